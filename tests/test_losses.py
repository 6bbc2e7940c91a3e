"""The losses of FCOS and their gradients."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import detector, objects, outputs_of, picture
from recorded import golden_objects, relative_error, rows_of
from torchvision.models.detection.image_list import ImageList

import fcos


def quantized(x):
    return (np.round(x * 64) / 64).astype(np.float32)


def generated_maps(seed, hw, N, norm):
    """Yield the head outputs of each level, by the recipe of recordings too large to be stored."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for stride, (h, w) in zip(fcos.STRIDES, fcos.level_sizes(hw)):
        cls = quantized(-3 + 2 * rng.standard_normal((N, 80, h, w)))
        reg = rng.standard_normal((N, 4, h, w))
        if norm:
            reg = np.abs(2 + 1.5 * reg)
            reg[rng.random(reg.shape) < 0.1] = 0
        else:
            reg = np.exp(0.8 * np.log(4 * stride) + 0.8 * reg)
        yield cls, quantized(reg), quantized(rng.standard_normal((N, 1, h, w)))


def golden_maps(case, fact, arrays):
    """Return the recorded head outputs, a list over levels for each of "cls", "reg" and "ctr"."""
    if f"{case}.cls_L0" in arrays:
        maps = [
            [arrays[f"{case}.{kind}_L{level}"].astype(np.float32) for level in range(5)]
            for kind in ("cls", "reg", "ctr")
        ]
    else:
        size = fact["seed"], fact["padded_hw"], fact["batch"], fact["norm_reg_targets"]
        maps = zip(*generated_maps(*size))
    return [[torch.from_numpy(x).requires_grad_() for x in levels] for levels in maps]


def golden_cls_gradient(case, arrays):
    """Return the recorded gradient of the logits, and the step between its elements."""
    if f"{case}.grad_cls_cuda_stride7" in arrays:
        return arrays[f"{case}.grad_cls_cuda_stride7"], 7
    if case.endswith("_big"):
        return arrays[f"{case}.grad_cls_cuda"], 11
    return arrays[f"{case}.grad_cls_cuda"], 1


def test_losses_and_gradients_match_the_official_code(golden):
    facts, arrays = golden("losses")
    for case, fact in facts.items():
        hw = fact["padded_hw"]
        cls, reg, ctr = golden_maps(case, fact, arrays)
        unit = "stride" if fact["norm_reg_targets"] else "pixel"
        pixels = reg
        if unit == "stride":
            pixels = [x * stride for x, stride in zip(reg, fcos.STRIDES)]
        outputs = {
            "cls": rows_of(cls),
            "ltrb": rows_of(pixels),
            "ctr": rows_of(ctr).squeeze(2),
            "points": fcos.make_points(hw),
        }
        model = fcos.build("shapes", radius=fact["center_sampling_radius"], ranges=fcos.RANGES)
        targets = model.targets(hw, golden_objects(case, fact, arrays))
        normalizers = fcos.loss_normalizers(targets)
        assert normalizers[0] == fact["num_pos"], case
        for kind in ("giou", "iou", "linear_iou"):
            losses = fcos.fcos_loss(outputs, targets, normalizers, kind, unit)
            expected = {
                "cls": fact["cls_loss_cuda_formula"],
                "box": fact[f"reg_loss_{kind}"],
                "ctr": fact["centerness_loss"],
            }
            for part, value in expected.items():
                assert losses[part].item() == pytest.approx(value, rel=1e-5, abs=1e-9), (case, part)
            gradients = torch.autograd.grad(
                sum(losses.values()), cls + reg + ctr, retain_graph=True
            )
            grad_cls, grad_reg, grad_ctr = (
                torch.cat([x.flatten() for x in gradients[i : i + 5]]) for i in (0, 5, 10)
            )
            assert relative_error(grad_reg, arrays[f"{case}.grad_reg_{kind}"]) <= 1e-4, (case, kind)
        assert relative_error(grad_ctr, arrays[f"{case}.grad_ctr"]) <= 1e-4, case
        expected, step = golden_cls_gradient(case, arrays)
        assert relative_error(grad_cls[::step], expected) <= 1e-4, case


def test_centerness_of_known_distances():
    ltrb = torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 5], [0, 1, 4, 1], [0, 0, 0, 0]])
    expected = torch.tensor([(1 / 3 * 1 / 2) ** 0.5, 1, 0, 0])
    torch.testing.assert_close(fcos.centerness(ltrb), expected)


