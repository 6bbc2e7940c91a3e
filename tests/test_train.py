"""train.py: the shapes data set, batches, the schedule, resuming, and any number of processes."""

import contextlib
import ctypes
import functools
import io
import itertools
import json
import linecache
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
import fcos
import train
from fcos import UserError

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
RATE = train.RECIPES["shapes"]["lr"]  # for 16 images a step; a quarter of it for 4
PATIENCE = 240  # seconds after which a process hangs, on however slow a machine
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


@pytest.fixture(autouse=True)
def no_process_left():
    """A test that fails leaves none behind, which could hold up those after it."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


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

    sample = evaluate.CocoDataset.sample


MIXED = Fake([(40, 60), (60, 40), (50, 50), (30, 60), (45, 61), (64, 32), (33, 64)])


def batches(dataset=MIXED, rank=0, world=1, parts=1, **settings):
    defaults = dict(seed=0, batch_size=4, min_size=[32, 48, 64], max_size=96, iters=30)
    return train.TrainBatches(dataset, defaults | settings, rank, world, parts)


def shown(item):
    """The multiset of (row, size, flipped) of an item, from its pixels."""
    images, sizes, _, labels, counts, bad = item
    assert bad == []
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
        _, _, boxes, labels, counts, _ = made[step]
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
        images, _, boxes, *_ = made[step]
        for image, box, flip in zip(images, boxes, made.plan(step)[2]):
            columns = image[1, 0].tolist()
            assert columns == (list(range(64))[::-1] if flip else list(range(64)))
            assert box.tolist() == ([32, 2, 63, 32] if flip else [1, 2, 32, 32])


def test_images_without_a_single_box_are_ordinary():
    dataset = Fake([(32, 64)])
    dataset.target = lambda i: (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    _, _, boxes, labels, counts, _ = batches(dataset)[0]
    assert boxes.shape == (0, 4) and labels.shape == (0,) and counts == [0] * 4


def test_the_number_of_workers_changes_nothing(shapes):
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    made = batches(dataset, iters=4)
    loaders = [DataLoader(made, batch_size=None, num_workers=n) for n in (0, 1, 4)]
    for first, *others in zip(*loaders, strict=True):
        for other in others:
            assert first[4:] == other[4:]
            for a, b in zip(first[:4], other[:4]):
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
            size = re.search(r"_bs(\d+)_", name)
            batch_size = int(size[1]) if size else 16
            assert (recipe["batch_size"], recipe["lr"]) == (batch_size, 0.01)
            twice = name.endswith("2x")
            assert recipe["iters"] == (180_000 if twice else 90_000)
            many = twice or "_ms_" in name
            assert recipe["min_size"] == (list(range(640, 801)) if many else [800])
            assert recipe["max_size"] == 1333


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
                    model="fcos_imprv_R_50_FPN", warmup=0, lr=0.01)  # fmt: skip
    assert {key: given[key] for key in expected} == expected
    warmups = [settings("--iters", n)["warmup"] for n in ("4999", "5000", "90000")]
    assert warmups == [499, 500, 500]  # a tenth of a run that is too short for the recipe's
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
        "last.pt", "log.jsonl", "metrics.json", "model.pt", "previous.pt"]  # fmt: skip
    metrics = json.loads((finished.out / "metrics.json").read_text())
    assert list(metrics) == list(evaluate.METRICS)
    assert json.loads(finished.stdout[-1]) == metrics

    rows = log(finished.out)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    losses = [row for row in rows if "loss" in row]
    for row in losses:
        assert row["loss"] == pytest.approx(row["cls"] + row["box"] + row["ctr"])
        assert row["lr"] == train.lr_at(row["step"] - 1, RATE / 4, 6, warmup=0)
        assert row["images_per_second"] > 0
    assert [row["AP"] for row in rows if "AP" in row][-1] == metrics["AP"]

    checkpoint = torch.load(finished.out / "last.pt", weights_only=True)
    assert checkpoint["step"] == 6 and checkpoint["settings"]["lr"] == RATE / 4
    assert checkpoint["made_with"].keys() == {"commit", "launch", "torch", "numpy"}
    assert torch.load(finished.out / "previous.pt", weights_only=True)["step"] == 3
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
    # Here P7 has more than one cell: for a single one PyTorch's bf16 convolution on the CPU
    # reads uninitialised memory in its backward pass (2.15), which stops the run as it should.
    call(flags(shapes, tmp_path, "--iters", 2, "--precision", "bf16", "--min-size", 160,
               "--max-size", 224))
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    assert all(np.isfinite(row["loss"]) for row in log(tmp_path) if "loss" in row)


def test_the_gradient_is_clipped_only_on_demand(shapes, small, tmp_path):
    for norm in (), ("--clip-norm", 1e9), ("--clip-norm", 1e-9):
        call(flags(shapes, tmp_path / f"{norm[1] if norm else 0}", "--iters", 1, *norm))
    free, wide, tight = (weights(tmp_path / f"{n}")["head.ctr.bias"] for n in (0, 1e9, 1e-9))
    assert free == wide and abs(free) > 1e-5 and abs(tight) < 1e-12  # from a start of 0


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
    changes = f"lr {RATE / 4} there, 0.5 here", "iters 6 there, 8 here"
    assert all(text in lines[0] for text in (str(finished.out), *changes, "--fresh"))
    assert files(finished.out) == before


TORN = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "overwritten": lambda content: b"\0" * 4096 + content[4096:],
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_torn_checkpoint_is_named_and_the_one_before_takes_its_place(
    finished, shapes, small, tmp_path, capsys, tear
):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    argv = flags(shapes, out, "--eval-every", 3, "--checkpoint-every", 3)
    (out / "last.pt").write_bytes(tear((out / "last.pt").read_bytes()))
    call(argv)
    said = capsys.readouterr().out
    assert "last.pt: " in said and "previous.pt takes its place" in said and "step 3 of 6" in said
    assert_same_run(out, finished.out)

    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(tear((out / name).read_bytes()))
    before = files(out)
    code, lines = mistake(capsys, argv)
    assert code == 2 and len(lines) == 1, lines
    assert all(text in lines[0] for text in ("last.pt", "previous.pt", "--fresh"))
    assert files(out) == before


@pytest.mark.parametrize("file", ["model.pt", "a tensor", "settings of a word"])
def test_a_foreign_checkpoint_is_named(finished, shapes, small, tmp_path, capsys, file):
    if file == "model.pt":
        shutil.copy(finished.out / "model.pt", tmp_path / "last.pt")
    else:
        torch.save({"settings": "mine"} if "word" in file else torch.zeros(2), tmp_path / "last.pt")
    code, lines = mistake(capsys, flags(shapes, tmp_path))
    assert code == 2 and len(lines) == 1 and "last.pt: not a checkpoint of this trainer" in lines[0]


def bomb(path):
    """A PNG file of a few bytes that says it has 10 ** 10 pixels."""
    size = (100_000).to_bytes(4, "big")
    header = b"IHDR" + size + size + b"\x08\0\0\0\0"
    crc = zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0d" + header + crc)


BROKEN = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:400]),
    "no image": lambda path: path.write_text("not found"),
    "empty": lambda path: path.write_bytes(b""),
    "of another size": lambda path: Image.new("RGB", (9, 9)).save(path, "JPEG"),
    "a decompression bomb": bomb,
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_an_image_that_turns_out_broken_is_one_line_that_names_it(
    shapes, small, tmp_path, capsys, spoil, workers
):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for path in (data / "train2017").iterdir():
        spoil(path)
    code, lines = mistake(capsys, flags(data, tmp_path / "out", "--workers", workers))
    assert code == 2 and len(lines) == 1, lines
    assert "train2017/0000000000" in lines[0]
    assert "cannot be read" in lines[0] or "is 9x9 pixels, but its annotations say" in lines[0]


def test_broken_images_can_be_replaced_and_are_counted(shapes, small, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    broken = sorted((data / "train2017").iterdir())[::3]
    for path, spoil in zip(broken, itertools.cycle(BROKEN.values())):
        spoil(path)
    runs = {"a": (), "b": ("--workers", 1)}
    for name, more in runs.items():
        call(flags(data, tmp_path / name, "--skip-bad-images", *more))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(data, "train2017"))
    made, paths = batches(dataset, min_size=[64], iters=6), {str(path) for path in broken}
    drawn = [[str(dataset.path(row)) for row in made.plan(step)[0]] for step in range(6)]
    expected = [sum(path in paths for path in rows) for rows in drawn]
    assert sum(expected) > 3
    for name in runs:
        rows = [row for row in log(tmp_path / name) if "loss" in row]
        assert [row["skipped_images"] for row in rows] == expected
    told = capsys.readouterr().err
    assert all(path in told for path in paths & set(itertools.chain(*drawn)))


def test_images_of_one_pixel_and_of_ten_thousand_are_ordinary(shapes, small, tmp_path):
    root, sizes = tmp_path / "data", [(1, 1), (10_000, 3), (3, 10_000), (40, 60)]
    shutil.copytree(shapes, root)
    path, folder = evaluate.coco_paths(root, "train2017")
    coco = json.loads(path.read_text()) | dict(images=[], annotations=[])
    for k, (w, h) in enumerate(sizes, 1):
        Image.new("RGB", (w, h)).save(folder / f"{k}.png")
        coco["images"].append(dict(id=k, file_name=f"{k}.png", width=w, height=h))
        coco["annotations"].append(dict(id=k, image_id=k, category_id=1, bbox=[0, 0, w, h]))
    coco["annotations"][0]["bbox"] = [0, 0, 1.5, 1.5]  # or the official rules leave it out
    path.write_text(json.dumps(coco))
    call(flags(root, tmp_path / "out", "--iters", 3))
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    shapes, small, tmp_path, monkeypatch, capsys
):
    """The fifth step of a run with a checkpoint after each second one."""
    poison(monkeypatch, step=4)
    argv = flags(shapes, tmp_path, "--checkpoint-every", 2)
    with pytest.raises(UserError) as stop:
        call(argv)
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    ids = dataset.image_ids[batches(dataset, min_size=[64], iters=6).plan(4)[0]].tolist()
    for text in ("step 5,", str(ids), "last.pt"):
        assert text in str(stop.value)
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
    with pytest.raises(UserError, match="finite"):
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


def fork(argv, told, prepare=lambda: None):
    """The script in a process of its own, without the seconds that importing torch takes; what it
    says goes to the file `told`. `prepare` is called in the child, whose patches die with it."""

    def child():
        tqdm.set_lock(threading.RLock())  # its own is shared by forks, and lost if one is killed
        sys.stdout = sys.stderr = open(told, "w", buffering=1)  # noqa: SIM115
        prepare()
        evaluate.run(train.main, train.parse_args(argv))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def at_step(number, action):
    """Let `action` happen in the midst of a step, counted from 0, of this process's run."""
    lr_at = train.lr_at

    def acting(step, *rest):
        if step == number:
            action()
        return lr_at(step, *rest)

    train.lr_at = acting


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(number):
    """Kill -9 when half of the checkpoint of that number has been written."""
    save, calls = torch.save, itertools.count(1)

    def dying(content, file):
        if next(calls) < number:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()

    torch.save = dying


