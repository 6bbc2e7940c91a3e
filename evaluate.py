"""Score an FCOS model on a COCO data set, or draw what it finds.

    python evaluate.py runs/shapes/model.pt --data data/shapes
    python evaluate.py coco --images photo.jpg folder/ --out drawn/
    python evaluate.py runs/shapes/model.pt --export model.onnx
    python evaluate.py --results results.json --annotations instances_val2017.json
    torchrun --nproc_per_node=8 evaluate.py runs/coco/model.pt --data data/coco

In this order: the COCO data set, prediction over any number of processes, scoring, drawing, and the
command line. train.py uses most of it: the data set, the scores, and how a process starts and ends.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of the slow imports: see run

import argparse
import ast
import contextlib
import dataclasses
import datetime
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import math
import mmap
import multiprocessing
import operator
import os
import pickle
import re
import socket
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import fcos
from fcos import UserError, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- data set ----------------------------------------------------------------------------------


def coco_paths(data, split):
    """Return the (annotations, image folder) of a split such as "val2017" below the folder `data`.

    Annotations are a JSON as COCO, Roboflow, `coco split` or CVAT lay it out, or labels of CVAT,
    YOLO or Pascal VOC: see read_labels. COCO's paths are returned for a folder that is not there.
    Raises UserError, which lists what was looked for, if the folder has none of them.
    """
    data = Path(data)
    name = split.removesuffix("2017")
    part = {"val": "valid"}.get(name, name)
    layouts = [
        (f"annotations/instances_{split}.json", split),
        (f"{part}/_annotations.coco.json", part),
        (f"annotations_{name}.json", "images"),
        ("annotations.json", "images"),
        ("annotations/instances_default.json", "images"),
        ("annotations.xml", "images"),
        *((f"labels/{folder}", f"images/{folder}") for folder in (split, name, part)),
        *((f"{folder}/labels", f"{folder}/images") for folder in (name, part)),
        ("labels", "images"),
        (f"ImageSets/Main/{name}.txt", "JPEGImages"),
        ("Annotations", "JPEGImages"),
        (part, part),
    ]
    for annotations, images in layouts:
        if has_annotations(data / annotations):
            return data / annotations, data / images
    if data.is_dir():
        looked_for = ", ".join(annotations for annotations, _ in layouts)
        raise UserError(
            f"{data}: found no annotations of {split}; looked for {looked_for}; "
            f"{what_is_there(data / split)}"
        )
    annotations, images = layouts[0]
    return data / annotations, data / images


def has_annotations(path):
    """Return whether a path is a file, or a folder with labels of YOLO or Pascal VOC."""
    if not path.is_dir():
        return path.exists()
    return any(entry.name.endswith((".txt", ".xml")) for entry in os.scandir(path))


def read_labels(path, image_dir):
    """Return labels of CVAT, YOLO or Pascal VOC as Instances, and notes about what was read.

    CVAT: its XML file. YOLO: a folder of text files, with data.yaml in it or above it. Pascal VOC:
    a folder of XML files, or a list of their names in ImageSets/Main. hotcoco converts them.
    Raises UserError if it cannot, or if it returns another number of images than there are files.
    """
    try:
        from hotcoco import COCO
    except ImportError:
        raise UserError(f"{path}: reading CVAT, YOLO and VOC needs hotcoco; install it") from None
    path = Path(path)
    count = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            if path.suffix == ".xml":
                kind = "CVAT's XML"
                coco = COCO.from_cvat(str(path))
            elif path.suffix == ".txt" or any(path.glob("*.xml")):
                kind = "labels of Pascal VOC"
                count = link_voc(path, folder)
                coco = COCO.from_voc(folder)
            else:
                kind = "YOLO labels"
                count = link_yolo(path, image_dir, folder)
                coco = COCO.from_yolo(folder, str(image_dir))
        except (OSError, ValueError) as error:
            problem = printable(str(error).replace(folder, str(path)), 300)
            raise UserError(f"{path}: cannot be read as {kind} ({problem})") from None
    content = msgspec.convert(coco.dataset, Instances, strict=False)
    if not content.images or count not in (None, len(content.images)):
        raise UserError(f"{path}: {kind}: {len(content.images)} images of {count or 'no'} files")
    if kind == "YOLO labels":
        turn_yolo(content, image_dir)
    for image in content.images:
        image.height = image.height or None  # 0 where the XML has no size
        image.width = image.width or None
    notes = [f"read as {kind}", *(printable(warning.message, 200) for warning in told)]
    return content, notes


def link_voc(path, folder):
    """Link the XML files of Pascal VOC into an empty folder; return their number."""
    if path.is_dir():
        files = list(path.glob("*.xml"))
    else:
        names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        files = [path.absolute().parents[2] / "Annotations" / f"{name}.xml" for name in names]
    for file in files:
        os.symlink(file.absolute(), Path(folder, file.name))
    return len(files)


def link_yolo(path, image_dir, folder):
    """Link YOLO's labels into an empty folder, beside data.yaml; return the number of images.

    An image without labels gets an empty file, since it is background. Labels without an image are
    left out, as YOLO does.
    """
    if image_dir is None:
        raise ValueError("the folder of their images is needed, too")
    found = (parent / "data.yaml" for parent in (path, *path.absolute().parents[:3]))
    yaml = next(filter(Path.is_file, found), None)
    if yaml is None:
        raise ValueError(
            "there is no data.yaml, in this folder or above it, that names the classes"
        )
    Path(folder, "data.yaml").write_text(plain_yaml(yaml.read_text()))
    images = [os.path.splitext(name) for name in os.listdir(image_dir)]
    stems = {stem for stem, suffix in images if suffix.lower() in image_suffixes()}
    labels = {file.stem for file in path.glob("*.txt")}
    if not labels & stems:
        raise ValueError(f"no label file has the name of an image in {image_dir}")
    for stem in stems:
        target = Path(folder, f"{stem}.txt")
        if stem in labels:
            os.symlink(Path(path, f"{stem}.txt").absolute(), target)
        else:
            target.touch()
    return len(stems)


def plain_yaml(text):
    """Return the text of a data.yaml with its list of names in a form that hotcoco reads."""
    names = re.search(r"^names:[^\S\n]*\n((?:[ \t]*- .*\n?)+)", text, re.MULTILINE)
    if names is None:
        return text
    lines = [line.strip().removeprefix("- ") for line in names[1].splitlines()]
    return "names:\n" + "".join(f"  {k}: {name}\n" for k, name in enumerate(lines))


def turn_yolo(content, image_dir):
    """Scale the boxes of photos that EXIF turns: YOLO's labels refer to the turned photo."""
    scales = {}
    names = find_images(Path(image_dir), [image.file_name for image in content.images], image_dir)
    for image, name in zip(content.images, names):
        with Image.open(Path(image_dir, name)) as photo:
            turned = photo.getexif().get(0x0112, 1) >= 5
        if turned:
            scales[image.id] = (image.height / image.width, image.width / image.height) * 2
            image.height, image.width = image.width, image.height
    for box in content.annotations:
        if box.image_id in scales:
            scale = scales[box.image_id]
            sides = msgspec.structs.astuple(box.bbox)
            box.bbox = Bbox(*(side * factor for side, factor in zip(sides, scale)))


class ImageEntry(msgspec.Struct, gc=False):
    """An entry of "images" in a COCO JSON. Fields that are not named here are skipped."""

    id: int | str
    file_name: str | int
    height: float | None = None
    width: float | None = None


class CategoryEntry(msgspec.Struct, gc=False):
    """An entry of "categories" in a COCO JSON."""

    id: int | str
    name: str | int
    supercategory: str | int | None = None


