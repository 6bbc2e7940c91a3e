"""Annotations: reading a COCO JSON, errors in one, and the choice of classes."""

import importlib
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from coco_files import box, edit, first_row, perfect_results, read_coco, write_coco
from conftest import assert_refused

import evaluate
import fcos
from fcos import UserError

ROOT = Path(__file__).resolve().parents[1]


# ---- boxes and images ----------------------------------------------------------------------------


def test_a_data_set_is_flat_arrays_in_the_order_of_ids(tmp_path):
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
    assert dataset.classes == ["three", "seven", "ninety"]
    assert dataset.category_ids == [3, 7, 90]
    assert dataset.offsets.tolist() == [0, 1, 1, 3]
    assert dataset.boxes.dtype == np.float32
    assert dataset.boxes.tolist() == [[0, 0, 5, 6], [1.5, 2, 11.5, 22], [3, 4, 8, 10.25]]
    assert dataset.labels.tolist() == [0, 2, 1]
    assert dataset.trainable.tolist() == [True, False, True]
    (note,) = dataset.notes
    assert note.startswith("1 of 4 boxes are crowds and not targets, such as annotations[3], [0.0,")
    boxes, labels = dataset.target(1)
    assert boxes.shape == (0, 4)
    assert boxes.dtype == torch.float32
    assert labels.shape == (0,)
    assert labels.dtype == torch.int64
    assert dataset.target(2)[0].tolist() == [[1.5, 2, 11.5, 22], [3, 4, 8, 10.25]]
    assert len(dataset) == 3
    assert dataset.path(2) == tmp_path / "images" / "9.png"
    assert dataset.image(2).shape == (3, 40, 60)


def test_boxes_outside_are_clipped_or_left_out_and_counted(tmp_path, recwarn):
    dataset = read_coco(
        tmp_path,
        {1: (100, 50), 2: (40, 40)},
        [
            box(1, 1, [90, 40, 30, 30]),  # ends outside the image: clipped
            box(2, 1, [-5, -5, 20, 20]),  # starts outside: clipped
            box(3, 1, [99.7, 10, 0.8, 5]),  # less than a pixel outside: clipped without a note
            box(4, 1, [200, 10, 5, 5]),  # outside
            box(5, 1, [10, 10, 0, 5]),  # empty
            box(6, 1, [10, 10, 5, -5]),  # negative
            box(7, 1, [math.nan, 10, 5, 5]),
            box(8, 1, [10, 10, math.inf, 5]),
            box(9, 77, [10, 10, 5, 5]),  # its image is not listed
            box(10, 2, [10, 10, 1, 1]),  # valid, but too small for the official training filter
        ],
    )
    expected = [[90, 40, 100, 50], [0, 0, 15, 15], [99.7, 10, 100, 15], [10, 10, 11, 11]]
    np.testing.assert_allclose(dataset.boxes, expected, rtol=1e-6)
    assert dataset.offsets.tolist() == [0, 3, 4]
    assert dataset.trainable.tolist() == [True, False]
    unknown_image, without_area, clipped = dataset.notes
    assert unknown_image.startswith("1 of 10 boxes ")
    assert "annotations[8], [" in unknown_image
    assert without_area.startswith("5 of 10 boxes ")
    assert "annotations[3], [" in without_area
    assert clipped.startswith("2 of 10 boxes ")
    assert "annotations[0], [" in clipped
    assert not recwarn.list


def test_crowds_are_no_targets_but_keep_their_image_in_training(tmp_path):
    dataset = read_coco(
        tmp_path,
        {1: (20, 20), 2: (20, 20)},
        [box(1, 1, [2, 2, 9, 9], iscrowd=1), box(2, 2, [2, 2, 9, 1])],
    )
    assert len(dataset.boxes) == 1
    assert dataset.target(0)[0].shape == (0, 4)
    assert dataset.trainable.tolist() == [True, False]


def test_a_data_set_without_any_annotation_is_ordinary(tmp_path):
    dataset = read_coco(tmp_path, {1: (20, 20)}, [])
    assert len(dataset) == 1
    assert dataset.target(0)[0].shape == (0, 4)
    assert dataset.trainable.tolist() == [False]
    assert dataset.notes == []


