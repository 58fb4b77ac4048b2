"""Run a detector on images, folders of images, videos or a webcam, and draw its detections.

Pictures keep the names of their images. Without --output, they are shown in a window.
"""

import argparse
import functools
import glob
import json
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Set

# First, so that importing Detectron2 is quiet.
from balanced_d2.data.datasets.register import register_from
from balanced_d2.detection import Detector
from balanced_d2.detection.tiles import check_tiling
from balanced_d2.engine import add_model_arguments, config_from
from balanced_d2.export.run_exported import IMAGES, VIDEOS
from balanced_d2.utils.arguments import split_at_key
from balanced_d2.utils.errors import UserError, first_of
from balanced_d2.utils.files import (
    check_keeps_inputs,
    check_writable,
    open_replacing,
    raise_if_unwritable,
)
from balanced_d2.visualization import as_records
from balanced_d2.visualization.fonts import use_font_for
from balanced_d2.visualization.video import VideoReader, create_video

# isort: split
import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

WINDOW = "balanced_d2: any key for the next, Esc or q to quit"
ESCAPE = 27

Detect = Callable[[np.ndarray], Instances]


class Source(NamedTuple):
    """An image or video, and the path of its picture."""

    path: str
    output: Optional[str]
    """Path of the picture; None: it is shown in a window."""
    is_webcam: bool = False

    @property
    def is_video(self) -> bool:
        return self.is_webcam or self.path.lower().endswith(VIDEOS)

    @property
    def json(self) -> str:
        return str(Path(self.output or "").with_suffix(".json"))


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a video is finished
    split_options(args)
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(f"--confidence-threshold is {args.confidence_threshold}, not in [0, 1]")
    if args.json and not args.output:
        raise UserError("--json writes files beside the pictures, so it needs --output")
    if args.tile:
        check_tiling(args.tile, args.overlap)
    if args.webcam:
        video = args.output and os.path.join(args.output, "webcam.mp4")
        sources = [Source("webcam", video, is_webcam=True)]
    else:
        sources = list_sources(args.input, args.output)
    check_output(sources, args.output)
    detector = load_detector(args, args.confidence_threshold)
    use_font_for(tuple(detector.class_names))
    detect = functools.partial(detector, tile=args.tile, overlap=args.overlap)

    done, num_detections = 0, 0
    failed: List[str] = []
    progress = tqdm(sources, desc="detecting", unit="file", disable=disable_bar(sources))
    try:
        for source in progress:
            process = process_video if source.is_video else process_image
            try:
                for number in process(source, detector, detect, args.json):
                    num_detections += number
            except UserError as error:  # the other inputs are still processed
                failed.append(str(error))
            else:
                done += 1
    except Quit:
        done += 1  # of which this was enough
    except KeyboardInterrupt:
        if not args.webcam:  # whose recording has no other end
            raise
        done += 1
    finally:
        progress.close()
        where = f", drawn in {args.output}" if args.output else ""
        print(f"{done} of {len(sources)} input(s), {num_detections} detection(s){where}")
    if failed:
        raise UserError(first_of(failed, number=10))


class Quit(Exception):
    """The user has closed the window."""


def split_options(args: argparse.Namespace) -> None:
    """Move ``KEY VALUE`` pairs that --input has taken for images back to the options."""
    if args.input:
        args.input, options = split_at_key(args.input)
        args.opts = options + args.opts


def load_detector(args: argparse.Namespace, threshold: float) -> Detector:
    """The detector that the arguments name.

    Args:
        args: parsed with :func:`add_detector_arguments`.
        threshold: the score that a detection has to exceed.

    Raises:
        UserError: on anything in them that the user can fix.
    """
    if bool(args.model) == bool(args.config_file):
        raise UserError("give either --model or --config-file")
    if args.model:
        register_from(args)
        return Detector.load(args.model, options=args.opts, threshold=threshold)
    return Detector.from_config(config_from(args), "draw", threshold)


def list_sources(inputs: List[str], output: Optional[str]) -> List[Source]:
    """The images and videos of the input, each with the path of its picture.

    Raises:
        UserError: if one does not exist.
    """
    paths: List[str] = []
    for path in (path for given in inputs for path in _expanded(given)):
        if os.path.isdir(path):
            files = [p for p in sorted(Path(path).iterdir()) if p.suffix.lower() in IMAGES + VIDEOS]
            if not files:
                raise UserError(f"--input: there is no image or video in the folder {path}")
            paths += map(str, files)
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise UserError(f"--input: there is no file or folder {path}")
    if not paths:
        raise UserError("--input: give at least one image, folder or video")
    names: Set[str] = set()
    return [Source(path, output and picture(path, output, names)) for path in dict.fromkeys(paths)]


def _expanded(given: str) -> List[str]:
    """The paths of a pattern in quotes, which the shell does not expand."""
    if os.path.exists(given):  # brackets may be part of a name
        return [given]
    return sorted(glob.glob(given)) or [given]


