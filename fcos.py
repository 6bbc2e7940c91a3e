"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., arXiv 1904.01355) in one file.

    import fcos
    model = fcos.load("runs/shapes/model.pt")
    for detections in model.predict(["photo.jpg"]):
        print(detections["boxes"], detections["scores"], detections["labels"])

How FCOS works, and where to find each step:

  1. A backbone and a feature pyramid turn an image into maps P3 to P7 with strides of 8 to 128
     pixels (ResNet, FPN). Every cell of every map is a location in the image (make_points).
  2. At each location the head predicts a score for every class, the distances to the four sides
     of a box, and how central the location lies in that box (Head).
  3. For training, a location is assigned to the smallest box that contains it near its center
     and whose size suits its pyramid level (kernels/assign.py). Its targets follow from that box
     (encode).
  4. Three losses train the three predictions: focal loss for the classes, IoU loss for the
     boxes, cross entropy for centerness (fcos_loss; kernels/focal_loss.py, kernels/iou_loss.py).
  5. For detection, the best (location, class) pairs become boxes, and non-maximum suppression
     removes duplicates (FCOS.decode; kernels/nms.py).

Reading from here to the end of the class FCOS covers the paper. The table of models, prediction
on images, checkpoints, weights of other projects and ONNX export follow.

    B  images                 boxes   xyxy in pixels, continuous: x2 = x + w
    K  classes                ltrb    distances to the left, top, right, bottom side, in pixels
    P  locations, all levels  labels  0..K-1, in the order of the category ids; -1 is background
    G  boxes of one image     sizes   (B, 2) height, width of the images before padding
    D  detections             levels  locations are level-major, row-major inside a level
"""

import contextlib
import copy
import errno
import inspect
import io
import json
import math
import os
import pickle
import re
import reprlib
import secrets
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models import detection, get_model_weights
from torchvision.ops import FrozenBatchNorm2d, deform_conv2d

from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss
from kernels.iou_loss import KINDS, iou, iou_loss
from kernels.nms import batched_nms

__version__ = "1.0"


class UserError(ValueError):
    """A mistake in the caller's input; the scripts print it as one line, without a traceback."""


# ---- images -------------------------------------------------------------------------------------


def resized_hw(h: int, w: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return the (height, width) to which an image of h x w pixels is resized.

    The short side becomes `min_size` pixels, or less if the long side would exceed `max_size`.
    As in the official code, rounding lets the long side of a narrow image exceed max_size by up to
    2 %; a longer one becomes max_size.

    Raises UserError unless 1 <= min_size <= max_size.
    """
    if not 1 <= min_size <= max_size:
        raise UserError(f"min_size {min_size}: expected 1 or more, and at most max_size {max_size}")
    short, long = min(h, w), max(h, w)
    if long / short * min_size > max_size:
        min_size = max(round(max_size * short / long), 1)
    if short != min_size:
        long = int(min_size * long / short)
    if long > 1.02 * max_size:
        long = max_size
    return (min_size, long) if h <= w else (long, min_size)


def resize(image: Tensor, hw) -> Tensor:
    """Resize a uint8 image (3, H, W) to (3, *hw) with antialiased bilinear interpolation.

    The result is within one gray level of Pillow's, which the official code uses, and takes a
    sixth of the time.
    """
    if image.shape[-2:] == tuple(hw):
        return image
    # Only the strides change: PyTorch has a fast path for a batch in the layout channels_last.
    channels_last = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(channels_last, tuple(hw), mode="bilinear", antialias=True)[0]


def padded_hw(sizes, multiple: int = 32) -> tuple[int, int]:
    """Return the smallest (H, W), multiples of `multiple`, that holds images of all `sizes`."""
    h = max(size[0] for size in sizes)
    w = max(size[1] for size in sizes)
    return math.ceil(h / multiple) * multiple, math.ceil(w / multiple) * multiple


def pad_batch(images, hw=None) -> tuple[Tensor, Tensor]:
    """Pad uint8 images (3, h, w) with zeros at the bottom and right to one batch.

    hw: the padded (height, width); by default the smallest multiples of 32 that hold all images.
    Returns the batch, uint8 (B, 3, H, W), and the sizes before padding, int64 (B, 2).
    Raises UserError for an image that is not uint8.
    """
    sizes = [tuple(image.shape[-2:]) for image in images]
    H, W = hw or padded_hw(sizes)
    batch = torch.zeros(len(images), H, W, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for slot, image, (h, w) in zip(batch, images, sizes):
        if image.dtype != torch.uint8:
            raise UserError(f"an image of {image.dtype}: expected a uint8 tensor, from 0 to 255")
        slot[:, :h, :w] = image
    return batch, torch.tensor(sizes)


# The pixels that backbones were pretrained on, and the epsilon of their norms. Caffe's backbones
# expect BGR in 0..255 minus a mean.
CAFFE = dict(bgr=True, mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), bn_eps=0.0)
MSRA = CAFFE | dict(mean=(103.53, 116.28, 123.675), bn_eps=1e-5)
TORCH = dict(bgr=False, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), bn_eps=1e-5)


# ---- backbones ----------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """Group normalization in up to 32 groups; a group may hold a single value."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, x):
        # F.group_norm refuses a batch of one 1x1 map with one channel per group, but not a batch
        # of two. The result is the bias.
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


NORMS = {
    "frozen": FrozenBatchNorm2d,  # constant statistics, scale and shift
    "gn": GroupNorm,
    "bn": nn.BatchNorm2d,
    "syncbn": nn.BatchNorm2d,  # train.py converts it, because SyncBatchNorm runs on GPUs only
}


class DeformConv(nn.Conv2d):
    """Modulated deformable 3x3 convolution (DCNv2: Zhu et al., arXiv 1811.11168).

    `offset` predicts where each of the nine taps reads the input (y, x in pixels from its regular
    place: 18 channels) and the logit of a mask that it is multiplied by (9 channels).
    """

    def __init__(self, c_in, c_out, kernel, stride, padding, groups=1, bias=True):
        super().__init__(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)
        self.offset = nn.Conv2d(c_in, 27, kernel, stride, padding)

    def _conv_forward(self, x, weight, bias):  # nn.Conv2d.forward calls this
        dtype = torch.promote_types(weight.dtype, torch.float32)  # deform_conv2d lacks bf16
        offset, mask = self.offset(x).to(dtype).split((18, 9), 1)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        y = deform_conv2d(
            x.to(dtype), offset, weight, bias, self.stride, self.padding, mask=mask.sigmoid()
        )
        return y.to(x.dtype)


class ConvNorm(nn.Module):
    """A convolution followed by a normalization; `norm` is one of NORMS."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, norm="gn", bias=False, dcn=False):
        super().__init__()
        conv = DeformConv if dcn else nn.Conv2d
        self.conv = conv(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = NORMS[norm](c_out)
        self.folded = None  # weight and bias with the norm folded in, set by `inference`

    def fold(self):
        """Return the convolution's weight and bias with a norm of constant statistics folded in."""
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        mean = self.norm.running_mean
        if self.conv.bias is not None:
            mean = mean - self.conv.bias
        return self.conv.weight * scale[:, None, None, None], self.norm.bias - mean * scale

    def forward(self, x):
        # Folded weights have no gradient, and another thread may train the model meanwhile.
        if self.folded is not None and not torch.is_grad_enabled():
            return self.conv._conv_forward(x, *self.folded)
        # In training a frozen norm is folded in every call: this multiplies the weights once
        # instead of every activation, and no activation is kept for the backward pass.
        if isinstance(self.norm, FrozenBatchNorm2d):
            return self.conv._conv_forward(x, *self.fold())
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """The 1x1, 3x3, 1x1 block of ResNet-50 and deeper (He et al., arXiv 1512.03385).

    Caffe's weights have the stride in the first 1x1 convolution, all others in the 3x3.
    """

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
    """The 3x3, 3x3 block of ResNet-18 and 34, with the stride in the first convolution."""

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
    """Initialize convolutions by `weight_init`, deformable ones uniformly as in DCN; biases: 0."""
    for conv in module.modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        if isinstance(conv, DeformConv):
            bound = (9 * conv.in_channels) ** -0.5
            nn.init.uniform_(conv.weight, -bound, bound)
        else:
            weight_init(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)


def freeze(stages, number):
    """Freeze the first `number` of the modules `stages`, with the statistics of BatchNorms."""
    if number > len(stages):
        raise UserError(f"frozen_stages {number}: expected 0 to {len(stages)}")
    for stage in stages[:number]:
        stage.requires_grad_(False)
        for layer in stage.modules():
            if isinstance(layer, ConvNorm) and isinstance(layer.norm, nn.BatchNorm2d):
                layer.norm = FrozenBatchNorm2d(layer.norm.num_features)


# A backbone is any module with
#     strides              the strides of its features, some of 4, 8, 16 and 32, rising
#     channels             the channels of these features
#     forward(images)      returns these features, finest first
#     freeze(stages)       freezes the first `stages` of its stages
#     initialize()         fills it with random weights; not called for a module passed to FCOS
#     convention           optional: the pixels it expects, such as CAFFE; TORCH by default


class ResNet(nn.Module):
    """ResNet and ResNeXt without the classifier (He et al., arXiv 1512.03385, 1611.05431)."""

    strides = (4, 8, 16, 32)
    convention = CAFFE

    # fmt: off
    def __init__(
        self,
        block="bottleneck",    # or "basic"
        blocks=(3, 4, 6, 3),   # number of blocks in res2..res5
        stem=64,               # channels after the first convolution
        groups=1,              # groups of the 3x3 convolutions (RESNETS.NUM_GROUPS)
        width=None,            # channels per group in res2 (WIDTH_PER_GROUP); None: same as stem
        stride_in_1x1=True,    # stride in the first 1x1, otherwise in the 3x3 (STRIDE_IN_1X1)
        dcn=(),                # stages with deformable 3x3 convolutions, of 2..5 (STAGE_WITH_DCN)
        norm="frozen",         # one of NORMS
    ):
        # fmt: on
        super().__init__()
        self.stem = ConvNorm(3, stem, 7, 2, norm=norm)
        make_block = BLOCKS[block]
        self.channels = []
        c_in = stem
        for stage, depth in enumerate(blocks):
            c_mid = groups * (width or stem) * 2**stage
            c_out = make_block.expansion * stem * 2**stage
            layers = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                settings = stride, groups, norm, stride_in_1x1, stage + 2 in dcn
                layers.append(make_block(c_in, c_mid, c_out, *settings))
                c_in = c_out
            setattr(self, f"res{stage + 2}", nn.Sequential(*layers))
            self.channels.append(c_out)

    def initialize(self):
        initialize(self, partial(nn.init.kaiming_uniform_, a=1))

    def freeze(self, stages):
        freeze([self.stem, self.res2, self.res3, self.res4, self.res5], stages)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu_(), 3, 2, 1)
        c2 = self.res2(x)
        c3 = self.res3(c2)
        c4 = self.res4(c3)
        c5 = self.res5(c4)
        return c2, c3, c4, c5


class InvertedResidual(nn.Sequential):
    """The block of MobileNetV2: 1x1 to `expand` times the channels, depthwise 3x3, linear 1x1."""

    def __init__(self, c_in, c_out, stride, expand, norm):
        c_mid = expand * c_in
        layers = [
            ConvNorm(c_mid, c_mid, 3, stride, groups=c_mid, norm=norm),
            ConvNorm(c_mid, c_out, 1, norm=norm),
        ]
        if expand > 1:
            layers.insert(0, ConvNorm(c_in, c_mid, 1, norm=norm))
        super().__init__(*layers)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        *layers, last = self
        y = x
        for layer in layers:
            y = F.relu6(layer(y), inplace=True)
        return last(y) + x if self.residual else last(y)


class MobileNetV2(nn.Module):
    """MobileNetV2 without the last 1x1 and the classifier (arXiv 1801.04381, table 2)."""

    strides = (4, 8, 16, 32)
    channels = (24, 32, 96, 320)
    convention = CAFFE  # the official recipes use Caffe's pixels here, too
    # (expansion, output channels, stride of the first block) of each stage
    STAGES = (1, 16, 1), (6, 24, 2), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1)

    def __init__(self, blocks=(1, 2, 3, 4, 3, 3, 1), stem=32, norm="bn"):
        """blocks: the number of blocks in each of STAGES; stem: channels of the first layer."""
        super().__init__()
        self.features = nn.Sequential(ConvNorm(3, stem, 3, 2, norm=norm))
        c_in = stem
        for (expand, c_out, stride), depth in zip(self.STAGES, blocks):
            for i in range(depth):
                block_stride = stride if i == 0 else 1
                self.features.append(InvertedResidual(c_in, c_out, block_stride, expand, norm))
                c_in = c_out
        self.ends = [sum(blocks[:stages]) for stages in (2, 3, 5, 7)]  # last block of each stride

    def initialize(self):
        initialize(self, partial(nn.init.kaiming_normal_, mode="fan_out"))

    def freeze(self, stages):
        freeze(self.features, stages)

    def forward(self, x):
        stem, *blocks = self.features
        x = F.relu6(stem(x), inplace=True)
        features = []
        for i, block in enumerate(blocks, 1):
            x = block(x)
            if i in self.ends:
                features.append(x)
        return features


