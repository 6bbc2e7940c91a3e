"""Train FCOS: the published recipes, on COCO, on your own boxes, or on a generated data set.

    python train.py shapes                                              # minutes on two CPU cores
    python train.py fcos_imprv_R_50_FPN_1x --accumulate 4               # one GPU, data/coco
    torchrun --nproc_per_node=8 train.py fcos_imprv_R_50_FPN_1x         # eight: the same training
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py

What a step trains on depends on (seed, step) alone, and its loss on all of its images alone, so the
number of GPUs, of parts (--accumulate) and of loader workers changes nothing but speed. The same
command again goes on where the last checkpoint in --out was written.
"""

import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

import evaluate
import fcos
from fcos import UserError

# ---- recipes -----------------------------------------------------------------------------------

# Shared by all rows: SGD with momentum 0.9 and weight decay 1e-4, a third of the rate for the first
# `warmup` steps, a tenth after 2/3 of the steps and a hundredth after 8/9. batch_size is images per
# step over all GPUs and parts; min_size the choices for the short side in pixels, one is drawn for
# each image; weights are looked for in ~/.torch/models, or are torchvision's, of ImageNet.
X1 = dict(iters=90_000, batch_size=16, lr=0.01, warmup=500, min_size=[800], max_size=1333)
MS, B32, B64 = dict(min_size=list(range(640, 801))), dict(batch_size=32), dict(batch_size=64)
X2 = X1 | MS | dict(iters=180_000)
R_50, R_101 = dict(weights="R-50.pkl"), dict(weights="R-101.pkl")
X_101_32x8d, X_101_64x4d = dict(weights="X-101-32x8d.pkl"), dict(weights="X-101-64x4d.pkl")
MNV2, IMAGENET = dict(weights="mobilenet_v2-ecbe2b5.pth"), dict(weights="imagenet")
RECIPES = {
    "fcos_R_50_FPN_1x":                     R_50        | X1,
    "fcos_R_101_FPN_2x":                    R_101       | X2,
    "fcos_X_101_32x8d_FPN_2x":              X_101_32x8d | X2,
    "fcos_X_101_64x4d_FPN_2x":              X_101_64x4d | X2,
    "fcos_imprv_R_50_FPN_1x":               R_50        | X1,
    "fcos_imprv_R_101_FPN_1x":              R_101       | X1,
    "fcos_imprv_R_101_FPN_2x":              R_101       | X2,
    "fcos_imprv_X_101_32x8d_FPN_2x":        X_101_32x8d | X2,
    "fcos_imprv_X_101_64x4d_FPN_2x":        X_101_64x4d | X2,
    "fcos_imprv_dcnv2_R_50_FPN_1x":         R_50        | X1,
    "fcos_imprv_dcnv2_R_101_FPN_1x":        R_101       | X1,
    "fcos_imprv_dcnv2_R_101_FPN_2x":        R_101       | X2,
    "fcos_imprv_dcnv2_X_101_32x8d_FPN_2x":  X_101_32x8d | X2,
    "fcos_imprv_dcnv2_X_101_64x4d_FPN_2x":  X_101_64x4d | X2,
    "fcos_bn_bs16_MNV2_FPN_1x":             MNV2        | X1,
    "fcos_syncbn_bs32_MNV2_FPN_1x":         MNV2        | X1 | B32,
    "fcos_syncbn_bs32_c128_MNV2_FPN_1x":    MNV2        | X1 | B32,
    "fcos_syncbn_bs32_c128_ms_MNV2_FPN_1x": MNV2        | X1 | B32 | MS,
    "fcos_syncbn_bs64_c128_ms_MNV2_FPN_1x": MNV2        | X1 | B64 | MS,
    # not official
    "fcos_torchvision_R_50_FPN_1x":         IMAGENET    | X1,
    "fcos_imprv_R_18_FPN_1x":               IMAGENET    | X1,
    "fcos_imprv_R_34_FPN_1x":               IMAGENET    | X1,
    "shapes": dict(weights="none", iters=1000, batch_size=16, lr=0.02, warmup=50, min_size=[160],
                   max_size=224),
}
for name, recipe in RECIPES.items():  # named as the row of fcos.MODELS, and how it is trained
    recipe["model"] = re.sub(r"_(bs\d+|ms|[12]x)(?=_|$)", "", name)

# The backbones of which torchvision has ImageNet weights that fit, by a part of the model's name.
VISION = {"torchvision_R_50": "resnet50", "R_18": "resnet18", "R_34": "resnet34",
          "X_101_32x8d": "resnext101_32x8d", "X_101_64x4d": "resnext101_64x4d",
          "MNV2": "mobilenet_v2"}

# ---- the shapes data set ------------------------------------------------------------------------

