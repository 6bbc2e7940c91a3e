"""Train FCOS: the published recipes, on COCO, on your own boxes, or on a generated data set.

    python train.py shapes                                              # minutes on two CPU cores
    python train.py fcos_imprv_R_50_FPN_1x --accumulate 4               # one GPU, data/coco
    torchrun --nproc_per_node=8 train.py fcos_imprv_R_50_FPN_1x         # eight: the same training
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py

What a step trains on depends on (seed, step) alone, and its loss on all of its images alone, so the
number of GPUs, of micro-batches (--accumulate) and of loader workers changes nothing but speed. The
same command again resumes from the last checkpoint in --out.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of the slow imports: see run

import contextlib
import copy
import functools
import hashlib
import json
import os
import reprlib
import shutil
import sys
import tempfile
import time
import uuid
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset
from torchvision.transforms import functional as vision
from tqdm import tqdm

import evaluate
import fcos
from fcos import UserError

# ---- recipes -----------------------------------------------------------------------------------


def row(model):
    """Return the part of a recipe that names a row of fcos.MODELS."""
    return dict(model=model)


# All recipes train by SGD with momentum 0.9 and weight decay 1e-4. The learning rate is lr / 3 for
# the first `warmup` steps, then lr, and falls to a tenth at each of `decays`, in eighteenths of the
# steps. batch_size counts the images of a step over all GPUs and micro-batches. min_size holds the
# choices for the short side in pixels; one is drawn for each image. weights is a file in
# ~/.torch/models, or "imagenet" for torchvision's.
X1 = dict(iters=90_000, batch_size=16, lr=0.01, warmup=500, min_size=[800], max_size=1333)
MS = dict(min_size=list(range(640, 801)))
B32 = dict(batch_size=32)
B64 = dict(batch_size=64)
X1_MS = X1 | MS
X2 = X1 | MS | dict(iters=180_000)
DECAYS = [12, 16]
X4 = X1 | dict(iters=360_000, decays=[15, 17], min_size=list(range(256, 609, 32)), max_size=900)
R_50 = dict(weights="R-50.pkl")
R_101 = dict(weights="R-101.pkl")
MSRA_R_50 = dict(weights="MSRA-R-50.pkl")  # Detectron2's, whose norms have statistics
X_32 = dict(weights="X-101-32x8d.pkl")
X_64 = dict(weights="X-101-64x4d.pkl")
MNV2 = dict(weights="mobilenet_v2-ecbe2b5.pth")
IMAGENET = dict(weights="imagenet")
# fmt: off
RECIPES = {
    "fcos_R_50_FPN_1x":                     R_50  | X1 | row("fcos_R_50_FPN"),
    "fcos_R_101_FPN_2x":                    R_101 | X2 | row("fcos_R_101_FPN"),
    "fcos_X_101_32x8d_FPN_2x":              X_32  | X2 | row("fcos_X_101_32x8d_FPN"),
    "fcos_X_101_64x4d_FPN_2x":              X_64  | X2 | row("fcos_X_101_64x4d_FPN"),
    "fcos_imprv_R_50_FPN_1x":               R_50  | X1 | row("fcos_imprv_R_50_FPN"),
    "fcos_imprv_R_101_FPN_1x":              R_101 | X1 | row("fcos_imprv_R_101_FPN"),
    "fcos_imprv_R_101_FPN_2x":              R_101 | X2 | row("fcos_imprv_R_101_FPN"),
    "fcos_imprv_X_101_32x8d_FPN_2x":        X_32  | X2 | row("fcos_imprv_X_101_32x8d_FPN"),
    "fcos_imprv_X_101_64x4d_FPN_2x":        X_64  | X2 | row("fcos_imprv_X_101_64x4d_FPN"),
    "fcos_imprv_dcnv2_R_50_FPN_1x":         R_50  | X1 | row("fcos_imprv_dcnv2_R_50_FPN"),
    "fcos_imprv_dcnv2_R_101_FPN_1x":        R_101 | X1 | row("fcos_imprv_dcnv2_R_101_FPN"),
    "fcos_imprv_dcnv2_R_101_FPN_2x":        R_101 | X2 | row("fcos_imprv_dcnv2_R_101_FPN"),
    "fcos_imprv_dcnv2_X_101_32x8d_FPN_2x":  X_32  | X2 | row("fcos_imprv_dcnv2_X_101_32x8d_FPN"),
    "fcos_imprv_dcnv2_X_101_64x4d_FPN_2x":  X_64  | X2 | row("fcos_imprv_dcnv2_X_101_64x4d_FPN"),
    "fcos_bn_bs16_MNV2_FPN_1x":             MNV2  | X1 | row("fcos_bn_MNV2_FPN"),
    "fcos_syncbn_bs32_MNV2_FPN_1x":         MNV2  | X1 | row("fcos_syncbn_MNV2_FPN") | B32,
    "fcos_syncbn_bs32_c128_MNV2_FPN_1x":    MNV2  | X1 | row("fcos_syncbn_c128_MNV2_FPN") | B32,
    "fcos_syncbn_bs32_c128_ms_MNV2_FPN_1x": MNV2  | X1_MS | row("fcos_syncbn_c128_MNV2_FPN") | B32,
    "fcos_syncbn_bs64_c128_ms_MNV2_FPN_1x": MNV2  | X1_MS | row("fcos_syncbn_c128_MNV2_FPN") | B64,
    # not official: AdelaiDet's, torchvision's, and a small one
    "fcos_imprv_R_50_FPN_2x":               R_50  | X2 | row("fcos_imprv_R_50_FPN"),
    "fcos_imprv_iou_R_50_FPN_1x":           R_50  | X1 | row("fcos_imprv_iou_R_50_FPN"),
    "fcos_rt_R_50_FPN_4x":                  MSRA_R_50 | X4 | row("fcos_rt_R_50_FPN"),
    "fcos_torchvision_R_50_FPN_1x":         IMAGENET | X1 | row("fcos_torchvision_R_50_FPN"),
    "small": dict(model="small", weights="none", iters=1500, batch_size=4, lr=0.02, warmup=100,
                  min_size=[320], max_size=480),
    "shapes": dict(model="shapes", weights="none", data="data/shapes", iters=1500, batch_size=8,
                   lr=0.02, warmup=50, min_size=[128], max_size=160),
}
# fmt: on

# ---- settings ----------------------------------------------------------------------------------


# The groups of flags that are not stored with a run. All others decide its result, and a resumed
# run must repeat them. The data counts by its content: see `fingerprint`.
DATA = "data"
HOW_IT_RUNS = "how it runs"


def make_parser():
    parser = evaluate.ArgumentParser(__doc__)
    positive_int = evaluate.positive_int
    not_negative = evaluate.not_negative
    parser.add_argument(
        "recipe", nargs="?", default="fcos_imprv_R_50_FPN_1x", help="of RECIPES (%(default)s)"
    )
    add = parser.add_argument_group(DATA).add_argument
    add("--data", help="folder of COCO, Roboflow, CVAT, YOLO or Pascal VOC (data/coco)")
    add("--train-images", metavar="DIR", help="own data, instead of --data: all four")
    add("--train-annotations", metavar="JSON")
    add("--val-images", metavar="DIR")
    add("--val-annotations", metavar="JSON")
    add = parser.add_argument_group("what is trained, instead of the recipe's").add_argument
    add(
        "--weights",
        metavar="PATH|coco|imagenet|none",
        help="start from a detector or ImageNet classifier, torchvision's, or nothing",
    )
    add(
        "--set",
        type=evaluate.keyword_value,
        nargs="+",
        action="extend",
        metavar="KEYWORD=VALUE",
        default=[],
        help="keywords of the model, such as radius=0 quality=iou: see fcos.FCOS",
    )
    add("--negatives", action="store_true", help="also train on images without objects")
    add("--augment", action="store_true", help="vary colours and crop, for small data sets")
    add("--batch-size", type=positive_int, help="images a step, over all GPUs and micro-batches")
    add("--iters", type=positive_int, help="steps; the schedule keeps its proportions")
    add("--lr", type=float, help="by default in proportion to --batch-size")
    add("--min-size", type=positive_int, nargs="+", help="choices for the short side, in pixels")
    add("--max-size", type=positive_int, help="most pixels of the long side")
    add("--multiple", type=positive_int, help="pad to multiples of this (32; 128 with --compile)")
    add(
        "--ema", type=float, metavar="DECAY", help="keep an average of the weights, as 0.999 (none)"
    )
    add(
        "--patience", type=positive_int, metavar="N", help="end after N evaluations in vain (never)"
    )
    add("--seed", type=not_negative, default=0, help="(%(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    add = parser.add_argument_group(HOW_IT_RUNS).add_argument
    add("--out", help="folder of the run (runs/RECIPE)")
    add("--workers", type=not_negative, help="loaders for each rank (4 on a GPU, 1 elsewhere)")
    add(
        "--accumulate",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro-batches of a step (1)",
    )
    add("--eval-every", type=positive_int, help="steps between evaluations (only at the end)")
    add("--checkpoint-every", type=positive_int, default=2500, help="steps (%(default)s)")
    add("--device", help="cpu, cuda, mps or xpu (cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--fresh", action="store_true", help="start over, whatever --out holds")
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def stored_flags():
    """Return the names of the flags that are stored with a run."""
    groups = [g for g in make_parser()._action_groups if g.title not in (DATA, HOW_IT_RUNS)]
    return [action.dest for g in groups for action in g._group_actions if action.dest != "help"]


def resolve(args):
    """Return the settings that decide the result: the recipe's, or the flags' where given.

    "keywords" are those of the model, complete.
    """
    settings = checked_recipe(args.recipe)
    batch_size = settings["batch_size"]
    for name in stored_flags():
        if getattr(args, name) is not None or name not in settings:
            settings[name] = getattr(args, name)
    if args.lr is None:
        settings["lr"] *= settings["batch_size"] / batch_size
    settings["warmup"] = min(settings["warmup"], settings["iters"] // 10)  # of a short run
    for name, most in ("lr", 1e38), ("ema", 1):
        if settings[name] is not None and not 0 < settings[name] < most:
            raise UserError(f"--{name} {settings[name]}: must be a number over 0 and below {most}")
    if settings["multiple"] is None:
        settings["multiple"] = 128 if args.compile else 32
    if settings["multiple"] % 32:
        raise UserError(f"--multiple {settings['multiple']}: expected a multiple of 32")
    fcos.resized_hw(1, 1, max(settings["min_size"]), settings["max_size"])  # do they fit?
    if settings["patience"]:  # then it decides where the run stops
        if not args.eval_every:
            raise UserError("--patience needs --eval-every")
        settings["eval_every"] = args.eval_every
    overrides = dict(settings.pop("set"))
    if "test_size" not in fcos.MODELS.get(settings["model"], {}) | overrides:  # as it is trained
        overrides["test_size"] = max(settings["min_size"]), settings["max_size"]
    keywords = fcos.model_keywords(settings["model"], overrides)
    shared = keywords.keys() & settings.keys()
    if shared:
        raise UserError(f"{', '.join(shared)}: both a keyword of the model and a setting")
    return settings | {"keywords": keywords}


def checked_recipe(name):
    """Return the settings of a recipe, without its data. Raises UserError for an unknown name, and
    for settings that are missing or not used."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r}: expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    needed = {"model", "weights"} | X1.keys()
    missing = needed - recipe.keys()
    unknown = recipe.keys() - needed - {"data", "decays"}
    if missing or unknown:
        raise UserError(
            f"recipe {name}: lacks {missing or 'nothing'}; has no use for {unknown or 'nothing'}"
        )
    settings = {"recipe": name, "decays": DECAYS} | recipe
    settings.pop("data", None)
    return settings


