"""The four kernels without a GPU.

The references against the official code's numbers, torchvision and float64; the CUDA text, run on
the CPU by cuda_shim, against the references; the text with a planted fault, which must not pass;
NVRTC's cubins for five architectures.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import warnings

import cuda_shim
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from kernels import assign as assign_file
from kernels import focal_loss as focal_file
from kernels import iou_loss as iou_file
from kernels import nms as nms_file
from kernels.assign import assign, assign_ref
from kernels.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_ref
from kernels.iou_loss import CUDA_KINDS, KINDS, iou, iou_loss, iou_loss_ref
from kernels.nms import batched_nms, batched_nms_ref

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = {"iou_loss": iou_file, "focal_loss": focal_file, "assign": assign_file, "nms": nms_file}
SIZES = (1, 31, 32, 33, 255, 256, 257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["forward", "reverse"])
def on_shim(request, monkeypatch):
    """Run kernels on the shim, in both orders of threads, with NaN in the memory of torch.empty."""
    for file in FILES.values():
        cuda_shim.install(monkeypatch, file, reverse=request.param == "reverse")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def value_and_grad(loss, leaf, *args):
    leaf = leaf.clone().requires_grad_()
    value = loss(leaf, *args)
    return value.detach(), torch.autograd.grad(3 * value, leaf)[0]  # upstream is not 1


# ---- IoU loss


def ltrb_pairs(n):
    pred, target = 40 * torch.rand(2, n, 4)
    pred[::5] = target[::5]  # ties of min and max
    pred[1::5, 1:3] = target[1::5, 1:3]
    weight = torch.rand(n)
    weight[2::5] = 0
    pred[2::10] = torch.nan
    pred[7::10] = torch.inf
    target[2::5] = 0
    return pred, target, weight


@pytest.mark.parametrize("kind", KINDS)
def test_iou_loss_kernel_equals_the_reference(on_shim, kind):
    for n in SIZES:
        check_iou_loss(n, kind)


def check_iou_loss(n, kind):
    pred, target, weight = ltrb_pairs(n)
    value, grad = value_and_grad(iou_loss, pred, target, weight, kind)
    expected, expected_grad = value_and_grad(iou_loss_ref, pred, target, weight, kind)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert (grad[weight == 0] == 0).all() and grad.isfinite().all()


def test_iou_loss_of_known_boxes():
    pred, target = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[2.0, 1, 4, 3]])  # I 16, U 32
    assert list(KINDS) == list(CUDA_KINDS) == ["iou", "linear_iou", "giou", "giou_exact"]
    for kind, expected in zip(KINDS, (0.663294, 0.484848, 0.595960, 0.611111), strict=True):
        value = iou_loss(pred, target, torch.tensor([0.5]), kind)
        torch.testing.assert_close(value, torch.tensor(expected / 2), rtol=1e-5, atol=0)
    assert torch.equal(iou(pred, target), torch.tensor([17 / 33]))


def test_exact_giou_is_torchvisions_and_does_not_depend_on_the_unit():
    pred, target = 0.1 + 5 * torch.rand(2, 100, 4, dtype=torch.float64)
    boxes = [torch.cat((-x[:, :2], x[:, 2:]), 1) for x in (pred, target)]
    expected = torchvision.ops.generalized_box_iou_loss(*boxes, reduction="sum")
    for unit in (1, 8):
        value = iou_loss(pred * unit, target * unit, torch.ones(100), "giou_exact")
        torch.testing.assert_close(value, expected)
    nothing = torch.zeros(1, 4)
    assert iou_loss(nothing, target[:1].float(), torch.ones(1), "giou_exact") == 1
    assert iou_loss(nothing, nothing, torch.ones(1), "giou_exact").isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_iou_is_one_number_a_location(dtype):
    """The 16-bit types in fp32: 300 x 300 pixels are more than fp16 holds."""
    pred, target = (torch.rand(2, 2, 5, 4) * 300).to(dtype)
    pred.requires_grad_()
    ratio = iou(pred, target)
    assert ratio.dtype == torch.promote_types(dtype, torch.float32)
    corners = [torch.cat((-x[..., :2], x[..., 2:]), 2).double() for x in (pred, target)]
    expected = torch.stack([torchvision.ops.box_iou(*pair).diag() for pair in zip(*corners)])
    torch.testing.assert_close(ratio.double(), expected, rtol=0, atol=1e-3)  # the smoothing
    loss = (
        torch.autograd.grad(ratio.sum(), pred)[0]
        + torch.autograd.grad(
            iou_loss(pred.flatten(0, 1), target.flatten(0, 1), torch.ones(10), "linear_iou"), pred
        )[0]
    )
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    with pytest.raises(ValueError, match=r"\(2, 5, 4\) and target \(5, 4\)"):
        iou(pred, target[0])


def squared(pred, target):
    """Compute a kind of loss that no kernel computes."""
    return (1 - iou(pred, target)) ** 2


def test_a_kind_that_no_kernel_computes_runs_as_pytorch_and_says_so_once(on_shim, monkeypatch):
    monkeypatch.setitem(KINDS, "squared", squared)
    iou_file._has_kernel.__wrapped__.cache_clear()
    pred, target, weight = ltrb_pairs(100)
    with pytest.warns(UserWarning, match="no kernel computes 'squared'") as caught:
        for _ in range(2):
            value, grad = value_and_grad(iou_loss, pred, target, weight, "squared")
    assert len(caught) == 1
    expected, expected_grad = value_and_grad(iou_loss_ref, pred, target, weight, "squared")
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)
    known = value_and_grad(iou_loss_ref, pred, target, weight)[0]
    assert not torch.isclose(value, known)
    # If the kernel gets an unknown kind nevertheless, it returns NaN, not another kind of loss.
    monkeypatch.setitem(CUDA_KINDS, "squared", 4)
    iou_file._has_kernel.__wrapped__.cache_clear()
    value, grad = value_and_grad(iou_loss, pred, target, weight, "squared")
    assert value.isnan() and grad[weight != 0].isnan().all() and (grad[weight == 0] == 0).all()
    iou_file._has_kernel.__wrapped__.cache_clear()


@pytest.mark.parametrize("loss", [iou_loss, iou_loss_ref])
def test_iou_loss_ignores_what_has_no_weight(loss):
    pred = torch.tensor([[torch.nan] * 4, [torch.inf] * 4, [1, 2, 3, 4.0]], requires_grad=True)
    value = loss(pred, torch.rand(3, 4), torch.zeros(3), "iou")
    (grad,) = torch.autograd.grad(value, pred)
    assert value == 0 and (grad == 0).all()
    empty = torch.zeros(0, 4, requires_grad=True)
    value = loss(empty, empty.detach(), torch.zeros(0))
    assert torch.autograd.grad(value, empty)[0].shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_iou_loss_gradient_in_float64(kind):
    pred, target = 1 + 8 * torch.rand(2, 20, 4, dtype=torch.float64)
    weight = torch.rand(20, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: iou_loss(p, target, weight, kind), pred.requires_grad_()
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_iou_loss_takes_16_bit_input_and_views(on_shim, dtype):
    pred, target = (40 * torch.rand(2, 100, 4)).to(dtype)
    weight = torch.rand(200)[::2]
    value, grad = value_and_grad(iou_loss, pred, target, weight)
    expected, expected_grad = value_and_grad(iou_loss_ref, pred.float(), target.float(), weight)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad.to(dtype))
    shifted = torch.rand(401)[1:].view(100, 4)  # contiguous, but not on a 16-byte boundary
    columns = torch.rand(4, 100).T
    torch.testing.assert_close(
        iou_loss(shifted, columns, weight), iou_loss_ref(shifted, columns, weight)
    )
    assert not iou_loss(pred, target, weight).requires_grad


# ---- focal loss


def logits_and_labels(n, classes, dtype=torch.float32):
    logits = 4 * torch.randn(n, classes)
    logits[::7] = 1e4 * torch.sign(logits[::7])
    logits[1::7, 0] = 0
    return logits.to(dtype), torch.randint(-1, classes, (n,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 8, 80, 91])
def test_focal_loss_kernel_equals_the_reference(on_shim, dtype, classes):
    for n in SIZES:
        check_focal_loss(n, classes, dtype)
    check_focal_loss(40, classes, dtype, alpha=0.7, gamma=0.5)
    check_focal_loss(40, classes, dtype, alpha=1.0, gamma=0.0)


def check_focal_loss(n, classes, dtype, alpha=0.25, gamma=2.0):
    logits, labels = logits_and_labels(n, classes, dtype)
    value, grad = value_and_grad(sigmoid_focal_loss, logits, labels, alpha, gamma)
    expected, expected_grad = value_and_grad(
        sigmoid_focal_loss_ref, logits.double(), labels, alpha, gamma
    )
    assert value.dtype == torch.float32 and grad.dtype == dtype and grad.isfinite().all()
    torch.testing.assert_close(value, expected.float(), rtol=5e-6, atol=1e-6)
    # Rounding to the dtype comes on top of 1e-5: an ulp of fp16 below its normal range is 6e-8.
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=1e-5 + torch.finfo(dtype).eps / 2, atol=2e-7
    )


def check_focal_loss_writes_no_more_than_the_gradient():
    labels, grad = torch.zeros(3, dtype=torch.int64), torch.full((12,), 7.0)
    args = torch.zeros(12)[:9], labels, torch.ones(()), grad[:9]
    numbers = np.int64(9), np.int32(3), np.float32(0.25), np.float32(2)
    focal_file._launch("backward_fp32", (1,), 32, *args, *numbers)
    assert (grad[:9] != 7).all() and (grad[9:] == 7).all()


def test_focal_loss_of_one_known_location():
    logits, terms = torch.tensor([[0.0, 2, -3]]), (0.129965, 0.000450891, 0.0000819625)
    # The three terms of the official code, whose label 2 is our 1.
    value = sigmoid_focal_loss(logits, torch.tensor([1]))
    torch.testing.assert_close(value, torch.tensor(sum(terms)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_gradient_in_float64(gamma):
    logits = 3 * torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([-1, 0, 4, 2, -1, 1])
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, labels, 0.3, gamma), logits.requires_grad_()
    )


def test_focal_loss_equals_torchvision():
    logits, labels = 3 * torch.randn(500, 20), torch.randint(-1, 20, (500,))
    one_hot = F.one_hot(labels + 1, 21)[:, 1:].float()
    expected = value_and_grad(
        lambda x: torchvision.ops.sigmoid_focal_loss(x, one_hot, reduction="sum"), logits
    )
    torch.testing.assert_close(value_and_grad(sigmoid_focal_loss, logits, labels), expected)


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_focal_loss_is_stable(size):
    logits, labels = torch.tensor([[size, -size], [-size, size]]), torch.tensor([0, 0])
    value, grad = value_and_grad(sigmoid_focal_loss, logits, labels)
    torch.testing.assert_close(value, torch.tensor(0.25 * size + 0.75 * size))
    torch.testing.assert_close(grad, 3 * torch.tensor([[0, 0], [-0.25, 0.75]]))
    empty = torch.zeros(0, 80, requires_grad=True)
    value = sigmoid_focal_loss(empty, torch.zeros(0, dtype=torch.int64))
    assert torch.autograd.grad(value, empty)[0].shape == (0, 80)


def test_bf16_by_hand():
    """Read every 16-bit number and round every kind of fp32 number: the bits equal PyTorch's."""
    text = """
    extern "C" __global__ void convert(const bf16* in, float* out, const float* wide, bf16* narrow)
    {
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        out[i] = to_float(in[i]);
        store(narrow[i], wide[i]);
    }"""
    launch = cuda_shim.launcher(focal_file.CUDA_SOURCE + text, ["convert"])
    bits = torch.arange(65536).to(torch.int16)
    wide = torch.randn(65536) * 2.0 ** torch.randint(-130, 120, (65536,))
    special = torch.tensor([0, 1e-45, 2**-126, 3.4e38, torch.inf, torch.nan])
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    ties = (bits[:500].int() << 16 | 0x8000).view(torch.float32)
    wide[:1015] = torch.cat((special, -special, ties, -ties, nan))
    out, narrow = torch.empty(65536), torch.empty(65536, dtype=torch.int16)
    launch("convert", (256,), 256, bits, out, wide, narrow)
    torch.testing.assert_close(
        out, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True
    )
    mine, theirs = narrow.view(torch.bfloat16), wide.bfloat16()
    number = ~wide.isnan()
    assert torch.equal(narrow[number], theirs.view(torch.int16)[number])
    assert mine[~number].isnan().all()


