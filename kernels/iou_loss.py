"""IoU losses on distances to the four sides of a box: value and gradient in one CUDA kernel.

    loss = iou_loss(pred, target, weight, kind="giou")    # the weighted sum, differentiable

`iou_loss_ref` is the same in plain PyTorch. To use the loss elsewhere, copy this file: it needs
PyTorch, and CuPy for the kernel. `python kernels/iou_loss.py` compares the two and times them.

Written as PyTorch operators, the loss takes about forty launches over (N, 4) tensors. Here the
forward pass takes two and moves 52 bytes per location (20 where the weight is 0); the backward pass
takes one and moves 32.
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
    """Return the IoU (I + 1) / (U + 1) of two boxes around the same location, as the official code.

    pred, target: (..., 4) distances left, top, right, bottom to the sides, in pixels or strides;
    because of the added 1, the unit changes the result.

    Returns (...), float64 for float64 and fp32 otherwise. It is differentiable.

    Raises ValueError for a wrong shape.
    """
    if pred.shape != target.shape or pred.shape[-1:] != (4,):
        shapes = f"pred {tuple(pred.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{shapes}: expected the same shape (..., 4)")
    inter, union, _ = _areas(pred, target)
    return (inter + 1) / (union + 1)


def _areas(pred, target):
    """Return the areas of the intersection, the union and the hull, (...) each.

    The hull is the smallest box around both. 1e-7 is added to its area, as in the official code.
    """
    if pred.dtype != torch.float64:
        pred = pred.float()
        target = target.float()
    inter = _area(torch.minimum(pred, target))
    hull = _area(torch.maximum(pred, target))
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


# Each kind maps pred and target (..., 4) to the loss of each location (...). To add a kind, add an
# entry here. If it has no entry in CUDA_KINDS below, PyTorch computes it on a GPU, too.
KINDS = {
    "iou": lambda pred, target: -iou(pred, target).log(),
    "linear_iou": lambda pred, target: 1 - iou(pred, target),
    "giou": lambda pred, target: 1 - _giou(pred, target),
    "giou_exact": lambda pred, target: 1 - _giou_exact(pred, target),
}


def iou_loss_ref(pred, target, weight, kind="giou"):
    """Compute `iou_loss` in plain PyTorch: the reference for the kernel, used on the CPU."""
    # Mask the inputs, not the loss: the gradient of a masked loss would be 0 * NaN = NaN.
    has_weight = (weight != 0)[:, None]
    pred = torch.where(has_weight, pred, 1)
    target = torch.where(has_weight, target, 1)
    loss = KINDS[kind](pred, target)
    return (weight.to(loss.dtype) * loss).sum()


# ---- kernel

CUDA_SOURCE = r"""
// d min(p, t) / dp: 1 or 0, and torch.minimum's 0.5 at a tie. d max(p, t) / dp is 1 minus that.
__device__ float min_slope(float p, float t) { return p < t ? 1.0f : p > t ? 0.0f : 0.5f; }

// Add up a block in a fixed order, so that every run gives the same bits.
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
    float4* grad,            // (n) out: d(weight * loss) / d pred; null if it is not needed
    float* partial,          // (gridDim.x) out: the sum of each block
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
        const float inter_plus = kind == 3 ? 0.0f : 1.0f;  // added to the areas, see `iou`
        const float union_plus = kind == 3 ? 1e-7f : 1.0f;
        const float iou = (inter + inter_plus) / (uni + union_plus);

        // The derivatives of the loss by the areas of the intersection, of pred and of the hull.
        float d_inter = -(1.0f + iou) / (uni + union_plus);
        float d_area = iou / (uni + union_plus);
        float d_hull = 0.0f;
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
            loss = d_inter = __uint_as_float(0x7fffffffu);  // NaN, if the kind is unknown
        }
        // The chain rule: left and right change the widths, top and bottom the heights.
        const float x_inter = w * d_inter * i_height;
        const float y_inter = w * d_inter * i_width;
        const float x_area = w * d_area * p_height;
        const float y_area = w * d_area * p_width;
        const float x_hull = w * d_hull * h_height;
        const float y_hull = w * d_hull * h_width;
        float s;
        s = min_slope(p.x, t.x); g.x = x_inter * s + x_area + x_hull * (1.0f - s);
        s = min_slope(p.y, t.y); g.y = y_inter * s + y_area + y_hull * (1.0f - s);
        s = min_slope(p.z, t.z); g.z = x_inter * s + x_area + x_hull * (1.0f - s);
        s = min_slope(p.w, t.w); g.w = y_inter * s + y_area + y_hull * (1.0f - s);
        loss *= w;
    }
    if (grad && i < n) grad[i] = g;
    const float sum = block_sum(loss);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