class Timm(nn.Module):
    """Any model of timm that offers feature maps (`features_only`) at strides 8, 16 and 32.

    The pixels it expects come from timm's own configuration. Building it never downloads;
    `load_pretrained` does, when train.py is asked for --weights imagenet.

    Raises UserError if timm is missing, if the model has no such maps, or if it uses dropout or
    drop_path: their random numbers depend on the number of GPUs and micro-batches.
    """

    def __init__(self, arch="resnet18"):
        super().__init__()
        if not re.fullmatch(r"\w+(\.\w+)?", arch):  # "hf-hub:..." would be fetched from the network
            raise UserError(f"arch {short_repr(arch)}: expected the name of a timm model")
        self.arch = arch
        self.body, maps = self.create(pretrained=False)
        for name, module in self.body.named_modules():
            rate = getattr(module, "drop_prob", None) or getattr(module, "p", 0)
            if "drop" in type(module).__name__.lower() and rate:
                raise UserError(f"arch {arch!r}: {name} drops at random ({rate}); choose another")
        strides = self.body.feature_info.reduction()
        channels = self.body.feature_info.channels()
        self.indices = [i for i, stride in enumerate(strides) if stride in (4, 8, 16, 32)]
        self.strides = tuple(strides[i] for i in self.indices)
        self.channels = tuple(channels[i] for i in self.indices)
        self.channels_last = maps[-1].shape[1] != channels[-1]  # maps (B, h, w, C)
        if not {8, 16, 32} <= set(strides):
            raise UserError(f"arch {arch!r}: expected maps at strides 8, 16, 32, found {strides}")
        pixels = getattr(self.body, "pretrained_cfg", None) or self.body.default_cfg
        mean = tuple(round(255.0 * value, 3) for value in pixels["mean"])
        std = tuple(round(255.0 * value, 3) for value in pixels["std"])
        self.convention = TORCH | dict(mean=mean, std=std)

    @torch.no_grad()
    def create(self, pretrained):
        """Create the timm model; returns it and its feature maps of an image of 128x128."""
        try:
            import timm

            body = timm.create_model(self.arch, pretrained=pretrained, features_only=True)
            maps = body.eval()(torch.zeros(1, 3, 128, 128))
        except ImportError:
            raise UserError("backbone timm: expected the package timm; pip install timm") from None
        except Exception as error:  # timm raises nearly anything; some models read one size only
            problem = f"timm cannot create it for images of 128x128 ({error})"
            raise UserError(f"arch {self.arch!r}: {problem}") from None
        return body.train(), maps

    def load_pretrained(self):
        """Fill the backbone with timm's pretrained weights, which timm downloads."""
        body, _ = self.create(pretrained=True)
        self.body.load_state_dict(body.state_dict(), strict=False)  # frozen norms count no batches

    def initialize(self):
        """Keep timm's own random initialization."""

    def freeze(self, stages):
        """Freeze the first `stages` child modules of the timm model, their BatchNorms included."""
        import timm.utils

        children = [name for name, _ in self.body.named_children()]
        if stages > len(children):
            raise UserError(f"frozen_stages {stages}: expected 0 to {len(children)}")
        timm.utils.freeze(self.body, children[:stages])

    def forward(self, x):
        maps = self.body(x)
        features = [maps[i] for i in self.indices]
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return features


BACKBONES = {"resnet": ResNet, "mobilenet": MobileNetV2, "timm": Timm}


# ---- feature pyramid and head -------------------------------------------------------------------


class FPN(nn.Module):
    """The feature pyramid (section 3.2): a map for each of `levels`, all with the same channels.

    Levels that the backbone has (its feature of stride 2**n is level n) get a lateral 1x1
    convolution, the upsampled coarser level added to it, and a 3x3 output convolution. Each further
    level is a strided convolution of the level before. Levels of the backbone that are coarser than
    the last of `levels` are also added to it, but have no output.
    """

    def __init__(self, strides_in, channels_in, channels, levels):
        super().__init__()
        # the place of each level among the backbone's features; a stride of 2**n is level n
        self.index = {stride.bit_length() - 1: i for i, stride in enumerate(strides_in)}
        self.lateral = [level for level in self.index if level >= levels[0]]
        self.output = [level for level in levels if level in self.index]
        self.further = [level for level in levels if level not in self.index]
        if levels[0] not in self.index or self.output + self.further != [*levels]:
            found = f"levels {levels} of a backbone with levels {tuple(self.index)}"
            raise UserError(f"{found}: expected one of these first, then all above it")
        for level in self.lateral:
            setattr(self, f"lateral{level}", nn.Conv2d(channels_in[self.index[level]], channels, 1))
            if level in self.output:
                setattr(self, f"output{level}", nn.Conv2d(channels, channels, 3, padding=1))
        for level in self.further:
            setattr(self, f"p{level}", nn.Conv2d(channels, channels, 3, 2, 1))

    def initialize(self):
        initialize(self, partial(nn.init.kaiming_uniform_, a=1))

    def forward(self, features):
        maps = []
        coarser = None
        for level in reversed(self.lateral):
            x = getattr(self, f"lateral{level}")(features[self.index[level]])
            if coarser is not None:
                x = x + F.interpolate(coarser, x.shape[-2:])
            coarser = x
            if level in self.output:
                maps.insert(0, getattr(self, f"output{level}")(x))
        for level in self.further:
            x = maps[-1]
            if level != self.further[0]:  # between two convolutions in a row
                x = x.relu()
            maps.append(getattr(self, f"p{level}")(x))
        return maps


class Tower(nn.Sequential):
    """Four 3x3 convolutions with GroupNorm and ReLU; with `dcn`, the last one is deformable."""

    def __init__(self, channels, dcn):
        layers = [ConvNorm(channels, channels, 3, bias=True, dcn=dcn and i == 3) for i in range(4)]
        super().__init__(*layers)

    def forward(self, x):
        for layer in self:
            x = layer(x).relu_()
        return x


# From the raw regression output to distances in pixels. The paper's exp makes every distance
# positive, but its gradient grows with the distance. The improved official models use the linear
# ReLU, in strides: predictions are of similar size on all levels.
ACTIVATIONS = {
    # exp(16) exceeds any image; infinity would give NaN gradients at background locations
    "exp": lambda x, stride: x.clamp(max=16).exp(),
    "relu": lambda x, stride: x.relu() * stride,
    # Not from a paper. With small objects, whose gradients are the largest, the relu was seen to
    # fall to 0, where it has no gradient, for hundreds of steps. exp is never 0.
    "exp_stride": lambda x, stride: x.clamp(max=16).exp() * stride,
}


class Head(nn.Module):
    """The head, shared by all levels (section 3.2).

    Two towers feed three predictions: classes, box and centerness. Unless `scales` is False, each
    level has one learned factor for its distances, since one convolution serves boxes of all sizes.
    """

    def __init__(self, channels, num_classes, strides, activation, ctr_on, tower_dcn, scales):
        super().__init__()
        self.strides = strides
        self.activation = activation
        self.ctr_on = ctr_on
        self.cls_tower = Tower(channels, tower_dcn)
        self.box_tower = Tower(channels, tower_dcn)
        self.cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box = nn.Conv2d(channels, 4, 3, padding=1)
        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)
        if scales:
            self.scale = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in strides)
        else:
            self.register_buffer("scale", torch.ones(len(strides), 1), persistent=False)

    def initialize(self):
        """Initialize as in section 4 of the paper, with a probability of 0.01 for every class, so
        that the background does not dominate the first steps (arXiv 1708.02002, section 3.3)."""
        initialize(self, partial(nn.init.normal_, std=0.01))
        nn.init.constant_(self.cls.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, features):
        """Predict for every location of all levels.

        features: one map (B, C, h, w) per level.
        Returns {"cls": (B, P, K) logits, "ltrb": (B, P, 4) pixels, "ctr": (B, P) logits}, and any
        further map that `predict_level` returns, as (B, P, C) or (B, P).
        """
        levels = [
            self.predict_level(feature, scale, stride)
            for feature, scale, stride in zip(features, self.scale, self.strides)
        ]
        return {
            name: torch.cat([by_location(maps[name]) for maps in levels], 1) for name in levels[0]
        }

    def predict_level(self, feature, scale, stride):
        """Return the maps of one level by name; a further output needs one more entry here.

        Only boxes are scaled back to the original image. A further output should have a unit that
        does not depend on the image size, such as fractions of the width of the box.
        """
        cls_features = self.cls_tower(feature)
        box_features = self.box_tower(feature)
        ctr_features = {"cls": cls_features, "box": box_features}[self.ctr_on]
        # Under autocast the scale makes these float32; cls, by far the largest, stays in 16 bits.
        regression = scale * self.box(box_features)
        return {
            "cls": self.cls(cls_features),
            "ltrb": ACTIVATIONS[self.activation](regression, stride),
            "ctr": self.ctr(ctr_features).squeeze(1).to(scale.dtype),
        }


def by_location(feature):
    """Flatten a map (B, C, h, w) to (B, h * w, C), or (B, h, w) to (B, h * w)."""
    if feature.ndim == 4:
        feature = feature.permute(0, 2, 3, 1)
    return feature.flatten(1, 2)


# ---- locations and targets ----------------------------------------------------------------------

