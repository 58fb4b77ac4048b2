"""Show a detector on a page in the browser.

Drop an image and move the threshold: the page shows the detections, and beside them the feature
pyramid before and after balancing. It is for this machine only, unless --host says otherwise; it
loads nothing from elsewhere and sends nothing to anyone.
"""

import argparse
import os
import socket
import threading
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, Optional, Tuple

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.features import recorded_levels
from balanced_d2.commands.detect import add_detector_arguments, load_detector
from balanced_d2.detection import Detector
from balanced_d2.export.sample import IMAGES
from balanced_d2.utils.errors import UserError, check_package
from balanced_d2.visualization.feature_sheet import draw_features
from balanced_d2.visualization.figure import as_image
from balanced_d2.visualization.fonts import use_font_for

# isort: split
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

LOCAL = ("127.0.0.1", "::1", "localhost")
# Detections with a lower score are not kept, wherever the threshold is moved.
LOWEST_SCORE = 0.05
# Of an image, and of the longer side of its picture, which labels can be read on.
MAX_PIXELS, PICTURE_SIDE = 50_000_000, 800
# Number of visitors whose last image is kept, and for how many seconds files are.
MAX_VISITORS, KEPT_FOR = 20, 3600
# The browser refuses whatever the page wants from another address.
POLICY = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'"
)


class Finding(NamedTuple):
    """What a detector finds in an image."""

    image: np.ndarray
    """uint8, shape (H, W, 3), RGB."""
    detections: Instances
    features: Optional[np.ndarray]
    """A picture of the pyramid before and after balancing, in RGB; None: there is none."""
    why_not: str
    """Why there are no features."""


def find(detector: Detector, path: str) -> Finding:
    """Run a detector on an image.

    Raises:
        UserError: if the image cannot be read, or has more than ``MAX_PIXELS``.
    """
    check_pixels(path)
    image = detector.read(path)
    levels, why_not = [], "no features: an exported file gives detections only"
    with ExitStack() as stack:
        if detector.model is not None:
            try:
                levels = stack.enter_context(recorded_levels(detector.model))
                why_not = ""
            except UserError as error:
                why_not = f"no features: {error}"
        detections = detector(image)
    image = image[:, :, ::-1]
    title = "Balanced features: norm over the channels"
    features = as_image(draw_features(image, levels, title)) if levels else None
    return Finding(image, detections, features, why_not)


def check_pixels(path: str) -> None:
    """Raise :class:`UserError` if an image has more than ``MAX_PIXELS``."""
    pixels = 0
    with suppress(Exception), Image.open(path) as image:  # the detector says what is wrong
        pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{path} has {pixels / 1e6:.0f} megapixels, and this page takes "
            f"{MAX_PIXELS / 1e6:.0f}: use balanced-d2 detect --tile"
        )


def draw(detector: Detector, finding: Finding, threshold: float) -> Tuple[np.ndarray, str]:
    """The detections above a threshold.

    Returns:
        A picture, uint8 of shape (H, W, 3), RGB, and a line of text about it.
    """
    shown = finding.detections[finding.detections.scores > threshold]
    scale = PICTURE_SIDE / max(finding.image.shape[:2])
    picture = Visualizer(finding.image, detector.metadata, scale).draw_instance_predictions(shown)
    number = f"{len(shown)} of {len(finding.detections)} detections"
    return picture.get_image(), "; ".join(filter(None, (number, finding.why_not)))


def build_page(detector: Detector, name: str, threshold: float = 0.5) -> Any:
    """The page.

    Args:
        name: of the model, for the heading.
        threshold: at the beginning, in [0.05, 1].

    Returns:
        ``gradio.Blocks``, to be launched.
    """
    import gradio

    def show(path: Optional[str], threshold: float) -> Tuple:
        if path is None:  # removed
            return None, None, None, ""
        try:
            finding = find(detector, path)
        except UserError as error:
            # Not where this machine keeps it.
            text = str(error).replace(path, os.path.basename(path))
            return None, None, None, f"error: {' '.join(text.split())}"
        picture, text = draw(detector, finding, threshold)
        return finding, picture, finding.features, text

    def show_again(finding: Optional[Finding], threshold: float) -> Tuple:
        return (None, "") if finding is None else draw(detector, finding, threshold)

    title = f"balanced_d2: {name}"
    with gradio.Blocks(
        title=title, analytics_enabled=False, delete_cache=(KEPT_FOR, KEPT_FOR), fill_width=True
    ) as page:
        finding = gradio.State(time_to_live=KEPT_FOR)
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            file = gradio.File(label="Image", file_types=list(IMAGES), height=120)
            with gradio.Column():
                slider = gradio.Slider(
                    LOWEST_SCORE, 1, threshold, step=0.01, label="Threshold", elem_id="threshold"
                )
                text = gradio.Textbox(show_label=False, interactive=False, elem_id="text")
        with gradio.Row():
            shown = {"format": "jpeg", "interactive": False, "buttons": ["fullscreen"]}
            picture = gradio.Image(label="Detections", elem_id="detections", **shown)
            features = gradio.Image(label="Balanced features", elem_id="features", **shown)
        outputs = [finding, picture, features, text]
        file.change(show, [file, slider], outputs, api_name="detect")
        slider.change(
            show_again,
            [finding, slider],
            [picture, text],
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
    return page


class WithPolicy:
    """Adds ``POLICY`` to every response of an ASGI application."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def launch(page: Any, host: str, port: Optional[int], max_upload: float) -> str:
    """Serve a page in the background.

    Args:
        page: of :func:`build_page`.
        port: None for the first that is free from 7860.
        max_upload: the size in megabytes that an image may have.

    Returns:
        Its address.

    Raises:
        UserError: if nothing can be served at this address.
    """
    import gradio
    from starlette.middleware import Middleware

    page.queue(default_concurrency_limit=1, max_size=MAX_VISITORS)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    try:
        socket.getaddrinfo(host, port)  # Gradio would ask for each of its ports
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size=int(max_upload * 1e6),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            state_session_capacity=MAX_VISITORS,
            theme=gradio.themes.Default(**fonts),
            app_kwargs={"middleware": [Middleware(WithPolicy)]},
        )
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve at {host}, port {port or 7860}: {error}") from error
    except ValueError:
        # Gradio's own look at the page, which a proxy or a busy machine may prevent.
        if not page.is_running:
            raise
    return page.local_url


def main(args: argparse.Namespace) -> None:
    check_package("gradio", "the page")
    if not LOWEST_SCORE <= args.confidence_threshold <= 1:
        raise UserError(
            f"--confidence-threshold is {args.confidence_threshold}, not in [{LOWEST_SCORE}, 1]"
        )
    if not args.max_upload > 0:
        raise UserError(f"--max-upload is {args.max_upload}, but has to be above 0")
    detector = load_detector(args, LOWEST_SCORE)
    use_font_for(tuple(detector.class_names))
    # Before the import: neither it nor what it imports reports its use.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    name = os.path.basename(os.path.normpath(args.model or args.config_file))
    page = build_page(detector, name, args.confidence_threshold)
    address = launch(page, args.host, args.port, args.max_upload)
    if args.host not in LOCAL:
        print(f"note: whoever can reach {args.host} can use the page")
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where the page can be reached: 0.0.0.0 for other machines (default: this one only)",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="default: the first that is free from 7860"
    )
    parser.add_argument(
        "--max-upload",
        type=float,
        default=20,
        metavar="MB",
        help="size of the largest image file (default: 20)",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="the threshold at the beginning (default: 0.5)",
    )
    add_detector_arguments(parser)
    return parser.parse_args()
