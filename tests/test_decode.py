"""Decoding: from the outputs of the network to boxes, scores and labels."""

import pytest
import torch
from recorded import assert_detections_match, golden_detections, read_golden, rows_of

import fcos

HW = (64, 96)


def outputs_without_objects(hw, K):
    """Return outputs in which nothing is found. Tests raise the logits of some rows."""
    points = fcos.make_points(hw)
    P = len(points)
    return {
        "cls": torch.full((1, P, K), -20.0),
        "ltrb": torch.zeros(1, P, 4),
        "ctr": torch.full((1, P), 20.0),
        "points": points,
        "levels": [rows * columns for rows, columns in fcos.level_sizes(hw)],
    }


def random_outputs(hw, K, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    points = fcos.make_points(hw)
    P = len(points)
    return {
        "cls": (2 * torch.randn(1, P, K, generator=generator) - 2).to(dtype),
        "ltrb": 40 * torch.randn(1, P, 4, generator=generator).sigmoid(),
        "ctr": 2 * torch.randn(1, P, generator=generator),
        "points": points,
        "levels": [rows * columns for rows, columns in fcos.level_sizes(hw)],
    }


def build(K, inclusive=False, family="fcos", **keywords):
    model = fcos.build("shapes", K, **keywords)
    model.set_convention(inclusive=inclusive, score=family)
    return model


# ---- boxes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inclusive, expected", [(True, [4, 7, 24, 34]), (False, [4, 7, 23, 33])])
def test_a_location_becomes_a_box(inclusive, expected):
    outputs = outputs_without_objects(HW, 2)
    row = 12 + 1  # second row and column of P3: the location (12, 12)
    outputs["ltrb"][0, row] = torch.tensor([8.0, 5, 11, 21])
    outputs["cls"][0, row, 1] = 0.3
    outputs["ctr"][0, row] = -0.2
    boxes, scores, labels = build(2, inclusive).decode(outputs, [HW]).values()
    assert boxes[0, 0].tolist() == expected
    assert labels[0, 0] == 1
    score = (torch.tensor([0.3]).sigmoid() * torch.tensor([-0.2]).sigmoid()).sqrt()
    torch.testing.assert_close(scores[0, :1], score)
    assert labels[0, 1:].eq(-1).all()
    assert scores[0, 1:].isneginf().all()
    assert not boxes[0, 1:].any()


@pytest.mark.parametrize("inclusive", [True, False])
def test_boxes_are_clipped_to_the_image_not_to_its_padding(inclusive):
    """The official code clips inclusive boxes to W - 1, and 1 is added to x2 afterwards."""
    outputs = outputs_without_objects(HW, 1)
    outputs["ltrb"][0, :2] = torch.tensor([[50.0] * 4, [-70.0, -70, 400, 400]])
    outputs["cls"][0, :2] = torch.tensor([[3.0], [2.0]])
    boxes, _, labels = build(1, inclusive).decode(outputs, [(40, 50)]).values()
    assert boxes[0, 0].tolist() == [0, 0, 50, 40]
    if inclusive:
        assert labels[0, :2].tolist() == [0, 0]
        assert boxes[0, 1].tolist() == [49, 39, 50, 40]
    else:  # a box outside the image has no area, so suppression would never remove it
        assert labels[0, :2].tolist() == [0, -1]


@pytest.mark.parametrize("K", [1, 80])
@pytest.mark.parametrize("hw", [(32, 32), (1, 1), (64, 96)])
def test_shapes_of_decode_are_fixed(K, hw):
    outputs = outputs_without_objects(hw, K)
    for max_detections in (1, 7, 100):
        model = build(K, max_detections=max_detections)
        boxes, scores, labels = model.decode(outputs, [hw]).values()
        assert boxes.shape == (1, max_detections, 4)
        assert not boxes.any()
        assert scores.shape == labels.shape == (1, max_detections)
        assert scores.isneginf().all()
        assert labels.eq(-1).all()
    (found,) = build(K).detect(outputs, [hw])
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}


def test_an_empty_batch_is_decoded():
    model = build(3)
    outputs = outputs_without_objects(HW, 3)
    for name in ("cls", "ltrb", "ctr"):
        outputs[name] = outputs[name][:0]
    found = model.decode(outputs, torch.zeros(0, 2))
    assert found["boxes"].shape == (0, 100, 4)
    assert found["labels"].shape == (0, 100)
    assert model.detect(outputs, torch.zeros(0, 2)) == []


