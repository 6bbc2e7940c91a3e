"""Names that other projects give to our tensors, and their files.

The rules are independent of those in fcos.py.
"""

import struct

import numpy as np

LEVELS = {"3": 0, "4": 1, "5": 2}
INNER = {"lateral": "inner", "output": "layer"}
KIND = ["conv", "norm"]


def resnet(name):
    """Return torchvision's name of a ResNet's tensor, without the prefix "backbone."."""
    part = name.split(".")[1:]
    if part[0] == "stem":
        return f"{'conv1' if part[1] == 'conv' else 'bn1'}.{part[2]}"
    stage, block, conv, kind, *tensor = part
    stage = f"layer{int(stage[3:]) - 1}.{block}"
    if conv == "down":
        return f"{stage}.downsample.{KIND.index(kind)}.{tensor[0]}"
    return f"{stage}.{conv if kind == 'conv' else 'bn' + conv[4:]}.{'.'.join(tensor)}"


def is_deformable(name, names):
    """Return whether a tensor is of a deformable convolution, which some families rename."""
    return f"{name.rsplit('.', 1)[0]}.offset.weight" in names


OFFICIAL_HEAD = dict(cls="cls_logits", box="bbox_pred", ctr="centerness")


def official(name, names):
    part = name.split(".")
    if name.startswith("backbone.features"):
        if part[2] == "0":
            return f"backbone.body.features.0.{KIND.index(part[3])}.{part[4]}"
        index = 3 * int(part[3]) + KIND.index(part[4])
        return f"backbone.body.features.{part[2]}.conv.{index}.{part[5]}"
    dcn = is_deformable(name, names)
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
    """Return Detectron2's name of a ResNet's tensor, without the prefix."""
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
    dcn = is_deformable(name, names)
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
    """Return the name of a ResNet's tensor in Caffe2, or in Detectron2 if `norms` are its names."""
    part = name.split(".")[1:]
    tensor = {"conv": "w", "norm": f"bn_{norms.get(part[-1])}"}[part[-2]]
    if part[0] == "stem":
        return f"conv1_{tensor}" if tensor == "w" else f"res_conv1_{tensor}"
    branch = "branch1" if part[2] == "down" else "branch2" + "abc"[int(part[2][4:]) - 1]
    return f"{part[0]}_{part[1]}_{branch}_{tensor}"


def renamed(model, rule):
    """Return the state dict of a model in the names of another family."""
    state = model.state_dict()
    theirs = {rule(name, state): value for name, value in state.items()}
    assert len(theirs) == len(state)
    return theirs


def backbone_file(model, norms, **others):
    """Return the content of an ImageNet file of Caffe2 or Detectron2: arrays and other entries."""
    return {
        caffe2(name, norms): value.numpy()
        for name, value in model.state_dict().items()
        if name.startswith("backbone.")
        and (norms != AFFINE or ".running_" not in name)
        and ".offset." not in name
    } | others


def python2_pickle(arrays):
    """Pickle a dict of float32 arrays as Python 2 did: names and data are byte strings."""
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
