#!/usr/bin/env python3
"""Run a detector written by export_model.py on images, folders of images and videos.

Needs neither Detectron2 nor any other file of this project, only torch and torchvision for a
TorchScript file or a torch.export program, onnxruntime or openvino for an ONNX file, NumPy and
Pillow for all, and OpenCV for videos and for a model that predicts masks. Which kind a file is of
is found from the file. For each image, one line of JSON is printed to standard output:

    {"image": FILE, "height": H, "width": W, "seconds": LATENCY, "detections":
        [{"bbox": [x1, y1, x2, y2], "class": NAME, "class_id": NUMBER, "score": SCORE}, ...]}

with boxes in pixels of the image, best score first. If the model predicts them, a detection also
has "segmentation", the outlines [x1, y1, x2, y2, ...] of its mask, and "keypoints", [x, y, score]
each. Images of a video also have "frame", their number from 0 on. Of images that went through the
model together, "seconds" is an equal share. An image that cannot be read, or that the model does
not take, is reported, and the others are still processed; with several, their number per second,
from reading to writing, is printed at the end. An IMAGE.npy contains an array (3, height, width)
that is passed to the model unchanged.
"""

import argparse
import collections
import colorsys
import contextlib
import functools
import importlib.util
import itertools
import json
import logging
import os
import queue
import re
import signal
import statistics
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

METADATA = "balanced_d2.json"
FORMAT_VERSION = 2  # the newest that is known; files of the first version have no number
NEEDED = ("class_names", "input_format", "min_size", "max_size")  # of what files say of themselves
# For older files, which do not name their outputs.
OUTPUTS = ["boxes", "classes", "scores", "image_size"]
PACKAGES = {"cv2": "opencv-python-headless"}  # packages with another name than their module
# Opacity of masks, at most 255, and the probability from which a pixel belongs to the mask.
MASK_ALPHA = 110
MASK_THRESHOLD = 0.5
READ_ERRORS = (EOFError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # in folders
FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
FONT_SUFFIXES = (".otf", ".ttc", ".ttf")
NO_CHARACTER = "\uffff"  # fonts draw what they lack as they draw this
ORIENTATIONS = {  # of EXIF, and what undoes them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UserError(Exception):
    """A mistake that the user can fix, shown as one line."""


class ExportedDetector:
    """A detector in a file of export_model.py.

    Args:
        engine: of an ONNX file, a key of ENGINES; by default the first that is installed.
        threads: how many will call it at a time; each has a share of the cores.

    Attributes:
        metadata: from the file: class_names, input_format, min_size, max_size.
    """

    def __init__(
        self, path: str, device: str = "cpu", engine: Optional[str] = None, threads: int = 1
    ):
        if not os.path.isfile(path):
            raise UserError(f"there is no model file {path}")
        try:
            self._run, self.metadata = load(path, device, engine, threads)
            if "masks" in self.outputs:
                import cv2  # noqa: F401  # if missing, report it now
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"{path} needs {what_is_missing(error)}") from None
        except Exception as error:  # loading any other file can fail in any way
            raise UserError(
                f"{path} is not an exported model, or is damaged: {one_line(error)}"
            ) from None

    @property
    def outputs(self) -> list:
        """The names of the model's outputs, in order."""
        return self.metadata.get("outputs", OUTPUTS)

    @property
    def score_threshold(self) -> float:
        """The score below which the file has no detections; 0 if an older one does not say it."""
        return self.metadata.get("score_threshold", 0.0)

    def __call__(self, array: np.ndarray) -> dict:
        """Run the model on an array (3, height, width).

        Returns:
            Boxes (N, 4), classes (N,), scores (N,), image_size (2,) and, if the model predicts
            them, masks (N, M, M) of probabilities within the box and keypoints (N, K, 3): x, y,
            score.
        """
        return self.detect([array])[0]

    def detect(self, arrays: list) -> list:
        """The same for several arrays of one size, together if the model takes batches.

        Raises:
            UserError: if the model cannot be run on them.
        """
        images = np.ascontiguousarray(np.stack(arrays), dtype=np.float32)
        try:
            if "num_detections" not in self.outputs:
                return [dict(zip(self.outputs, self._run(image))) for image in images]
            outputs = dict(zip(self.outputs, self._run(images)))
        except UserError:
            raise
        except Exception as error:  # an engine can fail in any way
            height, width = images.shape[2:]
            raise UserError(
                f"the model does not take {len(images)} image(s) of {width} x {height}: "
                f"{one_line(error)}"
            ) from None
        numbers = outputs.pop("num_detections")
        size = {"image_size": np.array(images.shape[2:])}
        return [
            {**{name: value[i, :number] for name, value in outputs.items()}, **size}
            for i, number in enumerate(numbers.tolist())
        ]

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """The network's input for an RGB image, scaled as in training."""
        size = self.network_size(*image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        array = np.asarray(image)
        if self.metadata["input_format"] == "BGR":
            array = array[:, :, ::-1]
        return array.transpose(2, 0, 1)

    def network_size(self, width: int, height: int) -> tuple:
        """Width and height to which an image is scaled."""
        return network_size(width, height, self.metadata["min_size"], self.metadata["max_size"])


def network_size(width: int, height: int, min_size: int, max_size: int) -> tuple:
    """Width and height to which Detectron2 scales an image, at least 1.

    Args:
        min_size: to which the shorter side is scaled; 0: the image is not scaled.
        max_size: which the longer side may have.
    """
    if min_size == 0:
        return width, height
    # In Detectron2's two steps: another order of these products can round to another pixel.
    scale = min_size / min(width, height)
    sides = (width * scale, min_size) if height < width else (min_size, height * scale)
    if max(sides) > max_size:
        scale = max_size / max(sides)
        sides = (sides[0] * scale, sides[1] * scale)
    return max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5))


