"""Batches and augmentation of train.py: what a step trains on, however it is divided."""

import json
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import (
    COCO,
    FakeDataset,
    assert_close_run,
    command_line,
    copy_data,
    error_line,
    load_checkpoint,
    load_dataset,
    make_batches,
    run,
    saved_weights,
)

import evaluate
import fcos
import train
from fcos import UserError

pytestmark = pytest.mark.usefixtures("no_process_left")

MIXED = FakeDataset([(40, 60), (60, 40), (50, 50), (30, 60), (45, 61), (64, 32), (33, 64)])
WIDE = [0, 3, 4, 6]
UPRIGHT = [1, 2, 5]  # height >= width, as in the official code


def is_mirrored(image):
    """Return whether an image of a FakeDataset is mirrored."""
    return bool(image[1, 0, 0] > image[1, 0, -1])


def describe(batch):
    """Return (index, height, width, mirrored, first blue value) of each image of a batch.

    Fails unless the padding of every image is black.
    """
    assert len(batch["images"]) == len(batch["sizes"]) == len(batch["counts"])
    assert sum(batch["counts"]) == len(batch["labels"])
    indices = [labels[0].item() for labels in batch["labels"].split(batch["counts"])]
    rows = []
    for image, (height, width), index in zip(batch["images"], batch["sizes"].tolist(), indices):
        inside = image[:, :height, :width]
        assert inside[0].unique().tolist() == [index]
        assert image[:, height:].sum() == image[:, :, width:].sum() == 0
        rows.append((index, height, width, is_mirrored(inside), image[2, 0, 0].item()))
    return rows


# ---- the plan of a step ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, micro_batches", [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (3, 1)]
)
def test_a_step_has_the_same_images_however_it_is_divided(monkeypatch, world_size, micro_batches):
    """The same sizes and random numbers, too: `augment` writes some into the blue pixels here."""
    augment = train.augment

    def augment_and_mark(sample, rng):
        sample = augment(sample, rng)
        image = sample["image"].clone()
        image[2] = int(rng.integers(1, 256))
        return sample | {"image": image}

    monkeypatch.setattr(train, "augment", augment_and_mark)
    whole = make_batches(MIXED)
    ranks = [make_batches(MIXED, rank, world_size, micro_batches) for rank in range(world_size)]
    marks = set()
    for step in range(10):
        items = range(step * micro_batches, (step + 1) * micro_batches)
        parts = [rank[item] for rank in ranks for item in items]
        expected = describe(whole[step])
        found = [row for part in parts for row in describe(part)]
        assert sorted(found) == sorted(expected)
        for part in parts:
            assert part["images"].shape[2:] == whole[step]["images"].shape[2:]
            assert len(part["images"]) >= 4 // (world_size * micro_batches)
        marks |= {mark for *_, mark in expected}
    assert len(ranks[0]) == 30 * micro_batches
    assert len(marks) > 30, "expected 40 numbers of 255"


def test_padded_sizes_are_multiples_but_not_beyond_the_largest_image():
    sizes = {}
    for multiple in (32, 128):
        settings = dict(min_size=[800], max_size=1333, batch_size=2, iters=200, multiple=multiple)
        batches = make_batches(COCO, **settings)
        plans = [batches.plan(step) for step in range(200)]
        for plan in plans:
            padded_height, padded_width = plan.padded_hw
            height, width = fcos.padded_hw(plan.sizes)
            assert height <= padded_height < height + multiple
            assert width <= padded_width < width + multiple
            assert min(plan.padded_hw) <= 800
            assert max(plan.padded_hw) <= 1344
        sizes[multiple] = {plan.padded_hw for plan in plans}
        assert len(sizes[multiple]) <= batches.count_padded_sizes()
    sides = {side for hw in sizes[128] for side in hw}
    assert sides <= {800, 1344, *range(128, 1344, 128)}
    assert len(sizes[128]) < len(sizes[32])
    assert len(sizes[32]) > 8