def find_data(args):
    """Return {"train": (annotation file, image folder), "val": ...} as the flags or the recipe say.

    Raises UserError if only some of the four flags for one's own data are given.
    """
    paths = {
        "train": (args.train_annotations, args.train_images),
        "val": (args.val_annotations, args.val_images),
    }
    given = [path for pair in paths.values() for path in pair if path]
    if not given:
        data = args.data or RECIPES[args.recipe].get("data", "data/coco")
        return {split: evaluate.coco_paths(data, f"{split}2017") for split in paths}
    if args.data or len(given) < 4:
        raise UserError(
            "own data needs all of --train-images, --train-annotations, --val-images "
            "and --val-annotations, and no --data"
        )
    return paths


SHORT = reprlib.Repr()  # bounded work for any value
SHORT.maxtuple = SHORT.maxlist = 10


def abbreviated(value):
    """Return a setting as text; of many choices the first and the last. A checkpoint may hold
    anything: the text is short and printable."""
    if isinstance(value, list) and len(value) > 8:
        return f"{abbreviated(value[0])} to {abbreviated(value[-1])} ({len(value)} values)"
    text = value if isinstance(value, str) else SHORT.repr(value)
    return evaluate.printable(text, 200)


def differences(there, here, name=""):
    """Return a text for each setting in which a checkpoint and the code differ.

    Nested settings follow from the others and from the code; they are compared if those are equal.
    """
    found = []
    nested = []
    for key in [*here, *(there.keys() - here.keys())]:
        old = there.get(key, "nothing")
        new = here.get(key, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            nested += differences(old, new, f"{name}{key} ")
        elif old != new:
            found.append(f"{name}{key} {abbreviated(old)} there, {abbreviated(new)} here")
    return found or nested


# ---- batches and augmentation ------------------------------------------------------------------

# Random streams, one for each purpose, and how many numbers make up a position in it: see
# TrainBatches.rng. Append only: the place in this table is part of the seed.
STREAMS = {"group": 0, "order": 2, "sizes": 1, "augment": 2, "augment_more": 2}


# The images of a step: their rows in the data set, the (height, width) to which each is resized,
# and the (height, width) to which all are padded.
Plan = namedtuple("Plan", "rows sizes padded_hw")


class TrainBatches(Dataset):
    """The micro-batches of all steps. Item `step * micro_batches + m` is what this rank trains on
    in micro-batch m of a step.

    All images of a step belong to one aspect group (height < width, or not), which keeps the
    padding small. A step draws its group in proportion to the groups' lengths. A group is an
    endless stream of seeded permutations, so that no batch is short, even if the data set is
    smaller than a batch. The images of a step are dealt to micro-batches and ranks like cards.

    All images of a step are padded to one size, which every rank computes for itself. Padding is
    background to the loss and enters the GroupNorms, so it must not depend on how a step is
    divided. Sizes are multiples of the setting "multiple", but no larger than the largest image of
    the group can need.
    """

    def __init__(self, dataset, settings, rank=0, world_size=1, micro_batches=1):
        self.dataset = dataset
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches
        self.batch_size = settings["batch_size"]
        self.drawn = set()
        self.groups = aspect_groups(dataset, settings)
        self.largest_hw = [self.largest_padded_hw(group) for group in self.groups]
        lengths = np.array([len(group) for group in self.groups])
        shares = lengths.cumsum() / lengths.sum()
        draws = self.rng("group").random(settings["iters"])
        self.group = np.searchsorted(shares[:-1], draws, side="right")
        self.turn = np.zeros_like(self.group)  # the number of earlier steps of the same group
        for number in range(len(self.groups)):
            steps = np.flatnonzero(self.group == number)
            self.turn[steps] = np.arange(len(steps))

    def rng(self, purpose, *position):
        """Return the random stream of a purpose at a position, a NumPy generator.

        Every purpose has its own stream, so that no draw shifts the numbers of another. Raises
        ValueError for a position of another length than STREAMS says, because NumPy fills a short
        key with zeros, so that (2, 5) and (2, 5, 0) would be one stream; and if an item takes a
        stream twice, because both would get the same numbers.
        """
        if len(position) != STREAMS.get(purpose):
            raise ValueError(f"stream {purpose!r} at {position}: expected one of {STREAMS}")
        if (purpose, position) in self.drawn:
            raise ValueError(f"stream {purpose!r} at {position} is taken twice: add one to STREAMS")
        self.drawn.add((purpose, position))
        key = list(STREAMS).index(purpose)
        return np.random.Generator(np.random.PCG64([self.settings["seed"], key, *position]))

    @functools.lru_cache(maxsize=4)  # noqa: B019  (one object a process, as long as the process)
    def order(self, group, epoch):
        return self.rng("order", group, epoch).permutation(self.groups[group])

    def plan(self, step) -> Plan:
        """Return the plan of a step, computed by every rank before it decodes an image."""
        self.drawn.clear()
        group = self.group[step]
        positions = self.turn[step] * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(positions, len(self.groups[group]))
        rows = [self.order(group, epoch)[place].item() for epoch, place in zip(epochs, places)]
        min_sizes = self.rng("sizes", step).choice(self.settings["min_size"], self.batch_size)
        sizes = [
            fcos.resized_hw(*self.dataset.hw[row].tolist(), min_size, self.settings["max_size"])
            for row, min_size in zip(rows, min_sizes.tolist())
        ]
        return Plan(rows, sizes, self.padded_hw(group, sizes))

    def padded_hw(self, group, sizes):
        """Return the padded (H, W) of a step with images of these sizes."""
        height, width = fcos.padded_hw(sizes, self.settings["multiple"])
        most_height, most_width = self.largest_hw[group]
        return min(height, most_height), min(width, most_width)

    def largest_padded_hw(self, group):
        """Return the padded (H, W) that holds every image of a group, whatever its short side."""
        if not len(group):
            return 0, 0
        shapes = np.unique(self.dataset.hw[group], axis=0)
        most = max(self.settings["min_size"]), self.settings["max_size"]
        return fcos.padded_hw([fcos.resized_hw(*hw, *most) for hw in shapes.tolist()])

    def count_padded_sizes(self):
        """Return an upper bound for the number of padded sizes of a run."""
        multiple = self.settings["multiple"]
        return sum(-(-h // multiple) * -(-w // multiple) for h, w in self.largest_hw)

    def __len__(self):
        return len(self.group) * self.micro_batches

    def __getitem__(self, item):
        """Return a micro-batch of this rank, with the boxes of its b images concatenated.

        {"images": uint8 (b, 3, H, W), "sizes": (b, 2), "counts": the b numbers of boxes, "boxes":
        (sum of G, 4) xyxy pixels, "labels": (sum of G,), and every further column}. Raises
        UserError, naming the files, if one cannot be read or an augmentation spoils a sample.
        """
        step, micro_batch = divmod(item, self.micro_batches)
        plan = self.plan(step)
        first = micro_batch * self.world_size + self.rank
        slots = range(first, self.batch_size, self.world_size * self.micro_batches)
        return collate([self.sample(plan, step, slot) for slot in slots], plan.padded_hw)

    def sample(self, plan, step, slot):
        """Return the augmented sample of a slot of a step."""
        self.dataset.files_read.clear()
        try:
            sample = self.read(plan.rows[slot], plan.sizes[slot], step, slot)
            if self.settings["augment"]:
                sample = augment_more(sample, self.rng("augment_more", step, slot))
            sample = augment(sample, self.rng("augment", step, slot))
            check_sample(sample, len(self.dataset.classes))
        except Exception as error:
            files = list(map(str, self.dataset.files_read))
            if isinstance(error, UserError) and not any(file in str(error) for file in files):
                raise UserError(f"{', '.join(files)}: {error}") from None
            error.add_note(f"in a sample made from {', '.join(files)}")
            raise
        return sample

    def read(self, row, hw, step, slot):
        """Return the sample of an image at (height, width), before augmentation.

        A mosaic goes here: it takes further rows from a stream of its own at (step, slot).
        """
        return self.dataset.sample(row, hw)

    def smallest(self):
        """Return a batch of one image, the one with the fewest pixels after padding."""
        rows = np.concatenate(self.groups)
        shapes, places = np.unique(self.dataset.hw[rows], axis=0, return_index=True)
        min_size = min(self.settings["min_size"])
        max_size = self.settings["max_size"]
        sizes = [fcos.resized_hw(*hw, min_size, max_size) for hw in shapes.tolist()]
        padded = [fcos.padded_hw([size]) for size in sizes]
        k = min(range(len(padded)), key=lambda k: padded[k][0] * padded[k][1])
        return collate([self.dataset.sample(rows[places[k]], sizes[k])], padded[k])


def aspect_groups(dataset, settings):
    """Return the rows of the images that are trained on: the wide ones, and the others.

    A step's images are of one group, drawn in proportion to the groups' lengths, and all rows of a
    group are drawn equally often: repeat a row to draw its image more often.
    """
    rows = np.flatnonzero(dataset.trainable | settings["negatives"])
    upright = dataset.hw[rows, 0] >= dataset.hw[rows, 1]
    return rows[~upright], rows[upright]


def check_sample(sample, num_classes):
    """Raise UserError unless an augmented sample is one that can be trained on."""
    image = sample["image"]
    boxes = sample["boxes"]
    labels = sample["labels"]
    good = image.dtype == torch.uint8 and image.ndim == len(image) == 3
    good = good and (boxes[:, 2:] > boxes[:, :2]).all()
    good = good and ((0 <= labels) & (labels < num_classes)).all()
    good = good and {len(sample[name]) for name in sample if name != "image"} == {len(boxes)}
    if not good:
        pixels = f"{tuple(image.shape)} {image.dtype} pixels"
        made = f"{pixels}, boxes {boxes.tolist()}, labels {labels.tolist()}"
        raise UserError(f"augment made {made:.300}")


def collate(samples, padded_hw):
    """Return a batch of samples: see TrainBatches.__getitem__."""
    images, sizes = fcos.pad_batch([sample["image"] for sample in samples], padded_hw)
    columns = {
        name: torch.cat([sample[name] for sample in samples])
        for name in samples[0]
        if name != "image"
    }
    counts = [len(sample["labels"]) for sample in samples]
    return {"images": images, "sizes": sizes, "counts": counts} | columns


def mirror_boxes(boxes, width):
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)


# How each column of the boxes changes when the image is mirrored at a width, and when it is cropped
# at an offset and scaled, both (x, y, x, y). A column without a rule is an error: it would silently
# keep the values of another image.
COLUMNS = {
    "boxes": dict(mirror=mirror_boxes, crop=lambda boxes, offset, scale: (boxes - offset) * scale),
    "labels": dict(mirror=lambda labels, *_: labels, crop=lambda labels, *_: labels),
}


def transform(sample, how, *values):
    """Return the columns of a sample, changed by their rules for "mirror" or "crop"."""
    columns = [name for name in sample if name != "image"]
    for name in columns:
        if how not in COLUMNS.get(name, {}):
            raise UserError(f"column {name!r}: has no rule {how!r} in COLUMNS of train.py")
    return {name: COLUMNS[name][how](sample[name], *values) for name in columns}


def augment(sample, rng):
    """Return a training sample changed at random: half of them are mirrored.

    The image must not become larger: the padding of a step is decided before its pixels are read.
    Boxes may be removed, with their row in every column. rng: a NumPy generator of this sample.
    """
    if rng.random() < 0.5:
        width = sample["image"].shape[2]
        return {"image": sample["image"].flip(2)} | transform(sample, "mirror", width)
    return sample


def augment_more(sample, rng):
    """Return a sample changed more strongly (--augment); `augment` follows.

    Brightness, contrast and saturation vary by up to 30 %. Half of the images are enlarged up to
    twice and cut to their size; boxes whose centre lies outside the crop are dropped.
    """
    image = sample["image"]
    for name in ("brightness", "contrast", "saturation"):
        image = getattr(vision, f"adjust_{name}")(image, rng.uniform(0.7, 1.3))
    sample = sample | {"image": image}
    return crop(sample, rng) if rng.random() < 0.5 else sample


def crop(sample, rng):
    """Cut out a random part of at least half the height and width, and enlarge it to full size."""
    image = sample["image"]
    H, W = image.shape[1:]
    h = round(H / rng.uniform(1, 2))
    w = round(W / rng.uniform(1, 2))
    y = rng.integers(H - h + 1)
    x = rng.integers(W - w + 1)
    offset = torch.tensor([x, y, x, y])
    scale = torch.tensor([W / w, H / h, W / w, H / h])
    columns = transform(sample, "crop", offset, scale)
    boxes = columns["boxes"]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = ((centre > 0) & (centre < torch.tensor([W, H]))).all(1)
    columns["boxes"] = boxes.clamp(min=0).minimum(torch.tensor([W, H, W, H]))
    image = fcos.resize(image[:, y : y + h, x : x + w], (H, W))
    return {"image": image} | {name: values[kept] for name, values in columns.items()}


# ---- the model's start -------------------------------------------------------------------------


def load_data(paths, settings, say):
    """Return the training and the validation set of `find_data`, and report what is odd about them.

    Adds what identifies their content to the settings.
    """
    if f"{paths['train'][1]}" == "data/shapes/train2017":
        draw_shapes("data/shapes", say)
    train = load_split(*paths["train"], None, say)
    val = load_split(*paths["val"], train.classes, say)
    settings |= {"train_data": fingerprint(train), "val_data": fingerprint(val)}
    if not len(val.boxes):
        say(f"{val.annotations}: has no box to find, so every AP will be -1")
    if train.image_dir == val.image_dir:
        shared = np.intersect1d(train._names, val._names)
        if len(shared):
            say(
                f"{val.annotations}: {len(shared)} of its images are also trained on, so its AP "
                "will be too high"
            )
    unlabeled = int((~train.trainable).sum())
    if unlabeled == len(train) or not len(train.boxes):
        raise UserError(
            f"{train.annotations}: has no image with a box to learn; {'; '.join(train.notes)}"
        )
    if unlabeled:
        use = "negatives" if settings["negatives"] else "left out; --negatives trains on them"
        say(
            f"{train.annotations}: {unlabeled} of {len(train)} images have no boxes to learn and "
            f"are {use}"
        )
    return train, val


def load_split(annotations, image_dir, classes, say):
    """Read a data set and report its size and what is odd about it.

    classes: the names that were trained on; None in training, where the annotations decide.
    """
    if not Path(annotations).exists():
        raise UserError(
            f"{annotations}: no such file; {evaluate.what_is_there(annotations)}; "
            "--train-annotations, --train-images, --val-annotations and --val-images name other "
            "places"
        )
    dataset = evaluate.load_dataset(annotations, image_dir, classes)
    names = ", ".join(map(str, dataset.classes))
    say(
        f"{annotations}: {len(dataset)} images, {len(dataset.boxes)} boxes of "
        f"{len(dataset.classes)} classes: {evaluate.printable(names, 100)}"
    )
    for note in dataset.notes:
        say(f"{annotations}: {note}")
    return dataset


def fingerprint(dataset):
    """Return what identifies the content of a data set's annotations, wherever they lie."""
    digest = hashlib.sha256(repr((dataset.classes, dataset.category_ids)).encode())
    values = vars(dataset) | vars(dataset.annotations) | dataset.annotations.columns
    for name, value in sorted(values.items()):
        if isinstance(value, np.ndarray):
            digest.update(name.encode() + value.tobytes())
    counts = f"{len(dataset)} images, {len(dataset.boxes)} boxes"
    return f"{counts}, sha256 {digest.hexdigest()[:16]}"


def draw_shapes(folder, say):
    """Draw the shapes data set on rank 0 if it is not there; the other ranks wait."""
    folder = Path(folder)
    rank, world_size = evaluate.rank_and_world_size()
    if rank == 0 and not folder.exists():
        say(f"drawing {folder}")
        with evaluate.one_writer(folder.parent, wait=True):
            for left_over in folder.parent.glob(f".{folder.name}-*"):  # of a killed process
                shutil.rmtree(left_over)
            if not folder.exists():  # no other run has drawn it meanwhile
                make_shapes(folder)
    if world_size > 1:
        dist.barrier()


def report_sizes(model, batches, say):
    """Print for each class how large its boxes are after resizing, and how many no location gets.

    Such boxes are not learned. Where they are many, print the --min-size that would help.
    """
    if evaluate.rank_and_world_size()[0] > 0:
        return
    classes = batches.dataset.classes
    settings = batches.settings
    min_size = sorted(settings["min_size"])[len(settings["min_size"]) // 2]
    rows = measure_boxes(model, batches, min_size, settings["max_size"])
    for label, side, lost, count in rows[:10]:
        say(
            f"{evaluate.printable(classes[label])}: boxes of {side:.0f} pixels at --min-size "
            f"{min_size} (median), {lost:.0%} of {count} without a location"
        )
    if len(rows) > 10:
        say(f"... of the other {len(rows) - 10} classes no more than {rows[10][2]:.0%}")
    if most_lost(rows) > 0.1:
        remedy = "a finer level (--set levels=[2,3,4,5,6] with ranges) or cutting images into tiles"
        for factor in (4, 3, 2, 1.5, 1.25):
            sizes = [round(factor * size / 32) * 32 for size in (min_size, settings["max_size"])]
            if most_lost(measure_boxes(model, batches, *sizes)) > 0.1:
                break
            remedy = f"--min-size {sizes[0]} --max-size {sizes[1]}"
        say(f"warning: many boxes are too small to be learned; what would help is {remedy}")


def most_lost(rows):
    """Return the largest share of boxes without a location, of classes with 10 boxes or more."""
    return max((lost for _, _, lost, count in rows if count >= 10), default=0)


def measure_boxes(model, batches, min_size, max_size):
    """Return (label, median side in pixels, share of boxes without a location, number of boxes).

    The classes with the largest share come first. It is measured on up to 500 images, and on few
    enough for a CPU to take a second or two.
    """
    dataset = batches.dataset
    device = next(model.parameters()).device
    rows = np.random.default_rng(0).permutation(np.concatenate(batches.groups))[:500]
    alike = {}
    work = 0
    for row in rows.tolist():
        hw = fcos.resized_hw(*dataset.hw[row].tolist(), min_size, max_size)
        truth = dataset.truth(row, hw)
        alike.setdefault(fcos.padded_hw([hw]), []).append(truth)
        work += hw[0] * hw[1] * len(truth["boxes"])
        if work > 5e8 and device.type == "cpu":
            break
    found = []
    for hw, truths in alike.items():
        for k in range(0, len(truths), 16):
            chunk = [to_device(truth, device) for truth in truths[k : k + 16]]
            for truth, index in zip(chunk, model.targets(hw, chunk)["index"]):
                boxes = truth["boxes"]
                assigned = torch.zeros(len(boxes), device=device)
                assigned[index[index >= 0]] = 1
                sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
                found.append(torch.stack([truth["labels"], sides, assigned], 1))
    labels, sides, assigned = torch.cat(found).cpu().T
    measured = []
    for label in labels.unique():
        of = labels == label
        lost = 1 - assigned[of].mean().item()
        measured.append((int(label), sides[of].median().item(), lost, int(of.sum())))
    return sorted(measured, key=lambda row: -row[2])


def find_weights(name, keywords):
    """Return the path that --weights means for a model of these keywords; None for "none"."""
    if name == "none":
        return None
    if name in ("imagenet", "coco"):
        return fcos.hub_file(name, keywords["imagenet"])
    path = Path(name)
    cached = Path.home() / ".torch" / "models" / name
    if path.exists():
        return path
    if path.name == name and cached.exists():
        return cached
    raise UserError(
        f"{name}: no such weights, neither here nor in {cached.parent}; the README says where to "
        "get the weights of a recipe; coco is torchvision's detector, none a random start"
    )


def make_model(settings, dataset, say):
    """Build the recipe's model for the classes of a data set, with its initial weights."""
    keywords = settings["keywords"]
    from_timm = settings["weights"] == "imagenet" and keywords["backbone"] == "timm"
    path = None if from_timm else find_weights(settings["weights"], keywords)
    weights = fcos.open_weights(path) if path else None
    if not from_timm:
        keywords |= settled_keywords(keywords, weights, say)
    torch.manual_seed(settings["seed"])
    try:
        model = fcos.FCOS(len(dataset.classes), **keywords)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{settings['model']} cannot be built: {error}") from None
    model.name = settings["model"]
    if from_timm:
        model.backbone.load_pretrained()
        say(f"timm's pretrained weights of {keywords['arch']}; random: fpn, head")
    if weights:
        report = fcos.load_weights(model, weights, dataset.classes)
        random = {".".join(name.split(".")[:2]) for name in report["missing"]}
        random = {name for name in random if not name.startswith("backbone.")}
        random |= {f"class {name}" for name in report["new_classes"]}
        say(
            f"{path}: {len(report['loaded'])} tensors of the {report['family']} family; random: "
            f"{', '.join(sorted(random)) or 'nothing'}"
        )
        say(", ".join(f"{name} {value}" for name, value in report["convention"].items()))
    model.set_convention(inclusive=False, score="fcos")  # the data set's boxes are continuous
    model.classes = dataset.classes
    model.category_ids = dataset.category_ids
    del settings["keywords"]
    settings |= model.keywords
    return model


def settled_keywords(keywords, weights, say):
    """Return the keywords that the initial weights decide.

    One of our own checkpoints says which norms it has. Without weights nothing can be frozen.
    """
    if weights:
        own = "num_classes" in weights.content
        stored = fcos.stored_keywords(weights.content) if own else {}
        return {name: stored[name] for name in ("norm", "frozen_stages") if name in stored}
    changes = {}
    if keywords.get("norm") == "frozen":
        changes["norm"] = "gn"
    if changes or keywords["frozen_stages"]:
        changes["frozen_stages"] = 0
        say(f"no pretrained weights: {changes}, because frozen random filters learn nothing")
    return changes


def make_network(model, settings, batches, say):
    """Return what computes the forward pass of a step: the model, or DDP around it.

    It has run once: see `rehearse`.
    """
    rank, world_size = evaluate.rank_and_world_size()
    network = model
    if world_size > 1:
        if settings.get("norm") == "syncbn":
            if next(model.parameters()).is_cuda:
                torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            else:
                say("SyncBN needs GPUs: every process normalizes by its own images alone")
        # Buffers are no use in training, so none is broadcast; torch 2.15 deprecates the flag.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        network = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    rehearse(network, model, batches, settings)
    return network


class Graphs:
    """A backend of torch.compile that counts the graphs it makes and the calls that use one.

    Beyond its recompile limit torch.compile runs a new size eager, for good and with one warning.
    """

    backend = "inductor"

    def __init__(self):
        self.made = 0
        self.calls = 0

    def __call__(self, module, example_inputs):
        run = torch._dynamo.lookup_backend(self.backend)(module, example_inputs)
        self.made += 1

        def run_and_count(*inputs):
            self.calls += 1
            return run(*inputs)

        return run_and_count


def compile_model(model, batches):
    """Compile a model in place, with a graph for each padded size of the run; return its Graphs."""
    config = torch._dynamo.config
    most = 8 + 2 * batches.count_padded_sizes()  # micro-batches may differ by an image
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    graphs = Graphs()
    model.compile(dynamic=False, backend=graphs)
    return graphs


def rehearse(network, model, batches, settings):
    """Run one forward and backward pass that trains nothing, on the smallest image of the run.

    What does not fit together fails here, before anything is written. DDP sums gradients in
    another order after its first backward pass; with this pass behind it, a resumed run sums in
    the same order as one that never stopped. Raises UserError if no loss depends on a parameter,
    or if a loss has a name that the log uses.
    """
    device = next(model.parameters()).device
    batch = to_device(batches.smallest(), device)
    network.eval()  # running statistics stay as they are
    with torch.autocast(device.type, torch.bfloat16, settings["precision"] == "bf16"):
        outputs = network(batch["images"], batch["sizes"])
    targets = model.targets(batch["images"].shape[2:], split_columns(batch))
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
    sum(losses.values()).backward()
    with torch.no_grad():
        model.decode(outputs, batch["sizes"])
    network.train()
    named = model.named_parameters()
    unused = [name for name, p in named if p.requires_grad and p.grad is None]
    if unused:
        raise UserError(f"no loss depends on {', '.join(unused)}")
    if losses.keys() & {"step", "loss", "lr", "AP"}:
        raise UserError(f"losses {', '.join(losses)}: one has a name that the log uses")
    model.zero_grad()


# ---- optimization ------------------------------------------------------------------------------


def parameter_groups(model):
    """Return the optimizer's groups. Biases, those of the norms included, have no weight decay
    and twice the learning rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "bias" not in name], "rate": 1, "weight_decay": 1e-4},
        {"params": [p for name, p in named if "bias" in name], "rate": 2, "weight_decay": 0.0},
    ]


def make_optimizer(model, settings):
    """Return the optimizer. A group's learning rate at a step is what `lr_at` makes of the rate
    given here, times the group's "rate" if it has one."""
    return torch.optim.SGD(parameter_groups(model), lr=settings["lr"], momentum=0.9)


def lr_at(step, lr, iters, warmup, decays=DECAYS):
    """Return the learning rate of a step, counted from 0: constant warm-up, then decays (see
    RECIPES)."""
    passed = sum(step >= iters * eighteenths // 18 for eighteenths in decays)
    return lr * (1 / 3 if step < warmup else 1) * 0.1**passed


class MovingAverage:
    """The moving average of a model's weights, which is evaluated and kept in its place (--ema).

    Its memory is short at first, so that the random start is forgotten: step k, counted from 0,
    weighs at least 9 / (9 + k).
    """

    def __init__(self, model, decay):
        self.source = model
        self.model = copy.deepcopy(model)
        self.decay = decay

    def update(self, step):
        average = get_ema_multi_avg_fn(min(self.decay, step / (9 + step)))
        average(list(self.model.parameters()), list(self.source.parameters()), None)

    def evaluated(self):
        """Return the averaged model, with the running statistics of the model itself."""
        for buffer, current in zip(self.model.buffers(), self.source.buffers()):
            buffer.copy_(current)
        return self.model

    def state_dict(self):
        return self.model.state_dict()

    def load_state_dict(self, state):
        self.model.load_state_dict(state)


def make_companions(model, settings):
    """Return what changes with the weights after every step, by name: a moving average, a teacher.

    Each has `update(step)`, and `state_dict` and `load_state_dict`, by which it is saved and
    resumed under its name. The one called "ema" is evaluated in place of the model.
    """
    return {"ema": MovingAverage(model, settings["ema"])} if settings["ema"] else {}


# ---- the step ----------------------------------------------------------------------------------


def to_device(batch, device):
    """Move the tensors of a batch to the device, without waiting for it."""
    return {
        name: values.to(device, non_blocking=True) if isinstance(values, torch.Tensor) else values
        for name, values in batch.items()
    }


def split_columns(batch):
    """Return the truths of a batch of TrainBatches: for each image, its rows of every column."""
    columns = {
        name: values.split(batch["counts"])
        for name, values in batch.items()
        if name not in ("images", "sizes", "counts")
    }
    return [dict(zip(columns, rows)) for rows in zip(*columns.values())]


def read_step(loader, micro_batches, device):
    """Return the micro-batches of the next step on the device."""
    return [to_device(next(loader), device) for _ in range(micro_batches)]


def compute_gradients(model, network, batches, settings, stop_requested):
    """Compute the gradients of one step from its micro-batches on this rank.

    Targets do not depend on predictions, so the normalizers of the whole step, over all
    micro-batches and ranks, are summed while the first forward pass runs. The same sum tells every
    rank whether any of them was asked to stop.

    Returns {name: this rank's part of the loss} and the number of ranks that were asked to stop,
    as tensors without dimensions: nothing is read from the device.
    """
    targets = [model.targets(batch["images"].shape[2:], split_columns(batch)) for batch in batches]
    device = targets[0]["labels"].device
    _, world_size = evaluate.rank_and_world_size()
    stops = torch.full((1,), float(bool(stop_requested)), device=device)
    sums = torch.cat([sum(map(fcos.loss_normalizers, targets)), stops])
    reduction = dist.all_reduce(sums, async_op=True) if world_size > 1 else None
    step_losses = 0
    for m, batch in enumerate(batches):
        add_only = world_size > 1 and m < len(batches) - 1  # DDP reduces with the last one
        with network.no_sync() if add_only else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, settings["precision"] == "bf16"):
                outputs = network(batch["images"], batch["sizes"])
            if reduction and m == 0:
                reduction.wait()
            losses = fcos.fcos_loss(outputs, targets[m], sums[:-1], **model.loss)
            values = torch.stack(list(losses.values()))
            (values.sum() * world_size).backward()  # DDP averages what is to be added
        step_losses = step_losses + values.detach()
    return dict(zip(losses, step_losses)), sums[-1]


def rate_at(step, group, settings):
    """Return the learning rate of an optimizer's group at a step."""
    schedule = settings["iters"], settings["warmup"], settings["decays"]
    return lr_at(step, group["initial_lr"], *schedule) * group.get("rate", 1)


def describe(optimizer, model, settings):
    """Return what the code makes of the optimizer: its class, the groups with their constant
    hyper-parameters, and {step: learning rate of the first group} wherever that changes.

    It is stored with a run, so that one with another optimizer or schedule is not resumed.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found = {"class": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups, 1):
        group["initial_lr"] = group["lr"]
        parameters = [names.get(id(p), f"{tuple(p.shape)}") for p in group["params"]]
        digest = hashlib.sha256(" ".join(parameters).encode()).hexdigest()[:8]
        values = {name: value for name, value in group.items() if name not in ("params", "lr")}
        found[f"group {number}"] = values | {"parameters": f"{len(parameters)} ({digest})"}
    steps = range(settings["iters"])
    rates = [rate_at(step, optimizer.param_groups[0], settings) for step in steps]
    changes = [step for step in steps if step == 0 or rates[step] != rates[step - 1]]
    changes = changes[:: -(-len(changes) // 100)]  # some of them, if the rate always changes
    schedule = {f"step {step + 1}": rates[step] for step in changes}
    return {"optimizer": found, "schedule": schedule}


def update(step, optimizer, companions, settings):
    """Change the weights, and then what follows them."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, group, settings)
    optimizer.step()
    optimizer.zero_grad()
    for companion in companions.values():
        companion.update(step)


class Meter:
    """The losses of the last step, and the speed since the last row of the log.

    Reading a number from a GPU waits for all of its work, so `add` reads nothing. `read` does, and
    is called every few steps.
    """

    def __init__(self, step, batches, device, graphs=None):
        self.batches = batches
        self.graphs = graphs
        self.first_step = step
        self.losses = {}
        self.first_bad = torch.tensor(len(batches.group), device=device)
        self.restart(step)

    def restart(self, step):
        """Measure the speed from this step on."""
        self.step = step
        self.clock = time.perf_counter()

    def add(self, step, losses, model):
        """Keep the losses, and the step if it is the first whose loss or gradient is not finite."""
        self.losses = losses
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.stack(list(losses.values())).sum().isfinite() & norm.isfinite()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def read(self, step):
        """Return {name: loss} over all ranks and the images per second up to now.

        Raises UserError on every rank if a loss or a gradient of any was not finite.
        """
        values = torch.stack(list(self.losses.values()))
        if dist.is_initialized():
            dist.all_reduce(values)
            dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)
        losses = dict(zip(self.losses, values.tolist()))
        bad = self.first_bad.item()
        if bad < len(self.batches.group):
            ids = self.batches.dataset.image_ids[self.batches.plan(bad).rows].tolist()
            raise UserError(
                f"the loss or its gradient is not finite since step {bad + 1}, of the images "
                f"{ids}; the losses are now {loss_text(losses)}; last.pt is from before that"
            )
        speed = (step - self.step) * self.batches.batch_size / (time.perf_counter() - self.clock)
        self.restart(step)
        return losses, speed

    def graph_counts(self, step):
        """Return the graphs and the eager forward passes of a compiled run, for the log."""
        if self.graphs is None:
            return {}
        passes = (step - self.first_step) * self.batches.micro_batches
        return {"graphs": self.graphs.made, "eager_passes": max(passes - self.graphs.calls, 0)}


def loss_text(losses):
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())


def validate(step, model, companions, val_set, best, files, workers):
    """Score the model after `step` steps, or its average; log the metrics, and keep the best.

    Returns the metrics of the best evaluation so far, on every rank.
    """
    evaluated = companions["ema"].evaluated() if "ema" in companions else model
    device = next(model.parameters()).device
    if dist.is_initialized():
        for buffer in evaluated.buffers():  # running statistics differ: take those of rank 0
            dist.broadcast(buffer, 0)
    batch_size = 1 if device.type == "cpu" else 8
    with torch.compiler.set_stance("force_eager"):  # its sizes are not worth a graph each
        results = evaluate.predict(evaluated, val_set, batch_size, workers)
    if files.active:
        metrics = evaluate.score(results, val_set.annotations)
        files.log(step, **metrics)
        tqdm.write(f"step {step}: AP {metrics['AP']:.3f}{peak_memory(device)}", file=sys.stderr)
        if not files.has_model() or metrics["AP"] < 0:  # the latter: there is nothing to find
            best = None
        if best is None or metrics["AP"] > best["AP"]:
            candidate = metrics | {"step": step}
            best = candidate if files.best(evaluated, candidate) else best
    if dist.is_initialized():
        shared = [best]
        dist.broadcast_object_list(shared, 0)
        best = shared[0]
    return best


def out_of_patience(step, best, settings):
    """Return whether as many evaluations as --patience says have not been better than the best.

    Those count that came after the last change of the learning rate. The number follows from the
    steps alone, so that a resumed run stops where one would that was never interrupted.
    """
    if not settings["patience"] or best is None:
        return False
    last_change = int(list(settings["schedule"])[-1].removeprefix("step ")) - 1
    every = settings["eval_every"]
    return step // every - max(best["step"], last_change) // every >= settings["patience"]


def peak_memory(device):
    """Return the peak memory of the GPU, or of the process on Linux, as text for the log."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    elif sys.platform == "linux":
        from resource import RUSAGE_SELF, getrusage  # Windows has none, macOS other units

        peak = getrusage(RUSAGE_SELF).ru_maxrss / 2**20
    else:
        return ""
    return f", peak {peak:.1f} GiB"


# ---- main --------------------------------------------------------------------------------------


def main(args):
    """Train as the command line says."""
    # Set up. Every mistake is found before anything is written.
    settings = resolve(args)
    rank, world_size, device = evaluate.start_process(args.device, fresh_store)
    say = print if rank == 0 else lambda text: None
    check_batch_size(settings, world_size, args.accumulate)
    train_set, val_set = load_data(find_data(args), settings, say)
    model = make_model(settings, train_set, say).to(device)
    evaluate.check_classes(model, val_set)
    optimizer = make_optimizer(model, settings)
    companions = make_companions(model, settings)
    settings |= describe(optimizer, model, settings)
    print_settings(settings, args, say)
    batches = TrainBatches(train_set, settings, rank, world_size, args.accumulate)
    report_sizes(model, batches, say)
    network = make_network(model, settings, batches, say)
    graphs = compile_model(model, batches) if args.compile else None

    # Train. The last turn of the loop only evaluates.
    iters = settings["iters"]
    out = Path(args.out or f"runs/{args.recipe}")
    inputs = settings["weights"], train_set.annotations.path, val_set.annotations.path
    saved = {"optimizer": optimizer} | companions
    workers = (1 if device.type == "cpu" else 4) if args.workers is None else args.workers
    check_room(batches, workers)
    with evaluate.one_writer(out), evaluate.no_worker_left(), stop_signals() as signals:
        files, start, best = open_run(out, args, settings, model, saved, inputs, say)
        loader = start_loader(batches, start, workers, device)
        meter = Meter(start, batches, device, graphs)
        bar = progress_bar(args.recipe, start, iters)
        for step in bar:
            # The model of an evaluation has been saved: a run that is stopped here repeats it.
            if step == iters or is_due(step, args.eval_every):
                best = validate(step, model, companions, val_set, best, files, workers)
                meter.restart(step)
            if step == iters or out_of_patience(step, best, settings):
                break
            micro_batches = read_step(loader, args.accumulate, device)
            losses, stops = compute_gradients(model, network, micro_batches, settings, signals)
            meter.add(step, losses, model)
            update(step, optimizer, companions, settings)

            done = step + 1
            saving = must_save(done, args, iters)
            logging = saving or is_due(done, max(1, min(20, iters // 100)))
            stopping = (logging or device.type == "cpu") and stops.item() > 0
            if logging or stopping:
                report(done, meter, optimizer, files, bar)
            if saving or stopping:
                files.checkpoint(done, settings, model, saved, best)
            if stopping and done < iters:
                sender = signals[0] if signals else "a signal to another rank"
                say(f"{sender}: stopped after step {done} of {iters}; {files.resumes_from()}")
                return
    if rank == 0:
        print_result(best, files)
    if world_size > 1:  # torchrun restarts all ranks if one fails before it is here
        dist.barrier()


def check_batch_size(settings, world_size, micro_batches):
    """Raise UserError unless every micro-batch of every rank gets an image."""
    batch_size = settings["batch_size"]
    if batch_size < world_size * micro_batches:
        raise UserError(
            f"--batch-size {batch_size}: less than an image for each of {world_size} "
            f"processes and {micro_batches} micro-batches"
        )


def print_settings(settings, args, say):
    """Print what runs: the learning rates from the optimizer, not from the settings behind them."""
    for name, value in settings.items():
        if name not in ("lr", "warmup", "decays", "optimizer", "schedule"):
            say(f"{name:18s} {abbreviated(value)}")
    say(f"{'optimizer':18s} {settings['optimizer']['class']}")
    for name, group in settings["optimizer"].items():
        if name != "class":
            used = [f"{key} {value}" for key, value in group.items() if value not in (None, False)]
            say(f"{name:18s} {', '.join(used)}")
    rates = [f"{rate:.3g} from {step}" for step, rate in settings["schedule"].items()]
    say(f"{'learning rate':18s} {', '.join(rates[:8])}{', ...' if len(rates) > 8 else ''}")
    recipe = RECIPES[args.recipe]
    if settings["lr"] != recipe["lr"] and args.lr is None:
        say(
            f"the learning rate {recipe['lr']} for {recipe['batch_size']} images a step becomes "
            f"{settings['lr']:g} for {settings['batch_size']}"
        )


def check_room(batches, workers):
    """Raise UserError unless the machine has room for what dataloader workers read ahead."""
    evaluate.check_open_files(workers)
    if os.path.isdir("/dev/shm"):
        shares = batches.world_size * batches.micro_batches
        pixels = max(h * w for h, w in batches.largest_hw)
        batch = -(-batches.batch_size // shares) * 3 * pixels
        needed = evaluate.launch_number("LOCAL_WORLD_SIZE", 1) * workers * 2 * batch
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise UserError(
                f"/dev/shm has {free / 2**20:.0f} MB free, and the dataloader workers may need "
                f"{needed / 2**20:.0f}; make it larger (docker run --shm-size), or use --workers 0"
            )


def start_loader(batches, start, workers, device):
    """Return the iterator over all micro-batches from step `start` on; its workers begin now."""
    items = range(start * batches.micro_batches, len(batches))
    pinned = device.type == "cuda"
    loader = evaluate.read_ahead(batches.__getitem__, items, workers, pin_memory=pinned)
    return evaluate.raise_errors(iter(loader))


def progress_bar(name, start, iters):
    """Return the steps from `start` to `iters`, both included, shown as a bar on rank 0."""
    rank, _ = evaluate.rank_and_world_size()
    steps = range(start, iters + 1)
    return tqdm(
        steps, name, iters, initial=start, disable=rank != 0, unit="step", dynamic_ncols=True
    )


def is_due(step, every):
    """Return whether something that happens every so many steps happens after this one."""
    return bool(every) and step > 0 and step % every == 0


def must_save(done, args, iters):
    """Return whether a checkpoint is written after `done` steps; before an evaluation it is."""
    return done == iters or is_due(done, args.checkpoint_every) or is_due(done, args.eval_every)


def report(done, meter, optimizer, files, bar):
    """Log the losses after `done` steps and show them beside the progress bar."""
    losses, speed = meter.read(done)
    rate = optimizer.param_groups[0]["lr"]
    total = sum(losses.values())
    counts = meter.graph_counts(done)
    files.log(done, loss=total, **losses, lr=rate, images_per_second=round(speed, 2), **counts)
    bar.set_postfix_str(f"{loss_text(losses)} lr {rate:.2g} {speed:.1f} img/s")


def print_result(best, files):
    """Print where the best model is, and its metrics as JSON in the last line.

    Raises UserError if the model or a checkpoint could not be written.
    """
    path = files.out / "model.pt"
    if best is None or not files.has_model():
        raise UserError(f"{path}: cannot be written; {files.resumes_from()}")
    print(
        f"AP {best['AP']:.3f} after step {best['step']}, the best, is of {path}; "
        f"{time.process_time():.0f} s of CPU time. To see what it finds:\n"
        f"python evaluate.py {path} --images PHOTO.jpg --out drawn/"
    )
    print(json.dumps(best))
    files.resumes_from()


# ---- what a run writes and resumes -------------------------------------------------------------


class RunFiles:
    """The files of a run: log.jsonl, last.pt, previous.pt, model.pt and metrics.json.

    Only rank 0 writes. If the disk is full, training continues, the older file stays, and a warning
    is printed. A run that starts over writes log.new.jsonl and then last.new.pt: see `replace_run`.
    """

    NAMES = ("last.pt", "previous.pt", "model.pt", "metrics.json", "log.jsonl")
    NEW_NAMES = ("last.new.pt", "log.new.jsonl")

    def __init__(self, out, start, launch):
        self.out = out
        self.active = evaluate.rank_and_world_size()[0] == 0
        self.made_with = {"launch": launch, "torch": str(torch.__version__)}
        self.saved_step = start or None  # of the checkpoint that is there
        self.owns_model = start > 0  # whether model.pt is not an older run's
        self.path = out / "log.jsonl"
        if not self.active:
            return
        rows = []
        if start == 0 and self.path.exists():
            self.path = out / "log.new.jsonl"
        elif self.path.is_file():
            rows = log_rows(self.path, start)
        with fcos.atomic_write(self.path, "w") as file:
            file.writelines(rows)

    def log(self, step, **values):
        """Write a row of the log: losses or metrics. Another logger takes them here."""
        if not self.active:
            return
        try:
            evaluate.make_folder(self.out)  # in case someone has removed it
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except (OSError, UserError) as error:
            tqdm.write(f"{self.path}: {error}", file=sys.stderr)

    def checkpoint(self, step, settings, model, saved, best):
        """Write all that a run needs to resume after `step` steps."""
        if not self.active:
            return
        content = {
            "settings": settings,
            "step": step,
            "best": best,
            "made_with": self.made_with,
            "model": fcos.checkpoint(model),
        }
        if saved.keys() & content.keys():
            raise UserError(f"{', '.join(saved)}: one has a name of the checkpoint's own")
        content |= {name: thing.state_dict() for name, thing in saved.items()}
        first = self.saved_step is None
        path = self.out / ("last.new.pt" if first else "last.pt")
        try:
            evaluate.make_folder(self.out)
            with fcos.atomic_write(path, keep=None if first else self.out / "previous.pt") as file:
                torch.save(content, file)
        except UserError as error:
            tqdm.write(f"{error}; the older checkpoint stays", file=sys.stderr)
            return
        if first:
            replace_run(self.out, self.owns_model)
            self.path = self.out / "log.jsonl"
        self.saved_step = step

    def best(self, model, metrics):
        """Write model.pt and metrics.json. Returns whether that succeeded."""
        try:
            evaluate.make_folder(self.out)
            fcos.save(model, self.out / "model.pt")
            with fcos.atomic_write(self.out / "metrics.json", "w") as file:
                json.dump(metrics, file)
        except UserError as error:
            tqdm.write(f"{error}; the older model stays", file=sys.stderr)
            return False
        self.owns_model = True
        return True

    def has_model(self):
        """Return whether the run has written a model.pt that is still there."""
        return self.owns_model and (self.out / "model.pt").exists()

    def resumes_from(self):
        """Return what to do after a stop, for the last message. Raises UserError if a checkpoint
        could not be written."""
        there = any((self.out / name).exists() for name in ("last.pt", "previous.pt"))
        if self.active and not (self.saved_step and there):
            raise UserError(f"{self.out}: no checkpoint could be written, so this run is lost")
        return f"the same command resumes after step {self.saved_step}"


def log_rows(path, start):
    """Return the lines of a log that a run which resumes after `start` steps will not write again.

    Its evaluation at `start` is repeated. Torn lines are left out.
    """
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["step"] < start or (row["step"] == start and "AP" not in row):
                rows.append(line + "\n")
    return rows


def replace_run(out, keep_model=False):
    """Delete the older run in a folder if a newer one has written its first checkpoint there.

    last.new.pt marks that. Every start calls this first, so that a kill at any moment leaves files
    of one run only. With `keep_model`, model.pt and metrics.json are the newer run's.
    """
    if (out / "last.new.pt").exists():
        for name in (
            "last.pt",
            "previous.pt",
            *(() if keep_model else ("model.pt", "metrics.json")),
        ):
            (out / name).unlink(missing_ok=True)
        if (out / "log.new.jsonl").exists():
            os.replace(out / "log.new.jsonl", out / "log.jsonl")
        os.replace(out / "last.new.pt", out / "last.pt")
    (out / "log.new.jsonl").unlink(missing_ok=True)


def open_run(out, args, settings, model, saved, inputs, say):
    """Resume the run in `out`, or start one. With --fresh, only a run of the same launch resumes.

    inputs: files that the run must not write over.
    Returns its RunFiles, the number of steps done, and the metrics of the best evaluation.
    """
    rank, world_size = evaluate.rank_and_world_size()
    if rank == 0:
        fcos.remove_leftovers(out)
        replace_run(out)
    agree(0, out)  # on rank 0 being done
    launch = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    # --fresh is for the first start of a launch: torchrun's restarts and Slurm's resume from it
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("SLURM_RESTART_COUNT")
    restarted = any(count and count.isdigit() and int(count) for count in restarts)
    start = 0
    best = None
    damaged = False
    if restarted or not args.fresh:
        start, best, damaged = resume(out, settings, model, saved, say, args.fresh and launch)
    if start == 0 and not args.fresh and (out / "model.pt").exists():
        raise UserError(
            f"{out}: holds a model.pt and no checkpoint; choose another --out, or "
            "--fresh to replace it"
        )
    agree(start, out)
    if start == 0:
        for name in RunFiles.NAMES + RunFiles.NEW_NAMES:
            evaluate.check_target(out / name, inputs)
    if damaged and rank == 0:  # or the next checkpoint would keep it as previous.pt
        os.replace(out / "last.pt", out / "damaged.pt")
    return RunFiles(out, start, launch), start, best


def agree(start, out):
    """Wait for all ranks, and raise UserError unless all have found the same number of steps."""
    if dist.is_initialized():
        starts = [None] * dist.get_world_size()
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise UserError(f"{out}: must be one folder for all nodes; they found steps {starts}")


def resume(out, settings, model, saved, say, launch=None):
    """Load the model and what is saved beside it from the last checkpoint of the run in `out`.

    With `launch`, only from one that this launch has written. Returns the number of steps done, 0
    without a checkpoint; the metrics of the best evaluation; and whether last.pt is damaged.
    Raises UserError if the checkpoint and the code disagree.
    """
    path, content, problems = find_checkpoint(out)
    if content is None:
        if problems and not launch:
            raise UserError(f"{'; '.join(problems)}; --fresh starts over")
        return 0, None, False
    if launch and (content.get("made_with") or {}).get("launch") != launch:
        return 0, None, False
    try:
        there = content["settings"] | fcos.stored_keywords(content["model"])
        there |= {"classes": content["model"]["classes"], "model": settings["model"]}
        changed = differences(there, settings | {"classes": model.classes})
        if not changed:
            step, best = restore(path, content, settings, model, saved)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"{path}: cannot be resumed ({what}); --fresh starts over") from None
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{out}: holds a run of other settings ({'; '.join(changed[:5])}{more}); repeat "
            "them, start over with --fresh, or choose another --out (and --weights "
            f"{path}, to train on with a schedule of its own)"
        )
    for problem in problems:
        say(f"{problem}; {path} takes its place")
    say(f"{out}: resumes after step {step} of {settings['iters']}")
    return step, best, len(problems) > 0


def find_checkpoint(out):
    """Return the path and content of last.pt, or of previous.pt if last.pt is missing or damaged.

    Also returns what is wrong with those that cannot be used. Without any, the content is None.
    """
    problems = []
    for path in filter(Path.exists, (out / "last.pt", out / "previous.pt")):
        try:
            content = fcos.read_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if isinstance(content, dict) and isinstance(content.get("settings"), dict):
            return path, content, problems
        problems.append(f"{path}: not a checkpoint of this trainer")
    return None, None, problems


def restore(path, content, settings, model, saved):
    """Load a checkpoint of these settings into the model and what is saved beside it.

    Returns the number of steps done and the metrics of the best evaluation. Raises ValueError and
    others if something is missing or does not fit.
    """
    step = content["step"]
    held = content["model"]
    best = content.get("best")
    if type(step) is not int or step not in range(settings["iters"] + 1):
        raise ValueError(f"step {step!r}")
    if best is not None:
        best |= {"AP": float(best["AP"]), "step": int(best["step"])}
    for name, thing in saved.items():
        odd = layout(content[name]).items() ^ layout(state_after_a_step(thing)).items()
        if odd:
            raise ValueError(f"{name} does not fit at {min(place for place, _ in odd)}")
        for value in torch.utils._pytree.tree_leaves(content[name]):
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
    fcos.load_weights(model, fcos.Weights(path, held, held["model"], "fcos"))
    for name, thing in saved.items():
        groups = [dict(group) for group in getattr(thing, "param_groups", [])]
        thing.load_state_dict(content[name])
        for group, ours in zip(getattr(thing, "param_groups", []), groups):
            group |= {key: value for key, value in ours.items() if key != "params"}
    return step, best


def state_after_a_step(thing):
    """Return the state_dict of an optimizer once it has made a step; of other things, of now.

    The weights may change: call it before they are loaded.
    """
    if isinstance(thing, torch.optim.Optimizer):
        for group in thing.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        thing.step()
        thing.zero_grad()
    return thing.state_dict()


def layout(state):
    """Return {place in a state_dict: shape of the tensor there, None for other values}."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(state)
    place = torch.utils._pytree.keystr
    return {place(path): getattr(leaf, "shape", None) for path, leaf in leaves}


# ---- signals and processes ---------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals():
    """Collect the signals that ask a run to stop in the list that this yields.

    Without this they would end the process. Signals that are ignored stay so: SIGHUP under nohup.
    A second signal ends the process, unless it comes at once: Slurm and torchrun both pass the same
    one on.
    """
    received = []
    before = {}
    last = 0.0

    def handle(number, _frame):
        nonlocal last
        if received and time.monotonic() > last + 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        received.append(signal.Signals(number).name)
        last = time.monotonic()

    for number in evaluate.STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fresh_store(rank, world_size, timeout):
    """Return a part of torchrun's store that no process has used before.

    torchrun keeps one store through all its restarts, where a rank may find the address of another
    that has died, and wait for it (PyTorch issue 135712). Also sets TORCHELASTIC_RESTART_COUNT,
    since torchrun's own counts for each node, and TORCHELASTIC_RUN_ID, since torchrun's own is the
    same for several launches.
    """
    env = os.environ
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), None, False, timeout)
    if (
        rank == 0
    ):  # answer every rank, under the name by which it asks, with the number of the start
        number = str(store.add("starts", 1))
        if number == "1":
            store.set("launch", uuid.uuid4().hex)
        waiting = set(range(1, world_size))
        while waiting:
            for r in waiting:
                if store.check([f"name of {r}"]):
                    store.set(store.get(f"name of {r}").decode(), number)
            waiting = {r for r in waiting if not store.check([f"{number} reached {r}"])}
            time.sleep(0.01)
    else:
        name = uuid.uuid4().hex  # of this process, not of one that had its rank before
        store.set(f"name of {rank}", name)
        number = store.get(name).decode()
        store.set(f"{number} reached {rank}", "")
    env["TORCHELASTIC_RESTART_COUNT"] = str(int(number) - 1)
    env["TORCHELASTIC_RUN_ID"] = store.get("launch").decode()
    return dist.PrefixStore(f"start {number}", store)


