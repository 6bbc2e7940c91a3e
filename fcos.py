"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., arXiv 1904.01355) in one file.

    import fcos
    model = fcos.load("runs/shapes/model.pt")
    for found in model.predict(["photo.jpg"]):
        print(found["boxes"], found["scores"], found["labels"])

The text follows the data: pixels become a padded batch, ResNet and FPN features at strides 8 to
128, and at every location class logits, the distances to the four sides of a box and a centerness;
then targets and losses for training, or boxes for detection. Everyone's weights come last.

    B  images                 boxes   xyxy in pixels, continuous: x2 = x + w
    K  classes                ltrb    distances to the left, top, right, bottom side, in pixels
    P  locations, all levels  labels  0..K-1, in the order of the category ids; -1 is background
    G  boxes of one image     sizes   (B, 2) height, width of the images before padding
    D  detections             levels  P3..P7; locations are level-major, row-major inside a level
"""

import contextlib
import inspect
import math
import os
import pickle
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torchvision.ops import deform_conv2d

from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss
from kernels.iou_loss import KINDS, iou_loss
from kernels.nms import batched_nms

STRIDES = (8, 16, 32, 64, 128)
UNITS = ("pixel", "stride")  # of the distances in the IoU loss
# The largest of the four distances, in pixels, that each level is responsible for (section 3.2).
# Both ends are inclusive, so a distance of exactly 64 is positive on P3 and on P4, as published.
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))

# One architecture a row, named as the official configurations are, without their schedule; then
# torchvision's, and the small ResNets. Keywords are those of FCOS.
R_18 = dict(block="basic", blocks=(2, 2, 2, 2), stride_in_1x1=False)
R_34 = dict(block="basic", blocks=(3, 4, 6, 3), stride_in_1x1=False)
R_50 = dict(blocks=(3, 4, 6, 3))
R_101 = dict(blocks=(3, 4, 23, 3))
X_101_32x8d = dict(blocks=(3, 4, 23, 3), groups=32, width=8, stride_in_1x1=False)
X_101_64x4d = dict(blocks=(3, 4, 23, 3), groups=64, width=4, stride_in_1x1=False)
MNV2 = dict(block="inverted", blocks=(1, 2, 3, 4, 3, 3, 1), stem=32, frozen_stages=0, norm="bn")
SYNCBN, C128 = dict(norm="syncbn"), dict(channels=128)
PLAIN = dict(activation="exp", ctr_on="cls", radius=0.0, iou="iou", unit="pixel")
IMPRV = dict(activation="relu", ctr_on="box", radius=1.5, iou="giou", unit="stride")
TINY = dict(block="basic", blocks=(1, 1, 2, 2), stem=32, channels=64, norm="gn", frozen_stages=0)
DCN_345, DCN_45 = IMPRV | dict(dcn=(3, 4, 5)), IMPRV | dict(dcn=(4, 5))
VISION = IMPRV | dict(stride_in_1x1=False, scales=False, grid="corner")
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
    "fcos_torchvision_R_50_FPN":        R_50        | VISION,
    "fcos_imprv_R_18_FPN":              R_18        | IMPRV,
    "fcos_imprv_R_34_FPN":              R_34        | IMPRV,
    "shapes":                           TINY        | IMPRV,
}

# How pixels enter a network and boxes leave it. This travels with weights, not with architecture.
# Pixels: Caffe's ImageNet weights take BGR in 0..255 minus a mean, and their norms have no epsilon.
# Boxes: the official FCOS learned inclusive ones (x2 = x + w - 1), to which decoding adds the
# missing pixel. Locations lie at the "centre" of their cells, or in torchvision at the "corner".
# Scores are those of "fcos", "torchvision" or "mmdetection": see FCOS.decode.
CONVENTION = dict(
    bgr=True, mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), bn_eps=0.0,
    inclusive=False, grid="centre", score="fcos",
)
CHOICES = dict(grid=("centre", "corner"), score=("fcos", "torchvision", "mmdetection"))


class UserError(ValueError):
    """A mistake in what was passed in; the scripts print it as one line, without a traceback."""


# ---- images ------------------------------------------------------------------------------------


def read_image(source, hw=None):
    """Decode an image file or PIL image to RGB: uint8 (3, H, W). Grey, palette, CMYK, transparent
    and 16-bit images become 8-bit RGB.

    EXIF orientation is applied, as a viewer would. With `hw`, the (height, width) that annotations
    were drawn on, it is applied only if the file as stored does not have that size but the turned
    image does: COCO's boxes refer to the stored pixels. UserError names an unreadable file.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        stored = image.size[::-1]
        if stored != hw and image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating point; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would saturate at 255
            pixels = np.asarray(image)
            pixels = pixels >> 8 if pixels.max() > 255 else pixels
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
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


def resized_hw(h, w, min_size, max_size):
    """(height, width) after scaling the short side to `min_size` pixels, or less if the long side
    would pass `max_size`. Rounds as the official code does: the long side is truncated, and an
    image whose short side already fits stays as it is."""
    if min_size < 1 or max_size < 1:
        raise UserError(f"sizes {min_size} and {max_size}: expected numbers of pixels")
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
    return F.interpolate(image[None], tuple(hw), mode="bilinear", antialias=True)[0]


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
        slot[:, :h, :w] = image
    return batch, torch.tensor(sizes)


