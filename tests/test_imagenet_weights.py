"""Weights of ImageNet classifiers in our backbones."""

import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    assert_refused,
    assert_same_backbone,
    assert_same_weights,
    randomise,
    small,
    thin,
)
from foreign import (
    AFFINE,
    GAMMA,
    INVERSE,
    backbone_file,
    detectron2,
    official,
    python2_pickle,
    renamed,
    resnet,
)
from torchvision.ops import FrozenBatchNorm2d

import fcos
import train
from fcos import UserError


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_caffe2_file_fills_the_backbone(wrapped, tmp_path):
    """Momenta, biases of convolutions and classifiers in the file are ignored, and reported."""
    blobs = backbone_file(randomise(thin()), AFFINE)
    assert len(blobs) == 53 + 2 * 53
    weights = [name for name in blobs if name.endswith("_w")]
    classifiers = ("fc1000_w", "fc1000_b", "pred_w", "pred_b", "lr")
    ignored = {f"{name}_momentum": value for name, value in blobs.items()}
    ignored |= {f"{name.removesuffix('_w')}_b": np.zeros(len(blobs[name])) for name in weights}
    ignored |= {name: np.ones((4, 1)) for name in classifiers}
    ignored |= {f"{name}_momentum": np.ones((4, 1)) for name in classifiers}
    names = {"conv1_b", "res3_0_branch1_b", "res5_2_branch2c_b", "res_conv1_bn_s_momentum"}
    assert names < set(ignored)
    path = tmp_path / "R-50.pkl"
    if wrapped:  # as Detectron writes detectors, pickled by Python 3
        ignored["weight_order"] = "conv1_w res2_0_branch2a_w"
        content = {"blobs": ignored | blobs, "cfg": "MODEL: retinanet"}
        path.write_bytes(pickle.dumps(content))
    else:
        ignored["weight_order"] = np.arange(3.0)
        path.write_bytes(python2_pickle(ignored | blobs))
    model = thin()
    head = model.head.cls_tower[0].conv.weight.clone()
    report = fcos.load_weights(model, path)
    assert report["family"] == "caffe2"
    assert set(report["ignored"]) == set(ignored)
    assert len(report["loaded"]) == 53 + 4 * 53  # mean and variance of an affine norm included
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
    assert model.convention["bgr"]
    assert model.convention["std"] == (1.0, 1.0, 1.0)
    assert model.convention["bn_eps"] == 0
    assert not model.convention["inclusive"]


