"""fcos.py against numbers recorded from the official FCOS, and against input it must survive.

golden/ holds the small sets, recorded on synthetic images; ../shared/golden, where it is present,
the full ones. Golden labels are ours + 1, golden boxes inclusive: their x2 is ours - 1.
"""

import copy
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


def silent_outputs(hw, K):
    """Outputs of `forward` in which nothing is found; tests then let some locations speak up."""
    points = fcos.make_points(hw)
    P = len(points)
    return {
        "cls": torch.full((1, P, K), -20.0),
        "ltrb": torch.zeros(1, P, 4),
        "ctr": torch.full((1, P), 20.0),
        "points": points,
        "levels": [rows * columns for rows, columns in fcos.level_sizes(hw)],
    }


def golden_detections(arrays, tag="det_", boxes="boxes"):
    """Recorded detections in our convention."""
    boxes = torch.from_numpy(arrays[tag + boxes]) + torch.tensor([0, 0, 1, 1])
    labels = torch.from_numpy(arrays[tag + "labels"]).long() - 1
    return {"boxes": boxes, "scores": torch.from_numpy(arrays[tag + "scores"]), "labels": labels}


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


def test_resized_sizes_are_the_official_ones(shared):
    golden = json.loads((shared / "golden/transforms.json").read_text())
    for setting, sizes in golden["resize"].items():
        min_size, max_size = map(int, setting.split("_"))
        ours = [list(fcos.resized_hw(h, w, min_size, max_size)) for w, h in golden["pairs_wh"]]
        assert ours == sizes, setting
    for batch in golden["padded_batches"]:
        assert list(fcos.padded_hw(batch["image_sizes_hw"])) == batch["padded_hw"]


@pytest.mark.parametrize(
    "wh, hw",
    [
        ((640, 480), (800, 1066)),
        ((640, 427), (800, 1199)),
        ((640, 360), (750, 1333)),
        ((480, 640), (1066, 800)),
        ((500, 375), (800, 1066)),
        ((800, 800), (800, 800)),
        ((10_000, 1), (1, 1333)),
        ((1, 5000), (1333, 1)),
        ((4, 550), (1333, 10)),
        ((2, 1500), (1333, 2)),
    ],
)
def test_resized_size_truncates_the_long_side(wh, hw):
    assert fcos.resized_hw(wh[1], wh[0], 800, 1333) == hw


@pytest.mark.parametrize("hw", [(320, 479), (61, 97), (500, 300), (1, 1), (240, 321)])
def test_resize_is_within_a_grey_level_of_pillow(hw):
    image = picture(240, 320)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(hw[::-1], Image.BILINEAR)
    pillow = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).float()
    difference = (fcos.resize(image, hw).float() - pillow).abs()
    assert difference.max() <= 1
    assert difference.mean() <= 1e-4 * pillow.mean()


def test_normalised_pixels_are_the_official_ones():
    expected = read_golden(GOLDEN / "model_fcos_imprv_R_50_FPN_1x")[0]
    images, sizes = fcos.pad_batch([picture(240, 320)])
    pixels = official_model("fcos_imprv_R_50_FPN").normalize(images, sizes)[0]
    assert pixels.shape == (3, 256, 320) and pixels[:, 240:].eq(0).all()
    probes = [pixels[:, y, x].tolist() for y, x in expected["image"]["probe_yx"]]
    np.testing.assert_allclose(probes, expected["input_tensor"]["probe_values_bgr"], atol=1e-4)
    sums = pixels.double().abs().sum((1, 2))
    np.testing.assert_allclose(sums, expected["input_tensor"]["channel_abssums_f64"], rtol=1e-6)


