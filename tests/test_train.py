"""train.py: the shapes data set, batches, the schedule, resuming, and any number of processes."""

import contextlib
import ctypes
import io
import itertools
import json
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
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
import fcos
import train
from fcos import UserError

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
RATE = train.RECIPES["shapes"]["lr"]  # for 8 images a step; half of it for 4
PATIENCE = 240  # seconds after which a process hangs, on however slow a machine
SMALL = ["--set", "stem=16", "channels=64"]  # what is made of the row `shapes` here, for speed
pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_3 = ["--eval-every", 3, "--checkpoint-every", 3]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A shapes data set of 24 pictures to train on and 4 to validate."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    train.make_shapes(root, train=24, val=4)
    return root


@pytest.fixture(autouse=True)
def no_process_left():
    """A test that fails leaves none behind, which could hold up those after it."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def flags(data, out, *more):
    """The command line of a small run of six steps; flags in `more` come last and win."""
    small = "--iters 6 --batch-size 4 --min-size 64 --max-size 96 --workers 0 --device cpu"
    return [
        "shapes",
        "--data",
        str(data),
        "--out",
        str(out),
        *small.split(),
        *SMALL,
        *map(str, more),
    ]


def call(argv):
    train.main(train.parse_args(argv))


def log(out, *leave_out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in leave_out} for row in rows]


def logged_losses(out):
    return [row for row in log(out, "images_per_second") if "loss" in row]


def metrics(out):
    return json.loads((Path(out) / "metrics.json").read_text())


def load(path):
    return torch.load(path, weights_only=True)


def weights(out, file="last.pt"):
    content = load(Path(out) / file)
    return content["model"]["model"] if file == "last.pt" else content["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_run(a, b):
    """Bit for bit: model, optimizer, averages, model.pt, metrics, and the log but for the speed."""
    one, other = (load(Path(out) / "last.pt") for out in (a, b))
    assert one["settings"] == other["settings"] and one["step"] == other["step"]
    buffers = [content["optimizer"]["state"] for content in (one, other)]
    assert buffers[0].keys() == buffers[1].keys() and buffers[0]
    for k in buffers[0]:
        assert torch.equal(buffers[0][k]["momentum_buffer"], buffers[1][k]["momentum_buffer"])
    assert_same_weights(one.get("ema", {}), other.get("ema", {}))
    for file in ("last.pt", "model.pt"):
        assert_same_weights(weights(a, file), weights(b, file))
    assert log(a, "images_per_second") == log(b, "images_per_second")
    assert metrics(a) == metrics(b)


def assert_close_run(a, b, tolerance=1e-4):
    """The same training but for the rounding of sums."""
    for file in ("last.pt", "model.pt"):
        torch.testing.assert_close(
            weights(a, file), weights(b, file), rtol=tolerance, atol=tolerance
        )
    for one, other in zip(logged_losses(a), logged_losses(b), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


# ---- the shapes data set -----------------------------------------------------------------------


def files(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


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

    monkeypatch.setattr(train, "draw_background", lambda rng, w, h: np.zeros((h, w, 3), np.float32))
    monkeypatch.setattr(train, "INKS", np.full((1, 3), 230, np.float32))
    seen, distances = set(), []
    for seed in range(80):
        picture, objects = train.draw_scene(np.random.default_rng(seed))
        if objects:
            ys, xs = np.nonzero(picture.min(2) > 40)
            x, y, w, h = objects[0]["bbox"]
            distances.append(
                np.subtract([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x, y, x + w, y + h])
            )
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


def test_what_a_killed_drawing_left_behind_goes_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / ".shapes-abcd" / "shapes").mkdir(parents=True)
    (tmp_path / "data" / ".shapes-abcd" / "shapes" / "1.jpg").write_bytes(b"half")
    monkeypatch.setattr(train, "make_shapes", lambda root: root.mkdir())
    train.draw_shapes("data/shapes")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["shapes"]


# ---- batches -----------------------------------------------------------------------------------


class Fake:
    """A data set of given (height, width) with a box an image; pixels tell their row and column."""

    def __init__(self, hw, trainable=None):
        self.hw, self.classes, self.files_read = np.array(hw), range(len(hw)), []
        self.columns, self.offsets = {}, np.arange(len(hw) + 1)
        self.trainable = np.ones(len(hw), bool) if trainable is None else np.array(trainable)

    def __len__(self):
        return len(self.hw)

    def image(self, i):
        h, w = self.hw[i]
        image = torch.zeros(3, h, w, dtype=torch.uint8)
        image[0], image[1] = int(i), torch.arange(w) % 256
        return image

    def path(self, i):
        return f"{i}.jpg"

    def target(self, i):
        h, w = self.hw[i].tolist()
        return torch.tensor([[1.0, 2, w / 2, h]]), torch.tensor([int(i)])

    sample, truth = evaluate.CocoDataset.sample, evaluate.CocoDataset.truth


MIXED = Fake([(40, 60), (60, 40), (50, 50), (30, 60), (45, 61), (64, 32), (33, 64)])


def batches(dataset=MIXED, rank=0, world_size=1, micro_batches=1, **settings):
    defaults = dict(
        seed=0,
        batch_size=4,
        min_size=[32, 48, 64],
        max_size=96,
        iters=30,
        negatives=False,
        augment=False,
        multiple=32,
    )
    return train.TrainBatches(dataset, defaults | settings, rank, world_size, micro_batches)


def shown(item):
    """The multiset of (row, size, flipped, stamp) of an item, from its pixels."""
    images, sizes, labels, counts = (item[name] for name in ("images", "sizes", "labels", "counts"))
    assert len(images) == len(sizes) == len(counts) and sum(counts) == len(labels)
    rows = [label[0].item() for label in labels.split(counts)]
    seen = []
    for image, (h, w), row in zip(images, sizes.tolist(), rows):
        assert image[0, :h, :w].unique().tolist() == [row]
        assert image[:, h:].sum() == 0 and image[:, :, w:].sum() == 0
        seen.append((row, h, w, flipped(image[:, :h, :w]), image[2, 0, 0].item()))
    return seen


def flipped(image):
    """Whether an image of Fake is seen in a mirror."""
    return bool(image[1, 0, 0] > image[1, 0, -1])


def stamp(monkeypatch):
    """An augmentation that writes the random numbers that it was given into the blue pixels."""
    augment = train.augment

    def stamped(sample, rng):
        sample = augment(sample, rng)
        image = sample["image"].clone()
        image[2] = int(rng.integers(1, 256))
        return sample | {"image": image}

    monkeypatch.setattr(train, "augment", stamped)


@pytest.mark.parametrize(
    "world_size, micro_batches", [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (3, 1)]
)
def test_a_step_is_the_same_however_it_is_divided(monkeypatch, world_size, micro_batches):
    """Its images, their sizes and their augmentation."""
    stamp(monkeypatch)
    whole, stamps = batches(), set()
    shares = [batches(MIXED, rank, world_size, micro_batches) for rank in range(world_size)]
    for step in range(10):
        expected = whole[step]
        items = [share[step * micro_batches + m] for share in shares for m in range(micro_batches)]
        assert sorted(sum(map(shown, items), [])) == sorted(shown(expected))
        assert {item["images"].shape[2:] for item in items} == {expected["images"].shape[2:]}
        assert all(len(item["images"]) >= 4 // (world_size * micro_batches) for item in items)
        stamps |= {row[-1] for row in shown(expected)}
    assert len(shares[0]) == 30 * micro_batches and len(stamps) > 30  # of 40 from 255


COCO_HW = [  # usual sizes of COCO's images, the most frequent twice
    tuple(map(int, size.split("x")))
    for size in """480x640 480x640 427x640 427x640 640x480 640x480 640x427 426x640 612x612 375x500
    333x500 500x375 640x640 360x640 424x640 640x425 281x500 640x360 300x640 523x640 640x512 457x640
    640x540 213x640 640x238""".split()
]


def test_padded_sizes_are_multiples_but_not_beyond_the_largest_image():
    counts = []
    for multiple in (32, 128):
        settings = dict(min_size=[800], max_size=1333, batch_size=2, iters=200, multiple=multiple)
        made = batches(Fake(COCO_HW), **settings)
        plans = [made.plan(step) for step in range(200)]
        for plan in plans:
            (H, W), (h, w) = plan.padded_hw, fcos.padded_hw(plan.sizes)
            assert h <= H < h + multiple and w <= W < w + multiple
            assert min(H, W) <= 800 and max(H, W) <= 1344
        sizes = {plan.padded_hw for plan in plans}
        assert len(sizes) <= made.count_padded_sizes()
        counts.append(len(sizes))
    allowed = {800, 1344, *range(128, 1344, 128)}
    assert all(side in allowed for hw in sizes for side in hw)
    assert counts[0] > 8 and counts[1] < counts[0]


def test_a_compiled_run_stays_compiled_for_every_padded_size():
    """In a process of its own: after torch.compile, autograd refuses to work in a fork."""
    process = multiprocessing.get_context("fork").Process(target=compile_every_padded_size)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0


def compile_every_padded_size():
    """More padded sizes than torch.compile's limit of eight; see train.Graphs."""
    train.Graphs.backend = "eager"
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, name, 8)
    settings = dict(min_size=[96, 128], max_size=208, batch_size=1, iters=60)
    made = batches(Fake(COCO_HW), **settings)
    model = fcos.build("shapes", 2, stem=16, channels=64, blocks=(1, 1, 1, 1))
    graphs = train.compile_model(model, made)
    sizes = list(dict.fromkeys(made.plan(step).padded_hw for step in range(60)))[:11]
    assert len(sizes) > 8
    order = sizes + sizes
    for hw in order:
        model(torch.zeros(1, 3, *hw, dtype=torch.uint8), torch.tensor([hw]))
    assert graphs.counts(len(order)) == {"graphs": len(sizes), "eager_passes": 0}
    assert graphs.counts(len(order) + 1)["eager_passes"] == 1  # a pass that used no graph


def test_a_step_depends_on_the_seed_and_not_on_those_before_or_after_it():
    def steps(order, **settings):
        made = batches(**settings)
        found = {step: (str(made.plan(step)), shown(made[step])) for step in order}
        return [found[step] for step in range(30)]

    assert steps(range(30)) == steps(reversed(range(30))) == steps(range(30), iters=50)
    assert sum(a == b for a, b in zip(steps(range(30)), steps(range(30), seed=1))) < 3


def test_streams_of_random_numbers_are_independent():
    """NumPy takes the keys (2, 5) and (2, 5, 0) for one. A purpose that is new needs no entry."""
    places = [
        ("group",),
        *(("sizes", step) for step in (0, 1, 256)),
        *(
            (name, *at)
            for name in ("augment", "augment_more", "order", "mosaic", "sizes")
            for at in ((0, 0), (0, 1), (1, 0))
        ),
        ("mosaic", 0),
        ("mosaic", 0, 0, 0),
    ]

    def draw(place, seed):
        made = batches(seed=seed)
        made.drawn.clear()
        return tuple(made.rng(*place).integers(2**60, size=2))

    drawn = [draw(place, seed) for place in places for seed in (0, 1)]
    assert len(set(drawn)) == len(drawn)
    assert {(name, len(at)) for name, *at in places} >= set(train.STREAMS)
    assert draw(("sizes", 1), 0) == tuple(
        batches(MIXED, 1, 2, 2).rng("sizes", 1).integers(2**60, size=2)
    )


