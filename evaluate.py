"""Score an FCOS model on a COCO data set, or draw what it finds.

    python evaluate.py runs/shapes/model.pt --data data/shapes
    python evaluate.py coco --images photo.jpg folder/ --out drawn/
    python evaluate.py runs/shapes/model.pt --export model.onnx
    python evaluate.py --results results.json --annotations instances_val2017.json
    torchrun --nproc_per_node=8 evaluate.py runs/coco/model.pt --data data/coco

The sections: the COCO data set, prediction over any number of processes, scoring, drawing, and the
command line. train.py uses the data set, the scores, and how a process starts and ends.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports; see run

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
import re
import shutil
import sys
import traceback
import unicodedata
import warnings
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

import fcos
from fcos import UserError, printable

# ---- the files of a data set -------------------------------------------------------------------

LAYOUTS = [  # annotations and images: COCO, Roboflow, `coco split`, CVAT, YOLO, Pascal VOC
    ("annotations/instances_{split}.json", "{split}"),
    ("{part}/_annotations.coco.json", "{part}"),
    ("annotations_{name}.json", "images"),
    ("annotations.json", "images"),
    ("annotations/instances_default.json", "images"),
    ("annotations.xml", "images"),
    ("labels/{split}", "images/{split}"),
    ("labels/{name}", "images/{name}"),
    ("labels/{part}", "images/{part}"),
    ("{name}/labels", "{name}/images"),
    ("{part}/labels", "{part}/images"),
    ("labels", "images"),
    ("ImageSets/Main/{name}.txt", "JPEGImages"),
    ("Annotations", "JPEGImages"),
    ("{part}", "{part}"),
    ("{name}", "{name}"),
]


def coco_paths(data, split: str) -> tuple[Path, Path]:
    """Return the (annotations, image folder) of a split such as "val2017" in the folder `data`.

    The first of LAYOUTS that exists, or COCO's if the folder is missing.
    Raises UserError with the list of layouts if the folder has none of them.
    """
    data = Path(data)
    name = split.removesuffix("2017")
    words = {"split": split, "name": name, "part": "valid" if name == "val" else name}
    layouts = [[path.format(**words) for path in layout] for layout in LAYOUTS]
    for annotations, images in layouts:
        path = data / annotations
        has_labels = any(path.glob("*.txt")) or any(path.glob("*.xml"))
        if has_labels or (path.exists() and not path.is_dir()):  # reading refuses a pipe
            return path, data / images
    annotations, images = layouts[0]
    if data.is_dir():
        looked_for = ", ".join(layout[0] for layout in layouts)
        there = list_nearest(data / split)
        raise UserError(
            f"{data}: no annotations of {split}; looked for {looked_for}; {there}; for another "
            "layout pass the paths of images and annotations, see --help"
        )
    return data / annotations, data / images


def list_nearest(path):
    """Describe the nearest existing folder of a missing path, for error messages."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")[:5]
    return f"{folder} holds {', '.join(map(printable, names)) or 'nothing'}"


def is_image(name):
    """Return whether a file of this name is not hidden and has a suffix that Pillow reads."""
    suffix = os.path.splitext(name)[1].lower()
    readable = Image.registered_extensions().get(suffix) in Image.OPEN
    return readable and not name.startswith(".")  # macOS puts ._1.jpg beside 1.jpg


def find_images(folder, names, path):
    """Return the paths of images, relative to the folder. names: from the annotations at `path`.

    A name matches the file of the same name, in any Unicode form and with either slash, in the
    folder or beside it; if there is none, the only image with that stem (names may lack a suffix).
    Raises UserError if a name matches no file or several.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such image folder; {list_nearest(folder)}")
    present = set(os.listdir(folder))
    index = functools.cache(index_folder)
    files = [name if name in present else find_image(folder, name, index) for name in names]
    missing = [name for name, file in zip(names, files) if file is None]
    if missing:
        counts = f"{len(missing)} of {len(names)} images of {path}"
        nearest = list_nearest(folder / missing[0].lstrip("/"))
        raise UserError(f"{folder}: lacks {counts}, such as {printable(missing[0])}; {nearest}")
    return files


def find_image(folder, name, index):
    """Return the path of one image or None, see find_images. index: `index_folder` with a cache."""
    head, tail = os.path.split(unicodedata.normalize("NFC", name.replace("\\", "/")))
    heads = [head, unicodedata.normalize("NFD", head)]
    heads += [f"../{head}" for head in heads if head]  # CVAT's names include the image folder
    stem = os.path.splitext(tail)[0] if is_image(tail) else tail
    for key in (("name", tail), ("stem", tail), ("stem", stem)):
        for head in heads:
            files = index(os.path.join(folder, head)).get(key, [])
            if len(files) > 1:
                several = " or ".join(map(printable, files[:3]))
                raise UserError(f"{folder}: {name!r:.99} may be {several}; write the full name")
            if files:
                return os.path.join(head, files[0])
    return None


def index_folder(folder):
    """Return the files of a folder under ("name", name), and its images under ("stem", stem).

    Keys are in Unicode's composed form (NFC); file names are as in the folder.
    """
    index = {}
    with contextlib.suppress(OSError):  # no such folder
        for file in sorted(os.listdir(folder)):
            name = unicodedata.normalize("NFC", file)
            index["name", name] = [file]
            if is_image(name):
                index.setdefault(("stem", os.path.splitext(name)[0]), []).append(file)
    return index


def same_content(paths):
    """Return lists of the positions of images with the same content.

    If there are many, only the paths are compared.
    """
    keys = [str(path) for path in paths]
    if len(keys) <= 10_000:  # reading more files takes too long
        sizes = [os.path.getsize(path) for path in paths]
        counts = Counter(sizes)
        for position, path in enumerate(paths):
            if sizes[position] and counts[sizes[position]] > 1:
                with open(path, "rb") as file:
                    keys[position] = hashlib.file_digest(file, "sha256").digest()
    groups = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


# ---- annotations -------------------------------------------------------------------------------


class ImageEntry(msgspec.Struct, gc=False):
    """An entry of "images" in a COCO JSON. Other fields are skipped."""

    id: int | str
    file_name: str | int
    height: float | None = None
    width: float | None = None


class CategoryEntry(msgspec.Struct, gc=False):
    """An entry of "categories" in a COCO JSON."""

    id: int | str
    name: str | int
    supercategory: str | int | None = None


class BoxEntry(msgspec.Struct, gc=False, kw_only=True):
    """An entry of "annotations" in a COCO JSON. bbox: x, y, width and height in pixels.

    Add fields such as `angle: float = 0.0` or `point: tuple[float, float]`: each becomes a column
    of the samples under its name, with one or more numbers per box. A field without a default is
    required.
    """

    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: bool | float | None = None


class ResultEntry(msgspec.Struct, gc=False):
    """A detection in COCO's results format."""

    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    score: float


class Instances(msgspec.Struct):
    """The lists of a COCO instances JSON."""

    images: list[ImageEntry]
    annotations: list[BoxEntry]
    categories: list[CategoryEntry]


class YoloClasses(msgspec.Struct):
    """The part of YOLO's data.yaml that names the classes."""

    names: list[str | int | float] | dict[int, str | int | float]


