"""Sigmoid focal loss on integer labels: one CUDA pass forward, one backward, no one-hot tensor.

    loss = sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=2.0)   # the sum, differentiable

`sigmoid_focal_loss_ref` is the same in plain PyTorch. The file needs nothing but PyTorch, and CuPy
for the kernels: copy it. `python kernels/focal_loss.py` compares the two, then times them.

The classification loss is the largest elementwise operation of a detector: 22,400 locations x 80
classes an image. Each pass is bound by memory, so the design counts bytes. Forward reads the logits
and stores only the sum; backward reads them again and writes the gradient in their dtype: 3 s bytes
a logit of s bytes (6 in bf16, 12 in fp32), and 8 a row for the label in each pass. To save the
gradient in forward and scale it in backward would be 4 s, and N x K more memory between the passes.
Launches: 2 forward (the kernel and PyTorch's sum of its partial sums), 1 backward.
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
    if logits.dtype != torch.float64:
        logits = logits.float()
    positive = (labels >= 0)[:, None]
    column = labels.clamp(min=0)[:, None]
    # z is the logit of the wrong answer: x for a negative class, -x for the positive one.
    own = logits.gather(1, column)
    z = logits.scatter(1, column, torch.where(positive, -own, own))
    cross_entropy = F.softplus(z)  # -log p_t, so log(1 - p_t) = z - softplus(z)
    loss = torch.exp(gamma * (z - cross_entropy)) * cross_entropy
    own = torch.where(positive, loss.gather(1, column), 0)
    return (1 - alpha) * loss.sum() + (2 * alpha - 1) * own.sum()


# ---- kernels

CUDA_SOURCE = r"""
// Floats as their bits. The toolkit's own 16-bit types need headers, which a compiler at run time
// finds on some machines only.
struct fp32 { unsigned bits; };
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

