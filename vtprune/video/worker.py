"""The process that decodes: it can hang or crash, and the reader lives on.

:mod:`vtprune.video.reading` starts it by `BOOTSTRAP`, which puts empty packages in the place of `vtprune` and
`vtprune.video`, so that neither torch nor transformers is imported and it starts in a fraction of a second.

Protocol: standard input is one line of JSON (a `Request`), then one byte for each frame that may be sent; its end ends
the process, so that no worker outlives its parent. Standard output is messages of a five-byte header (kind, length of
the body): "i" the information about the video and "x" an error and "e" the end, in JSON; "b" a sign of progress;
"f" a frame: time (float64), height and width (uint32), RGB bytes.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import threading
import time
from typing import Any, BinaryIO

from vtprune.errors import VTPruneError
from vtprune.video.backends import Image, Request, open_video
from vtprune.video.errors import BrokenVideoError

HEADER = struct.Struct("<cI")
FRAME = struct.Struct("<dII")
BEAT_SECONDS = 0.2

BOOTSTRAP = """
import sys, types
sys.path[:] = {path!r}
for name, folder in {packages!r}:
    module = types.ModuleType(name)
    module.__path__ = [folder]
    sys.modules[name] = module
from vtprune.video.worker import main
main()
"""


class Sender:
    """Writes messages; signs of progress at most every `BEAT_SECONDS`."""

    def __init__(self, pipe: BinaryIO):
        self._pipe = pipe
        self._last = 0.0

    def send(self, kind: bytes, *parts: bytes | memoryview) -> None:
        """One message whose body is `parts` (bytes, or byte views) in a row."""
        self._pipe.write(HEADER.pack(kind, sum(len(p) for p in parts)))
        for part in parts:
            self._pipe.write(part)
        self._pipe.flush()
        self._last = time.monotonic()

    def json(self, kind: bytes, value: dict[str, Any]) -> None:
        """One message with a JSON body."""
        self.send(kind, json.dumps(value).encode())

    def beat(self) -> None:
        """Say that decoding goes on."""
        if time.monotonic() - self._last > BEAT_SECONDS:
            self.send(b"b")

    def frame(self, at: float, image: Image) -> None:
        """One frame [H, W, 3] uint8 at `at` seconds."""
        height, width = image.shape[:2]
        self.send(b"f", FRAME.pack(at, height, width), image.data.cast("B"))


def main() -> None:
    """Answer the request on standard input, then exit."""
    # Decoders print; their text must not get into the protocol, and tells of damage.
    pipe = os.fdopen(os.dup(1), "wb")
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
    os.dup2(2, 1)
    sender = Sender(pipe)
    request = Request(**json.loads(_line()))
    credit = threading.Semaphore(0)
    threading.Thread(target=_listen, args=(credit,), daemon=True).start()
    try:
        _answer(request, sender, credit)
    except BrokenPipeError:
        pass
    except VTPruneError as error:
        sender.json(b"x", {"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        sender.json(b"x", {"error": BrokenVideoError.__name__, "message": "decoding it ran out of memory"})
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises is the file's or the decoder's fault
        message = f"its decoder failed: {type(error).__name__}: {error}"
        sender.json(b"x", {"error": BrokenVideoError.__name__, "message": message})
    # Tearing down a decoder that met damage may hang or crash: nothing is left to be saved.
    os._exit(0)


def _answer(request: Request, sender: Sender, credit: threading.Semaphore) -> None:
    decoder = open_video(request, sender.beat)
    sender.json(b"i", decoder.info)
    if request.count != 0:  # 0: information only
        for at, image in decoder.read():
            credit.acquire()
            sender.frame(at, image)
    sender.json(b"e", {"damage": decoder.report(), "truncated": decoder.truncated})


def _line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _listen(credit: threading.Semaphore) -> None:
    while received := os.read(0, 64):
        credit.release(len(received))
    os._exit(0)