def read_json(path, kind=Any):
    """Read a JSON file as the msgspec type `kind`, see `decode`; it is mapped into memory.

    Raises UserError if it is missing or has another type.
    """
    try:
        with open(fcos.regular_file(path), "rb") as file:
            try:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # a file system that cannot map files, or an empty file
                data = file.read()
            return decode(data, kind, path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {list_nearest(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def decode(data, kind, path):
    """Decode JSON as the msgspec type `kind`; other fields, such as COCO's polygons, are skipped.

    If msgspec refuses it (a byte order mark, NaN, numbers as text), Python's `json` decodes it.
    Raises UserError that names the list, the row and the field, and shows the entry.
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
        expected = "COCO instances, with lists of images, annotations and categories"
        if kind is not Instances:
            expected = "a list of detections"
        raise UserError(f"{path}: expected {expected}; {place or 'JSON'}: {problem}")
    entries = content[row[1]] if row[1] else content
    raise UserError(f"{path}: {place}: {problem}, in {entries[int(row[2])]!r:.300}")


def without_polygons(entry):
    """Remove the polygons of an annotation, which take most of the memory and are not used."""
    entry.pop("segmentation", None)
    return entry


YOLO = "YOLO labels"


def read_labels(path, image_dir):
    """Read labels of CVAT, Pascal VOC or YOLO; return Instances, the kind and a list of notes.

    CVAT: an XML file. Pascal VOC: a folder of XML files, or a list of their names in
    ImageSets/Main. YOLO: a folder of text files, with data.yaml in it or above it.
    Raises UserError if they cannot be read.
    """
    kind = YOLO
    if path.suffix == ".xml":
        kind = "CVAT's XML"
    elif path.suffix == ".txt" or any(path.glob("*.xml")):
        kind = "labels of Pascal VOC"
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        try:
            content = read_yolo(path, image_dir) if kind == YOLO else read_xml(path)
        except ImportError as error:
            raise UserError(f"{path}: {kind}: install requirements.txt ({error})") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as {kind} ({printable(error)})") from None
    notes = [f"read as {kind}", *(printable(warning.message) for warning in skipped)]
    return content, kind, notes


def read_xml(path):
    """Read the XML of CVAT or Pascal VOC with hotcoco; return Instances."""
    from hotcoco import COCO

    if path.suffix == ".xml":
        check_xml([path])
        coco = COCO.from_cvat(str(path))
        rotated = len(re.findall(rb"\srotation=", path.read_bytes()))
        if rotated:
            warnings.warn(f"{rotated} boxes are rotated; the rotation is ignored", stacklevel=2)
    else:
        folder = path if path.is_dir() else path.absolute().parents[2] / "Annotations"
        check_xml(folder.glob("*.xml"))
        coco = COCO.from_voc(str(folder))
    content = msgspec.convert(coco.dataset, Instances, strict=False)
    if path.suffix == ".txt":
        text = fcos.regular_file(path).read_text(encoding="utf-8-sig")
        lines = filter(str.strip, text.splitlines())
        files = [os.path.basename(line.split()[0]) for line in lines]
        names = {os.path.splitext(file)[0] if is_image(file) else file for file in files}
        content.images = [image for image in content.images if Path(image.file_name).stem in names]
        missing = names - {Path(image.file_name).stem for image in content.images}
        if missing:
            raise ValueError(f"expected an XML in Annotations with <filename> {min(missing)}")
        ids = {image.id for image in content.images}
        content.annotations = [box for box in content.annotations if box.image_id in ids]
    for image in content.images:
        image.height = image.height or None  # 0 if the XML has no size
        image.width = image.width or None
    return content


def check_xml(files):
    """Raise an error for a pipe, and for names with &amp;, of which hotcoco drops the beginning."""
    for file in files:
        content = fcos.regular_file(file).read_bytes()
        if re.search(rb"<(object>\s*<name|label>\s*<name|filename)>[^<]*&", content):
            raise ValueError(f"{file}: expected names without &; rename the class or image")


def read_yolo(path, image_dir):
    """Read the text files of YOLO; return Instances.

    Boxes are fractions of the image after its EXIF rotation. An image without a text file is
    background. A text file without an image is skipped with a warning, as in YOLO.
    """
    if image_dir is None:
        raise ValueError("expected the image folder, too")
    sideways = [fcos.TURNS[orientation] for orientation in (5, 6, 7, 8)]
    names = read_class_names(path)
    categories = [CategoryEntry(label, str(name)) for label, name in enumerate(names)]
    content = Instances([], [], categories)
    files = {unicodedata.normalize("NFC", file.stem): file for file in path.glob("*.txt")}
    images = {}
    for id, image in enumerate(filter(is_image, sorted(os.listdir(image_dir))), 1):
        stem = unicodedata.normalize("NFC", os.path.splitext(image)[0])
        if stem in images:
            raise ValueError(f"{image} and {images[stem]} share one text file")
        images[stem] = image
        with Image.open(fcos.regular_file(Path(image_dir, image))) as photo:
            width, height = photo.size
            if fcos.exif_turn(photo) in sideways:
                height, width = photo.size
        content.images.append(ImageEntry(id, image, height, width))
        file = files.get(stem)
        text = fcos.regular_file(file).read_text("utf-8-sig", "replace") if file else ""
        for line in filter(str.strip, text.splitlines()):
            try:
                label, x, y, w, h = map(float, line.split())
            except ValueError:
                label = -1
            if label not in range(len(names)) or max(x, y, w, h) > 2:
                expected = f"expected a class below {len(names)} and 4 fractions of the image"
                raise ValueError(f"{file}: {expected}, found {line!r:.99}")
            box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
            content.annotations.append(BoxEntry(image_id=id, category_id=int(label), bbox=box))
    nested = len(list(path.glob("*/**/*.txt")))
    if nested:
        warnings.warn(f"{nested} label files in subfolders are left out", stacklevel=2)
    unused = sorted(files.keys() - images.keys() - {"classes"})
    if unused:
        problem = f"have no image and are left out, such as {unused[0]}.txt"
        warnings.warn(f"{len(unused)} label files {problem}", stacklevel=2)
    if not content.annotations:
        raise ValueError(f"no box belongs to an image in {image_dir}")
    return content


def read_class_names(path):
    """Return the names of the classes in YOLO's data.yaml, in or above the folder `path`.

    Raises ValueError if there is no such file, or if it does not name every class.
    """
    places = [folder / "data.yaml" for folder in (path, *path.absolute().parents[:3])]
    yaml = next(filter(Path.is_file, places), None)
    if yaml is None:
        raise ValueError("expected data.yaml with the names of the classes, here or above")
    try:
        names = msgspec.yaml.decode(yaml.read_bytes(), type=YoloClasses, strict=False).names
    except ValueError as error:
        raise ValueError(f"{yaml}: {error}") from None
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{yaml}: names: expected 0 to {len(names) - 1}, found {list(names)}")
        return [names[label] for label in range(len(names))]
    return names


def sort_by_id(entries, where):
    """Return images or categories in ascending order of their ids.

    Raises UserError unless the ids are unique, and all whole numbers or all text.
    """
    ids = [entry.id for entry in entries]
    kinds = {type(id) for id in ids}
    if kinds not in ({int}, {str}) or (kinds == {int} and max(map(abs, ids)) >= 2**63):
        expected = "expected one or more, with ids that are all whole numbers or all text"
        raise UserError(f"{where}: {expected}; found {ids[:5]!r:.200}")
    id, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where}: expected unique ids, found id {id!r:.100} {count} times")
    return sorted(entries, key=operator.attrgetter("id"))


def find_positions(known, entries, field):
    """Return the position in `known` of the id in a field of each entry, int64 (M,), -1 if unknown.

    known: ids in ascending order, int64 (N,) or text. 7 and "7" are the same id, because some tools
    write ids as text.
    """
    get_id = operator.attrgetter(field)
    try:
        if known.dtype == np.int64:
            ids = np.fromiter(map(get_id, entries), np.int64, len(entries))
        else:
            ids = np.array([str(get_id(entry)) for entry in entries], str)
    except (TypeError, ValueError, OverflowError):  # some are text, or too large to be known
        position_of = {str(id): position for position, id in enumerate(known.tolist())}
        return np.array([position_of.get(str(get_id(entry)), -1) for entry in entries], np.int64)
    found = np.searchsorted(known, ids).clip(max=len(known) - 1)  # faster than a dict
    return np.where(known[found] == ids, found, -1)


def stack_boxes(entries):
    """Return the boxes of annotations or results, float64 (M, 4) as [x, y, w, h] in pixels."""
    sides = itertools.chain.from_iterable(map(operator.attrgetter("bbox"), entries))
    return np.fromiter(sides, np.float64, 4 * len(entries)).reshape(-1, 4)


COCO_FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd")  # others are extra columns
# Names that an extra column must not have: those of samples, batches, targets and flat arrays
RESERVED_NAMES = {"image", "images", "sizes", "counts", "boxes", "labels", "index", "ltrb"}
RESERVED_NAMES |= {"rows", "categories", "xywh", "areas", "crowds"}


def take_columns(boxes, images, categories, path, size=20_000):
    """Convert annotations to a dict of arrays, and empty their list.

    It works in blocks of `size` boxes, which fit the processor's cache, and frees each before the
    next. images, categories: all ids. "rows" and "categories" of the result are positions among
    them; a row is -1 if the image is unknown.
    """
    extra = [name for name in BoxEntry.__struct_fields__ if name not in COCO_FIELDS]
    taken = RESERVED_NAMES.intersection(extra)
    if taken:
        raise UserError(f"field {min(taken)} of BoxEntry: expected another name; samples use it")
    blocks = []
    while boxes or not blocks:
        block = boxes[-size:]
        del boxes[-size:]
        columns = {
            "rows": find_positions(images, block, "image_id"),
            "categories": find_positions(categories, block, "category_id"),
            "xywh": stack_boxes(block),
            "areas": np.array([box.area for box in block], np.float64),  # NaN for None
            "crowds": np.array([bool(box.iscrowd) for box in block], bool),
        }
        unknown = columns["categories"] < 0
        if unknown.any():
            first = unknown.argmax()
            id = f"category_id {block[first].category_id!r:.100}"
            known = f"{categories.tolist()!r:.200}"
            raise UserError(f"{path}: annotations[{len(boxes) + first}]: {id} is not in {known}")
        for name in extra:
            listed = [getattr(box, name) for box in block]
            try:
                values = np.array(listed)
                dtype = np.float32 if values.dtype.kind == "f" else np.int64
                columns[name] = values.astype(dtype)
            except (TypeError, ValueError):
                problem = "expected numbers, equally many for every box"
                raise UserError(f"{path}: column {name}: {problem}, found {listed!r:.99}") from None
        blocks.append(columns)
    columns = {name: np.concatenate([block[name] for block in blocks[::-1]]) for name in columns}
    missing = ~(np.isfinite(columns["areas"]) & (columns["areas"] >= 0))
    with np.errstate(over="ignore", invalid="ignore"):
        columns["areas"][missing] = columns["xywh"][missing, 2:].prod(axis=1)
    return columns


@dataclasses.dataclass
class Annotations:
    """The images, classes and boxes of a COCO instances JSON in flat arrays; str() is the path.

    N images and K classes are sorted by id; M boxes are in the order of the file.
    """

    path: Path
    image_ids: np.ndarray  # (N,) int64 or text
    names: list | None  # N file names
    hw: np.ndarray  # (N, 2) float64 pixels, NaN if not in the file
    classes: list  # K names
    category_ids: list  # K ids, None if the file lacks a requested class
    label_of: dict  # {category id: label, or -1 if the category is not a class}
    rows: np.ndarray  # (M,) int64, the position of the image, -1 if it is unknown
    labels: np.ndarray  # (M,) int64
    xywh: np.ndarray  # (M, 4) float64 pixels
    areas: np.ndarray  # (M,) float64, w * h if the file has no area
    crowds: np.ndarray  # (M,) bool
    columns: dict  # {name: float32 or int64 (M, ...)}, the extra fields of BoxEntry
    in_id_order: bool  # whether the file lists its categories in order of their ids
    upright: bool  # whether boxes refer to images turned by their EXIF orientation, as in YOLO
    notes: list  # warnings for the user, one line each

    def __str__(self):
        return str(self.path)


def read_annotations(path, classes=None, image_dir=None) -> Annotations:
    """Read a COCO instances JSON, or the labels that `read_labels` takes.

    classes: names in the order of their labels, if a model or another file decides the classes.
    Raises UserError that names the file, the list and the row of unusable content.
    """
    path = Path(path)
    notes: list[str] = []
    kind = None
    if path.is_dir() or path.suffix in (".xml", ".txt"):
        content, kind, notes = read_labels(path, image_dir)
    else:
        content = read_json(path, Instances)
    images = sort_by_id(content.images, f"{path}: images")
    categories = sort_by_id(content.categories, f"{path}: categories")
    image_ids = np.array([image.id for image in images])
    category_ids = [category.id for category in categories]
    boxes = content.annotations
    first_id = boxes[0].image_id if boxes else None
    columns = take_columns(boxes, image_ids, np.array(category_ids), path)
    rows = columns.pop("rows")
    unknown = rows < 0
    if len(rows) and unknown.all():
        problem = f"no annotation belongs to an image; the first has image_id {first_id!r:.100}"
        raise UserError(f"{path}: {problem}, the first image has id {image_ids[0].item()!r:.100}")
    note_boxes(notes, columns["xywh"], unknown, "have an unknown image_id and are left out")
    positions = columns.pop("categories")
    used = np.bincount(positions, minlength=len(categories)) > 0
    names = name_categories(categories, notes)
    classes = choose_classes(names, categories, used, path, classes, notes)
    label_of_class = {name: label for label, name in enumerate(classes)}
    labels = [label_of_class.get(name, -1) for name in names]
    id_of = dict(zip(names, category_ids))
    return Annotations(
        path=path,
        image_ids=image_ids,
        names=[str(image.file_name) for image in images],
        hw=np.array([[i.height for i in images], [i.width for i in images]], np.float64).T,
        classes=classes,
        category_ids=[id_of.get(name) for name in classes],
        label_of=dict(zip(category_ids, labels)),
        rows=rows,
        labels=np.array(labels, np.int64)[positions],
        xywh=columns.pop("xywh"),
        areas=columns.pop("areas"),
        crowds=columns.pop("crowds"),
        columns=columns,
        in_id_order=categories == content.categories,
        upright=kind == YOLO,
        notes=notes,
    )


def note_boxes(notes, xywh, which, problem):
    """Add a note about the boxes that a mask marks, if there are any."""
    if which.any():
        first = which.argmax()
        example = f"annotations[{first}], {xywh[first].tolist()}"
        notes.append(f"{which.sum()} of {len(which)} boxes {problem}, such as {example}")


def name_categories(categories, notes):
    """Return the names of categories; equal names get their id appended, and a note is added."""
    names = [unicodedata.normalize("NFC", str(category.name)) for category in categories]
    shared = [name for name, count in Counter(names).items() if count > 1]
    if not shared:
        return names
    notes.append(f"categories share the name {shared[0]!r:.100}; their ids are added to it")
    numbered = [f"{name} ({c.id})" for name, c in zip(names, categories)]
    unique = [new if name in shared else name for name, new in zip(names, numbered)]
    if len(set(unique)) < len(unique):
        raise UserError(f"categories {names!r:.200}: expected unique names")
    return unique


def choose_classes(names, categories, used, path, classes, notes):
    """Return the names of the classes, and add notes about other categories.

    By default every category is a class, except the first of a Roboflow export, which has no box
    and is the supercategory of the others. used (K,): whether a box has the category.
    """
    parents = {c.supercategory for c in categories if c.supercategory != c.name}
    usual = [name for name, has_box in zip(names, used) if has_box or name not in parents]
    classes = usual if classes is None else list(classes)
    ignored = [name for name in names if name not in classes]
    missing = [name for name in classes if name not in names]
    for name, has_box in zip(names, used):
        if name in ignored and (has_box or (missing and name in usual)):
            expected = f"one of the {len(classes)} classes that were trained on, {classes!r:.200}"
            raise UserError(f"{path}: category {name!r:.100}: expected {expected}")
    if ignored:
        notes.append(f"ignored categories (not a class, no boxes): {ignored!r:.200}")
    if missing:
        notes.append(f"classes without a category, not scored: {missing!r:.200}")
    return classes


class CocoDataset:
    """The images of a COCO instances JSON with their boxes and labels.

    The boxes of all images are in flat arrays, which dataloader workers share without copying.
    Crowd boxes are not targets, as in the official code. Boxes are clipped to their image; those
    without area or image are left out. `notes` holds warnings for the user.

    annotations: the Annotations of the file, for `score`.
    image_ids (N,), hw (N, 2) pixels, classes: K names, category_ids: K ids, in ascending order.
    boxes (M, 4) float32 xyxy pixels, labels (M,) and extra columns {name: (M, ...)}; image i has
    rows offsets[i]:offsets[i + 1].
    trainable (N,): whether the official code trains on the image: one of its annotations, which may
    be a crowd, is more than 1 pixel wide and high.
    """

    def __init__(self, annotations, image_dir, classes=None):
        self.image_dir = Path(image_dir)
        self.files_read = deque(maxlen=32)  # by `image`, for error messages
        self.annotations = read_annotations(annotations, classes, image_dir)
        self.image_ids = self.annotations.image_ids
        self.classes = self.annotations.classes
        self.category_ids = self.annotations.category_ids
        self.notes = list(self.annotations.notes)
        self._names = np.array(find_images(self.image_dir, self.annotations.names, annotations))
        self.annotations.names = None  # _names replaces them
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
            image = f"{self.annotations}: {printable(self._names[wrong[0]])}"
            problem = f"expected height and width in whole pixels, found {height:g} and {width:g}"
            raise UserError(f"{image}: {problem}")
        return sizes.astype(np.int64)

    def _note_copies(self):
        paths = [os.path.join(self.image_dir, name) for name in self._names.tolist()]
        groups = same_content(paths)
        if groups:
            copies = sum(len(group) - 1 for group in groups)
            names = printable(" and ".join(self._names[groups[0][:2]]))
            problem = "objects labeled in one are background in the other"
            self.notes.append(f"{copies} images are copies of another, such as {names}; {problem}")

    def _set_boxes(self):
        truth = self.annotations
        check_pixels(truth.xywh, truth)
        sides = np.ascontiguousarray(truth.xywh.T)  # (4, M) is faster than (M, 4)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite boxes are dropped below
            xyxy = np.concatenate([sides[:2], sides[:2] + sides[2:]])
        height, width = self.hw[truth.rows].T.astype(np.float64)
        inside = np.clip(xyxy, 0, np.stack([width, height, width, height]))
        known = truth.rows >= 0
        full = (inside[2:] > inside[:2]).all(0) & np.isfinite(xyxy).all(0)
        with np.errstate(invalid="ignore"):
            clipped = (np.abs(inside - xyxy) > 1).any(0)  # up to a pixel is rounding in the JSON
        for problem, rows in (
            ("have no area inside their image and are left out", ~full & known),
            ("reach beyond their image and are clipped", clipped & full & known),
            ("are crowds and not targets", truth.crowds & full & known),
        ):
            note_boxes(self.notes, truth.xywh, rows, problem)
        if 2 * (clipped & known).sum() > len(known):
            problem = "expected boxes [x, y, width, height], found perhaps [x1, y1, x2, y2]"
            self.notes.append(f"most boxes reach beyond their image: {problem}")
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

    def path(self, i) -> Path:
        return self.image_dir / str(self._names[i])

    def image(self, i) -> torch.Tensor:
        """Read image i as uint8 RGB (3, H, W), in the orientation of its annotations."""
        self.files_read.append(self.path(i))
        hw = tuple(self.hw[i].tolist())
        return fcos.read_image(self.path(i), hw, self.annotations.upright)

    def target(self, i):
        """Return the boxes of image i, float32 (G, 4) xyxy pixels, and their labels, int64 (G,)."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        # copies, because an augmentation may change them in place
        return torch.tensor(self.boxes[rows]), torch.tensor(self.labels[rows])

    def truth(self, i, hw) -> dict[str, torch.Tensor]:
        """Return the boxes of image i, scaled to an image of (height, width).

        {"boxes": float32 (G, 4) xyxy pixels, "labels": int64 (G,)} and every extra column as
        in the file: train.py scales it by its rule in COLUMNS.
        """
        h, w = self.hw[i].tolist()
        boxes, labels = self.target(i)
        scale = torch.tensor([hw[1] / w, hw[0] / h, hw[1] / w, hw[0] / h])
        rows = slice(self.offsets[i], self.offsets[i + 1])
        columns = {name: torch.tensor(values[rows]) for name, values in self.columns.items()}
        return {"boxes": boxes * scale, "labels": labels} | columns

    def sample(self, i, hw) -> dict[str, torch.Tensor]:
        """Return {"image": uint8 (3, H, W) resized to (height, width)} and its `truth`."""
        return {"image": fcos.resize(self.image(i), hw)} | self.truth(i, hw)


def check_pixels(xywh, where):
    """Raise UserError if most boxes look normalized: no number over 2, and some fractions."""
    small = xywh[(np.abs(xywh) <= 2).all(1)]  # not 1: reading Pascal VOC moves boxes by a pixel
    fractions = small[(small % 1).any(1)]
    if 2 * len(small) > len(xywh) and len(fractions):
        found = f"normalized ones, such as {fractions[0].tolist()}"
        fix = "multiply them by the size of their image"
        raise UserError(f"{where}: expected boxes in pixels, found {found}; {fix}")


def load_dataset(annotations, image_dir, classes=None) -> CocoDataset:
    """Read a CocoDataset on rank 0 and send it to every other process.

    Every process of torch.distributed must call it. An error of rank 0 is raised in all of them.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return CocoDataset(annotations, image_dir, classes)
    shared: list[Any] = [None]
    if rank == 0:
        try:
            shared[0] = CocoDataset(annotations, image_dir, classes)
        except (UserError, OSError, MemoryError) as error:
            shared[0] = UserError(str(error))
    dist.broadcast_object_list(shared)
    if isinstance(shared[0], UserError):
        raise shared[0]
    return shared[0]


# ---- prediction --------------------------------------------------------------------------------

STOP_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = [number for number in signal.Signals if number.name in STOP_NAMES]
# PyTorch's error messages for a worker that died, hangs or cannot open files
WORKER_ERRORS = r"DataLoader (worker \(pid|timed out)|ancillary data|Too many open files"
WORKER_HELP = "raise `ulimit -n`, enlarge /dev/shm (docker run --shm-size=8g) or use --workers 0"


def start_worker(_):
    """Let a dataloader worker ignore stop signals: its parent needs it to finish the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def check_limits(workers, item_bytes=2**15):
    """Raise UserError if dataloader workers have too few open files or too little shared memory."""
    if not workers:
        return
    files = 40 + 16 * workers  # of a process without workers, and of a worker
    if hasattr(os, "sysconf") and os.sysconf("SC_OPEN_MAX") < files:
        limit = os.sysconf("SC_OPEN_MAX")
        raise UserError(f"workers need {files} open files, found a limit of {limit}; {WORKER_HELP}")
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free / 2**20
        # a worker reads two items ahead
        needed = env_number("LOCAL_WORLD_SIZE", default=1) * workers * 2 * item_bytes / 2**20
        if needed > free:
            problem = f"/dev/shm has {free:.1f} MB free, and workers may need {needed:.1f}"
            raise UserError(f"{problem}; {WORKER_HELP}")


def read_ahead(read, items, workers, pin_memory=False):
    """Return an iterable of read(item), or the UserError it raised; workers read ahead."""
    check_limits(workers)
    # The items take the place of a data set, and reading one takes the place of collating.
    return DataLoader(
        items,
        batch_size=None,
        collate_fn=functools.partial(read_item, read),
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        timeout=600 if workers else 0,
    )


def read_item(read, item):
    """Return read(item), or its UserError, which PyTorch would wrap in a traceback.

    A worker moves the tensors to shared memory here. PyTorch does so in a thread, where an error
    would lose the item and leave the parent waiting.
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
        if "shared memory" in str(error):
            return UserError(f"a dataloader worker: {error}; {WORKER_HELP}")
        raise


def raise_errors(items):
    """Yield the items of `read_ahead`; raise the first error among them."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


@contextlib.contextmanager
def kill_workers():
    """Kill the dataloader workers started in this context at its end, since they ignore signals.

    Without an error they have mostly ended. But a package that stores an exception keeps the frame
    with the loader alive, and Python would wait for the workers at its exit.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException as error:
        # PyTorch writes "Caught" into errors that the code in a worker raised
        if re.search(WORKER_ERRORS, str(error)) and "Caught" not in str(error):
            raise UserError(f"{error}; {WORKER_HELP}") from None
        raise
    finally:
        workers = set(multiprocessing.active_children()) - others
        if workers:
            kill_processes(workers)


def kill_processes(processes):
    """Kill child processes without the error that PyTorch's handler raises if a worker dies."""
    unix = hasattr(signal, "SIGCHLD")
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if unix else None
    for process in processes:
        process.kill()
        process.join()
    if unix:
        signal.signal(signal.SIGCHLD, handler)


def check_classes(model, dataset):
    """Raise UserError with the first difference if a model and a data set differ in classes."""
    path = dataset.annotations
    found = dataset.classes
    if model.classes is not None:
        for expected, other in itertools.zip_longest(model.classes, found):
            if expected != other:
                raise UserError(f"{path}: expected class {expected!r:.100}, found {other!r:.100}")
    elif len(found) != model.num_classes:
        raise UserError(f"{path}: expected {model.num_classes} classes, found {len(found)}")
    elif not path.in_id_order:
        raise UserError(f"{path}: expected categories sorted by id, because the model has no names")


def predict(model, dataset, batch_size=None, workers=2, **options) -> list[dict] | None:
    """Predict every image of a CocoDataset; return the detections in COCO's results format.

    [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}, ...] in the order of the images,
    and every extra column of the detections. Every process of torch.distributed takes its share
    of the batches; the list is complete on rank 0 and None elsewhere.
    batch_size: by default 8 on a GPU, 1 elsewhere. options: more keywords of FCOS.predict.
    """
    batch_size = batch_size or (1 if model.pixel_mean.device.type == "cpu" else 8)
    rank, world_size = rank_and_world_size()
    images_of: dict[tuple, list] = {}  # by padded size: results must not depend on the batch
    for i, hw in enumerate(dataset.hw.tolist()):
        size = fcos.padded_hw([fcos.resized_hw(*hw, *model.test_size)])
        images_of.setdefault(size, []).append(i)
    batches = []
    for images in images_of.values():
        batches += [images[k : k + batch_size] for k in range(0, len(images), batch_size)]
    own_images = [i for batch in batches[rank::world_size] for i in batch]
    bar = progress_bar(read_ahead(dataset.image, own_images, workers), "predict")
    results: dict[int, list] = {}
    with kill_workers(), bar, count_views(model, bar, options):
        detections = model.predict(raise_errors(bar), batch_size=batch_size, **options)
        for i, found in zip(own_images, detections, strict=True):
            image_id = {"image_id": dataset.image_ids[i].item()}
            rows = result_rows(found, dataset.category_ids)
            results[i] = [image_id | row for row in rows if row["category_id"] is not None]
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        dist.gather_object(results, shares if rank == 0 else None)
        if rank != 0:
            return None
        results = {i: rows for share in shares for i, rows in share.items()}
    assert len(results) == len(dataset), f"{len(results)} of {len(dataset)} images predicted"
    return [row for i in range(len(dataset)) for row in results[i]]


def progress_bar(items, name):
    """Wrap an iterable of images in a progress bar, shown on rank 0."""
    # position 0 replaces the bar of training; in any other, Jupyter draws every update
    layout = dict(position=0, leave=False, dynamic_ncols=True, miniters=0)
    return tqdm(items, name, unit="image", disable=rank_and_world_size()[0] > 0, **layout)


@contextlib.contextmanager
def count_views(model, bar, options):
    """Show the number of views beside a progress bar if an image has several, which takes long."""
    seen = 0

    def show(module, inputs):
        nonlocal seen
        seen += len(inputs[0])
        bar.set_postfix_str(f"view {seen}", refresh=False)
        bar.update(0)  # draws the bar, at most ten times a second

    with contextlib.ExitStack() as stack:
        if options.get("tile") or options.get("tta"):
            stack.callback(model.register_forward_pre_hook(show).remove)
        yield


def result_rows(found, category_ids) -> list[dict]:
    """Return the detections on one image in COCO's results format, without its image_id.

    Every extra column of the detections keeps its name.
    """
    boxes = found["boxes"]
    columns = {name: values.tolist() for name, values in found.items() if name != "boxes"}
    columns["category_id"] = [category_ids[label] for label in columns.pop("labels")]
    columns["bbox"] = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    columns["score"] = columns.pop("scores")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


# ---- scoring -----------------------------------------------------------------------------------

METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def score(results, annotations, per_class=False) -> dict[str, float]:
    """Return COCO's twelve box metrics, {"AP": ..., "AP50": ...}, from 0 to 1, or -1 for no object.

    results: detections as `predict` returns them, or the path of a JSON file with them.
    annotations: Annotations, or the path of a COCO instances JSON.
    per_class: add "AP/<class>" and, at IoU 0.5, the best "F1" and its "threshold" over all classes,
    "F1/<class>" and "threshold/<class>" (see best_f1).
    Raises UserError that names the entry if results do not fit the annotations.
    """
    if not isinstance(annotations, Annotations):
        annotations = read_annotations(annotations)
    usable = (annotations.rows >= 0) & np.isfinite(annotations.xywh).all(1)
    columns = ("rows", "labels", "xywh", "areas", "crowds")
    truth = {name: getattr(annotations, name)[usable] for name in columns}
    found = read_results(results, annotations)
    classes = range(len(annotations.classes))
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        scorer = make_scorer(truth, found, range(len(annotations.image_ids)), classes)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        matched = [match_class(truth, found, label) for label in classes] if per_class else []
    metrics = dict(zip(METRICS, map(float, scorer.stats)))
    if not per_class:
        return metrics
    scores, right, objects = zip(*matched)
    overall = best_f1(np.concatenate(scores), np.concatenate(right), sum(objects))
    metrics["F1"], metrics["threshold"] = overall
    AP = scorer.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1)).tolist()
    for label, name in enumerate(annotations.classes):
        metrics[f"AP/{name}"] = AP[label]
        metrics[f"F1/{name}"], metrics[f"threshold/{name}"] = best_f1(*matched[label])
    return metrics


def read_results(results, annotations):
    """Return the rows, labels, xywh and scores of results as a dict of arrays.

    Results of categories that are not classes are dropped: they cannot change the metrics.
    """
    if isinstance(results, (str, os.PathLike)):
        where = str(results)
        entries = read_json(results, list[ResultEntry])
    else:
        where = "results"
        try:
            entries = msgspec.convert(results, list[ResultEntry])
        except msgspec.ValidationError:  # NumPy's numbers, or an error that decode describes
            data = msgspec.json.encode(results, enc_hook=operator.methodcaller("tolist"))
            entries = decode(data, list[ResultEntry], where)
    first_id = annotations.image_ids[0].item()
    categories = list(annotations.label_of)
    rows = find_positions(annotations.image_ids, entries, "image_id")
    positions = find_positions(np.array(categories), entries, "category_id")
    xywh = stack_boxes(entries)
    scores = np.fromiter(map(operator.attrgetter("score"), entries), np.float64, len(entries))
    finite = (np.abs(xywh) < 1e300).all(1) & (np.abs(scores) < 1e300)
    for problem, wrong in (
        (f"expected an image_id of the annotations, such as {first_id!r:.100}", rows < 0),
        (f"expected a category_id among {categories!r:.200}", positions < 0),
        ("expected finite numbers in bbox and score", ~finite),
    ):
        if wrong.any():
            first = wrong.argmax()
            entry = msgspec.to_builtins(entries[first])
            raise UserError(f"{where}: [{first}]: {problem}, found {entry!r:.300}")
    if where != "results":
        check_pixels(xywh, where)
    labels = np.array(list(annotations.label_of.values()))[positions]
    columns = {"rows": rows, "labels": labels, "xywh": xywh, "scores": scores}
    return {name: values[labels >= 0] for name, values in columns.items()}


def make_scorer(truth, found, images, classes):
    """Return a COCOeval of boxes in arrays, with rows as image ids and labels as category ids.

    hotcoco gives the same numbers as pycocotools, many times faster; if it is not installed,
    pycocotools is used.
    """
    images = [{"id": row} for row in images]
    categories = [{"id": label, "name": str(label)} for label in classes]
    columns = [truth[name] for name in ("rows", "labels", "xywh", "areas", "crowds")]
    try:
        from hotcoco import COCO, COCOeval

        *columns, areas, crowds = columns
        coco = COCO.from_arrays(images, categories, *columns, area=areas, iscrowd=crowds)
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        names = ("image_id", "category_id", "bbox", "area", "iscrowd")
        boxes = zip(*(column.tolist() for column in columns))
        boxes = [dict(zip(names, box), id=id) for id, box in enumerate(boxes, 1)]
        coco = COCO()
        coco.dataset = {"images": images, "categories": categories, "annotations": boxes}
        coco.createIndex()
    rows = np.column_stack([found["rows"], found["xywh"], found["scores"], found["labels"]])
    detections = coco.loadRes(rows) if len(rows) else COCO()
    return COCOeval(coco, detections, "bbox")


def match_class(truth, found, label):
    """Match the detections of one class at IoU 0.5, as COCO does.

    Returns the scores (D,) of detections that match no crowd, whether each is correct (D,), and the
    number of objects. Images without a box of the class are left out to save memory.
    """
    truth = {name: values[truth["labels"] == label] for name, values in truth.items()}
    found = {name: values[found["labels"] == label] for name, values in found.items()}
    images = np.union1d(truth["rows"], found["rows"]).tolist()
    if not images:
        return np.zeros(0), np.zeros(0, bool), 0
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

    F1 = 2 * TP / (detections + objects) over all images, with the detections that score at least
    the threshold.
    """
    if not len(scores) or not objects:
        return -1.0, -1.0
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    F1 = 2 * right[order].cumsum() / (np.arange(1, len(scores) + 1) + objects)
    last = np.append(scores[1:] < scores[:-1], True)  # of detections with equal scores
    best = np.where(last, F1, 0).argmax()
    return float(F1[best]), float(scores[best])


def table(metrics) -> str:
    """Return the metrics as text, one per line; "-" means that the data set has no such object."""
    names = [printable(name, 80) for name in metrics]
    width = max(map(len, names))
    numbers = [f"{value:6.3f}" if value >= 0 else "     -" for value in metrics.values()]
    return "\n".join(f"{name:{width}s} {number}" for name, number in zip(names, numbers))


# ---- drawing -----------------------------------------------------------------------------------

# Okabe and Ito's palette, which color-blind readers can tell apart, without its black and yellow.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
LEVEL_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")  # P3 to P7, cold to warm


def draw(
    image, detections, classes=None, score_threshold=0.5, min_side=480, colors=None, font_size=None
) -> Image.Image:
    """Draw boxes, classes and scores of one entry of `FCOS.predict`; return a PIL image.

    image: anything `FCOS.predict` takes. detections: those with a score of at least
    `score_threshold` are drawn, or all if there are no "scores" (ground truth). min_side: enlarge
    images whose short side has fewer pixels. colors: one per box; by default one per class.
    font_size: in pixels.
    """
    from matplotlib import get_data_path  # its font covers most alphabets; slow to import

    picture = Image.fromarray(fcos.as_image(image).permute(1, 2, 0).numpy())
    scale = min(math.ceil(min_side / min(picture.size)), 4000 // max(picture.size)) or 1
    picture = ImageOps.scale(picture, scale)
    size = font_size or max(12, min(picture.size) // 40)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    pen = ImageDraw.Draw(picture)
    boxes = (detections["boxes"] * scale).tolist()
    labels = detections["labels"].tolist()
    if colors is None:
        colors = [COLORS[label % len(COLORS)] for label in labels]
    texts = [printable(classes[label] if classes else label, 80) for label in labels]
    shown = list(range(len(boxes)))
    if "scores" in detections:
        scores = detections["scores"].tolist()
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores)]
        shown = [i for i in shown if scores[i] >= score_threshold]
    for i in reversed(shown):  # the best last, on top
        draw_box(pen, boxes[i], colors[i], max(3, size // 5))
    taken: list[tuple] = []
    for i in shown:
        wh = (pen.textlength(texts[i], font) + size // 2, 1.3 * size)
        x, y = place_label(boxes[i], wh, picture.size, taken)
        taken.append((x, y, x + wh[0], y + wh[1]))
        pen.rectangle(taken[-1], fill=colors[i])
        red, green, blue = ImageColor.getrgb(colors[i])[:3]
        ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 100 else "white"
        pen.text((x + size // 4, y + wh[1] / 2), texts[i], ink, font, "lm")
    return picture


def draw_box(pen, box, color, width):
    """Draw the outline of a box between two white lines, visible on any background."""
    x1, y1, x2, y2 = box
    for margin, ink, thickness in ((1, "white", width + 2), (0, color, width)):
        corners = (x1 - margin, y1 - margin, max(x1, x2) + margin, max(y1, y2) + margin)
        pen.rectangle(corners, outline=ink, width=thickness)


def place_label(box, wh, picture_wh, taken):
    """Return the top left corner (x, y) of a box's label of (width, height) pixels.

    The label starts above the box and slides down past the labels in `taken`, (x1, y1, x2, y2)
    each, but not below the picture, nor below the box or two label heights from its top.
    """
    x1, y1, _, y2 = box
    w, h = wh
    x = max(min(x1, picture_wh[0] - w), 0)
    y = max(y1 - h, 0)
    for left, top, right, bottom in sorted(taken, key=operator.itemgetter(1)):
        if x < right and left < x + w and y < bottom and top < y + h:
            y = bottom
    lowest = min(max(y2, y1 + 2 * h), picture_wh[1] - h)
    return x, max(min(y, lowest), 0)


def start_notebook():
    """Change to the folder of this file, and show figures as small JPEG files."""
    from matplotlib import pyplot
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    os.chdir(Path(__file__).absolute().parent)
    set_matplotlib_formats("jpeg")
    pyplot.rcParams.update({"font.size": 13, "figure.dpi": 80})


def find_pictures(sources) -> list[Path]:
    """Return the image files that paths, folders and patterns such as *.jpg name.

    A folder means all images below it that Pillow reads; the number of other files is printed.
    Raises UserError for a source without an image.
    """
    pictures: list[Path] = []
    skipped = 0
    for source in map(str, sources):
        if os.path.isdir(source):
            files = sorted(path for path in Path(source).rglob("*") if not path.is_dir())
            found = [path for path in files if is_image(path.name)]
            skipped += len(files) - len(found)
        elif os.path.exists(source):
            found = [Path(source)]
        else:
            found = [Path(path) for path in sorted(glob.glob(source, recursive=True))]
        if not found:
            raise UserError(f"{source}: no such image, or no image in it; {list_nearest(source)}")
        pictures += found
    if skipped:
        print(f"skipped {skipped} files that are not images", file=sys.stderr)
    return pictures


def draw_folder(model, sources, out, score_threshold=0.5, workers=0, **options) -> list[Path]:
    """Draw detections on images into the folder `out`, and list them in detections.json there.

    The list has an entry {"file", "drawn", "height", "width", "detections": [{"category_id",
    "class", "bbox": [x, y, w, h] in pixels, "score"}, ...]} for every image.
    sources: see find_pictures. workers: processes that read ahead. options: more keywords of
    FCOS.predict.

    Returns the files that could not be read, predicted or drawn; stderr says why.
    Raises UserError if `out` holds the pictures, or if another process writes there.
    """
    out = Path(out)
    own = os.path.realpath(out)
    paths = [p for p in find_pictures(sources) if os.path.dirname(os.path.realpath(p)) != own]
    if not paths:
        raise UserError(f"{out}: holds the pictures, drawing would replace them; use another --out")
    report: list[dict] = []
    left_out = []
    taken: set[str] = set()
    with lock_folder(out), kill_workers():
        fcos.remove_leftovers(out)
        bar = progress_bar(paths, "draw")
        for path, image in zip(bar, read_ahead(fcos.read_image, paths, workers)):
            try:
                if isinstance(image, UserError):
                    raise image
                with count_views(model, bar, options):
                    found = model.predict(image, score_threshold=score_threshold, **options)[0]
                picture = draw(image, found, model.classes, score_threshold)
                name = name_drawing(path, taken)
                with fcos.atomic_write(out / name) as file:  # replaces a link, not its target
                    picture.save(file, "JPEG", quality=92)
            except Exception as error:
                if not is_user_error(error):
                    raise
                reason = str(error).removeprefix(f"{printable(path)}: ")
                tqdm.write(printable(f"{path}: left out; {reason}", 500), file=sys.stderr)
                left_out.append(path)
                continue
            taken.add(name)
            rows = result_rows(found, model.category_ids or range(model.num_classes))
            for row, label in zip(rows, found["labels"].tolist()):
                row["class"] = model.classes[label] if model.classes else label
            entry = {"file": str(path), "drawn": name}
            entry |= {"height": image.shape[1], "width": image.shape[2], "detections": rows}
            report.append(entry)
        with fcos.atomic_write(out / "detections.json", "w") as file:
            json.dump(report, file, indent=1)
    boxes = sum(len(entry["detections"]) for entry in report)
    counts = f"{len(report)} images, {boxes} boxes drawn, {len(left_out)} left out"
    print(counts, file=sys.stderr)
    return left_out


def name_drawing(path, taken):
    """Return a file name for a drawing that is not in `taken`."""
    name = f"{path.stem}.jpg"
    count = 1
    while name in taken:
        count += 1
        name = f"{path.stem}_{count}.jpg"
    return name


# ---- command line ------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """A parser that prints the script's docstring as help, and an error as one line."""

    def __init__(self, doc):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        self.exit(2, printable(f"{self.prog}: {message}; see --help", 1000) + "\n")


def number(kind, low, high):
    """Return an argparse type: an int or a float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, found {text}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def keyword_value(text):
    """Return (keyword, value) of "KEYWORD=VALUE"; the value is a Python literal or else text."""
    keyword, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEYWORD=VALUE, found {text}")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return keyword, value


DECODING = ("candidate_threshold", "topk", "nms_threshold", "max_detections")


def set_decoding(model, settings):
    """Set keywords of DECODING, given as (keyword, value). Raises UserError for others."""
    for keyword, value in settings:
        if keyword not in DECODING:
            raise UserError(f"--set {keyword}: expected one of {', '.join(DECODING)}")
        setattr(model, keyword, value)


def number_for(keyword):
    """Return the argparse type of an argument of FCOS.predict, with its bounds in fcos.CHECKS."""
    bounds = fcos.CHECKS[keyword]
    return number(type(bounds.least), bounds.least, bounds.most)


# The flags of both scripts share these keywords of add_argument and the names of data formats
COUNT = dict(type=number(int, 1, 2**63 - 1), metavar="N")
PIXELS = COUNT | dict(metavar="PIXELS")
IMAGES = dict(type=number(int, 1, 2**16), metavar="N")
WORKERS = dict(type=number(int, 0, 256), metavar="N")
PRECISION = dict(choices=("fp32", "bf16"), default="fp32")
KEYWORD_VALUES = dict(type=keyword_value, nargs="+", action="extend", default=[])
LAYOUT_NAMES = "COCO, Roboflow, CVAT, YOLO or Pascal VOC"


def check_target(path, inputs):
    """Raise UserError if `path` cannot be written or is one of the inputs."""
    target = Path(path)
    if (target.exists() and not target.is_file()) or not target.absolute().parent.is_dir():
        raise UserError(f"{path}: expected a file in an existing folder")
    if os.path.realpath(target) in map(os.path.realpath, inputs):  # Path.resolve fails in a loop
        raise UserError(f"{path}: is an input of this run; write to another file")


def make_folder(path) -> Path:
    """Create a folder and its parents. Raises UserError if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create this folder ({error.strerror})") from None
    return Path(path)


@contextlib.contextmanager
def lock_folder(folder, wait=False):
    """Create a folder if it is missing and lock it, so that one run at a time writes there.

    Only rank 0 takes the lock. If it is killed, the system releases the lock even if its dataloader
    workers still run. wait: wait for the lock. Raises UserError if another process holds it.
    """
    if rank_and_world_size()[0] > 0:
        yield
        return
    missing = not os.path.isdir(folder)
    path = make_folder(folder) / ".lock"
    with open(fcos.regular_file(path), "a") as file:
        try:
            import fcntl  # Windows has none

            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder}: another process writes there; use another --out") from None
        except (ImportError, OSError):
            pass  # Windows, or a network file system without locks
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may be gone
                path.unlink()
                if missing:
                    os.rmdir(folder)  # fails unless it is empty


