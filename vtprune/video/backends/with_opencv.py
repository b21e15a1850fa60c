"""Reading with OpenCV."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from vtprune.video.backends.base import Forward, Image, Request, Shown, load
from vtprune.video.errors import BrokenVideoError


class OpenCV(Forward):
    """OpenCV, forward only: its seeks go by frame number, which is wrong for a variable frame rate."""

    def __init__(self, request: Request, beat: Callable[[], None]):
        super().__init__(request, beat)
        os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
        os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
        self._cv2: Any = load("cv2", "OpenCV")
        cv2 = self._cv2
        self._capture = cv2.VideoCapture(request.path, cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise BrokenVideoError("OpenCV cannot open it")
        self.limit(int(self._get("FRAME_WIDTH")), int(self._get("FRAME_HEIGHT")))
        self._fps = self._get("FPS") or 25.0
        self._origin: float | None = None
        self._read = 0
        first = self._next()
        if first is None:
            raise BrokenVideoError("no frame can be decoded")
        self._ahead = first
        height, width = first.frame.shape[:2]
        count = max(1, round(self._get("FRAME_COUNT")))
        end = max(count / self._fps, self._last_start(count) + 1 / self._fps)
        code = int(self._get("FOURCC"))
        self._slack = max(0.25, 3 / self._fps)
        self.info = {
            "duration": end,
            "frames": count,
            "fps": self._fps,
            "width": width,
            "height": height,
            "rotation": -round(self._get("ORIENTATION_META")) % 360,
            "codec": "".join(chr(code >> 8 * i & 255) for i in range(4)).strip("\0 ") or None,
            "variable_rate": None,
        }

    def missing(self, last: Shown) -> bool:
        return self._read < self.info["frames"] and super().missing(last)

    def _last_start(self, count: int) -> float:
        """Where the last frame begins, since count / fps is too short for some variable rates; 0 if unknown."""
        tail = self._cv2.VideoCapture(self.request.path, self._cv2.CAP_FFMPEG)
        tail.set(self._cv2.CAP_PROP_POS_FRAMES, count - 1)
        self.beat()
        found = tail.grab()
        start = float(tail.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000
        tail.release()
        return start - (self._origin or 0.0) if found else 0.0

    def _get(self, name: str) -> float:
        return float(self._capture.get(getattr(self._cv2, f"CAP_PROP_{name}")))

    def _next(self) -> Shown | None:
        self.beat()
        good, picture = self._capture.read()
        if not good:
            self._stopped = True
            return None
        self._read += 1
        self.limit(picture.shape[1], picture.shape[0])
        clock = self._get("POS_MSEC") / 1000
        if self._origin is None:
            self._origin = clock
        return Shown(clock - self._origin, clock - self._origin + 1 / self._fps, picture)

    def image(self, frame: Any) -> Image:
        size = self.fitted(frame.shape[1], frame.shape[0])
        if size != (frame.shape[1], frame.shape[0]):
            frame = self._cv2.resize(frame, size, interpolation=self._cv2.INTER_AREA)
        return np.ascontiguousarray(frame[..., ::-1])