@pytest.mark.parametrize("name", ["fcos_R_50_FPN", "fcos_imprv_dcnv2_X_101_32x8d_FPN"])
@pytest.mark.parametrize("norms", [AFFINE, GAMMA, INVERSE], ids=["affine", "gamma", "inverse"])
def test_backbones_of_caffe2_and_detectron2_bring_their_pixels(name, norms, tmp_path):
    model = randomise(small(name))
    other = small(name)
    extra = {"fc1000_w": np.zeros((2, 2)), "conv1_b": np.zeros(64), "res2_0_branch2a_b": np.ones(1)}
    state = backbone_file(model, norms, **extra)
    if norms == AFFINE:
        for norm in (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
    content = {"blobs": state} if norms == AFFINE else {"model": state, "__author__": "MSRA"}
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump(content, file, protocol=2)
    report = fcos.load_weights(other, tmp_path / "R-50.pkl")
    assert report["family"] == ("caffe2" if norms == AFFINE else "detectron2")
    assert set(report["ignored"]) == set(extra)
    assert_same_backbone(other, model)
    assert other.convention["bgr"]
    assert other.convention["bn_eps"] == (0 if norms == AFFINE else 1e-5)
    assert other.convention["mean"][0] == (102.9801 if norms == AFFINE else 103.53)
    scaled = norms != AFFINE and "32x8d" in name
    assert other.convention["std"] == ((57.375, 57.12, 58.395) if scaled else (1, 1, 1))
    with pytest.raises(UserError, match="expected a detector, found an ImageNet classifier"):
        fcos.load(tmp_path / "R-50.pkl", name)


@pytest.mark.parametrize(
    "arch, keywords",
    [
        ("resnet50", {}),
        ("resnet18", dict(block="basic", blocks=(2, 2, 2, 2))),
        ("resnet34", dict(block="basic", blocks=(3, 4, 6, 3))),
    ],
)
def test_a_resnet_of_torchvision_gives_its_features(arch, keywords):
    torch.manual_seed(0)
    theirs = randomise(torchvision.models.get_model(arch, weights=None)).eval()
    model = fcos.build("fcos_torchvision_R_50_FPN", **keywords).eval()
    report = fcos.load_weights(model, theirs.state_dict())
    assert model.convention["grid"] == "corner"
    assert_torchvision_report(report, model)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        found = model.backbone(x)
        c1 = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        c3 = theirs.layer2(theirs.layer1(c1))
        c4 = theirs.layer3(c3)
        assert_same_features(found[-3:], [c3, c4, theirs.layer4(c4)])


def test_a_mobilenet_of_torchvision_gives_its_features():
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(weights=None).eval()
    model = fcos.build("fcos_bn_MNV2_FPN").eval()
    report = fcos.load_weights(model, theirs.state_dict())
    assert model.convention["grid"] == "centre"
    assert_torchvision_report(report, model)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        found = model.backbone(x)
        features = [x]
        for layer in theirs.features:
            features.append(layer(features[-1]))
        assert_same_features(found[-3:], [features[7], features[14], features[18]])


def assert_torchvision_report(report, model):
    """Check that the pixels are torchvision's, and that all of the backbone was loaded."""
    assert report["convention"] == model.convention
    assert not model.convention["bgr"]
    assert model.convention["mean"] == (123.675, 116.28, 103.53)
    for key in report["ignored"]:
        of_backbone = key.startswith(("layer", "features.1.", "conv1", "bn1"))
        assert not of_backbone or key.endswith("num_batches_tracked"), key


def assert_same_features(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_the_mobilenet_file_of_the_official_recipe_fills_the_backbone():
    model = randomise(fcos.build("fcos_bn_MNV2_FPN"))
    other = fcos.build("fcos_bn_MNV2_FPN")
    state = {
        key.removeprefix("backbone.body."): value
        for key, value in renamed(model, official).items()
        if ".features." in key
    }
    extra = {"features.18.0.weight": torch.zeros(9, 320, 1, 1), "classifier.weight": torch.ones(2)}
    report = fcos.load_weights(other, state | extra)
    assert report["family"] == "mobilenet"
    assert set(report["ignored"]) == extra.keys()
    assert_same_backbone(other, model)
    assert other.convention == fcos.CONVENTION  # the pixels of the official recipe


def test_a_torchvision_backbone_in_names_of_detectron2_is_read():
    model = small("fcos_torchvision_R_50_FPN")
    other = small("fcos_torchvision_R_50_FPN")
    state = {
        detectron2(name): value.numpy()
        for name, value in randomise(model).state_dict().items()
        if "backbone." in name
    }
    state["stem.fc.weight"] = np.zeros((2, 2), np.float32)
    report = fcos.load_weights(other, {"model": state, "__author__": "torchvision"})
    assert report["ignored"] == ["stem.fc.weight"]
    assert not other.convention["bgr"]
    assert_same_backbone(other, model)


def test_backbones_that_differ_from_the_model_are_refused():
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
    """A new backbone with what FCOS and its loading of weights require of a class."""

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
    monkeypatch.setitem(fcos.FAMILIES, "own", (r"trunk\.stem\.conv\.weight", convention))
    model = fcos.build("own", 2, channels=32)
    assert (
        model.keywords.items()
        >= dict(backbone="steps", width=4, norm="gn", frozen_stages=2, channels=32).items()
    )
    assert all(p.eq(1).all() for p in model.backbone.parameters() if p.ndim == 4)
    trainable = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trainable == {"last.weight", "last.bias"}
    with pytest.raises(ValueError, match="'blocks': expected one of.*width, norm"):
        fcos.build("own", blocks=(1,))

    other = randomise(fcos.build("own", 2, channels=32))
    state = {f"trunk.{name}": value for name, value in other.backbone.state_dict().items()}
    report = fcos.load_weights(model, state | {"classifier.weight": torch.ones(2)})
    assert report["family"] == "own"
    assert report["ignored"] == ["classifier.weight"]
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


def find(name):
    """Return the file that `--weights imagenet` means for a model."""
    return train.find_weights("imagenet", fcos.resolve(fcos.MODELS[name]))


def test_imagenet_weights_that_torchvision_lacks_are_refused():
    for name in ("fcos_imprv_R_50_FPN", "fcos_imprv_dcnv2_R_101_FPN"):
        with pytest.raises(UserError, match="Caffe-style rows .stride in the 1x1.*README"):
            find(name)
    assert_refused(lambda: fcos.hub_file("imagenet", "resnet5"), "'resnet5'", "torchvision has no")


def test_a_failed_download_names_url_and_folder(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    "name, start",
    [
        ("fcos_imprv_dcnv2_X_101_32x8d_FPN", "resnext101_32x8d-"),
        ("fcos_bn_MNV2_FPN", "mobilenet_v2-"),
    ],
)
def test_imagenet_weights_are_downloaded_once(name, start, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: calls.append(args))
    path = find(name)
    assert path.parent == tmp_path / "checkpoints"
    assert path.name.startswith(start)
    url, target, digest = calls.pop()
    assert target == str(path)
    assert f"-{digest}.pth" in url
    path.touch()
    assert find(name) == path
    assert not calls