def test_kill_9_at_any_moment_changes_nothing(shapes, small, tmp_path):
    """The same run killed inside a save and at two moments nobody chose, and started again."""
    begin, more = time.monotonic(), ("--checkpoint-every", 1)
    call(flags(shapes, tmp_path / "whole", *more))
    seconds, out = time.monotonic() - begin, tmp_path / "killed"
    argv = flags(shapes, out, *more)
    saving = fork(argv, tmp_path / "told", lambda: die_while_saving(3))
    saving.join(PATIENCE)
    assert saving.exitcode == -signal.SIGKILL and (out / "last.pt.tmp").exists()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
    for delay in np.random.default_rng().uniform(0, 0.6 * seconds, 2):
        victim = fork(argv, tmp_path / "told")
        victim.join(delay)
        victim.kill()
        victim.join()
    again = fork(argv, tmp_path / "told")
    again.join(PATIENCE)
    text = (tmp_path / "told").read_text()
    assert again.exitcode == 0 and "going on after step" in text and "Traceback" not in text, text
    assert_same_run(out, tmp_path / "whole")
    assert not list(out.glob("*.tmp"))


def test_killed_between_the_two_renames_of_a_save(finished, shapes, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    (out / "last.pt").unlink()
    call(flags(shapes, out, "--eval-every", 3, "--checkpoint-every", 3))
    assert_same_run(out, finished.out)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_step_and_saves(finished, shapes, small, tmp_path, workers):
    """As at the shutdown of a machine, every process gets it, the loader's workers included."""
    argv = flags(shapes, tmp_path / "run", "--eval-every", 3, "--workers", workers)

    def everyone():
        for process in [*multiprocessing.active_children(), SimpleNamespace(pid=os.getpid())]:
            os.kill(process.pid, signal.SIGTERM)

    told = tmp_path / "told"
    stopped = fork(argv, told, lambda: at_step(3, everyone))
    stopped.join(PATIENCE)
    assert stopped.exitcode == 0, told.read_text()
    assert "SIGTERM: stopped after step 5 of 6; the same command goes on" in told.read_text()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 5
    again = fork(argv, told)
    again.join(PATIENCE)
    assert again.exitcode == 0 and "going on after step 5 of 6" in told.read_text()
    for (name, x), y in zip(weights(tmp_path / "run").items(), weights(finished.out).values()):
        assert torch.equal(x, y), name
    assert log(tmp_path / "run", "images_per_second") == log(finished.out, "images_per_second")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_run_at_once(shapes, small, tmp_path, number, code):
    """But not the echo of the first, which comes where Slurm and torchrun both pass it on."""

    def hang():
        for pause in (0.1, 1.1, 60):
            os.kill(os.getpid(), number)
            time.sleep(pause)

    begin = time.monotonic()
    process = fork(flags(shapes, tmp_path / "run"), tmp_path / "told", lambda: at_step(1, hang))
    process.join(50)
    assert process.exitcode == code and 1 < time.monotonic() - begin < 50
    assert not (tmp_path / "run" / "last.pt").exists()


def test_workers_die_with_their_parent(shapes, small, tmp_path):
    """Within the five seconds after which PyTorch's workers look for it."""
    argv = flags(shapes, tmp_path / "run", "--workers", 2)
    pids = tmp_path / "pids"

    def last_words():
        pids.write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
        die()

    fork(argv, tmp_path / "told", lambda: at_step(1, last_words)).join(PATIENCE)
    workers = pids.read_text().split()
    assert len(workers) == 2

    def alive(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"

    limit = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < limit, "a loader worker outlives its parent"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_is_reported_with_its_image(shapes, small, tmp_path, kind):
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    row = batches(dataset, min_size=[64], iters=6).plan(2)[0][1]

    def prepare():
        image = evaluate.CocoDataset.image

        def stuck(self, i):
            if i == row:
                die() if kind == "dies" else time.sleep(600)
            return image(self, i)

        evaluate.CocoDataset.image = stuck
        train.DataLoader = lambda *a, **k: DataLoader(*a, **k | {"timeout": 5})

    process = fork(flags(shapes, tmp_path / "run", "--workers", 1), tmp_path / "told", prepare)
    process.join(PATIENCE)
    lines = [line for line in (tmp_path / "told").read_text().splitlines() if "DataLoader" in line]
    assert process.exitcode == 2 and len(lines) == 1
    assert lines[0].endswith(f"images in hand: {dataset.path(row)}")


@pytest.mark.parametrize("kind", ["dies", "is broken"])
def test_an_error_in_the_evaluation_ends_the_run(shapes, small, tmp_path, kind):
    """In one line that names the image, although workers of both loaders are alive."""
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "val2017"))

    def prepare():
        def image(self, i):
            if kind == "dies":
                die()
            raise UserError(f"{self.path(i)}: is broken")

        predict = evaluate.predict

        def broken(*args):
            evaluate.CocoDataset.image = image
            return predict(*args)

        evaluate.predict = broken

    argv = flags(shapes, tmp_path / "run", "--iters", 2, "--workers", 1)
    process = fork(argv, tmp_path / "told", prepare)
    process.join(PATIENCE)
    told = (tmp_path / "told").read_text()
    assert process.exitcode == 2 and "Traceback" not in told, told
    assert any(str(dataset.path(i)) in told.splitlines()[-1] for i in range(len(dataset))), told