# ---- the shapes data set ------------------------------------------------------------------------

SHAPES = {  # category id (with gaps, as in COCO): name, distances of corners at equal angles, hole
    1: ("ellipse", [1] * 72, 0),
    3: ("rectangle", [0.71, 1] * 4, 0),
    4: ("triangle", [1] * 3, 0),
    7: ("star", [1, 0.45] * 5, 0),
    9: ("ring", [1] * 72, 0.55),
    10: ("cross", [0.37, 1, 1] * 4, 0),
}
PAPERS, INKS = (
    np.array([list(bytes.fromhex(c)) for c in row.split()], np.float32)
    for row in (
        "22303f 39463b 43374d 5a4a42 2f5061 1d3557 24404a 4a3038 333a56 3c4a3a",
        "ff6b6b ff9f43 ffd166 6ee7a8 4dd0c4 7cb8ff b79cff ff8fc2 fff8e7 c7f06a",
    )
)


def _background(rng, w, h):
    """Mix two colours by a gradient, stripes or checks, and clouds -> (h, w, 3) in 0..255."""
    a, b = rng.permutation(PAPERS)[:2]
    y, x = np.mgrid[:h, :w]
    z = (x - w / 2 + 1j * (y - h / 2)) * np.exp(2j * np.pi * rng.uniform())
    u, v = np.sin(2 * np.pi * np.stack([z.real, z.imag]) / rng.uniform(12, 48))
    clouds = Image.fromarray(rng.standard_normal((9, 9), np.float32)).resize((w, h), Image.BICUBIC)
    mix = 0.5 + z.real / w + 0.2 * np.asarray(clouds) + 0.3 * (0, u, u * v)[rng.integers(3)]
    return a + (b - a) * np.clip(mix, 0, 1)[..., None]


