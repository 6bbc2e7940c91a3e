"""Weights of other projects in our models.

test_network.py compares the outputs of official weights with recorded ones.
"""

import copy
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
import torchvision
from coco_files import run_evaluate
from conftest import (
    SHARED,
    THIN,
    assert_refused,
    assert_same_weights,
    objects,
    randomise,
    small,
    thin,
)
from foreign import (
    AFFINE,
    adelaidet,
    backbone_file,
    mmdetection,
    official,
    python2_pickle,
    renamed,
    vision,
)
from golden.synth_image import image as synth_image
from golden.weights_recipe import make_weights
from torchvision.ops import FrozenBatchNorm2d

import fcos
from fcos import UserError

# ---- detectors of other families ---------------------------------------------------------------


def small_row(name):
    """Build the model of a row with few channels and blocks; block numbers may have two digits."""
    if "MNV2" in name:
        return fcos.build(name, blocks=(2,) * 7, stem=8, channels=32)
    blocks = (2, 2, 11, 2) if "R_101" in name else (2, 2, 2, 2)
    return fcos.build(name, blocks=blocks, width=2, stem=8, channels=32)


@pytest.mark.parametrize("name", [name for name in fcos.MODELS if name not in ("small", "shapes")])
def test_detectors_of_other_families_fill_every_row(name):
    model = randomise(small_row(name))
    for rule in (official,) if "MNV2" in name else (official, adelaidet, mmdetection):
        other = small_row(name)
        report = fcos.load_weights(other, renamed(model, rule))
        assert report["family"] == rule.__name__
        assert not report["ignored"] + report["missing"]
        assert sorted(report["loaded"]) == sorted(model.state_dict())
        assert_same_weights(other, model)


@pytest.mark.parametrize("rule", [official, adelaidet, mmdetection])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_in_the_files_of_each_family(rule, prefix, tmp_path):
    model = randomise(small("fcos_imprv_dcnv2_R_50_FPN", **THIN))
    state = {prefix + key: value for key, value in renamed(model, rule).items()}
    if rule is mmdetection:
        content = {"state_dict": state, "meta": {}}
    else:
        momentum = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
        content = {"model": state, "iteration": 9, "scheduler": {}, "optimizer": momentum}
    path = tmp_path / "model_final.pth"
    torch.save(content, path)
    for source in (state, content, path, str(path)):
        other = small("fcos_imprv_dcnv2_R_50_FPN", **THIN)
        report = fcos.load_weights(other, source)
        assert report["family"] == rule.__name__
        assert not report["ignored"] + report["missing"]
        assert_same_weights(other, model)


def test_official_weights_replace_the_whole_convention():
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
    assert report["convention"] == expected
    assert model.convention == expected
    pixels = dict(
        pixel_mean=torch.tensor([123.5, 116, 103]).view(3, 1, 1),
        pixel_std=torch.tensor([58.0, 57, 56]).view(3, 1, 1),
    )
    report = fcos.load_weights(model, state | pixels)
    assert model.convention == expected | dict(bgr=False, mean=(123.5, 116, 103), std=(58, 57, 56))
    assert model.pixel_std.flatten().tolist() == [58, 57, 56]


@pytest.mark.parametrize("groups, std", [("64x4d", (1, 1, 1)), ("32x8d", (57.375, 57.12, 58.395))])
def test_resnext_of_adelaidet_brings_the_deviation_of_its_backbone(groups, std):
    model = small(f"fcos_imprv_X_101_{groups}_FPN")
    fcos.load_weights(model, renamed(model, adelaidet))
    assert model.convention["std"] == std
    assert {m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)} == {1e-5}