def test_fresh_goes_on_from_a_checkpoint_of_its_own_launch_only(
    finished, shapes, small, tmp_path, monkeypatch
):
    """As torchrun's restarts do: the first start may have ended before it removed the old run."""
    out = shutil.copytree(finished.out, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setattr(evaluate, "start_process", lambda _: (0, 1, torch.device("cpu")))
    argv = flags(shapes, out, "--fresh", "--checkpoint-every", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        with contextlib.suppress(Killed):
            killed_at(patch, 3)
            call(argv)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2  # of 6 in the old run
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    said = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: said.append(" ".join(map(str, a))))
    call(argv)
    assert any("going on after step 2 of 6" in line for line in said)


def test_a_full_disk_costs_the_write_and_not_the_run(finished, shapes, small, tmp_path):
    out, told = tmp_path / "run", tmp_path / "told"
    argv = flags(shapes, out, "--eval-every", 3, "--checkpoint-every", 3)
    fork(argv, told, lambda: at_step(4, die)).join(PATIENCE)
    before = (out / "last.pt").read_bytes()

    def full():  # for a file of the size of last.pt, not for that of model.pt
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4 * 3,) * 2)

    process = fork(argv, told, full)
    process.join(PATIENCE)
    assert process.exitcode == 0, told.read_text()
    assert "last.pt: cannot be written ([Errno 27] File too large); the older" in told.read_text()
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    assert (out / "metrics.json").read_text() == (finished.out / "metrics.json").read_text()
    call(argv)  # there is room again
    assert_same_run(out, finished.out)

    def fuller():  # for no model.pt either
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = fork(flags(shapes, tmp_path / "none", "--eval-every", 3), told, fuller)
    process.join(PATIENCE)
    assert "model.pt: cannot be written" in told.read_text().splitlines()[-1]
    assert process.exitcode == 2 and "the older model stays" in told.read_text()
    assert [row["step"] for row in log(tmp_path / "none") if "loss" in row][-1] == 6


