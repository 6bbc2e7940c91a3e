"""The table of models against the official facts, and the checks of keywords."""

import json
import math
import re
from functools import partial

import pytest
import torch
import torchvision
from conftest import HUGE, NAN, assert_refused, objects, picture
from foreign import (
    official,
)

import fcos
import train
from fcos import UserError

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
ROWS_OF_OTHERS = "fcos_torchvision_R_50_FPN", "shapes"  # rows that the official code lacks
RECIPES = """
    fcos_R_50_FPN_1x fcos_R_101_FPN_2x fcos_X_101_32x8d_FPN_2x fcos_X_101_64x4d_FPN_2x
    fcos_imprv_R_50_FPN_1x fcos_imprv_R_101_FPN_1x fcos_imprv_R_101_FPN_2x
    fcos_imprv_X_101_32x8d_FPN_2x fcos_imprv_X_101_64x4d_FPN_2x fcos_imprv_dcnv2_R_50_FPN_1x
    fcos_imprv_dcnv2_R_101_FPN_1x fcos_imprv_dcnv2_R_101_FPN_2x fcos_imprv_dcnv2_X_101_32x8d_FPN_2x
    fcos_imprv_dcnv2_X_101_64x4d_FPN_2x fcos_bn_bs16_MNV2_FPN_1x fcos_syncbn_bs32_MNV2_FPN_1x
    fcos_syncbn_bs32_c128_MNV2_FPN_1x fcos_syncbn_bs32_c128_ms_MNV2_FPN_1x
    fcos_syncbn_bs64_c128_ms_MNV2_FPN_1x""".split()


def official_recipe(name):
    """Return model, iterations, batch size and short sides, which the name of a recipe states."""
    model = re.sub(r"_bs\d+|_ms|_[12]x$", "", name)
    iterations = 90_000 * int(name[-2])
    batch = re.search(r"_bs(\d+)", name)
    batch_size = int(batch[1]) if batch else 16
    many_sizes = "_ms_" in name or name.endswith("_2x")
    short_sides = list(range(640, 801)) if many_sizes else [800]
    return model, iterations, batch_size, short_sides


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_a_model_has_the_official_number_of_parameters(name):
    with torch.device("meta"):
        model = fcos.build(name)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (parameters, trainable, len(model.state_dict())) == ROWS[name]


def test_state_dicts_match_the_official_code(shared):
    golden = json.loads((shared / "golden/state_dicts.json").read_text())
    assert sorted(golden) == sorted(RECIPES)
    for recipe, rows in golden.items():
        with torch.device("meta"):
            model = fcos.build(official_recipe(recipe)[0])
        state = model.state_dict()
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        found = {
            official(name, state): [list(value.shape), trainable.get(name)]
            for name, value in state.items()
        }
        assert found == {key: [shape, trains] for key, shape, _, trains in rows}, recipe


def test_models_of_others_have_as_many_parameters_as_theirs():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in fcos.build(n).parameters()) for n in ROWS_OF_OTHERS]
        theirs = torchvision.models.detection.fcos_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=80
        )
    norms = 2 * sum(m.num_features for m in theirs.modules() if hasattr(m, "running_mean"))
    parameters = sum(p.numel() for p in theirs.parameters())
    assert counts == [parameters - norms, 1_223_530]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_matches_the_official_one(recipe):
    settings = train.RECIPES[recipe]
    found = (settings["model"], settings["iters"], settings["batch_size"], settings["min_size"])
    assert found == official_recipe(recipe)
    assert settings["lr"] == 0.01
    assert settings["warmup"] == 500
    assert settings["max_size"] == 1333
    backbone = re.search(r"R_\d+|X_101_\d+x\dd|MNV2", recipe)[0].replace("_", "-", 2)
    assert settings["weights"].startswith(backbone.replace("MNV2", "mobilenet_v2"))


