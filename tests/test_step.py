"""The model's start, the optimizer and its schedule, and the training step of train.py."""

import contextlib
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import (
    COCO,
    FakeDataset,
    Killed,
    assert_equal_tensors,
    assert_same_run,
    command_line,
    copy_data,
    edit_annotations,
    error_line,
    fork,
    kill,
    load_checkpoint,
    load_dataset,
    make_batches,
    poison,
    read_log,
    read_losses,
    read_metrics,
    run,
    run_killed_at,
    saved_weights,
    set_scores,
    wait,
)

import evaluate
import fcos
import train
from fcos import UserError

pytestmark = pytest.mark.usefixtures("no_process_left")


# ---- the model's start -------------------------------------------------------------------------


def make_crowds(content):
    for box in content["annotations"]:
        box["iscrowd"] = 1


def move_outside(content):
    for box in content["annotations"]:
        box["bbox"][:2] = 1000, 1000


@pytest.mark.parametrize(
    "change, text", [(make_crowds, "crowds"), (move_outside, "no area inside their image")]
)
def test_without_a_box_to_train_on_the_run_ends_with_the_reason(
    shapes, tmp_path, capsys, change, text
):
    data = copy_data(shapes, tmp_path / "data", "train", change)
    line = error_line(capsys, command_line(data, tmp_path / "run"))
    assert "image with a box to train on" in line
    assert text in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("outside", [False, True])
def test_without_validation_boxes_the_last_model_is_kept(shapes, tmp_path, capsys, outside):
    def remove(content):
        content["annotations"] = [
            box | {"bbox": [999, 999, 5, 5]} for box in content["annotations"] if outside
        ]

    data = copy_data(shapes, tmp_path / "data", "val", remove)
    run(command_line(data, tmp_path / "run", "--eval-every", 3))
    before_training, *_ = capsys.readouterr().out.split("optimizer")
    assert "has no boxes" in before_training
    assert read_metrics(tmp_path / "run")["step"] == 6
    assert read_metrics(tmp_path / "run")["AP"] == (0 if outside else -1)


def test_boxes_without_a_location_are_reported_with_a_remedy(shapes, tmp_path, capsys):
    def shrink_rectangles(content):
        for box in content["annotations"]:
            if box["category_id"] == 3:
                box["bbox"][2:] = 6, 6

    def start(data, *sizes):
        """Return what a run prints before its first step."""
        with pytest.raises(Killed):
            run(command_line(data, tmp_path / "run", *sizes))
        return capsys.readouterr().out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_network", lambda *_: kill())
        assert "warning" not in start(shapes)
        data = copy_data(shapes, tmp_path / "data", "train", shrink_rectangles)
        output = start(data)
        report = re.search(r"rectangle: boxes of (\d+) pixels .* (\d+)% of \d+ without", output)
        assert int(report[1]) <= 4
        assert int(report[2]) > 50
        words = r"warning: many boxes are too small .* (--min-size (\d+) --max-size (\d+))"
        remedy, min_size, max_size = re.search(words, output).groups()
        assert int(min_size) > 64
        assert int(max_size) > 96
        assert "warning" not in start(data, *remedy.split())


def test_outputs_without_a_loss_and_reserved_names_of_losses_are_refused(
    shapes, tmp_path, monkeypatch, capsys
):
    fcos_loss = fcos.fcos_loss
    argv = command_line(shapes, tmp_path / "run")
    monkeypatch.setattr(fcos, "fcos_loss", lambda *a, **k: {"cls": fcos_loss(*a, **k)["cls"]})
    assert "no loss depends on head.box_t" in error_line(capsys, argv)

    def loss_named_lr(*args, **keywords):
        losses = fcos_loss(*args, **keywords)
        return losses | {"lr": losses["cls"]}

    monkeypatch.setattr(fcos, "fcos_loss", loss_named_lr)
    assert "expected no name of" in error_line(capsys, argv)


def test_outputs_of_the_head_with_a_name_of_detections_are_refused(
    shapes, tmp_path, monkeypatch, capsys
):
    forward = fcos.Head.forward

    def with_score(self, features):
        outputs = forward(self, features)
        return outputs | {"score": outputs["ctr"]}

    monkeypatch.setattr(fcos.Head, "forward", with_score)
    line = error_line(capsys, command_line(shapes, tmp_path / "run"))
    assert "output 'score' of the head: expected another name" in line


class Teacher:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


