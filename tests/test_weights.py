"""The rows of fcos.MODELS against the official facts, and weights in and out of a model: those of
everyone, ours, and files that are broken or hostile.

The names of other families are made here from ours, by rules of their own: none of fcos.py's. That
official weights land where they belong is also proved by the recorded outputs in test_fcos.py.
"""

import argparse
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import struct
import sys
import time
import urllib.error
import warnings
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import SHARED
from golden.synth_image import image as synth_image
from golden.weights_recipe import make_weights
from PIL import ImageOps
from torchvision.ops import FrozenBatchNorm2d

import evaluate
import fcos
import train
from fcos import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(blocks=(1, 1, 1, 1), channels=32)
THIN = dict(stem=8, channels=32)
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
FURTHER_ROWS = "fcos_torchvision_R_50_FPN", "shapes"
RECIPES = """
    fcos_R_50_FPN_1x fcos_R_101_FPN_2x fcos_X_101_32x8d_FPN_2x fcos_X_101_64x4d_FPN_2x
    fcos_imprv_R_50_FPN_1x fcos_imprv_R_101_FPN_1x fcos_imprv_R_101_FPN_2x
    fcos_imprv_X_101_32x8d_FPN_2x fcos_imprv_X_101_64x4d_FPN_2x fcos_imprv_dcnv2_R_50_FPN_1x
    fcos_imprv_dcnv2_R_101_FPN_1x fcos_imprv_dcnv2_R_101_FPN_2x fcos_imprv_dcnv2_X_101_32x8d_FPN_2x
    fcos_imprv_dcnv2_X_101_64x4d_FPN_2x fcos_bn_bs16_MNV2_FPN_1x fcos_syncbn_bs32_MNV2_FPN_1x
    fcos_syncbn_bs32_c128_MNV2_FPN_1x fcos_syncbn_bs32_c128_ms_MNV2_FPN_1x
    fcos_syncbn_bs64_c128_ms_MNV2_FPN_1x""".split()


def official_recipe(name):
    """Model, iterations, images a step and the choices of the short side, as the name tells."""
    many = "_ms_" in name or name.endswith("_2x")
    batch = re.search(r"_bs(\d+)", name)
    return (
        re.sub(r"_bs\d+|_ms|_[12]x$", "", name),
        90_000 * int(name[-2]),
        int(batch[1]) if batch else 16,
        list(range(640, 801)) if many else [800],
    )


DEEP = b")" + b"\x85" * 400_000  # a tuple in a tuple in ..., as a pickle
DEEP_KEY = DEEP + b"K\x01s"


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
    names = dict(
        cls="classification_head.cls_logits",
        box="regression_head.bbox_reg",
        ctr="regression_head.bbox_ctrness",
    )
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


AFFINE = dict(weight="s", bias="b")
GAMMA = dict(weight="gamma", bias="beta", running_mean="running_mean", running_var="running_var")
INVERSE = dict(weight="s", bias="b", running_mean="rm", running_var="riv")


def caffe2(name, norms):
    """... of a ResNet's tensor -> Caffe2's or, by what it calls norms, Detectron2's."""
    part = name.split(".")[1:]
    tensor = {"conv": "w", "norm": f"bn_{norms.get(part[-1])}"}[part[-2]]
    if part[0] == "stem":
        return f"conv1_{tensor}" if tensor == "w" else f"res_conv1_{tensor}"
    branch = "branch1" if part[2] == "down" else "branch2" + "abc"[int(part[2][4:]) - 1]
    return f"{part[0]}_{part[1]}_{branch}_{tensor}"


def renamed(model, rule):
    """The model's state dict in the names of another family."""
    state = model.state_dict()
    theirs = {rule(name, state): value for name, value in state.items()}
    assert len(theirs) == len(state)
    return theirs


def backbone_file(model, norms, **others):
    """An ImageNet file of Caffe2 or Detectron2 as it is read: arrays, and what else is in it."""
    return {
        caffe2(name, norms): value.numpy()
        for name, value in model.state_dict().items()
        if name.startswith("backbone.")
        and (norms != AFFINE or ".running_" not in name)
        and ".offset." not in name
    } | others


def randomise(model, seed=0):
    """Values that differ everywhere, in buffers too, with variances over 0."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.fill_(7)
    return model


def small(name, num_classes=80, **overrides):
    return fcos.build(name, num_classes, **{**SMALL, **overrides})


def thin(num_classes=3, name="fcos_imprv_R_50_FPN", **overrides):
    torch.manual_seed(0)
    return fcos.build(name, num_classes, **{**THIN, **overrides})


def assert_same_weights(model, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def assert_same_backbone(model, expected):
    for name, value in expected.backbone.state_dict().items():
        if ".offset." not in name:
            assert torch.equal(model.backbone.state_dict()[name], value), name


def assert_refused(call, *said):
    """One line without the words of a traceback, that says all of these."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 600
    for text in said:
        assert str(text) in message, message


# ---- the rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_row_has_the_official_parameters(name):
    with torch.device("meta"):
        model = fcos.build(name)
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    counts = (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trainable),
        len(model.state_dict()),
    )
    assert counts == ROWS[name]


@pytest.mark.parametrize("name", [*ROWS, *FURTHER_ROWS])
def test_keys_of_every_family_become_ours(name):
    with torch.device("meta"):
        model = fcos.build(name)
    state, pairs = model.state_dict(), []
    for rule in (official, adelaidet, vision, mmdetection):
        if rule is official or "MNV2" not in name:
            pairs += [
                (rule(key, state), key)
                for key in state
                if not (rule is vision and re.search("offset|scale", key))
            ]
    for key in [key for key in state if key.startswith("backbone.")]:
        if "MNV2" in name:
            pairs.append((official(key, state).removeprefix("backbone.body."), key))
        else:
            pairs += [(resnet(key), key), (detectron2(key), key)]
            if ".offset." not in key:
                pairs += [
                    (caffe2(key, norms), key)
                    for norms in (AFFINE, GAMMA, INVERSE)
                    if norms != AFFINE or ".running_" not in key
                ]
    assert len(pairs) >= len(state)
    for theirs, ours in pairs:
        assert (
            fcos.rename_key(theirs, fcos.BACKBONE_NAMES[type(model.backbone)] + fcos.NAMES) == ours
        ), theirs


def test_rows_have_the_official_keys(shared):
    golden = json.loads((shared / "golden/state_dicts.json").read_text())
    assert sorted(golden) == sorted(RECIPES)
    for recipe, rows in golden.items():
        with torch.device("meta"):
            model = fcos.build(official_recipe(recipe)[0])
        state = model.state_dict()
        learns = {name: p.requires_grad for name, p in model.named_parameters()}
        ours = {
            official(name, state): [list(value.shape), learns.get(name)]
            for name, value in state.items()
        }
        assert ours == {key: [shape, learns] for key, shape, _, learns in rows}, recipe


def test_further_rows_have_the_parameters_of_their_backbones():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in fcos.build(name).parameters()) for name in FURTHER_ROWS[:3]
        }
        theirs = torchvision.models.detection.fcos_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=80
        )
    batch_norms = 2 * sum(m.num_features for m in theirs.modules() if hasattr(m, "running_mean"))
    theirs = sum(p.numel() for p in theirs.parameters()) - batch_norms
    assert list(counts.values()) == [theirs, 1_223_530]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_the_official_one(recipe):
    settings = train.RECIPES[recipe]
    found = (settings["model"], settings["iters"], settings["batch_size"], settings["min_size"])
    assert found == official_recipe(recipe)
    assert settings["lr"] == 0.01 and settings["warmup"] == 500 and settings["max_size"] == 1333
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
    """Of the row with at most two blocks in a stage: others are the same again."""
    torch.manual_seed(0)
    blocks = fcos.resolve(fcos.MODELS[name]).get("blocks")
    less = {"blocks": tuple(min(depth, 2) for depth in blocks)} if blocks else {}
    model = fcos.build(name, num_classes=3, **less).train()
    torch.nn.init.ones_(model.head.box.bias)  # relu passes gradients on where distances are over 0
    images = torch.from_numpy(synth_image(3, 128, 128)).permute(2, 0, 1)[None]
    boxes = torch.tensor([[4.0, 4, 34, 44], [20, 10, 125, 120], [60, 30, 122, 80]])
    truth = {"boxes": boxes, "labels": torch.tensor([0, 1, 2])}
    targets = model.targets((128, 128), [truth])
    outputs = model(images, torch.tensor([[128, 128]]))
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
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