STRIDES = (8, 16, 32, 64, 128)  # of P3..P7
RANGES = (64, 128, 256, 512)  # pixels: where one level ends and the next begins, see make_points
GRIDS = {  # where the cells of a row or column of `side` pixels lie
    "centre": lambda cell, stride, side: cell * stride + stride // 2,
    "corner": lambda cell, stride, side: cell * (side // cell.shape[0]),
}


def level_sizes(hw, strides=STRIDES) -> list[tuple[int, int]]:
    """Return (rows, columns) of every level for a padded image; each stage halves, rounding up."""
    return [((hw[0] - 1) // stride + 1, (hw[1] - 1) // stride + 1) for stride in strides]


def make_points(hw, strides=STRIDES, ranges=RANGES, device=None, grid="centre") -> Tensor:
    """Return the locations of all levels of a padded image of (height, width).

    The result is float32 (P, 5): x, y, stride, lo, hi in pixels. A location is the center of its
    cell. It can be assigned to a box if the largest of its distances to the four sides lies between
    lo and hi (section 3.2), so that boxes of different sizes do not compete for it. Both bounds are
    inclusive, as in the official code: a distance of exactly 64 is positive on P3 and on P4.

    grid "corner" is torchvision's: multiples of (height // rows, width // columns), from 0.
    """
    points = []
    bounds = (-1, *ranges, math.inf)
    sizes = level_sizes(hw, strides)
    for stride, (rows, columns), lo, hi in zip(strides, sizes, bounds, bounds[1:]):
        y = GRIDS[grid](torch.arange(rows, device=device), stride, hw[0])
        x = GRIDS[grid](torch.arange(columns, device=device), stride, hw[1])
        cells = torch.empty(rows, columns, 5, device=device)
        cells[..., 0] = x
        cells[..., 1] = y[:, None]
        cells[..., 2] = stride
        cells[..., 3] = lo
        cells[..., 4] = hi
        points.append(cells.flatten(0, 1))
    return torch.cat(points)


def encode(points: Tensor, truths: list[dict], index: Tensor) -> dict:
    """Build the training targets (eq. 1) from an assignment.

    points: (P, 5), from make_points. truths: for each of B images a dict with "boxes" (G, 4) xyxy
    pixels, "labels" (G,) int64, and any further column of the boxes, (G, ...). index: int64 (B, P),
    the box of its image that each location is assigned to, or -1; from `assign` or your function.

    Returns {"labels": int64 (B, P), -1 in the background; "ltrb": (B, P, 4) pixels; "index"; and
    every further column, (B, P, ...)}. All but the labels and the index are 0 in the background.
    """
    image = torch.arange(len(truths), device=index.device)[:, None]
    columns = {}
    for name in truths[0]:
        rows = pad_sequence([truth[name] for truth in truths], batch_first=True)  # (B, G, ...)
        value = -1 if name == "labels" else 0
        background = rows.new_full((len(rows), 1, *rows.shape[2:]), value)
        # the last row is the one at index -1
        columns[name] = torch.cat([rows, background], 1)[image, index]
    x1, y1, x2, y2 = columns.pop("boxes").unbind(2)
    x, y = points[:, 0], points[:, 1]
    ltrb = torch.stack([x - x1, y - y1, x2 - x, y2 - y], 2)
    return columns | {"ltrb": ltrb.where(index[..., None] >= 0, 0), "index": index}


def take(rows: Tensor, index: Tensor, fill=0) -> Tensor:
    """Return the rows (B, N, ...) of each image at index (B, P), `fill` where the index is -1."""
    image = torch.arange(index.shape[0], device=index.device)[:, None]
    taken = rows[image, index.clamp(min=0)]
    found = (index >= 0).reshape(*index.shape, *[1] * (taken.ndim - 2))
    return taken.where(found, fill)


def centerness(ltrb: Tensor) -> Tensor:
    """Return how central a location lies in its box (eq. 3): (..., 4) -> (...).

    1 at the center, towards 0 at the sides, and 0 where ltrb is 0, which is the background.
    """
    left, top, right, bottom = ltrb.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-12)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-12)
    return (horizontal * vertical).sqrt()


# ---- losses -------------------------------------------------------------------------------------


def loss_normalizers(targets: dict) -> Tensor:
    """Return the number of positive locations and the sum of their centerness, float32 (2,).

    Sum it over all images of an optimizer step, on all GPUs, then pass the sum to fcos_loss.
    """
    positives = (targets["labels"] >= 0).sum().float()
    return torch.stack([positives, centerness(targets["ltrb"]).sum()])


def fcos_loss(
    outputs: dict,
    targets: dict,
    normalizers: Tensor,
    box_loss: str = "giou",
    unit: str = "stride",
    quality: str = "centerness",
    box_weight: str | None = None,
) -> dict[str, Tensor]:
    """Return the losses of FCOS by name (eq. 2 and section 3.3), each a scalar.

    Focal loss on the classes, IoU loss on the boxes, and cross entropy on the quality of the boxes.
    train.py adds, logs and shows whatever this returns: a further loss is one more entry. Divide a
    sum over locations by one of the normalizers; a mean over the batch would depend on how the step
    is split over GPUs and micro-batches.

    outputs: from FCOS.forward. targets: from FCOS.targets. normalizers: (2,), see loss_normalizers.
    box_loss, unit: keywords of FCOS. quality: the target of "ctr", the "centerness" or the "iou" of
    the predicted box (AdelaiDet's BOX_QUALITY). box_weight: the weight of a positive location in
    the box loss, its "centerness" or the same for all ("uniform"). Centerness gives small objects
    less weight. None is as published: "centerness" if that is the quality, else "uniform".

    Background locations are masked, not removed: shapes never depend on values, nothing waits for
    the GPU, and a batch without a box is an ordinary input.
    """
    num_positives = normalizers[0].clamp(min=1)
    labels = targets["labels"]
    positive = labels >= 0
    target_centerness = centerness(targets["ltrb"])

    divisor = {"pixel": 1, "stride": outputs["points"][:, 2:3]}[unit]
    predicted = outputs["ltrb"] / divisor  # exact: strides are powers of two
    target = targets["ltrb"] / divisor

    if quality == "centerness":
        target_quality = target_centerness
    elif quality == "iou":
        target_quality = iou(predicted.detach(), target).where(positive, 0)
    else:
        raise ValueError(f"quality {quality!r}: expected centerness or iou")

    if box_weight is None:
        box_weight = "centerness" if quality == "centerness" else "uniform"
    if box_weight == "centerness":
        # Locations near the border of a box predict it poorly and will have low scores anyway.
        weight = target_centerness
        box_normalizer = normalizers[1].clamp(min=1e-6)
    elif box_weight == "uniform":
        weight = positive.float()
        box_normalizer = num_positives
    else:
        raise ValueError(f"box_weight {box_weight!r}: expected centerness, uniform or None")

    cls = sigmoid_focal_loss(outputs["cls"].flatten(0, 1), labels.flatten())
    box = iou_loss(predicted.flatten(0, 1), target.flatten(0, 1), weight.flatten(), box_loss)
    ctr = F.binary_cross_entropy_with_logits(
        outputs["ctr"], target_quality, weight=positive.float(), reduction="sum"
    )
    return {"cls": cls / num_positives, "box": box / box_normalizer, "ctr": ctr / num_positives}


# ---- the model ----------------------------------------------------------------------------------

# What weights expect of pixels and boxes. It belongs to the weights, not to the architecture. The
# official FCOS was trained on inclusive boxes (x2 = x + w - 1), so decoding adds the missing pixel.
# Locations lie at the "centre" of their cells, or, in torchvision, at the "corner".
CONVENTION = CAFFE | dict(inclusive=False, grid="centre", score="fcos")


class ScoreRule(NamedTuple):
    """How a family of weights scores detections.

    prob is the probability of a class, product its product with centerness.
    """

    threshold: float  # of a candidate
    compared: Callable  # (prob, product) -> what is compared with the threshold
    ranked: Callable  # (prob, product) -> what ranks the candidates of a level
    final: Callable  # (product) -> the score of a detection

    def rank(self, prob, product):
        """Return what ranks the candidates of a level, and -inf for those below the threshold."""
        passed = self.compared(prob, product) > self.threshold
        return self.ranked(prob, product).where(passed, -math.inf)


# A location far from the center of its object predicts a worse box. Multiplied by centerness, its
# score drops, so that suppression keeps the better box of the object.
SCORES = {
    "fcos": ScoreRule(
        threshold=0.05,
        compared=lambda prob, product: prob,
        ranked=lambda prob, product: product,
        final=torch.sqrt,
    ),
    "torchvision": ScoreRule(
        threshold=0.2,
        compared=lambda prob, product: product.sqrt(),
        ranked=lambda prob, product: product,
        final=torch.sqrt,
    ),
    "mmdetection": ScoreRule(
        threshold=0.05,
        compared=lambda prob, product: prob,
        ranked=lambda prob, product: prob,
        final=lambda product: product,
    ),
}


def defaults(function) -> dict:
    """Return {keyword: default} of the parameters of a function or class that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def changeable(keyword):
    """Make a property of FCOS that reads one of its `keywords`, and checks and changes it."""

    def read(model):
        return model.keywords[keyword]

    def change(model, value):
        model.keywords = resolve(model.keywords | {keyword: value})

    return property(read, change)


class FCOS(nn.Module):
    """The detector. Use `build` for a row of MODELS, `load` for a file, or pass a backbone.

    `keywords` holds everything it was built with except the number of classes, `loss` the keywords
    of fcos_loss, `classes` and `category_ids` those of the data set, and `convention` what the
    weights expect of pixels and boxes (see CONVENTION).

    The keywords that decide how to resize and decode are attributes, too: setting
    `model.nms_threshold = 0.5` changes every prediction from then on, and is saved with the model.

    Raises UserError for a keyword that does not fit, with the choices.
    """

    pixel_mean: Tensor  # (3, 1, 1), set by set_convention
    pixel_std: Tensor
    name = "FCOS"  # or the row of MODELS it was built from
    loss_keywords = list(defaults(fcos_loss))  # read at import: fcos_loss may be replaced later
    candidate_threshold = changeable("candidate_threshold")
    topk = changeable("topk")
    nms_threshold = changeable("nms_threshold")
    max_detections = changeable("max_detections")
    test_size = changeable("test_size")

    # fmt: off
    def __init__(
        self,
        num_classes,             # without a background class (the official NUM_CLASSES has one)
        backbone="resnet",       # one of BACKBONES, whose keywords follow at the end; or a module
        frozen_stages=0,         # stages of the backbone that are frozen (FREEZE_CONV_BODY_AT)
        imagenet=None,           # torchvision's name of the backbone, for --weights imagenet
        channels=256,            # of pyramid and head (BACKBONE_OUT_CHANNELS)
        levels=(3, 4, 5, 6, 7),  # of the pyramid; level n has a stride of 2**n (FPN_STRIDES);
                                 # (2, 3, 4, 5, 6) for objects of less than 16 pixels
        ranges=None,             # pixels where one level ends (SIZES_OF_INTEREST); None: RANGES
        activation="relu",       # of the distances, one of ACTIVATIONS (NORM_REG_TARGETS: "relu")
        unit="stride",           # of the distances in the box loss, or "pixel" (NORM_REG_TARGETS)
        ctr_on="box",            # the tower that predicts centerness, or "cls" (CENTERNESS_ON_REG)
        quality="centerness",    # what multiplies the scores, or "iou" (BOX_QUALITY)
        box_weight=None,         # "centerness" or "uniform"; None: as published, see fcos_loss
        radius=1.5,              # of center sampling, in strides; 0: none (CENTER_SAMPLING_RADIUS)
        box_loss="giou",         # one of kernels.iou_loss.KINDS (IOU_LOSS_TYPE)
        tower_dcn=False,         # last convolution of both towers deformable (USE_DCN_IN_TOWER)
        scales=True,             # a learned factor of the distances for each level (USE_SCALE)
        grid="centre",           # of the locations in their cells, or torchvision's "corner"
        test_size=(800, 1333),   # pixels in prediction (INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST)
        candidate_threshold=None,  # least score of a candidate; None: see SCORES (INFERENCE_TH)
        topk=1000,               # candidates kept on each level (PRE_NMS_TOP_N)
        nms_threshold=0.6,       # IoU above which the lower score is removed (NMS_TH)
        max_detections=100,      # of an image (TEST.DETECTIONS_PER_IMAGE)
        **backbone_keywords,
    ):
        # fmt: on
        # All arguments that have a default; the model stores them. This must stay the first line,
        # because locals() holds every variable.
        given = {name: value for name, value in locals().items() if name in defaults(FCOS)}
        super().__init__()
        passed = isinstance(backbone, nn.Module)
        if passed:
            given["backbone"] = None  # a module cannot be stored among the keywords
        else:
            check("backbone", backbone, "resnet")
        self.keywords = resolve(given | backbone_keywords)
        self.num_classes = check("num_classes", num_classes, 80)
        self.strides = tuple(2**level for level in levels)
        self.ranges = self.keywords["ranges"]
        self.radius = radius
        self.loss = {name: self.keywords[name] for name in self.loss_keywords}
        self.classes = None
        self.category_ids = None

        self.backbone = backbone if passed else BACKBONES[backbone](**backbone_keywords)
        self.fpn = FPN(self.backbone.strides, self.backbone.channels, channels, levels)
        self.head = Head(channels, num_classes, self.strides, activation, ctr_on, tower_dcn, scales)
        if not passed:
            self.backbone.initialize()
        self.fpn.initialize()
        self.head.initialize()
        if frozen_stages:
            self.backbone.freeze(frozen_stages)
        pixels = getattr(self.backbone, "convention", TORCH)
        self.set_convention(grid=grid, **pixels)
        self.to(memory_format=torch.channels_last)  # the fastest layout for convolutions

    def set_convention(self, **changes):
        """Change what the weights expect of pixels and boxes.

        changes: entries of CONVENTION. Raises UserError for another entry, type or range.
        """
        changed = getattr(self, "convention", CONVENTION) | changes
        self.convention = check_entries("convention", changed, CONVENTION)
        for name in ("mean", "std"):
            value = torch.tensor(self.convention[name]).view(3, 1, 1).to(next(self.parameters()))
            self.register_buffer(f"pixel_{name}", value, persistent=False)
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = self.convention["bn_eps"]

    def normalize(self, images: Tensor, sizes) -> Tensor:
        """Normalize uint8 RGB images (B, 3, H, W) to float32 in the channel order of the weights.

        The padding, whatever lies beyond `sizes` (B, 2), becomes 0, as in the official code.
        """
        B, _, H, W = images.shape
        if self.convention["bgr"]:
            images = images.flip(1)
        images = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        sizes = torch.as_tensor(sizes, device=images.device)
        h, w = (side.view(B, 1, 1, 1) for side in sizes.unbind(1))
        y = torch.arange(H, device=images.device)[:, None]
        x = torch.arange(W, device=images.device)
        return images.masked_fill_((y >= h) | (x >= w), 0)

    def points(self, hw, device=None) -> Tensor:
        """Return the locations (P, 5) of a padded image of (height, width): see make_points."""
        return make_points(hw, self.strides, self.ranges, device, self.convention["grid"])

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict:
        """Predict for every location, in training and evaluation alike.

        images: uint8 RGB (B, 3, H, W), padded at the bottom and right if `sizes` (B, 2) are given;
        or float, taken as normalized already.

        Returns {"cls": (B, P, K) logits, "ltrb": (B, P, 4) pixels, "ctr": (B, P) logits, whatever
        else the head returns, "points": (P, 5), "levels": the number of locations of each level}.
        """
        check_inputs(images, sizes)
        hw = images.shape[-2:]
        if not images.is_floating_point():
            images = self.normalize(images, [hw] * len(images) if sizes is None else sizes)
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        check_features(features, hw, self.backbone)
        outputs = self.head(self.fpn(features))
        levels = [rows * columns for rows, columns in level_sizes(hw, self.strides)]
        return outputs | {"points": self.points(hw, images.device), "levels": levels}

    def targets(self, hw, truths: list[dict]) -> dict:
        """Return what every location of a padded (height, width) batch has to predict.

        truths and the result: see `encode`. kernels/assign.py has the rules of section 3.1 that
        choose the box of a location.
        """
        boxes = [truth["boxes"] for truth in truths]
        points = self.points(hw, boxes[0].device)
        return encode(points, truths, assign(points, boxes, self.radius))

    def decode(self, outputs: dict, sizes: Tensor, keep_scores: bool = False) -> dict:
        """Turn the outputs of `forward` into detections, in shapes that never depend on values.

        On each level the `topk` best candidates remain; `suppress` then leaves `max_detections`
        over all levels (section 3.3). keep_scores: ignore how `suppress` changes the scores.

        Returns {"boxes": (B, D, 4) xyxy pixels, clipped to `sizes`; "scores": (B, D), falling;
        "labels": (B, D); and every further output of the head at the location of the detection,
        (B, D, ...)}. Rows after the last detection are padding: boxes 0, scores -inf, labels -1.
        """
        found = self.candidates(outputs, sizes)
        keep, scores = self.suppress(found["boxes"], found["scores"], found["labels"])
        if keep_scores:
            scores = take(found["scores"], keep, -math.inf)
        fill = {"labels": -1}
        detections = {name: take(x, keep, fill.get(name, 0)) for name, x in found.items()}
        return detections | {"scores": scores}

    def candidates(self, outputs: dict, sizes: Tensor) -> dict:
        """Return the best (location, class) pairs of every level as boxes, without suppression.

        The result is that of `decode` with N candidates instead of D detections, level by level;
        a score of -inf marks one below the threshold or without area inside its image.
        """
        rule = SCORES[self.convention["score"]]
        if self.candidate_threshold is not None:
            rule = rule._replace(threshold=self.candidate_threshold)
        cls_levels = outputs["cls"].split(outputs["levels"], 1)
        ctr_levels = outputs["ctr"].split(outputs["levels"], 1)
        pairs = []
        first = 0  # the position of the level's first location
        for cls, ctr in zip(cls_levels, ctr_levels):
            location, label, product = best_pairs(cls, ctr, rule, self.topk)
            pairs.append((location + first, label, product))
            first += cls.shape[1]
        location, label, product = (torch.cat(of_levels, 1) for of_levels in zip(*pairs))

        ltrb = take(outputs["ltrb"], location).float()
        boxes = self.boxes_at(outputs["points"][location], ltrb, sizes)
        x1, y1, x2, y2 = boxes.unbind(-1)
        valid = (product >= 0) & (x2 > x1) & (y2 > y1)  # false for NaN, too
        scores = rule.final(product.clamp(min=0)).where(valid, -math.inf)
        used = "cls", "ltrb", "ctr", "points", "levels"
        further = {name: take(x, location) for name, x in outputs.items() if name not in used}
        return {"boxes": boxes, "scores": scores, "labels": label} | further

    def boxes_at(self, points: Tensor, ltrb: Tensor, sizes) -> Tensor:
        """Return the boxes (B, N, 4) of points (B, N, 5) and distances, clipped to sizes."""
        left, top, right, bottom = ltrb.unbind(-1)
        x, y = points[..., 0], points[..., 1]
        extra = float(self.convention["inclusive"])  # see CONVENTION
        sizes = torch.as_tensor(sizes, device=ltrb.device).float()
        h, w = sizes.view(ltrb.shape[0], 2, 1).unbind(1)
        x1 = torch.minimum((x - left).clamp(min=0), w - extra)
        y1 = torch.minimum((y - top).clamp(min=0), h - extra)
        x2 = torch.minimum((x + right + extra).clamp(min=extra), w)
        y2 = torch.minimum((y + bottom + extra).clamp(min=extra), h)
        return torch.stack([x1, y1, x2, y2], -1)

    def suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the detections among candidates: greedy non-maximum suppression in each class.

        All predictions pass through this method: replace it for another suppression, such as
        Soft-NMS, which also changes the scores. With tiles it chooses on each of them, and then
        among all that they found, with the scores of the candidates.

        boxes (B, N, 4) xyxy pixels, scores (B, N), -inf for padding, labels (B, N).
        Returns the candidates that remain, int64 (B, D), best first and then -1, and their scores
        (B, D), -inf where there is none.
        """
        # batched_nms of kernels/nms.py, as an operator that can be exported
        keep = nms(boxes, scores, labels, self.nms_threshold, self.max_detections)
        return keep, take(scores, keep, -math.inf)

    def detect(self, outputs: dict, sizes: Tensor, score_threshold: float = 0.0) -> list[dict]:
        """Return `decode` as a list with one dict per image, without padding and low scores."""
        return as_list(self.decode(outputs, sizes), score_threshold)

    def rescale(self, boxes: Tensor, from_hw, to_hw) -> Tensor:
        """Scale boxes (D, 4) from an image of `from_hw` (height, width) to the same at `to_hw`.

        The pixel that decoding adds to inclusive boxes does not scale, as in the official code.
        """
        extra = torch.tensor([0.0, 0.0, 1.0, 1.0]) * self.convention["inclusive"]
        scale_x = float(to_hw[1]) / float(from_hw[1])
        scale_y = float(to_hw[0]) / float(from_hw[0])
        return (boxes - extra) * torch.tensor([scale_x, scale_y, scale_x, scale_y]) + extra

    def predict(
        self,
        images,
        min_size: int | None = None,
        max_size: int | None = None,
        score_threshold: float = 0.0,
        batch_size: int = 1,
        graph: bool = False,
        tile: int | None = None,
        overlap: float = 0.2,
        tta: bool = False,
    ) -> list[dict]:
        """Detect objects in images of any size; returns one dict per image, on the CPU.

        images: one, or an iterable of paths, PIL images, RGB uint8 arrays (H, W, 3) or RGB uint8
        tensors (3, H, W). min_size, max_size: resize to these pixels instead of `test_size`.
        score_threshold: leave out detections that score less. batch_size: consecutive views that
        are padded to one size run together. graph: replay CUDA graphs on a GPU, see `replay`.
        tile, overlap, tta: look at each image several times, see `make_views`.
        After model.compile(dynamic=False) every padded size is a graph: set
        torch._dynamo.config.recompile_limit (8) to their number, or later sizes run eager.

        Returns [{"boxes": (D, 4) xyxy pixels of the image, "scores": (D,), "labels": (D,), and
        every further output of the head, (D, ...)}], always a list.
        """
        short, long = self.test_size
        short = check("min_size", short if min_size is None else min_size, 1)
        long = check("max_size", long if max_size is None else max_size, 1)
        score_threshold = check("score_threshold", score_threshold, 0.0)
        batch_size = check("batch_size", batch_size, 1)
        tile = check("tile", tile, None)
        overlap = check("overlap", overlap, 0.2)
        views = dict(test_size=(short, long), tile=tile, overlap=overlap, tta=tta)
        results = []
        for found in predict_images(self, list_images(images), batch_size, graph, views):
            kept = found["scores"] >= score_threshold
            results.append({name: values[kept] for name, values in found.items()})
        return results


def best_pairs(cls, ctr, rule, topk):
    """Choose the `topk` best (location, class) pairs of one level.

    cls (B, P, K) and ctr (B, P) are logits, rule is a ScoreRule. The best pairs lie among the
    `topk` locations with the best class, because the centerness of a location is the same for all
    of its classes. Ranking locations first avoids sorting all P * K pairs.

    Returns location (B, N), label (B, N) and the product of probability and centerness (B, N),
    which is -inf for pairs that do not exceed the threshold.
    """
    K = cls.shape[2]
    ctr_prob = ctr.float().sigmoid()
    # One NaN hides the best class; 1 lets the other classes of that location take part.
    best_prob = cls.amax(2).float().sigmoid().nan_to_num(nan=1.0)
    locations = rule.rank(best_prob, best_prob * ctr_prob)
    # min would make N a constant in an exported graph; sym_min keeps it dynamic
    location = locations.topk(torch.sym_min(topk, locations.shape[1])).indices

    prob = take(cls, location).float().sigmoid()  # (B, at most topk, K)
    product = prob * ctr_prob.gather(1, location)[..., None]
    pairs = rule.rank(prob, product).flatten(1)
    best, pair = pairs.topk(torch.sym_min(topk, pairs.shape[1]))
    product = product.flatten(1).gather(1, pair).where(best > -math.inf, -math.inf)
    return location.gather(1, pair // K), pair % K, product


# ---- models -------------------------------------------------------------------------------------

# Parts of the rows of MODELS. Backbones:
FROZEN = dict(norm="frozen", frozen_stages=2)
R_50 = dict(blocks=(3, 4, 6, 3)) | FROZEN
R_101 = dict(blocks=(3, 4, 23, 3)) | FROZEN
STRIDE_IN_3x3 = dict(stride_in_1x1=False)
R_50_TORCH = R_50 | STRIDE_IN_3x3 | dict(imagenet="resnet50")
X_101_32x8d = R_101 | STRIDE_IN_3x3 | dict(groups=32, width=8, imagenet="resnext101_32x8d")
X_101_64x4d = R_101 | STRIDE_IN_3x3 | dict(groups=64, width=4, imagenet="resnext101_64x4d")
MNV2 = dict(backbone="mobilenet", norm="bn", imagenet="mobilenet_v2")
SYNCBN = dict(norm="syncbn")
TINY = dict(block="basic", blocks=(1, 1, 2, 2), norm="gn")  # six blocks of two convolutions
# The paper's first version, and the improved one ("imprv") of the official repository:
PLAIN = dict(activation="exp", ctr_on="cls", radius=0.0, box_loss="iou", unit="pixel")
IMPRV = dict(activation="relu", ctr_on="box", radius=1.5, box_loss="giou", unit="stride")
# Variants of the improved version:
DCN_345 = IMPRV | dict(dcn=(3, 4, 5), tower_dcn=True)
DCN_45 = IMPRV | dict(dcn=(4, 5), tower_dcn=True)
IOU = IMPRV | dict(quality="iou")  # AdelaiDet's
REAL_TIME = IMPRV | dict(levels=(3, 4, 5), ranges=(64, 128), test_size=(512, 736))  # AdelaiDet's
UNIFORM_LOSS = dict(box_loss="giou_exact", box_weight="uniform")
TORCHVISION = IMPRV | UNIFORM_LOSS | dict(scales=False, grid="corner")
HALVED = dict(ranges=(32, 64, 128, 256))  # so that small images use several levels
# For small objects: a finest stride of 4, and a loss that gives them full weight (see fcos_loss)
STRIDE_4 = IMPRV | UNIFORM_LOSS | dict(levels=(2, 3, 4, 5, 6), activation="exp_stride") | HALVED

# One architecture per row, named like the official configurations, without the schedule; the last
# five are not official. The keywords are those of FCOS and of the row's backbone.
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
    "fcos_syncbn_c128_MNV2_FPN":        MNV2        | PLAIN | SYNCBN | dict(channels=128),
    "fcos_imprv_iou_R_50_FPN":          R_50        | IOU,
    "fcos_rt_R_50_FPN":                 R_50        | REAL_TIME | SYNCBN,
    "fcos_torchvision_R_50_FPN":        R_50_TORCH  | TORCHVISION,
    "small":                            TINY        | STRIDE_4 | dict(stem=32, channels=32),
    "shapes":                           TINY        | IMPRV | HALVED | dict(stem=16, channels=64),
}
# fmt: on


class Numbers(NamedTuple):
    """Bounds of a number or of every number in a tuple; bounds of type int allow only ints."""

    least: float
    most: float
    any_length: bool = False  # of a tuple; otherwise as long as the default


# Allowed values of keywords: bounds or choices. Other keywords need the type of their default.
# Without these checks, a typing error or a damaged file could build a model that fails during
# training or fills the memory.
CHECKS: dict[str, Any] = {
    "backbone": BACKBONES,
    "block": BLOCKS,
    "blocks": Numbers(1, 200),
    "stem": Numbers(1, 2**14),
    "groups": Numbers(1, 2**14),
    "width": Numbers(1, 2**14),
    "dcn": Numbers(2, 5, any_length=True),
    "norm": NORMS,
    "frozen_stages": Numbers(0, 100),
    "channels": Numbers(1, 2**14),
    "levels": Numbers(2, 10, any_length=True),
    "ranges": Numbers(1.0, 1e6, any_length=True),
    "activation": ACTIVATIONS,
    "unit": ("pixel", "stride"),
    "ctr_on": ("cls", "box"),
    "quality": ("centerness", "iou"),
    "box_weight": ("centerness", "uniform"),
    "radius": Numbers(0.0, 1000.0),
    "box_loss": KINDS,
    "grid": GRIDS,
    "test_size": Numbers(1, 10**6),
    "candidate_threshold": Numbers(0.0, 1.0),
    "topk": Numbers(1, 10**6),
    "nms_threshold": Numbers(0.0, 1.0),
    "max_detections": Numbers(1, 10**6),
    "num_classes": Numbers(1, 10**6),
    "min_size": Numbers(1, 10**6),  # from here on: arguments of FCOS.predict
    "max_size": Numbers(1, 10**6),
    "score_threshold": Numbers(-math.inf, math.inf),
    "batch_size": Numbers(1, 10**6),
    "tile": Numbers(32, 10**6),
    "overlap": Numbers(0.0, 0.9),
    "mean": Numbers(0.0, 1e6),  # from here on: entries of CONVENTION
    "std": Numbers(1e-6, 1e6),
    "bn_eps": Numbers(0.0, 1e6),
    "score": SCORES,
}


def is_allowed(value, default, allowed) -> bool:
    """Return whether an entry of CHECKS allows a value; None allows the type of the default."""
    if allowed is None:
        kind = str if default is None else type(default)
        return type(value) is kind or (kind is float and type(value) is int)
    if not isinstance(allowed, Numbers):
        return isinstance(value, str) and value in allowed
    numbers = (value,)
    if allowed.any_length or isinstance(default, tuple):
        numbers = value
        if type(value) is not tuple or not (allowed.any_length or len(value) == len(default)):
            return False
    kinds = (int,) if type(allowed.least) is int else (int, float)  # a bool is neither
    return all(type(x) in kinds and allowed.least <= x <= allowed.most for x in numbers)


def check(keyword: str, value, default):
    """Return the value of a keyword, with a list as a tuple and a NumPy number as Python's.

    Raises UserError if the value is not allowed.
    """
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, np.number):
        value = value.item()
    if value is None and default is None:
        return value
    allowed = CHECKS.get(keyword)
    if default is not None and not is_allowed(default, default, allowed):
        allowed = None  # a custom backbone uses this keyword in another sense
    if not is_allowed(value, default, allowed):
        expected = "text" if default is None else f"a value like {default!r}"
        if isinstance(allowed, Numbers):
            if default is None:
                expected = "a tuple of numbers" if allowed.any_length else "a number"
            expected = f"{expected} from {allowed.least} to {allowed.most}"
        elif allowed is not None:
            expected = f"one of {', '.join(allowed)}"
        raise UserError(f"{keyword} {short_repr(value)}: expected {expected}")
    return value


