"""Weights for the official FCOS models that need no file: make_weights({key: shape}).

`key` is the official state_dict key without a leading "module."; a tensor depends on its key and
shape alone: x = Generator(PCG64(crc32(key))).standard_normal(shape) as float32. First match wins:

    *.num_batches_tracked   int64 zeros
    convolution weights     x * sqrt(2 / fan_in) * gain; x of cls_logits has mean 0 per channel
    *.running_var           0.5 + |x|
    *.running_mean          0.1 x
    *.scale                 1 + 0.1 x
    *.bias                  0.1 x, plus -5 for cls_logits and 3.25 for bbox_pred
    norm *.weight           1 + 0.1 x, times 0.2 for *.bn3.weight, the last norm of a bottleneck
"""

import math
import zlib

import numpy as np

GAINS = {
    "backbone.body.stem.conv1.weight": 1 / 64,  # the pixels it meets are about +-128
    "backbone.body.features.0.0.weight": 1 / 64,
    "rpn.head.cls_logits.weight": 1.5,
    "rpn.head.bbox_pred.weight": 1.5,
}
BIASES = {"rpn.head.cls_logits.bias": -5.0, "rpn.head.bbox_pred.bias": 3.25}


def make_weight(key, shape):
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    x = np.asarray(rng.standard_normal(shape)).astype(np.float32)
    if len(shape) == 4:
        if key == "rpn.head.cls_logits.weight":
            x = x - x.astype(np.float64).mean(axis=(1, 2, 3), keepdims=True).astype(np.float32)
        gain = 0.25 if key.endswith(".offset.weight") else GAINS.get(key, 1.0)
        return x * np.float32(math.sqrt(2.0 / math.prod(shape[1:])) * gain)
    if key.endswith("running_var"):
        return np.float32(0.5) + np.abs(x)
    if key.endswith("running_mean"):
        return np.float32(0.1) * x
    if key.endswith(".bias"):
        return np.float32(0.1) * x + np.float32(BIASES.get(key, 0.0))
    y = np.float32(1.0) + np.float32(0.1) * x
    return np.float32(0.2) * y if key.endswith(".bn3.weight") else y


def make_weights(shapes):
    return {key: make_weight(key, tuple(shape)) for key, shape in shapes.items()}
