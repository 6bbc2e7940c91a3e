"""Target assignment of FCOS: the box that each location has to predict, in O(locations) memory.

    index = assign(points, boxes, center_radius=1.5)      # (B, P), -1 for background

`assign_ref` is the same in plain PyTorch. To use the assignment elsewhere, copy this file: it needs
PyTorch, and CuPy for the kernel. `python kernels/assign.py` compares the two and times them.

The usual vectorized code builds matrices of locations x boxes, which fill the memory for an aerial
image with 1,000 boxes. Here each thread owns a location and looks at the boxes one by one; a block
reads them 256 at a time into shared memory. One launch serves the whole batch.
"""

import functools
import os
import warnings

import numpy as np
import torch
from torch import Tensor

# ---- reference


def assign_ref(points, boxes, center_radius):
    """Compute `assign` in plain PyTorch: the reference for the kernel, used on the CPU."""
    x, y, stride, lo, hi = points.T
    reach = center_radius * stride
    results = []
    for image_boxes in boxes:
        smallest = torch.full_like(x, torch.inf)
        index = torch.full_like(x, -1, dtype=torch.int64)
        for start in range(0, len(image_boxes), 32):  # 32 boxes at a time, to limit the memory
            x1, y1, x2, y2 = image_boxes[start : start + 32].T[:, :, None]  # (G, 1) against (P,)
            matches = (x > x1) & (y > y1) & (x < x2) & (y < y2)
            if center_radius > 0:
                cx = (x1 + x2) / 2
                cy = (y1 + y2) / 2
                matches &= (x > cx - reach) & (x < cx + reach) & (y > cy - reach) & (y < cy + reach)
            furthest = torch.maximum(torch.maximum(x - x1, x2 - x), torch.maximum(y - y1, y2 - y))
            matches &= (furthest >= lo) & (furthest <= hi)
            area, first = torch.where(matches, (x2 - x1) * (y2 - y1), torch.inf).min(dim=0)
            index = torch.where(area < smallest, first + start, index)  # in a tie, the first stays
            smallest = torch.minimum(area, smallest)
        results.append(index)
    return torch.stack(results)


# ---- kernel

