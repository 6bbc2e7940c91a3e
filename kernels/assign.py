"""Target assignment of FCOS: the box that each location learns, in O(locations) memory.

    labels, ltrb, index = assign(points, boxes, labels, center_radius=1.5)      # (B, P, ...)

`assign_ref` is the same in plain PyTorch. The file needs nothing but PyTorch, and CuPy for the
kernel: copy it. `python kernels/assign.py` compares the two, then times them.

Vectorised PyTorch builds locations x boxes matrices: an aerial image with 1,000 boxes takes several
times 22,400 x 1,000 x 4 floats, and users run out of memory. Here a thread owns a location and sees
the boxes one by one; a block reads them from memory once, 256 at a time, into shared memory. One
launch serves the whole batch. Per location it reads 20 bytes and writes 32.
"""

import functools
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- reference


def assign_ref(points, boxes, labels, center_radius):
    """`assign` in plain PyTorch: what the kernel must reproduce, and what runs on the CPU."""
    x, y, stride, lo, hi = points.T
    reach = center_radius * stride
    results = []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        smallest = torch.full_like(x, torch.inf)
        index = torch.full_like(x, -1, dtype=torch.int64)
        for start in range(0, len(image_boxes), 32):  # 32 boxes at a time bound the memory
            x1, y1, x2, y2 = image_boxes[start : start + 32].T[:, :, None]  # (G, 1) against (P,)
            matches = (x > x1) & (y > y1) & (x < x2) & (y < y2)
            if center_radius > 0:
                cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
                matches &= (x > cx - reach) & (x < cx + reach) & (y > cy - reach) & (y < cy + reach)
            furthest = torch.maximum(torch.maximum(x - x1, x2 - x), torch.maximum(y - y1, y2 - y))
            matches &= (furthest >= lo) & (furthest <= hi)
            area, first = torch.where(matches, (x2 - x1) * (y2 - y1), torch.inf).min(dim=0)
            index = torch.where(area < smallest, first + start, index)  # a tie keeps the earlier
            smallest = torch.minimum(area, smallest)
        # Index -1 picks the row that pads the end: an image without boxes is no special case.
        matched = F.pad(image_labels, (0, 1), value=-1)[index]
        x1, y1, x2, y2 = F.pad(image_boxes, (0, 0, 0, 1))[index].T
        ltrb = torch.stack((x - x1, y - y1, x2 - x, y2 - y), dim=1)
        results.append((matched, torch.where(index[:, None] >= 0, ltrb, 0), index))
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


# ---- kernel

CUDA_SOURCE = r"""
const int THREADS = 256, MAX_IMAGES = 256;

// Boxes of all images stand one after the other; those of image b are [at[b], at[b + 1]). Passed by
// value: an array on the device would cost a copy from the host, and a wait, in every step.
struct Offsets { int at[MAX_IMAGES + 1]; };

extern "C" __global__ void assign(
    const float* points,           // (n_points, 5) x, y, stride, lo, hi
    const float4* boxes,           // (all boxes of the batch) x1, y1, x2, y2
    const long long* labels,       // (all boxes of the batch)
    const Offsets offsets,
    long long* matched_label,      // (B, n_points) out, -1 for background
    float4* matched_ltrb,          // (B, n_points) out, 0 for background
    long long* matched_index,      // (B, n_points) out: position in its image's boxes, or -1
    int n_points, float radius)
{
    __shared__ float4 tile[THREADS];
    const int first = offsets.at[blockIdx.y], last = offsets.at[blockIdx.y + 1];
    const long long p = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    // Threads past the end stay for the barriers; hi = -1 lets nothing match.
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
    float4 ltrb = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int start = first; start < last; start += blockDim.x) {
        __syncthreads();  // nobody still reads the previous tile
        if (start + (int)threadIdx.x < last) tile[threadIdx.x] = boxes[start + threadIdx.x];
        __syncthreads();
        const int count = min((int)blockDim.x, last - start);
        for (int j = 0; j < count; ++j) {
            const float4 box = tile[j];  // all threads read one address: a broadcast
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
            if (area < smallest) {  // a tie keeps the earlier box
                smallest = area;
                match = start + j;
                ltrb = {l, t, r, b};
            }
        }
    }
    if (p >= n_points) return;
    const long long out = (long long)blockIdx.y * n_points + p;
    matched_label[out] = match < 0 ? -1 : labels[match];
    matched_ltrb[out] = ltrb;
    matched_index[out] = match < 0 ? -1 : match - first;
}
"""
KERNELS, OPTIONS = ("assign",), ("--fmad=false",)  # no fused rounding: bit for bit PyTorch
THREADS, MAX_IMAGES = 256, 256  # as in the CUDA text


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