def test_every_epoch_of_a_group_is_a_permutation_of_it():
    made = batches(iters=200)
    drawn = {0: [], 1: []}
    for step in range(200):
        drawn[made.group_of_step[step]] += made.plan(step).indices
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
        rows, sizes, padded = made.plan(step)
        assert len(rows) == len(sizes) == 6
        assert len({h >= w for h, w in MIXED.hw[rows]}) == 1
        assert padded == fcos.padded_hw(sizes)


@pytest.mark.parametrize("hw", [[(40, 60)], [(60, 40)] * 3, [(50, 50), (60, 40)], [(40, 60)] * 5])
def test_few_images_and_one_aspect_fill_any_batch(hw):
    made = batches(Fake(hw), batch_size=16, iters=5)
    assert all(len(made[step]["images"]) == 16 for step in range(5))
    rows = sum((made.plan(step).indices for step in range(5)), [])
    assert np.ptp(np.bincount(rows, minlength=len(hw))) <= 1  # all equally often


def test_the_groups_decide_the_shares(monkeypatch):
    """Rows that are repeated, as in repeat-factor sampling, are drawn more often; a third group
    gets its share."""
    rows = {0: [0], 1: [1, 1, 1, 2, 2, 5], 2: [6] * 3}
    monkeypatch.setattr(train, "aspect_groups", lambda *_: tuple(map(np.array, rows.values())))
    made = batches(iters=1000)
    share = np.bincount(made.group_of_step) / 1000
    assert share == pytest.approx([0.1, 0.6, 0.3], abs=0.05)
    drawn = np.bincount(sum((made.plan(step).indices for step in range(1000)), []), minlength=7)
    assert drawn[1] / drawn[2] == pytest.approx(1.5, abs=0.1) and drawn[3] == drawn[4] == 0


def test_enabling_an_option_shifts_no_other_stream(monkeypatch):
    """--augment with all its draws leaves groups, rows, sizes and mirrored images as they are."""
    monkeypatch.setattr(train, "augment_more", lambda sample, rng: rng.random(9) is None or sample)
    plain, more = batches(), batches(augment=True)
    for step in range(10):
        assert str(plain.plan(step)) == str(more.plan(step))
        assert shown(plain[step]) == shown(more[step])
    with pytest.raises(ValueError, match="'sizes' at .3,. is taken twice"):
        plain.plan(3)
        plain.rng("sizes", 3)
    assert len(shown(plain[3])) == 4  # the next item takes its streams again


def mosaic(monkeypatch):
    """Let every sample show a second image, whose row comes from a stream of its own."""

    def read(self, i, hw, step, slot):
        other = self.rng("mosaic", step, slot).integers(len(self.dataset))
        first, second = (self.dataset.sample(k, hw) for k in (i, other))
        return {name: torch.cat([first[name], second[name]]) for name in first}

    monkeypatch.setattr(train.TrainBatches, "read", read)


def test_errors_in_a_sample_name_every_file_that_was_read_for_it(shapes, tmp_path, monkeypatch):
    data = shutil.copytree(shapes, tmp_path / "data")
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(data, "train2017"))
    mosaic(monkeypatch)
    made = batches(dataset, iters=20)
    dataset.files_read.append(Path("old"))
    with pytest.raises(UserError, match="train2017/.*, .*train2017/[^,]*: augment made") as stop:
        made[0]  # images of six channels: refused
    assert "old" not in str(stop.value)
    monkeypatch.setattr(train, "augment", lambda sample, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError) as stop:
        made[1]
    assert len(re.findall("train2017", str(stop.value.__notes__))) == 2
    (data / "train2017" / "000000000003.jpg").write_bytes(b"broken")
    for step in range(20):
        with pytest.raises((ZeroDivisionError, UserError)) as stop:
            made[step]
        if stop.type is UserError:
            assert str(stop.value).startswith(f"{data}/train2017/000000000003.jpg: ")
            break
    else:
        pytest.fail("the broken image was never read")


def test_a_column_without_a_rule_is_refused_by_name(monkeypatch):
    sample = Fake([(32, 64)]).sample(0, (32, 64)) | {"angles": torch.zeros(1)}
    for change in train.augment, train.augment_more:
        with pytest.raises(UserError, match="column 'angles': expected a rule"):
            for seed in range(20):
                change(sample, np.random.default_rng(seed))
    rules = dict(mirror=lambda angles, *_: -angles, crop=lambda angles, *_: angles)
    monkeypatch.setitem(train.COLUMNS, "angles", rules)
    for seed in range(20):
        made = train.augment_more(sample, np.random.default_rng(seed))
        made = train.augment(made, np.random.default_rng(seed))
        assert len(made["angles"]) == len(made["boxes"])


def test_images_without_boxes_to_learn_are_never_drawn():
    made = batches(Fake([(40, 60)] * 4, trainable=[True, False, True, False]))
    assert set(itertools.chain(*(made.plan(step).indices for step in range(10)))) == {0, 2}


def test_all_sizes_and_both_flips_are_drawn_and_boxes_follow_their_pixels():
    made, sides, flips = batches(iters=50), set(), []
    for step in range(50):
        rows, sizes, _ = made.plan(step)
        batch = made[step]
        assert batch["counts"] == [1] * 4 and batch["labels"].tolist() == rows
        for image, box, row, (h, w) in zip(batch["images"], batch["boxes"], rows, sizes):
            old_h, old_w = MIXED.hw[row]
            x1, y1, x2, y2 = 1 / old_w * w, 2 / old_h * h, w / 2, h
            flips.append(flipped(image[:, :h, :w]))
            if flips[-1]:
                x1, x2 = w - x2, w - x1
            assert box.tolist() == pytest.approx([x1, y1, x2, y2], abs=1e-4)
            sides.add(min(h, w))
    assert sides >= {32, 48} and 0.35 < np.mean(flips) < 0.65
    assert [fcos.resized_hw(40, 60, size, 96) for size in (32, 48)] == [(32, 48), (48, 72)]


def test_a_flip_mirrors_pixels_and_boxes_exactly():
    sample, seen = Fake([(32, 64)]).sample(0, (32, 64)), []
    for seed in range(20):
        made = train.augment(sample, np.random.default_rng(seed))
        seen.append((made["image"][1, 0].tolist(), *made["boxes"].tolist()))
    columns = list(range(64))
    straight, mirrored = (columns, [1, 2, 32, 32]), (columns[::-1], [32, 2, 63, 32])
    assert straight in seen and mirrored in seen
    assert all(row in (straight, mirrored) for row in seen)


def test_a_cropping_augmentation_trains_alike_with_any_workers_and_micro_batches(
    shapes, tmp_path, monkeypatch
):
    """It makes images smaller, and drops boxes, of some images all."""

    def crop(sample, rng):
        h, w = (int(side * rng.uniform(0.5, 1)) for side in sample["image"].shape[1:])
        boxes = sample["boxes"].clamp(max=torch.tensor([w, h, w, h]))
        inside = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)
        image, labels = sample["image"][:, :h, :w], sample["labels"][inside]
        return {"image": image, "boxes": boxes[inside], "labels": labels}

    monkeypatch.setattr(train, "augment", crop)
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    batch = batches(dataset)[0]
    assert (batch["sizes"] < torch.tensor(batches(dataset).plan(0).sizes)).any()
    assert sum(batch["counts"]) > 0
    for n in (1, 2):
        call(flags(shapes, tmp_path / f"{n}", "--iters", 3, "--workers", n - 1, "--accumulate", n))
    assert_close_run(tmp_path / "1", tmp_path / "2")


# ---- schedule and settings ---------------------------------------------------------------------


RATES = {  # recipe: {step: learning rate}
    "fcos_imprv_R_50_FPN_1x": {0: 1 / 300, 499: 1 / 300, 500: 0.01, 59_999: 0.01, 60_000: 0.001}
    | {79_999: 0.001, 80_000: 0.0001, 89_999: 0.0001},
    "fcos_R_101_FPN_2x": {119_999: 0.01, 120_000: 0.001, 159_999: 0.001, 160_000: 0.0001},
}


@pytest.mark.parametrize("recipe, rates", RATES.items())
def test_the_learning_rate_is_the_published_one(recipe, rates):
    given = [settings(recipe)[name] for name in ("lr", "iters", "warmup", "decays")]
    assert {step: train.lr_at(step, *given) for step in rates} == pytest.approx(rates)


def test_every_recipe_names_a_row_of_models():
    assert {recipe["model"] for recipe in train.RECIPES.values()} <= fcos.MODELS.keys()


def test_biases_learn_twice_as_fast_and_do_not_decay():
    model = fcos.build("fcos_R_50_FPN")
    groups = train.parameter_groups(model, 0.1)
    group_of = {id(p): group for group in groups for p in group["params"]}
    kinds = {}
    for name, p in model.named_parameters():
        frozen = name.startswith(("backbone.stem", "backbone.res2"))
        assert (id(p) in group_of) == p.requires_grad == (not frozen), name
        if not frozen:
            group = group_of[id(p)]
            assert group["lr"] == (0.2 if "bias" in name else 0.1), name
            assert group["weight_decay"] == (0 if "bias" in name else 1e-4), name
            kinds["bias" in name] = kinds.get("bias" in name, 0) + p.numel()
    assert sum(kinds.values()) == 32_021_850  # what the official model trains


def settings(*argv):
    return train.resolve(train.parse_args([*argv]))


def data_of(*argv):
    return train.find_data(train.parse_args([*argv]))


def test_flags_beat_the_recipe_and_the_rate_follows_the_batch():
    assert settings()["recipe"] == "fcos_imprv_R_50_FPN_1x"
    annotations, _ = data_of()["train"]
    assert annotations == Path("data/coco/annotations/instances_train2017.json")
    assert data_of("shapes")["val"][1] == Path("data/shapes/val2017")
    assert data_of("shapes", "--data", "here")["val"][1] == Path("here/val2017")
    assert settings("--batch-size", "4")["lr"] == pytest.approx(0.0025)
    assert settings("--batch-size", "4", "--lr", "0.3")["lr"] == 0.3
    line = "--iters 7 --min-size 5 6 --max-size 9 --weights w.pkl --seed 3 --ema 0.5"
    given = settings(*line.split(), "--precision", "bf16")
    expected = dict(iters=7, min_size=[5, 6], max_size=9, weights="w.pkl", seed=3, ema=0.5)
    expected |= dict(precision="bf16", model="fcos_imprv_R_50_FPN", warmup=0, lr=0.01)
    assert {key: given[key] for key in expected} == expected
    warmups = [settings("--iters", n)["warmup"] for n in ("4999", "5000", "90000")]
    assert warmups == [499, 500, 500]  # a tenth of a run that is too short for the recipe's
    before = json.dumps([train.RECIPES, fcos.MODELS])
    row = settings()["keywords"]
    levels = "levels=[3,4,5] ranges=[64,128]"
    changed = settings(*f"--min-size 1 --set radius=0 {levels} --set norm=bn".split())
    assert changed["keywords"] == row | dict(
        radius=0, levels=(3, 4, 5), ranges=(64, 128), norm="bn", test_size=(1, 1333)
    )
    assert json.dumps([train.RECIPES, fcos.MODELS]) == before


