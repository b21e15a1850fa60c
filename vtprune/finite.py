"""Checks that scores are numbers, without making the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vtprune.errors import NonFiniteScoresError


class Check:
    """Whether scores hold NaN, copied to the host in the background.

    Attributes:
        size: how many scores there are.
    """

    def __init__(self, scores: Tensor) -> None:
        self.size = scores.numel()
        found = torch.isnan(scores).sum()
        self._event: torch.cuda.Event | None = None
        if found.is_cuda:
            self._found = torch.empty((), dtype=found.dtype, pin_memory=True)
            self._found.copy_(found, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._found = found

    @property
    def ready(self) -> bool:
        """Whether :meth:`raise_if_found` would answer at once."""
        return self._event is None or self._event.query()

    def raise_if_found(self) -> None:
        """Waits for the answer; raises NonFiniteScoresError if a score is NaN."""
        if self._event is not None:
            self._event.synchronize()
        if int(self._found):
            raise NonFiniteScoresError(
                f"{int(self._found)} of {self.size} token scores are NaN, so no token can be "
                "selected. Look for overflow in the model (float16 attention?) or a bug in the method's score."
            )


_open: ContextVar[list[Check] | None] = ContextVar("vtprune_open_checks", default=None)


@contextmanager
def deferred() -> Iterator[list[Check]]:
    """Collects checks inside that a device has not answered yet; whoever opens it has to have them answered."""
    checks: list[Check] = []
    token = _open.set(checks)
    try:
        yield checks
    finally:
        _open.reset(token)


def answer(checks: list[Check], wait: bool) -> None:
    """Takes checks off a list as they are answered.

    Args:
        wait: for all of them; otherwise those that are not ready stay.

    Raises:
        NonFiniteScoresError: a score was NaN.
    """
    while checks and (wait or checks[0].ready):
        checks.pop(0).raise_if_found()


def check_finite(scores: Tensor) -> None:
    """Raises NonFiniteScoresError if a score is NaN.

    Inside a patched model on a GPU it is raised later: by the first decoding step or the next call that finds the answer
    there, or by ``report()``, which waits for it.
    """
    check = Check(scores)
    checks = _open.get()
    if checks is None or check.ready:
        check.raise_if_found()
    else:
        checks.append(check)