# ---- thresholds and NaN ------------------------------------------------------------------------


def test_a_location_can_have_several_classes_and_the_threshold_is_strict():
    model = build(3)
    outputs = outputs_without_objects(HW, 3)
    outputs["ltrb"][0, 20] = 6
    outputs["cls"][0, 20] = torch.tensor([0.0, 1.0, 2.0])
    assert model.decode(outputs, [HW])["labels"][0, :4].tolist() == [2, 1, 0, -1]
    model.candidate_threshold = 0.5  # the probability of a logit of 0
    assert model.decode(outputs, [HW])["labels"][0, :4].tolist() == [2, 1, -1, -1]


def test_candidate_threshold_cuts_probabilities_and_score_threshold_cuts_scores():
    model = build(1)
    outputs = outputs_without_objects(HW, 1)
    outputs["ltrb"][0, :2] = 3
    outputs["cls"][0, :2] = torch.tensor([[0.9], [0.4]]).logit()
    outputs["ctr"][0, :2] = torch.tensor([0.1, 0.9]).logit()
    scores = model.detect(outputs, [HW])[0]["scores"]
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.3]))
    high, low = scores.tolist()

    def scores_above(threshold):
        return model.detect(outputs, [HW], threshold)[0]["scores"].tolist()

    assert scores_above(0.5) == [high]
    assert scores_above(low) == [high, low]
    model.candidate_threshold = 0.5
    assert scores_above(0.0) == [low]  # its class has a probability of 0.9
    assert scores_above(0.5) == []


@pytest.mark.parametrize("part", ["cls", "ctr", "ltrb"])
def test_nan_is_never_a_detection(part):
    model = build(2)
    outputs = outputs_without_objects(HW, 2)
    outputs["cls"][0, :5] = 1.0
    outputs["ltrb"][0, :5] = 3.0
    outputs[part][0, 1:] = float("nan")
    boxes, scores, labels = model.decode(outputs, [HW]).values()
    assert labels[0, :3].sort().values.tolist() == [-1, 0, 1]
    assert boxes.isfinite().all()
    assert not scores.isnan().any()
    outputs[part][:] = float("nan")
    boxes, scores, labels = model.decode(outputs, [HW]).values()
    assert labels.eq(-1).all()
    assert scores.isneginf().all()
    assert not boxes.any()


def test_a_nan_class_does_not_hide_the_other_classes_of_its_location():
    model = build(3, nms_threshold=1.0, topk=30)
    outputs = outputs_without_objects(HW, 3)
    outputs["ltrb"][0, :40] = 3
    outputs["cls"][0, :40, 1] = torch.linspace(1, 2, 40)
    outputs["cls"][0, 7, 0] = torch.nan
    (found,) = model.detect(outputs, [HW])
    assert found["labels"].tolist() == [1] * 30
    expected = outputs["cls"][0, 7, 1].sigmoid().sqrt()
    assert ((found["scores"] - expected).abs() < 1e-6).any()


# ---- how each family ranks and scores ----------------------------------------------------------


def passes(family, probability, centerness):
    """Return whether a (location, class) pair is a candidate."""
    if family == "torchvision":
        return (probability * centerness) ** 0.5 > 0.2
    return probability > 0.05


def rank(family, probability, centerness):
    """Return what the candidates of a level are ranked by."""
    return probability if family == "mmdetection" else probability * centerness


def final_score(family, probability, centerness):
    product = probability * centerness
    return product if family == "mmdetection" else product**0.5


def candidates_slowly(outputs, family, topk):
    """Apply the rules to one pair at a time. Return [(score, location, class)]."""
    K = outputs["cls"].shape[2]
    probability = outputs["cls"][0].double().sigmoid().tolist()
    centerness = outputs["ctr"][0].double().sigmoid().tolist()
    candidates = []
    first = 0
    for size in outputs["levels"]:
        pairs = [
            (rank(family, probability[row][k], centerness[row]), row, k)
            for row in range(first, first + size)
            for k in range(K)
            if passes(family, probability[row][k], centerness[row])
        ]
        pairs.sort(reverse=True)
        candidates += [
            (final_score(family, probability[row][k], centerness[row]), row, k)
            for _, row, k in pairs[:topk]
        ]
        first += size
    return candidates


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (area_a + area_b - w * h)


