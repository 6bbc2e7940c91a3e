"""IoU losses on distances to the four sides of a box: value and gradient in one CUDA kernel.

    loss = iou_loss(pred, target, weight, kind="giou")    # the weighted sum, differentiable

`iou_loss_ref` is the same in plain PyTorch. The file needs nothing but PyTorch, and CuPy for the
kernel: copy it. `python kernels/iou_loss.py` compares the two, then times them.

As PyTorch operators the loss is some forty launches, each reading and writing (N, 4) tensors. Here
forward is two (the kernel and PyTorch's sum of its partial sums), backward one. Bytes per location:
forward reads pred, target, weight and writes the gradient, 52 (20 where the weight is 0: pred and
target are not even read); backward scales the gradient, 32.
"""

import functools
import os
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KINDS = ("iou", "linear_iou", "giou")  # the kernel knows them by their position


# ---- reference


def iou_loss_ref(pred, target, weight, kind="giou"):
    """`iou_loss` in plain PyTorch: what the kernel must reproduce, and what runs on the CPU."""
    if pred.dtype != torch.float64:
        pred, target, weight = pred.float(), target.float(), weight.float()
    # torch.where on the inputs, not on the loss: the gradient would bring 0 * NaN back.
    counts = (weight != 0)[:, None]
    pred, target = torch.where(counts, pred, 1), torch.where(counts, target, 1)

    left, top, right, bottom = torch.minimum(pred, target).unbind(1)
    inter = (left + right) * (top + bottom)
    union = _area(pred) + _area(target) - inter
    iou = (inter + 1) / (union + 1)
    if kind == "iou":
        loss = -iou.log()
    elif kind == "linear_iou":
        loss = 1 - iou
    else:
        hull = _area(torch.maximum(pred, target)) + 1e-7
        loss = 1 - (iou - (hull - union) / hull)
    return (weight * loss).sum()


def _area(ltrb):
    left, top, right, bottom = ltrb.unbind(1)
    return (left + right) * (top + bottom)


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
    long long n,
    int kind)
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
        const float iou = (inter + 1.0f) / (uni + 1.0f);

        // The loss as a function of three areas that depend on pred: d_inter, d_area and d_hull are
        // its derivatives by the intersection, the area of pred, and the hull.
        float d_inter = -(1.0f + iou) / (uni + 1.0f), d_area = iou / (uni + 1.0f), d_hull = 0.0f;
        float h_width = 0.0f, h_height = 0.0f;
        if (kind == 0) {
            loss = -logf(iou);
            d_inter /= iou;
            d_area /= iou;
        } else if (kind == 1) {
            loss = 1.0f - iou;
        } else {
            h_width = fmaxf(p.x, t.x) + fmaxf(p.z, t.z);
            h_height = fmaxf(p.y, t.y) + fmaxf(p.w, t.w);
            const float hull = h_width * h_height + 1e-7f;
            loss = 1.0f - (iou - (hull - uni) / hull);
            d_inter += 1.0f / hull;
            d_area -= 1.0f / hull;
            d_hull = uni / hull / hull;
        }
        // And of the areas by the distances: left and right move widths, top and bottom heights.
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

