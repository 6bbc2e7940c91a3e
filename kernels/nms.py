"""Class-aware greedy non-maximum suppression of a whole batch in one CUDA launch.

    keep = batched_nms(boxes, scores, labels, iou_threshold=0.6, max_detections=100)   # (B, 100)

`batched_nms_ref` is the same in plain PyTorch, and torchvision's compiled loop is what runs on the
CPU. The file needs nothing but PyTorch and torchvision, and CuPy for the kernel: copy it.
`python kernels/nms.py` compares them, then times them.

The usual kernel sorts the candidates, fills an N x N bit mask and reduces it one image at a time;
then the number of survivors has to reach the host. A detector wants its best 100, which needs
neither a sort nor a mask: take the best live candidate, suppress what it overlaps, 100 times, one
block an image. Time is O(N) a round, memory O(N). The output has a fixed shape and nothing goes to
the host, so that a CUDA graph can hold it.
"""

import functools
import os
import warnings

import numpy as np
import torch
import torchvision
from torch import Tensor

# ---- reference


def batched_nms_ref(boxes, scores, labels, iou_threshold, max_detections):
    """`batched_nms` in plain PyTorch: what the kernel and the CPU must reproduce."""
    (B, N), D = scores.shape, max_detections
    keep = torch.full((B, D), -1, dtype=torch.int64, device=boxes.device)
    if N == 0:
        return keep
    live = scores.float()
    live = torch.where(live.isnan(), -torch.inf, live)  # a copy; what is done with becomes -inf
    x1, y1, x2, y2 = boxes.float().unbind(2)
    area = (x2 - x1) * (y2 - y1)
    for d in range(D):
        score, best = live.max(dim=1, keepdim=True)  # the first of equal scores
        found = score > -torch.inf
        if live.device.type == "cpu" and not found.any():  # on a GPU this would cost a wait
            break
        keep[:, d : d + 1] = torch.where(found, best, -1)
        best_x1, best_y1, best_x2, best_y2 = (side.gather(1, best) for side in (x1, y1, x2, y2))
        width = (torch.minimum(x2, best_x2) - torch.maximum(x1, best_x1)).clamp(min=0)
        height = (torch.minimum(y2, best_y2) - torch.maximum(y1, best_y1)).clamp(min=0)
        inter = width * height
        iou = inter / (area + area.gather(1, best) - inter)  # NaN, which suppresses nothing, if 0/0
        suppressed = (iou > iou_threshold) & (labels == labels.gather(1, best))
        live.masked_fill_(suppressed, -torch.inf).scatter_(1, best, -torch.inf)
    return keep


# ---- CPU


@torch.compiler.disable
def _nms_cpu(boxes, scores, labels, iou_threshold, max_detections):
    """`batched_nms` on the CPU, of one image after another."""
    keep = torch.full((len(scores), max_detections), -1)
    for row, box, score, label in zip(keep, boxes, scores, labels):
        order = score.sort(descending=True, stable=True).indices  # of equal scores the first
        order = order[score[order] > -torch.inf]  # without padding, NaN included
        # Worse candidates never change the fate of better ones: look at the best first.
        seen = 2 * max_detections
        kept = _nms_of_classes(order[:seen], box, score, label, iou_threshold)
        while len(kept) < max_detections and seen < len(order):
            seen *= 4
            kept = _nms_of_classes(order[:seen], box, score, label, iou_threshold)
        kept = kept[:max_detections]
        row[: len(kept)] = kept
    return keep


def _nms_of_classes(order, boxes, scores, labels, iou_threshold):
    """Return the candidates of `order`, best first, that torchvision's loop keeps in each class."""
    by_class, place = labels[order].sort(stable=True)
    counts = by_class.unique_consecutive(return_counts=True)[1].tolist()
    # torchvision compares in double, where an IoU of float32 0.6 would exceed 0.6
    threshold = float(np.float32(iou_threshold))
    kept = [
        places[torchvision.ops.nms(boxes[order[places]], scores[order[places]], threshold)]
        if len(places) > 1
        else places
        for places in place.split(counts)
    ]
    return order[torch.cat(kept).sort().values] if kept else order


# ---- kernel