def test_every_flag_is_stored_unless_it_says_how_the_run_runs(monkeypatch):
    """A flag that someone adds, too: there is no list of flags that could forget it."""
    ours = train.make_parser

    def with_flag(group):
        def make_parser():
            parser = ours()
            found = [g for g in parser._action_groups if g.title == group]
            (found[0] if found else parser.add_argument_group(group)).add_argument("--mixup")
            return parser

        return make_parser

    for group, stored in ("a new group", True), ("what is trained, instead of the recipe's", True):
        monkeypatch.setattr(train, "make_parser", with_flag(group))
        assert settings("--mixup", "3")["mixup"] == "3"
        assert settings()["mixup"] is None and stored
    monkeypatch.setattr(train, "make_parser", with_flag(train.HOW_IT_RUNS))
    assert "mixup" not in settings("--mixup", "3")
    assert not settings().keys() & {"out", "workers", "accumulate", "eval_every", "device", "fresh"}


def test_own_data_comes_by_four_paths():
    paths = ["--train-images", "--train-annotations", "--val-images", "--val-annotations"]
    own = data_of(*itertools.chain(*((flag, flag[2:]) for flag in paths)))
    assert own == {split: (f"{split}-annotations", f"{split}-images") for split in ("train", "val")}
    with pytest.raises(UserError, match="all of --train-images, --train-annotations"):
        data_of("--train-images", "there")


# ---- a run and its files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A finished run of six steps, evaluated after three and at the end -> folder, stdout"""
    out, stdout = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with contextlib.redirect_stdout(stdout):
        call(flags(shapes, out, *EVERY_3))
    return SimpleNamespace(out=out, stdout=stdout.getvalue().splitlines())


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a finished run, to be changed."""
    return shutil.copytree(finished.out, tmp_path / "run")


@pytest.fixture
def half(copied):
    """The folder of a run that ended after three of six steps, or between the renames of a save."""
    (copied / "last.pt").unlink()
    return copied


def test_a_run_leaves_four_files_and_its_metrics_as_the_last_line(finished, shapes):
    names = "last.pt log.jsonl metrics.json model.pt previous.pt"
    assert sorted(path.name for path in finished.out.iterdir()) == names.split()
    found = metrics(finished.out)
    assert list(found) == [*evaluate.METRICS, "step"] and json.loads(finished.stdout[-1]) == found

    rows = log(finished.out)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    for row in rows:
        if "loss" in row:
            assert row["loss"] == pytest.approx(row["cls"] + row["box"] + row["ctr"])
            assert row["lr"] == pytest.approx(RATE / 2 * 0.1 ** max(row["step"] - 4, 0))
            assert row["images_per_second"] > 0
    assert max((row for row in rows if "AP" in row), key=lambda row: row["AP"]) == found

    last, previous = (load(finished.out / name) for name in ("last.pt", "previous.pt"))
    assert (last["step"], previous["step"]) == (6, 3) and last["settings"]["lr"] == RATE / 2
    rates = [group["lr"] for group in last["optimizer"]["param_groups"]]
    assert rates == pytest.approx([RATE / 200, RATE / 100])  # of weights, of biases
    model = fcos.load(finished.out / "model.pt")
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "val2017"))
    assert (model.classes, model.category_ids) == (dataset.classes, dataset.category_ids)
    assert model.test_size == (64, 96) and not model.convention["inclusive"]
    evaluated = {3: previous, 6: last}[found["step"]]["model"]["model"]
    assert_same_weights(model.state_dict(), evaluated)


def test_the_settings_and_the_rates_that_run_are_printed(finished):
    text = re.sub(" +", " ", "\n".join(finished.stdout))
    rates = {1: RATE / 2, 5: RATE / 20, 6: RATE / 200}
    for line in (
        "iters 6",
        "batch_size 4",
        *(f"learning rate from step {step} {rate:.9g}" for step, rate in rates.items()),
    ):
        assert line in text, line


def test_training_learns_something(shapes, tmp_path):
    call(flags(shapes, tmp_path, "--iters", "25", "--lr", "0.02"))
    rows = [row["loss"] for row in logged_losses(tmp_path)]
    assert np.mean(rows[-3:]) < np.mean(rows[:3]) - 0.2


def test_bf16_is_for_the_network_and_the_weights_stay_float32(shapes, tmp_path):
    # Here P7 has more than one cell: for a single one PyTorch's bf16 convolution on the CPU
    # reads uninitialised memory in its backward pass (2.15), which stops the run as it should.
    size = "--min-size", 160, "--max-size", 224
    call(flags(shapes, tmp_path, "--iters", 2, "--precision", "bf16", *size))
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    assert all(np.isfinite(row["loss"]) for row in logged_losses(tmp_path))


def test_strong_augmentation_is_a_function_of_its_stream_and_keeps_boxes_on_their_objects():
    """A bright square on dark ground: wherever it goes, its box goes, in every colour."""
    torch.manual_seed(0)
    crops = gone = 0
    for seed in range(60):
        image = torch.full((3, 64, 80), 20, dtype=torch.uint8)
        x, y = np.random.default_rng(seed).integers(4, 40, 2).tolist()
        image[:, y : y + 16, x : x + 20] = 220
        boxes, labels = torch.tensor([[x, y, x + 20, y + 16]]).float(), torch.tensor([3])
        sample = {"image": image, "boxes": boxes, "labels": labels}
        made = [train.augment_more(sample, np.random.default_rng(seed)) for _ in range(2)]
        assert made[0].keys() == made[1].keys() == sample.keys()
        assert all(made[0][name].equal(made[1][name]) for name in sample)
        picture, moved, kept = (made[0][name] for name in ("image", "boxes", "labels"))
        assert picture.shape == image.shape and picture.dtype == torch.uint8
        assert len(moved) == len(kept) and not picture.equal(image)
        bright = picture.float().mean(0)
        bright = bright > (bright.min() + bright.max()) / 2
        gone += len(kept) == 0
        if len(kept):
            ys, xs = bright.nonzero().T
            seen = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (seen - moved[0]).abs().max() <= 2
            crops += (moved[0, 2:] - moved[0, :2] - torch.tensor([20, 16])).abs().max() > 1
    assert crops > 10 and gone > 0


def test_images_without_objects_are_trained_on_when_asked_for(shapes, tmp_path, capsys):
    path, _ = evaluate.coco_paths(shapes, "train2017")
    content = json.loads(path.read_text())
    bare = content["images"][0]["id"]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != bare]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").symlink_to(shapes / f"{split}2017")
    (tmp_path / "annotations" / path.name).write_text(json.dumps(content))
    val, _ = evaluate.coco_paths(shapes, "val2017")
    shutil.copy(val, tmp_path / "annotations")
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(tmp_path, "train2017"))
    row = dataset.image_ids.tolist().index(bare)
    for negatives in (False, True):
        plans = batches(dataset, batch_size=len(dataset), negatives=negatives)
        drawn = {row for step in range(6) for row in plans.plan(step).indices}
        assert (row in drawn) == negatives
    call(flags(tmp_path, tmp_path / "run", "--negatives", "--augment", "--iters", 2))
    assert "1 of" in (said := capsys.readouterr().out) and "are negatives" in said
    assert load(tmp_path / "run" / "last.pt")["settings"]["negatives"] is True
    with pytest.raises(UserError, match="augment True there, False here"):
        call(flags(tmp_path, tmp_path / "run", "--negatives", "--iters", 2))


def test_a_run_ends_with_what_to_do_next_and_its_metrics_last(finished, shapes, tmp_path, capsys):
    call(flags(shapes, tmp_path / "run", "--iters", 2))
    *_, next_command, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == metrics(tmp_path / "run")
    script, model, *_ = next_command.removeprefix("python ").split()
    assert (ROOT / script).exists() and Path(model) == tmp_path / "run" / "model.pt"
    with pytest.raises(UserError, match="iters 2 there, 4 here.*--weights .*last.pt to continue"):
        call(flags(shapes, tmp_path / "run", "--iters", 4))
    on = flags(shapes, tmp_path / "on", "--iters", 4, "--weights", tmp_path / "run" / "last.pt")
    call(on)


class Killed(BaseException):
    pass


def kill():
    raise Killed


def at_step(number, action, monkeypatch=None):
    """Let `action` happen in the midst of a step, counted from 0, of the next run."""
    update, monkeypatch = train.update, monkeypatch or pytest.MonkeyPatch()

    def acting(step, *rest):
        if step == number:
            monkeypatch.setattr(train, "update", update)
            action()
        update(step, *rest)

    monkeypatch.setattr(train, "update", acting)


def call_until(step, argv):
    """A run that dies in the midst of a step, counted from 0."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(step, kill, patch)
        call(argv)


def test_a_killed_run_resumes_bit_for_bit(finished, shapes, tmp_path, capsys):
    argv = flags(shapes, tmp_path, *EVERY_3)
    call_until(5, argv)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 3, 4, 5]
    call(argv)
    assert "resumes after step 3 of 6" in capsys.readouterr().out
    assert_same_run(tmp_path, finished.out)


def test_resuming_takes_another_number_of_micro_batches_and_workers(finished, shapes, tmp_path):
    argv = flags(shapes, tmp_path, "--eval-every", 3, "--checkpoint-every", 2)
    call_until(4, argv)
    call([*argv, "--accumulate", "2", "--workers", "1"])
    assert_close_run(tmp_path, finished.out)


def rewrite(name, change):
    """A function: change the bytes of a file of a run."""

    def prepare(out):
        (out / name).write_bytes(change((out / name).read_bytes()))

    return prepare


TORN = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "overwritten": lambda content: b"\0" * 4096 + content[4096:],
}
LEFT = {  # what a crash has left of a finished run: a preparation, and what the next call says
    "all": (lambda out: None, "step 6 of 6"),
    "previous.pt, between two renames": (lambda out: (out / "last.pt").unlink(), "step 3 of 6"),
    "no log": (lambda out: (out / "log.jsonl").unlink(), "step 6 of 6"),
    "a torn log": (rewrite("log.jsonl", lambda content: content[:-9]), "step 6 of 6"),
    **{
        f"a last.pt that is {how}": (rewrite("last.pt", tear), "previous.pt takes its place")
        for how, tear in TORN.items()
    },
}


