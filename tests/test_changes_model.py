"""The changes of the model in the table of CONTRIBUTING.md: each is made and tried.

Every test makes a change as a newcomer would: it edits a copy of the product, or replaces a
function. It checks the number of places, and that the change works in training, prediction and
export. changed_copy.py explains the scenarios. This file must not import the product at the top.
"""

import contextlib
import functools
import importlib.util
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from changed_copy import (
    PHOTO,
    found_in_drawing,
    found_in_results,
    run_evaluate,
    run_train,
    run_train_in_two_parts,
    save_model,
)

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))),
    reason="needs onnx and onnxscript",
)
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")

# ---- losses --------------------------------------------------------------------------------------

FURTHER_LOSS = [
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "l1": (predicted - target).abs().sum() / num_positives}',
    )
]
MEAN_LOSS = [
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "l1": (predicted - target).abs().mean()}',
    )
]
KIND_OF_IOU_LOSS = [
    (
        "kernels/iou_loss.py",
        "KINDS = {\n",
        'KINDS = {\n    "squared_iou": lambda pred, target: 1 - iou(pred, target) ** 2,\n',
    )
]


def test_a_further_loss_is_one_place(change):
    change(further_loss, FURTHER_LOSS)


def further_loss():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = run_train()
    assert "warning: loss" not in printed.getvalue()
    assert len(rows) == 4
    for row in rows:
        assert row["l1"] > 0
        assert row["loss"] == pytest.approx(row["cls"] + row["box"] + row["ctr"] + row["l1"])


def test_a_loss_that_depends_on_the_micro_batches_causes_a_warning(change):
    change(mean_loss, MEAN_LOSS)


def mean_loss():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_train()
    assert "warning: loss l1 depends on how a step is split" in printed.getvalue()


def test_a_kind_of_iou_loss_is_one_place(change):
    change(kind_of_iou_loss, KIND_OF_IOU_LOSS)


def kind_of_iou_loss():
    import fcos

    rows = run_train("--set", "box_loss=squared_iou")
    assert all(row["box"] > 0 for row in rows)
    assert fcos.load("run/model.pt").loss["box_loss"] == "squared_iou"
    with pytest.raises(fcos.UserError, match="expected one of squared_iou, iou"):
        fcos.build("shapes", box_loss="circle_iou")


# ---- outputs of the head -------------------------------------------------------------------------

# The logarithm of width / height of the object.
FURTHER_OUTPUT = [
    (
        "fcos.py",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n"
        "        self.aspect = nn.Conv2d(channels, 1, 3, padding=1)\n",
    ),
    (
        "fcos.py",
        '            "cls": self.cls(cls_features),\n',
        '            "cls": self.cls(cls_features),\n'
        '            "aspect": self.aspect(box_features).squeeze(1).float(),\n',
    ),
    (
        "fcos.py",
        "    cls = sigmoid_focal_loss(",
        "    left, top, right, bottom = (targets['ltrb'].where(positive[..., None], 1)).unbind(2)\n"
        "    aspect = (outputs['aspect'] - ((left + right) / (top + bottom)).log()).abs()\n"
        "    aspect = (aspect * positive).sum()\n"
        "    cls = sigmoid_focal_loss(",
    ),
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "aspect": aspect / num_positives}',
    ),
]


def test_a_further_output_is_four_places(change):
    change(further_output, FURTHER_OUTPUT)
    assert len(FURTHER_OUTPUT) == 4


def further_output():
    import fcos

    assert all(row["aspect"] > 0 for row in run_train("--set", "candidate_threshold=0.001"))
    model = fcos.load("run/model.pt")
    image = fcos.read_image(PHOTO)
    found = model.predict(image)[0]
    assert found["aspect"].shape == found["scores"].shape != (0,)
    hw = fcos.resized_hw(*image.shape[1:], 64, 96)
    with torch.no_grad():
        images, sizes = fcos.pad_batch([fcos.resize(image, hw)])
        outputs = model(images, sizes)
        detections = model.decode(outputs, sizes)
    predicted = {0.0, *outputs["aspect"].flatten().tolist()}  # 0.0 is padding
    assert set(detections["aspect"].flatten().tolist()) <= predicted
    assert [box["aspect"] for box in found_in_drawing()] == found["aspect"].tolist()
    results = found_in_results()
    first = [box for box in results if box["image_id"] == results[0]["image_id"]]
    assert [box["aspect"] for box in first] == pytest.approx(found["aspect"].tolist())

    found = model.predict(image, tile=64)[0]
    assert found["aspect"].shape == found["scores"].shape != (0,)

    # Mirrored views need a rule for the mirror image of the output.
    with pytest.raises(fcos.UserError, match="output aspect: expected a rule in fcos.UNMIRROR"):
        model.predict(image, tta=True)
    with pytest.raises(fcos.UserError, match="aspect"):
        found_in_results("--tta")
    fcos.UNMIRROR["aspect"] = lambda aspect, right: aspect
    found = model.predict(image, tta=True)[0]
    assert found["aspect"].shape == found["scores"].shape != (0,)


