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
import contextlib
import datetime
import functools
import gc
import glob
import io
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import fcos
from fcos import UserError

# ---- data set ----------------------------------------------------------------------------------


def coco_paths(data, split):
    """(annotation file, image folder) of a split such as "val2017" as COCO, Roboflow, `coco split`
    or CVAT lay them out; COCO's where there is nothing. UserError tells how to convert others."""
    data, name = Path(data), split.removesuffix("2017")
    part = {"val": "valid"}.get(name, name)
    layouts = [
        (data / "annotations" / f"instances_{split}.json", data / split),
        (data / part / "_annotations.coco.json", data / part),
        (data / f"annotations_{name}.json", data / "images"),
        (data / "annotations.json", data / "images"),
        (data / "annotations" / "instances_default.json", data / "images"),
    ]
    there = [paths for paths in layouts if paths[0].exists()]
    yolo = [data / "labels" / name, data / part / "labels", data / "labels"]
    labels = next((folder for folder in yolo if folder.is_dir()), yolo[0])
    images = data / str(labels.relative_to(data)).replace("labels", "images")
    convert = "coco convert --to coco --output"  # of hotcoco
    for mark, command in (
        (
            "data.yaml",
            f"cp {data}/data.yaml {labels}; {convert} {part}.json --from yolo --input "
            f"{labels} --images-dir {images}",
        ),
        ("annotations.xml", f"{convert} {part}.json --from cvat --input {data}/annotations.xml"),
    ):
        if not there and (data / mark).exists():
            raise UserError(
                f"{data}: no COCO JSON, but {mark}; make one of each split, for the "
                f"flags that name annotations and images: {command}"
            )
    return (there or layouts)[0]