@pytest.mark.parametrize("prepare, words", LEFT.values(), ids=LEFT)
def test_whatever_a_crash_has_left_resumes_bit_for_bit(
    copied, finished, shapes, capsys, prepare, words
):
    prepare(copied)
    call(flags(shapes, copied, *EVERY_3))
    said = capsys.readouterr().out
    assert words in said and json.loads(said.splitlines()[-1]) == metrics(finished.out)
    assert_same_run(copied, finished.out)


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_two_torn_checkpoints_are_named_and_kept(copied, shapes, capsys, tear):
    for name in ("last.pt", "previous.pt"):
        rewrite(name, tear)(copied)
    before = files(copied)
    code, (line,) = mistake(capsys, flags(shapes, copied, *EVERY_3))
    assert code == 2 and all(text in line for text in ("last.pt", "previous.pt", "--fresh"))
    assert files(copied) == before


def test_fresh_removes_the_older_run_once_it_has_a_checkpoint_of_its_own(copied, shapes, capsys):
    before = files(copied)
    argv = flags(shapes, copied, "--seed", "1", "--iters", "4", "--checkpoint-every", 2)
    call_until(1, [*argv, "--fresh"])
    assert files(copied) == before
    call_until(3, [*argv, "--fresh"])
    assert files(copied).keys() == {"last.pt", "log.jsonl"}
    assert [row["step"] for row in log(copied)] == [1, 2, 3]
    capsys.readouterr()
    call(argv)
    assert "resumes after step 2 of 4" in capsys.readouterr().out
    assert [row["step"] for row in logged_losses(copied)] == [1, 2, 3, 4]
    assert load(copied / "last.pt")["settings"]["seed"] == 1 and metrics(copied)["step"] == 4


@pytest.mark.parametrize("moment", range(6))
def test_fresh_killed_at_any_moment_of_a_save_leaves_one_run(copied, shapes, monkeypatch, moment):
    """The log and the checkpoint are both of the older run or, after the first rename, of the new
    one."""
    left = itertools.count(moment, -1)

    def dying(function):
        return lambda *args, **more: kill() if next(left) == 0 else function(*args, **more)

    argv = flags(shapes, copied, "--seed", "1", "--iters", "4", "--checkpoint-every", 2)
    checkpoint = train.RunFiles.checkpoint

    def watched(self, *rest):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", dying(Path.unlink))
            patch.setattr(os, "replace", dying(os.replace))
            checkpoint(self, *rest)

    before = files(copied)
    monkeypatch.setattr(train.RunFiles, "checkpoint", watched)
    with pytest.raises(Killed):
        call([*argv, "--fresh"])
    monkeypatch.undo()
    if moment == 0:
        assert files(copied) == before
        return
    call(argv)
    assert [row["step"] for row in logged_losses(copied)] == [1, 2, 3, 4]
    assert load(copied / "last.pt")["settings"]["seed"] == 1
    assert files(copied).keys() == before.keys()


def test_a_second_run_in_one_folder_is_refused_while_the_first_lives(
    finished, shapes, tmp_path, capsys
):
    """Once it is killed, its loader workers do not block the next."""
    argv = flags(shapes, tmp_path / "run", *EVERY_3, "--workers", 1)
    started = tmp_path / "started"

    def wait():
        started.touch()
        time.sleep(PATIENCE)

    first = fork(argv, tmp_path / "told", lambda: at_step(1, wait))
    while not started.exists():
        assert first.is_alive()
        time.sleep(0.05)
    before = files(tmp_path / "run")
    code, (line,) = mistake(capsys, [*argv, "--fresh"])
    assert code == 2 and line.endswith("run: another process writes there; choose another --out")
    assert files(tmp_path / "run") == before
    first.kill()
    first.join()
    call(argv)
    assert_same_run(tmp_path / "run", finished.out)


def test_a_folder_that_is_removed_under_a_run_is_made_again(shapes, tmp_path, capsys):
    out = tmp_path / "run"
    at_step(4, lambda: shutil.rmtree(out))
    call(flags(shapes, out, *EVERY_3))
    assert {"last.pt", "log.jsonl"} <= files(out).keys()
    assert metrics(out) == json.loads(capsys.readouterr().out.splitlines()[-1])

    def replace():
        shutil.rmtree(out)
        out.write_text("in the way")

    at_step(5, replace)
    code, lines = mistake(capsys, flags(shapes, out, "--fresh"))
    assert code == 2 and lines[-1].endswith("no checkpoint could be written, so this run is lost")
    assert "holds the model" not in str(lines) and "resumes" not in str(lines)