def load(path: str, device: str, engine: Optional[str], threads: int) -> tuple:
    """The model of a file as a function of an array to arrays, and what the file says of it."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # of PyTorch
    if not is_zip:
        share_cores(threads)
        engine = engine or default_engine()
        run, text = ENGINES[engine](path, device)
        metadata = check_metadata(path, text)
        if engine == "openvino" and "format_version" not in metadata:
            raise UserError(
                f"{path} was written by version 0.1.0, and OpenVINO finds other detections with "
                "such files, because it rounds divisions: export it again, or use onnxruntime"
            )
        return run, metadata
    if engine:
        raise UserError(f"{path} is run by PyTorch; --engine is for ONNX files")
    metadata = check_metadata(path, zip_metadata(path))
    format = metadata.get("format", "torchscript")
    if format != "aoti":  # whose packages run one at a time, since PyTorch keeps Python's lock
        share_cores(threads)
    return LOADERS[format](path, device), metadata


def share_cores(threads: int) -> None:
    """Let what is loaded afterwards take a share of the cores, unless the user says how many."""
    if threads > 1:
        share = max(1, (os.cpu_count() or 1) // threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))


def zip_metadata(path: str) -> Optional[str]:
    """The JSON in a file of PyTorch, None if there is none."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")]
        return archive.read(names[0]).decode() if names else None


def check_metadata(path: str, text: Optional[str]) -> dict:
    if not text:
        raise UserError(
            f"{path} is not an exported model: it has no {METADATA}, so it was not written by "
            "export_model.py"
        )
    metadata = json.loads(text)
    version = metadata.get("format_version", 1)
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, and this program knows up to {FORMAT_VERSION}: "
            "use the run_exported.py of the version that wrote it "
            f"({metadata.get('versions', {}).get('balanced_d2', 'unknown')})"
        )
    missing = [key for key in NEEDED if key not in metadata]
    if missing:
        raise UserError(f"{path} cannot be used: its {METADATA} has no {', '.join(missing)}")
    return metadata


def load_torchscript(path: str, device: str):
    import torch
    import torchvision  # noqa: F401  # its operators

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # unknown, or not there
        raise UserError(f"--device {device}: {one_line(error)}") from None
    return with_tensors(torch.jit.load(path, map_location=device), device)


def load_pt2(path: str, device: str):
    check_cpu(device)
    import torch
    import torchvision  # noqa: F401  # its operators

    logging.getLogger("torch._export").setLevel(logging.ERROR)  # of symbols that are not needed
    return with_tensors(torch.export.load(path).module(), device)