# ---- backbone ----------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """BatchNorm2d with constant statistics and affine: y = scale * x + shift for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.eps = CONVENTION["bn_eps"]
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_shift(self):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


NORMS = {
    "frozen": FrozenBatchNorm,
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
        return deform_conv2d(
            x.to(dtype), offset, weight.to(dtype), bias, self.stride, self.padding,
            mask=mask.sigmoid(),
        ).to(x.dtype)


class ConvNorm(nn.Module):
    """A convolution and the normalisation after it; `norm` is one of NORMS."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, norm="gn", bias=False, dcn=False):
        super().__init__()
        conv = DeformConv if dcn else nn.Conv2d
        self.conv = conv(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = NORMS[norm](c_out)

    def forward(self, x):
        if not isinstance(self.norm, FrozenBatchNorm):
            return self.norm(self.conv(x))
        # A frozen norm is folded into the weights on every call: one product per weight instead of
        # a pass over the activations, and no activation saved for backward.
        scale, shift = self.norm.scale_shift()
        weight = self.conv.weight * scale[:, None, None, None]
        return self.conv._conv_forward(x, weight, shift)


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
    """3x3, 3x3: the block of ResNet-18 and 34."""

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


class ResNet(nn.Module):
    """ResNet and ResNeXt without the classifier; returns the features at strides 8, 16, 32. The
    last 3x3 of every block is deformable in the stages `dcn`, some of 2..5."""

    def __init__(self, block, blocks, stem, groups, width, norm, stride_in_1x1, dcn):
        super().__init__()
        block = BLOCKS[block]
        self.stem = ConvNorm(3, stem, 7, 2, norm=norm)
        c_in = stem
        for stage, depth in enumerate(blocks):
            c_mid, c_out = groups * width * 2**stage, block.expansion * stem * 2**stage
            layers = []
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                settings = stride, groups, norm, stride_in_1x1, stage + 2 in dcn
                layers += [block(c_in, c_mid, c_out, *settings)]
                c_in = c_out
            setattr(self, f"res{stage + 2}", nn.Sequential(*layers))
        self.channels = [c_out // 4, c_out // 2, c_out]

    def freeze(self, stages):
        """Stop learning in the first `stages` of stem, res2, res3, res4, res5."""
        for stage in [self.stem, self.res2, self.res3, self.res4, self.res5][:stages]:
            stage.requires_grad_(False)

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
    """Sandler et al., arXiv 1801.04381, table 2, without the last 1x1 and the classifier; returns
    the features at strides 8, 16, 32."""

    STAGES = (1, 16, 1), (6, 24, 2), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1)
    channels = [32, 96, 320]

    def __init__(self, blocks, stem, norm):
        super().__init__()
        self.features, c_in = nn.Sequential(ConvNorm(3, stem, 3, 2, norm=norm)), stem
        for (expand, c_out, stride), depth in zip(self.STAGES, blocks):
            for i in range(depth):
                s = stride if i == 0 else 1
                self.features.append(InvertedResidual(c_in, c_out, s, expand, norm))
                c_in = c_out
        self.ends = [sum(blocks[:n]) for n in (3, 5, 7)]  # the last block at strides 8, 16, 32

    def freeze(self, stages):
        """Stop learning in the stem and the blocks after it, `stages` in all."""
        self.features[:stages].requires_grad_(False)

    def forward(self, x):
        stem, *blocks = self.features
        x, found = F.relu6(stem(x), inplace=True), []
        for i, block in enumerate(blocks, 1):
            x = block(x)
            if i in self.ends:
                found.append(x)
        return found


# ---- feature pyramid and head ------------------------------------------------------------------


class FPN(nn.Module):
    """C3, C4, C5 -> P3, P4, P5, and two strided convolutions for P6 and P7 (section 3.2)."""

    def __init__(self, channels_in, channels):
        super().__init__()
        for level, c_in in zip((3, 4, 5), channels_in):
            setattr(self, f"lateral{level}", nn.Conv2d(c_in, channels, 1))
            setattr(self, f"output{level}", nn.Conv2d(channels, channels, 3, padding=1))
        self.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, c3, c4, c5):
        p5 = self.lateral5(c5)
        p4 = self.lateral4(c4)
        p4 = p4 + F.interpolate(p5, p4.shape[-2:])
        p3 = self.lateral3(c3)
        p3 = p3 + F.interpolate(p4, p3.shape[-2:])
        p3, p4, p5 = self.output3(p3), self.output4(p4), self.output5(p5)
        p6 = self.p6(p5)
        return p3, p4, p5, p6, self.p7(p6.relu())


class Tower(nn.Sequential):
    """Four 3x3 convolutions with GroupNorm and ReLU; with `dcn`, the last is deformable."""

    def __init__(self, channels, dcn):
        super().__init__(*(
            ConvNorm(channels, channels, 3, bias=True, dcn=dcn and i == 3) for i in range(4)
        ))

    def forward(self, x):
        for layer in self:
            x = layer(x).relu_()
        return x


class Head(nn.Module):
    """Two towers shared by all levels, a prediction each for class, box and centerness, and one
    learned scale of the distances for each level (section 3.2), unless `scales` is False."""

    def __init__(self, channels, num_classes, activation, ctr_on, dcn, scales):
        super().__init__()
        self.activation, self.ctr_on = activation, ctr_on
        self.cls_tower, self.box_tower = Tower(channels, dcn), Tower(channels, dcn)
        self.cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box = nn.Conv2d(channels, 4, 3, padding=1)
        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)
        if scales:
            self.scale = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in STRIDES)
        else:
            self.register_buffer("scale", torch.ones(len(STRIDES), 1), persistent=False)

    def forward(self, features):
        """-> cls (B, P, K) and ctr (B, P) logits, ltrb (B, P, 4) pixels. Under autocast cls, by far
        the largest, stays in 16 bits: its loss reads them as they are and computes in float32."""
        cls, ltrb, ctr = [], [], []
        for x, scale, stride in zip(features, self.scale, STRIDES):
            cls_features, box_features = self.cls_tower(x), self.box_tower(x)
            distance = scale * self.box(box_features)  # float32, as the scale is
            if self.activation == "exp":  # in pixels; exp(16) is beyond any image, inf would be NaN
                distance = distance.clamp(max=16).exp()  # in the gradient of background locations
            else:
                distance = distance.relu() * stride
            cls.append(self.cls(cls_features))
            ltrb.append(distance)
            ctr_features = cls_features if self.ctr_on == "cls" else box_features
            ctr.append(self.ctr(ctr_features).to(scale.dtype))
        cls, ltrb, ctr = (
            torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1)
            for maps in (cls, ltrb, ctr)
        )
        return cls, ltrb, ctr.squeeze(2)


# ---- locations and targets ---------------------------------------------------------------------


def level_sizes(hw):
    """(rows, columns) of P3..P7 for a padded image; every stage halves, rounding up."""
    return [(-(-hw[0] // stride), -(-hw[1] // stride)) for stride in STRIDES]


def make_points(hw, device=None, grid="centre"):
    """Locations of all levels of a padded image of (height, width): float32 (P, 5) = x, y, stride,
    lo, hi. A location is the centre of its cell; lo and hi bound the largest distance it learns.

    grid "corner" is torchvision's: multiples of (height // rows, width // columns), which is less
    than the stride on P6 and P7 of most images, from 0 on.
    """
    points = []
    for stride, (lo, hi), (rows, columns) in zip(STRIDES, RANGES, level_sizes(hw)):
        y, x = (torch.arange(n, device=device) for n in (rows, columns))
        if grid == "centre":
            y, x = y * stride + stride // 2, x * stride + stride // 2
        else:
            y, x = y * (hw[0] // rows), x * (hw[1] // columns)
        level = torch.empty(rows, columns, 5, device=device)
        level[..., 0], level[..., 1] = x, y[:, None]
        level[..., 2], level[..., 3], level[..., 4] = stride, lo, hi
        points.append(level.flatten(0, 1))
    return torch.cat(points)


def centerness(ltrb):
    """How central a location lies in its box (eq. 3): (..., 4) -> (...), 1 at the centre, towards 0
    at the sides; 0 where ltrb is 0, that is for the background."""
    left, top, right, bottom = ltrb.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-12)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-12)
    return (horizontal * vertical).sqrt()


# ---- losses ------------------------------------------------------------------------------------


def normalizer(targets):
    """-> float32 (2,): the number of positive locations and the sum of their centerness. Sum it
    over everything that makes up one optimizer step, then pass it to fcos_loss."""
    positives = (targets["labels"] >= 0).sum().float()
    return torch.stack([positives, centerness(targets["ltrb"]).sum()])


def fcos_loss(outputs, targets, normalizer, iou="giou", unit="stride"):
    """Focal loss on the classes, IoU loss on the boxes weighted by centerness, and cross entropy on
    the centerness (eq. 2 and section 3.3), as {"cls", "box", "ctr"} scalars.

    outputs: of FCOS.forward; targets: of FCOS.targets; normalizer (2,): see `normalizer`.
    iou: "iou", "linear_iou" or "giou"; unit: measure boxes in "pixel" or in "stride" of their level
    (matters because the IoU is smoothed by +1). Dense: no location is gathered, nothing waits for
    the device, and a batch without a single box is an ordinary input.
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r}: expected {' or '.join(map(repr, UNITS))}")
    positives, centernesses = normalizer[0].clamp(min=1), normalizer[1].clamp(min=1e-6)
    cls, ltrb, labels, target = outputs["cls"], outputs["ltrb"], targets["labels"], targets["ltrb"]
    weight = centerness(target)
    if unit == "stride":
        stride = outputs["points"][:, 2:3]
        ltrb, target = ltrb / stride, target / stride
    box = iou_loss(ltrb.flatten(0, 1), target.flatten(0, 1), weight.flatten(), iou)
    ctr = F.binary_cross_entropy_with_logits(
        outputs["ctr"], weight, weight=(labels >= 0).float(), reduction="sum"
    )
    return {
        "cls": sigmoid_focal_loss(cls.flatten(0, 1), labels.flatten()) / positives,
        "box": box / centernesses,
        "ctr": ctr / positives,
    }