# ---- detectors of other families ---------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, family",
    [
        (official, "official"),
        (adelaidet, "adelaidet"),
        (mmdetection, "mmdetection"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "fcos_R_50_FPN",
        "fcos_imprv_dcnv2_R_50_FPN",
        "fcos_imprv_dcnv2_X_101_64x4d_FPN",
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_a_detector_is_used(rule, family, name, prefix, tmp_path):
    model, other = randomise(small(name, **THIN)), small(name, **THIN)
    state = {prefix + key: value for key, value in renamed(model, rule).items()}
    wrapped = (
        {"state_dict": state, "meta": {}}
        if family == "mmdetection"
        else {
            "model": state,
            "iteration": 9,
            "scheduler": {},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        }
    )
    path = tmp_path / "model_final.pth"
    torch.save(wrapped, path)
    for source in (state, wrapped, path, str(path)):
        report = fcos.load_weights(other, source)
        assert report["family"] == family
        assert not report["ignored"] and not report["missing"]
        assert sorted(report["loaded"]) == sorted(model.state_dict())
        assert_same_weights(other, model)
        other = randomise(other, 1)


def test_official_weights_bring_their_convention_and_no_other_is_left():
    model = small("fcos_imprv_R_50_FPN")
    model.set_convention(bgr=False, mean=(0.0, 0.0, 0.0), std=(9.0, 9.0, 9.0), bn_eps=1e-5)
    for before in (None, mmdetection):
        if before:
            fcos.load_weights(model, renamed(model, before))
        fcos.load_weights(model, renamed(model, official))
        assert model.convention == {
            "bgr": True,
            "mean": (102.9801, 115.9465, 122.7717),
            "std": (1.0, 1.0, 1.0),
            "bn_eps": 0.0,
            "inclusive": True,
            "grid": "centre",
            "score": "fcos",
        }
        mean = model.pixel_mean.flatten().tolist()
        assert mean == pytest.approx([102.9801, 115.9465, 122.7717])
        assert model.pixel_std.flatten().tolist() == [1, 1, 1]
        assert {m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}


def test_adelaidet_brings_its_pixels():
    model = small("fcos_imprv_R_50_FPN")
    state = renamed(model, adelaidet)
    report = fcos.load_weights(model, state)
    expected = dict(
        bgr=True,
        mean=(103.53, 116.28, 123.675),
        std=(1.0, 1.0, 1.0),
        bn_eps=1e-5,
        inclusive=False,
        grid="centre",
        score="fcos",
    )
    assert report["convention"] == model.convention == expected
    pixels = dict(
        pixel_mean=torch.tensor([123.5, 116, 103]).view(3, 1, 1),
        pixel_std=torch.tensor([58.0, 57, 56]).view(3, 1, 1),
    )
    report = fcos.load_weights(model, state | pixels)
    assert model.convention == expected | dict(bgr=False, mean=(123.5, 116, 103), std=(58, 57, 56))
    assert model.pixel_std.flatten().tolist() == [58, 57, 56]

    wide, narrow = (small(f"fcos_imprv_X_101_{kind}_FPN") for kind in ("64x4d", "32x8d"))
    fcos.load_weights(wide, renamed(wide, adelaidet))
    fcos.load_weights(narrow, renamed(narrow, adelaidet))
    assert wide.convention["std"] == (1, 1, 1)
    assert narrow.convention["std"] == (57.375, 57.12, 58.395)
    assert {m.eps for m in narrow.modules() if isinstance(m, FrozenBatchNorm2d)} == {1e-5}


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
    old = {
        key.replace("conv_cls", "fcos_cls")
        .replace("conv_reg", "fcos_reg")
        .replace("conv_centerness", "fcos_centerness"): value
        for key, value in theirs.items()
    }
    assert not fcos.load_weights(imprv, old)["ignored"]
    resnet34 = small("fcos_torchvision_R_50_FPN", block="basic", scales=True)
    fcos.load_weights(resnet34, renamed(resnet34, mmdetection))
    assert resnet34.convention["mean"] == (123.675, 116.28, 103.53)
    assert not resnet34.convention["bgr"]

    config = (
        "data_preprocessor=dict(\n    mean=[\n        102.9801,\n        115.9465,\n        "
        "122.7717,\n    ],\n    std=[1.0, 1.0, 1.0],\n    bgr_to_rgb=False,\n"
    )
    fcos.load_weights(imprv, {"state_dict": theirs, "meta": {"cfg": config, "epoch": 12}})
    assert imprv.convention["mean"] == (102.9801, 115.9465, 122.7717) and imprv.convention["bgr"]
    config = (
        "img_norm_cfg = dict(\n    mean=[123.675, 116.28, 103.53], "
        "std=[58.395, 57.12, 57.375], to_rgb=True)"
    )
    fcos.load_weights(imprv, {"state_dict": theirs, "meta": {"config": config}})
    assert imprv.convention["std"] == (58.395, 57.12, 57.375) and not imprv.convention["bgr"]


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
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value)
    assert fcos.load_weights(model, state)["ignored"] == []  # with frozen batch norm
    photos = [torch.from_numpy(synth_image(seed, 240, 320)).permute(2, 0, 1) for seed in (1, 2)]
    for path in sorted((SHARED / "data/coco2017_tiny/val2017").glob("*.jpg"))[:2]:
        photos.append(fcos.resize(fcos.read_image(path), (240, 320)))
    for photo in photos:
        with torch.inference_mode():
            expected = theirs([photo / 255])[0]
            found = model.detect(model(*fcos.pad_batch([photo])), [(240, 320)])[0]
        labels = torch.tensor(model.category_ids)[found["labels"]]
        close = (found["boxes"] - expected["boxes"][:, None]).abs().amax(2) <= 0.05
        close &= (found["scores"] - expected["scores"][:, None]).abs() <= 1e-4
        close &= labels == expected["labels"][:, None]
        assert 10 < len(labels) == len(expected["labels"])
        assert close.sum(0).eq(1).all() and close.sum(1).eq(1).all()
        assert (found["scores"] > 0.2).all()


def test_torchvision_grid():
    points = fcos.make_points((800, 1088), grid="corner")
    first = [0, *np.cumsum([rows * columns for rows, columns in fcos.level_sizes((800, 1088))])]
    steps = [points[i + 1, 0].item() for i in first[:5]]
    assert steps == [8, 16, 32, 64, 120] and (points[first[:5], :2] == 0).all()
    columns = fcos.level_sizes((800, 1088))
    steps = [points[i + columns[level][1], 1].item() for level, i in enumerate(first[:5])]
    assert steps == [8, 16, 32, 61, 114]
    model = small("fcos_torchvision_R_50_FPN")
    outputs = model(torch.zeros(1, 3, 128, 192, dtype=torch.uint8), [(128, 192)])
    assert torch.equal(outputs["points"], fcos.make_points((128, 192), grid="corner"))
    truth = {"boxes": torch.tensor([[0.0, 0, 16, 16]]), "labels": torch.tensor([1])}
    targets = model.targets((64, 64), [truth])
    assert targets["ltrb"][0][(targets["labels"] == 1)[0]].tolist() == [[8, 8, 8, 8]]


def test_torchvision_rows_follow_the_category_ids():
    model = small("fcos_torchvision_R_50_FPN", 2)
    state = renamed(randomise(model), vision)
    for kind in ("weight", "bias"):
        value = state[f"head.classification_head.cls_logits.{kind}"]
        state[f"head.classification_head.cls_logits.{kind}"] = (
            torch.arange(91.0).view(91, *[1] * (value.ndim - 1)).expand(91, *value.shape[1:])
        )
    with pytest.raises(UserError, match=r"head\.cls\.weight is \(80, 32, 3, 3\) in the file"):
        fcos.load_weights(model, state)
    prior = model.head.cls.bias[0].item()
    report = fcos.load_weights(model, state, ["unicorn", "cat"])
    assert model.head.cls.bias.tolist() == [prior, 17] and report["new_classes"] == ["unicorn"]
    whole = small("fcos_torchvision_R_50_FPN", 91)
    names = [f"c{n}" for n in range(90)] + ["cat"]
    assert fcos.load_weights(whole, state, names)["new_classes"] == names[:90]
    assert whole.head.cls.bias[90] == 17 and whole.classes is None
    fcos.load_weights(whole, state)
    assert whole.head.cls.bias.tolist() == list(range(91)) and whole.classes is None
    old = {re.sub(r"(blocks\.\d)\.0\.", r"\1.", key): value for key, value in state.items()}
    assert len(old) == len(state) and not fcos.load_weights(whole, old)["ignored"]


def test_raw_files_give_a_model_with_names_and_evaluate_draws_with_them(tmp_path, capsys):
    name, path = "fcos_syncbn_c128_MNV2_FPN", tmp_path / "raw.pth"
    with torch.device("meta"):
        shapes = renamed(fcos.build(name), official)
    weights = make_weights({key: value.shape for key, value in shapes.items()})
    official_weights = {key: torch.from_numpy(value) for key, value in weights.items()}
    torch.save({"model": official_weights}, path)
    assert_refused(lambda: fcos.load(path), "does not say which model it is", "fcos_R_50_FPN")
    assert_refused(lambda: fcos.load(path, "fat"), "'fat'", "fcos_R_50_FPN", "shapes")
    loaded = fcos.load(path, name)
    assert not loaded.training and loaded.num_classes == 80
    for key, value in renamed(loaded, official).items():
        assert torch.equal(value, official_weights[key]), key
    assert loaded.classes[:2] == ["person", "bicycle"] and loaded.category_ids[79] == 90
    assert len(loaded.classes) == len(set(loaded.classes)) == len(loaded.category_ids) == 80
    fcos.save(loaded, tmp_path / "model.pt")
    again = fcos.load(tmp_path / "model.pt")
    assert again.convention == loaded.convention and again.classes == loaded.classes
    assert_same_weights(again, loaded)

    fcos.Image.fromarray(synth_image(1, 240, 320)).save(tmp_path / "photo.png")
    evaluate.main(
        evaluate.parse_args(
            [
                str(path),
                "--model",
                name,
                "--device",
                "cpu",
                "--images",
                str(tmp_path / "photo.png"),
                "--out",
                str(tmp_path / "out"),
                "--min-size",
                "240",
                "--score-threshold",
                "0.1",
            ]
        )
    )
    drawn = json.loads((tmp_path / "out/detections.json").read_text())[0]["detections"]
    assert drawn and {row["class"] for row in drawn} <= set(fcos.COCO.values())
    assert "'inclusive': True" in capsys.readouterr().err

    torch.save(renamed(fcos.build(name, 5), official), path)
    loaded = fcos.load(path, name)
    assert loaded.num_classes == 5 and loaded.classes is None


def test_classes_are_those_of_coco(shared):
    file = next((shared / "data/coco2017_tiny/annotations").glob("*val*.json"))
    categories = json.loads(file.read_text())["categories"]
    assert {c["id"]: c["name"] for c in categories} == fcos.COCO


PREFIXES = ["module.", "_orig_mod.", "module.module.", "model.module._orig_mod.", "ema.", "net."]
WRAPPED = {  # how a program may store a state dict
    **{
        prefix: (lambda state, p=prefix: {p + k: v for k, v in state.items()})
        for prefix in PREFIXES
    },
    "student and teacher": lambda state: (
        {f"student.{k}": v for k, v in state.items()}
        | {f"teacher.{k}": v * 0 for k, v in state.items()}
    ),
    "average": lambda state: {"n_averaged": torch.tensor(3)} | WRAPPED["module."](state),
    "net": lambda state: {"net": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
    "ema": lambda state: {"model": None, "ema": {"state_dict": state}},
    "lightning": lambda state: {"state_dict": WRAPPED["model."](state), "epoch": 3},
    "model.": lambda state: {f"model.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("rule", [official, lambda name, names: name], ids=["official", "ours"])
def test_wrappers_of_every_kind_are_removed(how, rule):
    model, other = randomise(fcos.build("shapes", 3)), fcos.build("shapes", 3)
    report = fcos.load_weights(other, WRAPPED[how](renamed(model, rule)))
    assert_same_weights(other, model)
    assert not report["missing"] and all(
        key == "n_averaged" or key.startswith("teacher.") for key in report["ignored"]
    )


def test_an_unknown_prefix_is_named():
    model = thin()
    state = {f"my.wrapper.{k}": v for k, v in renamed(model, official).items()}
    assert_refused(lambda: fcos.load_weights(model, state), "'my.wrapper.'", "remove it")
    extra = WRAPPED["model."](renamed(model, official)) | {"criterion.weight": torch.ones(2)}
    assert_refused(lambda: fcos.load_weights(model, extra), "criterion.weight")


# ---- files that contradict the row -------------------------------------------------------------


@pytest.mark.parametrize(
    "file, row",
    [
        ("fcos_imprv_dcnv2_R_50_FPN", "fcos_imprv_R_50_FPN"),
        ("fcos_imprv_R_50_FPN", "fcos_imprv_dcnv2_R_50_FPN"),
        ("fcos_imprv_R_50_FPN", "fcos_torchvision_R_50_FPN"),
        ("fcos_imprv_X_101_32x8d_FPN", "fcos_imprv_X_101_64x4d_FPN"),
        ("fcos_imprv_R_50_FPN", "fcos_syncbn_MNV2_FPN"),
    ],
)
@pytest.mark.parametrize("rule", [official, adelaidet])
def test_a_file_that_contradicts_the_row_is_refused(file, row, rule):
    source, model = small(file), small(row) if "MNV2" not in row else fcos.build(row)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"does not fit {row}: "):
        fcos.load_weights(model, renamed(source, rule))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_and_unknown_keys_are_named_and_nothing_is_changed():
    model = thin()
    state = renamed(model, adelaidet)
    before, convention = {k: v.clone() for k, v in model.state_dict().items()}, model.convention

    def refused(state, *said):
        assert_refused(lambda: fcos.load_weights(model, state), *said)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())
        assert model.convention == convention

    less = {key: value for key, value in state.items() if not key.endswith("ctrness.bias")}
    refused(
        less | {"iou_head.w": torch.ones(1)},
        "fcos_imprv_R_50_FPN",
        "2 keys are missing or unknown, among them",
        "head.ctr.bias",
        "iou_head.w",
    )
    twice = {"backbone.bottom_up.res2.0.down.conv.weight": torch.ones(32, 8, 1, 1)}
    refused(state | twice, "1 keys", "res2.0.down.conv.weight")
    refused(
        {key.replace("tower.1.", "tower.1.0."): value for key, value in state.items()}, "tower.1.0."
    )  # AdelaiDet's batch norm heads
    shape = {"proposal_generator.fcos_head.bbox_pred.weight": torch.zeros(5, 32, 3, 3)}
    refused(state | shape, "head.box.weight", "(5, 32, 3, 3)", "(4, 32, 3, 3)")
    refused({"encoder.weight": torch.ones(1)}, "of no family known here")


def test_wrong_depth_is_an_error(tmp_path):
    deep, shallow = thin(name="fcos_imprv_R_101_FPN"), thin()
    load = fcos.load_weights
    assert_refused(lambda: load(shallow, renamed(deep, official)), "layer3.6", "R_50")
    assert_refused(lambda: load(deep, renamed(shallow, official)), "res4.6", "R_101")
    for name, model in (("R-101", deep), ("R-50", shallow)):
        (tmp_path / f"{name}.pkl").write_bytes(python2_pickle(backbone_file(model, AFFINE)))
    assert_refused(lambda: load(deep, tmp_path / "R-50.pkl"), "R-50.pkl", "res4.6")
    assert_refused(lambda: load(shallow, tmp_path / "R-101.pkl"), "R-101.pkl", "res4_6")


@pytest.mark.parametrize("rule", [official, lambda name, names: name], ids=["official", "ours"])
def test_classes_of_the_same_name_keep_their_rows(rule):
    detector, model = randomise(thin(80)), thin()
    state = renamed(detector, rule)
    box = rule("head.box.weight", model.state_dict())
    assert_refused(lambda: fcos.load_weights(model, state), "head.cls", "(80,", "(3,", "classes")
    before = model.head.cls.weight.clone(), model.head.cls.bias.clone()
    report = fcos.load_weights(model, state, ["zebra", "cell", "person"])
    assert report["new_classes"] == ["cell"] and not report["missing"]
    rows = [list(fcos.COCO.values()).index(name) for name in ("zebra", "person")]
    for start, now, theirs in zip(
        before,
        (model.head.cls.weight, model.head.cls.bias),
        (detector.head.cls.weight, detector.head.cls.bias),
    ):
        assert now[[0, 2]].equal(theirs[rows]) and now[1].equal(start[1])
    assert model.head.box.weight.equal(state[box])
    assert_refused(lambda: fcos.load_weights(model, state, ["zebra"]), "1 classes for 3 rows")
    turned, names = thin(80), list(fcos.COCO.values())[::-1]
    fcos.load_weights(turned, state, names)
    assert turned.head.cls.bias.equal(detector.head.cls.bias.flip(0)) and turned.classes is None
    state[box] = torch.zeros(5, 32, 3, 3)  # only classes may differ
    assert_refused(lambda: fcos.load_weights(model, state, ["a", "b", "c"]), "head.box.weight")

    fits = randomise(thin(), 1)  # a file of as many classes that names none: taken as they are
    assert not fcos.load_weights(model, renamed(fits, rule), ["a", "b", "c"])["new_classes"]
    assert_same_weights(model, fits)


@pytest.mark.parametrize(
    "name, value",
    [
        ("head.cls.bias", torch.zeros(())),
        ("head.cls.bias", torch.zeros(4)),
        ("head.cls.weight", torch.zeros(3)),
        ("head.cls.weight", torch.zeros(1).expand(10**9, 32, 3, 3)),
        ("head.cls.weight", torch.zeros(1).expand(3, 32, 3, 10**9)),
    ],
    ids=str,
)
def test_a_classifier_of_odd_shapes_is_refused(name, value):
    model, state = thin(), thin().state_dict() | {name: value}
    assert_refused(lambda: fcos.load_weights(model, state), name, tuple(value.shape))
    assert_refused(lambda: fcos.load_weights(model, state, ["a", "b", "c"]))


def test_our_own_checkpoints_name_the_classes_of_their_rows(tmp_path):
    cells = randomise(thin())
    cells.classes, cells.category_ids = ["red", "white", "platelet"], [1, 2, 3]
    fcos.save(cells, tmp_path / "cells.pt")
    model = thin(2)
    report = fcos.load_weights(model, tmp_path / "cells.pt", ["platelet", "red"])
    assert not report["new_classes"] and model.head.cls.bias.equal(cells.head.cls.bias[[2, 0]])
    other = thin(3)  # as many classes, none of a known name
    prior = other.head.cls.bias.clone()
    report = fcos.load_weights(other, tmp_path / "cells.pt", ["a", "b", "c"])
    assert report["new_classes"] == ["a", "b", "c"] and other.head.cls.bias.equal(prior)


# ---- AdelaiDet's other models and torchvision's own file -----------------------------------------


def test_the_real_time_model_has_three_levels_and_frozen_norms_where_it_is_frozen():
    model = fcos.build("fcos_rt_R_50_FPN", 3)
    counts = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
    assert len(counts) == 42 and not any(key.startswith("backbone.res2") for key in counts)
    model.train()
    mean = model.backbone.res2[0].conv1.norm.running_mean.clone()
    outputs = model(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    assert outputs["levels"] == [96, 24, 6] and outputs["points"][:, 4].unique().tolist() == [
        64,
        128,
        math.inf,
    ]
    assert model.backbone.res2[0].conv1.norm.running_mean.equal(mean)
    assert not hasattr(model.fpn, "p6") and len(model.head.scale) == 3


def test_adelaidet_files_of_the_further_rows_load():
    for name in ("fcos_imprv_iou_R_50_FPN", "fcos_rt_R_50_FPN"):
        source, model = randomise(fcos.build(name, 2)), fcos.build(name, 2)
        report = fcos.load_weights(model, renamed(source, adelaidet))
        assert report["family"] == "adelaidet" and not report["missing"] + report["ignored"]
        assert_same_weights(model, source)
    assert model.convention["bn_eps"] == 1e-5


def test_coco_is_torchvisions_file_in_its_hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    calls = []

    def offline(url, path, digest):
        calls.append((url, path, digest))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert_refused(lambda: fcos.load("coco"), "download https://", "checkpoints", "no network")
    [(url, path, digest)] = calls
    assert Path(path).parent == tmp_path / "checkpoints" and digest in url

    state = renamed(randomise(fcos.build("fcos_torchvision_R_50_FPN", 91)), vision)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, digest: torch.save(state, path)
    )
    model = fcos.load("coco")
    assert model.num_classes == 80 and model.classes[0] == "person" and not model.training
    key = "head.classification_head.cls_logits.bias"
    assert model.head.cls.bias.equal(state[key][list(fcos.COCO)])
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    fcos.load("coco")  # is there now
    assert len(calls) == 1


# ---- ImageNet classifiers ----------------------------------------------------------------------


def python2_pickle(arrays):
    """A dict of float32 arrays as Python 2 and its NumPy pickled it: byte strings everywhere."""
    string = lambda x: b"T" + struct.pack("<i", len(x)) + x  # noqa: E731
    number = lambda x: b"J" + struct.pack("<i", x)  # noqa: E731
    dtype = (
        b"cnumpy\ndtype\n(" + string(b"f4") + number(0) + number(1) + b"tR"
        b"(" + number(3) + string(b"<") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    )
    items = b""
    for name, array in arrays.items():
        array = np.ascontiguousarray(array, np.float32)
        items += string(name.encode()) + (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n("
            + number(0)
            + b"t"
            + string(b"b")
            + b"tR("
            + number(1)
            + b"("
            + b"".join(map(number, array.shape))
            + b"t"
            + dtype
            + b"I00\n"
            + string(array.tobytes())
            + b"tb"
        )
    return b"\x80\x02}(" + items + b"u."


@pytest.mark.parametrize("wrapped", [False, True])
def test_caffe2_file_fills_the_backbone(wrapped, tmp_path):
    """R-50.pkl and all that such files hold beside the network: it is ignored, and reported."""
    blobs, path = backbone_file(randomise(thin()), AFFINE), tmp_path / "R-50.pkl"
    assert len(blobs) == 53 + 2 * 53
    extra = {f"{name}_momentum": value for name, value in blobs.items()}
    extra |= {
        re.sub("_w$", "_b", name): np.zeros(len(value))
        for name, value in blobs.items()
        if name.endswith("_w")
    }  # biases of convolutions
    classifiers = ("fc1000_w", "fc1000_b", "pred_w", "pred_b", "lr")
    extra |= {name: np.ones((4, 1)) for name in classifiers}
    extra |= {f"{name}_momentum": np.ones((4, 1)) for name in classifiers}
    assert {"conv1_b", "res3_0_branch1_b", "res5_2_branch2c_b", "res_conv1_bn_s_momentum"} < set(
        extra
    )
    if wrapped:  # as Detectron's own detectors, and as Python 3 pickles
        extra["weight_order"] = "conv1_w res2_0_branch2a_w"
        content = {"blobs": extra | blobs, "cfg": "MODEL: retinanet"}
        path.write_bytes(pickle.dumps(content))
    else:
        extra["weight_order"] = np.arange(3.0)
        path.write_bytes(python2_pickle(extra | blobs))
    model = thin()
    head = model.head.cls_tower[0].conv.weight.clone()
    report = fcos.load_weights(model, path)
    assert report["family"] == "caffe2"
    assert set(report["ignored"]) == set(extra)
    assert len(report["loaded"]) == 53 + 4 * 53  # with the mean and variance of an affine norm
    state = model.backbone.state_dict()
    for name, blob in {
        "stem.conv.weight": "conv1_w",
        "stem.norm.bias": "res_conv1_bn_b",
        "res2.0.conv1.conv.weight": "res2_0_branch2a_w",
        "res2.0.down.conv.weight": "res2_0_branch1_w",
        "res3.0.down.norm.weight": "res3_0_branch1_bn_s",
        "res4.5.conv2.norm.bias": "res4_5_branch2b_bn_b",
        "res5.2.conv3.conv.weight": "res5_2_branch2c_w",
        "res5.2.conv3.norm.weight": "res5_2_branch2c_bn_s",
    }.items():
        assert state[name].equal(torch.from_numpy(blobs[blob])), name
    missing = {name.split(".")[0] for name in report["missing"]}
    assert missing == {"fpn", "head"}
    assert model.head.cls_tower[0].conv.weight.equal(head)
    for name, value in model.backbone.named_buffers():
        if "running" in name:
            assert value.eq("var" in name).all(), name
    assert model.convention["bgr"] and model.convention["std"] == (1.0, 1.0, 1.0)
    assert model.convention["bn_eps"] == 0 and not model.convention["inclusive"]


@pytest.mark.parametrize("name", ["fcos_R_50_FPN", "fcos_imprv_dcnv2_X_101_32x8d_FPN"])
@pytest.mark.parametrize("norms", [AFFINE, GAMMA, INVERSE], ids=["affine", "gamma", "inverse"])
def test_caffe_backbones(name, norms, tmp_path):
    model, other = randomise(small(name)), small(name)
    extra = {"fc1000_w": np.zeros((2, 2)), "conv1_b": np.zeros(64), "res2_0_branch2a_b": np.ones(1)}
    state = backbone_file(model, norms, **extra)
    if norms == AFFINE:
        for norm in (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
            norm.running_mean.zero_(), norm.running_var.fill_(1)
    content = {"blobs": state} if norms == AFFINE else {"model": state, "__author__": "MSRA"}
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump(content, file, protocol=2)
    report = fcos.load_weights(other, tmp_path / "R-50.pkl")
    assert report["family"] == ("caffe2" if norms == AFFINE else "detectron2")
    assert set(report["ignored"]) == set(extra)
    assert_same_backbone(other, model)
    assert other.convention["bgr"] and other.convention["bn_eps"] == (norms != AFFINE) * 1e-5
    assert other.convention["mean"][0] == (102.9801 if norms == AFFINE else 103.53)
    narrow = norms != AFFINE and "32x8d" in name
    assert other.convention["std"] == ((57.375, 57.12, 58.395) if narrow else (1, 1, 1))
    with pytest.raises(UserError, match="is an ImageNet classifier.*and no detector"):
        fcos.load(tmp_path / "R-50.pkl", name)


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("fcos_torchvision_R_50_FPN", "resnet50"),
        ("fcos_torchvision_R_50_FPN", "resnet18"),
        ("fcos_torchvision_R_50_FPN", "resnet34"),
        ("fcos_bn_MNV2_FPN", "mobilenet_v2"),
    ],
)
def test_torchvision_backbones(name, theirs):
    torch.manual_seed(0)
    smaller = {
        "resnet18": dict(block="basic", blocks=(2, 2, 2, 2)),
        "resnet34": dict(block="basic", blocks=(3, 4, 6, 3)),
    }.get(theirs, {})
    theirs = torchvision.models.get_model(theirs, weights=None).eval()
    model = fcos.build(name, **smaller)
    if "MNV2" not in name:
        randomise(theirs)
    report = fcos.load_weights(model, theirs.state_dict())
    assert report["convention"] == model.convention and not model.convention["bgr"]
    assert model.convention["mean"] == (123.675, 116.28, 103.53)
    assert model.convention["grid"] == ("corner" if "torchvision" in name else "centre")
    assert all(
        not key.startswith(("layer", "features.1.", "conv1", "bn1"))
        or key.endswith("num_batches_tracked")
        for key in report["ignored"]
    )
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
    for ours, feature in zip(found[-3:], features):
        assert ours.shape == feature.shape
        assert torch.allclose(ours, feature, rtol=1e-3, atol=1e-3 * feature.abs().max().item())


def test_mobilenet_file_of_the_recipe():
    model, other = randomise(fcos.build("fcos_bn_MNV2_FPN")), fcos.build("fcos_bn_MNV2_FPN")
    state = {
        key.removeprefix("backbone.body."): value
        for key, value in renamed(model, official).items()
        if ".features." in key
    }
    extra = {"features.18.0.weight": torch.zeros(9, 320, 1, 1), "classifier.weight": torch.ones(2)}
    report = fcos.load_weights(other, state | extra)
    assert report["family"] == "mobilenet" and set(report["ignored"]) == extra.keys()
    assert_same_backbone(other, model)
    assert other.convention == fcos.CONVENTION  # as the official recipe feeds it


def test_torchvision_backbone_in_detectron2s_names():
    model, other = (small("fcos_torchvision_R_50_FPN") for _ in range(2))
    state = {
        detectron2(name): value.numpy()
        for name, value in randomise(model).state_dict().items()
        if "backbone." in name
    }
    state["stem.fc.weight"] = np.zeros((2, 2), np.float32)
    report = fcos.load_weights(other, {"model": state, "__author__": "torchvision"})
    assert report["ignored"] == ["stem.fc.weight"] and not other.convention["bgr"]
    assert_same_backbone(other, model)


def test_backbones_that_only_seem_to_fit():
    caffe = small("fcos_R_50_FPN")
    file = backbone_file(caffe, AFFINE)
    with pytest.raises(UserError, match="stride_in_1x1 is True in the file, False in the model"):
        fcos.load_weights(small("fcos_torchvision_R_50_FPN"), file)
    theirs = {
        resnet(name): value
        for name, value in caffe.state_dict().items()
        if name.startswith("backbone.")
    }
    with pytest.raises(UserError, match="stride_in_1x1 is False in the file, True in the model"):
        fcos.load_weights(caffe, theirs)
    for norm in ("gn", "bn"):
        with pytest.raises(UserError, match=f"norm is frozen in the file, {norm} in the model"):
            fcos.load_weights(small("fcos_R_50_FPN", norm=norm), file)
    assert_refused(lambda: fcos.load_weights(small("fcos_R_50_FPN", stem=32), file), "(64,", "(32,")
    deeper = backbone_file(small("fcos_R_50_FPN", blocks=(1, 2, 1, 1)), AFFINE)
    with pytest.raises(UserError, match="keys are missing or unknown.*res3_1_branch2"):
        fcos.load_weights(caffe, deeper)
    del file["res4_0_branch2b_w"]
    with pytest.raises(UserError, match=r"1 keys .*backbone\.res4\.0\.conv2\.conv\.weight"):
        fcos.load_weights(caffe, file)


class Steps(torch.nn.Module):
    """A backbone that is added with its row: what FCOS asks of a class, and what weights do."""

    strides = (8, 16, 32)
    convention = fcos.CAFFE

    def __init__(self, width=8, norm="gn"):
        super().__init__()
        self.channels = [width, width, width]
        self.stem = fcos.ConvNorm(3, width, 3, 8, norm=norm)
        self.step = fcos.ConvNorm(width, width, 3, 2, norm=norm)
        self.last = torch.nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x):
        c3 = self.stem(x)
        c4 = self.step(c3)
        return c3, c4, self.last(c4)

    def freeze(self, stages):
        for stage in [self.stem, self.step, self.last][:stages]:
            stage.requires_grad_(False)

    def initialize(self):
        fcos.initialize(self, torch.nn.init.ones_)


def test_a_backbone_and_a_row_can_be_added_with_their_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(fcos.BACKBONES, "steps", Steps)
    monkeypatch.setitem(fcos.MODELS, "own", dict(backbone="steps", width=4, frozen_stages=2))
    monkeypatch.setitem(fcos.BACKBONE_NAMES, Steps, [(r"^trunk\.", "backbone.")])
    convention = dict(bgr=False, mean=(1.0, 2.0, 3.0))
    monkeypatch.setitem(fcos.CLASSIFIERS, "own", (r"trunk\.stem\.conv\.weight", convention))
    model = fcos.build("own", 2, channels=32)
    assert (
        model.keywords.items()
        >= dict(backbone="steps", width=4, norm="gn", frozen_stages=2, channels=32).items()
    )
    assert all(p.eq(1).all() for p in model.backbone.parameters() if p.ndim == 4)
    learns = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert learns == {"last.weight", "last.bias"}
    with pytest.raises(ValueError, match="'blocks': expected one of.*width, norm"):
        fcos.build("own", blocks=(1,))

    other = randomise(fcos.build("own", 2, channels=32))
    state = {f"trunk.{name}": value for name, value in other.backbone.state_dict().items()}
    report = fcos.load_weights(model, state | {"classifier.weight": torch.ones(2)})
    assert report["family"] == "own" and report["ignored"] == ["classifier.weight"]
    assert {name.split(".")[0] for name in report["missing"]} == {"fpn", "head"}
    assert_same_backbone(model, other)
    assert model.convention == fcos.CONVENTION | dict(bgr=False, mean=(1.0, 2.0, 3.0))
    del state["trunk.step.conv.weight"]
    assert_refused(lambda: fcos.load_weights(model, state), "backbone.step.conv.weight")

    fcos.save(model, tmp_path / "model.pt")
    monkeypatch.delitem(fcos.MODELS, "own")  # the class is needed, the row is not
    assert_same_weights(fcos.load(tmp_path / "model.pt"), model)
    monkeypatch.delitem(fcos.BACKBONES, "steps")
    assert_refused(lambda: fcos.load(tmp_path / "model.pt"), "model.pt", "steps", "resnet")


def test_weights_imagenet(tmp_path, monkeypatch):
    def find(name):
        return train.find_weights("imagenet", fcos.resolve(fcos.MODELS[name]))

    for name in ("fcos_imprv_R_50_FPN", "fcos_imprv_dcnv2_R_101_FPN"):
        with pytest.raises(UserError, match="stride in the 3x3.*the Caffe-style rows in the 1x1"):
            find(name)
    assert_refused(lambda: fcos.hub_file("imagenet", "resnet5"), "'resnet5'", "torchvision has no")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(url, path, digest):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert_refused(
        lambda: find("fcos_torchvision_R_50_FPN"),
        tmp_path / "checkpoints",
        "no network",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    )
    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: calls.append(args))
    fits = {
        "resnext101_32x8d-": "fcos_imprv_dcnv2_X_101_32x8d_FPN",
        "mobilenet_v2-": "fcos_bn_MNV2_FPN",
    }
    for start, name in fits.items():
        path = find(name)
        assert path.parent == tmp_path / "checkpoints" and path.name.startswith(start)
        url, target, digest = calls.pop()
        assert target == str(path) and f"-{digest}.pth" in url
        path.touch()
        assert find(name) == path and not calls


