"""Scoring: the twelve numbers of COCO, F1, and results that do not fit their annotations."""

import contextlib
import importlib
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_files import CATEGORIES, box, detection, edit, first_row, perfect_results, write_coco

import evaluate
from fcos import UserError

# ---- the numbers of pycocotools ------------------------------------------------------------------


def pycocotools_metrics(results, annotations):
    """Return the twelve numbers and the precision array of pycocotools, run as its demo does."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        if results:
            found = truth.loadRes(json.loads(json.dumps(results)))
        else:  # loadRes refuses an empty list
            found = COCO()
            found.dataset = truth.dataset | dict(annotations=[])
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


@pytest.fixture(params=["hotcoco", "pycocotools"])
def scorer(request, monkeypatch):
    """Score with each of the two packages. Returns the list of their evaluations."""
    if request.param == "hotcoco":
        module = pytest.importorskip("hotcoco")
    else:
        monkeypatch.setitem(sys.modules, "hotcoco", None)  # as if it were not installed
        module = importlib.import_module("pycocotools.cocoeval")
    evaluations = []
    original = module.COCOeval

    def create(*args):
        evaluations.append(original(*args))
        return evaluations[-1]

    monkeypatch.setattr(module, "COCOeval", create)
    return evaluations


def noisy_results(coco, seed=0):
    """Return results with all errors: boxes moved, missed, repeated, invented, of a wrong class."""
    rng = np.random.default_rng(seed)
    images = coco["images"]
    ids = [category["id"] for category in coco["categories"]]
    results = []
    for row in coco["annotations"]:
        for _ in range(rng.integers(0, 4)):
            bbox = np.array(row["bbox"]) * rng.uniform(0.8, 1.2, 4) + rng.uniform(-2, 2, 4)
            category = row["category_id"] if rng.random() < 0.9 else int(rng.choice(ids))
            bbox = bbox.clip(0.1).tolist()
            results.append(detection(row["image_id"], bbox, category, rng.random()))
    for _ in range(len(images)):
        image_id = images[rng.integers(len(images))]["id"]
        category = int(rng.choice(ids))
        score = rng.random()
        results.append(detection(image_id, rng.uniform(1, 80, 4).tolist(), category, score))
    return results


def write_scene(
    path,
    seed=0,
    images=12,
    classes=(7, 3, 90),
    objects=6,
    noise=4,
    crowd=0.1,
    rounded=False,
    areas=None,
    id_of=int,
):
    """Write random annotations and return results near and far from them.

    objects: the largest number in an image. noise: the number of sets of results. crowd: the share
    of crowds. rounded: use whole pixels and few different scores, so that many tie. areas: "area"
    of the annotations, used in turn. id_of: maps the number of an image to its id.
    """
    rng = np.random.default_rng(seed)
    annotations = []
    for image in map(id_of, range(images)):
        for k in range(rng.integers(0, objects + 1)):
            size = rng.choice([12, 60, 200])
            bbox = [*rng.uniform(0, 300, 2), *rng.uniform(size / 2, size * 1.5, 2)]
            if rounded:
                bbox = [float(round(x)) for x in bbox]
            fields = dict(area=areas[k % len(areas)]) if areas else {}
            category = int(rng.choice(classes))
            fields["iscrowd"] = int(rng.random() < crowd)
            annotations.append(box(len(annotations) + 1, image, bbox, category, **fields))
    content = dict(
        images=[dict(id=id_of(k), file_name="") for k in range(images)],
        annotations=annotations,
        categories=[dict(id=k, name=f"{k}") for k in classes],
    )
    path.write_text(json.dumps(content))
    results = []
    for _ in range(noise):
        results += noisy_results(content, int(rng.integers(1 << 30)))
    if rounded:
        for result in results:
            result["bbox"] = [round(x) for x in result["bbox"]]
            result["score"] = round(result["score"]) / 2
    return results


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Write annotations of thirty images with small and large objects and crowds of two classes."""
    path = tmp_path_factory.mktemp("synthetic") / "instances.json"
    write_scene(path, images=30, classes=(7, 3))
    edit(path, categories=CATEGORIES)
    return path