def test_a_folder_that_cannot_be_written_is_named_before_training(shapes, small, tmp_path):
    """Root may write anywhere, so the child gives up the rights that make it root."""
    out, told = tmp_path / "run", tmp_path / "told"
    out.mkdir(mode=0o555)

    def give_up():
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0

    for folder in out, out / "deeper":
        process = fork(flags(shapes, folder), told, give_up)
        process.join(PATIENCE)
        lines = [line for line in told.read_text().splitlines() if "cannot be" in line]
        assert process.exitcode == 2 and len(lines) == 1 and str(folder) in lines[0]
        assert "%|" not in told.read_text() and not list(out.iterdir())


def test_small_limits_of_the_system_get_advice(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    train.check_limits(64 << 20, print)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    train.check_limits(65 << 20, print)
    shm, files = capsys.readouterr().out.splitlines()
    assert "64 MB" in shm and "65 MB" in shm and "--ipc=host" in shm and "--workers" in shm
    assert "256 files" in files and "ulimit -n" in files


class HostReads(TorchDispatchMode):
    """Where the program waits for a number from the device: lines of train.py, step by step."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique",
               "_unique2", "unique_consecutive", "bincount", "repeat_interleave"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.lines = []

    def note(self):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != train.__file__:
            frame = frame.f_back
        if frame:
            self.lines.append(linecache.getline(train.__file__, frame.f_lineno).strip())

    def noted(self, method):
        def noted(*args, **kwargs):
            self.note()
            return method(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])  # fmt: skip
        if masks or name in self.WAITING:
            self.note()
        return function(*args, **kwargs or {})


def test_between_log_rows_no_number_is_read_from_the_device(shapes, small, tmp_path, monkeypatch):
    """On the CPU the wish to stop is read in every step, behind `device.type == "cpu"`; a GPU is to
    go through the same steps without a single read."""
    reads = HostReads()
    for method in ("tolist", "numpy", "cpu", "__array__"):  # these are no operations on the CPU
        monkeypatch.setattr(torch.Tensor, method, reads.noted(getattr(torch.Tensor, method)))
    lr_at, steps = train.lr_at, []

    def marked(step, *rest):
        steps.append(len(reads.lines))
        return lr_at(step, *rest)

    monkeypatch.setattr(train, "lr_at", marked)
    argv = flags(shapes, tmp_path, "--iters", 250, "--batch-size", 2, "--min-size", 32,
                 "--max-size", 48, "--accumulate", 2, "--clip-norm", 1, "--workers", 1)  # fmt: skip
    with reads, contextlib.suppress(Killed):
        killed_at(monkeypatch, 9)
        call(argv)
    guarded = 'stopping = (logging or device.type == "cpu") and sums[2].item() > 0'
    rows = [row["step"] for row in log(tmp_path)]
    assert rows == [2, 4, 6, 8]  # of 250 steps every second is logged
    for step in range(1, 8):  # between the rate of this step and that of the next
        lines = reads.lines[steps[step] : steps[step + 1]]
        assert lines.count(guarded) == 1
        assert (len(lines) == 1) == (step + 1 not in rows), lines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_between_log_rows_nothing_waits_for_the_gpu(shapes, small, tmp_path, monkeypatch):
    """From the start of a step's targets to the end of its optimizer."""
    zero_grad, normalizer = torch.optim.SGD.zero_grad, fcos.normalizer

    def begin(targets):
        torch.cuda.set_sync_debug_mode("error")
        return normalizer(targets)

    def end(self):
        zero_grad(self)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(fcos, "normalizer", begin)
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", end)
    call(flags(shapes, tmp_path, "--device", "cuda", "--accumulate", 2, "--clip-norm", 1))


# ---- several processes -------------------------------------------------------------------------

LAUNCHED = """
import json, os, sys
import torch.distributed as dist
import evaluate, fcos, train
sys.path.insert(0, {tests!r})
import test_train

me, folder = int(os.environ["RANK"]), sys.argv[1]
fcos.MODELS["shapes"] = fcos.MODELS["shapes"] | test_train.SMALL

for name, (ranks, patches, argv) in json.load(open(f"{{folder}}/cases")).items():
    if me in ranks:  # ranks 0, 1 and 2, 3 each go through their own cases
        dist.init_process_group("gloo", init_method=f"file://{{folder}}/{{name}} init",
                                rank=ranks.index(me), world_size=len(ranks))
        with test_train.pytest.MonkeyPatch.context() as patch:
            for function in patches:
                getattr(test_train, function)(patch)
            try:
                train.main(train.parse_args(argv))
            except (fcos.UserError, test_train.Killed) as error:
                with open(f"{{folder}}/{{name}} {{dist.get_rank()}}", "w") as file:
                    file.write(str(error))
        dist.destroy_process_group()
"""


def doubled(monkeypatch):
    """A model and targets in float64."""
    make_model = train.make_model

    def double(*args):
        model = make_model(*args).double()
        targets = model.targets
        model.targets = lambda *args: (found := targets(*args)) | {"ltrb": found["ltrb"].double()}
        return model

    monkeypatch.setattr(train, "make_model", double)


def empty_images(monkeypatch):
    """Take the boxes away from every odd slot of each step, that is from rank 1 of 2."""
    getitem = train.TrainBatches.__getitem__

    @functools.wraps(getitem)
    def emptied(self, item):
        images, sizes, boxes, labels, counts, bad = getitem(self, item)
        first = item % self.parts * self.world + self.rank
        slots = range(first, self.batch_size, self.world * self.parts)
        boxes, labels = list(boxes.split(counts)), list(labels.split(counts))
        for k, slot in enumerate(slots):
            if slot % 2:
                boxes[k], labels[k] = boxes[k][:0], labels[k][:0]
        counts = [len(label) for label in labels]
        return images, sizes, torch.cat(boxes), torch.cat(labels), counts, bad

    monkeypatch.setattr(train.TrainBatches, "__getitem__", emptied)


def thin_boxes(monkeypatch):
    """Boxes so thin that no location lies inside: every part of every step is background."""
    target = evaluate.CocoDataset.target

    def thin(self, i):
        boxes, labels = target(self, i)
        return torch.cat([boxes[:, :2], boxes[:, :2] + 0.01], 1), labels

    monkeypatch.setattr(evaluate.CocoDataset, "target", thin)


def poison_rank_1(monkeypatch):
    poison(monkeypatch, 4, here=torch.distributed.get_rank() == 1)


def folders_of_two_nodes(monkeypatch):
    step = 3 * torch.distributed.get_rank()
    monkeypatch.setattr(train, "resume", lambda *args: step)


def killed_at_4(monkeypatch):
    killed_at(monkeypatch, 4)


PLAIN = ["--eval-every", 3, "--checkpoint-every", 3]
SCALES = ["--min-size", 48, 64, 80, "--batch-size", 5]
ALL, LEFT, RIGHT = [0, 1, 2, 3], [0, 1], [2, 3]
CASES = {  # name of the run's folder: ranks, functions of this file that patch it, flags
    "four": (ALL, [], PLAIN),
    "two": (LEFT, [], PLAIN),
    "two of two parts": (RIGHT, [], [*PLAIN, "--accumulate", 2]),
    "four in float64": (ALL, ["doubled"], []),
    "two in float64": (LEFT, ["doubled"], []),
    "two of two parts in float64": (RIGHT, ["doubled"], ["--accumulate", 2]),
    "uneven shares of many scales": (ALL, [], SCALES),
    "a rank without positives": (LEFT, ["empty_images"], []),
    "no positives": (RIGHT, ["thin_boxes"], []),
    "few images of one aspect": (LEFT, [], ["--data", "few"]),
    "undisturbed": (LEFT, [], ["--iters", 40, "--batch-size", 2, "--checkpoint-every", 5]),
    "not finite": (RIGHT, ["poison_rank_1"], ["--checkpoint-every", 2]),
    "not shared": (RIGHT, ["folders_of_two_nodes"], []),
    "from one process to four": (ALL, [], PLAIN),
    "killed": (ALL, ["killed_at_4"], PLAIN),
    "killed ": (ALL, [], PLAIN),  # the same folder again
}


@pytest.fixture(scope="module")
def launched(shapes, tmp_path_factory):
    """All cases, in one launch of four processes -> the folder of their runs"""
    tmp = tmp_path_factory.mktemp("launched")
    few = shutil.copytree(shapes, tmp / "few")
    path, _ = evaluate.coco_paths(few, "train2017")
    coco = json.loads(path.read_text())
    upright = [image for image in coco["images"] if image["height"] >= image["width"]][:3]
    ids = {image["id"] for image in upright}
    rest = [a for a in coco["annotations"] if a["image_id"] in ids]
    path.write_text(json.dumps(coco | dict(images=upright, annotations=rest)))

    cases = {}
    for name, (ranks, patches, more) in CASES.items():
        argv = flags(shapes, tmp / name.strip(), *more)
        cases[name] = ranks, patches, [str(few) if word == "few" else word for word in argv]
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setitem(fcos.MODELS, "shapes", fcos.MODELS["shapes"] | SMALL)
        killed_at(patch, 4)
        call(cases["from one process to four"][2])
    (tmp / "cases").write_text(json.dumps(cases))
    (tmp / "launched.py").write_text(LAUNCHED.format(tests=str(ROOT / "tests")))
    torchrun("--nproc_per_node=4", tmp / "launched.py", tmp).check()
    return SimpleNamespace(out=tmp, argv={name: case[2] for name, case in cases.items()})


def torchrun(*argv):
    """-> a running torchrun; check() waits for its end and returns what it said"""
    told = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads would fill up)
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, argv)],
                               cwd=ROOT, env=ONE_THREAD, stdout=told, stderr=told)  # fmt: skip

    def check(good=True):
        process.wait(PATIENCE)
        told.seek(0)
        said = told.read()
        assert process.returncode == 0 or not good, said[-5000:]
        return said

    process.check = check
    return process


