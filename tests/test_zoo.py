"""Every row of fcos.MODELS against the official facts, and everyone's weights.

The names of other families are made here from ours, by rules of their own: none of fcos.py's.
"""

import functools
import json
import math
import os
import pickle
import re
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from golden.synth_image import image as synth_image
from golden.weights_recipe import make_weights

import evaluate
import fcos
import train
from fcos import UserError

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"
SMALL = dict(blocks=(1, 1, 1, 1), channels=32)

ROWS = {  # model: parameters, trainable ones, keys of the official state dict
    "fcos_R_50_FPN": (32_244_250, 32_021_850, 324),
    "fcos_R_101_FPN": (51_184_154, 50_961_754, 579),
    "fcos_X_101_32x8d_FPN": (95_328_794, 94_903_642, 579),
    "fcos_X_101_64x4d_FPN": (89_992_730, 89_595_226, 579),
    "fcos_imprv_R_50_FPN": (32_244_250, 32_021_850, 324),
    "fcos_imprv_R_101_FPN": (51_184_154, 50_961_754, 579),
    "fcos_imprv_X_101_32x8d_FPN": (95_328_794, 94_903_642, 579),
    "fcos_imprv_X_101_64x4d_FPN": (89_992_730, 89_595_226, 579),
    "fcos_imprv_dcnv2_R_50_FPN": (33_239_983, 33_017_583, 354),
    "fcos_imprv_dcnv2_R_101_FPN": (53_237_882, 53_015_482, 643),
    "fcos_imprv_dcnv2_X_101_32x8d_FPN": (102_670_094, 102_244_942, 635),
    "fcos_imprv_dcnv2_X_101_64x4d_FPN": (97_334_030, 96_936_526, 635),
    "fcos_bn_MNV2_FPN": (9_798_234, 9_798_234, 365),
    "fcos_syncbn_MNV2_FPN": (9_798_234, 9_798_234, 365),
    "fcos_syncbn_c128_MNV2_FPN": (3_888_090, 3_888_090, 365),
}
RECIPES = {  # official recipe: its model, iterations, images a step, choices of the short side
    "fcos_R_50_FPN_1x": ("fcos_R_50_FPN", 90_000, 16, 1),
    "fcos_R_101_FPN_2x": ("fcos_R_101_FPN", 180_000, 16, 161),
    "fcos_X_101_32x8d_FPN_2x": ("fcos_X_101_32x8d_FPN", 180_000, 16, 161),
    "fcos_X_101_64x4d_FPN_2x": ("fcos_X_101_64x4d_FPN", 180_000, 16, 161),
    "fcos_imprv_R_50_FPN_1x": ("fcos_imprv_R_50_FPN", 90_000, 16, 1),
    "fcos_imprv_R_101_FPN_1x": ("fcos_imprv_R_101_FPN", 90_000, 16, 1),
    "fcos_imprv_R_101_FPN_2x": ("fcos_imprv_R_101_FPN", 180_000, 16, 161),
    "fcos_imprv_X_101_32x8d_FPN_2x": ("fcos_imprv_X_101_32x8d_FPN", 180_000, 16, 161),
    "fcos_imprv_X_101_64x4d_FPN_2x": ("fcos_imprv_X_101_64x4d_FPN", 180_000, 16, 161),
    "fcos_imprv_dcnv2_R_50_FPN_1x": ("fcos_imprv_dcnv2_R_50_FPN", 90_000, 16, 1),
    "fcos_imprv_dcnv2_R_101_FPN_1x": ("fcos_imprv_dcnv2_R_101_FPN", 90_000, 16, 1),
    "fcos_imprv_dcnv2_R_101_FPN_2x": ("fcos_imprv_dcnv2_R_101_FPN", 180_000, 16, 161),
    "fcos_imprv_dcnv2_X_101_32x8d_FPN_2x": ("fcos_imprv_dcnv2_X_101_32x8d_FPN", 180_000, 16, 161),
    "fcos_imprv_dcnv2_X_101_64x4d_FPN_2x": ("fcos_imprv_dcnv2_X_101_64x4d_FPN", 180_000, 16, 161),
    "fcos_bn_bs16_MNV2_FPN_1x": ("fcos_bn_MNV2_FPN", 90_000, 16, 1),
    "fcos_syncbn_bs32_MNV2_FPN_1x": ("fcos_syncbn_MNV2_FPN", 90_000, 32, 1),
    "fcos_syncbn_bs32_c128_MNV2_FPN_1x": ("fcos_syncbn_c128_MNV2_FPN", 90_000, 32, 1),
    "fcos_syncbn_bs32_c128_ms_MNV2_FPN_1x": ("fcos_syncbn_c128_MNV2_FPN", 90_000, 32, 161),
    "fcos_syncbn_bs64_c128_ms_MNV2_FPN_1x": ("fcos_syncbn_c128_MNV2_FPN", 90_000, 64, 161),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Two are slower on networks as small as these, by far if the second core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared():
    """The folder with the full golden sets and a few real images, which is no part of a clone."""
    if not SHARED.is_dir():
        pytest.skip("needs the full golden sets of ../shared")
    return SHARED


# ---- the names of other families ---------------------------------------------------------------

LEVELS = {"3": 0, "4": 1, "5": 2}
INNER = {"lateral": "inner", "output": "layer"}
KIND = ["conv", "norm"]


def resnet(name):
    """Our name of a ResNet's tensor -> torchvision's, without the prefix "backbone."."""
    part = name.split(".")[1:]
    if part[0] == "stem":
        return f"{'conv1' if part[1] == 'conv' else 'bn1'}.{part[2]}"
    stage, block, conv, kind, *tensor = part
    stage = f"layer{int(stage[3:]) - 1}.{block}"
    if conv == "down":
        return f"{stage}.downsample.{KIND.index(kind)}.{tensor[0]}"
    return f"{stage}.{conv if kind == 'conv' else 'bn' + conv[4:]}.{'.'.join(tensor)}"


def deformable(names):
    """The prefixes of deformable convolutions, whose weight some families call differently."""
    return {name.removesuffix(".offset.weight") for name in names if ".offset.weight" in name}


OFFICIAL_HEAD = dict(cls="cls_logits", box="bbox_pred", ctr="centerness")


def official(name, names):
    part = name.split(".")
    if name.startswith("backbone.features"):
        if part[2] == "0":
            return f"backbone.body.features.0.{KIND.index(part[3])}.{part[4]}"
        index = 3 * int(part[3]) + KIND.index(part[4])
        return f"backbone.body.features.{part[2]}.conv.{index}.{part[5]}"
    dcn = name.rsplit(".", 1)[0] in deformable(names)
    if part[0] == "backbone":
        theirs = resnet(name)
        if dcn:
            theirs = theirs.replace(".conv2.weight", ".conv2.conv.weight")
        return f"backbone.body.{'stem.' if part[1] == 'stem' else ''}{theirs}"
    if part[0] == "fpn":
        kind, level = part[1][:-1], int(part[1][-1])
        if kind == "p":
            return f"backbone.fpn.top_blocks.{part[1]}.{part[2]}"
        return f"backbone.fpn.fpn_{INNER[kind]}{level - 1}.{part[2]}"
    return "rpn.head." + head(part[1:], dcn, OFFICIAL_HEAD)


def head(part, dcn, names):
    if part[0].endswith("_tower"):
        tower = part[0].replace("box", "bbox")
        index = 3 * int(part[1]) + KIND.index(part[2])
        dcn = "conv." if dcn else ""
        return f"{tower}.{index}.{dcn}{'.'.join(part[3:])}"
    if part[0] == "scale":
        return f"scales.{part[1]}.scale"
    return f"{names[part[0]]}.{part[1]}"


def detectron2(name):
    """... of a ResNet's tensor -> Detectron2's, without the prefix."""
    part = name.split(".")[1:]
    tensor = part[-1]
    if part[0] == "stem":
        return f"stem.conv1.{'norm.' if part[1] == 'norm' else ''}{tensor}"
    where = ".".join(part[:3]).replace("down", "shortcut")
    if "offset" in part:
        return f"{where}_offset.{tensor}"
    return f"{where}.{'norm.' if part[3] == 'norm' else ''}{tensor}"


def adelaidet(name, names):
    part = name.split(".")
    if part[0] == "backbone":
        return "backbone.bottom_up." + detectron2(name)
    if part[0] == "fpn":
        middle = f"top_block.{part[1]}" if part[1] in ("p6", "p7") else f"fpn_{part[1]}"
        return f"backbone.{middle}.{part[2]}"
    dcn = name.rsplit(".", 1)[0] in deformable(names)
    names = OFFICIAL_HEAD | dict(ctr="ctrness")
    return "proposal_generator.fcos_head." + head(part[1:], dcn, names)


def vision(name, names):
    part = name.split(".")
    if part[0] == "backbone":
        return "backbone.body." + resnet(name)
    if part[0] == "fpn":
        kind, level = part[1][:-1], part[1][-1]
        if kind == "p":
            return f"backbone.fpn.extra_blocks.{part[1]}.{part[2]}"
        return f"backbone.fpn.{INNER[kind]}_blocks.{LEVELS[level]}.0.{part[2]}"
    if part[1].endswith("_tower"):
        index = 3 * int(part[2]) + KIND.index(part[3])
        tower = {"cls_tower": "classification", "box_tower": "regression"}[part[1]]
        return f"head.{tower}_head.conv.{index}.{part[4]}"
    names = dict(cls="classification_head.cls_logits", box="regression_head.bbox_reg",
                 ctr="regression_head.bbox_ctrness")
    return f"head.{names[part[1]]}.{part[2]}"


def mmdetection(name, names):
    part = name.split(".")
    if part[0] == "backbone":
        return "backbone." + resnet(name).replace("conv2.offset", "conv2.conv_offset")
    if part[0] == "fpn":
        kind, level = part[1][:-1], part[1][-1]
        index = {"6": 3, "7": 4, **LEVELS}[level]
        return f"neck.{'lateral' if kind == 'lateral' else 'fpn'}_convs.{index}.conv.{part[2]}"
    if part[1].endswith("_tower"):
        tower = {"cls_tower": "cls_convs", "box_tower": "reg_convs"}[part[1]]
        tensor = ".".join(part[4:]).replace("offset", "conv_offset")
        return f"bbox_head.{tower}.{part[2]}.{'gn' if part[3] == 'norm' else 'conv'}.{tensor}"
    if part[1] == "scale":
        return f"bbox_head.scales.{part[2]}.scale"
    name = {"cls": "conv_cls", "box": "conv_reg", "ctr": "conv_centerness"}[part[1]]
    return f"bbox_head.{name}.{part[2]}"


def renamed(model, rule):
    """The model's state dict in the names of another family."""
    state = model.state_dict()
    theirs = {rule(name, state): value for name, value in state.items()}
    assert len(theirs) == len(state)
    return theirs


def randomise(model, seed=0):
    """Values that differ everywhere, in buffers too, with variances over 0."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.fill_(7)
    return model


def small(name, **overrides):
    return fcos.build(name, **{**SMALL, **overrides})


def assert_same_weights(model, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# ---- the rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_row_has_the_official_parameters(name):
    with torch.device("meta"):
        model = fcos.build(name)
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    state = model.state_dict()
    counts = sum(p.numel() for p in parameters), sum(p.numel() for p in trainable), len(state)
    assert counts == ROWS[name]
    for name in state:
        assert fcos.our_name(official(name, state)) == name


def test_rows_have_the_official_keys(shared):
    golden = json.loads((shared / "golden/state_dicts.json").read_text())
    assert golden.keys() == RECIPES.keys()
    for recipe, rows in golden.items():
        with torch.device("meta"):
            model = fcos.build(RECIPES[recipe][0])
        state = model.state_dict()
        learns = {name: p.requires_grad for name, p in model.named_parameters()}
        ours = {official(name, state): [list(value.shape), learns.get(name)]
                for name, value in state.items()}
        assert ours == {key: [shape, learns] for key, shape, _, learns in rows}, recipe


def test_rows_beyond_the_official_ones():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in fcos.build(name).parameters())
                  for name in fcos.MODELS if name not in ROWS and name != "shapes"}
        theirs = torchvision.models.detection.fcos_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=80
        )
    batch_norms = 2 * sum(m.num_features for m in theirs.modules() if hasattr(m, "running_mean"))
    theirs = sum(p.numel() for p in theirs.parameters()) - batch_norms
    assert counts == {
        "fcos_torchvision_R_50_FPN": theirs, "fcos_imprv_R_18_FPN": 19_268_122,
        "fcos_imprv_R_34_FPN": 29_368_858,
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_the_official_one(recipe):
    settings = train.RECIPES[recipe]
    found = (settings["model"], settings["iters"], settings["batch_size"],
             len(settings["min_size"]))
    assert found == RECIPES[recipe]
    assert settings["lr"] == 0.01 and settings["warmup"] == 500 and settings["max_size"] == 1333
    assert settings["min_size"] in ([800], list(range(640, 801)))
    part = re.search(r"R_\d+|X_101_\d+x\dd|MNV2", recipe)[0].replace("_", "-", 2)
    assert settings["weights"].startswith(part.replace("MNV2", "mobilenet_v2"))


def test_initial_values_are_the_official_ones():
    torch.manual_seed(0)
    model = fcos.build("fcos_imprv_dcnv2_X_101_32x8d_FPN", blocks=(1, 1, 1, 1))
    dcn = model.backbone.res5[0].conv2.conv
    bound = 1 / math.sqrt(9 * 2048)  # of all channels, not of one of the 32 groups
    assert dcn.weight.abs().max() <= bound and dcn.weight.std() > bound / 2
    assert not isinstance(model.backbone.res3[0].conv2.conv, fcos.DeformConv)
    bound = math.sqrt(3 / (9 * 2048))  # kaiming_uniform(a=1), not zero
    assert bound / 2 < dcn.offset.weight.std() and dcn.offset.weight.abs().max() <= bound
    last = model.head.box_tower[3].conv
    assert isinstance(last, fcos.DeformConv)
    assert abs(last.offset.weight.std() - 0.01) < 1e-3 and last.weight.std() > 0.011
    assert not dcn.offset.bias.any() and not last.bias.any()
    mobile = fcos.build("fcos_bn_MNV2_FPN").backbone.features[13]
    assert abs(mobile[0].conv.weight.std() / math.sqrt(2 / 576) - 1) < 0.05
    assert abs(mobile[1].conv.weight.std() / math.sqrt(2 / (9 * 576)) - 1) < 0.05


@pytest.mark.parametrize("name", fcos.MODELS)
def test_one_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = fcos.build(name, num_classes=3).train()
    torch.nn.init.ones_(model.head.box.bias)  # relu passes gradients on where distances are over 0
    images = torch.from_numpy(synth_image(3, 128, 128)).permute(2, 0, 1)[None]
    boxes = torch.tensor([[4.0, 4, 34, 44], [20, 10, 125, 120], [60, 30, 122, 80]])
    targets = model.targets((128, 128), [boxes], [torch.tensor([0, 1, 2])])
    outputs = model(images, torch.tensor([[128, 128]]))
    losses = fcos.fcos_loss(outputs, targets, fcos.normalizer(targets), **model.loss)
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values()))
    idle = []
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        if not parameter.grad.any():
            idle.append(parameter_name)
    # no box is matched on P6 and P7
    assert all(name.startswith("head.scale.") for name in idle), idle
    optimizer = torch.optim.SGD(train.parameter_groups(model), lr=1e-3, momentum=0.9)
    optimizer.step()


# ---- the official code's numbers ---------------------------------------------------------------


@functools.cache
def official_model(name):
    """A row with the weights of the recipe, loaded under their official names."""
    model = fcos.build(name)
    state = model.state_dict()
    weights = make_weights({official(key, state): value.shape for key, value in state.items()})
    report = fcos.load_weights(model, {key: torch.from_numpy(w) for key, w in weights.items()})
    assert report["family"] == "official" and not report["missing"] + report["ignored"]
    return model.eval()


def assert_close(found, expected, limit):
    scale = max(1, np.abs(expected).max())
    assert np.abs(np.asarray(found) - expected).max() <= limit * scale


def assert_matched(found, expected, share, pixels, score):
    """At least this share of the expected detections is found, each once, and little else."""
    boxes, scores, labels = (np.asarray(part) for part in expected)
    close = np.abs(found["boxes"].numpy() - boxes[:, None]).max(2) <= pixels
    close &= np.abs(found["scores"].numpy() - scores[:, None]) <= score
    close &= found["labels"].numpy() == labels[:, None]
    taken = np.zeros(close.shape[1], bool)
    for row in close:
        taken[np.flatnonzero(row & ~taken)[:1]] = True
    D = len(labels)
    assert D > 0 and taken.sum() >= share * D and abs(len(taken) - D) <= (1 - share) * D


def per_level(model, outputs):
    """cls, ltrb, ctr of the official shapes (C, rows, columns) for P3..P7."""
    hw = model.padded
    parts = zip(*(outputs[key].view(1, len(outputs["points"]), -1)[0].split(outputs["levels"])
                  for key in ("cls", "ltrb", "ctr")))
    for maps, (rows, columns) in zip(parts, fcos.level_sizes(hw)):
        yield [x.T.reshape(-1, rows, columns).numpy() for x in maps]


@torch.inference_mode()
def check_golden(model, images, sizes, arrays, tag, detections, boxes):
    model.padded = images.shape[-2:]
    outputs = model(images, sizes)
    for level, (cls, ltrb, ctr) in enumerate(per_level(model, outputs)):
        for name, found in (("cls", cls[::8]), ("reg", ltrb), ("ctr", ctr)):
            assert_close(found, arrays[f"{tag}{name}_L{level}"].reshape(found.shape), 2e-4)
    found = model.detect(outputs, sizes)[0]
    expected = (arrays[detections + boxes] + [0, 0, 1, 1], arrays[detections + "det_scores"],
                arrays[detections + "det_labels"] - 1)
    assert_matched(found, expected, 0.99, 0.5, 1e-3)  # of 100: one may change places at the cut


@pytest.mark.parametrize("recipe", [
    "fcos_syncbn_bs32_c128_MNV2_FPN_1x", "fcos_imprv_dcnv2_R_50_FPN_1x"
])
def test_outputs_equal_the_official_ones(recipe):
    model = official_model(RECIPES[recipe][0])
    arrays = np.load(GOLDEN / f"model_{recipe}.npz")
    state = model.state_dict()
    ours = {official(name, state): value.double() for name, value in state.items()}
    for key, sums in zip(arrays["weights.keys"].tolist(), arrays["weights.sum_abssum"]):
        value = ours.pop(key)
        assert np.allclose([value.sum(), value.abs().sum()], sums, rtol=1e-6, atol=1e-5), key
    assert not ours
    images, sizes = fcos.pad_batch([torch.from_numpy(synth_image(1, 240, 320)).permute(2, 0, 1)])
    check_golden(model, images, sizes, arrays, "", "", "det_boxes")


@pytest.mark.parametrize("recipe", [
    "fcos_syncbn_bs32_c128_MNV2_FPN_1x", "fcos_imprv_dcnv2_R_50_FPN_1x",
    "fcos_imprv_X_101_32x8d_FPN_2x",
])
def test_outputs_on_photos_equal_the_official_ones(recipe, shared):
    arrays = np.load(shared / f"golden/model_{recipe}.npz")
    tensors = np.load(shared / "golden/transforms.npz")
    model = official_model(RECIPES[recipe][0])
    for photo in ("885", "1000"):
        tensor = torch.from_numpy(tensors[f"tensor_{photo}_320"])
        h, w = tensor.shape[-2:]
        H, W = fcos.padded_hw([(h, w)])
        images = torch.nn.functional.pad(tensor.view(1, 3, h, w), (0, W - w, 0, H - h))
        tag = f"s320_{photo}."
        check_golden(model, images, torch.tensor([[h, w]]), arrays, tag, tag + "img0.",
                     "det_boxes_net")


# ---- deformable convolution and batch norm -----------------------------------------------------


def test_deformable_convolution_has_the_right_gradients():
    torch.manual_seed(0)
    layer = fcos.DeformConv(2, 4, 3, 2, 1, groups=2).double()
    torch.nn.init.normal_(layer.offset.weight, std=0.3)
    torch.nn.init.normal_(layer.offset.bias)  # positions between the pixels, some outside
    names, parameters = zip(*layer.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), x)

    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_deformable_convolution_without_offsets_is_half_a_convolution():
    layer = fcos.DeformConv(8, 4, 3, 1, 1)
    torch.nn.init.zeros_(layer.offset.weight)
    torch.nn.init.zeros_(layer.offset.bias)
    torch.nn.init.zeros_(layer.bias)
    x = torch.randn(2, 8, 6, 7)
    expected = torch.nn.functional.conv2d(x, layer.weight, padding=1) / 2  # sigmoid(0)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with torch.no_grad():  # one pixel down and two to the right, for all taps
        layer.offset.bias[0:18:2], layer.offset.bias[1:18:2] = 1, 2
    moved = torch.nn.functional.pad(x, (0, 2, 0, 1))[:, :, 1:, 2:]
    expected = torch.nn.functional.conv2d(moved, layer.weight, padding=1) / 2
    assert torch.allclose(layer(x)[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-5)


def test_deformable_row_runs_in_bf16():
    torch.manual_seed(0)
    model = small("fcos_imprv_dcnv2_R_50_FPN").eval()
    images, sizes = torch.rand(1, 3, 128, 192), torch.tensor([[128, 192]])
    with torch.inference_mode():
        full = model(images, sizes)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images, sizes)
        model.bfloat16()(images.bfloat16(), sizes)
    assert (half["cls"] - full["cls"]).abs().max() < 0.1


def test_sync_batch_norm_takes_over_every_batch_norm():
    model = fcos.build("fcos_syncbn_c128_MNV2_FPN").eval()
    x, sizes = torch.rand(1, 3, 64, 64), torch.tensor([[64, 64]])
    with torch.inference_mode():
        before, keys = model(x, sizes)["cls"], list(model.state_dict())
        parameters = [id(p) for p in model.parameters()]
        converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert converted is model and list(model.state_dict()) == keys
        assert [id(p) for p in model.parameters()] == parameters
        assert torch.equal(model(x, sizes)["cls"], before)
    kinds = [type(m) for m in model.modules() if hasattr(m, "running_mean")]
    assert len(kinds) == 51 and set(kinds) == {torch.nn.SyncBatchNorm}


# ---- weights of other families -----------------------------------------------------------------


@pytest.mark.parametrize("rule, family", [
    (official, "official"), (adelaidet, "adelaidet"), (mmdetection, "mmdetection"),
])
@pytest.mark.parametrize("name", [
    "fcos_R_50_FPN", "fcos_imprv_dcnv2_R_50_FPN", "fcos_imprv_dcnv2_X_101_64x4d_FPN",
])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_a_detector_is_used(rule, family, name, prefix):
    model, other = randomise(small(name)), small(name)
    state = {prefix + key: value for key, value in renamed(model, rule).items()}
    wrapped = {"state_dict": state, "meta": {}} if family == "mmdetection" else {
        "model": state, "optimizer": {}, "iteration": 9}
    for source in (state, wrapped):
        report = fcos.load_weights(other, source)
        assert report["family"] == family
        assert not report["ignored"] and not report["missing"]
        assert_same_weights(other, model)
        other = randomise(other, 1)


def test_official_mobilenet_is_used_whole():
    model, other = (fcos.build("fcos_syncbn_c128_MNV2_FPN") for _ in range(2))
    report = fcos.load_weights(other, renamed(randomise(model), official))
    assert len(report["loaded"]) == 365 and not report["ignored"]
    assert_same_weights(other, model)


def test_adelaidet_brings_its_pixels():
    model = small("fcos_imprv_R_50_FPN")
    state = renamed(model, adelaidet)
    report = fcos.load_weights(model, state)
    expected = dict(bgr=True, mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bn_eps=1e-5,
                    inclusive=False, grid="centre", score="fcos")
    assert report["convention"] == model.convention == expected
    pixels = dict(pixel_mean=torch.tensor([123.5, 116, 103]).view(3, 1, 1),
                  pixel_std=torch.tensor([58.0, 57, 56]).view(3, 1, 1))
    report = fcos.load_weights(model, state | pixels)
    assert model.convention == expected | dict(bgr=False, mean=(123.5, 116, 103), std=(58, 57, 56))
    assert model.pixel_std.flatten().tolist() == [58, 57, 56]

    wide, narrow = (small(f"fcos_imprv_X_101_{kind}_FPN") for kind in ("64x4d", "32x8d"))
    fcos.load_weights(wide, renamed(wide, adelaidet))
    fcos.load_weights(narrow, renamed(narrow, adelaidet))
    assert wide.convention["std"] == (1, 1, 1)
    assert narrow.convention["std"] == (57.375, 57.12, 58.395)
    for norm in (m for m in narrow.modules() if isinstance(m, fcos.FrozenBatchNorm)):
        assert norm.eps == 1e-5


def test_mmdetection_brings_its_pixels():
    plain, imprv = small("fcos_R_50_FPN"), small("fcos_imprv_R_50_FPN")
    state = renamed(plain, mmdetection)
    biases = [key for key in state if re.search(r"head\..*convs\.\d\.conv\.bias", key)]
    assert len(biases) == 8
    state = {key: value for key, value in state.items() if key not in biases}
    state |= {key: value.reshape(()) for key, value in state.items() if key.endswith(".scale")}
    state["backbone.bn1.num_batches_tracked"] = torch.tensor(3)
    randomise(plain)
    report = fcos.load_weights(plain, {"state_dict": state, "meta": {"CLASSES": ("a",)}})
    assert report["ignored"] == ["backbone.bn1.num_batches_tracked"]
    assert not plain.head.cls_tower[2].conv.bias.any()
    assert plain.convention == fcos.CONVENTION | dict(bn_eps=1e-5, score="mmdetection")

    theirs = renamed(imprv, mmdetection)
    fcos.load_weights(imprv, theirs)
    assert imprv.convention["mean"] == (103.53, 116.28, 123.675) and imprv.convention["bgr"]
    old = {key.replace("conv_cls", "fcos_cls").replace("conv_reg", "fcos_reg")
           .replace("conv_centerness", "fcos_centerness"): value for key, value in theirs.items()}
    assert not fcos.load_weights(imprv, old)["ignored"]
    resnet34 = small("fcos_imprv_R_34_FPN")
    fcos.load_weights(resnet34, renamed(resnet34, mmdetection))
    assert resnet34.convention["mean"] == (123.675, 116.28, 103.53)
    assert not resnet34.convention["bgr"]

    config = ("data_preprocessor=dict(\n    mean=[\n        102.9801,\n        115.9465,\n        "
              "122.7717,\n    ],\n    std=[1.0, 1.0, 1.0],\n    bgr_to_rgb=False,\n")
    fcos.load_weights(imprv, {"state_dict": theirs, "meta": {"cfg": config, "epoch": 12}})
    assert imprv.convention["mean"] == (102.9801, 115.9465, 122.7717) and imprv.convention["bgr"]
    config = ("img_norm_cfg = dict(\n    mean=[123.675, 116.28, 103.53], "
              "std=[58.395, 57.12, 57.375], to_rgb=True)")
    fcos.load_weights(imprv, {"state_dict": theirs, "meta": {"config": config}})
    assert imprv.convention["std"] == (58.395, 57.12, 57.375) and not imprv.convention["bgr"]


def test_mmdetection_scores():
    torch.manual_seed(0)
    model = fcos.build("shapes", 3).eval()
    points = fcos.make_points((96, 128))
    P = len(points)
    outputs = {"cls": torch.randn(1, P, 3), "ltrb": torch.rand(1, P, 4) * 40,
               "ctr": torch.randn(1, P), "points": points,
               "levels": [rows * columns for rows, columns in fcos.level_sizes((96, 128))]}
    boxes, scores, labels = model.decode(outputs, [(96, 128)])
    model.set_convention(score="mmdetection")
    found = model.decode(outputs, [(96, 128)])
    assert torch.equal(found[0], boxes) and torch.equal(found[2], labels)
    assert torch.allclose(found[1], scores**2, atol=1e-6)
    # of the three surest pairs of a level, whatever their centerness
    kept = model.detect(outputs, [(96, 128)], topk=3, nms_threshold=1)[0]
    expected = []
    for cls, ctr in zip(outputs["cls"].sigmoid().split(outputs["levels"], 1),
                        outputs["ctr"].sigmoid().split(outputs["levels"], 1)):
        top, pairs = cls.flatten().topk(3)
        expected.append(top * ctr.flatten()[pairs // 3])
    expected = torch.cat(expected).sort(descending=True)[0]
    assert torch.allclose(kept["scores"], expected)


def test_torchvision_detects_the_same(tmp_path):
    """The recipe's weights in both networks, each loaded from the other's names."""
    model = fcos.build("fcos_torchvision_R_50_FPN").eval()
    names = model.state_dict()
    weights = make_weights({official(name, names): value.shape for name, value in names.items()})
    weights = {name: torch.from_numpy(weights[official(name, names)]) for name in names}
    model.load_state_dict(weights)

    theirs = torchvision.models.detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=240, max_size=320
    ).eval()
    state = renamed(model, vision)
    for kind, unused in (("weight", 0.0), ("bias", -30.0)):  # 91 rows, of which 80 are classes
        key = f"head.classification_head.cls_logits.{kind}"
        rows = torch.full((91, *state[key].shape[1:]), unused)
        rows[list(fcos.COCO)] = state[key]
        state[key] = rows
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("num_batches_tracked" in key for key in missing)
    torch.save({"model": theirs.state_dict(), "epoch": 25}, tmp_path / "model_25.pth")
    assert len(theirs.state_dict()) == 372

    model = fcos.load(tmp_path / "model_25.pth")  # trained with batch norm
    assert model.name == "fcos_torchvision_R_50_FPN" and model.classes[79] == "toothbrush"
    assert_same_weights(model, model)
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value)
    assert fcos.load_weights(model, state)["ignored"] == []  # with frozen batch norm
    photos = [synth_image(seed, 240, 320) for seed in (1, 2)]
    for path in sorted((SHARED / "data/coco2017_tiny/val2017").glob("*.jpg"))[:2]:
        photo = fcos.read_image(path)
        photos.append(fcos.resize(photo, (240, 320)).permute(1, 2, 0).numpy())
    with torch.inference_mode():
        for photo in photos:
            photo = torch.from_numpy(photo).permute(2, 0, 1)
            expected = theirs([photo / 255])[0]
            found = model.detect(model(*fcos.pad_batch([photo])), [(240, 320)])[0]
            found["labels"] = torch.tensor(model.category_ids)[found["labels"]]
            expected = [expected[key] for key in ("boxes", "scores", "labels")]
            assert_matched(found, expected, 1, 0.05, 1e-4)
            assert (found["scores"] > 0.2).all()


def test_torchvision_grid():
    points = fcos.make_points((800, 1088), grid="corner")
    first = [0, *np.cumsum([rows * columns for rows, columns in fcos.level_sizes((800, 1088))])]
    steps = [points[i + 1, 0].item() for i in first[:5]]
    assert steps == [8, 16, 32, 64, 120] and (points[first[:5], :2] == 0).all()
    columns = fcos.level_sizes((800, 1088))
    steps = [points[i + columns[level][1], 1].item() for level, i in enumerate(first[:5])]
    assert steps == [8, 16, 32, 61, 114]
    model = fcos.build("fcos_torchvision_R_50_FPN", **SMALL)
    outputs = model(torch.zeros(1, 3, 128, 192, dtype=torch.uint8), [(128, 192)])
    assert torch.equal(outputs["points"], fcos.make_points((128, 192), grid="corner"))
    box = [torch.tensor([[0.0, 0, 16, 16]])]
    targets = model.targets((64, 64), box, [torch.tensor([1])])
    assert targets["ltrb"][0][(targets["labels"] == 1)[0]].tolist() == [[8, 8, 8, 8]]


def test_torchvision_rows_follow_the_category_ids():
    model = fcos.build("fcos_torchvision_R_50_FPN", 2, **SMALL)
    state = renamed(randomise(model), vision)
    for kind in ("weight", "bias"):
        value = state[f"head.classification_head.cls_logits.{kind}"]
        state[f"head.classification_head.cls_logits.{kind}"] = torch.arange(91.0).view(
            91, *[1] * (value.ndim - 1)).expand(91, *value.shape[1:])
    with pytest.raises(UserError, match=r"head\.cls\.weight is \(91, 32, 3, 3\) in the file"):
        fcos.load_weights(model, state)
    assert "head.cls.weight" in fcos.load_weights(model, state, finetune=True)["missing"]
    model.category_ids = [3, 17]
    fcos.load_weights(model, state)
    assert model.head.cls.bias.tolist() == [3, 17]
    whole = fcos.build("fcos_torchvision_R_50_FPN", 91, **SMALL)
    fcos.load_weights(whole, state)
    assert whole.head.cls.bias.tolist() == list(range(91)) and whole.classes is None
    old = {re.sub(r"(blocks\.\d)\.0\.", r"\1.", key): value for key, value in state.items()}
    assert len(old) == len(state) and not fcos.load_weights(whole, old)["ignored"]


# ---- ImageNet classifiers ----------------------------------------------------------------------


def caffe2(name, norms):
    part = name.split(".")[1:]
    tensor = {"conv": "w", "norm": f"bn_{norms.get(part[-1])}"}[part[-2]]
    if part[0] == "stem":
        return f"conv1_{tensor}" if tensor == "w" else f"res_conv1_{tensor}"
    branch = "branch1" if part[2] == "down" else "branch2" + "abc"[int(part[2][4:]) - 1]
    return f"{part[0]}_{part[1]}_{branch}_{tensor}"


AFFINE = dict(weight="s", bias="b")
GAMMA = dict(weight="gamma", bias="beta", running_mean="running_mean", running_var="running_var")
INVERSE = dict(weight="s", bias="b", running_mean="rm", running_var="riv")


def backbone_file(model, norms):
    """An ImageNet file of Caffe2 or Detectron2 as it is read: arrays, and a classifier."""
    state = {
        caffe2(name, norms): value.numpy() for name, value in model.state_dict().items()
        if name.startswith("backbone.") and (norms != AFFINE or ".running_" not in name)
        and ".offset." not in name
    }
    return state | {"fc1000_w": np.zeros((2, 2), np.float32), "conv1_b": np.zeros(64, np.float32),
                    "res2_0_branch2a_b": np.zeros(64, np.float32)}


def assert_same_backbone(model, expected):
    for name, value in expected.backbone.state_dict().items():
        if ".offset." not in name:
            assert torch.equal(model.backbone.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["fcos_R_50_FPN", "fcos_imprv_dcnv2_X_101_32x8d_FPN"])
@pytest.mark.parametrize("norms", [AFFINE, GAMMA, INVERSE], ids=["affine", "gamma", "inverse"])
def test_caffe_backbones(name, norms, tmp_path):
    model, other = randomise(small(name)), small(name)
    state = backbone_file(model, norms)
    if norms == AFFINE:
        for norm in (m for m in model.modules() if isinstance(m, fcos.FrozenBatchNorm)):
            norm.running_mean.zero_(), norm.running_var.fill_(1)
    content = {"blobs": state} if norms == AFFINE else {"model": state, "__author__": "MSRA"}
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump(content, file, protocol=2)
    report = fcos.load_weights(other, tmp_path / "R-50.pkl")
    assert report["family"] == ("caffe2" if norms == AFFINE else "detectron2")
    assert set(report["ignored"]) == {"fc1000_w", "conv1_b", "res2_0_branch2a_b"}
    assert_same_backbone(other, model)
    assert other.convention["bgr"] and other.convention["bn_eps"] == (norms != AFFINE) * 1e-5
    assert other.convention["mean"][0] == (102.9801 if norms == AFFINE else 103.53)
    narrow = norms != AFFINE and "32x8d" in name
    assert other.convention["std"] == ((57.375, 57.12, 58.395) if narrow else (1, 1, 1))
    with pytest.raises(UserError, match="is an ImageNet classifier.*and no detector"):
        fcos.load(tmp_path / "R-50.pkl", name)


@pytest.mark.parametrize("name, theirs", [
    ("fcos_torchvision_R_50_FPN", "resnet50"), ("fcos_imprv_R_18_FPN", "resnet18"),
    ("fcos_imprv_R_34_FPN", "resnet34"), ("fcos_bn_MNV2_FPN", "mobilenet_v2"),
])
def test_torchvision_backbones(name, theirs):
    torch.manual_seed(0)
    theirs, model = torchvision.models.get_model(theirs, weights=None).eval(), fcos.build(name)
    if "MNV2" not in name:
        randomise(theirs)
    report = fcos.load_weights(model, theirs.state_dict())
    assert report["convention"] == model.convention and not model.convention["bgr"]
    assert model.convention["mean"] == (123.675, 116.28, 103.53)
    assert model.convention["grid"] == ("corner" if "torchvision" in name else "centre")
    assert all(not key.startswith(("layer", "features.1.", "conv1", "bn1")) or
               key.endswith("num_batches_tracked") for key in report["ignored"])
    x = torch.rand(1, 3, 64, 64)
    model.eval()
    with torch.inference_mode():
        found = model.backbone(x)
        if "MNV2" in name:
            features = []
            for i, layer in enumerate(theirs.features):
                x = layer(x)
                features += [x] if i in (6, 13, 17) else []
        else:
            x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
            c3 = theirs.layer2(theirs.layer1(x))
            c4 = theirs.layer3(c3)
            features = c3, c4, theirs.layer4(c4)
    for ours, feature in zip(found, features):
        assert ours.shape == feature.shape
        assert torch.allclose(ours, feature, rtol=1e-3, atol=1e-3 * feature.abs().max().item())


def test_mobilenet_file_of_the_recipe():
    model, other = randomise(fcos.build("fcos_bn_MNV2_FPN")), fcos.build("fcos_bn_MNV2_FPN")
    state = {key.removeprefix("backbone.body."): value
             for key, value in renamed(model, official).items() if ".features." in key}
    extra = {"features.18.0.weight": torch.zeros(9, 320, 1, 1), "classifier.weight": torch.ones(2)}
    report = fcos.load_weights(other, state | extra)
    assert report["family"] == "mobilenet" and set(report["ignored"]) == extra.keys()
    assert_same_backbone(other, model)
    assert other.convention == fcos.CONVENTION  # as the official recipe feeds it


def test_torchvision_backbone_in_detectron2s_names():
    model, other = (fcos.build("fcos_torchvision_R_50_FPN", **SMALL) for _ in range(2))
    state = {detectron2(name): value.numpy()
             for name, value in randomise(model).state_dict().items() if "backbone." in name}
    state["stem.fc.weight"] = np.zeros((2, 2), np.float32)
    report = fcos.load_weights(other, {"model": state, "__author__": "torchvision"})
    assert report["ignored"] == ["stem.fc.weight"] and not other.convention["bgr"]
    assert_same_backbone(other, model)


def test_backbones_that_only_seem_to_fit():
    caffe = small("fcos_R_50_FPN")
    file = backbone_file(caffe, AFFINE)
    with pytest.raises(UserError, match="stride in the 1x1 convolution, the model's in the 3x3"):
        fcos.load_weights(fcos.build("fcos_torchvision_R_50_FPN", **SMALL), file)
    theirs = {resnet(name): value for name, value in caffe.state_dict().items()
              if name.startswith("backbone.")}
    with pytest.raises(UserError, match="stride in the 3x3 convolution, the model's in the 1x1"):
        fcos.load_weights(caffe, theirs)
    for norm, why in (("gn", "GroupNorm"), ("bn", "norms have no statistics")):
        with pytest.raises(UserError, match=why):
            fcos.load_weights(small("fcos_R_50_FPN", norm=norm), file)
    with pytest.raises(ValueError, match="'center': expected one of centre, corner"):
        small("fcos_R_50_FPN", grid="center")
    deeper = backbone_file(small("fcos_R_50_FPN", blocks=(1, 2, 1, 1)), AFFINE)
    with pytest.raises(UserError, match="keys are missing or unknown.*res3_1_branch2"):
        fcos.load_weights(caffe, deeper)
    del file["res4_0_branch2b_w"]
    with pytest.raises(UserError, match=r"1 keys .*backbone\.res4\.0\.conv2\.conv\.weight"):
        fcos.load_weights(caffe, file)


# ---- files that contradict the row, or are worse -----------------------------------------------


@pytest.mark.parametrize("file, row", [
    ("fcos_imprv_dcnv2_R_50_FPN", "fcos_imprv_R_50_FPN"),
    ("fcos_imprv_R_50_FPN", "fcos_imprv_dcnv2_R_50_FPN"),
    ("fcos_imprv_R_50_FPN", "fcos_torchvision_R_50_FPN"),
    ("fcos_imprv_X_101_32x8d_FPN", "fcos_imprv_X_101_64x4d_FPN"),
    ("fcos_imprv_R_50_FPN", "fcos_syncbn_MNV2_FPN"),
])
@pytest.mark.parametrize("rule", [official, adelaidet])
def test_a_file_that_contradicts_the_row_is_refused(file, row, rule):
    source, model = small(file), small(row) if "MNV2" not in row else fcos.build(row)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"does not fit {row}: "):
        fcos.load_weights(model, renamed(source, rule))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_and_missing_keys_are_named():
    model = small("fcos_imprv_R_50_FPN")
    state = renamed(model, adelaidet)
    with pytest.raises(UserError, match=r"1 keys are missing or unknown, among them iou_head\.w"):
        fcos.load_weights(model, state | {"iou_head.w": torch.ones(1)})
    twice = {"backbone.bottom_up.res2.0.down.conv.weight": torch.ones(256, 64, 1, 1)}
    with pytest.raises(UserError, match=r"res2\.0\.down\.conv\.weight"):
        fcos.load_weights(model, state | twice)
    per_level = {key.replace("tower.1.", "tower.1.0."): value for key, value in state.items()}
    with pytest.raises(UserError, match=r"tower\.1\.0\."):  # AdelaiDet's batch norm heads
        fcos.load_weights(model, per_level)
    with pytest.raises(UserError, match="of no family known here"):
        fcos.load_weights(model, {"encoder.weight": torch.ones(1)})


def test_loading_another_family_leaves_no_convention_behind():
    model = small("fcos_imprv_R_50_FPN")
    fcos.load_weights(model, renamed(model, mmdetection))
    fcos.load_weights(model, renamed(model, official))
    assert model.convention == fcos.CONVENTION | dict(inclusive=True)


class Malice:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pt"])
def test_no_program_is_run(tmp_path, suffix):
    path, marker = tmp_path / f"weights{suffix}", tmp_path / "owned"
    state = {"rpn.head.cls_logits.weight": Malice(str(marker))}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    with pytest.raises(UserError, match=r"refused, because it holds (posix|nt|os)\.mkdir"):
        fcos.load(path, "fcos_R_50_FPN")
    assert not marker.exists()


@pytest.mark.parametrize("value", [
    np.array([{}, []], dtype=object), np.array(["a", "b"]), "text", 3, None, [1, 2],
], ids=["objects", "strings", "text", "number", "none", "list"])
def test_values_that_are_no_numbers(tmp_path, value):
    model = small("fcos_R_50_FPN")
    state = backbone_file(model, AFFINE) | {"res2_0_branch2a_w": value}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(state))
    with pytest.raises(UserError, match=r"res2_0_branch2a_w is no tensor but "):
        fcos.load_weights(model, path)


# ---- the scripts -------------------------------------------------------------------------------


def test_raw_files_give_a_model_with_names(tmp_path):
    model = official_model("fcos_syncbn_c128_MNV2_FPN")
    path = tmp_path / "FCOS_syncbn_bs32_c128_MNV2_FPN_1x.pth"
    torch.save({"model": renamed(model, official)}, path)
    with pytest.raises(UserError, match="does not say which model it is; name one of fcos_R_50"):
        fcos.load(path)
    loaded = fcos.load(path, "fcos_syncbn_c128_MNV2_FPN")
    assert loaded.classes[:2] == ["person", "bicycle"] and loaded.category_ids[79] == 90
    assert len(loaded.classes) == len(set(loaded.classes)) == len(loaded.category_ids) == 80
    fcos.save(loaded, tmp_path / "model.pt")
    again = fcos.load(tmp_path / "model.pt")
    assert again.convention == loaded.convention and again.classes == loaded.classes
    assert_same_weights(again, model)

    five = fcos.build("fcos_syncbn_c128_MNV2_FPN", 5)
    torch.save(renamed(five, official), path)
    loaded = fcos.load(path, "fcos_syncbn_c128_MNV2_FPN")
    assert loaded.num_classes == 5 and loaded.classes is None


def test_classes_are_those_of_coco(shared):
    file = next((shared / "data/coco2017_tiny/annotations").glob("*val*.json"))
    categories = json.loads(file.read_text())["categories"]
    assert {c["id"]: c["name"] for c in categories} == fcos.COCO


def test_evaluate_draws_with_a_raw_file(tmp_path, capsys):
    path = tmp_path / "raw.pth"
    torch.save(renamed(official_model("fcos_syncbn_c128_MNV2_FPN"), official), path)
    fcos.Image.fromarray(synth_image(1, 240, 320)).save(tmp_path / "photo.png")
    evaluate.main(evaluate.parse_args([
        str(path), "--model", "fcos_syncbn_c128_MNV2_FPN", "--device", "cpu", "--images",
        str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--min-size", "240",
        "--score-threshold", "0.1",
    ]))
    drawn = json.loads((tmp_path / "out/detections.json").read_text())[0]["detections"]
    assert drawn and {row["class"] for row in drawn} <= set(fcos.COCO.values())
    assert "inclusive True" in capsys.readouterr().err


def test_weights_imagenet(tmp_path, monkeypatch):
    for model in ("fcos_imprv_R_50_FPN", "fcos_imprv_dcnv2_R_101_FPN"):
        with pytest.raises(UserError, match="stride in the 3x3.*the Caffe-style rows in the 1x1"):
            train.find_weights("imagenet", model)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(url, path, digest):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as error:
        train.find_weights("imagenet", "fcos_torchvision_R_50_FPN")
    message = str(error.value)
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in message
    assert str(tmp_path / "checkpoints") in message and "no network" in message
    assert "\n" not in message

    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: calls.append(args))
    fits = {"resnext101_32x8d-": "fcos_imprv_dcnv2_X_101_32x8d_FPN", "resnet18-":
            "fcos_imprv_R_18_FPN", "mobilenet_v2-": "fcos_bn_MNV2_FPN"}
    for start, model in fits.items():
        path = train.find_weights("imagenet", model)
        assert path.parent == tmp_path / "checkpoints" and path.name.startswith(start)
        url, target, digest = calls.pop()
        assert target == str(path) and f"-{digest}.pth" in url
        path.touch()
        assert train.find_weights("imagenet", model) == path and not calls
