"""The shapes data set of train.py: generated pictures in the layout of COCO."""

import numpy as np
import pytest
from PIL import Image
from small_runs import read_files

import evaluate
import train


def test_pictures_depend_on_seed_split_and_number_only(tmp_path, shapes):
    train.make_shapes(tmp_path / "again", train=24, val=4)
    expected = read_files(shapes)
    assert read_files(tmp_path / "again") == expected
    train.make_shapes(tmp_path / "other counts", train=2, val=5)
    other_counts = read_files(tmp_path / "other counts")
    common = [name for name in other_counts if name.endswith(".jpg") and name in expected]
    assert len(common) == 2 + 4
    for name in common:
        assert other_counts[name] == expected[name]
    train.make_shapes(tmp_path / "other seed", seed=1, train=1, val=1)
    first = "train2017/000000000001.jpg"
    assert read_files(tmp_path / "other seed")[first] != expected[first]


def test_shapes_are_a_coco_data_set(shapes, capsys):
    from pycocotools.coco import COCO

    ids = []
    for split, count in ("train", 24), ("val", 4):
        path, folder = evaluate.coco_paths(shapes, f"{split}2017")
        coco = COCO(str(path))
        assert len(coco.imgs) == count == len(list(folder.glob("*.jpg")))
        ids += coco.imgs
        categories = sorted(coco.getCatIds())
        assert len(categories) >= 3
        assert categories != list(range(1, len(categories) + 1)), "expected gaps, as in COCO"
        for image in coco.imgs.values():
            with Image.open(folder / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
        for annotation in coco.anns.values():
            x, y, w, h = annotation["bbox"]
            image = coco.imgs[annotation["image_id"]]
            assert x >= 0 and y >= 0
            assert x + w <= image["width"] and y + h <= image["height"]
            assert min(w, h) >= 8
            assert 0.1 * w * h < annotation["area"] <= w * h
            assert annotation["iscrowd"] == 0
            assert annotation["category_id"] in categories
        dataset = evaluate.CocoDataset(path, folder)
        assert dataset.notes == []
        assert dataset.trainable.all()
    assert len(set(ids)) == 28


def test_boxes_are_tight_around_the_visible_part_of_a_shape(monkeypatch):
    """With one bright object on black, every bright pixel is of the object."""
    monkeypatch.setattr(train, "draw_background", lambda rng, w, h: np.zeros((h, w, 3), np.float32))
    monkeypatch.setattr(train, "COLORS", np.full((1, 3), 230, np.float32))
    categories = set()
    errors = []
    for seed in range(80):
        picture, objects = train.draw_scene(np.random.default_rng(seed))
        if not objects:
            continue
        categories.add(objects[0]["category_id"])
        ys, xs = np.nonzero(picture.min(2) > 40)
        x, y, w, h = objects[0]["bbox"]
        visible = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        errors.append(np.subtract(visible, [x, y, x + w, y + h]))
    assert len(errors) > 30
    assert categories == set(train.SHAPES)
    assert np.abs(errors).max() < 2.5, "the thin tips of stars are nearly black"
    assert np.abs(errors).mean() < 0.5


def test_a_folder_with_files_is_not_drawn_over(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(OSError):
        train.make_shapes(tmp_path / "photos", train=1, val=1)
    assert read_files(tmp_path) == {"photos/photo.jpg": b"precious"}


def test_files_of_a_killed_drawing_are_removed_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leftover = tmp_path / "data" / ".shapes-abcd" / "shapes"
    leftover.mkdir(parents=True)
    (leftover / "1.jpg").write_bytes(b"half")
    monkeypatch.setattr(train, "make_shapes", lambda root: root.mkdir())
    train.draw_shapes("data/shapes")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["shapes"]
