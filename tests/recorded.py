"""Read recordings of the official code, and compare results with them.

golden/ holds the small sets; ../shared/golden, where it is present, the full ones. Official labels
are ours + 1. Official boxes are inclusive: their x2 is ours - 1.
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from foreign import official
from golden.weights_recipe import make_weights

import fcos

GOLDEN = Path(__file__).parent / "golden"
RECORDED = {  # model: its recording
    "fcos_imprv_R_50_FPN": "fcos_imprv_R_50_FPN_1x",
    "fcos_R_50_FPN": "fcos_R_50_FPN_1x",
    "fcos_imprv_dcnv2_R_50_FPN": "fcos_imprv_dcnv2_R_50_FPN_1x",
    "fcos_syncbn_c128_MNV2_FPN": "fcos_syncbn_bs32_c128_MNV2_FPN_1x",
}


def read_golden(path):
    """Return the facts (JSON) and the arrays of the recording at a path without suffix."""
    return json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".npz"))


def golden_objects(case, facts, arrays):
    """Return the recorded boxes and labels, a dict for each image.

    Boxes stay inclusive: the official targets take sides as they are stored, and so do ours.
    """
    if "boxes_xyxy" in facts:
        boxes = facts["boxes_xyxy"]
        labels = facts["labels"]
    else:
        images = range(sum(key.startswith(f"{case}.boxes") for key in arrays.files))
        boxes = [arrays[f"{case}.boxes{i}"] for i in images]
        labels = [arrays[f"{case}.gtlabels{i}"] for i in images]
    return [
        {
            "boxes": torch.tensor(image_boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor(image_labels, dtype=torch.int64).view(-1) - 1,
        }
        for image_boxes, image_labels in zip(boxes, labels, strict=True)
    ]


def golden_detections(arrays, tag="det_", boxes="boxes"):
    """Return recorded detections in our convention."""
    return {
        "boxes": torch.from_numpy(arrays[tag + boxes]) + torch.tensor([0, 0, 1, 1]),
        "scores": torch.from_numpy(arrays[tag + "scores"]),
        "labels": torch.from_numpy(arrays[tag + "labels"]).long() - 1,
    }


# ---- models with the recorded weights ----------------------------------------------------------


def our_names(model):
    """Return our name of each official tensor."""
    names = model.state_dict()
    return {official(name, names): name for name in names}


def recipe_model(name, keys):
    """Build a model and give it the weights that the recipe makes for these official keys."""
    with torch.device("meta"):
        model = fcos.build(name)
    model.to_empty(device="cpu").set_convention()
    state = model.state_dict()
    names = our_names(model)
    weights = make_weights({key: state[names[key]].shape for key in keys})
    report = fcos.load_weights(model, {key: torch.from_numpy(w) for key, w in weights.items()})
    assert report["family"] == "official"
    assert not report["missing"] + report["ignored"]
    return model.eval()


@functools.cache
def official_model(name):
    """Return a recorded model with the recorded weights. All tests share it: change a copy only."""
    _, arrays = read_golden(GOLDEN / f"model_{RECORDED[name]}")
    keys = arrays["weights.keys"].tolist()
    model = recipe_model(name, keys)
    names = our_names(model)
    assert sorted(keys) == sorted(names)
    for key, sums in zip(keys, arrays["weights.sum_abssum"]):
        value = model.state_dict()[names[key]].double()
        assert np.allclose([value.sum(), value.abs().sum()], sums, rtol=1e-6, atol=1e-5), key
    return model


# ---- comparisons -------------------------------------------------------------------------------


def rows_of(maps):
    """Turn maps (B, C, h, w), one a level, into (B, P, C)."""
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1)


def relative_error(ours, expected):
    """Return the L2 norm of the difference, relative to that of `expected`."""
    expected = torch.as_tensor(expected)
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_detections_match(found, expected, share=0.995, pixels=0.5, score=1e-3):
    """Check that `found` holds at least `share` of `expected`, each once, and few others."""
    close = (found["boxes"] - expected["boxes"][:, None]).abs().amax(2) <= pixels
    close &= (found["scores"] - expected["scores"][:, None]).abs() <= score
    close &= found["labels"] == expected["labels"][:, None]
    taken = np.zeros(close.shape[1], bool)
    for row in close.numpy():
        free = np.flatnonzero(row & ~taken)
        taken[free[:1]] = True
    D = len(expected["labels"])
    assert taken.sum() >= share * D
    assert abs(len(taken) - D) <= (1 - share) * D
    assert (found["scores"].diff() <= 0).all()


def assert_same_detections(found, expected, pixels=1e-2):
    """Check that both hold the same detections, and at least one."""
    assert len(expected["labels"]) > 0
    assert_detections_match(found, expected, 1, pixels, 1e-4)
