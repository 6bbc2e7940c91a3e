"""Score an FCOS model on a COCO data set, or draw what it finds.

    python evaluate.py runs/shapes/model.pt --data data/shapes
    python evaluate.py coco --images photo.jpg folder/ --out drawn/
    python evaluate.py --results results.json --annotations instances_val2017.json
    torchrun --nproc_per_node=8 evaluate.py runs/coco/model.pt --data data/coco

In this order: the COCO data set, prediction over any number of processes, scoring, drawing, and the
command line. train.py uses most of it: the data set, the scores, and how a process starts and ends.
"""

import argparse
import contextlib
import datetime
import gc
import io
import itertools
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


@contextlib.contextmanager
def no_garbage_collection():
    """For code that makes a million objects and no garbage: looking for it doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_garbage_collection()
def read_json(path):
    """The content of a JSON file, without the polygons that are most of COCO's and of no use here.
    UserError if it is missing or not JSON."""

    def drop(entry):
        entry.pop("segmentation", None)
        return entry

    try:
        with open(path, encoding="utf-8-sig") as file:  # some exporters write a byte order mark
            return json.load(file, object_hook=drop)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what_is_there(path)}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, or no text
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def what_is_there(path):
    """What a user may have meant by a path that does not exist."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    with contextlib.suppress(OSError):
        names = sorted(name for name in os.listdir(folder) if name[0] != ".")[:5]
        return f"{folder} holds {', '.join(names) or 'nothing'}"
    return f"{folder} cannot be read"


@no_garbage_collection()
def read_coco(path):
    """A COCO instances JSON, checked -> its content, {image id: row}, {category id: label}, and its
    annotations as plain_boxes. Rows and labels count from 0 in rising order of the ids."""
    coco = read_json(path)
    for part in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(part), list):
            raise UserError(f"{path}: not COCO instances: it has no list {part!r}")
    rows = numbered(coco["images"], "file_name", f"{path}: images")
    labels = numbered(coco["categories"], "name", f"{path}: categories")
    return coco, rows, labels, plain_boxes(coco["annotations"], rows, labels, path)


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
            area = w * h if area is None else float(area)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: expected image_id, category_id and bbox [x, y, w, h] in "
                            f"{entry!r:.300} ({error!r})") from None
        if label is None:
            raise UserError(f"{where}: category_id {entry['category_id']!r} is not in the "
                            f"categories {list(labels)}")
        boxes.append({"id": id, "image_id": row, "category_id": label, "bbox": [x, y, w, h],
                      "area": area, "iscrowd": int(crowd != 0)})
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
        self.classes = [category["name"] for category in categories]
        self.category_ids = list(labels)
        self.sorted = categories == coco["categories"]  # the official code keeps the file's order
        self.image_ids = np.array(list(rows))
        self._set_images(sorted(coco["images"], key=lambda image: image["id"]))
        self._set_boxes(boxes, coco["annotations"])

    def _set_images(self, images):
        folder, names = self.image_dir, [str(image["file_name"]) for image in images]
        if not folder.is_dir():
            raise UserError(f"{folder}: no such image folder; {what_is_there(folder)}")
        present = set(os.listdir(folder))  # one call is faster than one for each image
        missing = [n for n in names if n not in present and not os.path.isfile(folder / n)]
        if missing:
            raise UserError(f"{folder}: lacks {len(missing)} of {len(names)} images of "
                            f"{self.annotations}, the first being {missing[0]}")
        self._names = np.array(names)
        self.hw = np.array([self._size(image) for image in images])

    def _size(self, image):
        name, height, width = (image.get(key) for key in ("file_name", "height", "width"))
        if "height" not in image or "width" not in image:
            return fcos.read_image(self.image_dir / name).shape[-2:]
        if not all(isinstance(side, int) and side > 0 for side in (height, width)):
            raise UserError(f"{self.annotations}: {name} has height {height!r} and width "
                            f"{width!r}, not whole numbers over 0")
        return height, width

    def _set_boxes(self, boxes, annotations):
        image = np.array([box["image_id"] for box in boxes], dtype=np.int64)
        label = np.array([box["category_id"] for box in boxes], dtype=np.int64)
        crowd = np.array([box["iscrowd"] for box in boxes], dtype=bool)
        xywh = np.array([box["bbox"] for box in boxes]).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        inside = np.clip(xyxy, 0, np.tile(self.hw[image][:, ::-1], 2))

        homeless = image < 0
        full = (inside[:, 2:] > inside[:, :2]).all(1) & np.isfinite(xyxy).all(1)
        clipped = (np.abs(inside - xyxy) > 1).any(1)  # up to a pixel is rounding in the JSON
        self.notes = []
        for what, which in (
            ("belong to no image of the file and are left out", homeless),
            ("have no area inside their image and are left out", ~full & ~homeless),
            ("reach beyond their image and are clipped", clipped & full & ~homeless),
        ):
            if which.any():
                first = annotations[which.argmax()]
                self.notes.append(
                    f"{which.sum()} of {len(annotations)} boxes {what}; the first is annotation "
                    f"{first.get('id')} of image {first['image_id']}, {first['bbox']}"
                )

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
        """Image, boxes and labels of image i, resized to (height, width)."""
        (h, w), (boxes, labels) = self.hw[i].tolist(), self.target(i)
        scale = torch.tensor([hw[1] / w, hw[0] / h, hw[1] / w, hw[0] / h])
        return fcos.resize(self.image(i), hw), boxes * scale, labels