# ---- our own checkpoints -----------------------------------------------------------------------


def found_in(model):
    torch.manual_seed(2)
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 60]])
    with torch.inference_mode():
        outputs = model.eval()(images, sizes)
        detections = model.decode(outputs, sizes)
    return [outputs[part] for part in ("cls", "ltrb", "ctr", "points")] + list(detections.values())


def assert_finds_the_same(model, expected):
    assert all(ours.equal(theirs) for ours, theirs in zip(found_in(model), expected))


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("shapes", {}),
        ("fcos_R_50_FPN", THIN),
        ("shapes", dict(quality="iou", levels=[3, 4, 5], ranges=[64, 128])),
        ("fcos_imprv_X_101_32x8d_FPN", {"channels": 32, "stem": 8, "groups": 4, "width": 2}),
        ("fcos_imprv_R_50_FPN", {**THIN, "norm": "bn", "frozen_stages": 0, "radius": 2.5}),
    ],
)
def test_saved_model_comes_back_whole_whatever_becomes_of_its_row(
    name, overrides, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    model = fcos.build(name, 3, **overrides)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    model.set_convention(
        inclusive=True, bgr=False, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), bn_eps=1e-3
    )
    model.classes, model.category_ids = ["cat", "dög", "tree"], [1, 7, 90]
    model.test_size = (320, 533)
    model.candidate_threshold = 0.0
    expected = found_in(model)
    path = tmp_path / "model.pt"
    fcos.save(model.train(), path)
    assert fcos.load(path, name).name == name
    content = torch.load(path, weights_only=True)
    assert "overrides" not in content and all(type(key) is str for key in content)
    assert content["keywords"] == model.keywords == fcos.resolve(content["keywords"])

    other = dict(backbone="mobilenet", norm="gn", radius=9.0, box_loss="iou", channels=16)
    for change in (
        lambda: None,
        lambda: monkeypatch.setitem(fcos.MODELS, name, other),
        lambda: monkeypatch.delitem(fcos.MODELS, name),
    ):
        change()
        loaded = fcos.load(path)
        assert not loaded.training
        for attribute in (
            "name",
            "num_classes",
            "keywords",
            "classes",
            "category_ids",
            "test_size",
            "convention",
            "radius",
            "loss",
            "strides",
            "ranges",
        ):
            assert getattr(loaded, attribute) == getattr(model, attribute), attribute
        assert_finds_the_same(loaded, expected)
        assert [p.requires_grad for p in loaded.parameters()] == [
            p.requires_grad for p in model.parameters()
        ]


