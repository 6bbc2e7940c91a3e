"""FCOS.predict: sizes, thresholds, batches, tiles and test-time augmentation."""

import functools
import json

import numpy as np
import pytest
import torch
from conftest import detector, outputs_of, picture
from golden.synth_image import image as synth_image
from PIL import Image
from recorded import assert_same_detections, read_golden

import evaluate
import fcos

# ---- sizes, thresholds, modes ------------------------------------------------------------------


def test_boxes_are_in_pixels_of_the_original_image():
    model = detector()
    image = picture(90, 120)
    (found,) = model.predict(image, min_size=60, max_size=200)
    batch, sizes = fcos.pad_batch([fcos.resize(image, (60, 80))])
    (expected,) = model.detect(outputs_of(model, batch, sizes), sizes)
    expected["boxes"] = expected["boxes"] * 1.5
    assert_same_detections(found, expected)
    assert found["boxes"][:, 2].max() <= 120
    assert found["boxes"][:, 3].max() <= 90
    assert found["boxes"].max() > 80


def test_images_are_resized_to_the_test_size_of_the_model():
    model = detector()
    image = picture(90, 120)
    model.test_size = (60, 200)
    (found,) = model.predict(image)
    assert_same_detections(found, model.predict(image, min_size=60, max_size=200)[0])
    (other,) = model.predict(image, min_size=90)
    assert other["scores"].tolist() != found["scores"].tolist()