# ---- prediction --------------------------------------------------------------------------------


class EvalBatches(Dataset):
    """The images of a data set, resized, in batches of one padded size: the prediction for an image
    depends neither on the images beside it nor on the number of processes."""

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
            raise UserError(f"{path}: its categories are not in the order of their ids, and the "
                            "model does not say in which order it was trained on them")
    elif ours != names:
        pairs = itertools.zip_longest(ours, names)
        first = next(f"{a!r} against {b!r}" for a, b in pairs if a != b)
        raise UserError(f"{path}: its {len(names)} categories are not the {len(ours)} that the "
                        f"model was trained on; the first difference is {first}")


@torch.inference_mode()
def predict(model, dataset, batch_size=1, workers=2, min_size=None, max_size=None, **thresholds):
    """Detections on every image of a CocoDataset, in COCO's results format, in the order of the
    images: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}, ...].

    Every process of torch.distributed takes its share of the batches, none twice and none padded;
    the list is complete on rank 0 and None elsewhere. Sizes default to model.test_size.
    """
    rank, world_size = rank_and_world_size()
    device, training = next(model.parameters()).device, model.training
    min_size, max_size = min_size or model.test_size[0], max_size or model.test_size[1]
    batches = EvalBatches(dataset, min_size, max_size, batch_size)
    loader = DataLoader(
        Subset(batches, range(rank, len(batches), world_size)), batch_size=None,
        num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=start_worker,
        timeout=600 if workers else 0,
    )
    # in position 0 the bar replaces a bar of training; below it, Jupyter draws every update
    bar = tqdm(loader, "predict", unit="batch", position=0, leave=False, dynamic_ncols=True,
               disable=rank != 0)
    model.eval()
    results = {}
    with no_worker_left():
        for batch in bar:
            if isinstance(batch, UserError):
                raise batch
            images, sizes, members = batch
            outputs = model(*(x.to(device, non_blocking=True) for x in (images, sizes)))
            for i, size, found in zip(members, sizes, model.detect(outputs, sizes, **thresholds)):
                found["boxes"] = model.rescale(found["boxes"].cpu(), size, dataset.hw[i])
                rows, image_id = result_rows(found, dataset.category_ids), dataset.image_ids[i]
                results[i] = [{"image_id": image_id.item(), **row} for row in rows]
    model.train(training)
    if world_size > 1:
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(results, shares)
        if rank != 0:
            return None
        results = {i: rows for share in shares for i, rows in share.items()}
    assert len(results) == len(dataset), f"{len(results)} of {len(dataset)} images predicted"
    return [row for i in range(len(dataset)) for row in results[i]]


def result_rows(found, category_ids):
    """Detections on one image in COCO's results format, without its image_id."""
    corners, sides = found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]
    columns = torch.cat([corners, sides], dim=1), found["scores"], found["labels"]
    return [
        {"category_id": category_ids[label], "bbox": xywh, "score": score}
        for xywh, score, label in zip(*(column.tolist() for column in columns))
    ]


