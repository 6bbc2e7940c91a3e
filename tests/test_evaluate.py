"""evaluate.py: the data set, prediction, scoring, drawing and the command line."""

import contextlib
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import fcos
from fcos import UserError

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")

CATEGORIES = [dict(id=7, name="seven"), dict(id=3, name="three"), dict(id=90, name="ninety")]


def write_coco(root, images, annotations, categories=CATEGORIES, **extra):
    """A COCO instances JSON and its folder of images, which are made where they are missing.
    images: {id: (width, height)} -> (annotation file, image folder)"""
    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for id, (w, h) in images.items():
        rows.append(dict(id=id, file_name=f"{id}.png", width=w, height=h))
        if not (folder / f"{id}.png").exists():
            noise = np.random.default_rng(id).integers(0, 256, (h, w, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{id}.png")
    content = dict(images=rows, annotations=annotations, categories=categories, **extra)
    path = root / "instances.json"
    path.write_text(json.dumps(content))
    return path, folder


def read_coco(*args):
    return evaluate.CocoDataset(*write_coco(*args))


def box(id, image_id, bbox, category_id=3, **extra):
    area = bbox[2] * bbox[3] if len(bbox) == 4 else 0
    return (
        dict(id=id, image_id=image_id, category_id=category_id, bbox=bbox, area=area, iscrowd=0)
        | extra
    )


def detection(image_id, bbox, category_id=3, score=0.5):
    return dict(image_id=image_id, category_id=category_id, bbox=bbox, score=score)


def edit(path, **changes):
    """Replace lists of a JSON file by functions of them, or set them."""
    content = json.loads(path.read_text())
    for name, change in changes.items():
        content[name] = change(content[name]) if callable(change) else change
    path.write_text(json.dumps(content))


# ---- data set ----------------------------------------------------------------------------------


def test_dataset_is_flat_arrays_in_the_order_of_ids(tmp_path):
    dataset = read_coco(
        tmp_path,
        {9: (60, 40), 2: (30, 50), 5: (20, 20)},
        [
            box(11, 9, [1.5, 2, 10, 20], 90),
            box(10, 2, [0, 0, 5, 6], 3),
            box(12, 9, [3, 4, 5, 6.25], 7),
            box(13, 9, [0, 0, 60, 40], 7, iscrowd=1),
        ],
    )
    assert dataset.image_ids.tolist() == [2, 5, 9]
    assert dataset.hw.tolist() == [[50, 30], [20, 20], [40, 60]]
    assert (dataset.classes, dataset.category_ids) == (["three", "seven", "ninety"], [3, 7, 90])
    assert dataset.offsets.tolist() == [0, 1, 1, 3]
    assert dataset.boxes.dtype == np.float32
    assert dataset.boxes.tolist() == [[0, 0, 5, 6], [1.5, 2, 11.5, 22], [3, 4, 8, 10.25]]
    assert dataset.labels.tolist() == [0, 2, 1]
    assert dataset.trainable.tolist() == [True, False, True]
    (note,) = dataset.notes
    assert note.startswith(
        "1 of 4 boxes are crowds and not targets, such as annotations[3], [0.0, 0.0"
    )
    boxes, labels = dataset.target(1)
    assert boxes.shape == (0, 4) and boxes.dtype == torch.float32
    assert labels.shape == (0,) and labels.dtype == torch.int64
    assert dataset.target(2)[0].tolist() == [[1.5, 2, 11.5, 22], [3, 4, 8, 10.25]]
    assert len(dataset) == 3 and dataset.path(2) == tmp_path / "images" / "9.png"
    assert dataset.image(2).shape == (3, 40, 60)


def test_boxes_without_area_or_image_are_left_out_and_others_clipped_all_counted(tmp_path, recwarn):
    dataset = read_coco(
        tmp_path,
        {1: (100, 50), 2: (40, 40)},
        [
            box(1, 1, [90, 40, 30, 30]),  # reaches beyond: clipped
            box(2, 1, [-5, -5, 20, 20]),  # starts outside: clipped
            box(3, 1, [99.7, 10, 0.8, 5]),  # by less than a pixel: rounding, not told
            box(4, 1, [200, 10, 5, 5]),  # outside
            box(5, 1, [10, 10, 0, 5]),  # empty
            box(6, 1, [10, 10, 5, -5]),  # negative
            box(7, 1, [math.nan, 10, 5, 5]),
            box(8, 1, [10, 10, math.inf, 5]),
            box(9, 77, [10, 10, 5, 5]),  # of no image
            box(10, 2, [10, 10, 1, 1]),  # fine, but too small for the official filter
        ],
    )
    expected = [[90, 40, 100, 50], [0, 0, 15, 15], [99.7, 10, 100, 15], [10, 10, 11, 11]]
    np.testing.assert_allclose(dataset.boxes, expected, rtol=1e-6)
    assert dataset.offsets.tolist() == [0, 3, 4]
    assert dataset.trainable.tolist() == [True, False]
    expected = ("1 of 10", 8), ("5 of 10", 3), ("2 of 10", 0)
    for note, (count, first) in zip(dataset.notes, expected, strict=True):
        assert note.startswith(f"{count} boxes ") and f", such as annotations[{first}], [" in note
    assert not recwarn.list


def test_crowds_are_no_targets_but_keep_their_image_as_in_the_official_filter(tmp_path):
    dataset = read_coco(
        tmp_path,
        {1: (20, 20), 2: (20, 20)},
        [
            box(1, 1, [2, 2, 9, 9], iscrowd=1),
            box(2, 2, [2, 2, 9, 1]),
        ],
    )
    assert len(dataset.boxes) == 1 and dataset.target(0)[0].shape == (0, 4)
    assert dataset.trainable.tolist() == [True, False]


def test_a_data_set_without_any_annotation_is_ordinary(tmp_path):
    dataset = read_coco(tmp_path, {1: (20, 20)}, [])
    assert len(dataset) == 1 and dataset.target(0)[0].shape == (0, 4)
    assert dataset.trainable.tolist() == [False] and dataset.notes == []


def test_annotations_without_iscrowd_or_area_are_ordinary(tmp_path):
    row = dict(id=1, image_id=1, category_id=3, bbox=[1, 2, 3, 4])
    dataset = read_coco(tmp_path, {1: (20, 20)}, [row])
    assert dataset.boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize("missing", [("width", "height"), ("height",)])
def test_sizes_missing_from_the_json_are_read_from_the_files(tmp_path, missing):
    path, folder = write_coco(tmp_path, {1: (30, 20), 2: (25, 20)}, [box(1, 1, [1, 1, 5, 5])])
    edit(
        path,
        images=lambda rows: [
            {key: value for key, value in row.items() if key not in missing or row["id"] == 2}
            for row in rows
        ],
    )
    assert evaluate.CocoDataset(path, folder).hw.tolist() == [[20, 30], [20, 25]]


def first_row(**changes):
    return lambda rows: [rows[0] | changes, *rows[1:]]


BAD_ROWS = {  # the list of the JSON, what becomes of it, and what the error names
    "no category": ("annotations", first_row(category_id=5), r"category_id 5 .*\[3, 7, 90\]"),
    "short bbox": ("annotations", first_row(bbox=[1, 2, 3]), r"\[0\].bbox.* 4, .*\[1, 2, 3\]"),
    "bbox of words": ("annotations", first_row(bbox=["a", 2, 3, 4]), r"\[0\].bbox\[0\]: .*'a'"),
    "no bbox": ("annotations", first_row(bbox=None), r"\[0\].bbox: .*None"),
    "area of a word": ("annotations", first_row(area="large"), r"\[0\].area: .*'large'"),
    "empty area": ("annotations", first_row(area=""), r"\[0\].area: .*`float"),
    "a crowd of a word": ("annotations", first_row(iscrowd="many"), r"\[0\].iscrowd: .*'many'"),
    "an annotation of a number": ("annotations", lambda rows: [5], r"annotations\[0\]: .*, in 5"),
    "no image_id": ("annotations", lambda rows: [{"bbox": [1, 2, 3, 4]}], "image_id.*'bbox'"),
    "image_id a list": ("annotations", first_row(image_id=[1]), r"image_id.*\[1\]"),
    "an image twice": ("images", lambda rows: rows + rows[:1], "images: .* id 1 2 times"),
    "a category twice": ("categories", lambda rows: rows * 2, "categories: .* id 7 2 times"),
    "a category without a name": ("categories", lambda rows: [dict(id=3)], r"\[0\]: .*`name`"),
    "a category without a text": ("categories", first_row(name=None), r"\[0\].name: .*null"),
    "too long a file name": ("images", first_row(file_name="a" * 300), "instances|lacks"),
    "a file name of nothing": ("images", first_row(file_name=None), r"\[0\].file_name: .*null"),
    "escape codes": ("images", first_row(file_name="\x1b[2J\n.png"), r"first being \\x1b\[2J\\n"),
    # ids that scoring could not tell apart
    "huge id": ("images", first_row(id=2**70), "images: .*whole numbers"),
    "ids of two kinds": ("images", first_row(id="1"), "images: .*whole numbers"),
    "fractional id": ("images", first_row(id=1.5), r"images\[0\].id: .*float"),
    "id of NaN": ("images", first_row(id=math.nan), r"images\[0\].id: .*float"),
    "no id": ("images", first_row(id=None), r"images\[0\].id: .*null"),
    "id of a truth": ("images", first_row(id=True), r"images\[0\].id: .*bool"),
    "category id of nothing": ("categories", first_row(id=None), r"categories\[0\].id: .*null"),
    "height 0": ("images", first_row(height=0), r"1\.png: .*pixels, found 0 "),
    "height -5": ("images", first_row(height=-5), r"1\.png: .*pixels, found -5 "),
    "height 20.5": ("images", first_row(height=20.5), r"1\.png: .*pixels, found 20.5 "),
    "height tall": ("images", first_row(height="tall"), r"images\[0\].height: .*1\.png"),
}


@pytest.mark.parametrize("part, change, names", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_one_error_that_names_it(tmp_path, part, change, names):
    path, folder = write_coco(tmp_path, {1: (20, 20), 2: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    edit(path, **{part: change})
    with pytest.raises(UserError, match=names) as error:
        evaluate.CocoDataset(path, folder)
    assert str(error.value).isprintable() and str(path) in str(error.value)


ODD_FIELDS = {  # of the list of the JSON, the first row is changed and must mean the same
    "width 64.0": ("images", dict(width=20.0)),
    "width as text": ("images", dict(width="20")),
    "width of null": ("images", dict(width=None)),
    "height of NaN": ("images", dict(height=math.nan)),
    "id 1.0": ("images", dict(id=1.0)),
    "iscrowd false": ("annotations", dict(iscrowd="false")),
    "iscrowd 0": ("annotations", dict(iscrowd="0")),
    "iscrowd null": ("annotations", dict(iscrowd=None)),
    "area as text": ("annotations", dict(area="25")),
    "area of null": ("annotations", dict(area=None)),
    "bbox as text": ("annotations", dict(bbox=["1", "1", "5", "5.0"])),
    "image_id as text": ("annotations", dict(image_id="1")),
    "category_id 3.0": ("annotations", dict(category_id=3.0)),
    "odd fields that are not read": ("annotations", dict(id="x", segmentation=math.nan)),
}


@pytest.mark.parametrize("part, changes", ODD_FIELDS.values(), ids=ODD_FIELDS)
def test_fields_of_odd_type_are_read_where_their_meaning_is_certain(tmp_path, part, changes):
    rows = [box(1, 1, [1, 1, 5, 5]), box(2, 2, [2, 2, 5, 5], iscrowd=1)]
    path, folder = write_coco(tmp_path, {1: (20, 20), 2: (20, 20)}, rows)
    plain = evaluate.CocoDataset(path, folder)
    edit(path, **{part: first_row(**changes)})
    if "width" in changes:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    odd = evaluate.CocoDataset(path, folder)
    for name in ("image_ids", "hw", "boxes", "labels", "offsets", "trainable"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(odd, name))
    np.testing.assert_array_equal(plain.annotations.areas, odd.annotations.areas)
    np.testing.assert_array_equal(plain.annotations.crowds, odd.annotations.crowds)


def test_ids_that_are_text_are_found_by_numbers(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    edit(path, images=first_row(id="1"))
    dataset = evaluate.CocoDataset(path, folder)
    assert dataset.image_ids.tolist() == ["1"] and len(dataset.boxes) == 1


def test_boxes_that_look_normalized_are_refused(tmp_path):
    rows = [box(1, 1, [0.1, 0.1, 0.5, 0.5]), box(2, 1, [0, 0, 1, 1])]
    path, folder = write_coco(tmp_path, {1: (20, 20)}, rows)
    with pytest.raises(
        UserError, match=r"in pixels, found normalized ones, such as \[0.1, 0.1, 0.5, 0.5\]"
    ):
        evaluate.CocoDataset(path, folder)
    write_coco(tmp_path, {1: (20, 20)}, rows[1:])
    assert len(evaluate.CocoDataset(path, folder).boxes) == 1  # of one pixel, perhaps


def test_odd_fields_that_only_scoring_reads_are_harmless(tmp_path, scorer):
    rows = [box(1, 1, [2, 2, 9, 9], iscrowd=math.nan), box(2, 1, [5, 5, 9, 9], iscrowd=math.inf)]
    path, folder = write_coco(tmp_path, {1: (20, 20)}, rows)
    evaluate.CocoDataset(path, folder)
    assert evaluate.score([], path)["AP"] == -1  # both are crowds, in training too


BAD_FILES = {
    "not JSON": (b"{", ("cannot be read as JSON",)),
    "not text": (b"\xff\xfe\x00\x80", ("cannot be read as JSON",)),
    "nothing": (b"", ("cannot be read as JSON",)),
    "a list": (b"[]", ("expected COCO instances", "`array`")),
    "captions": (b'{"images": [], "annotations": []}', ("COCO instances", "`categories`")),
    "no images": (
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
        ("images: expected one or more",),
    ),
    "no categories": (
        b'{"images": [{"id": 1, "file_name": "1.png"}], "annotations": [], "categories": []}',
        ("categories: expected one or more",),
    ),
    "rows of numbers": (
        b'{"images": [1], "annotations": [], "categories": [2]}',
        ("images[0]: Expected `object`, got `int`, in 1",),
    ),
    "no image_id": (
        b'{"images": [{"id": 1, "file_name": "1.png", "height": 5, "width": 5}], '
        b'"annotations": [{"id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}], '
        b'"categories": [{"id": 1, "name": "a"}]}',
        ("image_id",),
    ),
    "no size in a broken file": (
        b'{"images": [{"id": 1, "file_name": "bad.png"}], "annotations": '
        b'[], "categories": [{"id": 1, "name": "a"}]}',
        ("bad.png",),
    ),
}


@pytest.mark.parametrize("content, names", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_not_coco_is_one_error_that_names_it(tmp_path, content, names):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [])
    (folder / "bad.png").write_bytes(b"not an image")
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        evaluate.CocoDataset(path, folder)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or "bad.png" in names
    for name in names:
        assert name in str(error.value)


NAMES = {  # the name in the JSON, the files of the folder, and the one that is meant or the error
    "another suffix": ("1.jpg", ["1.png"], "1.png"),
    "suffix in capitals": ("1.png", ["1.PNG"], "1.PNG"),
    "no suffix": ("1", ["1.png", "1.txt"], "1.png"),
    "a number": (1, ["1.png"], "1.png"),
    "a stem with a dot": ("a.001", ["a.001.png", "a.png"], "a.001.png"),
    "the exact name": ("1.jpg", ["1.jpg", "1.png"], "1.jpg"),
    "backslashes": ("a\\1.png", ["a/1.png"], "a/1.png"),
    "composed": ("gr\u00f6\u00dfe.png", ["gro\u0308\u00dfe.png"], "gro\u0308\u00dfe.png"),
    "decomposed": ("gro\u0308\u00dfe.png", ["gr\u00f6\u00dfe.png"], "gr\u00f6\u00dfe.png"),
    "a composed folder": ("\u00f6/1", ["o\u0308/1.png"], "o\u0308/1.png"),
    "below": ("a/größe 1.png", ["a/größe 1.png"], "a/größe 1.png"),
    "beside": ("beside/1.png", ["../beside/1.png"], "../beside/1.png"),
    "CVAT's folder": ("images/1.png", ["1.png"], "../images/1.png"),
    "CVAT's folder, no suffix": ("images/1", ["1.png"], "../images/1.png"),
    "a mask beside it": ("1", ["1.jpg", "1.png"], UserError("'1' may be 1.jpg or 1.png; write")),
    "escaped": ("a%20b.png", ["a b.png"], UserError("being a%20b.png; .* holds a b.png")),
    "a prefix": ("/data/upload/1.png", ["1.png"], UserError("first being /data/upload/1.png")),
    "a note": ("1", ["1.txt"], UserError("lacks 1 of 1 images .* holds 1.txt")),
}


@pytest.mark.parametrize("name, files, expected", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("sized", [True, False])
def test_an_image_is_found_by_its_name_or_else_by_its_stem(tmp_path, name, files, expected, sized):
    path, folder = write_coco(tmp_path, {1: (8, 6)}, [])
    size = dict(width=8, height=6) if sized else {}
    edit(path, images=[dict(id=1, file_name=name) | size])
    picture = (folder / "1.png").read_bytes()
    (folder / "1.png").unlink()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(picture)
    if isinstance(expected, UserError):
        with pytest.raises(UserError, match=str(expected)):
            evaluate.CocoDataset(path, folder)
    else:
        dataset = evaluate.CocoDataset(path, folder)
        assert dataset.path(0) == folder / expected
        assert dataset.hw.tolist() == [[6, 8]] and dataset.image(0).shape == (3, 6, 8)


def test_images_that_are_listed_twice_or_copied_are_counted(tmp_path):
    path, folder = write_coco(tmp_path, {1: (8, 6), 2: (8, 6), 3: (9, 6), 4: (8, 5)}, [])
    assert evaluate.CocoDataset(path, folder).notes == []
    shutil.copy(folder / "1.png", folder / "2.png")
    (note,) = evaluate.CocoDataset(path, folder).notes
    assert note.startswith("1 images are copies of another, such as 1.png and 2.png; objects")
    edit(path, images=lambda rows: [*rows, rows[0] | dict(id=101), rows[0] | dict(id=102)])
    (note,) = evaluate.CocoDataset(path, folder).notes
    assert note.startswith("3 images are copies of another, such as 1.png and 2.png; objects")
    paths = [folder / f"{name}.png" for name in (1, 2, 1)]
    assert evaluate.same_content(paths) == [[0, 1, 2]]
    assert evaluate.same_content(paths, hashed=2) == [[0, 2]]  # by their paths alone


def test_categories_of_one_name_are_told_apart(tmp_path):
    names = [dict(id=k, name=name) for k, name in ((1, "a"), (2, "b"), (5, "a"))]
    rows = [box(1, 1, [1, 1, 5, 5], 5)]
    path, folder = write_coco(tmp_path, {1: (20, 20)}, rows, names)
    dataset = evaluate.CocoDataset(path, folder)
    assert dataset.classes == ["a (1)", "b", "a (5)"] and "share the name 'a'" in dataset.notes[0]
    metrics = evaluate.score(perfect(rows), path, per_class=True)
    assert metrics["AP/a (1)"] == -1 and metrics["AP/a (5)"] == pytest.approx(1)


def test_classes_are_decided_by_training(tmp_path):
    """The first category, which names the data set, is a class in training alone."""
    tree = [dict(id=0, name="cells")]
    tree += [dict(id=k, name=name, supercategory="cells") for k, name in ((1, "red"), (2, "rare"))]
    rows = [box(k + 1, 1, [1, 1, 5, 5], k) for k in (0, 1, 2)]
    train = read_coco(tmp_path / "train", {1: (20, 20)}, rows, tree)
    assert train.classes == ["cells", "red", "rare"]
    path, folder = write_coco(tmp_path / "val", {1: (20, 20)}, rows[1:], tree)
    val = evaluate.CocoDataset(path, folder, train.classes)
    assert val.classes == train.classes and val.labels.tolist() == [1, 2] and not val.notes
    assert evaluate.CocoDataset(path, folder).classes == ["red", "rare"]

    edit(path, categories=lambda rows: [rows[2] | dict(id=7), rows[1]], annotations=rows[1:2])
    val = evaluate.CocoDataset(
        path, folder, train.classes
    )  # other ids, and a class that is missing
    assert (val.category_ids, val.labels.tolist()) == ([None, 1, 7], [1])
    assert val.notes == ["classes without a category, not scored: ['cells']"]
    assert evaluate.score(perfect(rows[1:2]), val.annotations)["AP"] == pytest.approx(1)

    edit(path, categories=[*tree, dict(id=9, name="new")], annotations=rows)
    val = evaluate.CocoDataset(path, folder, train.classes)
    assert val.notes == ["ignored categories (not a class, no boxes): ['new']"]
    new = perfect([box(1, 1, [1, 1, 9, 9], 9)])  # cannot change the metrics
    assert evaluate.score(perfect(rows) + new, val.annotations)["AP"] == pytest.approx(1)
    edit(path, annotations=[*rows, box(4, 1, [1, 1, 9, 9], 9)])
    with pytest.raises(UserError, match="'new': expected one of the 3 classes"):
        evaluate.CocoDataset(path, folder, train.classes)


ANGLE, POINT = "    angle: float = 0.5\n", "    point: tuple[int, int]\n"


def test_a_further_column_costs_one_line(tmp_path, monkeypatch):
    """One field more in BoxEntry, and the samples have the column."""
    source = (ROOT / "evaluate.py").read_text()
    field = "    iscrowd: bool | float | None = None\n"
    assert source.count(field) == 1
    (tmp_path / "columns.py").write_text(source.replace(field, field + ANGLE + POINT))
    monkeypatch.syspath_prepend(tmp_path)
    columns = importlib.import_module("columns")
    rows = [
        box(1, 2, [1, 1, 5, 5], angle=0.25, point=[3, 4]),
        box(2, 1, [1, 1, 5, 5], point=[5, 6]),
        box(3, 1, [1, 1, 5, 5], point=[7, 8], iscrowd=1),
        box(4, 2, [2, 2, 5, 5], angle=-1, point=[9, 9]),
    ]
    path, folder = write_coco(tmp_path, {1: (20, 20), 2: (20, 20), 3: (20, 20)}, rows)
    dataset = columns.CocoDataset(path, folder)
    samples = [dataset.sample(i, (10, 10)) for i in range(3)]
    assert [sample["angle"].tolist() for sample in samples] == [[0.5], [0.25, -1], []]
    assert [sample["point"].tolist() for sample in samples] == [[[5, 6]], [[3, 4], [9, 9]], []]
    assert samples[2]["point"].shape == (0, 2) and samples[0]["point"].dtype == torch.int64
    assert samples[0]["angle"].dtype == torch.float32
    edit(path, annotations=first_row(point=None))
    with pytest.raises(UserError, match=r"annotations\[0\].point: .*null"):
        columns.CocoDataset(path, folder)


def torchrun(script, *argv):
    """Run a script in two processes. Returns the completed process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command += [str(script), *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


READERS = """
import argparse
import torch
import evaluate
reads, read_json = [], evaluate.read_json
def counted(*args):
    reads.append(args)
    return read_json(*args)
evaluate.read_json = counted
def main(args):
    rank, world_size, _ = evaluate.start_process("cpu")
    dataset = evaluate.load_dataset({path!r}, {folder!r})
    sums = dataset.boxes.sum().item(), dataset.annotations.areas.sum().item()
    print(f"{{len(reads)}} read", *sums, *dataset.image_ids, *dataset.sample(1, (9, 9)), flush=True)
    torch.distributed.barrier()  # or torchrun may end the other process before it prints
    evaluate.load_dataset({wrong!r}, {folder!r})
evaluate.run(main, argparse.Namespace())
"""


def test_one_process_of_a_node_reads_and_all_end_with_its_error(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20), 2: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    wrong = shutil.copy(path, tmp_path / "wrong.json")
    edit(wrong, annotations=first_row(bbox=[1, 2]))
    script = tmp_path / "readers.py"
    script.write_text(READERS.format(path=str(path), wrong=str(wrong), folder=str(folder)))
    done = torchrun(script)
    read = " 14.0 25.0 1 2 image boxes labels"
    assert sorted(done.stdout.splitlines()) == [f"0 read{read}", f"1 read{read}"], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("readers.py: ")]
    # torchrun may end the other process before it prints
    assert errors and all("annotations[0].bbox" in line for line in errors), done.stderr


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20), 4: (20, 20), 5: (20, 20)}, [])
    (folder / "4.png").unlink()
    (folder / "5.png").unlink()
    with pytest.raises(UserError, match=r"lacks 2 of 3 images .*4\.png"):
        evaluate.CocoDataset(path, folder)


def test_missing_paths_name_what_is_there(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [])
    with pytest.raises(UserError, match=r"nothing\.json: no such file; .* holds .*instances\.json"):
        evaluate.CocoDataset(tmp_path / "nothing.json", folder)
    with pytest.raises(UserError, match=r"nowhere: no such image folder; .* holds images"):
        evaluate.CocoDataset(path, tmp_path / "nowhere")


# ---- EXIF orientation --------------------------------------------------------------------------


def rotated_png(path, w, h, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((h, w, 3), np.uint8)
    pixels[0, 0] = 255  # the corner that shows what was turned
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize("declared, corner", [((30, 20), (0, 0)), ((20, 30), (0, 19))])
def test_exif_turns_an_image_only_if_the_json_says_so(tmp_path, declared, corner):
    path, folder = write_coco(tmp_path, {1: declared}, [])
    rotated_png(folder / "1.png", 30, 20, 6)
    dataset = evaluate.CocoDataset(path, folder)
    image = dataset.image(0)
    assert image.shape[1:] == declared[::-1]
    assert image[(slice(None), *corner)].tolist() == [255, 255, 255]


def test_exif_of_a_size_that_fits_neither_way_is_an_error(tmp_path):
    path, folder = write_coco(tmp_path, {1: (40, 20)}, [])
    rotated_png(folder / "1.png", 30, 20, 6)
    with pytest.raises(UserError, match=r"1\.png: expected 40x20 pixels.*, found 30x20"):
        evaluate.CocoDataset(path, folder).image(0)


# ---- the official data set ---------------------------------------------------------------------


@pytest.fixture
def official(shared):
    return json.loads((shared / "golden" / "transforms.json").read_text())


@pytest.fixture
def tiny(shared):
    """The training and the validation set of a small part of COCO."""
    root = shared / "data" / "coco2017_tiny"
    paths = {split: evaluate.coco_paths(root, f"{split}2017") for split in ("train", "val")}
    return {split: evaluate.CocoDataset(*where) for split, where in paths.items()}


def test_boxes_and_sizes_are_those_of_the_official_data_set(official, tiny):
    for sample in official["dataset_samples"]:
        dataset = tiny[sample["split"]]
        i = dataset.image_ids.tolist().index(sample["image_id"])
        (old_h, old_w), (h, w) = dataset.hw[i].tolist(), sample["resized_hw"]
        assert fcos.resized_hw(old_h, old_w, 800, 1333) == (h, w)
        boxes, labels = dataset.target(i)
        assert (labels + 1).tolist() == sample["labels"]  # the official background is class 0
        ours = boxes.double() / torch.tensor([old_w, old_h, old_w, old_h])
        if sample["hflip"]:
            ours = torch.stack([1 - ours[:, 2], ours[:, 1], 1 - ours[:, 0], ours[:, 3]], 1)
        # Theirs are inclusive in original pixels, then scaled: a pixel less at the far side. Their
        # flip mirrors the resized image with a pixel of that, so it is a fraction of a pixel off.
        pixel_w, pixel_h = w / old_w, h / old_h
        theirs = torch.tensor(sample["boxes_xyxy"], dtype=torch.float64)
        if sample["hflip"]:
            theirs = theirs + torch.tensor([1 - pixel_w, 0, 1, pixel_h])
        else:
            theirs = theirs + torch.tensor([0, 0, pixel_w, pixel_h])
        difference = (ours * torch.tensor([w, h, w, h]) - theirs).abs()
        assert difference.max() < 1e-3, (sample["image_id"], sample["hflip"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_training_filter_is_the_official_one(official, tiny, split):
    golden, dataset = official["dataset_filter"][split], tiny[split]
    assert dataset.image_ids.tolist() == golden["all_ids"]
    assert dataset.image_ids[dataset.trainable].tolist() == golden["ids_with_valid_annotations"]


def test_the_category_mapping_is_the_official_one(official, tiny):
    ours = {str(id): label + 1 for label, id in enumerate(tiny["val"].category_ids)}
    assert ours == official["json_category_id_to_contiguous_id"]


# ---- scoring -----------------------------------------------------------------------------------


def pycocotools_says(results, annotations):
    """The twelve numbers and the precision array of pycocotools, run as its own demo does."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        found = truth.loadRes(json.loads(json.dumps(results))) if results else COCO()
        if not results:  # which loadRes does not take
            found.dataset = truth.dataset | dict(annotations=[])
            found.createIndex()
        coco = COCOeval(truth, found, "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    return coco.stats, coco.eval["precision"]


@pytest.fixture(params=["hotcoco", "pycocotools"])
def scorer(request, monkeypatch):
    """Each of the two that evaluate.score may find -> the list of its evaluations, to look into"""
    if request.param == "hotcoco":
        module = pytest.importorskip("hotcoco")
    else:
        monkeypatch.setitem(sys.modules, "hotcoco", None)  # not installed
        module = importlib.import_module("pycocotools.cocoeval")
    evaluations, original = [], module.COCOeval

    def noted(*args):
        evaluations.append(original(*args))
        return evaluations[-1]

    monkeypatch.setattr(module, "COCOeval", noted)
    return evaluations


def noisy_results(coco, seed=0):
    """Results in which the boxes of an annotation file are found, moved, missed, mistaken, found
    twice and made up."""
    rng = np.random.default_rng(seed)
    images, ids = coco["images"], [category["id"] for category in coco["categories"]]
    results = []
    for a in coco["annotations"]:
        for _ in range(rng.integers(0, 4)):
            bbox = np.array(a["bbox"]) * rng.uniform(0.8, 1.2, 4) + rng.uniform(-2, 2, 4)
            category = a["category_id"] if rng.random() < 0.9 else int(rng.choice(ids))
            bbox = bbox.clip(0.1).tolist()
            results.append(detection(a["image_id"], bbox, category, rng.random()))
    for _ in range(len(images)):
        image_id = images[rng.integers(len(images))]["id"]
        category, score = int(rng.choice(ids)), rng.random()
        results.append(detection(image_id, rng.uniform(1, 80, 4).tolist(), category, score))
    return results


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Annotations of thirty images, small and large objects and crowds, in two of three classes."""
    path = tmp_path_factory.mktemp("synthetic") / "instances.json"
    write_scene(path, images=30, classes=(7, 3))
    edit(path, categories=CATEGORIES)
    return path


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
    """Random annotations, and results near and far from them. -> results
    rounded: whole pixels and two scores, for ties. areas: what annotations have in turn."""
    rng, annotations, results = np.random.default_rng(seed), [], []
    for image in map(id_of, range(images)):
        for k in range(rng.integers(0, objects + 1)):
            size = rng.choice([12, 60, 200])
            bbox = [*rng.uniform(0, 300, 2), *rng.uniform(size / 2, size * 1.5, 2)]
            if rounded:
                bbox = [float(round(x)) for x in bbox]
            extra = dict(area=areas[k % len(areas)]) if areas else {}
            category, extra["iscrowd"] = int(rng.choice(classes)), int(rng.random() < crowd)
            annotations.append(box(len(annotations) + 1, image, bbox, category, **extra))
    content = dict(
        images=[dict(id=id_of(k), file_name="") for k in range(images)],
        annotations=annotations,
        categories=[dict(id=k, name=f"{k}") for k in classes],
    )
    path.write_text(json.dumps(content))
    for _ in range(noise):
        results += noisy_results(content, int(rng.integers(1 << 30)))
    for result in results if rounded else []:
        result.update(bbox=[round(x) for x in result["bbox"]], score=round(result["score"]) / 2)
    return results


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
    "many classes": dict(classes=tuple(range(600, 5, -1)), images=60),
    "ids that are text": dict(id_of=lambda k: f"image {k}", rounded=True),
    "ids below 0": dict(id_of=lambda k: k - 5, rounded=True),
}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_score_is_pycocotools_bit_for_bit(tmp_path, scorer, scene):
    path = tmp_path / "instances.json"
    results = write_scene(path, **scene)
    metrics = evaluate.score(results, path)
    stats, precision = pycocotools_says(results, path)
    assert list(metrics) == list(evaluate.METRICS)
    np.testing.assert_array_equal(list(metrics.values()), stats)
    np.testing.assert_array_equal(scorer[0].eval["precision"], precision)
    if {"objects", "noise"}.isdisjoint(scene) and scene.get("crowd") != 1:
        assert 0.01 < metrics["AP"] < 0.9


def test_score_is_pycocotools_on_real_annotations(scorer, tiny):
    path = tiny["val"].annotations.path
    results = noisy_results(json.loads(path.read_text()), seed=1)
    metrics = evaluate.score(results, path)
    np.testing.assert_array_equal(list(metrics.values()), pycocotools_says(results, path)[0])


def test_only_what_boxes_need_reaches_the_scorer(tmp_path, scorer):
    """hotcoco refuses fields of other types than COCO's, in whatever has no part in the scores."""
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


def perfect(annotations):
    return [
        detection(a["image_id"], a["bbox"], a["category_id"], 0.9)
        for a in annotations
        if not a.get("iscrowd")
    ]


def test_annotation_id_0_and_ids_given_twice_lose_no_match(tmp_path, scorer):
    annotations = [box(0, 1, [5, 5, 40, 40]), box(0, 2, [5, 5, 40, 40], 7)]
    path, _ = write_coco(tmp_path, {1: (80, 80), 2: (80, 80)}, annotations)
    assert evaluate.score(perfect(annotations), path)["AP"] == pytest.approx(1)


def test_missing_area_and_iscrowd_are_made_up_for(tmp_path, synthetic):
    results = noisy_results(json.loads(synthetic.read_text()))
    path = tmp_path / "bare.json"
    path.write_text(synthetic.read_text())
    edit(
        path,
        annotations=lambda rows: [
            {
                key: value
                for key, value in row.items()
                if key != "area" and (key != "iscrowd" or row["iscrowd"])
            }
            for row in rows
        ],
    )
    assert evaluate.score(results, path) == evaluate.score(results, synthetic)


def test_annotations_that_cannot_be_scored_are_an_error_that_names_them(tmp_path):
    path, _ = write_coco(tmp_path, {1: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    edit(path, annotations=lambda rows: [{k: v for k, v in rows[0].items() if k != "bbox"}])
    with pytest.raises(UserError, match="instances.json.*bbox"):
        evaluate.score([], path)


def test_no_results_score_0_and_no_annotations_score_minus_1(tmp_path, synthetic, scorer):
    assert set(evaluate.score([], synthetic).values()) == {0}
    path, _ = write_coco(tmp_path, {1: (20, 20)}, [])
    result = detection(1, [1, 1, 5, 5])
    assert set(evaluate.score([], path).values()) == {-1}
    assert set(evaluate.score([result], path).values()) == {-1}


def test_the_mean_over_classes_is_the_ap(synthetic, scorer):
    results = noisy_results(json.loads(synthetic.read_text()))
    metrics = evaluate.score(results, synthetic, per_class=True)
    of_class = {name: value for name, value in metrics.items() if name.startswith("AP/")}
    assert list(of_class) == ["AP/three", "AP/seven", "AP/ninety"]
    assert of_class["AP/ninety"] == -1  # there is none to find
    present = [value for name, value in of_class.items() if value >= 0]
    assert np.mean(present) == pytest.approx(metrics["AP"], abs=1e-12)
    lines = evaluate.table(metrics).splitlines()
    assert len(lines) == 12 + 2 + 3 * 3 and "-" in lines[-1]


def test_a_class_cannot_forge_lines_of_the_table(synthetic, tmp_path):
    path = shutil.copy(synthetic, tmp_path)
    edit(Path(path), categories=first_row(name="a\nAP 0.999\x1b[2J"))
    lines = evaluate.table(evaluate.score([], path, per_class=True)).splitlines()
    assert len(lines) == 12 + 2 + 3 * 3 and all(line.isprintable() for line in lines)


def test_the_annotations_that_were_read_are_scored_whatever_the_file_holds_now(synthetic, tmp_path):
    path = Path(shutil.copy(synthetic, tmp_path))
    results = noisy_results(json.loads(path.read_text()))
    annotations = evaluate.read_annotations(path)
    before = evaluate.score(results, path)
    edit(path, annotations=lambda rows: rows[:3])
    assert evaluate.score(results, annotations) == before != evaluate.score(results, path)


def test_results_may_hold_numbers_of_numpy(synthetic):
    results = noisy_results(json.loads(synthetic.read_text()))
    arrays = [
        {
            name: np.array(value) if name == "bbox" else np.array(value)[()]
            for name, value in r.items()
        }
        for r in results
    ]
    assert evaluate.score(arrays, synthetic) == evaluate.score(results, synthetic)


def test_scoring_changes_neither_the_results_nor_the_file(synthetic):
    before = synthetic.read_bytes()
    results = perfect(json.loads(before)["annotations"])
    copy = json.loads(json.dumps(results))
    evaluate.score(results, synthetic)
    assert results == copy and synthetic.read_bytes() == before


GOOD_RESULT = detection(10, [1, 2, 3, 4])
BAD_RESULTS = {
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
    "bbox of NaN": ([GOOD_RESULT | dict(bbox=[1, 2, math.nan, 4])], "bbox"),  # matches anything
    "score of NaN": ([GOOD_RESULT | dict(score=math.nan)], "score"),
    "image_id a list": ([GOOD_RESULT | dict(image_id=[10])], "image_id"),
    "annotations": ({"annotations": []}, "list"),
}


@pytest.mark.parametrize("results, name", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_results_that_do_not_fit_the_annotations_are_one_error(synthetic, results, name):
    with pytest.raises(UserError, match=name) as error:
        evaluate.score(results, synthetic)
    assert "\n" not in str(error.value)


# ---- prediction --------------------------------------------------------------------------------


class PixelModel(torch.nn.Module):
    """Stands for FCOS: finds boxes that tell which pixels and sizes it was shown."""

    test_size, convention, pixel_mean = (64, 96), fcos.CONVENTION, torch.zeros(1)
    predict, rescale = fcos.FCOS.predict, fcos.FCOS.rescale

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, images, sizes):
        assert not self.training and images.dtype == torch.uint8
        self.calls.append(tuple(images.shape))
        return images

    def decode(self, images, sizes):
        boxes, scores = [], []
        for image, (h, w) in zip(images, sizes.tolist()):
            assert image[:, h:].sum() == 0 and image[:, :, w:].sum() == 0
            scores.append([image[:, :h, :w].double().mean().item() / 256])
            boxes.append([[w / 4, h / 4, w, h]])
        labels = torch.ones(len(images), 1).long()
        return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": labels}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Seven images of four sizes."""
    sizes = [(64, 64), (90, 60), (60, 90), (64, 64), (90, 60), (33, 21), (90, 60)]
    root = tmp_path_factory.mktemp("mixed")
    annotations = [box(k, k, [5, 5, 20, 10]) for k in range(7)]
    return write_coco(root, dict(enumerate(sizes)), annotations)


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 0), (4, 2)])
def test_every_image_is_predicted_once_in_its_own_pixels(mixed, batch_size, workers):
    dataset, model = evaluate.CocoDataset(*mixed), PixelModel().train()
    results = evaluate.predict(model, dataset, batch_size, workers)
    assert model.training  # as it was
    assert [result["image_id"] for result in results] == list(range(7))
    assert {result["category_id"] for result in results} == {7}  # label 1
    for result, (h, w) in zip(results, dataset.hw.tolist()):
        assert result["bbox"] == pytest.approx([w / 4, h / 4, w * 3 / 4, h * 3 / 4], rel=1e-6)
    assert results == evaluate.predict(PixelModel(), dataset, 1, 0)
    assert all(shape[0] <= batch_size for shape in model.calls)
    json.dumps(results)  # plain Python values only


def test_prediction_takes_sizes_from_the_model(mixed):
    dataset, model = evaluate.CocoDataset(*mixed), PixelModel()
    evaluate.predict(model, dataset, 8, 0)
    assert {shape[2:] for shape in model.calls} == {(64, 64), (64, 96), (96, 64)}
    model.calls.clear()
    model.test_size = 32, 40
    evaluate.predict(model, dataset, 8, 0)
    assert {shape[2:] for shape in model.calls} == {(32, 32), (32, 64), (64, 32)}


def tiny_model(num_classes=3, classes=("three", "seven", "ninety"), ids=(3, 7, 90)):
    """A small FCOS whose random weights find many boxes of well-separated scores."""
    torch.manual_seed(0)
    model = fcos.build("shapes", num_classes, stem=16, channels=64)
    torch.nn.init.normal_(model.head.cls.weight, std=0.4)
    torch.nn.init.constant_(model.head.cls.bias, -1.0)
    model.classes, model.category_ids = list(classes), list(ids)
    model.test_size = (64, 96)
    return model.eval()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    fcos.save(tiny_model(), path)
    return str(path)


def call(line):
    evaluate.main(evaluate.parse_args(line.split()))


LAUNCHED = """
import argparse, json, sys
import evaluate

def every_call(_):
    for argv in json.loads(sys.argv[1]):
        evaluate.main(evaluate.parse_args(argv))

evaluate.run(every_call, argparse.Namespace())
"""


def test_two_processes_predict_what_one_does(tmp_path, mixed, model_file):
    one_image = write_coco(tmp_path / "one", {5: (40, 30)}, [box(1, 5, [1, 1, 9, 9])])
    here = f"{model_file} --device cpu --workers 0 --annotations"
    lines = [
        f"{here} {annotations} --image-dir {folder} --batch-size {batch} --save-json {tmp_path}/"
        for (annotations, folder), batch in ((mixed, 1), (mixed, 4), (one_image, 1))
    ]
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    calls = json.dumps([f"{line}{k}.json".split() for k, line in enumerate(lines)])
    done = torchrun(script, calls)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("AP50") == len(lines)  # rank 0 alone prints

    for k, line in enumerate(lines):
        two = json.loads((tmp_path / f"{k}.json").read_text())
        call(f"{line}alone.json")
        assert two == json.loads((tmp_path / "alone.json").read_text())
        assert len(two) > 20


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("inclusive", [False, True])
def test_a_data_set_is_predicted_as_its_images_are(mixed, inclusive, tta):
    """In inclusive boxes, too, whose last pixel is one of the original image."""
    dataset, model = evaluate.CocoDataset(*mixed), tiny_model()
    model.set_convention(inclusive=inclusive)
    results = evaluate.predict(model, dataset, 1, 0, tta=tta)
    found = model.predict([dataset.path(i) for i in range(len(dataset))], tta=tta)
    boxes = torch.tensor([result["bbox"] for result in results])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, torch.cat([one["boxes"] for one in found]))
    scores = torch.tensor([result["score"] for result in results])
    torch.testing.assert_close(scores, torch.cat([one["scores"] for one in found]))


@pytest.mark.parametrize("more", ["", "--tta"])
def test_saved_results_score_as_the_prediction_did(tmp_path, mixed, model_file, capsys, more):
    annotations, folder = map(str, mixed)
    saved = str(tmp_path / "results.json")
    here = f"{model_file} --annotations {annotations} --image-dir {folder}"
    call(f"{here} --workers 0 --device cpu --save-json {saved} --per-class {more}")
    first = capsys.readouterr().out
    dataset, model = evaluate.CocoDataset(*mixed), fcos.load(model_file)
    rows = evaluate.predict(model, dataset, 1, 0, tta=bool(more))
    assert json.loads(Path(saved).read_text()) == rows
    assert rows != evaluate.predict(model, dataset, 1, 0, tta=not more)
    call(f"--results {saved} --annotations {annotations} --per-class")
    assert capsys.readouterr().out == first
    names = [line.split()[0] for line in first.splitlines()]
    of_class = [
        f"{name}/{c}" for c in ("three", "seven", "ninety") for name in ("AP", "F1", "threshold")
    ]
    assert names == [*evaluate.METRICS, "F1", "threshold", *of_class]
    row = json.loads(Path(saved).read_text())[0]
    assert row.keys() == {"image_id", "category_id", "bbox", "score"}
    assert row["category_id"] in (3, 7, 90)
    pycocotools_says(json.loads(Path(saved).read_text()), annotations)  # loadRes takes the file


def test_categories_that_differ_from_the_models_are_named(tmp_path, mixed):
    dataset = evaluate.CocoDataset(*mixed)
    evaluate.check_classes(tiny_model(), dataset)
    evaluate.check_classes(tiny_model(ids=(1, 2, 3)), dataset)  # ids are the data set's affair
    for classes in (("three", "eight", "ninety"), ("three",), ("three", "seven", "ninety", "more")):
        other = tiny_model(len(classes), classes)
        with pytest.raises(UserError, match="seven.*eight|eight.*seven|None|'more'"):
            evaluate.check_classes(other, dataset)


def test_a_model_without_class_names_needs_as_many_categories_in_the_order_of_ids(tmp_path, mixed):
    model = tiny_model()
    model.classes = None
    path = tmp_path / "sorted.json"
    path.write_text(mixed[0].read_text())
    edit(path, categories=lambda rows: sorted(rows, key=lambda row: row["id"]))
    evaluate.check_classes(model, evaluate.CocoDataset(path, mixed[1]))
    with pytest.raises(UserError, match="categories are not sorted by id"):
        evaluate.check_classes(model, evaluate.CocoDataset(*mixed))
    model.num_classes = 4
    with pytest.raises(UserError, match="expected the 4 classes of the model, found 3"):
        evaluate.check_classes(model, evaluate.CocoDataset(*mixed))


# ---- data as exported --------------------------------------------------------------------------


def test_the_layouts_of_coco_of_roboflow_and_of_one_folder_are_known(tmp_path):
    for name, annotations, images in (
        ("coco", "annotations/instances_val2017.json", "val2017"),
        ("roboflow", "valid/_annotations.coco.json", "valid"),
        ("split", "annotations_val.json", "images"),
        ("plain", "annotations.json", "images"),
        ("cvat", "annotations/instances_default.json", "images"),
    ):
        (tmp_path / name / annotations).parent.mkdir(parents=True)
        (tmp_path / name / annotations).write_text("{}")
        found = evaluate.coco_paths(tmp_path / name, "val2017")
        assert found == (tmp_path / name / annotations, tmp_path / name / images)
    nothing = evaluate.coco_paths(tmp_path / "none", "train2017")
    assert nothing[0] == tmp_path / "none" / "annotations" / "instances_train2017.json"
    looked_for = r"instances_train2017.json, .*labels/train, .*; .* holds annotations"
    with pytest.raises(UserError, match=looked_for):
        evaluate.coco_paths(tmp_path / "coco", "train2017")


def write_labels(root, kind, path, folder):
    """Write a COCO JSON as the labels of another tool, with its images, for the split val2017."""
    from hotcoco import COCO

    coco = COCO(str(path))
    images, labels = {
        "YOLO by split": ("images/val", "labels/val"),
        "YOLO by part": ("valid/images", "valid/labels"),
        "flat YOLO": ("images", "labels"),
        "VOC": ("JPEGImages", "Annotations"),
        "VOC with lists": ("JPEGImages", "Annotations"),
        "Roboflow's VOC": ("valid", "valid"),
        "CVAT": ("images", ""),
    }[kind]
    shutil.copytree(folder, root / images)
    if "YOLO" in kind:
        coco.to_yolo(str(root / labels))
        (root / labels / "data.yaml").rename(root / "data.yaml")
    elif kind == "CVAT":
        coco.to_cvat(str(root / "annotations.xml"))
    else:
        coco.to_voc(str(root / "voc"))
        shutil.copytree(root / "voc" / "Annotations", root / labels, dirs_exist_ok=True)
        shutil.rmtree(root / "voc")
    if kind == "VOC with lists":
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "val.txt").write_text("1\n2 1\n")


@pytest.mark.parametrize(
    "kind",
    "YOLO by split,YOLO by part,flat YOLO,VOC,VOC with lists,Roboflow's VOC,CVAT".split(","),
)
def test_labels_of_other_tools_are_read_directly(tmp_path, kind):
    pytest.importorskip("hotcoco")
    boxes = [box(1, 1, [4, 6, 20, 10], 90), box(2, 2, [8, 4, 16, 30])]
    sizes = {1: (60, 40), 2: (40, 60), 3: (32, 32)}
    path, folder = write_coco(tmp_path / "coco", sizes, boxes)
    data = tmp_path / "data"
    write_labels(data, kind, path, folder)
    if "YOLO" in kind:  # an image without labels is background
        next(data.glob("**/3.txt")).unlink()
    before = sorted(data.rglob("*"))
    found = evaluate.CocoDataset(*evaluate.coco_paths(data, "val2017"))
    assert sorted(data.rglob("*")) == before
    assert found.notes[0] == "read as " + (
        "YOLO labels"
        if "YOLO" in kind
        else "CVAT's XML"
        if kind == "CVAT"
        else "labels of Pascal VOC"
    )
    truth = evaluate.CocoDataset(path, folder)
    images = {found.path(i).name: i for i in range(len(found))}
    assert len(found) == 2 if kind == "VOC with lists" else 3
    for i, name in enumerate(("1.png", "2.png")):
        boxes, labels = found.target(images[name])
        torch.testing.assert_close(boxes, truth.target(i)[0], atol=1.01, rtol=0)
        assert found.classes[labels[0]] == truth.classes[truth.target(i)[1][0]]
        assert found.image(images[name]).equal(truth.image(i))
    assert evaluate.score([], found.annotations)["AP"] == 0


def test_rotated_boxes_of_cvat_are_counted(tmp_path):
    pytest.importorskip("hotcoco")
    path, folder = write_coco(tmp_path / "coco", {1: (60, 40)}, [box(1, 1, [4, 6, 20, 10], 90)])
    write_labels(tmp_path / "data", "CVAT", path, folder)
    xml = tmp_path / "data" / "annotations.xml"
    xml.write_text(xml.read_text().replace("<box ", '<box rotation="30.0" '))
    found = evaluate.CocoDataset(*evaluate.coco_paths(tmp_path / "data", "val2017"))
    assert "1 boxes are rotated; the rotation is ignored" in found.notes


YAMLS = {
    "a list": "names:\n- a\n- b\n\ntrain: x\n",
    "an indented list": "train: x\nnames:\n  - a\n  - 'b'\nnc: 2",
    "a mapping": "names:\n  0: a\n  1: b\n",
    "a flow": "nc: 2\nnames: ['a', \"b\"]\n",
}


@pytest.mark.parametrize("yaml", YAMLS.values(), ids=YAMLS)
def test_names_of_yolo_are_read_in_all_their_forms(tmp_path, yaml):
    pytest.importorskip("hotcoco")
    _, folder = write_coco(tmp_path, {1: (20, 10)}, [])
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "1.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    (labels / "gone.txt").write_text("1 0.5 0.5 0.2 0.4\n")  # its image is not there
    (tmp_path / "data.yaml").write_text(yaml)
    dataset = evaluate.CocoDataset(labels, folder)
    assert dataset.classes == ["a", "b"] and dataset.boxes.tolist() == [[8, 3, 12, 7]]


def test_labels_of_yolo_refer_to_photos_as_exif_turns_them(tmp_path):
    pytest.importorskip("hotcoco")
    folder = tmp_path / "images"
    folder.mkdir()
    rotated_png(folder / "1.png", 30, 20, 6)
    (tmp_path / "1.txt").write_text("0 0.5 0.25 0.5 0.1\n")
    (tmp_path / "data.yaml").write_text("names: [a]")
    dataset = evaluate.CocoDataset(tmp_path, folder)
    assert dataset.image(0).shape == (3, 30, 20)
    np.testing.assert_allclose(dataset.boxes, [[5, 6, 15, 9]])


BAD_LABELS = {
    "no data.yaml": ("data.yaml", None, "No such file .*data.yaml"),
    "no names": ("data.yaml", "nc: 1", "names"),
    "a class too many": ("labels/1.txt", "7 .5 .5 .1 .1", "1.txt: expected a class below 1"),
    "an infinite class": ("labels/1.txt", "inf .5 .5 .1 .1", "expected a class"),
    "a polygon": ("labels/1.txt", "0 .1 .1 .5 .1 .5 .5 .1 .5", "below 1 and 4 numbers"),
    "no image": ("images/1.png", None, "no box belongs to an image in"),
}


@pytest.mark.parametrize("file, text, names", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_cannot_be_read_are_one_error(tmp_path, file, text, names):
    pytest.importorskip("hotcoco")
    write_coco(tmp_path, {1: (20, 10)}, [])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (tmp_path / "data.yaml").write_text("names: [a]")
    (tmp_path / file).unlink()
    if text:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=names) as error:
        evaluate.CocoDataset(tmp_path / "labels", tmp_path / "images")
    assert str(error.value).isprintable()


def test_labels_without_hotcoco_name_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    (tmp_path / "1.xml").touch()
    with pytest.raises(UserError, match="requirements.txt .*hotcoco"):
        evaluate.CocoDataset(tmp_path, tmp_path)


def test_a_category_that_only_names_others_is_no_class(tmp_path):
    """The first that Roboflow exports: no box has it, and it is the supercategory of all others."""
    categories = [
        dict(id=0, name="cells", supercategory="none"),
        dict(id=1, name="red", supercategory="cells"),
        dict(id=2, name="rare", supercategory="cells"),
        dict(id=3, name="person", supercategory="person"),
    ]
    path, folder = write_coco(tmp_path, {1: (60, 40)}, [box(1, 1, [4, 6, 20, 10], 1)], categories)
    dataset = evaluate.CocoDataset(path, folder)
    assert dataset.classes == ["red", "rare", "person"] and dataset.category_ids == [1, 2, 3]
    assert dataset.target(0)[1].tolist() == [0]
    (note,) = dataset.notes
    assert note == "ignored categories (not a class, no boxes): ['cells']"
    used = [box(1, 1, [4, 6, 20, 10], 1), box(2, 1, [4, 6, 20, 10], 0)]
    path, folder = write_coco(tmp_path, {1: (60, 40)}, used, categories)
    assert evaluate.CocoDataset(path, folder).classes[0] == "cells"


# ---- F1 ----------------------------------------------------------------------------------------


def slow_f1(results, truth, threshold, label=None):
    """F1 at an IoU of 0.5, by greedy matching in the order of the scores, one image at a time."""
    right = found = total = 0
    for image_id in {row["image_id"] for row in truth}:
        objects = [
            row
            for row in truth
            if row["image_id"] == image_id and label in (None, row["category_id"])
        ]
        total, taken = total + len(objects), set()
        rows = [
            row
            for row in results
            if row["image_id"] == image_id
            and row["score"] >= threshold
            and label in (None, row["category_id"])
        ]
        for row in sorted(rows, key=lambda row: -row["score"]):
            x, y, w, h = row["bbox"]
            overlaps = {}
            for k, other in enumerate(objects):
                a, b, c, d = other["bbox"]
                inter = max(0, min(x + w, a + c) - max(x, a)) * max(
                    0, min(y + h, b + d) - max(y, b)
                )
                if k not in taken and other["category_id"] == row["category_id"]:
                    overlaps[k] = inter / (w * h + c * d - inter)
            best = max(overlaps, key=overlaps.get, default=None)
            found += 1
            if best is not None and overlaps[best] >= 0.5:
                taken.add(best)
                right += 1
    return 2 * right / (found + total)


@pytest.mark.parametrize("digits", [17, 1])  # with one digit many scores tie
def test_the_best_f1_and_its_threshold_are_those_of_a_slow_count(tmp_path, scorer, digits):
    rng, annotations = np.random.default_rng(0), []
    for image in (1, 2, 3, 4):
        for _ in range(6):
            (x, y), (w, h) = rng.uniform(0, 60, 2), rng.uniform(10, 30, 2)
            category = int(rng.choice([3, 7]))
            annotations.append(box(len(annotations) + 1, image, [x, y, w, h], category))
    path, _ = write_coco(tmp_path, dict.fromkeys((1, 2, 3, 4), (96, 96)), annotations)
    results = []
    for row in annotations:
        x, y, w, h = row["bbox"]
        (dx, dy), label = rng.normal(0, 3, 2), int(rng.choice([3, 3, 7]))
        score, bbox = round(rng.uniform(0, 1), digits), [x + dx, y + dy, w, h]
        results.append(detection(row["image_id"], bbox, label, score))
    metrics = evaluate.score(results, path, per_class=True)
    for name, label in ("", None), ("/three", 3), ("/seven", 7):
        f1, threshold = metrics[f"F1{name}"], metrics[f"threshold{name}"]
        assert f1 == pytest.approx(slow_f1(results, annotations, threshold, label))
        every = [slow_f1(results, annotations, row["score"], label) for row in results]
        assert f1 == pytest.approx(max(every)) and f1 > 0
    assert metrics["F1/ninety"] == metrics["threshold/ninety"] == -1  # there is none
    nothing = evaluate.score([], path, per_class=True)
    assert nothing["F1"] == -1 and nothing["AP/three"] == 0


# ---- drawing -----------------------------------------------------------------------------------


def detections(*rows):
    boxes, scores, labels = zip(*rows)
    return dict(boxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))


def changed(before, after, box, margin=3):
    """Whether any pixel within `margin` of the outline of box (xyxy) differs, side by side."""
    different = (np.asarray(before) != np.asarray(after)).any(2)
    x1, y1, x2, y2 = (round(value) for value in box)
    sides = (
        different[y1 : y2 + 1, max(x1 - margin, 0) : x1 + margin],
        different[y1 : y2 + 1, x2 - margin : x2 + margin],
        different[y2 - margin : y2 + margin, x1 : x2 + 1],
    )
    return [side.any() for side in sides]


def test_boxes_over_the_threshold_are_drawn_where_they_are():
    grey = Image.new("RGB", (600, 500), (128, 128, 128))
    high, low = [100.0, 100.0, 200.0, 300.0], [350.0, 100.0, 500.0, 300.0]
    picture = evaluate.draw(grey, detections((high, 0.9, 0), (low, 0.3, 1)))
    assert picture.size == grey.size
    assert all(changed(grey, picture, high)) and not any(changed(grey, picture, low))
    inside = np.asarray(picture)[120:280, 120:180]
    assert (inside == 128).all()  # an outline, not a filled box
    both = evaluate.draw(grey, detections((high, 0.9, 0), (low, 0.3, 1)), score_threshold=0.2)
    assert all(changed(grey, both, low))
    assert grey.getpixel((100, 150)) == (128, 128, 128)  # the argument is as it was


def test_class_names_are_written_and_classes_have_colours():
    grey = Image.new("RGB", (600, 500), (128, 128, 128))
    row = [100.0, 100.0, 200.0, 300.0]
    pictures = [
        evaluate.draw(grey, detections((row, 0.9, label)), classes).tobytes()
        for label, classes in [
            (0, None),
            (0, ["cat", "dog"]),
            (1, ["cat", "dog"]),
            (1, ["cat", "cat"]),
        ]
    ]
    assert len(set(pictures)) == 4


def test_the_label_of_the_best_is_not_covered():
    grey = Image.new("RGB", (600, 500), (128, 128, 128))
    row = [100.0, 100.0, 400.0, 300.0]
    alone = evaluate.draw(grey, detections((row, 0.9, 0)), ["cat"])
    three = detections((row, 0.9, 0), (row, 0.8, 1), (row, 0.7, 2))
    picture = evaluate.draw(grey, three, ["cat", "dog", "cow"])
    label = (100, 86, 140, 98)
    assert picture.crop(label).tobytes() == alone.crop(label).tobytes()
    assert alone.crop(label).tobytes() != grey.crop(label).tobytes()


@pytest.mark.parametrize("corner", [(100, 0), (100, 100), (560, 290), (0, 290)])
@pytest.mark.parametrize("side, count", [(12, 3), (200, 4)])
def test_labels_of_one_box_do_not_cover_each_other(corner, side, count):
    x, y = corner
    labels = []
    for _ in range(count):
        left, top = evaluate.place_label((x, y, x + side, y + side), (60, 16), (600, 500), labels)
        assert 0 <= left <= 540 and 0 <= top <= 484  # inside the picture
        labels.append((left, top, left + 60, top + 16))
    tops = sorted(label[1] for label in labels)
    assert all(after - before >= 16 for before, after in zip(tops, tops[1:]))


@pytest.mark.parametrize("ground", [*evaluate.COLORS, "white", "black"])
def test_boxes_show_on_every_background(ground):
    plain = Image.new("RGB", (600, 500), ground)
    row = [100.0, 100.0, 200.0, 300.0]
    assert all(changed(plain, evaluate.draw(plain, detections((row, 0.9, 0))), row))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_can_be_drawn_on(mode):
    picture = evaluate.draw(Image.new(mode, (500, 480)), detections(([9.0, 9, 99, 99], 0.9, 0)))
    assert picture.mode == "RGB" and picture.size == (500, 480)


def test_nothing_found_draws_nothing():
    grey = Image.new("RGB", (600, 500), (128, 128, 128))
    nothing = dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long())
    assert evaluate.draw(grey, nothing).tobytes() == grey.tobytes()


def test_small_images_are_enlarged_with_their_boxes_and_long_ones_within_reason():
    small = Image.new("RGB", (60, 40))
    picture = evaluate.draw(small, detections(([10.0, 5, 50, 35], 0.9, 0)))
    assert picture.size == (720, 480)
    assert all(changed(small.resize(picture.size), picture, [120, 60, 600, 420], 8))
    ribbon = evaluate.draw(Image.new("RGB", (2000, 2)), detections(([1.0, 0, 3, 2], 0.9, 0)))
    assert ribbon.width * ribbon.height < 50e6


def test_boxes_at_the_border_and_of_no_size_are_drawn():
    grey = Image.new("RGB", (500, 500), (128, 128, 128))
    rows = [([0.0, 0, 500, 500], 0.9, 0), ([499.5, 499.5, 500, 500], 0.8, 1), ([7.0] * 4, 0.7, 2)]
    evaluate.draw(grey, detections(*rows), ["a name that is far too long " * 5, "b", "c"])


def photo(path, size=(50, 40), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_draw_folder_writes_pictures_and_their_detections(tmp_path):
    for name in ("a/x.png", "b/x.jpg", "c.PNG", "d/x_2.png"):
        photo(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "a" / "deeper").mkdir()
    out, model = tmp_path / "new" / "drawn", tiny_model()
    unreadable = evaluate.draw_folder(
        model, [tmp_path / name for name in ("a", "b/x.jpg", "d", "c.PNG")], out, 0.4
    )
    assert unreadable == []
    report = json.loads((out / "detections.json").read_text())
    assert [Path(row["file"]).relative_to(tmp_path).as_posix() for row in report] == [
        "a/x.png",
        "b/x.jpg",
        "d/x_2.png",
        "c.PNG",
    ]
    drawn = [row["drawn"] for row in report]
    assert drawn == ["x.jpg", "x_2.jpg", "x_2_2.jpg", "c.jpg"]  # photos of one name
    assert sorted(path.name for path in out.iterdir()) == sorted([*drawn, "detections.json"])
    assert all((row["height"], row["width"]) == (40, 50) for row in report)
    expected = model.predict(tmp_path / "c.PNG")[0]
    rows = report[-1]["detections"]
    assert len(rows) == (expected["scores"] >= 0.4).sum() > 0
    x1, y1, x2, y2 = expected["boxes"][0].tolist()
    assert rows[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])
    assert rows[0]["class"] == model.classes[expected["labels"][0]]
    assert rows[0]["category_id"] == model.category_ids[expected["labels"][0]]
    assert all(row["score"] >= 0.4 for row in rows)


def test_pictures_that_fail_are_named_left_out_and_fail_the_command(tmp_path, capsys):
    """Odd names of files and classes, and broken files, do not end the drawing of the others."""
    model = tiny_model()
    model.classes = ["a\nAP 0.999\x1b[2J", "long" * 10**6, "c"]
    fcos.save(model, tmp_path / "model.pt")
    for name in ("good.png", "n" * 249 + ".tiff", "\x1b[2J\nz.png"):
        photo(tmp_path / "in" / name)
    torn = photo(tmp_path / "in" / "torn.png").read_bytes()
    (tmp_path / "in" / "torn.png").write_bytes(torn[: len(torn) // 2])
    (tmp_path / "in" / "bad\x1b[31m.jpg").write_bytes(b"junk")
    photo(tmp_path / "in" / "too wide for a JPEG.png", (70_000, 1))
    argv = "--images", tmp_path / "in", "--out", tmp_path / "out", "--score-threshold", 0.4
    code, lines = command(capsys, tmp_path / "model.pt", *argv)
    assert code == 2 and all(line.isprintable() and len(line) < 600 for line in lines)
    for name in (r"bad\x1b[31m.jpg", "torn.png", "too wide for a JPEG.png"):
        assert len([line for line in lines if name in line and "left out" in line]) == 1
    assert "3 images" in lines[-2] and "3 left out" in lines[-2] and lines[-1].endswith(": 3")
    report = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {row["drawn"] for row in report} == {
        "good.jpg",
        "n" * 249 + ".jpg",
        "\x1b[2J\nz.jpg",
    }


def test_all_that_pillow_reads_is_drawn_from_a_folder_and_the_rest_counted(tmp_path, capsys):
    names = ("a.jfif", "b.jpe", "c.ppm", "d.JPEG", "deep/e.webp", "f.gif", "g.tif")
    for name in names:
        photo(tmp_path / name)
    for name in ("notes.txt", "deep/labels.json", "drawing.svg"):
        (tmp_path / name).write_text("{}")
    found = evaluate.find_pictures([tmp_path])
    assert sorted(path.relative_to(tmp_path).as_posix() for path in found) == sorted(names)
    assert capsys.readouterr().err == "skipped 3 files that are not images\n"


DRAWING = """
import argparse, sys, time
import evaluate, fcos
model, images, out, what = sys.argv[1:]
draw = evaluate.draw
def hold(*args):
    print("drawing", flush=True)
    if what == "bug":
        raise TypeError("a bug of mine")
    time.sleep(60)
evaluate.draw = hold
args = [model, "--images", images, "--out", out, "--workers", "1", "--device", "cpu"]
evaluate.run(evaluate.main, evaluate.parse_args(args))
"""


def test_one_drawing_at_a_time_and_a_killed_one_leaves_nothing(tmp_path, model_file, capsys):
    for k in range(3):
        photo(tmp_path / "in" / f"{k}.png")
    (tmp_path / "drawing.py").write_text(DRAWING)
    argv = [model_file, tmp_path / "in", tmp_path / "out"]
    start = [sys.executable, tmp_path / "drawing.py", *argv]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    with subprocess.Popen([*start, "hold"], env=env, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        (tmp_path / "out" / ".fcos-0.tmp").touch()  # of the drawing
        again = ("--images", tmp_path / "in", "--out", tmp_path / "out", "--workers", 0)
        code, lines = command(capsys, model_file, *again, "--device", "cpu")
        assert code == 2 and re.search("out: another process writes there", lines[-1])
        first.kill()
    call(f"{model_file} --images {tmp_path}/in --out {tmp_path}/out --workers 0 --device cpu")
    names = ["0.jpg", "1.jpg", "2.jpg", "detections.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names

    done = subprocess.run([*start, "bug"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "a bug of mine" in done.stderr  # pipes: no worker holds them


def test_folders_are_searched_to_their_end_and_patterns_are_expanded(tmp_path):
    names = ("a/x.png", "a/b/c/y.JPG", "z.png")
    for name in names:
        photo(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    found = evaluate.find_pictures([tmp_path / "a", f"{tmp_path}/*.png", f"{tmp_path}/**/y.*"])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "a/b/c/y.JPG",
        "a/x.png",
        "z.png",
        "a/b/c/y.JPG",
    ]
    with pytest.raises(UserError, match="no such image"):
        evaluate.find_pictures([f"{tmp_path}/*.gif"])


@pytest.mark.parametrize("workers", [0, 1])
def test_of_many_pictures_exactly_the_broken_ones_are_left_out(tmp_path, capsys, workers):
    paths = [photo(tmp_path / f"in/{i % 3}/{i}.png", value=i) for i in range(12)]
    for path in paths[::4]:
        path.write_bytes(b"junk")
    left_out = evaluate.draw_folder(
        tiny_model(), [tmp_path / "in"], tmp_path / "out", workers=workers
    )
    assert sorted(left_out) == sorted(paths[::4])
    assert re.search("9 images, [0-9]+ boxes drawn, 3 left out", capsys.readouterr().err)
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 9


def test_a_drawing_never_follows_a_link(tmp_path):
    precious = photo(tmp_path / "precious.jpg")
    before = precious.read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.jpg").symlink_to(precious)
    evaluate.draw_folder(tiny_model(), [photo(tmp_path / "in" / "x.png")], tmp_path / "out")
    assert precious.read_bytes() == before and not (tmp_path / "out" / "x.jpg").is_symlink()


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_the_pictures_are_never_replaced(tmp_path, through):
    before = photo(tmp_path / "in" / "x.jpg").read_bytes()
    out = tmp_path / "in"
    if through == "a link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "in")
    with pytest.raises(UserError, match="would replace"):
        evaluate.draw_folder(tiny_model(), [tmp_path / "in" / "x.jpg"], out)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["x.jpg"]
    assert (tmp_path / "in" / "x.jpg").read_bytes() == before


# ---- command line ------------------------------------------------------------------------------


def command(capsys, *argv):
    """-> exit code and lines on stderr of a call of the script, without tqdm's bars."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.run(evaluate.main, evaluate.parse_args([*map(str, argv)]))
    err = capsys.readouterr().err.replace("\r", "\n")
    return stop.value.code, [line for line in err.splitlines() if line.strip() and "%|" not in line]


MISTAKES = {
    "nothing": ("", "model"),
    "no data": ("{model}", "--data"),
    "no such model": ("{tmp}/none.pt --data {tmp}", "none.pt"),
    "a model of junk": ("{tmp}/junk.pt --data {tmp}", "junk.pt"),
    "no such data": ("{model} --data {tmp}/nowhere", "nowhere"),
    "no such annotations": ("{model} --annotations {tmp}/none.json --image-dir {dir}", "none.json"),
    "no such images": ("{model} --annotations {json} --image-dir {tmp}/none", "none"),
    "annotations without images": ("{model} --annotations {json}", "--image-dir"),
    "no such picture": ("{model} --images {tmp}/none.jpg --out {tmp}/out", "none.jpg"),
    "a folder without pictures": ("{model} --images {tmp}/empty --out {tmp}/out", "empty"),
    "no out": ("{model} --images {dir}", "--out"),
    "out is a file": ("{model} --images {dir} --out {json}", "instances.json"),
    "results alone": ("--results {json}", "--annotations"),
    "no such results": ("--results {tmp}/none.json --annotations {json}", "none.json"),
    "results that are none": ("--results {json} --annotations {json}", "list"),
    "results against no COCO": (
        "--results {tmp}/list.json --annotations {tmp}/list.json",
        "list.json",
    ),
    "unknown model name": ("{tmp}/state.pt --model fcos_R_51 --data {tmp}", "fcos_R_51"),
    "another model's name": ("{model} --model fcos_R_50_FPN --data {tmp}", "fcos_R_50_FPN"),
    "a foreign file without name": ("{tmp}/state.pt --data {tmp}", "pass one of"),
    "other categories": (
        "{model} --annotations {tmp}/other/instances.json --image-dir {dir}",
        "eight",
    ),
    "a broken image, read here": (
        "{model} --annotations {tmp}/torn/instances.json --image-dir {tmp}/torn/images --workers 0",
        "1.png",
    ),
    "a broken image, read by a worker": (
        "{model} --annotations {tmp}/torn/instances.json --image-dir {tmp}/torn/images --workers 1",
        "1.png",
    ),
    "nowhere to save": ("{here} --workers 0 --save-json {tmp}/none/results.json", "results.json"),
    "an input to save over": ("{here} --workers 0 --save-json {json}", "input of this run"),
    "pictures to save": (
        "{model} --images {dir} --out {tmp}/o --save-json {tmp}/r.json",
        "needs --data",
    ),
    "out without pictures": ("{here} --out {tmp}/o", "--images"),
    "two things to do": ("{here} --images {dir} --out {tmp}/o", "choose one of"),
    "a threshold of NaN": ("{model} --images {dir} --out {tmp}/o --score-threshold nan", "nan"),
    "a pipe as model": ("{tmp}/pipe --data {tmp}", "pipe"),
    "a pipe as results": ("--results {tmp}/pipe --annotations {json}", "pipe"),
    "a pipe as a picture": ("{model} --images {tmp}/pipe --out {tmp}/o", "could not be read"),
    "annotations of no image": (
        "{model} --annotations {tmp}/alien.json --image-dir {dir}",
        "no annotation belongs to an image",
    ),
    "export into nowhere": ("{model} --export {tmp}/none/m.onnx", "m.onnx"),
    "a keyword of training": ("{model} --data {tmp} --set radius=0", "max_detections"),
    "tiles of nothing": ("{model} --export m.onnx --tile 64", "--tile needs"),
    "no GPU": ("{model} --data {tmp} --device cuda", "--device cpu"),
    "unknown flag": ("{here} --min-siz 5", "--min-siz"),
    "no number": ("{here} --batch-size many", "--batch-size"),
    "batch of none": ("{here} --batch-size 0", "--batch-size"),
    "size of none": ("{here} --min-size 0", "--min-size"),
    "negative size": ("{here} --max-size -1", "--max-size"),
    "negative workers": ("{here} --workers -1", "--workers"),
    "no such device": ("{here} --device tpu", "--device"),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, mixed, model_file):
    """The places that MISTAKES speaks of."""
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "empty").mkdir()
    (tmp / "junk.pt").write_bytes(b"junk")
    (tmp / "list.json").write_text("[]")
    torch.save({"rpn.head.cls_logits.weight": torch.zeros(3, 1, 1, 1)}, tmp / "state.pt")
    os.mkfifo(tmp / "pipe")
    alien = json.loads(mixed[0].read_text())
    for row in alien["annotations"]:
        row["image_id"] = f"image {row['image_id']}"
    (tmp / "alien.json").write_text(json.dumps(alien))
    other = [category | dict(name="eight") for category in CATEGORIES[:1]] + CATEGORIES[1:]
    path, _ = write_coco(tmp / "other", {0: (64, 64)}, [], other)
    _, folder = write_coco(tmp / "torn", {1: (64, 64)}, [])
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    here = f"{model_file} --annotations {mixed[0]} --image-dir {mixed[1]}"
    return dict(tmp=tmp, model=model_file, json=mixed[0], dir=mixed[1], here=here)


@pytest.mark.parametrize("line, name", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(
    mistakes, monkeypatch, capsys, line, name
):
    if "--device cuda" in line and torch.cuda.is_available():
        pytest.skip("has a GPU")
    if "--save-json" in line:
        monkeypatch.setattr(evaluate, "predict", lambda *_: pytest.fail("hours of work, lost"))
    argv = line.format(**mistakes).split()
    if "--device" not in argv:
        argv += ["--device", "cpu"]
    code, lines = command(capsys, *argv)
    assert code == 2
    picture = "picture" in name or "read" in name  # told one by one, and then counted
    assert len(lines) == 1 or picture and name in lines[-1], lines
    assert name in lines[-1]


def test_the_script_itself_ends_a_mistake_with_one_line(mistakes):
    argv = [sys.executable, ROOT / "evaluate.py", mistakes["tmp"] / "none.pt", "--data", "nowhere"]
    done = subprocess.run(argv, timeout=240, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("evaluate.py: ") and done.stderr.count("\n") == 1


def test_a_folder_is_drawn_from_the_command_line(mistakes, tmp_path):
    line = "{model} --images {dir} --out ".format(**mistakes)
    call(f"{line} {tmp_path} --score-threshold 0.4 --device cpu")
    assert len(list(tmp_path.glob("*.jpg"))) == 7
    for row in json.loads((tmp_path / "detections.json").read_text()):
        assert row["detections"] and min(found["score"] for found in row["detections"]) >= 0.4