def _assign_kernel(points, boxes, labels, center_radius):
    B, P = len(boxes), len(points)
    offsets = np.zeros(1, dtype=[("at", np.int32, MAX_IMAGES + 1)])  # CuPy passes it by value
    offsets["at"][0, 1 : B + 1] = np.cumsum([len(b) for b in boxes])
    matched_label, index = torch.empty((2, B, P), dtype=torch.int64, device=points.device)
    ltrb = points.new_empty((B, P, 4))
    _launch(
        "assign", (-(-P // THREADS), B), THREADS,
        points.contiguous(), torch.cat(boxes), torch.cat(labels), offsets,
        matched_label, ltrb, index, np.int32(P), np.float32(center_radius),
    )  # fmt: skip
    return matched_label, ltrb, index


@torch.no_grad()
def assign(
    points: Tensor, boxes: list[Tensor], labels: list[Tensor], center_radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which box, if any, each location of each image has to predict (arXiv 1904.01355, section 3).

    points: (P, 5) fp32, a row per location: x, y, the stride of its level, and the range lo, hi of
    its level, all in pixels. boxes: for each of B images (G, 4) x1, y1, x2, y2 in pixels; labels:
    (G,) integers each. G may be 0 and differ between images. All on one device.

    A box is a candidate for a location strictly inside it whose largest distance to a side lies in
    [lo, hi], both ends included. With center_radius > 0 the location must also be less than
    center_radius * stride from the centre of the box in x and in y. Of several candidates the one
    of smallest area wins, of equal areas the first.

    Returns labels (B, P) int64, ltrb (B, P, 4) fp32 distances to the left, top, right and bottom
    side in pixels, and index (B, P) int64, the position of the box in its image's list. A location
    without a box, background, has -1, zeros and -1.

    Raises ValueError for another shape or device, no image, or a negative radius.
    """
    if points.ndim != 2 or points.shape[1] != 5:
        raise ValueError(f"points is {tuple(points.shape)}; it must be (P, 5), see assign")
    if len(boxes) == 0 or len(boxes) != len(labels):
        raise ValueError(
            f"{len(boxes)} tensors of boxes and {len(labels)} of labels; "
            "give one of each per image, and at least one image"
        )
    for image, (b, k) in enumerate(zip(boxes, labels, strict=True)):
        if b.ndim != 2 or b.shape[1] != 4 or k.shape != b.shape[:1]:
            raise ValueError(
                f"image {image} has boxes {tuple(b.shape)} and labels {tuple(k.shape)}; "
                "they must be (G, 4) and (G,), also where G is 0"
            )
        if not b.device == k.device == points.device:
            raise ValueError(f"points is on {points.device}; move boxes and labels there as well")
    if not center_radius >= 0:
        raise ValueError(f"center_radius is {center_radius}; give 0 (the whole box) or more")
    points, boxes = points.float(), [b.float() for b in boxes]
    labels = [k.long() for k in labels]
    if len(points) == 0 or not _use_kernel(points):
        return assign_ref(points, boxes, labels, center_radius)
    parts = [
        _assign_kernel(points, boxes[i : i + MAX_IMAGES], labels[i : i + MAX_IMAGES], center_radius)
        for i in range(0, len(boxes), MAX_IMAGES)
    ]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


# ---- compare, then time

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["FCOS_KERNELS"] = "cupy"  # on a GPU no fallback may pass for the kernel

    def scene(images, n_boxes):
        """One level of stride 8 over 1,200 x 1,200 pixels: 22,500 locations."""
        y, x = torch.meshgrid(*2 * [torch.arange(4.0, 1200, 8)], indexing="ij")
        level = torch.tensor([8.0, -1, 64]).expand(x.numel(), 3)
        points = torch.cat((torch.stack((x, y), dim=2).view(-1, 2), level), dim=1).to(device)
        corner, size = 1100 * torch.rand(images, n_boxes, 2), 100 * torch.rand(images, n_boxes, 2)
        boxes = torch.cat((corner, corner + size), dim=2).round().to(device)
        return points, list(boxes), list(torch.randint(80, (images, n_boxes), device=device)), 1.5

    for n_boxes in (0, 1, 7, 300, 1000):
        args = scene(3, n_boxes)
        for mine, expected in zip(assign(*args), assign_ref(*args), strict=True):
            assert torch.equal(mine, expected), f"{n_boxes} boxes"
    print("OK" if device == "cuda" else "OK for the reference. No GPU: the kernel did not run.")
    if device == "cuda":
        from torch.utils.benchmark import Timer

        def milliseconds(f, *args):
            return 1e3 * Timer("f(*args)", globals={"f": f, "args": args}).timeit(20).mean

        args = scene(16, 500)
        for name, function in ("kernel", assign), ("PyTorch", assign_ref):
            torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(function, *args)
            peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
            print(f"16 images x 22,500 locations x 500 boxes, {name}: {ms:.3f} ms, peak {peak}")
