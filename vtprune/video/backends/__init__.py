"""The decoders behind :mod:`vtprune.video.reading`: PyAV, decord and OpenCV, alike in what they answer.

They run in the worker process (see :mod:`vtprune.video.worker`), which starts without torch: this package may import
numpy, the decoder it is asked for, and :mod:`vtprune.video.errors`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vtprune.video.backends.base import Decoder, Image, Request, Shown, still_picture
from vtprune.video.backends.with_decord import Decord
from vtprune.video.backends.with_opencv import OpenCV
from vtprune.video.backends.with_pyav import PyAV

__all__ = ["Backends", "Decoder", "Image", "Request", "Shown", "open_video", "still_picture"]


class Backends:
    """The backends by name, in the order in which "auto" tries them."""

    by_name: ClassVar[dict[str, type[Decoder]]] = {"decord": Decord, "pyav": PyAV, "opencv": OpenCV}
    modules: ClassVar[dict[str, str]] = {"decord": "decord", "pyav": "av", "opencv": "cv2"}


def open_video(request: Request, beat: Callable[[], None]) -> Decoder:
    """The decoder of `request.backend` on its file.

    Raises:
        VideoError: it is not installed, or cannot read the file.
    """
    return Backends.by_name[request.backend](request, beat)