def test_transformed_photos_are_the_official_ones(shared):
    normalize = fcos.build("shapes").normalize
    for sample in json.loads((shared / "golden/transforms.json").read_text())["dataset_samples"]:
        folder = shared / f"data/coco2017_tiny/{sample['split']}2017"
        image = fcos.read_image(folder / f"{sample['image_id']:012d}.jpg")
        hw = fcos.resized_hw(*image.shape[1:], 800, 1333)
        assert list(hw) == sample["resized_hw"]
        image = fcos.resize(image, hw)
        if sample["hflip"]:
            image = image.flip(2)
        pixels = normalize(image[None], [hw])[0].double()
        tolerance = 1e-4 * sample["tensor_abssum_f64"]
        assert pixels.sum() == pytest.approx(sample["tensor_sum_f64"], abs=tolerance)
        assert pixels.abs().sum() == pytest.approx(sample["tensor_abssum_f64"], abs=tolerance)
        left = pixels[:, :, : hw[1] // 2].sum()
        assert left == pytest.approx(sample["tensor_left_half_sum_f64"], abs=tolerance)


def test_normalize_follows_the_convention_of_the_weights():
    model = fcos.build("shapes")
    model.set_convention(bgr=False, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
    images = torch.tensor([50, 60, 70], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    pixels = model.normalize(images, torch.tensor([[3, 2]]))
    assert pixels[0, :, 2, 1].tolist() == [40, 20, 10]
    assert pixels.abs().sum() == 70 * 6  # the padding is 0 after the mean went off


def test_pad_batch_keeps_images_at_the_top_left():
    images = [picture(50, 70), picture(64, 33)]
    batch, sizes = fcos.pad_batch(images)
    assert batch.shape == (2, 3, 64, 96) and batch.dtype == torch.uint8
    assert sizes.tolist() == [[50, 70], [64, 33]]
    assert batch[0, :, :50, :70].equal(images[0])
    assert batch.long().sum() == sum(image.long().sum() for image in images)


def pil_images():
    """The same picture in the modes that files come in."""
    rgb = Image.fromarray(synth_image(1, 40, 60))
    grey = np.asarray(rgb.convert("L"))
    return {
        "RGB": rgb,
        "L": rgb.convert("L"),
        "1": rgb.convert("1"),
        "LA": rgb.convert("LA"),
        "RGBA": rgb.convert("RGBA"),
        "P": rgb.convert("P"),
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "I": Image.fromarray(grey.astype(np.int32) * 257),
    }


@pytest.mark.parametrize("mode", pil_images())
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    source, rgb = pil_images()[mode], pil_images()["RGB"]
    pixels = fcos.read_image(source)
    assert pixels.shape == (3, 40, 60) and pixels.dtype == torch.uint8
    grey = mode in ("L", "1", "LA", "I;16", "I")
    expected = torch.from_numpy(np.array(rgb.convert("L").convert("RGB") if grey else rgb))
    difference = pixels.float() - expected.permute(2, 0, 1).float()
    assert difference.mean().abs() < 2
    assert mode in ("1", "P") or difference.abs().mean() < 2  # those two are dithered

    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "I": "tif"}.get(mode, "png")
    options = dict(quality=98, subsampling=0) if suffix == "jpg" else {}
    source.save(tmp_path / f"image.{suffix}", **options)
    difference = fcos.read_image(tmp_path / f"image.{suffix}").float() - pixels.float()
    assert difference.abs().mean() < 3


def test_16_bit_grey_keeps_its_range():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert fcos.read_image(Image.fromarray(ramp))[0].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = np.full((20, 40, 3), 128, np.uint8)
    upright[:10, :20] = 255, 0, 0  # red at the top left
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # PIL's transpose to undo it
    stored = Image.fromarray(upright)
    if back is not None:
        stored = stored.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert fcos.read_image(tmp_path / "turned.png").permute(1, 2, 0).numpy().tolist() == (
        upright.tolist()
    )


def test_exif_is_ignored_where_annotations_were_drawn_on_stored_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(synth_image(1, 20, 40)).save(tmp_path / "turned.png", exif=exif)
    assert fcos.read_image(tmp_path / "turned.png").shape == (3, 40, 20)
    assert fcos.read_image(tmp_path / "turned.png", hw=(20, 40)).shape == (3, 20, 40)
    assert fcos.read_image(tmp_path / "turned.png", hw=(40, 20)).shape == (3, 40, 20)
    with pytest.raises(fcos.UserError, match="expected 50x50 pixels.*annotations, found 40x20"):
        fcos.read_image(tmp_path / "turned.png", hw=(50, 50))


def jpeg_bytes(**options):
    file = io.BytesIO()
    Image.fromarray(synth_image(1, 40, 60)).save(file, "jpeg", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "not an image"),
        (b"this is text", "not an image"),
        (jpeg_bytes()[:-300], "truncated"),
    ],
    ids=["empty", "text", "cut"],
)
def test_unreadable_image_is_named(content, why, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(fcos.UserError, match=rf"broken\.jpg: cannot be read as an image.*{why}"):
        fcos.read_image(path)


def test_missing_image_and_folder_are_named(tmp_path):
    with pytest.raises(fcos.UserError, match=r"nowhere\.jpg: no such image"):
        fcos.read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(fcos.UserError, match=re.escape(str(tmp_path))):
        fcos.read_image(tmp_path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_no_harm(exif, tmp_path):
    (tmp_path / "odd.jpg").write_bytes(jpeg_bytes(exif=exif))
    assert fcos.read_image(tmp_path / "odd.jpg").shape == (3, 40, 60)


# ---- targets and losses ------------------------------------------------------------------------


def truths(boxes, labels):
    """Boxes and labels of a batch as `FCOS.targets` takes them."""
    return [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]


def changed(model, **keywords):
    """The model with other decoding keywords; the weights are shared."""
    other = copy.copy(model)
    for name, value in keywords.items():
        setattr(other, name, value)
    return other


def rows_of(maps):
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1)


def relative_error(ours, expected):
    """The L2 norm of the difference, over that of `expected`."""
    expected = torch.as_tensor(expected)
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-12))


