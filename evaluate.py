"""Score an FCOS model on a COCO data set, or draw what it finds.

    python evaluate.py runs/shapes/model.pt --data data/shapes
    python evaluate.py runs/shapes/model.pt --images photo.jpg folder/ --out drawn/
    python evaluate.py --results results.json --annotations instances_val2017.json
    torchrun --nproc_per_node=8 evaluate.py runs/coco/model.pt --data data/coco

In this order: the COCO data set, prediction over any number of processes, scoring, drawing, and the
command line. train.py takes from it the data set (CocoDataset, coco_paths), what it evaluates with
(predict, score, check_classes), and how a process starts and ends (start_process, run,
start_worker, no_worker_left, ArgumentParser and its types).
"""

import argparse
import contextlib
import datetime
import gc
import io
import json
import math
import multiprocessing
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import fcos
from fcos import UserError

# ---- data set ----------------------------------------------------------------------------------


def coco_paths(data, split):
    """(annotation file, image folder) of a split such as "val2017" in COCO's own layout."""
    return Path(data) / "annotations" / f"instances_{split}.json", Path(data) / split


def read_json(path):
    """The content of a JSON file, without the polygons, of no use here, that are most of COCO's;
    UserError if it is missing or not JSON."""

    def drop(entry):
        entry.pop("segmentation", None)
        return entry

    collecting = gc.isenabled()
    gc.disable()  # a million new objects and no garbage: looking for it doubles the time
    try:
        with open(path, encoding="utf-8-sig") as file:  # some exporters write a byte order mark
            return json.load(file, object_hook=drop)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what_is_there(path)}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, or no text
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    finally:
        if collecting:
            gc.enable()


def read_coco(path):
    """The content of a COCO instances JSON, of which the parts that boxes need are checked."""
    coco = read_json(path)
    for part in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(part), list):
            raise UserError(f"{path}: not COCO instances: it has no list {part!r}")
        if not all(isinstance(entry, dict) for entry in coco[part]):
            raise UserError(f"{path}: not COCO instances: {part!r} holds more than objects")
    for annotation in coco["annotations"]:
        if not is_box(annotation.get("bbox")):
            raise UserError(
                f"{path}: the bbox of annotation {annotation.get('id')} is "
                f"{annotation.get('bbox')!r}, not four numbers [x, y, w, h]"
            )
        for field in ("area", "iscrowd"):
            if not isinstance(annotation.get(field, 0), (int, float, type(None))):
                raise UserError(
                    f"{path}: the {field} of annotation {annotation.get('id')} is "
                    f"{annotation[field]!r}, not a number"
                )
    return coco


def is_box(value):
    """Whether this is a list of four numbers, NaN and infinity among them."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 4
        and all(isinstance(x, (int, float)) for x in value)
    )


def what_is_there(path):
    """What a user may have meant by a path that does not exist."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    with contextlib.suppress(OSError):
        entries = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")[:5]
        return f"{folder} holds {', '.join(entries) or 'nothing'}"
    return f"{folder} cannot be read"