def test_mmdetection_leaves_out_biases_before_a_norm():
    """Scales may be scalars, and the number of batches is ignored."""
    model = small("fcos_R_50_FPN")
    state = renamed(model, mmdetection)
    biases = [key for key in state if re.search(r"head\..*convs\.\d\.conv\.bias", key)]
    assert len(biases) == 8
    state = {key: value for key, value in state.items() if key not in biases}
    state |= {key: value.reshape(()) for key, value in state.items() if key.endswith(".scale")}
    state["backbone.bn1.num_batches_tracked"] = torch.tensor(3)
    randomise(model)
    report = fcos.load_weights(model, {"state_dict": state, "meta": {"CLASSES": ("a",)}})
    assert report["ignored"] == ["backbone.bn1.num_batches_tracked"]
    assert not model.head.cls_tower[2].conv.bias.any()
    assert model.convention == fcos.CONVENTION | dict(bn_eps=1e-5, score="mmdetection")


def test_old_names_of_mmdetection_are_read():
    model = small("fcos_imprv_R_50_FPN")
    state = {
        re.sub("conv_(cls|reg|centerness)", r"fcos_\1", key): value
        for key, value in renamed(model, mmdetection).items()
    }
    assert "bbox_head.fcos_cls.weight" in state
    assert not fcos.load_weights(model, state)["ignored"]


NEW_CONFIG = """data_preprocessor=dict(
    mean=[
        102.9801,
        115.9465,
        122.7717,
    ],
    std=[1.0, 1.0, 1.0],
    bgr_to_rgb=False,
"""
OLD_CONFIG = "img_norm_cfg = dict(\n    mean=[1.5, 2.5, 3.5], std=[4.5, 5.5, 6.5], to_rgb=True)"


@pytest.mark.parametrize(
    "meta, expected",
    [
        ({}, dict(bgr=True, mean=(103.53, 116.28, 123.675))),
        (
            {"cfg": NEW_CONFIG, "epoch": 12},
            dict(bgr=True, mean=(102.9801, 115.9465, 122.7717), std=(1, 1, 1)),
        ),
        ({"config": OLD_CONFIG}, dict(bgr=False, mean=(1.5, 2.5, 3.5), std=(4.5, 5.5, 6.5))),
    ],
    ids=["no configuration", "new", "old"],
)
def test_mmdetection_brings_the_pixels_of_its_configuration(meta, expected):
    model = small("fcos_imprv_R_50_FPN")
    fcos.load_weights(model, {"state_dict": renamed(model, mmdetection), "meta": meta})
    assert model.convention.items() >= expected.items()


def test_a_torchvision_backbone_of_mmdetection_has_torchvisions_pixels():
    model = small("fcos_torchvision_R_50_FPN", block="basic", scales=True)
    fcos.load_weights(model, renamed(model, mmdetection))
    assert model.convention["mean"] == (123.675, 116.28, 103.53)
    assert not model.convention["bgr"]


def test_torchvision_detects_the_same(tmp_path):
    """Both networks have the same weights, each read in the names of the other."""
    model = fcos.build("fcos_torchvision_R_50_FPN").eval()
    names = model.state_dict()
    weights = make_weights({official(name, names): value.shape for name, value in names.items()})
    weights = {name: torch.from_numpy(weights[official(name, names)]) for name in names}
    model.load_state_dict(weights)

    theirs = torchvision.models.detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=240, max_size=320
    ).eval()
    state = renamed(model, vision)
    for kind, unused in (("weight", 0.0), ("bias", -30.0)):  # 80 of 91 rows are classes
        key = f"head.classification_head.cls_logits.{kind}"
        rows = torch.full((91, *state[key].shape[1:]), unused)
        rows[list(fcos.COCO)] = state[key]
        state[key] = rows
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in key for key in missing)
    torch.save({"model": theirs.state_dict(), "epoch": 25}, tmp_path / "model_25.pth")
    assert len(theirs.state_dict()) == 372

    model = fcos.load(tmp_path / "model_25.pth")  # trained with batch norm
    assert model.name == "fcos_torchvision_R_50_FPN"
    assert model.classes[79] == "toothbrush"
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
        assert close.sum(0).eq(1).all()
        assert close.sum(1).eq(1).all()
        assert (found["scores"] > 0.2).all()


