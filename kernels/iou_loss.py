"""IoU losses on distances to the four sides of a box: value and gradient in one CUDA kernel.

    loss = iou_loss(pred, target, weight, kind="giou")    # the weighted sum, differentiable

`iou_loss_ref` is the same in plain PyTorch. The file needs nothing but PyTorch, and CuPy for the
kernel: copy it. `python kernels/iou_loss.py` compares the two, then times them.

As PyTorch operators the loss is some forty launches over (N, 4) tensors; here forward is two and
backward one. Forward moves 52 bytes a location (20 where weight is 0), backward 32.
"""

import functools
import os
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---- reference


def iou(pred: Tensor, target: Tensor) -> Tensor:
    """(I + 1) / (U + 1), the official code's IoU, of two boxes around the same location.

    pred, target: (..., 4) distances left, top, right, bottom to the sides, in pixels or strides
    (the 1 makes the unit matter). Returns (...), fp32 or, of float64, float64; differentiable.
    Raises ValueError for another shape.
    """
    if pred.shape != target.shape or pred.shape[-1:] != (4,):
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)}: not (..., 4)")
    inter, union, _ = _areas(pred, target)
    return (inter + 1) / (union + 1)


def _areas(pred, target):
    """Return the areas of the intersection, the union and the hull, (...) each.

    The hull is the smallest box around both. 1e-7 is added to it, as in the official code.
    """
    if pred.dtype != torch.float64:
        pred, target = pred.float(), target.float()
    inter, hull = _area(torch.minimum(pred, target)), _area(torch.maximum(pred, target))
    union = _area(pred) + _area(target) - inter
    return inter, union, hull + 1e-7


def _area(ltrb):
    left, top, right, bottom = ltrb.unbind(-1)
    return (left + right) * (top + bottom)


def _giou(pred, target):
    inter, union, hull = _areas(pred, target)
    return (inter + 1) / (union + 1) - (hull - union) / hull


def _giou_exact(pred, target):
    inter, union, hull = _areas(pred, target)
    return inter / (union + 1e-7) - (hull - union) / hull


# The loss of each location by kind, (..., 4) and (..., 4) to (...). A new kind is one more entry:
# what CUDA_KINDS below does not name runs as PyTorch, on a GPU too.
KINDS = {
    "iou": lambda pred, target: -iou(pred, target).log(),
    "linear_iou": lambda pred, target: 1 - iou(pred, target),
    "giou": lambda pred, target: 1 - _giou(pred, target),
    "giou_exact": lambda pred, target: 1 - _giou_exact(pred, target),
}


def iou_loss_ref(pred, target, weight, kind="giou"):
    """`iou_loss` in plain PyTorch: what the kernel must reproduce, and what runs on the CPU."""
    # torch.where on the inputs, not on the loss: the gradient would bring 0 * NaN back.
    counts = (weight != 0)[:, None]
    pred, target = torch.where(counts, pred, 1), torch.where(counts, target, 1)
    loss = KINDS[kind](pred, target)
    return (weight.to(loss.dtype) * loss).sum()


# ---- kernel

CUDA_SOURCE = r"""
// d min(p, t) / dp: 1 or 0, and torch.minimum's 0.5 at a tie. d max(p, t) / dp is 1 minus that.
__device__ float min_slope(float p, float t) { return p < t ? 1.0f : p > t ? 0.0f : 0.5f; }

// The sum over a block, added in a fixed order: the same bits on every run.
__device__ float block_sum(float x)
{
    __shared__ float warp_sum[32];
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += warp_sum[warp];
    return sum;
}

extern "C" __global__ void iou_loss(
    const float4* pred,      // (n) left, top, right, bottom
    const float4* target,    // (n)
    const float* weight,     // (n)
    float4* grad,            // (n) out: d(weight * loss) / d pred; null when nobody asks for it
    float* partial,          // (gridDim.x) out: this block's share of the sum
    long long n, int kind)   // kind as in CUDA_KINDS
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const float w = i < n ? weight[i] : 0.0f;
    float loss = 0.0f;
    float4 g = {0.0f, 0.0f, 0.0f, 0.0f};
    if (w != 0.0f) {
        const float4 p = pred[i], t = target[i];
        const float p_width = p.x + p.z, p_height = p.y + p.w;
        const float i_width = fminf(p.x, t.x) + fminf(p.z, t.z);
        const float i_height = fminf(p.y, t.y) + fminf(p.w, t.w);
        const float inter = i_width * i_height;
        const float uni = p_width * p_height + (t.x + t.z) * (t.y + t.w) - inter;
        const float above = kind == 3 ? 0.0f : 1.0f, below = kind == 3 ? 1e-7f : 1.0f;
        const float iou = (inter + above) / (uni + below);

        // The derivatives of the loss by the areas of the intersection, of pred and of the hull.
        float d_inter = -(1.0f + iou) / (uni + below), d_area = iou / (uni + below), d_hull = 0.0f;
        const float h_width = fmaxf(p.x, t.x) + fmaxf(p.z, t.z);
        const float h_height = fmaxf(p.y, t.y) + fmaxf(p.w, t.w);
        if (kind == 0) {
            loss = -logf(iou);
            d_inter /= iou;
            d_area /= iou;
        } else if (kind == 1) {
            loss = 1.0f - iou;
        } else if (kind == 2 || kind == 3) {
            const float hull = h_width * h_height + 1e-7f;
            loss = 1.0f - (iou - (hull - uni) / hull);
            d_inter += 1.0f / hull;
            d_area -= 1.0f / hull;
            d_hull = uni / hull / hull;
        } else {
            loss = d_inter = __uint_as_float(0x7fffffffu);  // NaN: no kind of CUDA_KINDS
        }
        // And those of the areas: left and right change widths, top and bottom heights.
        const float x = w * d_inter * i_height, x_area = w * d_area * p_height;
        const float y = w * d_inter * i_width, y_area = w * d_area * p_width;
        const float x_hull = w * d_hull * h_height, y_hull = w * d_hull * h_width;
        float s;
        s = min_slope(p.x, t.x); g.x = x * s + x_area + x_hull * (1.0f - s);
        s = min_slope(p.y, t.y); g.y = y * s + y_area + y_hull * (1.0f - s);
        s = min_slope(p.z, t.z); g.z = x * s + x_area + x_hull * (1.0f - s);
        s = min_slope(p.w, t.w); g.w = y * s + y_area + y_hull * (1.0f - s);
        loss *= w;
    }
    if (grad && i < n) grad[i] = g;
    const float sum = block_sum(loss);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
"""
CUDA_KINDS = {"iou": 0, "linear_iou": 1, "giou": 2, "giou_exact": 3}  # as in the CUDA text
KERNELS, OPTIONS, THREADS = ("iou_loss",), (), 256


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