# ---- the model ---------------------------------------------------------------------------------


class FCOS(nn.Module):
    """Made by `build` or `load`. `loss` holds the keywords of fcos_loss, `classes` and
    `category_ids` the data set's, `test_size` (min_size, max_size) of prediction in pixels, and
    `convention` (see CONVENTION) what the weights expect of pixels and boxes."""

    def __init__(self, num_classes, blocks, activation, ctr_on, radius, iou, unit,
                 block="bottleneck", stem=64, groups=1, width=None, stride_in_1x1=True, dcn=(),
                 channels=256, scales=True, grid="centre", norm="frozen", frozen_stages=2):
        super().__init__()
        for keyword, value, choices in (
            ("norm", norm, NORMS), ("block", block, (*BLOCKS, "inverted")),
            ("ctr_on", ctr_on, ("cls", "box")), ("activation", activation, ("exp", "relu")),
            ("grid", grid, CHOICES["grid"]), ("iou", iou, KINDS), ("unit", unit, UNITS),
            ("frozen_stages", frozen_stages, range(19 if block == "inverted" else 6)),
        ):
            if value not in choices:
                choices = ", ".join(map(str, choices))
                raise UserError(f"{keyword} {value!r}: expected one of {choices}")
        if num_classes < 1:
            raise UserError(f"num_classes {num_classes}: expected 1 or more")
        if block == "inverted":
            self.backbone = MobileNetV2(blocks, stem, norm)
        else:
            width = width or stem
            self.backbone = ResNet(block, blocks, stem, groups, width, norm, stride_in_1x1, dcn)
        self.fpn = FPN(self.backbone.channels, channels)
        self.head = Head(channels, num_classes, activation, ctr_on, bool(dcn), scales)
        self.initialize()
        self.backbone.freeze(frozen_stages)

        self.num_classes, self.radius = num_classes, radius
        self.loss = dict(iou=iou, unit=unit)
        self.classes = self.category_ids = None
        self.test_size = (800, 1333)
        self.set_convention(grid=grid)
        self.to(memory_format=torch.channels_last)  # the layout convolutions are fastest in

    def initialize(self):
        """As the official code: section 4 of the paper, and the bias of the focal loss paper that
        starts every class at a probability of 0.01 (arXiv 1708.02002, section 3.3)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                if isinstance(module, DeformConv):
                    bound = (9 * module.in_channels) ** -0.5
                    nn.init.uniform_(module.weight, -bound, bound)
                elif name.startswith("head"):
                    nn.init.normal_(module.weight, std=0.01)
                elif name.startswith("backbone.features"):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")
                else:
                    nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.head.cls.bias, -math.log((1 - 0.01) / 0.01))

    def set_convention(self, **changes):
        """Change what the weights expect of pixels and boxes: keywords of CONVENTION."""
        for keyword in changes:
            if keyword not in CONVENTION:
                raise UserError(f"{keyword!r}: expected one of {', '.join(CONVENTION)}")
        for keyword, choices in CHOICES.items():
            if changes.get(keyword, choices[0]) not in choices:
                raise UserError(f"{keyword} {changes[keyword]!r}: expected {' or '.join(choices)}")
        self.convention = {**CONVENTION, **getattr(self, "convention", {}), **changes}
        for name in ("mean", "std"):
            value = torch.tensor(self.convention[name]).view(3, 1, 1).to(next(self.parameters()))
            self.register_buffer(f"pixel_{name}", value, persistent=False)
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm):
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

    def forward(self, images, sizes=None):
        """images: uint8 RGB (B, 3, H, W), with sizes (B, 2) where padded at the bottom and right;
        or float, taken as normalised and padded already.
        -> {"cls": (B, P, K) logits, "ltrb": (B, P, 4) pixels, "ctr": (B, P) logits,
            "points": (P, 5), "levels": the number of locations of P3..P7}
        """
        hw = images.shape[-2:]
        if not images.is_floating_point():
            images = self.normalize(images, [hw] * len(images) if sizes is None else sizes)
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        cls, ltrb, ctr = self.head(self.fpn(*features))
        levels = [rows * columns for rows, columns in level_sizes(hw)]
        points = make_points(hw, images.device, self.convention["grid"])
        return {"cls": cls, "ltrb": ltrb, "ctr": ctr, "points": points, "levels": levels}

    def targets(self, hw, boxes, labels):
        """What every location of a padded (height, width) batch is to learn.

        boxes, labels: B lists of (G, 4) xyxy pixels and (G,) int64, on the device of the result.
        -> {"labels": (B, P) int64, -1 for background, "ltrb": (B, P, 4) pixels,
            "index": (B, P) int64 of the matched box}, zeros and -1 for background
        """
        points = make_points(hw, boxes[0].device, self.convention["grid"])
        labels, ltrb, index = assign(points, boxes, labels, self.radius)
        return {"labels": labels, "ltrb": ltrb, "index": index}

    def decode(self, outputs, sizes, score_threshold=None, topk=1000, nms_threshold=0.6,
               max_detections=100):
        """Boxes of the outputs of `forward`, in shapes that never depend on their values.

        On every level the (location, class) pairs of class probability over `score_threshold`
        (0.05) compete by probability times centerness, and `topk` go on; non-maximum suppression
        within a class over all levels leaves `max_detections` (section 3.3).
        -> boxes (B, D, 4) xyxy pixels of the padded image, clipped to its size; scores (B, D) =
           sqrt(probability * centerness), falling; labels (B, D). 0, -inf and -1 where none is left
        Weights of torchvision bring its custom along, a threshold (0.2) on that square root; those
        of mmdetection to choose `topk` by probability alone, and to report no square root. (Their
        plain configurations also ask for nms_threshold=0.5.)
        """
        custom = self.convention["score"]
        if score_threshold is None:
            score_threshold = 0.2 if custom == "torchvision" else 0.05
        cls, ctr = outputs["cls"].float().sigmoid(), outputs["ctr"].float().sigmoid()
        points = outputs["points"]
        B, P, K = cls.shape
        joint = cls * ctr[..., None]
        passed = joint > score_threshold**2 if custom == "torchvision" else cls > score_threshold
        ranking = torch.where(passed, cls if custom == "mmdetection" else joint, -math.inf)

        left, top, right, bottom = outputs["ltrb"].float().unbind(-1)
        x, y, extra = points[:, 0], points[:, 1], float(self.convention["inclusive"])
        h, w = torch.as_tensor(sizes, device=cls.device).float().view(B, 2, 1).unbind(1)
        x1 = torch.minimum((x - left).clamp(min=0), w - extra)
        y1 = torch.minimum((y - top).clamp(min=0), h - extra)
        x2 = torch.minimum((x + right + extra).clamp(min=extra), w)
        y2 = torch.minimum((y + bottom + extra).clamp(min=extra), h)
        boxes = torch.stack([x1, y1, x2, y2], -1)

        scores, pairs, first = [], [], 0
        for level in ranking.split(outputs["levels"], 1):
            score, pair = level.flatten(1).topk(min(topk, level[0].numel()))
            scores.append(score)
            pairs.append(pair + first * K)
            first += level.shape[1]
        scores, pairs = torch.cat(scores, 1), torch.cat(pairs, 1)
        if custom == "mmdetection":
            scores = scores * ctr.gather(1, pairs // K)
        labels = pairs % K
        boxes = boxes.gather(1, (pairs // K)[..., None].expand(-1, -1, 4))
        scores = scores.masked_fill(boxes.isnan().any(-1), -math.inf)

        keep = batched_nms(boxes, scores, labels, nms_threshold, max_detections)
        found, keep = keep >= 0, keep.clamp(min=0)
        boxes = boxes.gather(1, keep[..., None].expand(-1, -1, 4)).where(found[..., None], 0)
        scores = scores.gather(1, keep).clamp(min=0)
        scores = torch.where(found, scores if custom == "mmdetection" else scores.sqrt(), -math.inf)
        return boxes, scores, torch.where(found, labels.gather(1, keep), -1)

    def detect(self, outputs, sizes, **thresholds):
        """`decode` as torchvision's list of {"boxes" (D, 4), "scores" (D,), "labels" (D,)}, only as
        long as there are detections. Waits for the device; decode does not."""
        results = []
        for boxes, scores, labels in zip(*self.decode(outputs, sizes, **thresholds)):
            D = int((labels >= 0).sum())
            results.append({"boxes": boxes[:D], "scores": scores[:D], "labels": labels[:D]})
        return results

    @torch.no_grad()
    def predict(self, images, min_size=None, max_size=None, **thresholds):
        """Detections in pixels of the given images.

        images: one or a list of paths, PIL images, RGB uint8 arrays (H, W, 3) or RGB uint8 tensors
        (3, H, W). min_size, max_size: pixels to resize to, by default `test_size`.
        -> a list of {"boxes" (D, 4) xyxy, "scores" (D,), "labels" (D,)} on the CPU, always a list
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        min_size, max_size = min_size or self.test_size[0], max_size or self.test_size[1]
        device, training = self.pixel_mean.device, self.training
        self.eval()
        results = []
        try:
            for image in map(as_image, images):
                h, w = image.shape[-2:]
                new_h, new_w = resized_hw(h, w, min_size, max_size)
                batch, sizes = pad_batch([resize(image, (new_h, new_w))])
                outputs = self(batch.to(device), sizes.to(device))
                found = self.detect(outputs, sizes, **thresholds)[0]
                found = {name: value.cpu() for name, value in found.items()}
                found["boxes"] *= torch.tensor([w / new_w, h / new_h, w / new_w, h / new_h])
                results.append(found)
        finally:
            self.train(training)
        return results


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
        f"image {what}: expected a path, a PIL image, an RGB uint8 array (H, W, 3) or an RGB uint8 "
        "tensor (3, H, W)"
    )