@pytest.mark.parametrize("how", ["mean", "missing"])
def test_a_loss_that_fails_without_boxes_is_warned_of(shapes, tmp_path, monkeypatch, capsys, how):
    fcos_loss = fcos.fcos_loss

    def with_width(outputs, targets, *rest, **keywords):
        widths = outputs["ltrb"][targets["labels"] >= 0].sum(1)
        further = {"width": widths.mean()} if how == "mean" or len(widths) else {}
        return fcos_loss(outputs, targets, *rest, **keywords) | further

    monkeypatch.setattr(fcos, "fcos_loss", with_width)
    run(command_line(shapes, tmp_path / "run"))
    assert "warning: loss width is missing or not finite" in capsys.readouterr().out


def test_parameters_that_no_group_updates_are_refused(shapes, tmp_path, monkeypatch, capsys):
    def make_optimizer(model, settings):
        return torch.optim.AdamW(model.backbone.parameters())

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    line = error_line(capsys, command_line(shapes, tmp_path / "run"))
    assert "the optimizer has no group with fpn.lateral3.weight" in line


@pytest.mark.parametrize(
    "companions, text",
    [
        ({"teacher": Teacher({"rate": np.float64(1)})}, "companion 'teacher': its state holds a"),
        ({"optimizer": Teacher({})}, "companion 'optimizer': expected no name of"),
        ({"teacher": object()}, "companion 'teacher': expected methods update, state"),
        ({"ema": Teacher({})}, "companion 'ema': expected methods update, state"),
    ],
)
def test_companions_that_could_not_be_resumed_are_refused_before_training(
    shapes, tmp_path, monkeypatch, capsys, companions, text
):
    monkeypatch.setattr(Teacher, "update", lambda step: None, raising=False)
    monkeypatch.setattr(Teacher, "load_state_dict", lambda state: None, raising=False)
    monkeypatch.setattr(train, "make_companions", lambda *_: companions)
    assert text in error_line(capsys, command_line(shapes, tmp_path / "run"))


def test_oddities_of_the_data_are_reported(shapes, tmp_path, monkeypatch, capsys):
    """A class without a box; validation images that are copies of training images."""

    def drop_stars(content):
        boxes = content["annotations"]
        content["annotations"] = [box for box in boxes if box["category_id"] != 7]

    monkeypatch.setattr(train, "make_network", lambda *_: kill())
    data = copy_data(shapes, tmp_path / "data", "train", drop_stars)
    train_image = sorted((data / "train2017").iterdir())[0]
    val_image = sorted((data / "val2017").iterdir())[0]

    def copy_size(content):
        rows = {row["file_name"]: row for row in content["images"]}
        with Image.open(train_image) as image:
            rows[val_image.name] |= dict(width=image.width, height=image.height)

    shutil.copy(train_image, val_image)
    edit_annotations(data, "val", copy_size)
    with pytest.raises(Killed):
        run(command_line(data, tmp_path / "run"))
    output = capsys.readouterr().out
    assert "has no box of star" in output
    assert "1 of its images are in the training set" in output


class EmptyDataset(FakeDataset):
    """A data set of images without boxes."""

    def target(self, i):
        boxes, labels = super().target(i)
        return boxes[:0], labels[:0]


def test_sizes_are_reported_even_if_no_measured_image_has_a_box(capsys):
    """With --negatives, the images that are measured may all be without objects."""
    batches = make_batches(EmptyDataset([(64, 64)] * 3))
    train.report_sizes(fcos.build("shapes", 3), batches)
    assert "warning" not in capsys.readouterr().out


def test_a_warning_is_given_if_few_boxes_are_all_too_small(shapes, tmp_path, monkeypatch, capsys):
    def keep_one_box(content):
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0]["bbox"][2:] = 2, 2

    monkeypatch.setattr(train, "make_network", lambda *_: kill())
    data = copy_data(shapes, tmp_path / "data", "train", keep_one_box)
    with pytest.raises(Killed):
        run(command_line(data, tmp_path / "run"))
    assert "warning: many boxes are too small" in capsys.readouterr().out


# ---- torch.compile -----------------------------------------------------------------------------


