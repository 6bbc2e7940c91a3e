"""A run that was killed resumes exactly; a checkpoint that the code does not fit is refused."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import (
    EVERY_3,
    SHAPES_LR,
    Killed,
    assert_close_run,
    assert_equal_tensors,
    assert_same_run,
    command_line,
    edit_annotations,
    error_line,
    kill,
    load_checkpoint,
    read_files,
    read_log,
    read_losses,
    read_metrics,
    run,
    run_killed_at,
    saved_step,
    saved_weights,
)

import evaluate
import fcos
import train

# ---- after a crash -----------------------------------------------------------------------------


def test_a_killed_run_resumes_bit_for_bit(finished, shapes, tmp_path, capsys):
    argv = command_line(shapes, tmp_path, *EVERY_3)
    run_killed_at(5, argv)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 3, 4, 5]
    run(argv)
    assert "resumes after step 3 of 6" in capsys.readouterr().out
    assert_same_run(tmp_path, finished.out)


def test_a_killed_run_with_dropout_resumes_bit_for_bit(shapes, tmp_path, monkeypatch):
    head = fcos.Head.forward

    def forward(self, features):
        return head(self, [torch.nn.functional.dropout(x, 0.5, self.training) for x in features])

    monkeypatch.setattr(fcos.Head, "forward", forward)
    whole, killed = (command_line(shapes, tmp_path / name, *EVERY_3) for name in ("a", "b"))
    run(whole)
    run_killed_at(5, killed)
    run(killed)
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_a_resumed_run_may_use_other_micro_batches_and_workers(finished, shapes, tmp_path):
    argv = command_line(shapes, tmp_path, "--eval-every", 3, "--checkpoint-every", 2)
    run_killed_at(4, argv)
    run([*argv, "--accumulate", "2", "--workers", "1"])
    assert_close_run(tmp_path, finished.out)


def rewrite(name, change):
    """Return a function that changes the bytes of a file in the folder of a run."""

    def apply(out):
        (out / name).write_bytes(change((out / name).read_bytes()))

    return apply


def remove(name):
    return lambda out: (out / name).unlink()


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "overwritten": lambda content: b"\0" * 4096 + content[4096:],
}
CRASHES = [  # what happened to the folder of a finished run, and what the next start prints
    ("nothing", lambda out: None, "step 6 of 6"),
    ("last.pt missing, between two renames", remove("last.pt"), "step 3 of 6"),
    ("log missing", remove("log.jsonl"), "step 6 of 6"),
    ("log cut short", rewrite("log.jsonl", lambda content: content[:-9]), "step 6 of 6"),
]
for how, change in DAMAGE.items():
    text = "previous.pt takes its place"
    CRASHES.append((f"last.pt {how}", rewrite("last.pt", change), text))


@pytest.mark.parametrize(
    "crash, text", [case[1:] for case in CRASHES], ids=[case[0] for case in CRASHES]
)
def test_whatever_a_crash_leaves_resumes_bit_for_bit(
    finished_copy, finished, shapes, capsys, crash, text
):
    crash(finished_copy)
    run(command_line(shapes, finished_copy, *EVERY_3))
    output = capsys.readouterr().out
    assert text in output
    assert json.loads(output.splitlines()[-1]) == read_metrics(finished.out)
    assert_same_run(finished_copy, finished.out)


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_two_damaged_checkpoints_are_named_and_kept(finished_copy, shapes, capsys, change):
    for name in ("last.pt", "previous.pt"):
        rewrite(name, change)(finished_copy)
    before = read_files(finished_copy)
    line = error_line(capsys, command_line(shapes, finished_copy, *EVERY_3))
    for text in ("last.pt", "previous.pt", "--fresh"):
        assert text in line
    assert read_files(finished_copy) == before


# ---- --fresh -----------------------------------------------------------------------------------

FRESH = ["--seed", 1, "--iters", 4, "--checkpoint-every", 2]


def test_fresh_removes_the_old_run_at_its_first_checkpoint(finished_copy, shapes, capsys):
    before = read_files(finished_copy)
    argv = command_line(shapes, finished_copy, *FRESH)
    run_killed_at(1, [*argv, "--fresh"])
    assert read_files(finished_copy) == before
    run_killed_at(3, [*argv, "--fresh"])
    assert read_files(finished_copy).keys() == {"last.pt", "log.jsonl"}
    assert [row["step"] for row in read_log(finished_copy)] == [1, 2, 3]
    capsys.readouterr()
    run(argv)
    assert "resumes after step 2 of 4" in capsys.readouterr().out
    assert [row["step"] for row in read_losses(finished_copy)] == [1, 2, 3, 4]
    assert load_checkpoint(finished_copy)["settings"]["seed"] == 1
    assert read_metrics(finished_copy)["step"] == 4


@pytest.mark.parametrize("moment", range(6))
def test_fresh_killed_within_a_save_leaves_one_consistent_run(
    finished_copy, shapes, monkeypatch, moment
):
    """Die before one of the renames and removals of the first save. Log and checkpoint are both of
    the old run or, after the first rename, of the new one."""
    calls = itertools.count()

    def die_before(function):
        def call_or_die(*args, **keywords):
            if next(calls) == moment:
                kill()
            return function(*args, **keywords)

        return call_or_die

    save_checkpoint = train.RunFiles.checkpoint

    def checkpoint(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", die_before(Path.unlink))
            patch.setattr(os, "replace", die_before(os.replace))
            save_checkpoint(self, *args)

    argv = command_line(shapes, finished_copy, *FRESH)
    before = read_files(finished_copy)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.RunFiles, "checkpoint", checkpoint)
        run([*argv, "--fresh"])
    if moment == 0:
        assert read_files(finished_copy) == before
        return
    run(argv)
    assert [row["step"] for row in read_losses(finished_copy)] == [1, 2, 3, 4]
    assert load_checkpoint(finished_copy)["settings"]["seed"] == 1
    assert read_files(finished_copy).keys() == before.keys()


def test_fresh_resumes_only_a_checkpoint_of_its_own_launch(
    finished_copy, shapes, monkeypatch, capsys
):
    """torchrun restarts a run with the same flags: --fresh must not start over once more. The
    first start may have ended before it removed the old run."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setattr(evaluate, "start_process", lambda *_: (0, 1, torch.device("cpu")))
    argv = command_line(shapes, finished_copy, "--fresh", "--checkpoint-every", 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_killed_at(3, argv)
    assert saved_step(finished_copy) == 2  # the old run has six
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    run(argv)
    assert "resumes after step 2 of 6" in capsys.readouterr().out


# ---- other settings, code or data --------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, row, flags, differences",
    [
        (
            "shapes",
            {},
            ["--lr", 0.5, "--iters", 8],
            [f"lr {SHAPES_LR / 2} there, 0.5", "iters 6 there, 8"],
        ),
        ("shapes", dict(radius=2.5), [], ["radius 1.5 there, 2.5 here"]),
        ("shapes", dict(box_loss="iou"), [], ["box_loss giou there, iou here"]),
        ("another", {}, [], ["recipe shapes there, another here"]),
    ],
)
def test_a_run_of_other_settings_is_refused_with_every_difference(
    finished, shapes, monkeypatch, capsys, recipe, row, flags, differences
):
    monkeypatch.setitem(train.RECIPES, "another", train.RECIPES["shapes"])
    monkeypatch.setitem(fcos.MODELS, "shapes", fcos.MODELS["shapes"] | row)
    before = read_files(finished.out)
    argv = command_line(shapes, finished.out, *flags)
    argv[0] = recipe
    line = error_line(capsys, argv)
    for text in (str(finished.out), *differences, "--fresh"):
        assert text in line
    assert line.count(" there, ") >= len(differences)
    if not flags:
        assert line.count(" there, ") == 1
    assert f"--weights {finished.out}/last.pt to continue" in line
    assert read_files(finished.out) == before


