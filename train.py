"""Train FCOS: the published recipes, on COCO, on your own boxes, or on a generated data set.

    python train.py shapes                                              # minutes on two CPU cores
    python train.py fcos_imprv_R_50_FPN_1x --accumulate 4               # one GPU, data/coco
    torchrun --nproc_per_node=8 train.py fcos_imprv_R_50_FPN_1x         # eight: the same training
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py

The images of a step depend only on (seed, step), and its loss is normalized over all of them. The
number of GPUs, micro-batches (--accumulate) and dataloader workers therefore changes only the
speed. The same command again resumes from the last checkpoint in --out.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports; see run

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
import warnings
import zlib
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import functional as vision
from tqdm import tqdm

import evaluate
import fcos
from fcos import UserError, mirror_boxes, printable

# ---- recipes -----------------------------------------------------------------------------------

DECAYS = [12, 16]


def recipe(
    model, weights, iters, batch_size, lr, warmup, min_size, max_size, decays=DECAYS, data=None
):
    """Return a recipe: training by SGD with momentum 0.9 and weight decay 1e-4.

    model: a row of fcos.MODELS. weights: a file in ~/.torch/models, or a choice of --weights.
    batch_size: images a step, over all GPUs and micro-batches.
    lr: the learning rate. The first `warmup` steps use a third of it, and it falls to a tenth at
    each of `decays`, in eighteenths of `iters`.
    min_size: choices for the short side in pixels; one of them is drawn for each image.
    data: a folder, by default data/coco.
    """
    return locals()


X1 = dict(iters=90_000, batch_size=16, lr=0.01, warmup=500, min_size=[800], max_size=1333)
MS = X1 | dict(min_size=list(range(640, 801)))
X2 = MS | dict(iters=180_000)
X4 = X1 | dict(iters=360_000, decays=[15, 17], min_size=list(range(256, 609, 32)), max_size=900)
B32 = dict(batch_size=32)
B64 = dict(batch_size=64)
X_32 = "X-101-32x8d.pkl"
X_64 = "X-101-64x4d.pkl"
MSRA = "MSRA-R-50.pkl"  # Detectron2's, whose norms have statistics
MNV2 = "mobilenet_v2-ecbe2b5.pth"
# fmt: off
RECIPES = {
    "fcos_R_50_FPN_1x":                     recipe("fcos_R_50_FPN", "R-50.pkl", **X1),
    "fcos_R_101_FPN_2x":                    recipe("fcos_R_101_FPN", "R-101.pkl", **X2),
    "fcos_X_101_32x8d_FPN_2x":              recipe("fcos_X_101_32x8d_FPN", X_32, **X2),
    "fcos_X_101_64x4d_FPN_2x":              recipe("fcos_X_101_64x4d_FPN", X_64, **X2),
    "fcos_imprv_R_50_FPN_1x":               recipe("fcos_imprv_R_50_FPN", "R-50.pkl", **X1),
    "fcos_imprv_R_101_FPN_1x":              recipe("fcos_imprv_R_101_FPN", "R-101.pkl", **X1),
    "fcos_imprv_R_101_FPN_2x":              recipe("fcos_imprv_R_101_FPN", "R-101.pkl", **X2),
    "fcos_imprv_X_101_32x8d_FPN_2x":        recipe("fcos_imprv_X_101_32x8d_FPN", X_32, **X2),
    "fcos_imprv_X_101_64x4d_FPN_2x":        recipe("fcos_imprv_X_101_64x4d_FPN", X_64, **X2),
    "fcos_imprv_dcnv2_R_50_FPN_1x":         recipe("fcos_imprv_dcnv2_R_50_FPN", "R-50.pkl", **X1),
    "fcos_imprv_dcnv2_R_101_FPN_1x":        recipe("fcos_imprv_dcnv2_R_101_FPN", "R-101.pkl", **X1),
    "fcos_imprv_dcnv2_R_101_FPN_2x":        recipe("fcos_imprv_dcnv2_R_101_FPN", "R-101.pkl", **X2),
    "fcos_imprv_dcnv2_X_101_32x8d_FPN_2x":  recipe("fcos_imprv_dcnv2_X_101_32x8d_FPN", X_32, **X2),
    "fcos_imprv_dcnv2_X_101_64x4d_FPN_2x":  recipe("fcos_imprv_dcnv2_X_101_64x4d_FPN", X_64, **X2),
    "fcos_bn_bs16_MNV2_FPN_1x":             recipe("fcos_bn_MNV2_FPN", MNV2, **X1),
    "fcos_syncbn_bs32_MNV2_FPN_1x":         recipe("fcos_syncbn_MNV2_FPN", MNV2, **X1 | B32),
    "fcos_syncbn_bs32_c128_MNV2_FPN_1x":    recipe("fcos_syncbn_c128_MNV2_FPN", MNV2, **X1 | B32),
    "fcos_syncbn_bs32_c128_ms_MNV2_FPN_1x": recipe("fcos_syncbn_c128_MNV2_FPN", MNV2, **MS | B32),
    "fcos_syncbn_bs64_c128_ms_MNV2_FPN_1x": recipe("fcos_syncbn_c128_MNV2_FPN", MNV2, **MS | B64),
    # not official: AdelaiDet's, torchvision's, and two small ones
    "fcos_imprv_R_50_FPN_2x":               recipe("fcos_imprv_R_50_FPN", "R-50.pkl", **X2),
    "fcos_imprv_iou_R_50_FPN_1x":           recipe("fcos_imprv_iou_R_50_FPN", "R-50.pkl", **X1),
    "fcos_rt_R_50_FPN_4x":                  recipe("fcos_rt_R_50_FPN", MSRA, **X4),
    "fcos_torchvision_R_50_FPN_1x":         recipe("fcos_torchvision_R_50_FPN", "imagenet", **X1),
    "small": recipe("small", "none", iters=1500, batch_size=4, lr=0.02, warmup=100,
                    min_size=[320], max_size=480),
    "shapes": recipe("shapes", "none", iters=1500, batch_size=8, lr=0.02, warmup=50,
                     min_size=[128], max_size=160, data="data/shapes"),
}
# fmt: on

# ---- settings ----------------------------------------------------------------------------------

# The groups of flags that are not stored with a run. All others decide its result, and a resumed
# run must repeat them. The data counts by its content: see `fingerprint`.
DATA = "data"
HOW_IT_RUNS = "how it runs"


def make_parser():
    parser = evaluate.ArgumentParser(__doc__)
    number = evaluate.number
    count = evaluate.COUNT
    pixels = evaluate.PIXELS
    recipe = dict(nargs="?", default="fcos_imprv_R_50_FPN_1x")
    parser.add_argument("recipe", help="row of RECIPES (%(default)s)", **recipe)
    add = parser.add_argument_group(DATA).add_argument
    layouts = evaluate.LAYOUT_NAMES
    add("--data", metavar="DIR", help=f"folder in the layout of {layouts} (data/coco)")
    add("--train-images", metavar="DIR", help="for any other layout: pass all four, not --data")
    add("--train-annotations", metavar="JSON")
    add("--val-images", metavar="DIR")
    add("--val-annotations", metavar="JSON")
    add = parser.add_argument_group("what is trained, instead of the recipe's").add_argument
    weights_help = "start from a detector or ImageNet classifier, torchvision's, or nothing"
    add("--weights", metavar="PATH|coco|imagenet|none", help=weights_help)
    keywords_help = "keywords of the model, such as radius=0 quality=iou: see fcos.FCOS"
    add("--set", metavar="KEYWORD=VALUE", help=keywords_help, **evaluate.KEYWORD_VALUES)
    add("--negatives", action="store_true", help="also train on images without objects")
    add("--augment", action="store_true", help="vary colors and crop, for small data sets")
    images = evaluate.IMAGES
    add("--batch-size", help="images per step, over all GPUs and micro-batches", **images)
    add("--iters", help="steps; the schedule keeps its proportions", **count)
    add("--lr", type=number(float, 1e-12, 1e38), help="learning rate (scaled with --batch-size)")
    add("--min-size", nargs="+", help="one or more choices for the short side", **pixels)
    add("--max-size", help="limit of the long side", **pixels)
    add("--multiple", help="pad to multiples of this (32; 128 with --compile)", **pixels)
    decay = dict(type=number(float, 1e-9, 1 - 1e-9), metavar="DECAY")
    add("--ema", help="average the weights, such as 0.999 (none)", **decay)
    add("--patience", help="stop after N evaluations without gain", **count)
    seed = dict(type=number(int, 0, 2**63 - 1), metavar="N", default=0)
    add("--seed", help="of initial weights, data order and augmentation (%(default)s)", **seed)
    add("--precision", help="bf16: autocast, for GPUs (%(default)s)", **evaluate.PRECISION)
    add = parser.add_argument_group(HOW_IT_RUNS).add_argument
    add("--out", metavar="DIR", help="folder of the run (runs/RECIPE)")
    workers = evaluate.WORKERS
    add("--workers", help="dataloader workers per rank (4 on a GPU, else 1)", **workers)
    add("--accumulate", default=1, help="micro-batches per step (%(default)s)", **count)
    add("--eval-every", help="steps between evaluations (only at the end)", **count)
    add("--checkpoint-every", default=2500, help="steps between checkpoints (%(default)s)", **count)
    add("--device", help="cpu, cuda, mps or xpu (cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--fresh", action="store_true", help="start over, whatever --out holds")
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    return make_parser().parse_args(argv)


def stored_flags():
    """Return the names of the flags that are stored with a run."""
    groups = [g for g in make_parser()._action_groups if g.title not in (DATA, HOW_IT_RUNS)]
    return [action.dest for g in groups for action in g._group_actions if action.dest != "help"]


def resolve(args: Namespace) -> dict:
    """Return the settings that decide the result: the recipe's, or the flags' where given.

    "keywords" are all keywords of the model. Raises UserError for settings that do not go together.
    """
    if args.recipe not in RECIPES:
        raise UserError(f"recipe {args.recipe!r}: expected one of {', '.join(RECIPES)}")
    settings = {"recipe": args.recipe, "decays": DECAYS} | RECIPES[args.recipe]
    settings.pop("data", None)
    batch_size = settings["batch_size"]
    for name in stored_flags():
        value = getattr(args, name)
        if value is not None or name not in settings:
            settings[name] = value
    if args.lr is None:
        settings["lr"] *= settings["batch_size"] / batch_size
    settings["warmup"] = min(settings["warmup"], settings["iters"] // 10)  # of a short run
    if settings["multiple"] is None:
        settings["multiple"] = 128 if args.compile else 32
    if settings["multiple"] % 32:
        raise UserError(f"--multiple {settings['multiple']}: expected a multiple of 32")
    if settings["patience"]:
        settings["eval_every"] = args.eval_every  # decides where the run stops
        if not args.eval_every:
            raise UserError("--patience needs --eval-every")
    fcos.resized_hw(1, 1, max(settings["min_size"]), settings["max_size"])  # raises if too small
    if not all(1 <= decay <= 18 for decay in settings["decays"]):
        raise UserError(f"decays {settings['decays']}: expected eighteenths of the steps, 1 to 18")
    overrides = dict(settings.pop("set"))
    if "test_size" not in fcos.MODELS.get(settings["model"], {}) | overrides:  # as it is trained
        overrides["test_size"] = max(settings["min_size"]), settings["max_size"]
    settings["keywords"] = fcos.model_keywords(settings["model"], overrides)
    return settings


def check_ranks(settings, args):
    """Raise UserError on every rank unless all were started with the same flags."""
    if not dist.is_initialized():
        return
    how = ("accumulate", "eval_every", "checkpoint_every", "compile", "fresh")
    own = settings | {name: getattr(args, name) for name in how}
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    for rank, other in enumerate(of_ranks):
        changed = "; ".join(differences(of_ranks[0], other))
        if changed:
            raise UserError(f"rank {rank}: expected the flags of rank 0, found {changed:.500}")


def find_data(args: Namespace) -> dict:
    """Return {"train": (annotation file, image folder), "val": ...} as the flags or the recipe say.

    Raises UserError if only some of the four flags for own data are given.
    """
    own = {
        "train": (args.train_annotations, args.train_images),
        "val": (args.val_annotations, args.val_images),
    }
    given = [path for pair in own.values() for path in pair if path]
    if not given:
        data = args.data or RECIPES[args.recipe].get("data") or "data/coco"
        return {split: evaluate.coco_paths(data, f"{split}2017") for split in own}
    if args.data or len(given) < 4:
        flags = "--train-images, --train-annotations, --val-images and --val-annotations"
        raise UserError(f"own data: expected all of {flags}, and no --data")
    return own


def flatten(settings):
    """Return settings without nesting: {"lr": 0.01, "keywords radius": 1.5, ...}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return flat