ONE_PROCESS = ["uneven shares of many scales", "a rank without positives", "no positives",
               "few images of one aspect"]  # fmt: skip


@pytest.mark.parametrize("case", ["four", "two", "two of two parts", "from one process to four"])
def test_any_number_of_processes_trains_as_one_does(launched, finished, case):
    assert_close_run(launched.out / case, finished.out)
    metrics = [json.loads((out / "metrics.json").read_text())
               for out in (launched.out / case, finished.out)]  # fmt: skip
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_same_training(finished, shapes, small, tmp_path, parts):
    call(flags(shapes, tmp_path, "--accumulate", parts, *PLAIN))
    assert_close_run(tmp_path, finished.out)


def test_in_float64_all_divisions_of_a_step_agree_to_1e_9(
    launched, shapes, small, tmp_path, monkeypatch
):
    doubled(monkeypatch)
    for parts in (1, 2, 4):
        call(flags(shapes, tmp_path / str(parts), "--accumulate", parts))
    one = weights(tmp_path / "1")
    assert one["head.cls.weight"].dtype == torch.float64
    others = [tmp_path / "2", tmp_path / "4", *(launched.out / name for name in CASES
                                                if "float64" in name)]  # fmt: skip
    for out in others:
        torch.testing.assert_close(weights(out), one, rtol=1e-9, atol=1e-9)
    assert len(others) == 5