# ---- the network -------------------------------------------------------------------------------


class Outputs(dict):
    """Outputs of a model and the padded size of the images."""

    hw = None


@torch.inference_mode()
def outputs_of(model, images, sizes=None):
    outputs = Outputs(model(images, sizes))
    outputs.hw = images.shape[-2:]
    return outputs


# ---- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inclusive, expected", [(True, [4, 7, 24, 34]), (False, [4, 7, 23, 33])])
def test_a_location_becomes_a_box(inclusive, expected):
    model = fcos.build("shapes", 2)
    model.set_convention(inclusive=inclusive)
    outputs = silent_outputs((64, 96), 2)
    at = 12 + 1  # second row and column of P3: the location (12, 12)
    outputs["ltrb"][0, at] = torch.tensor([8.0, 5, 11, 21])
    outputs["cls"][0, at, 1], outputs["ctr"][0, at] = 0.3, -0.2
    boxes, scores, labels = model.decode(outputs, [(64, 96)]).values()
    assert boxes[0, 0].tolist() == expected and labels[0, 0] == 1
    score = (torch.tensor([0.3]).sigmoid() * torch.tensor([-0.2]).sigmoid()).sqrt()
    torch.testing.assert_close(scores[0, :1], score)
    assert labels[0, 1:].eq(-1).all() and scores[0, 1:].isneginf().all() and not boxes[0, 1:].any()


@pytest.mark.parametrize("inclusive", [True, False])
def test_boxes_are_clipped_to_the_image_not_to_its_padding(inclusive):
    """Inclusive boxes as in the official code: to W - 1, and then one is added to x2."""
    model = fcos.build("shapes", 1)
    model.set_convention(inclusive=inclusive)
    outputs = silent_outputs((64, 96), 1)
    outputs["ltrb"][0, :2] = torch.tensor([[50.0] * 4, [-70.0, -70, 400, 400]])
    outputs["cls"][0, :2] = torch.tensor([[3.0], [2.0]])
    boxes, _, labels = model.decode(outputs, [(40, 50)]).values()
    assert boxes[0, 0].tolist() == [0, 0, 50, 40]
    if inclusive:
        assert labels[0, :2].tolist() == [0, 0] and boxes[0, 1].tolist() == [49, 39, 50, 40]
    else:  # a box beyond the border has no area, overlaps nothing, and would repeat itself
        assert labels[0, :2].tolist() == [0, -1]


def test_one_location_can_be_several_classes_and_the_threshold_is_strict():
    model = fcos.build("shapes", 3)
    outputs = silent_outputs((64, 96), 3)
    outputs["ltrb"][0, 20] = 6
    outputs["cls"][0, 20] = torch.tensor([0.0, 1.0, 2.0])
    assert model.decode(outputs, [(64, 96)])["labels"][0, :4].tolist() == [2, 1, 0, -1]
    model.candidate_threshold = 0.5  # sigmoid(0)
    labels = model.decode(outputs, [(64, 96)])["labels"]
    assert labels[0, :4].tolist() == [2, 1, -1, -1]