def test_focal_loss_passes_nan_on(on_shim):
    """A non-finite logit must show in the loss, which the trainer checks, and in the gradient."""
    for dtype in DTYPES:
        logits = torch.zeros(40, 80, dtype=dtype)
        logits[7, 3] = torch.nan
        for labels in torch.full((40,), -1), torch.full((40,), 3):
            value, grad = value_and_grad(sigmoid_focal_loss, logits, labels)
            assert value.isnan() and grad.isnan().nonzero().tolist() == [[7, 3]]


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
def test_focal_loss_takes_labels_that_no_class_has_for_background(kernel, monkeypatch):
    if kernel:
        cuda_shim.install(monkeypatch, focal_file)
    logits, labels = torch.randn(60, 80), torch.tensor([80, 2**31, 2**32 + 3, -2, -(2**40)] * 12)
    expected = value_and_grad(sigmoid_focal_loss_ref, logits, torch.full((60,), -1))
    torch.testing.assert_close(
        value_and_grad(sigmoid_focal_loss, logits, labels), expected, rtol=1e-5, atol=1e-6
    )


def test_float64_runs_as_pytorch_in_float64(on_shim):
    logits, labels = logits_and_labels(40, 8, torch.float64)
    pred, target = 40 * torch.rand(2, 40, 4, dtype=torch.float64)
    for mine, reference, args in (
        (sigmoid_focal_loss, sigmoid_focal_loss_ref, (logits, labels)),
        (iou_loss, iou_loss_ref, (pred, target, torch.rand(40, dtype=torch.float64))),
    ):
        value, grad = value_and_grad(mine, *args)
        expected, expected_grad = value_and_grad(reference, *args)
        assert value.dtype == torch.float64
        assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


