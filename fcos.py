"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., arXiv 1904.01355) in one file.

    import fcos
    model = fcos.load("runs/shapes/model.pt")
    for found in model.predict(["photo.jpg"]):
        print(found["boxes"], found["scores"], found["labels"])

The text follows the data: pixels become a padded batch, ResNet and FPN features at strides 8 to
128, and at every location class logits, the distances to the four sides of a box and a centerness;
then targets and losses for training, or boxes for detection. Everyone's weights come last. The
heart of the paper, which box a location learns, is `assign_ref` in kernels/assign.py; the two
losses and the suppression are the other `*_ref` functions there, in plain PyTorch.

    B  images                 boxes   xyxy in pixels, continuous: x2 = x + w
    K  classes                ltrb    distances to the left, top, right, bottom side, in pixels
    P  locations, all levels  labels  0..K-1, in the order of the category ids; -1 is background
    G  boxes of one image     sizes   (B, 2) height, width of the images before padding
    D  detections             levels  P3..P7; locations are level-major, row-major inside a level
"""

import contextlib
import errno
import inspect
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import namedtuple
from functools import partial
from http.client import HTTPException
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models import detection, get_model_weights
from torchvision.ops import FrozenBatchNorm2d, deform_conv2d

from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss
from kernels.iou_loss import KINDS, iou, iou_loss
from kernels.nms import batched_nms


class UserError(ValueError):
    """A mistake in what was passed in; the scripts print it as one line, without a traceback."""


# ---- images -------------------------------------------------------------------------------------


def resized_hw(h, w, min_size, max_size):
    """(height, width) after scaling the short side to `min_size` pixels, or less if the long side
    would pass `max_size`. Rounds as the official code does: the long side is truncated, and an
    image whose short side already fits stays as it is."""
    if not 1 <= min_size <= max_size:
        raise UserError(f"min_size {min_size}: expected 1 or more, and at most max_size {max_size}")
    short, long = min(h, w), max(h, w)
    if long / short * min_size > max_size:
        min_size = max(round(max_size * short / long), 1)
    if short == min_size:
        return h, w
    long = int(min_size * long / short)
    return (min_size, long) if h <= w else (long, min_size)


def resize(image, hw):
    """uint8 (3, H, W) -> uint8 (3, *hw), bilinear and antialiased. Within one grey level of
    Pillow's, which the official code uses (0.03 % of the pixels differ), at a sixth of its time."""
    if image.shape[-2:] == tuple(hw):
        return image
    # The channels of a pixel lie together, as in a decoded image: PyTorch has a fast way for that.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, tuple(hw), mode="bilinear", antialias=True)[0]