@pytest.mark.parametrize("case", ONE_PROCESS)
def test_odd_steps_are_the_same_for_one_process_and_several(
    launched, small, tmp_path, monkeypatch, case
):
    for patch in CASES[case][1]:
        globals()[patch](monkeypatch)
    argv = launched.argv[case]
    call([*argv, "--out", str(tmp_path)])
    assert_close_run(launched.out / case, tmp_path)
    if case == "no positives":
        rows = [row for row in log(tmp_path) if "loss" in row]
        assert all(row["box"] == row["ctr"] == 0 and row["cls"] > 0 for row in rows)


def test_several_processes_resume_bit_for_bit(launched):
    assert [(launched.out / f"killed {rank}").exists() for rank in range(4)] == [True] * 4
    assert_same_run(launched.out / "killed", launched.out / "four")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(launched):
    for rank in (0, 1):
        assert "step 5," in (launched.out / f"not finite {rank}").read_text()
    assert torch.load(launched.out / "not finite" / "last.pt", weights_only=True)["step"] == 4
    assert all(value.isfinite().all() for value in weights(launched.out / "not finite").values())


def test_ranks_that_see_different_folders_are_refused(launched):
    for rank in (0, 1):
        text = (launched.out / f"not shared {rank}").read_text()
        assert "one folder for all nodes" in text and "[0, 3]" in text
    assert not (launched.out / "not shared").exists()


