"""The results of the four kernels, without a GPU.

The references are compared with the official code, torchvision and float64. The CUDA text, which
cuda_shim.py runs on the CPU, is compared with the references.
"""

import json
import pathlib

import cuda_shim
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from kernel_inputs import (
    DTYPES,
    FILES,
    SIZES,
    candidates,
    check_assign,
    check_focal_loss,
    check_iou_loss,
    check_nms,
    location_grid,
    logits_and_labels,
    ltrb_pairs,
    random_boxes,
    value_and_grad,
)

from kernels import focal_loss as focal_file
from kernels import iou_loss as iou_file
from kernels import nms as nms_file
from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_ref
from kernels.iou_loss import CUDA_KINDS, KINDS, iou, iou_loss, iou_loss_ref
from kernels.nms import batched_nms

GOLDEN = pathlib.Path(__file__).parent / "golden"
pytestmark = pytest.mark.usefixtures("seeded")


# ---- IoU loss


@pytest.mark.parametrize("kind", KINDS)
def test_iou_loss_kernel_equals_the_reference(on_shim, kind):
    for n in SIZES:
        check_iou_loss(n, kind)


def test_iou_loss_of_known_boxes():
    pred = torch.tensor([[1.0, 2, 3, 4]])
    target = torch.tensor([[2.0, 1, 4, 3]])  # intersection 16, union 32
    assert list(KINDS) == list(CUDA_KINDS) == ["iou", "linear_iou", "giou", "giou_exact"]
    for kind, expected in zip(KINDS, (0.663294, 0.484848, 0.595960, 0.611111), strict=True):
        value = iou_loss(pred, target, torch.tensor([0.5]), kind)
        torch.testing.assert_close(value, torch.tensor(expected / 2), rtol=1e-5, atol=0)
    assert torch.equal(iou(pred, target), torch.tensor([17 / 33]))


def corners(ltrb):
    """Return the boxes (..., 4) around the location (0, 0) as x1, y1, x2, y2."""
    return torch.cat((-ltrb[..., :2], ltrb[..., 2:]), dim=-1)


def test_exact_giou_equals_torchvision_and_does_not_depend_on_the_unit():
    pred, target = 0.1 + 5 * torch.rand(2, 100, 4, dtype=torch.float64)
    expected = torchvision.ops.generalized_box_iou_loss(
        corners(pred), corners(target), reduction="sum"
    )
    for unit in (1, 8):
        value = iou_loss(pred * unit, target * unit, torch.ones(100), "giou_exact")
        torch.testing.assert_close(value, expected)
    nothing = torch.zeros(1, 4)
    assert iou_loss(nothing, target[:1].float(), torch.ones(1), "giou_exact") == 1
    assert iou_loss(nothing, nothing, torch.ones(1), "giou_exact").isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_iou_is_one_number_a_location(dtype):
    """The 16-bit types are computed in fp32, because fp16 does not reach 300 x 300 pixels."""
    pred, target = (torch.rand(2, 2, 5, 4) * 300).to(dtype)
    pred.requires_grad_()
    ratio = iou(pred, target)
    assert ratio.dtype == torch.promote_types(dtype, torch.float32)
    pairs = zip(corners(pred).double(), corners(target).double())
    expected = torch.stack([torchvision.ops.box_iou(*pair).diag() for pair in pairs])
    torch.testing.assert_close(ratio.double(), expected, rtol=0, atol=1e-3)  # the added 1
    loss = iou_loss(pred.flatten(0, 1), target.flatten(0, 1), torch.ones(10), "linear_iou")
    (grad,) = torch.autograd.grad(ratio.sum(), pred)
    (loss_grad,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(loss_grad, -grad)
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
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)
    giou, _ = value_and_grad(iou_loss_ref, pred, target, weight)
    assert not torch.isclose(value, giou)