def test_a_step_depends_on_the_seed_but_not_on_other_steps():
    def read_steps(order, **settings):
        batches = make_batches(MIXED, **settings)
        found = {step: (str(batches.plan(step)), describe(batches[step])) for step in order}
        return [found[step] for step in range(30)]

    steps = read_steps(range(30))
    assert read_steps(reversed(range(30))) == steps
    assert read_steps(range(30), iters=50) == steps
    other_seed = read_steps(range(30), seed=1)
    assert sum(one == other for one, other in zip(steps, other_seed)) < 3


def test_every_epoch_of_a_group_is_another_permutation_of_it():
    batches = make_batches(MIXED, iters=200)
    drawn = {0: [], 1: []}
    for step in range(200):
        drawn[batches.group_of_step[step]] += batches.plan(step).indices
    for group, members in (0, WIDE), (1, UPRIGHT):
        indices = drawn[group]
        starts = range(0, len(indices) - len(members) + 1, len(members))
        epochs = [tuple(indices[start : start + len(members)]) for start in starts]
        assert all(sorted(epoch) == members for epoch in epochs)
        assert len(set(epochs)) > 2
    share = len(drawn[1]) / (len(drawn[0]) + len(drawn[1]))
    assert share == pytest.approx(3 / 7, abs=0.1)


def test_a_step_has_images_of_one_aspect_and_is_never_short():
    batches = make_batches(MIXED, iters=40, batch_size=6)
    for step in range(40):
        indices, sizes, padded_hw = batches.plan(step)
        assert len(indices) == len(sizes) == 6
        assert set(indices) <= set(WIDE) or set(indices) <= set(UPRIGHT)
        assert padded_hw == fcos.padded_hw(sizes)


@pytest.mark.parametrize("hw", [[(40, 60)], [(60, 40)] * 3, [(50, 50), (60, 40)], [(40, 60)] * 5])
def test_fewer_images_than_a_batch_are_drawn_equally_often(hw):
    batches = make_batches(FakeDataset(hw), batch_size=16, iters=5)
    assert all(len(batches[step]["images"]) == 16 for step in range(5))
    indices = [i for step in range(5) for i in batches.plan(step).indices]
    assert np.ptp(np.bincount(indices, minlength=len(hw))) <= 1


def test_repeated_indices_and_further_groups_shift_the_shares(monkeypatch):
    """As in repeat-factor sampling. `aspect_groups` is the function to replace."""
    groups = [0], [1, 1, 1, 2, 2, 5], [6, 6, 6]
    monkeypatch.setattr(train, "aspect_groups", lambda *_: tuple(map(np.array, groups)))
    batches = make_batches(MIXED, iters=1000)
    shares = np.bincount(batches.group_of_step) / 1000
    assert shares == pytest.approx([0.1, 0.6, 0.3], abs=0.05)
    indices = [i for step in range(1000) for i in batches.plan(step).indices]
    counts = np.bincount(indices, minlength=7)
    assert counts[1] / counts[2] == pytest.approx(1.5, abs=0.1)
    assert counts[3] == counts[4] == 0


def test_images_without_boxes_are_never_drawn():
    dataset = FakeDataset([(40, 60)] * 4, trainable=[True, False, True, False])
    batches = make_batches(dataset)
    assert {i for step in range(10) for i in batches.plan(step).indices} == {0, 2}


def test_images_without_boxes_are_drawn_with_negatives(shapes, tmp_path, capsys):
    def empty_first_image(content):
        bare = content["images"][0]["id"]
        boxes = [box for box in content["annotations"] if box["image_id"] != bare]
        content["annotations"] = boxes

    data = copy_data(shapes, tmp_path / "data", "train", empty_first_image)
    dataset = load_dataset(data)
    (bare,) = np.flatnonzero(~dataset.trainable)
    for negatives in (False, True):
        batches = make_batches(dataset, batch_size=len(dataset), negatives=negatives)
        drawn = {i for step in range(6) for i in batches.plan(step).indices}
        assert (bare in drawn) == negatives
    argv = command_line(data, tmp_path / "run", "--negatives", "--iters", 2)
    run([*argv, "--augment"])
    output = capsys.readouterr().out
    assert "1 of 24 images" in output
    assert "are negatives" in output
    assert load_checkpoint(tmp_path / "run")["settings"]["negatives"] is True
    assert "augment True there, False here" in error_line(capsys, argv)