def load_aoti(path: str, device: str):
    check_cpu(device)
    import torch
    import torchvision  # noqa: F401  # its operators

    # They warn where there is no CUDA and no compiler, which are not needed.
    for name in ("torch.utils.cpp_extension", "torch._inductor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    multiple = json.loads(zip_metadata(path))["size_divisibility"]
    detect = torch._inductor.aoti_load_package(path)

    def detect_padded(images):
        height, width = images.shape[2:]
        padded = torch.nn.functional.pad(images, (0, -width % multiple, 0, -height % multiple))
        try:
            return detect(padded, torch.tensor([[height, width]] * len(images)))
        except RuntimeError as error:  # such as of its assertions about sizes
            raise UserError(
                f"{path} does not take images of {width} x {height}, which may be too small for "
                f"it; export with --format pt2 ({one_line(error)})"
            ) from None

    return with_tensors(detect_padded, device)


def with_tensors(model, device: str):
    """A model of PyTorch as a function of arrays."""
    import torch

    def run(array):
        with torch.no_grad():
            outputs = model(torch.from_numpy(array).to(device))
        return [output.cpu().numpy() for output in outputs]

    return run


def check_cpu(device: str) -> None:
    if device != "cpu":
        raise UserError("this file is run on the CPU; --device is for TorchScript files")


def load_onnx(path: str, device: str):
    check_cpu(device)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = engine_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(array):
        return session.run(None, {name: array})

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA)


def load_openvino(path: str, device: str):
    check_cpu(device)
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    # Its own choice would be bfloat16 where the CPU has it: other detections than those compared.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    if engine_threads():
        options["INFERENCE_NUM_THREADS"] = str(engine_threads())
    compiled = core.compile_model(model, "CPU", options)
    idle = queue.SimpleQueue()  # of requests, each of which runs one input at a time

    def run(array):
        try:
            request = idle.get_nowait()
        except queue.Empty:
            request = compiled.create_infer_request()
        results = request.infer([array])
        outputs = [results[output].copy() for output in compiled.outputs]
        idle.put(request)
        return outputs

    place = ["framework", METADATA]
    return run, model.get_rt_info(place).value if model.has_rt_info(place) else None


def engine_threads() -> int:
    """How many threads an engine takes for one input: as for PyTorch. 0: its own choice."""
    first = re.match(r"\s*\d+", os.environ.get("OMP_NUM_THREADS", ""))  # of a list, such as "2,1"
    return int(first[0]) if first else 0


def default_engine() -> str:
    """The first engine that is installed; the first one, to be named as missing, if none is."""
    return next(filter(importlib.util.find_spec, ENGINES), "onnxruntime")


ENGINES = {"onnxruntime": load_onnx, "openvino": load_openvino}
LOADERS = {"torchscript": load_torchscript, "pt2": load_pt2, "aoti": load_aoti}


def main(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")  # PyTorch's, about how the model was written
    if args.threads < 1 or args.batch_size < 1 or args.repeat < 0:
        raise UserError("--threads and --batch-size have to be 1 or more, --repeat 0 or more")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}, not in [0, 1]")
    files = list_files(args.images)
    items, number = list_items(files)
    if args.arrays and number != 1:
        raise UserError("--arrays is for a single image")
    if args.arrays and identities([args.arrays]) & identities([args.model, *files]):
        raise UserError(f"--arrays {args.arrays} would replace what is read: choose another file")
    detector = ExportedDetector(args.model, args.device, args.engine, args.threads)
    if args.threshold < detector.score_threshold:
        report(
            f"--threshold {args.threshold:g} has no effect below {detector.score_threshold:g}, the "
            "SCORE_THRESH_TEST of the export",
            "note",
        )
    done = failed = 0
    start = time.perf_counter()
    names = detector.metadata["class_names"]
    with Output(args.output, files, names) as output, bar(number) as progress:
        detect = functools.partial(detect_in, detector, repeat=args.repeat)
        for item, result in in_threads(detect, items, args.threads, args.batch_size):
            try:
                if isinstance(result, UserError):
                    raise result
                if args.arrays:
                    save_arrays(args.arrays, result.outputs)
                outputs, size = in_pixels_of(result.image, result.array, result.outputs)
                detections = describe(outputs, names, args.threshold)
                record = {"image": item.path, **size, "seconds": result.seconds}
                if item.frame is not None:
                    record["frame"] = item.frame
                output.write({**record, "detections": detections}, result.image, item.rate)
                done += 1
            except UserError as error:
                report(error)
                failed += 1
            progress()
    if done + failed > 1:
        seconds = time.perf_counter() - start
        bad = f"; {failed} failed, which are named above" if failed else ""
        report(f"{done} image(s) in {seconds:.1f} s, {done / seconds:.1f} a second{bad}", "done")
    return 2 if failed else 0