def test_losses_are_divided_by_the_normalizers():
    model = detector()
    outputs = outputs_of(model, picture(64, 96)[None])
    targets = model.targets((64, 96), [objects((8, 8, 50, 40, 1))])
    sums = fcos.fcos_loss(outputs, targets, torch.ones(2), **model.loss)
    assert all(value > 0 for value in sums.values())
    divided = fcos.fcos_loss(outputs, targets, torch.tensor([8.0, 0.25]), **model.loss)
    torch.testing.assert_close(divided["cls"], sums["cls"] / 8)
    torch.testing.assert_close(divided["box"], sums["box"] / 0.25)
    torch.testing.assert_close(divided["ctr"], sums["ctr"] / 8)
    without_positives = fcos.fcos_loss(outputs, targets, torch.zeros(2), **model.loss)
    torch.testing.assert_close(without_positives["cls"], sums["cls"])


@pytest.mark.parametrize("keyword", ["unit", "box_loss", "quality", "box_weight"])
def test_unknown_choices_are_refused(keyword):
    model = fcos.build("shapes", 2)
    outputs = model(torch.zeros(1, 3, 32, 32))
    targets = model.targets((32, 32), [objects()])
    with pytest.raises((ValueError, KeyError), match="'none'"):
        fcos.fcos_loss(outputs, targets, torch.ones(2), **{keyword: "none"})


# ---- the quality of a box ----------------------------------------------------------------------


def smoothed_iou(a, b):
    """Return the IoU of two boxes ltrb around a location, smoothed as in the official code."""
    width = min(a[0], b[0]) + min(a[2], b[2])
    height = min(a[1], b[1]) + min(a[3], b[3])
    intersection = width * height
    area_a = (a[0] + a[2]) * (a[1] + a[3])
    area_b = (b[0] + b[2]) * (b[1] + b[3])
    return (intersection + 1) / (area_a + area_b - intersection + 1)


def centerness_of(ltrb):
    left, top, right, bottom = ltrb
    x = min(left, right) / max(left, right)
    y = min(top, bottom) / max(top, bottom)
    return (x * y) ** 0.5


@pytest.mark.parametrize("quality", ["centerness", "iou"])
@pytest.mark.parametrize("unit", ["pixel", "stride"])
def test_quality_is_the_target_of_ctr_and_weighs_the_boxes(quality, unit):
    model = detector(quality=quality, unit=unit, box_loss="linear_iou")
    images, sizes = fcos.pad_batch([picture(64, 96), picture(60, 90, seed=2)])
    outputs = dict(outputs_of(model, images, sizes))
    outputs["ltrb"] = outputs["ltrb"].clone().requires_grad_()
    outputs["ctr"] = outputs["ctr"].clone().requires_grad_()
    truths = [objects((8, 8, 50, 40, 1), (30, 4, 94, 60, 0)), objects((1, 1, 89, 59, 2))]
    targets = model.targets((64, 96), truths)
    background = targets["labels"] < 0
    positives = (~background).nonzero().tolist()
    normalizers = torch.tensor([8.0, 0.25])
    losses = fcos.fcos_loss(outputs, targets, normalizers, **model.loss)
    sum(losses.values()).backward()
    ltrb_grad = outputs["ltrb"].grad
    ctr_grad = outputs["ctr"].grad
    assert ltrb_grad[~background].any()
    assert not ltrb_grad[background].any()
    assert not ctr_grad[background].any()

    # the gradient of the cross entropy is (probability - target) / normalizer
    ctr_target = outputs["ctr"].detach().sigmoid() - 8 * ctr_grad
    assert len(positives) > 10
    assert ctr_target[~background].max() > 0.4
    box_loss = 0.0
    for image, row in positives:
        stride = outputs["points"][row, 2].item() if unit == "stride" else 1
        predicted = [side / stride for side in outputs["ltrb"][image, row].tolist()]
        target = [side / stride for side in targets["ltrb"][image, row].tolist()]
        iou = smoothed_iou(predicted, target)
        central = centerness_of(target)
        if quality == "iou":
            expected = iou
            box_loss += (1 - iou) / 8
        else:
            expected = central
            box_loss += central * (1 - iou) / 0.25
        assert ctr_target[image, row].item() == pytest.approx(expected, abs=1e-5)
    assert losses["box"].item() == pytest.approx(box_loss, rel=1e-4)

    # whatever the background predicts, losses and gradients stay the same
    spoilt = outputs["ltrb"].detach().clone()
    spoilt[background] = torch.tensor([float("inf"), float("nan"), -float("inf"), 3e38])
    spoilt.requires_grad_()
    again = fcos.fcos_loss(outputs | {"ltrb": spoilt}, targets, normalizers, **model.loss)
    assert all(again[name].item() == loss.item() for name, loss in losses.items())
    assert torch.autograd.grad(sum(again.values()), spoilt)[0].equal(ltrb_grad)