def test_last_pt_may_be_the_initial_weights_of_another_run(finished, shapes, tmp_path):
    initial = finished.out / "last.pt"
    run(command_line(shapes, tmp_path, "--iters", 1, "--weights", initial))
    assert saved_step(tmp_path) == 1


def change_groups(change):
    """Return a patch of train.py that changes every group of parameters."""

    def patch(monkeypatch):
        parameter_groups = train.parameter_groups

        def changed_groups(*args):
            return [group | change(group) for group in parameter_groups(*args)]

        monkeypatch.setattr(train, "parameter_groups", changed_groups)

    return patch


def use_cosine(monkeypatch):
    def cosine(step, lr, iters, *_):
        return lr / 2 * (1 + np.cos(np.pi * step / iters).item())

    monkeypatch.setattr(train, "lr_at", cosine)


def use_adamw(monkeypatch):
    """Replace SGD by AdamW, with another learning rate for each part of the model."""

    def make_optimizer(model, settings):
        rates = {"backbone": 1e-5, "fpn": 1e-4, "head": 2e-4}
        groups = []
        for name, lr in rates.items():
            groups.append({"params": getattr(model, name).parameters(), "lr": lr})
        return torch.optim.AdamW(groups, weight_decay=0.05)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)


@pytest.mark.parametrize(
    "change, texts",
    [
        (change_groups(lambda group: {"lr": 0.1}), ["optimizer group 2", "initial_lr 0.1"]),
        (change_groups(lambda group: {"weight_decay": 0.5}), ["weight_decay 0.5"]),
        (change_groups(lambda group: {"params": group["params"][::-1]}), ["optimizer group 1"]),
        (use_cosine, ["learning rate from step 2 nothing there"]),
        (use_adamw, ["optimizer class SGD there, AdamW here"]),
    ],
    ids=["rates", "decay", "order", "schedule", "optimizer"],
)
def test_a_checkpoint_of_another_optimizer_is_refused(
    finished, shapes, monkeypatch, capsys, change, texts
):
    before = read_files(finished.out)
    change(monkeypatch)
    line = error_line(capsys, command_line(shapes, finished.out, *EVERY_3))
    for text in ("there, ", *texts):
        assert text in line
    assert read_files(finished.out) == before