def build(name, num_classes=80, **overrides):
    """A new model of the row `name` of MODELS, randomly initialised; never downloads.

    overrides: keywords of FCOS that replace the row's, such as norm="gn", frozen_stages=0.
    ValueError lists the choices.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    choices = list(inspect.signature(FCOS).parameters)[1:]
    for keyword in overrides:
        if keyword not in choices:
            raise UserError(f"keyword {keyword!r}: expected one of {', '.join(choices)}")
    model = FCOS(num_classes, **{**MODELS[name], **overrides})
    model.name, model.overrides = name, overrides
    return model


# ---- weights -----------------------------------------------------------------------------------

# COCO's 80 classes; a category id is a place in this list, counted from 1, and ten are not used.
COCO = {id: name for id, name in enumerate(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,"
    "backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush".split(","), 1) if name}

# How others name what is called backbone.*, fpn.* and head.* here: pattern and replacement, applied
# from top to bottom. "+" adds; n/3 is the name of module n among convolution, norm, relu, ...
NAMES = r"""
    # ResNets of torchvision, the official code, mmdetection and, with bottom_up, Detectron2
    ^(backbone\.)?(body\.|bottom_up\.)?(stem\.)?conv1\.(?=weight)  backbone.stem.conv.
    ^(backbone\.)?(body\.)?(stem\.)?bn1\.                          backbone.stem.norm.
    ^(backbone\.bottom_up\.)?stem\.conv1\.norm\.                   backbone.stem.norm.
    ^(backbone\.)?(body\.)?layer(\d)\.                             backbone.res\3+1.
    ^(backbone\.bottom_up\.)?res(\d)\.                             backbone.res\2.
    \.conv(\d)\.(?=weight)                                         .conv\1.conv.
    \.bn(\d)\.                                                     .conv\1.norm.
    \.(downsample\.0|shortcut)\.(?=weight)                         .down.conv.
    \.(downsample\.1|shortcut\.norm)\.                             .down.norm.
    \.conv2(\.|\.conv_|_)offset\.                                  .conv2.conv.offset.
    # ResNets of Caffe2 and, with gamma and beta, Detectron2
    ^conv1_w$                        backbone.stem.w
    ^res_conv1_bn                    backbone.stem.bn
    ^res(\d)_(\d+)_branch1_(w|bn)    backbone.res\1.\2.down.\3
    ^res(\d)_(\d+)_branch2a_(w|bn)   backbone.res\1.\2.conv1.\3
    ^res(\d)_(\d+)_branch2b_(w|bn)   backbone.res\1.\2.conv2.\3
    ^res(\d)_(\d+)_branch2c_(w|bn)   backbone.res\1.\2.conv3.\3
    \.w$                             .conv.weight
    \.bn_(s|gamma)$                  .norm.weight
    \.bn_(b|beta)$                   .norm.bias
    \.bn_(rm|running_mean)$          .norm.running_mean
    \.bn_(riv|running_var)$          .norm.running_var
    # MobileNets
    ^(backbone\.body\.)?features\.(\d|1[0-7])\.  backbone.features.\2.
    \.features\.0\.0\.                           .features.0.conv.
    \.features\.0\.1\.                           .features.0.norm.
    \.features\.(\d+)\.conv\.(\d+)\.             .features.\1.\2/3.
    # pyramids: official, torchvision (its files have both spellings), AdelaiDet, mmdetection
    ^backbone\.fpn\.fpn_inner(\d)\.              fpn.lateral\1+1.
    ^backbone\.fpn\.fpn_layer(\d)\.              fpn.output\1+1.
    ^backbone\.fpn\.inner_blocks\.(\d)\.(0\.)?   fpn.lateral\1+3.
    ^backbone\.fpn\.layer_blocks\.(\d)\.(0\.)?   fpn.output\1+3.
    ^backbone\.fpn\.(top|extra)_blocks\.         fpn.
    ^backbone\.fpn_(lateral|output)              fpn.\1
    ^backbone\.top_block\.                       fpn.
    ^neck\.lateral_convs\.(\d)\.conv\.           fpn.lateral\1+3.
    ^neck\.fpn_convs\.([012])\.conv\.            fpn.output\1+3.
    ^neck\.fpn_convs\.([34])\.conv\.             fpn.p\1+3.
    # heads: official, AdelaiDet, mmdetection, torchvision
    ^(rpn\.head|proposal_generator\.fcos_head|bbox_head)\.  head.
    ^head\.classification_head\.conv\.                      head.cls_tower.
    ^head\.regression_head\.conv\.                          head.bbox_tower.
    ^head\.\w+_head\.                                       head.
    ^head\.cls_tower\.(\d+)\.                               head.cls_tower.\1/3.
    ^head\.bbox_tower\.(\d+)\.                              head.box_tower.\1/3.
    ^head\.cls_convs\.                                      head.cls_tower.
    ^head\.reg_convs\.                                      head.box_tower.
    \.gn\.                                                  .norm.
    ^head\.(cls_logits|conv_cls|fcos_cls)\.                 head.cls.
    ^head\.(bbox_pred|bbox_reg|conv_reg|fcos_reg)\.         head.box.
    ^head\.(bbox_ctrness|ctrness|(conv_|fcos_)?centerness)\.  head.ctr.
    ^head\.scales\.(\d)\.scale$                             head.scale.\1
    \.conv\.conv\.                                          .conv.
    \.conv\.conv_offset\.                                   .conv.offset.