CUSTOMS = {  # family: what a candidate must pass, what ranks candidates, the final score
    "fcos": (lambda p, c: p > 0.05, lambda p, c: p * c, lambda p, c: (p * c) ** 0.5),
    "torchvision": (
        lambda p, c: (p * c) ** 0.5 > 0.2,
        lambda p, c: p * c,
        lambda p, c: (p * c) ** 0.5,
    ),
    "mmdetection": (lambda p, c: p > 0.05, lambda p, c: p, lambda p, c: p * c),
}


def decode_slowly(outputs, hw, family, topk, nms_threshold, max_detections):
    """The rules one location, class and box at a time: [(score, label, box)], falling."""
    passes, rank, final = CUSTOMS[family]
    P, K = outputs["cls"].shape[1:]
    probability = outputs["cls"][0].double().sigmoid().tolist()
    centerness = outputs["ctr"][0].double().sigmoid().tolist()
    chosen, first = [], 0
    for size in outputs["levels"]:
        pairs = [
            (row, k)
            for row in range(first, first + size)
            for k in range(K)
            if passes(probability[row][k], centerness[row])
        ]
        pairs.sort(key=lambda pair: -rank(probability[pair[0]][pair[1]], centerness[pair[0]]))
        chosen, first = chosen + pairs[:topk], first + size
    chosen.sort(key=lambda pair: -probability[pair[0]][pair[1]] * centerness[pair[0]])
    kept = []
    for row, k in chosen:
        x, y = outputs["points"][row, :2].tolist()
        left, top, right, bottom = outputs["ltrb"][0, row].tolist()
        box = [max(x - left, 0), max(y - top, 0), min(x + right, hw[1]), min(y + bottom, hw[0])]
        overlap = 0
        for _, label, other in kept:
            w, h = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1))
            if label == k and w > 0 and h > 0:
                areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
                overlap = max(overlap, w * h / (areas - w * h))
        if overlap <= nms_threshold and len(kept) < max_detections:
            kept.append((final(probability[row][k], centerness[row]), k, box))
    return kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(topk=20),
        dict(topk=3, nms_threshold=0.99),
        dict(max_detections=7, nms_threshold=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", CUSTOMS)
def test_decode_follows_the_customs_of_each_family(family, options):
    generator = torch.Generator().manual_seed(0)
    points = fcos.make_points((96, 128))
    P, random = len(points), functools.partial(torch.randn, generator=generator)
    outputs = {
        "cls": 2 * random(1, P, 3) - 2,
        "ltrb": 40 * random(1, P, 4).sigmoid(),
        "ctr": 2 * random(1, P),
        "points": points,
        "levels": [192, 48, 12, 4, 1],
    }
    model = fcos.build("shapes", 3)
    model.set_convention(score=family)
    found = changed(model, **options).detect(outputs, [(90, 120)])[0]
    options = dict(topk=1000, nms_threshold=0.6, max_detections=100) | options
    expected = decode_slowly(outputs, (90, 120), family, **options)
    scores, labels, boxes = zip(*expected)
    assert len(expected) >= 7 and found["labels"].tolist() == list(labels)
    torch.testing.assert_close(found["scores"], torch.tensor(scores), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["boxes"], torch.tensor(boxes), rtol=1e-5, atol=1e-4)


def test_one_threshold_cuts_class_probability_and_the_other_the_final_score():
    model = fcos.build("shapes", 1)
    outputs = silent_outputs((64, 96), 1)
    outputs["ltrb"][0, :2] = 3
    outputs["cls"][0, :2] = torch.tensor([[0.9], [0.4]]).logit()
    outputs["ctr"][0, :2] = torch.tensor([0.1, 0.9]).logit()  # final scores 0.3 and 0.6
    scores = model.detect(outputs, [(64, 96)])[0]["scores"]
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.3]))
    detect = functools.partial(model.detect, outputs, [(64, 96)])
    detect_half = functools.partial(changed(model, candidate_threshold=0.5).detect, *detect.args)
    assert detect_half()[0]["scores"].tolist() == scores[1:].tolist()
    assert detect(score_threshold=0.5)[0]["scores"].tolist() == scores[:1].tolist()
    assert detect(score_threshold=scores[1].item())[0]["scores"].tolist() == scores.tolist()
    assert not len(detect_half(0.5)[0]["scores"])