@pytest.mark.parametrize("eval_every", [1, 2])
def test_patience_ends_a_run_exactly_where_it_would_uninterrupted(
    shapes, tmp_path, monkeypatch, capsys, eval_every
):
    """The rate changes last after step 16 of 18: two evaluations after it, which find no better
    model, end the run. A call that was interrupted in between ends at the same step."""
    monkeypatch.setattr(train, "DECAYS", [6, 8])
    monkeypatch.setitem(train.RECIPES["shapes"], "decays", [6, 8])
    aps = [0.5 if step == 3 else 0.4 - step / 1000 for step in range(19)]
    score_in_turn(monkeypatch, aps)
    more = "--iters", 18, "--eval-every", eval_every, "--patience", 2, "--checkpoint-every", 5
    argv = flags(shapes, tmp_path / "whole", *more)
    call(argv)
    stop = (8 // eval_every + 2) * eval_every
    assert logged_losses(tmp_path / "whole")[-1]["step"] == stop
    assert load(tmp_path / "whole" / "last.pt")["step"] == stop
    before = files(tmp_path / "whole")
    call(argv)
    assert files(tmp_path / "whole").keys() == before.keys()
    assert load(tmp_path / "whole" / "last.pt")["step"] == stop
    for step in 6, stop - 1:
        call_until(step, [*argv, "--out", str(tmp_path / f"{step}")])
        call([*argv, "--out", str(tmp_path / f"{step}")])
        assert_same_run(tmp_path / f"{step}", tmp_path / "whole")
    capsys.readouterr()
    code, (line,) = mistake(capsys, flags(shapes, tmp_path / "new", "--patience", 2))
    assert code == 2 and "--patience needs --eval-every" in line


def edited(shapes, root, split, change):
    """A copy of a data set whose annotations of a split are changed."""
    path, _ = evaluate.coco_paths(shutil.copytree(shapes, root), f"{split}2017")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


def test_without_a_box_to_learn_nothing_is_trained(shapes, tmp_path, capsys):
    def crowds(content):
        for box in content["annotations"]:
            box["iscrowd"] = 1

    def outside(content):
        for box in content["annotations"]:
            box["bbox"][:2] = 1000, 1000

    for change, words in (crowds, "crowds"), (outside, "no area inside their image"):
        data = edited(shapes, tmp_path / change.__name__, "train", change)
        code, (line,) = mistake(capsys, flags(data, tmp_path / "out"))
        assert code == 2 and "image with a box to train on" in line and words in line, line
        assert not (tmp_path / "out").exists()


def test_without_a_box_to_find_the_last_model_is_kept(shapes, tmp_path, capsys):
    data = edited(shapes, tmp_path / "data", "val", lambda content: content.update(annotations=[]))
    call(flags(data, tmp_path / "out", "--eval-every", 3))
    said = capsys.readouterr().out
    assert "has no boxes" in said.split("optimizer")[0]
    assert metrics(tmp_path / "out")["step"] == 6 and metrics(tmp_path / "out")["AP"] == -1


def test_boxes_that_no_location_gets_are_reported_with_a_remedy(shapes, tmp_path, capsys):
    def shrink(content):
        for box in content["annotations"]:
            if box["category_id"] == 3:
                box["bbox"][2:] = 6, 6

    call(flags(shapes, tmp_path / "plain", "--iters", 1))
    assert "warning" not in capsys.readouterr().out
    data = edited(shapes, tmp_path / "data", "train", shrink)
    call(flags(data, tmp_path / "small", "--iters", 1))
    said = capsys.readouterr().out
    report = re.search(r"rectangle: boxes of (\d+) pixels .* (\d+)% of \d+ without", said)
    assert int(report[1]) <= 4 and int(report[2]) > 50
    remedy = re.search(
        r"warning: many boxes are too small .* --min-size (\d+) --max-size (\d+)", said
    )
    assert int(remedy[1]) > 64 and int(remedy[2]) > 96
    call(flags(data, tmp_path / "larger", "--iters", 1, *remedy[0].split()[-4:]))
    assert "warning" not in capsys.readouterr().out


def test_a_first_start_may_find_its_weights_in_its_own_folder(finished, shapes, tmp_path):
    (tmp_path / "start.pt").write_bytes((finished.out / "model.pt").read_bytes())
    call(flags(shapes, tmp_path, "--weights", tmp_path / "start.pt", "--iters", 1))
    assert (tmp_path / "model.pt").exists() and (tmp_path / "start.pt").exists()


def test_fresh_resumes_from_a_checkpoint_of_its_own_launch_only(copied, shapes, monkeypatch):
    """As torchrun's restarts do: the first start may have ended before it removed the old run."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setattr(evaluate, "start_process", lambda *_: (0, 1, torch.device("cpu")))
    argv = flags(shapes, copied, "--fresh", "--checkpoint-every", 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    call_until(3, argv)
    assert load(copied / "last.pt")["step"] == 2  # of 6 in the old run
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    said = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: said.append(" ".join(map(str, a))))
    call(argv)
    assert any("resumes after step 2 of 6" in line for line in said)


# ---- the best evaluation -----------------------------------------------------------------------


def score_in_turn(monkeypatch, values):
    """Let the AP of each model that is evaluated be the next of `values`, or what it was before.
    -> {AP: the weights that were evaluated}"""
    values, seen = iter(values), {}

    def predict(model, *_):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        same = [ap for ap in seen if torch.equal(seen[ap]["head.cls.bias"], state["head.cls.bias"])]
        ap = same[0] if same else next(values)
        seen[ap] = state
        return ap

    monkeypatch.setattr(evaluate, "predict", predict)
    monkeypatch.setattr(evaluate, "score", lambda ap, _: {"AP": ap})
    return seen


def test_model_pt_is_of_the_best_evaluation_however_the_run_went(
    shapes, tmp_path, monkeypatch, capsys
):
    """Killed after the best evaluation, which is then repeated; after the next checkpoint, which
    knows of it; and in the midst of it."""
    seen = score_in_turn(monkeypatch, [0.1, 0.5, 0.3, 0.4])
    more = "--iters", 8, "--eval-every", 2, "--checkpoint-every", 5
    whole = tmp_path / "whole"
    call(flags(shapes, whole, *more))
    assert metrics(whole) == {"AP": 0.5, "step": 4}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == metrics(whole)
    assert_same_weights(weights(whole, "model.pt"), seen[0.5])
    assert_same_weights(weights(whole), seen[0.4])
    evaluated = [(row["step"], row["AP"]) for row in log(whole) if "AP" in row]
    assert evaluated == [(2, 0.1), (4, 0.5), (6, 0.3), (8, 0.4)]

    for step in (4, 5):
        call_until(step, flags(shapes, tmp_path / f"{step}", *more))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        predict, calls = evaluate.predict, itertools.count()
        patch.setattr(
            evaluate, "predict", lambda *args: predict(*args) if next(calls) == 0 else kill()
        )
        call(flags(shapes, tmp_path / "evaluation", *more))
    assert [row["step"] for row in log(tmp_path / "evaluation") if "AP" in row] == [2]
    for name, step in {"4": 4, "5": 5, "evaluation": 4}.items():
        assert load(tmp_path / name / "last.pt")["step"] == step
        call(flags(shapes, tmp_path / name, *more))
        assert_same_run(tmp_path / name, whole)


# ---- keywords, averages, further losses --------------------------------------------------------


OTHER_SETTINGS = [  # recipe, keywords of its row, flags, what the error says
    ("shapes", {}, ("--lr", 0.5, "--iters", 8), [f"lr {RATE / 2} there, 0.5", "iters 6 there, 8"]),
    ("shapes", dict(radius=2.5), (), ["radius 1.5 there, 2.5 here"]),
    ("shapes", dict(box_loss="iou"), (), ["box_loss giou there, iou here"]),
    ("another", {}, (), ["recipe shapes there, another here"]),
]


@pytest.mark.parametrize("recipe, row, more, differences", OTHER_SETTINGS)
def test_other_settings_and_edited_rows_are_refused_by_name(
    finished, shapes, monkeypatch, capsys, recipe, row, more, differences
):
    monkeypatch.setitem(train.RECIPES, "another", train.RECIPES["shapes"])
    monkeypatch.setitem(fcos.MODELS, "shapes", fcos.MODELS["shapes"] | row)
    before = files(finished.out)
    code, (line,) = mistake(capsys, [recipe, *flags(shapes, finished.out, *more)[1:]])
    assert code == 2 and all(text in line for text in (str(finished.out), *differences, "--fresh"))
    assert more or line.count(" there, ") == 1
    assert files(finished.out) == before


def groups_changed(change):
    """A train.py whose groups of parameters are others."""

    def patch(monkeypatch):
        groups = train.parameter_groups
        monkeypatch.setattr(
            train, "parameter_groups", lambda *args: [g | change(g) for g in groups(*args)]
        )

    return patch


def cosine(monkeypatch):
    monkeypatch.setattr(
        train,
        "lr_at",
        lambda step, lr, iters, *_: lr / 2 * (1 + np.cos(np.pi * step / iters).item()),
    )


def adamw(monkeypatch):
    """With a rate of its own, which differs from layer to layer."""

    def make_optimizer(model, settings):
        layers = {"backbone": 1e-5, "fpn": 1e-4, "head": 2e-4}
        groups = [
            {"params": getattr(model, name).parameters(), "lr": lr} for name, lr in layers.items()
        ]
        return torch.optim.AdamW(groups, weight_decay=0.05)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)


CODE = {  # what is changed: the function that changes it, what the error says
    "rates": (groups_changed(lambda group: {"lr": 0.1}), "optimizer group 2", "initial_lr 0.1"),
    "decay": (groups_changed(lambda group: {"weight_decay": 0.5}), "weight_decay 0.5"),
    "order": (groups_changed(lambda group: {"params": group["params"][::-1]}), "optimizer group 1"),
    "schedule": (cosine, "learning rate from step 2 nothing there"),
    "optimizer": (adamw, "optimizer class SGD there, AdamW here"),
}


@pytest.mark.parametrize("what", CODE)
def test_a_checkpoint_that_the_code_no_longer_agrees_with_is_refused(
    copied, shapes, monkeypatch, capsys, what
):
    before = files(copied)
    change, *words = CODE[what]
    change(monkeypatch)
    code, (line,) = mistake(capsys, flags(shapes, copied, *EVERY_3))
    assert code == 2 and "there, " in line and all(word in line for word in words), line
    assert files(copied) == before


@pytest.mark.parametrize("change", [adamw, cosine])
def test_another_optimizer_or_schedule_is_one_change(shapes, tmp_path, monkeypatch, capsys, change):
    """What is printed is what runs, and a run that is killed resumes bit for bit."""
    change(monkeypatch)
    argv = flags(shapes, tmp_path / "killed", *EVERY_3)
    call_until(4, argv)
    capsys.readouterr()
    call(argv)
    said = re.sub(" +", " ", capsys.readouterr().out)
    call([*argv, "--out", str(tmp_path / "whole")])
    one, other = (log(tmp_path / name, "images_per_second") for name in ("killed", "whole"))
    assert one == other
    rates = [row["lr"] for row in logged_losses(tmp_path / "whole")]
    if change is adamw:
        assert rates == pytest.approx([1e-5] * 4 + [1e-6, 1e-7])
        assert "optimizer class AdamW" in said and "0.01" not in said.split("learning rate")[1]
        assert "learning rate from step 1 1e-05" in said and "from step 5 1" in said
        assert "group 3" in said and "weight_decay 0.05" in said
    else:
        assert rates == pytest.approx([RATE / 4 * (1 + np.cos(np.pi * k / 6)) for k in range(6)])
        assert "learning rate from step 2 0.0093" in said and "decays" not in said


def test_the_same_data_elsewhere_resumes_and_changed_data_is_refused(
    half, finished, shapes, tmp_path, monkeypatch, capsys
):
    elsewhere = shutil.copytree(shapes, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    call(flags("elsewhere", half, *EVERY_3))
    assert_same_weights(weights(half), weights(finished.out))
    for split in ("val", "train"):
        path, _ = evaluate.coco_paths(elsewhere, f"{split}2017")
        coco = json.loads(path.read_text())
        coco["annotations"][0]["bbox"][2] -= 1
        path.write_text(json.dumps(coco))
        code, (line,) = mistake(capsys, flags(elsewhere, half, *EVERY_3))
        assert code == 2 and f"{split}_data" in line and line.count("sha256") >= 2, line


SPOILT = {
    "no momentum": (lambda content: content["optimizer"].update(state={}), "momentum_buffer"),
    "momentum of another shape": (
        lambda content: content["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3)),
        "['state'][0]['momentum_buffer']",
    ),
    "a momentum too few": (lambda content: content["optimizer"]["state"].popitem(), "['state']"),
    "no such average": (lambda content: content.pop("optimizer"), "optimizer"),
}


@pytest.mark.parametrize("spoil, named", SPOILT.values(), ids=SPOILT)
def test_a_state_that_does_not_fit_is_refused(copied, shapes, capsys, spoil, named):
    content = load(copied / "last.pt")
    spoil(content)
    torch.save(content, copied / "last.pt")
    before = files(copied)
    code, (line,) = mistake(capsys, flags(shapes, copied, *EVERY_3))
    assert code == 2 and named in line and "last.pt: cannot be resumed" in line, line
    assert files(copied) == before


def test_a_run_of_a_renamed_row_resumes(half, finished, shapes, monkeypatch):
    """What counts is the keywords, which are also all that its model needs."""
    monkeypatch.setitem(fcos.MODELS, "renamed", fcos.MODELS["shapes"])
    monkeypatch.delitem(fcos.MODELS, "shapes")
    monkeypatch.setitem(train.RECIPES["shapes"], "model", "renamed")
    call(flags(shapes, half, *EVERY_3))
    assert_same_weights(weights(half), weights(finished.out))
    assert fcos.load(half / "model.pt").keywords["radius"] == 1.5


def test_keywords_from_the_command_line_are_stored_with_the_run(shapes, tmp_path, capsys):
    argv = flags(shapes, tmp_path, "--iters", 2, "--checkpoint-every", 1)
    given = [*argv, *SMALL, "radius=0", "quality=iou", "levels=[3,4,5,6]", "ranges=[32,64,128]"]
    call_until(1, given)
    keywords = dict(radius=0, quality="iou", levels=(3, 4, 5, 6), ranges=(32, 64, 128), stem=16)
    stored = load(tmp_path / "last.pt")
    assert stored["settings"]["keywords"] == stored["model"]["keywords"]
    row = fcos.MODELS["shapes"] | dict(channels=64, test_size=(64, 96))
    assert stored["model"]["keywords"] == fcos.resolve(row | keywords)
    for other, change in [
        (argv, "quality iou there, centerness here"),
        ([*given, "radius=2"], "radius 0 there, 2 here"),
    ]:
        code, lines = mistake(capsys, other)
        assert code == 2 and len(lines) == 1 and change in lines[0], lines
    call(given)
    model = fcos.load(tmp_path / "model.pt")
    assert (model.radius, model.strides, model.loss["quality"]) == (0, (8, 16, 32, 64), "iou")


def test_a_row_and_a_recipe_of_ones_own_train_load_and_resume(shapes, tmp_path, monkeypatch):
    """Of any names, by the two tables alone."""
    row = fcos.MODELS["shapes"] | dict(stem=16, channels=64, levels=(3, 4, 5), ranges=(64, 128))
    monkeypatch.setitem(fcos.MODELS, "mine", row)
    recipe = train.RECIPES["shapes"] | dict(
        model="mine", data=str(shapes), iters=4, batch_size=4, min_size=[64], max_size=96
    )
    monkeypatch.setitem(train.RECIPES, "overnight", recipe)
    monkeypatch.chdir(tmp_path)
    argv = ["overnight", "--checkpoint-every", "2", "--workers", "0", "--device", "cpu"]
    call([*argv, "--out", "whole"])
    call_until(3, argv)
    call(argv)
    assert_same_run("runs/overnight", "whole")
    monkeypatch.delitem(fcos.MODELS, "mine")
    model = fcos.load("runs/overnight/model.pt")
    assert (model.name, model.strides) == ("mine", (8, 16, 32))
    evaluate.main(evaluate.parse_args(["whole/model.pt", "--data", str(shapes), "--workers", "0"]))


def test_the_moving_average_is_evaluated_kept_and_resumed(shapes, tmp_path, monkeypatch):
    """Its past is short at first: a step k, from 0, has at least 1 - k / (9 + k) of it."""
    checkpoint, states = train.RunFiles.checkpoint, []

    def noted(self, step, settings, model, *rest):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        checkpoint(self, step, settings, model, *rest)

    doubled(monkeypatch)
    monkeypatch.setattr(train.RunFiles, "checkpoint", noted)
    evaluated = score_in_turn(monkeypatch, [0.1, 0.2])
    more = "--ema", 0.3, "--eval-every", 3, "--checkpoint-every", 1
    call(flags(shapes, tmp_path / "whole", *more))
    averages = states[:1]
    for k, state in enumerate(states[1:], 1):
        decay, before = min(0.3, k / (9 + k)), averages[-1]
        averages.append({name: decay * before[name] + (1 - decay) * state[name] for name in state})
    assert len(averages) == 6
    for step, ap in (3, 0.1), (6, 0.2):
        torch.testing.assert_close(evaluated[ap], averages[step - 1], rtol=1e-9, atol=1e-12)
        assert not torch.equal(evaluated[ap]["head.cls.bias"], states[step - 1]["head.cls.bias"])
    assert_same_weights(weights(tmp_path / "whole", "model.pt"), evaluated[0.2])
    call_until(4, flags(shapes, tmp_path / "killed", *more))
    call(flags(shapes, tmp_path / "killed", *more))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


class LargerHead(fcos.Head):
    """A head with one more output."""

    def __init__(self, channels, *rest):
        super().__init__(channels, *rest)
        self.more = torch.nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, features):
        maps = [self.more(self.box_tower(x)) for x in features]
        more = torch.cat([fcos.by_location(x) for x in maps], 1)
        return super().forward(features) | {"more": more}


def two_more_losses(monkeypatch):
    """One of an output that there is, and one of an output that is new."""
    fcos_loss = fcos.fcos_loss

    def more(outputs, targets, normalizers, **keywords):
        losses = fcos_loss(outputs, targets, normalizers, **keywords)
        return losses | {
            "extra": 1e-6 * (outputs["ltrb"] ** 2).sum() / normalizers[0],
            "more": 1e-2 * (outputs["more"] - 1).square().sum() / normalizers[0],
        }

    monkeypatch.setattr(fcos, "Head", LargerHead)
    monkeypatch.setattr(fcos, "fcos_loss", more)


# ---- mistakes ----------------------------------------------------------------------------------


def mistake(capsys, argv):
    """-> exit code and lines on stderr of a call of the script"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.run(train.main, train.parse_args([*map(str, argv)]))
    err = capsys.readouterr().err.replace("\r", "\n")
    return stop.value.code, [line for line in err.splitlines() if line.strip() and "%|" not in line]


def test_a_recipe_of_ones_own_says_all_that_is_needed_and_nothing_that_is_not():
    for settings, named in [
        (train.X1 | {"iter": 7}, "'iter'"),
        ({name: value for name, value in train.X1.items() if name != "lr"}, "'lr'"),
    ]:
        with pytest.raises(TypeError, match=named):
            train.recipe("shapes", "none", **settings)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sample, rng: sample | {"image": sample["image"].float() / 255},
        lambda sample, rng: sample | {"boxes": sample["boxes"].flip(1)},
        lambda sample, rng: sample | {"boxes": sample["boxes"] * torch.nan},
        lambda sample, rng: sample | {"labels": sample["labels"] + 6},
        lambda sample, rng: sample | {"boxes": sample["boxes"][1:]},
    ],
    ids=["floats", "inverted", "NaN", "labels", "fewer boxes"],
)
def test_augment_that_spoils_a_sample_is_named(spoil, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "augment", spoil)
    code, lines = mistake(capsys, flags(shapes, tmp_path))
    assert code == 2 and len(lines) == 1 and "augment made" in lines[0]