def slow_biases(monkeypatch):
    """Halve the rate of the biases from step 2 on."""
    group_lr = train.group_lr

    def slower(step, group, settings):
        slow = step >= 2 and group["weight_decay"] == 0
        return group_lr(step, group, settings) / (2 if slow else 1)

    monkeypatch.setattr(train, "group_lr", slower)


def repeat_an_image(monkeypatch):
    aspect_groups = train.aspect_groups

    def repeated(*args):
        return [np.append(group, group[:1]) for group in aspect_groups(*args)]

    monkeypatch.setattr(train, "aspect_groups", repeated)


def change_pixels(monkeypatch):
    monkeypatch.setattr(fcos.ResNet, "convention", fcos.TORCH)


@pytest.mark.parametrize(
    "change, text",
    [
        (slow_biases, "optimizer group 2"),
        (repeat_an_image, "sampling"),
        (change_pixels, "convention mean"),
    ],
)
def test_a_checkpoint_of_other_code_is_refused(finished, shapes, monkeypatch, capsys, change, text):
    change(monkeypatch)
    line = error_line(capsys, command_line(shapes, finished.out, *EVERY_3))
    assert text in line
    assert "there, " in line


@pytest.mark.parametrize("change", [use_adamw, use_cosine])
def test_another_optimizer_or_schedule_is_printed_and_resumes_bit_for_bit(
    shapes, tmp_path, monkeypatch, capsys, change
):
    change(monkeypatch)
    killed = command_line(shapes, tmp_path / "killed", *EVERY_3)
    run_killed_at(4, killed)
    run(killed)
    capsys.readouterr()
    run(command_line(shapes, tmp_path / "whole", *EVERY_3))
    output = re.sub(" +", " ", capsys.readouterr().out)
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "whole")
    rates = [row["lr"] for row in read_losses(tmp_path / "whole")]
    if change is use_adamw:
        assert rates == pytest.approx([1e-5] * 4 + [1e-6, 1e-7])
        for text in (
            "optimizer class AdamW",
            "group 3",
            "weight_decay 0.05",
            "learning rate from step 1 1e-05",
            "from step 5 1",
        ):
            assert text in output
        assert "0.01" not in output.split("learning rate")[1]
    else:
        expected = [SHAPES_LR / 4 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
        assert rates == pytest.approx(expected)
        assert "learning rate from step 2 0.0093" in output
        assert "decays" not in output


def test_the_same_data_in_another_folder_resumes_and_changed_data_is_refused(
    half_finished, finished, shapes, tmp_path, monkeypatch, capsys
):
    elsewhere = shutil.copytree(shapes, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    run(command_line("elsewhere", half_finished, *EVERY_3))
    assert_equal_tensors(saved_weights(half_finished), saved_weights(finished.out))

    def narrow_first_box(content):
        content["annotations"][0]["bbox"][2] -= 1

    for split in ("val", "train"):
        edit_annotations(elsewhere, split, narrow_first_box)
        line = error_line(capsys, command_line(elsewhere, half_finished, *EVERY_3))
        assert f"{split}_data" in line
        assert line.count("sha256") >= 2


def test_a_run_of_a_renamed_model_row_resumes(half_finished, finished, shapes, monkeypatch):
    """The keywords count, and not the name of the row; they are all that its model needs."""
    monkeypatch.setitem(fcos.MODELS, "renamed", fcos.MODELS["shapes"])
    monkeypatch.delitem(fcos.MODELS, "shapes")
    monkeypatch.setitem(train.RECIPES["shapes"], "model", "renamed")
    run(command_line(shapes, half_finished, *EVERY_3))
    assert_equal_tensors(saved_weights(half_finished), saved_weights(finished.out))
    assert fcos.load(half_finished / "model.pt").keywords["radius"] == 1.5


def test_a_checkpoint_without_a_later_keyword_has_its_default(half_finished, shapes, capsys):
    content = load_checkpoint(half_finished, "previous.pt")
    for keywords in (content["settings"]["keywords"], content["model"]["keywords"]):
        keywords.pop("quality", None)  # as before fcos.py had it; both may be the same dict
    torch.save(content, half_finished / "previous.pt")
    argv = command_line(shapes, half_finished, *EVERY_3)
    line = error_line(capsys, [*argv, "--set", "quality=iou"])
    assert "quality centerness there, iou here" in line
    run(argv)
    assert "resumes after step 3 of 6" in capsys.readouterr().out


# ---- damaged and foreign checkpoints -----------------------------------------------------------


def set_momentum_shape(content):
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda content: content["optimizer"].update(state={}), "momentum_buffer"),
        (set_momentum_shape, "['state'][0]['momentum_buffer']"),
        (lambda content: content["optimizer"]["state"].popitem(), "['state']"),
        (lambda content: content.pop("optimizer"), "optimizer"),
    ],
    ids=["no momentum", "momentum of another shape", "a momentum too few", "no optimizer"],
)
def test_a_state_that_does_not_fit_is_refused(finished_copy, shapes, capsys, damage, text):
    content = load_checkpoint(finished_copy)
    damage(content)
    torch.save(content, finished_copy / "last.pt")
    before = read_files(finished_copy)
    line = error_line(capsys, command_line(shapes, finished_copy, *EVERY_3))
    assert "last.pt: cannot be resumed" in line
    assert text in line
    assert read_files(finished_copy) == before


