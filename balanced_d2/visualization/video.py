"""Videos and webcams, read and written with OpenCV."""

import math
from contextlib import contextmanager
from typing import Iterator, Tuple

import cv2
import numpy as np

from balanced_d2.export.run_exported import is_utf8
from balanced_d2.utils.errors import UserError

DEFAULT_FPS = 25.0


class VideoReader:
    """The frames of a video or webcam.

    Args:
        source: the path of a video, or the number of a webcam.

    Attributes:
        fps: frames per second; 25 if the source does not say.
        num_frames: number of frames, 0 if not known.

    Raises:
        UserError: if the source cannot be opened.
    """

    def __init__(self, source: str | int):
        if isinstance(source, str):
            _check_name(source)
        # The error below replaces OpenCV's own messages about a file that it cannot open.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            is_webcam = isinstance(source, int)
            raise UserError(
                "there is no webcam that can be opened"
                if is_webcam
                else f"cannot read the video {source}"
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else DEFAULT_FPS
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames, uint8, shape (H, W, 3), BGR."""
        while True:
            success, frame = self._capture.read()
            if not success:
                return
            yield frame

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        self._capture.release()


@contextmanager
def create_video(path: str, fps: float, size: Tuple[int, int]) -> Iterator[cv2.VideoWriter]:
    """Context manager of an MP4 file to write frames to (``write``, BGR), playable afterwards.

    Args:
        size: width and height of the frames.

    Raises:
        UserError: if the file cannot be written.
    """
    _check_name(path)
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise UserError(f"cannot write the video {path}")
    try:
        yield writer
    finally:
        writer.release()


def _check_name(path: str) -> None:
    if not is_utf8(path):
        raise UserError(f"OpenCV takes no file whose name is not UTF-8: rename {ascii(path)}")