def test_points_of_torchvision_lie_at_corners_with_its_strides():
    """Its strides are whole quotients of the padded image and the map."""
    hw = 800, 1088
    points = fcos.make_points(hw, grid="corner")
    first = 0
    for (rows, columns), x, y in zip(
        fcos.level_sizes(hw), (8, 16, 32, 64, 120), (8, 16, 32, 61, 114)
    ):
        assert points[first, :2].tolist() == [0, 0]
        assert points[first + 1, 0] == x
        assert points[first + columns, 1] == y
        first += rows * columns
    model = small("fcos_torchvision_R_50_FPN")
    outputs = model(torch.zeros(1, 3, 128, 192, dtype=torch.uint8), [(128, 192)])
    assert outputs["points"].equal(fcos.make_points((128, 192), grid="corner"))
    targets = model.targets((64, 64), [objects((0, 0, 16, 16, 1))])
    assert targets["ltrb"][targets["labels"] == 1].tolist() == [[8, 8, 8, 8]]


@pytest.fixture
def numbered_rows():
    """Return a state dict of torchvision with 91 classes; the values of each row are its number."""
    state = renamed(randomise(small("fcos_torchvision_R_50_FPN", 2)), vision)
    for kind in ("weight", "bias"):
        key = f"head.classification_head.cls_logits.{kind}"
        shape = state[key].shape[1:]
        state[key] = torch.arange(91.0).view(91, *[1] * len(shape)).expand(91, *shape)
    return state


def test_classes_of_torchvision_are_found_by_name(numbered_rows):
    model = small("fcos_torchvision_R_50_FPN", 2)
    with pytest.raises(UserError, match=r"head\.cls\.weight: .*found \(80, 32, 3, 3\)"):
        fcos.load_weights(model, numbered_rows)
    prior = model.head.cls.bias[0].item()
    report = fcos.load_weights(model, numbered_rows, ["unicorn", "cat"])
    assert model.head.cls.bias.tolist() == [prior, 17]
    assert report["new_classes"] == ["unicorn"]


def test_all_91_rows_of_torchvision_can_be_kept(numbered_rows):
    model = small("fcos_torchvision_R_50_FPN", 91)
    names = [f"c{n}" for n in range(90)] + ["cat"]
    assert fcos.load_weights(model, numbered_rows, names)["new_classes"] == names[:90]
    assert model.head.cls.bias[90] == 17
    assert model.classes is None
    fcos.load_weights(model, numbered_rows)
    assert model.head.cls.bias.tolist() == list(range(91))
    assert model.classes is None


def test_old_names_of_torchvision_are_read(numbered_rows):
    old = {re.sub(r"(blocks\.\d)\.0\.", r"\1.", key): x for key, x in numbered_rows.items()}
    assert old.keys() != numbered_rows.keys()
    assert not fcos.load_weights(small("fcos_torchvision_R_50_FPN", 91), old)["ignored"]


RAW = "fcos_syncbn_c128_MNV2_FPN"