def decode_slowly(outputs, hw, family, topk, nms_threshold, max_detections):
    """Decode one box at a time. Return [(score, label, box)], best first."""
    detections = []
    for score, row, label in sorted(candidates_slowly(outputs, family, topk), reverse=True):
        x, y = outputs["points"][row, :2].tolist()
        left, top, right, bottom = outputs["ltrb"][0, row].tolist()
        box = [max(x - left, 0), max(y - top, 0), min(x + right, hw[1]), min(y + bottom, hw[0])]
        same_class = [other for _, other_label, other in detections if other_label == label]
        if all(iou(box, other) <= nms_threshold for other in same_class):
            detections.append((score, label, box))
    return detections[:max_detections]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(topk=20),
        dict(topk=3, nms_threshold=0.99),
        dict(max_detections=7, nms_threshold=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", fcos.SCORES)
def test_decode_follows_the_rules_of_each_family(family, changes):
    outputs = random_outputs((96, 128), 3)
    keywords = dict(topk=1000, nms_threshold=0.6, max_detections=100) | changes
    (found,) = build(3, family=family, **keywords).detect(outputs, [(90, 120)])
    expected = decode_slowly(outputs, (90, 120), family, **keywords)
    assert len(expected) >= 7
    scores, labels, boxes = zip(*expected)
    assert found["labels"].tolist() == list(labels)
    torch.testing.assert_close(found["scores"], torch.tensor(scores), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["boxes"], torch.tensor(boxes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "seed, topk, dtype", [(0, 20, torch.float32), (1, 1000, torch.float32), (2, 9, torch.bfloat16)]
)
@pytest.mark.parametrize("K", [1, 3, 80])
@pytest.mark.parametrize("family", fcos.SCORES)
def test_the_best_pairs_of_each_level_are_candidates(family, K, seed, topk, dtype):
    """Decoding ranks locations first; that must choose the same pairs as ranking all pairs.

    Where ranks are unique the pairs are the same; where they tie, the scores are.
    """
    outputs = random_outputs((96, 128), K, seed, dtype)
    outputs["ltrb"].fill_(2)  # the centre of a box is its location
    model = build(K, family=family, topk=topk, nms_threshold=1.0, max_detections=20_000)
    (found,) = model.detect(outputs, [(999, 999)])  # no box is clipped
    expected = sorted(candidates_slowly(outputs, family, topk), reverse=True)
    assert len(expected) > 10
    unique = dtype == torch.float32 and K < 80
    if unique or family != "mmdetection":  # mmdetection does not rank by the score
        scores = torch.tensor([score for score, _, _ in expected])
        torch.testing.assert_close(found["scores"], scores, rtol=1e-6, atol=0)
    if unique:
        centres = (found["boxes"][:, :2] + found["boxes"][:, 2:]) / 2
        row_of = {tuple(point): row for row, point in enumerate(outputs["points"][:, :2].tolist())}
        pairs = [
            (row_of[tuple(centre)], label)
            for centre, label in zip(centres.tolist(), found["labels"].tolist())
        ]
        assert sorted(pairs) == sorted((row, k) for _, row, k in expected)


def test_detections_of_recorded_outputs_match_the_official_code(shared):
    facts, arrays = read_golden(shared / "golden/postprocess")
    our_keyword = {
        "MODEL.FCOS.PRE_NMS_TOP_N": "topk",
        "MODEL.FCOS.NMS_TH": "nms_threshold",
        "MODEL.FCOS.INFERENCE_TH": "candidate_threshold",
        "TEST.DETECTIONS_PER_IMG": "max_detections",
    }
    for case in [name for name in facts if name.startswith("p")]:
        fact = facts[case]
        options = dict(zip(fact["opts"][::2], fact["opts"][1::2]))
        keywords = {
            our_keyword[key]: value or 5000 for key, value in options.items() if key in our_keyword
        }
        model = build(fact["num_classes"], inclusive=True, **keywords)
        cls, reg, ctr = (
            [torch.from_numpy(arrays[f"{case}.{kind}_L{level}"]) for level in range(5)]
            for kind in ("cls", "reg", "ctr")
        )
        outputs = {
            "cls": rows_of(cls),
            "ltrb": rows_of(reg),
            "ctr": rows_of(ctr).squeeze(2),
            "points": fcos.make_points(fact["padded_hw"]),
            "levels": [h * w for h, w in fcos.level_sizes(fact["padded_hw"])],
        }
        for i, found in enumerate(model.detect(outputs, fact["image_sizes_hw"])):
            assert_detections_match(found, golden_detections(arrays, f"{case}.img{i}."))