def check_inputs(images, sizes):
    """Raise UserError if these are no arguments of FCOS.forward, but of a torchvision model."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images {short_repr(images, 60)}: expected a tensor (B, 3, H, W)")
    if sizes is None or isinstance(sizes, Tensor) or np.shape(sizes) == (len(images), 2):
        return
    found = short_repr(sizes, 60)
    raise UserError(f"sizes {found}: expected (height, width) of each image, no targets")


def check_features(features, hw, backbone):
    """Raise UserError unless the features of a (height, width) image have the strides and channels
    that the backbone declares. Other strides would silently move every location."""
    if torch.compiler.is_compiling():  # sizes may be symbols here
        return
    sizes = level_sizes(hw, backbone.strides)
    expected = [(channels, *size) for channels, size in zip(backbone.channels, sizes)]
    found = [tuple(feature.shape[1:]) for feature in features]
    if found != expected:
        values = f"(channels, height, width) {expected} as it declares, found {found}"
        raise UserError(f"backbone {type(backbone).__name__}: expected features of {values}")


def check_entries(kind: str, entries, defaults: dict) -> dict:
    """Return the entries of a dict, checked; raises UserError for one that has no default."""
    if not isinstance(entries, dict):
        raise UserError(f"{kind} {short_repr(entries)}: expected a dict")
    for name in entries:
        if name not in defaults:
            raise UserError(f"{kind} {short_repr(name)}: expected one of {', '.join(defaults)}")
    return {name: check(name, value, defaults[name]) for name, value in entries.items()}


def resolve(keywords: dict) -> dict:
    """Return all keywords of FCOS and of its backbone, with defaults for those not given.

    The result and the number of classes suffice to build the same model again.
    Raises UserError for an unknown keyword or a value that is not allowed.
    """
    if not isinstance(keywords, dict):
        raise UserError(f"keywords {short_repr(keywords)}: expected a dict")
    resolved = defaults(FCOS)
    backbone = keywords.get("backbone", "resnet")
    if backbone is None:  # a module was passed to FCOS
        resolved["backbone"] = None
    else:
        resolved |= defaults(BACKBONES[check("backbone", backbone, "resnet")])
    resolved |= check_entries("keyword", keywords, resolved)
    levels = resolved["levels"]
    if resolved["ranges"] is None:
        if len(levels) != 1 and levels != defaults(FCOS)["levels"]:
            raise UserError(f"levels {levels}: expected ranges with them, found none")
        resolved["ranges"] = RANGES[: len(levels) - 1]  # one level has no other to hand over to
    check_combination(resolved)
    return resolved


def check_combination(keywords):
    """Raise UserError for values that are allowed one by one, but not together."""
    levels, ranges, test_size = (keywords[name] for name in ("levels", "ranges", "test_size"))
    consecutive = levels and levels == tuple(range(levels[0], levels[0] + len(levels)))
    for keyword, fits, expected in (
        ("levels", consecutive, "consecutive levels, such as (3, 4, 5, 6, 7)"),
        ("ranges", len(ranges) == len(levels) - 1, f"{len(levels) - 1}, one between two levels"),
        ("ranges", list(ranges) == sorted(set(ranges)), "ascending numbers"),
        ("test_size", test_size[0] <= test_size[1], "the short side first"),
        ("channels", keywords["channels"] % 32 == 0, "a multiple of 32, for 32 groups in the head"),
    ):
        if not fits:
            raise UserError(f"{keyword} {keywords[keyword]}: expected {expected}")


def model_keywords(name: str, overrides: dict) -> dict:
    """Return the resolved keywords of the row `name` of MODELS, updated by `overrides`.

    If the backbone changes, keywords of the row's backbone are dropped. Raises UserError for an
    unknown row or keyword, and for other levels without ranges.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    kept = MODELS[name]
    row = resolve(kept)
    if overrides.get("backbone", row["backbone"]) != row["backbone"]:
        of_backbone = {*defaults(BACKBONES[row["backbone"]]), "frozen_stages", "imagenet"}
        kept = {key: value for key, value in kept.items() if key not in of_backbone}
    levels = check("levels", overrides.get("levels", row["levels"]), row["levels"])
    if levels != row["levels"] and "ranges" not in overrides:
        if len(levels) != 1:  # a single level has no ranges
            default = f"{name} has levels {row['levels']} and ranges {row['ranges']} in pixels"
            raise UserError(f"levels {levels}: expected ranges with them; {default}")
        kept = kept | {"ranges": None}
    return resolve(kept | overrides)