def test_kernels_refuse_a_second_derivative(on_shim):
    """Their gradient has no graph, so a second derivative would silently be zero."""
    x, labels = torch.rand(3, 4, requires_grad=True), torch.tensor([0, -1, 3])
    weight = torch.rand(3)
    for loss in (iou_loss(x, torch.rand(3, 4), weight), sigmoid_focal_loss(x, labels)):
        upstream = torch.tensor(1.0, requires_grad=True)
        (grad,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


# ---- assignment


def location_grid(height, width):
    """Return FCOS's points (P, 5) of an image, P3 to P7."""
    edges = (-1, 64, 128, 256, 512, torch.inf)
    levels = []
    for stride, lo, hi in zip((8, 16, 32, 64, 128), edges[:-1], edges[1:], strict=True):
        y = torch.arange(-(-height // stride)) * stride + stride // 2
        x = torch.arange(-(-width // stride)) * stride + stride // 2
        y, x = torch.meshgrid(y, x, indexing="ij")
        level = torch.tensor([stride, lo, hi]).expand(y.numel(), 3)
        levels.append(torch.cat((torch.stack((x, y), dim=2).reshape(-1, 2), level), dim=1))
    return torch.cat(levels).float()


def random_boxes(n, height, width):
    centre = torch.rand(n, 2) * torch.tensor([width, height])
    size = torch.tensor([width, height]) * torch.rand(n, 2) ** 3
    return torch.cat((centre - size / 2, centre + size / 2), dim=1).round()  # ties, zero areas


def check_assign(points, boxes, radius):
    index = assign(points, boxes, radius)
    assert torch.equal(index, assign_ref(points, boxes, radius))
    return index


def labels_and_ltrb(points, boxes, classes, index):
    """Return the targets of the locations: label and distances of their box, or -1 and 0."""
    labels, ltrb = torch.full(index.shape, -1), torch.zeros(*index.shape, 4)
    for image, found in enumerate(index >= 0):
        chosen = index[image, found]
        labels[image, found] = classes[image][chosen].long()
        (x, y), (x1, y1, x2, y2) = points[found, :2].T, boxes[image][chosen].T
        ltrb[image, found] = torch.stack((x - x1, y - y1, x2 - x, y2 - y), dim=1)
    return labels, ltrb


@pytest.mark.parametrize("radius", [0, 1.5, 0.3])
def test_assign_kernel_equals_the_reference(on_shim, radius):
    points = location_grid(100, 140)
    for counts in ((0,), (1, 0, 5), (31, 32, 33), (255, 256, 257), (600, 0)):
        check_assign(points, [random_boxes(n, 100, 140) for n in counts], radius)
    for n in SIZES:
        check_assign(points[:n], [random_boxes(40, 100, 140)], radius)
    identical = random_boxes(1, 100, 140).repeat(50, 1)
    odd = torch.tensor([[torch.nan, 0, 50, 50], [0, 0, torch.inf, torch.inf], [90, 90, 10, 10]])
    index = check_assign(points, [identical, odd, identical.flip(0)], radius)
    assert set(index[0].tolist()) <= {-1, 0}  # the first of boxes of equal area
    assert index.dtype == torch.int64


def test_assign_takes_thousands_of_boxes_and_hundreds_of_images(on_shim):
    points = location_grid(64, 64)
    check_assign(points, [random_boxes(5000, 64, 64)], 1.5)
    check_assign(points, [random_boxes(n % 3, 64, 64) for n in range(300)], 1.5)


def test_assign_rules():
    points = torch.tensor([[64.0, 32, 8, -1, 64], [64, 32, 16, 64, 128], [100, 30, 8, -1, 64]])
    box = torch.tensor([[0.0, 0, 100, 60]])
    assert assign(points, [box], 0).tolist() == [[0, 0, -1]]  # 64 is on both levels; 100 is outside
    assert assign(points, [box], 1.5).tolist() == [[-1, 0, -1]]
    assert assign(points, [box[:0]] * 2, 1.5).tolist() == [[-1, -1, -1]] * 2
    assert assign(points[:0], [box], 1.5).shape == (1, 0)


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_assign_equals_the_official_code(radius):
    """They differ only where w * h and the official (w + 1) (h + 1) rank two boxes differently."""
    cases = json.loads((GOLDEN / "targets.json").read_text())
    arrays = np.load(GOLDEN / "targets.npz")
    tag = "r15" if radius else "r0"
    for case, facts in cases.items():
        points = location_grid(*facts["padded_hw"])
        images = facts["num_images"]
        boxes = [torch.from_numpy(arrays[f"{case}.boxes{i}"]) for i in range(images)]
        classes = [torch.from_numpy(arrays[f"{case}.gtlabels{i}"]) - 1 for i in range(images)]
        index = assign(points, boxes, radius)
        labels, ltrb = labels_and_ltrb(points, boxes, classes, index)

        sizes = [h * w for h, w in facts["feature_sizes"]]  # the official rows: level, image, cell
        official = torch.from_numpy(arrays[f"{case}.{tag}.labels"]).long() - 1
        official = [level.view(images, -1) for level in official.split([images * s for s in sizes])]
        official = torch.cat(official, dim=1)
        assert torch.equal(labels >= 0, official >= 0), case

        order = torch.arange(official.numel()).view(images, -1).split(sizes, dim=1)
        order = torch.cat([level.flatten() for level in order])
        positive = order[official.flatten()[order] >= 0]
        theirs = torch.from_numpy(arrays[f"{case}.{tag}.gtidx"]).long()
        mine = index.flatten()[positive]
        expected = torch.from_numpy(arrays[f"{case}.{tag}.reg"])
        same = mine == theirs
        assert torch.equal(ltrb.view(-1, 4)[positive][same], expected[same]), case
        assert torch.equal(labels.flatten()[positive][same], official.flatten()[positive][same])
        for row in (~same).nonzero()[:, 0]:
            image = boxes[positive[row] // len(points)].double()
            (w1, h1), (w2, h2) = (image[i, 2:] - image[i, :2] for i in (mine[row], theirs[row]))
            assert w1 * h1 <= w2 * h2 and (w1 + 1) * (h1 + 1) >= (w2 + 1) * (h2 + 1), case


# ---- losses against the official code


def by_location(levels):
    """Turn maps (N, C, h, w) of all levels into (N, P, C)."""
    return torch.cat([x.flatten(2) for x in levels], dim=2).transpose(1, 2)


def by_level(grad, levels):
    """Turn a gradient (N, P, C) into the flat order of the golden arrays, level by level."""
    parts = grad.transpose(1, 2).split([x[0, 0].numel() for x in levels], dim=2)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
def test_losses_equal_the_official_code(kernel, monkeypatch):
    if kernel:
        for file in FILES.values():
            cuda_shim.install(monkeypatch, file)
    arrays = np.load(GOLDEN / "losses.npz")
    for case, facts in json.loads((GOLDEN / "losses.json").read_text()).items():
        heads = {
            head: [torch.from_numpy(arrays[f"{case}.{head}_L{i}"]).float() for i in range(5)]
            for head in ("cls", "reg")
        }
        points = location_grid(*facts["padded_hw"])
        boxes = [torch.tensor(b).view(-1, 4) for b in facts["boxes_xyxy"]]
        classes = [torch.tensor(k, dtype=torch.int64) - 1 for k in facts["labels"]]
        index = assign(points, boxes, facts["center_sampling_radius"])
        labels, ltrb = labels_and_ltrb(points, boxes, classes, index)
        assert int((labels >= 0).sum()) == facts["num_pos"], case

        logits = by_location(heads["cls"]).flatten(0, 1)
        loss, grad = value_and_grad(sigmoid_focal_loss, logits, labels.flatten())
        count = max(facts["num_pos"], 1)
        torch.testing.assert_close(
            loss / count, torch.tensor(facts["cls_loss_cuda_formula"]), rtol=1e-5, atol=1e-7
        )
        grad = by_level(grad.view(*labels.shape, 80), heads["cls"]) / 3 / count
        expected = torch.from_numpy(arrays[f"{case}.grad_cls_cuda_stride7"])
        torch.testing.assert_close(grad[::7], expected, rtol=1e-4, atol=1e-7)

        l, t, r, b = ltrb.unbind(2)
        ratio_x, ratio_y = (torch.minimum(*d) / torch.maximum(*d) for d in ((l, r), (t, b)))
        weight = torch.where(labels >= 0, ratio_x * ratio_y, 0).sqrt()  # centerness
        unit = points[:, 2:3] if facts["norm_reg_targets"] else torch.ones(1)
        pred, target = by_location(heads["reg"]).flatten(0, 1), (ltrb / unit).flatten(0, 1)
        for kind in ("iou", "linear_iou", "giou"):
            loss, grad = value_and_grad(iou_loss, pred, target, weight.flatten(), kind)
            total = weight.sum().clamp(min=1e-6)
            torch.testing.assert_close(
                loss / total, torch.tensor(facts[f"reg_loss_{kind}"]), rtol=1e-5, atol=1e-7
            )
            grad = by_level(grad.view_as(ltrb), heads["reg"]) / 3 / total
            expected = torch.from_numpy(arrays[f"{case}.grad_reg_{kind}"])
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


# ---- NMS


def candidates(images, n, classes, levels=None):
    """Return overlapping boxes. levels: the number of different scores, so that most are ties."""
    corner, size = 100 * torch.rand(images, n, 2), 40 * torch.rand(images, n, 2)
    boxes = torch.cat((corner, corner + size), dim=2)
    scores = torch.stack([torch.randperm(n) for _ in range(images)]) / max(n, 1)
    if levels:
        scores = (scores * levels).round() - levels // 2
    return boxes, scores, torch.randint(classes, (images, n))


def per_class(boxes, scores, labels, threshold, limit):
    """Run torchvision's NMS on one image, class by class."""
    kept = [
        members[torchvision.ops.nms(boxes[members], scores[members], threshold)]
        for members in ((labels == label).nonzero()[:, 0] for label in labels.unique())
    ]
    kept = torch.cat(kept) if kept else labels[:0]
    return kept[scores[kept].argsort(descending=True)][:limit]


def check_nms(boxes, scores, labels, threshold=0.5, limit=20):
    mine = batched_nms(boxes, scores, labels, threshold, limit)
    assert torch.equal(mine, batched_nms_ref(boxes, scores, labels, threshold, limit))
    return mine


def test_nms_kernel_equals_the_reference(on_shim):
    for n in (0, *SIZES):
        check_nms(*candidates(2, n, 3))
    for levels in (2, 10):  # ties, negative scores, -0.0 beside 0.0
        boxes, scores, labels = candidates(2, 60, 2, levels)
        check_nms(boxes, torch.where(torch.rand(2, 60) < 0.5, scores, -scores), labels, limit=60)
    subnormal = 1e-45 * torch.randint(-9, 9, (2, 60))
    check_nms(candidates(2, 60, 2)[0], subnormal, labels, limit=60)
    boxes, scores, labels = candidates(3, 100, 2)
    scores[0, ::3], scores[0, 1::3], scores[1], scores[2, 5] = -torch.inf, torch.nan, -torch.inf, 9
    kept = check_nms(boxes, scores, labels, limit=100)
    assert (kept[1] == -1).all() and kept[2, 0] == 5 and not (kept[0] % 3 < 2)[kept[0] >= 0].any()
    check_nms(boxes[:, :1].expand(3, 100, 4), scores, labels)  # identical boxes
    check_nms(boxes[:, :, :2].repeat(1, 1, 2), scores, labels, 0.0)  # boxes without area
    check_nms(boxes, scores, torch.arange(100).expand(3, 100))  # one box for each class
    check_nms(boxes * torch.inf, scores, labels)


def test_nms_kernel_on_many_candidates(on_shim):
    check_nms(*candidates(1, 2000, 80), 0.6, 100)
    check_nms(*candidates(1, 75_000, 1203), 0.6, 3)


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
def test_nms_suppresses_strictly_above_the_threshold(kernel, monkeypatch):
    if kernel:
        cuda_shim.install(monkeypatch, nms_file)
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 3]]])  # IoU 1/2 and 3/4 with 0
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3, dtype=torch.int64)
    assert batched_nms(boxes, scores, labels, 0.5, 3).tolist() == [[0, 1, -1]]
    assert batched_nms(boxes, scores, labels, 0.49, 3).tolist() == [[0, -1, -1]]
    assert batched_nms(boxes, scores, torch.tensor([[0, 1, 2]]), 0.1, 2).tolist() == [[0, 1]]
    assert batched_nms(boxes, 0 * scores, labels, 1.0, 3).tolist() == [[0, 1, 2]]


def test_nms_equals_torchvision_on_200_cases():
    for case in range(200):
        torch.manual_seed(case)
        n, classes = int(torch.randint(0, 300, ())), int(torch.randint(1, 20, ()))
        threshold, limit = float(torch.rand(())), int(torch.randint(1, 200, ()))
        boxes, scores, labels = candidates(1, n, classes)
        kept = batched_nms(boxes, scores, labels, threshold, limit)[0]
        expected = per_class(boxes[0], scores[0], labels[0], threshold, limit)
        assert torch.equal(kept[kept >= 0], expected), case


def test_nms_on_the_cpu_equals_the_reference_bit_for_bit():
    for n, classes, levels in (
        (0, 3, None),
        (1, 1, None),
        (400, 1, 7),
        (400, 30, 3),
        (900, 4, None),
    ):
        boxes, scores, labels = candidates(3, n, classes, levels)
        scores = torch.where(torch.rand(3, n) < 0.5, scores, -scores)  # -0.0 beside 0.0
        scores[0, ::3], scores[1, ::5] = -torch.inf, torch.nan
        boxes[2, ::4, 2:] = boxes[2, ::4, :2]  # without area
        boxes[2, 1::9] = boxes[2, :1]  # identical
        boxes[1, ::7, 0] = torch.nan
        boxes[1, 1::7, 2:] = torch.inf
        boxes[0, ::8, :2] += 50  # corners in the wrong order
        for threshold, limit in ((0.0, 3), (0.1, n + 5), (0.6, 100), (1.0, 50)):
            check_nms(boxes, scores, labels, threshold, limit)
    check_nms(boxes[:0], scores[:0], labels[:0])


def test_an_iou_of_exactly_the_float32_threshold_is_not_suppressed():
    boxes = torch.tensor([[[0.0, 0, 10, 1], [0, 0, 6, 1]]])  # IoU 0.6, and float32 0.6 > 0.6
    scores, labels = torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, dtype=torch.int64)
    assert check_nms(boxes, scores, labels, 0.6, 2).tolist() == [[0, 1]]
    assert len(torchvision.ops.nms(boxes[0], scores[0], 0.6)) == 1


