"""Questions about many videos: one answer per file, resumable, errors recorded and passed over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtprune.errors import InvalidOptionError, VTPruneError
from vtprune.video.clip import Clip, FrameSelector
from vtprune.video.embedding import Embedder
from vtprune.video.reading import DamagedVideoWarning, Frame, FrameReader, read_frames

SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".3gp",
    ".ogv",
)
SMALL = 224  # pixels of a candidate's longer side, for selectors


@dataclass(frozen=True)
class Answer:
    """What a model said about some frames.

    Attributes:
        text: its answer.
        tokens_in, tokens_out: visual tokens before pruning, and left at the end of the model.
        notes: what a reader of the line must know.
    """

    text: str
    tokens_in: int
    tokens_out: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Places:
    """Where chosen frames stand among the candidates.

    Attributes:
        indices: of each frame, ascending from 0.
        candidates: how many there are.
        tokens: visual tokens that the selector allots to each frame; None where it allots none.
    """

    indices: tuple[int, ...]
    candidates: int
    tokens: tuple[int, ...] | None = None


class Answerer(ABC):
    """A video-language model, pruned or not.

    Attributes:
        about: what decides its answers (model, method, options), as plain JSON values.
    """

    about: dict[str, Any]

    @abstractmethod
    def answer(self, frames: Sequence[Frame], question: str, places: Places) -> Answer:
        """Answers a question about frames in the order of time, which stand at `places` among the candidates."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Gives back what it holds."""


class AnswererSource(ABC):
    """How to make an :class:`Answerer` where it is needed: here, or in every worker, to which it travels by pickle."""

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """That of the answerer."""

    @property
    def gpus(self) -> int:
        """GPUs that one answerer takes."""
        return 0

    @property
    def cpus(self) -> int | None:
        """CPU threads that one answerer takes; None: all there are, in workers an equal share."""
        return None

    @abstractmethod
    def open(self, threads: int | None) -> Answerer:
        """Loads the model; it may use so many CPU threads, None: what torch chooses."""


