"""Sigmoid focal loss on integer labels: one CUDA pass forward, one backward, no one-hot tensor.

    loss = sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=2.0)   # the sum, differentiable

`sigmoid_focal_loss_ref` is the same in plain PyTorch. The file needs nothing but PyTorch, and CuPy
for the kernels: copy it. `python kernels/focal_loss.py` compares the two, then times them.

The classification loss is the largest elementwise operation of a detector: 22,400 locations x 80
classes an image. Forward reads the logits and stores only the sum; backward reads them again and
writes the gradient: 3 s bytes a logit of s bytes (6 in bf16, 12 in fp32), and 8 a row for the label
in each pass. To save the gradient in forward would be 4 s, and N x K more memory in between. In
bf16 the instructions count as well (on sm_90 21 a logit forward, 32 backward): nearly every logit
is a negative, so that the inner loops know negatives only; a positive's sign is turned before them.
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
    """The loss in plain PyTorch: what the kernels must reproduce, and what runs on the CPU."""
    return _Reference.apply(logits, labels, alpha, gamma)


class _Reference(torch.autograd.Function):
    """Value and gradient together, in place: a third of the time that autograd takes on a CPU."""

    @staticmethod
    def forward(ctx, logits, labels, alpha, gamma):
        own, column = labels[:, None] >= 0, labels[:, None].clamp(min=0)
        # z is the logit of the wrong answer: x for a negative class, -x for the positive one.
        z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        z.scatter_(1, column, torch.where(own, -1, 1) * z.gather(1, column))
        cross_entropy = F.softplus(z)  # -log p_t
        q = z.sigmoid_()  # 1 - p_t
        modulation = q**gamma
        loss = modulation * cross_entropy
        own_loss = torch.where(own, loss.gather(1, column), 0)
        # d loss / dz = q^gamma (gamma p_t * -log p_t + q), and dz / dx = -1 for the positive class.
        slope = cross_entropy.mul_(gamma).addcmul_(cross_entropy, q, value=-1).add_(q)
        own_slope = slope.mul_(modulation).gather(1, column)
        own_slope = torch.where(own, -alpha * own_slope, (1 - alpha) * own_slope)
        ctx.save_for_backward(slope.mul_(1 - alpha).scatter_(1, column, own_slope))
        ctx.dtype = logits.dtype
        return (1 - alpha) * loss.sum() + (2 * alpha - 1) * own_loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), None, None, None


# ---- kernels

CUDA_SOURCE = r"""
// Floats as their bits: CUDA's own bf16 needs a header, which not every machine has.
typedef unsigned fp32;
typedef unsigned short bf16;

__device__ float to_float(fp32 bits) { return __uint_as_float(bits); }
__device__ float to_float(bf16 bits) { return __uint_as_float((unsigned)bits << 16); }

// The bits of x in the type of the last argument, rounded to nearest; ties go away from 0, which is
// cheaper than to even. The minimum keeps the addition from turning NaN (0x7fffffff) into -0.
__device__ unsigned to_bits(float x, fp32) { return __float_as_uint(x); }
__device__ unsigned to_bits(float x, bf16)
{
    return (unsigned)(min((int)__float_as_uint(x), 0x7fff7fff) + 0x8000) >> 16;
}

// log(1 + e) / e on [0, 1], a minimax fit: relative error 1.3e-6, also where 1 + e rounds to 1.
__device__ float log1p_over(float e)
{
    float p = 0.0141410176f * e - 0.0664017797f;
    p = (p * e + 0.149223849f) * e - 0.235038593f;
    p = (p * e + 0.331094474f) * e - 0.499869645f;
    return p * e + 0.999998748f;
}

#define LOG2_E 1.442695041f

// The loss of one logit of a wrong answer (z = x, or -x where x is the positive class of its row),
// or with GRAD its derivative by z. exp2f is one instruction under CuPy's -ftz=true.
template <bool GRAD> __device__ float element(float z, float gamma)
{
    const float e = exp2f(fabsf(z) * -LOG2_E), p = log1p_over(e);
    const float log_q = fminf(z, 0.0f) - p * e;          // q = sigmoid(z) = 1 - p_t
    const float cross_entropy = fmaxf(z, 0.0f) + p * e;  // -log p_t
    const float modulation = exp2f(gamma * LOG2_E * log_q);
    if (!GRAD) return modulation * cross_entropy;
    // d(q^gamma * -log p_t) / dz = q^gamma (gamma p_t * -log p_t + q)
    const float q = exp2f(LOG2_E * log_q);
    return modulation * ((gamma - gamma * q) * cross_entropy + q);
}

