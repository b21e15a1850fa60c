"""Clips as mp4 files: written and read with PyAV, and kept in a folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtprune.errors import VTPruneError

from ..scenes import SIZE

CODEC = "h264"
CODECS = {"h264": "libx264", "mpeg4": "mpeg4"}
_KEY_SECONDS = 10


class MissingCodecError(VTPruneError, ImportError):
    """PyAV is not installed, or was built without an encoder."""


def write(path: Path | str, images: Iterable[NDArray[np.uint8]], fps: int, codec: str = CODEC) -> Path:
    """Write pictures as an mp4 file with one thread, the i-th shown at exactly i / fps seconds.

    The file appears under its name only when it is complete. The same pictures give the same bytes with the same
    version of PyAV. Colour is stored at half the resolution, as in almost all video: decoded frames of the video world
    keep at least 36 dB of brightness, and 30 dB of colour averaged over 2 x 2 pixels (full-resolution RGB: 20 dB on
    pixel noise of two colours, usually 33 dB).

    Args:
        path: file to write; its folder is made if needed.
        images: (96, 96, 3) uint8 RGB.
        fps: frames per second.
        codec: "h264" or "mpeg4".

    Returns:
        The path.

    Raises:
        ValueError: if the codec is not one of these.
        MissingCodecError: if PyAV or its encoder is missing.
    """
    av = _pyav()
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; choose one of {', '.join(CODECS)}")
    if CODECS[codec] not in av.codecs_available:
        others = [name for name in CODECS if name != codec]
        raise MissingCodecError(
            f"this PyAV has no encoder {CODECS[codec]}; choose another codec: {', '.join(others)}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".mp4")
    os.close(handle)
    try:
        with av.open(name, "w", format="mp4") as container:
            stream = container.add_stream(CODECS[codec], rate=fps)
            _configure(stream, codec, fps)
            for index, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = index
                frame.time_base = Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def _configure(stream: Any, codec: str, fps: int) -> None:
    stream.width = stream.height = SIZE
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = Fraction(1, fps)
    context.thread_count = 1
    context.gop_size = _KEY_SECONDS * fps
    if codec == "h264":
        # With weighted prediction x264 gives other bytes once in some thirty files, on one thread too.
        stream.options = {"crf": "15", "preset": "veryfast", "x264-params": "weightp=0"}
    else:
        context.qmin, context.qmax = 2, 3
        context.bit_rate = 4_000_000


def read(path: Path | str) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Time in seconds and (96, 96, 3) uint8 RGB picture of every frame of a file, in order.

    Raises:
        MissingCodecError: if PyAV is missing.
    """
    with _pyav().open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            yield float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24")


def cache_dir() -> Path:
    """Where clips are kept unless another folder is named: ``vtprune/video-world`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vtprune" / "video-world"


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingCodecError(
            f"video files need PyAV, which cannot be imported ({error}): pip install 'vtprune[video]'"
        ) from error
    return av