class OneConvolution(torch.nn.Module):
    """A network that torch.compile compiles in no time."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 1, 3)

    def forward(self, images, sizes):
        return self.convolution(images.float()) + sizes.sum()


def compile_many_sizes():
    """Compile more sizes than the eight after which torch.compile gives up by default."""
    train.Graphs.backend = "eager"
    torch._dynamo.config.recompile_limit = 8
    torch._dynamo.config.accumulated_recompile_limit = 8
    batches = make_batches(COCO, min_size=[96, 128], max_size=208, batch_size=1, iters=60)
    plans = [batches.plan(step) for step in range(60)]
    sizes = list(dict.fromkeys(plan.padded_hw for plan in plans))
    assert len(sizes) > 8
    model = OneConvolution()
    graphs = train.compile_model(model, batches)
    order = sizes + sizes
    for height, width in order:
        images = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        model(images, torch.tensor([[height, width]]))
    assert graphs.counts(len(order)) == {"graphs": len(sizes), "eager_passes": 0}
    # one more pass, which used no graph
    assert graphs.counts(len(order) + 1) == {"graphs": len(sizes), "eager_passes": 1}


def test_every_padded_size_gets_a_graph_of_its_own():
    """In a fork, since autograd refuses to work in forks of a process that used torch.compile."""
    code, output = wait(fork(compile_many_sizes))
    assert code == 0, output


def test_a_compiled_run_uses_one_graph_for_each_size_and_logs_it(shapes, tmp_path):
    def compile_and_run():
        train.Graphs.backend = "eager"
        flags = ["--compile", "--iters", 3, "--set", "levels=(4,5)", "ranges=(64,)"]
        run(command_line(shapes, tmp_path, *flags))

    code, output = wait(fork(compile_and_run))
    assert code == 0, output
    assert load_checkpoint(tmp_path)["settings"]["multiple"] == 128
    last = read_losses(tmp_path)[-1]
    assert last["eager_passes"] == 0
    assert 1 <= last["graphs"] <= 2, "expected a graph for each aspect group"


# ---- optimization ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, rates",
    [
        ("fcos_imprv_R_50_FPN_1x", {0: 1 / 300, 499: 1 / 300, 500: 0.01, 59_999: 0.01}),
        ("fcos_imprv_R_50_FPN_1x", {60_000: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 89_999: 1e-4}),
        ("fcos_R_101_FPN_2x", {119_999: 0.01, 120_000: 1e-3, 159_999: 1e-3, 160_000: 1e-4}),
    ],
)
def test_the_learning_rate_is_the_published_one(recipe, rates):
    settings = train.resolve(train.parse_args([recipe]))
    arguments = [settings[name] for name in ("lr", "iters", "warmup", "decays")]
    assert {step: train.lr_at(step, *arguments) for step in rates} == pytest.approx(rates)


def test_biases_have_twice_the_learning_rate_and_no_weight_decay():
    model = fcos.build("fcos_R_50_FPN")
    groups = train.parameter_groups(model, 0.1)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    trained = 0
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("backbone.stem", "backbone.res2"))
        assert parameter.requires_grad != frozen, name
        assert (id(parameter) in group_of) != frozen, name
        if frozen:
            continue
        group = group_of[id(parameter)]
        is_bias = "bias" in name
        assert group["lr"] == (0.2 if is_bias else 0.1), name
        assert group["weight_decay"] == (0 if is_bias else 1e-4), name
        trained += parameter.numel()
    assert trained == 32_021_850, "the official model trains another number of weights"


def test_the_moving_average_is_evaluated_saved_and_resumed(shapes, tmp_path, monkeypatch):
    """Its decay grows from 0: in step k, counted from 0, it is at most k / (9 + k)."""
    states = []
    save_checkpoint = train.RunFiles.checkpoint

    def note_and_save(self, step, settings, model, *rest):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        save_checkpoint(self, step, settings, model, *rest)

    evaluated = set_scores(monkeypatch, [0.1, 0.2])
    flags = ["--ema", 0.3, "--eval-every", 3, "--checkpoint-every", 1]
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(train.RunFiles, "checkpoint", note_and_save)
        run(command_line(shapes, whole, *flags))
    averages = [states[0]]
    for k in range(1, 6):
        decay = min(0.3, k / (9 + k))
        average = {}
        for name, value in states[k].items():
            average[name] = decay * averages[-1][name] + (1 - decay) * value
        averages.append(average)
    for step, ap in (3, 0.1), (6, 0.2):
        torch.testing.assert_close(evaluated[ap], averages[step - 1], rtol=1e-5, atol=1e-6)
        bias = states[step - 1]["head.cls.bias"]
        assert not torch.allclose(evaluated[ap]["head.cls.bias"], bias, rtol=1e-5, atol=1e-6)
    assert_equal_tensors(saved_weights(whole, "model.pt"), evaluated[0.2])
    killed = command_line(shapes, tmp_path / "killed", *flags)
    run_killed_at(4, killed)
    run(killed)
    assert_same_run(tmp_path / "killed", whole)


LOSSES = {20: [0.477, 0.541, 0.670], 40: [0.435, 0.515, 0.660]}  # step: cls, box, ctr


def test_forty_steps_train_as_they_did(tmp_path):
    """Compare with losses of 2026-11-30. A change of how FCOS learns, by mistake or not, shows
    here; initial weights that differ by 1e-6 move these losses by 3 % at most."""
    train.make_shapes(tmp_path / "data", train=64, val=1)
    flags = ["--iters", 40, "--batch-size", 8, "--min-size", 96, "--max-size", 128]
    run(command_line(tmp_path / "data", tmp_path / "run", *flags))
    rows = {row["step"]: row for row in read_losses(tmp_path / "run")}
    for step, expected in LOSSES.items():
        found = [rows[step][name] for name in ("cls", "box", "ctr")]
        assert found == pytest.approx(expected, rel=0.07), f"step {step}: {found}"


# ---- the step ----------------------------------------------------------------------------------


def test_bf16_leaves_the_weights_in_float32(shapes, tmp_path):
    # At this size P7 has more than one cell. For a single one, PyTorch's bf16 convolution on the
    # CPU reads uninitialised memory in its backward pass (2.15).
    size = ["--min-size", 160, "--max-size", 224]
    run(command_line(shapes, tmp_path, "--iters", 2, "--precision", "bf16", *size))
    assert {value.dtype for value in saved_weights(tmp_path).values()} == {torch.float32}
    assert all(np.isfinite(row["loss"]) for row in read_losses(tmp_path))


@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_is_never_saved(
    shapes, tmp_path, monkeypatch, gradient_only
):
    poison(4, monkeypatch, gradient_only)
    with pytest.raises(UserError) as stop:
        run(command_line(shapes, tmp_path, "--iters", 5, "--checkpoint-every", 2))
    checkpoint = load_checkpoint(tmp_path)
    dataset = load_dataset(shapes)
    plan = train.TrainBatches(dataset, checkpoint["settings"]).plan(4)
    for text in ("step 5 ", str(dataset.image_ids[plan.indices].tolist()), "last.pt"):
        assert text in str(stop.value)
    assert checkpoint["step"] == 4
    assert all(value.isfinite().all() for value in saved_weights(tmp_path).values())
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "flags", ["--accumulate 2 --batch-size 2 --ema 0.9 --workers 1", "--set quality=iou"]
)
def test_between_rows_of_the_log_no_number_is_read_from_the_device(
    shapes, tmp_path, monkeypatch, flags
):
    """Tensors of the meta device hold no numbers: reading one, or a shape that depends on one, is
    an error. The first row of 200 steps is logged after the second."""
    steps = []
    update = train.update

    def note_and_update(step, *rest):
        steps.append(step)
        update(step, *rest)

    monkeypatch.setattr(train, "update", note_and_update)
    monkeypatch.setattr(evaluate, "start_process", lambda *_: (0, 1, torch.device("meta")))
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())  # knows no meta
    monkeypatch.setattr(train, "report_sizes", lambda *_: None)  # reads, but before training
    monkeypatch.setattr(train, "check_normalization", lambda *_: None)  # likewise
    monkeypatch.setattr(train, "check_empty_batch", lambda *_: None)
    argv = command_line(shapes, tmp_path, "--iters", 200, *flags.split())
    few_levels = ["--set", "levels=(4,5)", "ranges=(64,)"]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        run([*argv, *few_levels])
    assert steps == [0, 1]
    assert read_log(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_between_rows_of_the_log_nothing_waits_for_the_gpu(shapes, tmp_path, monkeypatch):
    """Of 400 steps every fourth is logged; waiting in the three between is an error."""
    update = train.update

    def watch_and_update(step, *rest):
        torch.cuda.set_sync_debug_mode("default" if step % 4 == 3 else "error")
        if step == 12:
            kill()
        update(step, *rest)

    monkeypatch.setattr(train, "update", watch_and_update)
    flags = ["--device", "cuda", "--iters", 400, "--accumulate", 2, "--ema", 0.9]
    try:
        with pytest.raises(Killed):
            run(command_line(shapes, tmp_path, *flags))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row["step"] for row in read_log(tmp_path)] == [4, 8, 12]