@pytest.mark.parametrize("K", [1, 80])
@pytest.mark.parametrize("hw", [(32, 32), (1, 1), (64, 96)])
def test_decoded_shapes_are_fixed(K, hw):
    outputs = silent_outputs(hw, K)
    for max_detections in (1, 7, 100):
        model = fcos.build("shapes", K, max_detections=max_detections)
        boxes, scores, labels = model.decode(outputs, [hw]).values()
        assert boxes.shape == (1, max_detections, 4) and not boxes.any()
        assert scores.shape == labels.shape == (1, max_detections)
        assert scores.isneginf().all() and labels.eq(-1).all()
    found = fcos.build("shapes", K).detect(outputs, [hw])[0]
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
    }


@pytest.mark.parametrize("part", ["cls", "ctr", "ltrb"])
def test_nan_is_never_a_detection(part):
    model = fcos.build("shapes", 2)
    outputs = silent_outputs((64, 96), 2)
    outputs["cls"][0, :5], outputs["ltrb"][0, :5] = 1.0, 3.0
    outputs[part][0, 1:] = float("nan")
    boxes, scores, labels = model.decode(outputs, [(64, 96)]).values()
    assert labels[0, :3].sort().values.tolist() == [-1, 0, 1]
    assert boxes.isfinite().all() and not scores.isnan().any()
    outputs[part][:] = float("nan")
    boxes, scores, labels = model.decode(outputs, [(64, 96)]).values()
    assert labels.eq(-1).all() and scores.isneginf().all() and not boxes.any()


def test_detections_of_recorded_outputs_are_the_official_ones(shared):
    facts, arrays = read_golden(shared / "golden/postprocess")
    options = {
        "MODEL.FCOS.PRE_NMS_TOP_N": "topk",
        "MODEL.FCOS.NMS_TH": "nms_threshold",
        "MODEL.FCOS.INFERENCE_TH": "candidate_threshold",
        "TEST.DETECTIONS_PER_IMG": "max_detections",
    }
    for case in [name for name in facts if name.startswith("p")]:
        fact, given = facts[case], facts[case]["opts"]
        model = fcos.build("shapes", fact["num_classes"])
        model.set_convention(inclusive=True)
        given = dict(zip(given[::2], given[1::2]))
        keywords = {options[key]: value or 5000 for key, value in given.items() if key in options}
        maps = [
            [torch.from_numpy(arrays[f"{case}.{kind}_L{level}"]) for level in range(5)]
            for kind in ("cls", "reg", "ctr")
        ]
        outputs = {
            "cls": rows_of(maps[0]),
            "ltrb": rows_of(maps[1]),
            "ctr": rows_of(maps[2]).squeeze(2),
            "points": fcos.make_points(fact["padded_hw"]),
            "levels": [h * w for h, w in fcos.level_sizes(fact["padded_hw"])],
        }
        for i, found in enumerate(
            changed(model, **keywords).detect(outputs, fact["image_sizes_hw"])
        ):
            assert_detections_match(found, golden_detections(arrays, f"{case}.img{i}."))


# ---- predict -----------------------------------------------------------------------------------


def test_predict_takes_paths_pil_images_arrays_and_tensors(tmp_path):
    model, pixels = detector(), picture(90, 120)
    array = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "photo.png")
    backwards = np.ascontiguousarray(array[:, ::-1])[:, ::-1]  # negative strides
    sources = [
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        Image.fromarray(array),
        array,
        backwards,
        pixels,
    ]
    results = model.predict(sources, min_size=64, max_size=128)
    assert len(results) == len(sources)
    for found in results:
        assert_same(found, results[0])
    assert_same(model.predict(sources[0], min_size=64, max_size=128)[0], results[0])
    assert model.predict([]) == []


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