# ---- scoring -----------------------------------------------------------------------------------

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl",
           "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def score(results, annotations, per_class=False):
    """COCO's twelve box metrics of a list of results: {"AP": ..., "AP50": ...}, from 0 to 1, or -1
    where there is nothing to find. With per_class also {"AP/<class>": ...}."""
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
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise UserError(f"results: expected finite numbers as bbox and score in {result}")
        box.update(score=numbers[4], area=box["bbox"][2] * box["bbox"][3])

    def indexed(boxes):  # by rows and labels, because hotcoco takes no text and no -1 as an id
        index = COCO()
        index.dataset = {
            "images": [{"id": row} for row in rows.values()],
            "categories": [{"id": label, "name": f"{id}"} for id, label in labels.items()],
            "annotations": [box for box in boxes if box["image_id"] >= 0],
        }
        index.createIndex()
        return index

    with contextlib.redirect_stdout(io.StringIO()):  # they print; the caller decides what to show
        scorer = COCOeval(indexed(truth), indexed(found), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = dict(zip(METRICS, map(float, scorer.stats)))
    if per_class:
        names = {category["id"]: category["name"] for category in coco["categories"]}
        precision = scorer.eval["precision"][:, :, :, 0, -1]  # of all areas, 100 detections
        of_class = precision.mean(axis=(0, 1)).tolist()  # over overlaps and recalls
        metrics |= {f"AP/{names[id]}": of_class[label] for id, label in labels.items()}
    return metrics


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
    """A PIL image with one entry of model.predict drawn on it: boxes, class names and scores;
    without "scores" they are ground truth. `colors`: one for each box instead of one a class.
    An image whose short side has less than `min_side` pixels is enlarged, so that its text, of
    `font_size` pixels, can be read. A label that would cover another moves, if it can."""
    from matplotlib import get_data_path  # for its font; slow to import

    picture = Image.fromarray(fcos.as_image(image).permute(1, 2, 0).numpy())
    scale = min(math.ceil(min_side / min(picture.size)), 4000 // max(picture.size))
    scale = max(1, scale)  # nothing is made smaller, or enlarged beyond 4000 pixels
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    size = font_size or max(12, min(picture.size) // 40)
    # Pillow's own font has no accented letters; DejaVu has most alphabets but the East Asian
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    line, height = max(2, size // 6), size * 1.3
    boxes = (detections["boxes"] * scale).tolist()
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
        places = [y1 - height, y1, y2, y2 - height]
        places = [y for y in places if 0 <= y <= picture.height - height]
        near = [top for left, right, top in taken if x < right and left < x + width]
        free = [y for y in places if all(abs(y - top) >= height for top in near)]
        y = (free or places or [0])[0]
        taken.append((x, x + width, y))
        pen.rectangle((x, y, x + width, y + height), fill=color)
        red, green, blue = ImageColor.getrgb(color)[:3]
        ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 100 else "black"
        pen.text((x + size // 4, y + height / 2), text, ink, font, "lm")
    return picture


def draw_folder(model, sources, out, score_threshold=0.5, min_size=None, max_size=None):
    """Draw detections on image files and folders of them into `out`, and write detections.json
    there. Files that cannot be read are named, left out and returned."""
    paths, extensions = [], (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
    for source in map(Path, sources):
        if not source.exists():
            raise UserError(f"{source}: no such image or folder; {what_is_there(source)}")
        found = [source]
        if source.is_dir():
            found = sorted(p for p in source.iterdir() if p.suffix.lower() in extensions)
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
        rows = result_rows(found, model.category_ids or range(model.num_classes))
        for row, label in zip(rows, found["labels"].tolist()):
            row["class"] = model.classes[label] if model.classes else label
        report.append({"file": str(path), "drawn": name, "height": image.shape[1],
                       "width": image.shape[2], "detections": rows})
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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo: detections
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout, store = datetime.timedelta(hours=2), None  # long enough for rank 0 to score
        if make_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = make_store(rank, world_size, timeout)
        dist.init_process_group(backend, timeout=timeout, world_size=world_size, rank=rank,
                                store=store)
    return *rank_and_world_size(), device


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def run(main, args):
    """Call a script's main; a user's mistake becomes one line on stderr and exit code 2. A process
    that fails ends at once: destroy_process_group would wait for the others."""
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
    add("model", nargs="?", help='model.pt of a run, "coco", or a file of another FCOS family')
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
        print(table(score(read_json(args.results), args.annotations, args.per_class)))
        return
    if args.model is None:
        raise UserError("name a model: a file such as runs/shapes/model.pt, or coco")
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
        unreadable = draw_folder(model, args.images, args.out, args.score_threshold,
                                 args.min_size, args.max_size)
        if unreadable:
            raise UserError(f"{len(unreadable)} files could not be read")
        return

    if args.save_json:
        target = Path(args.save_json)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise UserError(f"--save-json {target}: not a file in a folder that exists")
    annotations, image_dir = coco_paths(args.data or ".", args.split)
    dataset = CocoDataset(args.annotations or annotations, args.image_dir or image_dir)
    check_classes(model, dataset)
    batch_size = args.batch_size or (8 if device.type == "cuda" else 1)
    results = predict(model, dataset, batch_size, args.workers, args.min_size, args.max_size)
    if rank == 0:
        if args.save_json:
            with fcos.atomic_write(args.save_json, "w") as file:
                json.dump(results, file)
        print(table(score(results, dataset.annotations, args.per_class)))


if __name__ == "__main__":
    run(main, parse_args())