SCENES = {
    **{f"random {seed}": dict(seed=seed) for seed in range(4)},
    "crowds": dict(crowd=0.6),
    "all crowds": dict(crowd=1),
    "ties": dict(rounded=True),
    "ties of crowds": dict(rounded=True, crowd=0.5),
    "area borders": dict(areas=[0, 32**2 - 1e-9, 32**2, 32**2 + 1e-9, 96**2, 1e10, 1e11]),
    "no detections": dict(noise=0),
    "no ground truth": dict(objects=0, noise=2),
    "neither": dict(objects=0, noise=0),
    "more than 100 detections": dict(images=2, objects=60, noise=12, classes=(3,)),
    "many classes": dict(classes=tuple(range(300, 5, -1)), images=40),
    "ids that are text": dict(id_of=lambda k: f"image {k}", rounded=True),
    "ids below 0": dict(id_of=lambda k: k - 5, rounded=True),
}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_scores_equal_pycocotools_bit_for_bit(tmp_path, scorer, scene):
    path = tmp_path / "instances.json"
    results = write_scene(path, **scene)
    metrics = evaluate.score(results, path)
    stats, precision = pycocotools_metrics(results, path)
    assert list(metrics) == list(evaluate.METRICS)
    np.testing.assert_array_equal(list(metrics.values()), stats)
    np.testing.assert_array_equal(scorer[0].eval["precision"], precision)
    if {"objects", "noise"}.isdisjoint(scene) and scene.get("crowd") != 1:
        assert 0.01 < metrics["AP"] < 0.9


def test_scores_equal_pycocotools_on_real_annotations(scorer, coco_tiny):
    path = coco_tiny["val"].annotations.path
    results = noisy_results(json.loads(path.read_text()), seed=1)
    metrics = evaluate.score(results, path)
    np.testing.assert_array_equal(list(metrics.values()), pycocotools_metrics(results, path)[0])


# ---- ordinary annotations and results ------------------------------------------------------------


def test_annotation_id_0_is_matched(tmp_path, scorer):
    annotations = [box(0, 1, [5, 5, 40, 40]), box(0, 2, [5, 5, 40, 40], 7)]
    path, _ = write_coco(tmp_path, {1: (80, 80), 2: (80, 80)}, annotations)
    assert evaluate.score(perfect_results(annotations), path)["AP"] == pytest.approx(1)


def test_missing_area_and_iscrowd_are_filled_in(tmp_path, synthetic):
    results = noisy_results(json.loads(synthetic.read_text()))
    path = Path(shutil.copy(synthetic, tmp_path))

    def without_area_and_iscrowd(rows):
        for row in rows:
            del row["area"]
            if not row["iscrowd"]:
                del row["iscrowd"]
        return rows

    edit(path, annotations=without_area_and_iscrowd)
    assert evaluate.score(results, path) == evaluate.score(results, synthetic)


@pytest.mark.parametrize("iscrowd", [math.nan, math.inf])
def test_iscrowd_that_is_no_number_means_a_crowd(tmp_path, scorer, iscrowd):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [box(1, 1, [2, 2, 9, 9], iscrowd=iscrowd)])
    assert len(evaluate.CocoDataset(path, folder).boxes) == 0
    assert evaluate.score([], path)["AP"] == -1


def test_fields_that_boxes_do_not_need_are_ignored(tmp_path, scorer):
    """hotcoco would refuse fields whose type differs from COCO's."""
    path = tmp_path / "instances.json"
    results = write_scene(path, seed=1)
    metrics = evaluate.score(results, path)
    edit(
        path,
        images=lambda rows: [row | dict(license="MIT", width=1.5) for row in rows],
        annotations=lambda rows: [row | dict(num_keypoints="x", score="x") for row in rows],
    )
    odd = [result | dict(area=1, iscrowd=1, segmentation=5, id="x") for result in results]
    assert evaluate.score(odd, path) == metrics