"""
NESTED_MOBILENET = r"""
    # torchvision nests its layers, and so counts them in twos
    ^features\.1\.conv\.([12])\.(?=\D)             features.1.conv.\1+2.
    ^features\.(\d\d|[2-9])\.conv\.([23])\.(?=\D)  features.\1.conv.\2+4.
    \.conv\.0\.([01])\.                            .conv.\1.
    \.conv\.1\.([01])\.                            .conv.\1+3.
"""
CAFFE = {name: CONVENTION[name] for name in ("bgr", "mean", "std", "bn_eps")}
MSRA = CAFFE | dict(mean=(103.53, 116.28, 123.675), bn_eps=1e-5)
TORCH = dict(
    bgr=False, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), bn_eps=1e-5
)
DETECTORS = {  # family: (a key by which its files are known, the convention of its weights)
    "fcos": (r"head\.cls\.weight", {}),
    "official": (r"rpn\.head\.cls_logits\.weight", CONVENTION | dict(inclusive=True)),
    "adelaidet": (r"proposal_generator\.fcos_head\.cls_logits\.weight", CONVENTION | MSRA),
    "torchvision": (r"head\.classification_head\.cls_logits\.weight",
                    CONVENTION | TORCH | dict(grid="corner", score="torchvision")),
    "mmdetection": (r"bbox_head\.(conv|fcos)_cls\.weight",
                    CONVENTION | dict(bn_eps=1e-5, score="mmdetection")),
}
CLASSIFIERS = {  # for their backbone; the official recipes feed Caffe's pixels to MobileNet, too
    "detectron2": (r"res_conv1_bn_(gamma|rm)", MSRA),
    "caffe2": (r"res_conv1_bn_s", CAFFE),
    "torchvision_in_detectron2": (r"stem\.conv1\.norm\.weight", TORCH),
    "torchvision_resnet": (r"layer1\.0\.conv1\.weight", TORCH),
    "torchvision_mobilenet": (r"features\.1\.conv\.0\.0\.weight", TORCH),
    "mobilenet": (r"features\.1\.conv\.3\.weight", CAFFE),
}
FAMILIES = DETECTORS | CLASSIFIERS


def our_name(key, table=NAMES):
    """A key of another family in our words, by a table such as NAMES."""
    def expand(match):
        text = match.expand(replacement)
        text = re.sub(r"(\d)\+(\d)", lambda m: str(int(m[1]) + int(m[2])), text)
        part = ("conv", "norm", "relu")
        return re.sub(r"(\d+)/3", lambda m: f"{int(m[1]) // 3}.{part[int(m[1]) % 3]}", text)

    for row in table.split("\n"):
        if row and "#" not in row:
            pattern, replacement = row.split()
            key = re.sub(pattern, expand, key)
    return key


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
        with open(path, "rb") as file:
            if str(path).endswith(".pkl"):
                return ArrayUnpickler(file, encoding="latin1").load()
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # junk makes the readers raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: refused, because it holds {refused[1]} and could run any program; save "
                "its state dict alone"
            ) from None
        what = type(error).__name__
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({what})") from None


def open_weights(source):
    """A path or a dict of any family -> (path, content, state dict, family, the key that tells)."""
    path = source if isinstance(source, (str, os.PathLike)) else "weights"
    content = read_checkpoint(source) if path is source else source
    state = content
    while isinstance(state, dict):  # last.pt of train.py holds a checkpoint that holds the weights
        inner = [state.get(wrapper) for wrapper in ("model", "state_dict", "blobs")]
        inner = [value for value in inner if isinstance(value, dict)]
        if not inner:
            break
        content, state = state, inner[0]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: holds no state dict but a {type(state).__name__}")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for family, (mark, _) in FAMILIES.items():
        for key, value in state.items():
            if re.fullmatch(mark, key) and getattr(value, "ndim", 0):
                return path, content, state, family, key
    raise UserError(
        f"{path}: of no family known here ({', '.join(FAMILIES)}); its first keys are "
        f"{', '.join(list(state)[:3]) or 'none'}"
    )


def input_convention(model, family, content, state):
    """What a file tells of the pixels it wants beyond its family, as keywords of CONVENTION."""
    row = MODELS[model.name] | model.overrides
    if "pixel_mean" in state:  # AdelaiDet's
        mean, std = (tuple(state[f"pixel_{x}"].flatten().tolist()) for x in ("mean", "std"))
        return dict(bgr=mean[0] < mean[2], mean=mean, std=std)
    if family in ("adelaidet", "detectron2") and row.get("groups") == 32:
        return dict(std=(57.375, 57.12, 58.395))  # for this backbone alone
    if family == "mmdetection":  # the text of its configuration lies beside the weights
        text = str(content.get("meta"))
        found = [re.search(name + r"=\[([^\]]*)\]", text) for name in ("mean", "std")]
        if all(found):
            mean, std = (tuple(map(float, re.findall(r"[\d.]+", match[1]))) for match in found)
            return dict(bgr="to_rgb=True" not in text, mean=mean, std=std)
        if not row.get("stride_in_1x1", True):
            return TORCH
        if "bbox_head.cls_convs.0.conv.bias" in state:
            return MSRA
    return {}


def load_weights(model, source, finetune=False):
    """Fill `model` from a path or a dict: our own checkpoints; detectors of the official FCOS,
    AdelaiDet, torchvision and mmdetection; and of ImageNet classifiers of Caffe2, Detectron2 and
    torchvision the backbone. The family is known from the keys and sets what goes with it in
    model.convention. The architecture is the row's and never changes; a file that contradicts it is
    an error, but only ours tell exp from relu. A detector of 80 classes gets the names of COCO's.

    finetune: a classifier of another number of classes is left as it is, not an error.
    -> {"family", "convention", "loaded", "ignored", "missing"}, the last three lists of names.
       UserError lists keys that are missing or unknown, and shapes that differ.
    """
    path, content, state, family, _ = open_weights(source)

    def refuse(why):
        raise UserError(f"{path}: does not fit {model.name}: {why}")

    # ---- their names become ours
    table = NESTED_MOBILENET + NAMES if family == "torchvision_mobilenet" else NAMES
    own, renamed, unknown = model.state_dict(), {}, {}
    for key, value in state.items():
        name = key if family == "fcos" else our_name(key, table)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value.astype(np.float32))
        if name not in own or name in renamed:
            unknown[key] = name
        elif isinstance(value, torch.Tensor):
            renamed[name] = value
        else:
            raise UserError(f"{path}: {key} is no tensor but {type(value).__name__}")
    for name, value in own.items():
        if family == "caffe2" and re.match(r"backbone\..*\.running_(mean|var)$", name):
            renamed[name] = torch.full_like(value, name.endswith("var"))  # its norm is affine
        elif family == "mmdetection" and re.fullmatch(r"head\.\w+_tower\.\d\.conv\.bias", name):
            renamed.setdefault(name, torch.zeros_like(value))  # its plain models have none
        elif family == "mmdetection" and name.startswith("head.scale.") and name in renamed:
            renamed[name] = renamed[name].reshape(1)
        elif family == "torchvision" and name.startswith("head.cls.") and name in renamed:
            ids = model.category_ids or list(COCO)  # its 91 rows are category ids
            if len(renamed[name]) == 91 != model.num_classes == len(ids) and max(ids) < 91:
                renamed[name] = renamed[name][ids]

    # ---- does everything fit?
    missing, spare = [name for name in own if name not in renamed], r".*num_batches_tracked"
    if family in DETECTORS:
        wrong, spare = missing + list(unknown), spare + r"|pixel_(mean|std)"
    else:  # the rest of the file is its classifier
        if "backbone.stem.norm.running_var" not in own and "backbone.stem.conv.weight" in own:
            raise UserError(f"{path}: is of a backbone with BatchNorm, and this one has GroupNorm")
        wrong = missing + [key for key, name in unknown.items() if name.startswith("backbone.")]
        spare += r"|(fpn|head)\..*|.*\.offset\..*"
    wrong = [name for name in wrong if not re.fullmatch(spare, name)]
    if wrong:
        refuse(f"{len(wrong)} keys are missing or unknown, among them {', '.join(wrong[:5])}")
    for name, value in list(renamed.items()):
        if value.shape != own[name].shape:
            if finetune and name.startswith("head.cls."):
                missing.append(name)
                del renamed[name]
                continue
            hint = "; fine-tuning starts a new classifier" if name.startswith("head.cls.") else ""
            refuse(f"{name} is {tuple(value.shape)} in the file and {tuple(own[name].shape)} in "
                   f"the model{hint}")
    if family == "fcos" and "name" in content:  # what shapes do not tell
        for keyword in ("activation", "ctr_on", "stride_in_1x1", "scales"):
            there, here = (
                (MODELS.get(name, {}) | overrides).get(keyword)
                for name, overrides in ((content["name"], content["overrides"]),
                                        (model.name, model.overrides))
            )
            if there != here:
                refuse(f"it is a {content['name']}, whose {keyword} is {there} and not {here}")
    if family in CLASSIFIERS:
        row = MODELS[model.name] | model.overrides
        norm, here = row.get("norm", "frozen"), row.get("stride_in_1x1", True)
        there = family in ("caffe2", "detectron2") and row.get("groups", 1) == 1
        if "backbone.res2.0.conv3.conv.weight" in own and there != here:
            there, here = ("1x1" if first else "3x3" for first in (there, here))
            refuse(f"its blocks have the stride in the {there} convolution, the model's in the "
                   f"{here}")
        if family == "caffe2" and norm != "frozen":
            refuse("its norms have no statistics, so that they can only be norm='frozen'")

    model.load_state_dict(renamed, strict=False)
    convention = FAMILIES[family][1] | input_convention(model, family, content, state)
    if family == "fcos":
        convention = content.get("convention", {})
    elif family in DETECTORS and model.num_classes == 80 and model.classes is None:
        model.classes, model.category_ids = list(COCO.values()), list(COCO)
    model.set_convention(**convention)
    return {"family": family, "convention": model.convention, "loaded": list(renamed),
            "ignored": list(unknown), "missing": missing}


def load(path, name=None):
    """A model in eval mode from a file alone, if it is one of our own checkpoints or torchvision's;
    those of other families do not say which architecture they are of: `name` is a row of MODELS."""
    if name not in (None, *MODELS):
        raise UserError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    _, content, state, family, key = open_weights(path)
    fields = {"name", "num_classes", "overrides", "classes", "category_ids", "convention"}
    if not fields | {"test_size", "model"} <= content.keys():
        if family in CLASSIFIERS:
            raise UserError(f"{path}: is an ImageNet classifier, as {key} tells, and no detector")
        if name is None and family == "torchvision":
            name = "fcos_torchvision_R_50_FPN"
        if name is None:
            raise UserError(
                f"{path}: does not say which model it is; name one of {', '.join(MODELS)}"
            )
        num_classes = 80 if family == "torchvision" and len(state[key]) == 91 else len(state[key])
        model = build(name, num_classes)
        load_weights(model, path)
        return model.eval()
    if name not in (None, content["name"]):
        raise UserError(f"{path}: is a {content['name']}, not a {name}")
    try:
        model = build(content["name"], content["num_classes"], **content["overrides"])
        model.classes, model.category_ids = content["classes"], content["category_ids"]
        model.test_size = tuple(content["test_size"])
    except (ValueError, TypeError, RuntimeError) as error:  # of another version, or made by hand
        raise UserError(f"{path}: {error}") from None
    load_weights(model, path)
    return model.eval()


def checkpoint(model):
    """All that `load` needs to rebuild the model, as tensors and plain Python values."""
    names = ("name", "num_classes", "overrides", "classes", "category_ids", "convention",
             "test_size")
    return {name: getattr(model, name) for name in names} | {"model": model.state_dict()}


@contextlib.contextmanager
def open_whole(path, mode="wb", keep=None):
    """Open a file for writing that appears at `path` whole, when the block ends, or not at all.
    What was there moves to `keep`, if given. UserError if it cannot be written."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the former in the latter
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: cannot be written ({cause})") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def save(model, path):
    """Write a checkpoint that `load` reads, whole or not at all."""
    with open_whole(path) as file:
        torch.save(checkpoint(model), file)