def full_ranking(outputs, family, topk):
    """The pairs of one image that the rules choose if all of a level are ranked: scores, and
    (location, class)."""
    rule, pairs, first = fcos.SCORES[family], [], 0
    for count in outputs["levels"]:
        rows = slice(first, first + count)
        probability = outputs["cls"][0, rows].float().sigmoid()
        product = probability * outputs["ctr"][0, rows, None].float().sigmoid()
        ranked = rule.ranked(probability, product)
        ranked = ranked.where(rule.compared(probability, product) > rule.threshold, -1).flatten()
        best, index = ranked.topk(min(topk, len(ranked)))
        index = index[best >= 0]
        K = probability.shape[1]
        found = zip((index // K + first).tolist(), (index % K).tolist())
        pairs += zip(product.flatten()[index].tolist(), found)
        first += count
    return pairs


@pytest.mark.parametrize("K", [1, 3, 80])
@pytest.mark.parametrize("family", fcos.SCORES)
def test_ranking_locations_first_chooses_the_same_pairs(family, K):
    for seed, topk, dtype in (
        (0, 20, torch.float32),
        (1, 1000, torch.float32),
        (2, 9, torch.bfloat16),
    ):
        generator = torch.Generator().manual_seed(seed)
        P, random = 257, functools.partial(torch.randn, generator=generator)
        outputs = {
            "cls": (2 * random(1, P, K) - 1).to(dtype),
            "ctr": 2 * random(1, P),
            "levels": [192, 48, 12, 4, 1],
        }
        scores, pairs, first = [], [], 0
        for count in outputs["levels"]:
            level = [outputs[name][:, first : first + count] for name in ("cls", "ctr")]
            location, labels, product = fcos.best_pairs(*level, fcos.SCORES[family], topk)
            found = product[0] > -torch.inf
            scores += product[0, found].tolist()
            pairs += zip((location[0, found] + first).tolist(), labels[0, found].tolist())
            first += count
        expected = full_ranking(outputs, family, topk)
        assert len(scores) > 10
        expected_scores, expected_pairs = zip(*expected)
        unique = dtype == torch.float32 and K < 80  # ranks
        if unique or family != "mmdetection":  # which does not rank by the score
            # a sigmoid differs in its last bit with its place in a vector register
            best = torch.tensor([scores, expected_scores]).sort(1).values
            torch.testing.assert_close(best[0], best[1], rtol=3e-7, atol=0)
        if unique:
            assert pairs == list(expected_pairs)


def test_a_class_that_is_nan_leaves_the_others_of_its_location():
    model = fcos.build("shapes", 3)
    outputs = silent_outputs((64, 96), 3)
    outputs["ltrb"][0, :40] = 3
    outputs["cls"][0, :40, 1] = torch.linspace(1, 2, 40)
    outputs["cls"][0, 7, 0] = torch.nan
    model.topk = 30
    candidates = model.candidates(outputs, [(64, 96)])
    found = candidates["scores"][0] > -torch.inf
    assert candidates["labels"][0, found].eq(1).all() and found.sum() == 30
    assert any((candidates["scores"][0] - outputs["cls"][0, 7, 1].sigmoid().sqrt()).abs() < 1e-6)


def test_an_empty_batch_is_decoded():
    model = fcos.build("shapes", 3)
    outputs = silent_outputs((64, 96), 3)
    empty = {name: outputs[name][:0] for name in ("cls", "ltrb", "ctr")}
    found = model.decode(outputs | empty, torch.zeros(0, 2))
    assert found["boxes"].shape == (0, 100, 4) and found["labels"].shape == (0, 100)
    assert model.detect(outputs | empty, torch.zeros(0, 2)) == []


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


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((20, 30), np.uint8),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((20, 30, 3), np.float32),
        np.zeros((3, 20, 30), np.uint8),
        np.zeros((0, 30, 3), np.uint8),
        torch.zeros(3, 20, 30),
        torch.zeros(20, 30, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 20, 30, dtype=torch.uint8),
        np.zeros((20, 30, 3), bool),
        None,
        7,
        {"image": 1},
    ],
    ids=lambda image: f"{type(image).__name__}{getattr(image, 'shape', '')}",
)
def test_predict_says_what_an_image_is(image):
    with pytest.raises(ValueError, match=r"expected a path, a PIL image, an RGB uint8 array"):
        fcos.build("shapes", 1).predict([image])