def test_thresholds_of_the_model_and_of_the_call_are_applied():
    model = detector()
    predict = functools.partial(model.predict, picture(90, 120), 64, 128)
    scores = predict()[0]["scores"]
    middle = scores[len(scores) // 2].item()
    assert predict(score_threshold=middle)[0]["scores"].equal(scores[scores >= middle])
    assert len(predict(score_threshold=1.0)[0]["boxes"]) == 0
    model.max_detections = 4
    assert len(predict(score_threshold=0.3)[0]["labels"]) == 4
    model.max_detections = 100
    model.candidate_threshold = 0.6
    scores = predict()[0]["scores"]
    assert len(scores) > 0
    assert scores.min() < 0.6  # the threshold is for probabilities, before centerness


@pytest.mark.parametrize("hw", [(1, 1), (1, 50), (32, 32), (7, 3)])
def test_tiny_images_are_ordinary(hw):
    (found,) = detector(1).predict(picture(*hw), min_size=32, max_size=64)
    assert found["boxes"].isfinite().all()
    assert len(found["boxes"]) == len(found["labels"])


def test_a_prediction_can_be_changed_in_place_and_keeps_no_graph():
    (found,) = detector().predict(picture(32, 32), 32, 32)
    found["boxes"][:, 2:] -= found["boxes"][:, :2]
    assert not any(values.requires_grad for values in found.values())


def test_the_mode_of_every_module_is_restored(tmp_path):
    model = detector()
    for training in (True, False):
        model.train(training).predict(picture(32, 32), 32, 32)
        assert model.training is training
        assert model.backbone.training is training
    with pytest.raises(fcos.UserError):
        model.train().predict([picture(32, 32), tmp_path / "nowhere.jpg"], 32, 32)
    assert model.training


# ---- inclusive boxes ---------------------------------------------------------------------------


def test_the_last_pixel_of_inclusive_boxes_is_not_scaled():
    model = fcos.build("shapes", 2)
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    assert model.rescale(boxes, (50, 100), (100, 400)).tolist() == [[40, 40, 120, 80]]
    model.set_convention(inclusive=True)  # pixels 10..29 and 20..39
    assert model.rescale(boxes, (50, 100), (100, 400)).tolist() == [[40, 40, 117, 79]]
    assert model.rescale(boxes, torch.tensor([50, 100]), torch.tensor([50, 100])).equal(boxes)


def test_rescaled_boxes_match_the_official_json(shared):
    model = fcos.build("shapes")
    model.set_convention(inclusive=True)
    original_hw = {479: (427, 640), 1199: (427, 640), 426: (480, 640), 1066: (480, 640)}
    compared = 0
    for path in sorted((shared / "golden").glob("model_*.json")):
        facts, arrays = read_golden(path)
        for tag, run in facts["runs"].items():
            for i, size in enumerate(run["resized_hw"]):
                inclusive = torch.from_numpy(arrays[f"{tag}.img{i}.det_boxes_net"])
                boxes = inclusive + torch.tensor([0, 0, 1, 1])
                boxes = model.rescale(boxes, size, original_hw[size[1]])
                boxes[:, 2:] -= boxes[:, :2]
                expected = arrays[f"{tag}.img{i}.det_xywh"]
                assert np.abs(boxes.numpy() - expected).max() < 0.05, (path.name, tag, i)
                compared += len(boxes)
    assert compared >= 2000


# ---- batches and CUDA graphs -------------------------------------------------------------------


def test_consecutive_images_of_one_padded_size_run_together():
    model = detector()
    model.test_size = 64, 96
    sizes = (64, 96), (60, 90), (64, 90), (96, 64), (64, 96), (64, 95)
    images = [picture(*hw, seed) for seed, hw in enumerate(sizes)]
    alone = model.predict(images)
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    batched = model.predict(iter(images), batch_size=2)
    assert shapes == [(2, 3, 64, 96), (1, 3, 64, 96), (1, 3, 96, 64), (2, 3, 64, 96)]
    for one, other in zip(alone, batched, strict=True):
        assert_same_detections(one, other)


def test_a_cuda_graph_is_captured_once_a_shape(monkeypatch):
    """test_gpu.py captures for real; here the function runs instead of a graph."""
    captured = []

    def capture(function, inputs, pool):
        captured.append(tuple(inputs[0].shape))
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    model = detector()
    replayed = fcos.replay(fcos.Deployed(model).forward)
    images = [picture(64, 96)] * 5 + [picture(96, 64)] * 2
    for batch in (images[:2], images[2:4], images[4:5], images[5:]):
        batch, sizes = fcos.pad_batch(batch)
        with torch.no_grad():
            expected = model.decode(model(batch, sizes), sizes)
            torch.testing.assert_close(replayed(batch, sizes), expected, rtol=0, atol=0)
    assert captured == [(2, 3, 64, 96), (1, 3, 64, 96), (2, 3, 96, 64)]


def test_graph_is_ignored_on_the_cpu():
    model = detector()
    images = [picture(64, 96)] * 3
    plain = model.predict(images, 64, 96, batch_size=2)
    for found, expected in zip(model.predict(images, 64, 96, batch_size=2, graph=True), plain):
        assert_same_detections(found, expected)


# ---- folded norms ------------------------------------------------------------------------------


def with_random_norms(norm):
    """Return a model with random norms, a convolution of it with a bias, and the norms."""
    model = detector(norm=norm, dcn=(5,))
    layers = [layer for layer in model.backbone.modules() if isinstance(layer, fcos.ConvNorm)]
    for layer in layers:
        for tensor in (*layer.norm.buffers(), *layer.norm.parameters()):
            if tensor.is_floating_point():
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    conv = layers[3].conv
    conv.bias = torch.nn.Parameter(torch.rand(conv.out_channels))
    return model, conv, [layer.norm for layer in layers]


@pytest.mark.parametrize("norm", ["frozen", "bn", "gn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_follow_every_change_of_the_weights(norm, dtype):
    """Folded norms must never outlive the call that folded them."""
    model, conv, _ = with_random_norms(norm)
    image = picture(64, 96)
    first_scores = []
    for change in (0, 0.05):
        with torch.no_grad():
            conv.weight += change
        with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            outputs = outputs_of(model.eval(), image[None])
            (expected,) = model.detect(outputs, [(64, 96)])
            found, again = model.train().predict([image, image], 64, 96)
        assert len(found["boxes"]) > 10
        for name in expected:
            assert found[name].equal(again[name])
            if norm != "bn":
                assert found[name].equal(expected[name])
            elif dtype == torch.float32:  # in bfloat16 an unfolded BatchNorm rounds elsewhere
                torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
        first_scores.append(found["scores"][:10])
    assert not first_scores[0].equal(first_scores[1])


def test_batch_norms_are_folded_in_predict_only():
    model, _, norms = with_random_norms("bn")
    calls = []
    for module in norms:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    model.train().predict(picture(64, 96), 64, 96)
    assert calls == []
    outputs_of(model, picture(64, 96)[None])
    assert set(calls) == set(norms)


@pytest.mark.parametrize("failure", ["no image", "forward", "folding"])
@pytest.mark.parametrize("norm", ["frozen", "bn"])
def test_a_failed_prediction_leaves_no_folded_norm(norm, failure, tmp_path, monkeypatch):
    model, conv, norms = with_random_norms(norm)
    image = picture(64, 96)
    source = tmp_path / "nowhere.jpg" if failure == "no image" else image
    variance = norms[-1].running_var
    if failure == "folding":  # the last norm cannot be folded, after all others were
        norms[-1].running_var = torch.ones(3)
    with monkeypatch.context() as patch:
        if failure == "forward":
            patch.setattr(model.fpn, "forward", lambda features: 1 / 0)
        with pytest.raises((fcos.UserError, ZeroDivisionError, RuntimeError)):
            model.train().predict(source, 64, 96)
    norms[-1].running_var = variance
    assert model.training
    before = outputs_of(model.eval(), image[None])["cls"]
    with torch.no_grad():
        conv.weight += 0.05
    assert not outputs_of(model, image[None])["cls"].equal(before)


# ---- test-time augmentation --------------------------------------------------------------------


def run_slowly(model, image, hw, mirrored, extra):
    """Return the candidates of one view, [(score, label, x1, y1, x2, y2)], one box at a time.

    Boxes are in pixels of the view, not mirrored.
    """
    h, w = hw
    pixels = fcos.resize(image, hw)
    batch, _ = fcos.pad_batch([pixels.flip(2) if mirrored else pixels])
    outputs = outputs_of(model, batch, torch.tensor([hw]))
    cls = outputs["cls"][0].sigmoid()
    ctr = outputs["ctr"][0].sigmoid()
    found = []
    first = 0
    for count in outputs["levels"]:
        level = cls[first : first + count]
        pairs = [(row + first, k) for row, k in (level > 0.05).nonzero().tolist()]
        ranked = sorted(((cls[row, k] * ctr[row]).item(), row, k) for row, k in pairs)
        for product, row, k in ranked[::-1][:1000]:
            x, y = outputs["points"][row, :2].tolist()
            left, top, right, bottom = outputs["ltrb"][0, row].tolist()
            x1 = min(max(x - left, 0), w - extra)
            x2 = min(max(x + right, 0), w - extra)
            y1 = min(max(y - top, 0), h - extra)
            y2 = min(max(y + bottom, 0), h - extra)
            if mirrored:
                x1, x2 = w - extra - x2, w - extra - x1
            if x2 + extra > x1 and y2 + extra > y1:
                found.append((product**0.5, k, x1, y1, x2, y2))
        first += count
    return found


def overlaps(a, b, extra):
    """Return whether two boxes have an IoU above 0.6; sides are inclusive if `extra` is 1."""
    w = max(min(a[2], b[2]) - max(a[0], b[0]) + extra, 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]) + extra, 0)
    area_a = (a[2] - a[0] + extra) * (a[3] - a[1] + extra)
    area_b = (b[2] - b[0] + extra) * (b[3] - b[1] + extra)
    return w * h / (area_a + area_b - w * h) > 0.6


def scaled(box, x, y):
    x1, y1, x2, y2 = box
    return x1 * x, y1 * y, x2 * x, y2 * y


def augment_slowly(model, image, sizes, extra):
    """Do the official test-time augmentation, one box at a time.

    Return [(score, label, x1, y1, x2, y2)] in pixels of the image, at most 100.
    """
    H, W = image.shape[1:]
    first_h, first_w = fcos.resized_hw(H, W, *sizes[0])
    candidates = []
    for size in sizes:
        h, w = fcos.resized_hw(H, W, *size)
        for mirrored in (False, True):
            for score, label, *box in run_slowly(model, image, (h, w), mirrored, extra):
                candidates.append((score, label, *scaled(box, first_w / w, first_h / h)))
    kept = []
    for score, label, *box in sorted(candidates, reverse=True):
        same_class = [other for _, other_label, *other in kept if other_label == label]
        if not any(overlaps(box, other, extra) for other in same_class):
            kept.append((score, label, *box))
        if len(kept) == 100:
            break
    detections = []
    for score, label, *box in kept:
        x1, y1, x2, y2 = scaled(box, W / first_w, H / first_h)
        detections.append((score, label, x1, y1, x2 + extra, y2 + extra))
    return detections


def smooth_picture(h, w):
    """Return an image whose detections have scores far from each other."""
    image = Image.fromarray(synth_image(1, h, w)).resize((w // 4, h // 4))
    image = image.resize((w, h), Image.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("hw", [(75, 131), (120, 80)])
def test_test_time_augmentation_matches_the_official_code(inclusive, hw):
    model = detector()
    model.set_convention(inclusive=inclusive)
    model.test_size = (64, 100)
    image = smooth_picture(*hw)
    (found,) = model.predict([image], tta=True)
    sizes = [(64, 100), *((short, 150) for short in (32, 40, 48, 56, 72, 80, 88, 96))]
    expected = torch.tensor(augment_slowly(model, image, sizes, int(inclusive)))
    assert len(expected) == 100
    assert found["labels"].tolist() == expected[:, 1].tolist()
    torch.testing.assert_close(found["scores"], expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["boxes"], expected[:, 2:], rtol=0, atol=1e-3)


def test_test_time_augmentation_has_nine_sizes_plain_and_mirrored():
    views = fcos.make_views((800, 800), (800, 1333), tta=True)
    sides = [100 * n for n in (8, 4, 5, 6, 7, 9, 10, 11, 12) for _ in (False, True)]
    assert [view.size for view in views] == [(side, side) for side in sides]
    assert [view.mirrored for view in views] == [False, True] * 9


def test_mirrored_views_refuse_an_output_without_a_rule(monkeypatch):
    predict_level = fcos.Head.predict_level

    def with_angle(*args):
        maps = predict_level(*args)
        return maps | {"angle": maps["ctr"]}

    monkeypatch.setattr(fcos.Head, "predict_level", with_angle)
    model = detector(levels=(3, 4), ranges=(64,))
    image = picture(64, 96)
    with pytest.raises(fcos.UserError, match="output angle: .*UNMIRROR"):
        model.predict(image, 64, 96, tta=True)
    (found,) = model.predict(image, 64, 96, tile=48)
    assert found["angle"].shape == found["scores"].shape
    assert len(found["angle"]) > 10
    monkeypatch.setitem(fcos.UNMIRROR, "angle", lambda angle, right: -angle)
    assert "angle" in model.predict(image, 64, 96, tta=True)[0]


# ---- tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, tile, overlap", [(1000, 640, 0.2), (12_000, 640, 0.2), (641, 640, 0.0), (99, 10, 0.9)]
)
def test_tiles_cover_the_image_and_overlap_enough(side, tile, overlap):
    views = fcos.make_views((tile, side), (800, 1333), tile, overlap)[1:]
    crops = [view.crop for view in views]
    assert all((y1, y2, x2 - x1) == (0, tile, tile) for x1, y1, x2, y2 in crops)
    starts = [x1 for x1, *_ in crops]
    assert starts[0] == 0
    assert starts[-1] == side - tile
    assert np.diff(starts).max() <= np.ceil(tile * (1 - overlap))


def test_views_are_the_whole_image_and_its_tiles():
    views = fcos.make_views((1000, 700), (800, 1333), tile=640)
    tiles = [(x, y, x + 640, y + 640) for y in (0, 360) for x in (0, 60)]
    assert [view.crop for view in views] == [(0, 0, 700, 1000), *tiles]
    assert [view.size for view in views] == [(1142, 800), *[(800, 800)] * 4]
    assert len(fcos.make_views((640, 100), (800, 1333), tile=640)) == 1
    assert fcos.make_views((100, 900), (80, 133), tile=640)[1].crop == (0, 0, 640, 100)


@pytest.mark.parametrize(
    "options",
    [
        dict(tile=0),
        dict(tile=64.0),
        dict(tile=64, overlap=1),
        dict(tile=64, tta=True),
        dict(min_size=64.5),
        dict(max_size="96"),
        dict(batch_size=0),
        dict(score_threshold="0.5"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(options):
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    with pytest.raises(fcos.UserError, match="expected"):
        detector(3).predict(image, **options)


class BarModel:
    """Replaces the network: finds the bright vertical bars of an image, scored by grey level."""

    def forward(self, images, sizes):
        return images

    def candidates(self, images, sizes):
        detections = {
            "boxes": torch.zeros(len(images), 9, 4),
            "scores": torch.full((len(images), 9), -torch.inf),
            "labels": torch.full((len(images), 9), -1),
        }
        for b, (image, (h, w)) in enumerate(zip(images, sizes.tolist())):
            row = image[0, 0, :w].int()
            edges = [0, *(row.diff().nonzero()[:, 0] + 1).tolist(), w]
            bars = [(x1, x2) for x1, x2 in zip(edges, edges[1:]) if row[x1] > 0]
            for d, (x1, x2) in enumerate(bars):
                detections["boxes"][b, d] = torch.tensor([x1, 0, x2, h])
                detections["scores"][b, d] = row[x1] / 255
                detections["labels"][b, d] = 0
        return detections


@pytest.fixture
def bar_model(monkeypatch):
    model = fcos.build("shapes", 1)
    monkeypatch.setattr(model, "forward", BarModel().forward)
    monkeypatch.setattr(model, "candidates", BarModel().candidates)
    return model


def bars_of(found):
    return found["boxes"][:, [0, 2]].tolist()


def test_an_object_cut_by_a_tile_is_found_once(bar_model):
    image = torch.zeros(3, 64, 320, dtype=torch.uint8)
    image[:, :, 10:30] = 200  # in one tile
    image[:, :, 85:99] = 150  # cut by the edge of the first tile at 96, whole in the second
    (found,) = bar_model.predict(image, 64, 320, tile=96, overlap=0.25)
    assert bars_of(found) == [[10, 30], [85, 99]]
    assert found["labels"].tolist() == [0, 0]


def test_an_object_longer_than_a_tile_is_found_in_the_whole_image(bar_model, monkeypatch):
    image = torch.zeros(3, 64, 320, dtype=torch.uint8)
    image[:, :, 10:30] = 200
    image[:, :, 85:99] = 150
    image[:, :, 110:300] = 100
    (found,) = bar_model.predict(image, 64, 320, tile=96, overlap=0.25)
    assert bars_of(found) == [[10, 30], [85, 99], [110, 300]]

    tiles = fcos.make_views((64, 320), (64, 320), tile=96, overlap=0.25)[1:]
    monkeypatch.setattr(fcos, "make_views", lambda hw, **options: tiles)
    (found,) = bar_model.predict(image, tile=96, batch_size=4)
    pieces = found["boxes"][2:, [0, 2]]  # no uncut box covers them, so they stay
    assert pieces.min() == 110
    assert pieces.max() == 300


def test_tiles_run_in_batches_and_are_not_copied(monkeypatch):
    model = detector()
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    image = picture(300, 500).contiguous()
    crops = []
    resize = fcos.resize

    def resize_and_record(crop, hw):
        crops.append(crop)
        return resize(crop, hw)

    monkeypatch.setattr(fcos, "resize", resize_and_record)
    (found,) = model.predict(image, 64, 96, tile=100, overlap=0.2, batch_size=4)
    whole, *batches = shapes
    tiles = len(fcos.make_views((300, 500), (64, 96), 100, 0.2)) - 1
    assert whole == (1, 3, 64, 96)
    assert [batch[2:] for batch in batches] == [(64, 64)] * -(-tiles // 4)
    assert sum(batch[0] for batch in batches) == tiles
    storage = image.untyped_storage().data_ptr()
    assert len(crops) == tiles + 1
    assert all(crop.untyped_storage().data_ptr() == storage for crop in crops)
    assert found["boxes"][:, 2].max() <= 500
    assert found["boxes"][:, 3].max() <= 300
    assert len(found["scores"]) == 100
    assert (found["scores"].diff() <= 0).all()


# ---- predictions over a data set ---------------------------------------------------------------


@pytest.mark.parametrize("inclusive", [True, False])
def test_predict_and_evaluate_find_the_same_boxes(inclusive, tmp_path):
    model = detector()
    model.set_convention(inclusive=inclusive)
    model.test_size = 64, 128
    photos = [Image.fromarray(synth_image(1, *hw)) for hw in ((90, 120), (75, 51))]
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    content = {
        "images": [
            dict(id=i, file_name=f"{i}.png", width=photo.width, height=photo.height)
            for i, photo in enumerate(photos)
        ],
        "annotations": [],
        "categories": [dict(id=i, name=str(i)) for i in range(3)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    dataset = evaluate.CocoDataset(tmp_path / "instances.json", tmp_path)
    rows = evaluate.predict(model, dataset, workers=0)
    for i, found in enumerate(model.predict(photos, 64, 128)):
        found["boxes"][:, 2:] -= found["boxes"][:, :2]
        of_image = [row for row in rows if row["image_id"] == i]
        assert len(of_image) > 10
        assert [row["bbox"] for row in of_image] == found["boxes"].tolist()
        assert [row["score"] for row in of_image] == found["scores"].tolist()


def test_a_model_that_is_trained_while_another_thread_predicts_gets_all_gradients():
    model = detector(3, norm="frozen")
    with fcos.inference(model):
        outputs = model(picture(64, 64)[None])
        sum(value.sum() for value in (outputs["cls"], outputs["ltrb"], outputs["ctr"])).backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None]
    assert missing == []