@pytest.mark.parametrize("case", range(5))
def test_nms_equals_the_official_code(shared, case):
    """The official boxes include their last pixel: x2 + 1 and y2 + 1 give the official overlap."""
    arrays = np.load(shared / "golden" / "postprocess.npz")
    threshold = json.loads((shared / "golden" / "postprocess.json").read_text())[f"nms{case}"]
    boxes, scores, labels = (
        torch.from_numpy(arrays[f"nms{case}.{x}"])[None] for x in ("boxes", "scores", "labels")
    )
    boxes = boxes + torch.tensor([0, 0, 1, 1])
    kept = batched_nms(boxes, scores, labels, threshold["threshold"], boxes.shape[1])[0]
    assert kept[kept >= 0].sort().values.tolist() == arrays[f"nms{case}.keep"].tolist()


# ---- planted faults

FAULTS = {
    "iou_loss": [
        ("-(1.0f + iou)", "(1.0f + iou)"),
        ("fminf(p.z, t.z)", "fminf(p.w, t.z)"),
        ("x_hull * (1.0f - s)", "x_hull * s"),
        ("0.0f : 0.5f", "0.0f : 1.0f"),
        ("grad && i < n", "grad && i < n - 1"),
        ("if (w != 0.0f)", "if (i < n)"),
        ("__syncthreads();", ""),
        ("kind == 2 || kind == 3", "kind == 3"),
        ("kind == 3 ? 0.0f", "kind == 4 ? 0.0f"),
        ("kind == 3 ? 1e-7f", "kind == 4 ? 1e-7f"),
    ],
    "focal_loss": [
        ("labels[row++]", "labels[row]"),
        ("start += classes", "start += classes + 1"),
        ("start + (int)label : -1", "start + (int)label + 1 : -1"),
        ("label >= 0 && label < classes", "true"),
        ("else if (j < count)", "else"),
        ("1/3.0f", "1/2.0f"),
        ("positive ? -x : x", "x"),
        ("GRAD ? -alpha", "GRAD ? alpha"),
        ("(1.0f - alpha) * *upstream", "1.0f - alpha"),
        ("gamma * (1.0f - q)", "gamma * q"),
        ("fminf(z, 0.0f) - tail", "fminf(z, 0.0f) + tail"),
        ("bits + 0x7fff", "bits"),
        ("total - i < SIZE ? total - i : SIZE", "SIZE"),
        ("grad[i + j] = out", "grad[i] = out"),
        ("__syncthreads();", ""),
    ],
    "assign": [
        ("area < smallest", "area <= smallest"),
        ("furthest <= hi", "furthest < hi"),
        ("x < cx + reach", "x < cx - reach"),
        ("start + j - first", "start + j"),
        ("points[5 * p + 2]", "points[5 * p + 3]"),
        ("__syncthreads();  // no thread", "// no thread"),
        ("__syncthreads();\n        const", "const"),
    ],
    "nms": [
        ("> iou_threshold", ">= iou_threshold"),
        ("| ~(unsigned)i", "| (unsigned)i"),
        ("bits == 0x80000000u", "false"),
        ("labels[i] == label", "true"),
        ("keys[i] = 0;", ""),
        ("~bits : bits", "bits : bits"),
        ("round % 2", "0"),
        ("__syncthreads();", ""),
        ("return 0;", "return 1;"),
    ],
}


