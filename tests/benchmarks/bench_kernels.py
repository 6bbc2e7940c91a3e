"""The four kernels against torchvision and torch.compile on one GPU, and against its bandwidth.

    python tests/benchmarks/bench_kernels.py [FOLDER]     # writes FOLDER/kernels.json

`ms` is the time of a call as a program sees it, launches by Python included. `device_ms` is that of
its CUDA graph, the GPU's work alone; null for what waits for the GPU and cannot be captured. The
bytes behind `tb_per_s` are those that the kernels need, whoever the contender is: for the IoU loss
84 a location, for the focal loss the logits three times and the labels twice.
"""

import argparse

import record
import torch
import torchvision
from record import CUDA, DEVICE, device

from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss
from kernels.iou_loss import iou_loss, iou_loss_ref
from kernels.nms import batched_nms


class Bench:
    """The rows of kernels.json; `size(full, small)` chooses by --small."""

    def __init__(self, log, small):
        self.log, self.small = log, small

    def size(self, full, small):
        return small if self.small else full

    def compiled(self, function):
        backend = "eager" if self.small else "inductor"  # small: whether it runs at all
        return torch.compile(function, dynamic=False, backend=backend)

    def measure(self, what, contender, run, n_bytes=None, capture=True):
        row = self.log.add(what=what, contender=contender)
        with self.log.attempt(row):
            for _ in range(3):  # compile, fill the allocator's cache
                run()
            row["ms"] = device.milliseconds(run, 0.01 if self.small else 0.3)
            row["peak_mib"] = device.peak_bytes(run) / 2**20
            if capture:
                replay, _ = device.capture(run)
                row["device_ms"] = device.milliseconds(replay, 0.01 if self.small else 0.3)
                if n_bytes:
                    row["tb_per_s"] = n_bytes / row["device_ms"] / 1e9
            self.log.show(row)


def forward_backward(loss, leaf, *args):
    return lambda: torch.autograd.grad(loss(leaf, *args), leaf)