def read_json(path):
    """The content of a JSON file, without the polygons that are most of COCO's and of no use here.
    UserError if it is missing or not JSON."""

    def drop(entry):
        entry.pop("segmentation", None)
        return entry

    try:
        with open(fcos.regular(path), encoding="utf-8-sig") as file:  # some write a byte order mark
            return json.load(file, object_hook=drop)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what_is_there(path)}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, or no text
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def what_is_there(path):
    """What a user may have meant by a path that does not exist."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")[:5]
    return f"{folder} holds {', '.join(names) or 'nothing'}"


def read_coco(path):
    """A COCO instances JSON, checked -> its content, {image id: row}, {category id: label}, and its
    annotations as plain_boxes. Rows and labels count from 0 in rising order of the ids."""
    coco = read_json(path)
    for part in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(part), list):
            raise UserError(f"{path}: not COCO instances: it has no list {part!r}")
    rows = numbered(coco["images"], "file_name", f"{path}: images")
    labels = numbered(coco["categories"], "name", f"{path}: categories")
    boxes = plain_boxes(coco["annotations"], rows, labels, path)
    if boxes and all(box["image_id"] < 0 for box in boxes):
        raise UserError(
            f"{path}: no annotation is of an image of the file; the first image_id is "
            f"{coco['annotations'][0]['image_id']!r}, an id {next(iter(rows))!r}"
        )
    return coco, rows, labels, boxes


def numbered(entries, name, where):
    """{id: number} of images or categories, which have an id and a name."""
    for entry in entries:
        if not isinstance(entry, dict) or not {"id", name} <= entry.keys():
            raise UserError(f"{where}: no id and {name} in {entry!r:.300}")
    ids = [entry["id"] for entry in entries]
    if {type(id) for id in ids} not in ({int}, {str}) or np.array(ids).dtype == object:
        raise UserError(f"{where}: expected one or more, with whole numbers below 2**63 as ids")
    id, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where}: id {id} is there {count} times")
    return {id: number for number, id in enumerate(sorted(ids))}


def plain_boxes(entries, rows, labels, where):
    """Annotations or results in the form that training and scoring share: "image_id" is a row, or
    -1 for an unknown image, "category_id" is a label, and optional fields are filled in."""
    boxes = []
    for id, entry in enumerate(entries, 1):  # pycocotools ignores whatever matches annotation 0
        try:
            x, y, w, h = map(float, entry["bbox"])
            row, label = rows.get(entry["image_id"], -1), labels.get(entry["category_id"])
            area, crowd = entry.get("area"), float(entry.get("iscrowd") or 0)
            area = w * h if area is None or not float(area) >= 0 else float(area)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{where}: expected image_id, category_id and bbox [x, y, w, h] in "
                f"{entry!r:.300} ({error!r})"
            ) from None
        if label is None:
            raise UserError(
                f"{where}: category_id {entry['category_id']!r} is not in the "
                f"categories {list(labels)}"
            )
        boxes.append(
            {
                "id": id,
                "image_id": row,
                "category_id": label,
                "bbox": [x, y, w, h],
                "area": area,
                "iscrowd": int(crowd != 0),
            }
        )
    return boxes


class CocoDataset:
    """Boxes and labels of a COCO instances JSON, and the images they belong to.

    Everything is in flat arrays: loader workers share them with their parent, and would copy many
    objects one by one. Crowd boxes are no targets, as in the official code. Boxes are clipped to
    their image; those without area or image are left out. `notes` tells what is odd.

    image_ids (N,), hw (N, 2) pixels, classes: K names, category_ids: K ids, in rising order.
    boxes (M, 4) float32 xyxy pixels and labels (M,) of image i: rows offsets[i]:offsets[i + 1].
    trainable (N,): whether the official training set has the image: it has an annotation, crowds
    included, of more than 1 pixel in width and height.
    """

    def __init__(self, annotations, image_dir):
        self.annotations, self.image_dir = Path(annotations), Path(image_dir)
        coco, rows, labels, boxes = read_coco(annotations)
        categories = sorted(coco["categories"], key=lambda category: category["id"])
        self.sorted = categories == coco["categories"]  # the official code keeps the file's order
        used = {box["category_id"] for box in boxes}
        named = [(category["name"], category.get("supercategory")) for category in categories]
        parents = [parent for name, parent in named if parent != name]
        kept = [k for k, (name, _) in enumerate(named) if k in used or name not in parents]
        self.classes = [categories[k]["name"] for k in kept]
        self.category_ids = [categories[k]["id"] for k in kept]
        self.notes = [
            f"category {name!r} is no class: no box has it, and others name it as their "
            "supercategory"
            for k, (name, _) in enumerate(named)
            if k not in kept
        ]
        self.image_ids = np.array(list(rows))
        self._set_images(sorted(coco["images"], key=lambda image: image["id"]))
        self._set_boxes(boxes, coco["annotations"], kept)

    def _set_images(self, images):
        folder, names = self.image_dir, [str(image["file_name"]) for image in images]
        if not folder.is_dir():
            raise UserError(f"{folder}: no such image folder; {what_is_there(folder)}")
        listed = os.listdir(folder)  # one call is faster than one for each image
        present = {Path(name).stem: name for name in listed}  # YOLO's names have no suffix
        present |= {name: name for name in listed}
        places = [
            present.get(name)
            or next(
                (
                    way
                    for way in (name, f"../{name}")  # CVAT's folders
                    if os.path.isfile(folder / way)
                ),
                None,
            )
            for name in names
        ]
        missing = [name for name, place in zip(names, places) if place is None]
        if missing:
            raise UserError(
                f"{folder}: lacks {len(missing)} of {len(names)} images of "
                f"{self.annotations}, the first being {missing[0]}"
            )
        self._names = np.array(places)
        self.hw = np.array([self._size(image) for image in images])

    def _size(self, image):
        name, height, width = (image.get(key) for key in ("file_name", "height", "width"))
        if "height" not in image or "width" not in image:
            return fcos.read_image(self.image_dir / name).shape[-2:]
        if not all(isinstance(side, int) and side > 0 for side in (height, width)):
            raise UserError(
                f"{self.annotations}: {name} has height {height!r} and width "
                f"{width!r}, not whole numbers over 0"
            )
        return height, width

    def _set_boxes(self, boxes, annotations, kept):
        image = np.array([box["image_id"] for box in boxes], dtype=np.int64)
        label = np.searchsorted(kept, [box["category_id"] for box in boxes])
        crowd = np.array([box["iscrowd"] for box in boxes], dtype=bool)
        xywh = np.array([box["bbox"] for box in boxes]).reshape(-1, 4)
        with np.errstate(over="ignore"):  # infinity is no place inside the image
            xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        inside = np.clip(xyxy, 0, np.tile(self.hw[image][:, ::-1], 2))

        homeless = image < 0
        full = (inside[:, 2:] > inside[:, :2]).all(1) & np.isfinite(xyxy).all(1)
        clipped = (np.abs(inside - xyxy) > 1).any(1)  # up to a pixel is rounding in the JSON
        for what, which in (
            ("belong to no image of the file and are left out", homeless),
            ("have no area inside their image and are no targets", ~full & ~homeless),
            ("reach beyond their image and are clipped", clipped & full & ~homeless),
        ):
            if which.any():
                first = annotations[which.argmax()]
                self.notes.append(f"{which.sum()} of {len(which)} boxes {what}, as {first!r:.150}")

        visible = (xywh[:, 2:] > 1).all(1) & ~homeless
        self.trainable = np.bincount(image[visible], minlength=len(self)) > 0
        keep = np.flatnonzero(full & ~crowd & ~homeless)
        keep = keep[np.argsort(image[keep], kind="stable")]
        self.boxes, self.labels = inside[keep].astype(np.float32), label[keep]
        self.offsets = np.searchsorted(image[keep], np.arange(len(self) + 1))

    def __len__(self):
        return len(self.image_ids)

    def image(self, i):
        """RGB uint8 (3, H, W), in the orientation that the annotations refer to."""
        return fcos.read_image(self.path(i), tuple(self.hw[i].tolist()))

    def path(self, i):
        return self.image_dir / str(self._names[i])

    def target(self, i):
        """boxes float32 (G, 4) xyxy pixels, labels int64 (G,) of image i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return torch.from_numpy(self.boxes[rows]), torch.from_numpy(self.labels[rows])

    def sample(self, i, hw):
        """Return image i resized to (height, width) and its boxes, scaled alike, as a dict.

        {"image": uint8 (3, H, W), "boxes": float32 (G, 4) xyxy pixels, "labels": int64 (G,)}
        """
        h, w = self.hw[i].tolist()
        boxes, labels = self.target(i)
        scale = torch.tensor([hw[1] / w, hw[0] / h, hw[1] / w, hw[0] / h])
        image = fcos.resize(self.image(i), hw)
        return {"image": image, "boxes": boxes * scale, "labels": labels}