CUDA_SOURCE = r"""
// Unsigned numbers in the order of the scores, all above 0; 0 for padding (-inf, NaN). Of finite
// scores only the bits count: CuPy compiles with -ftz=true, which makes subnormal numbers zero.
__device__ unsigned order(float score)
{
    if (!(score > __uint_as_float(0xff800000u))) return 0;
    const unsigned bits = __float_as_uint(score);
    if (bits == 0x80000000u) return bits;  // -0 is 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float area(float4 box) { return (box.z - box.x) * (box.w - box.y); }

__device__ float box_iou(float4 a, float4 b)
{
    const float width = fmaxf(fminf(a.z, b.z) - fmaxf(a.x, b.x), 0.0f);
    const float height = fmaxf(fminf(a.w, b.w) - fmaxf(a.y, b.y), 0.0f);
    const float inter = width * height;
    return inter / (area(a) + area(b) - inter);
}

__device__ unsigned long long warp_max(unsigned long long x)
{
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, x, lanes);
        x = other > x ? other : x;
    }
    return x;
}

// One block an image; a thread owns candidates threadIdx.x, threadIdx.x + blockDim.x, ...
extern "C" __global__ void nms(
    const float4* boxes,      // (B, n) x1, y1, x2, y2
    const float* scores,      // (B, n)
    const long long* labels,  // (B, n)
    unsigned* keys,           // (B, n) scratch: order(score) while a candidate lives, then 0
    long long* keep,          // (B, max_detections) out
    int n, int max_detections, float iou_threshold)
{
    __shared__ unsigned long long warp_best[2][32];
    boxes += (long long)blockIdx.x * n;
    scores += (long long)blockIdx.x * n;
    labels += (long long)blockIdx.x * n;
    keys += (long long)blockIdx.x * n;
    keep += (long long)blockIdx.x * max_detections;
    for (int i = threadIdx.x; i < n; i += blockDim.x) keys[i] = order(scores[i]);

    const int warps = blockDim.x / 32;
    int kept = -1, round = 0;
    float4 box = {0.0f, 0.0f, 0.0f, 0.0f};  // nothing overlaps this one
    long long label = 0;
    for (; round < max_detections; ++round) {
        // One sweep suppresses for the last round's winner and looks for this round's.
        unsigned long long best = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const unsigned key = keys[i];
            if (key == 0) continue;
            if (i == kept || (labels[i] == label && box_iou(boxes[i], box) > iou_threshold)) {
                keys[i] = 0;
                continue;
            }
            // Score above, complement of the index below: of equal scores the first wins.
            const unsigned long long candidate = (unsigned long long)key << 32 | ~(unsigned)i;
            best = candidate > best ? candidate : best;
        }
        // Alternate rows of shared memory: a warp that is a round ahead writes where nobody reads,
        // so that one barrier a round is enough.
        unsigned long long* row = warp_best[round % 2];
        best = warp_max(best);
        if (threadIdx.x % 32 == 0) row[threadIdx.x / 32] = best;
        __syncthreads();
        best = warp_max(threadIdx.x % 32 < warps ? row[threadIdx.x % 32] : 0);
        if (best == 0) break;  // every thread has the same best
        kept = (int)~(unsigned)best;
        box = boxes[kept];
        label = labels[kept];
        if (threadIdx.x == 0) keep[round] = kept;
    }
    for (int i = round + threadIdx.x; i < max_detections; i += blockDim.x) keep[i] = -1;
}
"""
KERNELS, OPTIONS = ("nms",), ("--fmad=false",)  # no fused rounding: bit for bit PyTorch


# ---- launcher: the same lines in every kernel file, because a file is copied whole


@torch.compiler.disable
@functools.cache
def _load(device, choice):
    """The kernels compiled for GPU number `device`; if that fails, None after a warning, or with
    FCOS_KERNELS=cupy, or while a CUDA graph is captured, an ImportError."""
    try:
        import cupy  # only here: importing this file needs neither CuPy nor a GPU

        module = cupy.RawModule(code=CUDA_SOURCE, options=OPTIONS)
        with torch.cuda.device(device):
            return {name: module.get_function(name) for name in KERNELS}
    except Exception as error:  # what is raised is not cached
        if choice == "cupy" or torch.cuda.is_current_stream_capturing():
            raise ImportError(f"{error!r}: pip install cupy-cuda13x, or run it earlier") from error
        warnings.warn(f"{__name__}: PyTorch runs instead of the kernel: {error!r}", stacklevel=5)