"""
CUDA_KINDS = {"iou": 0, "linear_iou": 1, "giou": 2, "giou_exact": 3}  # as in the CUDA text
KERNELS = ("iou_loss",)
OPTIONS = ()
THREADS = 256


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


class _IoULoss(torch.autograd.Function):
    """The kernel: `forward` computes the gradient, too, and `backward` only scales it."""

    @staticmethod
    def forward(ctx, pred, target, weight, kind):
        blocks = -(-len(pred) // THREADS)
        partial = pred.new_empty(blocks)
        # An empty tensor has a null pointer, which tells the kernel that no gradient is needed.
        grad = pred.new_empty(pred.shape if ctx.needs_input_grad[0] else 0)
        tensors = _aligned(pred), _aligned(target), weight.contiguous(), grad, partial
        numbers = np.int64(len(pred)), np.int32(CUDA_KINDS[kind])
        _launch("iou_loss", (blocks,), THREADS, *tensors, *numbers)
        ctx.save_for_backward(grad)
        return partial.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None, None


def _aligned(tensor):
    """Return a contiguous tensor whose address is a multiple of the 16 bytes of a float4."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


_iou_loss_kernel = torch.compiler.disable(_IoULoss.apply)


@torch.compiler.disable
@functools.cache  # so that each kind warns once
def _has_kernel(kind):
    """Return whether the kernel computes this kind of loss, and warn if not."""
    if kind not in CUDA_KINDS:
        warnings.warn(f"{__name__}: no kernel computes {kind!r}; PyTorch does", stacklevel=4)
    return kind in CUDA_KINDS


def iou_loss(pred: Tensor, target: Tensor, weight: Tensor, kind: str = "giou") -> Tensor:
    """Return the sum over locations of weight * loss between two boxes around each location.

    pred, target: (N, 4) distances left, top, right, bottom from the location to the sides, in
    pixels or strides. weight: (N,). Tensors of 16 and 32 bits are computed in fp32; float64 is
    computed in float64, always by PyTorch.

    kind, with the areas I of the intersection, U of the union and H of the hull + 1e-7:
      "iou"         -log IoU, with IoU = (I + 1) / (U + 1) as in the official code (1608.01471)
      "linear_iou"  1 - IoU
      "giou"        1 - IoU + (H - U) / H (arXiv 1902.09630)
      "giou_exact"  the same with IoU = I / (U + 1e-7), which does not depend on the unit. The 1 in
                    the other kinds hides errors of small boxes: if a square of half a stride is
                    10 % too small, "giou" in strides has a fifth of this gradient. For a square of
                    eight strides the gradients are equal.

    Returns a scalar that is differentiable in pred, with the kernel only once. Where weight is 0,
    value and gradient are exactly 0, even if pred is infinite or NaN: to leave out background, give
    it the weight 0. Where pred equals target, min and max have the derivative 0.5.

    Raises ValueError for an unknown kind, or a wrong shape or device.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if weight.ndim != 1 or not pred.shape == target.shape == (len(weight), 4):
        raise ValueError(
            "expected pred (N, 4), target (N, 4) and weight (N,), found "
            f"{tuple(pred.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}"
        )
    if not pred.device == target.device == weight.device:
        raise ValueError(f"pred is on {pred.device}; move target and weight there as well")
    target = target.detach()
    weight = weight.detach()
    if len(pred) and pred.dtype != torch.float64 and _use_kernel(pred) and _has_kernel(kind):
        return _iou_loss_kernel(pred.float(), target.float(), weight.float(), kind)
    return iou_loss_ref(pred, target, weight, kind)


# ---- compare, then time

if __name__ == "__main__":
    from torch.utils.benchmark import Timer

    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU, fail instead of falling back to PyTorch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pred, target = 64 * torch.rand(2, 1_000_003, 4, device=device)
    weight = torch.rand(len(pred), device=device)
    pred[::3] = torch.nan
    weight[::3] = 0
    calls = iou_loss, iou_loss_ref
    for kind in KINDS:
        args = pred.requires_grad_(), target, weight, kind
        grads = [torch.autograd.grad(call(*args), pred) for call in calls]
        torch.testing.assert_close(*(call(*args) for call in calls), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    for call in calls:
        ms = 1e3 * Timer("call(*args)", globals=globals()).timeit(10).mean
        print(f"{call.__name__} on the {device}: {ms:.3f} ms")
