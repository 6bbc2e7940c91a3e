"""fcos.py against numbers recorded from the official FCOS, and against input it must survive.

golden/ holds the small sets, recorded on synthetic images; ../shared/golden, where it is present,
the full ones. Golden labels are ours + 1, golden boxes inclusive: their x2 is ours - 1.
"""

import functools
import io
import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.synth_image import image as synth_image
from golden.weights_recipe import make_weights
from PIL import Image

import evaluate
import fcos

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
RECORDED = {  # model: its recording
    "fcos_imprv_R_50_FPN": "fcos_imprv_R_50_FPN_1x",
    "fcos_R_50_FPN": "fcos_R_50_FPN_1x",
    "fcos_imprv_dcnv2_R_50_FPN": "fcos_imprv_dcnv2_R_50_FPN_1x",
    "fcos_syncbn_c128_MNV2_FPN": "fcos_syncbn_bs32_c128_MNV2_FPN_1x",
}
NO_BOXES, NO_LABELS = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


def read_golden(path):
    """What is recorded at this path without suffix: the JSON and the arrays."""
    return json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".npz"))


def rename(model, key):
    """Our name of an official tensor."""
    return fcos.rename_key(key, fcos.BACKBONE_NAMES[type(model.backbone)] + fcos.NAMES)


def recipe_model(name, keys):
    """A model with the values that the recipe gives to these official keys, all drawn once."""
    with torch.device("meta"):
        model = fcos.build(name)
    model.to_empty(device="cpu").set_convention()
    own = model.state_dict()
    weights = make_weights({key: own[rename(model, key)].shape for key in keys})
    report = fcos.load_weights(model, {key: torch.from_numpy(w) for key, w in weights.items()})
    assert report["family"] == "official" and not report["missing"] + report["ignored"]
    return model.eval()


@functools.cache
def official_model(name):
    """A recorded model with the recorded weights, for all tests: change a copy."""
    _, arrays = read_golden(GOLDEN / f"model_{RECORDED[name]}")
    model = recipe_model(name, arrays["weights.keys"].tolist())
    own = model.state_dict()
    for key, sums in zip(arrays["weights.keys"].tolist(), arrays["weights.sum_abssum"]):
        value = own.pop(rename(model, key)).double()
        assert np.allclose([value.sum(), value.abs().sum()], sums, rtol=1e-6, atol=1e-5), key
    assert not own
    return model


def detector(num_classes=3, **overrides):
    """A small model that finds something in every image."""
    torch.manual_seed(0)
    model = fcos.build("shapes", num_classes, **overrides).eval()
    with torch.no_grad():
        model.head.cls.weight.normal_(std=0.2)
        model.head.cls.bias.fill_(-1)
        model.head.box.weight.normal_(std=0.1)
        model.head.box.bias.fill_(2)
        model.head.ctr.weight.normal_(std=0.2)
    return model


def picture(h, w, seed=1):
    return torch.from_numpy(synth_image(seed, h, w)).permute(2, 0, 1)


def assert_detections_match(found, expected, share=0.995, pixels=0.5, score=1e-3):
    """At least this share of the expected detections is found, each once, and little else."""
    close = (found["boxes"] - expected["boxes"][:, None]).abs().amax(2) <= pixels
    close &= (found["scores"] - expected["scores"][:, None]).abs() <= score
    close &= found["labels"] == expected["labels"][:, None]
    taken = np.zeros(close.shape[1], bool)
    for row in close.numpy():
        free = np.flatnonzero(row & ~taken)
        taken[free[:1]] = True
    D = len(expected["labels"])
    assert taken.sum() >= share * D and abs(len(taken) - D) <= (1 - share) * D
    assert (found["scores"].diff() <= 0).all()


def assert_same(found, expected, pixels=1e-2):
    assert len(expected["labels"]) > 0
    assert_detections_match(found, expected, 1, pixels, 1e-4)


# ---- images ------------------------------------------------------------------------------------


# ---- targets and losses ------------------------------------------------------------------------


def truths(boxes, labels):
    """Boxes and labels of a batch as `FCOS.targets` takes them."""
    return [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]


# ---- the network -------------------------------------------------------------------------------