def find_device(name=None) -> torch.device:
    """Return the torch.device that --device names; by default CUDA, or the CPU if there is none.

    Under torchrun every process gets the device of its local rank. Raises UserError if PyTorch
    finds no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    kind, _, index = (name or ("cuda" if "cuda" in found else "cpu")).partition(":")
    if kind not in found or not (index or "0").isdecimal():
        choices = " or ".join(found)
        raise UserError(f"--device {name}: PyTorch does not find it; use --device {choices}")
    if kind not in ("cuda", "xpu"):
        return torch.device(kind)
    device = torch.device(kind, int(index or env_number("LOCAL_RANK", default=0)))
    torch.accelerator.set_device_index(device.index)
    return device


def env_number(name, least=0, most=2**16 - 1, default=None) -> int:
    """Return a launcher's environment variable as an int. Raises UserError for another value."""
    text = f"{os.environ.get(name, default)}"
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UserError(f"{name}: expected {least} to {most}, found {text:.100}; use torchrun")
    return int(text)


def read_launcher() -> tuple[int, int] | None:
    """Return (rank, number of processes) if a launcher such as torchrun started this process.

    Otherwise return None. Raises UserError if several processes were started independently.
    """
    env = os.environ
    if not {"RANK", "WORLD_SIZE"} & env.keys():
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):  # srun, mpirun
            tasks = env.get(name, "1")
            if tasks != "1":
                problem = f"{tasks} independent tasks were started"
                raise UserError(f"{name}: {problem}; start one torchrun per node")
        return None
    rank = env_number("RANK")
    world_size = env_number("WORLD_SIZE", least=rank + 1)
    if world_size == 1 and not dist.is_torchelastic_launched():
        return None
    if not env.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR: expected an address, found nothing; use torchrun")
    env_number("MASTER_PORT", least=1)
    return rank, world_size