def bench_copy(bench):
    source = torch.empty(bench.size(1 << 30, 1 << 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bench.measure("copy 1 GiB", "torch", lambda: target.copy_(source), 2 * source.nbytes)


def bench_iou_loss(bench):
    for n in bench.size((1_000_000, 16_000_000), (1000,)):
        pred, target = 1 + 63 * torch.rand(2, n, 4, device=DEVICE)
        weight = torch.rand(n, device=DEVICE)
        pred.requires_grad_()

        sign = torch.tensor([-1.0, -1, 1, 1], device=DEVICE)

        def eager(pred, target=target, weight=weight, sign=sign):  # torchvision takes corners
            loss = torchvision.ops.generalized_box_iou_loss(pred * sign, target * sign)
            return (loss * weight).sum()

        what = f"GIoU loss, {n} locations, forward + backward"
        compiled = bench.compiled(iou_loss_ref)
        bench.measure(what, "kernel", forward_backward(iou_loss, pred, target, weight), 84 * n)
        bench.measure(what, "torchvision", forward_backward(eager, pred), capture=False)
        run = forward_backward(compiled, pred, target, weight)
        bench.measure(what, "torch.compile", run, 84 * n)


def plain_focal_loss(logits, labels):
    """On integer labels as operators that a compiler can fuse, the gradient left to autograd."""
    positive = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    x = logits.float()
    z = torch.where(positive, -x, x)
    loss = torch.where(positive, 0.25, 0.75) * z.sigmoid() ** 2 * torch.nn.functional.softplus(z)
    return loss.sum()


def bench_focal_loss(bench):
    n, classes = bench.size(16 * 22_400, 100), 80
    labels = torch.where(torch.rand(n, device=DEVICE) < 0.01, 7, -1)
    one_hot = torch.nn.functional.one_hot(labels + 1, classes + 1)[:, 1:]
    for dtype in (torch.float32, torch.bfloat16):
        logits = (2 * torch.randn(n, classes, device=DEVICE) - 4).to(dtype).requires_grad_()
        target = one_hot.to(dtype)  # given to torchvision for nothing

        def eager(logits, target=target):
            return torchvision.ops.sigmoid_focal_loss(logits, target, reduction="sum")

        what = f"focal loss, ({n}, {classes}) {dtype}, forward + backward"
        for contender, run in {
            "kernel": forward_backward(sigmoid_focal_loss, logits, labels),
            "torchvision": forward_backward(eager, logits),
            "torch.compile of torchvision": forward_backward(bench.compiled(eager), logits),
            "torch.compile": forward_backward(bench.compiled(plain_focal_loss), logits, labels),
        }.items():
            bench.measure(what, contender, run, 3 * logits.nbytes + 16 * n)


def vectorised_assign(points, boxes, radius):
    """All locations x all boxes of an image at once: how it is usually written."""
    x, y, stride, lo, hi = points.T[:, :, None]
    out = []
    for box in boxes:
        ltrb = torch.stack((x - box[:, 0], y - box[:, 1], box[:, 2] - x, box[:, 3] - y), dim=2)
        centre, reach = (box[:, :2] + box[:, 2:]) / 2, radius * stride
        near = ((x - centre[:, 0]).abs() < reach) & ((y - centre[:, 1]).abs() < reach)
        far = ltrb.amax(dim=2)
        candidate = near & (ltrb.amin(dim=2) > 0) & (far >= lo) & (far <= hi)
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        area, index = torch.where(candidate, area, torch.inf).min(dim=1)
        out.append(torch.where(area < torch.inf, index, -1))
    return torch.stack(out)


def bench_assign(bench):
    images, hw, n = bench.size((16, (800, 1344), 500), (2, (96, 128), 5))
    levels = []
    for stride, lo, hi in ((8, -1, 64), (16, 64, 128), (32, 128, 256), (64, 256, 512)):
        cells = (torch.arange(stride / 2, size, stride) for size in hw)
        y, x = torch.meshgrid(*cells, indexing="ij")
        level = torch.tensor([float(stride), lo, hi]).expand(x.numel(), 3)
        levels.append(torch.cat((torch.stack((x, y), dim=2).view(-1, 2), level), dim=1))
    points = torch.cat(levels).to(DEVICE)
    corner, size = torch.rand(2, images, n, 2, device=DEVICE) * torch.tensor([1200, 700]).to(DEVICE)
    boxes = list(torch.cat((corner, corner + size / 4), dim=2))
    what = f"assignment, {images} images x {len(points)} locations x {n} boxes"
    for contender, function in ("kernel", assign), ("vectorised PyTorch", vectorised_assign):
        bench.measure(what, contender, lambda f=function: f(points, boxes, 1.5))


def bench_nms(bench):
    cases = (1, 100), (1, 5000), (16, 5000), (16, 75_000)
    for images, n in bench.size(cases, ((2, 100),)):
        corner, size = torch.rand(2, images, n, 2, device=DEVICE)
        boxes = torch.cat((800 * corner, 800 * corner + 200 * size), dim=2)
        scores = torch.rand(images, n, device=DEVICE)
        labels = torch.randint(80, (images, n), device=DEVICE)

        def one_by_one(boxes=boxes, scores=scores, labels=labels):
            for image in zip(boxes, scores, labels):
                torchvision.ops.batched_nms(*image, 0.6)[:100]

        what = f"NMS, {images} images x {n} candidates x 80 classes"
        args = boxes, scores, labels, 0.6, 100
        bench.measure(what, "kernel", lambda a=args: batched_nms(*a))
        bench.measure(what, "torchvision", one_by_one, capture=False)


def main():
    args = record.arguments(argparse.ArgumentParser(description=__doc__, allow_abbrev=False))
    log = record.Record(args.folder and f"{args.folder}/kernels.json")
    bench = Bench(log, args.small)
    for run in (bench_copy, bench_assign, bench_nms, bench_iou_loss, bench_focal_loss):
        row = {"what": run.__name__, "contender": None}
        with log.attempt(row):
            run(bench)
        if "error" in row:
            log.add(**row)
        if CUDA:
            torch.cuda.empty_cache()
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