def picture(path: str, output: str, names: Set[str]) -> str:
    """Path of the picture of an image or video: its own name, with a number if that is taken.

    Args:
        names: the names that are taken, without suffixes and case; the new one is added.
    """
    name, suffix = Path(path).stem, Path(path).suffix.lower()
    number = 1
    while name.casefold() in names:  # which some file systems take for the same
        number += 1
        name = f"{Path(path).stem}_{number}"
    names.add(name.casefold())
    if suffix in VIDEOS:
        suffix = ".mp4"
    elif suffix not in IMAGES or suffix == ".gif":  # which has 256 colours
        suffix = ".png"
    return os.path.join(output, name + suffix)


def check_output(sources: List[Source], output: Optional[str]) -> None:
    """Raise :class:`UserError` if pictures can neither be written nor shown."""
    if not output:
        on_screen = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
        if not on_screen:
            raise UserError("there is no screen to show pictures on: give --output DIR")
        if re.search(r"GUI: +NONE", cv2.getBuildInformation()):
            raise UserError(
                "the installed OpenCV opens no windows (opencv-python-headless): give "
                "--output DIR, or see docs/install.md"
            )
        return
    check_writable(os.path.join(output, "picture"), "the folder of --output,")
    check_keeps_inputs(
        (source.output for source in sources if source.output), (source.path for source in sources)
    )


def disable_bar(sources: List[Source]) -> Optional[bool]:
    """Whether to disable the bar: for a single input; None: only outside a terminal."""
    return True if len(sources) == 1 else None


def process_image(
    source: Source, detector: Detector, detect: Detect, with_json: bool
) -> Iterator[int]:
    """Run the detector on an image and draw it; yield the number of detections."""
    image = detector.read(source.path)
    detections = detect(image)
    rgb = Visualizer(image[:, :, ::-1], detector.metadata).draw_instance_predictions(detections)
    picture = rgb.get_image()[:, :, ::-1]
    yield len(detections)
    if source.output is None:
        show(picture, wait=0)
        return
    _, content = cv2.imencode(Path(source.output).suffix, picture)
    with raise_if_unwritable(source.output), open_replacing(source.output, "wb") as file:
        file.write(content.tobytes())
    if with_json:
        height, width = image.shape[:2]
        records = as_records(detections, detector.class_names)
        record = {"image": source.path, "height": height, "width": width, "detections": records}
        write_json(source.json, record)


def process_video(
    source: Source, detector: Detector, detect: Detect, with_json: bool
) -> Iterator[int]:
    """Run the detector on each frame of a video or webcam; yield the numbers of detections.

    When Ctrl-C or SIGTERM stops it, the frames written until then are kept.
    """
    visualizer = VideoVisualizer(detector.metadata)
    writer = None
    frames: List[Dict] = []
    with ExitStack() as stack:
        video = stack.enter_context(VideoReader(0 if source.is_webcam else source.path))

        @stack.callback  # also after an interruption
        def write_frames() -> None:
            if frames:
                content = {"video": source.path, "fps": video.fps, "frames": frames}
                write_json(source.json, content)

        progress = tqdm(
            video,
            total=video.num_frames or None,
            desc=os.path.basename(source.path),
            unit="frame",
            disable=None,
        )
        stack.enter_context(progress)
        for number, frame in enumerate(progress):
            detections = detect(frame)
            rgb = np.ascontiguousarray(frame[:, :, ::-1])
            drawn = visualizer.draw_instance_predictions(rgb, detections).get_image()
            picture = np.ascontiguousarray(drawn[:, :, ::-1])
            yield len(detections)
            if source.output is None:
                show(picture, wait=1)
            else:
                if writer is None:
                    size = picture.shape[1::-1]
                    writer = stack.enter_context(create_video(source.output, video.fps, size))
                writer.write(picture)
            if with_json:
                records = as_records(detections, detector.class_names)
                frames.append({"frame": number, "detections": records})
        if source.output and writer is None:
            raise UserError(f"cannot read the video {source.path}: no frame can be decoded")


def show(picture: np.ndarray, wait: int) -> None:
    """Show a picture for ``wait`` milliseconds; 0: until a key is pressed.

    Raises:
        Quit: on Esc or q.
    """
    cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    cv2.imshow(WINDOW, picture)
    if cv2.waitKey(wait) & 0xFF in (ESCAPE, ord("q")):
        raise Quit


def write_json(path: str, content: Dict) -> None:
    with raise_if_unwritable(path), open_replacing(path, "w") as file:
        json.dump(content, file)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="images, folders of images and videos, videos"
    )
    source.add_argument("--webcam", action="store_true", help="the first webcam")
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="draw only detections with a higher score (default: 0.5)",
    )
    parser.add_argument(
        "--json", action="store_true", help="write the detections as JSON beside each picture"
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=0,
        metavar="SIDE",
        help="look through each image in tiles of SIDE pixels, for objects that are small in it",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.2,
        metavar="PART",
        help="the part of a tile's side that neighbours have in common (default: 0.2)",
    )
    add_detector_arguments(parser)
    return parser.parse_args()


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--config-file``, ``--register`` and ``KEY VALUE`` pairs, for
    :func:`load_detector`."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="instead of --config-file: the folder of a training, a checkpoint in it, a YAML "
        "config or its name in the model zoo, or an exported file",
    )
    add_model_arguments(parser, required=False)