def test_an_output_that_no_loss_uses_and_a_loss_with_a_name_of_the_log_are_named(
    shapes, tmp_path, monkeypatch, capsys
):
    loss = fcos.fcos_loss
    for patch, named in [
        (lambda losses: {"cls": losses["cls"]}, "no loss depends on head.box_t"),
        (lambda losses: losses | {"lr": losses["cls"]}, "expected no name of"),
    ]:
        monkeypatch.setattr(fcos, "fcos_loss", lambda *a, p=patch, **k: p(loss(*a, **k)))
        code, (line,) = mistake(capsys, flags(shapes, tmp_path / "run"))
        assert code == 2 and named in line


def test_a_keyword_that_came_later_counts_as_its_default(shapes, tmp_path, capsys):
    argv = flags(shapes, tmp_path, "--checkpoint-every", 2)
    call_until(3, argv)
    content = load(tmp_path / "last.pt")
    for keywords in (content["settings"]["keywords"], content["model"]["keywords"]):
        keywords.pop("quality", None)  # as if it had not been there
    torch.save(content, tmp_path / "last.pt")
    code, (line,) = mistake(capsys, [*argv, "--set", "quality=iou"])
    assert code == 2 and "quality centerness there, iou here" in line
    call(argv)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, shapes):
    """Data sets and weights with one mistake each."""
    tmp = tmp_path_factory.mktemp("wrong")

    for name in ("no_json", "no_val", "no_images", "one_gone"):
        shutil.copytree(shapes, tmp / name)
    (tmp / "no_json" / "annotations" / "instances_train2017.json").unlink()
    (tmp / "one_gone" / "val2017" / "000001000002.jpg").unlink()
    shutil.rmtree(tmp / "no_val" / "val2017")
    shutil.rmtree(tmp / "no_images" / "train2017")
    letters = [dict(id=k, name=name) for k, name in zip(train.SHAPES, "abcdef")]
    for name, split, change in [
        ("not_coco", "train", dict(images=None)),
        ("no_boxes", "train", dict(annotations=[])),
        ("other_classes", "val", dict(categories=letters)),
    ]:
        path, _ = evaluate.coco_paths(shutil.copytree(shapes, tmp / name), f"{split}2017")
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp / "junk.pkl").write_bytes(b"junk")
    torch.save({"settings": SimpleNamespace(lr=1)}, tmp / "namespace.pt")
    (tmp / "file").write_text("in the way")
    return tmp


MISTAKES = {
    "unknown recipe": ("fcos_R_51 --data {data}", "fcos_R_50_FPN_1x"),
    "no COCO": ("fcos_R_50_FPN_1x --data {tmp}/coco --weights none", "--train-images"),
    "no such data": ("shapes --data {tmp}/nowhere", "nowhere"),
    "no annotations": ("shapes --data {tmp}/no_json", "instances_train2017.json"),
    "no images": ("shapes --data {tmp}/no_images", "train2017"),
    "no validation images": ("shapes --data {tmp}/no_val", "val2017"),
    "an image missing": ("shapes --data {tmp}/one_gone", "000001000002.jpg"),
    "not COCO": ("shapes --data {tmp}/not_coco", "images: "),
    "no boxes": ("shapes --data {tmp}/no_boxes", "image with a box to train on"),
    "other classes": ("shapes --data {tmp}/other_classes", "'a'"),
    "one path of four": ("shapes --train-images {data}", "--val-annotations"),
    "no such weights": ("shapes --data {data} --weights none.pkl", "none.pkl"),
    "no ImageNet weights": ("fcos_R_50_FPN_1x --data {data}", "R-50.pkl"),
    "junk for weights": ("shapes --data {data} --weights {tmp}/junk.pkl", "junk.pkl"),
    "a program for weights": (
        "shapes --data {data} --weights {tmp}/namespace.pt",
        "SimpleNamespace",
    ),
    "unknown keyword": ("shapes --data {data} --set radiu=1", "'radiu': expected one of backbone,"),
    "a short side over the long": ("shapes --data {data} --min-size 500", "max_size 96"),
    "keyword of another backbone": (
        "shapes --data {data} --set backbone=mobilenet block=basic",
        "'block'",
    ),
    "value of no choice": (
        "shapes --data {data} --set radius=0 quality=best",
        "quality 'best': expected one of centerness, iou",
    ),
    "value of another kind": ("shapes --data {data} --set channels=wide", "channels 'wide'"),
    "no number for a switch": ("shapes --data {data} --set channels=True", "channels True"),
    "number below 0": ("shapes --data {data} --set radius=-1", "radius -1"),
    "stage that is not there": ("shapes --data {data} --set dcn=(9,)", "dcn (9,)"),
    "keywords that do not go together": ("shapes --data {data} --set groups=3", "groups"),
    "keyword without value": ("shapes --data {data} --set radius", "KEYWORD=VALUE"),
    "rate of nothing": ("shapes --data {data} --lr 0", "--lr"),
    "rate of no number": ("shapes --data {data} --lr nan", "--lr"),
    "average of one": ("shapes --data {data} --ema 1", "--ema"),
    "batch too small": ("shapes --data {data} --batch-size 2 --accumulate 4", "--batch-size"),
    "no such GPU": ("shapes --data {data} --device cuda", "--device cpu"),
    "negative seed": ("shapes --data {data} --seed -1", "--seed"),
    "negative workers": ("shapes --data {data} --workers -1", "--workers"),
    "batch of none": ("shapes --data {data} --batch-size 0", "--batch-size"),
    "unknown flag": ("shapes --data {data} --batchsize 4", "--batchsize"),
    "no abbreviations": ("shapes --data {data} --batch 4", "--batch"),
}


@pytest.mark.parametrize("line, name", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_the_run_alone(
    wrong, shapes, finished, tmp_path, monkeypatch, capsys, line, name
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


def test_a_folder_that_holds_something_else_is_named_and_left_alone(wrong, copied, shapes, capsys):
    """A file in its place; a model that --fresh would start from; a model without its run."""
    (copied / "previous.pt").unlink()
    for out, more, name in [
        (wrong / "file", (), "file"),
        (
            copied,
            ("--fresh", "--weights", copied / "model.pt"),
            f"{copied / 'model.pt'}: is an input",
        ),
        (copied, (), "model.pt but no checkpoint"),
    ]:
        before = files(copied)
        code, lines = mistake(capsys, flags(shapes, out, *more))
        assert code == 2 and len(lines) == 1 and name in lines[0], lines
        assert files(copied) == before and (wrong / "file").read_text() == "in the way"
        if more:
            (copied / "last.pt").unlink()


@pytest.mark.parametrize("file", ["model.pt", "a tensor", "settings of a word"])
def test_a_foreign_checkpoint_is_named(finished, shapes, tmp_path, capsys, file):
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
    shapes, tmp_path, capsys, spoil, workers
):
    data = shutil.copytree(shapes, tmp_path / "data")
    for path in (data / "train2017").iterdir():
        spoil(path)
    code, lines = mistake(capsys, flags(data, tmp_path / "out", "--workers", workers))
    assert code == 2 and len(lines) == 1, lines
    assert "train2017/0000000000" in lines[0]
    assert "cannot be read" in lines[0] or "as in its annotations, found 9x9" in lines[0]


def test_images_of_one_pixel_and_of_ten_thousand_are_ordinary(shapes, tmp_path):
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


def poison(monkeypatch, step, gradient=False, here=True):
    """Make the loss of one step infinite, as a bad batch would, or only its gradient."""
    fcos_loss = fcos.fcos_loss
    compute_gradients = train.compute_gradients
    steps = itertools.count()

    def poisoned_loss(*args, **keywords):
        losses = fcos_loss(*args, **keywords)
        losses["box"] = losses["box"] * (1 if gradient else torch.inf)
        losses["box"].register_hook(lambda g: g * torch.nan)
        return losses

    def poisoned_gradients(model, network, batches, settings):
        training = network.training  # false in the rehearsal
        with monkeypatch.context() as patch:
            if training and next(steps) == step and here:
                patch.setattr(fcos, "fcos_loss", poisoned_loss)
            return compute_gradients(model, network, batches, settings)

    monkeypatch.setattr(train, "compute_gradients", poisoned_gradients)


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_stops_the_run_and_is_never_written(
    shapes, tmp_path, monkeypatch, gradient
):
    """The loss of the last step, or its gradient alone, of which the loss shows nothing."""
    poison(monkeypatch, 4, gradient)
    with pytest.raises(UserError) as stop:
        call(flags(shapes, tmp_path, "--iters", 5, "--checkpoint-every", 2))
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    ids = dataset.image_ids[batches(dataset, min_size=[64], iters=5).plan(4).indices].tolist()
    for text in ("step 5,", str(ids), "last.pt"):
        assert text in str(stop.value)
    assert load(tmp_path / "last.pt")["step"] == 4
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4]


