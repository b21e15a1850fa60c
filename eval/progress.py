"""Progress bars of the commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .evaluation import Observer


def bars(console: Console) -> Progress:
    """A bar per phase with steps, time and a note; tasks need the field ``note``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class Bars(Observer):
    """Shows the phases of an evaluation."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._task: TaskID | None = None

    def start(self, title: str, steps: int) -> None:
        self._task = self.progress.add_task(title, total=steps, note="")

    def step(self, steps: int, note: str) -> None:
        assert self._task is not None
        self.progress.update(self._task, advance=steps, note=note)