def test_no_results_score_0_and_no_annotations_score_minus_1(tmp_path, synthetic, scorer):
    assert set(evaluate.score([], synthetic).values()) == {0}
    path, _ = write_coco(tmp_path, {1: (20, 20)}, [])
    result = detection(1, [1, 1, 5, 5])
    assert set(evaluate.score([], path).values()) == {-1}
    assert set(evaluate.score([result], path).values()) == {-1}


def test_annotations_are_scored_as_they_were_read(synthetic, tmp_path):
    """The file may change while a run trains."""
    path = Path(shutil.copy(synthetic, tmp_path))
    results = noisy_results(json.loads(path.read_text()))
    annotations = evaluate.read_annotations(path)
    before = evaluate.score(results, path)
    edit(path, annotations=lambda rows: rows[:3])
    assert evaluate.score(results, annotations) == before
    assert evaluate.score(results, path) != before


def test_results_may_hold_numpy_numbers(synthetic):
    results = noisy_results(json.loads(synthetic.read_text()))
    converted = [
        {
            "image_id": np.int64(row["image_id"]),
            "category_id": np.int64(row["category_id"]),
            "bbox": np.array(row["bbox"]),
            "score": np.float64(row["score"]),
        }
        for row in results
    ]
    assert evaluate.score(converted, synthetic) == evaluate.score(results, synthetic)


def test_scoring_changes_neither_the_results_nor_the_file(synthetic):
    content = synthetic.read_bytes()
    results = perfect_results(json.loads(content)["annotations"])
    before = json.dumps(results)
    evaluate.score(results, synthetic)
    assert json.dumps(results) == before
    assert synthetic.read_bytes() == content


# ---- scores of classes ---------------------------------------------------------------------------


def test_the_mean_over_classes_is_the_ap(synthetic, scorer):
    results = noisy_results(json.loads(synthetic.read_text()))
    metrics = evaluate.score(results, synthetic, per_class=True)
    of_classes = {name: value for name, value in metrics.items() if name.startswith("AP/")}
    assert list(of_classes) == ["AP/three", "AP/seven", "AP/ninety"]
    assert of_classes["AP/ninety"] == -1  # there is no object of this class
    present = [value for value in of_classes.values() if value >= 0]
    assert np.mean(present) == pytest.approx(metrics["AP"], abs=1e-12)


def test_the_table_has_a_line_for_every_number(synthetic, tmp_path):
    """Line breaks in the name of a class cannot add one."""
    path = Path(shutil.copy(synthetic, tmp_path))
    edit(path, categories=first_row(name="a\nAP 0.999\x1b[2J"))
    lines = evaluate.table(evaluate.score([], path, per_class=True)).splitlines()
    assert len(lines) == 12 + 2 + 3 * 3
    assert all(line.isprintable() for line in lines)
    assert "-" in lines[-1]  # no object of the last class


# ---- F1 ------------------------------------------------------------------------------------------


def iou(a, b):
    w = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    h = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


def f1_slowly(results, truth, threshold, label=None):
    """Return F1 at an IoU of 0.5: results are matched greedily, the best first."""
    results = [row for row in results if row["score"] >= threshold]
    if label is not None:
        results = [row for row in results if row["category_id"] == label]
        truth = [row for row in truth if row["category_id"] == label]
    matched = set()
    for row in sorted(results, key=lambda row: -row["score"]):
        overlaps = {
            other["id"]: iou(row["bbox"], other["bbox"])
            for other in truth
            if other["id"] not in matched
            and other["image_id"] == row["image_id"]
            and other["category_id"] == row["category_id"]
        }
        best = max(overlaps, key=overlaps.get, default=None)
        if best is not None and overlaps[best] >= 0.5:
            matched.add(best)
    return 2 * len(matched) / (len(results) + len(truth))