# ---- processes ---------------------------------------------------------------------------------


def fork(argv, told, prepare=lambda: None):
    """The script in a process of its own, without the seconds that importing torch takes; what it
    says goes to the file `told`. `prepare` is called in the child, whose patches die with it."""

    def child():
        # What other threads of the parent have locked stays locked in a fork. tqdm: its lock, which
        # forks share, and its monitor. hotcoco: its pool of threads, without which it waits.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor, tqdm.monitor_interval = None, 0
        sys.modules["hotcoco"] = None  # pycocotools scores
        sys.stdout = sys.stderr = open(told, "w", buffering=1)  # noqa: SIM115
        prepare()
        evaluate.run(train.main, train.parse_args(argv))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def ended(argv, told, prepare=lambda: None):
    """-> exit code and words of a forked process"""
    process = fork(argv, told, prepare)
    process.join(PATIENCE)
    return process.exitcode, told.read_text()


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


def test_kill_9_at_any_moment_changes_nothing(shapes, tmp_path):
    """The same run killed inside a save and at two moments nobody chose, and started again."""
    begin, more = time.monotonic(), ("--checkpoint-every", 1)
    call(flags(shapes, tmp_path / "whole", *more))
    seconds, out, told = time.monotonic() - begin, tmp_path / "killed", tmp_path / "told"
    argv = flags(shapes, out, *more)
    code, _ = ended(argv, told, lambda: die_while_saving(3))
    assert code == -signal.SIGKILL and list(out.glob(".fcos-*.tmp"))
    assert load(out / "last.pt")["step"] == 2
    for delay in np.random.default_rng().uniform(0, 0.6 * seconds, 2):
        victim = fork(argv, told)
        victim.join(delay)
        victim.kill()
        victim.join()
    code, text = ended(argv, told)
    assert code == 0 and "resumes after step" in text and "Traceback" not in text, text
    assert_same_run(out, tmp_path / "whole")
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("workers, name", [(0, "SIGTERM"), (1, "SIGUSR1"), (1, "SIGHUP")])
def test_a_signal_ends_the_step_and_saves(finished, shapes, tmp_path, workers, name):
    """As at the shutdown of a machine, every process gets it, the loader's workers included."""
    out, told = tmp_path / "run", tmp_path / "told"
    argv = flags(shapes, out, "--eval-every", 3, "--workers", workers)

    def everyone():
        for process in [*multiprocessing.active_children(), SimpleNamespace(pid=os.getpid())]:
            os.kill(process.pid, getattr(signal, name))

    code, text = ended(argv, told, lambda: at_step(3, everyone))
    assert code == 0, text
    assert f"{name}: stopped after step 4 of 6; the same command resumes" in text
    assert load(out / "last.pt")["step"] == 4
    code, text = ended(argv, told)
    assert code == 0 and "resumes after step 4 of 6" in text
    assert_same_run(out, finished.out)


def test_under_nohup_a_hangup_is_ignored(shapes, tmp_path):
    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at_step(1, lambda: os.kill(os.getpid(), signal.SIGHUP))

    code, text = ended(flags(shapes, tmp_path / "run", "--iters", 2), tmp_path / "told", prepare)
    assert code == 0 and "stopped" not in text and load(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_run_at_once(shapes, tmp_path, number, code):
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


def test_workers_die_with_their_parent(shapes, tmp_path):
    """Within the five seconds after which PyTorch's workers look for it."""
    pids = tmp_path / "pids"

    def last_words():
        pids.write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
        die()

    argv = flags(shapes, tmp_path / "run", "--workers", 2)
    ended(argv, tmp_path / "told", lambda: at_step(1, last_words))
    workers, limit = pids.read_text().split(), time.monotonic() + 30
    assert len(workers) == 2
    while workers:
        assert time.monotonic() < limit, "a loader worker outlives its parent"
        time.sleep(0.1)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{workers[0]}/stat").read_text().split()[2] != "Z":
                continue
        del workers[0]


@pytest.mark.parametrize(
    "when, kind, told",
    [
        ("training", "dies", "DataLoader worker .* (killed by signal|exited)"),
        ("training", "hangs", "DataLoader timed out"),
        ("evaluation", "dies", "DataLoader worker .* (killed by signal|exited)"),
        ("evaluation", "is broken", r"val2017/\d+\.jpg: is broken"),
    ],
)
def test_a_worker_that_fails_ends_the_run_in_one_line(shapes, tmp_path, when, kind, told):
    """Here at the second image; at an evaluation workers of both loaders are alive."""

    def prepare():
        image, predict, calls = evaluate.CocoDataset.image, evaluate.predict, itertools.count()

        def failing(self, i):
            if next(calls) == 1:
                if kind == "is broken":
                    raise UserError(f"{self.path(i)}: is broken")
                die() if kind == "dies" else time.sleep(600)
            return image(self, i)

        def evaluated(*args):
            evaluate.CocoDataset.image = failing
            return predict(*args)

        if when == "training":
            evaluate.CocoDataset.image = failing
        evaluate.predict = evaluated
        evaluate.DataLoader = lambda *a, **k: DataLoader(*a, **k | {"timeout": 5})

    argv = flags(shapes, tmp_path / "run", "--iters", 2, "--workers", 1)
    code, text = ended(argv, tmp_path / "told", prepare)
    assert code == 2 and "Traceback" not in text, text
    assert re.search(told, text.splitlines()[-1]), text
    assert len([line for line in text.splitlines() if re.search(told, line)]) == 1


def few_files():
    """Report a low limit: pytest's own open files would count against a real one."""
    os.sysconf = lambda name: 50


def small_shm():
    shutil.disk_usage = lambda path: SimpleNamespace(free=2**20)


def full_shm():
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: (28)")

    torch.Tensor.share_memory_ = refuse


ROOM = {  # what is short: a preparation, what the one line names
    few_files: ("ulimit -n", "open files"),
    small_shm: ("/dev/shm has 1 MB free", "--shm-size"),
    full_shm: ("unable to allocate shared memory", "/dev/shm"),
}


@pytest.mark.parametrize("prepare", ROOM)
def test_without_room_for_workers_a_run_ends_at_once_in_one_line(shapes, tmp_path, prepare):
    argv = flags(shapes, tmp_path / "run", "--workers", 2, "--batch-size", 16, "--min-size", 96)
    code, text = ended(argv, tmp_path / "told", prepare)
    (line,) = [line for line in text.splitlines() if "--workers 0" in line]
    assert code == 2 and "Traceback" not in text, text
    assert all(word in line for word in ROOM[prepare])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_in_augment_keeps_its_traceback_and_leaves_no_process(shapes, tmp_path, workers):
    """A RuntimeError, as PyTorch's own errors about workers are."""

    def prepare():
        def augment(sample, rng):
            raise RuntimeError("a bug of mine")

        train.augment = augment

    argv = flags(shapes, tmp_path / "run", "--workers", workers)
    begin = time.monotonic()
    code, text = ended(argv, tmp_path / "told", prepare)
    assert code == 1 and time.monotonic() - begin < 60
    assert "Traceback" in text and "in augment" in text and "a bug of mine" in text, text
    assert re.search(r"in a sample made from .*train2017/\d+.jpg", text)


def test_a_full_disk_costs_the_write_and_not_the_run(finished, shapes, tmp_path):
    out, told = tmp_path / "run", tmp_path / "told"
    argv = flags(shapes, out, *EVERY_3)
    ended(argv, told, lambda: at_step(4, die))
    before = (out / "last.pt").read_bytes()

    def full(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    most = len(before) // 4 * 3  # between the sizes of model.pt and last.pt
    code, text = ended(argv, told, lambda: full(most))
    assert code == 0, text
    assert "last.pt: cannot be written ([Errno 27] File too large); the older" in text
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    assert metrics(out) == metrics(finished.out)
    call(argv)  # there is room again
    assert_same_run(out, finished.out)

    argv = flags(shapes, tmp_path / "none", "--eval-every", 3)
    code, text = ended(argv, told, lambda: full(20_000))  # none for model.pt either
    assert "none: no checkpoint could be written" in text.splitlines()[-1]
    assert code == 2 and "the older model stays" in text
    assert logged_losses(tmp_path / "none")[-1]["step"] == 6


def test_the_model_stays_if_only_the_first_checkpoint_found_no_room(
    shapes, tmp_path, monkeypatch, capsys
):
    """The second one takes away what --fresh replaces, but not what the run itself has written."""
    save, refusals = torch.save, iter(["last.pt"])

    def full_at_first(content, file):
        if "settings" in content and next(refusals, None):
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full_at_first)
    seen = score_in_turn(monkeypatch, [0.5, 0.4])
    call(flags(shapes, tmp_path, *EVERY_3))
    assert "No space left" in capsys.readouterr().err and len(seen) == 2
    assert metrics(tmp_path) == {"AP": 0.5, "step": 3}
    assert_same_weights(weights(tmp_path, "model.pt"), seen[0.5])


def test_a_folder_that_cannot_be_written_is_named_before_training(shapes, tmp_path):
    """Root may write anywhere, so the child gives up the rights that make it root."""
    out, told = tmp_path / "run", tmp_path / "told"
    out.mkdir(mode=0o555)

    def give_up():
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0

    for folder in out, out / "deeper":
        code, text = ended(flags(shapes, folder), told, give_up)
        lines = [line for line in text.splitlines() if "cannot be" in line or "denied" in line]
        assert code == 2 and len(lines) == 1 and str(folder) in lines[0]
        assert "%|" not in text and not list(out.iterdir())


def test_between_log_rows_no_number_is_read_from_the_device(shapes, tmp_path, monkeypatch):
    """On the meta device, which has no numbers: to read one, or a shape that depends on one, is an
    error. The first row of 300 steps is logged after the third."""
    steps, update = [], train.update
    monkeypatch.setattr(train, "update", lambda *now: steps.append(now[0]) or update(*now))
    monkeypatch.setattr(evaluate, "start_process", lambda *_: (0, 1, torch.device("meta")))
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())  # knows no meta
    monkeypatch.setattr(train, "report_sizes", lambda *_: None)  # reads before training
    for more in ("--accumulate", 2, "--ema", 0.9, "--workers", 1), ("--set", "quality=iou"):
        steps.clear()
        with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
            call(flags(shapes, tmp_path, "--iters", 300, *more))
        assert steps == [0, 1, 2] and log(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_between_log_rows_nothing_waits_for_the_gpu(shapes, tmp_path, monkeypatch):
    """Of 400 steps every fourth is logged; to wait in the first three of them is an error."""
    update = train.update

    def watched(step, *rest):
        torch.cuda.set_sync_debug_mode("default" if step % 4 == 3 else "error")
        if step == 12:
            raise Killed
        update(step, *rest)

    monkeypatch.setattr(train, "update", watched)
    try:
        with pytest.raises(Killed):
            more = "--device", "cuda", "--iters", 400, "--accumulate", 2, "--ema", 0.9
            call(flags(shapes, tmp_path, *more))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row["step"] for row in log(tmp_path)] == [4, 8, 12]


