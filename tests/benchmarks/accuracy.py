"""Average precision on real data: beside torchvision's FCOS, ablated as in the paper, over seeds.

    python tests/benchmarks/accuracy.py bccd          # ours and torchvision's, from scratch
    python tests/benchmarks/accuracy.py ablation      # one thing less, or another one
    python tests/benchmarks/accuracy.py padding       # of the whole step, or of pairs of images
    python tests/benchmarks/accuracy.py extras        # what the paper does not have
    python tests/benchmarks/accuracy.py invariance    # processes, micro-batches, resume
    python tests/benchmarks/accuracy.py all           # in order of weight
    python tests/benchmarks/accuracy.py table         # Markdown, and accuracy.png beside the rows

BCCD are 292 pictures of blood cells for training and 72 for validation, 640x480, three classes, in
--data as images/, annotations/train.json and annotations/test.json. Every run is train.main with
the recipe and the flags below, in a process of its own with one thread, so that what is measured is
the product. A finished run is a row of results/accuracy.jsonl and is not run again; an interrupted
one resumes; several invocations may work on the same rows, each takes runs that no other has. AP is
that of the last step, not of the best.

torchvision's side are the head, assignment, losses and post-processing of torchvision.models.
detection.FCOS on our backbone and pyramid, in our trainer: the same pixels in every step, the same
optimiser, schedule and initial backbone. It stays as it is where it differs from ours: locations at
the corner of their cells; no learned scale of the distances for each level; distances of exactly 64
(128, ...) pixels belong to no level; boxes that are not weighed by their centerness; a GIoU without
the official 1; a threshold of 0.2 on sqrt(class * centerness); and, no matter in one process, the
positive locations of a process alone as normaliser.
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torchvision.models.detection.image_list import ImageList

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
import fcos
import train
from kernels import iou_loss

ROOT = Path(__file__).resolve().parents[2]
MODEL = dict(block="basic", blocks=(1, 1, 2, 2), stem=32, channels=64, norm="gn") | fcos.IMPRV
RECIPE = dict(
    model="bccd",
    weights="none",
    iters=900,
    batch_size=4,
    lr=0.01,
    warmup=50,
    min_size=[240],
    max_size=400,
)

# ---- torchvision's detector in our trainer -----------------------------------------------------


class Torchvision(fcos.FCOS):
    """Our backbone and pyramid; from there on everything is torchvision's."""

    OUTPUTS = "cls_logits", "bbox_regression", "bbox_ctrness"

    @classmethod
    def of(cls, model):
        """Replaces the head of one of our models."""
        body = torch.nn.Identity()  # the features are made before, in forward
        body.out_channels = model.keywords["channels"]
        model.head = torchvision.models.detection.FCOS(body, model.num_classes)
        model.__class__ = cls
        return model.to(memory_format=torch.channels_last)

    def forward(self, images, sizes):
        images = self.normalize(images, sizes).contiguous(memory_format=torch.channels_last)
        features = self.fpn(*self.backbone(images))
        anchors = self.head.anchor_generator(ImageList(images, sizes.tolist()), features)
        levels = [feature.shape[2] * feature.shape[3] for feature in features]
        return self.head.head(features) | {"anchors": anchors, "levels": levels}

    def targets(self, hw, boxes, labels):
        theirs = [{"boxes": b, "labels": l} for b, l in zip(boxes, labels)]
        return super().targets(hw, boxes, labels) | {"theirs": theirs}

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
        return [
            torch.nn.utils.rnn.pad_sequence([image[name] for image in found], True, empty)
            for name, empty in (("boxes", 0), ("scores", -math.inf), ("labels", -1))
        ]


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

    def decode(self, outputs, *args, **keywords):
        certain = torch.full_like(outputs["ctr"], math.inf)
        return ours(self, outputs | {"ctr": certain}, *args, **keywords)

    fcos.FCOS.decode = decode