def padded_hw(sizes):
    """The smallest (H, W), multiples of 32, that holds images of all these (height, width)."""
    h, w = (max(side) for side in zip(*sizes))
    return -(-h // 32) * 32, -(-w // 32) * 32


def pad_batch(images, hw=None):
    """Images uint8 (3, h, w) -> one uint8 batch (B, 3, *hw), zero at the bottom and right, and
    sizes int64 (B, 2). `hw` defaults to the smallest multiples of 32."""
    sizes = [tuple(image.shape[-2:]) for image in images]
    H, W = hw or padded_hw(sizes)
    batch = torch.zeros(len(images), H, W, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for slot, image, (h, w) in zip(batch, images, sizes):
        if image.dtype != torch.uint8:
            raise UserError(f"an image of {image.dtype}: expected a uint8 tensor, from 0 to 255")
        slot[:, :h, :w] = image
    return batch, torch.tensor(sizes)


# ---- backbones ----------------------------------------------------------------------------------

NORMS = {
    "frozen": FrozenBatchNorm2d,  # constant statistics and affine
    "gn": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "bn": nn.BatchNorm2d,
    "syncbn": nn.BatchNorm2d,  # train.py converts it, since SyncBatchNorm works on GPUs only
}


class DeformConv(nn.Conv2d):
    """3x3 convolution that reads each of its nine taps at a learned distance from the regular place
    and weighs it by a learned mask in 0..1 (DCNv2: Zhu et al., arXiv 1811.11168). The channels of
    `offset` are y, x of each tap in pixels, and then the logits of the nine masks."""

    def __init__(self, c_in, c_out, kernel, stride, padding, groups=1, bias=True):
        super().__init__(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)
        self.offset = nn.Conv2d(c_in, 27, kernel, stride, padding)

    def _conv_forward(self, x, weight, bias):  # what nn.Conv2d.forward calls
        dtype = torch.promote_types(weight.dtype, torch.float32)  # deform_conv2d knows no bf16
        offset, mask = self.offset(x).to(dtype).split((18, 9), 1)
        bias = bias if bias is None else bias.to(dtype)
        y = deform_conv2d(
            x.to(dtype),
            offset,
            weight.to(dtype),
            bias,
            self.stride,
            self.padding,
            mask=mask.sigmoid(),
        )
        return y.to(x.dtype)


class ConvNorm(nn.Module):
    """A convolution and the normalisation after it; `norm` is one of NORMS."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, norm="gn", bias=False, dcn=False):
        super().__init__()
        conv = DeformConv if dcn else nn.Conv2d
        self.conv = conv(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = NORMS[norm](c_out)
        self.folded = None  # the result of fold, in `inference`

    def fold(self):
        """A norm with constant statistics as a part of the convolution: its weight and bias."""
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        mean = self.norm.running_mean - (0 if self.conv.bias is None else self.conv.bias)
        return self.conv.weight * scale[:, None, None, None], self.norm.bias - mean * scale

    def forward(self, x):
        # In training a frozen norm is folded in every call: one product per weight instead of
        # passes over the activations (cuDNN needs one for the shift), and none saved for backward.
        if self.folded or isinstance(self.norm, FrozenBatchNorm2d):
            return self.conv._conv_forward(x, *(self.folded or self.fold()))
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (He et al., arXiv 1512.03385). The stride sits in the first 1x1 in Caffe's
    weights, in the 3x3 in everyone else's."""

    expansion = 4

    def __init__(self, c_in, c_mid, c_out, stride, groups, norm, stride_in_1x1, dcn):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(c_in, c_mid, 1, first, norm=norm)
        self.conv2 = ConvNorm(c_mid, c_mid, 3, second, groups, norm=norm, dcn=dcn)
        self.conv3 = ConvNorm(c_mid, c_out, 1, norm=norm)
        self.down = ConvNorm(c_in, c_out, 1, stride, norm=norm) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(x).relu_()
        y = self.conv2(y).relu_()
        return self.conv3(y).add_(self.down(x)).relu_()


class BasicBlock(nn.Module):
    """3x3, 3x3: the block of ResNet-18 and 34; its stride is in the first."""

    expansion = 1

    def __init__(self, c_in, c_mid, c_out, stride, groups, norm, stride_in_1x1, dcn):
        super().__init__()
        self.conv1 = ConvNorm(c_in, c_mid, 3, stride, groups, norm=norm)
        self.conv2 = ConvNorm(c_mid, c_out, 3, 1, groups, norm=norm, dcn=dcn)
        self.down = ConvNorm(c_in, c_out, 1, stride, norm=norm) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(x).relu_()
        return self.conv2(y).add_(self.down(x)).relu_()


BLOCKS = {"bottleneck": Bottleneck, "basic": BasicBlock}


def initialize(module, weight_init):
    """Start the convolutions of a module as the official code: weights by `weight_init`, those that
    are deformable by the rule of DCN, biases at 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            if isinstance(conv, DeformConv):
                bound = (9 * conv.in_channels) ** -0.5
                nn.init.uniform_(conv.weight, -bound, bound)
            else:
                weight_init(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def freeze(stages, number):
    """Stop learning in the first `number` of a list of modules; the statistics of their BatchNorms
    become constant, too."""
    if not 0 <= number <= len(stages):
        raise UserError(f"frozen_stages {number}: expected 0 to {len(stages)}")
    for stage in stages[:number]:
        stage.requires_grad_(False)
        for conv in stage.modules():
            if isinstance(conv, ConvNorm) and isinstance(conv.norm, nn.BatchNorm2d):
                conv.norm = FrozenBatchNorm2d(conv.norm.num_features)


# A backbone is any module with
#     channels             of its features at strides 8, 16 and 32
#     forward(images)      -> these three features
#     freeze(stages)       stop learning in the first `stages` of what it calls stages
#     initialize()         random weights; not called for a module that is passed to FCOS
# and, if they are known, the pixels that it wants: see CONVENTION. The strides are not checked.


class ResNet(nn.Module):
    """ResNet and ResNeXt without the classifier (He et al., arXiv 1512.03385, 1611.05431)."""

    # fmt: off
    def __init__(
        self,
        block="bottleneck",    # or "basic"
        blocks=(3, 4, 6, 3),   # of res2..res5
        stem=64,               # channels after the first convolution
        groups=1,              # of the 3x3 convolutions (RESNETS.NUM_GROUPS)
        width=None,            # channels of a group in res2 (WIDTH_PER_GROUP); None: as the stem
        stride_in_1x1=True,    # or else in the 3x3 (STRIDE_IN_1X1)
        dcn=(),                # stages whose last 3x3s are deformable, of 2..5 (STAGE_WITH_DCN)
        norm="frozen",         # one of NORMS
    ):
        # fmt: on
        super().__init__()
        if not {2, 3, 4, 5}.issuperset(dcn):
            raise UserError(f"dcn {dcn}: expected some of the stages 2, 3, 4 and 5")
        make, c_in = BLOCKS[block], stem
        self.stem = ConvNorm(3, stem, 7, 2, norm=norm)
        for stage, depth in enumerate(blocks):
            c_mid, c_out = groups * (width or stem) * 2**stage, make.expansion * stem * 2**stage
            layers = []
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                settings = stride, groups, norm, stride_in_1x1, stage + 2 in dcn
                layers += [make(c_in, c_mid, c_out, *settings)]
                c_in = c_out
            setattr(self, f"res{stage + 2}", nn.Sequential(*layers))
        self.channels = [c_out // 4, c_out // 2, c_out]

    def initialize(self):
        initialize(self, partial(nn.init.kaiming_uniform_, a=1))

    def freeze(self, stages):
        """Stop learning in the first `stages` of stem, res2, res3, res4, res5."""
        freeze([self.stem, self.res2, self.res3, self.res4, self.res5], stages)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu_(), 3, 2, 1)
        c3 = self.res3(self.res2(x))
        c4 = self.res4(c3)
        return c3, c4, self.res5(c4)


class InvertedResidual(nn.Sequential):
    """1x1 to `expand` times the channels, 3x3 on each channel alone, 1x1 without activation."""

    def __init__(self, c_in, c_out, stride, expand, norm):
        c_mid = expand * c_in
        super().__init__(
            *([ConvNorm(c_in, c_mid, 1, norm=norm)] if expand > 1 else []),
            ConvNorm(c_mid, c_mid, 3, stride, groups=c_mid, norm=norm),
            ConvNorm(c_mid, c_out, 1, norm=norm),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        *layers, last = self
        y = x
        for layer in layers:
            y = F.relu6(layer(y), inplace=True)
        return last(y) + x if self.residual else last(y)


class MobileNetV2(nn.Module):
    """Sandler et al., arXiv 1801.04381, table 2, without the last 1x1 and the classifier."""

    STAGES = (1, 16, 1), (6, 24, 2), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1)
    channels = [32, 96, 320]

    def __init__(self, blocks=(1, 2, 3, 4, 3, 3, 1), stem=32, norm="bn"):  # blocks: of STAGES
        super().__init__()
        self.features, c_in = nn.Sequential(ConvNorm(3, stem, 3, 2, norm=norm)), stem
        for (expand, c_out, stride), depth in zip(self.STAGES, blocks):
            for i in range(depth):
                s = stride if i == 0 else 1
                self.features.append(InvertedResidual(c_in, c_out, s, expand, norm))
                c_in = c_out
        self.ends = [sum(blocks[:n]) for n in (3, 5, 7)]  # the last block at strides 8, 16, 32

    def initialize(self):
        initialize(self, partial(nn.init.kaiming_normal_, mode="fan_out"))

    def freeze(self, stages):
        """Stop learning in the stem and the blocks after it, `stages` in all."""
        freeze(self.features, stages)

    def forward(self, x):
        stem, *blocks = self.features
        x, found = F.relu6(stem(x), inplace=True), []
        for i, block in enumerate(blocks, 1):
            x = block(x)
            if i in self.ends:
                found.append(x)
        return found


BACKBONES = {"resnet": ResNet, "mobilenet": MobileNetV2}


# ---- feature pyramid and head -------------------------------------------------------------------


class FPN(nn.Module):
    """C3, C4, C5 -> P3, P4, P5, and a strided convolution for each further of `levels`, P6 and P7
    (section 3.2)."""

    def __init__(self, channels_in, channels, levels):
        super().__init__()
        for level, c_in in zip((3, 4, 5), channels_in):
            setattr(self, f"lateral{level}", nn.Conv2d(c_in, channels, 1))
            setattr(self, f"output{level}", nn.Conv2d(channels, channels, 3, padding=1))
        self.further = [f"p{level}" for level in levels[3:]]
        for name in self.further:
            setattr(self, name, nn.Conv2d(channels, channels, 3, 2, 1))

    def initialize(self):
        initialize(self, partial(nn.init.kaiming_uniform_, a=1))

    def forward(self, c3, c4, c5):
        p5 = self.lateral5(c5)
        p4 = self.lateral4(c4) + F.interpolate(p5, c4.shape[-2:])
        p3 = self.lateral3(c3) + F.interpolate(p4, c3.shape[-2:])
        maps = [self.output3(p3), self.output4(p4), self.output5(p5)]
        for name in self.further:
            x = maps[-1].relu() if name == "p7" else maps[-1]
            maps.append(getattr(self, name)(x))
        return maps


class Tower(nn.Sequential):
    """Four 3x3 convolutions with GroupNorm and ReLU; with `dcn`, the last is deformable."""

    def __init__(self, channels, dcn):
        layers = [ConvNorm(channels, channels, 3, bias=True, dcn=dcn and i == 3) for i in range(4)]
        super().__init__(*layers)

    def forward(self, x):
        for layer in self:
            x = layer(x).relu_()
        return x


ACTIVATIONS = {  # of what the head predicts for the distances -> pixels
    # exp(16) is beyond any image; inf would be NaN in the gradient of background locations
    "exp": lambda x, stride: x.clamp(max=16).exp(),
    "relu": lambda x, stride: x.relu() * stride,
}


class Head(nn.Module):
    """Two towers shared by all levels, a prediction each for class, box and centerness, and one
    learned scale of the distances for each level (section 3.2), unless `scales` is False."""

    def __init__(self, channels, num_classes, strides, activation, ctr_on, tower_dcn, scales):
        super().__init__()
        self.strides, self.activation, self.ctr_on = strides, activation, ctr_on
        self.cls_tower, self.box_tower = Tower(channels, tower_dcn), Tower(channels, tower_dcn)
        self.cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box = nn.Conv2d(channels, 4, 3, padding=1)
        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)
        if scales:
            self.scale = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in strides)
        else:
            self.register_buffer("scale", torch.ones(len(strides), 1), persistent=False)

    def initialize(self):
        """Section 4 of the paper, and the bias of the focal loss paper that starts every class at
        a probability of 0.01 (arXiv 1708.02002, section 3.3)."""
        initialize(self, partial(nn.init.normal_, std=0.01))
        nn.init.constant_(self.cls.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, features):
        """-> {"cls": (B, P, K) logits, "ltrb": (B, P, 4) pixels, "ctr": (B, P) logits}. The maps of
        a further output, (B, C, h, w) or (B, h, w), become (B, P, C) or (B, P) alike. Under
        autocast cls, by far the largest, stays in 16 bits: its loss reads them as they are."""
        levels = [self.level(*each) for each in zip(features, self.scale, self.strides)]
        return {
            name: torch.cat([by_location(level[name]) for level in levels], 1) for name in levels[0]
        }

    def level(self, x, scale, stride):
        """The maps of one level, by name, before they are flattened."""
        cls_features, box_features = self.cls_tower(x), self.box_tower(x)
        ctr_features = {"cls": cls_features, "box": box_features}[self.ctr_on]
        distance = scale * self.box(box_features)  # float32, as the scale is
        return {
            "cls": self.cls(cls_features),
            "ltrb": ACTIVATIONS[self.activation](distance, stride),
            "ctr": self.ctr(ctr_features).squeeze(1).to(scale.dtype),
        }


def by_location(x):
    """A map (B, C, h, w) or (B, h, w) -> (B, h * w, C) or (B, h * w)."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten(1, 2)


# ---- locations and targets ----------------------------------------------------------------------

STRIDES = (8, 16, 32, 64, 128)  # of P3..P7

GRIDS = {  # places of the cells of a row or column that is `side` pixels long
    "centre": lambda cell, stride, side: cell * stride + stride // 2,
    "corner": lambda cell, stride, side: cell * (side // len(cell)),
}

RANGES = (64, 128, 256, 512)  # pixels, where the largest distance passes from one level to the next


def level_sizes(hw, strides=STRIDES):
    """(rows, columns) of every level for a padded image; every stage halves, rounding up."""
    return [(-(-hw[0] // stride), -(-hw[1] // stride)) for stride in strides]


def make_points(hw, strides=STRIDES, ranges=RANGES, device=None, grid="centre") -> Tensor:
    """Locations of all levels of a padded image of (height, width): float32 (P, 5) = x, y, stride,
    lo, hi, in pixels. A location is the centre of its cell; lo and hi bound the largest distance to
    a side that it learns (section 3.2). Both ends are inclusive, so a distance of exactly 64 is
    positive on P3 and on P4, as published.

    grid "corner" is torchvision's: multiples of (height // rows, width // columns), which is less
    than the stride on P6 and P7 of most images, from 0 on.
    """
    points, ends = [], (-1, *ranges, math.inf)
    for stride, lo, hi, (rows, columns) in zip(strides, ends, ends[1:], level_sizes(hw, strides)):
        y, x = (
            GRIDS[grid](torch.arange(n, device=device), stride, side)
            for n, side in ((rows, hw[0]), (columns, hw[1]))
        )
        level = torch.empty(rows, columns, 5, device=device)
        level[..., 0], level[..., 1] = x, y[:, None]
        level[..., 2], level[..., 3], level[..., 4] = stride, lo, hi
        points.append(level.flatten(0, 1))
    return torch.cat(points)


def encode(points: Tensor, boxes: list[Tensor], labels: list[Tensor], index: Tensor) -> dict:
    """What locations are to learn (eq. 1), given the box of each: `assign` decides on the latter,
    or a function of your own.

    points (P, 5): of make_points; boxes, labels: B tensors (G, 4) xyxy pixels and (G,) int64;
    index int64 (B, P): a row of the image's boxes, or -1.
    -> {"labels": int64 (B, P) or -1, "ltrb": (B, P, 4) pixels, 0 for background, "index"}
    """
    boxes = F.pad(pad_sequence(boxes, batch_first=True), (0, 0, 0, 1))  # a row, if there is no box
    labels = F.pad(pad_sequence(labels, batch_first=True), (0, 1))
    row, positive = index.clamp(min=0), index >= 0
    x1, y1, x2, y2 = boxes.gather(1, row[..., None].expand(-1, -1, 4)).unbind(2)
    x, y = points[:, 0], points[:, 1]
    ltrb = torch.stack([x - x1, y - y1, x2 - x, y2 - y], 2)
    return {
        "labels": labels.gather(1, row).where(positive, -1),
        "ltrb": ltrb.where(positive[..., None], 0),
        "index": index,
    }


def centerness(ltrb: Tensor) -> Tensor:
    """How central a location lies in its box (eq. 3): (..., 4) -> (...), 1 at the centre, towards 0
    at the sides; 0 where ltrb is 0, that is for the background."""
    left, top, right, bottom = ltrb.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-12)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-12)
    return (horizontal * vertical).sqrt()


# ---- losses -------------------------------------------------------------------------------------


def loss_normalizers(targets: dict) -> Tensor:
    """-> float32 (2,): the number of positive locations and the sum of their centerness. Sum it
    over everything that makes up one optimizer step, then pass it to fcos_loss."""
    positives = (targets["labels"] >= 0).sum().float()
    return torch.stack([positives, centerness(targets["ltrb"]).sum()])


def fcos_loss(
    outputs: dict,
    targets: dict,
    normalizers: Tensor,
    box_loss: str = "giou",
    unit: str = "stride",
    quality: str = "centerness",
) -> dict[str, Tensor]:
    """Focal loss on the classes, IoU loss on the boxes, and cross entropy on the quality of the
    boxes (eq. 2 and section 3.3), as named scalars. train.py sums, logs and shows whatever names
    there are, so that a further loss is one entry more. Divide a sum over locations by one of the
    normalizers: a mean over the batch would depend on how a step is divided.

    outputs: of FCOS.forward; targets: of FCOS.targets; normalizers (2,): see loss_normalizers; the
    other arguments are the keywords of FCOS of the same names. With quality "centerness" the output
    "ctr" learns the centerness, which also weighs the boxes; with "iou" it learns the IoU of the
    predicted box, and all positive locations weigh the same (AdelaiDet's BOX_QUALITY). No location
    is gathered, nothing waits for the device, and a batch without a box is an ordinary input.
    """
    check_choices(box_loss=box_loss, unit=unit, quality=quality)
    positives, centernesses = normalizers[0].clamp(min=1), normalizers[1].clamp(min=1e-6)
    labels, ltrb, target = targets["labels"], outputs["ltrb"], targets["ltrb"]
    positive, central = labels >= 0, centerness(target)
    stride = {"pixel": 1, "stride": outputs["points"][:, 2:3]}[unit]
    ltrb, target = ltrb / stride, target / stride  # exact: strides are powers of two
    if quality == "centerness":
        learned, weight, normalizer = central, central, centernesses
    elif quality == "iou":
        learned = iou(ltrb.detach(), target).where(positive, 0)
        weight, normalizer = positive.float(), positives
    else:
        raise NotImplementedError(f"quality {quality!r} has no branch in fcos_loss")
    cls = sigmoid_focal_loss(outputs["cls"].flatten(0, 1), labels.flatten())
    box = iou_loss(ltrb.flatten(0, 1), target.flatten(0, 1), weight.flatten(), box_loss)
    ctr = F.binary_cross_entropy_with_logits(
        outputs["ctr"], learned, weight=positive.float(), reduction="sum"
    )
    return {"cls": cls / positives, "box": box / normalizer, "ctr": ctr / positives}


# ---- the model ----------------------------------------------------------------------------------


# How pixels enter a network and boxes leave it. This travels with weights, not with architecture.
# Pixels: Caffe's ImageNet weights take BGR in 0..255 minus a mean, and their norms have no epsilon.
# Boxes: the official FCOS learned inclusive ones (x2 = x + w - 1), to which decoding adds the
# missing pixel. Locations lie at the "centre" of their cells, or in torchvision at the "corner".
CONVENTION = dict(
    bgr=True,
    mean=(102.9801, 115.9465, 122.7717),
    std=(1.0, 1.0, 1.0),
    bn_eps=0.0,
    inclusive=False,
    grid="centre",
    score="fcos",
)

CAFFE = {name: CONVENTION[name] for name in ("bgr", "mean", "std", "bn_eps")}

MSRA = CAFFE | dict(mean=(103.53, 116.28, 123.675), bn_eps=1e-5)

TORCH = dict(bgr=False, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), bn_eps=1e-5)


# What the families' weights expect of scores, by the convention "score". Of cls, the probability of
# a class, and joint = cls * centerness: the threshold of a candidate and what it is compared with,
# what the candidates of a level are ranked by, and the final score as a function of joint.
SCORES = {
    "fcos": (0.05, lambda cls, joint: cls, lambda cls, joint: joint, torch.sqrt),
    "torchvision": (0.20, lambda cls, joint: joint.sqrt(), lambda cls, joint: joint, torch.sqrt),
    "mmdetection": (0.05, lambda cls, joint: cls, lambda cls, joint: cls, torch.clone),
}


def defaults(function):
    """{keyword: default} of a function or class, of the keywords that have one."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


class FCOS(nn.Module):
    """Made by `build`, by `load`, or from a backbone of your own, FCOS(80, backbone=module), whose
    pixels are then taken to be those of torchvision and timm: see set_convention.

    `keywords` holds all that it was built with, but the number of classes; `loss` the keywords of
    fcos_loss, `classes` and `category_ids` the data set's, `test_size` (min_size, max_size) of
    prediction in pixels, and `convention` (see CONVENTION) what the weights expect of pixels and
    boxes. UserError names a keyword that does not fit, and the choices.
    """

    name = "FCOS"  # or the row of MODELS that it was made from
    loss_keywords = list(defaults(fcos_loss))  # read now: what takes its place may have others

    # fmt: off
    def __init__(
        self,
        num_classes,            # without a background class (the official NUM_CLASSES has one)
        backbone="resnet",      # one of BACKBONES, whose keywords follow at the end; or a module
        frozen_stages=0,        # of the backbone that do not learn (FREEZE_CONV_BODY_AT)
        imagenet=None,          # torchvision's name of the backbone, for --weights imagenet
        channels=256,           # of pyramid and head (BACKBONE_OUT_CHANNELS)
        levels=(3, 4, 5, 6, 7),  # of the pyramid; the stride of level n is 2**n (FPN_STRIDES)
        ranges=RANGES,          # pixels of the largest distance between levels (SIZES_OF_INTEREST)
        activation="relu",      # of the distances: "exp" or "relu" (the latter: NORM_REG_TARGETS)
        unit="stride",          # of the distances in the box loss, or "pixel" (NORM_REG_TARGETS)
        ctr_on="box",           # the tower that predicts centerness, or "cls" (CENTERNESS_ON_REG)
        quality="centerness",   # what weighs scores, or "iou" (BOX_QUALITY)
        radius=1.5,             # of center sampling, in strides; 0: none (CENTER_SAMPLING_RADIUS)
        box_loss="giou",        # one of kernels.iou_loss.KINDS (IOU_LOSS_TYPE)
        tower_dcn=False,        # the last convolution of both towers deformable (USE_DCN_IN_TOWER)
        scales=True,            # a learned factor of the distances for each level (USE_SCALE)
        grid="centre",          # of the locations in their cells, or torchvision's "corner"
        test_size=(800, 1333),  # pixels in prediction (INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST)
        **backbone_keywords,
    ):
        # fmt: on
        keywords = dict(locals())
        super().__init__()
        given = {name: keywords[name] for name in defaults(FCOS)} | backbone_keywords
        passed = isinstance(backbone, nn.Module)
        self.keywords = resolve(given | {"backbone": None if passed else backbone})
        if num_classes < 1:
            raise UserError(f"num_classes {num_classes}: expected 1 or more")
        if len(ranges) != len(levels) - 1:
            raise UserError(f"ranges {ranges}: expected {len(levels) - 1}, one between two levels")
        self.strides, self.ranges = tuple(2**level for level in levels), tuple(ranges)
        self.backbone = backbone if passed else BACKBONES[backbone](**backbone_keywords)
        self.fpn = FPN(self.backbone.channels, channels, levels)
        self.head = Head(channels, num_classes, self.strides, activation, ctr_on, tower_dcn, scales)
        for module in [self.fpn, self.head] if passed else [self.backbone, self.fpn, self.head]:
            module.initialize()
        if frozen_stages:
            self.backbone.freeze(frozen_stages)

        self.num_classes, self.radius = num_classes, radius
        self.loss = {name: self.keywords[name] for name in self.loss_keywords}
        self.classes = self.category_ids = None
        self.test_size = tuple(test_size)
        self.set_convention(grid=grid, **(TORCH if passed else {}))
        self.to(memory_format=torch.channels_last)  # the layout convolutions are fastest in

    def set_convention(self, **changes):
        """Change what the weights expect of pixels and boxes: keywords of CONVENTION."""
        for keyword, value in changes.items():
            if keyword not in CONVENTION or type(value) is not type(CONVENTION[keyword]):
                raise UserError(f"{keyword} {value!r}: expected it as in {CONVENTION}")
        check_choices(**changes)
        convention = {**CONVENTION, **getattr(self, "convention", {}), **changes}
        for name, least, count in ("mean", 0, 3), ("std", 1e-6, 3), ("bn_eps", 0, 1):
            values = np.ravel(convention[name])
            if len(values) != count or not ((least <= values) & (values <= 1e6)).all():
                raise UserError(f"{name} {values}: expected {count} numbers from {least} to 1e6")
        self.convention = convention
        for name in ("mean", "std"):
            value = torch.tensor(convention[name]).view(3, 1, 1).to(next(self.parameters()))
            self.register_buffer(f"pixel_{name}", value, persistent=False)
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = self.convention["bn_eps"]

    def normalize(self, images, sizes):
        """uint8 RGB (B, 3, H, W) -> float32, less mean, over std, in the channel order of the
        weights; the padding becomes 0 after that, which is grey, as in the official code."""
        B, C, H, W = images.shape
        if self.convention["bgr"]:
            images = images.flip(1)
        images = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        h, w = torch.as_tensor(sizes, device=images.device).view(B, 2, 1, 1, 1).unbind(1)
        y, x = (torch.arange(n, device=images.device) for n in (H, W))
        return images.masked_fill_((y[:, None] >= h) | (x >= w), 0)

    def points(self, hw, device=None) -> Tensor:
        """The locations (P, 5) of a padded image of (height, width): see make_points."""
        return make_points(hw, self.strides, self.ranges, device, self.convention["grid"])

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict:
        """images: uint8 RGB (B, 3, H, W), with sizes (B, 2) where padded at the bottom and right;
        or float, taken as normalised and padded already.
        -> {"cls": (B, P, K) logits, "ltrb": (B, P, 4) pixels, "ctr": (B, P) logits, and what else
            the head returns; "points": (P, 5), "levels": the number of locations of each level}
        """
        hw = images.shape[-2:]
        if not images.is_floating_point():
            images = self.normalize(images, [hw] * len(images) if sizes is None else sizes)
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        levels = [rows * columns for rows, columns in level_sizes(hw, self.strides)]
        outputs = self.head(self.fpn(*features))
        return outputs | {"points": self.points(hw, images.device), "levels": levels}

    def targets(self, hw, boxes: list[Tensor], labels: list[Tensor]) -> dict:
        """What every location of a padded (height, width) batch is to learn.

        boxes, labels: B lists of (G, 4) xyxy pixels and (G,) int64, on the device of the result.
        -> see `encode`. The rules of section 3.1 that pick the box stand in kernels/assign.py.
        """
        points = self.points(hw, boxes[0].device)
        return encode(points, boxes, labels, assign(points, boxes, self.radius))

    def decode(self, outputs: dict, sizes: Tensor, candidate_threshold: float | None = None,
               topk: int = 1000, nms_threshold: float = 0.6, max_detections: int = 100):
        """Boxes of the outputs of `forward`, in shapes that never depend on their values.

        On every level the (location, class) pairs of class probability over `candidate_threshold`
        (0.05) compete by probability times centerness, and `topk` remain; non-maximum suppression
        within a class over all levels leaves `max_detections` (section 3.3).
        -> boxes (B, D, 4) xyxy pixels of the padded image, clipped to its size; scores (B, D) =
           sqrt(probability * centerness), falling; labels (B, D). 0, -inf and -1 where none is left
        Weights of torchvision and mmdetection bring other customs along: see SCORES. (mmdetection's
        plain configurations also ask for nms_threshold=0.5.)
        """
        threshold, compared, ranked_by, final_score = SCORES[self.convention["score"]]
        threshold = threshold if candidate_threshold is None else candidate_threshold
        cls, ctr = outputs["cls"].float().sigmoid(), outputs["ctr"].float().sigmoid()
        joint = cls * ctr[..., None]
        B, P, K = cls.shape

        # ---- the best pairs of every level
        ranking = ranked_by(cls, joint).where(compared(cls, joint) > threshold, -math.inf)
        pairs, first = [], 0
        for level in ranking.split(outputs["levels"], 1):
            pairs.append(level.flatten(1).topk(min(topk, level[0].numel())).indices + first * K)
            first += level.shape[1]
        pairs = torch.cat(pairs, 1)
        candidate = ranking.flatten(1).gather(1, pairs) > -math.inf
        scores, labels = joint.flatten(1).gather(1, pairs), pairs % K

        # ---- their boxes, clipped to the image
        points, row = outputs["points"], pairs // K
        ltrb = outputs["ltrb"].float().gather(1, row[..., None].expand(-1, -1, 4))
        left, top, right, bottom = ltrb.unbind(-1)
        x, y, extra = points[row, 0], points[row, 1], float(self.convention["inclusive"])
        h, w = torch.as_tensor(sizes, device=cls.device).float().view(B, 2, 1).unbind(1)
        x1 = torch.minimum((x - left).clamp(min=0), w - extra)
        y1 = torch.minimum((y - top).clamp(min=0), h - extra)
        x2 = torch.minimum((x + right + extra).clamp(min=extra), w)
        y2 = torch.minimum((y + bottom + extra).clamp(min=extra), h)
        boxes = torch.stack([x1, y1, x2, y2], -1)
        candidate &= (x2 > x1) & (y2 > y1)  # not beyond the border, and not NaN
        scores = scores.where(candidate, -math.inf)

        # ---- the best boxes of the image, without those that repeat a better one
        keep = nms(boxes, scores, labels, nms_threshold, max_detections)
        found, keep = keep >= 0, keep.clamp(min=0)
        boxes = boxes.gather(1, keep[..., None].expand(-1, -1, 4)).where(found[..., None], 0)
        scores = final_score(scores.gather(1, keep).clamp(min=0)).where(found, -math.inf)
        return boxes, scores, labels.gather(1, keep).where(found, -1)

    def detect(self, outputs: dict, sizes: Tensor, score_threshold: float = 0.0,
               **thresholds) -> list[dict]:
        """`decode` as torchvision's list of {"boxes" (D, 4), "scores" (D,), "labels" (D,)}, only as
        long as there are detections of at least `score_threshold`; `thresholds` are keywords of
        decode. Waits for the device; decode does not."""
        return as_list(self.decode(outputs, sizes, **thresholds), score_threshold)

    def rescale(self, boxes, size, hw):
        """Boxes (D, 4) in pixels of an image of `size` (height, width) -> of that image at `hw`.
        Where the weights know inclusive boxes, the pixel that decoding added is one of `hw`'s:
        taken off before the scaling and added after, as the official code does."""
        extra = torch.tensor([0.0, 0.0, 1.0, 1.0]) * self.convention["inclusive"]
        (h, w), (new_h, new_w) = map(float, size), map(float, hw)
        scale = torch.tensor([new_w / w, new_h / h, new_w / w, new_h / h])
        return (boxes - extra) * scale + extra

    @torch.no_grad()
    def predict(self, images, min_size: int | None = None, max_size: int | None = None,
                score_threshold: float = 0.0, batch_size: int = 1, graph: bool = False,
                **thresholds) -> list[dict]:
        """Detections in pixels of the given images.

        images: one or an iterable of paths, PIL images, RGB uint8 arrays (H, W, 3) or RGB uint8
        tensors (3, H, W). min_size, max_size: pixels to resize to, by default `test_size`.
        score_threshold: leaves out what scores less; thresholds: keywords of `decode`.
        batch_size: images that follow one another go together if they are padded to one size.
        graph: run as CUDA graphs on a GPU, see `replay`: for many images of few sizes.
        -> a list of {"boxes" (D, 4) xyxy, "scores" (D,), "labels" (D,)} on the CPU, always a list
        """
        images = [images] if isinstance(images, ONE_IMAGE) else images
        min_size, max_size = min_size or self.test_size[0], max_size or self.test_size[1]
        device, results = self.pixel_mean.device, []
        detect = Deployed(self, **thresholds).forward
        detect = replay(detect) if graph and device.type == "cuda" else detect
        with inference(self):
            images = ((image, resized_hw(*image.shape[-2:], min_size, max_size))
                      for image in map(as_image, images))
            for _, alike in groupby(images, lambda image: padded_hw([image[1]])):
                while chunk := list(islice(alike, max(batch_size, 1))):
                    batch, sizes = pad_batch([resize(image, size) for image, size in chunk])
                    decoded = [x.cpu() for x in detect(batch.to(device), sizes.to(device))]
                    for (image, size), found in zip(chunk, as_list(decoded, score_threshold)):
                        found["boxes"] = self.rescale(found["boxes"], size, image.shape[-2:])
                        results.append(found)
        return results

    def predict_tta(self, images, nms_threshold: float = 0.6, max_detections: int = 100):
        """`predict` with the official test-time augmentation: an image is seen at `test_size` and
        eight other sizes (of 800: 400, 500, ..., 1200), each time mirrored, too. What all views
        find, before any suppression, competes in one, in pixels of the first."""
        results, device, (short, long) = [], self.pixel_mean.device, self.test_size
        sizes = [(max(short * n // 8, 1), round(1.5 * long)) for n in (4, 5, 6, 7, 9, 10, 11, 12)]
        for image in map(as_image, [images] if isinstance(images, ONE_IMAGE) else images):
            (H, W), views = image.shape[1:], []
            for size in [self.test_size, *sizes]:
                views += self.predict([image, image.flip(2)], *size, batch_size=2,
                                      nms_threshold=1, max_detections=5000)
                x1, y1, x2, y2 = views[-1]["boxes"].unbind(1)
                pixel = W / resized_hw(H, W, *size)[1]  # the view's; inclusive boxes end at W - it
                right = W + (1 - pixel) * self.convention["inclusive"]
                views[-1]["boxes"] = torch.stack([right - x2, y1, right - x1, y2], 1)
            found = {name: torch.cat([view[name] for view in views]) for name in views[0]}
            seen = self.rescale(found["boxes"], (H, W), resized_hw(H, W, *self.test_size))
            args = (x[None].to(device) for x in (seen, found["scores"], found["labels"]))
            keep = batched_nms(*args, nms_threshold, max_detections)[0].cpu()
            results.append({name: values[keep[keep >= 0]] for name, values in found.items()})
        return results


# ---- models -------------------------------------------------------------------------------------


# One architecture a row, named as the official configurations are, without their schedule; then
# those that are not official. Keywords are those of FCOS and of the row's backbone: see there.
FROZEN = dict(norm="frozen", frozen_stages=2)

R_50 = dict(blocks=(3, 4, 6, 3)) | FROZEN

R_101 = dict(blocks=(3, 4, 23, 3)) | FROZEN

IN_3x3 = dict(stride_in_1x1=False)  # the stride, as in torchvision's ImageNet weights

V_50 = R_50 | IN_3x3 | dict(imagenet="resnet50")

X_101_32x8d = R_101 | IN_3x3 | dict(groups=32, width=8, imagenet="resnext101_32x8d")

X_101_64x4d = R_101 | IN_3x3 | dict(groups=64, width=4, imagenet="resnext101_64x4d")

MNV2 = dict(backbone="mobilenet", norm="bn", imagenet="mobilenet_v2")

SYNCBN, C128 = dict(norm="syncbn"), dict(channels=128)

PLAIN = dict(activation="exp", ctr_on="cls", radius=0.0, box_loss="iou", unit="pixel")

IMPRV = dict(activation="relu", ctr_on="box", radius=1.5, box_loss="giou", unit="stride")

DCN_345, DCN_45 = (IMPRV | dict(dcn=dcn, tower_dcn=True) for dcn in ((3, 4, 5), (4, 5)))

IOU = dict(quality="iou")  # AdelaiDet's, as is the real-time model

RT = dict(levels=(3, 4, 5), ranges=(64, 128), test_size=(512, 736))

VISION = IMPRV | dict(scales=False, grid="corner")

TINY = dict(block="basic", blocks=(1, 1, 2, 2), stem=16, channels=64, norm="gn")

HALVED = dict(ranges=(32, 64, 128, 256))  # so that small pictures use several levels


# fmt: off
MODELS = {
    "fcos_R_50_FPN":                    R_50        | PLAIN,
    "fcos_R_101_FPN":                   R_101       | PLAIN,
    "fcos_X_101_32x8d_FPN":             X_101_32x8d | PLAIN,
    "fcos_X_101_64x4d_FPN":             X_101_64x4d | PLAIN,
    "fcos_imprv_R_50_FPN":              R_50        | IMPRV,
    "fcos_imprv_R_101_FPN":             R_101       | IMPRV,
    "fcos_imprv_X_101_32x8d_FPN":       X_101_32x8d | IMPRV,
    "fcos_imprv_X_101_64x4d_FPN":       X_101_64x4d | IMPRV,
    "fcos_imprv_dcnv2_R_50_FPN":        R_50        | DCN_345,
    "fcos_imprv_dcnv2_R_101_FPN":       R_101       | DCN_345,
    "fcos_imprv_dcnv2_X_101_32x8d_FPN": X_101_32x8d | DCN_45,
    "fcos_imprv_dcnv2_X_101_64x4d_FPN": X_101_64x4d | DCN_45,
    "fcos_bn_MNV2_FPN":                 MNV2        | PLAIN,
    "fcos_syncbn_MNV2_FPN":             MNV2        | PLAIN | SYNCBN,
    "fcos_syncbn_c128_MNV2_FPN":        MNV2        | PLAIN | SYNCBN | C128,
    "fcos_imprv_iou_R_50_FPN":          R_50        | IMPRV | IOU,
    "fcos_rt_R_50_FPN":                 R_50        | IMPRV | SYNCBN | RT,
    "fcos_torchvision_R_50_FPN":        V_50        | VISION,
    "shapes":                           TINY        | IMPRV | HALVED,
}
# fmt: on

CHOICES = dict(
    norm=NORMS,
    block=BLOCKS,
    activation=ACTIVATIONS,
    ctr_on=("cls", "box"),
    quality=("centerness", "iou"),
    box_loss=KINDS,
    unit=("pixel", "stride"),
    grid=GRIDS,
    score=SCORES,
    levels=((3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 7)),
)


def check_choices(**keywords):
    """UserError unless every keyword that has CHOICES holds one of them."""
    for keyword, value in keywords.items():
        if keyword in CHOICES and value not in CHOICES[keyword]:
            choices = ", ".join(map(str, CHOICES[keyword]))
            raise UserError(f"{keyword} {value!r}: expected one of {choices}")


def resolve(keywords: dict) -> dict:
    """All keywords of FCOS and of the backbone that `keywords` names, those not given at their
    defaults: with the number of classes, all it takes to build the same model again, whatever
    becomes of MODELS. UserError for an unknown keyword or a value of another type."""
    known = defaults(FCOS)
    name = keywords.get("backbone", known["backbone"])
    if name is not None:
        if name not in BACKBONES:
            raise UserError(f"backbone {name!r}: expected one of {', '.join(BACKBONES)}")
        known |= defaults(BACKBONES[name])
    for keyword, value in keywords.items():
        if keyword not in known:
            raise UserError(f"keyword {keyword!r}: expected one of {', '.join(known)}")
        default, value = known[keyword], tuple(value) if isinstance(value, list) else value
        kinds = (float, int) if isinstance(default, float) else type(default)
        fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
        if isinstance(value, (int, float)):
            fits &= value >= 0  # and not NaN
        own = keyword == "backbone" and value is None  # a module that was passed to FCOS
        if default is not None and not fits and not own:
            raise UserError(f"{keyword} {value!r}: expected a value like {default!r}")
        known[keyword] = value
    check_choices(**known)
    return known


def build(name: str, num_classes: int = 80, **overrides) -> "FCOS":
    """A new model of the row `name` of MODELS, randomly initialised; never downloads.

    overrides: keywords of FCOS and of the row's backbone that replace the row's, such as
    norm="gn", frozen_stages=0. UserError, a ValueError, lists the choices.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    model = FCOS(num_classes, **resolve(MODELS[name] | overrides))
    model.name = name
    return model


# ---- prediction ---------------------------------------------------------------------------------


def regular(path):
    """The path, unless it is of a pipe, device or folder: they would hang or be lost. OSError"""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("Is a directory" if os.path.isdir(path) else "is no regular file")
    return path


def read_image(source, hw=None):
    """Decode an image file or PIL image to RGB: uint8 (3, H, W). Grey, palette, CMYK, transparent
    and 16-bit images become 8-bit RGB, the latter by the highest bit that they use.

    EXIF orientation is applied, as a viewer would. With `hw`, the (height, width) that annotations
    were drawn on, it is applied only if the file as stored does not have that size but the turned
    image does: COCO's boxes refer to the stored pixels. UserError names an unreadable file.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(regular(source))
        stored = image.size[::-1]
        if stored != hw and image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating point; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would saturate at 255
            pixels = np.asarray(image).clip(min=0)
            bits = int(pixels.max()).bit_length()  # a camera's 10, 12 or 14 bits come in 16
            image = Image.fromarray((pixels >> max(bits - 8, 0)).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{source}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{source}: cannot be read as an image ({why})") from None
    if hw is not None and pixels.shape[:2] != tuple(hw):
        h, w = stored
        raise UserError(f"{source}: is {w}x{h} pixels, but its annotations say {hw[1]}x{hw[0]}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


ONE_IMAGE = str, os.PathLike, Image.Image, np.ndarray, Tensor  # rather than an iterable of images


def as_image(source):
    """A path, PIL image, RGB uint8 array (H, W, 3) or tensor (3, H, W) -> the latter."""
    if isinstance(source, (str, os.PathLike, Image.Image)):
        return read_image(source)
    if isinstance(source, np.ndarray) and source.ndim == 3:
        source = torch.from_numpy(np.ascontiguousarray(source)).permute(2, 0, 1)
    if isinstance(source, torch.Tensor) and source.ndim == 3 and source.dtype == torch.uint8:
        if len(source) == 3 and source.numel():
            return source.cpu()
    what = f"{tuple(source.shape)} {source.dtype}" if hasattr(source, "shape") else repr(source)
    raise ValueError(
        f"image {what}: expected a path, a PIL image, an RGB uint8 array (H, W, 3) or "
        "an RGB uint8 tensor (3, H, W)"
    )


@contextlib.contextmanager
def inference(model):
    """The model in eval mode, its norms of constant statistics folded into the weights, and these
    cast as autocast would, once. Meanwhile no weight may change and no other call begin or end."""
    training, kind = model.training, model.pixel_mean.device.type
    layers = [layer for layer in model.modules() if isinstance(layer, ConvNorm)]
    layers = [layer for layer in layers if getattr(layer.norm, "running_var", None) is not None]
    try:
        for layer in layers:
            cast = torch.is_autocast_enabled(kind) and not isinstance(layer.conv, DeformConv)
            dtype = torch.get_autocast_dtype(kind) if cast else layer.conv.weight.dtype
            layer.folded = [x.to(dtype) for x in layer.fold()]
        model.eval()
        yield
    finally:
        model.train(training)
        for layer in layers:
            layer.folded = None


def as_list(detections, score_threshold):
    """The batch of `FCOS.decode` as a list of dicts without what scores less: see FCOS.detect."""
    results = []
    for boxes, scores, labels in zip(*detections):
        D = int(((labels >= 0) & (scores >= score_threshold)).sum())
        results.append({"boxes": boxes[:D], "scores": scores[:D], "labels": labels[:D]})
    return results


def replay(function):
    """`function`, of tensors on a CUDA device, as CUDA graphs: the first call with tensors of some
    shapes captures its kernels and keeps the tensors, later ones fill them and launch the kernels
    at once. A call overwrites the result of the one before. For torch.no_grad()."""
    graphs, memory = {}, torch.cuda.graph_pool_handle()  # one memory, since they run in turn

    def run(*inputs):
        kinds = tuple((x.shape, x.dtype) for x in inputs)
        if kinds not in graphs:  # casts in autocast's cache would not be captured
            with (
                torch.cuda.device_of(inputs[0]),
                torch.autocast(
                    "cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
                ),
            ):
                graphs[kinds] = torch.cuda.make_graphed_callables(function, inputs, pool=memory)
        return graphs[kinds](*inputs)

    return run


# ---- checkpoints --------------------------------------------------------------------------------


class ArrayUnpickler(pickle.Unpickler):
    """A pickle can run any program; this one admits numpy arrays and plain Python values only."""

    ALLOWED = ("_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype")

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode") or (
            re.fullmatch(r"numpy(\._?core\.(multiarray|numeric))?", module) and name in self.ALLOWED
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_checkpoint(path):
    """The content of a .pth, .pt or .pkl file, without running code from it. UserError if the file
    is missing, torn, or holds anything but tensors, arrays and plain values."""
    try:
        with open(regular(path), "rb") as file:
            if str(path).endswith(".pkl"):
                return ArrayUnpickler(file, encoding="latin1").load()
            if zipfile.is_zipfile(file) and (name := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"the checksum of {name} is wrong")  # torch.load checks none
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that are refused
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        why = "damaged" if error.errno == errno.EINVAL else error.strerror or error  # torn files
        raise UserError(f"{path}: {why}") from None
    except Exception as error:  # junk makes the readers raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: refused, because it holds {refused[1]} and could run any "
                "program; save its state dict alone"
            ) from None
        raise UserError(f"{path}: not a checkpoint or damaged ({type(error).__name__})") from None


def stored_keywords(content: dict) -> dict:
    """The keywords that the model of one of our checkpoints was built with. Files from before these
    were stored hold the name of a row and the keywords that overrode it."""
    if "keywords" in content:
        return resolve(dict(content["keywords"]))
    overrides = {{"iou": "box_loss"}.get(k, k): v for k, v in content["overrides"].items()}
    if "dcn" in overrides:
        overrides["tower_dcn"] = bool(overrides["dcn"])
    if content["name"] not in MODELS:
        raise UserError(f"the file is of {content['name']}, a row that MODELS no longer has")
    size = {"test_size": content.get("test_size", (800, 1333))}
    return resolve(MODELS[content["name"]] | overrides | size)


def checkpoint(model: "FCOS") -> dict:
    """All that `load` needs to rebuild the model, as tensors and plain Python values."""
    names = (
        "name",
        "num_classes",
        "keywords",
        "classes",
        "category_ids",
        "convention",
        "test_size",
    )
    return {name: getattr(model, name) for name in names} | {"model": model.state_dict()}


@contextlib.contextmanager
def atomic_write(path, mode="wb", keep=None):
    """Open a file for writing, one process at a time, that appears whole at `path`, or not at all.
    What was there moves to `keep`, if given. UserError if it cannot be written."""
    temporary = f"{path}.fcos.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # of a process that was killed
        with open(temporary, mode.replace("w", "x")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, regular(path))
    except (OSError, RuntimeError) as error:  # torch.save hides the former in the latter
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: cannot be written ({cause})") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def save(model: "FCOS", path):
    """Write a checkpoint that `load` reads, whole or not at all."""
    with atomic_write(path) as file:
        torch.save(checkpoint(model), file)


def load(path, name: str | None = None, backbone: nn.Module | None = None) -> "FCOS":
    """A model in eval mode from a file alone, if it is one of our own checkpoints or torchvision's;
    those of other families do not say which architecture they are of: `name` is a row of MODELS.
    "coco" is torchvision's own file: see hub_file. `backbone`: if it was a module of your own."""
    path = hub_file("coco") if path == "coco" else path
    _, content, state, family, mark = weights = open_weights(path)
    if family not in DETECTORS:
        raise UserError(f"{path}: is an ImageNet classifier, as {mark} tells, and no detector")
    if "test_size" not in content:  # not ours, or no more than a state dict
        if family == "torchvision":
            name = name or "fcos_torchvision_R_50_FPN"
        if name is None:
            raise UserError(
                f"{path}: does not say which model it is; name one of {', '.join(MODELS)}"
            )
        num_classes = 80 if family == "torchvision" and len(state[mark]) == 91 else len(state[mark])
        model = build(name, num_classes)
        load_weights(model, weights)
        return model.eval()
    if name not in (None, content["name"]):
        raise UserError(f"{path}: is a {content['name']}, not a {name}")
    try:
        keywords = stored_keywords(content)
        if keywords["backbone"] is None:
            if backbone is None:
                raise UserError("its backbone is no row's; pass a module as `backbone`")
            keywords = keywords | {"backbone": backbone}
        model = FCOS(K := content["num_classes"], **keywords)
        model.name = content["name"]
        for name, length in ("classes", K), ("category_ids", K), ("test_size", 2):
            value = content[name]
            if value is not None and (not isinstance(value, (list, tuple)) or len(value) != length):
                raise UserError(f"{name} {value!r:.99}: expected {length} of them")
            setattr(model, name, value)
        range(*model.test_size), resized_hw(1, 1, *model.test_size)  # whole pixels that fit?
        load_weights(model, weights)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        # made by hand, or damaged
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return model.eval()


# ---- weights of other projects ------------------------------------------------------------------


# COCO's 80 classes by category id; ten of 1..90 are not used.
COCO = dict(enumerate(detection.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))

COCO = {id: name for id, name in COCO.items() if name not in ("__background__", "N/A")}


def layer(n):
    """The name of module number n of a sequence of convolution, norm, relu, convolution, ..."""
    return f"{int(n) // 3}.{('conv', 'norm', 'relu')[int(n) % 3]}"


# How others name what is called fpn.* and head.* here, as backbones name what is theirs in `names`:
# (pattern, replacement or a function of the match), applied from top to bottom.
NAMES = [
    # pyramids: official, torchvision (its files have both spellings), AdelaiDet, mmdetection
    (r"^backbone\.fpn\.fpn_inner(\d)\.", lambda m: f"fpn.lateral{int(m[1]) + 1}."),
    (r"^backbone\.fpn\.fpn_layer(\d)\.", lambda m: f"fpn.output{int(m[1]) + 1}."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.(0\.)?", lambda m: f"fpn.lateral{int(m[1]) + 3}."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.(0\.)?", lambda m: f"fpn.output{int(m[1]) + 3}."),
    (r"^backbone\.fpn\.(top|extra)_blocks\.", "fpn."),
    (r"^backbone\.fpn_(lateral|output)", r"fpn.\1"),
    (r"^backbone\.top_block\.", "fpn."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", lambda m: f"fpn.lateral{int(m[1]) + 3}."),
    (r"^neck\.fpn_convs\.([012])\.conv\.", lambda m: f"fpn.output{int(m[1]) + 3}."),
    (r"^neck\.fpn_convs\.([34])\.conv\.", lambda m: f"fpn.p{int(m[1]) + 3}."),
    # heads: official, AdelaiDet, mmdetection, torchvision
    (r"^(rpn\.head|proposal_generator\.fcos_head|bbox_head)\.", "head."),
    (r"^head\.classification_head\.conv\.", "head.cls_tower."),
    (r"^head\.regression_head\.conv\.", "head.bbox_tower."),
    (r"^head\.\w+_head\.", "head."),
    (r"^head\.cls_tower\.(\d+)\.", lambda m: f"head.cls_tower.{layer(m[1])}."),
    (r"^head\.bbox_tower\.(\d+)\.", lambda m: f"head.box_tower.{layer(m[1])}."),
    (r"^head\.cls_convs\.", "head.cls_tower."),
    (r"^head\.reg_convs\.", "head.box_tower."),
    (r"\.gn\.", ".norm."),
    (r"^head\.(cls_logits|conv_cls|fcos_cls)\.", "head.cls."),
    (r"^head\.(bbox_pred|bbox_reg|conv_reg|fcos_reg)\.", "head.box."),
    (r"^head\.(bbox_ctrness|ctrness|(conv_|fcos_)?centerness)\.", "head.ctr."),
    (r"^head\.scales\.(\d)\.scale$", r"head.scale.\1"),
    (r"\.conv\.conv\.", ".conv."),
    (r"\.conv\.conv_offset\.", ".conv.offset."),
]

RESNET_NAMES = [
    # torchvision, the official code, mmdetection and, with bottom_up, Detectron2
    (r"^(backbone\.)?(body\.|bottom_up\.)?(stem\.)?conv1\.(?=weight)", "backbone.stem.conv."),
    (r"^(backbone\.)?(body\.)?(stem\.)?bn1\.", "backbone.stem.norm."),
    (r"^(backbone\.bottom_up\.)?stem\.conv1\.norm\.", "backbone.stem.norm."),
    (r"^(backbone\.)?(body\.)?layer(\d)\.", lambda m: f"backbone.res{int(m[3]) + 1}."),
    (r"^(backbone\.bottom_up\.)?res(\d)\.", r"backbone.res\2."),
    (r"\.conv(\d)\.(?=weight)", r".conv\1.conv."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.(downsample\.0|shortcut)\.(?=weight)", ".down.conv."),
    (r"\.(downsample\.1|shortcut\.norm)\.", ".down.norm."),
    (r"\.conv2(\.|\.conv_|_)offset\.", ".conv2.conv.offset."),
    # Caffe2 and, with gamma and beta, Detectron2
    (r"^conv1_w$", "backbone.stem.w"),
    (r"^res_conv1_bn", "backbone.stem.bn"),
    (r"^res(\d)_(\d+)_branch1_(w|bn)", r"backbone.res\1.\2.down.\3"),
    (
        r"^res(\d)_(\d+)_branch2([abc])_(w|bn)",
        lambda m: f"backbone.res{m[1]}.{m[2]}.conv{'abc'.index(m[3]) + 1}.{m[4]}",
    ),
    (r"\.w$", ".conv.weight"),
    (r"\.bn_(s|gamma)$", ".norm.weight"),
    (r"\.bn_(b|beta)$", ".norm.bias"),
    (r"\.bn_(rm|running_mean)$", ".norm.running_mean"),
    (r"\.bn_(riv|running_var)$", ".norm.running_var"),
]

MOBILENET_NAMES = [
    (r"^(backbone\.body\.)?features\.(\d|1[0-7])\.", r"backbone.features.\2."),
    (r"\.features\.0\.0\.", ".features.0.conv."),
    (r"\.features\.0\.1\.", ".features.0.norm."),
    (r"\.features\.(\d+)\.conv\.(\d+)\.", lambda m: f".features.{m[1]}.{layer(m[2])}."),
]

# torchvision nests its layers, and so counts them in twos.
NESTED_MOBILENET_NAMES = [
    (r"^features\.1\.conv\.([12])\.(?=\D)", lambda m: f"features.1.conv.{int(m[1]) + 2}."),
    (
        r"^features\.(\d\d|[2-9])\.conv\.([23])\.(?=\D)",
        lambda m: f"features.{m[1]}.conv.{int(m[2]) + 4}.",
    ),
    (r"\.conv\.([01])\.([01])\.", lambda m: f".conv.{3 * int(m[1]) + int(m[2])}."),
]

BACKBONE_NAMES = {ResNet: RESNET_NAMES, MobileNetV2: MOBILENET_NAMES}

DETECTORS = {  # family: (a key by which its files are known, the convention of its weights)
    "fcos": (r"head\.cls\.weight", {}),
    "official": (r"rpn\.head\.cls_logits\.weight", CONVENTION | dict(inclusive=True)),
    "adelaidet": (r"proposal_generator\.fcos_head\.cls_logits\.weight", CONVENTION | MSRA),
    "torchvision": (
        r"head\.classification_head\.cls_logits\.weight",
        CONVENTION | TORCH | dict(grid="corner", score="torchvision"),
    ),
    "mmdetection": (
        r"bbox_head\.(conv|fcos)_cls\.weight",
        CONVENTION | dict(bn_eps=1e-5, score="mmdetection"),
    ),
}


# ImageNet classifiers: the key that tells the family, and the convention of its weights.
CLASSIFIERS = {
    "detectron2": (r"res_conv1_bn_(gamma|rm)", MSRA),
    "caffe2": (r"res_conv1_bn_s", CAFFE),
    "torchvision_in_detectron2": (r"stem\.conv1\.norm\.weight", TORCH),
    "torchvision_resnet": (r"layer1\.0\.conv1\.weight", TORCH),
    "torchvision_mobilenet": (r"features\.1\.conv\.0\.0\.weight", TORCH),
    "mobilenet": (r"features\.1\.conv\.3\.weight", CAFFE),
}


def families():
    """Return {family: (key, convention)} of detectors and ImageNet classifiers."""
    return DETECTORS | CLASSIFIERS


def rename_key(key: str, names: list) -> str:
    """A key of another family in our words, by the rows of a table such as NAMES."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


# A file of weights: all that it holds, the state dict in it, its family and the key that tells it.
Weights = namedtuple("Weights", "path content state family mark")


def open_weights(source) -> Weights:
    """A path or a dict of any family. UserError if it holds no state dict of a known one."""
    path = source if isinstance(source, (str, os.PathLike)) else "weights"
    content = read_checkpoint(source) if path is source else source
    state = content
    for _ in range(4):  # last.pt of train.py holds a checkpoint that holds the weights
        held = state if isinstance(state, dict) else {}
        inner = [held[k] for k in ("model", "state_dict", "blobs") if isinstance(held.get(k), dict)]
        if not inner:
            break
        content, state = state, inner[0]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(
            f"{path}: holds no state dict, tensors with their names as keys, but a "
            f"{type(state).__name__}"
        )
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for family, (mark, _) in families().items():
        for key, value in state.items():
            if re.fullmatch(mark, key) and getattr(value, "ndim", 0):
                return Weights(path, content, state, family, key)
    first = ", ".join(list(state)[:3]) or "none"
    raise UserError(
        f"{path}: of no family known here ({', '.join(families())}); its first keys are {first}"
    )


def input_convention(model, weights):
    """What a file tells of the pixels it wants beyond its family, as keywords of CONVENTION."""
    family, state = weights.family, weights.state
    if "pixel_mean" in state:  # AdelaiDet's
        mean, std = (tuple(state[f"pixel_{x}"].flatten().tolist()) for x in ("mean", "std"))
        return dict(bgr=mean[0] < mean[2], mean=mean, std=std)
    if family in ("adelaidet", "detectron2") and model.keywords.get("groups") == 32:
        return dict(std=(57.375, 57.12, 58.395))  # for this backbone alone
    if family == "mmdetection":  # the text of its configuration lies beside the weights
        text = str(weights.content.get("meta"))
        found = [re.search(name + r"=\[([^\]]*)\]", text) for name in ("mean", "std")]
        if all(found):
            mean, std = (tuple(map(float, re.findall(r"[\d.]+", match[1]))) for match in found)
            return dict(bgr="to_rgb=True" not in text, mean=mean, std=std)
        if not model.keywords.get("stride_in_1x1", True):
            return TORCH
        if "bbox_head.cls_convs.0.conv.bias" in state:
            return MSRA
    return {}


def load_weights(model: "FCOS", source, classes: list[str] | None = None) -> dict:
    """Fill `model` from a path or a dict: our own checkpoints; detectors of the official FCOS,
    AdelaiDet, torchvision and mmdetection; and of ImageNet classifiers of Caffe2, Detectron2 and
    torchvision the backbone. The family is known from the keys and sets what goes with it in
    model.convention. The architecture is the row's and never changes; a file that contradicts it is
    an error, but only ours tell exp from relu. A detector of 80 classes gets the names of COCO's.

    classes: the names of the model's classes, to fine-tune a detector of others: the rows of its
    classifier are copied to the classes of the same name, and the others stay as they are.
    -> {"family", "convention", "loaded", "ignored", "missing", "new_classes"}, four lists of names.
       UserError lists keys that are missing or unknown, and shapes that differ.
    """
    weights = source if isinstance(source, Weights) else open_weights(source)
    path, content, state, family, _ = weights

    def refuse(why):
        row = "fcos_torchvision_R_50_FPN" if family == "torchvision" else content.get("name")
        hint = f"; it is a {row}" if row not in (None, model.name) else ""
        raise UserError(f"{path}: does not fit {model.name}: {why}{hint}")

    # ---- their names become ours
    names = BACKBONE_NAMES.get(type(model.backbone), []) + NAMES
    if family == "torchvision_mobilenet":
        names = NESTED_MOBILENET_NAMES + names
    own, renamed, unknown = model.state_dict(), {}, {}
    for key, value in state.items():
        name = key if family == "fcos" else rename_key(key, names)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value.astype(np.float32))
        if name not in own or name in renamed:
            unknown[key] = name
            continue
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        plain = plain and not (value.is_meta or value.is_nested)
        if not plain or value.is_floating_point() != own[name].is_floating_point():
            what = f"{type(value).__name__} {getattr(value, 'dtype', '')}"
            raise UserError(f"{path}: {key} is no plain tensor of floating point but {what}")
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} holds NaN or infinity")
        renamed[name] = value
    for name, value in own.items():
        if family == "caffe2" and re.match(r"backbone\..*\.running_(mean|var)$", name):
            renamed[name] = torch.full_like(value, name.endswith("var"))  # its norm is affine
        elif family == "mmdetection" and re.fullmatch(r"head\.\w+_tower\.\d\.conv\.bias", name):
            renamed.setdefault(name, torch.zeros_like(value))  # its plain models have none
        elif family == "mmdetection" and name.startswith("head.scale.") and name in renamed:
            renamed[name] = renamed[name].reshape(1)
        elif family == "torchvision" and name.startswith("head.cls.") and name in renamed:
            if len(renamed[name]) == 91 and (classes or model.num_classes != 91):  # category ids
                renamed[name] = renamed[name][list(COCO)]

    # ---- the classifier, class by class
    known, new_classes = content.get("classes") or [], []
    if classes and "head.cls.bias" in renamed and family in DETECTORS:
        rows = len(renamed["head.cls.bias"])
        if len(classes) != model.num_classes or len(known or range(rows)) != rows:
            refuse(f"{len(classes)} classes for {model.num_classes} rows, {len(known)} for {rows}")
        if not known:  # the file names none
            by_rows = {len(classes): classes, 80: list(COCO.values())}
            known = by_rows.get(rows, [])
        new_classes = [name for name in classes if name not in known]
        for name in ("head.cls.weight", "head.cls.bias"):
            theirs, renamed[name] = renamed[name], own[name].clone()
            for row, c in enumerate(classes):
                if c in known:
                    renamed[name][row] = theirs[known.index(c)]

    # ---- does everything fit?
    missing, spare = [name for name in own if name not in renamed], r".*num_batches_tracked"
    if family in DETECTORS:
        wrong, spare = missing + list(unknown), spare + r"|pixel_(mean|std)"
    else:  # the rest of the file is its classifier; Caffe2's also keep the optimizer's momentum
        wrong = missing + [key for key, name in unknown.items() if name.startswith("backbone.")]
        spare += r"|(fpn|head)\..*|.*\.offset\..*|.*_momentum"
    if family == "fcos" and classes:  # an output that the head has since got starts anew
        layers = {name.rpartition(".")[0] for name in renamed}
        wrong = [n for n in wrong if n[:5] != "head." or n.rpartition(".")[0] in layers]
    wrong = [name for name in wrong if not re.fullmatch(spare, name)]
    told = {}  # what shapes do not tell
    if family == "fcos" and "name" in content:
        stored = stored_keywords(content)
        told = {
            keyword: stored.get(keyword)
            for keyword in ("activation", "ctr_on", "quality", "levels", "scales", "stride_in_1x1")
        }
    elif family not in DETECTORS and isinstance(model.backbone, ResNet):
        if "res3.0.conv3.conv.weight" in model.backbone.state_dict():
            in_1x1 = family in ("caffe2", "detectron2") and model.keywords["groups"] == 1
            told["stride_in_1x1"] = in_1x1
        if family == "caffe2" or model.keywords["norm"] == "gn":
            told["norm"] = "frozen"  # with statistics, which GroupNorm has not; Caffe2's are 0, 1
    for keyword, there in told.items():
        if there != model.keywords.get(keyword):
            refuse(f"{keyword} is {there} in the file, {model.keywords.get(keyword)} in the model")
    if wrong:
        refuse(f"{len(wrong)} keys are missing or unknown, among them {', '.join(wrong[:5])}")
    for name, value in renamed.items():
        if value.shape != own[name].shape:
            hint = "; `classes` says whose rows to take" if name.startswith("head.cls.") else ""
            refuse(
                f"{name} is {tuple(value.shape)} in the file and {tuple(own[name].shape)} in "
                f"the model{hint}"
            )

    convention = families()[family][1] | input_convention(model, weights)
    convention = content.get("convention", {}) if family == "fcos" else convention
    if not isinstance(convention, dict) or not convention.keys() <= CONVENTION.keys():
        refuse(f"its convention is {convention!r:.99}")
    model.set_convention(**convention)
    model.load_state_dict(renamed, strict=False)
    if family in DETECTORS and family != "fcos" and model.num_classes == 80:
        if not (classes or model.classes):
            model.classes, model.category_ids = list(COCO.values()), list(COCO)
    return {
        "family": family,
        "convention": model.convention,
        "loaded": list(renamed),
        "ignored": list(unknown),
        "missing": missing,
        "new_classes": new_classes,
    }


def hub_file(name: str, classifier: str | None = None) -> Path:
    """Where torch's hub folder keeps weights of torchvision: "coco", its FCOS (box AP 39.2), or
    "imagenet", a classifier by its name there. A download checks the hash of the file."""
    if not (classifier or name == "coco"):
        raise UserError(
            "imagenet: torchvision has no weights for this model; its ResNets have "
            "the stride in the 3x3 convolution, the Caffe-style rows in the 1x1"
        )
    choices = get_model_weights("fcos_resnet50_fpn" if name == "coco" else classifier)
    weights = choices.COCO_V1 if name == "coco" else choices.IMAGENET1K_V1
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.split("/")[-1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(path), path.stem.split("-")[-1])
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"{name}: download {weights.url} and put it into {path.parent}, since "
                f"this process cannot ({error})"
            ) from None
    return path


# ---- export -------------------------------------------------------------------------------------


@torch.library.custom_op("fcos::nms", mutates_args=())
def nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """batched_nms as one operator, which an exported graph can hold."""
    return batched_nms(boxes, scores, labels, iou_threshold, max_detections)


@nms.register_fake
def _(boxes, scores, labels, iou_threshold, max_detections):
    return labels.new_empty(labels.shape[0], max_detections)


class Deployed(nn.Module):
    """What is exported, or captured: images uint8 (B, 3, H, W) RGB, padded at the bottom and right,
    and their sizes int64 (B, 2) before that -> boxes, scores, labels of `FCOS.decode`."""

    def __init__(self, model: "FCOS", **thresholds):
        super().__init__()
        self.model, self.thresholds = model, thresholds

    def forward(self, images: Tensor, sizes: Tensor):
        return self.model.decode(self.model(images, sizes), sizes, **self.thresholds)


def export_onnx(model: "FCOS", path, height: int, width: int):
    """Write `Deployed` to an ONNX file, for any number of images of height x width pixels, padding
    included: multiples of 32. The metadata hold the names of the classes and the test size."""
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise UserError(f"{path}: pip install onnx onnxscript ({error})") from None
    if height % 32 or width % 32 or min(height, width) < 32:
        raise UserError(f"height {height} and width {width}: expected multiples of 32")

    def onnx_nms(boxes, scores, labels, iou_threshold, max_detections):
        one = op.Constant(value_int=1)
        classes = op.Range(op.Constant(value_int=0), op.ReduceMax(labels, keepdims=0) + one, one)
        of_class = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))  # (B, K, N)
        nothing = op.Constant(value_float=-1.0)
        per_class = op.Where(of_class, op.Unsqueeze(scores, [1]), nothing)
        kept = op.NonMaxSuppression(boxes, per_class, [max_detections], [iou_threshold], [0.0])
        place = op.Gather(kept, [0, 2], axis=1)  # image and candidate
        kept = op.ScatterND(op.Expand(nothing, op.Shape(scores)), place, op.GatherND(scores, place))
        best, index = op.TopK(kept, [max_detections])
        return op.Where(op.Greater(best, 0.0), index, -1)

    device, B = model.pixel_mean.device, torch.export.Dim("B", min=1)
    example = (
        torch.zeros(2, 3, height, width, dtype=torch.uint8, device=device),
        torch.tensor([[height, width]] * 2, device=device),
    )
    program = torch.onnx.export(
        Deployed(model).eval(),
        example,
        input_names=["images", "sizes"],
        output_names=["boxes", "scores", "labels"],
        dynamo=True,
        verbose=False,
        dynamic_shapes={"images": {0: B}, "sizes": {0: B}},
        custom_translation_table={torch.ops.fcos.nms.default: onnx_nms},
    )
    for name in ("classes", "category_ids", "test_size"):
        program.model.metadata_props[name] = json.dumps(getattr(model, name))
    with atomic_write(path) as file:
        file.write(program.model_proto.SerializeToString())
