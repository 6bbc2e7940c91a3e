"""Inputs for the kernels, and checks that compare a kernel with its reference.

test_kernels.py and its neighbors run the CUDA text on the CPU; test_kernels_gpu.py uses the same
inputs on a GPU.
"""

import numpy as np
import torch

from kernels import assign as assign_file
from kernels import focal_loss as focal_file
from kernels import iou_loss as iou_file
from kernels import nms as nms_file
from kernels.assign import assign, assign_ref
from kernels.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_ref
from kernels.iou_loss import iou_loss, iou_loss_ref
from kernels.nms import batched_nms, batched_nms_ref

FILES = {"iou_loss": iou_file, "focal_loss": focal_file, "assign": assign_file, "nms": nms_file}
SIZES = (1, 31, 32, 33, 255, 256, 257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def value_and_grad(loss, leaf, *args):
    """Return the value of a loss and its gradient for an upstream gradient of 3."""
    leaf = leaf.clone().requires_grad_()
    value = loss(leaf, *args)
    (grad,) = torch.autograd.grad(3 * value, leaf)
    return value.detach(), grad


def ltrb_pairs(n):
    """Return pred (n, 4), target (n, 4) and weight (n,) with ties, zeros, NaN and infinity."""
    pred, target = 40 * torch.rand(2, n, 4)
    pred[::5] = target[::5]  # ties of min and max
    pred[1::5, 1:3] = target[1::5, 1:3]
    weight = torch.rand(n)
    weight[2::5] = 0
    pred[2::10] = torch.nan  # only where the weight is 0
    pred[7::10] = torch.inf
    target[2::5] = 0
    return pred, target, weight


def logits_and_labels(n, classes, dtype=torch.float32):
    """Return logits (n, classes), some of them 1e4, -1e4 or 0, and labels (n,)."""
    logits = 4 * torch.randn(n, classes)
    logits[::7] = 1e4 * torch.sign(logits[::7])
    logits[1::7, 0] = 0
    return logits.to(dtype), torch.randint(-1, classes, (n,))


def location_grid(height, width):
    """Return the points (P, 5) of an image on P3 to P7, as FCOS places them."""
    edges = (-1, 64, 128, 256, 512, torch.inf)
    levels = []
    for stride, lo, hi in zip((8, 16, 32, 64, 128), edges[:-1], edges[1:], strict=True):
        y = torch.arange(-(-height // stride)) * stride + stride // 2
        x = torch.arange(-(-width // stride)) * stride + stride // 2
        y, x = torch.meshgrid(y, x, indexing="ij")
        xy = torch.stack((x, y), dim=2).reshape(-1, 2)
        level = torch.tensor([stride, lo, hi]).expand(len(xy), 3)
        levels.append(torch.cat((xy, level), dim=1))
    return torch.cat(levels).float()


def random_boxes(n, height, width):
    """Return boxes (n, 4) on whole pixels; some have no area, and some have equal areas."""
    image = torch.tensor([width, height])
    center = image * torch.rand(n, 2)
    size = image * torch.rand(n, 2) ** 3
    return torch.cat((center - size / 2, center + size / 2), dim=1).round()


def candidates(images, n, classes, levels=None):
    """Return overlapping boxes (images, n, 4), their scores and labels (images, n).

    levels: the number of different scores, so that most are ties.
    """
    corner = 100 * torch.rand(images, n, 2)
    size = 40 * torch.rand(images, n, 2)
    boxes = torch.cat((corner, corner + size), dim=2)
    scores = torch.stack([torch.randperm(n) for _ in range(images)]) / max(n, 1)
    if levels:
        scores = (scores * levels).round() - levels // 2
    return boxes, scores, torch.randint(classes, (images, n))


# ---- checks ------------------------------------------------------------------------------------


def check_iou_loss(n, kind):
    """Compare value and gradient of `iou_loss` with the reference, for n locations."""
    pred, target, weight = ltrb_pairs(n)
    value, grad = value_and_grad(iou_loss, pred, target, weight, kind)
    expected, expected_grad = value_and_grad(iou_loss_ref, pred, target, weight, kind)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert (grad[weight == 0] == 0).all()
    assert grad.isfinite().all()


def check_focal_loss(n, classes, dtype, alpha=0.25, gamma=2.0):
    """Compare value and gradient of `sigmoid_focal_loss` with the reference in float64."""
    logits, labels = logits_and_labels(n, classes, dtype)
    value, grad = value_and_grad(sigmoid_focal_loss, logits, labels, alpha, gamma)
    expected, expected_grad = value_and_grad(
        sigmoid_focal_loss_ref, logits.double(), labels, alpha, gamma
    )
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    torch.testing.assert_close(value, expected.float(), rtol=5e-6, atol=1e-6)
    # The gradient is rounded to the dtype; fp16 has steps of 6e-8 below its normal range.
    rtol = 1e-5 + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=2e-7)


def check_focal_loss_writes_no_more_than_the_gradient():
    """Check the memory behind a gradient whose size is no multiple of 16 bytes."""
    logits = torch.zeros(12)[:9]
    labels = torch.zeros(3, dtype=torch.int64)
    upstream = torch.ones(())
    grad = torch.full((12,), 7.0)
    numbers = np.int64(9), np.int32(3), np.float32(0.25), np.float32(2)
    focal_file._launch("backward_fp32", (1,), 32, logits, labels, upstream, grad[:9], *numbers)
    assert (grad[:9] != 7).all()
    assert (grad[9:] == 7).all()


def check_assign(points, boxes, radius):
    """Check that `assign` equals the reference; return the index."""
    index = assign(points, boxes, radius)
    assert torch.equal(index, assign_ref(points, boxes, radius))
    return index


def check_nms(boxes, scores, labels, threshold=0.5, limit=20):
    """Check that `batched_nms` equals the reference; return the kept candidates."""
    kept = batched_nms(boxes, scores, labels, threshold, limit)
    assert torch.equal(kept, batched_nms_ref(boxes, scores, labels, threshold, limit))
    return kept