# ---- several processes -------------------------------------------------------------------------

LAUNCHED = """
import json, os, sys
import torch.distributed as dist
import evaluate, fcos, train
sys.path.insert(0, {tests!r})
import test_train

me, folder = int(os.environ["RANK"]), sys.argv[1]
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
    rng, augment, positions = train.TrainBatches.rng, train.augment, [None]

    def noted(self, purpose, *position):
        positions[0] = position
        return rng(self, purpose, *position)

    def emptied(sample, random):
        left = slice(0) if positions[0][-1] % 2 else slice(None)
        return augment(sample | {name: sample[name][left] for name in ("boxes", "labels")}, random)

    monkeypatch.setattr(train.TrainBatches, "rng", noted)
    monkeypatch.setattr(train, "augment", emptied)


def thin_boxes(monkeypatch):
    """Boxes so thin that no location lies inside: every share of every step is background."""
    target = evaluate.CocoDataset.target

    def thin(self, i):
        boxes, labels = target(self, i)
        return torch.cat([boxes[:, :2], boxes[:, :2] + 0.01], 1), labels

    monkeypatch.setattr(evaluate.CocoDataset, "target", thin)


def worse_and_worse(monkeypatch):
    """Let every evaluation find a lower AP than those before. Ranks other than 0 know none."""
    aps = itertools.count(50, -1)
    score = evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda *args: score(*args) | {"AP": next(aps) / 100})


def poison_rank_1(monkeypatch):
    poison(monkeypatch, 4, here=torch.distributed.get_rank() == 1)


def folders_of_two_nodes(monkeypatch):
    step = 3 * torch.distributed.get_rank()
    monkeypatch.setattr(train, "resume", lambda *args: (step, None, []))


def killed_at_4(monkeypatch):
    at_step(4, kill, monkeypatch)


SCALES = ["--min-size", 48, 64, 80, "--batch-size", 5]
AVERAGE = ["--ema", 0.9, "--eval-every", 4]
IMPATIENT = ["--iters", 18, "--eval-every", 1, "--patience", 1]
ALL, LEFT, RIGHT = [0, 1, 2, 3], [0, 1], [2, 3]
CASES = {  # name of the run's folder: ranks, functions of this file that patch it, flags
    "four": (ALL, [], EVERY_3),
    "four in float64": (ALL, ["doubled"], []),
    "two in float64": (LEFT, ["doubled"], []),
    "two of two micro-batches in float64": (RIGHT, ["doubled"], ["--accumulate", 2]),
    "uneven shares of many scales": (ALL, ["doubled"], SCALES),
    "a rank without positives": (LEFT, ["doubled", "empty_images"], []),
    "no positives": (RIGHT, ["doubled", "thin_boxes"], []),
    "few images of one aspect": (LEFT, ["doubled"], ["--data", "few"]),
    "further losses": (RIGHT, ["doubled", "two_more_losses"], []),
    "moving average": (RIGHT, ["doubled"], AVERAGE),
    "impatient": (LEFT, ["doubled", "worse_and_worse"], IMPATIENT),
    "undisturbed": (LEFT, [], ["--iters", 40, "--batch-size", 2, "--checkpoint-every", 5]),
    "not finite": (RIGHT, ["poison_rank_1"], ["--checkpoint-every", 2]),
    "not shared": (RIGHT, ["folders_of_two_nodes"], []),
    "from one process to four": (ALL, [], EVERY_3),
    "killed": (ALL, ["killed_at_4"], EVERY_3),
    "killed ": (ALL, [], EVERY_3),  # the same folder again
}
ODD = [case for case in CASES if "doubled" in CASES[case][1] and "float64" not in case]


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
    call_until(4, cases["from one process to four"][2])
    (tmp / "cases").write_text(json.dumps(cases))
    (tmp / "launched.py").write_text(LAUNCHED.format(tests=str(ROOT / "tests")))
    torchrun("--nproc_per_node=4", tmp / "launched.py", tmp).check()
    return SimpleNamespace(out=tmp, argv={name: case[2] for name, case in cases.items()})


def python(*argv, **env):
    """-> a running process; check() waits for its end and returns what it said"""
    told = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads would fill up)
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=ONE_THREAD | env, stdout=told, stderr=told
    )

    def check(code=0):
        process.wait(PATIENCE)
        told.seek(0)
        said = told.read()
        assert code in (process.returncode, None), said[-5000:]
        return said

    process.check = check
    return process


def torchrun(*argv):
    return python("-m", "torch.distributed.run", *argv)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("case", ["four", "from one process to four"])
def test_any_number_of_processes_trains_as_one_does(launched, finished, case):
    assert metrics(launched.out / case) == pytest.approx(metrics(finished.out), abs=1e-3)
    assert_close_run(launched.out / case, finished.out)


def test_in_float64_all_divisions_of_a_step_agree_to_1e_9(launched, shapes, tmp_path, monkeypatch):
    doubled(monkeypatch)
    for n in (1, 2, 4):
        call(flags(shapes, tmp_path / str(n), "--accumulate", n))
    assert weights(tmp_path / "1")["head.cls.weight"].dtype == torch.float64
    others = [
        tmp_path / "2",
        tmp_path / "4",
        *(launched.out / name for name in CASES if "float64" in name),
    ]
    for out in others:
        assert_close_run(out, tmp_path / "1", 1e-9)
    assert len(others) == 5


@pytest.mark.parametrize("case", ODD)
def test_odd_steps_are_the_same_for_one_process_and_several(launched, tmp_path, monkeypatch, case):
    for patch in CASES[case][1]:
        globals()[patch](monkeypatch)
    call([*launched.argv[case], "--out", str(tmp_path)])
    assert_close_run(launched.out / case, tmp_path, 1e-9)
    rows = logged_losses(launched.out / case)
    if case == "no positives":
        assert all(row["box"] == row["ctr"] == 0 and row["cls"] > 0 for row in rows)
    if case == "a rank without positives":
        assert all(row["box"] > 0 for row in rows)
    if case == "further losses":
        names = ("cls", "box", "ctr", "extra", "more")
        assert all(row["loss"] == pytest.approx(sum(map(row.get, names))) for row in rows)
        assert all(row[name] > 0 for row in rows for name in names)
        assert rows[-1]["more"] < rows[0]["more"] and all(weights(tmp_path)["head.more.bias"] > 0)
    if case == "impatient":  # two evaluations after the last decay at step 16
        assert rows[-1]["step"] == 17
    if case == "moving average":
        averages = weights(launched.out / case, "model.pt")
        assert not torch.allclose(averages["head.cls.bias"], weights(tmp_path)["head.cls.bias"])


def test_several_processes_resume_bit_for_bit(launched):
    assert [(launched.out / f"killed {rank}").exists() for rank in range(4)] == [True] * 4
    assert_same_run(launched.out / "killed", launched.out / "four")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(launched):
    for rank in (0, 1):
        assert "step 5," in (launched.out / f"not finite {rank}").read_text()
    assert load(launched.out / "not finite" / "last.pt")["step"] == 4
    assert all(value.isfinite().all() for value in weights(launched.out / "not finite").values())


def test_ranks_that_see_different_folders_are_refused(launched):
    for rank in (0, 1):
        text = (launched.out / f"not shared {rank}").read_text()
        assert "one folder for all nodes" in text and "[0, 3]" in text
    assert not (launched.out / "not shared").exists()


def script(path, body):
    path.write_text(f"""import os, time, evaluate, fcos, train
def broken(*_): raise fcos.UserError("broken")
def acting(step, *rest, update=train.update):
    {body}
    update(step, *rest)
train.update = acting
evaluate.run(train.main, train.parse_args())""")
    return path


def test_a_rank_that_fails_alone_ends_without_waiting_for_the_other(shapes, tmp_path):
    path = script(
        tmp_path / "alone.py",
        """if step == 1:
        time.sleep(600) if os.environ["RANK"] == "0" else broken()""",
    )
    argv = flags(shapes, tmp_path / "run", "--iters", 300)  # every third is logged
    # as Kubernetes launches them: without torchrun
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [python(path, *argv, **env, RANK=str(rank)) for rank in (0, 1)]
    try:
        said = ranks[1].check(2)
        assert said.splitlines()[-1] == "alone.py: broken" and "Traceback" not in said
        assert ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.kill()


def test_torchrun_restarts_stops_and_changes_the_number_of_nodes(launched, shapes, tmp_path):
    """One run of two processes through all that happens in a cluster: under two agents, as on two
    nodes, a rank is killed and both restart; both are told to stop; one agent ends the run.
    The weights are those of an undisturbed run, bit for bit."""
    out, last = tmp_path / "run", tmp_path / "run" / "last.pt"
    argv = flags(shapes, out, *CASES["undisturbed"][2], "--fresh")
    argv.insert(0, script(tmp_path / "slow.py", "time.sleep(0.1)"))
    two_nodes = "--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=two --max-restarts=3"
    endpoint = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    agents = [torchrun(*two_nodes.split(), endpoint, *argv) for _ in range(2)]

    def wait_for_step(number):
        limit, step = time.monotonic() + PATIENCE, 0
        while step < number:
            assert [agent.poll() for agent in agents] == [None, None] and time.monotonic() < limit
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):  # between two renames
                step = load(last)["step"]

    wait_for_step(5)
    rank = int(Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text())
    os.kill(rank, signal.SIGKILL)
    wait_for_step(10)
    for agent in agents:
        agent.send_signal(signal.SIGTERM)
    said = "".join([agent.check(None) for agent in agents])  # torchrun says 1 when stopped
    assert re.search("resumes after step (5|10) of 40", said), said
    assert "SIGTERM: stopped after step" in said, said
    step = load(last)["step"]
    assert 10 <= step < 40
    said = torchrun("--standalone", "--nproc_per_node=2", *argv[:-1]).check()
    assert f"resumes after step {step} of 40" in said
    assert_same_weights(weights(out), weights(launched.out / "undisturbed"))


def test_help_works_and_tells_every_recipe_flag():
    said = python("train.py", "--help").check()
    assert "Traceback" not in said and "Warning" not in said
    for flag in "data weights accumulate eval-every precision fresh set ema".split():
        assert f"--{flag}" in said


LEARNS = {40: [0.547, 0.497, 0.687], 60: [0.480, 0.433, 0.666]}  # step: cls, box, ctr


def test_sixty_steps_learn_as_they_did(tmp_path):
    """Against losses of 2026-11-27: whoever changes how FCOS learns, by mistake or not, meets it
    here. Threads and processors round differently, which moves them by up to 6 %."""
    train.make_shapes(tmp_path / "data", train=64, val=1)
    line = f"shapes --data {tmp_path}/data --out {tmp_path}/run --iters 60 --device cpu --workers 0"
    call(line.split())
    rows = {row["step"]: row for row in logged_losses(tmp_path / "run")}
    for step, expected in LEARNS.items():
        found = [rows[step][name] for name in ("cls", "box", "ctr")]
        assert found == pytest.approx(expected, rel=0.1), f"{step}: {found}"