@pytest.fixture
def moved_objects(tmp_path):
    """Return random annotations, their path, and a result near each, of random class and score."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in (1, 2, 3, 4):
        for _ in range(6):
            bbox = [*rng.uniform(0, 60, 2), *rng.uniform(10, 30, 2)]
            category = int(rng.choice([3, 7]))
            annotations.append(box(len(annotations) + 1, image, bbox, category))
    results = []
    for row in annotations:
        bbox = (np.array(row["bbox"]) + [*rng.normal(0, 3, 2), 0, 0]).tolist()
        category = int(rng.choice([3, 3, 7]))
        results.append(detection(row["image_id"], bbox, category, rng.uniform(0, 1)))
    path, _ = write_coco(tmp_path, dict.fromkeys((1, 2, 3, 4), (96, 96)), annotations)
    return annotations, path, results


@pytest.mark.parametrize("digits", [17, 1], ids=["unique scores", "tied scores"])
def test_f1_is_the_best_over_all_thresholds(moved_objects, scorer, digits):
    annotations, path, results = moved_objects
    results = [row | dict(score=round(row["score"], digits)) for row in results]
    metrics = evaluate.score(results, path, per_class=True)
    for suffix, label in (("", None), ("/three", 3), ("/seven", 7)):
        f1 = metrics[f"F1{suffix}"]
        threshold = metrics[f"threshold{suffix}"]
        assert f1 > 0
        assert f1 == pytest.approx(f1_slowly(results, annotations, threshold, label))
        others = [f1_slowly(results, annotations, row["score"], label) for row in results]
        assert f1 == pytest.approx(max(others))
    assert metrics["F1/ninety"] == -1  # there is no object of this class
    assert metrics["threshold/ninety"] == -1


def test_f1_is_minus_1_without_results(moved_objects, scorer):
    _, path, _ = moved_objects
    metrics = evaluate.score([], path, per_class=True)
    assert metrics["F1"] == -1
    assert metrics["AP/three"] == 0


# ---- errors --------------------------------------------------------------------------------------


def test_annotations_without_boxes_are_refused(tmp_path):
    path, _ = write_coco(tmp_path, {1: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    edit(path, annotations=[dict(id=1, image_id=1, category_id=3)])
    with pytest.raises(UserError, match="instances.json.*bbox"):
        evaluate.score([], path)


GOOD_RESULT = detection(10, [1, 2, 3, 4])


BAD_RESULTS = {  # results, and a pattern of the message
    "unknown image": ([GOOD_RESULT, GOOD_RESULT | dict(image_id=999)], r"\[1\]: .*: 999"),
    "text as image": ([GOOD_RESULT | dict(image_id="x")], "such as 0, found .*'image_id': 'x'"),
    "unknown category": ([GOOD_RESULT | dict(category_id=5)], "category_id .*'category_id': 5"),
    "no score": ([{k: v for k, v in GOOD_RESULT.items() if k != "score"}], "score"),
    "bbox of three": ([GOOD_RESULT | dict(bbox=[1, 2, 3])], "bbox"),
    "bbox of none": ([GOOD_RESULT | dict(bbox=None)], "bbox"),
    "bbox of words": ([GOOD_RESULT | dict(bbox=["a", "2", "3", "4"])], "bbox"),
    "score of words": ([GOOD_RESULT | dict(score="high")], "score"),
    "score of null": ([GOOD_RESULT | dict(score=None)], "score"),
    "rows of numbers": ([1, 2], r"\[0\]: .*, in 1"),
    "bbox of NaN": ([GOOD_RESULT | dict(bbox=[1, 2, math.nan, 4])], "bbox"),
    "score of NaN": ([GOOD_RESULT | dict(score=math.nan)], "score"),
    "image_id a list": ([GOOD_RESULT | dict(image_id=[10])], "image_id"),
    "annotations": ({"annotations": []}, "list"),
}


@pytest.mark.parametrize("results, message", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_results_that_do_not_fit_the_annotations_are_refused(synthetic, results, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.score(results, synthetic)
    assert "\n" not in str(error.value)