__device__ float to_float(fp32 x) { return __uint_as_float(x.bits); }
__device__ float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ float to_float(fp16 x)
{
    const unsigned magnitude = (x.bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
    float y = __uint_as_float(magnitude + (112u << 23));  // 112 is the difference of the biases
    if (exponent == 0x0f800000u) y = __uint_as_float(magnitude + (224u << 23));  // inf, NaN
    if (exponent == 0) y = __uint_as_float(magnitude + (113u << 23)) - __uint_as_float(113u << 23);
    return x.bits & 0x8000u ? -y : y;
}

// The bits of x in the type of the last argument, rounded to nearest even.
__device__ unsigned to_bits(float x, fp32) { return __float_as_uint(x); }
__device__ unsigned to_bits(float x, bf16)
{
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
__device__ unsigned to_bits(float x, fp16)
{
    const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    unsigned half = (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
    if (magnitude < 0x38800000u)  // subnormal: adding 0.5 rounds at 2^-24
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    if (magnitude >= 0x47800000u) half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, inf
    return (bits >> 16 & 0x8000u) | half;
}

// log2(1 + e) for e in [0, 1], a Chebyshev fit: relative error below 4e-7 also where 1 + e rounds
// to 1, and its multiply-adds run beside the transcendental unit, which is the busy one.
__device__ float log2_1p(float e)
{
    float p = -0.01207702048f * e + 0.06274843216f;
    p = (p * e - 0.1541520059f) * e + 0.2551763356f;
    p = (p * e - 0.3530963659f) * e + 0.4800124466f;
    p = (p * e - 0.7213067412f) * e + 1.442694783f;
    return p * e;
}

#define LOG2_E 1.442695041f
#define LN_2 0.6931471806f

// weight * the loss of one logit x over ln 2, or with GRAD weight * its derivative by z.
// z is the logit of the wrong answer: x, or -x where x is the positive class of its row (own).
template <bool GRAD> __device__ float element(float x, bool own, float weight, float gamma)
{
    const float z = own ? -(x * LOG2_E) : x * LOG2_E;  // every logarithm is in base 2
    const float tail = log2_1p(exp2f(fminf(z, -z)));
    const float log_q = fminf(z, 0.0f) - tail;          // q = sigmoid(z) = 1 - p_t
    const float cross_entropy = fmaxf(z, 0.0f) + tail;  // -log p_t
    const float modulation = weight * exp2f(gamma * log_q);
    if (!GRAD) return modulation * cross_entropy;
    // d(q^gamma * -log p_t) / dz = q^gamma (gamma p_t * -log p_t + q)
    const float q = exp2f(log_q), k = gamma * LN_2;
    return modulation * ((k - k * q) * cross_entropy + q);
}

// Bit j: is element j of the vector that begins at (row, column) the positive class of its row?
__device__ unsigned positives(
    const long long* labels, long long row, int column, int classes, int size)
{
    unsigned bits = 0;
    for (int start = -column; start < size; start += classes, ++row) {
        const long long label = labels[row], j = start + label;
        if (label >= 0 && label < classes && j >= 0 && j < size) bits |= 1u << j;
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
    float sum = 0.0f;
    long long i = begin, row = i / classes;  // one division for each thread; then carried along
    int column = i % classes;
    #pragma unroll
    for (int u = 0; u < UNROLL && i + size <= total; ++u) {
        const unsigned own = positives(labels, row, column, classes, size);
        const unsigned in[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
        unsigned out[4] = {0, 0, 0, 0};
        #pragma unroll
        for (int j = 0; j < size; ++j) {
            const int word = j * sizeof(T) / 4, shift = j * sizeof(T) % 4 * 8;
            const T logit = {(decltype(T::bits))(in[word] >> shift)};
            const bool mine = own >> j & 1u;
            const float weight = mine ? own_weight : other_weight;
            const float y = element<GRAD>(to_float(logit), mine, weight, gamma);
            if (GRAD) out[word] |= to_bits(y, T()) << shift; else sum += y;
        }
        if (GRAD) *(uint4*)(grad + i) = {out[0], out[1], out[2], out[3]};
        i += step;
        row += step / classes;
        column += step % classes;
        if (column >= classes) { column -= classes; ++row; }
    }
    // What is left of the last row when the total is no multiple of a vector: an element a thread.
    const long long last = total / size * size + threadIdx.x;
    if (blockIdx.x == 0 && last < total) {
        const bool own = labels[last / classes] == last % classes;
        const float weight = own ? own_weight : other_weight;
        const float y = element<GRAD>(to_float(logits[last]), own, weight, gamma);
        if (GRAD) grad[last].bits = to_bits(y, T()); else sum += y;
    }
    if (GRAD) return;

    // The sum over the block, added in a fixed order: the same bits on every run.
    __shared__ float warp_sum[32];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < blockDim.x / 32; ++warp) sum += warp_sum[warp];
    partial[blockIdx.x] = sum * LN_2;
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
KERNELS(fp16)
"""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = [f"{step}_{dtype}" for step in ("forward", "backward") for dtype in DTYPES.values()]
OPTIONS = ("--ftz=true",)  # exp2f is one instruction only without subnormal numbers
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

    logits: (N, K) fp32, bf16 or fp16, read as they are; the arithmetic is fp32 (on the CPU also
    float64). labels: (N,) int64, k in 0..K-1 where class k is the positive one and -1 for
    background, where every class is negative. With p = sigmoid(logit), a positive class costs
    -alpha (1 - p)^gamma log p and a negative one -(1 - alpha) p^gamma log(1 - p).

    Returns an fp32 scalar that is differentiable in logits, and once. Value and gradient are finite
    for logits up to 1e4 in size and more.

    Raises ValueError for another shape, type or device, and on the CPU for labels outside -1..K-1.
    On a GPU the look would cost a synchronisation: there a label outside is background.
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
    if len(labels) and not labels.is_cuda:
        low, high = labels.aminmax()
        if low < -1 or high >= logits.shape[1]:
            raise ValueError(
                f"labels run from {low} to {high}; with {logits.shape[1]} columns of logits they "
                f"must lie in -1..{logits.shape[1] - 1}"
            )
    return sigmoid_focal_loss_ref(logits, labels, alpha, gamma)


# ---- compare, then time

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU no fallback may pass for the kernel

    def value_and_grad(loss, logits, labels):
        value = loss(logits, labels)
        return value.detach(), *torch.autograd.grad(value, logits)

    for dtype in DTYPES:
        for n, k in (0, 1), (1, 1), (33, 3), (257, 91), (10_001, 80):
            logits = (4 * torch.randn(n, k, device=device)).to(dtype).requires_grad_()
            labels = torch.randint(-1, k, (n,), device=device)
            mine = value_and_grad(sigmoid_focal_loss, logits, labels)
            torch.testing.assert_close(mine, value_and_grad(sigmoid_focal_loss_ref, logits, labels))
    if device == "cpu":
        raise SystemExit("OK for the reference. No GPU here: the kernels did not run.")
    print("OK")
    from torch.utils.benchmark import Timer

    def milliseconds(f, *args):
        return 1e3 * Timer("f(*args)", globals={"f": f, "args": args}).timeit(20).mean

    n, k = 16 * 22_400, 80
    labels = torch.randint(-1, k, (n,), device=device)
    compiled = torch.compile(sigmoid_focal_loss_ref)
    losses = {"kernel": sigmoid_focal_loss, "eager": sigmoid_focal_loss_ref, "compiled": compiled}
    for dtype in torch.float32, torch.bfloat16:
        logits = torch.randn(n, k, device=device, dtype=dtype, requires_grad=True)
        for name, loss in losses.items():
            ms = milliseconds(value_and_grad, loss, logits, labels)
            rate = 3e-9 * logits.nbytes / ms
            print(f"({n}, {k}) {dtype}, forward + backward, {name}: {ms:.3f} ms, {rate:.2f} TB/s")