@pytest.mark.parametrize(
    "keywords, uniform",
    [
        (dict(), False),
        (dict(quality="iou"), True),
        (dict(box_weight="uniform"), True),
        (dict(quality="iou", box_weight="centerness"), False),
    ],
    ids=str,
)
def test_box_weight_is_independent_of_the_quality(keywords, uniform):
    """Two locations, of centerness 1 and 1/3. The box of the first is exact: its loss is 0."""
    outputs = {
        "cls": torch.zeros(1, 2, 3),
        "ltrb": torch.tensor([[[8.0, 8, 8, 8], [4, 4, 4, 4]]]),
        "ctr": torch.zeros(1, 2),
        "points": torch.tensor([[8.0, 8, 8, -1, 64]] * 2),
    }
    targets = {
        "labels": torch.tensor([[0, 1]]),
        "ltrb": torch.tensor([[[8.0, 8, 8, 8], [1, 8, 9, 8]]]),
    }
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **keywords)
    second = fcos.KINDS["giou"](outputs["ltrb"][0, 1] / 8, targets["ltrb"][0, 1] / 8)
    expected = second / 2 if uniform else second / 3 / (1 + 1 / 3)
    torch.testing.assert_close(losses["box"], expected)


# ---- torchvision's loss, and batches without a box ---------------------------------------------


def test_torchvision_row_has_torchvisions_loss():
    hw = 224, 256
    small = {name: fcos.MODELS["shapes"][name] for name in ("block", "blocks", "stem", "norm")}
    model = fcos.build("fcos_torchvision_R_50_FPN", 3, **small, frozen_stages=0)
    outputs = model(torch.zeros(2, 3, *hw, dtype=torch.uint8))
    P = len(outputs["points"])
    outputs["cls"] = torch.randn(2, P, 3).requires_grad_()
    outputs["ltrb"] = torch.rand(2, P, 4).mul(60).requires_grad_()
    outputs["ctr"] = torch.randn(2, P).requires_grad_()
    corner = torch.rand(2, 20, 2) * 120
    boxes = torch.cat([corner, corner + 4 + torch.rand(2, 20, 2) * 100], 2)
    labels = torch.randint(3, (2, 20))
    truths = [{"boxes": b, "labels": l} for b, l in zip(boxes, labels)]
    targets = model.targets(hw, truths)
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)

    body = torch.nn.Identity()
    body.out_channels = 32
    torchvision_model = torchvision.models.detection.FCOS(body, 3)
    sizes = fcos.level_sizes(hw)
    anchors = torchvision_model.anchor_generator(
        ImageList(torch.zeros(2, 3, *hw), [hw] * 2),
        [torch.zeros(2, 8, *size) for size in sizes],
    )
    torchvision_outputs = {
        "cls_logits": outputs["cls"],
        "bbox_regression": outputs["ltrb"] / outputs["points"][:, 2:3],
        "bbox_ctrness": outputs["ctr"][..., None],
    }
    levels = [rows * columns for rows, columns in sizes]
    expected = torchvision_model.compute_loss(truths, torchvision_outputs, anchors, levels)

    for loss, torchvision_loss, output in (
        ("cls", "classification", "cls"),
        ("box", "bbox_regression", "ltrb"),
        ("ctr", "bbox_ctrness", "ctr"),
    ):
        torch.testing.assert_close(losses[loss], expected[torchvision_loss], rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(losses[loss], outputs[output])
        (expected_gradient,) = torch.autograd.grad(expected[torchvision_loss], outputs[output])
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    assert losses["box"] > 0.3


@pytest.mark.parametrize(
    "overrides",
    [{}, fcos.PLAIN, {"norm": "frozen"}, {"norm": "bn"}, {"quality": "iou"}],
    ids=["imprv", "plain", "frozen", "bn", "iou quality"],
)
def test_a_batch_without_boxes_gives_every_parameter_a_gradient(overrides):
    model = fcos.build("shapes", 3, **overrides).train()
    images, sizes = fcos.pad_batch([picture(64, 90), picture(60, 64)])
    targets = model.targets((64, 96), [objects(), objects()])
    normalizers = fcos.loss_normalizers(targets)
    assert normalizers.tolist() == [0, 0]
    losses = fcos.fcos_loss(model(images, sizes), targets, normalizers, **model.loss)
    assert losses["cls"] > 0
    assert losses["box"] == 0
    assert losses["ctr"] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