def test_initial_weights_of_deformable_convolutions_match_the_official_code():
    torch.manual_seed(0)
    model = fcos.build("fcos_imprv_dcnv2_X_101_32x8d_FPN", blocks=(1, 1, 1, 1))
    assert not isinstance(model.backbone.res3[0].conv2.conv, fcos.DeformConv)
    layer = model.backbone.res5[0].conv2.conv
    bound = 1 / math.sqrt(9 * 2048)  # of all channels, not of one of the 32 groups
    assert layer.weight.abs().max() <= bound
    assert layer.weight.std() > bound / 2
    bound = math.sqrt(3 / (9 * 2048))  # kaiming_uniform(a=1), not zero
    assert layer.offset.weight.abs().max() <= bound
    assert layer.offset.weight.std() > bound / 2
    assert not layer.offset.bias.any()

    layer = model.head.box_tower[3].conv
    assert isinstance(layer, fcos.DeformConv)
    assert abs(layer.offset.weight.std() - 0.01) < 1e-3
    assert layer.weight.std() > 0.011
    assert not layer.bias.any()


def test_initial_weights_of_mobilenet_match_the_official_code():
    torch.manual_seed(0)
    depthwise, pointwise, *_ = fcos.build("fcos_bn_MNV2_FPN").backbone.features[13]
    assert depthwise.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 576), rel=0.05)
    assert pointwise.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 576)), rel=0.05)


def shallow_models():
    """Return the keywords of each row with at most two blocks a stage, without repetitions."""
    rows = {}
    for name in fcos.MODELS:
        keywords = fcos.resolve(fcos.MODELS[name])
        keywords.pop("imagenet", None)
        if "blocks" in keywords:
            keywords["blocks"] = tuple(min(depth, 2) for depth in keywords["blocks"])
        if keywords not in rows.values():
            rows[name] = keywords
    return rows


@pytest.mark.parametrize("keywords", shallow_models().values(), ids=shallow_models())
def test_one_step_reaches_every_parameter(keywords):
    torch.manual_seed(0)
    model = fcos.FCOS(3, **keywords).train()
    torch.nn.init.ones_(model.head.box.bias)  # relu has a gradient above 0
    truth = objects((4, 4, 34, 44, 0), (20, 10, 125, 120, 1), (60, 30, 122, 80, 2))
    targets = model.targets((128, 128), [truth])
    outputs = model(picture(128, 128, seed=3)[None])
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
    sum(losses.values()).backward()
    assert sum(losses.values()).isfinite()
    without_gradient = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not parameter.grad.any():
            without_gradient.append(name)
    # no box is assigned to P6 and P7
    assert all(name.startswith("head.scale.") for name in without_gradient), without_gradient
    optimizer = torch.optim.SGD(train.parameter_groups(model, 1e-3), momentum=0.9)
    optimizer.step()


# ---- keywords ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fcos.MODELS)
def test_keywords_of_a_model_build_the_same_model(name):
    keywords = fcos.resolve(fcos.MODELS[name])
    assert keywords.items() >= fcos.MODELS[name].items()
    assert fcos.resolve(keywords) == keywords
    with torch.device("meta"):
        model = fcos.build(name, 5)
        again = fcos.FCOS(5, **model.keywords)
    assert model.keywords == keywords
    assert again.keywords == keywords
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in again.state_dict().items()}


def test_an_unknown_name_lists_the_models():
    with pytest.raises(UserError, match="'resnet'.*fcos_R_50_FPN, .*shapes"):
        fcos.build("resnet")