def small_check(name):
    """Run enough comparisons to see every planted fault, but few, since each fault is compiled."""
    if name == "iou_loss":
        check_iou_loss(257, "giou")
        check_iou_loss(257, "giou_exact")
    elif name == "focal_loss":
        check_focal_loss(1, 1, torch.float32)
        check_focal_loss(257, 3, torch.float32)
        check_focal_loss(257, 80, torch.bfloat16)
        check_focal_loss_writes_no_more_than_the_gradient()
    elif name == "assign":
        points = torch.cat((location_grid(100, 140), torch.tensor([[64.0, 32, 8, -1, 64]])))
        box = torch.tensor([[0.0, 0, 100, 60]])
        check_assign(points, [box, box.repeat(3, 1), random_boxes(600, 100, 140)], 1.5)
        check_assign(points, [box], 0)
    else:
        zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0, torch.nan]])
        boxes = [[0.0, 0, 4, 4], [0, 0, 4, 2], [8, 8, 9, 9], [0, 0, 4, 3], [0, 0, 1, 1]]
        check_nms(torch.tensor([boxes]), zeros, torch.zeros(1, 5, dtype=torch.int64))
        check_nms(*candidates(2, 96, 2, levels=20), limit=40)


@pytest.mark.parametrize("name", FILES)
def test_the_true_text_passes_the_small_check(name, on_shim):
    small_check(name)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [(name, *fault) for name, faults in FAULTS.items() for fault in faults],
)
def test_a_planted_fault_is_noticed(name, right, wrong, monkeypatch):
    file = FILES[name]
    assert right in file.CUDA_SOURCE
    noticed = False
    for reverse in (False, True):
        cuda_shim.install(monkeypatch, file, file.CUDA_SOURCE.replace(right, wrong, 1), reverse)
        try:
            small_check(name)
        except (AssertionError, RuntimeError):
            noticed = True
    assert noticed


