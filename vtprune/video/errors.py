"""What can be wrong with a video file: every failure of reading is a :class:`VideoError`."""

from __future__ import annotations

from vtprune.errors import VTPruneError


class VideoError(VTPruneError):
    """Base class of all errors of reading a video."""


class VideoFileError(VideoError, OSError):
    """The path is missing, not a regular file, or not readable by this user."""


class NotAVideoError(VideoError, ValueError):
    """The file is intact but shows no moving picture: a still picture, or sound only."""


class BrokenVideoError(VideoError, ValueError):
    """The file is empty or damaged beyond reading, or its decoder crashed."""


class VideoTooLargeError(VideoError, ValueError):
    """A frame has more pixels than the declared limit."""


class VideoTimeoutError(VideoError, TimeoutError):
    """The decoder gave neither a frame nor a sign of progress for `timeout` seconds; it was killed."""


class VideoBackendError(VideoError, ImportError):
    """The backend is not installed, or cannot read this file reliably."""


class VideoTimeRangeError(VideoError, ValueError):
    """A requested time lies outside the video."""


class DamagedVideoWarning(UserWarning):
    """Parts of the video could not be decoded; the frames that were given are at their true times."""


class TruncatedVideoWarning(DamagedVideoWarning):
    """The video ends before the duration its header declares; what is there was read."""