def test_annotations_without_iscrowd_or_area_are_ordinary(tmp_path):
    row = dict(id=1, image_id=1, category_id=3, bbox=[1, 2, 3, 4])
    dataset = read_coco(tmp_path, {1: (20, 20)}, [row])
    assert dataset.boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize("missing", [("width", "height"), ("height",)])
def test_missing_sizes_are_read_from_the_files(tmp_path, missing):
    path, folder = write_coco(tmp_path, {1: (30, 20), 2: (25, 20)}, [box(1, 1, [1, 1, 5, 5])])

    def without_size(rows):
        first = {key: value for key, value in rows[0].items() if key not in missing}
        return [first, *rows[1:]]

    edit(path, images=without_size)
    assert evaluate.CocoDataset(path, folder).hw.tolist() == [[20, 30], [20, 25]]


# ---- odd and wrong values ------------------------------------------------------------------------


BAD_ROWS = {  # the list that is changed, the change, and a pattern of the message
    "no category": ("annotations", first_row(category_id=5), r"category_id 5 .*\[3, 7, 90\]"),
    "short bbox": ("annotations", first_row(bbox=[1, 2, 3]), r"\[0\].bbox.* 4, .*\[1, 2, 3\]"),
    "bbox with a word": ("annotations", first_row(bbox=["a", 2, 3, 4]), r"\[0\].bbox\[0\]: .*'a'"),
    "no bbox": ("annotations", first_row(bbox=None), r"\[0\].bbox: .*None"),
    "area as a word": ("annotations", first_row(area="large"), r"\[0\].area: .*'large'"),
    "empty area": ("annotations", first_row(area=""), r"\[0\].area: .*`float"),
    "iscrowd as a word": ("annotations", first_row(iscrowd="many"), r"\[0\].iscrowd: .*'many'"),
    "a number as annotation": ("annotations", lambda rows: [5], r"annotations\[0\]: .*, in 5"),
    "no image_id": ("annotations", lambda rows: [{"bbox": [1, 2, 3, 4]}], "image_id.*'bbox'"),
    "image_id a list": ("annotations", first_row(image_id=[1]), r"image_id.*\[1\]"),
    "an image twice": ("images", lambda rows: rows + rows[:1], "images: .* id 1 2 times"),
    "a category twice": ("categories", lambda rows: rows * 2, "categories: .* id 7 2 times"),
    "a category without a name": ("categories", lambda rows: [dict(id=3)], r"\[0\]: .*`name`"),
    "a category named null": ("categories", first_row(name=None), r"\[0\].name: .*null"),
    "a file name of 300 letters": ("images", first_row(file_name="a" * 300), "instances|lacks"),
    "no file name": ("images", first_row(file_name=None), r"\[0\].file_name: .*null"),
    "escape codes": ("images", first_row(file_name="\x1b[2J\n.png"), r"such as \\x1b\[2J\\n"),
    # scoring could not tell these ids apart
    "huge id": ("images", first_row(id=2**70), "images: .*whole numbers"),
    "ids of two kinds": ("images", first_row(id="1"), "images: .*whole numbers"),
    "fractional id": ("images", first_row(id=1.5), r"images\[0\].id: .*float"),
    "id of NaN": ("images", first_row(id=math.nan), r"images\[0\].id: .*float"),
    "no id": ("images", first_row(id=None), r"images\[0\].id: .*null"),
    "boolean id": ("images", first_row(id=True), r"images\[0\].id: .*bool"),
    "no category id": ("categories", first_row(id=None), r"categories\[0\].id: .*null"),
    "height 0": ("images", first_row(height=0), r"1\.png: .*pixels, found 0 "),
    "height -5": ("images", first_row(height=-5), r"1\.png: .*pixels, found -5 "),
    "height 20.5": ("images", first_row(height=20.5), r"1\.png: .*pixels, found 20.5 "),
    "height as a word": ("images", first_row(height="tall"), r"images\[0\].height: .*1\.png"),
}