def start_process(device, make_store=None) -> tuple[int, int, torch.device]:
    """Join torch.distributed if a launcher such as torchrun started this process.

    make_store(rank, world_size, timeout): returns a store for processes that may be restarted.
    Returns rank, number of processes, torch.device.
    """
    kernels = os.environ.get("FCOS_KERNELS")
    if kernels not in (None, "", "cupy", "torch"):
        raise UserError(f"FCOS_KERNELS: expected cupy or torch, found {kernels}")
    launch = None if dist.is_initialized() else read_launcher()
    device = find_device(device)
    if device.type == "cuda":
        # deformable convolutions are matrix products; cuDNN's convolutions use TF32 by default
        torch.backends.cuda.matmul.allow_tf32 = True
    if launch:
        rank, world_size = launch
        backend = "gloo"  # for detections; on a GPU, gradients use the device's backend
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        timeout = datetime.timedelta(hours=2)  # long enough for rank 0 to score
        if not dist.is_torchelastic_launched():
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(f"rank {rank} waits for {world_size} processes at {address}", file=sys.stderr)
        store = None
        if make_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = make_store(rank, world_size, timeout)
        dist.init_process_group(backend, None, timeout, world_size, rank, store)
    return *rank_and_world_size(), device


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: 0, 1 if it runs alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_user_error(error) -> bool:
    """Return whether the input or the machine caused an error, and not the code."""
    if isinstance(error, RuntimeError):
        return "allocate" in str(error)  # PyTorch ran out of memory
    return isinstance(error, (UserError, OSError, UnicodeError, MemoryError))


