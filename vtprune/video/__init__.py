"""Video: reading frames, selecting those that matter, and asking a model about them."""

from vtprune.video.errors import VideoError as VideoError
from vtprune.video.reading import Frame as Frame
from vtprune.video.reading import FrameReader as FrameReader
from vtprune.video.reading import VideoInfo as VideoInfo
from vtprune.video.reading import probe as probe
from vtprune.video.reading import read_frames as read_frames