@dataclass(frozen=True)
class Protocol:
    """How frames of a video become an answer.

    Attributes:
        question: what is asked about every video.
        selector: chooses among the candidates.
        keep: frames to keep, None for the selector's own number.
        candidates: frames to choose from, evenly spaced over the video.
        max_side: pixels of the longer side of frames as the model gets them; None for the video's own.
        timeout: seconds without any frame after which a file is given up.
        backend: decoder of the files, see `read_frames`. Under "auto" a decoder that gives nothing for its share of the
            timeout is replaced by the next; then the notes say so, as pixels and answers may differ by a little from
            those of a faster machine. A named one never is.
    """

    question: str
    selector: FrameSelector
    keep: int | None = 8
    candidates: int = 64
    max_side: int | None = 1024
    timeout: float = 20.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise InvalidOptionError("the question is empty; say what to ask about every video.")
        if self.candidates < 1:
            raise InvalidOptionError(f"candidates={self.candidates}: give an int >= 1.")

    @property
    def about(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        values = {k: v for k, v in vars(self).items() if k != "selector"}
        return {**values, "selector": {"name": self.selector.key, **asdict(self.selector)}}  # type: ignore[call-overload]


@dataclass
class Result:
    """One line of the output.

    Attributes:
        video: path as it was found.
        question, answer: None for the answer where there is an error.
        times: seconds of the frames that the model saw.
        tokens_in, tokens_out: see :class:`Answer`.
        error: what went wrong, "ClassName: message"; None where nothing did.
        notes: damage of the file, substitutes of the selector.
        seconds: "read", "select", "answer": wall time; the only part that differs from run to run.
        run: digest of everything that decides the answer but the video.
    """

    video: str
    question: str
    answer: str | None = None
    times: list[float] = field(default_factory=list)
    tokens_in: int | None = None
    tokens_out: int | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    run: str = ""


def find_videos(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as given, and all video files under folders by name; sorted within a folder, none twice.

    Raises:
        InvalidOptionError: a path does not exist, or there is no video at all.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file())
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise InvalidOptionError(f"{path} does not exist; give video files or folders of them.")
    if not found:
        raise InvalidOptionError(
            f"no video under {', '.join(map(str, paths))}; files are found by their endings: {', '.join(SUFFIXES)}."
        )
    return list(found)


def answer_one(
    video: Path, protocol: Protocol, answerer: Answerer, embedder: Embedder | None = None
) -> Result:
    """Reads, selects and asks; whatever goes wrong with the file or the model becomes the result's `error`."""
    result = Result(str(video), protocol.question, run=digest(protocol, answerer))
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        result.seconds[name] = round(now - clock, 4)
        clock = now

    reading: Any = {"timeout": protocol.timeout, "backend": protocol.backend}
    try:
        reader = read_frames(video, count=protocol.candidates, max_side=SMALL, **reading)
        small, info = read_all(reader), reader.info
        lap("read")
        clip = Clip(
            times=np.array([frame.time for frame in small]),
            frames=np.stack([frame.image for frame in small]),
            duration=info.duration,
            question=protocol.question,
            embedder=embedder,
        )
        selection = protocol.selector.select(clip, protocol.keep)
        lap("select")
        times = clip.times[selection.indices].tolist()
        chosen = read_frames(video, times, max_side=protocol.max_side, **reading)
        frames = read_all(chosen)
        lap("read_chosen")
        found = [*reader.given_up, *chosen.given_up, *reader.damage, *selection.notes]
        result.notes = list(dict.fromkeys(found))
        allotted = None if selection.tokens is None else tuple(selection.tokens.tolist())
        places = Places(tuple(selection.indices.tolist()), len(clip.times), allotted)
        answer = answerer.answer(frames, protocol.question, places)
        result.notes = list(dict.fromkeys([*result.notes, *answer.notes]))
        lap("answer")
    except (VTPruneError, RuntimeError, ValueError, OSError, MemoryError) as error:
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return result
    result.answer, result.times = answer.text, [frame.time for frame in frames]
    result.tokens_in, result.tokens_out = answer.tokens_in, answer.tokens_out
    return result


def read_all(reader: FrameReader) -> list[Frame]:
    """All frames of a reader; what is damaged stands in its `damage`, no warning is issued."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        return list(reader)


def digest(protocol: Protocol, answerer: Answerer | AnswererSource) -> str:
    """16 hexadecimal digits of everything that decides an answer but the video."""
    text = json.dumps([protocol.about, answerer.about], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answered(output: Path, run: str) -> set[str]:
    """Videos that an output file holds already; a line that was cut off is removed from its end.

    Raises:
        InvalidOptionError: the file is of another question, model or method, or is no such file.
    """
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            video, of = row["video"], row["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidOptionError(
                f"{output}, line {number} is no answer of vtprune; give another output."
            ) from error
        if of != run:
            raise InvalidOptionError(
                f"{output} holds answers of another run (question, model, method or options differ); give another output, "
                "or delete it."
            )
        done.add(video)
    if len(whole) < len(content):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return done


def answer_videos(
    paths: Sequence[str | os.PathLike[str]],
    protocol: Protocol,
    answerer: Answerer | AnswererSource,
    output: str | os.PathLike[str],
    embedder: Embedder | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
    workers: int | None = None,
    address: str | None = None,
) -> Iterator[Result]:
    """Answers the question for every video that `output` does not hold yet, in order, and appends a line for each.

    Every line is on the disk before the next result is waited for: after a crash or a kill the same call goes on, nothing lost
    but what was being answered and nothing twice, and apart from `seconds` the file is that of an undisturbed run,
    whatever the number of workers.

    Args:
        paths: files and folders, see :func:`find_videos`.
        answerer: the model, or where it comes from; a source's answerer is closed at the end.
        output: JSON lines of :class:`Result`; made if it is not there.
        embedder: for selectors that read embeddings.
        on_result: told of every new result.
        workers: None: one video after the other in this process. Else so many processes of Ray Data with a model each, see
            :mod:`vtprune.video.distributed`; then `answerer` has to be a source.
        address: of a running Ray cluster, as `ray.init` takes it; None: Ray is started on this machine and shut down.

    Raises:
        InvalidOptionError: no video, an argument does not fit the others, or `output` is of another run.
        MissingRayError: Ray is asked for and not installed.
        WorkerError: a worker cannot load the model, or met what is no fault of a video.

    Errors of single videos are results.
    """
    if workers is None and address is not None:
        raise InvalidOptionError("address is a cluster's, and no workers are asked for; give workers=N.")
    if workers is not None and (isinstance(workers, bool) or workers < 1):
        raise InvalidOptionError(f"workers={workers!r}: give an int >= 1, or None to use this process.")
    if workers is not None and isinstance(answerer, Answerer):
        raise InvalidOptionError(
            f"{type(answerer).__name__} is one model in this process; workers make their own: give an AnswererSource."
        )
    videos, file = find_videos(paths), Path(output)
    done = answered(file, digest(protocol, answerer))
    todo = [video for video in videos if str(video) not in done]
    if not todo:
        return
    if workers is not None and isinstance(answerer, AnswererSource):
        from vtprune.video.distributed import answer_with_ray

        results = answer_with_ray(todo, protocol, answerer, workers, address, embedder)
    else:
        results = _answer_here(todo, protocol, answerer, embedder)
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(results):
        for result in results:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
            on_result(result)
            yield result


def _answer_here(
    videos: Sequence[Path],
    protocol: Protocol,
    answerer: Answerer | AnswererSource,
    embedder: Embedder | None,
) -> Generator[Result, None, None]:
    if isinstance(answerer, Answerer):
        for video in videos:
            yield answer_one(video, protocol, answerer, embedder)
        return
    with contextlib.closing(answerer.open(answerer.cpus)) as opened:
        for video in videos:
            yield answer_one(video, protocol, opened, embedder)
