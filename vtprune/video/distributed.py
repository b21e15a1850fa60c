"""Questions about many videos on Ray Data: a pool of worker processes, each with a model of its own.

The results come in the order of the videos, as in one process. What Ray is asked for:

- one actor per worker, one video at a time in each. With one video at a time nothing else is lost with an actor;
- an actor that dies (out of memory, a crash in a library) is started again and gets the same video once more. If it dies again,
  that video's result says so and the run goes on;
- everything else that goes wrong in a worker and is no fault of the video ends the run, as in one process;
- without an address, Ray is started on this machine without dashboard and usage
  statistics, and shut down at the end. A Ray that runs already is used and left running; so is a cluster.

A model is loaded with the first video of a worker. Paths must mean the same file on every machine of a cluster.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtprune.errors import InvalidOptionError, VTPruneError
from vtprune.video.answering import Answerer, AnswererSource, Protocol, Result, answer_one, digest
from vtprune.video.embedding import Embedder

TRIES = 2  # of a video whose worker died
LOADS = 2  # of models that may have come to no end before no worker tries any more
OBJECT_STORE = 256 << 20  # bytes; results are lines of text
# Ray Data's collection of usage would also leave a thread behind that ends this process when it asks a Ray that is shut down.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_USAGE_DISABLED": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
DIED = (
    "WorkerError: the worker process died at this video, and again when it was tried once more (out of memory, or a crash in a "
    "library; the logs of Ray tell)"
)


class MissingRayError(VTPruneError, ImportError):
    """Ray Data is not installed."""


class WorkerError(VTPruneError, RuntimeError):
    """A worker cannot go on, and no other could."""


@dataclass(frozen=True)
class _Job:
    """All that a worker needs; `threads` of torch, `cpus` as Ray counts them."""

    protocol: Protocol
    source: AnswererSource
    embedder: Embedder | None
    threads: int
    cpus: int
    folder: str


class _Ledger:
    """Runs in an actor of its own and outlives the workers: what was begun, so that nothing is begun for ever."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._loading = 0
        self._begun: Counter[int] = Counter()

    def may_load(self) -> bool:
        """A worker is about to load its model; whether it should, after so many that never came to an end."""
        self._loading += 1
        return self._loading <= self._workers + LOADS

    def loaded(self) -> None:
        """It has."""
        self._loading -= 1

    def may_begin(self, number: int) -> bool:
        """A worker is about to answer for a video; whether it should, after so many times."""
        self._begun[number] += 1
        return self._begun[number] <= TRIES


class _Worker:
    """Runs in an actor: a row {"number", "video"} to {"number", "line", "failure"}; one of the last two is empty."""

    def __init__(self, job: _Job, ledger: Any) -> None:
        self._job, self._ledger = job, ledger
        self._answerer: Answerer | None = None
        # Relative paths are those of the driver, also in messages.
        with contextlib.suppress(OSError):
            os.chdir(job.folder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = {"number": row["number"], "line": "", "failure": ""}
        try:
            result = self._answer(int(row["number"]), row["video"])
            answer["line"] = json.dumps(asdict(result))
        except Exception as error:  # noqa: BLE001 - it ends the run, with its message and not with Ray's pages
            answer["failure"] = _brief(error)
        return answer

    def _answer(self, number: int, video: str) -> Result:
        import ray

        job, ledger = self._job, self._ledger
        if self._answerer is None:
            if not ray.get(ledger.may_load.remote()):
                raise WorkerError(
                    "workers died while they loaded the model, most likely for want of memory; use fewer, or a smaller model."
                )
            try:
                self._answerer = job.source.open(job.threads)
            except Exception as error:
                raise WorkerError(f"a worker cannot load the model: {_brief(error)}") from error
            ray.get(ledger.loaded.remote())
        if not ray.get(ledger.may_begin.remote(number)):
            return Result(video, job.protocol.question, error=DIED, run=digest(job.protocol, job.source))
        return answer_one(Path(video), job.protocol, self._answerer, job.embedder)


def answer_with_ray(
    videos: Sequence[Path],
    protocol: Protocol,
    source: AnswererSource,
    workers: int,
    address: str | None = None,
    embedder: Embedder | None = None,
) -> Generator[Result, None, None]:
    """The results of all videos in their order, as they come; see :func:`~vtprune.video.answering.answer_videos`.

    Args:
        videos: files.
        protocol, embedder: as there; they travel to the workers by pickle.
        source: of the model.
        workers: processes with a model each, at most.
        address: of a running cluster; None: the Ray of this process if it is initialized, else one is started here.

    Raises:
        MissingRayError: Ray Data is not installed.
        InvalidOptionError: there is no cluster at the address, this process is connected to another one, or no GPU where the
            model needs one.
        WorkerError: a worker cannot load the model, or met an error that is no fault of a video.
    """
    ray = _import_ray()
    # A Ray of our own shares this machine among the workers, and needs no CPUs to count; another one has its own count.
    own = address is None and not ray.is_initialized()
    threads = source.cpus or (max(1, (os.cpu_count() or 1) // workers) if own else 1)
    job = _Job(protocol, source, embedder, threads, 1 if own else threads, os.getcwd())
    with _environment(ENVIRONMENT), _connected(ray, address, workers), _quiet():
        for resource, needed in (("CPU", job.cpus), ("GPU", source.gpus)):
            if ray.cluster_resources().get(resource, 0) < needed:
                raise InvalidOptionError(
                    f"a worker needs {needed} {resource}, and Ray has {ray.cluster_resources().get(resource, 0):g}; "
                    + ("use --device cpu." if resource == "GPU" else "use fewer --threads.")
                )
        yield from _results(ray, videos, job, workers)


def _results(ray: Any, videos: Sequence[Path], job: _Job, workers: int) -> Generator[Result, None, None]:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        rows = [{"number": number, "video": str(video)} for number, video in enumerate(videos)]
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=(job, ray.remote(num_cpus=0)(_Ledger).remote(workers)),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=job.cpus,
            num_gpus=job.source.gpus or None,
        )
        # Closed before Ray is: a pool that still runs then ends the whole process.
        with contextlib.closing(iter(answers.iter_rows())) as arriving:
            for answer in arriving:
                if answer["failure"]:
                    raise WorkerError(f"{answer['failure']} (at {videos[answer['number']]})")
                yield Result(**json.loads(answer["line"]))


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, WorkerError) else f"{type(error).__name__}: {text}"


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingRayError(
            f"workers need Ray Data, which cannot be imported ({error}); pip install 'vtprune[ray]', or leave out the workers."
        ) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | None, workers: int) -> Iterator[None]:
    """Ray, started or joined for as long as the context lasts; one that is initialized is left alone."""
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", here):
            raise InvalidOptionError(
                f"this process is connected to the Ray at {here}, not {address}; ray.shutdown() first."
            )
        yield
        return
    own: dict[str, Any] = {}
    if address is None:
        own = {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # a start that takes too long is a bare Exception in Ray
        what = "Ray cannot be started here" if address is None else f"no Ray cluster answers at {address!r}"
        raise InvalidOptionError(f"{what}: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables where the user has not set them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray Data's plans and tracebacks on the terminal; its log file has them."""
    handlers = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