// Bit j: is element j of the vector that begins at (row, column) the positive class of its row?
__device__ unsigned positives(
    const long long* labels, long long row, int column, int classes, int size)
{
    unsigned bits = 0;
    for (int start = -column; start < size; start += classes, ++row) {
        const long long label = labels[row];
        const unsigned j = start + (int)label;
        if (0 <= label && label < classes && j < size) bits |= 1u << j;
    }
    return bits;
}

#define UNROLL 4  // 16-byte vectors that a thread loads before it computes: enough bytes in flight

template <typename T, bool GRAD> __device__ void focal(
    const T* logits,          // (rows, classes)
    const long long* labels,  // (rows), -1 for background
    const float* upstream,    // () gradient of the sum, with GRAD
    T* grad,                  // (rows, classes) out, with GRAD
    float* partial,           // (gridDim.x) out, without: this block's share of the sum
    long long rows, int classes, float alpha, float gamma)
{
    const int size = 16 / sizeof(T), step = blockDim.x * size;  // elements of a thread, of a block
    const long long total = rows * classes;
    const long long begin = ((long long)blockIdx.x * UNROLL * blockDim.x + threadIdx.x) * size;
    uint4 v[UNROLL];
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const long long i = begin + (long long)u * step;
        if (i + size <= total) v[u] = *(const uint4*)(logits + i);
    }

    const float scale = GRAD ? *upstream : 1.0f;  // and dz / dx = -1 for the positive class
    const float own_weight = scale * (GRAD ? -alpha : alpha), other_weight = scale * (1.0f - alpha);
    float own_sum = 0.0f, sum = 0.0f;  // of the positives; of all
    long long i = begin, row = i / classes;  // one division for each thread; then carried along
    int column = i % classes;
    #pragma unroll
    for (int u = 0; u < UNROLL && i + size <= total; ++u) {
        const unsigned own = positives(labels, row, column, classes, size);
        unsigned in[4] = {v[u].x, v[u].y, v[u].z, v[u].w}, out[4] = {};
        #pragma unroll
        for (int j = 0; j < size && own; ++j)  // from x to z: turn the sign bit of a positive
            in[j * sizeof(T) / 4] ^= (own >> j & 1u) << ((j + 1) * sizeof(T) * 8 - 1) % 32;
        #pragma unroll
        for (int j = 0; j < size; ++j) {
            const int word = j * sizeof(T) / 4, shift = j * sizeof(T) % 4 * 8;
            const float y = element<GRAD>(to_float((T)(in[word] >> shift)), gamma);
            const float weight = own >> j & 1u ? own_weight : other_weight;
            if (GRAD) out[word] |= to_bits(weight * y, T()) << shift; else sum += y;
        }
        if (GRAD) *(uint4*)(grad + i) = {out[0], out[1], out[2], out[3]};
        else for (unsigned left = own; left; left &= left - 1)  // cheaper than a weight for each
            own_sum += element<GRAD>(-to_float(logits[i + __ffs(left) - 1]), gamma);
        i += step;
        row += step / classes;
        column += step % classes;
        if (column >= classes) { column -= classes; ++row; }
    }
    // What is left of the last row when the total is no multiple of a vector: an element a thread.
    const long long last = total / size * size + threadIdx.x;
    if (blockIdx.x == 0 && last < total) {
        const bool own = labels[last / classes] == last % classes;
        const float x = to_float(logits[last]), y = element<GRAD>(own ? -x : x, gamma);
        if (GRAD) grad[last] = to_bits((own ? own_weight : other_weight) * y, T());
        sum += y;
        own_sum += own ? y : 0.0f;
    }
    if (GRAD) return;

    // The sum over the block, added in a fixed order: the same bits on every run.
    __shared__ float warp_sum[32];
    sum = other_weight * sum + (own_weight - other_weight) * own_sum;
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
        long long rows, int classes, float alpha, float gamma)                                     \
    { focal<T, false>(logits, labels, 0, 0, partial, rows, classes, alpha, gamma); }               \
    extern "C" __global__ void backward_##T(                                                       \
        const T* logits, const long long* labels, const float* upstream, T* grad,                  \
        long long rows, int classes, float alpha, float gamma)                                     \
    { focal<T, true>(logits, labels, upstream, grad, 0, rows, classes, alpha, gamma); }