class CocoDataset:
    """Boxes and labels of a COCO instances JSON, and the images they belong to.

    Everything lies in flat arrays, so that loader workers share it with the parent instead of
    copying it object by object. Crowd boxes are no targets, as in the official code. Boxes are
    clipped to their image; those without area or image are left out. `notes` tells what is odd.
    UserError names the file and what is wrong with it.

    image_ids (N,), hw (N, 2) pixels, classes: K names, category_ids: K ids, in rising order.
    boxes (M, 4) float32 xyxy pixels and labels (M,) of image i: rows offsets[i]:offsets[i + 1].
    trainable (N,): whether the official training set has the image, that is whether it has any
    annotation, a crowd included, of more than 1 pixel in width and height.
    """

    def __init__(self, annotations, image_dir):
        self.annotations, self.image_dir = Path(annotations), Path(image_dir)
        coco = read_coco(annotations)
        if not self.image_dir.is_dir():
            raise UserError(f"{image_dir}: no such image folder; {what_is_there(image_dir)}")
        try:
            self._flatten(coco)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:  # odd fields
            raise UserError(f"{annotations}: not COCO instances ({error!r})") from None

    def _flatten(self, coco):
        categories = sorted(coco["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.sorted = categories == coco["categories"]  # the official code keeps the file's order
        images = sorted(coco["images"], key=lambda image: image["id"])
        for what, ids in (("categories", self.category_ids), ("images", [x["id"] for x in images])):
            whole = all(type(id) is int and abs(id) < 2**63 for id in ids)
            if not whole and not all(type(id) is str for id in ids):
                raise UserError(f"{self.annotations}: the ids of its {what} are not whole numbers")
            if not ids or len(set(ids)) < len(ids):
                problem = f"id {Counter(ids).most_common(1)[0][0]} twice among its" if ids else "no"
                raise UserError(f"{self.annotations}: has {problem} {what}")

        self.image_ids = np.array([image["id"] for image in images])
        self._names = np.array([os.fsencode(image["file_name"]) for image in images])
        present = set(os.listdir(self.image_dir))
        missing = [
            image["file_name"] for image in images
            if image["file_name"] not in present
            and not (self.image_dir / image["file_name"]).is_file()
        ]
        if missing:
            raise UserError(
                f"{self.image_dir}: lacks {len(missing)} of {len(images)} images of "
                f"{self.annotations}, the first being {missing[0]}"
            )
        self.hw = np.array([self._size(image) for image in images], dtype=np.int64)

        rows = {image["id"]: row for row, image in enumerate(images)}
        label_of = {id: label for label, id in enumerate(self.category_ids)}
        annotations = coco["annotations"]
        unknown = [a["category_id"] for a in annotations if a["category_id"] not in label_of]
        if unknown:
            raise UserError(
                f"{self.annotations}: has {len(unknown)} boxes of no known category, the first of "
                f"category {unknown[0]!r}; its categories are {self.category_ids}"
            )
        image = np.array([rows.get(a["image_id"], -1) for a in annotations], dtype=np.int64)
        label = np.array([label_of[a["category_id"]] for a in annotations], dtype=np.int64)
        crowd = np.array([a.get("iscrowd") or 0 for a in annotations], dtype=bool)
        xywh = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)

        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        boxes = np.clip(xyxy, 0, np.tile(self.hw[image][:, ::-1], 2)) if len(xyxy) else xyxy
        empty = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & np.isfinite(xyxy).all(1))  # NaN: empty
        clipped = (np.abs(boxes - xyxy) > 1).any(1) & ~empty  # by a pixel: rounding in the JSON
        homeless = image < 0
        self.notes = []
        for what, which in (
            ("belong to no image of the file and are left out", homeless),
            ("have no area inside their image and are left out", empty & ~homeless),
            ("reach beyond their image and are clipped", clipped & ~homeless),
        ):
            if which.any():
                first = annotations[which.argmax()]
                self.notes.append(
                    f"{which.sum()} of {len(annotations)} boxes {what}; the first is annotation "
                    f"{first.get('id')} of image {first['image_id']}, {first['bbox']}"
                )
        visible = (xywh[:, 2:] > 1).all(1) & ~homeless
        self.trainable = np.bincount(image[visible], minlength=len(images)) > 0
        keep = np.flatnonzero(~(crowd | empty | homeless))
        keep = keep[np.argsort(image[keep], kind="stable")]
        self.boxes, self.labels = boxes[keep].astype(np.float32), label[keep]
        self.offsets = np.searchsorted(image[keep], np.arange(len(images) + 1))

    def _size(self, image):
        hw = image.get("height"), image.get("width")
        if not {"height", "width"} <= image.keys():
            return fcos.read_image(self.image_dir / image["file_name"]).shape[-2:]
        if not all(isinstance(side, int) and side > 0 for side in hw):
            raise UserError(
                f"{self.annotations}: {image['file_name']} has height {hw[0]!r} and width "
                f"{hw[1]!r}, not whole numbers over 0"
            )
        return hw

    def __len__(self):
        return len(self.image_ids)

    def image(self, i):
        """RGB uint8 (3, H, W), in the orientation that the annotations refer to."""
        return fcos.read_image(self.path(i), tuple(self.hw[i].tolist()))

    def path(self, i):
        return self.image_dir / os.fsdecode(self._names[i])

    def target(self, i):
        """boxes float32 (G, 4) xyxy pixels, labels int64 (G,) of image i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return torch.from_numpy(self.boxes[rows]), torch.from_numpy(self.labels[rows])

    def sample(self, i, hw):
        """Image, boxes and labels of image i, resized to (height, width)."""
        (h, w), (boxes, labels) = self.hw[i].tolist(), self.target(i)
        scale = torch.tensor([hw[1] / w, hw[0] / h, hw[1] / w, hw[0] / h])
        return fcos.resize(self.image(i), hw), boxes * scale, labels


# ---- prediction --------------------------------------------------------------------------------


class EvalBatches(Dataset):
    """The images of a data set, resized, in batches of one padded size: a prediction then depends
    neither on the images beside it nor on the number of processes."""

    def __init__(self, dataset, min_size, max_size, batch_size):
        self.dataset, self.batches = dataset, []
        self.sizes = [fcos.resized_hw(h, w, min_size, max_size) for h, w in dataset.hw.tolist()]
        groups = {}
        for i, size in enumerate(self.sizes):
            groups.setdefault(fcos.padded_hw([size]), []).append(i)
        for group in groups.values():
            self.batches += [group[k : k + batch_size] for k in range(0, len(group), batch_size)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, b):
        members = self.batches[b]
        try:
            images = [fcos.resize(self.dataset.image(i), self.sizes[i]) for i in members]
        except UserError as error:  # raised here it would come wrapped in a worker's traceback
            return error
        return *fcos.pad_batch(images), members


def start_worker(_):
    """What stops a run is often sent to all of its processes, but the step is to be finished with
    the help of the loader workers: they leave it to their parent, and end with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def no_worker_left():
    """After any error no loader worker is left: they ignore signals, and would keep their parent
    from ending. PyTorch's error about one that died or hangs becomes a UserError."""
    try:
        yield
    except BaseException as error:
        unix = hasattr(signal, "SIGCHLD")  # at which PyTorch raises an error, if a worker has died
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
    names, ours = dataset.classes, model.classes
    if ours is None and len(names) != model.num_classes:
        raise UserError(
            f"{dataset.annotations}: has {len(names)} categories, the model {model.num_classes}"
        )
    if ours is None and not dataset.sorted:
        raise UserError(f"{dataset.annotations}: its categories are not in the order of their ids, "
                        "and the model does not say in which order it was trained on them")
    if ours is not None and ours != names:
        pairs = list(zip(ours + [None] * len(names), names + [None] * len(ours)))
        first = next(f"{a!r} against {b!r}" for a, b in pairs if a != b)
        raise UserError(
            f"{dataset.annotations}: its {len(names)} categories are not the {len(ours)} that the "
            f"model was trained on; the first difference is {first}"
        )


