"""Sigmoid focal loss on integer labels: one CUDA pass forward, one backward, no one-hot tensor.

    loss = sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=2.0)   # the sum, differentiable

`sigmoid_focal_loss_ref` is the same in plain PyTorch. To use the loss elsewhere, copy this file: it
needs PyTorch, and CuPy for the kernels. `python kernels/focal_loss.py` compares and times the two.

The classification loss is the largest elementwise operation of a detector: 22,400 locations x 80
classes for each image. The forward pass reads the logits and stores only the sum. The backward pass
reads them again and writes the gradient, so that nothing of size N x K is kept in between.
"""

import functools
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---- reference


def sigmoid_focal_loss_ref(logits, labels, alpha=0.25, gamma=2.0):
    """Compute the loss in plain PyTorch: the reference for the kernels, used on the CPU."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    has_class = ((labels >= 0) & (labels < x.shape[1]))[:, None]
    positive = x.gather(1, torch.where(has_class, labels[:, None], 0))  # (N, 1)
    # Treat every class as a negative, then correct the positive class of each row: this needs
    # fewer (N, K) tensors than a one-hot encoding.
    loss = alpha * _wrong_answer(-positive, gamma) - (1 - alpha) * _wrong_answer(positive, gamma)
    correction = torch.where(has_class, loss, 0).sum()
    return (1 - alpha) * _wrong_answer(x, gamma).sum() + correction


def _wrong_answer(z, gamma):
    """Return the focal loss of each logit, without the factor alpha.

    z: x for a negative class, -x for the positive one; sigmoid(z) is the probability of the wrong
    answer. sigmoid(z)^gamma is computed as exp(gamma log sigmoid(z)), because the gradient of a
    power below 1 is infinite where sigmoid(z) rounds to 0.
    """
    cross_entropy = F.softplus(z)  # -log p_t
    log_wrong = z - cross_entropy  # log sigmoid(z)
    return (gamma * log_wrong).exp() * cross_entropy


# ---- kernels

CUDA_SOURCE = r"""
typedef float fp32;
typedef unsigned short bf16;  // its bits, because CUDA's own type needs a header

__device__ float to_float(fp32 x) { return x; }
__device__ float to_float(bf16 bits) { return __uint_as_float((unsigned)bits << 16); }

__device__ void store(fp32& out, float x) { out = x; }
__device__ void store(bf16& out, float x)  // rounds to nearest, ties to even, as PyTorch does
{
    const unsigned bits = __float_as_uint(x);
    out = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// 16 bytes, which a thread loads or stores at once: 4 or 8 numbers.
template <typename T> struct alignas(16) Vector { T at[16 / sizeof(T)]; };

// The loss of a logit without the factor alpha, or with GRAD its derivative with respect to z. z is
// x for a negative class, -x for the positive one. The kernels are limited by arithmetic: expf and
// log1pf would double the instructions for one more digit.
template <bool GRAD> __device__ float wrong_answer(float z, float gamma)
{
    // tail = log(1 + e) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...), where s is at most 1/3; 0.1
    // replaces 1/11 and all later terms. The relative error is 1e-8.
    const float e = __expf(-fabsf(z));
    const float s = __fdividef(e, 2.0f + e);
    const float t = s * s;
    const float series = 1/3.0f + t * (1/5.0f + t * (1/7.0f + t * (1/9.0f + t * 0.1f)));
    const float tail = 2.0f * (s + s * t * series);
    const float cross_entropy = fmaxf(z, 0.0f) + tail;  // -log p_t
    const float log_q = fminf(z, 0.0f) - tail;          // q = sigmoid(z) = 1 - p_t
    const float modulation = __expf(gamma * log_q);     // q^gamma
    if (!GRAD) return modulation * cross_entropy;
    const float q = __expf(log_q);
    return modulation * (gamma * (1.0f - q) * cross_entropy + q);
}

template <typename T, bool GRAD> __device__ void focal_loss(
    const T* logits,          // (total / classes, classes)
    const long long* labels,  // (total / classes); outside 0..classes-1 is background
    const float* upstream,    // () gradient of the sum; with GRAD
    T* grad,                  // (total / classes, classes) out; with GRAD
    float* partial,           // (gridDim.x) out, the sum of each block; without GRAD
    long long total, int classes, float alpha, float gamma)
{
    const int SIZE = 16 / sizeof(T);
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * SIZE;
    const float positive_weight = GRAD ? -alpha * *upstream : alpha;  // dz / dx is -1 here
    const float negative_weight = GRAD ? (1.0f - alpha) * *upstream : 1.0f - alpha;
    float sum = 0.0f;
    if (i < total) {
        const int count = total - i < SIZE ? total - i : SIZE;  // fewer at the end of the tensor
        Vector<T> in = {}, out;
        if (count == SIZE) in = *(const Vector<T>*)(logits + i);
        else for (int j = 0; j < SIZE; ++j) if (j < count) in.at[j] = logits[i + j];

        // A 64-bit division takes as long as the loss of a logit: use it only for large tensors.
        long long row = total >> 31 ? i / classes : (unsigned)i / (unsigned)classes;
        unsigned positives = 0;  // bit j is set if logit j is that of its row's positive class
        #pragma unroll 1  // mostly one row, and unrolling would need a division
        for (int start = row * classes - i; start < count; start += classes) {
            const long long label = labels[row++];
            const int j = label >= 0 && label < classes ? start + (int)label : -1;
            if (j >= 0 && j < SIZE) positives |= 1u << j;
        }
        #pragma unroll
        for (int j = 0; j < SIZE; ++j) {
            const bool positive = positives >> j & 1;
            const float x = to_float(in.at[j]);
            const float y = wrong_answer<GRAD>(positive ? -x : x, gamma);
            const float weighted = (positive ? positive_weight : negative_weight) * y;
            if (GRAD) store(out.at[j], weighted);
            else if (j < count) sum += weighted;
        }
        if (GRAD && count == SIZE) *(Vector<T>*)(grad + i) = out;
        else if (GRAD) for (int j = 0; j < SIZE; ++j) if (j < count) grad[i + j] = out.at[j];
    }
    if (GRAD) return;

    // Add up the block in a fixed order, so that every run gives the same bits.
    __shared__ float warp_sum[32];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < blockDim.x / 32; ++warp) sum += warp_sum[warp];
    partial[blockIdx.x] = sum;
}