def build(name: str, num_classes: int = 80, **overrides) -> FCOS:
    """Build the model of the row `name` of MODELS with random weights, without downloads.

    overrides: keywords of FCOS and of the row's backbone that replace the row's, such as
    norm="gn", frozen_stages=0. Raises UserError, a ValueError, with the choices.
    """
    model = FCOS(num_classes, **model_keywords(name, overrides))
    model.name = name
    return model


# ---- values in messages -------------------------------------------------------------------------


class ShortRepr(reprlib.Repr):
    """Write any value in little time and space, even if it is nested, shared or huge."""

    def repr_int(self, value, level):
        return repr(value) if abs(value) < 10**30 else "a huge number"

    def repr_instance(self, value, level):
        try:
            return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
        except (AttributeError, RuntimeError, TypeError):  # no array, or a nested tensor
            return super().repr_instance(value, level)


def short_repr(value, limit: int = 99) -> str:
    """Return any value as Python writes it, on one line of at most `limit` characters."""
    writer = ShortRepr()
    writer.maxstring = writer.maxother = limit
    return printable(writer.repr(value), limit)


def printable(value, limit: int = 300) -> str:
    """Return text, a path or an error on one line of at most `limit` characters.

    Characters that do not print become escapes, and the middle of a long line is left out. Other
    values are written by `short_repr`.
    """
    if not isinstance(value, (str, os.PathLike, Exception)):
        return short_repr(value, limit)
    line = str(value)
    if len(line) > limit:
        line = f"{line[: limit * 2 // 3 - 5]} ... {line[-limit // 3 :]}"
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


# ---- prediction ---------------------------------------------------------------------------------


def regular_file(path):
    """Return the path; raises OSError if it is a folder, pipe or device (reads could block)."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("Is a directory" if os.path.isdir(path) else "expected a regular file")
    return path


# Pillow warns about EXIF tags that are not used here, and about transparent palettes.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

TURNS = {  # EXIF orientation: the operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_turn(image):
    """Return the one of TURNS that an image needs, or None."""
    try:
        # ImageOps.exif_transpose fails if any other EXIF tag is malformed
        return TURNS.get(image.getexif().get(0x0112))
    except Exception:  # damaged
        return None


def read_image(source, hw=None, upright=False) -> Tensor:
    """Read an image as 8-bit RGB and return it as a uint8 tensor (3, H, W).

    source: a path, a PIL image, a file object, or the bytes of an image file. Gray, palette, CMYK
    and transparent images are converted; 16-bit images keep the highest 8 bits in use.

    hw: the (height, width) of its annotations. The EXIF orientation is applied unless the stored
    image already has this size, because COCO's boxes refer to the stored pixels. upright: apply it
    even then, because YOLO's boxes refer to the upright image.

    Raises UserError if the file cannot be read, or if its size is not `hw`.
    """
    is_path = isinstance(source, (str, os.PathLike))
    name = printable(source) if is_path else short_repr(getattr(source, "name", source), 60)
    try:
        file = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
        if is_path:
            regular_file(source)
        image = source if isinstance(source, Image.Image) else Image.open(file)
        stored = image.size[::-1]
        image.load()  # before the orientation is read: Pillow turns TIFF files while it loads them
        turn = exif_turn(image)
        if turn is not None and (upright or stored != hw):
            image = image.transpose(turn)
        if image.mode == "F":
            raise ValueError("expected 8 or 16 bits, found floating-point pixels; convert it first")
        if image.mode.startswith("I"):  # 16-bit gray, which PIL would clip at 255
            pixels = np.asarray(image).clip(min=0)
            bits = int(pixels.max()).bit_length()  # cameras store 10, 12 or 14 bits in 16
            image = Image.fromarray((pixels >> max(bits - 8, 0)).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly anything for damaged files
        reason = getattr(error, "strerror", None) or printable(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        elif isinstance(error, Image.DecompressionBombError):
            reason += "; split it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        raise UserError(f"{name}: cannot be read as an image ({reason})") from None
    if hw is not None and pixels.shape[:2] != tuple(hw):
        expected = f"expected {hw[1]}x{hw[0]} pixels as in its annotations"
        raise UserError(f"{name}: {expected}, found {stored[1]}x{stored[0]}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


SOURCES = str, bytes, bytearray, os.PathLike, Image.Image  # and anything with `read`


def as_image(source) -> Tensor:
    """Return an image as a uint8 RGB tensor (3, H, W).

    source: what `read_image` takes, a uint8 RGB array (H, W, 3), or a uint8 RGB tensor (3, H, W).
    Raises UserError for anything else, such as float or gray pixels or a batch.
    """
    image = source
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.dtype == np.uint8:
        writable = np.require(source, requirements=["C", "W"])  # PyTorch warns about read-only ones
        image = torch.from_numpy(writable).permute(2, 0, 1)
    elif isinstance(source, SOURCES) or hasattr(source, "read"):
        image = read_image(source)
    fits = isinstance(image, Tensor) and image.ndim == 3 and image.dtype == torch.uint8
    if not fits or len(image) != 3 or image.numel() == 0:
        forms = "a path, a PIL image, an RGB uint8 array (H, W, 3) or tensor (3, H, W), or bytes"
        raise UserError(f"image {short_repr(source, 60)}: expected {forms}")
    return image.cpu()


def list_images(images):
    """Return an iterable of images; a single image of any kind is put into a list."""
    single = isinstance(images, (*SOURCES, np.ndarray, Tensor, dict)) or hasattr(images, "read")
    return [images] if single or not isinstance(images, Iterable) else images


INFERENCE_LOCK = threading.RLock()  # for all models, because a model with a lock cannot be copied


@contextlib.contextmanager
def inference(model: FCOS):
    """Switch to eval mode and fold frozen norms into the convolutions, in autocast's precision.

    Do not change weights inside this context, and use it under torch.no_grad(): a pass that needs
    gradients does not use the folded norms. Only one thread can be inside at a time.
    """
    with INFERENCE_LOCK:
        training = {module: module.training for module in model.modules()}
        layers = [layer for layer in model.modules() if isinstance(layer, ConvNorm)]
        layers = [layer for layer in layers if getattr(layer.norm, "running_var", None) is not None]
        device_type = model.pixel_mean.device.type
        try:
            for layer in layers:
                dtype = layer.conv.weight.dtype
                deformable = isinstance(layer.conv, DeformConv)  # always float32
                if torch.is_autocast_enabled(device_type) and not deformable:
                    dtype = torch.get_autocast_dtype(device_type)
                layer.folded = [x.to(dtype) for x in layer.fold()]
            model.eval()
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            for layer in layers:
                layer.folded = None


class View(NamedTuple):
    """A part of an image as the model sees it: cropped, resized and perhaps mirrored."""

    image_hw: tuple  # (height, width) of the image
    crop: tuple  # x1, y1, x2, y2 in pixels of the image
    size: tuple  # (height, width) to which the crop is resized
    mirrored: bool


def predict_images(model, images, batch_size, graph, view_options):
    """Do the work of `FCOS.predict`: run the views of each image and merge what they find.

    view_options: the arguments of `make_views` except the size of the image.
    """
    tta = view_options["tta"]
    tiles = view_options["tile"] is not None

    def run_model(images, sizes):
        outputs = model(images, sizes)
        if tta:  # the official augmentation merges candidates
            return model.candidates(outputs, sizes)
        if tiles:  # suppressed to bound memory; only `merge` may change the scores
            return model.decode(outputs, sizes, keep_scores=True)
        return model.decode(outputs, sizes)

    if graph and model.pixel_mean.device.type == "cuda":
        run_model = replay(run_model)
    views = (
        (number, image, view)
        for number, image in enumerate(map(as_image, images))
        for view in make_views(image.shape[-2:], **view_options)
    )
    results = []
    with torch.no_grad(), inference(model):
        runs = run_views(model, run_model, views, batch_size)
        for _, runs_of_image in groupby(runs, key=lambda run: run[0]):
            _, views_of_image, found = zip(*runs_of_image)
            results.append(merge(model, found, views_of_image) if tta or tiles else found[0])
    return results


def make_views(hw, test_size, tile=None, overlap=0.2, tta=False) -> list[View]:
    """Return the views of an image of (height, width): the whole image, and perhaps more.

    tile: add crops of tile x tile pixels that overlap by at least the share `overlap` of a side.
    tta: return the whole image at nine sizes, plain and mirrored, as in the official test-time
    augmentation.

    Raises UserError for tile together with tta.
    """
    hw = tuple(hw)
    whole = (0, 0, hw[1], hw[0])
    if tta and tile is not None:
        raise UserError("tile and tta: expected one of them, found both")
    if tta:
        short, long = test_size
        others = [(max(short * n // 8, 1), round(1.5 * long)) for n in (4, 5, 6, 7, 9, 10, 11, 12)]
        sizes = [resized_hw(*hw, *size) for size in (test_size, *others)]
        return [View(hw, whole, size, mirrored) for size in sizes for mirrored in (False, True)]
    crops = [whole]
    if tile is not None and max(hw) > tile:
        ys, xs = (tile_starts(side, tile, overlap) for side in hw)
        crops += [(x, y, min(x + tile, hw[1]), min(y + tile, hw[0])) for y in ys for x in xs]
    sizes = [resized_hw(y2 - y1, x2 - x1, *test_size) for x1, y1, x2, y2 in crops]
    return [View(hw, crop, size, mirrored=False) for crop, size in zip(crops, sizes)]


def tile_starts(side, tile, overlap):
    """Return the starts of evenly spaced tiles that cover `side` pixels and overlap enough."""
    if side <= tile:
        return [0]
    steps = math.ceil((side - tile) / max(tile * (1 - overlap), 1))
    return [(side - tile) * i // steps for i in range(steps + 1)]


def run_views(model, run_model, views, batch_size):
    """Run views in batches of one padded size; yield (image number, view, detections).

    views: triples of image number, image (3, H, W) and view. run_model: maps a padded batch and
    its sizes to a dict of (B, N, ...). The boxes of the detections are in pixels of the image.
    """
    device = model.pixel_mean.device
    for _, of_one_size in groupby(views, key=lambda triple: padded_hw([triple[2].size])):
        while chunk := list(islice(of_one_size, batch_size)):
            batch, sizes = pad_batch([crop_view(image, view) for _, image, view in chunk])
            detections = run_model(batch.to(device), sizes.to(device))
            detections = {name: values.cpu() for name, values in detections.items()}
            for (number, _, view), found in zip(chunk, as_list(detections, -math.inf)):
                yield number, view, map_back(model, found, view)


def crop_view(image, view):
    """Return the pixels of a view."""
    x1, y1, x2, y2 = view.crop
    crop = image[:, y1:y2, x1:x2]
    return resize(crop.flip(2) if view.mirrored else crop, view.size)


def mirror_boxes(boxes, right):
    """Mirror boxes (N, 4) in an image whose right border has the x coordinate `right`."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([right - x2, y1, right - x1, y2], 1)


