"""Reading with decord."""

from __future__ import annotations

import importlib
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np

from vtprune.video.backends.base import TOLERANCE, Decoder, Image, Request, Shown, brief, load
from vtprune.video.backends.with_pyav import PyAV
from vtprune.video.errors import BrokenVideoError, VideoBackendError

DECORD_SECONDS = 2048  # its float32 timestamps are within 0.06 ms until there


class Decord(Decoder):
    """decord, for the files it reads right: what it would answer wrongly or hide is refused here.

    decord 0.6 repeats frames it cannot decode, knows no AV1, and tells neither codec, rotation nor declared duration;
    those come from PyAV's header where PyAV is installed, and a file whose frames do not fill its declared duration
    is left to the next backend.
    """

    def __init__(self, request: Request, beat: Callable[[], None]):
        super().__init__(request, beat)
        decord: Any = load("decord", "decord")
        decord.logging.set_level(decord.logging.ERROR)
        header = self._header()
        beat()
        try:
            self._reader = decord.VideoReader(request.path, ctx=decord.cpu(0), num_threads=1, fault_tol=1)
            clock = self._reader.get_frame_timestamp(range(len(self._reader)))
            fps = float(self._reader.get_avg_fps())
            first = self._reader[0].asnumpy()
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            raise BrokenVideoError(f"cannot be opened: {brief(error)}") from None
        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError)
        if clock[-1, 1] - clock[0, 0] > DECORD_SECONDS:
            raise VideoBackendError(f"decord's timestamps are too coarse beyond {DECORD_SECONDS} s (float32)")
        clock = np.round(
            np.asarray(clock, dtype=np.float64) - float(clock[0, 0]), 6
        )  # 0.3 from float32's 0.30000001
        self._starts: list[float] = clock[:, 0].tolist()
        self._ends: list[float] = clock[:, 1].tolist()
        self._index = -1
        steps = np.diff(self._starts)
        if len(steps) and steps.min() <= 0:
            raise VideoBackendError("decord gives no ascending timestamps for this file")
        height, width = first.shape[:2]
        self.limit(width, height)
        self.info = {
            "duration": self._ends[-1],
            "frames": len(self._starts),
            "fps": fps,
            "width": width,
            "height": height,
            "rotation": None,
            "codec": None,
            "variable_rate": len(steps) > 0 and bool(steps.max() - steps.min() > 2.5e-3),
        }
        if header is not None:
            self.info.update({k: header.info[k] for k in ("duration", "codec", "rotation", "variable_rate")})
            same = (header.info["width"], header.info["height"], header.info["frames"])
            if same != (width, height, len(self._starts)):
                raise VideoBackendError(
                    "decord sees another picture size or frame count than the header declares"
                )

    def _header(self) -> PyAV | None:
        try:
            header = PyAV(self.request, self.beat)
        except VideoBackendError:
            return None
        if header.info["duration"] > DECORD_SECONDS:  # before decord spends minutes on its index
            raise VideoBackendError(f"decord's timestamps are too coarse beyond {DECORD_SECONDS} s (float32)")
        if header.transport:
            raise VideoBackendError("decord hides the gaps of transport streams")
        if header.info["codec"] == "av1":
            raise VideoBackendError("decord has no decoder for AV1")
        return header

    def missing(self, last: Shown) -> bool:
        return False  # such a file was refused above

    @property
    def ended(self) -> bool:
        return self._index >= len(self._starts) - 1

    def following(self) -> Shown | None:
        return None if self.ended else self._at(self._index + 1)

    def shown(self, time: float) -> Shown | None:
        return self._at(max(0, bisect_right(self._starts, time + TOLERANCE) - 1))

    def _at(self, index: int) -> Shown:
        self._index = index
        return Shown(self._starts[index], self._ends[index], index)

    def image(self, frame: int) -> Image:
        self.beat()
        try:
            rgb: Image = self._reader[frame].asnumpy()
        except self._errors as error:
            raise BrokenVideoError(f"frame {frame} cannot be decoded: {brief(error)}") from None
        size = self.fitted(rgb.shape[1], rgb.shape[0])
        if size == (rgb.shape[1], rgb.shape[0]):
            return np.ascontiguousarray(rgb)
        pillow: Any = importlib.import_module("PIL.Image")
        return np.asarray(pillow.fromarray(rgb).resize(size, pillow.Resampling.BOX))
