"""Colour histograms of frames."""

from __future__ import annotations

import numpy as np

from vtprune.video.embedding import Array

BINS = (8, 4, 4)
TOGETHER = 64  # frames that are converted at once, so that hours need little memory


def rgb_to_hsv(rgb: Array) -> Array:
    """uint8 RGB [..., 3] -> float32 hue, saturation and value in [0, 1); hue 0 and saturation 0 for grey.

    V = max, S = (max - min) / max, H = ((G - B) / (max - min), 2 + (B - R) / ..., 4 + (R - G) / ...) / 6 mod 1 for the
    largest channel; values are scaled by 256, so that none reaches 1.
    """
    r, g, b = np.moveaxis(rgb.astype(np.float32), -1, 0)
    value = np.maximum(np.maximum(r, g), b)
    span = value - np.minimum(np.minimum(r, g), b)
    safe = np.where(span > 0, span, 1)
    hue = np.where(value == r, (g - b) / safe, np.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = np.where(span > 0, hue / 6 % 1, 0)
    saturation = span / np.where(value > 0, value, 1)
    return np.stack([hue, saturation * (255 / 256), value / 256], axis=-1)


def hsv_histograms(frames: Array, bins: tuple[int, int, int] = BINS) -> Array:
    """Joint HSV histograms of frames [N, h, w, 3] uint8 RGB: [N, bins] float64, each summing to 1."""
    rows = []
    for start in range(0, len(frames), TOGETHER):
        hsv = rgb_to_hsv(frames[start : start + TOGETHER])
        h, s, v = (np.minimum((hsv[..., i] * n).astype(np.int64), n - 1) for i, n in enumerate(bins))
        cell = ((h * bins[1] + s) * bins[2] + v).reshape(len(hsv), -1)
        rows += [np.bincount(row, minlength=int(np.prod(bins))) / row.size for row in cell]
    return np.stack(rows)