def test_torchrun_restarts_stops_and_changes_the_number_of_nodes(launched, shapes, tmp_path):
    """One run of two processes through all that happens in a cluster: under two agents, as on two
    nodes, a rank is killed and both restart; both are told to stop; one agent ends the run.
    The weights are those of an undisturbed run, bit for bit."""
    script, out, last = tmp_path / "small.py", tmp_path / "run", tmp_path / "run" / "last.pt"
    script.write_text(f"import time, evaluate, fcos, train\nfcos.MODELS['shapes'] |= {SMALL}\n"
                      "lr_at = train.lr_at\n"
                      "train.lr_at = lambda *step: time.sleep(0.1) or lr_at(*step)\n"
                      "evaluate.run(train.main, train.parse_args())\n")  # fmt: skip
    argv = script, *flags(shapes, out, *CASES["undisturbed"][2], "--fresh")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two_nodes = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=two",
                 f"--rdzv_endpoint=127.0.0.1:{port}", "--max-restarts=3")  # fmt: skip
    agents = [torchrun(*two_nodes, *argv) for _ in range(2)]

    def wait_for_step(number):
        limit, step = time.monotonic() + PATIENCE, 0
        while step < number:
            assert [agent.poll() for agent in agents] == [None, None] and time.monotonic() < limit
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):  # between two renames
                step = torch.load(last, weights_only=True)["step"]

    wait_for_step(5)
    rank = int(Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text())
    os.kill(rank, signal.SIGKILL)
    wait_for_step(10)
    for agent in agents:
        agent.send_signal(signal.SIGTERM)
    said = "".join([agent.check(good=False) for agent in agents])  # torchrun says 1 when stopped
    assert re.search("going on after step (5|10) of 40", said), said
    assert "SIGTERM: stopped after step" in said, said
    step = torch.load(last, weights_only=True)["step"]
    assert 10 <= step < 40
    said = torchrun("--standalone", "--nproc_per_node=2", *argv[:-1]).check()
    assert f"going on after step {step} of 40" in said
    for (name, x), y in zip(weights(out).items(), weights(launched.out / "undisturbed").values()):
        assert torch.equal(x, y), name


def test_help_works_and_tells_every_recipe_flag():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True,
                          text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("--data", "--weights", "--accumulate", "--eval-every", "--precision", "--fresh"):
        assert flag in done.stdout
