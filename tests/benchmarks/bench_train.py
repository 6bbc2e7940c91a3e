"""Time a training step, beside torchvision's and with each change that could make it faster.

    python tests/benchmarks/bench_train.py [FOLDER] [--only eager compiled ...] [--name train]

Writes FOLDER/train.json, or train_cpu.json without a GPU. A step goes from uint8 images and boxes
on the device to the update of SGD: targets, forward and backward pass under bf16 autocast, losses
in float32. torchvision's takes floats in 0..1, and has frozen BatchNorms and weights as ours.
Weights are random. No time is asserted.

Parts, the most valuable first:

    eager      both as they are; GroupNorm in channels_last; fused SGD; cudnn.benchmark
    compiled   both under torch.compile
    profile    kernels, bytes and idle time of the compiled and of the eager step
    graph      the whole compiled step as one CUDA graph
    norm       the compiled step with GroupNorm in channels_last
    loss       network and loss compiled as one graph, without our kernels
    conv       1x1 convolutions as matrix products
    epoch      compiled steps of the padded sizes of COCO, from results/padding.json
    autotune   max-autotune
    dcn        deformable convolutions in float32 and in TF32

A second PyTorch is measured by running this file with its Python and another --name.
"""

import argparse
import contextlib
import functools
import json
import logging
import re
import time
from pathlib import Path
from unittest import mock

import bench_model
import record
import torch
from record import CUDA, DEVICE, device

import fcos
import train
from kernels.focal_loss import sigmoid_focal_loss_ref
from kernels.iou_loss import iou_loss_ref

PADDING = Path(__file__).parent / "results" / "padding.json"
EPOCH = "COCO, 800"  # of padding.json


class ChannelsLastGroupNorm(torch.nn.GroupNorm):
    """GroupNorm without a copy into another layout: statistics of each channel, then of each group.

    Under autocast PyTorch computes GroupNorm in float32 and, on a GPU, in contiguous layout, with
    copies before and after. This one returns the dtype and the layout of its input; statistics are
    float32, or float64 for a float64 input.
    """

    def forward(self, x):
        B, C = x.shape[:2]
        values = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(values, (2, 3), correction=0)
        variance = variance.view(B, self.num_groups, -1)
        mean = mean.view(B, self.num_groups, -1)
        group_mean = mean.mean(2, keepdim=True)
        # All channels hold the same number of pixels.
        group_variance = (variance + (mean - group_mean).square()).mean(2, keepdim=True)
        scale = (group_variance + self.eps).rsqrt() * self.weight.view(1, self.num_groups, -1)
        shift = self.bias.view(1, self.num_groups, -1) - group_mean * scale
        return (values * scale.view(B, C, 1, 1) + shift.view(B, C, 1, 1)).to(x.dtype)


def keep_layout(model):
    """Replace every GroupNorm of a model by ChannelsLastGroupNorm, with the same parameters."""
    for module in model.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = ChannelsLastGroupNorm


class Training:
    """One batch of uint8 images with seven boxes each, COCO's mean, and steps on it."""

    def __init__(self, batch, hw, backend="inductor"):
        self.backend = backend
        torch.manual_seed(0)
        images = torch.randint(256, (batch, 3, *hw), dtype=torch.uint8)
        edge = torch.tensor([hw[1], hw[0]])
        corner = torch.rand(batch, 7, 2) * edge * 0.7
        size = 16 + torch.rand(batch, 7, 2) ** 2 * edge * 0.28
        boxes = torch.cat([corner, corner + size], 2).to(DEVICE)
        labels = torch.randint(80, (batch, 7), device=DEVICE)
        self.truths = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels)]
        padded, sizes = fcos.pad_batch(list(images))
        self.padded = padded.to(DEVICE)
        self.sizes = sizes.to(DEVICE)
        self.floats = [image.to(DEVICE) / 255 for image in images]
        self.hw = hw

    def compile(self, module, dynamic=False, **options):
        """Compile a module in place; `options` are Inductor's."""
        if self.backend != "inductor":
            options = {}
        module.compile(dynamic=dynamic, backend=self.backend, options=options or None)

    def torchvision(self, compiled=False, channels_last=False):
        model = bench_model.torchvision_model(channels_last).train()
        model.transform.min_size = (min(self.hw),)
        model.transform.max_size = max(self.hw)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-6, momentum=0.9)
        if compiled:  # assignment and losses have shapes that depend on values
            self.compile(model.backbone)
            self.compile(model.head)

        def step():
            with torch.autocast(DEVICE.type, torch.bfloat16):
                losses = model(self.floats, self.truths)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def ours(self, compiled=False, row=bench_model.ROW, norm=False, loss=False, fused=None, **how):
        """Return a step of ours.

        compiled: compile the network, `how` as in `compile`. norm: ChannelsLastGroupNorm. loss:
        compile network and loss as one graph, with the losses in plain PyTorch. fused: of SGD.
        """
        model = bench_model.our_model(row).train()
        if norm:
            keep_layout(model)
        optimizer = torch.optim.SGD(train.parameter_groups(model, 1e-6), momentum=0.9, fused=fused)
        if compiled:
            self.compile(model, **how)

        def compute_losses(targets):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                outputs = model(self.padded, self.sizes)
            return fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)

        if loss:
            compute_losses = self.compile_with_loss(compute_losses)

        def step():
            losses = compute_losses(model.targets(self.padded.shape[2:], self.truths))
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def compile_with_loss(self, compute_losses):
        compiled = torch.compile(compute_losses, dynamic=False, backend=self.backend)

        def compute(targets):
            plain = {"iou_loss": iou_loss_ref, "sigmoid_focal_loss": sigmoid_focal_loss_ref}
            with mock.patch.multiple(fcos, **plain):
                return compiled(targets)

        return compute

    def with_flag(self, module, name, value, **how):
        """Return a step that runs with a flag of torch.backends set."""
        step = self.ours(**how)

        def run():
            before = getattr(module, name)
            setattr(module, name, value)
            step()
            setattr(module, name, before)

        return run

    def graph(self):
        """Return a replay of the whole compiled step, the update included."""
        replay, _ = device.capture(self.ours(compiled=True))
        return replay