class Bbox(msgspec.Struct, gc=False, array_like=True, forbid_unknown_fields=True):
    """A box in pixels. The garbage collector does not track it, as it would millions of tuples."""

    x: float
    y: float
    w: float
    h: float


class BoxEntry(msgspec.Struct, gc=False, kw_only=True):
    """An entry of "annotations" in a COCO JSON.

    Any field after `iscrowd` becomes a column of the samples, under its name. It holds one number
    or a fixed count of numbers of each box: `angle: float = 0.0` or `point: tuple[float, float]`.
    A field without a default is required.
    """

    image_id: int | str
    category_id: int | str
    bbox: Bbox
    area: float | None = None
    iscrowd: bool | float | None = None


class ResultEntry(msgspec.Struct, gc=False):
    """A detection in COCO's results format."""

    image_id: int | str
    category_id: int | str
    bbox: Bbox
    score: float


class Instances(msgspec.Struct):
    """The lists of a COCO instances JSON."""

    images: list[ImageEntry]
    annotations: list[BoxEntry]
    categories: list[CategoryEntry]


def read_json(path, kind=Any):
    """Read a JSON file as the msgspec type `kind`. See decode.

    The file is mapped, not copied. Raises UserError if it is missing or does not have the type.
    """
    try:
        with open(fcos.regular_file(path), "rb") as file:
            return decode(file_content(file), kind, path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what_is_there(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def file_content(file):
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # a file system that cannot map files, or an empty file
        return file.read()


def decode(data, kind, path):
    """Decode JSON as the msgspec type `kind`, skipping fields that it does not name.

    COCO's polygons are therefore never built. `json` decodes what msgspec refuses: a byte order
    mark, NaN, and numbers written as text.
    Raises UserError, which names the list, the row and the field, and shows the entry.
    """
    with contextlib.suppress(ValueError, RecursionError):
        return msgspec.json.decode(data, type=kind)
    try:
        content = json.loads(bytes(data), object_hook=without_polygons)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    try:
        return msgspec.convert(content, kind, strict=False)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
    place = place.strip(".`")
    row = re.match(r"(\w*)\[(\d+)\]", place)
    if row is None:
        lists = "a COCO instances JSON, with the lists 'images', 'annotations' and 'categories'"
        expected = lists if kind is Instances else "a list of detections"
        raise UserError(f"{path}: expected {expected}; {place or 'JSON'}: {problem}")
    entries = content[row[1]] if row[1] else content
    raise UserError(f"{path}: {place}: {problem}, in {entries[int(row[2])]!r:.300}")


def without_polygons(entry):
    """Remove the polygons of an annotation: they take most of the memory and are not used."""
    entry.pop("segmentation", None)
    return entry


def what_is_there(path):
    """List the nearest existing folder of a path that does not exist, for error messages."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")[:5]
    return f"{folder} holds {', '.join(map(printable, names)) or 'nothing'}"


def in_order(entries, where):
    """Return images or categories in ascending order of their ids.

    Raises UserError unless the ids are unique, and all whole numbers or all text.
    """
    ids = [entry.id for entry in entries]
    kinds = {type(id) for id in ids}
    if kinds not in ({int}, {str}) or (kinds == {int} and max(map(abs, ids)) >= 2**63):
        raise UserError(
            f"{where}: expected one or more, whose ids are all whole numbers below 2**63 or all "
            f"text; the first ids are {ids[:5]!r:.200}"
        )
    id, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where}: id {id!r:.100} is there {count} times")
    return sorted(entries, key=operator.attrgetter("id"))


def numbered(ids):
    """Return {id: position}."""
    return {id: position for position, id in enumerate(ids)}


def look_up(positions, entries, field):
    """Return the positions of the ids in a field of M entries: int64 (M,), -1 for an unknown id.

    7 and "7" are the same id, since some tools write the ids of results as text.
    """
    get_id = operator.attrgetter(field)
    found = map(positions.get, map(get_id, entries), itertools.repeat(-1))
    found = np.fromiter(found, np.int64, len(entries))
    if (found < 0).any():
        texts = {str(id): position for id, position in positions.items()}
        found = np.array([texts.get(str(get_id(entry)), -1) for entry in entries], np.int64)
    return found


def boxes_of(entries):
    """Return the boxes of annotations or results, float64 (M, 4) as [x, y, w, h] in pixels."""
    boxes = map(msgspec.structs.astuple, map(operator.attrgetter("bbox"), entries))
    sides = itertools.chain.from_iterable(boxes)
    return np.fromiter(sides, np.float64, 4 * len(entries)).reshape(-1, 4)


def column_of(entries, name, where):
    """Return a further field of the annotations: float32 or int64, (M,) or (M, count).

    Raises UserError if the values are not numbers of one shape.
    """
    try:
        values = np.array([getattr(entry, name) for entry in entries])
    except ValueError:  # of several shapes
        values = np.array(None)
    if values.dtype.kind not in "fib":
        raise UserError(f"{where}: field {name!r}: expected numbers, as many for every box")
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)


@dataclasses.dataclass
class Annotations:
    """The images, classes and boxes of a COCO instances JSON in flat arrays; str() is the path.

    N images and K classes are in ascending order of their ids, M boxes in the order of the file.
    """

    path: Path
    image_ids: np.ndarray  # (N,) int64 or text
    names: list  # N file names as the JSON has them
    hw: np.ndarray  # (N, 2) float64 pixels, NaN where the file does not say
    classes: list  # K names
    category_ids: list  # K ids, None where the file lacks a class that was asked for
    label_of: dict  # {category id: label, -1 if it is no class}
    rows: np.ndarray  # (M,) int64, the position of the image, -1 if it is unknown
    labels: np.ndarray  # (M,) int64
    xywh: np.ndarray  # (M, 4) float64 pixels
    areas: np.ndarray  # (M,) float64, of the box where the file has no area
    crowds: np.ndarray  # (M,) bool
    columns: dict  # {name: float32 or int64 (M, ...)}, the further fields of BoxEntry
    sorted: bool  # whether the file has its categories in the order of their ids
    notes: list  # what is odd, one line each

    def __str__(self):
        return str(self.path)


def read_annotations(path, classes=None, image_dir=None):
    """Read a COCO instances JSON, or the labels that read_labels takes -> Annotations.

    classes: names in the order of their labels, if a model or another file decides the classes.
    Raises UserError, which names the file, the list and the row, for content that cannot be used.
    """
    content, notes = None, []
    if Path(path).is_dir() or Path(path).suffix in (".xml", ".txt"):
        content, notes = read_labels(path, image_dir)
    else:
        content = read_json(path, Instances)
    images = in_order(content.images, f"{path}: images")
    categories = in_order(content.categories, f"{path}: categories")
    ids = [image.id for image in images]
    boxes = content.annotations
    first_id = boxes[0].image_id if boxes else None
    columns = take_columns(boxes, numbered(ids), numbered([c.id for c in categories]), path)
    rows = columns.pop("rows")
    if len(rows) and (rows < 0).all():
        raise UserError(
            f"{path}: no annotation belongs to an image of the file; annotations[0] has image_id "
            f"{first_id!r:.100}, an image has id {ids[0]!r:.100}"
        )
    positions = columns.pop("categories")
    used = np.bincount(positions, minlength=len(categories)) > 0
    found = choose_classes(categories, used, path, classes, notes)
    label_of = np.array(list(found["label_of"].values()), np.int64)
    return Annotations(
        path=Path(path),
        image_ids=np.array(ids),
        names=[str(image.file_name) for image in images],
        hw=np.array([[i.height for i in images], [i.width for i in images]], np.float64).T,
        rows=rows,
        labels=label_of[positions],
        xywh=columns.pop("xywh"),
        areas=columns.pop("areas"),
        crowds=columns.pop("crowds"),
        columns=columns,
        sorted=categories == content.categories,
        notes=notes,
        **found,
    )


def take_columns(boxes, images, categories, path, size=20_000):
    """Return the columns of annotations as a dict of arrays, and empty their list.

    Blocks of `size` boxes stay in the cache of the processor while they are converted, and are
    freed before the next block. images, categories: {id: position}. rows and categories of the
    result are such positions; a row is -1 if the image is unknown.
    """
    blocks = []
    while boxes or not blocks:
        block = boxes[-size:]
        del boxes[-size:]
        columns = {
            "rows": look_up(images, block, "image_id"),
            "categories": look_up(categories, block, "category_id"),
            "xywh": boxes_of(block),
            "areas": np.array([box.area for box in block], np.float64),  # NaN for None
            "crowds": np.array([bool(box.iscrowd) for box in block], bool),
        }
        unknown = np.flatnonzero(columns["categories"] < 0)
        if len(unknown):
            raise UserError(
                f"{path}: annotations[{len(boxes) + unknown[0]}]: category_id "
                f"{block[unknown[0]].category_id!r:.100} is not in the categories "
                f"{list(categories)!r:.200}"
            )
        fields = BoxEntry.__struct_fields__
        for name in fields[fields.index("iscrowd") + 1 :]:
            columns[name] = column_of(block, name, path)
        blocks.insert(0, columns)
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in columns}
    missing = ~(columns["areas"] >= 0)
    with np.errstate(over="ignore", invalid="ignore"):
        columns["areas"][missing] = columns["xywh"][missing, 2:].prod(axis=1)
    return columns


def choose_classes(categories, used, path, classes, notes):
    """Return the fields of Annotations about classes, and add what is odd to the notes.

    By default every category is a class, except the first that Roboflow exports: no box has it, and
    the others name it as their supercategory. Categories that share a name get their id added.
    used (K,): whether a box has the category.
    """
    ids = [category.id for category in categories]
    names = [str(category.name) for category in categories]
    shared = [name for name, count in Counter(names).items() if count > 1]
    if shared:
        notes.append(f"categories share the name {shared[0]!r:.100}; their ids are added to it")
        names = [f"{name} ({id})" if name in shared else name for name, id in zip(names, ids)]
    parents = {c.supercategory for c in categories if c.supercategory != c.name}
    own = [name for name, has_box in zip(names, used) if has_box or name not in parents]
    classes = own if classes is None else list(classes)
    ignored = [name for name in names if name not in classes]
    missing = [name for name in classes if name not in names]
    for name, has_box in zip(names, used):
        if name in ignored and (has_box or (missing and name in own)):
            raise UserError(
                f"{path}: category {name!r:.100} is none of the {len(classes)} classes that were "
                f"trained on, {classes!r:.200}"
            )
    if ignored:
        notes.append(f"categories that are no class and have no box: {ignored!r:.200}")
    if missing:
        notes.append(f"classes that are no category, so they are not scored: {missing!r:.200}")
    labels = numbered(classes)
    id_of = dict(zip(names, ids))
    return {
        "classes": classes,
        "category_ids": [id_of.get(name) for name in classes],
        "label_of": {id: labels.get(name, -1) for id, name in zip(ids, names)},
    }


@functools.cache
def image_suffixes():
    """Return the suffixes, such as ".jpg", of all files that Pillow reads."""
    suffixes = Image.registered_extensions().items()
    return {suffix for suffix, kind in suffixes if kind in Image.OPEN}


def index_folder(folder):
    """Return {name: file} and {stem: images} of a folder; both are empty if there is none.

    Names and stems have composed Unicode characters; files are spelt as the folder has them.
    """
    try:
        with os.scandir(folder) as entries:
            files = sorted(entry.name for entry in entries if not entry.is_dir())
    except OSError:
        return {}, {}
    names = {unicodedata.normalize("NFC", file): file for file in files}
    stems = {}
    for name, file in names.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in image_suffixes():
            stems.setdefault(stem, []).append(file)
    return names, stems


def find_image(folder, name, index):
    """Return the path of an image, relative to the folder, or None. See find_images."""
    head, tail = os.path.split(name.replace("\\", "/"))
    tail = unicodedata.normalize("NFC", tail)
    heads = [unicodedata.normalize(form, head) for form in ("NFC", "NFD")]
    places = [*heads, *(f"../{head}" for head in heads if head)]  # CVAT names the image folder, too
    for place in places:
        names, _ = index(os.path.join(folder, place))
        if tail in names:
            return os.path.join(place, names[tail])
    stem, suffix = os.path.splitext(tail)
    for place in places:
        _, stems = index(os.path.join(folder, place))
        images = stems.get(tail, [])
        if suffix.lower() in image_suffixes():
            images = images + stems.get(stem, [])
        if len(images) > 1:
            raise UserError(
                f"{folder}: {name!r:.100} may be {' or '.join(map(printable, images[:3]))}; give "
                "the full name in the JSON"
            )
        if images:
            return os.path.join(place, images[0])
    return None


def find_images(folder, names, path):
    """Return the paths, relative to the folder, of the images that a JSON names.

    A name means the file of that name, whatever its slashes and Unicode form, in the folder or
    beside it. Otherwise it means the only image with that stem: YOLO's names have no suffix.
    Raises UserError if a name means no file or several.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such image folder; {what_is_there(folder)}")
    present = set(os.listdir(folder))
    index = functools.cache(index_folder)
    places = [name if name in present else find_image(folder, name, index) for name in names]
    missing = [name for name, place in zip(names, places) if place is None]
    if missing:
        raise UserError(
            f"{folder}: lacks {len(missing)} of {len(names)} images of {path}, the first being "
            f"{printable(missing[0])}; {what_is_there(folder / missing[0])}"
        )
    return places


def same_content(paths, hashed=10_000):
    """Return lists of the positions of images with the same content.

    Of more than `hashed` paths the paths alone are compared, so that a large data set starts fast.
    """
    keys = list(paths)
    if len(paths) <= hashed:
        sizes = [os.path.getsize(path) for path in paths]
        counts = Counter(sizes)
        counts[0] = 1  # an empty file, a pipe or a device
        for position, path in enumerate(paths):
            if counts[sizes[position]] > 1:
                with open(path, "rb") as file:
                    keys[position] = hashlib.file_digest(file, "sha256").digest()
    counts = Counter(keys)
    groups = {}
    for position, key in enumerate(keys):
        if counts[key] > 1:
            groups.setdefault(key, []).append(position)
    return list(groups.values())


class CocoDataset:
    """The images of a COCO instances JSON with their boxes and labels.

    Everything is in flat arrays: loader workers share them with their parent, and would copy many
    objects one by one. Crowd boxes are no targets, as in the official code. Boxes are clipped to
    their image; those without area or image are left out. `notes` tells what is odd.

    annotations: the Annotations of the file, for `score`.
    image_ids (N,), hw (N, 2) pixels, classes: K names, category_ids: K ids, in rising order.
    boxes (M, 4) float32 xyxy pixels, labels (M,) and further columns {name: (M, ...)} of image i:
    rows offsets[i]:offsets[i + 1].
    trainable (N,): whether the official training set has the image: it has an annotation, crowds
    included, of more than 1 pixel in width and height.
    """

    def __init__(self, annotations, image_dir, classes=None):
        self.image_dir = Path(image_dir)
        self.files_read = deque(maxlen=32)  # by `image`; whoever reports an error clears it first
        self.annotations = read_annotations(annotations, classes, image_dir)
        self.image_ids = self.annotations.image_ids
        self.classes = self.annotations.classes
        self.category_ids = self.annotations.category_ids
        self.sorted = self.annotations.sorted
        self.notes = list(self.annotations.notes)
        self._names = np.array(find_images(self.image_dir, self.annotations.names, annotations))
        self.annotations.names = None  # the spelling of the folder counts from here on
        self.hw = self._sizes()
        self._note_copies()
        self._set_boxes()

    def _sizes(self):
        sizes = self.annotations.hw.copy()
        for i in np.flatnonzero(np.isnan(sizes).any(1)):
            sizes[i] = fcos.read_image(self.path(i)).shape[-2:]
        wrong = np.flatnonzero(((sizes <= 0) | (sizes % 1 != 0) | (sizes >= 2**31)).any(1))
        if len(wrong):
            height, width = sizes[wrong[0]]
            raise UserError(
                f"{self.annotations}: {printable(self._names[wrong[0]])} has height {height:g} and "
                f"width {width:g}, expected whole numbers over 0"
            )
        return sizes.astype(np.int64)

    def _note_copies(self):
        groups = same_content([f"{self.image_dir}/{name}" for name in self._names.tolist()])
        if groups:
            names = [printable(self._names[i]) for i in groups[0][:2]]
            self.notes.append(
                f"{sum(map(len, groups)) - len(groups)} images are copies of another, such as "
                f"{' and '.join(names)}: what is labeled in one is background in the other"
            )

    def _set_boxes(self):
        truth = self.annotations
        check_pixels(truth)
        sides = np.ascontiguousarray(truth.xywh.T)  # (4, M) is faster than (M, 4)
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is outside every image
            xyxy = np.concatenate([sides[:2], sides[:2] + sides[2:]])
        height, width = self.hw[truth.rows].T.astype(np.float64)
        inside = np.clip(xyxy, 0, np.stack([width, height, width, height]))
        known = truth.rows >= 0
        full = (inside[2:] > inside[:2]).all(0) & np.isfinite(xyxy).all(0)
        with np.errstate(invalid="ignore"):
            clipped = (np.abs(inside - xyxy) > 1).any(0)  # up to a pixel is rounding in the JSON
        for what, which in (
            ("belong to no image of the file and are left out", ~known),
            ("have no area inside their image and are no targets", ~full & known),
            ("reach beyond their image and are clipped", clipped & full & known),
            ("are crowds and no targets", truth.crowds & full & known),
        ):
            if which.any():
                first = which.argmax()
                self.notes.append(
                    f"{which.sum()} of {len(which)} boxes {what}, as annotations[{first}], "
                    f"{truth.xywh[first].tolist()}"
                )
        visible = (sides[2:] > 1).all(0) & known
        self.trainable = np.bincount(truth.rows[visible], minlength=len(self)) > 0
        kept = np.flatnonzero(full & known & ~truth.crowds)
        order = np.argsort(truth.rows[kept] * len(truth.rows) + kept)  # faster than kind="stable"
        kept = kept[order]
        self.boxes = np.ascontiguousarray(inside.T, np.float32)[kept]
        self.labels = truth.labels[kept]
        self.columns = {name: values[kept] for name, values in truth.columns.items()}
        self.offsets = np.searchsorted(truth.rows[kept], np.arange(len(self) + 1))

    def __len__(self):
        return len(self.image_ids)

    def image(self, i):
        """RGB uint8 (3, H, W), in the orientation that the annotations refer to."""
        self.files_read.append(self.path(i))
        return fcos.read_image(self.path(i), tuple(self.hw[i].tolist()))

    def path(self, i):
        return self.image_dir / str(self._names[i])

    def target(self, i):
        """boxes float32 (G, 4) xyxy pixels, labels int64 (G,) of image i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return torch.from_numpy(self.boxes[rows]), torch.from_numpy(self.labels[rows])

    def truth(self, i, hw):
        """Return the boxes of image i, scaled as the image is when it gets (height, width).

        {"boxes": float32 (G, 4) xyxy pixels, "labels": int64 (G,)} and every further column, as the
        file has it: a column in pixels must be scaled here.
        """
        h, w = self.hw[i].tolist()
        boxes, labels = self.target(i)
        scale = torch.tensor([hw[1] / w, hw[0] / h, hw[1] / w, hw[0] / h])
        rows = slice(self.offsets[i], self.offsets[i + 1])
        columns = {name: torch.from_numpy(values[rows]) for name, values in self.columns.items()}
        return {"boxes": boxes * scale, "labels": labels} | columns

    def sample(self, i, hw):
        """Return {"image": uint8 (3, H, W) resized to (height, width)} and its `truth`."""
        return {"image": fcos.resize(self.image(i), hw)} | self.truth(i, hw)


def check_pixels(annotations):
    """Raise UserError if the boxes look normalized: all numbers are from 0 to 1."""
    if annotations.xywh.max(initial=0) > 1:
        return
    boxes = annotations.xywh[np.isfinite(annotations.xywh).all(1)]
    if len(boxes) and boxes.min() >= 0 and boxes.max() <= 1 and (boxes % 1).any():
        raise UserError(
            f"{annotations}: expected boxes in pixels; these look normalized, as "
            f"{boxes[0].tolist()}; multiply them by the width and height of their image"
        )


def load_dataset(annotations, image_dir, classes=None):
    """Return a CocoDataset that one process of each node reads and the others receive.

    Every process of torch.distributed calls it. If a reader fails, its error is raised in all.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return CocoDataset(annotations, image_dir, classes)
    hosts = [None] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    reader = hosts.index(hosts[rank])
    dataset, error = None, None
    if rank == reader:
        try:
            dataset = CocoDataset(annotations, image_dir, classes)
        except (UserError, OSError, MemoryError) as caught:
            error = UserError(str(caught))
    errors = [None] * world_size
    dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error
    for host in dict.fromkeys(hosts):  # every process takes part in making every group
        ranks = [other for other in range(world_size) if hosts[other] == host]
        group = dist.new_group(ranks, backend="gloo")
        if rank in ranks:
            dataset = broadcast(dataset, reader, group)
    return dataset


def broadcast(value, source, group):
    """Return the object of rank `source` in all processes of a group; its arrays are not copied."""
    buffers = []
    header = [None, None]
    if dist.get_rank() == source:
        header[0] = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        buffers = [torch.from_numpy(np.frombuffer(buffer.raw(), np.uint8)) for buffer in buffers]
        header[1] = [len(buffer) for buffer in buffers]
    dist.broadcast_object_list(header, source, group)
    if dist.get_rank() != source:
        buffers = [torch.empty(size, dtype=torch.uint8) for size in header[1]]
    for buffer in buffers:
        dist.broadcast(buffer, source, group)
    return pickle.loads(header[0], buffers=[buffer.numpy() for buffer in buffers])


# ---- prediction --------------------------------------------------------------------------------


STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has not all of them
]


def start_worker(_):
    """Loader workers ignore the signals that stop a run, which often reach all of its processes:
    their parent needs them to finish its step. They end when it does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


WORKER_ERRORS = {  # part of an error's text: what helps
    "DataLoader worker (pid": "; if /dev/shm is full, use --workers 0",
    "DataLoader timed out": "; use --workers 0",
    "ancillary data": ": too many open files; raise `ulimit -n` or use --workers 0",
    "Too many open files": "; raise `ulimit -n` or use --workers 0",
}


@contextlib.contextmanager
def no_worker_left():
    """Kill all dataloader workers if an error occurs: they ignore signals, and would keep their
    parent from ending. PyTorch's error about a worker that died or hangs becomes a UserError."""
    try:
        yield
    except BaseException as error:
        unix = hasattr(signal, "SIGCHLD")  # PyTorch's handler raises an error when a worker dies
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if unix else None
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        if unix:
            signal.signal(signal.SIGCHLD, handler)
        hint = next((hint for text, hint in WORKER_ERRORS.items() if text in str(error)), None)
        if hint is None or "Caught" in str(error):  # the latter: an error of the code in a worker
            raise
        raise UserError(f"{error}{hint}") from None


def check_classes(model, dataset):
    """UserError, naming the difference, unless the model was made for the data set's classes."""
    path, names, ours = dataset.annotations, dataset.classes, model.classes
    if ours is None:
        if len(names) != model.num_classes:
            raise UserError(f"{path}: has {len(names)} categories, the model {model.num_classes}")
        if not dataset.sorted:
            raise UserError(
                f"{path}: its categories are not in the order of their ids, and the "
                "model does not say in which order it was trained on them"
            )
    elif ours != names:
        pairs = itertools.zip_longest(ours, names)
        first = next(f"{a!r} against {b!r}" for a, b in pairs if a != b)
        raise UserError(
            f"{path}: its {len(names)} categories are not the {len(ours)} that the "
            f"model was trained on; the first difference is {first}"
        )


def attempt(read, item):
    """Return read(item), or its UserError: raised in a worker, it would be wrapped in a traceback.

    A worker puts the tensors into shared memory here. PyTorch would do so in a thread, where an
    error would lose the item, and the parent would wait for it.
    """
    try:
        result = read(item)
        if torch.utils.data.get_worker_info():
            for value in torch.utils._pytree.tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        return result
    except UserError as error:
        return error
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        few = "Too many open files" in str(error)
        remedy = "raise `ulimit -n`" if few else "make /dev/shm larger (docker run --shm-size=8g)"
        return UserError(f"a dataloader worker: {error}; {remedy} or use --workers 0")


FILES, FILES_PER_WORKER = 40, 16  # open files of a process, and those that each worker adds


def check_open_files(workers):
    """Raise UserError if the process may not open as many files as its workers need."""
    needed = FILES + FILES_PER_WORKER * workers
    if workers and hasattr(os, "sysconf") and os.sysconf("SC_OPEN_MAX") < needed:
        raise UserError(
            f"`ulimit -n` is {os.sysconf('SC_OPEN_MAX')}, too few open files for {workers} "
            f"dataloader workers; raise it to {needed} or use --workers 0"
        )


def read_ahead(read, items, workers, pin_memory=False):
    """Return read(item) of all items in turn, or its UserError; worker processes read ahead."""
    check_open_files(workers)
    return DataLoader(
        items,
        batch_size=None,
        collate_fn=functools.partial(attempt, read),
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        timeout=600 if workers else 0,
    )


def raised(items):
    """The items of read_ahead, up to the first that is an error: it is raised."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def predict(model, dataset, batch_size=1, workers=2, **how):
    """Detections on every image of a CocoDataset, in COCO's results format, in the order of the
    images: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}, ...].

    Images of one padded size go together, so that the prediction for an image does not depend on
    those beside it. Every process of torch.distributed takes its share of these batches; the list
    is complete on rank 0 and None elsewhere. how: further keywords of FCOS.predict, such as tta.
    """
    rank, world_size = rank_and_world_size()
    batches, alike = [], {}
    for i, hw in enumerate(dataset.hw.tolist()):
        padded_hw = fcos.padded_hw([fcos.resized_hw(*hw, *model.test_size)])
        alike.setdefault(padded_hw, []).append(i)
    for images in alike.values():
        batches += [images[k : k + batch_size] for k in range(0, len(images), batch_size)]
    mine = [i for batch in batches[rank::world_size] for i in batch]
    # in position 0 the bar replaces a bar of training; below it, Jupyter draws every update
    bar = tqdm(
        read_ahead(dataset.image, mine, workers),
        "predict",
        unit="image",
        position=0,
        leave=False,
        dynamic_ncols=True,
        disable=rank != 0,
    )
    results, images = {}, raised(bar)
    with no_worker_left(), bar, views_shown(model, bar, how):
        detections = model.predict(images, batch_size=batch_size, **how)
        for i, found in zip(mine, detections, strict=True):
            rows, image_id = result_rows(found, dataset.category_ids), dataset.image_ids[i].item()
            results[i] = [
                {"image_id": image_id, **row} for row in rows if row["category_id"] is not None
            ]
    if world_size > 1:
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(results, shares)
        if rank != 0:
            return None
        results = {i: rows for share in shares for i, rows in share.items()}
    assert len(results) == len(dataset), f"{len(results)} of {len(dataset)} images predicted"
    return [row for i in range(len(dataset)) for row in results[i]]


@contextlib.contextmanager
def views_shown(model, bar, how):
    """Count the views beside a progress bar where an image has more than one: it may take long."""
    seen = 0
    shown = time.monotonic()

    def show(module, inputs):
        nonlocal seen, shown
        seen += len(inputs[0])
        if time.monotonic() > shown + 0.5:
            shown = time.monotonic()
            bar.set_postfix_str(f"view {seen}")

    if not (how.get("tile") or how.get("tta")):
        yield
        return
    hook = model.register_forward_pre_hook(show)
    try:
        yield
    finally:
        hook.remove()


def result_rows(found, category_ids):
    """Return the detections on one image in COCO's results format, without its image_id.

    Every further column of the detections is written by its name.
    """
    boxes = found["boxes"]
    columns = {name: values.tolist() for name, values in found.items() if name != "boxes"}
    columns["category_id"] = [category_ids[label] for label in columns.pop("labels")]
    columns["bbox"] = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    columns["score"] = columns.pop("scores")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


# ---- scoring -----------------------------------------------------------------------------------

METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def score(results, annotations, per_class=False):
    """Return COCO's twelve box metrics, {"AP": ..., "AP50": ...}, from 0 to 1, or -1 for no object.

    results: detections as `predict` returns them, or the path of a JSON file of them.
    annotations: the Annotations that were read before, or the path of a COCO instances JSON.
    With per_class also "AP/<class>"; and "F1" and "threshold" of all classes together, "F1/<class>"
    and "threshold/<class>" of each, at IoU 0.5: see best_f1.
    Raises UserError, which names the entry, for results that do not fit the annotations.
    """
    if not isinstance(annotations, Annotations):
        annotations = read_annotations(annotations)
    usable = (annotations.rows >= 0) & np.isfinite(annotations.xywh).all(1)
    columns = ("rows", "labels", "xywh", "areas", "crowds")
    truth = {name: getattr(annotations, name)[usable] for name in columns}
    found = read_results(results, annotations)
    images = range(len(annotations.image_ids))
    classes = range(len(annotations.classes))
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        scorer = make_scorer(truth, found, images, classes)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        parts = split_by_class(truth, found, classes) if per_class else []
        judged = [judge(*part) for part in parts]
    metrics = dict(zip(METRICS, map(float, scorer.stats)))
    if not per_class:
        return metrics
    scores, right, objects = zip(*judged)
    together = best_f1(np.concatenate(scores), np.concatenate(right), sum(objects))
    metrics["F1"], metrics["threshold"] = together
    AP = scorer.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1)).tolist()
    for label, name in enumerate(annotations.classes):
        metrics[f"AP/{name}"] = AP[label]
        metrics[f"F1/{name}"], metrics[f"threshold/{name}"] = best_f1(*judged[label])
    return metrics


def read_results(results, annotations):
    """Return the rows, labels, xywh and scores of results as a dict of arrays.

    Results of a category that is no class cannot change the metrics and are left out.
    """
    if isinstance(results, (str, os.PathLike)):
        where = results
        entries = read_json(results, list[ResultEntry])
    else:
        where = "results"
        try:
            entries = msgspec.convert(results, list[ResultEntry])
        except msgspec.ValidationError:  # numbers of NumPy, or an error that decode describes
            data = msgspec.json.encode(results, enc_hook=operator.methodcaller("tolist"))
            entries = decode(data, list[ResultEntry], where)
    images = annotations.image_ids.tolist()
    categories = list(annotations.label_of)
    rows = look_up(numbered(images), entries, "image_id")
    positions = look_up(numbered(categories), entries, "category_id")
    xywh = boxes_of(entries)
    scores = np.fromiter(map(operator.attrgetter("score"), entries), np.float64, len(entries))
    finite = (np.abs(xywh) < 1e300).all(1) & (np.abs(scores) < 1e300)
    for problem, wrong in (
        (f"image_id is not in the annotations, whose first is {images[0]!r:.100}", rows < 0),
        (f"category_id is not in the categories {categories!r:.200}", positions < 0),
        ("bbox and score must be finite numbers", ~finite),
    ):
        if wrong.any():
            first = wrong.argmax()
            entry = msgspec.to_builtins(entries[first])
            raise UserError(f"{where}: [{first}]: {problem}, in {entry!r:.300}")
    labels = np.array(list(annotations.label_of.values()))[positions]
    columns = {"rows": rows, "labels": labels, "xywh": xywh, "scores": scores}
    return {name: values[labels >= 0] for name, values in columns.items()}


def make_scorer(truth, found, images, classes):
    """Return a COCOeval of boxes in arrays, whose ids are rows and labels.

    hotcoco gives the numbers of pycocotools to the last bit, many times faster. pycocotools takes
    its place where it is missing.
    """
    images = [{"id": row} for row in images]
    categories = [{"id": label, "name": str(label)} for label in classes]
    try:
        from hotcoco import COCO, COCOeval
    except ImportError:
        return pycocotools_scorer(truth, found, images, categories)
    coco = COCO.from_arrays(
        images,
        categories,
        truth["rows"],
        truth["labels"],
        truth["xywh"],
        area=truth["areas"],
        iscrowd=truth["crowds"],
    )
    detections = [found["rows"], found["xywh"], found["scores"], found["labels"]]
    return COCOeval(coco, coco.load_res(np.column_stack(detections)), "bbox")


def pycocotools_scorer(truth, found, images, categories):
    """Return the COCOeval of pycocotools for make_scorer."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    areas = found["xywh"][:, 2] * found["xywh"][:, 3]
    found = found | {"areas": areas, "crowds": np.zeros(len(areas), bool)}
    truth = truth | {"scores": np.ones(len(truth["rows"]))}
    sides = []
    for boxes in (truth, found):
        names = {"image_id": "rows", "category_id": "labels", "bbox": "xywh", "area": "areas"}
        names |= {"iscrowd": "crowds", "score": "scores"}
        columns = [boxes[name].tolist() for name in names.values()]
        rows = [dict(zip(names, row), id=id) for id, row in enumerate(zip(*columns), 1)]
        coco = COCO()
        coco.dataset = {"images": images, "categories": categories, "annotations": rows}
        coco.createIndex()
        sides.append(coco)
    return COCOeval(*sides, "bbox")