def find_line(error) -> str:
    """Return the last line of this project that an error passed through, as "train.py line 7"."""
    folder = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if Path(frame.filename).parent == folder][-1]
    return f"{Path(last.filename).name} line {last.lineno}"


class LossyStream:
    """Standard error that loses text, instead of ending the run, if it cannot be written."""

    def __init__(self, stream):
        self.stream = stream  # not _wrapped: tqdm would not find its bars and write over them

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def run(main, args):
    """Call a script's main; print a user error as one line on stderr and exit with code 2.

    After an error the process group is not destroyed, which would wait for the other processes.
    """
    if sys.stderr is None:  # the shell closed it, as with 2>&-, but progress bars need a file
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = LossyStream(sys.stderr)
    gc.set_threshold(100_000)  # results are many dicts, and searching them for garbage takes time
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for name, value in vars(args).items():
            if value == "":  # a variable that is not set in a shell
                raise UserError(f"{name}: expected a value, found an empty argument")
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_user_error(error):
            raise
        message = f"{Path(sys.argv[0]).name}: {error}"
        if not isinstance(error, UserError):  # perhaps a bug in code that somebody has changed
            message += f" ({find_line(error)})"
        print(printable(" ".join(message.split()), 1000), file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help='model.pt of a run, "coco", or a file of another FCOS family')
    add("--model", dest="row", help="row of fcos.MODELS, for files that do not name it")
    add("--device", help="cpu, cuda, mps or xpu (cuda if there is one)")
    add("--precision", help="bf16: autocast (%(default)s)", **PRECISION)
    add("--min-size", help="short side (as stored with the model)", **PIXELS)
    add("--max-size", help="limit of the long side (as stored with the model)", **PIXELS)
    add("--workers", default=2, help="dataloader workers (%(default)s)", **WORKERS)
    add("--export", metavar="F.onnx", help="write the model as ONNX, for images of any size")
    add("--set", metavar="KEYWORD=VALUE", help=f"change {', '.join(DECODING)}", **KEYWORD_VALUES)
    tile = dict(type=number_for("tile"), metavar="PIXELS")
    add("--tile", help="also predict square crops of this side", **tile)
    overlap = dict(type=number_for("overlap"), metavar="X", default=0.2)
    add("--overlap", help="share of a tile that the next one repeats (%(default)s)", **overlap)
    add = parser.add_argument_group("score it on a data set").add_argument
    add("--data", metavar="DIR", help=f"folder in the layout of {LAYOUT_NAMES}")
    add("--split", default="val2017", help="part of --data (%(default)s)")
    add("--annotations", metavar="F", help="COCO JSON or other labels, instead of --data")
    add("--image-dir", metavar="DIR", help="the folder of its images")
    add("--batch-size", help="images at a time (8 on a GPU, 1 elsewhere)", **IMAGES)
    add("--save-json", metavar="F", help="write the detections in COCO's results format")
    add("--tta", action="store_true", help="test-time augmentation: 18 views, two at a time")
    add("--per-class", action="store_true", help="add AP, best F1 and its threshold per class")
    add("--results", metavar="R", help="score this results file; needs --annotations")
    add = parser.add_argument_group("draw what it finds").add_argument
    add("--images", nargs="+", metavar="FILE|DIR", help="pictures to draw on; needs --out")
    add("--out", metavar="DIR", help="folder for the drawings and detections.json")
    threshold = dict(type=number(float, 0, 1), metavar="X", default=0.5)
    add("--score-threshold", help="the least score that is drawn (%(default)s)", **threshold)
    return parser.parse_args(argv)