# ---- random streams ----------------------------------------------------------------------------


def test_random_streams_of_all_purposes_and_positions_are_independent():
    """NumPy takes the seeds (2, 5) and (2, 5, 0) for one. A new purpose needs no entry in STREAMS:
    "mosaic" is one."""
    places = [("group",), ("mosaic", 0), ("mosaic", 0, 0, 0)]
    places += [("sizes", step) for step in (0, 1, 256)]
    for name in ("augment", "augment_more", "order", "mosaic", "sizes"):
        places += [(name, *position) for position in ((0, 0), (0, 1), (1, 0))]
    assert {(name, len(position)) for name, *position in places} >= set(train.STREAMS)

    def draw(place, batches):
        return tuple(batches.rng(*place).integers(2**60, size=2))

    drawn = set()
    for seed in (0, 1):
        batches = make_batches(MIXED, seed=seed)
        batches.drawn.clear()
        drawn |= {draw(place, batches) for place in places}
    assert len(drawn) == 2 * len(places)
    other_rank = make_batches(MIXED, rank=1, world_size=2, micro_batches=2)
    assert draw(("sizes", 1), other_rank) == draw(("sizes", 1), make_batches(MIXED))


def test_an_option_shifts_no_other_random_stream(monkeypatch):
    """--augment draws numbers, but changes no group, image, size or mirroring."""

    def draw_nine(sample, rng):
        rng.random(9)
        return sample

    monkeypatch.setattr(train, "augment_more", draw_nine)
    without = make_batches(MIXED)
    with_option = make_batches(MIXED, augment=True)
    for step in range(10):
        assert str(without.plan(step)) == str(with_option.plan(step))
        assert describe(without[step]) == describe(with_option[step])


def test_a_stream_that_is_taken_twice_in_an_item_is_an_error():
    batches = make_batches(MIXED)
    batches.plan(3)
    with pytest.raises(ValueError, match="'sizes' at .3,. is taken twice"):
        batches.rng("sizes", 3)
    assert len(describe(batches[3])) == 4, "the next item takes its streams again"


# ---- samples -----------------------------------------------------------------------------------


def test_all_sizes_and_both_mirrorings_are_drawn_and_boxes_follow_their_pixels():
    batches = make_batches(MIXED, iters=50)
    short_sides = set()
    mirrored = []
    for step in range(50):
        indices, sizes, _ = batches.plan(step)
        batch = batches[step]
        assert batch["counts"] == [1] * 4
        assert batch["labels"].tolist() == indices
        for image, box, i, (h, w) in zip(batch["images"], batch["boxes"], indices, sizes):
            old_h, old_w = MIXED.hw[i]
            x1, y1, x2, y2 = 1 / old_w * w, 2 / old_h * h, w / 2, h
            mirrored.append(is_mirrored(image[:, :h, :w]))
            if mirrored[-1]:
                x1, x2 = w - x2, w - x1
            assert box.tolist() == pytest.approx([x1, y1, x2, y2], abs=1e-4)
            short_sides.add(min(h, w))
    assert short_sides >= {32, 48}
    assert 0.35 < np.mean(mirrored) < 0.65


def test_augment_mirrors_pixels_and_boxes_exactly_or_changes_nothing():
    sample = FakeDataset([(32, 64)]).sample(0, (32, 64))
    columns = list(range(64))
    unchanged = (columns, [1, 2, 32, 32])
    mirrored = (columns[::-1], [32, 2, 63, 32])
    found = []
    for seed in range(20):
        made = train.augment(sample, np.random.default_rng(seed))
        found.append((made["image"][1, 0].tolist(), *made["boxes"].tolist()))
    assert unchanged in found
    assert mirrored in found
    assert all(row in (unchanged, mirrored) for row in found)


