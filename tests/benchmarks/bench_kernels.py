"""The four kernels against torchvision and torch.compile on one GPU, and against its bandwidth.

    python tests/benchmarks/bench_kernels.py [FOLDER]     # writes FOLDER/kernels.json

`ms` is the time of a call as a program sees it, launches by Python included. `device_ms` is that of
its CUDA graph, the GPU's work alone; null for what waits for the GPU and cannot be captured. The
bytes behind `tb_per_s` are those that the kernels' docstrings count, whoever the contender is.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys

import cupy
import torch
import torchvision

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("FCOS_KERNELS", "cupy")  # a fallback must not pass for a kernel

from kernels.assign import assign  # noqa: E402
from kernels.focal_loss import sigmoid_focal_loss  # noqa: E402
from kernels.iou_loss import iou_loss, iou_loss_ref  # noqa: E402
from kernels.nms import batched_nms  # noqa: E402


def milliseconds(run, seconds=0.3):
    """The median over 10 rounds that fill about `seconds` together."""

    def rounds(count, repeat):
        times = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / repeat)
        return sorted(times)[count // 2]

    once = rounds(3, 1)
    if once > 100:  # ms; torchvision's NMS of 75,000 candidates
        return once
    return rounds(10, max(1, int(1e3 * seconds / 10 / max(once, 1e-3))))


def device_milliseconds(run):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay)


def measure(results, what, contender, run, n_bytes=None, capture=True):
    row = {"what": what, "contender": contender}
    results.append(row)
    try:
        for _ in range(3):  # compile, fill the allocator's cache
            run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        row["ms"] = milliseconds(run)
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["device_ms"] = device_milliseconds(run) if capture else None
        if n_bytes and capture:
            row["tb_per_s"] = n_bytes / row["device_ms"] / 1e9
    except Exception as error:  # the other contenders are worth having all the same
        row["error"] = repr(error)
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def forward_backward(loss, leaf, *args):
    return lambda: torch.autograd.grad(loss(leaf, *args), leaf)


def bench_copy(results):
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    measure(results, "copy 1 GiB", "torch", lambda: target.copy_(source), 2 * source.nbytes)


def bench_iou_loss(results):
    for n in (1_000_000, 16_000_000):
        pred, target = 1 + 63 * torch.rand(2, n, 4, device="cuda")
        weight = torch.rand(n, device="cuda")
        pred.requires_grad_()

        sign = torch.tensor([-1.0, -1, 1, 1], device="cuda")

        def eager(pred, target=target, weight=weight, sign=sign):  # torchvision takes corners
            loss = torchvision.ops.generalized_box_iou_loss(pred * sign, target * sign)
            return (loss * weight).sum()

        what = f"GIoU loss, {n} locations, forward + backward"
        compiled = torch.compile(iou_loss_ref, dynamic=False)
        measure(results, what, "kernel", forward_backward(iou_loss, pred, target, weight), 84 * n)
        measure(results, what, "torchvision", forward_backward(eager, pred), capture=False)
        run = forward_backward(compiled, pred, target, weight)
        measure(results, what, "torch.compile", run, 84 * n)


def plain_focal_loss(logits, labels):
    """On integer labels as operators that a compiler can fuse, the gradient left to autograd."""
    positive = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    x = logits.float()
    z = torch.where(positive, -x, x)
    loss = torch.where(positive, 0.25, 0.75) * z.sigmoid() ** 2 * torch.nn.functional.softplus(z)
    return loss.sum()


def bench_focal_loss(results):
    n, classes = 16 * 22_400, 80
    labels = torch.where(torch.rand(n, device="cuda") < 0.01, 7, -1)
    one_hot = torch.nn.functional.one_hot(labels + 1, classes + 1)[:, 1:]
    for dtype in (torch.float32, torch.bfloat16):
        logits = (2 * torch.randn(n, classes, device="cuda") - 4).to(dtype).requires_grad_()
        target = one_hot.to(dtype)  # given to torchvision for nothing

        def eager(logits, target=target):
            return torchvision.ops.sigmoid_focal_loss(logits, target, reduction="sum")

        what = f"focal loss, ({n}, {classes}) {dtype}, forward + backward"
        for contender, run in {
            "kernel": forward_backward(sigmoid_focal_loss, logits, labels),
            "torchvision": forward_backward(eager, logits),
            "torch.compile of torchvision": forward_backward(
                torch.compile(eager, dynamic=False), logits
            ),
            "torch.compile": forward_backward(
                torch.compile(plain_focal_loss, dynamic=False), logits, labels
            ),
        }.items():
            measure(results, what, contender, run, 3 * logits.nbytes + 16 * n)


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


def bench_assign(results):
    levels = []
    for stride, lo, hi in ((8, -1, 64), (16, 64, 128), (32, 128, 256), (64, 256, 512)):
        cells = (torch.arange(stride / 2, size, stride) for size in (800, 1344))
        y, x = torch.meshgrid(*cells, indexing="ij")
        level = torch.tensor([float(stride), lo, hi]).expand(x.numel(), 3)
        levels.append(torch.cat((torch.stack((x, y), dim=2).view(-1, 2), level), dim=1))
    points = torch.cat(levels).cuda()
    corner, size = torch.rand(2, 16, 500, 2, device="cuda") * torch.tensor([1200, 700]).cuda()
    boxes = list(torch.cat((corner, corner + size / 4), dim=2))
    what = f"assignment, 16 images x {len(points)} locations x 500 boxes"
    for contender, function in ("kernel", assign), ("vectorised PyTorch", vectorised_assign):
        measure(results, what, contender, lambda f=function: f(points, boxes, 1.5))


def bench_nms(results):
    for images, n in (1, 100), (1, 5000), (16, 5000), (16, 75_000):
        corner, size = torch.rand(2, images, n, 2, device="cuda")
        boxes = torch.cat((800 * corner, 800 * corner + 200 * size), dim=2)
        scores = torch.rand(images, n, device="cuda")
        labels = torch.randint(80, (images, n), device="cuda")

        def one_by_one(boxes=boxes, scores=scores, labels=labels):
            for image in zip(boxes, scores, labels):
                torchvision.ops.batched_nms(*image, 0.6)[:100]

        what = f"NMS, {images} images x {n} candidates x 80 classes"
        args = boxes, scores, labels, 0.6, 100
        measure(results, what, "kernel", lambda a=args: batched_nms(*a))
        measure(results, what, "torchvision", one_by_one, capture=False)


def main(folder):
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    results = []
    record = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0],
        "versions": {lib.__name__: lib.__version__ for lib in (torch, torchvision, cupy)},
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for bench in (bench_copy, bench_assign, bench_nms, bench_iou_loss, bench_focal_loss):
        try:
            bench(results)
        except Exception as error:
            results.append({"what": bench.__name__, "error": repr(error)})
            print(results[-1], flush=True)
        # After each one: what a time limit cuts off must not take the rest along.
        (folder / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
        torch.cuda.empty_cache()
    return any("error" in row for row in results)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py needs a CUDA device")
    default = pathlib.Path(__file__).parent / "results"
    raise SystemExit(main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default))