def views_at_test():
    predict = evaluate.predict
    evaluate.predict = functools.partial(predict, tta=True)


def bf16_at_test():
    predict = evaluate.predict

    def in_bf16(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return predict(*args)

    evaluate.predict = in_bf16


def no_centerness():
    """Neither as a weight of the boxes, nor learned, nor in the score."""
    ours = fcos.fcos_loss

    def loss(*args, **keywords):
        losses = ours(*args, **keywords | {"quality": "iou"})  # weighs all positive ones the same
        return losses | {"ctr": 0 * losses["ctr"]}

    fcos.fcos_loss = loss
    no_centerness_at_test()


def no_smoothing():
    """GIoU of the areas as they are, without the official 1."""

    def giou(pred, target):
        _, union, hull = iou_loss._overlap(pred, target)
        inter = iou_loss._area(torch.minimum(pred, target))
        return 1 - inter / union + (hull - union) / hull

    iou_loss.KINDS["giou_exact"] = giou


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
    """A training. `patch` is called before it; it is compared with the config `base`, seed by seed;
    `paper` is the difference in AP that the paper has for the same change (tables 3 and 4 of arXiv
    1904.01355: one improvement less, or None of table 4, of another starting point)."""

    group: str
    flags: str = ""
    patch: callable = None
    base: str = "imprv"
    paper: float | None = None
    threads: int = 1
    processes: int = 1
    starts: int = 1
    from_base: bool = False  # nothing to train: another evaluation of the base's last weights


# Mean pixels of a batch padded as a whole over those of its pairs padded alone: 1.18. On 100 images
# of COCO, 16 a step, it is 1.08 with a short side of 800 and 1.20 with the official 640 to 800.
SIZES = "--accumulate 2 --min-size " + " ".join(map(str, range(128, 305, 16)))
CONFIGS = {
    "torchvision": Config("bccd", patch=torchvision_side, base="torchvision"),
    "plain": Config(
        "bccd", "--set activation=exp ctr_on=cls radius=0.0 box_loss=iou unit=pixel", paper=-1.5
    ),
    "imprv": Config("bccd", base="torchvision"),
    "imprv, quality iou": Config("bccd", "--set quality=iou"),
    "no centerness": Config("ablation", patch=no_centerness, paper=-3.6),
    "no centerness at test": Config("ablation", patch=no_centerness_at_test, from_base=True),
    "centerness on class tower": Config("ablation", "--set ctr_on=cls", paper=-0.3),
    "no center sampling": Config("ablation", "--set radius=0.0", paper=-0.7),
    "IoU loss": Config("ablation", "--set box_loss=iou", paper=-0.2),
    "linear IoU loss": Config("ablation", "--set box_loss=linear_iou"),
    "unit pixel": Config("ablation", "--set unit=pixel", paper=-0.3),
    "GIoU without + 1": Config("ablation", "--set box_loss=giou_exact", no_smoothing),
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
SEEDS = {"bccd": 5, "ablation": 3, "padding": 3, "extras": 3, "invariance": 2}
ALL = [
    ("bccd", range(3)),
    ("ablation", range(3)),
    ("bccd", range(3, 5)),
    ("padding", range(3)),
    ("extras", range(3)),
    ("invariance", range(2)),
]


def train_one(name, seed, out, args):
    """The training itself, in this process."""
    config, iters, data = CONFIGS[name], args.iters, args.data.resolve()
    fcos.MODELS["bccd"], train.RECIPES["bccd"] = MODEL, RECIPE
    fcos.read_image = functools.cache(fcos.read_image)  # the same 364 again and again
    if config.patch:
        config.patch()
    flags = f"bccd --iters {iters} --seed {seed} --eval-every {iters // 10} --workers 0 --out {out}"
    folders = [f"--{split}-images={data}/images" for split in ("train", "val")]
    files = [
        f"--train-annotations={data}/annotations/train.json",
        f"--val-annotations={data}/annotations/test.json",
    ]
    args = [*flags.split(), *folders, *files, *config.flags.split()]
    evaluate.run(train.main, train.parse_args(args))


def folder_of(name, seed, iters):
    return ROOT / "runs" / "accuracy" / f"{name} {seed} {iters}".replace(",", "").replace(" ", "-")


def run(name, seed, args):
    """The training in a process of its own, unless its row is there or another invocation is at it.
    The lock is the child's too: it ends with the last of them, however that ends."""
    config, out = CONFIGS[name], folder_of(name, seed, args.iters)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if (name, seed) in read_rows(args):
            return
        base = folder_of(config.base, seed, args.iters)
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
                    str(args.iters),
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
        row = result(name, seed, out, args.iters)
        with open(args.results, "a") as file:  # one write of one line
            file.write(json.dumps(row) + "\n")
        print(f"  AP {row['AP']:.3f}, {row['seconds']} s", flush=True)


def result(name, seed, out, iters):
    """The row of a finished run: AP and mean losses of every tenth, from the trainer's log."""
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
            seconds += (entry["step"] - last) * RECIPE["batch_size"] / entry["images_per_second"]
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
        "recipe": RECIPE,
        "model": MODEL,
        "commit": commit,
        "versions": versions,
        "threads": config.threads,
        "processes": config.processes,
        "seconds": round(seconds),
        **metrics,
        "curve": curve,
    }


# ---- what came out -----------------------------------------------------------------------------


def read_rows(args):
    """{(config, seed): row} of the runs of this length."""
    rows = {}
    if args.results.exists():
        for line in args.results.read_text().splitlines():
            row = json.loads(line)
            if row["iters"] == args.iters:
                rows[row["config"], row["seed"]] = row
    return rows


def spread(values):
    """Mean and standard error along the first axis; of one value, no error."""
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
            f"\n`python tests/benchmarks/accuracy.py {group}`: {args.iters} steps of "
            f"{RECIPE['batch_size']} images; mean ± standard error; differences are of the same "
            "seeds\n"
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


def summary(results, iters=RECIPE["iters"]):
    """The README's table, of what has been run."""
    rows = read_rows(argparse.Namespace(results=Path(results), iters=iters))
    lines = [
        "| | AP | AP50 | seeds | difference in AP, same seeds | the paper's |",
        "|---|---|---|---|---|---|",
    ]
    for name, config in CONFIGS.items():
        runs = [row for (found, _), row in rows.items() if found == name]
        if runs:
            cells = [cell([100 * row[metric] for row in runs], ".1f") for metric in ("AP", "AP50")]
            than = cell(differences(name, rows), "+.2f")
            cells += [str(len(runs)), f"{than} against {config.base}" if than else ""]
            cells += ["" if config.paper is None else f"{config.paper:+}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows, path):
    """Left the curves of the group bccd, right the ablation's differences beside the paper's."""
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
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
    fig.savefig(path, dpi=110)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", choices=[*SEEDS, "all", "table", "one"])
    add("--seeds", type=int, nargs="+", help="(the group's own)")
    add("--iters", type=int, default=RECIPE["iters"], help="steps of a run (%(default)s)")
    add("--data", type=Path, default=ROOT.parent / "shared/data/bccd")
    add("--results", type=Path, default=Path(__file__).parent / "results/accuracy.jsonl")
    add("--config", help="of `one`: the training alone, in this process, without a row")
    args = parser.parse_args()
    if args.what == "table":
        return table(args)
    if args.what == "one":
        (seed,) = args.seeds
        return train_one(args.config, seed, folder_of(args.config, seed, args.iters), args)
    groups = ALL if args.what == "all" else [(args.what, range(SEEDS[args.what]))]
    for group, seeds in groups:
        for seed in args.seeds or seeds:
            for name, config in CONFIGS.items():
                if config.group == group:
                    run(name, seed, args)


if __name__ == "__main__":
    main()