def differences(there, here):
    """Return a short, printable text for each setting in which a checkpoint and the code differ."""
    there = flatten(there)
    here = flatten(here)
    found = []
    for name in here | there:
        old = there.get(name, "nothing")
        new = here.get(name, "nothing")
        if old != new:
            values = f"{printable(old, 200)} there, {printable(new, 200)} here"
            found.append(f"{printable(name)} {values}")
    return found


def print_settings(settings):
    """Print what runs. The learning rates are the optimizer's, not the settings behind them."""
    for name, value in flatten(settings).items():
        if value is not None and name not in ("lr", "warmup", "decays"):
            say(f"{name:28s} {printable(value, 200)}")
    if settings["patience"]:
        every = settings["eval_every"]
        first_end = (settings["last_rate_change"] // every + settings["patience"]) * every
        if first_end >= settings["iters"]:  # see out_of_patience
            why = "it counts from the last change of the learning rate"
            say(f"warning: --patience cannot end this run before step {first_end}: {why}")


# ---- batches and augmentation ------------------------------------------------------------------

# The random streams: purpose, and the length of a position. The index in this list is part of the
# seed; later streams, such as "libraries", are seeded by their names, see TrainBatches.rng.
STREAMS = [("group", 0), ("order", 2), ("sizes", 1), ("augment", 2), ("augment_more", 2)]


class Plan(NamedTuple):
    """The images of a step: their indices in the data set, the (height, width) to which each is
    resized, and the (height, width) to which all are padded."""

    indices: list[int]
    sizes: list[tuple[int, int]]
    padded_hw: tuple[int, int]


class TrainBatches:
    """The micro-batches of all steps. Item `step * micro_batches + m` is this rank's part of
    micro-batch m of a step.

    All images of a step belong to one aspect group (height < width, or not), which keeps the
    padding small. A step draws its group in proportion to the groups' lengths. A group is an
    endless stream of seeded permutations, so no batch is short, even if the data set is smaller
    than a batch. The images of a step are dealt to micro-batches and ranks like cards.

    All images of a step are padded to one size, which every rank computes for itself, because
    padding is background to the loss and enters the GroupNorms. Sizes are multiples of the setting
    "multiple", but no larger than the largest image of the group can need.
    """

    def __init__(self, dataset, settings, rank=0, world_size=1, micro_batches=1):
        self.dataset = dataset
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches
        self.batch_size = settings["batch_size"]
        self.iters = settings["iters"]
        self.drawn = set()  # random streams that the current item has taken
        self.groups = aspect_groups(dataset, settings)
        self.largest_hw = [self.largest_padded_hw(group) for group in self.groups]
        lengths = np.array([len(group) for group in self.groups])
        shares = lengths.cumsum() / lengths.sum()
        draws = self.rng("group").random(self.iters)
        self.group_of_step = np.searchsorted(shares[:-1], draws, side="right")
        self.turn_of_step = np.zeros_like(self.group_of_step)  # earlier steps of the same group
        for group in range(len(self.groups)):
            steps = np.flatnonzero(self.group_of_step == group)
            self.turn_of_step[steps] = np.arange(len(steps))

    def rng(self, purpose, *position):
        """Return the random stream of a purpose at a position, a NumPy generator.

        Every purpose has its own stream, so that a draw for one does not shift the numbers of
        another. Raises ValueError if an item takes a stream twice and would get equal numbers.
        """
        stream = purpose, len(position)  # NumPy fills short seeds with zeros: (2, 5) is (2, 5, 0)
        number = STREAMS.index(stream) if stream in STREAMS else zlib.crc32(repr(stream).encode())
        if (purpose, position) in self.drawn:
            raise ValueError(f"stream {purpose!r} at {position} is taken twice: use another name")
        self.drawn.add((purpose, position))
        return np.random.Generator(np.random.PCG64([self.settings["seed"], number, *position]))

    @functools.lru_cache(maxsize=4)  # noqa: B019  (one object a process, as long as the process)
    def order(self, group, epoch):
        """Return the permutation of a group's images in one epoch of the group."""
        return self.rng("order", group, epoch).permutation(self.groups[group])

    def plan(self, step: int) -> Plan:
        """Return the plan of a step, computed by every rank before it decodes an image."""
        self.drawn.clear()  # a new item: each computes its plan first
        group = self.group_of_step[step]
        start = self.turn_of_step[step] * self.batch_size
        positions = start + np.arange(self.batch_size)  # in the group's endless stream
        epochs, places = np.divmod(positions, len(self.groups[group]))
        indices = [self.order(group, epoch)[place].item() for epoch, place in zip(epochs, places)]
        min_sizes = self.rng("sizes", step).choice(self.settings["min_size"], self.batch_size)
        sizes = [self.resized_hw(i, size) for i, size in zip(indices, min_sizes.tolist())]
        height, width = fcos.padded_hw(sizes, self.settings["multiple"])
        most_height, most_width = self.largest_hw[group]
        return Plan(indices, sizes, (min(height, most_height), min(width, most_width)))

    def resized_hw(self, i, min_size):
        """Return the (height, width) of image i with a short side of `min_size` pixels."""
        height, width = self.dataset.hw[i].tolist()
        return fcos.resized_hw(height, width, min_size, self.settings["max_size"])

    def one_of_each_size(self, indices):
        """Return one image of every (height, width) among some images."""
        _, first = np.unique(self.dataset.hw[indices], axis=0, return_index=True)
        return indices[first].tolist()

    def largest_padded_hw(self, group):
        """Return the padded (H, W) that holds every image of a group, whatever its short side."""
        if not len(group):
            return 0, 0
        min_size = max(self.settings["min_size"])
        return fcos.padded_hw([self.resized_hw(i, min_size) for i in self.one_of_each_size(group)])

    def count_padded_sizes(self):
        """Return an upper bound for the number of padded sizes of a run."""
        multiple = self.settings["multiple"]
        return sum(math.ceil(h / multiple) * math.ceil(w / multiple) for h, w in self.largest_hw)

    def checksum(self):
        """Return a checksum of the groups: a run that samples other images must not be resumed."""
        return f"{zlib.crc32(np.concatenate(self.groups).tobytes()):x}"

    def __len__(self):
        return self.iters * self.micro_batches

    def __getitem__(self, item):
        """Return a micro-batch of this rank.

        {"images": uint8 (b, 3, H, W), "sizes": (b, 2), "counts": the b numbers of boxes, "boxes":
        (sum of G, 4) xyxy pixels, "labels": (sum of G,), and every further column}. Boxes of all
        images are concatenated, because processes exchange few tensors faster; `to_device` splits
        them. Raises UserError, naming the files, if one cannot be read or an augmentation spoils a
        sample.
        """
        step, micro_batch = divmod(item, self.micro_batches)
        plan = self.plan(step)
        first = micro_batch * self.world_size + self.rank
        slots = range(first, self.batch_size, self.world_size * self.micro_batches)
        return collate([self.sample(plan, step, slot) for slot in slots], plan.padded_hw)

    def sample(self, plan, step, slot):
        """Return the augmented sample of one image of a step. slot: its position in the plan."""
        with name_files(self.dataset), seeded_globals(self.rng("libraries", step, slot)):
            sample = self.read(plan.indices[slot], plan.sizes[slot], step, slot)
            if self.settings["augment"]:
                sample = augment_more(sample, self.rng("augment_more", step, slot))
            sample = augment(sample, self.rng("augment", step, slot))
            check_sample(sample, len(self.dataset.classes))
            return sample

    def read(self, i, hw, step, slot):
        """Return the sample of image i at (height, width), before augmentation.

        A mosaic goes here: it draws further images by self.rng("mosaic", step, slot), and reads
        them by `read_resized`, too.
        """
        return read_resized(self.dataset, i, hw)

    def smallest(self):
        """Return a batch of one image, the smallest one."""
        images = self.one_of_each_size(np.concatenate(self.groups))
        sizes = {image: self.resized_hw(image, min(self.settings["min_size"])) for image in images}
        i = min(images, key=lambda image: math.prod(sizes[image]))
        return collate([read_resized(self.dataset, i, sizes[i])], fcos.padded_hw([sizes[i]]))


def aspect_groups(dataset, settings):
    """Return the indices of the images that are trained on: the wide ones, and the others.

    A step's images are of one group, drawn in proportion to the groups' lengths, and all entries of
    a group are drawn equally often: repeat an index to draw its image more often.
    """
    indices = np.flatnonzero(dataset.trainable | settings["negatives"])
    upright = dataset.hw[indices, 0] >= dataset.hw[indices, 1]
    return indices[~upright], indices[upright]


@contextlib.contextmanager
def name_files(dataset):
    """Name the files that were read for a sample in every error about it."""
    dataset.files_read.clear()
    try:
        yield
    except Exception as error:
        files = list(map(str, dataset.files_read))
        if isinstance(error, UserError) and not any(file in str(error) for file in files):
            raise UserError(f"{', '.join(files)}: {error}") from None
        error.add_note(f"in a sample made from {', '.join(files)}")
        raise


@contextlib.contextmanager
def seeded_globals(rng):
    """Seed the global generators of PyTorch, NumPy and Python, and restore them at the end.

    Augmentation libraries draw from them. Without this, a sample would depend on the samples that
    its worker made before.
    """
    seed = int(rng.integers(2**32))
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def check_sample(sample, num_classes):
    """Raise UserError if an augmented sample cannot be trained on."""
    image = sample["image"]
    boxes = sample["boxes"]
    labels = sample["labels"]
    is_image = image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
    have_area = (boxes[:, 2:] > boxes[:, :2]).all()
    height, width = image.shape[-2:]
    inside = ((boxes[:, 2:] > 0) & (boxes[:, :2] < torch.tensor([width, height]))).all()
    known = ((labels >= 0) & (labels < num_classes)).all()
    complete = all(len(sample[name]) == len(boxes) for name in sample if name != "image")
    if not (is_image and have_area and inside and known and complete):
        made = f"{tuple(image.shape)} {image.dtype} pixels, boxes {boxes.tolist()}"
        expected = f"uint8 (3, H, W), boxes that overlap it, a label below {num_classes} for each"
        raise UserError(f"augment made {made:.250}, labels {labels.tolist()}; expected {expected}")


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


# How each column of the boxes changes with the image: mirror(values, width) when it is mirrored,
# crop(values, offset, scale) when it is cropped and resized, with offset and scale as (x, y, x, y).
# A column without a rule raises an error, because its values would no longer fit the image.
COLUMNS = {
    "boxes": dict(mirror=mirror_boxes, crop=lambda boxes, offset, scale: (boxes - offset) * scale),
    "labels": dict(mirror=lambda labels, *_: labels, crop=lambda labels, *_: labels),
}


def transform(sample, how, *values):
    """Return the columns of a sample, changed by their rules for "mirror" or "crop"."""
    columns = [name for name in sample if name != "image"]
    for name in columns:
        if how not in COLUMNS.get(name, {}):
            raise UserError(f"column {name!r}: expected a rule {how!r} in COLUMNS of train.py")
    return {name: COLUMNS[name][how](sample[name], *values) for name in columns}


def read_resized(dataset, i, hw):
    """Return the sample of image i, resized to (height, width). Extra columns change by their
    "crop" rule with an offset of 0, because a column in pixels must be scaled like the boxes."""
    sample = dataset.sample(i, hw)
    height, width = dataset.hw[i].tolist()
    scale = torch.tensor([hw[1] / width, hw[0] / height] * 2)
    extra = {name: sample[name] for name in sample if name not in ("image", "boxes", "labels")}
    return sample | transform(extra, "crop", torch.zeros(4), scale)


def augment(sample, rng):
    """Return a sample, mirrored with a probability of one half.

    The image must not become larger, because the padding of a step is decided before its pixels are
    read. Boxes may be removed, with their rows of every column. rng: this sample's NumPy generator.
    """
    if rng.random() < 0.5:
        width = sample["image"].shape[2]
        return {"image": sample["image"].flip(2)} | transform(sample, "mirror", width)
    return sample


def augment_more(sample, rng):
    """Return a sample with other colors and perhaps a crop (--augment); `augment` follows.

    Brightness, contrast and saturation vary by up to 30 %. Half of the images are enlarged up to
    twice and cut to their size; boxes whose center lies outside the crop are dropped.
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
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = ((center > 0) & (center < torch.tensor([W, H]))).all(1)
    columns["boxes"] = boxes.clamp(min=0).minimum(torch.tensor([W, H, W, H]))
    image = fcos.resize(image[:, y : y + h, x : x + w], (H, W))
    return {"image": image} | {name: values[kept] for name, values in columns.items()}


# ---- the model's start -------------------------------------------------------------------------


def load_data(args: Namespace, settings: dict):
    """Return the training and the validation set, and print warnings about them.

    Raises UserError if a file cannot be used, or if there is no box to train on.
    """
    paths = find_data(args)
    if str(paths["train"][1]) == "data/shapes/train2017":
        draw_shapes("data/shapes")
    train_set = load_split(paths["train"])
    val_set = load_split(paths["val"], train_set.classes)
    train_path = train_set.annotations
    val_path = val_set.annotations
    empty = int((~train_set.trainable).sum())
    if empty == len(train_set) or not len(train_set.boxes):
        why = "; ".join(train_set.notes) or f"it lists {len(train_path.rows)} boxes"
        raise UserError(f"{train_path}: expected an image with a box to train on; {why}")
    if empty:
        use = "negatives" if settings["negatives"] else "left out; --negatives trains on them"
        say(f"{train_path}: {empty} of {len(train_set)} images without boxes to train on are {use}")
    counts = np.bincount(train_set.labels, minlength=len(train_set.classes))
    without = [name for name, count in zip(train_set.classes, counts) if count == 0]
    if without:
        say(f"{train_path}: has no box of {printable(', '.join(without), 200)}")
    if not len(val_set.boxes):
        say(f"{val_path}: has no boxes, so every AP will be -1")
    if evaluate.rank_and_world_size()[0] == 0:
        shared = count_shared_images(train_set, val_set)
        if shared:
            say(f"{val_path}: {shared} of its images are in the training set: AP will be too high")
    return train_set, val_set


def count_shared_images(train_set, val_set):
    """Return how many validation images have the path or the content of a training image."""
    paths = []
    for dataset in (train_set, val_set):
        folder = dataset.image_dir.resolve()  # two links may lead to one folder
        paths += [os.path.join(folder, name) for name in dataset._names.tolist()]
    first_val = len(train_set)
    shared = [group for group in evaluate.same_content(paths) if group[0] < first_val]
    return sum(position >= first_val for group in shared for position in group)


def load_split(paths, classes=None):
    """Read a data set; print its size and its warnings.

    classes: the names of the classes; by default the annotations decide.
    """
    annotations, image_dir = paths
    if not Path(annotations).exists():
        nearest = evaluate.list_nearest(annotations)
        flags = "--data, or --train-images and the three flags after it in --help"
        raise UserError(f"{annotations}: no such file; {nearest}; use {flags}")
    dataset = evaluate.load_dataset(annotations, image_dir, classes)
    names = printable(", ".join(map(str, dataset.classes)), 100)
    counts = f"{len(dataset)} images, {len(dataset.boxes)} boxes"
    say(f"{annotations}: {counts} of {len(dataset.classes)} classes: {names}")
    for note in dataset.notes:
        say(f"{annotations}: {note}")
    return dataset


def fingerprint(dataset):
    """Return a text that identifies the content of a data set's annotations, not their path."""
    digest = hashlib.sha256(repr((dataset.classes, dataset.category_ids)).encode())
    values = vars(dataset) | vars(dataset.annotations) | dataset.annotations.columns
    for name, value in sorted(values.items()):
        if isinstance(value, np.ndarray):
            digest.update(name.encode() + value.tobytes())
    counts = f"{len(dataset)} images, {len(dataset.boxes)} boxes"
    return f"{counts}, sha256 {digest.hexdigest()[:16]}"


def draw_shapes(folder):
    """Draw the shapes data set on rank 0 if it is not there; the other ranks wait."""
    folder = Path(folder)
    if evaluate.rank_and_world_size()[0] == 0 and not folder.exists():
        say(f"drawing {folder}")
        with evaluate.lock_folder(folder.parent, wait=True):
            for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a killed process
                shutil.rmtree(leftover)
            if not folder.exists():  # another run may have drawn it meanwhile
                make_shapes(folder)
    if dist.is_initialized():
        dist.barrier()


def report_sizes(model, batches):
    """Print the size of the boxes after resizing and the share without a location, which is not
    trained on, for the ten worst classes. Above a tenth, print a --min-size that would help."""
    if evaluate.rank_and_world_size()[0] > 0:
        return
    min_sizes = sorted(batches.settings["min_size"])
    sizes = min_sizes[len(min_sizes) // 2], batches.settings["max_size"]
    found = measure_boxes(model, batches, sizes)
    for lost, label, count, side in found[:10]:
        name = printable(batches.dataset.classes[label])
        size = f"{side:.0f} pixels at --min-size {sizes[0]} (median)"
        say(f"{name}: boxes of {size}, {lost:.0%} of {count} without a location")
    if largest_share_lost(found) > 0.1:
        remedy = "a finer level (--set levels=[2,3,4,5,6] with ranges) or tiles of the images"
        for factor in (4, 3, 2, 1.5, 1.25):
            larger = [round(factor * size / 32) * 32 for size in sizes]
            if largest_share_lost(measure_boxes(model, batches, larger)) > 0.1:
                break
            remedy = f"--min-size {larger[0]} --max-size {larger[1]}"
        say(f"warning: many boxes are too small for any location; try {remedy}")


def largest_share_lost(found):
    """Return the largest share of boxes without a location: among all boxes, or among those of a
    class with 10 boxes or more. found: from measure_boxes."""
    total = sum(count for _, _, count, _ in found)
    overall = sum(lost * count for lost, _, count, _ in found) / max(total, 1)
    of_classes = [lost for lost, _, count, _ in found if count >= 10]
    return max([overall, *of_classes])


def measure_boxes(model, batches, sizes):
    """Return (share of boxes without a location, label, number of boxes, median side in pixels) for
    each class, the largest share first.

    Up to 300 random images are measured; fewer if a CPU would take more than a second or two.
    """
    dataset = batches.dataset
    device = next(model.parameters()).device
    measured = []
    work = 0
    for i in np.random.default_rng(0).permutation(np.concatenate(batches.groups))[:300].tolist():
        height, width = dataset.hw[i].tolist()
        hw = fcos.resized_hw(height, width, *sizes)
        truth = {name: values.to(device) for name, values in dataset.truth(i, hw).items()}
        boxes = truth["boxes"]
        index = model.targets(fcos.padded_hw([hw]), [truth])["index"]
        lost = torch.isin(torch.arange(len(boxes), device=device), index, invert=True)
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        measured.append(torch.stack([truth["labels"], lost, sides], 1))
        work += hw[0] * hw[1] * len(boxes)
        if work > 5e8 and device.type == "cpu":
            break
    table = torch.cat(measured).cpu()
    found = []
    for label in table[:, 0].unique():
        _, lost, sides = table[table[:, 0] == label].T
        found.append((lost.mean().item(), int(label), len(lost), sides.median().item()))
    return sorted(found, reverse=True)


def find_weights(name, keywords):
    """Return the path of the weights that --weights names, or None for "none"."""
    if name == "none":
        return None
    if name in ("imagenet", "coco"):
        return fcos.hub_file(name, keywords["imagenet"])
    cached = Path.home() / ".torch" / "models" / name
    for path in Path(name), cached:
        if path.exists():
            return path
    choices = "coco (torchvision's detector), imagenet, none, or a file listed in the README"
    raise UserError(f"{name}: no such file, nor {cached}; expected {choices}")


def make_model(settings: dict, dataset) -> fcos.FCOS:
    """Build the recipe's model for the classes of a data set, with its initial weights."""
    keywords = settings["keywords"]
    from_timm = settings["weights"] == "imagenet" and keywords["backbone"] == "timm"
    path = None if from_timm else find_weights(settings["weights"], keywords)
    weights = fcos.open_weights(path) if path else None
    if not from_timm:
        keywords = keywords | keywords_for(weights, keywords)
    torch.manual_seed(settings["seed"])
    try:
        model = fcos.FCOS(len(dataset.classes), **keywords)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{settings['model']} cannot be built: {error}") from None
    model.name = settings["model"]
    if from_timm:
        model.backbone.load_pretrained()
        say(f"timm's pretrained weights of {keywords['arch']}; random: fpn, head")
    if weights:
        report_weights(path, fcos.load_weights(model, weights, dataset.classes))
    model.set_convention(inclusive=False, score="fcos")  # the data set's boxes are continuous
    model.classes = dataset.classes
    model.category_ids = dataset.category_ids
    return model


def keywords_for(weights, keywords):
    """Return the keywords that the initial weights decide.

    Our own checkpoints store the kind of norm. Without weights nothing can be frozen.
    """
    if weights:
        is_ours = "num_classes" in weights.content
        stored = fcos.resolve(weights.content["keywords"]) if is_ours else {}
        return {name: stored[name] for name in ("norm", "frozen_stages") if name in stored}
    changes = {}
    if keywords.get("norm") == "frozen":
        changes["norm"] = "gn"
    if changes or keywords["frozen_stages"]:
        changes["frozen_stages"] = 0
        say(f"no pretrained weights: {changes}, because random weights must not be frozen")
    return changes


def report_weights(path, report):
    """Print what fcos.load_weights has loaded, and which parts keep random weights."""
    parts = {".".join(name.split(".")[:2]) for name in report["missing"]}
    untrained = {part for part in parts if not part.startswith("backbone.")}
    untrained |= {f"class {name}" for name in report["new_classes"]}
    loaded = f"{len(report['loaded'])} tensors of the {report['family']} family"
    say(f"{path}: {loaded}; random: {', '.join(sorted(untrained)) or 'nothing'}")
    say(", ".join(f"{name} {value}" for name, value in report["convention"].items()))


def make_network(model, settings, batches):
    """Return the model, or DDP around it, after `rehearse`."""
    network = model
    if evaluate.rank_and_world_size()[1] > 1:
        if settings["keywords"].get("norm") == "syncbn":
            if next(model.parameters()).device.type == "cpu":
                say("SyncBN needs GPUs; on a CPU each process normalizes over its own images")
            else:
                torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Training does not use the buffers, so none is broadcast; torch 2.15 deprecates the flag.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        options = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
        network = DistributedDataParallel(model, **options)
    rehearse(network, model, batches, settings)
    return network


class Graphs:
    """A backend of torch.compile that counts the graphs it makes and the calls that use one.

    Beyond its recompile limit, torch.compile runs new sizes eagerly, and warns only once.
    """

    backend = "inductor"
    made = 0
    calls = 0

    def __call__(self, module, example_inputs):
        run = torch._dynamo.lookup_backend(self.backend)(module, example_inputs)
        self.made += 1

        def run_and_count(*inputs):
            self.calls += 1
            return run(*inputs)

        return run_and_count

    def counts(self, passes):
        """Return the number of graphs, and of eager passes among `passes` forward passes."""
        return {"graphs": self.made, "eager_passes": max(passes - self.calls, 0)}


def compile_model(model, batches) -> Graphs:
    """Compile a model in place, with a graph for each padded size of the run."""
    config = torch._dynamo.config
    most = 8 + 2 * batches.count_padded_sizes()  # micro-batches may differ by an image
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    graphs = Graphs()
    model.compile(dynamic=False, backend=graphs)
    return graphs


# Names that an output of the head and a loss must not have
DETECTION_NAMES = {"boxes", "scores", "labels", "bbox", "score", "category_id", "image_id"}
LOG_NAMES = {"step", "loss", "lr", "AP"}


def rehearse(network, model, batches, settings):
    """Run a step without an update on the smallest image of the run, and decode its outputs.

    A mistake in the model or the loss raises an error here, before anything is written. DDP sums
    gradients in another order after its first backward pass, which is this one; so a resumed run
    sums in the same order as one that never stopped.

    Raises UserError if no loss depends on a parameter, or for a reserved name of an output or loss.
    """
    batch = to_device(batches.smallest(), next(model.parameters()).device)
    network.eval()  # running statistics stay as they are
    with torch.no_grad():
        outputs = model(batch["images"], batch["sizes"])
        taken = outputs.keys() & DETECTION_NAMES
        if taken:
            problem = "expected another name; detections use it"
            raise UserError(f"output {min(taken)!r} of the head: {problem}")
        model.decode(outputs, batch["sizes"])
    losses = compute_gradients(model, network, [batch], settings)
    check_empty_batch(model, network, batch, losses, settings)
    if batches.batch_size > batches.world_size * batches.micro_batches:
        check_normalization(model, network, batch, settings)
    network.train()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise UserError(f"no loss depends on {', '.join(unused)}")
    if losses.keys() & LOG_NAMES:
        raise UserError(f"losses {', '.join(losses)}: expected no name of {sorted(LOG_NAMES)}")
    model.zero_grad()


def check_empty_batch(model, network, batch, losses, settings):
    """Warn if a loss is missing or not finite for the batch without its boxes.

    A step without boxes would then end the run, and so would every attempt to resume it.
    """
    truths = [{name: rows[:0] for name, rows in truth.items()} for truth in batch["truths"]]
    found = compute_gradients(model, network, [batch | {"truths": truths}], settings)
    for name in losses:
        if name not in found or not found[name].isfinite():
            fix = "divide by a normalizer that is clamped to 1, see fcos.fcos_loss"
            say(f"warning: loss {name} is missing or not finite in a step without boxes; {fix}")


def check_normalization(model, network, batch, settings):
    """Warn if a loss depends on how a step is split into micro-batches, as a mean does.

    Computes the losses of the batch twice over: in one micro-batch, and in two.
    """
    twice = {name: torch.cat([x, x]) if torch.is_tensor(x) else x + x for name, x in batch.items()}
    together = compute_gradients(model, network, [twice], settings)
    apart = compute_gradients(model, network, [batch, batch], settings)
    for name in together:
        if not torch.isclose(together[name], apart[name], rtol=0.03, atol=1e-3, equal_nan=True):
            fix = "divide its sum by one of the normalizers, see fcos.fcos_loss"
            say(f"warning: loss {name} depends on how a step is split; {fix}")


# ---- optimization ------------------------------------------------------------------------------


def parameter_groups(model: torch.nn.Module, lr: float) -> list[dict]:
    """Return the optimizer's groups. Biases, including those of norms, have no weight decay and
    twice the learning rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for name, p in named if "bias" not in name]
    biases = [p for name, p in named if "bias" in name]
    return [
        {"params": weights, "lr": lr, "weight_decay": 1e-4},
        {"params": biases, "lr": 2 * lr, "weight_decay": 0.0},
    ]


def make_optimizer(model: torch.nn.Module, settings: dict) -> torch.optim.Optimizer:
    """Return the optimizer. `lr_at` scales the "lr" of each of its groups."""
    return torch.optim.SGD(parameter_groups(model, settings["lr"]), momentum=0.9)


def lr_at(step: int, lr: float, iters: int, warmup: int, decays=DECAYS) -> float:
    """Return the learning rate of a step, counted from 0: constant warm-up, then decays.

    The other arguments are those of `recipe`.
    """
    passed = sum(step >= iters * eighteenths // 18 for eighteenths in decays)
    return lr * (1 / 3 if step < warmup else 1) * 0.1**passed


def group_lr(step, group, settings):
    """Return the learning rate of an optimizer's group at a step."""
    schedule = settings["iters"], settings["warmup"], settings["decays"]
    return lr_at(step, group["initial_lr"], *schedule)  # `describe` has stored initial_lr


def describe(optimizer, model, settings):
    """Return the optimizer as settings, so that a run with another one is not resumed: its class,
    its groups, and the learning rate of the first group wherever that changes."""
    names = {p: name for name, p in model.named_parameters()}
    updated = {p for group in optimizer.param_groups for p in group["params"]}
    left_out = [names[p] for p in names if p.requires_grad and p not in updated]
    if left_out:
        raise UserError(f"the optimizer has no group with {', '.join(left_out):.300}")
    found = {"class": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups, 1):
        group.setdefault("initial_lr", group["lr"])
        found[f"group {number}"] = describe_group(group, names, settings)
    rates = [group_lr(k, optimizer.param_groups[0], settings) for k in range(settings["iters"])]
    changes = [k for k in range(len(rates)) if k == 0 or rates[k] != rates[k - 1]]
    shown = changes[:: math.ceil(len(changes) / 20)]  # some of them, if the rate always changes
    schedule = {f"from step {k + 1}": float(f"{rates[k]:.9g}") for k in shown}
    return {"optimizer": found, "learning rate": schedule, "last_rate_change": changes[-1]}


def describe_group(group, names, settings):
    """Return the values of a group as text, with a checksum of its parameters' names and of its
    learning rate at 100 steps."""
    parameters = [names.get(p, f"{tuple(p.shape)}") for p in group["params"]]
    steps = range(0, settings["iters"], math.ceil(settings["iters"] / 100))
    rates = [group_lr(step, group, settings) for step in steps]
    checksum = zlib.crc32(repr(rates).encode(), zlib.crc32(" ".join(parameters).encode()))
    used = [(name, value) for name, value in group.items() if value not in (None, False)]
    values = [f"{name} {value}" for name, value in used if name not in ("params", "lr")]
    return f"{', '.join(values)}, {len(parameters)} tensors ({checksum:x})"


class MovingAverage:
    """The moving average of a model's weights, evaluated and saved in place of the model (--ema).

    The weights of step k, counted from 0, count at least 9 / (9 + k), so that the random initial
    weights are soon forgotten.
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


def make_companions(model: torch.nn.Module, settings: dict) -> dict:
    """Return {name: object to update after every step}, such as a moving average or a teacher.

    Each has `update(step)`, `state_dict` and `load_state_dict`, and is saved and resumed. The one
    called "ema" is evaluated in place of the model.
    """
    return {"ema": MovingAverage(model, settings["ema"])} if settings["ema"] else {}


# ---- the step ----------------------------------------------------------------------------------


def to_device(batch, device):
    """Move a batch of TrainBatches to the device, without waiting for the copy.

    Returns {"images": (b, 3, H, W), "sizes": (b, 2), "truths": for each image a dict of its boxes,
    labels and further columns}.
    """
    columns = {
        name: values.to(device, non_blocking=True)
        for name, values in batch.items()
        if name != "counts"
    }
    images = columns.pop("images")
    sizes = columns.pop("sizes")
    truths = [{} for _ in images]
    for name, values in columns.items():
        for truth, rows in zip(truths, values.split(batch["counts"])):
            truth[name] = rows
    return {"images": images, "sizes": sizes, "truths": truths}


def all_reduce(values, operation=dist.ReduceOp.SUM):
    """Replace a tensor by its sum over all processes, or by the result of another operation."""
    if dist.is_initialized():
        dist.all_reduce(values, operation)


def seed_step(step, rank, settings):
    """Seed PyTorch's generators for a step, so that dropout draws the same in a resumed run."""
    seed = np.random.SeedSequence([settings["seed"], step, rank]).generate_state(1)
    torch.manual_seed(int(seed[0]))


def compute_gradients(model, network, micro_batches, settings):
    """Compute the gradients of one step from its micro-batches on this rank.

    Targets do not depend on predictions, so the normalizers of the whole step, over all
    micro-batches and ranks, are known before the first forward pass. Every loss is then a share of
    the step's loss, and the shares add up.

    network: the model, or DDP around it. Returns {name: this rank's share of the loss} as scalar
    tensors on the device.
    """
    targets = [model.targets(batch["images"].shape[2:], batch["truths"]) for batch in micro_batches]
    normalizers = sum(map(fcos.loss_normalizers, targets))
    all_reduce(normalizers)
    _, world_size = evaluate.rank_and_world_size()
    bf16 = settings["precision"] == "bf16"
    step_losses = []
    for m, batch in enumerate(micro_batches):
        # DDP sums gradients over ranks in the last micro-batch only; the model ignores the flag.
        network.require_backward_grad_sync = m == len(micro_batches) - 1
        with torch.autocast(normalizers.device.type, torch.bfloat16, bf16):
            outputs = network(batch["images"], batch["sizes"])
        losses = fcos.fcos_loss(outputs, targets[m], normalizers, **model.loss)
        values = torch.stack(list(losses.values()))
        (values.sum() * world_size).backward()  # DDP divides the sum over ranks by their number
        step_losses.append(values.detach())
    return dict(zip(losses, sum(step_losses)))


def update(step, optimizer, companions, settings):
    """Update the weights, with the learning rates of this step, and then the companions."""
    for group in optimizer.param_groups:
        group["lr"] = group_lr(step, group, settings)
    optimizer.step()
    optimizer.zero_grad()
    for companion in companions.values():
        companion.update(step)


class Meter:
    """The losses of the last step, and the speed since the last reading.

    Reading a number from a GPU waits for all of its work, so `add` reads nothing, and `read` is
    called every few steps.
    """

    def __init__(self, step, batches, device, graphs=None):
        self.batches = batches
        self.graphs = graphs
        self.first_step = step
        self.first_bad = torch.tensor(batches.iters, device=device)  # the step; iters: none yet
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
        bad = torch.where(finite, self.batches.iters, step)
        self.first_bad = torch.minimum(self.first_bad, bad)

    def read(self, step):
        """Return what is logged after `step` steps: the losses over all ranks, and the speed.

        Raises UserError on every rank if a loss or a gradient of any was not finite.
        """
        values = torch.stack(list(self.losses.values()))
        all_reduce(values)
        all_reduce(self.first_bad, dist.ReduceOp.MIN)
        losses = dict(zip(self.losses, values.tolist()))
        first_bad = self.first_bad.item()
        if first_bad < self.batches.iters:
            ids = self.batches.dataset.image_ids[self.batches.plan(first_bad).indices].tolist()
            problem = f"since step {first_bad + 1} with the images {ids}; losses are now {losses}"
            raise UserError(f"the loss or its gradient is not finite {problem}; last.pt is older")
        speed = (step - self.step) * self.batches.batch_size / (time.perf_counter() - self.clock)
        self.restart(step)
        row = {"loss": sum(losses.values())} | losses | {"images_per_second": round(speed, 2)}
        if self.graphs:
            row |= self.graphs.counts((step - self.first_step) * self.batches.micro_batches)
        return row


def validate(step, model, companions, val_set, best, files, workers):
    """Score the model after `step` steps, or its average; log the metrics and keep the best model.

    Returns the metrics of the best evaluation so far, on every rank.
    """
    evaluated = companions["ema"].evaluated() if "ema" in companions else model
    device = next(model.parameters()).device
    if dist.is_initialized():
        for buffer in evaluated.buffers():  # running statistics differ: take those of rank 0
            dist.broadcast(buffer, 0)
    batch_size = 1 if device.type == "cpu" else 8
    with torch.compiler.set_stance("force_eager"):  # a graph for each size would take too long
        results = evaluate.predict(evaluated, val_set, batch_size, workers)
    if files.active:
        metrics = evaluate.score(results, val_set.annotations)
        files.log(step, **metrics)
        message = f"step {step}: AP {metrics['AP']:.3f}"
        if device.type in ("cuda", "xpu"):
            message += f", peak {torch.accelerator.max_memory_allocated() / 2**30:.1f} GiB"
        tqdm.write(message, file=sys.stderr)
        metrics["step"] = step
        no_objects = not len(val_set.boxes)  # then every AP is -1: keep the last model
        nothing_kept = best is None or not files.has_model()
        better = nothing_kept or no_objects or metrics["AP"] > best["AP"]
        if better and files.save_best(evaluated, metrics):
            best = metrics
    if dist.is_initialized():
        shared = [best]
        dist.broadcast_object_list(shared, 0)
        best = shared[0]
    return best


def out_of_patience(step, best, settings):
    """Return whether --patience evaluations since the last change of the learning rate have found
    no better model. This depends on steps only, so resuming does not change where a run stops."""
    if not settings["patience"] or best is None:
        return False
    every = settings["eval_every"]
    start = max(best["step"], settings["last_rate_change"])
    return step // every - start // every >= settings["patience"]


# ---- main --------------------------------------------------------------------------------------


def main(args: Namespace):
    """Train as the command line says."""
    # Set up. Every mistake is found before anything is written.
    settings = resolve(args)
    rank, world_size, device = evaluate.start_process(args.device, make_fresh_store)
    check_ranks(settings, args)
    train_set, val_set = load_data(args, settings)
    model = make_model(settings, train_set).to(device)
    optimizer = make_optimizer(model, settings)
    companions = make_companions(model, settings)
    settings |= {"train_data": fingerprint(train_set), "val_data": fingerprint(val_set)}
    settings |= {"keywords": model.keywords} | describe(optimizer, model, settings)
    print_settings(settings)
    batches = TrainBatches(train_set, settings, rank, world_size, args.accumulate)
    settings["sampling"] = batches.checksum()
    report_sizes(model, batches)
    network = make_network(model, settings, batches)
    graphs = compile_model(model, batches) if args.compile else None
    workers = (1 if device.type == "cpu" else 4) if args.workers is None else args.workers
    check_room(batches, workers)

    # Train. The last turn of the loop only evaluates.
    iters = settings["iters"]
    out = Path(args.out or f"runs/{args.recipe}")
    inputs = settings["weights"], train_set.annotations.path, val_set.annotations.path
    check_companions(companions)
    saved = {"optimizer": optimizer} | companions
    with evaluate.lock_folder(out), stop_signals() as signals, evaluate.kill_workers():
        files, start, best = open_run(out, args, settings, model, saved, inputs)
        loader = start_loader(batches, start, workers, device)
        meter = Meter(start, batches, device, graphs)
        steps = range(start, iters + 1)
        bar = tqdm(steps, args.recipe, iters, initial=start, disable=rank > 0, unit="step")
        for step in bar:
            # A checkpoint precedes each evaluation, so a run that is stopped in one repeats it.
            if step == iters or is_due(step, args.eval_every):
                best = validate(step, model, companions, val_set, best, files, workers)
                meter.restart(step)
            if step == iters or out_of_patience(step, best, settings):
                break
            seed_step(step, rank, settings)
            micro_batches = [next(loader) for _ in range(args.accumulate)]
            losses = compute_gradients(model, network, micro_batches, settings)
            meter.add(step, losses, model)
            update(step, optimizer, companions, settings)

            done = step + 1
            saving = must_save(done, args, iters)
            logging = saving or is_due(done, max(1, min(20, iters // 100)))
            # Asking the other ranks takes time that only the long steps of a CPU can spare.
            stopping = (logging or device.type == "cpu") and asked_to_stop(signals)
            if logging or stopping:  # raises an error, before a checkpoint, for a loss of NaN
                report(done, meter, optimizer, files, bar)
            if saving or stopping:
                files.checkpoint(done, settings, model, saved, best)
            if stopping and done < iters:
                sender = signals[0] if signals else "a signal to another rank"
                say(f"{sender}: stopped after step {done} of {iters}; {files.resume_advice()}")
                return
    if rank == 0:
        print_result(best, files)
    if world_size > 1:  # torchrun restarts all ranks if one fails before it is here
        dist.barrier()


def check_room(batches, workers):
    """Raise UserError if a micro-batch of a rank would be empty, or if dataloader workers have too
    few open files or too little shared memory."""
    shares = batches.world_size * batches.micro_batches
    if batches.batch_size < shares:
        each = f"{batches.world_size} processes and {batches.micro_batches} micro-batches"
        raise UserError(f"--batch-size {batches.batch_size}: less than an image for each of {each}")
    pixels = max(h * w for h, w in batches.largest_hw)
    evaluate.check_limits(workers, math.ceil(batches.batch_size / shares) * 3 * pixels)


def start_loader(batches, start, workers, device):
    """Start the dataloader workers; return an iterator over the micro-batches from step `start` on,
    as `to_device` returns them."""
    items = range(start * batches.micro_batches, len(batches))
    pinned = device.type in ("cuda", "xpu")
    loader = evaluate.read_ahead(batches.__getitem__, items, workers, pin_memory=pinned)
    batches_read = evaluate.raise_errors(iter(loader))  # iter starts the workers
    return (to_device(batch, device) for batch in batches_read)


def is_due(step, every):
    """Return whether `step` is a multiple of `every`; not at step 0, and never if every is None."""
    return bool(every) and step > 0 and step % every == 0


def must_save(done, args, iters):
    """Return whether to write a checkpoint after `done` steps, as before every evaluation."""
    return done == iters or is_due(done, args.checkpoint_every) or is_due(done, args.eval_every)


def asked_to_stop(signals):
    """Return whether any rank has received a signal to stop. Every rank calls this."""
    stops = torch.tensor(len(signals))
    all_reduce(stops)
    return stops.item() > 0


def report(done, meter, optimizer, files, bar):
    """Log the losses after `done` steps and show them beside the progress bar."""
    row = meter.read(done) | {"lr": optimizer.param_groups[0]["lr"]}
    files.log(done, **row)
    bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in row.items()))


def print_result(best, files):
    """Print the best metrics, as JSON in the last line. Raises UserError if no model or checkpoint
    could be written."""
    path = files.out / "model.pt"
    if best is None or not files.has_model():
        raise UserError(f"{path}: cannot be written; {files.resume_advice()}")
    seconds = time.process_time()
    print(f"{path}: AP {best['AP']:.3f} after step {best['step']}; {seconds:.0f} s of CPU time")
    print(f"python evaluate.py {path} --images PHOTO.jpg --out drawn/")
    print(json.dumps(best))
    files.resume_advice()


# ---- what a run writes and resumes -------------------------------------------------------------


class RunFiles:
    """The files of a run: log.jsonl, last.pt, previous.pt, model.pt and metrics.json.

    Only rank 0 writes. If the disk is full, training continues, the older file stays, and a warning
    is printed. Checkpoints include the log; a resumed run rewrites log.jsonl from it, so that both
    agree after a crash. With --fresh, the files of the older run stay until the first checkpoint is
    written.
    """

    def __init__(self, out, start, best, lines, launch):
        self.out = out
        self.active = evaluate.rank_and_world_size()[0] == 0
        self.launch = launch
        self.saved_step = start or None  # of the last checkpoint
        self.wrote_model = best is not None  # whether model.pt is of this run
        self.lines = lines  # of log.jsonl
        older = any((out / name).exists() for name in ("last.pt", "previous.pt", "model.pt"))
        self.replaces = start == 0 and older
        if self.active and not self.replaces:
            self.write_log()

    def write_log(self):
        with fcos.atomic_write(self.out / "log.jsonl", "w") as file:
            file.writelines(self.lines)

    @contextlib.contextmanager
    def warn_if_full(self, consequence):
        """Print a warning if a file cannot be written."""
        try:
            yield
        except (OSError, UserError) as error:
            tqdm.write(f"{error}; {consequence}", file=sys.stderr)

    def log(self, step, **values):
        """Append losses or metrics to log.jsonl. Call another logger here."""
        if not self.active:
            return
        self.lines.append(json.dumps({"step": step, **values}) + "\n")
        if not self.replaces:
            with self.warn_if_full("the log lacks a line"):
                evaluate.make_folder(self.out)  # it may have been deleted
                with open(self.out / "log.jsonl", "a") as file:
                    file.write(self.lines[-1])

    def checkpoint(self, step, settings, model, saved, best):
        """Write a checkpoint that resumes after `step` steps.

        saved: {name: object with state_dict and load_state_dict}, such as the optimizer.
        """
        if not self.active:
            return
        states = {name: stateful.state_dict() for name, stateful in saved.items()}
        content = {
            "settings": settings,
            "step": step,
            "best": best,
            "log": "".join(self.lines),
            "launch": self.launch,
            "layout": tensor_shapes(states),
            "model": fcos.checkpoint(model),
        }
        assert content.keys() | {"optimizer"} == ENTRIES
        keep = None if self.replaces else self.out / "previous.pt"
        with self.warn_if_full("the older checkpoint stays"):
            with fcos.atomic_write(self.out / "last.pt", keep=keep) as file:
                torch.save(content | states, file)
            self.saved_step = step
            if self.replaces:
                self.replaces = False
                (self.out / "previous.pt").unlink(missing_ok=True)
                if not self.wrote_model:
                    (self.out / "model.pt").unlink(missing_ok=True)
                    (self.out / "metrics.json").unlink(missing_ok=True)
                self.write_log()

    def save_best(self, model, metrics):
        """Write model.pt and metrics.json; return whether that succeeded."""
        with self.warn_if_full("the older model stays"):
            fcos.save(model, self.out / "model.pt")
            with fcos.atomic_write(self.out / "metrics.json", "w") as file:
                json.dump(metrics, file)
            self.wrote_model = True
            return True
        return False

    def has_model(self):
        """Return whether the run has written a model.pt that still exists."""
        return self.wrote_model and (self.out / "model.pt").exists()

    def resume_advice(self):
        """Return how to resume, for the last message. Raises UserError without a checkpoint."""
        exists = any((self.out / name).exists() for name in ("last.pt", "previous.pt"))
        if self.active and not (self.saved_step and exists):
            raise UserError(f"{self.out}: no checkpoint could be written, so this run is lost")
        return f"the same command resumes after step {self.saved_step}"


# The entries of a checkpoint except companions, and the types of their values beside tensors
ENTRIES = {"settings", "step", "best", "log", "launch", "layout", "model", "optimizer"}
PLAIN_TYPES = (str, int, float, bool, bytes, type(None))


def check_companions(companions):
    """Raise UserError for a companion that could not be saved and resumed."""
    taken = companions.keys() & ENTRIES
    if taken:
        raise UserError(f"companion {min(taken)!r}: expected no name of {sorted(ENTRIES)}")
    for name, companion in companions.items():
        methods = ["update", "state_dict", "load_state_dict"]
        if name == "ema":
            methods.append("evaluated")
        if not all(hasattr(companion, method) for method in methods):
            raise UserError(f"companion {name!r}: expected methods {', '.join(methods)}")
        for value in torch.utils._pytree.tree_leaves(companion.state_dict()):
            if not isinstance(value, torch.Tensor) and type(value) not in PLAIN_TYPES:
                found = type(value).__name__
                raise UserError(f"companion {name!r}: its state holds a {found}; use tensors")


def open_run(out, args, settings, model, saved, inputs):
    """Resume the run in `out`, or start one. With --fresh, only a run of the same launch resumes.

    saved: see RunFiles.checkpoint. inputs: files that the run must not overwrite.
    Returns its RunFiles, the number of steps done, and the metrics of the best evaluation.
    """
    rank, world_size = evaluate.rank_and_world_size()
    if rank == 0:
        fcos.remove_leftovers(out)
    launch = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    # --fresh applies to the first start of a launch; restarts by torchrun or Slurm resume
    counts = [os.environ.get(f"{name}_RESTART_COUNT", "") for name in ("TORCHELASTIC", "SLURM")]
    restarted = any(count.isdecimal() and int(count) > 0 for count in counts)
    start = 0
    best = None
    lines = []
    if restarted or not args.fresh:
        start, best, lines = resume(out, settings, model, saved, launch if args.fresh else None)
    if world_size > 1:
        starts = [None] * world_size
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise UserError(f"{out}: expected one folder for all nodes, found steps {starts}")
    if start == 0:
        if (out / "model.pt").exists() and not args.fresh:
            fix = "choose another --out, or --fresh to replace it"
            raise UserError(f"{out}: holds a model.pt but no checkpoint; {fix}")
        for name in "last.pt", "previous.pt", "model.pt", "metrics.json", "log.jsonl":
            evaluate.check_target(out / name, inputs)
    return RunFiles(out, start, best, lines, launch), start, best


def resume(out, settings, model, saved, launch=None):
    """Load the model and the `saved` states from the last checkpoint of the run in `out`.

    launch: resume only a checkpoint of this launch. Returns the number of steps done, the metrics
    of the best evaluation, and the lines of the log; (0, None, []) without a checkpoint.
    Raises UserError if the checkpoint and the code disagree.
    """
    path, content, problems = find_checkpoint(out)
    if content is None:
        if problems and not launch:
            raise UserError(f"{'; '.join(problems)}; --fresh starts over")
        return 0, None, []
    try:
        if launch and content["launch"] != launch:
            return 0, None, []
        keywords = fcos.resolve(content["model"]["keywords"])
        stored = content["settings"] | {"model": settings["model"], "keywords": keywords}
        of_model = {name: getattr(model, name) for name in ("classes", "convention")}
        stored |= {name: content["model"][name] for name in of_model}
        changed = differences(stored, settings | of_model)
        if not changed:
            step, best = restore(path, content, settings, model, saved)
            lines = content["log"].splitlines(keepends=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = printable(f"{type(error).__name__} {error}", 200)
        raise UserError(f"{path}: cannot be resumed ({reason}); --fresh starts over") from None
    if changed:
        texts = "; ".join(changed)
        fix = f"use --fresh, or choose another --out (with --weights {path} to continue from it)"
        raise UserError(f"{out}: holds a run of other settings ({texts}); repeat them, {fix}")
    for problem in problems:
        say(f"{problem}; {path} takes its place")
        if evaluate.rank_and_world_size()[0] == 0:  # the next save must not make it previous.pt
            os.replace(out / "last.pt", out / "damaged.pt")
    say(f"{out}: resumes after step {step} of {settings['iters']}")
    return step, best, lines


def find_checkpoint(out):
    """Return the path and content of last.pt, or of previous.pt if last.pt is missing or damaged,
    and the problems of unusable files. Without a usable file, path and content are None."""
    problems = []
    for path in filter(Path.exists, (out / "last.pt", out / "previous.pt")):
        try:
            content = fcos.read_checkpoint(path)
            if isinstance(content, dict) and isinstance(content.get("settings"), dict):
                return path, content, problems
            problems.append(f"{path}: not a checkpoint of this trainer")
        except UserError as error:
            problems.append(str(error))
    return None, None, problems


def restore(path, content, settings, model, saved):
    """Load a checkpoint; return the number of steps done and the metrics of the best evaluation.

    Raises ValueError and others if an entry is missing or does not match.
    """
    step = content["step"]
    model_content = content["model"]
    best = content["best"]
    if type(step) is not int or step not in range(settings["iters"] + 1):
        raise ValueError(f"step {step!r}")
    if best is not None:
        best |= {"AP": float(best["AP"]), "step": int(best["step"])}
        if not -1 <= best["AP"] <= 1 or best["step"] > step:
            raise ValueError(f"best AP {best['AP']} of step {best['step']}")
    states = {name: content[name] for name in saved}
    differing = tensor_shapes(states).items() ^ content["layout"].items()
    if differing:  # shapes before values, because a tensor of the wrong shape may be huge
        raise ValueError(f"{min(place for place, _ in differing)} does not fit")
    for name, state in states.items():
        for value in torch.utils._pytree.tree_leaves(state):
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
    fcos.load_weights(model, fcos.Weights(path, model_content, model_content["model"], "fcos"))
    for name, stateful in saved.items():
        if "param_groups" in states[name]:  # keep the code's: `resume` has compared them
            states[name]["param_groups"] = stateful.state_dict()["param_groups"]
        stateful.load_state_dict(states[name])
    return step, best


def tensor_shapes(state):
    """Return {path in nested containers: shape of the tensor, () for other values}."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(state)
    place = torch.utils._pytree.keystr
    return {place(path): tuple(getattr(leaf, "shape", ())) for path, leaf in leaves}


# ---- signals and processes ---------------------------------------------------------------------


def say(text):
    """Print a line on rank 0."""
    if evaluate.rank_and_world_size()[0] == 0:
        print(text)


@contextlib.contextmanager
def stop_signals():
    """Yield a list that collects the names of received stop signals.

    Ignored signals stay ignored (SIGHUP under nohup). A second signal ends the process, unless it
    follows within a second, because Slurm and torchrun may both forward the same signal.
    """
    received = []
    handlers = {}
    last = 0.0

    def handle(number, _frame):
        nonlocal last
        if received and time.monotonic() > last + 1:
            signal.signal(number, handlers[number])
            signal.raise_signal(number)
        received.append(signal.Signals(number).name)
        last = time.monotonic()

    for number in evaluate.STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            handlers[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def make_fresh_store(rank, world_size, timeout):
    """Return a section of torchrun's store that no process has used before.

    torchrun keeps one store across restarts, so a rank may read the address of a process that died
    and wait for it forever (PyTorch issue 135712). Here rank 0 counts the starts and sends the
    number to every rank under a key that only this process knows. The number and an id of the
    launch also replace torchrun's environment variables, which differ between nodes.
    """
    env = os.environ
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), None, False, timeout)
    if rank == 0:
        number = str(store.add("starts", 1))
        if number == "1":
            store.set("launch", uuid.uuid4().hex)
        waiting = set(range(1, world_size))
        while waiting:
            for other in waiting:
                if store.check([f"name of {other}"]):
                    store.set(store.get(f"name of {other}").decode(), number)
            waiting = {other for other in waiting if not store.check([f"{number} reached {other}"])}
            time.sleep(0.01)
    else:
        name = uuid.uuid4().hex
        store.set(f"name of {rank}", name)
        number = store.get(name).decode()
        store.set(f"{number} reached {rank}", "")
    env["TORCHELASTIC_RESTART_COUNT"] = str(int(number) - 1)
    env["TORCHELASTIC_RUN_ID"] = store.get("launch").decode()
    return dist.PrefixStore(f"start {number}", store)


# ---- the shapes data set ------------------------------------------------------------------------


class Shape(NamedTuple):
    """A class of objects; its corners lie at equal angles around the center."""

    name: str
    distances: list[float]  # of the corners from the center
    hole: float = 0  # the size of the hole, relative to the shape


SHAPES = {  # by category id, with gaps as in COCO
    1: Shape("ellipse", [1] * 72),
    3: Shape("rectangle", [0.71, 1] * 4),
    4: Shape("triangle", [1] * 3),
    7: Shape("star", [1, 0.45] * 5),
    9: Shape("ring", [1] * 72, hole=0.55),
    10: Shape("cross", [0.37, 1, 1] * 4),
}


def parse_colors(text):
    """Return colors in hexadecimal RGB as a float32 array (N, 3) in 0..255."""
    return np.array([list(bytes.fromhex(color)) for color in text.split()], np.float32)


BACKGROUNDS = parse_colors("22303f 39463b 43374d 5a4a42 2f5061 1d3557 24404a 4a3038 333a56 3c4a3a")
COLORS = parse_colors("ff6b6b ff9f43 ffd166 6ee7a8 4dd0c4 7cb8ff b79cff ff8fc2 fff8e7 c7f06a")


def draw_background(rng, w, h):
    """Mix two colors by a gradient, stripes or checks, and clouds; return (h, w, 3) in 0..255."""
    first, second = rng.permutation(BACKGROUNDS)[:2]
    y, x = np.mgrid[:h, :w]
    turned = (x - w / 2 + 1j * (y - h / 2)) * np.exp(2j * np.pi * rng.uniform())
    waves = np.sin(2 * np.pi * np.stack([turned.real, turned.imag]) / rng.uniform(12, 48))
    clouds = Image.fromarray(rng.standard_normal((9, 9), np.float32)).resize((w, h), Image.BICUBIC)
    pattern = (0, waves[0], waves[0] * waves[1])[rng.integers(3)]  # none, stripes or checks
    mix = 0.5 + turned.real / w + 0.2 * np.asarray(clouds) + 0.3 * pattern
    return first + (second - first) * np.clip(mix, 0, 1)[..., None]


def draw_scene(rng):
    """Draw a picture; return it, uint8 (h, w, 3), and its objects as COCO annotations without ids.

    A box is tight around the part of the object inside the picture, even if another object covers
    it. Two objects overlap by at most 30 % of the smaller one.
    """
    w, h = rng.permutation([128, rng.choice([144, 152, 160])]).tolist()
    image = draw_background(rng, w, h)
    objects = []
    masks = []
    sizes = np.sort(10 * 5.5 ** rng.uniform(size=rng.integers(6, 11)))
    for size, color in zip(sizes[::-1], rng.permutation(COLORS)):  # small objects on top
        category = int(rng.choice(list(SHAPES)))
        center = complex(*rng.uniform(0, (w, h)))
        outline = draw_outline(rng, category)
        drawn = fill_shape(size * outline, center, SHAPES[category].hole, (w, h))
        x1, y1, x2, y2 = (edge / 4 for edge in drawn.getbbox())
        mask = np.asarray(drawn.reduce(4), np.float32) / 255
        whole_area = size**2 * np.ptp(outline.real) * np.ptp(outline.imag)
        mostly_outside = (x2 - x1) * (y2 - y1) < 0.7 * whole_area
        overlaps = [(mask * m).sum() > 0.3 * min(mask.sum(), m.sum()) for m in masks]
        if mostly_outside or any(overlaps):
            continue
        shadow = drawn.transform((w, h), Image.AFFINE, (4, 0, -4, 0, 4, -8))  # right 1, down 2
        image *= 1 - np.asarray(shadow.filter(ImageFilter.GaussianBlur(2)))[..., None] / 640
        image += (color - image) * mask[..., None]
        masks.append(mask)
        bbox = [x1, y1, x2 - x1, y2 - y1]
        area = round(float(mask.sum()), 2)
        objects.append(dict(category_id=category, bbox=bbox, area=area, iscrowd=0))
    image += rng.uniform(1, 4) * rng.standard_normal((h, w, 1), np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), objects


def draw_outline(rng, category):
    """Return the corners of a shape of size 1 around 0, squeezed and turned at random.

    A corner (x, y) is the complex number x + iy.
    """
    distances = SHAPES[category].distances
    angles = np.arange(len(distances)) / len(distances) - 0.25  # in turns
    corners = np.exp(2j * np.pi * angles) * distances
    squeezed = corners.real + 1j * corners.imag * rng.uniform(0.75, 1)
    return squeezed * np.exp(1j * rng.uniform(-0.25, 0.25))


def fill_shape(outline, center, hole, wh):
    """Draw a shape in white on black, four times as large. hole: its size relative to the shape."""
    drawn = Image.new("L", (4 * wh[0], 4 * wh[1]))
    for scale, gray in ((1, 255), (hole, 0)):  # a hole of size 0 draws nothing visible
        corners = 4 * (outline * scale + center)
        ImageDraw.Draw(drawn).polygon(corners.view(float).tolist(), gray)
    return drawn


def make_shapes(root, seed=0, train=1400, val=200):
    """Draw the shapes data set in the layout of COCO 2017; the folder appears when it is complete.

    Picture i of a split depends on (seed, split, i) only. Raises OSError if the folder has files.
    """
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        part = Path(temporary, root.name)
        (part / "annotations").mkdir(parents=True)
        for split, (name, count) in enumerate([("train2017", train), ("val2017", val)]):
            (part / name).mkdir()
            content = draw_split(part / name, seed, split, count)
            (part / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        os.replace(part, root)


def draw_split(folder, seed, split, count):
    """Draw the pictures of a split into a folder; return its COCO instances."""
    images = []
    annotations = []
    for i in range(count):
        picture, objects = draw_scene(np.random.Generator(np.random.PCG64([seed, split, i])))
        image_id = 1_000_000 * split + i + 1
        name = f"{image_id:012d}.jpg"
        h, w, _ = picture.shape
        Image.fromarray(picture).save(folder / name, quality=90)
        images.append(dict(id=image_id, file_name=name, width=w, height=h))
        for drawn in objects:
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id) | drawn)
    categories = [dict(id=id, name=shape.name) for id, shape in SHAPES.items()]
    return dict(images=images, annotations=annotations, categories=categories)


if __name__ == "__main__":
    evaluate.run(main, parse_args())