#define KERNELS(T)                                                                                 \
    extern "C" __global__ void forward_##T(                                                        \
        const T* logits, const long long* labels, float* partial,                                  \
        long long total, int classes, float alpha, float gamma)                                    \
    { focal_loss<T, false>(logits, labels, 0, 0, partial, total, classes, alpha, gamma); }         \
    extern "C" __global__ void backward_##T(                                                       \
        const T* logits, const long long* labels, const float* upstream, T* grad,                  \
        long long total, int classes, float alpha, float gamma)                                    \
    { focal_loss<T, true>(logits, labels, upstream, grad, 0, total, classes, alpha, gamma); }
KERNELS(fp32)
KERNELS(bf16)
"""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
KERNELS = [f"{step}_{dtype}" for step in ("forward", "backward") for dtype in DTYPES.values()]
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


class _SigmoidFocalLoss(torch.autograd.Function):
    """The two kernels: `forward` computes the sum, `backward` the gradient from the same logits."""

    @staticmethod
    def forward(ctx, logits, labels, alpha, gamma):
        logits = logits.contiguous()
        labels = labels.contiguous()
        if logits.data_ptr() % 16:  # the kernel loads 16 bytes at once, from multiples of 16
            logits = logits.clone()
        total = np.int64(logits.numel())
        classes = np.int32(logits.shape[1])
        ctx.numbers = total, classes, np.float32(alpha), np.float32(gamma)
        ctx.blocks = -(-logits.nbytes // (16 * THREADS))
        partial = torch.empty(ctx.blocks, dtype=torch.float32, device=logits.device)
        name = f"forward_{DTYPES[logits.dtype]}"
        _launch(name, (ctx.blocks,), THREADS, logits, labels, partial, *ctx.numbers)
        ctx.save_for_backward(logits, labels)
        return partial.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        logits, labels = ctx.saved_tensors
        grad = torch.empty_like(logits)
        name = f"backward_{DTYPES[logits.dtype]}"
        _launch(name, (ctx.blocks,), THREADS, logits, labels, upstream, grad, *ctx.numbers)
        return grad, None, None, None


_focal_loss_kernel = torch.compiler.disable(_SigmoidFocalLoss.apply)


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Return the focal loss summed over locations and classes (arXiv 1708.02002, equation 5).

    logits: (N, K), in fp32, bf16 or fp16; computed in fp32. float64 is computed in float64, always
    by PyTorch. labels: (N,) int64, the positive class of each location, 0..K-1. Any other number,
    usually -1, is background: every class is negative. With p = sigmoid(logit), a positive class
    contributes -alpha (1 - p)^gamma log p and a negative one -(1 - alpha) p^gamma log(1 - p).

    Returns a scalar, float64 for float64 and fp32 otherwise. It is differentiable in logits, with
    the kernels only once. Value and gradient are finite for |logit| up to 1e4.

    Raises ValueError for a wrong shape, type or device.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            "logits: expected floating point (N, K) with K > 0, found "
            f"{tuple(logits.shape)} {logits.dtype}; flatten the leading dimensions"
        )
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 {(len(logits),)}, the class of each row or -1, found "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    if labels.device != logits.device:
        raise ValueError(f"logits is on {logits.device}; move labels there as well")
    if len(logits) and logits.dtype != torch.float64 and _use_kernel(logits):
        logits = logits if logits.dtype in DTYPES else logits.float()
        return _focal_loss_kernel(logits, labels, alpha, gamma)
    return sigmoid_focal_loss_ref(logits, labels, alpha, gamma)


# ---- compare, then time

if __name__ == "__main__":
    from torch.utils.benchmark import Timer

    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU, fail instead of falling back to PyTorch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = sigmoid_focal_loss, sigmoid_focal_loss_ref
    for dtype, rtol in (torch.float32, 2e-5), (torch.bfloat16, 1e-2):
        logits = (4 * torch.randn(22_401, 91, device=device)).to(dtype).requires_grad_()
        args = logits, torch.randint(-1, 91, (len(logits),), device=device)
        grads = [torch.autograd.grad(call(*args), logits) for call in calls]
        torch.testing.assert_close(*(call(*args) for call in calls), rtol=rtol, atol=1e-6)
        torch.testing.assert_close(*grads, rtol=rtol, atol=1e-6)
    for call in calls:
        ms = 1e3 * Timer("call(*args)", globals=globals()).timeit(10).mean
        print(f"{call.__name__} on the {device}: {ms:.3f} ms")
