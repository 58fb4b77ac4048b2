#!/usr/bin/env python3
"""Run a detector written by export_model.py on images.

Needs neither Detectron2 nor any other file of this project, only torch and torchvision for a
TorchScript file or a torch.export program, onnxruntime for an ONNX file, NumPy and Pillow for all,
and OpenCV for a model that predicts masks. Which kind a file is of is found from the file. For each
image, one line of JSON is printed to standard output:

    {"image": FILE, "height": H, "width": W, "seconds": LATENCY, "detections":
        [{"bbox": [x1, y1, x2, y2], "class": NAME, "class_id": NUMBER, "score": SCORE}, ...]}

with boxes in pixels of the image, best score first. If the model predicts them, a detection also
has "segmentation", the outlines [x1, y1, x2, y2, ...] of its mask, and "keypoints", [x, y, score]
each. An image that cannot be read is reported, and the others are still processed. An IMAGE.npy
contains an array (3, height, width) that is passed to the model unchanged.
"""

import argparse
import colorsys
import functools
import json
import logging
import os
import statistics
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

METADATA = "balanced_d2.json"
FORMAT_VERSION = 2  # the newest that is known; files of the first version have no number
# For older files, which do not name their outputs.
OUTPUTS = ["boxes", "classes", "scores", "image_size"]
PACKAGES = {"cv2": "opencv-python-headless"}  # packages with another name than their module
# Opacity of masks, at most 255, and the probability from which a pixel belongs to the mask.
MASK_ALPHA = 110
MASK_THRESHOLD = 0.5
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

    Attributes:
        metadata: from the file: class_names, input_format, min_size, max_size.
    """

    def __init__(self, path: str, device: str = "cpu"):
        if not os.path.isfile(path):
            raise UserError(f"there is no model file {path}")
        try:
            metadata = zip_metadata(path) if zipfile.is_zipfile(path) else None
            if metadata is not None:
                self.metadata = check_version(path, json.loads(metadata))
                load = LOADERS[self.metadata.get("format", "torchscript")]
                self._run, _ = load(path, device)
            else:  # ONNX, or nothing that export_model.py wrote
                load = load_torchscript if zipfile.is_zipfile(path) else load_onnx
                self._run, metadata = load(path, device)
                if not metadata:
                    raise UserError(
                        f"{path} was not written by export_model.py: it has no {METADATA}"
                    )
                self.metadata = check_version(path, json.loads(metadata))
            if "masks" in self.outputs:
                import cv2  # noqa: F401  # if missing, report it now
        except UserError:
            raise
        except ImportError as error:
            package = PACKAGES.get(error.name, error.name)
            raise UserError(f"{path} needs the package {package}: pip install {package}") from None
        except Exception as error:  # loading any other file can fail in any way
            raise UserError(
                f"{path} is not a model that can be loaded: {one_line(error)}"
            ) from None

    @property
    def outputs(self) -> list:
        """The names of the model's outputs, in order."""
        return self.metadata.get("outputs", OUTPUTS)

    def __call__(self, array: np.ndarray) -> dict:
        """Run the model on an array (3, height, width).

        Returns:
            Boxes (N, 4), classes (N,), scores (N,), image_size (2,) and, if the model predicts
            them, masks (N, M, M) of probabilities within the box and keypoints (N, K, 3): x, y,
            score.
        """
        array = np.ascontiguousarray(array, dtype=np.float32)
        if "num_detections" not in self.outputs:
            return dict(zip(self.outputs, self._run(array)))
        outputs = dict(zip(self.outputs, self._run(array[None])))
        number = int(outputs.pop("num_detections")[0])
        outputs = {name: value[0, :number] for name, value in outputs.items()}
        return {**outputs, "image_size": np.array(array.shape[1:])}

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
        if self.metadata["min_size"] == 0:
            return width, height
        scale = self.metadata["min_size"] / min(width, height)
        if scale * max(width, height) > self.metadata["max_size"]:
            scale = self.metadata["max_size"] / max(width, height)
        return int(width * scale + 0.5), int(height * scale + 0.5)


