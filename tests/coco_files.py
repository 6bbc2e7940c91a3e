"""Write COCO files for tests, and call evaluate.py."""

import json

import numpy as np
import pytest
from PIL import Image

import evaluate

CATEGORIES = [dict(id=7, name="seven"), dict(id=3, name="three"), dict(id=90, name="ninety")]


def write_coco(root, images, annotations, categories=CATEGORIES):
    """Write instances.json and a folder of images; images that exist already are kept.

    images: {id: (width, height)}. Returns the paths of both.
    """
    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for id, (w, h) in images.items():
        rows.append(dict(id=id, file_name=f"{id}.png", width=w, height=h))
        if not (folder / f"{id}.png").exists():
            noise = np.random.default_rng(id).integers(0, 256, (h, w, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{id}.png")
    path = root / "instances.json"
    content = dict(images=rows, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))
    return path, folder


def read_coco(*args):
    """Write COCO files and read them as a data set."""
    return evaluate.CocoDataset(*write_coco(*args))


def box(id, image_id, bbox, category_id=3, **fields):
    """Return an annotation."""
    area = bbox[2] * bbox[3] if len(bbox) == 4 else 0
    row = dict(id=id, image_id=image_id, category_id=category_id, bbox=bbox, area=area, iscrowd=0)
    return row | fields


def detection(image_id, bbox, category_id=3, score=0.5):
    """Return a result."""
    return dict(image_id=image_id, category_id=category_id, bbox=bbox, score=score)


def perfect_results(annotations):
    """Return a result for each annotation that is not a crowd."""
    return [
        detection(row["image_id"], row["bbox"], row["category_id"], 0.9)
        for row in annotations
        if not row.get("iscrowd")
    ]


def edit(path, **changes):
    """Replace lists of a JSON file, by new lists or by functions of the old ones."""
    content = json.loads(path.read_text())
    for name, change in changes.items():
        content[name] = change(content[name]) if callable(change) else change
    path.write_text(json.dumps(content))


def first_row(**changes):
    """Return a function that changes fields of the first row of a list."""
    return lambda rows: [rows[0] | changes, *rows[1:]]


def rotated_png(path, w, h, orientation):
    """Write a black PNG with a white pixel at its top left, and an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((h, w, 3), np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(path, exif=exif)


def run_evaluate(*argv):
    """Run evaluate.py in this process."""
    evaluate.main(evaluate.parse_args([*map(str, argv)]))


def run_script(capsys, *argv):
    """Run evaluate.py until it exits. Return the exit code and its stderr without progress bars."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.run(evaluate.main, evaluate.parse_args([*map(str, argv)]))
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return stop.value.code, [line for line in lines if line.strip() and "%|" not in line]