def test_own_weights_fill_a_model_and_bring_their_convention(tmp_path):
    model = fcos.build("shapes", 2)
    model.set_convention(inclusive=True)
    fcos.save(model, tmp_path / "model.pt")
    content = {"settings": {}, "step": 7, "model": fcos.checkpoint(model), "optimizer": {}}
    torch.save(content, tmp_path / "last.pt")  # the trainer's
    for source in (tmp_path / "model.pt", fcos.checkpoint(model), tmp_path / "last.pt"):
        other = fcos.build("shapes", 2)
        report = fcos.load_weights(other, source)
        assert report["family"] == "fcos" and not report["missing"] + report["ignored"]
        assert other.convention == model.convention
        assert_same_weights(other, model)
    assert fcos.load(tmp_path / "last.pt").name == "shapes"
    other = fcos.build("shapes", 2)
    assert not fcos.load_weights(other, model.state_dict())["missing"]  # without what is around it
    assert_refused(
        lambda: fcos.load(tmp_path / "model.pt", "fcos_R_50_FPN"),
        "model.pt",
        "shapes",
        "fcos_R_50_FPN",
    )


@pytest.mark.parametrize(
    "keyword, value",
    [
        ("activation", "exp"),
        ("ctr_on", "cls"),
        ("quality", "iou"),
        ("stride_in_1x1", False),
    ],
)
def test_own_weights_of_another_meaning_are_refused(keyword, value):
    there = fcos.build("shapes", 2, **{keyword: value})
    here = fcos.build("shapes", 2)
    assert_refused(lambda: fcos.load_weights(here, fcos.checkpoint(there)), keyword, value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_save_leaves_the_old_file_when_it_fails(error, tmp_path, monkeypatch):
    model = fcos.build("shapes", 2)
    fcos.save(model, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def fail(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        fcos.save(model, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_wrapped_models_are_saved_as_they_are(tmp_path):
    model = randomise(fcos.build("shapes", 2))
    compiled = fcos.build("shapes", 2)
    compiled.load_state_dict(model.state_dict())
    compiled.head = torch.compile(compiled.head)
    average = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model), compiled, average):
        fcos.save(wrapped, tmp_path / "model.pt")
        assert_same_weights(fcos.load(tmp_path / "model.pt"), model)
    for other in (torch.nn.Linear(1, 1), torch.nn.DataParallel(torch.nn.Linear(1, 1)), None):
        assert_refused(lambda other=other: fcos.save(other, tmp_path / "model.pt"), "fcos.build")


def test_a_file_appears_whole_in_any_folder_under_any_name(tmp_path):
    for name in ("x" * 254, "x" * 250 + ".pt", "new/folder/model.pt", "dög \n.pt"):
        with fcos.atomic_write(tmp_path / name, "w") as file:
            file.write("whole")
        assert (tmp_path / name).read_text() == "whole"
    target = tmp_path / "target"
    target.write_text("mine")
    for link in ("link", "dangling"):
        (tmp_path / link).symlink_to(target if link == "link" else tmp_path / "nowhere")
        with fcos.atomic_write(tmp_path / link, "w") as file:
            file.write("new")
        assert not (tmp_path / link).is_symlink() and (tmp_path / link).read_text() == "new"
    assert target.read_text() == "mine"
    with (
        pytest.raises(UserError, match="cannot be written"),
        fcos.atomic_write(target / "x") as file,
    ):
        pass
    with fcos.atomic_write(target, "w") as first, fcos.atomic_write(target, "w") as second:
        first.write("first")
        second.write("second")
    assert target.read_text() == "first" and not list(tmp_path.rglob("*.tmp"))


def test_leftovers_of_killed_processes_are_removed_and_no_others(tmp_path):
    def write_and(end):
        with fcos.atomic_write(tmp_path / "model.pt"):
            end()

    children = []
    for end in (lambda: os._exit(9), signal.pause):  # one dies, one goes on writing
        children.append(os.fork())
        if not children[-1]:
            write_and(end)
    os.waitpid(children[0], 0)
    while len(list(tmp_path.glob(".fcos-*.tmp"))) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    (tmp_path / "notes.tmp").touch()
    with fcos.atomic_write(tmp_path / "model.pt", "w") as file:
        fcos.remove_leftovers(tmp_path)
        assert Path(file.name).exists()
        assert len(list(tmp_path.glob(".fcos-*.tmp"))) == 2
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
    fcos.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", "model.pt"}
    fcos.remove_leftovers(tmp_path / "nowhere")


def test_safetensors_hold_whole_models_and_plain_weights(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model = randomise(fcos.build("shapes", 2, levels=(2, 3, 4, 5), ranges=(32, 64, 128)))
    model.set_convention(inclusive=True, mean=(1.0, 2.0, 3.0))
    model.classes, model.category_ids, model.nms_threshold = ["a", "dög"], [1, 7], 0.5
    path = tmp_path / "model.safetensors"
    fcos.save(model, path)
    loaded = fcos.load(path)
    assert_same_weights(loaded, model)
    for attribute in ("name", "keywords", "classes", "category_ids", "convention", "loss"):
        assert getattr(loaded, attribute) == getattr(model, attribute), attribute
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["fcos"]

    for rule in (official, adelaidet, mmdetection):  # as they come from elsewhere
        source, other = randomise(thin()), thin()
        state = {key: value.contiguous() for key, value in renamed(source, rule).items()}
        safetensors.save_file(state, path)
        assert not fcos.load_weights(other, path)["ignored"]
        assert_same_weights(other, source)
    assert_refused(lambda: fcos.load(path), path, "does not say which model")
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"\xff" * 99):
        path.write_bytes(damaged)
        assert_refused(lambda: fcos.load(path), path, "damaged")
    for stored in ("[", "[]", '{"keywords": 3}', "[" * 10**5, '{"keywords": {"blocks": [1]}}'):
        safetensors.save_file(state | {"head.cls.weight": torch.ones(2, 1)}, path, {"fcos": stored})
        assert_refused(lambda: fcos.load(path), path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: fcos.load(path), lambda: fcos.save(model, tmp_path / "m.safetensors")):
        assert_refused(call, "pip install safetensors")
    assert not (tmp_path / "m.safetensors").exists()


# ---- keywords, to the last element ---------------------------------------------------------------

NAN, HUGE = math.nan, "x" * 10**6
WRONG = {  # keyword: values that are refused, before anything is built
    "test_size": [(64, 32), ("a", "b"), (64.5, 99.5), (64,), (64, 65, 66), 64, (0, 64), None, "ab"],
    "blocks": [(0, 0, 0, 0), (1, 1, 1), (1, 1, 1, 1, 1), (1.0, 1, 1, 1), (10**6, 1, 1, 1), "1111"],
    "ranges": [(4, 3, 2, 1), (4, 4, 5, 6), (1, 2, 3), (NAN, 1, 2, 3), ("1", "2", "3", "4"), 5],
    "levels": [(), (3, 5, 6), (3.0, 4.0), ("3",), (7, 6, 5), 3, (1, 2, 3), (9, 10, 11)],
    "channels": [16, 48, 0, -32, 64.0, "64", True, None, 10**6],
    "dcn": [(1,), ("a",), ([],), (2.0,), 3, None],
    "radius": [-1, NAN, math.inf, "1.5", True, None],
    "stem": [0, 16.0, "16", 10**9],
    "width": [0, 1.5, "4"],
    "groups": [0, "1", 10**9],
    "frozen_stages": [-1, 6, 2.0, "2", True],
    "candidate_threshold": [-0.1, 2, NAN, "0.05", True],
    "topk": [0, -1, 1.5, "10", None],
    "nms_threshold": [-1, 2, NAN, "x", None],
    "max_detections": [0, 1.5, "x"],
    "norm": [["gn"], None, {}, "GN", HUGE],
    "activation": ["sigmoid", 1],
    "box_weight": ["x", 0],
    "scales": ["no", 1, None],
    "backbone": [["resnet"], 3, "vgg"],
    "imagenet": [3, ["resnet50"]],
    "a\nkeyword\x1b[31m": [1],
    HUGE: [1],
}


@pytest.mark.parametrize("keyword", WRONG, ids=lambda keyword: ascii(keyword)[:30])
def test_keywords_are_checked_to_the_last_element(keyword):
    for value in WRONG[keyword]:
        call = lambda value=value: fcos.build("shapes", 2, **{keyword: value})  # noqa: E731
        assert_refused(call, "" if "\n" in keyword else keyword[:20], "expected")
    model = fcos.build("shapes", 2)
    if keyword in ("topk", "nms_threshold", "max_detections", "candidate_threshold", "test_size"):
        before = getattr(model, keyword)
        for value in WRONG[keyword]:
            with pytest.raises(UserError):
                setattr(model, keyword, value)
        assert getattr(model, keyword) == before


# ---- checkpoints made by hand --------------------------------------------------------------------


def shared():
    """A list of 2**60 elements that takes a few kilobytes."""
    value = []
    for _ in range(60):
        value = [value, value]
    return value


def repeated(*sides):
    """A tensor whose elements are all the same one in memory."""
    return torch.zeros(1).expand(sides)


def rezipped(change, compression=zipfile.ZIP_STORED):
    """The archive of a checkpoint with other bytes in its members."""

    def write(path, content):
        torch.save(content, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, change(name.partition("/")[2], data))

    return write


def pickled(program):
    return rezipped(lambda name, data: program if name == "data.pkl" else data)


BLOCKS = [(10**6, 1, 1, 1), (200, 200, 200, 200), (1, 1, 1), (1.5, 1, 1, 1), shared()]
CRAFTED = {  # entry of the checkpoint: values
    "keywords blocks": BLOCKS,
    "keywords channels": [2**14, 10**9],
    "keywords stem": [2**14],
    "keywords levels": [tuple(range(2, 10**5)), shared(), None],
    **{f"keywords {k}": [shared(), HUGE] for k in ("norm", "test_size", "backbone")},
    "keywords imagenet": [shared(), 3],
    "keywords": [None, shared(), [], {"blocks": 3}, {HUGE: 1}, {3: 4}],
    "name": [None, shared(), 3],
    "num_classes": [None, 10**9, 3, True, "2", shared()],
    "classes": [shared(), [1, 2], ["a"], {0: "a", 1: "b"}, "ab", ["a", shared()]],
    "category_ids": [shared(), ["1", "2"], [1], 7, [True, False]],
    "convention": [None, shared(), {1: 2}, {HUGE: 1}, []],
    **{f"convention {k}": [shared(), HUGE, None] for k in ("mean", "std", "bn_eps", "grid", "bgr")},
    "convention std": [(0.0, 0.0, 0.0), ("a", "b", "c"), (1.0,), (NAN,) * 3],
    "model": [None, shared(), {}, {1: torch.zeros(1)}, torch.zeros(3)],
    "model head.cls.weight": [
        repeated(2 * 10**9, 64, 3, 3),
        repeated(2, 64, 3, 10**9),
        torch.zeros(()),
        torch.zeros(2, 64, 3, 3).to_sparse(),
        torch.zeros(2, 64, 3, 3, device="meta"),
        torch.zeros(2, 64, 3, 3, dtype=torch.int64),
        HUGE,
        shared(),
    ],
    "model head.cls.bias": [repeated(2 * 10**9), torch.zeros(()), torch.full((2,), NAN), None],
    f"model {HUGE}": [torch.zeros(1)],
    "all": [
        rezipped(lambda name, data: data, zipfile.ZIP_DEFLATED),
        rezipped(
            lambda name, data: bytes(4 * 10**8) if name == "data/0" else data, zipfile.ZIP_DEFLATED
        ),
        rezipped(lambda name, data: data[:-4] if name == "data/3" else data),
        pickled(b"\x80\x02}" + DEEP_KEY + b"."),
        pickled(b"\x80\x02}" + b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85Rs."),
        pickled(b"\x80\x02}" + b"cbuiltins\nset\n](" + DEEP_KEY[:-3] + b"e\x85Rs."),
    ],
}


@pytest.mark.parametrize("entry", CRAFTED, ids=lambda entry: entry[:30])
def test_crafted_checkpoints_are_refused_in_one_line(entry, tmp_path):
    for value in CRAFTED[entry]:
        content = fcos.checkpoint(fcos.build("shapes", 2))
        path = tmp_path / "model.pt"
        if entry == "all":
            value(path, content)
        else:
            first, _, second = entry.partition(" ")
            content[first] = {**content[first], second: value} if second else value
            torch.save(content, path)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        assert_refused(partial(fcos.load, path), path)
        assert time.monotonic() - start < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # kB


def test_a_model_of_repeated_elements_does_not_fill_the_memory(tmp_path):
    """Names and shapes agree, but the file holds one element of each tensor."""
    content = fcos.checkpoint(fcos.build("shapes", 2))
    content["keywords"]["channels"] = 2**14
    for name, value in content["model"].items():
        wide = [2**14 if side == 64 and name[:8] != "backbone" else side for side in value.shape]
        content["model"][name] = repeated(*wide)
    torch.save(content, tmp_path / "model.pt")
    assert_refused(lambda: fcos.load(tmp_path / "model.pt"), "far larger than its tensors")


# ---- images from every source --------------------------------------------------------------------


def jpeg(orientation=None, **tags):
    """A JPEG of 40x20 pixels, red at the top, with an EXIF block."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :, 0] = 255
    entries = {} if orientation is None else {0x0112: (3, 1, struct.pack("<HH", orientation, 0))}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        block += struct.pack("<HHI", tag, kind, count) + value
    file = io.BytesIO()
    fcos.Image.fromarray(pixels).save(file, "JPEG", exif=block + b"\0\0\0\0", quality=95)
    return file.getvalue()


EXIF = {  # blocks beside which orientation 6 is good: what cameras and editors wrote
    "plain": {},
    "resolution as text": {"t282": (2, 4, b"72\0\0")},
    "resolution beyond the end": {"t282": (5, 1, struct.pack("<I", 10**6))},
    "a kind that does not exist": {"t305": (99, 1, b"\0\0\0\0")},
    "description beyond the end": {"t270": (2, 99, struct.pack("<I", 10**6))},
    "another block beyond the end": {"t34665": (4, 1, struct.pack("<I", 10**6))},
    "another block as text": {"t34665": (2, 4, b"abc\0")},
    "four billion values": {"t306": (2, 2**32 - 1, b"abcd")},
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("name", EXIF)
def test_only_the_orientation_is_read_of_exif(name, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(6, **EXIF[name]))
    image = fcos.read_image(tmp_path / "a.jpg")
    assert image.shape == (3, 40, 20)
    assert (image[0, :, 15:] > 200).all() and (image[0, :, :5] < 50).all()  # red is at the right
    assert fcos.read_image(tmp_path / "a.jpg", (20, 40)).shape == (3, 20, 40)


def test_exif_turns_as_pillow_does():
    for orientation in (None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535):
        image = fcos.Image.open(io.BytesIO(jpeg(orientation)))
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        found = fcos.read_image(jpeg(orientation)).permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected), orientation


@pytest.mark.filterwarnings("error")
def test_images_come_from_every_source(tmp_path):
    content = jpeg()
    (tmp_path / "a.jpg").write_bytes(content)
    expected = fcos.read_image(tmp_path / "a.jpg")
    array = np.asarray(fcos.Image.open(io.BytesIO(content)))  # read-only
    model = fcos.build("shapes", 2)
    sources = {
        "text": lambda: str(tmp_path / "a.jpg"),
        "path": lambda: tmp_path / "a.jpg",
        "bytes": lambda: content,
        "bytearray": lambda: bytearray(content),
        "BytesIO": lambda: io.BytesIO(content),
        "file": lambda: open(tmp_path / "a.jpg", "rb"),  # noqa: SIM115
        "PIL": lambda: fcos.Image.open(io.BytesIO(content)),
        "read-only array": lambda: array,
        "mirrored array": lambda: array[:, ::-1][:, ::-1],
        "tensor": lambda: expected,
    }
    for name, source in sources.items():
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            assert fcos.as_image(source()).equal(expected), name
            [found] = model.predict(source(), min_size=32, max_size=64)
            assert len(model.predict([source()] * 1, min_size=32, max_size=64)) == 1
            assert set(found) == {"boxes", "scores", "labels"}


NO_IMAGES = {
    "batch": (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "(2, 3, 64, 64)"),
    "grey": (np.zeros((20, 30), np.uint8), "(20, 30)"),
    "transparent": (np.zeros((20, 30, 4), np.uint8), "(20, 30, 4)"),
    "channels first": (np.zeros((3, 20, 30), np.uint8), "(3, 20, 30)"),
    "floats": (np.zeros((20, 30, 3)), "float64"),
    "float tensor": (torch.zeros(3, 20, 30), "torch.float32"),
    "16 bits": (np.zeros((20, 30, 3), np.uint16), "uint16"),
    "empty": (np.zeros((0, 30, 3), np.uint8), "(0, 30, 3)"),
    "None": (None, "None"),
    "number": (7, "7"),
    "list of pixels": (np.zeros((100, 100, 3), np.uint8).tolist(), "[[[0, 0, 0], "),
    "dict": ({"image": torch.zeros(3, 2000, 2000)}, "Tensor torch.float32 (3, 2000, 2000)"),
    "nested": (shared(), "[[[["),
    "no bytes": (b"", "b''"),
    "bytes of something else": (b"photo.jpg" * 10**6, "b'photo.jpg"),
    "text file": (io.StringIO("x"), "StringIO"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_described_as_it_was_passed(name):
    image, said = NO_IMAGES[name]
    model = fcos.build("shapes", 1)
    for call in (lambda: fcos.as_image(image), lambda: model.predict([image])):
        with pytest.raises(UserError) as error:
            call()
        assert said in str(error.value) and len(str(error.value)) <= 210, str(error.value)
    if not np.iterable(image) or isinstance(image, dict):
        assert_refused(lambda: model.predict(image), said)


@pytest.mark.parametrize("name", ["a\n0.999.jpg", "\x1b[31mred.jpg", "ü" * 100, "\u202egpj.jpg"])
def test_names_of_files_are_printable_in_messages(name, tmp_path):
    (tmp_path / name).write_bytes(b"no image")
    (tmp_path / f"{name[:80]}.pt").write_bytes(b"no checkpoint")
    for call in (
        lambda: fcos.read_image(tmp_path / name),
        lambda: fcos.load(tmp_path / f"{name[:80]}.pt"),
        lambda: fcos.save(fcos.build("shapes", 1), tmp_path / name / "model.pt"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_the_size_limit_of_pillow_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr(fcos.Image, "MAX_IMAGE_PIXELS", 100)
    assert_refused(lambda: fcos.read_image(jpeg()), "MAX_IMAGE_PIXELS", "pieces")


# ---- files that are something else -------------------------------------------------------------


def both(model, path):
    """The two ways in."""
    return [lambda: fcos.load_weights(model, path), lambda: fcos.load(path)]


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"hello, this is no checkpoint\n" * 9,
        b"\x80\x02",
        b"PK\x03\x04 and no zip",
        b"<html>404</html>",
    ],
    ids=["empty", "zeros", "text", "start", "zip", "html"],
)
def test_junk_is_named(content, suffix, tmp_path):
    path = tmp_path / f"junk.{suffix}"
    path.write_bytes(content)
    for call in both(fcos.build("shapes", 2), path):
        assert_refused(call, path, "not a checkpoint or damaged")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_torn_checkpoint_is_named(share, tmp_path):
    fcos.save(fcos.build("shapes", 2), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[: int(share * len(content))])
    content = python2_pickle(backbone_file(thin(), AFFINE))
    (tmp_path / "torn.pkl").write_bytes(content[: int(share * 100_000)])
    for name in ("torn.pt", "torn.pkl"):
        for call in both(fcos.build("shapes", 2), tmp_path / name):
            assert_refused(call, name, "not a checkpoint or damaged")


def test_missing_file_and_folder_are_named(tmp_path):
    for call in both(fcos.build("shapes", 2), tmp_path / "nowhere.pth"):
        assert_refused(call, tmp_path / "nowhere.pth", "No such file")
    for call in both(fcos.build("shapes", 2), tmp_path):
        assert_refused(call, tmp_path, "Is a directory")


@pytest.mark.parametrize(
    "content, said",
    [
        ([1, 2, 3], "list"),
        (torch.zeros(3), "Tensor"),
        ({0: torch.zeros(3)}, "dict"),
        ({}, "none"),
        ({"conv1.weight": torch.zeros(3)}, "conv1.weight"),
        ({"model": {}}, "none"),
        ({"model": {"backbone.conv1.weight": torch.zeros(3)}}, "backbone.conv1.weight"),
        ({"head.cls.weight": "text"}, "head.cls.weight"),
        ({"res_conv1_bn_s": np.zeros(3, dtype=object)}, "res_conv1_bn_s"),
        ({"name": "shapes", "overrides": {}, "convention": {}}, "name"),
    ],
    ids=str,
)
def test_other_contents_are_named(content, said, tmp_path):
    path = tmp_path / ("other.pkl" if said == "res_conv1_bn_s" else "other.pt")
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert_refused(lambda: fcos.load_weights(fcos.build("shapes", 2), path), path)
    assert_refused(lambda: fcos.load(path), path)
    assert_refused(lambda: fcos.load(path, "shapes"), path, said)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"keywords": fcos.resolve({}) | {"depth": 1}}, "depth"),
        ({"num_classes": "two"}, "model.pt"),
        ({"keywords": {"backbone": "vgg"}}, "vgg"),
        ({"keywords": None}, "model.pt"),
    ],
    ids=str,
)
def test_own_checkpoint_of_a_model_that_is_unknown_here(changes, said, tmp_path):
    content = fcos.checkpoint(fcos.build("shapes", 2)) | changes
    torch.save(content, tmp_path / "model.pt")
    assert_refused(lambda: fcos.load(tmp_path / "model.pt"), tmp_path / "model.pt", said)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_may_hold_what_torch_reads(zipped, tmp_path):
    """As a zip archive, and as torch.save wrote before version 1.6."""
    model = fcos.build("shapes", 2)
    content = fcos.checkpoint(model) | {
        "ordered": OrderedDict(a=1),
        "counted": Counter("abca"),
        "set": {1, 2},
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "complex": 1j,
        "dtype": torch.float32,
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
    }
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_same_weights(fcos.load(tmp_path / "model.pt"), model)


class Program:
    """An object whose unpickling creates a file or folder."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl"])
def test_a_program_in_a_file_is_refused_by_name_and_not_run(suffix, tmp_path):
    for number, (function, argument, name) in enumerate(
        [
            (os.system, f"touch {tmp_path}/ran", r"(posix|nt)\.system"),
            (os.mkdir, str(tmp_path / "ran"), r"(posix|nt|os)\.mkdir"),
            (eval, f"open({str(tmp_path / 'ran')!r}, 'w')", "eval"),
            (touch, str(tmp_path / "ran"), r"test_weights\.touch"),
            (np.load, str(tmp_path / "ran"), r"numpy.*load"),
            (None, None, r"argparse\.Namespace"),
        ]
    ):
        path = tmp_path / f"{number}.{suffix}"
        program = Program(function, argument) if function else argparse.Namespace(lr=0.1)
        content = {"conv1_w": program, "res_conv1_bn_s": 1}
        if suffix == "pkl":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save({"model": content}, path)
        for call in both(fcos.build("shapes", 2), path):
            with pytest.raises(UserError, match=rf"{path.name}: refused.*{name}.*state dict"):
                call()
        assert not (tmp_path / "ran").exists()


SOUND = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "permuted": np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
    "big-endian": np.arange(3, dtype=">f4"),
    "half": np.zeros((1, 2), np.float16),
    "bytes": np.arange(3, dtype=np.uint8)[::-1],
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "no axis": np.array(5),
    "scalar": np.float32(1),
    "text": np.array(["text", "ü"]),
    "byte strings": np.array([b"text"]),
    "plain": [1, -1, 10**30, "x", b"y", b"", None, 2.5, True, (1, (2, "a")), {"a": 0, 1: None}],
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("package", ["numpy._core", "numpy.core"])
def test_sound_pickles_are_read(protocol, package, tmp_path):
    """Of numpy 1 and 2; the package is written with its length in the later protocols."""
    content = SOUND | {"again": SOUND["float32"]}
    pickled = pickle.dumps(content, protocol)
    if package == "numpy.core" and protocol < 4:
        pickled = pickled.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "arrays.pkl").write_bytes(pickled)
    read = fcos.read_checkpoint(tmp_path / "arrays.pkl")
    assert list(read) == list(content) and read["again"] is read["float32"]
    for name, value in content.items():
        if name != "plain":
            assert type(read[name]) is type(value) and read[name].dtype == value.dtype, name
            assert read[name].shape == value.shape and (read[name] == value).all(), name
    assert read["plain"] == content["plain"]