# For each column of detections, the function that undoes mirroring, given the x coordinate of the
# image's right border. A column without a rule raises an error.
UNMIRROR = {
    "boxes": mirror_boxes,
    "scores": lambda scores, right: scores,
    "labels": lambda labels, right: labels,
}


def map_back(model, found, view):
    """Map the detections on a view to pixels of its image.

    Raises UserError if the view is mirrored and a column has no rule in UNMIRROR.
    """
    x1, y1, x2, y2 = view.crop
    width = x2 - x1
    found = found | {"boxes": model.rescale(found["boxes"], view.size, (y2 - y1, width))}
    if view.mirrored:
        unknown = found.keys() - UNMIRROR.keys()
        if unknown:
            raise UserError(f"output {min(unknown)}: expected a rule in fcos.UNMIRROR")
        pixel = width / view.size[1]  # a pixel of the view; inclusive boxes end at width - pixel
        right = width + (1 - pixel) * model.convention["inclusive"]
        found = {name: UNMIRROR[name](values, right) for name, values in found.items()}
    return found | {"boxes": found["boxes"] + torch.tensor([x1, y1, x1, y1])}


def merge(model, found, views):
    """Merge the detections on all views of one image, in its pixels, by one suppression.

    Boxes cut by the edge of a tile are dropped if an uncut box covers them. Overlaps are computed
    in pixels of the first view, as in the official code; this matters only for inclusive boxes.
    """
    merged = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    if not len(merged["scores"]):
        return merged
    cut = torch.cat([find_cut(one["boxes"], view) for one, view in zip(found, views)])
    dropped = find_covered(merged["boxes"], merged["labels"], cut)
    boxes = model.rescale(merged["boxes"], views[0].image_hw, views[0].size)
    scores = merged["scores"].masked_fill(dropped, -math.inf)
    columns = (x[None].to(model.pixel_mean.device) for x in (boxes, scores, merged["labels"]))
    keep, scores = (x[0].cpu() for x in model.suppress(*columns))
    merged = {name: values[keep[keep >= 0]] for name, values in merged.items()}
    return merged | {"scores": scores[keep >= 0]}


def find_cut(boxes, view):
    """Return which boxes (D, 4) end at an edge of the crop that is inside the image, bool (D,)."""
    x1, y1, x2, y2 = view.crop
    inside = torch.tensor([x1 > 0, y1 > 0, x2 < view.image_hw[1], y2 < view.image_hw[0]])
    near = (x2 - x1 + y2 - y1) / 200  # pixels, because a cut box rarely reaches the edge exactly
    return (((boxes - torch.tensor(view.crop)).abs() <= near) & inside).any(1)


def find_covered(boxes, labels, cut):
    """Return which cut boxes are more than half covered by an uncut box of their class, (D,)."""
    covered = torch.zeros_like(cut)
    whole = boxes[~cut]
    whole_labels = labels[~cut]
    for rows in cut.nonzero()[:, 0].split(64):  # 64 at a time to bound memory
        part = boxes[rows, None]
        corner = torch.maximum(part[..., :2], whole[:, :2])
        common = (torch.minimum(part[..., 2:], whole[:, 2:]) - corner).clamp(min=0).prod(2)
        area = (part[..., 2:] - part[..., :2]).prod(2)
        same = labels[rows, None] == whole_labels
        covered[rows] = (same & (common > area / 2)).any(1)
    return covered


def as_list(detections: dict, score_threshold: float) -> list[dict]:
    """Split a batch of detections into one dict per image, without padding and low scores."""
    results = []
    for b, scores in enumerate(detections["scores"]):
        found = (scores > -math.inf) & (scores >= score_threshold)
        results.append({name: values[b][found] for name, values in detections.items()})
    return results


def replay(function):
    """Wrap a function of CUDA tensors so that it replays CUDA graphs.

    The first call with new shapes records a graph. Later calls replay it and overwrite the result
    of the call before. Use it under torch.no_grad().
    """
    graphs = {}
    memory = torch.cuda.graph_pool_handle()  # shared, because the graphs run in turn

    def run(*inputs):
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        if shapes not in graphs:
            autocast = torch.is_autocast_enabled("cuda")
            # the graph must record autocast's casts, so none may come from the cache
            with (
                torch.cuda.device_of(inputs[0]),
                torch.autocast("cuda", enabled=autocast, cache_enabled=False),
            ):
                graphs[shapes] = torch.cuda.make_graphed_callables(function, inputs, pool=memory)
        return graphs[shapes](*inputs)

    return run


# ---- checkpoints --------------------------------------------------------------------------------


def is_int64(value):
    """Return whether a value is an int of at most 64 bits, which is fast to hash and print."""
    return type(value) is int and -(2**63) <= value < 2**63


class SafeUnpickler(pickle._Unpickler):
    """Read a pickle of plain values and arrays without calling any function that it names.

    A pickle is a program, and numpy's constructors trust it: a forged pickle can make them read and
    write any address. `call` and `load_build` replace them, and make an array only from bytes that
    match its shape and element type. Tensors become None; after this check torch.load may read
    the file. Keys must be plain, because hashing a deeply nested tuple overflows the stack. The
    size of the file limits all arguments together, because a small file could pass the same value
    many times and fill the memory.
    """

    # without instructions that create objects, sets or extension codes, or read other buffers
    INSTRUCTIONS = """
        PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
        FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
        UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3
        LIST EMPTY_LIST APPEND APPENDS EMPTY_DICT PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET
        LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID""".split()
    FUNCTIONS = (
        r"_codecs\.encode|__builtin__\.(bytes|set)|collections\.(OrderedDict|Counter)"
        r"|numpy\.(dtype|scalar|_reconstruct|_frombuffer)"
        r"|torch\.(device|Size|serialization\._get_layout)|torch\._utils\._rebuild_"
        r"(parameter|tensor|tensor_v[23]|(q|sparse_|nested_)tensor|meta_tensor_no_storage)"
    )
    TYPES = r"numpy\.ndarray|torch\.((storage\.)?\w+Storage|[a-z]+\d\w*|bool|per_\w+)"

    def __init__(self, file, size):
        super().__init__(file, encoding="latin1")
        self.memo = Memo()
        self.values_left = 3 * size  # 3 because an array may be stored as text, then as bytes

    def find_class(self, module, name):
        package = re.sub(r"^numpy\._?core\.(multiarray|numeric)$", "numpy", module)
        full_name = f"{package}.{name}"
        if re.fullmatch(self.FUNCTIONS, full_name):
            return partial(self.call, full_name)
        if re.fullmatch(self.TYPES, full_name):
            return None
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def call(self, function, *arguments):
        """Return the result of one of FUNCTIONS, or None instead of a tensor."""
        self.limit_size(arguments)
        match function, arguments:
            case "_codecs.encode", (str(text), "latin1" | "latin-1"):
                return text.encode("latin1")
            case "__builtin__.bytes", ():
                return b""
            case "numpy.dtype", (str(code), _, _):
                return StoredType(code)
            case "numpy.scalar", (kind, raw):
                return self.make_array((), kind, "C", raw)[()]
            case "numpy._reconstruct", (None, (0,), b"b" | "b"):
                return StoredArray()
            case "numpy._frombuffer", (raw, kind, shape, order) | (raw, kind, shape, order, None):
                return self.make_array(shape, kind, order, raw)
            case "numpy._frombuffer", (raw, kind, shape, order, axes):
                return self.make_array(shape, kind, order, raw).transpose(axes)
            case "collections.OrderedDict", ():
                return OrderedDict()
            case "collections.OrderedDict", (pairs,):
                self.check_plain([key for key, _ in pairs])
                return OrderedDict(pairs)
            case "collections.Counter" | "__builtin__.set", (keys,):
                self.check_plain(keys)
                return None
        if function.startswith("torch."):
            return None
        raise pickle.UnpicklingError(f"arguments of {function}")

    def load_build(self):
        """Set the state of the last value."""
        state = self.stack.pop()
        value = self.stack[-1]
        self.limit_size(state)
        match value, state:
            case OrderedDict(), dict():
                pass
            case StoredType(), (3, "<" | ">" | "=" | "|", None, None, None, int(), int(), int()):
                value.order = state[1]
            case StoredArray(array=None), (1, shape, kind, int(fortran), raw):
                value.array = self.make_array(shape, kind, "F" if fortran else "C", raw)
                self.stack[-1] = value.array
            case _:
                raise pickle.UnpicklingError(f"a state of a {type(value).__name__}")

    def make_array(self, shape, kind, order, raw):
        """Return an array of the bytes `raw`. Raises UnpicklingError unless they fit exactly, and
        UserError if the elements are not numbers."""
        if not re.fullmatch(r"f[248]|[iu][1248]|b1|[SU][1-9]\d{0,8}", kind.code):
            key = printable(self.stack[-2], 99)
            raise UserError(f"{key}: expected an array of numbers, found {kind.code:.20}")
        dtype = np.dtype(kind.order + kind.code)
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        fits = type(raw) is bytes and type(shape) is tuple and len(shape) <= 32
        fits = fits and all(type(side) is int and 0 <= side < 2**31 for side in shape)
        if not fits or math.prod(shape) * dtype.itemsize != len(raw):
            raise pickle.UnpicklingError("an array whose shape does not fit its bytes")
        if dtype.kind == "U":
            raw.decode("utf-32-be" if kind.order == ">" else "utf-32-le")  # raises if not text
        return np.frombuffer(raw, dtype).reshape(shape, order="F" if order == "F" else "C")

    def persistent_load(self, storage):
        match storage:
            case "storage", None, *parts:  # key, device and number of elements
                self.check_plain(parts)
                return None
        raise pickle.UnpicklingError("a reference to something other than a storage")

    def limit_size(self, values):
        lengths = [len(value) for value in values if hasattr(value, "__len__")]
        self.values_left -= len(values) + sum(lengths)
        if self.values_left < 0:
            raise pickle.UnpicklingError("values larger than the file")

    def check_plain(self, values):
        for value in values:
            if not is_int64(value) and type(value) not in (str, bytes, float, bool, type(None)):
                raise pickle.UnpicklingError(f"a key of type {type(value).__name__}")

    def fill(self, items):
        """Add a list of alternating keys and values to the last value, a dict."""
        target = self.stack[-1]
        keys, values = items[::2], items[1::2]
        self.check_plain(keys)
        if any(callable(value) or isinstance(value, (StoredArray, StoredType)) for value in values):
            raise pickle.UnpicklingError("an unfinished array")
        if type(target) not in (dict, OrderedDict):
            raise pickle.UnpicklingError(f"items of a {type(target).__name__}")
        target.update(zip(keys, values, strict=True))

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.fill(items)

    def load_setitems(self):
        self.fill(self.pop_mark())

    def load_setitem(self):
        items = self.stack[-2:]
        del self.stack[-2:]
        self.fill(items)

    dispatch: ClassVar[dict] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in INSTRUCTIONS
    }
    dispatch |= {
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: dispatch[pickle.BINBYTES8[0]],  # the original allocates any size
    }


@dataclass
class StoredType:
    """The element type of an array in a pickle, and its byte order."""

    code: str
    order: str = "|"


@dataclass
class StoredArray:
    """An array in a pickle that was created but not filled yet."""

    array: object = None


class Memo(dict):
    """The values that a pickle may refer to again; a filled StoredArray becomes its array."""

    def __getitem__(self, index):
        value = super().__getitem__(index)
        return value.array if isinstance(value, StoredArray) else value


def check_archive(file, size):
    """Raise an error if the zip archive of torch.save is damaged or unpacks to more than `size`."""
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError("expected a file of torch.save, found a compressed archive; unpack it")
    overlap = sum(member.file_size for member in members) > size
    folder = any(member.external_attr & 16 for member in members)  # torch.load would not fill it
    if overlap or folder or archive.testzip():  # torch.load does not verify checksums
        raise ValueError("damaged")
    for member in members:
        if member.filename.endswith("data.pkl"):
            with archive.open(member) as pickled:
                SafeUnpickler(pickled, size).load()


def read_safetensors(path):
    """Return the tensors of a file by name, or the checkpoint if `save` wrote the file."""
    from safetensors import safe_open  # optional

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        stored = (file.metadata() or {}).get("fcos")
    return tensors if stored is None else json.loads(stored) | {"model": tensors}