def test_the_kernel_returns_nan_for_an_unknown_kind(on_shim, monkeypatch):
    """It must not return another kind of loss, should KINDS and the CUDA text ever disagree."""
    monkeypatch.setitem(KINDS, "squared", squared)
    monkeypatch.setitem(CUDA_KINDS, "squared", 4)
    iou_file._has_kernel.__wrapped__.cache_clear()
    pred, target, weight = ltrb_pairs(100)
    value, grad = value_and_grad(iou_loss, pred, target, weight, "squared")
    assert value.isnan()
    assert grad[weight != 0].isnan().all()
    assert (grad[weight == 0] == 0).all()
    iou_file._has_kernel.__wrapped__.cache_clear()


@pytest.mark.parametrize("loss", [iou_loss, iou_loss_ref])
def test_iou_loss_ignores_locations_without_weight(loss):
    pred = torch.tensor([[torch.nan] * 4, [torch.inf] * 4, [1, 2, 3, 4.0]], requires_grad=True)
    value = loss(pred, torch.rand(3, 4), torch.zeros(3), "iou")
    (grad,) = torch.autograd.grad(value, pred)
    assert value == 0
    assert (grad == 0).all()
    empty = torch.zeros(0, 4, requires_grad=True)
    value = loss(empty, empty.detach(), torch.zeros(0))
    assert torch.autograd.grad(value, empty)[0].shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_iou_loss_gradient_in_float64(kind):
    pred, target = 1 + 8 * torch.rand(2, 20, 4, dtype=torch.float64)
    weight = torch.rand(20, dtype=torch.float64)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: iou_loss(x, target, weight, kind), pred)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_iou_loss_takes_16_bit_input_and_views(on_shim, dtype):
    pred, target = (40 * torch.rand(2, 100, 4)).to(dtype)
    weight = torch.rand(200)[::2]
    value, grad = value_and_grad(iou_loss, pred, target, weight)
    expected, expected_grad = value_and_grad(iou_loss_ref, pred.float(), target.float(), weight)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad.to(dtype))
    shifted = torch.rand(401)[1:].view(100, 4)  # contiguous, but not on a 16-byte boundary
    columns = torch.rand(4, 100).T
    value = iou_loss(shifted, columns, weight)
    torch.testing.assert_close(value, iou_loss_ref(shifted, columns, weight))
    assert not iou_loss(pred, target, weight).requires_grad


# ---- focal loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 8, 80, 91])
def test_focal_loss_kernel_equals_the_reference(on_shim, dtype, classes):
    for n in SIZES:
        check_focal_loss(n, classes, dtype)
    check_focal_loss(40, classes, dtype, alpha=0.7, gamma=0.5)
    check_focal_loss(40, classes, dtype, alpha=1.0, gamma=0.0)


def test_focal_loss_of_one_known_location():
    """The expected terms are those of the official code for its label 2, which is our 1."""
    value = sigmoid_focal_loss(torch.tensor([[0.0, 2, -3]]), torch.tensor([1]))
    expected = torch.tensor(0.129965 + 0.000450891 + 0.0000819625)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_gradient_in_float64(gamma):
    logits = 3 * torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([-1, 0, 4, 2, -1, 1])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, labels, 0.3, gamma), logits)


def test_focal_loss_equals_torchvision():
    logits = 3 * torch.randn(500, 20)
    labels = torch.randint(-1, 20, (500,))
    one_hot = F.one_hot(labels + 1, 21)[:, 1:].float()

    def torchvision_loss(x):
        return torchvision.ops.sigmoid_focal_loss(x, one_hot, reduction="sum")

    expected = value_and_grad(torchvision_loss, logits)
    torch.testing.assert_close(value_and_grad(sigmoid_focal_loss, logits, labels), expected)


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_focal_loss_is_stable(size):
    logits = torch.tensor([[size, -size], [-size, size]])
    labels = torch.tensor([0, 0])
    value, grad = value_and_grad(sigmoid_focal_loss, logits, labels)
    torch.testing.assert_close(value, torch.tensor(0.25 * size + 0.75 * size))
    torch.testing.assert_close(grad, 3 * torch.tensor([[0, 0], [-0.25, 0.75]]))
    empty = torch.zeros(0, 80, requires_grad=True)
    value = sigmoid_focal_loss(empty, torch.zeros(0, dtype=torch.int64))
    assert torch.autograd.grad(value, empty)[0].shape == (0, 80)