extern "C" __global__ void scale(
    const float4* grad, const float* upstream, float4* out, long long n)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float4 g = grad[i];
    const float u = *upstream;
    out[i] = {g.x * u, g.y * u, g.z * u, g.w * u};
}
"""
KERNELS, OPTIONS = ("iou_loss", "scale"), ()
THREADS = 256


# ---- launcher: the same lines in every kernel file, because a file is copied whole


@functools.cache
def _load(device):
    """The kernels compiled for GPU number `device`, or the exception that says why not."""
    try:
        import cupy  # only here: importing this file needs neither CuPy nor a GPU

        kernels = {name: cupy.RawKernel(CUDA_SOURCE, name, OPTIONS) for name in KERNELS}
        with torch.cuda.device(device):
            for kernel in kernels.values():
                kernel.compile()
        return kernels
    except Exception as error:
        warnings.warn(f"{__name__}: PyTorch runs instead of the kernel: {error!r}", stacklevel=4)
        return error


def _use_kernel(like):
    """Whether the kernel serves this tensor. FCOS_KERNELS=cupy or torch forces the answer."""
    choice = os.environ.get("FCOS_KERNELS", "")
    if choice not in ("", "cupy", "torch"):
        raise ValueError(f"FCOS_KERNELS is {choice!r}; choose cupy or torch, or unset it")
    if choice == "torch" or not like.is_cuda:
        return False
    kernels = _load(like.device.index)
    if choice == "cupy" and isinstance(kernels, Exception):
        raise ImportError(
            f"FCOS_KERNELS=cupy, but the kernel cannot run: {kernels!r}. "
            "pip install cupy-cuda13x (cupy-cuda12x for a PyTorch built with CUDA 12)"
        ) from kernels
    return not isinstance(kernels, Exception)


def _launch(name, grid, threads, *args):
    """Run a kernel on the device and stream that PyTorch is using. CuPy checks no argument: tensors
    must be contiguous, numbers are numpy scalars of the width in the CUDA text."""
    import cupy

    device = args[0].device
    values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in args)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14
            stream = cupy.cuda.Stream.from_external(stream)
        else:
            stream = cupy.cuda.ExternalStream(stream.cuda_stream, device.index)
        with stream:
            _load(device.index)[name](grid, (threads,), values)


# ---- operator


def _aligned(tensor):
    """Contiguous and on a 16-byte boundary, as 16-byte loads need; nearly always the tensor."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class _IoULoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, weight, kind):
        n, blocks = len(pred), -(-len(pred) // THREADS)
        partial = pred.new_empty(blocks)
        grad = pred.new_empty(pred.shape if ctx.needs_input_grad[0] else 0)  # empty: a null pointer
        _launch(
            "iou_loss", (blocks,), THREADS, _aligned(pred), _aligned(target), weight.contiguous(),
            grad, partial, np.int64(n), np.int32(KINDS.index(kind)),
        )  # fmt: skip
        ctx.save_for_backward(grad)
        return partial.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        n, out = len(grad), torch.empty_like(grad)
        _launch("scale", (-(-n // THREADS),), THREADS, grad, upstream, out, np.int64(n))
        return out, None, None, None


def iou_loss(pred: Tensor, target: Tensor, weight: Tensor, kind: str = "giou") -> Tensor:
    """Sum over locations of weight * loss between two boxes around the same location.

    pred, target: (N, 4) distances left, top, right, bottom from the location to the sides, in
    pixels or strides (the +1 below makes the unit matter); weight: (N,). fp32, bf16 or fp16, the
    arithmetic is fp32 (on the CPU also float64). Returns a scalar that is differentiable in pred
    only, and once. Where weight is 0, value and gradient are exactly 0 whatever pred is, inf and
    NaN included: give the negatives weight 0 and gather nothing.

    With intersection I and union U, IoU = (I + 1) / (U + 1) as in the official code. kind "iou" is
    -log IoU (arXiv 1608.01471), "linear_iou" is 1 - IoU, "giou" is 1 - GIoU (arXiv 1902.09630) with
    GIoU = IoU - (H - U) / H and the hull H = its area + 1e-7. Where pred equals target, min and max
    have the subgradient 0.5.

    Raises ValueError for another kind, shape or device.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if weight.ndim != 1 or not pred.shape == target.shape == (len(weight), 4):
        raise ValueError(
            f"pred is {tuple(pred.shape)}, target is {tuple(target.shape)}, weight is "
            f"{tuple(weight.shape)}; they must be (N, 4), (N, 4) and (N,): flatten them"
        )
    if not pred.device == target.device == weight.device:
        raise ValueError(f"pred is on {pred.device}; move target and weight there as well")
    target, weight = target.detach(), weight.detach()
    if len(pred) and _use_kernel(pred):
        return _IoULoss.apply(pred.float(), target.float(), weight.float(), kind)
    return iou_loss_ref(pred, target, weight, kind)


# ---- compare, then time

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU no fallback may pass for the kernel

    def value_and_grad(loss, pred, *args):
        value = loss(pred, *args)
        return value.detach(), *torch.autograd.grad(value, pred)

    for kind in KINDS:
        for n in (0, 1, 33, 257, 100_003):
            pred, target = 64 * torch.rand(2, n, 4, device=device)
            weight = torch.rand(n, device=device)
            pred[::3], weight[::3] = torch.nan, 0
            args = pred.requires_grad_(), target, weight, kind
            mine, expected = (value_and_grad(loss, *args) for loss in (iou_loss, iou_loss_ref))
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    print("OK" if device == "cuda" else "OK for the reference. No GPU: the kernel did not run.")
    if device == "cuda":
        from torch.utils.benchmark import Timer

        def milliseconds(f, *args):
            return 1e3 * Timer("f(*args)", globals={"f": f, "args": args}).timeit(20).mean

        n = 4_000_000
        pred, target = 64 * torch.rand(2, n, 4, device=device)
        args = pred.requires_grad_(), target, torch.rand(n, device=device), "giou"
        losses = {"kernel": iou_loss, "eager": iou_loss_ref}
        losses["torch.compile"] = torch.compile(iou_loss_ref)
        for name, loss in losses.items():
            ms = milliseconds(value_and_grad, loss, *args)
            print(f"{n} locations, both passes, {name}: {ms:.3f} ms, {84e-9 * n / ms:.2f} TB/s")