class Item(NamedTuple):
    """An image to be read, or one of a video."""

    path: str
    frame: Optional[int] = None  # its number in the video
    rate: float = 0.0  # of the video, in images per second
    image: Optional[Image.Image] = None
    error: Optional[UserError] = None  # why a video could not be read


class Result(NamedTuple):
    image: Optional[Image.Image]  # None for an array
    array: np.ndarray
    outputs: dict
    seconds: float


def list_files(paths: list) -> list:
    """The images and videos of files and folders, in order."""
    files = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        found = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in IMAGES + VIDEOS)
        # Images of a video are often in a folder with its name.
        inside = [file for file in found if not file.is_dir()]
        if not inside:
            raise UserError(f"there are no images and no videos in the folder {path}")
        files += map(str, inside)
    return files


def list_items(files: list) -> tuple:
    """The images of files, in order, and their number, None if it is not known: of videos."""
    videos = list(filter(is_video, files))
    if videos:
        try:
            import cv2  # noqa: F401  # if missing, report it now
        except ImportError as error:
            raise UserError(f"{videos[0]} needs {what_is_missing(error)}") from None
    parts = (frames(file) if is_video(file) else [Item(file)] for file in files)
    return itertools.chain.from_iterable(parts), None if videos else len(files)


def is_video(file: str) -> bool:
    return file.lower().endswith(VIDEOS)


def frames(path: str):
    import cv2

    if not is_utf8(path):
        reason = "its name is not UTF-8, and OpenCV reads no others: rename it"
        yield Item(path, error=UserError(f"cannot read video {path}: {reason}"))
        return
    if os.path.isfile(path):
        video = cv2.VideoCapture(path)
        rate = video.get(cv2.CAP_PROP_FPS) or 25.0
        expected = video.get(cv2.CAP_PROP_FRAME_COUNT)  # of some formats, about
        for number in itertools.count():
            is_there, pixels = video.read()
            if not is_there:
                break
            image = Image.fromarray(pixels[:, :, ::-1])
            yield Item(path, frame=number, rate=rate, image=image)
        video.release()
        if 0 < number < 0.9 * expected:
            report(f"{path} ends after {number} of {expected:.0f} images; is it damaged?", "note")
        if number > 0:
            return
    yield Item(path, error=UserError(f"cannot read video {path}"))


def is_utf8(path: str) -> bool:
    """Whether OpenCV can take a path: of one with other bytes it ends the process."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_threads(detect, items, threads: int, batch_size: int):
    """Each item and its result, in order; no more are read ahead than keep the threads busy."""
    items, waiting = iter(items), collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                batch = list(itertools.islice(items, batch_size))
                if batch:
                    waiting.append((batch, pool.submit(detect, batch)))
                if waiting and (not batch or len(waiting) > 2 * threads):
                    yield from zip(waiting[0][0], waiting.popleft()[1].result())
                elif not batch:
                    return
        finally:
            pool.shutdown(cancel_futures=True)


def detect_in(detector: ExportedDetector, items: list, repeat: int) -> list:
    """For each item a Result, or the UserError that says why there is none.

    Those of one size go through the model together.
    """
    results, by_size = {}, {}
    for i, item in enumerate(items):
        try:
            image, array = read(item, detector)
            by_size.setdefault(array.shape, []).append((i, image, array))
        except UserError as error:
            results[i] = error
    for group in by_size.values():
        try:
            outputs, seconds = run(detector, [array for _, _, array in group], repeat)
        except UserError as error:  # the model takes no images of this size
            results.update((i, UserError(f"{items[i].path}: {error}")) for i, _, _ in group)
            continue
        for (i, image, array), output in zip(group, outputs):
            results[i] = Result(image, array, output, seconds / len(group))
    return [results[i] for i in range(len(items))]


@contextlib.contextmanager
def bar(number: Optional[int]):
    """A function that counts images, with a progress bar if tqdm is installed and no results go to
    a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    disable = True if number == 1 or sys.stdout.isatty() else None
    with tqdm(total=number, desc="detecting", unit="image", disable=disable) as progress:
        yield progress.update


