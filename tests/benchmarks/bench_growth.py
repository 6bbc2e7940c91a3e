"""How time and memory grow: with pixels, images a batch, boxes an image, classes and candidates.

    python tests/benchmarks/bench_growth.py [FOLDER] [--threads 2]

Writes FOLDER/growth.json (growth_cuda.json on a GPU) and a figure beside it. Each line varies one
number and holds the rest. `exponent` is the slope between the last two points of time and memory on
logarithmic axes: 1 is linear, 2 quadratic. Memory is what a call adds at its peak: on a CPU to the
resident pages of the process, on a GPU to what PyTorch has allocated.
"""

import argparse
import ctypes
import gc
import math
import statistics
import time
from pathlib import Path

import record
import torch
from record import CUDA, DEVICE, device

import fcos
from kernels.nms import batched_nms

MODEL, HW = "fcos_imprv_R_50_FPN", (800, 1344)


def quick_allocator(quick):
    """glibc keeps freed memory for the next call, which is fast, or gives it back, which shows what
    a call needs."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20 if quick else 64 << 10)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)


def resident(key):
    """Bytes of this process: VmRSS now, VmHWM the most since it was reset."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(key + ":")[1].split()[0])


def peak_bytes(run):
    if CUDA:
        return device.peak_bytes(run)
    gc.collect()
    quick_allocator(False)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    run()
    peak = resident("VmHWM") - before
    quick_allocator(True)
    return peak


def timed(run, seconds):
    """The median of at least three calls."""
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- the lines: x -> a call whose cost is measured ----------------------------------------------


def inference(batch, hw):
    model = model_of(80).eval()
    images = torch.randint(256, (batch, 3, *hw), dtype=torch.uint8, device=DEVICE)
    sizes = torch.tensor([hw] * batch, device=DEVICE)

    @torch.inference_mode()
    def run():
        model.decode(model(images, sizes), sizes)

    return run


def model_of(classes, row=MODEL):
    torch.manual_seed(0)
    model = fcos.build(row, classes)
    torch.nn.init.constant_(model.head.cls.bias, -3.5)
    return model.to(DEVICE)


def random_outputs(classes, hw):
    """What a head returns, as leaves that want a gradient."""
    model = model_of(1, "shapes")
    points = model.points(hw, DEVICE)
    P = len(points)
    outputs = {
        "cls": torch.randn(1, P, classes, device=DEVICE) - 5,
        "ltrb": 4 * torch.rand(1, P, 4, device=DEVICE) * points[:, 2:3],
        "ctr": torch.randn(1, P, device=DEVICE),
    }
    for leaf in outputs.values():
        leaf.requires_grad_()
    levels = [h * w for h, w in fcos.level_sizes(hw, model.strides)]
    return model, outputs | {"points": points, "levels": levels}


def targets_and_loss(boxes, classes, hw):
    model, outputs = random_outputs(classes, hw)
    leaves = [outputs[name] for name in ("cls", "ltrb", "ctr")]
    edge = torch.tensor([hw[1], hw[0]])
    corner = torch.rand(boxes, 2) * edge * 0.8
    box = torch.cat([corner, corner + 8 + torch.rand(boxes, 2) ** 3 * edge * 0.2], 1).to(DEVICE)
    label = torch.randint(classes, (boxes,), device=DEVICE)

    def run():
        targets = model.targets(hw, [{"boxes": box, "labels": label}])
        losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
        torch.autograd.grad(sum(losses.values()), leaves)

    return run


def decoding(classes, hw):
    model, outputs = random_outputs(classes, hw)
    sizes = torch.tensor([hw], device=DEVICE)

    @torch.inference_mode()
    def run():
        model.decode(outputs, sizes)

    return run


def suppression(candidates):
    torch.manual_seed(0)
    corner, size = torch.rand(2, 1, candidates, 2, device=DEVICE)
    boxes = torch.cat((800 * corner, 800 * corner + 200 * size), dim=2)
    scores = torch.rand(1, candidates, device=DEVICE)
    labels = torch.randint(80, (1, candidates), device=DEVICE)
    return lambda: batched_nms(boxes, scores, labels, 0.6, 100)


SIDES = (256, 512, 1024, 1448, 2048)
LINES = {  # name: (what x is, its values, x -> call, x -> what cost is to be proportional to)
    "inference, image side": ("pixels", SIDES, lambda n: inference(1, (n, n)), lambda n: n * n),
    "inference, batch": ("images", (1, 2, 4, 8, 16), lambda n: inference(n, (256, 320)), float),
    "assignment and loss, boxes": (
        "boxes",
        (1, 10, 100, 1000, 5000),
        lambda n: targets_and_loss(n, 80, HW),
        float,
    ),
    "loss, classes": (
        "classes",
        (1, 10, 80, 365, 1203),
        lambda n: targets_and_loss(7, n, HW),
        float,
    ),
    "decode, classes": ("classes", (1, 10, 80, 365, 1203), lambda n: decoding(n, HW), float),
    "NMS, candidates": ("candidates", (10, 100, 1000, 5000, 50_000), suppression, float),
}


def exponent(points, key, cost):
    """The slope between the two largest points, where constant costs matter least."""
    (x1, y1), (x2, y2) = ((cost(p["x"]), p[key]) for p in points[-2:])
    if min(y1, y2) <= 0:
        return None
    return math.log(y2 / y1) / math.log(x2 / x1)


def draw(log, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    for axis, key, label in zip(axes, ("ms", "peak_mib"), ("time, ms", "memory at the peak, MiB")):
        for row in log.content["results"]:
            points = [(LINES[row["what"]][3](p["x"]), p[key]) for p in row.get("points", ())]
            points = [(x, y) for x, y in points if y > 0]
            if points:
                slope = row[f"exponent_{key}"]
                name = row["what"] + (f": {slope:z.2f}" if slope is not None else "")
                axis.loglog(*zip(*points), marker="o", label=name)
        axis.set(xlabel="pixels, images, boxes, classes or candidates", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(
            fontsize=8,
            title="slope at the end",
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
        )
    figure.suptitle(f"{log.content['gpu'] or log.content['cpu']}, {log.content['date']}")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=3, help="for the time of each point")
    args = record.arguments(parser)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = "growth_cuda" if CUDA else "growth"
    log = record.Record(args.folder and f"{args.folder}/{name}.json")
    for what, (unit, values, make, cost) in LINES.items():
        row = log.add(what=what, x=unit, points=[])
        with log.attempt(row):
            for x in values[:2] if args.small else values:
                run = make(x)
                ms = 1000 * timed(run, 0 if args.small else args.seconds)
                row["points"].append({"x": x, "ms": ms, "peak_mib": peak_bytes(run) / 2**20})
                log.write()
                del run
                gc.collect()
                if CUDA:
                    torch.cuda.empty_cache()
            for key in ("ms", "peak_mib"):
                row[f"exponent_{key}"] = exponent(row["points"], key, cost)
            log.show(row)
    if args.folder:
        draw(log, f"{args.folder}/{name}.png")
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
