"""The files of a data set: how images are found, layouts, and labels of other tools."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from coco_files import box, edit, rotated_png, write_coco

import evaluate
from fcos import UserError

# ---- images --------------------------------------------------------------------------------------


NAMES = {  # the name in the JSON, the files of the folder, and the one that is found or the error
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
    "in a folder below": ("a/größe 1.png", ["a/größe 1.png"], "a/größe 1.png"),
    "in a folder beside": ("beside/1.png", ["../beside/1.png"], "../beside/1.png"),
    "CVAT's folder": ("images/1.png", ["1.png"], "../images/1.png"),
    "CVAT's folder, no suffix": ("images/1", ["1.png"], "../images/1.png"),
    "a mask beside it": ("1", ["1.jpg", "1.png"], UserError("'1' may be 1.jpg or 1.png; write")),
    "escaped": ("a%20b.png", ["a b.png"], UserError("such as a%20b.png; .* holds a b.png")),
    "a prefix": ("/data/upload/1.png", ["1.png"], UserError("/data/upload/1.png; .* holds 1.png")),
    "a note": ("1", ["1.txt"], UserError("lacks 1 of 1 images .* holds 1.txt")),
}


@pytest.mark.parametrize("name, files, expected", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("sized", [True, False])
def test_an_image_is_found_by_its_name_or_its_stem(tmp_path, name, files, expected, sized):
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
        assert dataset.hw.tolist() == [[6, 8]]
        assert dataset.image(0).shape == (3, 6, 8)


def test_copies_of_images_are_counted(tmp_path):
    path, folder = write_coco(tmp_path, {1: (8, 6), 2: (8, 6), 3: (9, 6), 4: (8, 5)}, [])
    assert evaluate.CocoDataset(path, folder).notes == []
    shutil.copy(folder / "1.png", folder / "2.png")
    (note,) = evaluate.CocoDataset(path, folder).notes
    assert note.startswith("1 images are copies of another, such as 1.png and 2.png; objects")
    edit(path, images=lambda rows: [*rows, rows[0] | dict(id=101), rows[0] | dict(id=102)])
    (note,) = evaluate.CocoDataset(path, folder).notes
    assert note.startswith("3 images are copies of another, such as 1.png and 2.png; objects")


def test_many_images_are_compared_by_path_alone(tmp_path):
    """Reading more than 10,000 files would take too long: the copy of 1.png is not counted."""
    path, folder = write_coco(tmp_path, {1: (8, 6), 2: (8, 6)}, [])
    shutil.copy(folder / "1.png", folder / "2.png")
    edit(path, images=lambda rows: [*rows, *(rows[0] | dict(id=id) for id in range(3, 10_002))])
    (note,) = evaluate.CocoDataset(path, folder).notes
    assert note.startswith("9999 images are copies of another, such as 1.png and 1.png; objects")


def test_missing_images_are_counted(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20), 4: (20, 20), 5: (20, 20)}, [])
    (folder / "4.png").unlink()
    (folder / "5.png").unlink()
    with pytest.raises(UserError, match=r"lacks 2 of 3 images .*4\.png"):
        evaluate.CocoDataset(path, folder)


def test_messages_about_missing_paths_list_what_is_there(tmp_path):
    path, folder = write_coco(tmp_path, {1: (20, 20)}, [])
    with pytest.raises(UserError, match=r"nothing\.json: no such file; .* holds .*instances\.json"):
        evaluate.CocoDataset(tmp_path / "nothing.json", folder)
    with pytest.raises(UserError, match=r"nowhere: no such image folder; .* holds images"):
        evaluate.CocoDataset(path, tmp_path / "nowhere")


@pytest.mark.parametrize("declared, corner", [((30, 20), (0, 0)), ((20, 30), (0, 19))])
def test_exif_turns_an_image_only_if_the_json_says_so(tmp_path, declared, corner):
    path, folder = write_coco(tmp_path, {1: declared}, [])
    rotated_png(folder / "1.png", 30, 20, 6)
    dataset = evaluate.CocoDataset(path, folder)
    image = dataset.image(0)
    assert image.shape[1:] == declared[::-1]
    assert image[:, *corner].tolist() == [255, 255, 255]


def test_a_size_that_fits_neither_orientation_is_refused(tmp_path):
    path, folder = write_coco(tmp_path, {1: (40, 20)}, [])
    rotated_png(folder / "1.png", 30, 20, 6)
    with pytest.raises(UserError, match=r"1\.png: expected 40x20 pixels.*, found 30x20"):
        evaluate.CocoDataset(path, folder).image(0)


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "annotations, images",
    [
        ("annotations/instances_val2017.json", "val2017"),
        ("valid/_annotations.coco.json", "valid"),
        ("annotations_val.json", "images"),
        ("annotations.json", "images"),
        ("annotations/instances_default.json", "images"),
    ],
    ids=["COCO", "Roboflow", "split", "one folder", "CVAT"],
)
def test_layouts_of_data_sets_are_known(tmp_path, annotations, images):
    (tmp_path / annotations).parent.mkdir(exist_ok=True)
    (tmp_path / annotations).write_text("{}")
    found = evaluate.coco_paths(tmp_path, "val2017")
    assert found == (tmp_path / annotations, tmp_path / images)


def test_an_unknown_layout_lists_what_was_looked_for(tmp_path):
    expected = tmp_path / "none" / "annotations" / "instances_train2017.json"
    assert evaluate.coco_paths(tmp_path / "none", "train2017")[0] == expected
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    message = r"instances_train2017.json, .*labels/train, .*; .* holds annotations"
    with pytest.raises(UserError, match=message):
        evaluate.coco_paths(tmp_path / "coco", "train2017")


# ---- labels of other tools -----------------------------------------------------------------------


LABELS = {  # layout: images, labels, and the note about them
    "YOLO by split": ("images/val", "labels/val", "YOLO labels"),
    "YOLO by part": ("valid/images", "valid/labels", "YOLO labels"),
    "flat YOLO": ("images", "labels", "YOLO labels"),
    "VOC": ("JPEGImages", "Annotations", "labels of Pascal VOC"),
    "VOC with lists": ("JPEGImages", "Annotations", "labels of Pascal VOC"),
    "Roboflow's VOC": ("valid", "valid", "labels of Pascal VOC"),
    "CVAT": ("images", "", "CVAT's XML"),
}


def write_labels(root, layout, path, folder):
    """Write a COCO JSON as the labels of another tool, with its images, as the split val2017."""
    from hotcoco import COCO

    coco = COCO(str(path))
    images, labels, _ = LABELS[layout]
    shutil.copytree(folder, root / images)
    if "YOLO" in layout:
        coco.to_yolo(str(root / labels))
        (root / labels / "data.yaml").rename(root / "data.yaml")
    elif layout == "CVAT":
        coco.to_cvat(str(root / "annotations.xml"))
    else:
        coco.to_voc(str(root / "voc"))
        shutil.copytree(root / "voc" / "Annotations", root / labels, dirs_exist_ok=True)
        shutil.rmtree(root / "voc")
    if layout == "VOC with lists":
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "val.txt").write_text("1\n2 1\n")


@pytest.mark.parametrize("layout", LABELS)
def test_labels_of_other_tools_are_read_directly(tmp_path, layout):
    pytest.importorskip("hotcoco")
    boxes = [box(1, 1, [4, 6, 20, 10], 90), box(2, 2, [8, 4, 16, 30])]
    sizes = {1: (60, 40), 2: (40, 60), 3: (32, 32)}
    path, folder = write_coco(tmp_path / "coco", sizes, boxes)
    data = tmp_path / "data"
    write_labels(data, layout, path, folder)
    if "YOLO" in layout:  # an image without a file of labels is background
        next(data.glob("**/3.txt")).unlink()
    files = sorted(data.rglob("*"))
    found = evaluate.CocoDataset(*evaluate.coco_paths(data, "val2017"))
    assert sorted(data.rglob("*")) == files
    assert found.notes[0] == f"read as {LABELS[layout][2]}"
    assert len(found) == (2 if layout == "VOC with lists" else 3)
    expected = evaluate.CocoDataset(path, folder)
    position = {found.path(i).name: i for i in range(len(found))}
    for i, name in enumerate(("1.png", "2.png")):
        boxes, labels = found.target(position[name])
        expected_boxes, expected_labels = expected.target(i)
        torch.testing.assert_close(boxes, expected_boxes, atol=1.01, rtol=0)
        assert found.classes[labels[0]] == expected.classes[expected_labels[0]]
        assert found.image(position[name]).equal(expected.image(i))
    assert evaluate.score([], found.annotations)["AP"] == 0


def test_rotated_boxes_of_cvat_are_counted(tmp_path):
    pytest.importorskip("hotcoco")
    path, folder = write_coco(tmp_path / "coco", {1: (60, 40)}, [box(1, 1, [4, 6, 20, 10], 90)])
    write_labels(tmp_path / "data", "CVAT", path, folder)
    xml = tmp_path / "data" / "annotations.xml"
    xml.write_text(xml.read_text().replace("<box ", '<box rotation="30.0" '))
    found = evaluate.CocoDataset(*evaluate.coco_paths(tmp_path / "data", "val2017"))
    assert "1 boxes are rotated; the rotation is ignored" in found.notes


@pytest.mark.parametrize(
    "layout, file",
    [
        ("VOC", "Annotations/1.xml"),
        ("VOC with lists", "ImageSets/Main/val.txt"),
        ("CVAT", "annotations.xml"),
        ("flat YOLO", "labels/1.txt"),
        ("flat YOLO", "images/1.png"),
    ],
)
def test_a_pipe_in_place_of_labels_is_refused(tmp_path, layout, file):
    """Reading it would never end."""
    pytest.importorskip("hotcoco")
    path, folder = write_coco(tmp_path / "coco", {1: (60, 40)}, [box(1, 1, [4, 6, 20, 10], 90)])
    write_labels(tmp_path / "data", layout, path, folder)
    (tmp_path / "data" / file).unlink()
    os.mkfifo(tmp_path / "data" / file)
    with pytest.raises(UserError, match="expected a regular file"):
        evaluate.CocoDataset(*evaluate.coco_paths(tmp_path / "data", "val2017"))


@pytest.mark.parametrize("layout", ["VOC", "CVAT"])
def test_class_names_with_an_ampersand_are_refused(tmp_path, layout):
    """hotcoco 1.3 reads <name>a&amp;b</name> as b."""
    pytest.importorskip("hotcoco")
    rows = [box(1, 1, [4, 6, 20, 10], 90)]
    path, folder = write_coco(tmp_path / "coco", {1: (60, 40)}, rows, [dict(id=90, name="a&b")])
    write_labels(tmp_path / "data", layout, path, folder)
    with pytest.raises(UserError, match=".xml: expected names without &"):
        evaluate.CocoDataset(*evaluate.coco_paths(tmp_path / "data", "val2017"))


YAMLS = {
    "a list": "names:\n- a\n- b\n\ntrain: x\n",
    "an indented list": "train: x\nnames:\n  - a\n  - 'b'\nnc: 2",
    "a mapping": "names:\n  0: a\n  1: b\n",
    "a flow": "nc: 2\nnames: ['a', \"b\"]\n",
    "keys of text": "names: {'1': b, '0': a}",
}


@pytest.mark.parametrize("yaml", YAMLS.values(), ids=YAMLS)
def test_class_names_of_yolo_are_read_in_every_form(tmp_path, yaml):
    pytest.importorskip("hotcoco")
    _, folder = write_coco(tmp_path, {1: (20, 10)}, [])
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "1.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    (labels / "gone.txt").write_text("1 0.5 0.5 0.2 0.4\n")  # without an image
    (tmp_path / "data.yaml").write_text(yaml)
    dataset = evaluate.CocoDataset(labels, folder)
    assert dataset.classes == ["a", "b"]
    assert dataset.boxes.tolist() == [[8, 3, 12, 7]]


@pytest.mark.parametrize(
    "w, h, orientation, white",
    [
        (30, 20, 6, (19, 0)),
        (20, 20, 6, (19, 0)),
        (30, 20, 3, (29, 19)),
        (30, 20, 2, (29, 0)),
    ],
)
def test_labels_of_yolo_refer_to_the_image_as_exif_turns_it(tmp_path, w, h, orientation, white):
    """So it is even if both have the same size. white: x, y of the white pixel after turning."""
    folder = tmp_path / "images"
    folder.mkdir()
    rotated_png(folder / "1.png", w, h, orientation)
    turned_w, turned_h = (h, w) if orientation == 6 else (w, h)
    x, y = white
    center = f"{(x + 0.5) / turned_w} {(y + 0.5) / turned_h}"
    (tmp_path / "1.txt").write_text(f"0 {center} {1 / turned_w} {1 / turned_h}")
    (tmp_path / "data.yaml").write_text("names: [a]")
    dataset = evaluate.CocoDataset(tmp_path, folder)
    image = dataset.image(0)
    assert image.shape == (3, turned_h, turned_w)
    np.testing.assert_allclose(dataset.boxes, [[x, y, x + 1, y + 1]], atol=1e-5)
    assert image[:, y, x].tolist() == [255, 255, 255]


def test_labels_of_yolo_in_subfolders_are_counted(tmp_path):
    _, folder = write_coco(tmp_path, {1: (20, 10)}, [])
    below = tmp_path / "labels" / "below"
    below.mkdir(parents=True)
    (below.parent / "1.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (below / "2.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (tmp_path / "data.yaml").write_text("names: [a]")
    notes = evaluate.CocoDataset(below.parent, folder).notes
    assert "1 label files in subfolders are left out" in notes


BAD_LABELS = {  # the file that is replaced, its new content, and a pattern of the message
    "no data.yaml": ("data.yaml", None, "expected data.yaml"),
    "no names": ("data.yaml", "nc: 1", "data.yaml: .*names"),
    "nested names": ("data.yaml", "names: [[a], [b]]", "data.yaml: .*names"),
    "a class too many": ("labels/1.txt", "7 .5 .5 .1 .1", "1.txt: expected a class below 1"),
    "an infinite class": ("labels/1.txt", "inf .5 .5 .1 .1", "expected a class"),
    "a polygon": ("labels/1.txt", "0 .1 .1 .5 .1 .5 .5 .1 .5", "below 1 and 4 fractions"),
    "pixels": ("labels/1.txt", "0 10 5 4 2", "1.txt: .* 4 fractions of the image, found '0 10 5"),
    "another encoding": ("labels/1.txt", "0 .5\udcff .5 .2 .4", "1.txt: expected a class"),
    "names by a word": ("data.yaml", "names: {x: a}", "data.yaml: Expected `int`"),
    "no image": ("images/1.png", None, "no box belongs to an image in"),
}


@pytest.mark.parametrize("file, text, message", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_cannot_be_read_are_named(tmp_path, file, text, message):
    pytest.importorskip("hotcoco")
    write_coco(tmp_path, {1: (20, 10)}, [])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (tmp_path / "data.yaml").write_text("names: [a]")
    (tmp_path / file).unlink()
    if text:
        (tmp_path / file).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message) as error:
        evaluate.CocoDataset(tmp_path / "labels", tmp_path / "images")
    assert str(error.value).isprintable()


def test_labels_of_other_tools_need_hotcoco(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    (tmp_path / "1.xml").touch()
    with pytest.raises(UserError, match="requirements.txt .*hotcoco"):
        evaluate.CocoDataset(tmp_path, tmp_path)