def zip_metadata(path: str):
    """The JSON in a file of PyTorch, None if there is none."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")]
        return archive.read(names[0]) if names else None


def check_version(path: str, metadata: dict) -> dict:
    version = metadata.get("format_version", 1)
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, and this program knows up to {FORMAT_VERSION}: "
            "use the run_exported.py of the version that wrote it "
            f"({metadata.get('versions', {}).get('balanced_d2', 'unknown')})"
        )
    return metadata


def load_torchscript(path: str, device: str):
    import torch
    import torchvision  # noqa: F401  # its operators

    files = {METADATA: ""}
    model = torch.jit.load(path, map_location=device, _extra_files=files)
    return with_tensors(model, device), files[METADATA]


def load_pt2(path: str, device: str):
    check_cpu(device)
    import torch
    import torchvision  # noqa: F401  # its operators

    logging.getLogger("torch._export").setLevel(logging.ERROR)  # of symbols that are not needed
    return with_tensors(torch.export.load(path).module(), device), None


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

    return with_tensors(detect_padded, device), None


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

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(array):
        return session.run(None, {name: array})

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA)


LOADERS = {"torchscript": load_torchscript, "pt2": load_pt2, "aoti": load_aoti}


def main(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")  # PyTorch's, about how the model was written
    if args.arrays and len(args.images) > 1:
        raise UserError("--arrays is for a single image")
    detector = ExportedDetector(args.model, args.device)
    failed = 0
    with Output(args.output) as output:
        for path in with_bar(args.images):
            try:
                image, array = read(path, detector)
                outputs, seconds = run(detector, array, args.repeat)
                if args.arrays:
                    save_arrays(args.arrays, outputs)
                outputs, size = in_pixels_of(image, array, outputs)
                detections = describe(outputs, detector.metadata["class_names"], args.threshold)
                record = {"image": path, **size, "seconds": seconds, "detections": detections}
                output.write(record, image)
            except UserError as error:
                report(error)
                failed += 1
    return 2 if failed else 0


def with_bar(paths: list):
    """The paths, with a progress bar if tqdm is installed and no results go to a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return paths
    disable = True if len(paths) == 1 or sys.stdout.isatty() else None
    return tqdm(paths, desc="detecting", unit="image", disable=disable)


def read(path: str, detector: ExportedDetector):
    """The image (None for an array) and the network's input."""
    try:
        if path.endswith(".npy"):
            array = np.load(path)
            if array.ndim != 3 or len(array) != 3:
                raise ValueError(f"an array (3, height, width) is needed, not {array.shape}")
            return None, array
        # Of a path, Pillow turns some TIFFs wrongly.
        with open(path, "rb") as file, Image.open(file) as opened:
            image = as_rgb(opened, detector.metadata.get("gray_range"))
        return image, detector.preprocess(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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


def run(detector, array: np.ndarray, repeat: int):
    """The outputs for an array, and the median time in seconds."""
    if repeat:
        for _ in range(3):  # TorchScript optimises itself in its first runs
            detector(array)
    seconds = []
    for _ in range(max(1, repeat)):
        start = time.perf_counter()
        outputs = detector(array)
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
            "class": class_names[label],
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

    def __init__(self, folder: str):
        self.folder = folder and Path(folder)
        self.lines = None
        self.used = set()

    def __enter__(self):
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lines = open(self.folder / "detections.jsonl", "w")
            except OSError as error:
                raise UserError(f"cannot write to {self.folder}: {error.strerror}") from None
        return self

    def __exit__(self, *_):
        if self.lines:
            self.lines.close()

    def write(self, record: dict, image) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        if not self.folder:
            return
        self.lines.write(line + "\n")
        if image is None:
            return
        file = self.picture_name(record["image"])
        try:
            draw(image, record["detections"]).save(file)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from None

    def picture_name(self, path: str) -> Path:
        """A path that differs from those of the run's other images and from the image itself."""
        stem, number = Path(path).stem, 1
        while True:
            file = self.folder / (f"{stem}.png" if number == 1 else f"{stem}_{number}.png")
            is_input = file.exists() and file.samefile(path)
            if file not in self.used and not is_input:
                self.used.add(file)
                return file
            number += 1


def draw(image: Image.Image, detections: list) -> Image.Image:
    """The image with mask, box, label and keypoints of each detection, best ones on top."""
    image = draw_masks(image, detections)
    canvas = ImageDraw.Draw(image)
    line = max(1, round(min(image.size) / 300))
    text = "".join(detection["class"] for detection in detections)
    font = font_for(text, size=max(10, min(image.size) / 40))
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


def font_for(text: str, size: float):
    """A font that has the characters of a text, if there is one: Pillow's own has Latin ones."""
    if text.isascii():
        return ImageFont.load_default(size=size)
    path = font_file(frozenset(c for c in text if not c.isspace()))
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size=size)


@functools.cache
def font_file(characters: frozenset) -> str:
    """The installed font with the most of some characters; "" if none has any."""
    folders = [Path(folder).expanduser() for folder in FONT_FOLDERS]
    files = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix.lower() in FONT_SUFFIXES]
    best, number = "", 0
    for file in files:
        try:
            font = ImageFont.truetype(str(file), 16)
            absent = bytes(font.getmask(NO_CHARACTER))
            found = sum(bytes(font.getmask(character)) != absent for character in characters)
        except (OSError, ValueError):  # not a font that can be drawn with
            continue
        if found > number:
            best, number = str(file), found
        if number == len(characters):
            break
    else:
        some = "".join(sorted(characters)[:10])
        report(f"no installed font has all characters of the names: {some}", "note")
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


def one_line(error: Exception) -> str:
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
    parser.add_argument("images", metavar="IMAGE", nargs="+")
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
    parser.add_argument("--device", default="cpu", help="for a TorchScript file, such as cuda")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