def _scene(rng):
    """Draw a picture -> uint8 (h, w, 3), and its objects as COCO annotations without ids.

    A box is tight around the part of the object inside the picture, covered or not. Two objects
    share at most 30 % of the smaller one.
    """
    w, h = rng.permutation([128, rng.choice([144, 152, 160])]).tolist()
    image = _background(rng, w, h)
    objects = []
    masks = []
    sizes = np.sort(10 * 5.5 ** rng.uniform(size=rng.integers(6, 11)))
    for size, ink in zip(sizes[::-1], rng.permutation(INKS)):  # the small cover the large
        category = int(rng.choice(list(SHAPES)))
        centre = complex(*rng.uniform(0, (w, h)))
        _, distances, hole = SHAPES[category]
        z = np.exp(2j * np.pi * (np.arange(len(distances)) / len(distances) - 0.25)) * distances
        z = (z.real + 1j * z.imag * rng.uniform(0.75, 1)) * np.exp(1j * rng.uniform(-0.25, 0.25))
        drawn = Image.new("L", (4 * w, 4 * h))  # four times as large
        for scale, fill in [(size, 255), (size * hole, 0)]:  # a hole of 0 is too small to see
            corners = 4 * (z * scale + centre)
            ImageDraw.Draw(drawn).polygon(corners.view(float).tolist(), fill)
        x0, y0, x1, y1 = (edge / 4 for edge in drawn.getbbox())
        mask = np.asarray(drawn.reduce(4), np.float32) / 255
        if (x1 - x0) * (y1 - y0) < 0.7 * size**2 * np.ptp(z.real) * np.ptp(z.imag) or any(
            (mask * m).sum() > 0.3 * min(mask.sum(), m.sum()) for m in masks
        ):
            continue  # too little of it is inside the picture, or too much on another
        shadow = drawn.transform((w, h), Image.AFFINE, (4, 0, -4, 0, 4, -8))  # right 1, down 2
        image *= 1 - np.asarray(shadow.filter(ImageFilter.GaussianBlur(2)))[..., None] / 640
        image += (ink - image) * mask[..., None]
        masks.append(mask)
        bbox = [x0, y0, x1 - x0, y1 - y0]
        area = round(float(mask.sum()), 2)
        objects.append(dict(category_id=category, bbox=bbox, area=area, iscrowd=0))
    image += rng.uniform(1, 4) * rng.standard_normal((h, w, 1), np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), objects


