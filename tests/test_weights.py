"""Weights in and out of a model: everyone's files, ours, and files that are broken or hostile.

The models are as deep as those of the paper, but thin. That official weights land where they
belong is proved by the recorded outputs in test_fcos.py.
"""

import argparse
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch

import fcos

THIN = dict(stem=8, channels=32)


def thin_model(num_classes=3, name="fcos_imprv_R_50_FPN", **overrides):
    torch.manual_seed(0)
    return fcos.build(name, num_classes, **{**THIN, **overrides})


def official_name(name):
    """The name that the official code gives to one of our parameters."""
    for pattern, replacement in [
        (r"^backbone\.stem\.conv", "backbone.body.stem.conv1"),
        (r"^backbone\.stem\.norm", "backbone.body.stem.bn1"),
        (r"^backbone\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}"),
        (r"\.conv(\d)\.conv\.", r".conv\1."), (r"\.conv(\d)\.norm\.", r".bn\1."),
        (r"\.down\.conv\.", ".downsample.0."), (r"\.down\.norm\.", ".downsample.1."),
        (r"^fpn\.lateral(\d)", lambda m: f"backbone.fpn.fpn_inner{int(m[1]) - 1}"),
        (r"^fpn\.output(\d)", lambda m: f"backbone.fpn.fpn_layer{int(m[1]) - 1}"),
        (r"^fpn\.", "backbone.fpn.top_blocks."),
        (r"^head\.", "rpn.head."), (r"\.box_tower\.", ".bbox_tower."),
        (r"_tower\.(\d)\.conv", lambda m: f"_tower.{3 * int(m[1])}"),
        (r"_tower\.(\d)\.norm", lambda m: f"_tower.{3 * int(m[1]) + 1}"),
        (r"head\.cls\.", "head.cls_logits."), (r"head\.box\.", "head.bbox_pred."),
        (r"head\.ctr\.", "head.centerness."), (r"head\.scale\.(\d)$", r"head.scales.\1.scale"),
    ]:  # fmt: skip
        name = re.sub(pattern, replacement, name)
    return name


def official_dict(model):
    """An official state dict with new values for all of this model."""
    generator = torch.Generator().manual_seed(1)
    return {official_name(name): torch.rand(value.shape, generator=generator)
            for name, value in model.state_dict().items()}  # fmt: skip


def assert_holds(model, official):
    for name, value in model.state_dict().items():
        assert value.equal(official[official_name(name)]), name