# ---- the parts ---------------------------------------------------------------------------------


def eager_sides(case):
    sides = {
        "torchvision": case.torchvision,
        "torchvision, channels_last": lambda: case.torchvision(channels_last=True),
        "ours": case.ours,
        "ours, channels_last GroupNorm": lambda: case.ours(norm=True),
        "ours, fused SGD": lambda: case.ours(fused=True),
    }
    if CUDA:
        cudnn = torch.backends.cudnn
        sides["ours, cudnn.benchmark"] = lambda: case.with_flag(cudnn, "benchmark", True)
    return sides


def compiled_sides(case):
    return {
        "torchvision, compiled": lambda: case.torchvision(compiled=True, channels_last=True),
        "ours, compiled": lambda: case.ours(compiled=True),
    }


def further(name, **how):
    """Return the sides of a part that compares one change with the compiled step as it is."""

    def sides(case):
        return {
            "ours, compiled": lambda: case.ours(compiled=True),
            f"ours, compiled, {name}": lambda: case.ours(compiled=True, **how),
        }

    return sides


def graph_sides(case):
    return {
        "ours, compiled": lambda: case.ours(compiled=True),
        "ours, compiled, whole step as a CUDA graph": case.graph,
    }


def loss_sides(case):
    return {
        "ours, compiled": lambda: case.ours(compiled=True),
        "ours, compiled, with the loss": lambda: case.ours(loss=True),
    }


def dcn_sides(case):
    row = "fcos_imprv_dcnv2_R_50_FPN"
    matmul = torch.backends.cuda.matmul
    return {
        "float32": lambda: case.with_flag(matmul, "allow_tf32", False, row=row),
        "TF32": lambda: case.with_flag(matmul, "allow_tf32", True, row=row),
    }


def compare(log, args, sides, model="R-50"):
    case = Training(args.batch, args.size, args.backend)
    made = sides(case)
    log.compare(
        f"training {model}, batch {args.batch}, {args.size[0]}x{args.size[1]}, bf16 autocast",
        made,
        rounds=args.rounds,
        calls=2 if CUDA else 1,
        unit="images/s",
        per_call=args.batch,
        base=next(iter(made)),
    )


KINDS = {  # of kernels, by what their names contain; the first that fits
    "convolution": r"conv|implicit_gemm|xmma|cutlass|nvjet|gemm|wgrad|dgrad|fprop",
    "kernels/": r"^(iou_loss|focal_|assign|nms)",
    "fused by Inductor": r"triton",
    "norm": r"norm|moments|internalgradients",
    "copy": r"copy|memcpy|memset|padding",
    "elementwise and sums": r"",
}


def kind_of(kernel):
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower()))


def busy_ms(events):
    """Return the milliseconds in which at least one of the events runs."""
    total, end = 0.0, 0.0
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1000


@contextlib.contextmanager
def counted_bytes():
    """Yield a list that holds, at the end, the bytes that the compiled kernels read and write.

    Inductor counts the inputs and outputs of every kernel, convolutions included, while it
    compiles; a graph from its cache is not counted.
    """
    from torch._inductor import config, metrics

    logger = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # they are many lines
    metrics.reset()
    counted = []
    with config.patch(force_disable_caches=True):
        yield counted
    counted.append(metrics.num_bytes_accessed)
    logger.level, logger.propagate = before