SHAPES = {  # category id (with gaps, as in COCO): name, distances of the corners at equal angles
    1: ("ellipse", [1] * 72), 3: ("rectangle", [1] * 4), 4: ("triangle", [1] * 3),
    7: ("star", [1, 0.48] * 5), 9: ("ring", [1] * 72), 10: ("cross", [1, 1, 0.366] * 4)}
SIZES = (224, 160), (208, 156), (200, 150), (192, 168), (160, 224), (156, 208), (168, 192)
INKS, PAPERS = (np.array([list(bytes.fromhex(c)) for c in row.split()], np.float32) for row in (
    "e63946 f3722c ffca3a 52b788 1b998b 3a86ff 8338ec ff70a6 1d3557 fff8e7 7f4f24 8ecae6",
    "e9dcc3 bcd7e6 b7c9a8 d9dde0 f2e3e3 c9bfd9 22303f 39463b 43374d 5a4a42 2f5061 4f5d75"))


def _background(rng, w, h):
    """Two related papers mixed by a gradient, clouds and stripes or checks, (h,w,3) in 0..255,
    and the inks that stand out on both, at least ten in random order, (N,3)."""
    a = PAPERS[rng.integers(len(PAPERS))]
    b = PAPERS[np.abs(PAPERS - a).sum(1).argsort(kind="stable")[rng.integers(1, 6)]]
    ramp = a + (b - a) * np.linspace(0, 1, 5, dtype=np.float32)[:, None]
    inks = INKS[np.linalg.norm(INKS[:, None] - ramp, axis=2).min(1) > 80]
    y, x = np.mgrid[:h, :w].astype(np.float32)
    turn, wave = rng.uniform(0, 2 * np.pi), 2 * np.pi / rng.uniform(12, 48)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    pattern = (0, np.sin(u * wave), np.sin(u * wave) * np.sin(v * wave))[rng.integers(3)]
    mix = (u - u.min()) / np.ptp(u) + rng.uniform(0.15, 0.45) * pattern
    for cell in (48, 20, 8):
        noise = Image.fromarray(rng.standard_normal((h // cell + 2, w // cell + 2), np.float32))
        mix += cell / 200 * np.asarray(noise.resize((w, h), Image.BICUBIC))
    return a + (b - a) * np.clip(mix, 0, 1)[..., None], rng.permutation(inks)


def _scene(rng):
    """One picture, uint8 (h,w,3), and its objects as COCO annotations without ids. A box is tight
    around the object's part inside the picture, covered or not; at most 40 % of it is covered."""
    w, h = SIZES[rng.integers(len(SIZES))]
    image, inks = _background(rng, w, h)
    light = rng.uniform(0, 2 * np.pi)
    objects, sizes, top = [], [], np.zeros((h, w), np.uint8)    # top: number of the object seen
    for ink in inks[:rng.integers(2, 9)]:                       # no two objects of one colour
        category, centre = int(rng.choice(list(SHAPES))), rng.uniform(0, (w, h))
        name, radii = SHAPES[category]
        radius = 7 * 8 ** rng.uniform() ** 0.8
        z = np.exp(2j * np.pi * (np.arange(len(radii)) - 0.5) / len(radii)) * radii * radius
        z = (z.real + 1j * z.imag * rng.uniform(0.65, 1)) * np.exp(2j * np.pi * rng.uniform())
        corners = np.stack([z.real, z.imag], 1)
        low, high = centre + corners.min(0), centre + corners.max(0)
        x0, y0 = np.maximum(low - 4, 0).astype(int).tolist()    # a window with room for the shadow
        x1, y1 = np.minimum(high + 8, (w, h)).astype(int).tolist()
        mask = Image.new("L", (8 * (x1 - x0), 8 * (y1 - y0)))   # drawn 8 times as large
        for fill, scale in ((255, 1), (0, 0.55))[:2 if name == "ring" else 1]:
            points = 8 * (centre - (x0, y0) + corners * scale)
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=fill)
        x, y, right, lower = (edge / 8 for edge in mask.getbbox())
        if min(right - x, lower - y) < 8 or (right - x) * (lower - y) < 0.6 * np.prod(high - low):
            continue                                            # too little inside the picture
        mask = mask.reduce(8)
        shadow = mask.transform(mask.size, Image.AFFINE, (1, 0, -1, 0, 1, -2))  # right 1, down 2
        shadow = shadow.filter(ImageFilter.GaussianBlur(2))
        mask, shadow = (np.asarray(m, np.float32)[..., None] / 255 for m in (mask, shadow))
        seen = top.copy()
        seen[y0:y1, x0:x1][mask[..., 0] > 0.5] = len(objects) + 1
        pixels = np.bincount(seen.ravel(), minlength=len(objects) + 2)[1:]
        if (pixels[:-1] < 0.6 * np.array(sizes)).any():
            continue                                            # would hide an earlier object
        top, sizes = seen, [*sizes, pixels[-1]]
        dy, dx = np.mgrid[y0:y1, x0:x1] - centre[::-1, None, None]
        shade = 1 + 0.15 * (dx * np.cos(light) + dy * np.sin(light)) / radius
        patch = image[y0:y1, x0:x1]
        patch *= 1 - 0.4 * shadow
        patch += mask * (ink * shade[..., None] - patch)
        objects.append(dict(category_id=category, area=round(float(mask.sum()), 2), iscrowd=0,
                            bbox=[x0 + x, y0 + y, right - x, lower - y]))
    image += rng.uniform(1, 4) * rng.standard_normal((h, w, 1), np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), objects


def make_shapes(root, seed=0, train=1400, val=200):
    """Draw the shapes data set in COCO 2017 layout. Picture i of a split is a function of (seed,
    split, i). The folder appears when complete; OSError if it is already there and not empty."""
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    categories = [dict(id=k, name=name, supercategory="shape") for k, (name, _) in SHAPES.items()]
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        part = Path(temporary) / root.name
        (part / "annotations").mkdir(parents=True)
        for split, (folder, count) in enumerate({"train2017": train, "val2017": val}.items()):
            (part / folder).mkdir()
            images, annotations = [], []
            for i in range(count):
                picture, objects = _scene(np.random.Generator(np.random.PCG64([seed, split, i])))
                number, (h, w, _) = 1_000_000 * split + i + 1, picture.shape
                images.append(dict(id=number, file_name=f"{number:012d}.jpg", width=w, height=h))
                annotations += [dict(id=len(annotations) + n, image_id=number, **o)
                                for n, o in enumerate(objects, 1)]
                Image.fromarray(picture).save(part / folder / images[-1]["file_name"], quality=90)
            (part / f"annotations/instances_{folder}.json").write_text(json.dumps(dict(
                info=dict(description=f"shapes, seed {seed}"), licenses=[], images=images,
                annotations=annotations, categories=categories)))
        os.replace(part, root)

# ---- batches -----------------------------------------------------------------------------------


class TrainBatches(Dataset):
    """The parts of all steps: item `step * parts + part` is what this rank trains on in that part.

    All images of a step are of one aspect group (height < width, or not), which keeps the padding
    small. A step draws its group in proportion to the groups' images; a group is an endless stream
    of seeded permutations, so no batch is ever short, even of a data set smaller than a batch. The
    step's images are dealt out to parts and ranks like cards. All of them are padded to one size,
    which every rank works out for itself: padding is background to the loss and enters the
    GroupNorms, so it must not depend on how a step is divided.
    """

    def __init__(self, dataset, settings, rank=0, world=1, parts=1, skip_bad_images=False):
        self.dataset, self.rank, self.world, self.parts = dataset, rank, world, parts
        self.skip_bad_images = skip_bad_images
        self.in_hand = torch.full((256,), -1)  # the row that each loader worker reads
        self.seed, self.batch_size = settings["seed"], settings["batch_size"]
        self.min_size, self.max_size = settings["min_size"], settings["max_size"]
        usable = np.flatnonzero(dataset.trainable)
        upright = dataset.hw[usable, 0] >= dataset.hw[usable, 1]
        self.groups = usable[~upright], usable[upright]
        draws = self.rng("group").random(settings["iters"])
        self.group = (draws >= len(self.groups[0]) / len(usable)).astype(np.int64)
        counts = np.stack([self.group == 0, self.group == 1]).cumsum(1) - 1
        self.turn = counts[self.group, np.arange(len(self.group))]  # earlier steps of this group

    def rng(self, purpose, *position):
        """An independent random stream for each purpose and position of this seed."""
        key = ("group", "order", "augment").index(purpose)
        return np.random.Generator(np.random.PCG64([self.seed, key, *position]))

    @functools.lru_cache(maxsize=4)  # noqa: B019  (one object a process, as long as the process)
    def order(self, group, epoch):
        return self.rng("order", group, epoch).permutation(self.groups[group])

    def plan(self, step):
        """-> rows of the data set (B,), their resized (height, width), whether to flip each, and
        the padded (height, width) of the whole step."""
        group = self.group[step]
        positions = self.turn[step] * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(positions, len(self.groups[group]))
        rows = [self.order(group, epoch)[place] for epoch, place in zip(epochs, places)]
        rng = self.rng("augment", step)
        min_sizes = rng.choice(self.min_size, self.batch_size)
        flips = rng.random(self.batch_size) < 0.5
        sizes = [
            fcos.resized_hw(*self.dataset.hw[row].tolist(), min_size, self.max_size)
            for row, min_size in zip(rows, min_sizes.tolist())
        ]
        return rows, sizes, flips, fcos.padded_hw(sizes)

    def __len__(self):
        return len(self.group) * self.parts

    def __getitem__(self, item):
        """-> images uint8 (b, 3, H, W), sizes (b, 2), boxes (sum of G, 4) xyxy pixels, labels (sum
        of G,), the list of the b numbers of boxes G, and a list of errors of images replaced. Or a
        UserError, returned because raising it would wrap it in a worker's traceback."""
        step, part = divmod(item, self.parts)
        rows, sizes, flips, padded = self.plan(step)
        worker = get_worker_info().id % 256 if get_worker_info() else 0
        images, boxes, labels, bad = [], [], [], []
        for slot in range(part * self.world + self.rank, len(rows), self.world * self.parts):
            row, (h, w) = rows[slot], sizes[slot]
            self.in_hand[worker] = row
            try:
                image, box, label = self.dataset.sample(row, (h, w))
            except UserError as error:
                if not self.skip_bad_images:
                    return error
                bad.append(str(error))
                image = torch.full((3, h, w), 128, dtype=torch.uint8)
                box, label = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
            if flips[slot]:
                image = image.flip(2)
                box = torch.stack([w - box[:, 2], box[:, 1], w - box[:, 0], box[:, 3]], 1)
            images.append(image)
            boxes.append(box)
            labels.append(label)
        self.in_hand[worker] = -1
        counts = [len(label) for label in labels]
        return *fcos.pad_batch(images, padded), torch.cat(boxes), torch.cat(labels), counts, bad


# ---- optimisation ------------------------------------------------------------------------------


def parameter_groups(model):
    """Weights decay; biases, those of the norms included, do not and learn twice as fast."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "bias" not in name], "rate": 1, "weight_decay": 1e-4},
        {"params": [p for name, p in named if "bias" in name], "rate": 2, "weight_decay": 0.0},
    ]


def lr_at(step, lr, iters, warmup):
    """The learning rate of a step counted from 0: constant warm-up, then two decays."""
    decays = (step >= iters * 2 // 3) + (step >= iters * 8 // 9)
    return lr * (1 / 3 if step < warmup else 1) * 0.1**decays


# ---- command line ------------------------------------------------------------------------------


def parse_args(argv=None):
    parser, positive = evaluate.ArgumentParser(__doc__), evaluate.positive
    add, not_negative = parser.add_argument, evaluate.not_negative
    add("recipe", nargs="?", default="fcos_imprv_R_50_FPN_1x", help="of RECIPES (%(default)s)")
    # data
    add("--data", help="folder in COCO's layout (data/coco, or data/shapes for shapes)")
    add("--train-images", metavar="DIR", help="own data, instead of --data: all four")
    add("--train-annotations", metavar="JSON")
    add("--val-images", metavar="DIR")
    add("--val-annotations", metavar="JSON")
    add("--workers", type=not_negative, help="loaders for each rank (4 on a GPU, 1 elsewhere)")
    # what is trained, instead of the recipe's
    add("--weights", metavar="PATH|imagenet|none",
        help="start from a detector, an ImageNet classifier, torchvision's own, or nothing")
    add("--batch-size", type=positive, help="images a step, over all GPUs and parts")
    add("--iters", type=positive, help="steps; the schedule keeps its proportions")
    add("--lr", type=float, help="by default in proportion to --batch-size")
    add("--min-size", type=positive, nargs="+", help="choices for the short side, in pixels")
    add("--max-size", type=positive, help="most pixels of the long side")
    add("--clip-norm", type=float, help="clip the norm of the gradient (not clipped)")
    add("--seed", type=not_negative, default=0)
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    # how it runs
    add("--out", help="folder of the run (runs/RECIPE)")
    add("--accumulate", type=positive, default=1, help="parts that a step is computed in")
    add("--eval-every", type=positive, help="steps between evaluations (only at the end)")
    add("--checkpoint-every", type=positive, default=2500, help="steps (%(default)s)")
    add("--skip-bad-images", action="store_true", help="replace unreadable training images")
    add("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--fresh", action="store_true", help="start over, whatever --out holds")
    return parser.parse_args(argv)


def resolve(args):
    """The settings that decide the result of a run: the recipe's, or the flags' where given."""
    if args.recipe not in RECIPES:
        raise UserError(f"recipe {args.recipe!r}: expected one of {', '.join(RECIPES)}")
    settings = {"recipe": args.recipe} | RECIPES[args.recipe]
    for name in ("weights", "iters", "lr", "min_size", "max_size", "batch_size"):
        given = getattr(args, name)
        if given is not None:
            settings[name] = given
    if args.lr is None:
        settings["lr"] *= settings["batch_size"] / RECIPES[args.recipe]["batch_size"]
    if settings["iters"] > 10**8:
        raise UserError(f"--iters {settings['iters']}: expected at most 100 million")
    settings["warmup"] = min(settings["warmup"], settings["iters"] // 10)  # of a short run
    if not 0 < settings["lr"] < math.inf:
        raise UserError(f"--lr {settings['lr']}: must be a number over 0")
    if args.clip_norm is not None and not 0 < args.clip_norm < math.inf:
        raise UserError(f"--clip-norm {args.clip_norm}: must be a number over 0")
    own = [args.train_images, args.train_annotations, args.val_images, args.val_annotations]
    if args.data and any(own):
        raise UserError("--data and own images and annotations exclude each other")
    if any(own) and not all(own):
        raise UserError(
            "own data needs all of --train-images, --train-annotations, --val-images and "
            "--val-annotations"
        )
    if not any(own):
        data = args.data or ("data/shapes" if args.recipe == "shapes" else "data/coco")
        train, val = (evaluate.coco_paths(data, f"{split}2017") for split in ("train", "val"))
        own = [train[1], train[0], val[1], val[0]]
    names = ("train_images", "train_annotations", "val_images", "val_annotations")
    settings |= {name: str(path) for name, path in zip(names, own)}
    settings |= {name: getattr(args, name) for name in ("clip_norm", "seed", "precision")}
    return settings


def find_weights(name, model):
    """The path that a recipe's or the user's --weights means for a row of fcos.MODELS; None for
    "none". "imagenet" downloads what is not yet there."""
    if name == "none":
        return None
    if name == "imagenet":
        backbone = next((VISION[part] for part in VISION if part in model), None)
        if backbone is None:
            raise UserError(
                f"--weights imagenet: torchvision has none for {model}; its ResNets have the "
                "stride in the 3x3 convolution of a block, the Caffe-style rows in the 1x1"
            )
        url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.split("/")[-1]
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = path.stem.split("-")[-1]  # the start of the sha256
                torch.hub.download_url_to_file(url, str(path), digest)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"--weights imagenet: download {url} and put it into {path.parent}, since "
                    f"this process cannot ({error}); --weights none starts at random"
                ) from None
        return path
    path = Path(name)
    if path.exists():
        return path
    cached = Path.home() / ".torch" / "models" / name
    if os.sep not in name and cached.exists():
        return cached
    raise UserError(
        f"{name}: no such weights, neither here nor in {cached.parent}; the README says where the "
        "recipes' ImageNet weights are to be had; --weights none starts at random"
    )


def make_model(settings, dataset, say):
    """The recipe's model for the classes of a data set, with its initial weights."""
    path, overrides, classes = find_weights(settings["weights"], settings["model"]), {}, None
    if path:  # one of our own checkpoints says which norms it has, and of which classes it is
        content = fcos.open_weights(path)[1]
        overrides, classes = content.get("overrides", {}), content.get("classes")
    elif fcos.MODELS[settings["model"]].get("norm", "frozen") == "frozen":
        overrides = {"norm": "gn", "frozen_stages": 0}
        say("no pretrained weights: GroupNorm and no frozen layers in the backbone, because random "
            "filters that stay frozen learn nothing")
    torch.manual_seed(settings["seed"])
    model = fcos.build(settings["model"], len(dataset.classes), **overrides)
    if path:
        classifier = copy.deepcopy(model.head.cls.state_dict())
        report = fcos.load_weights(model, path, finetune=True)
        random = {".".join(name.split(".")[:2]) for name in report["missing"]}
        random -= {name for name in random if name.startswith("backbone.")}
        if classes and classes != dataset.classes:
            model.head.cls.load_state_dict(classifier)
            random.add("head.cls")
        say(f"{path}: {len(report['loaded'])} tensors of the {report['family']} family; random: "
            f"{', '.join(sorted(random)) or 'nothing'}")
        say(", ".join(f"{name} {value}" for name, value in report["convention"].items()))
    model.set_convention(inclusive=False, score="fcos")  # the data set's boxes are continuous
    model.classes, model.category_ids = dataset.classes, dataset.category_ids
    model.test_size = (max(settings["min_size"]), settings["max_size"])
    return model


# ---- what a run leaves -------------------------------------------------------------------------


class RunFiles:
    """log.jsonl, last.pt and previous.pt of a run, which rank 0 writes. A full disk costs the write
    and not the run: it is told on stderr, and what was there before stays."""

    def __init__(self, out, start, iters, launch):
        self.out, rows = evaluate.make_folder(out), []
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = ""  # there need not be one, nor git
        with contextlib.suppress(OSError):
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        versions = {"torch": str(torch.__version__), "numpy": np.__version__}
        self.made_with = {"commit": commit, "launch": launch} | versions
        if start and (out / "log.jsonl").exists():  # without the rows that will be written again
            for line in (out / "log.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a row that is torn
                    row = json.loads(line)
                    if row["step"] <= start and not ("AP" in row and row["step"] == iters):
                        rows.append(line + "\n")
        with fcos.open_whole(out / "log.jsonl", "w") as file:
            file.writelines(rows)
        if start == 0:  # a run that --fresh replaces
            for name in ("previous.pt", "last.pt", "model.pt", "metrics.json"):
                (out / name).unlink(missing_ok=True)

    def log(self, step, **values):
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            tqdm.write(f"{self.out / 'log.jsonl'}: {error.strerror}", file=sys.stderr)

    def checkpoint(self, step, settings, model, optimizer):
        content = {
            "settings": settings, "step": step, "made_with": self.made_with,
            "model": fcos.checkpoint(model), "optimizer": optimizer.state_dict(),
        }
        try:
            with fcos.open_whole(self.out / "last.pt", keep=self.out / "previous.pt") as file:
                torch.save(content, file)
        except UserError as error:
            tqdm.write(f"{error}; the older checkpoint stays", file=sys.stderr)


def resume(out, settings, model, optimizer, say, launch=None):
    """Fill model and optimizer from last.pt, or from previous.pt where last.pt is damaged.
    -> the steps done, 0 if there is no checkpoint, or, with `launch`, none of this launch.
    UserError for a run of other settings."""
    problems = []
    for path in filter(Path.exists, (out / "last.pt", out / "previous.pt")):
        try:
            content = fcos.read_checkpoint(path)
            if isinstance(content, dict) and isinstance(content.get("settings"), dict):
                break
            problems.append(f"{path}: not a checkpoint of this trainer")
        except UserError as error:
            problems.append(str(error))
    else:
        if problems and not launch:
            raise UserError(f"{'; '.join(problems)}; --fresh starts over")
        return 0
    if launch and (content.get("made_with") or {}).get("launch") != launch:
        return 0
    old = content["settings"]
    changed = [
        f"{key} {old.get(key)} there, {settings[key]} here"
        for key in settings if settings[key] != old.get(key)
    ]
    classes = content["model"].get("classes") if isinstance(content.get("model"), dict) else None
    if not changed and classes != model.classes:
        changed = [f"classes {classes} there, {model.classes} here"]
    if changed:
        raise UserError(
            f"{out}: holds a run of other settings ({'; '.join(changed)}); repeat them, choose "
            "another --out, or start over with --fresh"
        )
    try:
        model.load_state_dict(content["model"]["model"])
        optimizer.load_state_dict(content["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be resumed ({what}); --fresh starts over") from None
    for problem in problems:
        say(f"{problem}; {path} takes its place")
        (out / "last.pt").unlink(missing_ok=True)  # or it would become the next previous.pt
    say(f"{out}: going on after step {content['step']} of {settings['iters']}")
    return content["step"]


# ---- what a run must survive -------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals():
    """SIGTERM and SIGINT no longer end the process but fill the list that this yields. A second one
    does end it, unless it comes at once: Slurm and torchrun both pass the same one on."""
    received, before, last = [], {}, 0.0

    def handle(number, _frame):
        nonlocal last
        if received and time.monotonic() > last + 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        received.append(signal.Signals(number).name)
        last = time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_limits(need, say):
    """Batches come from the workers through /dev/shm, as open files. Where there is little room for
    either the run would end in a bus error, or "too many open files"."""
    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if room < need:
        say(f"/dev/shm has room for {room >> 20} MB, and the loader may need {need >> 20} MB: "
            "enlarge it (docker run --ipc=host) or choose fewer --workers")
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if 0 <= files < 1024:
            say(f"only {files} files may be open, which can be too few: ulimit -n 4096")


# ---- training ----------------------------------------------------------------------------------


def load_data(settings, rank, world, say):
    """-> the training and the validation set, after saying what is odd about them."""
    if settings["train_images"] == "data/shapes/train2017":
        if rank == 0 and not Path("data/shapes").exists():
            say("drawing data/shapes")
            make_shapes("data/shapes")
        if world > 1:
            dist.barrier()
    datasets = []
    for split in ("train", "val"):
        path = settings[f"{split}_annotations"]
        if not Path(path).exists():
            raise UserError(
                f"{path}: no such file; {evaluate.what_is_there(path)}; the README says how to "
                "prepare COCO 2017 (cocodataset.org), and python train.py shapes needs no data"
            )
        datasets.append(evaluate.CocoDataset(path, settings[f"{split}_images"]))
        for note in datasets[-1].notes:
            say(f"{path}: {note}")
    trainable = datasets[0].trainable
    if not trainable.any():
        raise UserError(f"{settings['train_annotations']}: has no image with a box to learn")
    if not trainable.all():
        say(f"{settings['train_annotations']}: {(~trainable).sum()} of {len(trainable)} images "
            "have no boxes to learn and are left out")
    return datasets


def main(args):
    # ---- everything that can be wrong, before anything is written
    settings = resolve(args)
    rank, world, device = evaluate.start_process(args.device)
    say = print if rank == 0 else lambda text: None
    recipe, out = RECIPES[args.recipe], Path(args.out or f"runs/{args.recipe}")
    iters, batch_size, parts = settings["iters"], settings["batch_size"], args.accumulate
    if batch_size < world * parts:
        raise UserError(
            f"--batch-size {batch_size}: less than an image for each of {world} processes and "
            f"{parts} parts"
        )
    for name, value in settings.items():
        if isinstance(value, list) and len(value) > 8:
            value = f"{value[0]} to {value[-1]}"
        say(f"{name:18s} {value}")
    if settings["lr"] != recipe["lr"] and args.lr is None:
        say(f"the learning rate {recipe['lr']} for {recipe['batch_size']} images a step becomes "
            f"{settings['lr']:g} for {batch_size}")
    train_set, val_set = load_data(settings, rank, world, say)
    model = make_model(settings, train_set, say).to(device)
    if fcos.MODELS[model.name].get("norm") == "syncbn" and world > 1:
        if device.type == "cuda":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            say("SyncBN needs GPUs: every process normalises by its own images alone")
    evaluate.check_classes(model, val_set)
    optimizer = torch.optim.SGD(parameter_groups(model), lr=settings["lr"], momentum=0.9)
    # --fresh is for the first start of a launch: torchrun's restarts and Slurm's go on from it
    launch = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("SLURM_RESTART_COUNT")
    if args.fresh and not any(int(count or 0) for count in restarts):
        start = 0
    else:
        start = resume(out, settings, model, optimizer, say, launch if args.fresh else None)
    if start == 0 and (out / "model.pt").exists():
        if not args.fresh:
            raise UserError(
                f"{out}: holds a model.pt and no checkpoint; --fresh replaces it, or choose "
                "another --out"
            )
        if Path(settings["weights"]).resolve().parent == out.resolve():
            raise UserError(f"--fresh would delete {settings['weights']}; choose another --out")
    if world > 1:
        starts = [None] * world
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise UserError(f"{out}: must be one folder for all nodes; they found steps {starts}")

    # ---- from here on the run is under way
    files = RunFiles(out, start, iters, launch) if rank == 0 else None
    workers = args.workers
    if workers is None:
        workers = 4 if device.type == "cuda" else 1
    image_bytes = 3 * max(settings["min_size"]) * settings["max_size"]
    check_limits(2 * workers * batch_size // parts * image_bytes, say)  # two parts a worker
    batches = TrainBatches(train_set, settings, rank, world, parts, args.skip_bad_images)
    if workers:
        batches.in_hand.share_memory_()
    loader = iter(DataLoader(
        batches, batch_size=None, sampler=range(start * parts, iters * parts), num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=evaluate.start_worker,
        timeout=600 if workers else 0,
    ))
    network = model
    if world > 1:  # no buffer is of use in training, so none is broadcast
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # since torch 2.15
        network = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        # After its first backward pass DDP sums the gradients in another order. With a pass that
        # counts for nothing, a resumed run is in the same order as one that never stopped.
        outputs = network.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device))
        sum(outputs[name].sum() for name in ("cls", "ltrb", "ctr")).backward()
        optimizer.zero_grad()
    if args.compile:
        model.compile()
    network.train()

    def in_hand():
        return [train_set.path(row) for row in batches.in_hand.tolist() if row >= 0]

    def validate(step):
        if world > 1:  # the running statistics of batch norms differ; rank 0's are written
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        if rank == 0:
            try:
                fcos.save(model, out / "model.pt")
            except UserError as error:
                if step == iters:
                    raise
                tqdm.write(f"{error}; the older model stays", file=sys.stderr)
        results = evaluate.predict(model, val_set, 8 if device.type == "cuda" else 1, workers)
        if rank == 0:
            metrics = evaluate.score(results, val_set.annotations)
            files.log(step, **metrics)
            return metrics

    log_every = max(1, min(20, iters // 100))
    diverged = torch.tensor(iters, device=device)  # the first step whose loss was not finite
    clock, clock_step, replaced = time.perf_counter(), start, torch.zeros(1, device=device)
    bar = tqdm(range(start, iters), args.recipe, iters, initial=start, disable=rank != 0,
               unit="step", dynamic_ncols=True)
    with evaluate.loader_errors(in_hand), stop_signals() as signals, bar:
        for step in bar:
            # ---- this rank's images, and what their locations are to learn
            inputs, targets = [], []
            for _ in range(parts):
                item = next(loader)
                if isinstance(item, UserError):
                    raise item
                *tensors, counts, bad = item
                images, sizes, boxes, labels = (x.to(device, non_blocking=True) for x in tensors)
                inputs.append((images, sizes))
                targets.append(
                    model.targets(images.shape[2:], boxes.split(counts), labels.split(counts))
                )
                replaced += len(bad)
                for error in bad:
                    tqdm.write(f"{error}; a grey image takes its place", file=sys.stderr)

            # ---- gradients. Targets do not depend on predictions, so the sums that normalise the
            # loss of the whole step, over all parts and ranks, are known before the first forward
            # pass, which hides their reduction. With them goes the wish of any rank to stop.
            stop = torch.full((1,), float(len(signals) > 0), device=device)
            sums = torch.cat([sum(map(fcos.normalizer, targets)), stop])
            reduction = dist.all_reduce(sums, async_op=True) if world > 1 else None
            step_losses = torch.zeros(3, device=device)
            for part in range(parts):
                more = world > 1 and part < parts - 1
                with network.no_sync() if more else contextlib.nullcontext():
                    bf16 = settings["precision"] == "bf16"
                    with torch.autocast(device.type, torch.bfloat16, bf16):
                        outputs = network(*inputs[part])
                    if reduction and part == 0:
                        reduction.wait()
                    losses = fcos.fcos_loss(outputs, targets[part], sums[:2], **model.loss)
                    losses = torch.stack([losses["cls"], losses["box"], losses["ctr"]])
                    (losses.sum() * world).backward()  # DDP averages what is to be added
                step_losses += losses.detach()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            finite = step_losses.sum().isfinite() & norm.isfinite()
            diverged = torch.where(finite, diverged, diverged.clamp(max=step))

            # ---- the step
            rate = lr_at(step, settings["lr"], iters, settings["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            if settings["clip_norm"]:
                torch.nn.utils.clip_grads_with_norm_(
                    model.parameters(), settings["clip_norm"], norm
                )
            optimizer.step()
            optimizer.zero_grad()

            # ---- now and then: log, checkpoint, evaluate. Reading a number from a GPU waits for
            # all its work, so nothing is read in between; from a CPU it is free.
            done = step + 1
            evaluating = done < iters and args.eval_every and done % args.eval_every == 0
            saving = evaluating or done == iters or done % args.checkpoint_every == 0
            logging = saving or done % log_every == 0
            stopping = (logging or device.type == "cpu") and sums[2].item() > 0
            if logging or stopping:
                numbers = torch.cat([step_losses, replaced])
                if world > 1:
                    dist.all_reduce(numbers)
                    dist.all_reduce(diverged, dist.ReduceOp.MIN)
                cls, box, ctr, grey = numbers.tolist()
                if diverged.item() < iters:
                    ids = train_set.image_ids[batches.plan(diverged.item())[0]].tolist()
                    raise UserError(
                        f"the loss or its gradient is not finite since step {diverged.item() + 1}, "
                        f"of the images {ids}; cls, box and ctr are now {cls}, {box} and {ctr}; "
                        f"nothing of it is in {out / 'last.pt'}"
                    )
                speed = (done - clock_step) * batch_size / (time.perf_counter() - clock)
                clock, clock_step = time.perf_counter(), done
                replaced.zero_()
                if rank == 0:
                    files.log(done, loss=cls + box + ctr, cls=cls, box=box, ctr=ctr, lr=rate,
                              images_per_second=round(speed, 2), skipped_images=int(grey))
                bar.set_postfix_str(
                    f"cls {cls:.3f} box {box:.3f} ctr {ctr:.3f} lr {rate:.2g} {speed:.1f} img/s"
                )
            if rank == 0 and (saving or stopping):
                files.checkpoint(done, settings, model, optimizer)
            if stopping and done < iters:
                say(f"{signals[0] if signals else 'a signal elsewhere'}: stopped after step {done} "
                    f"of {iters}; the same command goes on from there")
                return
            if evaluating:
                metrics = validate(done)
                if rank == 0:
                    bar.write(f"step {done}: AP {metrics['AP']:.3f}", file=sys.stderr)
                clock, clock_step = time.perf_counter(), done

    # ---- the result
    with evaluate.loader_errors(in_hand):
        metrics = validate(iters)
    if rank == 0:
        with fcos.open_whole(out / "metrics.json", "w") as file:
            json.dump(metrics, file)
        print(json.dumps(metrics))
    if world > 1:  # a rank that dies until here brings all of them back
        dist.barrier()


if __name__ == "__main__":
    evaluate.run(main, parse_args())