def make_shapes(root, seed=0, train=1400, val=200):
    """Draw the shapes data set in COCO 2017 layout. Picture i of a split is a function of (seed,
    split, i). The folder appears when complete. Raises OSError if it exists and is not empty."""
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        part = Path(temporary, root.name)
        (part / "annotations").mkdir(parents=True)
        for split, (name, count) in enumerate([("train2017", train), ("val2017", val)]):
            (part / name).mkdir()
            content = _draw_split(part / name, seed, split, count)
            (part / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        os.replace(part, root)


def _draw_split(folder, seed, split, count):
    """Draw the pictures of a split into a folder -> its COCO instances."""
    images = []
    annotations = []
    for i in range(count):
        picture, objects = _scene(np.random.Generator(np.random.PCG64([seed, split, i])))
        image_id = 1_000_000 * split + i + 1
        name = f"{image_id:012d}.jpg"
        h, w, _ = picture.shape
        Image.fromarray(picture).save(folder / name, quality=90)
        images.append(dict(id=image_id, file_name=name, width=w, height=h))
        for shape in objects:
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id) | shape)
    categories = [dict(id=id, name=name) for id, (name, _, _) in SHAPES.items()]
    return dict(images=images, annotations=annotations, categories=categories)


if __name__ == "__main__":
    evaluate.run(main, parse_args())