def read_torch_or_pickle(file):
    """Return the content of an open file that torch.save wrote, or a pickle of arrays."""
    size = os.fstat(file.fileno()).st_size
    if zipfile.is_zipfile(file):
        check_archive(file, size)
    else:
        file.seek(0)
        content = SafeUnpickler(file, size).load()
        if type(content) is not int or content != torch.serialization.MAGIC_NUMBER:
            return content
        # the format before PyTorch 1.6: protocol version, system, content, keys of the storages
        *_, storages = [SafeUnpickler(file, size).load() for _ in range(4)]
        if any(type(key) is not str for key in storages):
            raise ValueError("a key of a storage is not text")
    file.seek(0)
    with warnings.catch_warnings(action="ignore"):  # rare kinds of tensors warn
        return torch.load(file, map_location="cpu", weights_only=True)


def read_checkpoint(path):
    """Read a file of torch.save, a pickle of arrays (.pkl) or a .safetensors file without running
    code from it.

    Raises UserError if it is missing or damaged, or holds anything but tensors, arrays and plain
    values.
    """
    try:
        with open(regular_file(path), "rb") as file:
            if str(path).endswith(".safetensors"):
                return read_safetensors(path)
            return read_torch_or_pickle(file)
    except UserError as error:
        reason = error
    except ImportError as error:
        reason = f"pip install safetensors ({error})"
    except OSError as error:
        truncated = error.errno == errno.EINVAL
        reason = "damaged" if truncated else error.strerror or error
    except Exception as error:  # damaged files make the readers raise nearly anything
        reason = f"not a checkpoint or damaged ({type(error).__name__})"
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            name = printable(refused[1], 99)
            reason = f"refused: {name} could run any program; save only the state dict"
    raise UserError(f"{printable(path)}: {printable(reason)}")


def checkpoint(model: "FCOS") -> dict:
    """Return all that `load` needs to build the model again, as tensors and plain Python values.

    Wrappers of torch.compile and DataParallel are removed. Raises UserError unless it is an FCOS.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, FCOS):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if not isinstance(inner, FCOS):
        raise UserError(f"model of type {type(model).__name__}: expected one of fcos.build or load")
    names = ("name", "num_classes", "keywords", "classes", "category_ids", "convention")
    content = {name: getattr(inner, name) for name in names}
    check_class_lists(content, inner.num_classes)
    state = {key.replace("_orig_mod.", ""): x for key, x in inner.state_dict().items()}
    return content | {"model": state}


@contextlib.contextmanager
def atomic_write(path, mode="wb", keep=None):
    """Open a file for writing that appears complete at `path`, or not at all.

    A temporary file in the same folder replaces `path` at the end; a link is replaced, not its
    target. The old file moves to `keep` if given. A missing folder is created.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".fcos-{secrets.token_hex(8)}.tmp"
    try:
        regular_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode.replace("w", "x")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides an OSError, such as a full disk, behind a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = cause.strerror if getattr(cause, "filename", None) else printable(cause)
        raise UserError(f"{printable(path)}: cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def remove_leftovers(folder):
    """Remove temporary files of `atomic_write` that killed processes left in a folder.

    Call it only while no other process writes there.
    """
    for path in Path(folder).glob(".fcos-*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def save(model: "FCOS", path):
    """Write a checkpoint that `load` reads, completely or not at all.

    If the path ends in .safetensors, that format is written, with everything but the tensors as
    JSON in its metadata.
    """
    content = checkpoint(model)
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import save as pack
        except ImportError as error:
            raise UserError(f"{path}: pip install safetensors ({error})") from None
        tensors = {name: tensor.contiguous() for name, tensor in content.pop("model").items()}
        with atomic_write(path) as file:
            file.write(pack(tensors, {"fcos": json.dumps(content)}))
    else:
        with atomic_write(path) as file:
            torch.save(content, file)


def load(path, name: str | None = None, backbone: nn.Module | None = None) -> "FCOS":
    """Load a model in eval mode from a file of weights.

    name: the row of MODELS, needed except for checkpoints of this project and of torchvision.
    "coco" is torchvision's own file, see `hub_file`.
    backbone: the module, if the model was built with a custom one.

    Raises UserError if the file cannot be read or does not fit.
    """
    weights = open_weights(hub_file("coco") if path == "coco" else path)
    try:
        name, classes, keywords = find_description(weights, name)
        if keywords["backbone"] is None:
            if backbone is None:
                raise UserError("has a custom backbone: pass the module as `backbone=`")
            keywords["backbone"] = backbone
        check_parameter_count(classes, keywords, os.path.getsize(weights.path))
        model = FCOS(classes, **keywords)
    except UserError as error:
        raise UserError(f"{printable(weights.path)}: {error}") from None
    model.name = name
    if "keywords" in weights.content:
        model.classes = weights.content.get("classes")
        model.category_ids = weights.content.get("category_ids")
    load_weights(model, weights)
    return model.eval()


def find_description(weights, name):
    """Return the name, number of classes and keywords of the model that a file of weights holds.

    name: the row of MODELS, for a file that does not name it.
    """
    if weights.family not in DETECTORS:
        raise UserError(f"expected a detector, found an ImageNet classifier ({weights.family})")
    content = weights.content
    rows = len(as_dense(weights.family_key, weights.state[weights.family_key], torch.empty(0)))
    if "keywords" not in content:
        if weights.family == "torchvision":
            name = name or "fcos_torchvision_R_50_FPN"
            rows = len(COCO) if rows == 91 else rows  # its rows are category ids
        if name is None:
            raise UserError(f"does not say which model it is; pass one of {', '.join(MODELS)}")
        return name, rows, model_keywords(name, {})
    stored_name, number = content.get("name"), content.get("num_classes")
    if not isinstance(stored_name, str) or name not in (None, stored_name):
        raise UserError(f"expected model {name or 'name'}, found {short_repr(stored_name)}")
    if type(number) is not int or number != rows:
        raise UserError(f"num_classes {short_repr(number)}: expected {rows} as in its weights")
    check_class_lists(content, rows)
    return stored_name, rows, resolve(content["keywords"])


def check_class_lists(content, rows):
    """Raise UserError unless "classes" of a checkpoint is None or `rows` names, and "category_ids"
    None or `rows` numbers or names."""
    for entry, kind in (("classes", "names"), ("category_ids", "whole numbers or names")):
        values = content.get(entry)
        if values is None:
            continue
        numbers = entry == "category_ids"
        fits = isinstance(values, (list, tuple)) and len(values) == rows
        if not fits or not all(type(x) is str or (numbers and is_int64(x)) for x in values):
            raise UserError(f"{entry} {short_repr(values)}: expected a list of {rows} {kind}")


def check_parameter_count(classes, keywords, size):
    """Raise UserError if keywords describe no model, or one much larger than the file of `size`
    bytes, which could fill the memory."""
    backbone = keywords["backbone"]
    if isinstance(backbone, nn.Module):
        keywords = keywords | {"backbone": copy.deepcopy(backbone).to("meta")}
    try:
        with torch.device("meta"):  # takes no memory
            described = FCOS(classes, **keywords).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"its keywords describe no model ({printable(error, 99)})") from None
    if sum(value.numel() for value in described.values()) > 10**7 + size:
        raise UserError("its keywords describe a model far larger than its tensors")


# ---- weights of other projects ------------------------------------------------------------------


# COCO's 80 classes by category id; ten of the ids 1 to 90 are unused.
COCO = dict(enumerate(detection.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))
COCO = {id: name for id, name in COCO.items() if name not in ("__background__", "N/A")}


def layer_name(n):
    """Return our name of module n in a sequence of convolution, norm, ReLU, convolution, ..."""
    return f"{int(n) // 3}.{('conv', 'norm', 'relu')[int(n) % 3]}"


# From other projects' names to our fpn.* and head.*: (pattern, replacement or a function of the
# match), applied from top to bottom.
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
    (r"^head\.cls_tower\.(\d\d?)\.", lambda m: f"head.cls_tower.{layer_name(m[1])}."),
    (r"^head\.bbox_tower\.(\d\d?)\.", lambda m: f"head.box_tower.{layer_name(m[1])}."),
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
    (r"\.features\.(\d\d?)\.conv\.(\d\d?)\.", lambda m: f".features.{m[1]}.{layer_name(m[2])}."),
]

# torchvision nests its layers, so its numbers come in pairs.
NESTED_MOBILENET_NAMES = [
    (r"^features\.1\.conv\.([12])\.(?=\D)", lambda m: f"features.1.conv.{int(m[1]) + 2}."),
    (
        r"^features\.(\d\d|[2-9])\.conv\.([23])\.(?=\D)",
        lambda m: f"features.{m[1]}.conv.{int(m[2]) + 4}.",
    ),
    (r"\.conv\.([01])\.([01])\.", lambda m: f".conv.{3 * int(m[1]) + int(m[2])}."),
]

BACKBONE_NAMES = {ResNet: RESNET_NAMES, MobileNetV2: MOBILENET_NAMES}

# family: (a key that only its files have, the convention of its weights)
FAMILIES = {
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
    # ImageNet classifiers
    "detectron2": (r"res_conv1_bn_(gamma|rm)", MSRA),
    "caffe2": (r"res_conv1_bn_s", CAFFE),
    "torchvision_in_detectron2": (r"stem\.conv1\.norm\.weight", TORCH),
    "torchvision_resnet": (r"layer1\.0\.conv1\.weight", TORCH),
    "torchvision_mobilenet": (r"features\.1\.conv\.0\.0\.weight", TORCH),
    "mobilenet": (r"features\.1\.conv\.3\.weight", CAFFE),
}
DETECTORS = "fcos", "official", "adelaidet", "torchvision", "mmdetection"


class Weights(NamedTuple):
    """The content of a file of weights."""

    path: Any  # "weights" for a dict
    content: dict  # the dict around the state dict, or the state dict itself
    state: dict  # tensors or arrays by name, without the prefix of wrappers
    family: str  # one of FAMILIES
    family_key: str = ""  # the key that identifies the family


# Names under which training programs store the state dict, the preferred ones first. Wrappers also
# put such names before every key.
STATE_DICT_KEYS = """model state_dict blobs net network model_state_dict model_state weights module
    ema model_ema ema_model ema_state_dict state_dict_ema student teacher detector params
    state""".split()
# Wrappers of single modules put a name anywhere in a key.
INNER_WRAPPER = r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\."
WRAPPER_PREFIX = rf"(?:{'|'.join(STATE_DICT_KEYS)})\."


def open_weights(source) -> Weights:
    """Open a path or a dict; raises UserError if it holds no state dict of a known family."""
    path: str | os.PathLike = "weights"
    if isinstance(source, (str, os.PathLike)):
        path = source
        source = read_checkpoint(path)
    content, state = find_state(source)
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or len(state) > 20_000:  # real files have up to 2,000, and renaming is slow
        expected = "a state dict of at most 20000 tensors by name"
        raise UserError(f"{printable(path)}: expected {expected}, found {short_repr(state)}")
    state = {re.sub(INNER_WRAPPER, "", key): value for key, value in state.items()}
    family, prefix, family_key = find_family(state, f"(?:{WRAPPER_PREFIX})*")
    if family is None:
        family, prefix, _ = find_family(state, r".*[./]")
        first = ", ".join(printable(key, 60) for key in list(state)[:3])
        known = ", ".join(FAMILIES)
        reason = f"expected weights of {known}; its first keys are {first or 'none'}"
        if family:
            reason = f"remove the prefix {printable(prefix, 60)!r} before the keys of {family}"
        raise UserError(f"{printable(path)}: {reason}")
    # keys with the prefix come last, so that they replace others of the same name
    keys = sorted(state, key=lambda key: key.startswith(prefix))
    tensors = {key.removeprefix(prefix): state[key] for key in keys}
    return Weights(path, content, tensors, family, family_key)


def find_state(content):
    """Return the dict around the state dict in the content of a file, and the state dict."""
    around = state = content
    for _ in range(4):  # last.pt of train.py holds a checkpoint that holds the weights
        inner = [state.get(key) for key in STATE_DICT_KEYS] if isinstance(state, dict) else []
        inner = [value for value in inner if isinstance(value, dict) and value]
        if inner:
            around, state = state, inner[0]
    return around, state


def find_family(state, prefix):
    """Return the family of a state dict, the prefix of its keys and the key that identifies it.

    prefix: a pattern for the prefix of that key. The family is None if it is unknown.
    """
    keys = [key for key, value in state.items() if getattr(value, "ndim", 0)]
    for family, (family_key, _) in FAMILIES.items():
        pattern = re.compile(f"({prefix})({family_key})")
        for key in keys:
            if match := pattern.fullmatch(key):
                return family, match[1], match[2]
    return None, "", ""