def test_a_model_without_classes_is_refused():
    with pytest.raises(UserError, match="num_classes.*expected"):
        fcos.build("shapes", num_classes=0)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(depth=50), "keyword 'depth': expected one of backbone.*frozen_stages.*blocks.*norm"),
        (dict(backbone="vgg"), "backbone 'vgg': expected one of resnet, mobilenet"),
        (dict(backbone="mobilenet", groups=2), "'groups': expected one of.*blocks, stem, norm"),
        (dict(radius="1.5"), "radius '1.5': expected a value like 1.5"),
        (dict(radius=None), "radius None: expected a value like 1.5"),
        (dict(channels=256.0), "channels 256.0: expected a value like 256"),
        (dict(blocks=3), r"blocks 3: expected a value like \(3, 4, 6, 3\)"),
        (dict(blocks=(1, 1, 1)), r"blocks \(1, 1, 1\): expected a value like"),
        (dict(test_size=(64.5, 96)), r"test_size \(64.5, 96\): expected"),
        (dict(test_size=(96, 64)), r"test_size \(96, 64\): expected the short side first"),
        (dict(topk=0), "topk 0: expected a value like 1000 from 1 to 1000000"),
        (dict(topk="100"), "topk '100': expected"),
        (dict(topk=True), "topk True: expected"),
        (dict(nms_threshold=2), "nms_threshold 2: expected a value like 0.6 from 0.0 to 1.0"),
        (dict(nms_threshold=math.nan), "nms_threshold nan: expected"),
        (dict(candidate_threshold=-0.1), "candidate_threshold -0.1: expected a number from"),
        (dict(scales=1), "scales 1: expected a value like True"),
        (dict(imagenet=50), "imagenet 50: expected text"),
        (dict(channels=48), "channels 48: expected a multiple of 32"),
        (dict(scales="no"), "scales 'no': expected a value like True"),
        (dict(levels=3), "levels 3: expected"),
        (dict(levels=(2, 3, 4)), r"levels \(2, 3, 4\): expected ranges with them"),
        (dict(levels=(3, 5), ranges=(64,)), r"levels \(3, 5\): expected consecutive levels"),
        (dict(norm="batch"), "norm 'batch': expected one of frozen, gn, bn, syncbn"),
        (dict(block="wide"), "block 'wide': expected one of bottleneck, basic"),
        (
            dict(activation="softplus"),
            "activation 'softplus': expected one of exp, relu, exp_stride",
        ),
        (dict(ctr_on="both"), "ctr_on 'both': expected one of cls, box"),
        (
            dict(box_loss="diou"),
            "box_loss 'diou': expected one of iou, linear_iou, giou, giou_exact",
        ),
        (dict(quality="area"), "quality 'area': expected one of centerness, iou"),
        (dict(unit="metre"), "unit 'metre': expected one of pixel, stride"),
        (dict(grid="center"), "grid 'center': expected one of centre, corner"),
        (dict(levels=(3, 4, 5), ranges=(64,)), "ranges.*expected"),
        (dict(ranges=(64, 128)), "ranges.*expected"),
    ],
    ids=str,
)
def test_messages_about_keywords_name_the_choices(keywords, message):
    for call in (
        lambda: fcos.resolve(keywords),
        lambda: fcos.FCOS(2, **keywords),
        lambda: fcos.build("fcos_imprv_R_50_FPN", 2, **keywords),
    ):
        with pytest.raises(UserError, match=message):
            call()


REFUSED = {  # keyword: values that are refused, before anything is built
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
    "backbone": [["resnet"], 3, "vgg", None],
    "imagenet": [3, ["resnet50"]],
    "a\nkeyword\x1b[31m": [1],
    HUGE: [1],
}


@pytest.mark.parametrize("keyword", REFUSED, ids=lambda keyword: ascii(keyword)[:30])
def test_keywords_are_checked_to_the_last_element(keyword):
    for value in REFUSED[keyword]:
        call = partial(fcos.build, "shapes", 2, **{keyword: value})
        assert_refused(call, "" if "\n" in keyword else keyword[:20], "expected")


@pytest.mark.parametrize(
    "keyword", ["topk", "nms_threshold", "max_detections", "candidate_threshold", "test_size"]
)
def test_decoding_keywords_are_checked_when_they_are_changed(keyword):
    model = fcos.build("shapes", 2)
    before = getattr(model, keyword)
    for value in REFUSED[keyword]:
        with pytest.raises(UserError):
            setattr(model, keyword, value)
    assert getattr(model, keyword) == before