def test_strong_augmentation_keeps_boxes_on_their_objects_in_every_colour():
    """The object is a bright square on dark ground."""
    torch.manual_seed(0)
    crops = 0
    dropped = 0
    for seed in range(60):
        image = torch.full((3, 64, 80), 20, dtype=torch.uint8)
        x, y = np.random.default_rng(seed).integers(4, 40, 2).tolist()
        image[:, y : y + 16, x : x + 20] = 220
        boxes = torch.tensor([[x, y, x + 20, y + 16]]).float()
        sample = {"image": image, "boxes": boxes, "labels": torch.tensor([3])}
        made = train.augment_more(sample, np.random.default_rng(seed))
        again = train.augment_more(sample, np.random.default_rng(seed))
        assert made.keys() == again.keys() == sample.keys()
        for name in sample:
            assert made[name].equal(again[name]), name
        assert made["image"].shape == image.shape
        assert made["image"].dtype == torch.uint8
        assert not made["image"].equal(image)
        assert len(made["boxes"]) == len(made["labels"])
        if not len(made["boxes"]):
            dropped += 1
            continue
        brightness = made["image"].float().mean(0)
        ys, xs = (brightness > (brightness.min() + brightness.max()) / 2).nonzero().T
        visible = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        x1, y1, x2, y2 = made["boxes"][0]
        assert (visible - made["boxes"][0]).abs().max() <= 2
        crops += max(abs(x2 - x1 - 20), abs(y2 - y1 - 16)) > 1
    assert crops > 10
    assert dropped > 0


def test_a_column_without_a_rule_is_refused_by_name(monkeypatch):
    sample = FakeDataset([(32, 64)]).sample(0, (32, 64)) | {"angles": torch.zeros(1)}
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


def test_an_augmentation_that_crops_trains_alike_with_other_workers_and_micro_batches(
    shapes, tmp_path, monkeypatch
):
    """It makes images smaller and drops boxes, of some images all."""

    def crop(sample, rng):
        h, w = (int(side * rng.uniform(0.5, 1)) for side in sample["image"].shape[1:])
        boxes = sample["boxes"].clamp(max=torch.tensor([w, h, w, h]))
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)
        image = sample["image"][:, :h, :w]
        return {"image": image, "boxes": boxes[kept], "labels": sample["labels"][kept]}

    monkeypatch.setattr(train, "augment", crop)
    batches = make_batches(load_dataset(shapes))
    batch = batches[0]
    assert (batch["sizes"] < torch.tensor(batches.plan(0).sizes)).any()
    assert sum(batch["counts"]) > 0
    run(command_line(shapes, tmp_path / "one", "--iters", 3))
    flags = ["--iters", 3, "--workers", 1, "--accumulate", 2]
    run(command_line(shapes, tmp_path / "other", *flags))
    assert_close_run(tmp_path / "one", tmp_path / "other")


def test_images_of_one_pixel_and_of_ten_thousand_are_ordinary(shapes, tmp_path):
    def use_odd_images(content):
        content["images"] = []
        content["annotations"] = []
        for id, (w, h) in enumerate([(1, 1), (10_000, 3), (3, 10_000), (40, 60)], 1):
            content["images"].append(dict(id=id, file_name=f"{id}.png", width=w, height=h))
            bbox = [0, 0, max(w, 1.5), max(h, 1.5)]  # the official rules drop boxes up to 1
            box = dict(id=id, image_id=id, category_id=1, bbox=bbox)
            content["annotations"].append(box)

    data = copy_data(shapes, tmp_path / "data", "train", use_odd_images)
    path, folder = evaluate.coco_paths(data, "train2017")
    for row in json.loads(path.read_text())["images"]:
        Image.new("RGB", (row["width"], row["height"])).save(folder / row["file_name"])
    run(command_line(data, tmp_path / "run", "--iters", 3))
    assert all(value.isfinite().all() for value in saved_weights(tmp_path / "run").values())


