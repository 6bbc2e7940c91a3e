"""train.py: the shapes data set, batches, the schedule, resuming, and any number of processes."""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import fcos
import train
from fcos import UserError

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
RATE = train.RECIPES["shapes"]["lr"]  # for 16 images a step; a quarter of it for 4
SMALL = dict(stem=16, channels=64)  # what is made of the row `shapes` here, for speed


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A shapes data set of 24 pictures to train on and 4 to validate."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    train.make_shapes(root, train=24, val=4)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks here are too small for more; and processes under torchrun have one as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(fcos.MODELS, "shapes", fcos.MODELS["shapes"] | SMALL)


def flags(data, out, *more):
    """The command line of a small run of six steps; flags in `more` come last and win."""
    return ["shapes", "--data", str(data), "--out", str(out), "--iters", "6", "--batch-size", "4",
            "--min-size", "64", "--max-size", "96", "--workers", "0", "--device", "cpu",
            *map(str, more)]  # fmt: skip


def call(argv):
    train.main(train.parse_args(argv))


def log(out, *leave_out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in leave_out} for row in rows]


def weights(out, file="last.pt"):
    content = torch.load(Path(out) / file, weights_only=True)
    return content["model"]["model"] if file == "last.pt" else content["model"]


def assert_same_run(a, b):
    """Bit for bit: model, optimizer, model.pt, metrics, and the log but for the speed."""
    a, b = Path(a), Path(b)
    one, other = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    assert one["settings"] == other["settings"] and one["step"] == other["step"]
    buffers = [content["optimizer"]["state"] for content in (one, other)]
    assert buffers[0].keys() == buffers[1].keys() and buffers[0]
    for k in buffers[0]:
        assert torch.equal(buffers[0][k]["momentum_buffer"], buffers[1][k]["momentum_buffer"])
    for file in ("last.pt", "model.pt"):
        for (name, x), y in zip(weights(a, file).items(), weights(b, file).values(), strict=True):
            assert torch.equal(x, y), name
    assert log(a, "images_per_second") == log(b, "images_per_second")
    assert (a / "metrics.json").read_text() == (b / "metrics.json").read_text()