# ---- build -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fcos.MODELS)
def test_rows_resolve_to_all_their_keywords(name):
    keywords = fcos.resolve(fcos.MODELS[name])
    assert keywords.items() >= fcos.MODELS[name].items()
    assert fcos.resolve(keywords) == keywords
    with torch.device("meta"):
        model = fcos.build(name, 5)
        again = fcos.FCOS(5, **model.keywords)
    assert model.keywords == keywords == again.keywords
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "keywords, said",
    [
        (dict(depth=50), "keyword 'depth': expected one of backbone.*frozen_stages.*blocks.*norm"),
        (dict(backbone="vgg"), "backbone 'vgg': expected one of resnet, mobilenet"),
        (dict(backbone="mobilenet", groups=2), "'groups': expected one of.*blocks, stem, norm"),
        (dict(radius="1.5"), "radius '1.5': expected a value like 1.5"),
        (dict(radius=None), "radius None: expected a value like 1.5"),
        (dict(channels=256.0), "channels 256.0: expected a value like 256"),
        (dict(blocks=3), r"blocks 3: expected a value like \(3, 4, 6, 3\)"),
        (dict(blocks=(1, 1, 1)), r"blocks \(1, 1, 1\): expected a value like"),
        (dict(test_size=(64.5, 96)), r"test_size \(64.5, 96\): expected"),
        (dict(test_size=(96, 64)), r"test_size \(96, 64\): expected the short side first"),
        (dict(topk=0), "topk 0: expected a value like 1000 from 1 to 1000000"),
        (dict(topk="100"), "topk '100': expected"),
        (dict(topk=True), "topk True: expected"),
        (dict(nms_threshold=2), "nms_threshold 2: expected a value like 0.6 from 0.0 to 1.0"),
        (dict(nms_threshold=math.nan), "nms_threshold nan: expected"),
        (dict(candidate_threshold=-0.1), "candidate_threshold -0.1: expected numbers from"),
        (dict(scales=1), "scales 1: expected a value like True"),
        (dict(imagenet=50), "imagenet 50: expected text"),
        (dict(channels=48), "channels 48: expected a multiple of 32"),
        (dict(scales="no"), "scales 'no': expected a value like True"),
        (dict(levels=3), "levels 3: expected"),
        (dict(levels=(2, 3, 4)), r"levels \(2, 3, 4\): expected ranges with them"),
        (dict(levels=(3, 5), ranges=(64,)), r"levels \(3, 5\): expected consecutive levels"),
        (dict(norm="batch"), "norm 'batch': expected one of frozen, gn, bn, syncbn"),
        (dict(block="wide"), "block 'wide': expected one of bottleneck, basic"),
        (
            dict(activation="softplus"),
            "activation 'softplus': expected one of exp, relu, exp_stride",
        ),
        (dict(ctr_on="both"), "ctr_on 'both': expected one of cls, box"),
        (
            dict(box_loss="diou"),
            "box_loss 'diou': expected one of iou, linear_iou, giou, giou_exact",
        ),
        (dict(quality="area"), "quality 'area': expected one of centerness, iou"),
        (dict(unit="metre"), "unit 'metre': expected one of pixel, stride"),
        (dict(grid="center"), "grid 'center': expected one of centre, corner"),
    ],
    ids=str,
)
def test_keywords_that_mean_nothing_are_refused_with_the_choices(keywords, said):
    calls = [
        fcos.resolve,
        lambda keywords: fcos.FCOS(2, **keywords),
        lambda keywords: fcos.build("fcos_imprv_R_50_FPN", 2, **keywords),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=said):
            call(keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        dict(frozen_stages=-1),
        dict(frozen_stages=6),
        dict(num_classes=0),
        dict(ranges=(64, 128)),
        dict(levels=(3, 4, 5), ranges=(64,)),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(keywords):
    named = "ranges" if "levels" in keywords else next(iter(keywords))
    with pytest.raises(ValueError, match=f"{named}.*expected"):
        fcos.build("shapes", **keywords)


def test_build_lists_the_names():
    with pytest.raises(ValueError, match="'resnet'.*fcos_R_50_FPN, .*shapes"):
        fcos.build("resnet")


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