# ---- prediction --------------------------------------------------------------------------------


def start_worker(_):
    """Loader workers ignore the signals that stop a run, which often reach all of its processes:
    their parent needs them to finish its step. They end when it does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def no_worker_left():
    """After any error no loader worker is left: they ignore signals, and would keep their parent
    from ending. PyTorch's error about a worker that died or hangs becomes a UserError."""
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
        if isinstance(error, RuntimeError) and "DataLoader" in str(error):
            raise UserError(f"{error}") from None
        raise


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
    """read(item), or its UserError: raised in a worker, it would come wrapped in a traceback."""
    try:
        return read(item)
    except UserError as error:
        return error


def read_ahead(read, items, workers, pin_memory=False):
    """read(item) of all items in turn, or its UserError; worker processes are ahead."""
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
    with no_worker_left(), bar:
        detections = model.predict(images, batch_size=batch_size, **how)
        for i, found in zip(mine, detections, strict=True):
            rows, image_id = result_rows(found, dataset.category_ids), dataset.image_ids[i].item()
            results[i] = [{"image_id": image_id, **row} for row in rows]
    if world_size > 1:
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(results, shares)
        if rank != 0:
            return None
        results = {i: rows for share in shares for i, rows in share.items()}
    assert len(results) == len(dataset), f"{len(results)} of {len(dataset)} images predicted"
    return [row for i in range(len(dataset)) for row in results[i]]


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
    """COCO's twelve box metrics of a list of results: {"AP": ..., "AP50": ...}, from 0 to 1, or -1
    where there is nothing to find. With per_class also {"AP/<class>": ...}, and for all ("F1",
    "threshold") and each class ("F1/<class>", ...) the best F1 at IoU 0.5 and its threshold."""
    try:  # the numbers of pycocotools to the last bit, many times faster
        from hotcoco import COCO, COCOeval
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    coco, rows, labels, truth = read_coco(annotations)
    if not isinstance(results, list):
        raise UserError(f"results: expected a list of detections, not a {type(results).__name__}")
    found = plain_boxes(results, rows, labels, "results")
    for result, box in zip(results, found):
        if box["image_id"] < 0:
            raise UserError(f"results: image_id {result['image_id']} is not in the annotations")
        numbers = [*box["bbox"], result.get("score")]
        if not all(isinstance(x, (int, float)) and abs(x) < 1e300 for x in numbers):
            raise UserError(f"results: expected finite numbers as bbox and score in {result}")
        box.update(score=numbers[4], area=box["bbox"][2] * box["bbox"][3])

    names = {category["id"]: f"{category['name']}" for category in coco["categories"]}

    def indexed(boxes):  # by rows and labels, because hotcoco takes no text and no -1 as an id
        index = COCO()
        index.dataset = {
            "images": [{"id": row} for row in rows.values()],
            "categories": [{"id": label, "name": names[id]} for id, label in labels.items()],
            "annotations": [
                box
                for box in boxes
                if box["image_id"] >= 0 and all(map(math.isfinite, box["bbox"]))
            ],
        }
        index.createIndex()
        return index

    with contextlib.redirect_stdout(io.StringIO()):  # they print; the caller decides what to show
        scorer = COCOeval(indexed(truth), indexed(found), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = dict(zip(METRICS, map(float, scorer.stats)))
    if not per_class:
        return metrics

    suffixes = [f"/{names[id]}" for id in labels]
    judged, objects = [], np.zeros(len(suffixes), int)  # (-score, label, whether it is right)
    for entry in scorer.evalImgs:
        if entry and entry["aRng"] == scorer.params.areaRng[0]:  # of all sizes
            label, scores, ignored = (entry[key] for key in ("category_id", "dtScores", "gtIgnore"))
            objects[label] += len(ignored) - sum(ignored)
            judged += [
                (-score, label, match > 0)
                for score, match, crowd in zip(scores, entry["dtMatches"][0], entry["dtIgnore"][0])
                if not crowd
            ]
    scores, classes, right = np.array(sorted(judged)).reshape(-1, 3).T
    AP = scorer.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1)).tolist()
    for k, suffix in ((None, ""), *enumerate(suffixes)):
        chosen = classes >= 0 if k is None else classes == k
        hits, total = right[chosen].cumsum(), objects.sum() if k is None else objects[k]
        F1 = 2 * hits / (np.arange(1, len(hits) + 1) + total)
        best = (F1.max(), -scores[chosen][F1.argmax()]) if len(hits) and total else (-1, -1)
        metrics |= {} if k is None else {f"AP{suffix}": AP[k]}
        metrics |= {f"F1{suffix}": float(best[0]), f"threshold{suffix}": float(best[1])}
    return metrics