CUDA_SOURCE = r"""
const int THREADS = 256, MAX_IMAGES = 256;

// The boxes of all images are concatenated; those of image b are [at[b], at[b + 1]). The struct is
// passed by value, because an array on the device would cost a copy from the host in every step.
struct Offsets { int at[MAX_IMAGES + 1]; };

extern "C" __global__ void assign(
    const float* points,           // (n_points, 5) x, y, stride, lo, hi
    const float4* boxes,           // (all boxes of the batch) x1, y1, x2, y2
    const Offsets offsets,
    long long* index,              // (B, n_points) out: position in its image's boxes, or -1
    int n_points, float radius)
{
    __shared__ float4 tile[THREADS];
    const int first = offsets.at[blockIdx.y];
    const int last = offsets.at[blockIdx.y + 1];
    const long long p = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    // Threads past the end have to reach the barriers, too: with hi = -1 they match no box.
    float x = 0.0f, y = 0.0f, reach = 0.0f, lo = 0.0f, hi = -1.0f;
    if (p < n_points) {
        x = points[5 * p];
        y = points[5 * p + 1];
        reach = radius * points[5 * p + 2];
        lo = points[5 * p + 3];
        hi = points[5 * p + 4];
    }

    float smallest = __uint_as_float(0x7f800000u);
    int match = -1;
    for (int start = first; start < last; start += blockDim.x) {
        __syncthreads();  // wait until no thread reads the previous tile
        if (start + (int)threadIdx.x < last) tile[threadIdx.x] = boxes[start + threadIdx.x];
        __syncthreads();
        const int count = min((int)blockDim.x, last - start);
        for (int j = 0; j < count; ++j) {
            const float4 box = tile[j];
            const float l = x - box.x, t = y - box.y, r = box.z - x, b = box.w - y;
            if (!(l > 0.0f && t > 0.0f && r > 0.0f && b > 0.0f)) continue;
            const float furthest = fmaxf(fmaxf(l, t), fmaxf(r, b));
            if (!(furthest >= lo && furthest <= hi)) continue;
            if (radius > 0.0f) {
                const float cx = (box.x + box.z) / 2.0f, cy = (box.y + box.w) / 2.0f;
                if (!(x > cx - reach && x < cx + reach)) continue;
                if (!(y > cy - reach && y < cy + reach)) continue;
            }
            const float area = (box.z - box.x) * (box.w - box.y);
            if (area < smallest) {  // in a tie, the first box stays
                smallest = area;
                match = start + j - first;
            }
        }
    }
    if (p < n_points) index[(long long)blockIdx.y * n_points + p] = match;
}
"""
KERNELS = ("assign",)
OPTIONS = ("--fmad=false",)  # without fused multiply-adds, results equal PyTorch's bit for bit
THREADS = 256  # as in the CUDA text
MAX_IMAGES = 256  # as in the CUDA text


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
def _assign_kernel(points, boxes, center_radius):
    """Compute `assign` with the kernel, up to MAX_IMAGES images in a launch."""
    P = len(points)
    blocks = -(-P // THREADS)
    points = points.contiguous()
    index = torch.empty((len(boxes), P), dtype=torch.int64, device=points.device)
    for first in range(0, len(boxes), MAX_IMAGES):
        images = boxes[first : first + MAX_IMAGES]
        all_boxes = torch.cat(images)  # a new tensor, so that it starts at a multiple of 16 bytes
        offsets = np.zeros(1, dtype=[("at", np.int32, MAX_IMAGES + 1)])  # CuPy passes it by value
        offsets["at"][0, 1 : len(images) + 1] = np.cumsum([len(b) for b in images])
        args = points, all_boxes, offsets, index[first:], np.int32(P), np.float32(center_radius)
        _launch("assign", (blocks, len(images)), THREADS, *args)
    return index


@torch.no_grad()
def assign(points: Tensor, boxes: list[Tensor], center_radius: float) -> Tensor:
    """Return the index of the box that each location has to predict, or -1 for background.

    points: (P, 5) fp32, a row per location: x, y, the stride of its level, and the range lo, hi of
    its level, all in pixels. boxes: a list of B tensors, one for each image: (G, 4) x1, y1, x2, y2
    in pixels, on the device of points. G may be 0, and may differ between images.

    A box is a candidate if the location lies strictly inside it, and the largest of the four
    distances to its sides is in [lo, hi]. With center_radius > 0 the location must also be less
    than center_radius * stride away from the center of the box, in x and in y. The candidate with
    the smallest area is assigned; among equal areas, the first (arXiv 1904.01355, section 3).

    Returns int64 (B, P): the row of the box in the tensor of its image.

    Raises ValueError for a wrong shape or device, if there is no image, or if the radius is
    negative.
    """
    if points.ndim != 2 or points.shape[1] != 5:
        raise ValueError(f"points: expected (P, 5), found {tuple(points.shape)}")
    if len(boxes) == 0:
        raise ValueError("boxes: expected a tensor for each image, found none")
    for image, b in enumerate(boxes):
        if b.ndim != 2 or b.shape[1] != 4:
            raise ValueError(f"boxes of image {image}: expected (G, 4), found {tuple(b.shape)}")
        if b.device != points.device:
            raise ValueError(f"points is on {points.device}; move boxes there as well")
    if not center_radius >= 0:
        raise ValueError(f"center_radius {center_radius}: expected 0 (the whole box) or more")
    points = points.float()
    boxes = [b.float() for b in boxes]
    run = _assign_kernel if len(points) and _use_kernel(points) else assign_ref
    return run(points, boxes, center_radius)


# ---- compare, then time

if __name__ == "__main__":
    from torch.utils.benchmark import Timer

    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU, fail instead of falling back to PyTorch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = torch.arange(4.0, 1200, 8, device=device)  # one level of stride 8: 22,500 locations
    level = torch.tensor([8.0, -1, 64], device=device).expand(len(grid) ** 2, 3)
    points = torch.cat((torch.cartesian_prod(grid, grid), level), dim=1)
    corner = 1100 * torch.rand(3, 500, 2, device=device)
    size = 100 * torch.rand(3, 500, 2, device=device)
    boxes = list(torch.cat((corner, corner + size), dim=2).round())
    args = points, boxes, 1.5
    assert torch.equal(assign(*args), assign_ref(*args))
    for call in (assign, assign_ref):
        ms = 1e3 * Timer("call(*args)", globals=globals()).timeit(10).mean
        print(f"{call.__name__} on the {device}: {ms:.3f} ms")