def test_bf16_conversions_of_the_cuda_text_equal_pytorch():
    """Read every 16-bit number and round every kind of fp32 number: the bits are the same."""
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
    out = torch.empty(65536)
    narrow = torch.empty(65536, dtype=torch.int16)
    launch("convert", (256,), 256, bits, out, wide, narrow)
    expected = bits.view(torch.bfloat16).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    number = ~wide.isnan()
    assert torch.equal(narrow[number], wide.bfloat16().view(torch.int16)[number])
    assert narrow.view(torch.bfloat16)[~number].isnan().all()


def test_focal_loss_of_nan_is_nan(on_shim):
    """A non-finite logit must show in the loss, which the trainer checks, and in the gradient."""
    for dtype in DTYPES:
        logits = torch.zeros(40, 80, dtype=dtype)
        logits[7, 3] = torch.nan
        for labels in torch.full((40,), -1), torch.full((40,), 3):
            value, grad = value_and_grad(sigmoid_focal_loss, logits, labels)
            assert value.isnan()
            assert grad.isnan().nonzero().tolist() == [[7, 3]]


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
def test_labels_outside_of_the_classes_are_background_for_the_focal_loss(kernel, monkeypatch):
    if kernel:
        cuda_shim.install(monkeypatch, focal_file)
    logits = torch.randn(60, 80)
    labels = torch.tensor([80, 2**31, 2**32 + 3, -2, -(2**40)] * 12)
    expected = value_and_grad(sigmoid_focal_loss_ref, logits, torch.full((60,), -1))
    found = value_and_grad(sigmoid_focal_loss, logits, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_float64_runs_as_pytorch_in_float64(on_shim):
    logits, labels = logits_and_labels(40, 8, torch.float64)
    pred, target = 40 * torch.rand(2, 40, 4, dtype=torch.float64)
    weight = torch.rand(40, dtype=torch.float64)
    for loss, reference, args in (
        (sigmoid_focal_loss, sigmoid_focal_loss_ref, (logits, labels)),
        (iou_loss, iou_loss_ref, (pred, target, weight)),
    ):
        value, grad = value_and_grad(loss, *args)
        expected, expected_grad = value_and_grad(reference, *args)
        assert value.dtype == torch.float64
        assert torch.equal(value, expected)
        assert torch.equal(grad, expected_grad)


def test_kernels_refuse_a_second_derivative(on_shim):
    """Their gradient has no graph, so a second derivative would silently be zero."""
    x = torch.rand(3, 4, requires_grad=True)
    labels = torch.tensor([0, -1, 3])
    weight = torch.rand(3)
    for loss in (iou_loss(x, torch.rand(3, 4), weight), sigmoid_focal_loss(x, labels)):
        upstream = torch.tensor(1.0, requires_grad=True)
        (grad,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


# ---- assignment


def labels_and_ltrb(points, boxes, classes, index):
    """Return the targets of the locations: label and distances of their box, or -1 and 0."""
    labels = torch.full(index.shape, -1)
    ltrb = torch.zeros(*index.shape, 4)
    for image, found in enumerate(index >= 0):
        chosen = index[image, found]
        labels[image, found] = classes[image][chosen].long()
        x, y = points[found, :2].T
        x1, y1, x2, y2 = boxes[image][chosen].T
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
    # A distance of 64 belongs to both levels; a location on the side of the box is outside.
    assert assign(points, [box], 0).tolist() == [[0, 0, -1]]
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

        # The official rows are ordered by level, then image, then cell.
        sizes = [h * w for h, w in facts["feature_sizes"]]
        official = torch.from_numpy(arrays[f"{case}.{tag}.labels"]).long() - 1
        levels = official.split([images * size for size in sizes])
        official = torch.cat([level.view(images, -1) for level in levels], dim=1)
        assert torch.equal(labels >= 0, official >= 0), case

        order = torch.arange(official.numel()).view(images, -1).split(sizes, dim=1)
        order = torch.cat([level.flatten() for level in order])
        positive = order[official.flatten()[order] >= 0]
        our_index = index.flatten()[positive]
        official_index = torch.from_numpy(arrays[f"{case}.{tag}.gtidx"]).long()
        same = our_index == official_index
        expected = torch.from_numpy(arrays[f"{case}.{tag}.reg"])
        assert torch.equal(ltrb.view(-1, 4)[positive][same], expected[same]), case
        assert torch.equal(labels.flatten()[positive][same], official.flatten()[positive][same])
        for row in (~same).nonzero()[:, 0]:
            sizes_of_boxes = corner_sizes(boxes[positive[row] // len(points)].double())
            w1, h1 = sizes_of_boxes[our_index[row]]
            w2, h2 = sizes_of_boxes[official_index[row]]
            assert w1 * h1 <= w2 * h2, case
            assert (w1 + 1) * (h1 + 1) >= (w2 + 1) * (h2 + 1), case


def corner_sizes(boxes):
    """Return width and height (G, 2) of boxes x1, y1, x2, y2."""
    return boxes[:, 2:] - boxes[:, :2]


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
        expected = torch.tensor(facts["cls_loss_cuda_formula"])
        torch.testing.assert_close(loss / count, expected, rtol=1e-5, atol=1e-7)
        grad = by_level(grad.view(*labels.shape, 80), heads["cls"]) / 3 / count
        expected = torch.from_numpy(arrays[f"{case}.grad_cls_cuda_stride7"])
        torch.testing.assert_close(grad[::7], expected, rtol=1e-4, atol=1e-7)

        l, t, r, b = ltrb.unbind(2)
        ratio_x = torch.minimum(l, r) / torch.maximum(l, r)
        ratio_y = torch.minimum(t, b) / torch.maximum(t, b)
        weight = torch.where(labels >= 0, ratio_x * ratio_y, 0).sqrt()  # centerness
        total = weight.sum().clamp(min=1e-6)
        unit = points[:, 2:3] if facts["norm_reg_targets"] else torch.ones(1)
        pred = by_location(heads["reg"]).flatten(0, 1)
        target = (ltrb / unit).flatten(0, 1)
        for kind in ("iou", "linear_iou", "giou"):
            loss, grad = value_and_grad(iou_loss, pred, target, weight.flatten(), kind)
            expected = torch.tensor(facts[f"reg_loss_{kind}"])
            torch.testing.assert_close(loss / total, expected, rtol=1e-5, atol=1e-7)
            grad = by_level(grad.view_as(ltrb), heads["reg"]) / 3 / total
            expected = torch.from_numpy(arrays[f"{case}.grad_reg_{kind}"])
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


# ---- NMS


def per_class(boxes, scores, labels, threshold, limit):
    """Run torchvision's NMS on one image, class by class."""
    kept = labels[:0]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        chosen = torchvision.ops.nms(boxes[members], scores[members], threshold)
        kept = torch.cat((kept, members[chosen]))
    return kept[scores[kept].argsort(descending=True)][:limit]


def test_nms_kernel_equals_the_reference(on_shim):
    for n in (0, *SIZES):
        check_nms(*candidates(2, n, 3))
    for levels in (2, 10):  # ties, negative scores, -0.0 beside 0.0
        boxes, scores, labels = candidates(2, 60, 2, levels)
        check_nms(boxes, torch.where(torch.rand(2, 60) < 0.5, scores, -scores), labels, limit=60)
    subnormal = 1e-45 * torch.randint(-9, 9, (2, 60))
    check_nms(candidates(2, 60, 2)[0], subnormal, labels, limit=60)


def test_nms_kernel_leaves_out_padding_and_takes_odd_boxes(on_shim):
    boxes, scores, labels = candidates(3, 100, 2)
    scores[0, ::3] = -torch.inf
    scores[0, 1::3] = torch.nan
    scores[1] = -torch.inf
    scores[2, 5] = 9
    kept = check_nms(boxes, scores, labels, limit=100)
    assert set((kept[0][kept[0] >= 0] % 3).tolist()) == {2}
    assert (kept[1] == -1).all()
    assert kept[2, 0] == 5
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
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    labels = torch.zeros(1, 3, dtype=torch.int64)
    assert batched_nms(boxes, scores, labels, 0.5, 3).tolist() == [[0, 1, -1]]
    assert batched_nms(boxes, scores, labels, 0.49, 3).tolist() == [[0, -1, -1]]
    assert batched_nms(boxes, scores, torch.tensor([[0, 1, 2]]), 0.1, 2).tolist() == [[0, 1]]
    assert batched_nms(boxes, 0 * scores, labels, 1.0, 3).tolist() == [[0, 1, 2]]


def test_nms_equals_torchvision_on_200_cases():
    for case in range(200):
        torch.manual_seed(case)
        n = int(torch.randint(0, 300, ()))
        classes = int(torch.randint(1, 20, ()))
        threshold = float(torch.rand(()))
        limit = int(torch.randint(1, 200, ()))
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
        scores[0, ::3] = -torch.inf
        scores[1, ::5] = torch.nan
        boxes[2, ::4, 2:] = boxes[2, ::4, :2]  # without area
        boxes[2, 1::9] = boxes[2, :1]  # identical
        boxes[1, ::7, 0] = torch.nan
        boxes[1, 1::7, 2:] = torch.inf
        boxes[0, ::8, :2] += 50  # corners in the wrong order
        for threshold, limit in ((0.0, 3), (0.1, n + 5), (0.6, 100), (1.0, 50)):
            check_nms(boxes, scores, labels, threshold, limit)
    check_nms(boxes[:0], scores[:0], labels[:0])


def test_an_iou_of_exactly_the_float32_threshold_is_not_suppressed():
    """0.6 in float32 is more than 0.6 in double precision, with which torchvision compares."""
    boxes = torch.tensor([[[0.0, 0, 10, 1], [0, 0, 6, 1]]])  # IoU 0.6
    scores = torch.tensor([[0.9, 0.8]])
    labels = torch.zeros(1, 2, dtype=torch.int64)
    assert check_nms(boxes, scores, labels, 0.6, 2).tolist() == [[0, 1]]
    assert len(torchvision.ops.nms(boxes[0], scores[0], 0.6)) == 1


@pytest.mark.parametrize("case", range(5))
def test_nms_equals_the_official_code(shared, case):
    """The official boxes include their last pixel: x2 + 1 and y2 + 1 give the official overlap."""
    arrays = np.load(shared / "golden" / "postprocess.npz")
    facts = json.loads((shared / "golden" / "postprocess.json").read_text())[f"nms{case}"]
    boxes = torch.from_numpy(arrays[f"nms{case}.boxes"])[None] + torch.tensor([0, 0, 1, 1])
    scores = torch.from_numpy(arrays[f"nms{case}.scores"])[None]
    labels = torch.from_numpy(arrays[f"nms{case}.labels"])[None]
    kept = batched_nms(boxes, scores, labels, facts["threshold"], boxes.shape[1])[0]
    assert kept[kept >= 0].sort().values.tolist() == arrays[f"nms{case}.keep"].tolist()