def load_weights(model: "FCOS", source, classes: list[str] | None = None) -> dict:
    """Load weights of any family into `model`, and set its convention to theirs.

    source: a path or a dict with one of our checkpoints; a detector of the official FCOS,
    AdelaiDet, torchvision or mmdetection; or an ImageNet classifier of Caffe2, Detectron2 or
    torchvision, which fills the backbone. The keys identify the family. The model must have the
    architecture of the weights; keywords that shapes do not show, such as the activation, can be
    checked only for our own files. A detector of COCO's 80 classes also sets the class names.

    classes: names of the model's classes, to fine-tune a detector of other classes: rows of the
    classifier are copied for classes of the same name; the others keep their initial rows.

    Returns {"family", "convention", "loaded", "ignored", "missing", "new_classes"}, the last four
    lists of names. Raises UserError, and changes nothing, if keys are missing or unknown, or if
    shapes, values or keywords do not match.
    """
    weights = source if isinstance(source, Weights) else open_weights(source)
    try:
        tensors, unknown = rename_tensors(model, weights)
        complete_tensors(model, weights.family, tensors)
        missing = [name for name in model.state_dict() if name not in tensors]
        check_keywords(model, weights)
        check_names(weights.family, tensors, missing, unknown, fine_tuned=bool(classes))
        new_classes = choose_class_rows(model, weights, tensors, classes)
        check_tensors(model.state_dict(), tensors)
        convention = check_entries("convention", stored_convention(model, weights), CONVENTION)
    except UserError as error:
        path = printable(weights.path)
        raise UserError(f"{path}: does not fit {model.name}: {error}") from None
    model.set_convention(**convention)
    model.load_state_dict(tensors, strict=False)
    of_coco = weights.family in DETECTORS and weights.family != "fcos" and model.num_classes == 80
    if of_coco and not (classes or model.classes):
        model.classes = list(COCO.values())
        model.category_ids = list(COCO)
    return {
        "family": weights.family,
        "convention": model.convention,
        "loaded": list(tensors),
        "ignored": list(unknown),
        "missing": missing,
        "new_classes": new_classes,
    }


def rename_tensors(model, weights):
    """Return {our name: tensor}, and {their key: our name} for names that the model lacks.

    Raises UserError if a tensor to load is not a dense tensor or array of numbers.
    """
    names = BACKBONE_NAMES.get(type(model.backbone), []) + NAMES
    if weights.family == "torchvision_mobilenet":
        names = NESTED_MOBILENET_NAMES + names
    if weights.family == "fcos":
        names = []
    own = model.state_dict()
    tensors = {}
    unknown = {}
    for key, value in weights.state.items():
        name = key
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name in own and name not in tensors:
            tensors[name] = as_dense(key, value, own[name])
        else:
            unknown[key] = name
    return tensors, unknown


def as_dense(key, value, own):
    """Return a value of a state dict as a tensor; raises UserError if it cannot fill `own`."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(value.astype(np.float32))
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    dense = dense and not (value.is_meta or value.is_nested or value.is_quantized)
    if not dense or value.is_floating_point() != own.is_floating_point():
        kind = "floating-point" if own.is_floating_point() else "integer"
        found = short_repr(value, 60)
        raise UserError(f"{printable(key, 99)}: expected a dense {kind} tensor, found {found}")
    return value


def complete_tensors(model, family, tensors):
    """Add constants that a family does not store, and reshape scales."""
    for name, own in model.state_dict().items():
        if family == "caffe2" and re.match(r"backbone\..*\.running_(mean|var)$", name):
            tensors[name] = torch.full_like(own, name.endswith("var"))  # it has no statistics
        elif family == "mmdetection" and re.fullmatch(r"head\.\w+_tower\.\d\.conv\.bias", name):
            tensors.setdefault(name, torch.zeros_like(own))  # its plain models have no bias
        elif name.startswith("head.scale.") and name in tensors and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(1)  # mmdetection stores scalars


def check_keywords(model, weights):
    """Raise UserError if file and model differ in a keyword that shapes do not show."""
    expected = {}
    if weights.family == "fcos" and "keywords" in weights.content:
        stored = resolve(weights.content["keywords"])
        hidden = "activation", "ctr_on", "quality", "levels", "scales", "stride_in_1x1"
        expected = {keyword: stored.get(keyword) for keyword in hidden}
    elif weights.family not in DETECTORS and isinstance(model.backbone, ResNet):
        if "res3.0.conv3.conv.weight" in model.backbone.state_dict():
            caffe = weights.family in ("caffe2", "detectron2")
            expected["stride_in_1x1"] = caffe and model.keywords["groups"] == 1
        if weights.family == "caffe2" or model.keywords["norm"] == "gn":
            expected["norm"] = "frozen"  # the file has affine norms or statistics, not GroupNorm
    for keyword, stored_value in expected.items():
        value = model.keywords.get(keyword)
        if stored_value != value:
            raise UserError(f"{keyword} is {stored_value} in the file, {value} in the model")


def check_names(family, tensors, missing, unknown, fine_tuned):
    """Raise UserError if keys are missing or unknown. A classifier fills only the backbone."""
    ignored = r".*num_batches_tracked"
    if family in DETECTORS:  # the file may hold more copies of the model, such as a teacher
        wrong = missing + list(unknown)
        ignored += rf"|pixel_(mean|std)|n_averaged|{WRAPPER_PREFIX}.*"
    else:  # the rest of the file is the classifier and, in Caffe2, the momentum of the optimizer
        wrong = missing + [key for key, name in unknown.items() if name.startswith("backbone.")]
        ignored += r"|(fpn|head)\..*|.*\.offset\..*|.*_momentum"
    if family == "fcos" and fine_tuned:  # a head output added since then keeps its initial weights
        layers = {name.rpartition(".")[0] for name in tensors}
        wrong = [n for n in wrong if n[:5] != "head." or n.rpartition(".")[0] in layers]
    wrong = [name for name in wrong if not re.fullmatch(ignored, name)]
    if wrong:
        first = ", ".join(printable(name, 80) for name in wrong[:5])
        raise UserError(f"{len(wrong)} keys are missing or unknown, among them {first}")


def choose_class_rows(model, weights, tensors, classes):
    """Replace the rows of the classifier in `tensors` by those of `classes`.

    Returns the classes that the file lacks; they keep the model's rows.
    """
    layers = ("head.cls.weight", "head.cls.bias")
    if layers[0] not in tensors:
        return []
    own = model.state_dict()
    rows = tensors[layers[0]].shape[:1]
    if not rows or any(tensors[name].shape != rows + own[name].shape[1:] for name in layers):
        return []  # check_tensors raises the error
    if weights.family == "torchvision" and rows == (91,) and (classes or model.num_classes != 91):
        for name in layers:
            tensors[name] = tensors[name][list(COCO)]  # row numbers are category ids
    if not classes:
        return []
    if len(classes) != model.num_classes:
        raise UserError(f"{len(classes)} classes for {model.num_classes} rows")
    rows = len(tensors[layers[0]])
    check_class_lists(weights.content, rows)
    known = weights.content.get("classes") or []
    if not known and rows in (80, len(classes)):
        known = list(COCO.values()) if rows == 80 else classes
    for name in layers:
        chosen = own[name].clone()
        for row, c in enumerate(classes):
            if c in known:
                chosen[row] = tensors[name][known.index(c)]
        tensors[name] = chosen
    return [c for c in classes if c not in known]


def check_tensors(own, tensors):
    """Raise UserError if shapes differ from the model's, or for NaN and infinity.

    All shapes are checked first, because a tensor of the wrong shape may be huge.
    """
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            rows_differ = name.startswith("head.cls.") and value.shape[1:] == own[name].shape[1:]
            hint = "; pass `classes` to choose rows" if rows_differ else ""
            expected = tuple(own[name].shape)
            found = short_repr(tuple(value.shape))
            raise UserError(f"{name}: expected shape {expected}, found {found}{hint}")
    for name, value in tensors.items():
        if not value.float().isfinite().all():
            raise UserError(f"{name}: expected finite values, found NaN or infinity")


def stored_convention(model, weights):
    """Return the pixel and box convention of weights, as keywords of CONVENTION."""
    family, state = weights.family, weights.state
    if family == "fcos":
        return weights.content.get("convention", {})
    pixels = {}
    if "pixel_mean" in state and "pixel_std" in state:  # AdelaiDet's
        for name in ("mean", "std"):
            key = f"pixel_{name}"
            value = as_dense(key, state[key], model.pixel_mean)
            if value.numel() != 3:
                raise UserError(f"{key}: expected 3 numbers, found {value.numel()}")
            pixels[name] = tuple(value.flatten().tolist())
        pixels["bgr"] = pixels["mean"][0] < pixels["mean"][2]
    elif family in ("adelaidet", "detectron2") and model.keywords.get("groups") == 32:
        pixels = dict(std=(57.375, 57.12, 58.395))  # only X-101-32x8d
    elif family == "mmdetection":
        pixels = mmdetection_pixels(model, weights)
    return FAMILIES[family][1] | pixels


def mmdetection_pixels(model, weights):
    """Return the pixel convention of an mmdetection model, from its configuration if stored."""
    meta = weights.content.get("meta")
    config = meta.get("cfg", meta.get("config")) if isinstance(meta, dict) else None
    if isinstance(config, str):
        found = [re.search(rf"{name}=\[([\d.,\s]{{,200}})\]", config) for name in ("mean", "std")]
        if all(found):
            values = [re.findall(r"\d+(?:\.\d+)?", match[1]) for match in found]
            mean, std = (tuple(map(float, numbers)) for numbers in values)
            return dict(bgr="to_rgb=True" not in config, mean=mean, std=std)
    if not model.keywords.get("stride_in_1x1", True):
        return TORCH
    return MSRA if "bbox_head.cls_convs.0.conv.bias" in weights.state else {}


def hub_file(name: str, classifier: str | None = None) -> Path:
    """Return the path of torchvision's weights in the folder of torch.hub; download them if needed.

    name: "coco" for its FCOS (box AP 39.2), or "imagenet" for torchvision's model `classifier`.
    Raises UserError if there are no such weights, or if the download fails.
    """
    try:
        choices = get_model_weights("fcos_resnet50_fpn" if name == "coco" else classifier)
        weights = choices.COCO_V1 if name == "coco" else choices.IMAGENET1K_V1
    except (AttributeError, TypeError, ValueError):
        fix = "Caffe-style rows (stride in the 1x1 convolution) need a file listed in the README"
        found = short_repr(classifier)
        raise UserError(f"imagenet {found}: torchvision has no such weights; {fix}") from None
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.split("/")[-1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(path), path.stem.split("-")[-1])
        except (OSError, RuntimeError, HTTPException) as error:
            problem = f"cannot download {weights.url} ({error})"
            raise UserError(f"{name}: {problem}; put the file into {path.parent}") from None
    return path


# ---- export -------------------------------------------------------------------------------------


@torch.library.custom_op("fcos::nms", mutates_args=())
def nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """Run batched_nms as one operator, so that it can be exported."""
    return batched_nms(boxes, scores, labels, iou_threshold, max_detections)


@nms.register_fake
def _(boxes, scores, labels, iou_threshold, max_detections):
    return labels.new_empty(labels.shape[0], max_detections)


class Deployed(nn.Module):
    """The part of prediction that is exported.

    Maps images uint8 RGB (B, 3, H, W), padded at the bottom and right, and their sizes int64 (B, 2)
    before padding to the detections of `FCOS.decode`.
    """

    def __init__(self, model: "FCOS"):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> dict:
        return self.model.decode(self.model(images, sizes), sizes)


def onnx_nms(boxes, scores, labels, iou_threshold, max_detections):
    """Return the ONNX operators of `nms`."""
    from onnxscript import opset18 as op

    one = op.Constant(value_int=1)
    classes = op.Range(op.Constant(value_int=0), op.ReduceMax(labels, keepdims=0) + one, one)
    of_class = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))  # (B, K, N)
    nothing = op.Constant(value_float=-1.0)
    per_class = op.Where(of_class, op.Unsqueeze(scores, [1]), nothing)
    kept = op.NonMaxSuppression(boxes, per_class, [max_detections], [iou_threshold], [0.0])
    place = op.Gather(kept, [0, 2], axis=1)  # image and candidate
    kept = op.ScatterND(op.Expand(nothing, op.Shape(scores)), place, op.GatherND(scores, place))
    # TopK fails where there are fewer candidates than detections
    enough = op.Pad(kept, [0, 0, 0, max_detections], nothing)
    best, index = op.TopK(enough, [max_detections])
    return op.Where(op.Greater(best, 0.0), index, -1)


def export_onnx(model: "FCOS", path, height: int, width: int):
    """Write `Deployed` to an ONNX file, for any number of images of any size.

    height, width: the example for tracing; every padded height and width must be a multiple of 32.
    The model's thresholds are built in; classes and test size are in the metadata.

    Raises UserError for other sizes, or if onnx or onnxscript is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: pip install onnx onnxscript ({error})") from None
    if height % 32 or width % 32 or min(height, width) < 32:
        raise UserError(f"height {height} and width {width}: expected multiples of 32")
    # A feature map with one row or column would be exported as a constant size.
    height, width = (max(side, 2 * model.strides[-1]) for side in (height, width))
    device = model.pixel_mean.device
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8, device=device)
    sizes = torch.tensor([[height, width]] * 2, device=device)
    B, h, w = (torch.export.Dim(name, min=1) for name in ("B", "h", "w"))
    deployed = Deployed(model)
    with torch.no_grad(), inference(model):  # folded norms are constants, which quantizers need
        program = torch.onnx.export(
            deployed.eval(),
            (images, sizes),
            input_names=["images", "sizes"],
            output_names=list(deployed(images, sizes)),
            dynamo=True,
            verbose=False,
            dynamic_shapes={"images": {0: B, 2: 32 * h, 3: 32 * w}, "sizes": {0: B}},
            custom_translation_table={torch.ops.fcos.nms.default: onnx_nms},
        )
    assert program is not None  # it is None only for the old exporter
    for name in ("classes", "category_ids", "test_size"):
        program.model.metadata_props[name] = json.dumps(getattr(model, name))
    with atomic_write(path) as file:
        file.write(program.model_proto.SerializeToString())