def test_the_shim_notices_other_argument_widths():
    launch = cuda_shim.launcher(iou_file.CUDA_SOURCE, iou_file.KERNELS)
    with pytest.raises(RuntimeError, match="arguments"):
        launch("iou_loss", (1,), 32, *torch.zeros(5, 4), *np.int32([1, 0]))  # n is a long long


# ---- the compiler's view


@pytest.mark.parametrize("architecture", [75, 80, 90, 100, 120])
@pytest.mark.parametrize("name", FILES)
def test_nvrtc_compiles_the_kernels(name, architecture):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC comes with PyTorch for CUDA")
    file = FILES[name]
    ok = nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, program = nvrtc.nvrtcCreateProgram(file.CUDA_SOURCE.encode(), b"kernels.cu", 0, [], [])
    options = [*file.OPTIONS, "-ftz=true", "-std=c++17", "--device-as-default-execution-space"]
    options += [f"-arch=sm_{architecture}", "--ptxas-options=-v"]  # the rest is what CuPy 14 gives
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.decode(errors="replace")
    assert result == ok, log
    assert nvrtc.nvrtcGetCUBINSize(program)[1] > 1000

    report = dict.fromkeys(file.KERNELS)
    for kernel, text in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling|\Z)", log, re.DOTALL):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        stack = int(re.search(r"(\d+) bytes stack frame", text)[1])
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        shared = re.search(r"(\d+) bytes smem", text)
        report[kernel] = registers, spills, stack, int(shared[1]) if shared else 0
    print(f"sm_{architecture} {name}: (registers, spills, stack, shared memory) {report}")
    for registers, spills, stack, _ in report.values():
        assert spills == 0 and stack == 0 and registers <= 64  # 64: 1,024 threads fit