@pytest.mark.parametrize("kind", ["model.pt", "a tensor", "settings that are a word"])
def test_a_file_that_is_no_checkpoint_of_train_py_is_named(
    finished, shapes, tmp_path, capsys, kind
):
    if kind == "model.pt":
        shutil.copy(finished.out / "model.pt", tmp_path / "last.pt")
    elif kind == "a tensor":
        torch.save(torch.zeros(2), tmp_path / "last.pt")
    else:
        torch.save({"settings": "mine"}, tmp_path / "last.pt")
    line = error_line(capsys, command_line(shapes, tmp_path))
    assert "last.pt: not a checkpoint of this trainer" in line


def test_a_folder_that_holds_something_else_is_named_and_left_alone(
    finished_copy, shapes, tmp_path, capsys
):
    file = tmp_path / "file"
    file.write_text("in the way")
    assert str(file) in error_line(capsys, command_line(shapes, file))
    assert file.read_text() == "in the way"

    model = finished_copy / "model.pt"
    before = read_files(finished_copy)
    line = error_line(capsys, command_line(shapes, finished_copy, "--fresh", "--weights", model))
    assert f"{model}: is an input" in line
    assert read_files(finished_copy) == before

    for name in ("last.pt", "previous.pt"):
        (finished_copy / name).unlink()
    before = read_files(finished_copy)
    line = error_line(capsys, command_line(shapes, finished_copy))
    assert "model.pt but no checkpoint" in line
    assert read_files(finished_copy) == before