def read(item: Item, detector: ExportedDetector):
    """The image (None for an array) and the network's input."""
    path = item.path
    if item.error:
        raise item.error
    if item.image:
        return item.image, detector.preprocess(item.image)
    try:
        if path.endswith(".npy"):
            array = np.asarray(np.load(path))
            is_image = array.ndim == 3 and len(array) == 3 and array.size > 0
            if not is_image or array.dtype.kind not in "biuf":
                raise ValueError(
                    f"an array (3, height, width) is needed, not {array.shape} of {array.dtype}"
                )
            return None, array
        # Of a path, Pillow turns some TIFFs wrongly.
        with open(path, "rb") as file, Image.open(file) as opened:
            image = as_rgb(opened, detector.metadata.get("gray_range"))
        return image, detector.preprocess(image)
    except READ_ERRORS as error:
        raise UserError(f"cannot read image {path}: {one_line(error)}") from None


def as_rgb(image: Image.Image, gray_range):
    """An opened image as the model was trained with: rotated, gray of more than 8 bits in 8."""
    image.load()
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;")
    image = upright(image)
    if is_deep:
        image = Image.fromarray(to_8_bits(np.asarray(image), gray_range))
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image rotated as its EXIF data says, if they can be read."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # broken EXIF data, which training ignores too
        return image
    method = ORIENTATIONS.get(orientation)
    return image if method is None else image.transpose(method)


def to_8_bits(pixels: np.ndarray, gray_range) -> np.ndarray:
    """Gray values from 0 to the range of the model as 0 to 255.

    Without a range, it is the image's own: the next 2**n - 1 from its largest value, at least 255;
    of floats 1, if none is above.
    """
    if not np.isfinite(pixels).all() or pixels.min() < 0:
        raise ValueError("it is gray with values that are negative or not finite")
    largest = float(pixels.max())
    if not gray_range and pixels.dtype.kind == "f" and largest <= 1:
        gray_range = 1.0
    if not gray_range:
        gray_range = 2 ** max(8, int(np.ceil(largest)).bit_length()) - 1
    return np.rint(pixels.astype(np.float64) * (255 / gray_range)).clip(0, 255).astype(np.uint8)


def run(detector: ExportedDetector, arrays: list, repeat: int):
    """The outputs for arrays of one size, and the median time in seconds."""
    if repeat:
        for _ in range(3):  # TorchScript optimises itself in its first runs
            detector.detect(arrays)
    seconds = []
    for _ in range(max(1, repeat)):
        start = time.perf_counter()
        outputs = detector.detect(arrays)
        seconds.append(time.perf_counter() - start)
    return outputs, statistics.median(seconds)


def save_arrays(path: str, outputs: dict) -> None:
    try:
        with open(path, "wb") as file:
            np.savez(file, **outputs)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def in_pixels_of(image, array: np.ndarray, outputs: dict):
    """The outputs in pixels of the image, or of the array if there is no image, and its size."""
    outputs = {name: value for name, value in outputs.items() if name != "image_size"}
    height, width = array.shape[1:]
    if image is not None:
        outputs = to_size(outputs, (width, height), image.size)
        width, height = image.size
    return outputs, {"height": height, "width": width}


def to_size(outputs: dict, network_size: tuple, size: tuple) -> dict:
    """The outputs with scaled boxes and keypoints, without detections whose box is empty."""
    scale = np.divide(size, network_size)
    boxes = (outputs["boxes"] * np.tile(scale, 2)).astype(np.float32).clip(0, np.tile(size, 2))
    scaled = {**outputs, "boxes": boxes}
    if "keypoints" in outputs:
        scaled["keypoints"] = (outputs["keypoints"] * [*scale, 1]).astype(np.float32)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return {name: value[kept] for name, value in scaled.items()}