def _use_kernel(like):
    """Whether the kernel serves this tensor. FCOS_KERNELS=cupy or torch forces the answer."""
    choice = os.environ.get("FCOS_KERNELS", "")
    if choice not in ("", "cupy", "torch"):
        raise ValueError(f"FCOS_KERNELS is {choice!r}; choose cupy or torch, or unset it")
    return like.is_cuda and choice != "torch" and _load(like.device.index, choice) is not None


def _launch(name, grid, threads, *args):
    """Run a kernel on the device and stream that PyTorch is using. CuPy checks no argument: tensors
    must be contiguous, numbers are numpy scalars of the width in the CUDA text."""
    import cupy

    device = args[0].device
    values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in args)
    with torch.cuda.device(device), cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        _load(device.index, os.environ.get("FCOS_KERNELS", ""))[name](grid, (threads,), values)


# ---- operator


@torch.compiler.disable
def _nms_kernel(boxes, scores, labels, iou_threshold, max_detections):
    B, N = scores.shape
    keys = torch.empty((B, N), dtype=torch.int32, device=boxes.device)
    keep = torch.empty((B, max_detections), dtype=torch.int64, device=boxes.device)
    threads = min(1024, max(32, -(-N // 32) * 32))
    boxes = boxes.clone(memory_format=torch.contiguous_format)  # which aligns it, too
    tensors = boxes, scores.contiguous(), labels.contiguous(), keys, keep
    numbers = np.int32(N), np.int32(max_detections), np.float32(iou_threshold)
    _launch("nms", (B,), threads, *tensors, *numbers)
    return keep


@torch.no_grad()
def batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """Greedy NMS inside each class of each image, stopped at the best max_detections of an image.

    boxes: (B, N, 4) x1, y1, x2, y2; scores: (B, N); labels: (B, N) integers, any number of classes.
    The arithmetic is fp32. A candidate goes when its IoU with a better kept one of its label is
    strictly above iou_threshold; no class offsets are added to the boxes, which would cost their
    precision. Scores of -inf and NaN are padding: never kept, never suppressing. Of equal scores
    the lower index is the better. Boxes without area overlap nothing.

    Returns (B, max_detections) int64: indices by falling score, then -1. Not differentiable.

    Raises ValueError for other shapes and devices, thresholds outside [0, 1], max_detections < 1.
    """
    shape = scores.shape
    if len(shape) != 2 or boxes.shape != (*shape, 4) or labels.shape != shape:
        raise ValueError(
            f"boxes is {tuple(boxes.shape)}, scores {tuple(shape)}, labels "
            f"{tuple(labels.shape)}; not (B, N, 4), (B, N), (B, N): add [None]"
        )
    if not boxes.device == scores.device == labels.device:
        raise ValueError(f"boxes is on {boxes.device}; move scores and labels there as well")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must lie in [0, 1]")
    if max_detections < 1:
        raise ValueError(f"max_detections is {max_detections}; it must be 1 or more")
    boxes, scores, labels = boxes.float(), scores.float(), labels.long()
    if len(boxes) and _use_kernel(boxes):
        run = _nms_kernel
    elif boxes.device.type == "cpu":
        run = _nms_cpu
    else:
        run = batched_nms_ref
    return run(boxes, scores, labels, iou_threshold, max_detections)


# ---- compare, then time

if __name__ == "__main__":
    from torch.utils.benchmark import Timer

    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU no fallback may pass for the kernel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corner, size = (torch.randint(high, (2, 5000, 2), device=device) for high in (800, 200))
    boxes, scores = torch.cat((corner, corner + size), dim=2).float(), torch.rand(2, 5000)
    args = boxes, scores.to(device), torch.randint(80, (2, 5000), device=device), 0.5, 100
    assert torch.equal(batched_nms(*args), batched_nms_ref(*args))
    for call in (batched_nms, batched_nms_ref):
        ms = 1e3 * Timer("call(*args)", globals=globals()).timeit(10).mean
        print(f"{call.__name__} on the {device}: {ms:.3f} ms")