@torch.inference_mode()
def outputs_of(model, images, sizes=None):
    outputs = Outputs(model(images, sizes))
    outputs.hw = images.shape[-2:]
    return outputs


# ---- decoding ----------------------------------------------------------------------------------


# ---- predict -----------------------------------------------------------------------------------


def test_predict_returns_boxes_in_pixels_of_the_original():
    model, image = detector(), picture(90, 120)
    small = fcos.resize(image, (60, 80))
    found = model.predict(image, min_size=60, max_size=200)[0]
    batch, sizes = fcos.pad_batch([small])
    expected = model.detect(outputs_of(model, batch, sizes), sizes)[0]
    expected["boxes"] = expected["boxes"] * 1.5
    assert_same(found, expected)
    assert found["boxes"][:, 2].max() <= 120 and found["boxes"][:, 3].max() <= 90
    assert found["boxes"].max() > 80


def test_predict_resizes_to_the_size_that_travels_with_the_model():
    model, image = detector(), picture(90, 120)
    model.test_size = (60, 200)
    assert_same(model.predict(image)[0], model.predict(image, min_size=60, max_size=200)[0])
    other = model.predict(image, min_size=90)[0]
    assert other["scores"].tolist() != model.predict(image)[0]["scores"].tolist()


def test_predict_passes_thresholds_on():
    model = detector()
    predict = functools.partial(model.predict, picture(90, 120), 64, 128)
    scores = predict()[0]["scores"]
    model.max_detections = 4
    assert len(predict(score_threshold=0.3)[0]["labels"]) == 4
    model.max_detections = 100
    middle = scores[len(scores) // 2].item()
    assert predict(score_threshold=middle)[0]["scores"].equal(scores[scores >= middle])
    assert not len(predict(score_threshold=1.0)[0]["boxes"])
    model.candidate_threshold = 0.6
    sure = predict()[0]["scores"]  # of classes; sqrt(0.6 * ctr) is less
    assert 0 < len(sure) and sure.min() < 0.6


def test_inclusive_boxes_keep_their_pixel_when_they_are_scaled():
    model = fcos.build("shapes", 2)
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    assert model.rescale(boxes, (50, 100), (100, 400)).tolist() == [[40, 40, 120, 80]]
    model.set_convention(inclusive=True)  # from 10..29 and 20..39
    assert model.rescale(boxes, (50, 100), (100, 400)).tolist() == [[40, 40, 117, 79]]
    assert model.rescale(boxes, torch.tensor([50, 100]), torch.tensor([50, 100])).equal(boxes)


def test_scaled_boxes_are_those_of_the_official_json(shared):
    model, checked = fcos.build("shapes"), 0
    model.set_convention(inclusive=True)
    original = {479: (427, 640), 1199: (427, 640), 426: (480, 640), 1066: (480, 640)}
    for path in sorted((shared / "golden").glob("model_*.json")):
        facts, arrays = read_golden(path)
        for tag, run in facts["runs"].items():
            for i, size in enumerate(run["resized_hw"]):
                recorded = {
                    name: arrays[f"{tag}.img{i}.det_{name}"] for name in ("boxes_net", "xywh")
                }
                boxes = torch.from_numpy(recorded["boxes_net"]) + torch.tensor([0, 0, 1, 1])
                boxes = model.rescale(boxes, size, original[size[1]])
                boxes[:, 2:] -= boxes[:, :2]
                error = np.abs(boxes.numpy() - recorded["xywh"]).max()
                assert error < 0.05, (path.name, tag, i)
                checked += len(boxes)
    assert checked >= 2000


@pytest.mark.parametrize("inclusive", [True, False])
def test_predict_and_evaluate_give_the_same_boxes(inclusive, tmp_path):
    model = detector()
    model.set_convention(inclusive=inclusive)
    photos = [Image.fromarray(synth_image(1, *hw)) for hw in ((90, 120), (75, 51))]
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    images = [
        dict(id=i, file_name=f"{i}.png", width=photo.width, height=photo.height)
        for i, photo in enumerate(photos)
    ]
    categories = [dict(id=i, name=str(i)) for i in range(3)]
    content = dict(images=images, annotations=[], categories=categories)
    (tmp_path / "instances.json").write_text(json.dumps(content))
    dataset = evaluate.CocoDataset(tmp_path / "instances.json", tmp_path)
    model.test_size = 64, 128
    rows = evaluate.predict(model, dataset, workers=0)
    for i, found in enumerate(model.predict(photos, 64, 128)):
        found["boxes"][:, 2:] -= found["boxes"][:, :2]
        theirs = [row for row in rows if row["image_id"] == i]
        assert len(theirs) > 10
        assert [row["bbox"] for row in theirs] == found["boxes"].tolist()
        assert [row["score"] for row in theirs] == found["scores"].tolist()


def test_predict_leaves_the_mode_of_the_model_as_it_was(tmp_path):
    model = detector()
    for training in (True, False):
        model.train(training).predict(picture(32, 32), 32, 32)
        assert model.training is training and model.backbone.training is training
    with pytest.raises(ValueError):
        model.train().predict([picture(32, 32), tmp_path / "nowhere.jpg"], 32, 32)
    assert model.training


def slow_tta(model, image, sizes, extra):
    """Test-time augmentation as the official code does it, a box at a time. Sides of boxes are
    inclusive where `extra` is 1, and ends where it is 0. -> (score, label, x1, y1, x2, y2) in
    pixels of the image, at most 100."""
    H, W = image.shape[1:]
    first_h, first_w = fcos.resized_hw(H, W, *sizes[0])
    found = []
    for size in sizes:
        h, w = fcos.resized_hw(H, W, *size)
        for mirrored in (False, True):
            pixels = fcos.resize(image, (h, w))
            batch, _ = fcos.pad_batch([pixels.flip(2) if mirrored else pixels])
            with torch.no_grad():
                outputs = model(batch, torch.tensor([[h, w]]))
            cls, ctr = outputs["cls"][0].sigmoid(), outputs["ctr"][0].sigmoid()
            start = 0
            for count in outputs["levels"]:
                pairs = [
                    ((cls[p, k] * ctr[p]).item(), p, k)
                    for p, k in (cls[start : start + count] > 0.05).nonzero().tolist()
                    for p in [p + start]
                ]
                start += count
                for joint, p, k in sorted(pairs, reverse=True)[:1000]:
                    (x, y), (l, t, r, b) = (
                        outputs["points"][p, :2].tolist(),
                        outputs["ltrb"][0, p].tolist(),
                    )
                    x1, x2 = (min(max(side, 0), w - extra) for side in (x - l, x + r))
                    y1, y2 = (min(max(side, 0), h - extra) for side in (y - t, y + b))
                    if mirrored:
                        x1, x2 = w - extra - x2, w - extra - x1
                    kx, ky = first_w / w, first_h / h
                    if x2 + extra > x1 and y2 + extra > y1:
                        found.append((joint**0.5, k, x1 * kx, y1 * ky, x2 * kx, y2 * ky))
    found.sort(reverse=True)
    kept = []
    for score, k, x1, y1, x2, y2 in found:
        for _, other, a1, b1, a2, b2 in kept:
            inter = max(min(x2, a2) - max(x1, a1) + extra, 0) * max(
                min(y2, b2) - max(y1, b1) + extra, 0
            )
            area = (x2 - x1 + extra) * (y2 - y1 + extra) + (a2 - a1 + extra) * (b2 - b1 + extra)
            if other == k and inter / (area - inter) > 0.6:
                break
        else:
            kept.append((score, k, x1, y1, x2, y2))
        if len(kept) == 100:
            break
    kx, ky = W / first_w, H / first_h
    return [
        (score, k, x1 * kx, y1 * ky, x2 * kx + extra, y2 * ky + extra)
        for score, k, x1, y1, x2, y2 in kept
    ]


@pytest.mark.parametrize("inclusive", [True, False])
def test_test_time_augmentation_is_the_official_one(inclusive, tmp_path):
    model = detector()
    model.set_convention(inclusive=inclusive)
    model.test_size, seen = (64, 100), (32, 40, 48, 56, 72, 80, 88, 96)
    for h, w in (75, 131), (120, 80):
        image = picture(h, w)
        image.numpy()[:] = np.asarray(
            Image.fromarray(image.permute(1, 2, 0).numpy())
            .resize((w // 4, h // 4))
            .resize((w, h), Image.BICUBIC)
        ).transpose(2, 0, 1)
        (found,) = model.predict([image], tta=True)
        sizes = [(64, 100), *((size, 150) for size in seen)]
        expected = torch.tensor(slow_tta(model, image, sizes, int(inclusive)))
        assert len(expected) == 100 and found["labels"].tolist() == expected[:, 1].tolist()
        torch.testing.assert_close(found["scores"], expected[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["boxes"], expected[:, 2:], rtol=0, atol=1e-3)
    views = fcos.make_views((800, 800), (800, 1333), tta=True)
    sides = [100 * n for n in (8, 4, 5, 6, 7, 9, 10, 11, 12) for _ in (False, True)]
    assert [view.size for view in views] == [(side, side) for side in sides]


def test_tiles_cover_the_image_and_overlap_enough():
    for side, tile, overlap in (
        (1000, 640, 0.2),
        (12_000, 640, 0.2),
        (641, 640, 0.0),
        (99, 10, 0.9),
    ):
        starts = fcos.tile_starts(side, tile, overlap)
        assert starts[0] == 0 and starts[-1] == side - tile
        assert np.diff(starts).max() <= math.ceil(tile * (1 - overlap))
    views = fcos.make_views((1000, 700), (800, 1333), tile=640)
    assert [view.crop for view in views] == [
        (0, 0, 700, 1000),
        *((x, y, x + 640, y + 640) for y in (0, 360) for x in (0, 60)),
    ]
    assert [view.size for view in views] == [(1142, 800), *[(800, 800)] * 4]
    assert len(fcos.make_views((640, 100), (800, 1333), tile=640)) == 1
    assert fcos.make_views((100, 900), (80, 133), tile=640)[1].crop == (0, 0, 640, 100)
    for options in (dict(tile=0), dict(tile=9, overlap=1), dict(tile=9, tta=True)):
        with pytest.raises(fcos.UserError, match="expected"):
            fcos.make_views((64, 96), (80, 133), **options)


def blobs(model, monkeypatch):
    """Make the model find the bright columns of an image, by their grey level, at full height."""

    def outputs(images, sizes):
        found = [
            [(x1, x2, grey) for x1, x2, grey in runs(image[0, 0, : int(w)].tolist())]
            for image, (_, w) in zip(images, sizes)
        ]
        return found, images.shape

    def runs(row):
        edges = [0, *(i for i in range(1, len(row)) if row[i] != row[i - 1]), len(row)]
        return [(a, b, row[a]) for a, b in zip(edges, edges[1:]) if row[a]]

    def decode(outputs, sizes):
        found, shape = outputs
        result = {
            "boxes": torch.zeros(len(found), 9, 4),
            "scores": torch.full((len(found), 9), -torch.inf),
            "labels": torch.full((len(found), 9), -1),
        }
        for b, columns in enumerate(found):
            for d, (x1, x2, grey) in enumerate(columns):
                result["boxes"][b, d] = torch.tensor([x1, 0.0, x2, float(sizes[b][0])])
                result["scores"][b, d] = grey / 255
                result["labels"][b, d] = 0
        return result

    monkeypatch.setattr(model, "forward", outputs)
    monkeypatch.setattr(model, "decode", decode)


def test_tiles_find_each_object_once_and_keep_those_longer_than_a_tile(monkeypatch):
    """Views at their own size see everything; a whole image of half its size sees the large."""
    model = fcos.build("shapes", 1)
    blobs(model, monkeypatch)
    image = torch.zeros(3, 64, 320, dtype=torch.uint8)
    image[:, :, 10:30] = 200  # in one tile
    image[:, :, 85:99] = 150  # cut by the edge of the first tile at 96, whole in the second
    (found,) = model.predict(image, 64, 320, tile=96, overlap=0.25)
    assert found["boxes"][:, [0, 2]].tolist() == [[10, 30], [85, 99]]
    assert found["labels"].tolist() == [0, 0]
    image[:, :, 110:300] = 100  # longer than a tile: only the whole image has it uncut
    (found,) = model.predict(image, 64, 320, tile=96, overlap=0.25)
    assert [110, 300] in found["boxes"][:, [0, 2]].tolist() and len(found["boxes"]) == 3
    views = fcos.make_views((64, 320), (64, 320), tile=96, overlap=0.25)[1:]  # without the whole
    monkeypatch.setattr(fcos, "make_views", lambda hw, **how: views)
    (found,) = model.predict(image, tile=96, batch_size=4)
    pieces = found["boxes"][2:, [0, 2]]  # no uncut box covers them: they stay
    assert len(pieces) and pieces.min() == 110 and pieces.max() == 300


def test_tiles_run_in_batches_and_copy_no_more_than_crops(monkeypatch):
    model, shapes = detector(), []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    image = picture(300, 500)
    (found,) = model.predict(image, 64, 96, tile=100, overlap=0.2, batch_size=4)
    assert shapes[0] == (1, 3, 64, 96) or shapes[0][2:] == (64, 128)
    tiles = len(fcos.make_views((300, 500), (64, 96), 100, 0.2)) - 1
    assert sum(shape[0] for shape in shapes[1:]) == tiles and len(shapes) == 1 + -(-tiles // 4)
    assert {shape[2:] for shape in shapes[1:]} == {(64, 64)}
    assert found["boxes"][:, 2].max() <= 500 and found["boxes"][:, 3].max() <= 300
    assert len(found["scores"]) == 100 and (found["scores"].diff() <= 0).all()

    largest = []
    resize = fcos.resize
    monkeypatch.setattr(fcos, "resize", lambda x, hw: largest.append(x) or resize(x, hw))
    fcos.crop_view(image, fcos.View((100, 50, 200, 150), (64, 64), False))
    assert largest[0].data_ptr() == image[:, 50:, 100:].data_ptr()  # a view, no copy


def test_mirrored_views_refuse_an_output_without_a_rule(monkeypatch):
    head = fcos.Head.predict_level
    monkeypatch.setattr(
        fcos.Head, "predict_level", lambda *args: head(*args) | {"angle": head(*args)["ctr"]}
    )
    model, image = detector(), picture(64, 96)
    with pytest.raises(fcos.UserError, match="output angle: .*UNMIRROR"):
        model.predict(image, 64, 96, tta=True)
    (found,) = model.predict(image, 64, 96, tile=48)
    assert found["angle"].shape == found["scores"].shape and len(found["angle"]) > 10
    monkeypatch.setitem(fcos.UNMIRROR, "angle", lambda angle, right: -angle)
    assert "angle" in model.predict(image, 64, 96, tta=True)[0]


@pytest.mark.parametrize("norm", ["frozen", "bn", "gn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_folds_constant_norms_once_and_sees_new_weights(norm, dtype, monkeypatch, tmp_path):
    model, folds = detector(norm=norm, dcn=(5,)), []
    layers = [layer for layer in model.backbone.modules() if isinstance(layer, fcos.ConvNorm)]
    with torch.no_grad():
        for layer in layers:
            for tensor in (*layer.norm.buffers(), *layer.norm.parameters()):
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
    fold, image = fcos.ConvNorm.fold, picture(64, 96)
    monkeypatch.setattr(fcos.ConvNorm, "fold", lambda self: folds.append(self) or fold(self))
    before = None
    for shift in 0, 0.05:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            layers[3].conv.weight += shift
            (expected,) = model.detect(model(image[None]), [(64, 96)])
            folds.clear()
            model.train()
            found, again = model.predict([image, image], 64, 96)
        assert folds == layers * (norm != "gn") and model.training and len(found["boxes"]) > 10
        assert not any(layer.folded for layer in layers)
        for name in expected:
            assert torch.equal(found[name], again[name])
            if norm != "bn":
                assert torch.equal(found[name], expected[name])
            elif dtype == torch.float32:  # in bf16 a BatchNorm rounds elsewhere
                torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
        assert before is None or not torch.equal(before, found["scores"][:10])
        before = found["scores"][:10]
        model.eval()
    with pytest.raises(ValueError):
        model.predict([tmp_path / "nowhere.jpg"], 64, 96)
    assert not any(layer.folded for layer in layers)
    monkeypatch.setattr(
        fcos.ConvNorm, "fold", lambda self: 1 / 0 if self is layers[-1] else fold(self)
    )
    if norm != "gn":
        with pytest.raises(ZeroDivisionError):
            model.train().predict(image, 64, 96)
        assert model.training
    assert not any(layer.folded for layer in layers)


@pytest.mark.parametrize("norm", ["frozen", "bn"])
def test_a_norm_is_folded_with_the_bias_of_its_convolution(norm):
    layer = fcos.ConvNorm(3, 4, 3, norm=norm, bias=True).eval()
    for x in layer.parameters(), layer.norm.buffers():
        for tensor in x:
            if tensor.is_floating_point():
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.rand(1, 3, 5, 5)
    expected = layer.norm(layer.conv(x))
    layer.folded = layer.fold()
    torch.testing.assert_close(layer(x), expected)


def test_a_graph_is_captured_once_a_shape(monkeypatch):
    """On a GPU (test_gpu.py); here what would be captured runs instead."""
    shapes = []

    def capture(function, inputs, pool):
        shapes.append(tuple(inputs[0].shape))
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    images, model = [picture(64, 96)] * 5 + [picture(96, 64)] * 2, detector()
    model.topk = 9
    wanted = fcos.replay(fcos.Deployed(model).forward)
    for batch in (images[:2], images[2:4], images[4:5], images[5:]):
        batch, sizes = fcos.pad_batch(batch)
        with torch.no_grad():
            expected = model.decode(model(batch, sizes), sizes)
            torch.testing.assert_close(wanted(batch, sizes), expected, rtol=0, atol=0)
    model.topk = 1000
    assert shapes == [(2, 3, 64, 96), (1, 3, 64, 96), (2, 3, 96, 64)]
    plain = model.predict(images, 64, 96, batch_size=2)
    for one, other in zip(model.predict(images, 64, 96, batch_size=2, graph=True), plain):
        assert_same(one, other)


def test_predicted_tensors_are_ordinary_ones():
    found = detector().predict(picture(32, 32), 32, 32)[0]
    found["boxes"][:, 2:] -= found["boxes"][:, :2]  # a caller turns xyxy into xywh in place
    # Otherwise the results of a whole data set would keep all of its feature maps in memory.
    assert not any(values.requires_grad for values in found.values())


@pytest.mark.parametrize("hw", [(1, 1), (1, 50), (32, 32), (7, 3)])
def test_predict_survives_tiny_images(hw):
    found = detector(1).predict(picture(*hw), min_size=32, max_size=64)[0]
    assert found["boxes"].isfinite().all() and len(found["boxes"]) == len(found["labels"])


# ---- build -------------------------------------------------------------------------------------


# ---- export ------------------------------------------------------------------------------------


def small_detector(name, **keywords):
    """A detector of three classes that finds a hundred things in noise."""
    torch.manual_seed(0)
    small = dict(
        fcos_imprv_R_50_FPN=dict(blocks=(1, 1, 1, 1), norm="gn", frozen_stages=0),
        fcos_bn_MNV2_FPN=dict(blocks=(1,) * 7),
        shapes={},
    )[name]
    model = fcos.build(name, 3, **small | keywords).eval()
    torch.nn.init.normal_(model.head.cls.weight, std=0.1)
    torch.nn.init.normal_(model.head.box.weight, std=0.05)
    torch.nn.init.constant_(model.head.box.bias, 2)
    model.classes, model.category_ids = ["a", "b", "c"], [1, 2, 4]
    return model


def noise_and_sizes(B):
    images = torch.randint(256, (B, 3, 96, 128), dtype=torch.uint8)
    return images, torch.tensor([[96, 128], [80, 128], [96, 100]][:B])


def assert_same_detections(got, expected, pixels=0.05, score=1e-3):
    """All that one side finds, the other finds too, but for the last: they may be exchanged."""
    for one, other in zip(fcos.as_list(got, 0.0), fcos.as_list(expected, 0.0), strict=True):
        last = 0.0 if len(other["scores"]) < len(got["scores"][0]) else other["scores"].min()
        sure = one["scores"] > last + score
        assert abs(len(one["scores"]) - len(other["scores"])) <= 1
        for d in sure.nonzero()[:, 0].tolist():
            same = (other["boxes"] - one["boxes"][d]).abs().amax(1) < pixels
            same &= (other["scores"] - one["scores"][d]).abs() < score
            same &= other["labels"] == one["labels"][d]
            assert same.any(), (one["boxes"][d], one["scores"][d], one["labels"][d])
            for name in one.keys() - {"boxes", "scores", "labels"}:
                assert ((other[name][same] - one[name][d]).abs() < pixels).any()


def test_the_deployed_model_is_one_graph_of_any_number_of_images():
    model = fcos.Deployed(small_detector("shapes")).eval()
    B = torch.export.Dim("B", min=1)
    program = torch.export.export(model, noise_and_sizes(2), dynamic_shapes=({0: B}, {0: B}))
    for count in (1, 3):
        inputs = noise_and_sizes(count)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def model_to_export(name, monkeypatch):
    """A model with a further output and every other difference, or one with few candidates."""
    if name == "one class":
        keywords = dict(levels=(3, 4), ranges=(64,), candidate_threshold=0.1, topk=50)
        model = fcos.build("shapes", 1, max_detections=300, **keywords)
        torch.nn.init.constant_(model.head.cls.bias, -1)
        torch.nn.init.constant_(model.head.box.bias, 2)
        return model
    level = fcos.Head.predict_level

    def with_angle(head, *args):
        maps = level(head, *args)
        return maps | {"angle": 2 * maps["ctr"]}

    monkeypatch.setattr(fcos.Head, "predict_level", with_angle)
    few_levels = dict(levels=(3, 4, 5), ranges=(64, 128))  # an export takes seconds for each
    model = small_detector("shapes", norm="frozen", topk=60, **few_levels)
    model.set_convention(score="torchvision", grid="corner")
    return model


@pytest.mark.parametrize("name", ["further output", "one class"])
def test_one_onnx_file_finds_what_the_model_finds_at_every_size(name, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    # pytest would keep a line of torch's trace for every symbolic size, which takes minutes
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    model = model_to_export(name, monkeypatch)
    model.train()
    model.backbone.eval()
    fcos.export_onnx(model, tmp_path / "model.onnx", 96, 128)
    assert model.training and model.head.training and not model.backbone.training
    model.eval()
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in constants for node in graph.node if node.op_type == "Conv")

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == model.classes
    assert json.loads(facts["category_ids"]) == model.category_ids
    assert json.loads(facts["test_size"]) == list(model.test_size)
    names = [output.name for output in session.get_outputs()]
    assert names == ["boxes", "scores", "labels", "angle"][: 3 + (name == "further output")]
    total = 0
    for h, w, count in ((96, 128, 3), (32, 32, 1), (160, 64, 2), (320, 96, 1)):
        images = torch.randint(256, (count, 3, h, w), dtype=torch.uint8)
        sizes = torch.tensor([[h, w], [h - 16, w], [h, w - 28]][:count])  # padded
        got = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        got = dict(zip(names, map(torch.from_numpy, got)))
        with torch.no_grad():
            expected = fcos.Deployed(model)(images, sizes)
        for key, values in expected.items():
            assert got[key].dtype == values.dtype and got[key].shape == values.shape
        assert_same_detections(got, expected)
        assert_same_detections(expected, got)
        total += int((got["labels"] >= 0).sum())
    assert total > 100


def test_an_export_of_odd_size_is_refused(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="100.*multiples of 32"):
        fcos.export_onnx(fcos.build("shapes", 2), tmp_path / "model.onnx", 100, 128)


def test_a_list_is_predicted_in_batches_as_one_by_one():
    model = small_detector("shapes")
    model.test_size = 64, 96
    images = [
        torch.randint(256, (3, *hw), dtype=torch.uint8)
        for hw in ((64, 96), (60, 90), (64, 90), (96, 64), (64, 96), (64, 95))
    ]
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    alone, batched = model.predict(images), model.predict(iter(images), batch_size=2)
    assert shapes[6:] == [(2, 3, 64, 96), (1, 3, 64, 96), (1, 3, 96, 64), (2, 3, 64, 96)]
    for one, other in zip(alone, batched, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
