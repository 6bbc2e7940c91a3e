"""Class-aware greedy non-maximum suppression of a whole batch in one CUDA launch.

    keep = batched_nms(boxes, scores, labels, iou_threshold=0.6, max_detections=100)   # (B, 100)

`batched_nms_ref` is the same in plain PyTorch. On the CPU, torchvision's compiled NMS runs. To use
this elsewhere, copy the file: it needs PyTorch and torchvision, and CuPy for the kernel.
`python kernels/nms.py` compares the two and times them.

The usual kernel sorts the candidates, fills an N x N bit mask, reduces it one image at a time, and
copies the number of survivors to the host. A detector keeps only its best 100 boxes, which needs
neither a sort nor a mask: 100 times, one block per image takes the best remaining candidate and
suppresses those that overlap it. Each round takes O(N) time; memory is O(N). The output has a fixed
shape and nothing is copied to the host, so a CUDA graph can contain it.
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
    """Compute `batched_nms` in plain PyTorch: the reference for the kernel and for the CPU."""
    B, N = scores.shape
    keep = torch.full((B, max_detections), -1, dtype=torch.int64, device=boxes.device)
    if N == 0:
        return keep
    # The scores of the remaining candidates. Kept and suppressed ones become -inf, like padding.
    remaining = scores.float()
    remaining = torch.where(remaining.isnan(), -torch.inf, remaining)
    x1, y1, x2, y2 = boxes.float().unbind(2)
    area = (x2 - x1) * (y2 - y1)
    for d in range(max_detections):
        score, best = remaining.max(dim=1, keepdim=True)  # the first of equal scores
        found = score > -torch.inf
        # On a GPU, this check would wait for the result.
        if remaining.device.type == "cpu" and not found.any():
            break
        keep[:, d : d + 1] = torch.where(found, best, -1)
        best_x1, best_y1, best_x2, best_y2 = (side.gather(1, best) for side in (x1, y1, x2, y2))
        width = (torch.minimum(x2, best_x2) - torch.maximum(x1, best_x1)).clamp(min=0)
        height = (torch.minimum(y2, best_y2) - torch.maximum(y1, best_y1)).clamp(min=0)
        inter = width * height
        iou = inter / (area + area.gather(1, best) - inter)  # 0/0 is NaN and suppresses nothing
        suppressed = (iou > iou_threshold) & (labels == labels.gather(1, best))
        remaining.masked_fill_(suppressed, -torch.inf)
        remaining.scatter_(1, best, -torch.inf)
    return keep


# ---- CPU


@torch.compiler.disable
def _nms_cpu(boxes, scores, labels, iou_threshold, max_detections):
    """Compute `batched_nms` on the CPU, one image after another."""
    keep = torch.full((len(scores), max_detections), -1)
    for row, box, score, label in zip(keep, boxes, scores, labels):
        order = score.sort(descending=True, stable=True).indices  # ties keep their order
        order = order[score[order] > -torch.inf]  # drops padding and NaN
        # Only a better candidate can suppress another: look at the best few, at more if needed.
        seen = 2 * max_detections
        kept = _nms_of_classes(order[:seen], box, score, label, iou_threshold)
        while len(kept) < max_detections and seen < len(order):
            seen *= 4
            kept = _nms_of_classes(order[:seen], box, score, label, iou_threshold)
        kept = kept[:max_detections]
        row[: len(kept)] = kept
    return keep


def _nms_of_classes(order, boxes, scores, labels, iou_threshold):
    """Suppress inside each class; return the kept candidates of `order`, best first.

    order: indices of the candidates of one image, best first.
    """
    if len(order) == 0:
        return order
    by_class, places = labels[order].sort(stable=True)  # places in `order`, class by class
    counts = by_class.unique_consecutive(return_counts=True)[1].tolist()
    # torchvision compares with a double: an IoU of 0.6 in float32 is more than 0.6 in double.
    threshold = float(np.float32(iou_threshold))
    kept = []
    for places_of_class in places.split(counts):
        if len(places_of_class) > 1:
            members = order[places_of_class]
            chosen = torchvision.ops.nms(boxes[members], scores[members], threshold)
            places_of_class = places_of_class[chosen]
        kept.append(places_of_class)
    return order[torch.cat(kept).sort().values]


# ---- kernel

CUDA_SOURCE = r"""
// Map scores to unsigned numbers above 0 in the same order; padding (-inf, NaN) becomes 0. The bits
// are compared, because CuPy compiles with -ftz=true, which turns subnormal numbers into zero.
__device__ unsigned order(float score)
{
    if (!(score > __uint_as_float(0xff800000u))) return 0;
    const unsigned bits = __float_as_uint(score);
    if (bits == 0x80000000u) return bits;  // -0 equals 0
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

// One block per image; a thread owns candidates threadIdx.x, threadIdx.x + blockDim.x, ...
extern "C" __global__ void nms(
    const float4* boxes,      // (B, n) x1, y1, x2, y2
    const float* scores,      // (B, n)
    const long long* labels,  // (B, n)
    unsigned* keys,           // (B, n) scratch: order(score) of a remaining candidate, else 0
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
    float4 box = {0.0f, 0.0f, 0.0f, 0.0f};  // suppresses nothing in the first round
    long long label = 0;
    for (; round < max_detections; ++round) {
        // One pass suppresses what the last round's box overlaps, and finds this round's best.
        unsigned long long best = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const unsigned key = keys[i];
            if (key == 0) continue;
            if (i == kept || (labels[i] == label && box_iou(boxes[i], box) > iou_threshold)) {
                keys[i] = 0;
                continue;
            }
            // The score, then the complement of the index, so that the first of equal scores wins.
            const unsigned long long candidate = (unsigned long long)key << 32 | ~(unsigned)i;
            best = candidate > best ? candidate : best;
        }
        // Two rows of shared memory alternate: a warp that is one round ahead writes to the row
        // that no other warp reads, so that one barrier per round is enough.
        unsigned long long* row = warp_best[round % 2];
        best = warp_max(best);
        if (threadIdx.x % 32 == 0) row[threadIdx.x / 32] = best;
        __syncthreads();
        best = warp_max(threadIdx.x % 32 < warps ? row[threadIdx.x % 32] : 0);
        if (best == 0) break;  // all threads leave together: they have the same best
        kept = (int)~(unsigned)best;
        box = boxes[kept];
        label = labels[kept];
        if (threadIdx.x == 0) keep[round] = kept;
    }
    for (int i = round + threadIdx.x; i < max_detections; i += blockDim.x) keep[i] = -1;
}
"""
KERNELS = ("nms",)
OPTIONS = ("--fmad=false",)  # without fused multiply-adds, results equal PyTorch's bit for bit


# ---- launcher: the same lines in every kernel file, so that each file can be copied alone


@torch.compiler.disable
@functools.cache
def _load(device, choice):
    """Compile the kernels for GPU number `device` and return them by name.

    If that fails, warn and return None: PyTorch runs instead. Raises ImportError instead of warning
    if FCOS_KERNELS is "cupy", and while a CUDA graph is captured.
    """
    try:
        import cupy  # imported only here: on a CPU this file must work without CuPy

        module = cupy.RawModule(code=CUDA_SOURCE, options=OPTIONS)
        with torch.cuda.device(device):
            return {name: module.get_function(name) for name in KERNELS}
    except Exception as error:
        cuda = (torch.version.cuda or "13").partition(".")[0]
        problem = f"{error!r}; to install CuPy: pip install cupy-cuda{cuda}x"
        if torch.cuda.is_current_stream_capturing():
            raise ImportError(f"{problem}; call the kernel once before the capture") from error
        if choice == "cupy":
            raise ImportError(problem) from error
        warnings.warn(f"{__name__}: PyTorch runs instead of the kernel: {problem}", stacklevel=5)
        return None


def _use_kernel(tensor):
    """Return whether the kernel runs for this tensor. FCOS_KERNELS=cupy or torch forces one."""
    choice = os.environ.get("FCOS_KERNELS", "")
    if choice not in ("", "cupy", "torch"):
        raise ValueError(f"FCOS_KERNELS is {choice!r}; choose cupy or torch, or unset it")
    return tensor.is_cuda and choice != "torch" and _load(tensor.device.index, choice) is not None


def _launch(name, grid, threads, *args):
    """Launch a kernel on PyTorch's current stream.

    args: contiguous tensors, and NumPy scalars of exactly the types that the CUDA text declares.
    CuPy checks neither. The first argument is a tensor.
    """
    import cupy

    device = args[0].device
    kernel = _load(device.index, os.environ.get("FCOS_KERNELS", ""))[name]
    values = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
    with torch.cuda.device(device), cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        kernel(grid, (threads,), values)


# ---- operator


@torch.compiler.disable
def _nms_kernel(boxes, scores, labels, iou_threshold, max_detections):
    """Compute `batched_nms` with the kernel, in one launch."""
    B, N = scores.shape
    keys = torch.empty((B, N), dtype=torch.int32, device=boxes.device)
    keep = torch.empty((B, max_detections), dtype=torch.int64, device=boxes.device)
    threads = min(1024, max(32, -(-N // 32) * 32))  # whole warps
    boxes = boxes.clone(memory_format=torch.contiguous_format)  # starts at a multiple of 16 bytes
    tensors = boxes, scores.contiguous(), labels.contiguous(), keys, keep
    numbers = np.int32(N), np.int32(max_detections), np.float32(iou_threshold)
    _launch("nms", (B,), threads, *tensors, *numbers)
    return keep


@torch.no_grad()
def batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """Return the max_detections best candidates of each image after greedy NMS in each class.

    boxes: (B, N, 4) x1, y1, x2, y2; scores: (B, N); labels: (B, N) integers, any number of classes.
    The arithmetic is fp32. A candidate is suppressed if its IoU with a better kept one of the same
    label is strictly above iou_threshold. The boxes are not shifted by class, which would cost
    precision. Scores of -inf and NaN are padding: such candidates are not kept and suppress no
    other. Among equal scores the lower index comes first. Boxes without area overlap nothing.

    Returns int64 (B, max_detections): indices by falling score, then -1. Not differentiable.

    Raises ValueError for wrong shapes or devices, an iou_threshold outside [0, 1], or a
    max_detections below 1.
    """
    shape = scores.shape
    if len(shape) != 2 or boxes.shape != (*shape, 4) or labels.shape != shape:
        raise ValueError(
            "expected boxes (B, N, 4), scores (B, N) and labels (B, N), found "
            f"{tuple(boxes.shape)}, {tuple(shape)} and {tuple(labels.shape)}"
        )
    if not boxes.device == scores.device == labels.device:
        raise ValueError(f"boxes is on {boxes.device}; move scores and labels there as well")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold {iou_threshold}: expected a number in [0, 1]")
    if max_detections < 1:
        raise ValueError(f"max_detections {max_detections}: expected 1 or more")
    boxes = boxes.float()
    scores = scores.float()
    labels = labels.long()
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

    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU, fail instead of falling back to PyTorch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corner = torch.randint(800, (2, 5000, 2), device=device)
    size = torch.randint(200, (2, 5000, 2), device=device)
    boxes = torch.cat((corner, corner + size), dim=2).float()
    scores = torch.rand(2, 5000, device=device)
    labels = torch.randint(80, (2, 5000), device=device)
    args = boxes, scores, labels, 0.5, 100
    assert torch.equal(batched_nms(*args), batched_nms_ref(*args))
    for call in (batched_nms, batched_nms_ref):
        ms = 1e3 * Timer("call(*args)", globals=globals()).timeit(10).mean
        print(f"{call.__name__} on the {device}: {ms:.3f} ms")