class _IoULoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, weight, kind):
        n, blocks = len(pred), -(-len(pred) // THREADS)
        partial = pred.new_empty(blocks)
        grad = pred.new_empty(pred.shape if ctx.needs_input_grad[0] else 0)  # empty: a null pointer
        boxes = [x.contiguous() for x in (pred, target)]
        boxes = [x.clone() if x.data_ptr() % 16 else x for x in boxes]  # for 16-byte loads
        tensors = *boxes, weight.contiguous(), grad, partial
        _launch("iou_loss", (blocks,), THREADS, *tensors, np.int64(n), np.int32(CUDA_KINDS[kind]))
        ctx.save_for_backward(grad)
        return partial.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None, None


_iou_loss_kernel = torch.compiler.disable(_IoULoss.apply)


@torch.compiler.disable
@functools.cache  # one warning for each kind
def _in_cuda(kind):
    if kind not in CUDA_KINDS:
        warnings.warn(f"{__name__}: no kernel computes {kind!r}, PyTorch runs it", stacklevel=4)
    return kind in CUDA_KINDS


def iou_loss(pred: Tensor, target: Tensor, weight: Tensor, kind: str = "giou") -> Tensor:
    """Sum over locations of weight * loss between two boxes around the same location.

    pred, target: (N, 4) distances left, top, right, bottom from the location to the sides, in
    pixels or strides (the unit matters, see `iou`); weight: (N,). fp32, bf16 or fp16, computed in
    fp32; float64 is computed in float64, always by PyTorch. kind, one of KINDS: "iou" is -log IoU
    (arXiv 1608.01471), "linear_iou" 1 - IoU, "giou" 1 - IoU + (H - U) / H, with the area U of the
    union and H of the hull + 1e-7 (arXiv 1902.09630), each with the official IoU (I + 1) / (U + 1).
    "giou_exact" is "giou" with I / (U + 1e-7), which does not depend on the unit. The official 1
    hides the error of small boxes: for a box of half a stride the gradient of "giou" in strides is
    a fifth of that of "giou_exact", for a box of eight strides both are equal. A kind that no
    kernel computes runs as PyTorch on a GPU too, and one warning says so.

    Returns a scalar, differentiable in pred alone, by the kernel only once. Where weight is 0,
    value and gradient are exactly 0 whatever pred is, inf and NaN included: give background the
    weight 0, select nothing. Where pred equals target, min and max have the derivative 0.5.

    Raises ValueError for another kind, shape or device.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if weight.ndim != 1 or not pred.shape == target.shape == (len(weight), 4):
        raise ValueError(
            f"pred is {tuple(pred.shape)}, target is {tuple(target.shape)}, weight is "
            f"{tuple(weight.shape)}; they must be (N, 4), (N, 4) and (N,): flatten"
        )
    if not pred.device == target.device == weight.device:
        raise ValueError(f"pred is on {pred.device}; move target and weight there as well")
    target, weight = target.detach(), weight.detach()
    if len(pred) and pred.dtype != torch.float64 and _use_kernel(pred) and _in_cuda(kind):
        return _iou_loss_kernel(pred.float(), target.float(), weight.float(), kind)
    return iou_loss_ref(pred, target, weight, kind)


# ---- compare, then time

if __name__ == "__main__":
    from torch.utils.benchmark import Timer

    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU no fallback may pass for the kernel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pred, target = 64 * torch.rand(2, 1_000_003, 4, device=device)
    weight = torch.rand(len(pred), device=device)
    pred[::3], weight[::3] = torch.nan, 0
    for kind in KINDS:
        args, calls = (pred.requires_grad_(), target, weight, kind), (iou_loss, iou_loss_ref)
        grads = [torch.autograd.grad(call(*args), pred) for call in calls]
        torch.testing.assert_close(*(call(*args) for call in calls), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    for call in calls:
        ms = 1e3 * Timer("call(*args)", globals=globals()).timeit(10).mean
        print(f"{call.__name__} on the {device}: {ms:.3f} ms")
