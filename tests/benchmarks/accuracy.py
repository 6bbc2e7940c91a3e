"""Measure average precision on real data: beside torchvision's FCOS, ablated, over seeds.

    python tests/benchmarks/accuracy.py bccd          # ours and torchvision's, from scratch
    python tests/benchmarks/accuracy.py hituav        # the same with small objects
    python tests/benchmarks/accuracy.py longer        # HIT-UAV for twice as many steps
    python tests/benchmarks/accuracy.py small         # the recipe `small` of train.py as it is
    python tests/benchmarks/accuracy.py ablation      # one thing less, or another one
    python tests/benchmarks/accuracy.py padding       # of the whole step, or of pairs of images
    python tests/benchmarks/accuracy.py extras        # what the paper does not have
    python tests/benchmarks/accuracy.py invariance    # processes, micro-batches, resume
    python tests/benchmarks/accuracy.py all           # everything, in order of importance
    python tests/benchmarks/accuracy.py table         # Markdown, and accuracy.png beside the rows
    python tests/benchmarks/accuracy.py check         # train one seed again: is it in the old band?

BCCD: 292 pictures of blood cells for training and 72 for validation, 640x480, three classes.
HIT-UAV: 2,029 and 579 thermal aerial pictures, 400x320, four classes; half of the boxes are persons
of 8 x 12 pixels. --data holds bccd/ and hituav/, each with images/, annotations/train.json and
annotations/test.json.

Every run is train.main with the recipe and flags below, in a process of its own with one thread: it
measures the product. A finished run is a row of results/accuracy.jsonl and is not run again; an
interrupted run resumes; several invocations may share the work. AP is that of the last step, not of
the best. "ms" is the CPU time of one validation image in that evaluation, in milliseconds.

The side "torchvision" is the head, assignment, losses and post-processing of
torchvision.models.detection.FCOS on our backbone and pyramid, in our trainer: the same pixels in
every step, the same optimizer, schedule and initial backbone. It keeps its own ways: locations at
the corner of their cells; no learned scale of the distances for each level; distances of exactly 64
(128, ...) pixels belong to no level; boxes that are not weighted by their centerness; a GIoU
without the official 1; a threshold of 0.2 on sqrt(class * centerness); and, which makes no
difference in one process, the positive locations of a process alone as normalizer.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
import fcos
import train

ROOT = Path(__file__).resolve().parents[2]
MODEL = dict(block="basic", blocks=(1, 1, 2, 2), stem=32, channels=64, norm="gn") | fcos.IMPRV
RECIPE = dict(model="bench", weights="none", iters=900, batch_size=4, lr=0.01, warmup=50)
SIZES_OF = {
    "bccd": dict(min_size=[240], max_size=400),
    "hituav": dict(iters=450, min_size=[384], max_size=480),
}

# ---- torchvision's detector in our trainer -----------------------------------------------------


class Torchvision(fcos.FCOS):
    """Our backbone and pyramid; from there on everything is torchvision's."""

    OUTPUTS = "cls_logits", "bbox_regression", "bbox_ctrness"

    @classmethod
    def of(cls, model):
        """Replace the head of one of our models."""
        body = torch.nn.Identity()  # forward computes the features before
        body.out_channels = model.keywords["channels"]
        anchors = AnchorGenerator([(s,) for s in model.strides], [(1.0,)] * len(model.strides))
        model.head = torchvision.models.detection.FCOS(
            body, model.num_classes, anchor_generator=anchors
        )
        model.__class__ = cls
        return model.to(memory_format=torch.channels_last)

    def forward(self, images, sizes):
        images = self.normalize(images, sizes).contiguous(memory_format=torch.channels_last)
        features = self.fpn(self.backbone(images))
        anchors = self.head.anchor_generator(ImageList(images, sizes.tolist()), features)
        levels = [feature.shape[2] * feature.shape[3] for feature in features]
        return self.head.head(features) | {"anchors": anchors, "levels": levels}

    def targets(self, hw, truths):
        return super().targets(hw, truths) | {"theirs": truths}

    def loss_of(self, outputs, targets, normalizers, **keywords):
        predicted = {name: outputs[name] for name in self.OUTPUTS}
        return self.head.compute_loss(
            targets["theirs"], predicted, outputs["anchors"], outputs["levels"]
        )

    def decode(self, outputs, sizes):
        levels = outputs["levels"]
        predicted = {name: list(outputs[name].split(levels, 1)) for name in self.OUTPUTS}
        anchors = [list(anchors.split(levels)) for anchors in outputs["anchors"]]
        found = self.head.postprocess_detections(predicted, anchors, sizes.tolist())
        return {
            name: torch.nn.utils.rnn.pad_sequence([image[name] for image in found], True, empty)
            for name, empty in (("boxes", 0), ("scores", -math.inf), ("labels", -1))
        }