@pytest.fixture(scope="module")
def raw_file(tmp_path_factory):
    """Return the path of a file of the official code, and its weights."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in renamed(fcos.build(RAW), official).items()}
    weights = {key: torch.from_numpy(value) for key, value in make_weights(shapes).items()}
    path = tmp_path_factory.mktemp("raw") / "raw.pth"
    torch.save({"model": weights}, path)
    return path, weights


def test_a_raw_file_and_a_name_give_a_model_with_classes(raw_file, tmp_path):
    path, weights = raw_file
    assert_refused(lambda: fcos.load(path), "does not say which model it is", "fcos_R_50_FPN")
    assert_refused(lambda: fcos.load(path, "fat"), "'fat'", "fcos_R_50_FPN", "shapes")
    loaded = fcos.load(path, RAW)
    assert not loaded.training
    assert loaded.num_classes == 80
    for key, value in renamed(loaded, official).items():
        assert value.equal(weights[key]), key
    assert loaded.classes[:2] == ["person", "bicycle"]
    assert loaded.category_ids[79] == 90
    assert len(set(loaded.classes)) == len(loaded.category_ids) == 80
    fcos.save(loaded, tmp_path / "model.pt")
    again = fcos.load(tmp_path / "model.pt")
    assert again.convention == loaded.convention
    assert again.classes == loaded.classes
    assert_same_weights(again, loaded)


def test_a_raw_file_without_80_classes_has_no_names(tmp_path):
    torch.save(renamed(fcos.build(RAW, 5), official), tmp_path / "raw.pth")
    loaded = fcos.load(tmp_path / "raw.pth", RAW)
    assert loaded.num_classes == 5
    assert loaded.classes is None


def test_evaluate_draws_with_the_classes_of_a_raw_file(raw_file, tmp_path, capsys):
    path, _ = raw_file
    photo = tmp_path / "photo.png"
    fcos.Image.fromarray(synth_image(1, 240, 320)).save(photo)
    out = tmp_path / "out"
    flags = f"--model {RAW} --device cpu --min-size 240 --score-threshold 0.1"
    run_evaluate(path, "--images", photo, "--out", out, *flags.split())
    (entry,) = json.loads((out / "detections.json").read_text())
    assert entry["detections"]
    assert {row["class"] for row in entry["detections"]} <= set(fcos.COCO.values())
    assert "'inclusive': True" in capsys.readouterr().err


def test_classes_are_those_of_coco(shared):
    file = next((shared / "data/coco2017_tiny/annotations").glob("*val*.json"))
    categories = json.loads(file.read_text())["categories"]
    assert {c["id"]: c["name"] for c in categories} == fcos.COCO


PREFIXES = ["module.", "_orig_mod.", "module.module.", "model.module._orig_mod.", "ema.", "net."]
WRAPPED = {  # ways in which programs store a state dict
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
    "inside": lambda state: {
        k.replace(".", "._orig_mod._checkpoint_wrapped_module.", 1): v for k, v in state.items()
    },
    "params": lambda state: {"model": {}, "params": state},
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("rule", [official, lambda name, names: name], ids=["official", "ours"])
def test_wrappers_of_every_kind_are_removed(how, rule):
    model = randomise(fcos.build("shapes", 3))
    other = fcos.build("shapes", 3)
    report = fcos.load_weights(other, WRAPPED[how](renamed(model, rule)))
    assert_same_weights(other, model)
    assert not report["missing"]
    assert all(key == "n_averaged" or key.startswith("teacher.") for key in report["ignored"])


def test_odd_keys_and_values_take_no_time():
    model = thin()
    state = renamed(model, official)
    start = time.process_time()
    assert_refused(lambda: fcos.load_weights(model, state | {"x" * 10**6: torch.ones(2)}), "1 keys")
    digits = f"rpn.head.cls_tower.{'1' * 10**5}.weight"
    assert_refused(lambda: fcos.load_weights(model, state | {digits: torch.ones(2)}), "1 keys")
    many = {f"{k}": k for k in range(10**5)}
    assert_refused(lambda: fcos.load_weights(model, state | many), "at most 20000")
    theirs = {"state_dict": renamed(model, mmdetection), "meta": {"cfg": "mean=[" * 10**6}}
    assert not fcos.load_weights(model, theirs)["missing"]
    assert time.process_time() - start < 20


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_weights_of_any_precision_are_read_if_they_fit_float32(kind):
    model = fcos.build("shapes", 2)
    state = {name: x.to(kind) for name, x in model.state_dict().items() if x.is_floating_point()}
    assert not fcos.load_weights(model, state)["missing"]
    state["head.cls.weight"] = state["head.cls.weight"].double() + 1e300
    assert_refused(lambda: fcos.load_weights(model, state), "head.cls.weight", "infinity")


def test_an_unknown_prefix_is_named():
    model = thin()
    state = {f"my.wrapper.{k}": v for k, v in renamed(model, official).items()}
    assert_refused(lambda: fcos.load_weights(model, state), "'my.wrapper.'", "remove")
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
    source = small(file)
    model = fcos.build(row) if "MNV2" in row else small(row)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"does not fit {row}: "):
        fcos.load_weights(model, renamed(source, rule))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_and_unknown_keys_are_named_and_nothing_is_changed():
    model = thin()
    state = renamed(model, adelaidet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convention = model.convention

    def assert_unchanged(state, *parts):
        assert_refused(lambda: fcos.load_weights(model, state), *parts)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())
        assert model.convention == convention

    incomplete = {key: value for key, value in state.items() if not key.endswith("ctrness.bias")}
    assert_unchanged(
        incomplete | {"iou_head.w": torch.ones(1)},
        "fcos_imprv_R_50_FPN",
        "2 keys are missing or unknown, among them",
        "head.ctr.bias",
        "iou_head.w",
    )
    twice = {"backbone.bottom_up.res2.0.down.conv.weight": torch.ones(32, 8, 1, 1)}
    assert_unchanged(state | twice, "1 keys", "res2.0.down.conv.weight")
    batch_norm_heads = {key.replace("tower.1.", "tower.1.0."): x for key, x in state.items()}
    assert_unchanged(batch_norm_heads, "tower.1.0.")
    shape = {"proposal_generator.fcos_head.bbox_pred.weight": torch.zeros(5, 32, 3, 3)}
    assert_unchanged(state | shape, "head.box.weight", "(5, 32, 3, 3)", "(4, 32, 3, 3)")
    assert_unchanged({"encoder.weight": torch.ones(1)}, "expected weights of fcos")


def test_another_depth_is_refused(tmp_path):
    deep = thin(name="fcos_imprv_R_101_FPN")
    shallow = thin()
    load = fcos.load_weights
    assert_refused(lambda: load(shallow, renamed(deep, official)), "layer3.6", "R_50")
    assert_refused(lambda: load(deep, renamed(shallow, official)), "res4.6", "R_101")
    for name, model in (("R-101", deep), ("R-50", shallow)):
        (tmp_path / f"{name}.pkl").write_bytes(python2_pickle(backbone_file(model, AFFINE)))
    assert_refused(lambda: load(deep, tmp_path / "R-50.pkl"), "R-50.pkl", "res4.6")
    assert_refused(lambda: load(shallow, tmp_path / "R-101.pkl"), "R-101.pkl", "res4_6")


@pytest.mark.parametrize("rule", [official, lambda name, names: name], ids=["official", "ours"])
def test_classes_of_the_same_name_keep_their_weights(rule):
    detector = randomise(thin(80))
    model = thin()
    state = renamed(detector, rule)
    box = rule("head.box.weight", model.state_dict())
    assert_refused(lambda: fcos.load_weights(model, state), "head.cls", "(80,", "(3,", "classes")
    before = copy.deepcopy(model.head.cls)
    report = fcos.load_weights(model, state, ["zebra", "cell", "person"])
    assert report["new_classes"] == ["cell"]
    assert not report["missing"]
    rows = [list(fcos.COCO.values()).index(name) for name in ("zebra", "person")]
    for name, value in model.head.cls.state_dict().items():
        assert value[[0, 2]].equal(detector.head.cls.state_dict()[name][rows])
        assert value[1].equal(before.state_dict()[name][1])
    assert model.head.box.weight.equal(state[box])
    assert_refused(lambda: fcos.load_weights(model, state, ["zebra"]), "1 classes for 3 rows")
    reordered = thin(80)
    fcos.load_weights(reordered, state, list(fcos.COCO.values())[::-1])
    assert reordered.head.cls.bias.equal(detector.head.cls.bias.flip(0))
    assert reordered.classes is None
    state[box] = torch.zeros(5, 32, 3, 3)  # only classes may differ
    assert_refused(lambda: fcos.load_weights(model, state, ["a", "b", "c"]), "head.box.weight")


def test_as_many_classes_without_names_are_kept():
    model = thin()
    source = randomise(thin(), 1)
    state = renamed(source, official)
    assert not fcos.load_weights(model, state, ["a", "b", "c"])["new_classes"]
    assert_same_weights(model, source)


@pytest.mark.parametrize(
    "name, value",
    [
        ("head.cls.bias", torch.zeros(())),
        ("head.cls.bias", torch.zeros(4)),
        ("head.cls.weight", torch.zeros(3)),
        ("head.cls.weight", torch.zeros(1).expand(10**9, 32, 3, 3)),
        ("head.cls.weight", torch.zeros(1).expand(3, 32, 3, 10**9)),
        ("head.cls.weight", torch.zeros(1).as_strided((1,) * 3000, (1,) * 3000)),
    ],
    ids=lambda value: str(value if isinstance(value, str) else tuple(value.shape))[:40],
)
def test_a_classifier_of_an_odd_shape_is_refused(name, value):
    model = thin()
    state = thin().state_dict() | {name: value}
    assert_refused(lambda: fcos.load_weights(model, state), name, str(tuple(value.shape))[:18])
    assert_refused(lambda: fcos.load_weights(model, state, ["a", "b", "c"]))


def test_classes_are_found_by_the_names_in_our_checkpoints(tmp_path):
    cells = randomise(thin())
    cells.classes = ["red", "white", "platelet"]
    cells.category_ids = [1, 2, 3]
    fcos.save(cells, tmp_path / "cells.pt")
    model = thin(2)
    report = fcos.load_weights(model, tmp_path / "cells.pt", ["platelet", "red"])
    assert not report["new_classes"]
    assert model.head.cls.bias.equal(cells.head.cls.bias[[2, 0]])
    other = thin(3)  # as many classes, but no name is known
    prior = other.head.cls.bias.clone()
    report = fcos.load_weights(other, tmp_path / "cells.pt", ["a", "b", "c"])
    assert report["new_classes"] == ["a", "b", "c"]
    assert other.head.cls.bias.equal(prior)


# ---- other models and files -------------------------------------------------------------------


def test_the_real_time_model_has_three_levels_and_frozen_norms_in_frozen_stages():
    model = fcos.build("fcos_rt_R_50_FPN", 3)
    counts = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
    assert len(counts) == 42
    assert not any(key.startswith("backbone.res2") for key in counts)
    model.train()
    mean = model.backbone.res2[0].conv1.norm.running_mean.clone()
    outputs = model(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    assert outputs["levels"] == [96, 24, 6]
    assert outputs["points"][:, 4].unique().tolist() == [64, 128, math.inf]
    assert model.backbone.res2[0].conv1.norm.running_mean.equal(mean)


def test_coco_is_downloaded_from_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    calls = []

    def fail(url, path, digest):
        calls.append((url, path, digest))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert_refused(lambda: fcos.load("coco"), "download https://", "checkpoints", "no network")
    ((url, path, digest),) = calls
    assert Path(path).parent == tmp_path / "checkpoints"
    assert digest in url

    state = renamed(fcos.build("fcos_torchvision_R_50_FPN", 91), vision)
    bias = torch.arange(91.0)
    state["head.classification_head.cls_logits.bias"] = bias
    save = lambda url, path, digest: torch.save(state, path)  # noqa: E731
    monkeypatch.setattr(torch.hub, "download_url_to_file", save)
    model = fcos.load("coco")
    assert model.num_classes == 80
    assert model.classes[0] == "person"
    assert not model.training
    assert model.head.cls.bias.equal(bias[list(fcos.COCO)])
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    fcos.load("coco")
    assert len(calls) == 1  # the file is there