def check_flags(args):
    """Raise UserError unless the flags choose one task and all that it needs."""
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
        choices = "--data, --annotations with --image-dir or --results, --images, and --export"
        raise UserError(f"choose one of {choices}")


def print_notes(notes, path):
    for note in notes:
        print(printable(f"{path}: {note}", 500), file=sys.stderr)


def draw_images(args, model):
    """Draw detections. Raises UserError at the end if pictures were left out."""
    options = dict(workers=args.workers, tile=args.tile, overlap=args.overlap)
    left_out = draw_folder(model, args.images, args.out, args.score_threshold, **options)
    if left_out:
        raise UserError(f"pictures that could not be read, predicted or drawn: {len(left_out)}")


def score_model(args, model):
    """Print the metrics of the model on a data set; every process takes a share of the images."""
    rank, _ = rank_and_world_size()
    annotations = args.annotations
    image_dir = args.image_dir
    if args.data:
        annotations, image_dir = coco_paths(args.data, args.split)
    dataset = load_dataset(annotations, image_dir, model.classes)
    check_classes(model, dataset)
    if args.save_json:
        images = map(dataset.path, range(len(dataset)))
        check_target(args.save_json, [args.model, dataset.annotations.path, *images])
    if rank == 0:
        print_notes(dataset.notes, dataset.annotations)
    views = dict(tile=args.tile, overlap=args.overlap, tta=args.tta)
    results = predict(model, dataset, args.batch_size, args.workers, **views)
    if rank != 0:
        return
    if args.save_json:
        with fcos.atomic_write(args.save_json, "w") as file:
            file.write(json.dumps(results))
    print(table(score(results, dataset.annotations, args.per_class)))


def main(args):
    check_flags(args)
    if args.results:
        annotations = read_annotations(args.annotations)
        print(table(score(args.results, annotations, args.per_class)))
        print_notes(annotations.notes, annotations)
        return
    rank, _, device = start_process(args.device)
    model = fcos.load(args.model, args.row).to(device)
    set_decoding(model, args.set)
    if args.row and rank == 0:
        print_notes([f"{model.name} with {model.convention}"], args.model)
    model.test_size = args.min_size or model.test_size[0], args.max_size or model.test_size[1]
    if args.export:
        check_target(args.export, [args.model])
        fcos.export_onnx(model, args.export, *fcos.padded_hw([model.test_size]))
        print(f"{printable(args.export)}: takes images padded to multiples of 32 pixels, in fp32")
        return
    with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
        if args.images:
            draw_images(args, model)
        else:
            score_model(args, model)


if __name__ == "__main__":
    run(main, parse_args())