@pytest.mark.parametrize("part, change, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, part, change, message):
    path, folder = write_coco(tmp_path, {1: (20, 20), 2: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    edit(path, **{part: change})
    with pytest.raises(UserError, match=message) as error:
        evaluate.CocoDataset(path, folder)
    assert str(error.value).isprintable()
    assert str(path) in str(error.value)


ODD_FIELDS = {  # the list whose first row is changed, and a change that does not alter its meaning
    "width 20.0": ("images", dict(width=20.0)),
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
def test_fields_of_an_odd_type_are_read_if_their_meaning_is_certain(tmp_path, part, changes):
    rows = [box(1, 1, [1, 1, 5, 5]), box(2, 2, [2, 2, 5, 5], iscrowd=1)]
    path, folder = write_coco(tmp_path, {1: (20, 20), 2: (20, 20)}, rows)
    plain = evaluate.CocoDataset(path, folder)
    edit(path, **{part: first_row(**changes)})
    odd = evaluate.CocoDataset(path, folder)
    assert_same_data(odd, plain)


def test_a_byte_order_mark_is_ignored(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    plain = evaluate.CocoDataset(path, folder)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_same_data(evaluate.CocoDataset(path, folder), plain)


def assert_same_data(found, expected):
    for name in ("image_ids", "hw", "boxes", "labels", "offsets", "trainable"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(found.annotations.areas, expected.annotations.areas)
    np.testing.assert_array_equal(found.annotations.crowds, expected.annotations.crowds)


def test_an_image_id_of_text_matches_a_number(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    edit(path, images=first_row(id="1"))
    dataset = evaluate.CocoDataset(path, folder)
    assert dataset.image_ids.tolist() == ["1"]
    assert len(dataset.boxes) == 1


def test_boxes_that_look_normalized_are_refused(tmp_path):
    rows = [box(1, 1, [0.1, 0.1, 0.5, 0.5]), box(2, 1, [0, 0, 1, 1])]
    path, folder = write_coco(tmp_path, {1: (20, 20)}, rows)
    message = r"in pixels, found normalized ones, such as \[0.1, 0.1, 0.5, 0.5\]"
    with pytest.raises(UserError, match=message):
        evaluate.CocoDataset(path, folder)
    write_coco(tmp_path, {1: (20, 20)}, rows[1:])  # perhaps a box of one pixel
    assert len(evaluate.CocoDataset(path, folder).boxes) == 1


ONE_CATEGORY = [{"id": 1, "name": "a"}]
BAD_FILES = {  # the content of the file, and parts of the message
    "not JSON": (b"{", ["cannot be read as JSON"]),
    "not text": (b"\xff\xfe\x00\x80", ["cannot be read as JSON"]),
    "nothing": (b"", ["cannot be read as JSON"]),
    "a list": ([], ["expected COCO instances", "`array`"]),
    "captions": ({"images": [], "annotations": []}, ["COCO instances", "`categories`"]),
    "no images": (
        {"images": [], "annotations": [], "categories": ONE_CATEGORY},
        ["images: expected one or more"],
    ),
    "no categories": (
        {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [], "categories": []},
        ["categories: expected one or more"],
    ),
    "rows of numbers": (
        {"images": [1], "annotations": [], "categories": [2]},
        ["images[0]: Expected `object`, got `int`, in 1"],
    ),
    "no image_id": (
        {
            "images": [{"id": 1, "file_name": "1.png", "height": 5, "width": 5}],
            "annotations": [{"id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
            "categories": ONE_CATEGORY,
        },
        ["image_id"],
    ),
}


@pytest.mark.parametrize("content, parts", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_not_coco_is_named(tmp_path, content, parts):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [])
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert_refused(lambda: evaluate.CocoDataset(path, folder), path, *parts)


def test_a_broken_image_without_a_size_in_the_json_is_named(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [])
    (folder / "bad.png").write_bytes(b"not an image")
    edit(path, images=[dict(id=1, file_name="bad.png")])
    assert_refused(lambda: evaluate.CocoDataset(path, folder), "bad.png")


def test_an_infinite_area_counts_as_none(tmp_path):
    path, _ = write_coco(tmp_path, {1: (20, 20)}, [box(1, 1, [1, 1, 5, 4], area=0)])
    path.write_text(path.read_text().replace('"area": 0', '"area": 1e400'))
    assert evaluate.read_annotations(path).areas.tolist() == [20]


def test_a_hint_is_given_if_most_boxes_may_be_corners(tmp_path):
    corners = [box(k, 1, [10 + k, 10 + k, 35, 35]) for k in range(1, 5)]
    dataset = read_coco(tmp_path, {1: (40, 40)}, corners)
    assert any("found perhaps [x1, y1, x2, y2]" in note for note in dataset.notes)
    sound = [box(k, 1, [5 * k, 5 * k, 9, 9]) for k in range(1, 5)]
    assert read_coco(tmp_path, {1: (40, 40)}, sound).notes == []


class Ragged(evaluate.BoxEntry):
    point: list[float] = []


class Taken(evaluate.BoxEntry):
    sizes: float = 0


def test_fields_that_cannot_be_a_column_are_named(tmp_path, monkeypatch):
    rows = [box(1, 1, [1, 1, 5, 4], point=[1, 2]), box(2, 1, [1, 1, 5, 4], point=[1])]
    path, _ = write_coco(tmp_path, {1: (20, 20)}, rows)
    for entry, message in ((Ragged, "column point: expected numbers"), (Taken, "field sizes")):
        monkeypatch.setattr(evaluate, "BoxEntry", entry)
        instances = msgspec.defstruct(
            "Instances",
            [
                ("images", list[evaluate.ImageEntry]),
                ("annotations", list[entry]),
                ("categories", list[evaluate.CategoryEntry]),
            ],
        )
        monkeypatch.setattr(evaluate, "Instances", instances)
        assert_refused(lambda: evaluate.read_annotations(path), message)


# ---- classes -------------------------------------------------------------------------------------


def test_categories_of_the_same_name_get_their_id_as_a_suffix(tmp_path):
    categories = [dict(id=1, name="a"), dict(id=2, name="b"), dict(id=5, name="a")]
    rows = [box(1, 1, [1, 1, 5, 5], 5)]
    path, folder = write_coco(tmp_path, {1: (20, 20)}, rows, categories)
    dataset = evaluate.CocoDataset(path, folder)
    assert dataset.classes == ["a (1)", "b", "a (5)"]
    assert "share the name 'a'" in dataset.notes[0]
    metrics = evaluate.score(perfect_results(rows), path, per_class=True)
    assert metrics["AP/a (1)"] == -1
    assert metrics["AP/a (5)"] == pytest.approx(1)


def test_names_that_are_the_same_even_with_their_ids_are_refused(tmp_path):
    categories = [dict(id=1, name="a"), dict(id=2, name="a"), dict(id=3, name="a (1)")]
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [], categories)
    assert_refused(lambda: evaluate.CocoDataset(path, folder), "unique names")


CELLS = [
    dict(id=0, name="cells", supercategory="none"),
    dict(id=1, name="red", supercategory="cells"),
    dict(id=2, name="rare", supercategory="cells"),
]


def test_a_supercategory_without_boxes_is_no_class(tmp_path):
    """Roboflow exports the name of the data set as the first category."""
    categories = [*CELLS, dict(id=3, name="person", supercategory="person")]
    red = box(1, 1, [4, 6, 20, 10], 1)
    dataset = read_coco(tmp_path, {1: (60, 40)}, [red], categories)
    assert dataset.classes == ["red", "rare", "person"]
    assert dataset.category_ids == [1, 2, 3]
    assert dataset.target(0)[1].tolist() == [0]
    assert dataset.notes == ["ignored categories (not a class, no boxes): ['cells']"]
    cells = box(2, 1, [4, 6, 20, 10], 0)
    dataset = read_coco(tmp_path, {1: (60, 40)}, [red, cells], categories)
    assert dataset.classes == ["cells", "red", "rare", "person"]


@pytest.fixture
def validation(tmp_path):
    """Return the paths of a validation set, and the classes of a training set with "cells"."""
    rows = [box(k + 1, 1, [1, 1, 5, 5], k) for k in (0, 1, 2)]
    train = read_coco(tmp_path / "train", {1: (20, 20)}, rows, CELLS)
    assert train.classes == ["cells", "red", "rare"]
    return *write_coco(tmp_path / "val", {1: (20, 20)}, rows[1:], CELLS), train.classes


def test_classes_of_training_are_those_of_validation(validation):
    path, folder, classes = validation
    dataset = evaluate.CocoDataset(path, folder, classes)
    assert dataset.classes == classes
    assert dataset.labels.tolist() == [1, 2]
    assert not dataset.notes
    assert evaluate.CocoDataset(path, folder).classes == ["red", "rare"]


def test_classes_are_matched_by_name_and_may_lack_a_category(validation):
    path, folder, classes = validation
    rows = [box(2, 1, [1, 1, 5, 5], 1)]
    edit(path, categories=[CELLS[2] | dict(id=7), CELLS[1]], annotations=rows)
    dataset = evaluate.CocoDataset(path, folder, classes)
    assert dataset.category_ids == [None, 1, 7]
    assert dataset.labels.tolist() == [1]
    assert dataset.notes == ["classes without a category, not scored: ['cells']"]
    metrics = evaluate.score(perfect_results(rows), dataset.annotations)
    assert metrics["AP"] == pytest.approx(1)


def test_a_category_that_is_no_class_is_ignored_unless_it_has_boxes(validation):
    path, folder, classes = validation
    rows = [box(k + 1, 1, [1, 1, 5, 5], k) for k in (0, 1, 2)]
    new = box(4, 1, [1, 1, 9, 9], 9)
    edit(path, categories=[*CELLS, dict(id=9, name="new")], annotations=rows)
    dataset = evaluate.CocoDataset(path, folder, classes)
    assert dataset.notes == ["ignored categories (not a class, no boxes): ['new']"]
    metrics = evaluate.score(perfect_results([*rows, new]), dataset.annotations)
    assert metrics["AP"] == pytest.approx(1)
    edit(path, annotations=[*rows, new])
    with pytest.raises(UserError, match="'new': expected one of the 3 classes"):
        evaluate.CocoDataset(path, folder, classes)


# ---- further columns -----------------------------------------------------------------------------


NEW_FIELDS = "    angle: float = 0.5\n    point: tuple[int, int]\n"


def test_a_new_field_of_boxes_becomes_a_column_of_samples(tmp_path, monkeypatch):
    source = (ROOT / "evaluate.py").read_text()
    field = "    iscrowd: bool | float | None = None\n"
    assert source.count(field) == 1
    (tmp_path / "columns.py").write_text(source.replace(field, field + NEW_FIELDS))
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
    assert samples[2]["point"].shape == (0, 2)
    assert samples[0]["point"].dtype == torch.int64
    assert samples[0]["angle"].dtype == torch.float32
    edit(path, annotations=first_row(point=None))
    with pytest.raises(UserError, match=r"annotations\[0\].point: .*null"):
        columns.CocoDataset(path, folder)


# ---- the official data set -----------------------------------------------------------------------


@pytest.fixture
def official(shared):
    return json.loads((shared / "golden" / "transforms.json").read_text())


def test_boxes_and_sizes_match_the_official_code(official, coco_tiny):
    for sample in official["dataset_samples"]:
        dataset = coco_tiny[sample["split"]]
        i = dataset.image_ids.tolist().index(sample["image_id"])
        old_h, old_w = dataset.hw[i].tolist()
        h, w = sample["resized_hw"]
        assert fcos.resized_hw(old_h, old_w, 800, 1333) == (h, w)
        boxes, labels = dataset.target(i)
        assert (labels + 1).tolist() == sample["labels"]  # the official background is class 0
        boxes = boxes.double() * torch.tensor([w / old_w, h / old_h, w / old_w, h / old_h])
        if sample["hflip"]:
            boxes = torch.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], 1)
        # Official boxes are inclusive in the original image and then scaled, so they end one scaled
        # pixel earlier. The flip subtracts one pixel of the resized image.
        pixel_w = w / old_w
        pixel_h = h / old_h
        shift = [1 - pixel_w, 0, 1, pixel_h] if sample["hflip"] else [0, 0, pixel_w, pixel_h]
        expected = torch.tensor(sample["boxes_xyxy"], dtype=torch.float64) + torch.tensor(shift)
        difference = (boxes - expected).abs().max()
        assert difference < 1e-3, (sample["image_id"], sample["hflip"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_training_filter_matches_the_official_code(official, coco_tiny, split):
    expected = official["dataset_filter"][split]
    dataset = coco_tiny[split]
    assert dataset.image_ids.tolist() == expected["all_ids"]
    trainable = dataset.image_ids[dataset.trainable].tolist()
    assert trainable == expected["ids_with_valid_annotations"]


def test_labels_of_categories_match_the_official_code(official, coco_tiny):
    ids = coco_tiny["val"].category_ids
    found = {str(id): label + 1 for label, id in enumerate(ids)}
    assert found == official["json_category_id_to_contiguous_id"]
