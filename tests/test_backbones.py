"""Backbones: their layers and norms, frozen stages, timm models and custom modules."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import objects, outputs_of, picture, small

import fcos
import train

# ---- layers and norms --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, kind",
    [
        ("gn", fcos.GroupNorm),
        ("bn", torch.nn.BatchNorm2d),
        ("syncbn", torch.nn.BatchNorm2d),
        ("frozen", fcos.FrozenBatchNorm2d),
    ],
)
def test_norm_applies_to_the_backbone_only(norm, kind):
    model = fcos.build("shapes", 2, norm=norm)
    norms = [layer.norm for layer in model.backbone.modules() if isinstance(layer, fcos.ConvNorm)]
    assert norms
    assert all(type(layer) is kind for layer in norms)
    assert all(type(layer.norm) is fcos.GroupNorm for layer in model.head.cls_tower)
    assert not any("norm" in name for name, _ in model.fpn.named_parameters())


def test_a_frozen_norm_computes_the_batch_norm_it_replaces():
    torch.manual_seed(0)
    layer = fcos.ConvNorm(4, 6, 3, norm="frozen")
    norm = torch.nn.BatchNorm2d(6).eval()
    for name, buffer in layer.norm.named_buffers():
        buffer.uniform_(0.5, 2)
        getattr(norm, name).data.copy_(buffer)
    layer.norm.eps = norm.eps
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(layer(x), norm(layer.conv(x)), rtol=1e-4, atol=1e-5)
    assert layer.norm.weight.requires_grad is False


@pytest.mark.parametrize("stages", range(6))
def test_stages_are_frozen_from_the_stem_upwards(stages):
    model = fcos.build("shapes", 2, frozen_stages=stages)
    order = ["stem", "res2", "res3", "res4", "res5"]
    for name, parameter in model.named_parameters():
        frozen = name.startswith("backbone") and order.index(name.split(".")[1]) < stages
        assert parameter.requires_grad is not frozen, name


@pytest.mark.parametrize(
    "in_1x1, strides_1x1, strides_3x3", [(True, (2, 2), (1, 1)), (False, (1, 1), (2, 2))]
)
def test_stride_in_1x1_moves_the_stride(in_1x1, strides_1x1, strides_3x3):
    with torch.device("meta"):
        block = fcos.build("fcos_R_50_FPN", stride_in_1x1=in_1x1).backbone.res3[0]
    assert block.conv1.conv.stride == strides_1x1
    assert block.conv2.conv.stride == strides_3x3


def test_sync_batch_norm_replaces_every_batch_norm():
    model = fcos.build("fcos_syncbn_c128_MNV2_FPN").eval()
    images = torch.rand(1, 3, 64, 64)
    before = outputs_of(model, images)["cls"]
    keys = list(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert outputs_of(model, images)["cls"].equal(before)
    kinds = [type(module) for module in model.modules() if hasattr(module, "running_mean")]
    assert len(kinds) == 51
    assert set(kinds) == {torch.nn.SyncBatchNorm}


# ---- deformable convolution --------------------------------------------------------------------


def test_gradients_of_deformable_convolution_are_right():
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
    """The mask of each tap is sigmoid(0). Offsets of whole pixels shift the image."""
    layer = fcos.DeformConv(8, 4, 3, 1, 1)
    torch.nn.init.zeros_(layer.offset.weight)
    torch.nn.init.zeros_(layer.offset.bias)
    torch.nn.init.zeros_(layer.bias)
    x = torch.randn(2, 8, 6, 7)
    expected = torch.nn.functional.conv2d(x, layer.weight, padding=1) / 2
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with torch.no_grad():  # one pixel down and two to the right, for all taps
        layer.offset.bias[0:18:2] = 1
        layer.offset.bias[1:18:2] = 2
    shifted = torch.nn.functional.pad(x, (0, 2, 0, 1))[:, :, 1:, 2:]
    expected = torch.nn.functional.conv2d(shifted, layer.weight, padding=1) / 2
    assert torch.allclose(layer(x)[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-5)


def test_a_deformable_model_runs_in_bfloat16():
    torch.manual_seed(0)
    model = small("fcos_imprv_dcnv2_R_50_FPN").eval()
    images = torch.rand(1, 3, 128, 192)
    sizes = torch.tensor([[128, 192]])
    full = outputs_of(model, images, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        half = outputs_of(model, images, sizes)
    outputs_of(model.bfloat16(), images.bfloat16(), sizes)
    assert (half["cls"] - full["cls"]).abs().max() < 0.1


# ---- custom modules ----------------------------------------------------------------------------


class Patches(torch.nn.Module):
    """A custom backbone with no more than what FCOS requires of a module."""

    strides = (8, 16, 32)
    channels = (8, 12, 16)

    def __init__(self):
        super().__init__()
        self.steps = torch.nn.ModuleList(
            torch.nn.Conv2d(c_in, c_out, kernel, kernel)
            for c_in, c_out, kernel in ((3, 8, 8), (8, 12, 2), (12, 16, 2))
        )

    def forward(self, images):
        features = [images / 50]
        for step in self.steps:
            features.append(step(features[-1]).tanh())
        return features[1:]


def patches_model():
    torch.manual_seed(0)
    return fcos.FCOS(3, backbone=Patches(), channels=64, radius=0.0)


def test_a_custom_backbone_is_trained():
    torch.manual_seed(0)
    backbone = Patches()
    before = copy.deepcopy(backbone.state_dict())
    model = fcos.FCOS(3, backbone=backbone, channels=64, radius=0.0).train()
    assert model.backbone is backbone
    assert model.name == "FCOS"
    assert all(value.equal(before[name]) for name, value in backbone.state_dict().items())
    optimizer = torch.optim.SGD(train.parameter_groups(model, 0.1))
    targets = model.targets((64, 96), [objects((8, 8, 50, 40, 1))])
    outputs = model(picture(64, 96)[None])
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
    sum(losses.values()).backward()
    optimizer.step()
    assert not any(value.equal(before[name]) for name, value in backbone.state_dict().items())


def test_a_checkpoint_with_a_custom_backbone_is_loaded_with_its_module(tmp_path):
    model = patches_model()
    model.classes = ["a", "b", "c"]
    model.category_ids = [1, 2, 3]
    images = picture(64, 96)[None]
    expected = outputs_of(model.eval(), images)
    path = tmp_path / "model.pt"
    fcos.save(model, path)
    loaded = fcos.load(path, backbone=Patches())
    found = outputs_of(loaded, images)
    assert all(found[name].equal(expected[name]) for name in ("cls", "ltrb", "ctr", "points"))
    assert loaded.keywords == model.keywords
    assert loaded.classes == model.classes

    message = r"model\.pt: has a custom backbone: pass the module as `backbone=`"
    with pytest.raises(fcos.UserError, match=message):
        fcos.load(path)
    other = Patches()
    other.steps.append(torch.nn.Conv2d(16, 16, 1))
    with pytest.raises(fcos.UserError, match=r"does not fit FCOS.*backbone\.steps\.3"):
        fcos.load(path, backbone=other)


@pytest.mark.parametrize("declared", [{"strides": (4, 8, 16)}, {"channels": (8, 12, 17)}])
def test_features_that_differ_from_what_a_backbone_declares_are_refused(declared):
    backbone = Patches()
    backbone.channels = declared.get("channels", Patches.channels)
    backbone.strides = declared.get("strides", Patches.strides)
    model = fcos.FCOS(3, backbone=backbone, channels=32)
    with pytest.raises(fcos.UserError, match=r"backbone Patches: .*features"):
        model(torch.zeros(1, 3, 64, 96))


def test_a_custom_backbone_refuses_the_keywords_of_a_resnet():
    with pytest.raises(ValueError, match="'blocks': expected one of"):
        fcos.FCOS(3, backbone=Patches(), blocks=(1, 1, 1, 1))


# ---- timm --------------------------------------------------------------------------------------


def test_a_timm_model_is_a_backbone_with_timms_pixels(tmp_path):
    pytest.importorskip("timm")
    keywords = dict(backbone="timm", arch="resnet10t", channels=32, frozen_stages=3)
    model = fcos.build("shapes", 3, **keywords)
    module = fcos.FCOS(3, backbone=fcos.Timm("resnet10t"), channels=32)
    assert model.convention == module.convention
    assert model.convention["mean"] == (123.675, 116.28, 103.53)
    assert not model.convention["bgr"]
    assert "blocks" not in model.keywords  # a keyword of the row's ResNet
    fcos.save(model, tmp_path / "model.pt")
    loaded = fcos.load(tmp_path / "model.pt").state_dict()
    assert all(value.equal(loaded[name]) for name, value in model.state_dict().items())


def test_frozen_stages_of_a_timm_model_do_not_change():
    """The statistics of their batch norms stay the same, too."""
    pytest.importorskip("timm")
    model = fcos.build("shapes", 3, backbone="timm", arch="resnet10t", frozen_stages=3).train()
    before = copy.deepcopy(model.state_dict())
    assert not next(model.backbone.parameters()).requires_grad
    images, sizes = fcos.pad_batch([picture(64, 96), picture(64, 96)])
    outputs = model(images, sizes)
    sum(outputs[part].sum() for part in ("cls", "ltrb", "ctr")).backward()
    frozen = [name for name in before if name.startswith("backbone.body.conv1.")]
    assert frozen
    assert all(before[name].equal(model.state_dict()[name]) for name in frozen)


@pytest.mark.parametrize(
    "arch, message",
    [
        ("no_such_model", "timm cannot create it"),
        ("hf-hub:someone/something", "expected the name of a timm model"),
        ("vit_tiny_patch16_224", "128x128"),
        ("xcit_nano_12_p8_224", "expected maps at strides 8, 16, 32"),
        ("focalnet_tiny_srf", "drops at random"),
    ],
)
def test_a_timm_model_that_does_not_fit_is_refused(arch, message):
    pytest.importorskip("timm")
    with pytest.raises(fcos.UserError, match=f"{arch}.*{message}"):
        fcos.build("shapes", 3, backbone="timm", arch=arch)


class ChannelsLast(torch.nn.Module):
    """Stands for models of timm that return maps (B, h, w, C) and have pretrained weights."""

    default_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def __init__(self, pretrained):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(3, 4 + n, 2**n, 2**n) for n in range(2, 6)
        )
        if pretrained:
            for layer in self.layers:
                torch.nn.init.ones_(layer.weight)
        self.feature_info = SimpleNamespace(
            reduction=lambda: [4, 8, 16, 32], channels=lambda: [6, 7, 8, 9]
        )

    def forward(self, x):
        return [layer(x).permute(0, 2, 3, 1) for layer in self.layers]


def test_maps_with_channels_last_and_pretrained_weights_on_request(monkeypatch):
    """Weights are downloaded for `--weights imagenet` only, not to build or load a model."""
    timm = pytest.importorskip("timm")
    requests = []

    def create_model(arch, pretrained, features_only):
        requests.append(pretrained)
        return ChannelsLast(pretrained)

    monkeypatch.setattr(timm, "create_model", create_model)
    dataset = SimpleNamespace(classes=["a", "b"], category_ids=[1, 2])
    keywords = fcos.model_keywords("shapes", dict(backbone="timm", arch="any"))
    for weights, pretrained in (("none", False), ("imagenet", True)):
        requests.clear()
        settings = {"keywords": keywords, "weights": weights, "seed": 0, "model": "shapes"}
        model = train.make_model(settings, dataset)
        assert any(requests) == pretrained
        assert model.backbone.body.layers[0].weight.eq(1).all() == pretrained
        assert model.convention["mean"] == (127.5,) * 3
        assert len(model.predict(picture(64, 96))) == 1
    requests.clear()
    fcos.FCOS(2, **model.keywords)  # as `fcos.load` does
    assert requests == [False]