def table(metrics):
    """The metrics as people expect to read them."""
    width = max(map(len, metrics))
    rows = ((name, f"{x:6.3f}" if x >= 0 else "     -") for name, x in metrics.items())
    return "\n".join(f"{name:{width}s} {number}" for name, number in rows)


# ---- drawing -----------------------------------------------------------------------------------

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its black and yellow.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
LEVEL_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")  # P3 to P7, cold to warm


def draw(
    image, detections, classes=None, score_threshold=0.5, min_side=480, colors=None, font_size=None
):
    """A PIL image with one entry of model.predict drawn on it: boxes, class names and scores;
    without "scores" they are ground truth. `colors`: one for each box instead of one a class. An
    image whose short side has less than `min_side` pixels is enlarged; text has `font_size`."""
    from matplotlib import get_data_path  # its font has most alphabets; slow to import

    picture = Image.fromarray(fcos.as_image(image).permute(1, 2, 0).numpy())
    scale = min(math.ceil(min_side / min(picture.size)), 4000 // max(picture.size)) or 1
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    pen, size = ImageDraw.Draw(picture), font_size or max(12, min(picture.size) // 40)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    boxes, labels = (detections["boxes"] * scale).tolist(), detections["labels"].tolist()
    colors = colors or [COLORS[label % len(COLORS)] for label in labels]
    texts = [f"{classes[label] if classes else label}" for label in labels]
    shown = range(len(boxes))
    if "scores" in detections:
        scores = detections["scores"].tolist()
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores)]
        shown = [i for i in shown if scores[i] >= score_threshold]
    for i in reversed(shown):  # the best last, above the others
        (x1, y1, x2, y2), color, height = boxes[i], colors[i], 1.3 * size
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=max(2, size // 6))
        width = pen.textlength(texts[i], font) + size // 2
        x = max(min(x1, picture.width - width), 0)
        y = y1 - height if y1 >= height else y1  # inside the box if there is no room above it
        pen.rectangle((x, y, x + width, y + height), fill=color)
        ink = "black" if np.dot(ImageColor.getrgb(color)[:3], (0.3, 0.6, 0.1)) > 100 else "white"
        pen.text((x + size // 4, y + height / 2), texts[i], ink, font, "lm")
    return picture


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


def draw_folder(model, sources, out, score_threshold=0.5, workers=0):
    """Draw detections on images (see find_pictures) into `out`, and write them to detections.json
    there: [{"file", "drawn", "height", "width", "detections": [{"category_id", "class", "bbox":
    [x, y, w, h] in pixels, "score"}, ...]}, ...]. Files that cannot be read are named, left out and
    returned. `workers` processes read ahead."""
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
        found = model.predict(image, score_threshold=score_threshold)[0]
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


def start_process(device, make_store=None):
    """Join torch.distributed if torchrun started this process. -> rank, world size, torch.device.
    make_store(rank, world_size, timeout): makes the store of a process that may be restarted."""
    if os.environ.get("FCOS_KERNELS") not in (None, "", "cupy", "torch"):
        raise UserError(f"FCOS_KERNELS is {os.environ['FCOS_KERNELS']}: choose cupy or torch")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True  # deformable convolutions, as cuDNN's others
    if dist.is_torchelastic_launched() and "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo: detections
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
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
    gc.set_threshold(100_000)  # a million annotations and no garbage: a fourth of reading them
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
    add("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    add("--min-size", type=positive_int, help="pixels of the short side (the model's own)")
    add("--max-size", type=positive_int, help="most pixels of the long side (the model's own)")
    add("--workers", type=not_negative, default=2, help="loader processes, a process (%(default)s)")
    add("--export", metavar="F.onnx", help="write it as ONNX, --min-size high and --max-size wide")
    add = parser.add_argument_group("score it on a data set").add_argument
    add("--data", help="folder as COCO, Roboflow, CVAT or `coco split` lay it out")
    add("--split", default="val2017", help="which part of --data (%(default)s)")
    add("--annotations", help="COCO JSON, instead of --data")
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


def main(args):
    # ---- everything that can be wrong, before anything is computed
    for flag, *needs in (
        ("results", "annotations"),
        ("image_dir", "annotations"),
        ("images", "out"),
        ("out", "images"),
        ("per_class", "data", "annotations"),
        ("save_json", "data", "image_dir"),
        ("tta", "data", "image_dir"),
    ):
        if getattr(args, flag) and not any(getattr(args, name) for name in needs):
            raise UserError(f"--{flag} needs --{' or --'.join(needs)}".replace("_", "-"))
    given = [name for name in ("data", "annotations", "images", "export") if getattr(args, name)]
    if args.results and given == ["annotations"] and not (args.image_dir or args.model):
        print(table(score(read_json(args.results), args.annotations, args.per_class)))
        if homeless := sum(box["image_id"] < 0 for box in read_coco(args.annotations)[3]):
            print(f"{args.annotations}: {homeless} boxes belong to no image in it", file=sys.stderr)
        return
    if args.model is None:
        raise UserError("name a model: a file such as runs/shapes/model.pt, or coco")
    if len(given) != 1 or args.results or (args.annotations and not args.image_dir):
        raise UserError(
            "say one thing to do: --data, or --annotations with --image-dir or with "
            "--results, --images with --out, or --export"
        )
    rank, _, device = start_process(args.device)
    model = fcos.load(args.model, args.row).to(device)
    if args.row and rank == 0:
        print(f"{args.model}: {model.name} with {model.convention}", file=sys.stderr)
    min_size, max_size = args.min_size or model.test_size[0], args.max_size or model.test_size[1]
    if args.export:
        check_target(args.export, [args.model])
        height, width = fcos.padded_hw([(min_size, max_size)])
        fcos.export_onnx(model, args.export, height, width)
        print(f"{args.export}: for padded images of {height}x{width} pixels, in fp32")
        return
    model.test_size = min_size, max_size
    with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
        if args.images:
            if bad := draw_folder(model, args.images, args.out, args.score_threshold, args.workers):
                raise UserError(f"files that could not be read: {len(bad)}")
            return
        annotations, image_dir = coco_paths(args.data or ".", args.split)
        dataset = CocoDataset(args.annotations or annotations, args.image_dir or image_dir)
        check_classes(model, dataset)
        if args.save_json:
            images = map(dataset.path, range(len(dataset)))
            check_target(args.save_json, [args.model, dataset.annotations, *images])
        for note in dataset.notes if rank == 0 else ():
            print(f"{dataset.annotations}: {note}", file=sys.stderr)
        batch_size = args.batch_size or (8 if device.type == "cuda" else 1)
        results = predict(model, dataset, batch_size, args.workers, tta=args.tta)
    if rank == 0:
        if args.save_json:
            with fcos.atomic_write(args.save_json, "w") as file:
                json.dump(results, file)
        print(table(score(results, dataset.annotations, args.per_class)))


if __name__ == "__main__":
    run(main, parse_args())