def split_by_class(truth, found, classes):
    """Return (truth, found, label) of every class, each with the boxes of the class alone."""
    parts = []
    for boxes in (truth, found):
        order = np.argsort(boxes["labels"], kind="stable")
        ends = np.searchsorted(boxes["labels"][order], classes, side="right")
        rows = np.split(order, ends)[: len(classes)]
        parts.append([{name: values[kept] for name, values in boxes.items()} for kept in rows])
    return list(zip(*parts, classes))


def judge(truth, found, label):
    """Match the detections of one class at IoU 0.5, as COCO does.

    Returns their scores (D,) without those that match crowds, whether each is right (D,), and the
    number of objects. Only the images with a box of the class are looked at, so that memory does
    not grow with classes times images.
    """
    images = np.union1d(truth["rows"], found["rows"]).tolist()
    scorer = make_scorer(truth, found, images, [label])
    scorer.params.iouThrs = [0.5]
    scorer.params.areaRng = scorer.params.areaRng[:1]  # all sizes
    scorer.params.areaRngLbl = scorer.params.areaRngLbl[:1]
    scorer.evaluate()
    entries = [entry for entry in scorer.evalImgs if entry]
    scores = np.array([score for entry in entries for score in entry["dtScores"]])
    matches = np.array([match for entry in entries for match in entry["dtMatches"][0]])
    ignored = np.array([flag for entry in entries for flag in entry["dtIgnore"][0]], dtype=bool)
    objects = sum(not flag for entry in entries for flag in entry["gtIgnore"])
    return scores[~ignored], matches[~ignored] > 0, objects