def torchvision_side():
    ours = train.make_model

    def make_model(*args):
        model = Torchvision.of(ours(*args))
        fcos.fcos_loss = model.loss_of
        return model

    train.make_model = make_model


# ---- changes that are no keywords --------------------------------------------------------------


def no_centerness_at_test():
    ours = fcos.FCOS.decode

    def decode(self, outputs, sizes):
        certain = torch.full_like(outputs["ctr"], math.inf)
        return ours(self, outputs | {"ctr": certain}, sizes)

    fcos.FCOS.decode = decode


def views_at_test():
    predict = evaluate.predict
    evaluate.predict = functools.partial(predict, tta=True)


def tiles_at_test():
    """Evaluate on crops of 240 x 240 pixels, too, each at the size of training."""
    evaluate.predict = functools.partial(evaluate.predict, tile=240)


def bf16_at_test():
    predict = evaluate.predict

    def in_bf16(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return predict(*args)

    evaluate.predict = in_bf16


def larger_at_test():
    """Evaluate at 1.5 times the size of training."""
    predict = evaluate.predict

    def at_larger(model, *args):
        size = model.test_size
        model.test_size = tuple(3 * side // 2 for side in size)
        results = predict(model, *args)
        model.test_size = size
        return results

    evaluate.predict = at_larger


def no_centerness():
    """Neither as a weight of the boxes, nor learned, nor in the score."""
    ours = fcos.fcos_loss

    def loss(*args, **keywords):
        losses = ours(*args, **keywords | {"quality": "iou"})  # weighs all positive ones the same
        return losses | {"ctr": 0 * losses["ctr"]}

    fcos.fcos_loss = loss
    no_centerness_at_test()


def pad_pairs():
    """Every micro-batch is padded to its own images."""
    ours = train.TrainBatches.plan
    train.TrainBatches.plan = lambda self, step: ours(self, step)._replace(padded_hw=None)


def stop_halfway():
    ours = train.lr_at

    def lr_at(step, lr, iters, *args):
        if step == iters // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return ours(step, lr, iters, *args)

    train.lr_at = lr_at


# ---- what is run -------------------------------------------------------------------------------


class Config(NamedTuple):
    """A training. `patch` is called before it; it is compared with the config `base`, seed by seed.

    `paper` is the difference in AP that the paper has for the same change (tables 3 and 4 of arXiv
    1904.01355: one improvement less, or None of table 4, of another starting point). `model` is a
    row of fcos.MODELS instead of MODEL; `recipe` one of train.RECIPES instead of RECIPE.
    """

    group: str
    flags: str = ""
    patch: callable = None
    base: str = "imprv"
    paper: float | None = None
    threads: int = 1
    processes: int = 1
    starts: int = 1
    from_base: bool = False  # nothing to train: another evaluation of the base's last weights
    data: str = "bccd"
    model: str | None = None
    recipe: str | None = None
    iters: int | None = None  # instead of the recipe's

    def settings(self):
        """Return the recipe of this training."""
        recipe = RECIPE | SIZES_OF[self.data]
        if self.recipe:
            recipe = train.RECIPES[self.recipe]
        if self.iters:
            recipe = recipe | dict(iters=self.iters)
        return recipe

    def keywords(self):
        """Return the model's keywords before the flags."""
        return fcos.MODELS[self.model or self.recipe] if self.model or self.recipe else MODEL


# Mean pixels of a batch padded as a whole over those of its pairs padded alone: 1.18. On 100 images
# of COCO, 16 a step, it is 1.08 with a short side of 800 and 1.20 with the official 640 to 800.
SIZES = "--accumulate 2 --min-size " + " ".join(map(str, range(128, 305, 16)))
HIT_UAV = Config("hituav", base="HIT-UAV, torchvision", data="hituav")
CONFIGS = {
    "torchvision": Config("bccd", patch=torchvision_side, base="torchvision"),
    "plain": Config(
        "bccd", "--set activation=exp ctr_on=cls radius=0.0 box_loss=iou unit=pixel", paper=-1.5
    ),
    "imprv": Config("bccd", base="torchvision"),
    "imprv, quality iou": Config("bccd", "--set quality=iou"),
    "stride 4 and its loss": Config("bccd", base="torchvision", model="small"),
    "HIT-UAV, torchvision": HIT_UAV._replace(patch=torchvision_side),
    "HIT-UAV, stride 4 and its loss": HIT_UAV._replace(model="small"),
    "HIT-UAV, imprv": HIT_UAV,
    "HIT-UAV, 1.5 times larger at test": HIT_UAV._replace(
        base="HIT-UAV, stride 4 and its loss", model="small", patch=larger_at_test, from_base=True
    ),
    "HIT-UAV, tiles at test": HIT_UAV._replace(
        base="HIT-UAV, stride 4 and its loss", model="small", patch=tiles_at_test, from_base=True
    ),
    "HIT-UAV, torchvision, 900 steps": HIT_UAV._replace(
        group="longer", base="HIT-UAV, torchvision, 900 steps", patch=torchvision_side, iters=900
    ),
    "HIT-UAV, stride 4 and its loss, 900 steps": HIT_UAV._replace(
        group="longer", base="HIT-UAV, torchvision, 900 steps", model="small", iters=900
    ),
    "BCCD, recipe small": Config("small", base="BCCD, recipe small", recipe="small"),
    "HIT-UAV, recipe small": Config(
        "small", base="HIT-UAV, recipe small", recipe="small", data="hituav"
    ),
    "no centerness": Config("ablation", patch=no_centerness, paper=-3.6),
    "no centerness at test": Config("ablation", patch=no_centerness_at_test, from_base=True),
    "centerness on class tower": Config("ablation", "--set ctr_on=cls", paper=-0.3),
    "no center sampling": Config("ablation", "--set radius=0.0", paper=-0.7),
    "IoU loss": Config("ablation", "--set box_loss=iou", paper=-0.2),
    "linear IoU loss": Config("ablation", "--set box_loss=linear_iou"),
    "unit pixel": Config("ablation", "--set unit=pixel", paper=-0.3),
    "GIoU without + 1": Config("ablation", "--set box_loss=giou_exact"),
    "mixed sizes": Config("padding", SIZES, base="mixed sizes"),
    "mixed sizes, padded in pairs": Config("padding", SIZES, pad_pairs, base="mixed sizes"),
    "EMA 0.99": Config("extras", "--ema 0.99"),
    "augmented": Config("extras", "--augment"),
    "bf16 at test": Config("extras", patch=bf16_at_test, from_base=True),
    "18 views at test": Config("extras", patch=views_at_test, from_base=True),
    "2 threads (rounding alone)": Config("invariance", threads=2),
    "2 processes": Config("invariance", processes=2),
    "2 micro-batches": Config("invariance", "--accumulate 2"),
    "stopped and resumed": Config("invariance", patch=stop_halfway, starts=2),
}
SEEDS = {
    "bccd": 5,
    "hituav": 3,
    "longer": 1,
    "small": 1,
    "ablation": 3,
    "padding": 3,
    "extras": 3,
    "invariance": 2,
}
ALL = [
    ("bccd", range(3)),
    ("hituav", range(3)),
    ("longer", range(1)),
    ("small", range(1)),
    ("ablation", range(3)),
    ("bccd", range(3, 5)),
    ("padding", range(3)),
    ("extras", range(3)),
    ("invariance", range(2)),
]


def steps_of(name, args):
    return args.iters or CONFIGS[name].settings()["iters"]


def train_one(name, seed, out, args):
    """Train in this process."""
    config, iters = CONFIGS[name], steps_of(name, args)
    data = (args.data / config.data).resolve()
    fcos.MODELS["bench"] = config.keywords()
    train.RECIPES["bench"] = config.settings() | {"model": "bench"}
    fcos.read_image = functools.cache(fcos.read_image)  # the same few hundred again and again
    if config.patch:
        config.patch()
    evaluate.predict = timed(evaluate.predict, out / "ms")
    every = iters // 10 if config.data == "bccd" else iters
    flags = f"bench --iters {iters} --seed {seed} --eval-every {every} --workers 0 --out {out}"
    folders = [f"--{split}-images={data}/images" for split in ("train", "val")]
    files = [
        f"--train-annotations={data}/annotations/train.json",
        f"--val-annotations={data}/annotations/test.json",
    ]
    args = [*flags.split(), *folders, *files, *config.flags.split()]
    evaluate.run(train.main, train.parse_args(args))


def timed(predict, path):
    """Return `predict` that writes the CPU milliseconds of an image to `path`."""

    def predict_and_time(model, dataset, *args):
        start = time.process_time()
        results = predict(model, dataset, *args)
        path.write_text(f"{1e3 * (time.process_time() - start) / len(dataset.hw):.1f}")
        return results

    return predict_and_time


def folder_of(name, seed, iters):
    return ROOT / "runs" / "accuracy" / f"{name} {seed} {iters}".replace(",", "").replace(" ", "-")


def run(name, seed, args):
    """Train in a process of its own, unless its row exists or another invocation works on it.

    The child holds the lock too, so that it ends with the last of them, however that ends.
    """
    config, iters = CONFIGS[name], steps_of(name, args)
    out = folder_of(name, seed, iters)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if (name, seed) in read_rows(args):
            return
        base = folder_of(config.base, seed, iters)
        if config.from_base and (base / "last.pt").exists():
            shutil.copy(base / "last.pt", out)
        launch = [sys.executable]
        if config.processes > 1:
            launch += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={config.processes}",
            ]
        print(f"{name}, seed {seed}", flush=True)
        for _ in range(config.starts):
            subprocess.run(
                [
                    *launch,
                    __file__,
                    "one",
                    "--config",
                    name,
                    "--seeds",
                    str(seed),
                    "--iters",
                    str(iters),
                    "--data",
                    args.data,
                    "--results",
                    args.results,
                ],
                env=os.environ | {"OMP_NUM_THREADS": str(config.threads)},
                pass_fds=[lock.fileno()],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        row = result(name, seed, out, iters)
        with open(args.results, "a") as file:  # one write of one line
            file.write(json.dumps(row) + "\n")
        print(f"  AP {row['AP']:.3f}, {row['seconds']} s", flush=True)


def result(name, seed, out, iters):
    """Return the row of a finished run: AP and mean losses of every part, from the log."""
    recipe = CONFIGS[name].settings()
    curve, losses, seconds, last = [], [], 0, 0
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "AP" in entry:
            point = {
                key: round(float(np.mean([loss[key] for loss in losses])), 4)
                for key in (losses[0] if losses else [])
            }
            curve.append({"step": entry["step"], "AP": round(entry["AP"], 4), **point})
            losses, metrics = [], entry
        else:
            seconds += (entry["step"] - last) * recipe["batch_size"] / entry["images_per_second"]
            last = entry["step"]
            other = ("step", "lr", "images_per_second", "skipped_images")
            losses.append({key: value for key, value in entry.items() if key not in other})
    if curve[-1]["step"] != iters:
        sys.exit(f"{name}, seed {seed}: stopped after step {last}; the same command goes on")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }
    config = CONFIGS[name]
    metrics = {key: round(metrics[key], 4) for key in evaluate.METRICS[:6]}
    return {
        "config": name,
        "seed": seed,
        "iters": iters,
        "flags": config.flags,
        "patch": config.patch and config.patch.__name__,
        "recipe": recipe,
        "model": config.keywords(),
        "data": config.data,
        "commit": commit,
        "versions": versions,
        "threads": config.threads,
        "processes": config.processes,
        "seconds": round(seconds),
        "ms": float((out / "ms").read_text()),
        **metrics,
        "curve": curve,
    }


# ---- what came out -----------------------------------------------------------------------------


def read_rows(args):
    """Return {(config, seed): row} of the runs of their config's length, or of --iters."""
    rows = {}
    if args.results.exists():
        for line in args.results.read_text().splitlines():
            row = json.loads(line)
            known = row["config"] in CONFIGS
            if known and row["iters"] == steps_of(row["config"], args):
                rows[row["config"], row["seed"]] = row
    return rows


def check(args):
    """Train seed 0 of imprv on BCCD again and exit with 1 unless its AP is in the recorded band.

    The band is three standard deviations of the recorded seeds to both sides of their mean: after
    900 steps, rounding alone makes another training of the same seed.
    """
    values = [100 * row["AP"] for (name, _), row in read_rows(args).items() if name == "imprv"]
    width = 3 * np.std(values, ddof=1)
    args.results = ROOT / "runs" / "accuracy" / "check.jsonl"
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.unlink(missing_ok=True)
    shutil.rmtree(folder_of("imprv", 0, steps_of("imprv", args)), ignore_errors=True)
    run("imprv", 0, args)
    ap = 100 * read_rows(args)["imprv", 0]["AP"]
    fits = abs(ap - np.mean(values)) <= width
    print(f"AP {ap:.1f}, recorded {np.mean(values):.1f} ± {width:.1f}: {'ok' if fits else 'wrong'}")
    sys.exit(not fits)


def spread(values):
    """Return mean and standard error along the first axis; the error of one value is 0."""
    return np.mean(values, 0), np.std(values, 0) / math.sqrt(len(values) - 1 or math.inf)


def differences(name, rows, metric="AP"):
    """From the base, in points, of the seeds that both have."""
    base = CONFIGS[name].base
    return [
        100 * (row[metric] - rows[base, seed][metric])
        for (config, seed), row in rows.items()
        if config == name != base and (base, seed) in rows
    ]


def cell(values, form):
    if not values:
        return ""
    mean, error = spread(values)
    return f"{mean:{form}} ± {error:{form.strip('+')}}" if len(values) > 1 else f"{mean:{form}}"


def table(args):
    rows, metrics = read_rows(args), evaluate.METRICS[:6]
    for group in SEEDS:
        print(
            f"\n`python tests/benchmarks/accuracy.py {group}`: mean ± standard error; differences "
            "are of the same seeds\n"
        )
        head = [*metrics, "seeds", "seconds", "against", *metrics[:3], "paper"]
        print("| |", " | ".join(head), "|\n" + "|---" * (len(head) + 1) + "|")
        for name, config in CONFIGS.items():
            runs = [row for (found, _), row in rows.items() if found == name]
            if config.group == group and runs:
                cells = [cell([100 * row[metric] for row in runs], ".1f") for metric in metrics]
                cells += [str(len(runs)), f"{np.mean([row['seconds'] for row in runs]):.0f}"]
                cells += [config.base if config.base != name else ""]
                cells += [cell(differences(name, rows, m), "+.2f") for m in metrics[:3]]
                cells += ["" if config.paper is None else f"{config.paper:+}"]
                print(f"| {name} |", " | ".join(cells), "|")
    figure(rows, args.results.with_suffix(".png"))


def summary(results):
    """Return the README's table of the finished runs."""
    rows = read_rows(argparse.Namespace(results=Path(results), iters=None))
    lines = [
        "| | AP | AP50 | AP small | seeds | difference in AP, same seeds | the paper's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, config in CONFIGS.items():
        runs = [row for (found, _), row in rows.items() if found == name]
        if runs:
            cells = [
                cell([100 * row[metric] for row in runs], ".1f") for metric in ("AP", "AP50", "APs")
            ]
            than = cell(differences(name, rows), "+.2f")
            cells += [str(len(runs)), f"{than} against {config.base}" if than else ""]
            cells += ["" if config.paper is None else f"{config.paper:+}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows, path):
    """Draw three panels to `path`.

    Left: the curves of the group bccd. Middle: the ablation's differences beside the paper's.
    Right: AP on HIT-UAV against the CPU time of an image.
    """
    from matplotlib import pyplot as plt

    fig, (left, right, cost) = plt.subplots(1, 3, figsize=(16, 4), layout="constrained")
    names = [name for name, config in CONFIGS.items() if config.group == "bccd"]
    for name, color in zip(names, evaluate.COLORS):
        curves = [row["curve"] for (found, _), row in rows.items() if found == name]
        if curves:
            mean, error = spread([[100 * point["AP"] for point in curve] for curve in curves])
            steps = [point["step"] for point in curves[0]]
            left.plot(steps, mean, color=color, label=f"{name} ({len(curves)} seeds)")
            left.fill_between(steps, mean - error, mean + error, color=color, alpha=0.25, lw=0)
    left.set(xlabel="step", ylabel="AP", title="BCCD from scratch", ylim=0)
    left.legend(frameon=False)
    names = [n for n, c in CONFIGS.items() if c.group == "ablation" and differences(n, rows)]
    for y, name in enumerate(reversed(names)):
        mean, error = spread(differences(name, rows))
        right.errorbar(mean, y, xerr=error, fmt="o", color="#0072B2", capsize=3)
        if CONFIGS[name].paper is not None:
            right.plot(CONFIGS[name].paper, y, "x", color="#D55E00")
    right.plot([], [], "o", color="#0072B2", label="here: BCCD, mean and standard error")
    right.plot([], [], "x", color="#D55E00", label="the paper: COCO, R-50")
    right.axvline(0, color="grey", lw=0.8, zorder=0)
    right.set(
        yticks=range(len(names)),
        yticklabels=names[::-1],
        title="imprv with one change",
        xlabel="difference in AP, same seeds",
    )
    right.set_ylim(-2.2, len(names) - 0.5)  # room for the legend
    right.legend(frameon=False, loc="lower left")
    draw_costs(cost, rows)
    fig.savefig(path, dpi=110)


def draw_costs(axes, rows):
    """Draw AP on HIT-UAV, mean and standard error over the seeds, against CPU ms per image."""
    names = [name for name, config in CONFIGS.items() if config.group == "hituav"]
    for name, color in zip(names, evaluate.COLORS):
        runs = [row for (found, _), row in rows.items() if found == name]
        if runs:
            mean, error = spread([100 * row["AP"] for row in runs])
            ms = np.mean([row["ms"] for row in runs])
            label = f"{name.removeprefix('HIT-UAV, ')} ({len(runs)} seeds)"
            axes.errorbar(ms, mean, yerr=error, fmt="o", color=color, capsize=3, label=label)
    axes.set(xlabel="CPU ms per image, one thread", ylabel="AP", title="HIT-UAV")
    axes.set_xlim(0, 1.2 * axes.get_xlim()[1])
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", choices=[*SEEDS, "all", "table", "check", "one"])
    add("--seeds", type=int, nargs="+", help="(the group's own)")
    add("--iters", type=int, help="steps of a run (the config's own)")
    add("--data", type=Path, default=ROOT.parent / "shared/data", help="holds bccd/ and hituav/")
    add("--results", type=Path, default=Path(__file__).parent / "results/accuracy.jsonl")
    add("--config", help="of `one`: the training alone, in this process, without a row")
    args = parser.parse_args()
    if args.what == "table":
        return table(args)
    if args.what == "check":
        return check(args)
    if args.what == "one":
        (seed,) = args.seeds
        out = folder_of(args.config, seed, steps_of(args.config, args))
        return train_one(args.config, seed, out, args)
    groups = ALL if args.what == "all" else [(args.what, range(SEEDS[args.what]))]
    for group, seeds in groups:
        for seed in args.seeds or seeds:
            for name, config in CONFIGS.items():
                if config.group == group:
                    run(name, seed, args)


if __name__ == "__main__":
    main()