@torch.inference_mode()
def predict(model, dataset, batch_size=1, workers=2, min_size=None, max_size=None, **thresholds):
    """Detections on every image of a CocoDataset, in COCO's results format, in the order of the
    images: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}, ...].

    Every process of torch.distributed takes its share of the batches, none twice and none padded;
    the list is complete on rank 0 and None elsewhere. Sizes default to model.test_size.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    device = next(model.parameters()).device
    min_size, max_size = min_size or model.test_size[0], max_size or model.test_size[1]
    batches = EvalBatches(dataset, min_size, max_size, batch_size)
    loader = DataLoader(
        Subset(batches, range(rank, len(batches), world_size)), batch_size=None,
        num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=start_worker,
        timeout=600 if workers else 0,
    )
    training = model.training
    model.eval()
    results = {}
    bar = tqdm(  # in position 0 it replaces a bar of training; below it, Jupyter draws every update
        loader, "predict", unit="batch", position=0, leave=False, disable=rank != 0,
        dynamic_ncols=True,
    )
    with no_worker_left():
        for batch in bar:
            if isinstance(batch, UserError):
                raise batch
            images, sizes, members = batch
            outputs = model(*(x.to(device, non_blocking=True) for x in (images, sizes)))
            for i, size, found in zip(members, sizes, model.detect(outputs, sizes, **thresholds)):
                boxes = model.rescale(found["boxes"].cpu(), size, dataset.hw[i])
                boxes[:, 2:] -= boxes[:, :2]
                image_id = dataset.image_ids[i].item()
                results[i] = [
                    {"image_id": image_id, "category_id": dataset.category_ids[label],
                     "bbox": box, "score": score}
                    for box, score, label in zip(
                        boxes.tolist(), found["scores"].tolist(), found["labels"].tolist()
                    )
                ]
    model.train(training)
    if world_size > 1:
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(results, shares)
        if rank != 0:
            return None
        results = {i: found for share in shares for i, found in share.items()}
    assert len(results) == len(dataset), f"{len(results)} of {len(dataset)} images predicted"
    return [detection for i in range(len(dataset)) for detection in results[i]]


# ---- scoring -----------------------------------------------------------------------------------

METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"
)


def score(results, annotations, per_class=False):
    """COCO's twelve box metrics of a list of results, by pycocotools: {"AP": ..., "AP50": ...}, in
    0..1, and -1 where there is nothing to find. With per_class also {"AP/<class>": ...}."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints; the caller decides what to show
        truth, found = COCO(), COCO()
        truth.dataset = read_coco(annotations)
        # pycocotools ignores whatever matches the annotation of id 0, so ids are counted from 1
        for id, annotation in enumerate(truth.dataset["annotations"], 1):
            w, h = annotation["bbox"][2:]
            area = w * h if annotation.get("area") is None else annotation["area"]
            annotation.update(id=id, area=area, iscrowd=int(bool(annotation.get("iscrowd"))))
        truth.createIndex()
        check_results(results, truth)
        found.dataset = {
            "images": truth.dataset["images"],
            "categories": truth.dataset["categories"],
            "annotations": [
                {**result, "id": id, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
                for id, result in enumerate(results, 1)
            ],
        }
        found.createIndex()
        coco = COCOeval(truth, found, "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    metrics = dict(zip(METRICS, map(float, coco.stats)))
    if per_class:
        for k, id in enumerate(coco.params.catIds):
            precision = coco.eval["precision"][:, :, k, 0, -1]  # all areas, 100 detections
            precision = precision[precision > -1]
            metrics[f"AP/{truth.cats[id]['name']}"] = (
                float(precision.mean()) if precision.size else -1.0
            )
    return metrics


def check_results(results, truth):
    """UserError unless this is a list of detections on images and categories of the annotations."""
    fields = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(results, list):
        raise UserError(f"results: expected a list of detections, not a {type(results).__name__}")
    for row, result in enumerate(results):
        if not isinstance(result, dict) or not fields <= result.keys():
            raise UserError(f"results: row {row} lacks one of {', '.join(sorted(fields))}")
        for field, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
            if not isinstance(result[field], (int, str)) or result[field] not in known:
                raise UserError(f"results: {field} {result[field]} is not in the annotations")
        box, score = result["bbox"], result["score"]
        if not is_box(box) or not all(  # pycocotools matches a NaN to anything
            isinstance(value, (int, float)) and math.isfinite(value) for value in [*box, score]
        ):
            raise UserError(
                f"results: row {row} needs four finite numbers as bbox and one as score, not "
                f"{box!r} and {score!r}"
            )


def table(metrics):
    """The metrics as people expect to read them."""
    width = max(map(len, metrics))
    return "\n".join(
        f"{name:{width}s} {value:6.3f}" if value >= 0 else f"{name:{width}s}      -"
        for name, value in metrics.items()
    )


# ---- drawing -----------------------------------------------------------------------------------

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its black and yellow.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
LEVEL_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")  # P3 to P7, cold to warm


def draw(image, detections, classes=None, score_threshold=0.5, min_side=480, colors=None,
         font_size=None):
    """A PIL image with the boxes, class names and scores of one entry of model.predict drawn on it;
    without "scores" they are ground truth. `colors`: one for each box, instead of one a class.
    An image whose short side has less than `min_side` pixels is enlarged, for the text's sake, of
    which `font_size` is the height in pixels. A label that would cover another moves, if it can."""
    from matplotlib import get_data_path  # for its font; slow to import

    picture = Image.fromarray(fcos.as_image(image).permute(1, 2, 0).numpy())
    scale = -(-min_side // min(picture.size))
    scale = max(1, min(scale, 4000 // max(picture.size)))  # not beyond 4000 pixels
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    size = font_size or max(12, min(picture.size) // 40)
    # Pillow's own font has no accented letters; DejaVu has most alphabets but the East Asian
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    line, height = max(2, size // 6), size * 1.3
    boxes = [[value * scale for value in box] for box in detections["boxes"].tolist()]
    labels = detections["labels"].tolist()
    scores = detections["scores"].tolist() if "scores" in detections else [None] * len(boxes)
    colors = colors or [COLORS[label % len(COLORS)] for label in labels]
    rows = zip(boxes, scores, labels, colors)
    rows = [row for row in rows if row[1] is None or row[1] >= score_threshold]
    for (x1, y1, x2, y2), _, _, color in reversed(rows):
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=line)
    taken = []  # left, right and top of the labels so far
    for (x1, y1, _, y2), score, label, color in rows:  # the best first: it may choose its place
        text = f"{classes[label] if classes else label}"
        text += "" if score is None else f" {score:.2f}"
        width = pen.textlength(text, font=font) + size // 2
        x = max(min(x1, picture.width - width), 0)
        lowest = picture.height - height
        places = [y for y in (y1 - height, y1, y2, y2 - height) if 0 <= y <= lowest]
        free = [y for y in places if not any(
            x < right and left < x + width and abs(y - other) < height
            for left, right, other in taken
        )]
        y = (free or places or [0])[0]
        taken.append((x, x + width, y))
        pen.rectangle((x, y, x + width, y + height), fill=color)
        red, green, blue = ImageColor.getrgb(color)[:3]
        ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 100 else "black"
        pen.text((x + size // 4, y + height / 2), text, ink, font, "lm")
    return picture


def draw_folder(model, sources, out, score_threshold=0.5, min_size=None, max_size=None):
    """Draw detections on image files and folders of them into `out`, with detections.json beside
    the pictures. Files that cannot be read are told, left out and returned."""
    paths, extensions = [], (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
    for source in map(Path, sources):
        if not source.exists():
            raise UserError(f"{source}: no such image or folder; {what_is_there(source)}")
        inside = sorted(source.iterdir()) if source.is_dir() else [source]
        found = [p for p in inside if p == source
                 or p.is_file() and p.suffix.lower() in extensions]
        if not found:
            raise UserError(f"{source}: holds no images")
        paths += found
    out = make_folder(out)
    if any(path.parent.resolve() == out.resolve() for path in paths):
        raise UserError(f"{out}: is where the pictures come from; drawing there would replace them")
    report, unreadable, taken = [], [], set()
    for path in tqdm(paths, "draw", unit="image", leave=False, dynamic_ncols=True):
        try:
            image = fcos.read_image(path)
        except UserError as error:
            tqdm.write(f"{error}; left out", file=sys.stderr)
            unreadable.append(path)
            continue
        found = model.predict(image, min_size, max_size, score_threshold)[0]
        name, count = f"{path.stem}.jpg", 1
        while name in taken:  # photos of one name in several folders
            count += 1
            name = f"{path.stem}_{count}.jpg"
        taken.add(name)
        draw(image, found, model.classes, score_threshold).save(out / name, quality=92)
        rows = zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")))
        report.append({
            "file": str(path), "drawn": name, "height": image.shape[1], "width": image.shape[2],
            "detections": [
                {"class": model.classes[label] if model.classes else label,
                 "category_id": model.category_ids[label] if model.category_ids else label,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
                for (x1, y1, x2, y2), score, label in rows
            ],
        })
    with fcos.atomic_write(out / "detections.json", "w") as file:
        json.dump(report, file, indent=1)
    return unreadable


# ---- command line ------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Shows the script's docstring as help, and a mistake as one line without the usage."""

    def __init__(self, doc):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def positive_int(text):
    """argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def not_negative(text):
    """argparse type: a whole number from 0 to what a seed may be."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 2**63 - 1")
    return int(text)


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror})") from None
    return Path(path)


def start_process(device, make_store=None):
    """Join torch.distributed if torchrun started this process. -> rank, world size, torch.device.
    make_store(rank, world_size, timeout): makes the store of a process that may be restarted."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # gloo carries the detections, and rank 0 may take its time to score them
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout, store = datetime.timedelta(hours=2), None
        if make_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = make_store(rank, world_size, timeout)
        dist.init_process_group(
            backend, timeout=timeout, world_size=world_size, rank=rank, store=store
        )
    if not dist.is_initialized():
        return 0, 1, device
    return dist.get_rank(), dist.get_world_size(), device


def run(main, args):
    """Call a script's main; a user's mistake becomes one line on stderr and exit code 2. A process
    that fails ends at once: taking leave of the others would wait for them."""
    try:
        main(args)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help="model.pt of a training run, or a file of another FCOS family")
    add("--model", dest="name", help="row of fcos.MODELS, for files that do not say")
    add("--data", help="folder in COCO's layout")
    add("--split", default="val2017", help="which part of --data (%(default)s)")
    add("--annotations", help="COCO JSON, instead of --data")
    add("--image-dir", help="the folder of its images")
    add("--save-json", metavar="F", help="write the detections in COCO's results format")
    add("--per-class", action="store_true", help="also the AP of every class")
    add("--results", metavar="R", help="score this results file; needs --annotations")
    add("--images", nargs="+", metavar="FILE|DIR", help="draw detections on pictures; needs --out")
    add("--out", help="folder for the drawn pictures")
    add("--score-threshold", type=float, default=0.5, help="of drawn boxes (%(default)s)")
    add("--min-size", type=positive_int, help="pixels of the short side (the model's own)")
    add("--max-size", type=positive_int, help="most pixels of the long side (the model's own)")
    add("--batch-size", type=positive_int, help="images at a time (8 on a GPU, 1 elsewhere)")
    add("--workers", type=not_negative, default=2, help="loader processes, a process (%(default)s)")
    add("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    return parser.parse_args(argv)


def main(args):
    if args.results:
        if not args.annotations:
            raise UserError("--results needs --annotations")
        metrics = score(read_json(args.results), args.annotations, args.per_class)
        print(table(metrics))
        return
    if args.model is None:
        raise UserError("name a model file, such as runs/shapes/model.pt, or --results")
    if not (args.images or args.data or (args.annotations and args.image_dir)):
        raise UserError("say what to look at: --data, --annotations with --image-dir, or --images")
    if args.images and not args.out:
        raise UserError("--images needs --out, the folder for the drawn pictures")

    rank, _, device = start_process(args.device)
    model = fcos.load(args.model, args.name).to(device)
    if args.name and rank == 0:
        convention = ", ".join(f"{name} {value}" for name, value in model.convention.items())
        print(f"{args.model}: {model.name} with {convention}", file=sys.stderr)
    if args.images:
        unreadable = draw_folder(
            model, args.images, args.out, args.score_threshold, args.min_size, args.max_size
        )
        if unreadable:
            raise UserError(f"{len(unreadable)} files could not be read")
        return

    if args.save_json:
        target = Path(args.save_json).absolute()
        if target.is_dir() or not target.parent.is_dir():
            raise UserError(f"--save-json {args.save_json}: not a file in a folder that exists")
    annotations, image_dir = coco_paths(args.data or ".", args.split)
    annotations, image_dir = args.annotations or annotations, args.image_dir or image_dir
    dataset = CocoDataset(annotations, image_dir)
    check_classes(model, dataset)
    batch_size = args.batch_size or (8 if device.type == "cuda" else 1)
    results = predict(model, dataset, batch_size, args.workers, args.min_size, args.max_size)
    if rank == 0:
        if args.save_json:
            with fcos.atomic_write(args.save_json, "w") as file:
                json.dump(results, file)
        print(table(score(results, annotations, args.per_class)))


if __name__ == "__main__":
    run(main, parse_args())