KERNELS(fp32)
KERNELS(bf16)
"""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
KERNELS = [f"{step}_{dtype}" for step in ("forward", "backward") for dtype in DTYPES.values()]
OPTIONS = ()
THREADS, UNROLL = 256, 4  # UNROLL as in the CUDA text


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


class _SigmoidFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, alpha, gamma):
        logits, labels = _aligned(logits), labels.contiguous()
        ctx.blocks = -(-logits.nbytes // (16 * UNROLL * THREADS))
        rows, classes = logits.shape
        ctx.numbers = np.int64(rows), np.int32(classes), np.float32(alpha), np.float32(gamma)
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


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sum over locations and classes of the focal loss (arXiv 1708.02002, equation 5).

    logits: (N, K), fp32 or bf16 as they are, other types as a copy in fp32; the arithmetic is fp32
    (on the CPU also float64). labels: (N,) int64, k in 0..K-1 where class k is the positive one and
    -1 for background, where every class is negative. With p = sigmoid(logit), a positive class
    costs -alpha (1 - p)^gamma log p and a negative one -(1 - alpha) p^gamma log(1 - p).

    Returns an fp32 scalar that is differentiable in logits, and once. Value and gradient are finite
    for logits up to 1e4 in size and more.

    Raises ValueError for another shape, type or device. A label of K or more is a RuntimeError on
    the CPU and background on a GPU, where the look would cost a synchronisation.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits is {tuple(logits.shape)} {logits.dtype}; it must be (N, K) floating point "
            "with K > 0: flatten the leading dimensions"
        )
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels is {tuple(labels.shape)} {labels.dtype}; it must be {(len(logits),)} int64, "
            "a class index per row of logits, -1 for background"
        )
    if labels.device != logits.device:
        raise ValueError(f"logits is on {logits.device}; move labels there as well")
    if len(logits) and _use_kernel(logits):
        logits = logits if logits.dtype in DTYPES else logits.float()
        return _SigmoidFocalLoss.apply(logits, labels, alpha, gamma)
    return sigmoid_focal_loss_ref(logits, labels, alpha, gamma)


# ---- compare, then time

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU no fallback may pass for the kernel

    def value_and_grad(loss, logits, labels):
        value = loss(logits, labels)
        return value.detach(), *torch.autograd.grad(value, logits)

    for dtype, rtol in (torch.float32, 2e-5), (torch.bfloat16, 1e-2):
        for n, k in (0, 1), (1, 1), (33, 3), (257, 91), (10_001, 80):
            logits = (4 * torch.randn(n, k, device=device)).to(dtype).requires_grad_()
            labels = torch.randint(-1, k, (n,), device=device)
            mine = value_and_grad(sigmoid_focal_loss, logits, labels)
            expected = value_and_grad(sigmoid_focal_loss_ref, logits, labels)
            torch.testing.assert_close(mine, expected, rtol=rtol, atol=1e-6)
    print("OK" if device == "cuda" else "OK for the reference. No GPU: the kernel did not run.")
    if device == "cuda":
        from torch.utils.benchmark import Timer

        def milliseconds(f, *args):
            return 1e3 * Timer("f(*args)", globals={"f": f, "args": args}).timeit(20).mean

        from torchvision.ops import sigmoid_focal_loss as torchvision_loss

        def eager(logits, labels):
            one_hot = F.one_hot(labels + 1, logits.shape[1] + 1)[:, 1:].to(logits.dtype)
            return torchvision_loss(logits, one_hot, reduction="sum")

        logits = torch.randn(16 * 22_400, 80, device=device).bfloat16().requires_grad_()
        labels = torch.where(torch.rand(len(logits), device=device) < 0.02, 7, -1)
        losses = {"kernel": sigmoid_focal_loss, "torchvision": eager}
        losses["torch.compile"] = torch.compile(eager)
        for name, loss in losses.items():
            ms = milliseconds(value_and_grad, loss, logits, labels)
            rate = 3e-9 * logits.nbytes / ms
            print(f"{tuple(logits.shape)} bf16, both passes, {name}: {ms:.3f} ms, {rate:.2f} TB/s")