# ---- dispatch


@pytest.fixture
def without_cupy(monkeypatch):
    """Let `import cupy` fail, and forget earlier attempts."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("FCOS_KERNELS", raising=False)
    for file in FILES.values():
        file._load.__wrapped__.cache_clear()
    yield
    for file in FILES.values():
        file._load.__wrapped__.cache_clear()


ON_GPU = types.SimpleNamespace(is_cuda=True, device=types.SimpleNamespace(index=0))
ON_CPU = types.SimpleNamespace(is_cuda=False)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_dispatch_falls_back_with_one_warning(file, without_cupy, monkeypatch):
    with pytest.warns(UserWarning, match="cupy") as caught:
        assert not file._use_kernel(ON_GPU)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not file._use_kernel(ON_GPU) and not file._use_kernel(ON_CPU)
        monkeypatch.setenv("FCOS_KERNELS", "torch")
        assert not file._use_kernel(ON_GPU)
        monkeypatch.setenv("FCOS_KERNELS", "cupy")
        assert not file._use_kernel(ON_CPU)
        with pytest.raises(ImportError, match=r"pip install cupy-cuda\d+x"):
            file._use_kernel(ON_GPU)
    monkeypatch.setenv("FCOS_KERNELS", "triton")
    with pytest.raises(ValueError, match="triton.*cupy or torch"):
        file._use_kernel(ON_CPU)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_a_failure_during_a_capture_is_not_kept(file, without_cupy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        with pytest.raises(ImportError, match="before the capture"):
            file._use_kernel(ON_GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    module = types.SimpleNamespace(get_function=lambda name: name)
    cupy = types.SimpleNamespace(RawModule=lambda code, options: module)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert file._use_kernel(ON_GPU) and list(file._load(0, "")) == list(file.KERNELS)


CALLS = {
    "iou_loss": lambda x, k: iou_loss(x, x.detach().flip(0), x[:, 0].detach()),
    "focal_loss": lambda x, k: sigmoid_focal_loss(x, k),
    "assign": lambda x, k: assign(torch.cat((x, 64 * x[:, :1]), dim=1), [x, x[:2]], 0),
    "nms": lambda x, k: batched_nms(x[None], x[None, :, 0], k[None], 0.5, 3),
}


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_program_calls_them(name, kernel, monkeypatch):
    """torch.compile traces the references, except for the early end of NMS on the CPU. It leaves
    out the launch of a kernel."""
    if kernel:
        cuda_shim.install(monkeypatch, FILES[name])
    torch._dynamo.reset()
    whole = not kernel and name != "nms"
    x, k = torch.rand(5, 4).cumsum(1).requires_grad_(), torch.tensor([-1, 0, 3, 1, 2])
    results = []
    for run in (CALLS[name], torch.compile(CALLS[name], backend="eager", fullgraph=whole)):
        result = 2 * run(1 * x, k)
        grad = torch.autograd.grad(result, x) if result.requires_grad else ()
        results.append((result.detach(), *grad))
    assert len(results[0]) == (2 if "loss" in name else 1)
    torch.testing.assert_close(*results)


def test_the_launcher_follows_pytorch(monkeypatch):
    """Replace CuPy by a stand-in that notes the stream of each launch and the pointers."""
    log = []

    class Within:
        def __init__(self, *what):
            self.what = what

        def __enter__(self):
            log.append(self.what)

        def __exit__(self, *_):
            log.append("left")

    now = types.SimpleNamespace(cuda_stream=1234)
    stream = types.SimpleNamespace(
        from_external=lambda stream: Within("stream", stream.cuda_stream)
    )
    cuda = types.SimpleNamespace(Stream=stream)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "device", lambda device: Within("device", device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now)
    kernels = {"nms": lambda *args: log.append(args)}
    monkeypatch.setattr(nms_file, "_load", lambda device, choice: kernels)
    tensor, number = torch.zeros(4), np.int32(7)
    nms_file._launch("nms", (3,), 64, tensor, number)
    device, stream, call, *left = log
    assert device == ("device", tensor.device) and stream == ("stream", 1234)
    assert call == ((3,), (64,), (tensor.data_ptr(), number)) and left == ["left", "left"]


WIDE = {  # the arguments that a kernel reads or writes 16 bytes at a time
    "iou_loss": (0, 1, 3),
    "nms": (0,),
    "assign": (1,),
    "forward_fp32": (0,),
    "backward_fp32": (0, 3),
}


def test_what_is_read_16_bytes_at_a_time_is_aligned(on_shim, monkeypatch):
    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def watched(launch, name, grid, threads, *args):
        assert not [place for place in WIDE[name] if args[place].data_ptr() % 16]
        ran.append(name)
        launch(name, grid, threads, *args)

    ran = []
    for file in FILES.values():
        monkeypatch.setattr(file, "_launch", functools.partial(watched, file._launch))
    pred, target = shifted(torch.rand(5, 4)), shifted(torch.rand(5, 4))
    logits, labels = shifted(torch.randn(5, 3)), torch.arange(-1, 4)
    boxes = shifted(torch.tensor([[0, 0, 9, 9], [1, 1, 9, 9], [20, 20, 30, 30.0]]))
    assert all(x.data_ptr() % 16 for x in (pred, target, logits, boxes))
    for loss, reference, leaf, other in (
        (iou_loss, iou_loss_ref, pred, (target, torch.ones(5))),
        (sigmoid_focal_loss, sigmoid_focal_loss_ref, logits, (labels,)),
    ):
        leaf.requires_grad_()
        found, expected = loss(leaf, *other), reference(leaf, *other)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (found, expected)))
    args = boxes[None], torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3).long(), 0.5, 3
    assert batched_nms(*args).tolist() == [[0, 2, -1]]
    points = torch.tensor([[5.0, 5, 8, -1, 64], [25, 25, 8, -1, 64]])
    assert assign(points, [boxes], 0).tolist() == [[1, 2]]
    assert set(ran) == set(WIDE)


def test_the_launcher_is_the_same_in_every_file():
    texts = [pathlib.Path(file.__file__).read_text() for file in FILES.values()]
    launcher = re.compile(r"# ---- launcher.*?(?=# ---- operator)", re.DOTALL)
    assert len({launcher.search(text)[0] for text in texts}) == 1


def test_kernel_files_import_nothing_of_this_repository():
    for file in FILES.values():
        imports = re.findall(
            r"^ *(?:import|from) +(\w+)", pathlib.Path(file.__file__).read_text(), re.M
        )
        allowed = {"functools", "os", "warnings", "numpy", "torch", "torchvision", "cupy"}
        assert set(imports) <= allowed, file.__name__


def test_the_cpu_path_imports_no_cupy_and_starts_no_cuda():
    code = """