def assert_refused(call, *said):
    """One line without the words of a traceback, that says all of these."""
    with pytest.raises(fcos.UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 600
    for text in said:
        assert str(text) in message, message


# ---- official checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_official_checkpoint_with_and_without_wrapping(prefix, wrapped, tmp_path):
    model = thin_model()
    official = official_dict(model)
    content = {prefix + key: value for key, value in official.items()}
    if wrapped:
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
        content = {"model": content, "optimizer": optimizer, "scheduler": {}, "iteration": 90_000}
    torch.save(content, tmp_path / "model_final.pth")
    for source in (content, tmp_path / "model_final.pth", str(tmp_path / "model_final.pth")):
        model = thin_model()
        report = fcos.load_weights(model, source)
        assert report["family"] == "official"
        assert not report["missing"] and not report["ignored"]
        assert sorted(report["loaded"]) == sorted(model.state_dict())
        assert_holds(model, official)


def test_official_weights_bring_their_convention():
    model = thin_model(norm="frozen")
    model.set_convention(bgr=False, mean=(0.0, 0.0, 0.0), std=(9.0, 9.0, 9.0), bn_eps=1e-5)
    fcos.load_weights(model, official_dict(model))
    assert model.convention == {
        "bgr": True, "mean": (102.9801, 115.9465, 122.7717), "std": (1.0, 1.0, 1.0),
        "bn_eps": 0.0, "inclusive": True, "grid": "centre", "score": "fcos",
    }  # fmt: skip
    assert model.pixel_mean.flatten().tolist() == pytest.approx([102.9801, 115.9465, 122.7717])
    assert model.pixel_std.flatten().tolist() == [1, 1, 1]
    assert {m.eps for m in model.modules() if isinstance(m, fcos.FrozenBatchNorm)} == {0.0}


def test_load_names_the_architecture_of_official_files(tmp_path, monkeypatch):
    monkeypatch.setitem(fcos.MODELS, "thin", fcos.MODELS["fcos_imprv_R_50_FPN"] | THIN)
    official = official_dict(fcos.build("thin"))
    torch.save({"model": official}, tmp_path / "official.pth")
    model = fcos.load(tmp_path / "official.pth", "thin")
    assert_holds(model, official)
    assert not model.training and model.num_classes == 80
    assert_refused(lambda: fcos.load(tmp_path / "official.pth"), "official.pth", "shapes", "thin")
    assert_refused(lambda: fcos.load(tmp_path / "official.pth", "fat"), "'fat'", "shapes")


def test_missing_and_unknown_keys_are_listed_and_nothing_is_changed():
    model = thin_model()
    official = official_dict(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del official["rpn.head.centerness.bias"]
    official["rpn.head.extra.weight"] = torch.zeros(3)
    assert_refused(
        lambda: fcos.load_weights(model, official),
        "fcos_imprv_R_50_FPN", "2 keys", "head.ctr.bias", "rpn.head.extra.weight",
    )  # fmt: skip
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.convention["inclusive"] is False


def test_wrong_depth_is_an_error():
    deep, shallow = thin_model(name="fcos_imprv_R_101_FPN"), thin_model()
    assert_refused(lambda: fcos.load_weights(shallow, official_dict(deep)), "layer3.6", "R_50")
    assert_refused(lambda: fcos.load_weights(deep, official_dict(shallow)), "res4.6", "R_101")


def test_wrong_shapes_are_named_with_both_shapes():
    official = official_dict(thin_model())
    official["rpn.head.bbox_pred.weight"] = torch.zeros(5, 32, 3, 3)
    assert_refused(
        lambda: fcos.load_weights(thin_model(), official),
        "head.box.weight", "(5, 32, 3, 3)", "(4, 32, 3, 3)",
    )  # fmt: skip


def test_another_number_of_classes_needs_finetune():
    official, model = official_dict(thin_model(80)), thin_model(3)
    assert_refused(lambda: fcos.load_weights(model, official), "head.cls", "(80,", "(3,")
    classifier = model.head.cls.weight.clone()
    report = fcos.load_weights(model, official, finetune=True)
    assert sorted(report["missing"]) == ["head.cls.bias", "head.cls.weight"]
    assert model.head.cls.weight.equal(classifier)
    assert model.head.box.weight.equal(official["rpn.head.bbox_pred.weight"])
    official["rpn.head.bbox_pred.weight"] = torch.zeros(5, 32, 3, 3)  # only classes may differ
    assert_refused(lambda: fcos.load_weights(model, official, finetune=True), "head.box.weight")


def test_finetune_keeps_a_classifier_that_fits():
    official = official_dict(thin_model())
    model = thin_model()
    assert not fcos.load_weights(model, official, finetune=True)["missing"]
    assert_holds(model, official)


# ---- Caffe2's ImageNet files -------------------------------------------------------------------


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
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
            + string(b"b") + b"tR(" + number(1) + b"(" + b"".join(map(number, array.shape)) + b"t"
            + dtype + b"I00\n" + string(array.tobytes()) + b"tb"
        )  # fmt: skip
    return b"\x80\x02}(" + items + b"u."


def caffe2_blobs(blocks=(3, 4, 6, 3), stem=8):
    """Blobs of R-50.pkl, thin: the network, and what else is in the file."""
    rng = np.random.default_rng(0)
    blobs = {"conv1_w": rng.random((stem, 3, 7, 7)), "conv1_b": np.zeros(stem),
             "fc1000_w": rng.random((10, 32 * stem)), "fc1000_b": rng.random(10),
             "conv1_w_momentum": rng.random((stem, 3, 7, 7))}  # fmt: skip

    def add(name, c_out, c_in, kernel):
        blobs[f"{name}_w"] = rng.random((c_out, c_in, kernel, kernel))
        blobs[f"{name}_b"] = rng.random(c_out)
        blobs[f"{name}_bn_s"], blobs[f"{name}_bn_b"] = rng.random(c_out), rng.random(c_out)

    blobs["res_conv1_bn_s"], blobs["res_conv1_bn_b"] = rng.random(stem), rng.random(stem)
    c_in = stem
    for stage, depth in enumerate(blocks):
        c_mid, c_out = stem * 2**stage, 4 * stem * 2**stage
        for i in range(depth):
            block = f"res{stage + 2}_{i}_branch"
            add(block + "2a", c_mid, c_in, 1)
            add(block + "2b", c_mid, c_mid, 3)
            add(block + "2c", c_out, c_mid, 1)
            if i == 0:
                add(block + "1", c_out, c_in, 1)
            c_in = c_out
    return {name: value.astype(np.float32) for name, value in blobs.items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_caffe2_file_fills_the_backbone(wrapped, tmp_path):
    blobs, path = caffe2_blobs(), tmp_path / "R-50.pkl"
    path.write_bytes(python2_pickle(blobs))
    if wrapped:  # as Detectron's own detectors, and as Python 3 pickles
        path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: retinanet"}))
    model = thin_model()
    head = model.head.cls_tower[0].conv.weight.clone()
    report = fcos.load_weights(model, path)
    assert report["family"] == "caffe2"
    state = model.backbone.state_dict()
    for name, blob in {
        "stem.conv.weight": "conv1_w", "stem.norm.bias": "res_conv1_bn_b",
        "res2.0.conv1.conv.weight": "res2_0_branch2a_w",
        "res2.0.down.conv.weight": "res2_0_branch1_w",
        "res3.0.down.norm.weight": "res3_0_branch1_bn_s",
        "res4.5.conv2.norm.bias": "res4_5_branch2b_bn_b",
        "res5.2.conv3.conv.weight": "res5_2_branch2c_w",
        "res5.2.conv3.norm.weight": "res5_2_branch2c_bn_s",
    }.items():  # fmt: skip
        assert state[name].equal(torch.from_numpy(blobs[blob])), name
    unused = {name for name in blobs if re.search(r"(conv1|branch\d[abc]?|fc1000)_b$", name)}
    assert set(report["ignored"]) == unused | {"fc1000_w", "conv1_w_momentum"}
    assert len(blobs) - len(report["ignored"]) == 53 + 2 * 53
    assert len(report["loaded"]) == 53 + 4 * 53  # with the mean and variance of an affine norm
    missing = {name.split(".")[0] for name in report["missing"]}
    assert missing == {"fpn", "head"}
    assert model.head.cls_tower[0].conv.weight.equal(head)
    for name, value in model.backbone.named_buffers():
        if "running" in name:
            assert value.eq("var" in name).all(), name
    assert model.convention["bgr"] and model.convention["std"] == (1.0, 1.0, 1.0)
    assert model.convention["bn_eps"] == 0 and not model.convention["inclusive"]


def test_caffe2_file_of_another_depth_is_an_error(tmp_path):
    (tmp_path / "R-101.pkl").write_bytes(python2_pickle(caffe2_blobs((3, 4, 23, 3))))
    (tmp_path / "R-50.pkl").write_bytes(python2_pickle(caffe2_blobs()))
    deep = thin_model(name="fcos_imprv_R_101_FPN")
    assert_refused(lambda: fcos.load_weights(deep, tmp_path / "R-50.pkl"), "R-50.pkl", "res4.6")
    assert_refused(lambda: fcos.load_weights(thin_model(), tmp_path / "R-101.pkl"), "res4_6")


def test_caffe2_file_does_not_fit_group_norm():
    assert_refused(lambda: fcos.load_weights(thin_model(norm="gn"), caffe2_blobs()), "GroupNorm")


def test_caffe2_file_of_another_width_is_an_error():
    assert_refused(lambda: fcos.load_weights(thin_model(stem=16), caffe2_blobs()), "(8,", "(16,")


# ---- our own checkpoints -----------------------------------------------------------------------


def found_in(model):
    torch.manual_seed(2)
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        return model.eval()(images, torch.tensor([[64, 96], [50, 60]]))


@pytest.mark.parametrize("name, overrides", [
    ("shapes", {}), ("fcos_R_50_FPN", THIN), ("fcos_imprv_X_101_32x8d_FPN", {"channels": 32}),
    ("fcos_imprv_R_50_FPN", {**THIN, "norm": "bn", "frozen_stages": 0, "radius": 2.5}),
])  # fmt: skip
def test_saved_model_comes_back_whole(name, overrides, tmp_path):
    if name == "fcos_imprv_X_101_32x8d_FPN":  # its groups, thin
        overrides = {**overrides, "stem": 8, "groups": 4, "width": 2}
    torch.manual_seed(0)
    model = fcos.build(name, 3, **overrides)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    model.set_convention(inclusive=True, bgr=False, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0),
                         bn_eps=1e-3)  # fmt: skip
    model.classes, model.category_ids = ["cat", "dög", "tree"], [1, 7, 90]
    model.test_size = (320, 533)
    expected = found_in(model)
    fcos.save(model.train(), tmp_path / "model.pt")

    loaded = fcos.load(tmp_path / "model.pt")
    assert not loaded.training
    for attribute in ("name", "num_classes", "overrides", "classes", "category_ids", "test_size",
                      "convention", "radius", "loss"):  # fmt: skip
        assert getattr(loaded, attribute) == getattr(model, attribute), attribute
    found = found_in(loaded)
    assert all(found[part].equal(expected[part]) for part in ("cls", "ltrb", "ctr"))
    assert fcos.load(tmp_path / "model.pt", name).name == name
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_loading_under_another_name_is_an_error(tmp_path):
    fcos.save(fcos.build("shapes", 2), tmp_path / "model.pt")
    assert_refused(
        lambda: fcos.load(tmp_path / "model.pt", "fcos_R_50_FPN"), "model.pt", "shapes",
        "fcos_R_50_FPN",
    )  # fmt: skip


def test_own_weights_fill_a_model_and_bring_their_convention(tmp_path):
    model = fcos.build("shapes", 2)
    model.set_convention(inclusive=True)
    fcos.save(model, tmp_path / "model.pt")
    for source in (tmp_path / "model.pt", fcos.checkpoint(model)):
        other = fcos.build("shapes", 2)
        report = fcos.load_weights(other, source)
        assert report["family"] == "fcos" and not report["missing"] + report["ignored"]
        assert other.convention == model.convention
        assert all(v.equal(model.state_dict()[k]) for k, v in other.state_dict().items())
    other = fcos.build("shapes", 2)
    assert not fcos.load_weights(other, model.state_dict())["missing"]  # without what is around it


def test_own_weights_start_a_model_of_other_classes(tmp_path):
    fcos.save(fcos.build("shapes", 6), tmp_path / "model.pt")
    model = fcos.build("shapes", 2)
    assert_refused(lambda: fcos.load_weights(model, tmp_path / "model.pt"), "head.cls", "(6,")
    report = fcos.load_weights(model, tmp_path / "model.pt", finetune=True)
    assert sorted(report["missing"]) == ["head.cls.bias", "head.cls.weight"]


def test_the_trainers_checkpoint_is_a_model_too(tmp_path):
    model = fcos.build("shapes", 2)
    content = {"settings": {}, "step": 7, "model": fcos.checkpoint(model), "optimizer": {}}
    torch.save(content, tmp_path / "last.pt")
    fcos.load_weights(fcos.build("shapes", 2), tmp_path / "last.pt")
    assert fcos.load(tmp_path / "last.pt").name == "shapes"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_save_leaves_the_old_file_when_it_fails(error, tmp_path, monkeypatch):
    model = fcos.build("shapes", 2)
    fcos.save(model, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def fail(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((fcos.UserError, KeyboardInterrupt)):
        fcos.save(model, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_checkpoint_is_plain_values_and_tensors(tmp_path):
    fcos.save(fcos.build("shapes", 2), tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["name"] == "shapes" and content["num_classes"] == 2
    assert all(type(key) is str for key in content)


# ---- files that are something else -------------------------------------------------------------


def both(model, path):
    """The two ways in."""
    return [lambda: fcos.load_weights(model, path), lambda: fcos.load(path)]


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"hello, this is no checkpoint\n" * 9,
                                     b"\x80\x02", b"PK\x03\x04 and no zip", b"<html>404</html>"],
                         ids=["empty", "zeros", "text", "start", "zip", "html"])  # fmt: skip
def test_junk_is_named(content, suffix, tmp_path):
    path = tmp_path / f"junk.{suffix}"
    path.write_bytes(content)
    for call in both(fcos.build("shapes", 2), path):
        assert_refused(call, path, "not a checkpoint, or a damaged one")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_torn_checkpoint_is_named(share, tmp_path):
    fcos.save(fcos.build("shapes", 2), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[: int(share * len(content))])
    (tmp_path / "torn.pkl").write_bytes(python2_pickle(caffe2_blobs())[: int(share * 100_000)])
    for name in ("torn.pt", "torn.pkl"):
        for call in both(fcos.build("shapes", 2), tmp_path / name):
            assert_refused(call, name, "not a checkpoint, or a damaged one")


def test_missing_file_and_folder_are_named(tmp_path):
    for call in both(fcos.build("shapes", 2), tmp_path / "nowhere.pth"):
        assert_refused(call, tmp_path / "nowhere.pth", "No such file")
    for call in both(fcos.build("shapes", 2), tmp_path):
        assert_refused(call, tmp_path, "Is a directory")


@pytest.mark.parametrize("content, said", [
    ([1, 2, 3], "list"), (torch.zeros(3), "Tensor"), ({0: torch.zeros(3)}, "dict"), ({}, "none"),
    ({"conv1.weight": torch.zeros(3)}, "conv1.weight"), ({"model": {}}, "none"),
    ({"model": {"backbone.conv1.weight": torch.zeros(3)}}, "backbone.conv1.weight"),
    ({"head.cls.weight": "text"}, "head.cls.weight"),
    ({"res_conv1_bn_s": np.zeros(3, dtype=object)}, "res_conv1_bn_s"),
    ({"name": "shapes", "overrides": {}, "convention": {}}, "name"),
], ids=str)  # fmt: skip
def test_other_contents_are_named(content, said, tmp_path):
    path = tmp_path / ("other.pkl" if said == "res_conv1_bn_s" else "other.pt")
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert_refused(lambda: fcos.load_weights(fcos.build("shapes", 2), path), path)
    assert_refused(lambda: fcos.load(path), path)
    assert_refused(lambda: fcos.load(path, "shapes"), path, said)


@pytest.mark.parametrize("changes, said", [
    ({"overrides": {"depth": 1}}, "depth"), ({"name": "fcos_R_9_FPN"}, "fcos_R_9_FPN"),
], ids=str)  # fmt: skip
def test_own_checkpoint_of_a_model_that_is_unknown_here(changes, said, tmp_path):
    torch.save(fcos.checkpoint(fcos.build("shapes", 2)) | changes, tmp_path / "model.pt")
    assert_refused(lambda: fcos.load(tmp_path / "model.pt"), tmp_path / "model.pt", said)


class Program:
    """An object whose unpickling creates a file."""

    def __init__(self, function, path):
        self.function, self.path = function, path

    def __reduce__(self):
        return self.function, (self.path,)


def touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_program_in_a_file_is_refused_by_name_and_not_run(suffix, tmp_path):
    for number, (function, argument, name) in enumerate([
        (os.system, f"touch {tmp_path}/ran", r"(posix|nt)\.system"),
        (eval, f"open({str(tmp_path / 'ran')!r}, 'w')", "eval"),
        (touch, str(tmp_path / "ran"), r"test_weights\.touch"),
        (np.load, str(tmp_path / "ran"), r"numpy.*load"),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.{suffix}"
        content = {"conv1_w": Program(function, argument), "res_conv1_bn_s": 1}
        if suffix == "pkl":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save({"model": content}, path)
        for call in both(fcos.build("shapes", 2), path):
            with pytest.raises(fcos.UserError, match=rf"{path.name}: refused.*{name}.*state dict"):
                call()
        assert not (tmp_path / "ran").exists()


def test_a_namespace_is_refused_by_name(tmp_path):
    content = {"model": {"head.cls.weight": torch.zeros(3)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "theirs.pth")
    for call in both(fcos.build("shapes", 2), tmp_path / "theirs.pth"):
        assert_refused(call, "theirs.pth", "refused", "argparse.Namespace", "state dict")


def test_pickled_arrays_of_every_kind_are_admitted(tmp_path):
    content = {"a": np.float32(1), "b": np.arange(3), "c": np.zeros((1, 2), np.float16),
               "d": np.array(["text"]), "e": [1, "x", None, 2.5, True], "f": np.asfortranarray(
                   np.ones((2, 3)))}  # fmt: skip
    for protocol in (2, 4):
        (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        read = fcos.read_checkpoint(tmp_path / "arrays.pkl")
        assert str(read) == str(content)