def test_global_random_numbers_of_a_sample_depend_on_its_place_alone(monkeypatch):
    """Libraries of augmentations use the global generators of PyTorch, NumPy and Python."""
    drawn = []

    def augment(sample, rng):
        drawn.append((torch.rand(()).item(), np.random.random(), random.random()))
        return sample

    monkeypatch.setattr(train, "augment", augment)
    batches = make_batches(MIXED, iters=3)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for item in (2, 0, 2):
        batches[item]
    size = len(drawn) // 3
    assert drawn[:size] == drawn[2 * size :]
    assert len(set(drawn)) == 2 * size
    assert torch.equal(torch.rand(3), expected), "a sample must leave the generators alone"


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda sample: {"image": sample["image"].float() / 255},
        lambda sample: {"boxes": sample["boxes"].flip(1)},
        lambda sample: {"boxes": sample["boxes"] + 1000},
        lambda sample: {"boxes": sample["boxes"] * torch.nan},
        lambda sample: {"labels": sample["labels"] + 6},
        lambda sample: {"boxes": sample["boxes"][1:]},
    ],
    ids=["floats", "inverted", "outside", "NaN", "labels", "fewer boxes"],
)
def test_an_augmentation_that_spoils_a_sample_is_named(
    shapes, tmp_path, monkeypatch, capsys, change
):
    monkeypatch.setattr(train, "augment", lambda sample, rng: sample | change(sample))
    assert "augment made" in error_line(capsys, command_line(shapes, tmp_path))


def test_an_augmentation_may_change_a_sample_in_place(shapes):
    dataset = evaluate.CocoDataset(*evaluate.coco_paths(shapes, "train2017"))
    before = dataset.labels.copy(), dataset.boxes.copy()
    sample = dataset.sample(0, tuple(dataset.hw[0].tolist()))
    sample["labels"].fill_(0)
    sample["boxes"].mul_(2)
    assert np.array_equal(dataset.labels, before[0])
    assert np.array_equal(dataset.boxes, before[1])


def test_errors_in_a_sample_name_every_file_that_was_read_for_it(shapes, tmp_path, monkeypatch):
    """Here every sample shows a second image, as in a mosaic."""

    def read_two(self, i, hw, step, slot):
        other = self.rng("mosaic", step, slot).integers(len(self.dataset))
        first = self.dataset.sample(i, hw)
        second = self.dataset.sample(other, hw)
        return {name: torch.cat([first[name], second[name]]) for name in first}

    monkeypatch.setattr(train.TrainBatches, "read", read_two)
    data = shutil.copytree(shapes, tmp_path / "data")
    dataset = load_dataset(data)
    batches = make_batches(dataset, iters=20)
    dataset.files_read.append(Path("of an earlier sample"))
    six_channels = "train2017/.*, .*train2017/[^,]*: augment made"
    with pytest.raises(UserError, match=six_channels) as stop:
        batches[0]
    assert "of an earlier sample" not in str(stop.value)

    monkeypatch.setattr(train, "augment", lambda sample, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError) as stop:
        batches[1]
    assert len(re.findall("train2017", str(stop.value.__notes__))) == 2

    broken = data / "train2017" / "000000000003.jpg"
    broken.write_bytes(b"broken")
    messages = []
    for step in range(20):
        with pytest.raises((ZeroDivisionError, UserError)) as stop:
            batches[step]
        if stop.type is UserError:
            messages.append(str(stop.value))
    assert messages, "the broken image was never read"
    assert all(message.startswith(f"{broken}: ") for message in messages)


def write_bomb(path):
    """Write a PNG file of a few bytes that declares 10 ** 10 pixels."""
    size = (100_000).to_bytes(4, "big")
    header = b"IHDR" + size + size + b"\x08\0\0\0\0"
    checksum = zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0d" + header + checksum)


BROKEN_IMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:400]),
    "text": lambda path: path.write_text("not found"),
    "empty": lambda path: path.write_bytes(b""),
    "of another size": lambda path: Image.new("RGB", (9, 9)).save(path, "JPEG"),
    "a decompression bomb": write_bomb,
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", BROKEN_IMAGES.values(), ids=BROKEN_IMAGES)
def test_a_broken_image_ends_the_run_with_one_line_that_names_it(
    shapes, tmp_path, capsys, damage, workers
):
    data = shutil.copytree(shapes, tmp_path / "data")
    for path in (data / "train2017").iterdir():
        damage(path)
    line = error_line(capsys, command_line(data, tmp_path / "run", "--workers", workers))
    assert "train2017/0000000000" in line
    assert "cannot be read" in line or "as in its annotations, found 9x9" in line