# Instructions of a pickle, and what numpy makes of them.


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def raw(value):
    return b"B" + struct.pack("<I", len(value)) + value


def whole(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def shape(*sides):
    return group(*map(whole, sides))


def called(module, name, *parts):
    return f"c{module}\n{name}\n".encode() + group(*parts) + b"R"


NO, MULTIARRAY = b"\x89", "numpy._core.multiarray"
CREATED = called(MULTIARRAY, "_reconstruct", b"cnumpy\nndarray\n", shape(0), raw(b"b"))


def kind(code="f4", order="<", parts=b"NNN", size=-1):
    state = whole(3) + text(order) + parts + whole(size) + whole(-1) + whole(0)
    return called("numpy", "dtype", text(code), NO, b"\x88") + group(state) + b"b"


TWO, FLOAT, ZEROS, ONE = shape(2), kind(), raw(bytes(8)), whole(1)


def array(shape=TWO, kind=FLOAT, content=ZEROS, fortran=NO, version=ONE):
    return CREATED + group(version, shape, kind, fortran, content) + b"b"


def buffer(shape=TWO, kind=FLOAT, content=ZEROS):
    return called("numpy._core.numeric", "_frombuffer", content, kind, shape, text("C"))


def scalar(kind, content):
    return called(MULTIARRAY, "scalar", kind, content)


def sized(instruction, size):
    return instruction + struct.pack("<Q", size)


WIDE, KEY = b")" + b"2\x86" * 60, text("key") + b"s"
FORGED = {
    # ---- element types
    "objects in a buffer": buffer(kind=kind("O8", "|"), shape=shape(1)),
    "objects in an array": array(kind=kind("O8", "|"), shape=shape(1)),
    "list of objects": array(kind=kind("O8", "|"), content=b"](NNe"),
    "object as scalar": scalar(kind("O8", "|"), ZEROS),
    "dates": array(kind=kind("M8")),
    "records": array(kind=kind("V8", "|")),
    "long double": array(kind=kind("f16"), content=raw(bytes(32))),
    "list of types": array(kind=kind("f4,f4"), shape=shape(1)),
    "type of nothing": array(kind=kind("S0", "|"), content=raw(b"")),
    "huge strings": array(kind=kind("S999999999", "|")),
    "subarray": array(kind=kind(parts=group(kind(), shape(10**9)) + b"NN")),
    "fields": array(kind=kind(parts=b"N" + group(text("a")) + b"}")),
    "no byte order": array(kind=kind(order="?")),
    "type by number": array(kind=called("numpy", "dtype", whole(1), NO, NO)),
    "type without a name": array(kind=called("numpy", "dtype")),
    "type named by a type": array(kind=called("numpy", "dtype", kind(), NO, NO)),
    "state is a number": array(kind=called("numpy", "dtype", text("f4"), NO, NO) + whole(3) + b"b"),
    "state is too short": array(kind=called("numpy", "dtype", text("f4"), NO, NO) + b")b"),
    "sizes are text": array(kind=kind().replace(whole(-1), text("x"))),
    "no text": array(kind=kind("U1"), content=raw(b"\xff" * 8)),
    # ---- shapes and bytes
    "huge": array(shape(10**9, 10**9)),
    "2**62 elements": array(shape(2**31, 2**31), kind("b1", "|"), raw(b"")),
    "negative": array(shape(-1)),
    "two negative sides": array(shape(-1, -2)),
    "a side of text": array(group(text("2"))),
    "a side of 2.0": array(group(b"G" + struct.pack(">d", 2))),
    "a true side": array(group(b"\x88", whole(2))),
    "a shape in a list": array(b"](" + whole(2) + b"e"),
    "100 axes": array(shape(*[1] * 100), content=raw(bytes(4))),
    "too few bytes": array(shape(3)),
    "too many bytes": buffer(shape(1)),
    "no bytes": array(content=b"N"),
    "a number of bytes": scalar(kind(), whole(4)),
    "text beyond latin1": array(content=text("\u0100" * 8)),
    "another version": array(version=whole(2)),
    "Fortran in a list": array(fortran=b"]"),
    "no type": array(kind=b"N"),
    "an array as type": array(kind=array()),
    "filled twice": array() + group(ONE, TWO, FLOAT, NO, ZEROS) + b"b",
    "array in itself": CREATED + b"q\x07" + group(ONE, b"h\x07", FLOAT, NO, raw(b"")) + b"b",
    "never filled": CREATED,
    "other axes": called(
        "numpy._core.numeric", "_frombuffer", ZEROS, FLOAT, TWO, text("K"), shape(7)
    ),
    "a subclass": called(MULTIARRAY, "_reconstruct", b"cnumpy\ndtype\n", shape(0), raw(b"b")),
    "starts with a size": called(
        MULTIARRAY, "_reconstruct", b"cnumpy\nndarray\n", shape(10**12), raw(b"b")
    ),
    # ---- names and calls
    "system": called("posix", "system", text("false")),
    "another function of numpy": called(MULTIARRAY, "fromfile", text("/dev/zero")),
    "a path in a name": b"cnumpy\nndarray.dtype\n",
    "a name with an escape code": b"cnumpy\x1b[31m\nload\n",
    "a very long name": b"c" + b"n" * 10**6 + b"\nload\n",
    "a name of numbers": whole(1) + whole(2) + b"\x93",
    "a function as value": b"cnumpy\ndtype\n",
    "a call of text": text("f") + b")R",
    "a call of an array": array() + b")R",
    "a call with a number": b"cnumpy\ndtype\n" + whole(3) + b"R",
    "a call without arguments": called(MULTIARRAY, "scalar"),
    "compressed bytes": called("_codecs", "encode", text("a" * 99), text("zlib")),
    "INST": b"(iposix\nsystem\n",
    "INST of numpy": b"(" + text("O8") + b"inumpy\ndtype\n",
    "OBJ": b"(cnumpy\ndtype\n" + text("O8") + b"o",
    "NEWOBJ": b"cnumpy\nndarray\n" + group(shape(10**12)) + b"\x81",
    "NEWOBJ_EX": b"cnumpy\nndarray\n" + group(shape(10**12)) + b"}\x92",
    "EXT1": b"\x82\x01",
    "EXT4": b"\x84" + struct.pack("<i", 2**31 - 1),
    "PERSID": b"Pstorage\n",
    "BINPERSID": text("storage") + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": raw(b"") + b"\x98",
    "state of a dict": b"}}b",
    "state of text": text("a") + b"}b",
    # ---- keys, nesting, sizes
    "deep key": b"}" + DEEP + KEY,
    "wide key": b"}" + WIDE + KEY,
    "list as key": b"}]" + KEY,
    "array as key": b"}" + array() + KEY,
    "deep key of many": b"}(" + DEEP + b"Nu",
    "deep key of a literal": b"(" + DEEP + b"Nd",
    "deep element of a set": b"\x8f(" + DEEP + b"\x90",
    "deep element of a frozen set": b"(" + DEEP + b"\x91",
    "items of a list": b"](NNu",
    "odd items": b"}(Nu",
    "2**40 bytes": sized(b"\x8e", 2**40),
    "2**63 bytes": sized(b"\x8e", 2**63),
    "2**36 bytes to change": sized(b"\x96", 2**36),
    "2**40 letters": sized(b"\x8d", 2**40),
    "2**40 digits": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a frame of 2**40": sized(b"\x95", 2**40),
    "a negative length": b"T" + struct.pack("<i", -1),
    "a million digits": b"L" + b"9" * 10**6 + b"L\n",
    "an array 3000 times": text("a" * 10**6)
    + b"q\x010]("
    + array(shape(10**6), kind("b1", "|"), b"h\x01") * 3000
    + b"e",
    "nothing on the stack": b"0000000",
    "no mark": b"e",
    "an unknown memo": b"h\x63",
    "an unknown instruction": b"\xff",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_pickles_are_refused(name, tmp_path):
    """One value of a dict is forged, the other would be read."""
    sound = text("res_conv1_bn_s") + array() + b"s"
    path = tmp_path / "forged.pkl"
    path.write_bytes(b"\x80\x02}" + sound + b".")
    assert fcos.read_checkpoint(path)["res_conv1_bn_s"].tolist() == [0, 0]
    path.write_bytes(b"\x80\x02}" + text("conv1_w") + FORGED[name] + b"s" + sound + b".")
    start = time.monotonic()
    assert_refused(lambda: fcos.read_checkpoint(path), path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}, []], dtype=object),
        np.array(["a", "b"]),
        "text",
        3,
        None,
        [1, 2],
    ],
    ids=["objects", "strings", "text", "number", "none", "list"],
)
def test_values_that_are_no_numbers(tmp_path, value):
    model, path = small("fcos_R_50_FPN"), tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(backbone_file(model, AFFINE, res2_0_branch2a_w=value)))
    said = "res2_0_branch2a_w: expected (an array of numbers|a dense floating-point tensor)"
    with pytest.raises(UserError, match=said):
        fcos.load_weights(model, path)