def describe(outputs: dict, class_names: list, threshold: float) -> list:
    """The detections that reach the threshold, for JSON."""
    detections = []
    for i in np.flatnonzero(outputs["scores"] >= threshold):
        box, label = outputs["boxes"][i], int(outputs["classes"][i])
        detection = {
            "bbox": box.tolist(),
            # Without a name, its number, as where no names are known to the export.
            "class": class_names[label] if label < len(class_names) else str(label),
            "class_id": label,
            "score": float(outputs["scores"][i]),
        }
        if "masks" in outputs:
            detection["segmentation"] = outlines(outputs["masks"][i], box)
        if "keypoints" in outputs:
            detection["keypoints"] = outputs["keypoints"][i].tolist()
        detections.append(detection)
    return detections


def paste(mask: np.ndarray, box: np.ndarray):
    """A mask of probabilities (M, M) in a box as a bool array, and the pixel where it starts."""
    import cv2

    start, end = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    scale = np.divide(mask.shape[::-1], box[2:] - box[:2])
    # From the centre of an image pixel to a point of the mask, whose first pixel centre is at 0.
    offset = (start + 0.5 - box[:2]) * scale - 0.5
    matrix = np.column_stack([np.diag(scale), offset])
    pasted = cv2.warpAffine(
        np.ascontiguousarray(mask, dtype=np.float32),
        matrix,
        tuple(int(length) for length in end - start),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    )
    return pasted >= MASK_THRESHOLD, start


def outlines(mask: np.ndarray, box: np.ndarray) -> list:
    """The outer contours of a mask in the image, each as [x1, y1, x2, y2, ...]."""
    import cv2

    pasted, start = paste(mask, box)
    pasted = pasted.astype(np.uint8)
    contours, _ = cv2.findContours(pasted, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    # They go through pixel centres. Fewer than three points are not a polygon.
    points = (contour.reshape(-1, 2) + start + 0.5 for contour in contours if len(contour) > 2)
    return [polygon.ravel().tolist() for polygon in points]


class Output:
    """Writes the results to standard output, and to a folder if one is given."""

    def __init__(self, folder: str, inputs: list, class_names: list):
        self.folder = folder and Path(folder)
        self.font = find_font("".join(class_names)) if folder else ""
        self.inputs = identities(inputs)
        self.lines = None
        self.used = set()
        self.videos = {}  # by path of the input

    def __enter__(self):
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # By line, so that the file has whole ones however the program ends.
                self.lines = open(self.folder / "detections.jsonl", "w", buffering=1)
            except OSError as error:
                raise UserError(f"cannot write to {self.folder}: {error.strerror}") from None
        return self

    def __exit__(self, *_):
        if self.lines:
            with contextlib.suppress(OSError):  # which has been reported, with its image
                self.lines.close()
        for video in self.videos.values():
            video.release()

    def write(self, record: dict, image, rate: float) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        if not self.folder:
            return
        try:
            self.lines.write(line + "\n")
            if image is None:
                return
            picture = draw(image, record["detections"], self.font)
            if "frame" not in record:
                self.save(picture, self.picture_name(record["image"]))
                return
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {one_line(error)}") from None
        self.video(record["image"], rate, picture.size).write(np.asarray(picture)[:, :, ::-1])

    def save(self, picture: Image.Image, file: Path) -> None:
        """Write a picture whole or, if a signal stops it, not at all."""
        partial = self.folder / ".partial"
        try:
            picture.save(partial, "PNG")
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def video(self, path: str, rate: float, size: tuple):
        if path not in self.videos:
            import cv2

            if not is_utf8(str(self.folder)):
                raise UserError(f"cannot write videos to {self.folder}: its name is not UTF-8")
            file = self.picture_name(path, ".mp4")
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self.videos[path] = cv2.VideoWriter(str(file), code, rate, size)
            if not self.videos[path].isOpened():
                raise UserError(f"cannot write {file}")
        return self.videos[path]

    def picture_name(self, path: str, suffix: str = ".png") -> Path:
        """A path that differs from those of the run's other pictures and of all its images."""
        stem, number = Path(path).stem, 1
        while True:
            file = self.folder / (stem + (suffix if number == 1 else f"_{number}{suffix}"))
            name = file.name.casefold()  # which some file systems take for the same
            if name not in self.used and not identities([file]) & self.inputs:
                self.used.add(name)
                return file
            number += 1


def identities(paths) -> set:
    """Of the files that are there, each the same under all its names."""
    found = (os.stat(path) for path in paths if os.path.exists(path))
    return {(file.st_dev, file.st_ino) for file in found}


def draw(image: Image.Image, detections: list, font_file: str) -> Image.Image:
    """The image with mask, box, label and keypoints of each detection, best ones on top.

    Args:
        font_file: of find_font.
    """
    image = draw_masks(image, detections)
    canvas = ImageDraw.Draw(image)
    line = max(1, round(min(image.size) / 300))
    size = max(10, min(image.size) / 40)
    font = ImageFont.truetype(font_file, size) if font_file else ImageFont.load_default(size=size)
    for detection in reversed(detections):
        color = class_color(detection["class_id"])
        x1, y1, x2, y2 = detection["bbox"]
        canvas.rectangle((x1, y1, x2, y2), outline=color, width=line)
        text = f"{detection['class']} {detection['score']:.0%}"
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        height = bottom + 2
        y = y1 - height if y1 >= height else y1  # above the box, inside it at the image's top
        x = max(0, min(x1, image.width - right - 4))
        canvas.rectangle((x, y, x + right + 4, y + height), fill=color)
        canvas.text((x + 2, y), text, fill="black", font=font)
        for x, y, _ in detection.get("keypoints", []):
            canvas.ellipse((x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line), fill=color)
    return image


def find_font(text: str) -> str:
    """The file of the installed font with the most characters of a text; "" for Pillow's own, which
    has those of ASCII."""
    characters = {character for character in text if not character.isspace()}
    best, missing = "", {character for character in characters if not character.isascii()}
    if not missing:
        return best
    folders = [Path(folder).expanduser() for folder in FONT_FOLDERS]
    files = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix.lower() in FONT_SUFFIXES]
    for file in files:
        try:
            font = ImageFont.truetype(str(file), 16)
            absent = bytes(font.getmask(NO_CHARACTER))
            lacks = {c for c in characters if bytes(font.getmask(c)) == absent}
        except (OSError, ValueError):  # not a font that can be drawn with
            continue
        if len(lacks) < len(missing):
            best, missing = str(file), lacks
        if not missing:
            return best
    some = "".join(sorted(missing)[:10])
    report(f"no installed font has all characters of the names, such as {some}", "note")
    return best