def bench_profile(log, args):
    """Add the kernels of three training steps that take the most time on the device."""
    case = Training(args.batch, args.size, args.backend)
    with counted_bytes() as counted:
        compiled = case.ours(compiled=True)
        compiled()
    profile(log, args, "ours, compiled", compiled, counted[0])
    del compiled
    empty()
    profile(log, args, "ours", case.ours())


def profile(log, args, side, step, n_bytes=None, steps=3):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for _ in range(3):
        step()
    device.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    device.synchronize()
    wall = time.perf_counter() - start  # the profiler slows the launches
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
    with profiler(activities=activities) as result:
        for _ in range(steps):
            step()
        device.synchronize()
    on_cuda = torch.autograd.DeviceType.CUDA
    events = [e for e in result.events() if not CUDA or e.device_type == on_cuda]
    times = {}
    for event in events:
        times.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000 / steps)
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, values in times.items():
        kinds[kind_of(name)] += sum(values)
    busy = busy_ms(events) / steps
    row = log.add(
        what=f"profile of a training step, batch {args.batch}, {args.size[0]}x{args.size[1]}, bf16",
        side=side,
        wall_ms=1000 * wall / steps,
        busy_ms=busy,
        idle_ms=1000 * wall / steps - busy,
        launches=len(events) // steps,
        gigabytes=n_bytes and n_bytes / 1e9,
    )
    row["kinds"] = [f"{kind}: {ms:.3f} ms" for kind, ms in kinds.items()]
    largest = sorted(times.items(), key=lambda item: -sum(item[1]))[:25]
    row["kernels"] = [
        f"{sum(values):.3f} ms, {len(values) // steps} calls: {name[:120]}"
        for name, values in largest
    ]
    log.show(row)


def bench_epoch(log, args):
    """Add a row for each padded size of COCO's steps, the most frequent first.

    The first row compiles one graph for every size. An epoch takes the mean of the seconds a step,
    weighted by the shares.
    """
    rows = [r for r in json.loads(PADDING.read_text())["results"] if r["what"] == EPOCH]
    sizes = next(row["sizes"] for row in rows if row["multiple"] == args.multiple)
    if args.small:
        sizes = [[96, 128, 0.7], [64, 96, 0.3]]
    what = f"epoch of R-50, batch {args.batch}, bf16 autocast, multiple {args.multiple}"
    for dynamic in (False, True):
        torch._dynamo.reset()
        for h, w, share in sizes:
            side = f"ours, compiled {'for any size' if dynamic else 'for each size'}"
            row = log.add(what=what, side=side, size=[h, w], share=share, unit="images/s")
            with log.attempt(row):
                time_size(row, args, (h, w), dynamic)
                log.show(row)
            empty()


def time_size(row, args, hw, dynamic):
    """Fill a row of bench_epoch: the first step, which compiles, and the median of the others."""
    case = Training(args.batch, hw, args.backend)
    start = time.perf_counter()
    step = case.ours(compiled=True, dynamic=dynamic)
    step()
    device.synchronize()
    row["first_s"] = round(time.perf_counter() - start, 2)
    step()
    values = []
    for _ in range(args.rounds):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(2):
            step()
        device.synchronize()
        values.append(2 * args.batch / (time.perf_counter() - start))
    record.Record.summarise(row, values)


def empty():
    if CUDA:
        torch.cuda.empty_cache()


def part(sides, **more):
    return functools.partial(compare, sides=sides, **more)


PARTS = {
    "eager": part(eager_sides),
    "compiled": part(compiled_sides),
    "profile": bench_profile,
    "graph": part(graph_sides),
    "norm": part(further("channels_last GroupNorm", norm=True)),
    "loss": part(loss_sides),
    "conv": part(further("conv_1x1_as_mm", conv_1x1_as_mm=True)),
    "epoch": bench_epoch,
    "autotune": part(further("max-autotune", max_autotune=True, conv_1x1_as_mm=True)),
    "dcn": part(dcn_sides, model="dcnv2 R-50"),
}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--name", default="train" if CUDA else "train_cpu", help="of the JSON file")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), default=[800, 1333])
    parser.add_argument("--batch", type=int, default=16 if CUDA else 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--multiple", type=int, default=128, help="of the padded sizes of `epoch`")
    args = record.arguments(parser)
    args.backend = "inductor"
    if args.small:
        args.size, args.batch, args.rounds, args.backend = [96, 128], 1, 1, "eager"
    log = record.Record(args.folder and f"{args.folder}/{args.name}.json", parts=args.only)
    for name in args.only:
        log.common = {"part": name}
        row = {"what": name, "side": None}
        with log.attempt(row):
            PARTS[name](log, args)
        if "error" in row:
            log.add(**row)
        torch._dynamo.reset()
        empty()
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
