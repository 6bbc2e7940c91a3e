"""A synthetic photograph, the same on every machine: image(seed, H, W) -> uint8 (H, W, 3) RGB."""

import numpy as np


def image(seed, H, W):
    """Six plane waves per channel, then ten translucent rectangles and ellipses, in float64."""
    rng = np.random.Generator(np.random.PCG64(seed))
    waves, patches = rng.random((6, 8)), rng.random((10, 8))
    y, x = np.mgrid[0:H, 0:W].astype(np.float64)
    img = np.full((H, W, 3), 128.0)
    for k, u in enumerate(waves):
        fx, fy = (2 * u[:2] - 1) * 2.0 ** (k / 2 + 1)
        for c in range(3):
            phase = fx * x / W + fy * y / H + u[5 + c]
            img[:, :, c] += (10 + 22 * u[2 + c]) * np.sin(2 * np.pi * phase)
    for k, v in enumerate(patches):
        cx, cy = W * v[0], H * v[1]
        rx, ry = W * (0.03 + 0.17 * v[2]), H * (0.03 + 0.17 * v[3])
        if k % 2 == 0:
            mask = (np.abs(x - cx) <= rx) & (np.abs(y - cy) <= ry)
        else:
            mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
        img[mask] = 0.25 * img[mask] + 0.75 * 255 * v[4:7]
    return np.floor(np.clip(img, 0, 255) + 0.5).astype(np.uint8)