import sys, torch
from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss
from kernels.iou_loss import iou_loss
from kernels.nms import batched_nms
x = torch.rand(3, 4)
label = torch.zeros(3, dtype=torch.int64)
iou_loss(x, x, x[:, 0]), sigmoid_focal_loss(x, label)
assign(torch.rand(3, 5), [x], 1.5)
batched_nms(x[None], x[None, :, 0], label[None], 0.6, 2)
assert "cupy" not in sys.modules and not torch.cuda.is_initialized()
"""
    root = pathlib.Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "FCOS_KERNELS"}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, k: iou_loss(x, x, x[:, 0], "diou"), "'diou'; choose one of iou, lin"),
        (lambda x, k: iou_loss(x[:, :3], x, x[:, 0]), r"\(N, 4\).*found \(3, 3\)"),
        (lambda x, k: iou_loss(x, x, x), r"weight \(N,\), found .* and \(3, 4\)"),
        (lambda x, k: sigmoid_focal_loss(x[0], k), r"logits: .*\(4,\)"),
        (lambda x, k: sigmoid_focal_loss(x, k.int()), r"labels: .*\(3,\) torch.int32"),
        (lambda x, k: assign(x, [x], 1.5), r"points: .*\(3, 4\)"),
        (lambda x, k: assign(torch.rand(2, 5), [], 1.5), "boxes: .*none"),
        (lambda x, k: assign(torch.rand(2, 5), [x, x[0]], 1), r"boxes of image 1: .*\(4,\)"),
        (lambda x, k: assign(torch.rand(2, 5), [x], -1), "center_radius -1"),
        (lambda x, k: batched_nms(x, x[:, 0], k, 0.6, 9), r"\(B, N, 4\).*found \(3, 4\)"),
        (lambda x, k: batched_nms(x[None], x[None, :, 0], k[None], 6, 9), "iou_threshold 6"),
        (lambda x, k: batched_nms(x[None], x[None, :, 0], k[None], 0.6, 0), "max_detections 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(3, 4), torch.zeros(3, dtype=torch.int64))
