"""The changes of data and training in the table of CONTRIBUTING.md: each is made and tried.

Every test makes a change as a newcomer would: it edits a copy of the product, or replaces a
function. It checks the number of places, and that the change works in training, prediction and
export. changed_copy.py explains the scenarios. This file must not import the product at the top.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from changed_copy import found_in_drawing, found_in_results, run_train, run_train_in_two_parts

# ---- columns of the annotations ------------------------------------------------------------------

# The angle of an object: two places for its column, and the four of the output that predicts it.
FURTHER_COLUMN = [
    (
        "evaluate.py",
        "    iscrowd: bool | float | None = None\n",
        "    iscrowd: bool | float | None = None\n    angle: float\n",
    ),
    (
        "train.py",
        "COLUMNS = {\n",
        'COLUMNS = {\n    "angle": dict(mirror=lambda a, *_: -a, crop=lambda a, *_: a),\n',
    ),
    (
        "fcos.py",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n"
        "        self.angle = nn.Conv2d(channels, 1, 3, padding=1)\n",
    ),
    (
        "fcos.py",
        '            "cls": self.cls(cls_features),\n',
        '            "cls": self.cls(cls_features),\n'
        '            "angle": self.angle(box_features).squeeze(1).float(),\n',
    ),
    (
        "fcos.py",
        "    cls = sigmoid_focal_loss(",
        "    angle = ((outputs['angle'] - targets['angle']).abs() * positive).sum()\n"
        "    cls = sigmoid_focal_loss(",
    ),
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "angle": angle / num_positives}',
    ),
]


def test_a_further_column_is_two_places_and_its_loss(change):
    change(further_column, FURTHER_COLUMN)


def further_column():
    """Object number n has the angle n / 100. Crowds, which are not trained, have the angle 99."""
    import evaluate
    import fcos
    import train

    for split in "train2017", "val2017":
        annotations, _ = evaluate.coco_paths("data/shapes", split)
        coco = json.loads(annotations.read_text())
        boxes = coco["annotations"]
        coco["annotations"] = boxes[::-1] + [boxes[0] | dict(id=999, iscrowd=1, angle=99.0)]
        for box in boxes:
            box["angle"] = box["id"] / 100
        annotations.write_text(json.dumps(coco))
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "train2017"))
    by_place = {tuple(box["bbox"]): box["angle"] for box in coco_boxes("train2017")}
    settings = train.resolve(train.parse_args(["shapes", "--iters", "8", "--augment"]))
    settings |= dict(batch_size=4, min_size=[64], max_size=96)
    batches = train.TrainBatches(dataset, settings)
    for step in range(8):
        batch = batches[step]
        assert len(batch["angle"]) == len(batch["boxes"])
        assert batch["angle"].abs().max() < 1
    assert min(batches[step]["angle"].min() for step in range(8)) < 0  # mirrored ones
    sample = dataset.sample(0, tuple(dataset.hw[0].tolist()))
    for (x1, y1, x2, y2), angle in zip(sample["boxes"].tolist(), sample["angle"].tolist()):
        xywh = (x1, y1, x2 - x1, y2 - y1)
        annotated = [angle for place, angle in by_place.items() if np.allclose(place, xywh)]
        assert annotated == [pytest.approx(angle)]

    # The target of a location is the angle of its box.
    model = fcos.build("shapes", 6)
    truth = {name: column for name, column in sample.items() if name != "image"}
    targets = model.targets((160, 160), [truth])
    index = targets["index"][0]
    assert (index >= 0).any()
    assert torch.equal(targets["angle"][0][index >= 0], sample["angle"][index[index >= 0]])
    assert (targets["angle"][0][index < 0] == 0).all()

    rows = run_train("--augment", "--set", "candidate_threshold=0.001", "--accumulate", "2")
    assert all(row["angle"] > 0 for row in rows)
    assert all("angle" in box for box in found_in_drawing() + found_in_results())


def coco_boxes(split):
    import evaluate

    annotations, _ = evaluate.coco_paths("data/shapes", split)
    return [b for b in json.loads(annotations.read_text())["annotations"] if not b["iscrowd"]]


POINT = [
    (
        "evaluate.py",
        "    iscrowd: bool | float | None = None\n",
        "    iscrowd: bool | float | None = None\n    point: tuple[float, float]\n",
    ),
    (
        "train.py",
        "COLUMNS = {\n",
        'COLUMNS = {\n    "point": dict(\n'
        "        mirror=lambda p, width: torch.stack([width - p[:, 0], p[:, 1]], 1),\n"
        "        crop=lambda p, offset, scale: (p - offset[:2]) * scale[:2],\n    ),\n",
    ),
]


def test_a_column_in_pixels_is_resized_with_the_boxes(change):
    change(column_in_pixels, POINT)


def column_in_pixels():
    """Every point lies a quarter of the width from the left, and a third of the height down."""
    import evaluate
    import train

    annotations, images = evaluate.coco_paths("data/shapes", "train2017")
    coco = json.loads(annotations.read_text())
    for box in coco["annotations"]:
        x, y, w, h = box["bbox"]
        box["point"] = [x + w / 4, y + h / 3]
    annotations.write_text(json.dumps(coco))
    settings = train.resolve(train.parse_args(["shapes", "--iters", "8"]))
    settings |= dict(batch_size=4, min_size=[64], max_size=96)
    batches = train.TrainBatches(evaluate.CocoDataset(annotations, images), settings)
    for batch in [batches.smallest(), *(batches[step] for step in range(8))]:
        x1, y1, x2, y2 = batch["boxes"].T
        x, y = ((batch["point"] - batch["boxes"][:, :2]) / torch.stack([x2 - x1, y2 - y1], 1)).T
        torch.testing.assert_close(y, torch.full_like(y, 1 / 3), atol=1e-4, rtol=0)
        torch.testing.assert_close((x - 0.5).abs(), torch.full_like(x, 0.25), atol=1e-4, rtol=0)


@pytest.mark.parametrize("forgotten", range(6))
def test_a_place_of_a_further_column_that_is_forgotten_is_an_error(change, forgotten):
    change(forgotten_column, FURTHER_COLUMN[:forgotten] + FURTHER_COLUMN[forgotten + 1 :])


def forgotten_column():
    import fcos

    for split in "train2017", "val2017":
        annotations = Path(f"data/shapes/annotations/instances_{split}.json")
        coco = json.loads(annotations.read_text())
        for box in coco["annotations"]:
            box["angle"] = 0.5
        annotations.write_text(json.dumps(coco))
    with pytest.raises(
        (fcos.UserError, AttributeError, KeyError, NameError, ValueError), match="angle"
    ):
        run_train()
    assert not Path("run/model.pt").exists()


# ---- sampling, optimization, logging -------------------------------------------------------------


def test_repeat_factor_sampling_is_one_function(change):
    change(repeat_factor_sampling)


def repeat_factor_sampling():
    """Repeat images with a star nine times."""
    import evaluate
    import train

    aspect_groups = train.aspect_groups

    def repeated(dataset, settings):
        star = dataset.classes.index("star")
        groups = aspect_groups(dataset, settings)
        has_star = np.array([star in dataset.target(i)[1] for i in range(len(dataset))])
        return tuple(np.repeat(rows, np.where(has_star[rows], 9, 1)) for rows in groups)

    train.aspect_groups = repeated
    settings = train.resolve(train.parse_args(["shapes", "--iters", "400"]))
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "train2017"))
    batches = train.TrainBatches(dataset, settings)
    wide, upright = map(len, batches.groups)
    assert len(dataset) < wide + upright and min(wide, upright) > 0
    share = upright / (wide + upright)
    assert (batches.group_of_step == 1).mean() == pytest.approx(share, abs=0.1)
    drawn = np.bincount(np.ravel([batches.plan(step).indices for step in range(400)]), minlength=8)
    expected = np.bincount(np.concatenate(batches.groups), minlength=8) / (wide + upright)
    assert drawn / drawn.sum() == pytest.approx(expected, abs=0.03)
    assert len(run_train()) == 4


def test_a_mosaic_is_one_function(change):
    change(mosaic)


def mosaic():
    """Join four images to a sample. An error names the broken image, not the first of the four."""
    import evaluate
    import fcos
    import train

    def read(batches, i, hw, step, slot):
        others = batches.rng("mosaic", step, slot).choice(len(batches.dataset), 3).tolist()
        h, w = hw[0] // 2, hw[1] // 2
        image = torch.zeros(3, *hw, dtype=torch.uint8)
        parts = [batches.dataset.sample(k, (h, w)) for k in (i, *others)]
        for n, part in enumerate(parts):
            y, x = n // 2 * h, n % 2 * w
            image[:, y : y + h, x : x + w] = part.pop("image")
            part["boxes"] = part["boxes"] + torch.tensor([x, y, x, y])
        return {"image": image} | {n: torch.cat([part[n] for part in parts]) for n in parts[0]}

    settings = train.resolve(train.parse_args(["shapes", "--iters", "9"]))
    settings |= dict(batch_size=4, min_size=[64], max_size=96)
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "train2017"))
    plain = train.TrainBatches(dataset, settings)
    plans = [str(plain.plan(step)) for step in range(9)]
    boxes = sum(plain[0]["counts"])

    train.TrainBatches.read = read
    batches = train.TrainBatches(dataset, settings)
    assert [str(batches.plan(step)) for step in range(9)] == plans
    assert sum(batches[0]["counts"]) > boxes

    one = run_train(out="one")
    other = run_train("--workers", "1", "--accumulate", "2", out="other")
    for row, same in zip(one, other, strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)

    broken = Path("data/shapes/train2017/000000000003.jpg")
    broken.write_bytes(b"no image")
    with pytest.raises(fcos.UserError, match=str(broken)):
        run_train(out="third")


LOGGER = [
    (
        "train.py",
        "    def log(self, step, **values):\n",
        "    def log(self, step, **values):\n"
        '        print(json.dumps(values | {"step": step}), file=open(self.out / "board", "a"))\n',
    )
]


def test_optimizer_schedule_teacher_and_logger_resume_on_two_ranks(change):
    change(own_optimization, LOGGER, world_size=2)


def own_optimization():
    """Use AdamW with a rate for each part of the network, a cosine schedule, and a teacher."""
    import copy

    import train

    def make_optimizer(model, settings):
        rates = {"backbone": 1e-4, "fpn": 1e-3, "head": 2e-3}
        groups = []
        for name, rate in rates.items():
            groups.append({"params": getattr(model, name).parameters(), "lr": rate})
        return torch.optim.AdamW(groups, weight_decay=0.05)

    class Teacher:
        def __init__(self, model):
            self.model = copy.deepcopy(model)
            self.student = model

        def update(self, step):
            pairs = zip(self.model.parameters(), self.student.parameters(), strict=True)
            for average, new in pairs:
                average.data.lerp_(new.data, 0.5 / (step + 1))

        def state_dict(self):
            return self.model.state_dict()

        def load_state_dict(self, state):
            self.model.load_state_dict(state)

    def lr_at(step, lr, iters, warmup, decays=None):
        return lr / 2 * (1 + math.cos(math.pi * step / iters))

    train.make_optimizer = make_optimizer
    train.make_companions = lambda model, settings: {"teacher": Teacher(model)}
    train.lr_at = lr_at
    rows = run_train(out="whole")
    resumed = run_train_in_two_parts()
    torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "1":
        return
    assert [row["lr"] for row in rows] == pytest.approx([lr_at(k, 1e-4, 4, 0) for k in range(4)])
    assert [row["loss"] for row in rows] == [row["loss"] for row in resumed]
    one = torch.load("whole/last.pt")
    other = torch.load("run/last.pt")
    for name in "optimizer", "teacher", "model":
        values = torch.utils._pytree.tree_leaves(one[name])
        resumed_values = torch.utils._pytree.tree_leaves(other[name])
        for value, resumed_value in zip(values, resumed_values, strict=True):
            if torch.is_tensor(value):
                assert torch.equal(value, resumed_value)
            else:
                assert value == resumed_value
    board = read_board("whole")
    assert len(board) == 6  # one rank writes: four rows of losses, two of metrics
    assert board == read_board("run")

    # Without the second rank.
    for name in "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID":
        del os.environ[name]
    alone = run_train(out="alone")
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in rows], rel=1e-3)


def read_board(out):
    """Return what the logger wrote, {(step, names): values}; a repeated step replaces the first."""
    board = {}
    for line in Path(out, "board").read_text().splitlines():
        row = json.loads(line)
        row.pop("images_per_second", None)
        board[row["step"], *row] = row
    return board