def draw_masks(image: Image.Image, detections: list) -> Image.Image:
    overlay = Image.new("RGBA", image.size)
    canvas = ImageDraw.Draw(overlay)
    for detection in reversed(detections):
        for polygon in detection.get("segmentation", []):
            canvas.polygon(polygon, fill=(*class_color(detection["class_id"]), MASK_ALPHA))
    return Image.alpha_composite(image.convert("RGBA"), overlay).convert("RGB")


def class_color(number: int) -> tuple:
    """A bright colour; the golden ratio keeps those of neighbouring numbers apart."""
    rgb = colorsys.hls_to_rgb(number * 0.618034 % 1.0, 0.65, 0.9)
    return tuple(round(255 * value) for value in rgb)


def what_is_missing(error: ImportError) -> str:
    """A package and how to install it, or what an installed one lacks."""
    if not isinstance(error, ModuleNotFoundError):
        return f"a package that is installed but cannot be imported: {one_line(error)}"
    module = str(error.name).split(".")[0]
    package = PACKAGES.get(module, module)
    return f"the package {package}: pip install {package}"


def one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a format that Pillow reads"
    if getattr(error, "strerror", None):
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def report(error, kind: str = "error") -> None:
    print(f"{kind}: {error}", file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a file that export_model.py wrote")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="an image, a folder of them, or a video"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="also write DIR/detections.jsonl and a picture of each image",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="T", help="minimum score (default: 0.5)"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=0,
        metavar="N",
        help="for measurements: run each image N times after a warm-up; `seconds` is the median",
    )
    parser.add_argument(
        "--arrays", metavar="FILE.npz", help="also save the model's outputs for a single image"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="images read at a time; those of one size go through a model of batches together",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="images or batches processed at a time, each with a share of the cores",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="for an ONNX file (default: onnxruntime if it is installed)",
    )
    parser.add_argument("--device", default="cpu", help="for a TorchScript file, such as cuda")
    return parser.parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: videos are finished
    try:
        sys.exit(main(parse_args()))
    except UserError as error:
        report(error)
        sys.exit(2)
    except BrokenPipeError:  # who reads the results, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