@pytest.mark.parametrize("forgotten", range(4))
def test_a_place_of_a_further_output_that_is_forgotten_is_an_error(change, forgotten):
    edits = FURTHER_OUTPUT[:forgotten] + FURTHER_OUTPUT[forgotten + 1 :]
    change(forgotten_place, edits)


def forgotten_place():
    with pytest.raises((AttributeError, KeyError, NameError, ValueError), match="aspect"):
        run_train()
    assert not Path("run/last.pt").exists()


# ---- assignment and suppression ------------------------------------------------------------------


def test_another_assignment_is_one_function(change):
    change(another_assignment)


def another_assignment():
    """Assign a location to the box whose center is nearest, if the location lies inside."""
    import fcos

    def targets(model, hw, truths):
        points = model.points(hw, truths[0]["boxes"].device)
        index = torch.full((len(truths), len(points)), -1)
        for row, truth in zip(index, truths):
            x1, y1, x2, y2 = truth["boxes"].T
            x, y = points[:, 0, None], points[:, 1, None]
            inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
            distance = ((x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2).where(inside, math.inf)
            if len(x1):
                nearest = distance.min(1)
                row[:] = nearest.indices.where(nearest.values < math.inf, -1)
        seen.append((index >= 0).sum().item())
        return fcos.encode(points, truths, index)

    seen = []
    fcos.FCOS.targets = targets
    rows = run_train("--accumulate", "2")
    assert sum(seen) > 0 and all(math.isfinite(row["loss"]) for row in rows)


def soft_suppress(model, boxes, scores, labels):
    """Compute Soft-NMS (arXiv 1704.04503) with the Gaussian decay."""
    area = (boxes[..., 2:] - boxes[..., :2]).prod(2)
    left = scores
    keep, kept_scores = [], []
    for _ in range(model.max_detections):
        score, best = left.max(1, keepdim=True)
        keep.append(best.where(score > 0.02, -1))
        kept_scores.append(score.where(score > 0.02, -math.inf))
        box = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        corner = torch.maximum(box[..., :2], boxes[..., :2])
        other_corner = torch.minimum(box[..., 2:], boxes[..., 2:])
        intersection = (other_corner - corner).clamp(min=0).prod(2)
        overlap = intersection / (area + area.gather(1, best) - intersection + 1e-9)
        decay = (-(overlap**2) / 0.5).exp().where(labels == labels.gather(1, best), 1)
        left = (left * decay).scatter(1, best, -math.inf)
    return torch.cat(keep, 1), torch.cat(kept_scores, 1)


def test_another_suppression_is_one_function_for_all_predictions(change):
    change(another_suppression)


def another_suppression():
    import evaluate
    import fcos
    import train

    model, dataset = save_model(max_detections=20)
    hard = model.predict(PHOTO)[0]["scores"]
    hard_views = model.predict(PHOTO, tta=True)[0]["scores"]
    hard_tiles = model.predict(PHOTO, tile=64)[0]["scores"]

    fcos.FCOS.suppress = soft_suppress
    soft = model.predict(PHOTO)[0]
    views = model.predict(PHOTO, tta=True)[0]
    assert not torch.equal(soft["scores"], hard)
    assert not torch.equal(views["scores"], hard_views)
    assert not torch.equal(model.predict(PHOTO, tile=64)[0]["scores"], hard_tiles)
    # A tile as large as the image: the scores must not decay on the tile and again in the end.
    one_tile = model.predict(PHOTO, tile=4096)[0]["scores"]
    assert one_tile.tolist() == pytest.approx(soft["scores"].tolist(), rel=1e-5)

    # It decays final scores: those that are not changed are the scores of predict.
    candidates = {}

    def note(model, boxes, scores, labels):
        candidates["scores"] = scores
        return soft_suppress(model, boxes, scores, labels)

    fcos.FCOS.suppress = note
    assert torch.equal(model.predict(PHOTO)[0]["scores"], soft["scores"])
    assert soft["scores"][0] == candidates["scores"].max() == hard[0]
    fcos.FCOS.suppress = soft_suppress

    assert [box["score"] for box in found_in_drawing()] == soft["scores"].tolist()
    first = dataset.image_ids[0]
    for flags, found in ((), soft), (("--tta",), views):
        rows = [row for row in found_in_results(*flags) if row["image_id"] == first]
        assert [row["score"] for row in rows] == pytest.approx(found["scores"].tolist(), rel=1e-5)

    # The trainer's validation.
    metrics = []
    score = evaluate.score

    def keep(results, *rest):
        metrics.append([row["score"] for row in results])
        return score(results, *rest)

    evaluate.score = keep
    files = SimpleNamespace(
        active=True,
        has_model=lambda: False,
        log=lambda *_, **__: True,
        save_best=lambda *_, **__: True,
    )
    train.validate(0, model, {}, dataset, None, files, 0)
    rows = found_in_results()
    assert metrics[0] == pytest.approx([row["score"] for row in rows])


@needs_onnx
def test_onnx_gets_a_further_output_and_another_suppression(change):
    change(exported_changes, FURTHER_OUTPUT)


def exported_changes():
    """Check the arguments of torch.onnx.export; test_export.py exports for real."""
    import fcos

    model, _ = save_model()
    fcos.FCOS.suppress = soft_suppress
    expected = model.predict(PHOTO)[0]
    given = {}

    def export(deployed, _, output_names, **__):
        image = fcos.read_image(PHOTO)
        size = fcos.resized_hw(*image.shape[1:], 64, 96)
        found = deployed(*fcos.pad_batch([fcos.resize(image, size)]))
        given.update(zip(output_names, found.values(), strict=True))
        raise KeyboardInterrupt

    torch.onnx.export = export
    with pytest.raises(KeyboardInterrupt):
        run_evaluate("--export", "model.onnx", "--min-size", "64", "--max-size", "96")
    assert given.keys() == {"boxes", "scores", "labels", "aspect"}
    for name in "scores", "aspect":
        torch.testing.assert_close(given[name][0, : len(expected[name])], expected[name])


# ---- levels and backbones ------------------------------------------------------------------------


def test_other_levels_are_keywords(change):
    change(other_levels)


def other_levels():
    import fcos

    with pytest.raises(fcos.UserError, match="levels.*expected ranges with them"):
        run_train("--set", "levels=2,3,4,5,6")
    run_train("--set", "levels=2,3,4,5,6", "ranges=16,32,64,128")
    model = fcos.load("run/model.pt")
    assert model.strides == (4, 8, 16, 32, 64)
    points = model.points((64, 96))
    assert len(points) == 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    bounds = {(stride, low, high) for _, _, stride, low, high in points.tolist()}
    ends = [-1.0, 16.0, 32.0, 64.0, 128.0, math.inf]
    assert bounds == set(zip(map(float, model.strides), ends, ends[1:]))
    assert found_in_results() is not None


@pytest.mark.parametrize("level", [2, 4])
def test_a_single_level_is_a_keyword(change, level):
    change(functools.partial(single_level, level))


def single_level(level):
    """Check that the coarser features of the backbone reach the level, and are trained."""
    import fcos

    run_train("--set", f"levels={level},", "candidate_threshold=0.001")
    model = fcos.load("run/model.pt")
    assert model.strides == (2**level,) and model.ranges == ()
    names = {name.split(".")[0] for name in model.fpn.state_dict()}
    assert names == {f"output{level}"} | {f"lateral{n}" for n in range(level, 6)}
    assert {row["image_id"] for row in found_in_results()} != set()


@needs_timm
def test_a_timm_model_is_a_flag(change):
    change(timm_model)


def timm_model():
    """Train with weights of timm and torchvision's pixel normalization; stop and resume."""
    import timm

    import fcos

    create = timm.create_model

    def create_model(arch, pretrained, **keywords):
        """Fill the first layer with a known value, where timm would download weights."""
        body = create(arch, pretrained=False, **keywords)
        if pretrained:
            body.conv1[0].weight.data.fill_(0.125)
        return body

    timm.create_model = create_model
    flags = ["--set", "backbone=timm", "arch=resnet10t", "frozen_stages=1"]
    flags += ["--weights", "imagenet"]
    run_train(*flags, out="whole")
    model = fcos.load("whole/model.pt")
    assert model.convention == fcos.FCOS(3, fcos.Timm("resnet10t")).convention
    assert not model.convention["bgr"]
    assert model.backbone.body.conv1[0].weight.eq(0.125).all()

    run_train_in_two_parts(*flags)
    whole, resumed = (torch.load(f"{out}/last.pt")["model"]["model"] for out in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert found_in_results() is not None