def best_f1(scores, right, objects):
    """Return the highest F1 over all score thresholds, and its threshold; -1, -1 if there is none.

    F1 = 2 * TP / (detections + objects), counted over all images, of the detections whose score is
    not below the threshold.
    """
    if not len(scores) or not objects:
        return -1.0, -1.0
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    F1 = 2 * right[order].cumsum() / (np.arange(1, len(scores) + 1) + objects)
    last = np.append(scores[1:] < scores[:-1], True)  # of several detections with one score
    best = np.where(last, F1, 0).argmax()
    return float(F1[best]), float(scores[best])


def table(metrics):
    """Return the metrics as text, a line for each; "-" means that there is nothing to find."""
    names = [printable(name, 80) for name in metrics]
    width = max(map(len, names))
    numbers = [f"{value:6.3f}" if value >= 0 else "     -" for value in metrics.values()]
    return "\n".join(f"{name:{width}s} {number}" for name, number in zip(names, numbers))


# ---- drawing -----------------------------------------------------------------------------------

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its black and yellow.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
LEVEL_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")  # P3 to P7, cold to warm


def draw(
    image, detections, classes=None, score_threshold=0.5, min_side=480, colors=None, font_size=None
):
    """Return a PIL image with one entry of `FCOS.predict` drawn on it: boxes, classes and scores.

    image: anything `FCOS.predict` takes. detections: without "scores" they are ground truth, and
    all are drawn; otherwise those that score at least `score_threshold`. min_side: an image whose
    short side has fewer pixels is enlarged. colors: one for each box instead of one for each class.
    font_size: in pixels.
    """
    from matplotlib import get_data_path  # its font has most alphabets; slow to import

    picture = Image.fromarray(fcos.as_image(image).permute(1, 2, 0).numpy())
    scale = min(math.ceil(min_side / min(picture.size)), 4000 // max(picture.size)) or 1
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    size = font_size or max(12, min(picture.size) // 40)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    pen = ImageDraw.Draw(picture)
    boxes = (detections["boxes"] * scale).tolist()
    labels = detections["labels"].tolist()
    if colors is None:
        colors = [COLORS[label % len(COLORS)] for label in labels]
    texts = [f"{classes[label] if classes else label}" for label in labels]
    shown = range(len(boxes))
    if "scores" in detections:
        scores = detections["scores"].tolist()
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores)]
        shown = [i for i in shown if scores[i] >= score_threshold]
    for i in reversed(shown):  # the best last, above the others
        draw_box(pen, boxes[i], colors[i], max(3, size // 5))
    taken = []
    for i in shown:
        wh = pen.textlength(texts[i], font) + size // 2, 1.3 * size
        x, y = place_label(boxes[i], wh, picture.size, taken)
        taken.append((x, y, x + wh[0], y + wh[1]))
        pen.rectangle(taken[-1], fill=colors[i])
        red, green, blue = ImageColor.getrgb(colors[i])[:3]
        ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 100 else "white"
        pen.text((x + size // 4, y + wh[1] / 2), texts[i], ink, font, "lm")
    return picture


def draw_box(pen, box, color, width):
    """Draw the outline of a box between two white lines, which show on every background."""
    x1, y1, x2, y2 = box
    for margin, ink, thickness in ((1, "white", width + 2), (0, color, width)):
        corners = (x1 - margin, y1 - margin, max(x1, x2) + margin, max(y1, y2) + margin)
        pen.rectangle(corners, outline=ink, width=thickness)


def place_label(box, wh, picture_wh, taken):
    """Return the top left corner (x, y) of a label of (width, height) pixels near its box.

    The first of ten places is chosen that covers none of the labels in `taken`, a list of
    (x1, y1, x2, y2); if there is none, the place that covers the least.
    """
    x1, y1, x2, y2 = box
    w, h = wh
    above, inside, bottom = y1 - h, y1, y2 - h
    left, right = x1, x2 - w
    corners = [(left, above), (left, above - h), (left, y2), (right, above), (right, y2)]
    corners += [(left, inside), (right, inside), (left, bottom), (right, bottom), (x2, inside)]
    places = []
    for x, y in corners:
        x = max(min(x, picture_wh[0] - w), 0)
        y = max(min(y, picture_wh[1] - h), 0)
        covered = 0
        for label in taken:
            width = max(min(x + w, label[2]) - max(x, label[0]), 0)
            height = max(min(y + h, label[3]) - max(y, label[1]), 0)
            covered += width * height
        places.append((covered, x, y))
    _, x, y = min(places, key=lambda place: place[0])
    return x, y


def start_notebook():
    """Make the folder of this file the working directory, and show figures as small JPEG files."""
    from matplotlib import pyplot
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    os.chdir(Path(__file__).absolute().parent)
    set_matplotlib_formats("jpeg")
    pyplot.rcParams.update({"font.size": 13, "figure.dpi": 80})


def find_pictures(sources):
    """The files that paths, folders (with all that is below them) and patterns such as *.jpg mean;
    UserError for one that means none."""
    kinds, paths = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"), []
    for source in map(str, sources):
        found = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if os.path.isdir(source):
            found = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in kinds)
        if not found:
            raise UserError(f"{source}: no such image, or no image in it; {what_is_there(source)}")
        paths += map(Path, found)
    return paths


def draw_folder(model, sources, out, score_threshold=0.5, workers=0, **how):
    """Draw detections on images (see find_pictures) into `out`, and write them to detections.json
    there: [{"file", "drawn", "height", "width", "detections": [{"category_id", "class", "bbox":
    [x, y, w, h] in pixels, "score"}, ...]}, ...]. Files that cannot be read are named, left out and
    returned. `workers` processes read ahead. how: further keywords of FCOS.predict."""
    paths, out = find_pictures(sources), make_folder(out)
    paths = [p for p in paths if Path(os.path.realpath(p)).parent != Path(os.path.realpath(out))]
    if not paths:
        raise UserError(f"{out}: is where the pictures come from; drawing there would replace them")
    report, unreadable, taken, clocks = [], [], set(), []
    bar = tqdm(paths, "draw", unit="image", leave=False, dynamic_ncols=True)
    for path, image in zip(bar, read_ahead(fcos.read_image, paths, workers)):
        if isinstance(image, UserError):
            tqdm.write(f"{image}; left out", file=sys.stderr)
            unreadable.append(path)
            continue
        clocks.append(time.perf_counter())
        with views_shown(model, bar, how):
            found = model.predict(image, score_threshold=score_threshold, **how)[0]
        clocks.append(time.perf_counter())
        name, count = f"{path.stem}.jpg", 1
        while name in taken:  # photos of one name in several folders
            count += 1
            name = f"{path.stem}_{count}.jpg"
        taken.add(name)
        with fcos.atomic_write(out / name) as file:  # never through a link
            draw(image, found, model.classes, score_threshold).save(file, "JPEG", quality=92)
        rows = result_rows(found, model.category_ids or range(model.num_classes))
        for row, label in zip(rows, found["labels"].tolist()):
            row["class"] = model.classes[label] if model.classes else label
        report.append(
            {
                "file": str(path),
                "drawn": name,
                "height": image.shape[1],
                "width": image.shape[2],
                "detections": rows,
            }
        )
        clocks.append(time.perf_counter())
    with fcos.atomic_write(out / "detections.json", "w") as file:
        json.dump(report, file, indent=1)
    network, drawing, read = (sum(np.diff(clocks)[stage::3]) for stage in range(3))
    boxes = sum(len(entry["detections"]) for entry in report)
    print(
        f"{len(report)} images, {boxes} boxes drawn, {len(unreadable)} left out; {read:.1f} s "
        f"waiting for images, {network:.1f} s network, {drawing:.1f} s drawing",
        file=sys.stderr,
    )
    return unreadable


# ---- command line ------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Shows the script's docstring as help, and a mistake as one line without the usage."""

    def __init__(self, doc):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def number(kind, low, high):
    """argparse type: an int or a float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def keyword_value(text):
    """argparse type: "KEYWORD=VALUE" -> (keyword, value), a Python literal or else a string."""
    keyword, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not KEYWORD=VALUE")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return keyword, value


DECODING = "candidate_threshold", "topk", "nms_threshold", "max_detections"


def set_decoding(model, settings):
    """Change keywords of DECODING, given with their values. Raises UserError for others."""
    for keyword, value in settings:
        if keyword not in DECODING:
            raise UserError(f"--set {keyword}: expected one of {', '.join(DECODING)}")
        setattr(model, keyword, value)


positive_int, not_negative = number(int, 1, 2**63 - 1), number(int, 0, 2**63 - 1)


def check_target(path, inputs):
    """UserError unless a file can be written at `path` that is none of the inputs."""
    target = Path(path)
    if (target.exists() and not target.is_file()) or not target.absolute().parent.is_dir():
        raise UserError(f"{path}: not a file in a folder that exists")
    if target.resolve() in [Path(name).resolve() for name in inputs]:
        raise UserError(f"{path}: would be written over, and is an input of this run")


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror})") from None
    return Path(path)


@contextlib.contextmanager
def one_writer(folder, wait=False):
    """Hold the lock of a folder, made if it is missing, so that one process at a time writes there.

    Only rank 0 takes it. The system releases the lock of a process that is killed, even if its
    workers live on. wait: wait for the other process.
    Raises UserError if another process has the lock, or if the folder cannot be written.
    """
    if rank_and_world_size()[0] > 0:
        yield
        return
    made = not os.path.exists(folder)
    path = make_folder(folder) / ".lock"
    try:
        file = open(path, "a")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process writes there; choose another --out"
            ) from None
        except OSError:
            pass  # a network file system without locks
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                if made:
                    os.rmdir(folder)  # fails unless it is empty


def find_device(name=None):
    """Return the torch.device that --device names, by default CUDA or else the CPU.

    Under torchrun every process gets the one with its local rank. Raises UserError if PyTorch does
    not find such a device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name or ("cuda" if "cuda" in found else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in found:
        use = " or ".join(found)
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device {use}")
    if device.type in ("cuda", "xpu"):
        device = torch.device(device.type, device.index or launch_number("LOCAL_RANK", 0))
        torch.accelerator.set_device_index(device.index)
    return device


def launch_number(name, default):
    """Return a variable of the launcher as a whole number. Raises UserError if it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r:.100}: expected a whole number, as torchrun sets it")
    return int(text)


def launched():
    """Return (rank, number of processes) of the launch, or None if this process runs alone.

    Raises UserError if several processes were started that do not know of each other.
    """
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    rank, world_size, *master = (os.environ.get(name) for name in names)
    advice = "start several processes with torchrun, or one without these variables"
    if rank is None and world_size is None:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1" and not dist.is_torchelastic_launched():
            raise UserError(
                f"srun started {tasks} tasks that do not know of each other; start one torchrun "
                "for each node: srun --ntasks-per-node=1 torchrun ..."
            )
        return None
    if not (f"{rank}".isdecimal() and f"{world_size}".isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK is {rank!r:.100} of WORLD_SIZE {world_size!r:.100}; {advice}")
    if not dist.is_torchelastic_launched() and world_size == "1":
        return None
    if not all(master) or not master[1].isdecimal():
        raise UserError(f"MASTER_ADDR is {master[0]!r}, MASTER_PORT {master[1]!r:.100}; {advice}")
    return int(rank), int(world_size)


def start_process(device, make_store=None):
    """Join torch.distributed if a launcher such as torchrun started this process.

    make_store(rank, world_size, timeout): makes the store of a process that may be restarted.
    Returns rank, number of processes, torch.device.
    """
    if os.environ.get("FCOS_KERNELS") not in (None, "", "cupy", "torch"):
        raise UserError(f"FCOS_KERNELS is {os.environ['FCOS_KERNELS']}: choose cupy or torch")
    launch = None if dist.is_initialized() else launched()
    device = find_device(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # deformable convolutions, as cuDNN's others
    if launch:
        backend = "gloo"  # it carries detections, beside what the device needs for gradients
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        rank, world_size = launch
        timeout, store = datetime.timedelta(hours=2), None  # long enough for rank 0 to score
        if make_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = make_store(rank, world_size, timeout)
        dist.init_process_group(
            backend, timeout=timeout, world_size=world_size, rank=rank, store=store
        )
    return *rank_and_world_size(), device


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def run(main, args):
    """Call a script's main; a user's mistake becomes one line on stderr and exit code 2. A process
    that fails ends at once: destroy_process_group would wait for the others."""
    gc.set_threshold(100_000)  # of the many dicts of results none is garbage
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if empty := [name for name, value in vars(args).items() if value == ""]:  # unset in a shell
            raise UserError(f"an argument is empty: {empty[0]}")
        main(args)
    except (UserError, OSError, UnicodeError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # out of memory
            raise
        print(" ".join(f"{Path(sys.argv[0]).name}: {error}".split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help='model.pt of a run, "coco", or a file of another FCOS family')
    add("--model", dest="row", help="row of fcos.MODELS, for files that do not say")
    add("--device", help="cpu, cuda, mps or xpu (cuda if there is one)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    add("--min-size", type=positive_int, help="pixels of the short side (the model's own)")
    add("--max-size", type=positive_int, help="most pixels of the long side (the model's own)")
    add("--workers", type=not_negative, default=2, help="loader processes, a process (%(default)s)")
    add("--export", metavar="F.onnx", help="write it as ONNX, for images of any size")
    add(
        "--set",
        type=keyword_value,
        nargs="+",
        action="extend",
        metavar="KEYWORD=VALUE",
        default=[],
        help=f"change how the model decodes: {', '.join(DECODING)}",
    )
    add("--tile", type=positive_int, metavar="PIXELS", help="look at crops of this side, too")
    add("--overlap", type=number(float, 0, 0.9), default=0.2, help="of tiles (%(default)s)")
    add = parser.add_argument_group("score it on a data set").add_argument
    add("--data", help="folder of COCO, Roboflow, CVAT, YOLO or Pascal VOC")
    add("--split", default="val2017", help="which part of --data (%(default)s)")
    add("--annotations", help="COCO JSON or other labels, instead of --data")
    add("--image-dir", help="the folder of its images")
    add("--batch-size", type=positive_int, help="images at a time (8 on a GPU, 1 elsewhere)")
    add("--save-json", metavar="F", help="write the detections in COCO's results format")
    add("--tta", action="store_true", help="test-time augmentation: 18 views, two at a time")
    add("--per-class", action="store_true", help="also of each class: AP, best F1 and its score")
    add("--results", metavar="R", help="score this results file instead; needs --annotations")
    add = parser.add_argument_group("draw what it finds").add_argument
    add("--images", nargs="+", metavar="FILE|DIR", help="pictures; needs --out")
    add("--out", metavar="DIR", help="for the drawn ones, and detections.json")
    add(
        "--score-threshold",
        type=number(float, 0, 1),
        default=0.5,
        help="of drawn boxes (%(default)s)",
    )
    return parser.parse_args(argv)


def check_flags(args):
    """Raise UserError unless the flags name one thing to do and all that it needs."""
    for flag, *needs in (
        ("results", "annotations"),
        ("image_dir", "annotations"),
        ("images", "out"),
        ("out", "images"),
        ("per_class", "data", "annotations"),
        ("save_json", "data", "image_dir"),
        ("tta", "data", "image_dir"),
        ("tile", "data", "image_dir", "images"),
    ):
        if getattr(args, flag) and not any(getattr(args, name) for name in needs):
            raise UserError(f"--{flag} needs --{' or --'.join(needs)}".replace("_", "-"))
    given = [name for name in ("data", "annotations", "images", "export") if getattr(args, name)]
    if args.results and given == ["annotations"] and not (args.image_dir or args.model):
        return
    if args.model is None:
        raise UserError("name a model: a file such as runs/shapes/model.pt, or coco")
    if len(given) != 1 or args.results or (args.annotations and not args.image_dir):
        raise UserError(
            "choose one of --data, --annotations with --image-dir or with --results, --images with "
            "--out, and --export"
        )


def score_results(args):
    """Print the metrics of a results file."""
    annotations = read_annotations(args.annotations)
    print(table(score(args.results, annotations, args.per_class)))
    unknown = int((annotations.rows < 0).sum())
    if unknown:
        annotations.notes.append(f"{unknown} boxes belong to no image in it")
    for note in annotations.notes:
        print(f"{args.annotations}: {note}", file=sys.stderr)


def export_model(args, model):
    """Write the model as ONNX."""
    check_target(args.export, [args.model])
    height, width = fcos.padded_hw([model.test_size])
    fcos.export_onnx(model, args.export, height, width)
    print(f"{args.export}: for images padded to multiples of 32 pixels, in fp32")


def draw_images(args, model):
    """Draw what the model finds. Raises UserError at the end if files could not be read."""
    views = dict(tile=args.tile, overlap=args.overlap)
    bad = draw_folder(model, args.images, args.out, args.score_threshold, args.workers, **views)
    if bad:
        raise UserError(f"files that could not be read: {len(bad)}")


def score_model(args, model):
    """Print the metrics of the model on a data set; every process takes a share of the images."""
    rank, _ = rank_and_world_size()
    annotations, image_dir = args.annotations, args.image_dir
    if args.data:
        annotations, image_dir = coco_paths(args.data, args.split)
    dataset = load_dataset(annotations, image_dir, model.classes)
    check_classes(model, dataset)
    if args.save_json:
        images = map(dataset.path, range(len(dataset)))
        check_target(args.save_json, [args.model, dataset.annotations.path, *images])
    for note in dataset.notes if rank == 0 else ():
        print(f"{dataset.annotations}: {note}", file=sys.stderr)
    batch_size = args.batch_size or (1 if model.pixel_mean.device.type == "cpu" else 8)
    views = dict(tile=args.tile, overlap=args.overlap, tta=args.tta)
    results = predict(model, dataset, batch_size, args.workers, **views)
    if rank != 0:
        return
    if args.save_json:
        with fcos.atomic_write(args.save_json, "w") as file:
            file.write(json.dumps(results))
    print(table(score(results, dataset.annotations, args.per_class)))


def main(args):
    """Score, draw or export, as the command line says."""
    check_flags(args)
    if args.results:
        score_results(args)
        return
    rank, _, device = start_process(args.device)
    model = fcos.load(args.model, args.row).to(device)
    set_decoding(model, args.set)
    if args.row and rank == 0:
        print(f"{args.model}: {model.name} with {model.convention}", file=sys.stderr)
    model.test_size = args.min_size or model.test_size[0], args.max_size or model.test_size[1]
    if args.export:
        export_model(args, model)
        return
    with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
        if args.images:
            draw_images(args, model)
        else:
            score_model(args, model)


if __name__ == "__main__":
    run(main, parse_args())