def assert_close_run(a, b, tolerance=1e-5):
    """The same training but for the rounding of sums."""
    torch.testing.assert_close(weights(a), weights(b), rtol=tolerance, atol=tolerance)
    rows = [[row for row in log(out) if "loss" in row] for out in (a, b)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for one, other in zip(*rows):
        for key in ("loss", "cls", "box", "ctr", "lr"):
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


# ---- the shapes data set -----------------------------------------------------------------------


def files(root):
    return {str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}  # fmt: skip


def test_shapes_are_a_function_of_seed_split_and_number(tmp_path, shapes):
    train.make_shapes(tmp_path / "again", train=24, val=4)
    assert files(tmp_path / "again") == files(shapes)
    train.make_shapes(tmp_path / "fewer", train=2, val=5)
    for name, content in files(tmp_path / "fewer").items():
        if name.endswith(".jpg") and name in files(shapes):
            assert content == files(shapes)[name]
    train.make_shapes(tmp_path / "other", seed=1, train=2, val=1)
    first = "train2017/000000000001.jpg"
    assert (tmp_path / "other" / first).read_bytes() != (shapes / first).read_bytes()


def test_shapes_are_a_coco_data_set(shapes, capsys):
    from pycocotools.coco import COCO

    ids = []
    for split, count in ("train", 24), ("val", 4):
        path, folder = evaluate.coco_paths(shapes, f"{split}2017")
        coco = COCO(str(path))
        assert len(coco.imgs) == count == len(list(folder.glob("*.jpg")))
        ids += coco.imgs
        categories = sorted(coco.getCatIds())
        assert len(categories) >= 3 and categories != list(range(1, len(categories) + 1))
        for image in coco.imgs.values():
            with Image.open(folder / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.format == "JPEG" and picture.mode == "RGB"
        for annotation in coco.anns.values():
            x, y, w, h = annotation["bbox"]
            image = coco.imgs[annotation["image_id"]]
            assert 0 <= x and 0 <= y and x + w <= image["width"] and y + h <= image["height"]
            assert min(w, h) >= 8 and 0.1 * w * h < annotation["area"] <= w * h
            assert annotation["iscrowd"] == 0 and annotation["category_id"] in categories
        dataset = evaluate.CocoDataset(path, folder)
        assert dataset.notes == [] and dataset.trainable.all()
    assert len(set(ids)) == 28


def test_the_box_of_a_shape_is_tight_around_what_is_seen_of_it(monkeypatch):
    """One bright object on black: what is not black is the object (and JPEG is not involved)."""

    def black(rng, w, h):
        return np.zeros((h, w, 3), np.float32), np.full((1, 3), 230, np.float32)

    monkeypatch.setattr(train, "_background", black)
    seen, distances = set(), []
    for seed in range(60):
        picture, objects = train._scene(np.random.default_rng(seed))
        if objects:
            ys, xs = np.nonzero(picture.min(2) > 40)
            x, y, w, h = objects[0]["bbox"]
            distances.append(np.subtract([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1],
                                         [x, y, x + w, y + h]))  # fmt: skip
            seen.add(objects[0]["category_id"])
    assert len(distances) > 30 and seen == set(train.SHAPES)
    assert np.abs(distances).max() < 2.5, "the thin tips of stars are nearly black"
    assert np.abs(distances).mean() < 0.5


def test_a_folder_that_is_in_use_is_not_drawn_over(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(OSError):
        train.make_shapes(tmp_path / "mine", train=1, val=1)
    assert files(tmp_path) == {"mine/photo.jpg": b"precious"}


# ---- batches -----------------------------------------------------------------------------------


class Fake:
    """A data set of given (height, width) with a box an image; pixels tell their row and column."""

    def __init__(self, hw, trainable=None):
        self.hw = np.array(hw)
        self.trainable = np.ones(len(hw), bool) if trainable is None else np.array(trainable)

    def __len__(self):
        return len(self.hw)

    def image(self, i):
        h, w = self.hw[i]
        image = torch.zeros(3, h, w, dtype=torch.uint8)
        image[0], image[1] = int(i), torch.arange(w) % 256
        return image

    def target(self, i):
        h, w = self.hw[i].tolist()
        return torch.tensor([[1.0, 2, w / 2, h]]), torch.tensor([int(i)])


MIXED = Fake([(40, 60), (60, 40), (50, 50), (30, 60), (45, 61), (64, 32), (33, 64)])


def batches(dataset=MIXED, rank=0, world=1, parts=1, **settings):
    defaults = dict(seed=0, batch_size=4, min_size=[32, 48, 64], max_size=96, iters=30)
    return train.TrainBatches(dataset, defaults | settings, rank, world, parts)


def shown(item):
    """The multiset of (row, size, flipped) of an item, from its pixels."""
    images, sizes, _, labels, counts = item
    assert len(images) == len(sizes) == len(counts) and sum(counts) == len(labels)
    rows = [label[0].item() for label in labels.split(counts)]
    seen = []
    for image, (h, w), row in zip(images, sizes.tolist(), rows):
        assert image[0, :h, :w].unique().tolist() == [row]
        assert image[:, h:].sum() == 0 and image[:, :, w:].sum() == 0
        seen.append((row, h, w, bool(image[1, 0, 0] > image[1, 0, w - 1])))
    return seen


@pytest.mark.parametrize("world, parts", [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (3, 1)])
def test_a_step_is_the_same_however_it_is_divided(world, parts):
    whole = batches()
    shares = [batches(rank=rank, world=world, parts=parts) for rank in range(world)]
    for step in range(10):
        expected = whole[step]
        items = [share[step * parts + part] for share in shares for part in range(parts)]
        assert sorted(sum(map(shown, items), [])) == sorted(shown(expected))
        assert {item[0].shape[2:] for item in items} == {expected[0].shape[2:]}
        assert all(len(item[0]) >= 4 // (world * parts) for item in items)
    assert len(shares[0]) == 30 * parts


def test_a_step_depends_on_the_seed_and_nothing_before_it():
    def plans(**settings):
        made = batches(**settings)
        return [str(made.plan(step)) for step in range(30)]

    assert plans() == plans()
    backwards = batches()
    assert [str(backwards.plan(step)) for step in reversed(range(30))] == plans()[::-1]
    assert plans(seed=1) != plans()


def test_more_steps_begin_like_fewer():
    short, long = batches(iters=20), batches(iters=50)
    for step in range(20):
        assert str(short.plan(step)) == str(long.plan(step))


def test_every_epoch_of_a_group_is_a_permutation_of_it():
    made = batches(iters=200)
    drawn = {0: [], 1: []}
    for step in range(200):
        drawn[made.group[step]] += made.plan(step)[0]
    upright = [1, 2, 5]  # the official bins: height >= width
    for group, members in (1, upright), (0, [0, 3, 4, 6]):
        rows, n = drawn[group], len(members)
        epochs = [rows[k : k + n] for k in range(0, len(rows) - n + 1, n)]
        assert all(sorted(epoch) == members for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 2  # and not always the same
    assert len(drawn[1]) / (len(drawn[0]) + len(drawn[1])) == pytest.approx(3 / 7, abs=0.1)


def test_a_step_is_of_one_aspect_and_never_short():
    made = batches(iters=40, batch_size=6)
    for step in range(40):
        rows, sizes, flips, padded = made.plan(step)
        assert len(rows) == len(sizes) == len(flips) == 6
        assert len({h >= w for h, w in MIXED.hw[rows]}) == 1
        assert padded == fcos.padded_hw(sizes)


@pytest.mark.parametrize("hw", [[(40, 60)], [(60, 40)] * 3, [(50, 50), (60, 40)], [(40, 60)] * 5])
def test_few_images_and_one_aspect_fill_any_batch(hw):
    made = batches(Fake(hw), batch_size=16, iters=5)
    assert all(len(made[step][0]) == 16 for step in range(5))
    rows = sum((made.plan(step)[0] for step in range(5)), [])
    assert np.ptp(np.bincount(rows, minlength=len(hw))) <= 1  # all equally often


def test_images_without_boxes_to_learn_are_never_drawn():
    dataset = Fake([(40, 60)] * 4, trainable=[True, False, True, False])
    made = batches(dataset)
    assert set(itertools.chain(*(made.plan(step)[0] for step in range(10)))) == {0, 2}


def test_all_sizes_and_both_flips_are_drawn():
    made = batches(iters=50)
    sizes, flips = [], []
    for step in range(50):
        _, size, flip, _ = made.plan(step)
        sizes += [min(hw) for hw in size]
        flips += flip.tolist()
    assert set(sizes) >= {32, 48} and 0.35 < np.mean(flips) < 0.65
    assert [fcos.resized_hw(40, 60, size, 96) for size in (32, 48)] == [(32, 48), (48, 72)]


def test_boxes_follow_their_pixels_through_resize_and_flip():
    made, seen = batches(iters=20), set()
    for step in range(20):
        rows, sizes, flips, _ = made.plan(step)
        _, _, boxes, labels, counts = made[step]
        assert counts == [1] * 4 and labels.tolist() == rows
        for box, row, (h, w), flip in zip(boxes, rows, sizes, flips):
            old_h, old_w = MIXED.hw[row]
            x1, y1, x2, y2 = 1 / old_w * w, 2 / old_h * h, w / 2, h
            if flip:
                x1, x2 = w - x2, w - x1
            assert box.tolist() == pytest.approx([x1, y1, x2, y2], abs=1e-4)
            seen.add(bool(flip))
    assert seen == {True, False}


def test_a_flip_mirrors_pixels_and_boxes_exactly():
    dataset = Fake([(32, 64)])
    made = batches(dataset, min_size=[32], max_size=64, iters=10, batch_size=2)
    for step in range(10):
        images, _, boxes, _, _ = made[step]
        for image, box, flip in zip(images, boxes, made.plan(step)[2]):
            columns = image[1, 0].tolist()
            assert columns == (list(range(64))[::-1] if flip else list(range(64)))
            assert box.tolist() == ([32, 2, 63, 32] if flip else [1, 2, 32, 32])


def test_images_without_a_single_box_are_ordinary():
    dataset = Fake([(32, 64)])
    dataset.target = lambda i: (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    images, sizes, boxes, labels, counts = batches(dataset)[0]
    assert boxes.shape == (0, 4) and labels.shape == (0,) and counts == [0] * 4


def test_the_number_of_workers_changes_nothing(shapes):
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    made = batches(dataset, iters=4)
    loaders = [torch.utils.data.DataLoader(made, batch_size=None, num_workers=n) for n in (0, 2)]
    for one, other in zip(*loaders, strict=True):
        assert one[4] == other[4]
        for a, b in zip(one[:4], other[:4]):
            assert a.dtype == b.dtype and torch.equal(a, b)


# ---- schedule and settings ---------------------------------------------------------------------


def test_the_learning_rate_is_the_published_one():
    def lr_at(step, recipe):
        recipe = train.RECIPES[recipe]
        return train.lr_at(step, recipe["lr"], recipe["iters"], recipe["warmup"])

    steps = {0: 1 / 300, 499: 1 / 300, 500: 0.01, 59_999: 0.01, 60_000: 0.001, 79_999: 0.001,
             80_000: 0.0001, 89_999: 0.0001}  # fmt: skip
    for step, lr in steps.items():
        assert lr_at(step, "fcos_imprv_R_50_FPN_1x") == pytest.approx(lr)
    for step, lr in {119_999: 0.01, 120_000: 0.001, 159_999: 0.001, 160_000: 0.0001}.items():
        assert lr_at(step, "fcos_R_101_FPN_2x") == pytest.approx(lr)


def test_the_recipes_are_the_published_ones():
    for name, recipe in train.RECIPES.items():
        assert recipe["model"] in fcos.MODELS
        if name != "shapes":
            assert (recipe["batch_size"], recipe["lr"], recipe["max_size"]) == (16, 0.01, 1333)
            twice = name.endswith("2x")
            assert recipe["iters"] == (180_000 if twice else 90_000)
            assert recipe["min_size"] == (list(range(640, 801)) if twice else [800])


def test_biases_learn_twice_as_fast_and_do_not_decay():
    model = fcos.build("fcos_R_50_FPN")
    group_of = {id(p): group for group in train.parameter_groups(model) for p in group["params"]}
    kinds = {}
    for name, p in model.named_parameters():
        frozen = name.startswith(("backbone.stem", "backbone.res2"))
        assert (id(p) in group_of) == p.requires_grad == (not frozen), name
        if not frozen:
            group = group_of[id(p)]
            assert group["rate"] == (2 if "bias" in name else 1), name
            assert group["weight_decay"] == (0 if "bias" in name else 1e-4), name
            kinds["bias" in name] = kinds.get("bias" in name, 0) + p.numel()
    assert sum(kinds.values()) == 32_021_850  # what the official model trains


def settings(*argv):
    return train.resolve(train.parse_args([*argv]))


def test_flags_beat_the_recipe_and_the_rate_follows_the_batch():
    assert settings()["recipe"] == "fcos_imprv_R_50_FPN_1x"
    assert settings()["train_annotations"] == "data/coco/annotations/instances_train2017.json"
    assert settings("shapes")["val_images"] == "data/shapes/val2017"
    assert settings("shapes", "--data", "here")["val_images"] == "here/val2017"
    assert settings("--batch-size", "4")["lr"] == pytest.approx(0.0025)
    assert settings("--batch-size", "4", "--lr", "0.3")["lr"] == 0.3
    given = settings(*"--iters 7 --min-size 5 6 --max-size 9 --weights w.pkl --seed 3 "
                     "--precision bf16".split())  # fmt: skip
    expected = dict(iters=7, min_size=[5, 6], max_size=9, weights="w.pkl", seed=3, precision="bf16",
                    model="fcos_imprv_R_50_FPN", warmup=500, lr=0.01)  # fmt: skip
    assert {key: given[key] for key in expected} == expected
    before = json.dumps(train.RECIPES)
    settings("--min-size", "1", "--iters", "1")
    assert json.dumps(train.RECIPES) == before


def test_own_data_comes_by_four_paths():
    paths = ["--train-images", "--train-annotations", "--val-images", "--val-annotations"]
    own = settings(*itertools.chain(*((flag, flag[2:]) for flag in paths)))
    assert [own[flag[2:].replace("-", "_")] for flag in paths] == [flag[2:] for flag in paths]
    with pytest.raises(UserError, match="all of --train-images, --train-annotations"):
        settings("--train-images", "there")


# ---- a run and its files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A finished run of six steps, evaluated after three and at the end -> folder, stdout"""
    out, stdout = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setitem(fcos.MODELS, "shapes", fcos.MODELS["shapes"] | SMALL)
        call(flags(shapes, out, "--eval-every", 3, "--checkpoint-every", 3))
    return SimpleNamespace(out=out, stdout=stdout.getvalue().splitlines())


def test_a_run_leaves_four_files_and_its_metrics_as_the_last_line(finished, shapes, small):
    assert sorted(path.name for path in finished.out.iterdir()) == [
        "last.pt", "log.jsonl", "metrics.json", "model.pt"]  # fmt: skip
    metrics = json.loads((finished.out / "metrics.json").read_text())
    assert list(metrics) == list(evaluate.METRICS)
    assert json.loads(finished.stdout[-1]) == metrics

    rows = log(finished.out)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    losses = [row for row in rows if "loss" in row]
    warmup = train.RECIPES["shapes"]["warmup"]
    for row in losses:
        assert row["loss"] == pytest.approx(row["cls"] + row["box"] + row["ctr"])
        assert row["lr"] == train.lr_at(row["step"] - 1, RATE / 4, 6, warmup)
        assert row["images_per_second"] > 0
    assert [row["AP"] for row in rows if "AP" in row][-1] == metrics["AP"]

    checkpoint = torch.load(finished.out / "last.pt", weights_only=True)
    assert checkpoint["step"] == 6 and checkpoint["settings"]["lr"] == RATE / 4
    model = fcos.load(finished.out / "model.pt")
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "val2017"))
    assert (model.classes, model.category_ids) == (dataset.classes, dataset.category_ids)
    assert model.test_size == (64, 96) and not model.convention["inclusive"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["model"]["model"][name])


def test_the_settings_are_printed_with_the_rate_before_and_after_scaling(finished):
    text = "\n".join(finished.stdout)
    for line in ("iters              6", "batch_size         4", f"lr                 {RATE / 4}"):
        assert line in text
    assert any(f"{RATE:g}" in line and f"{RATE / 4:g}" in line for line in finished.stdout)


def test_training_learns_something(shapes, small, tmp_path):
    call(flags(shapes, tmp_path, "--iters", "25", "--lr", "0.02"))
    rows = [row["loss"] for row in log(tmp_path) if "loss" in row]
    assert np.mean(rows[-3:]) < np.mean(rows[:3]) - 0.2


def test_bf16_is_for_the_network_and_the_weights_stay_float32(shapes, small, tmp_path):
    call(flags(shapes, tmp_path, "--iters", 2, "--precision", "bf16"))
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    assert all(np.isfinite(row["loss"]) for row in log(tmp_path) if "loss" in row)


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    """Let the next run die in the middle of a step, counted from 0."""
    lr_at = train.lr_at

    def dying(now, *rest):
        if now == step:
            monkeypatch.setattr(train, "lr_at", lr_at)
            raise Killed
        return lr_at(now, *rest)

    monkeypatch.setattr(train, "lr_at", dying)


def test_a_killed_run_goes_on_bit_for_bit(finished, shapes, small, tmp_path, monkeypatch, capsys):
    argv = flags(shapes, tmp_path, "--eval-every", 3, "--checkpoint-every", 3)
    killed_at(monkeypatch, 5)
    with pytest.raises(Killed):
        call(argv)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 3, 4, 5]
    assert not (tmp_path / "metrics.json").exists()
    call(argv)
    assert "after step 3 of 6" in capsys.readouterr().out
    assert_same_run(tmp_path, finished.out)


def test_resuming_takes_another_number_of_parts_and_workers(
    finished, shapes, small, tmp_path, monkeypatch
):
    argv = flags(shapes, tmp_path, "--eval-every", 3, "--checkpoint-every", 2)
    killed_at(monkeypatch, 4)
    with pytest.raises(Killed):
        call(argv)
    call([*argv, "--accumulate", "2", "--workers", "1"])
    assert_close_run(tmp_path, finished.out)


def test_a_finished_run_called_again_changes_nothing(finished, shapes, small, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    call(flags(shapes, out, "--eval-every", 3, "--checkpoint-every", 3))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    assert_same_run(out, finished.out)
    assert log(out) == log(finished.out)


def test_fresh_starts_over(finished, shapes, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    argv = flags(shapes, out, "--seed", "1", "--iters", "4")
    killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        call([*argv, "--fresh"])
    assert [row["step"] for row in log(out)] == [1, 2]
    call(argv)  # the killed run had no checkpoint yet: it begins again, and not from the older run
    assert "going on" not in capsys.readouterr().out
    assert [row["step"] for row in log(out) if "loss" in row] == [1, 2, 3, 4]
    assert torch.load(out / "last.pt", weights_only=True)["settings"]["seed"] == 1


@pytest.mark.parametrize("lost", ["the log", "its last line"])
def test_a_log_that_is_lost_or_torn_does_not_stop_a_run(finished, shapes, small, tmp_path, lost):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    if lost == "the log":
        (out / "log.jsonl").unlink()
    else:
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 6, "AP"')
    call(flags(shapes, out))
    assert json.loads((out / "metrics.json").read_text()) == json.loads(
        (finished.out / "metrics.json").read_text())  # fmt: skip
    log(out)


def test_accumulation_is_the_same_training(finished, shapes, small, tmp_path):
    call(flags(shapes, tmp_path, "--accumulate", 2, "--eval-every", 3, "--checkpoint-every", 3))
    assert_close_run(tmp_path, finished.out)


# ---- mistakes ----------------------------------------------------------------------------------


def mistake(capsys, argv):
    """-> exit code and lines on stderr of a call of the script"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.run(train.main, train.parse_args([*map(str, argv)]))
    err = capsys.readouterr().err.replace("\r", "\n")
    return stop.value.code, [line for line in err.splitlines() if line.strip() and "%|" not in line]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, shapes):
    """Data sets and weights with one mistake each."""
    tmp = tmp_path_factory.mktemp("wrong")

    def variant(name, change):
        shutil.copytree(shapes, tmp / name)
        change(tmp / name)

    def edit(root, split="train", **changes):
        path, _ = evaluate.coco_paths(root, f"{split}2017")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def categories(*names):
        return [dict(id=k, name=name) for k, name in zip(train.SHAPES, names)]

    variant("no_json", lambda root: (root / "annotations" / "instances_train2017.json").unlink())
    variant("no_val", lambda root: shutil.rmtree(root / "val2017"))
    variant("no_images", lambda root: shutil.rmtree(root / "train2017"))
    variant("one_gone", lambda root: (root / "val2017" / "000001000002.jpg").unlink())
    variant("not_coco", lambda root: edit(root, images=None))
    variant("no_boxes", lambda root: edit(root, annotations=[]))
    variant("other_classes", lambda root: edit(root, "val", categories=categories(*"abcdef")))
    (tmp / "junk.pkl").write_bytes(b"junk")
    torch.save({"settings": SimpleNamespace(lr=1)}, tmp / "namespace.pt")
    (tmp / "file").write_text("in the way")
    return tmp


MISTAKES = {
    "unknown recipe": ("fcos_R_51 --data {data}", "fcos_R_50_FPN_1x"),
    "no COCO": ("fcos_R_50_FPN_1x --data {tmp}/coco --weights none", "train.py shapes"),
    "no such data": ("shapes --data {tmp}/nowhere", "nowhere"),
    "no annotations": ("shapes --data {tmp}/no_json", "instances_train2017.json"),
    "no images": ("shapes --data {tmp}/no_images", "train2017"),
    "no validation images": ("shapes --data {tmp}/no_val", "val2017"),
    "an image missing": ("shapes --data {tmp}/one_gone", "000001000002.jpg"),
    "not COCO": ("shapes --data {tmp}/not_coco", "'images'"),
    "no boxes": ("shapes --data {tmp}/no_boxes", "no image with a box"),
    "other classes": ("shapes --data {tmp}/other_classes", "'a'"),
    "one path of four": ("shapes --train-images {data}", "--val-annotations"),
    "no such weights": ("shapes --data {data} --weights none.pkl", "none.pkl"),
    "no ImageNet weights": ("fcos_R_50_FPN_1x --data {data}", "R-50.pkl"),
    "junk for weights": ("shapes --data {data} --weights {tmp}/junk.pkl", "junk.pkl"),
    "a program for weights": ("shapes --data {data} --weights {tmp}/namespace.pt",
                              "SimpleNamespace"),
    "rate of nothing": ("shapes --data {data} --lr 0", "--lr"),
    "rate of no number": ("shapes --data {data} --lr nan", "--lr"),
    "batch too small": ("shapes --data {data} --batch-size 2 --accumulate 4", "--batch-size"),
    "no such GPU": ("shapes --data {data} --device cuda", "--device cpu"),
    "negative seed": ("shapes --data {data} --seed -1", "--seed"),
    "negative workers": ("shapes --data {data} --workers -1", "--workers"),
    "batch of none": ("shapes --data {data} --batch-size 0", "--batch-size"),
    "unknown flag": ("shapes --data {data} --batchsize 4", "--batchsize"),
    "no abbreviations": ("shapes --data {data} --batch 4", "--batch"),
}  # fmt: skip


@pytest.mark.parametrize("line, name", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_the_run_alone(
    wrong, shapes, finished, small, tmp_path, monkeypatch, capsys, line, name
):
    if "--device cuda" in line and torch.cuda.is_available():
        pytest.skip("has a GPU")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    argv = line.format(data=shapes, tmp=wrong).split()
    argv[1:1] = ["--device", "cpu", "--iters", "1", "--min-size", "64", "--max-size", "96"]
    new = tmp_path / "new"
    code, lines = mistake(capsys, [*argv, "--out", new])
    assert code == 2
    assert len(lines) == 1 and name in lines[0], lines
    assert not new.exists()

    before = files(finished.out)
    code, _ = mistake(capsys, [*argv, "--out", finished.out, "--fresh"])
    assert code == 2 and files(finished.out) == before


def test_out_in_the_way_of_a_file_is_named(wrong, shapes, small, capsys):
    code, lines = mistake(capsys, flags(shapes, wrong / "file"))
    assert code == 2 and len(lines) == 1 and "file" in lines[0], lines
    assert (wrong / "file").read_text() == "in the way"


def test_other_settings_are_refused_by_name(finished, shapes, small, capsys):
    before = files(finished.out)
    code, lines = mistake(capsys, flags(shapes, finished.out, "--lr", "0.5", "--iters", "8"))
    assert code == 2 and len(lines) == 1
    for text in ("last.pt", f"lr {RATE / 4} there, 0.5 here", "iters 6 there, 8 here", "--fresh"):
        assert text in lines[0]
    assert files(finished.out) == before


TORN = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "overwritten": lambda content: b"\0" * 4096 + content[4096:],
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_torn_checkpoint_is_named_and_kept(finished, shapes, small, tmp_path, capsys, tear):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    (out / "last.pt").write_bytes(tear((out / "last.pt").read_bytes()))
    before = files(out)
    code, lines = mistake(capsys, flags(shapes, out))
    assert code == 2 and len(lines) == 1 and "last.pt" in lines[0] and "--fresh" in lines[0], lines
    assert files(out) == before


@pytest.mark.parametrize("file", ["model.pt", "a tensor", "settings of a word"])
def test_a_foreign_checkpoint_is_named(finished, shapes, small, tmp_path, capsys, file):
    if file == "model.pt":
        shutil.copy(finished.out / "model.pt", tmp_path / "last.pt")
    else:
        torch.save({"settings": "mine"} if "word" in file else torch.zeros(2), tmp_path / "last.pt")
    code, lines = mistake(capsys, flags(shapes, tmp_path))
    assert code == 2 and len(lines) == 1 and "last.pt: not a checkpoint of this trainer" in lines[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_turns_out_broken_is_one_line_that_names_it(
    shapes, small, tmp_path, capsys, workers
):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for path in (data / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:400])
    code, lines = mistake(capsys, flags(data, tmp_path / "out", "--workers", workers))
    assert code == 2 and len(lines) == 1, lines
    assert "train2017/0000000000" in lines[0] and "cannot be read" in lines[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    shapes, small, tmp_path, monkeypatch, capsys
):
    """The fifth step of a run with a checkpoint after each second one."""
    poison(monkeypatch, step=4)
    argv = flags(shapes, tmp_path, "--checkpoint-every", 2)
    with pytest.raises(SystemExit) as stop:
        call(argv)
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    ids = dataset.image_ids[batches(dataset, min_size=[64], iters=6).plan(4)[0]].tolist()
    for text in ("step 5 ", str(ids), "last.pt"):
        assert text in stop.value.code
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 4
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4]


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.nan


def test_weights_that_are_not_finite_are_never_written(shapes, small, tmp_path, monkeypatch):
    """The loss of the fourth and last step is finite, and shows nothing of its gradient."""
    fcos_loss, calls = fcos.fcos_loss, iter(range(4))

    def loss(*args, **kwargs):
        losses = fcos_loss(*args, **kwargs)
        return losses | ({"box": NoGradient.apply(losses["box"])} if next(calls) == 3 else {})

    monkeypatch.setattr(fcos, "fcos_loss", loss)
    with pytest.raises(SystemExit, match="finite"):
        call(flags(shapes, tmp_path, "--iters", 4, "--checkpoint-every", 2))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def poison(monkeypatch, step, here=True):
    """Make the loss of one step infinite, as a bad batch would."""
    fcos_loss, calls = fcos.fcos_loss, iter(range(10**6))

    def poisoned(*args, **kwargs):
        losses = fcos_loss(*args, **kwargs)
        if next(calls) == step and here:
            losses["box"] = losses["box"] * torch.inf
        return losses

    monkeypatch.setattr(fcos, "fcos_loss", poisoned)


# ---- processes ---------------------------------------------------------------------------------


def script(*argv):
    return subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, env=ONE_THREAD,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_the_script_survives_kill_9(shapes, tmp_path):
    """As a user has it: the command, kill -9 at a moment nobody chose, and the command again."""
    more = "--checkpoint-every", 1, "--batch-size", 2
    call(flags(shapes, tmp_path / "whole", *more))
    argv = flags(shapes, tmp_path / "killed", *more)
    victim = script(*argv)
    limit = time.monotonic() + 60
    while not (tmp_path / "killed" / "last.pt").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    again = script(*argv)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert "going on after step" in out
    assert list(json.loads(out.splitlines()[-1])) == list(evaluate.METRICS)
    assert "Traceback" not in err
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.tmp"))


LAUNCHED = """
import json, sys
import pytest, torch
import torch.distributed as dist
import evaluate, fcos, train
sys.path.insert(0, {tests!r})
import test_train

fcos.MODELS["shapes"] = fcos.MODELS["shapes"] | test_train.SMALL

def every_case(_):
    for case, argv in json.loads(sys.argv[1]).items():
        with pytest.MonkeyPatch.context() as patch:
            if case == "not finite":  # on one rank only
                train.evaluate.start_process("cpu")
                test_train.poison(patch, 4, here=dist.get_rank() == 1)
            if case == "no positives":
                test_train.empty_images(patch)
            try:
                train.main(train.parse_args(argv))
            except SystemExit as stop:
                with open(f"{{sys.argv[2]}}/{{case}} {{dist.get_rank()}}", "w") as file:
                    file.write(str(stop.code))

evaluate.run(every_case, None)
"""


def empty_images(monkeypatch):
    """Take the boxes away from every odd slot of each step, that is from rank 1 of 2."""
    getitem = train.TrainBatches.__getitem__

    @functools.wraps(getitem)
    def emptied(self, item):
        images, sizes, boxes, labels, counts = getitem(self, item)
        first = item % self.parts * self.world + self.rank
        slots = range(first, self.batch_size, self.world * self.parts)
        boxes, labels = list(boxes.split(counts)), list(labels.split(counts))
        for k, slot in enumerate(slots):
            if slot % 2:
                boxes[k], labels[k] = boxes[k][:0], labels[k][:0]
        return images, sizes, torch.cat(boxes), torch.cat(labels), [len(label) for label in labels]

    monkeypatch.setattr(train.TrainBatches, "__getitem__", emptied)


@pytest.fixture(scope="module")
def launched(shapes, tmp_path_factory):
    """Several runs in one launch of two processes -> their folder, stdout"""
    tmp = tmp_path_factory.mktemp("launched")
    cases = {
        "plain": flags(shapes, tmp / "plain", "--eval-every", 3, "--checkpoint-every", 3),
        "accumulate": flags(shapes, tmp / "accumulate", "--accumulate", 2),
        "multi-scale": flags(shapes, tmp / "multi", "--min-size", 48, 64, 80, "--batch-size", 5),
        "no positives": flags(shapes, tmp / "empty"),
        "not finite": flags(shapes, tmp / "poison", "--checkpoint-every", 2),
    }
    path = tmp / "launched.py"
    path.write_text(LAUNCHED.format(tests=str(ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(path), json.dumps(cases), str(tmp)]  # fmt: skip
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return SimpleNamespace(out=tmp, stdout=done.stdout)


def test_two_processes_train_as_one_does(launched, finished):
    assert_close_run(launched.out / "plain", finished.out)
    metrics = [json.loads((out / "metrics.json").read_text())
               for out in (launched.out / "plain", finished.out)]  # fmt: skip
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)
    assert launched.stdout.count("batch_size         4\n") == 4  # by rank 0, once in each case of 4


def test_two_processes_of_two_parts_train_as_one_does(launched, finished):
    assert_close_run(launched.out / "accumulate", finished.out)


def test_uneven_shares_of_a_multi_scale_recipe_train_as_one_process_does(
    launched, shapes, small, tmp_path
):
    call(flags(shapes, tmp_path, "--min-size", 48, 64, 80, "--batch-size", 5))
    assert_close_run(launched.out / "multi", tmp_path)


def test_a_rank_without_a_single_positive_trains_as_one_process_does(
    launched, shapes, small, tmp_path, monkeypatch
):
    empty_images(monkeypatch)
    call(flags(shapes, tmp_path))
    assert_close_run(launched.out / "empty", tmp_path)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(launched):
    told, silent = ((launched.out / f"not finite {rank}").read_text() for rank in (0, 1))
    assert "step 5 " in told and silent == "1"  # both stop, and rank 0 says why
    assert torch.load(launched.out / "poison" / "last.pt", weights_only=True)["step"] == 4
    assert all(value.isfinite().all() for value in weights(launched.out / "poison").values())


def test_no_image_with_a_positive_at_all_is_ordinary(shapes, small, tmp_path, monkeypatch):
    """Boxes so thin that no location lies inside: every part of every step is background."""
    target = evaluate.CocoDataset.target

    def thin(self, i):
        boxes, labels = target(self, i)
        return torch.cat([boxes[:, :2], boxes[:, :2] + 0.01], 1), labels

    monkeypatch.setattr(evaluate.CocoDataset, "target", thin)
    call(flags(shapes, tmp_path, "--iters", 2, "--accumulate", 2))
    for row in log(tmp_path):
        if "loss" in row:
            assert row["box"] == row["ctr"] == 0 and row["cls"] > 0
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_help_works_and_tells_every_recipe_flag():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("--data", "--weights", "--accumulate", "--eval-every", "--precision", "--fresh"):
        assert flag in done.stdout
