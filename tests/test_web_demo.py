"""The page of tools/web_demo.py: what it shows, over HTTP, and in a real browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from detectron2.engine import DefaultPredictor
from PIL import Image

from balanced_d2 import Detector, load_config
from balanced_d2.analysis.features import balance_levels
from balanced_d2.checkpoint import BalancedCheckpointer
from balanced_d2.commands import web_demo
from balanced_d2.utils.errors import UserError

from .conftest import (
    ROOT,
    TINY_CONFIG,
    TINY_MODEL,
    assert_user_error,
    chromium,
    run_program,
    wait_for,
)

PLAIN = ("MODEL.BALANCED_FPN.ENABLED", "False")


def save_training(folder, *options):
    """A training with random weights, whose scores are near 1/3."""
    options = [*TINY_MODEL, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", *options]
    cfg = load_config(str(ROOT / TINY_CONFIG), [*options, "DATASETS.TEST", "()"])
    cfg.MODEL.WEIGHTS = ""
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    checkpointer = BalancedCheckpointer(
        DefaultPredictor(cfg).model, str(folder), class_names=["bright", "dark"]
    )
    checkpointer.save("model_final", iteration=1)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_training(tmp_path_factory.mktemp("web") / "mine")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)
    return path


# What it shows


def test_what_is_found_and_drawn(trained, photo):
    detector = Detector.load(trained, threshold=web_demo.LOWEST_SCORE)
    finding = web_demo.find(detector, str(photo))
    assert finding.detections.scores.tolist() == detector(photo).scores.tolist()
    assert np.array_equal(finding.image, cv2.imread(str(photo))[:, :, ::-1])
    assert finding.features.ndim == 3 and finding.features.std() > 10 and not finding.why_not

    scores = finding.detections.scores
    middle = float(scores.median())
    picture, text = web_demo.draw(detector, finding, middle)
    assert text == f"{(scores > middle).sum()} of {len(scores)} detections"
    assert max(picture.shape) == pytest.approx(web_demo.PICTURE_SIDE, abs=1)
    nothing, text = web_demo.draw(detector, finding, 1.0)
    assert text.startswith("0 of ") and (nothing != picture).any()


def test_levels_are_recorded_while_the_detector_runs(trained, photo):
    """The same as of a run for them alone."""
    detector = Detector.load(trained)
    cfg = load_config(str(trained / "config.yaml"))
    predictor = DefaultPredictor(cfg)
    predictor.model.load_state_dict(detector.model.state_dict())
    wanted = balance_levels(predictor, detector.read(photo))
    with web_demo.recorded_levels(detector.model) as levels:
        detector(photo)
    assert len(levels) == 5
    for level, other in zip(levels, wanted):
        assert level[:2] == other[:2]
        for norms, expected in zip(level[2:], other[2:]):
            np.testing.assert_allclose(norms, expected, rtol=1e-4)


def test_models_without_balanced_features(tmp_path, photo):
    detector = Detector.load(save_training(tmp_path / "plain", *PLAIN))
    finding = web_demo.find(detector, str(photo))
    assert finding.features is None and len(finding.detections) > 0
    text = web_demo.draw(detector, finding, 0)[1]
    assert "no features: the model has no balanced feature pyramid" in text
    detector.model = None  # as of an exported file
    assert "exported file" in web_demo.find(detector, str(photo)).why_not


def test_images_that_are_too_large(trained, tmp_path):
    detector = Detector.load(trained)
    Image.new("1", (10000, 5001)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="large.png has 50 megapixels, and this page takes 50"):
        web_demo.find(detector, str(tmp_path / "large.png"))


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--confidence-threshold", "0"], ["--confidence-threshold is 0.0, not in [0.05, 1]"]),
        (["--max-upload", "0"], ["--max-upload is 0.0"]),
        ([], ["either --model or --config-file"]),
        (["--model", "nowhere"], ["nowhere"]),
    ],
)
def test_arguments(arguments, parts, run_here, monkeypatch):
    monkeypatch.setattr(web_demo, "check_package", lambda *names: None)
    assert_user_error(run_here("tools/web_demo.py", *arguments), *parts)


def test_gradio_is_missing(run_here, monkeypatch):
    monkeypatch.setattr("balanced_d2.utils.errors.importlib.util.find_spec", lambda name: None)
    result = run_here("tools/web_demo.py", "--model", "x")
    assert_user_error(result, "the page needs the package gradio; run: pip install gradio")


# Over HTTP


@contextmanager
def served(*arguments):
    """The page of the command, in a process of its own; gives its address."""
    pytest.importorskip("gradio", reason="needs the package gradio")
    command = [sys.executable, "-W", "ignore", "-m", "balanced_d2", "web-demo", *arguments]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        yield re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+/) \(Ctrl-C.*\n", line)[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(trained):
    with served("--model", trained, "--max-upload", "0.05") as address:
        yield address


@pytest.mark.slow
def test_over_http(address, photo, tmp_path):
    from gradio_client import Client, handle_file  # comes with gradio

    client = Client(address, verbose=False, download_files=str(tmp_path / "files"))
    detections, features, text = client.predict(handle_file(str(photo)), 0.05, api_name="/detect")
    assert re.fullmatch(r"(\d+) of \1 detections", text)
    for path in (detections, features):
        assert max(cv2.imread(path).shape) > 300

    (tmp_path / "text.jpg").write_text("no picture")
    *pictures, text = client.predict(
        handle_file(str(tmp_path / "text.jpg")), 0.5, api_name="/detect"
    )
    assert pictures == [None, None]
    assert text == (
        "error: cannot read the image text.jpg: it is not an image in a format that Pillow reads"
    )

    (tmp_path / "large.bmp").write_bytes(bytes(60_000))
    with pytest.raises(Exception, match="(?i)size|413"):
        client.predict(handle_file(str(tmp_path / "large.bmp")), 0.5, api_name="/detect")


@pytest.mark.slow
def test_the_page_is_kept_from_other_addresses(address):
    with urllib.request.urlopen(address) as response:
        policy = response.headers["Content-Security-Policy"]
        page = response.read().decode()
    assert policy.startswith("default-src 'self'") and "http" not in policy
    for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", page):
        assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//(?!127\.0\.0\.1)", tag), tag


@pytest.mark.slow
def test_nothing_is_reported(trained, photo):
    """Neither the start nor a detection opens a connection to anything but this machine."""
    pytest.importorskip("gradio", reason="needs the package gradio")
    program = f"""
import socket, sys, types
asked = []
def hook(event, args):
    if event == "socket.connect" and args[0].family != socket.AF_UNIX:
        asked.append(args[1][0])
    elif event == "socket.getaddrinfo":
        asked.append(args[0])
sys.addaudithook(hook)
from balanced_d2.commands import web_demo
sys.argv = ["web_demo", "--model", {str(trained)!r}]
class Ended:
    def wait(self):
        from gradio_client import Client, handle_file
        client = Client(web_demo.ADDRESS, verbose=False)
        client.predict(handle_file({str(photo)!r}), 0.1, api_name="/detect")
        raise KeyboardInterrupt
launch = web_demo.launch
def remember(*args):
    web_demo.ADDRESS = launch(*args)
    return web_demo.ADDRESS
web_demo.launch = remember
web_demo.threading = types.SimpleNamespace(Event=Ended)
web_demo.main(web_demo.parse_args())
print("asked:", sorted({{str(host) for host in asked}}))
"""
    result = run_program("-W", "ignore", "-c", program)
    assert result.returncode == 0, result.stderr
    hosts = re.search(r"asked: \[(.*)\]", result.stdout)[1]
    assert set(hosts.replace("'", "").split(", ")) <= {"127.0.0.1", "localhost", "0.0.0.0", "::1"}


@pytest.mark.slow
def test_addresses_that_cannot_be_used(trained, run_here):
    pytest.importorskip("gradio", reason="needs the package gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_here("tools/web_demo.py", "--model", trained, "--port", port)
        assert_user_error(result, f"cannot serve at 127.0.0.1, port {port}")
    result = run_here("tools/web_demo.py", "--model", trained, "--host", "no host")
    assert_user_error(result, "cannot serve at no host, port 7860")


@pytest.mark.slow
def test_gradio_cannot_look_at_the_page(trained, monkeypatch):
    """Through a proxy, or because the machine is busy: it is served all the same."""
    gradio = pytest.importorskip("gradio", reason="needs the package gradio")
    monkeypatch.setattr(gradio.networking, "url_ok", lambda url: False)
    page = web_demo.build_page(Detector.load(trained), "mine")
    address = web_demo.launch(page, "127.0.0.1", None, 20)
    try:
        with urllib.request.urlopen(address) as response:
            assert b"balanced_d2: mine" in response.read()
    finally:
        page.close(verbose=False)


# In a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.mark.slow
def test_in_a_browser(address, browser, photo, tmp_path):
    def find(selector):
        return wait_for(lambda: browser.find_elements("css selector", selector))[0]

    def text():
        return find("#text textarea, #text input").get_attribute("value")

    def sources():
        """Addresses of the two pictures."""
        return [find(f"#{part} img").get_attribute("src") for part in ("detections", "features")]

    browser.get(address)
    find("input[type=file]").send_keys(str(photo))
    wait_for(lambda: text().startswith("0 of "))
    shown, number = sources(), int(text().split()[2])
    for part in ("detections", "features"):
        width = wait_for(lambda part=part: find(f"#{part} img").get_property("naturalWidth"))
        assert width > 300
    left, right = find("#detections").rect, find("#features").rect
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]  # side by side

    # The threshold changes the detections only.
    slider = find("#threshold input[type=range]")
    browser.execute_script(
        "arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        slider,
    )
    wait_for(lambda: text() == f"{number} of {number} detections")
    wait_for(lambda: sources()[0] != shown[0])
    assert sources()[1] == shown[1]

    # Another file, which is no image.
    (tmp_path / "text.png").write_text("no picture")
    find("button[aria-label='Remove this file'], button[aria-label='Clear']").click()
    wait_for(lambda: not browser.find_elements("css selector", "#detections img"))
    find("input[type=file]").send_keys(str(tmp_path / "text.png"))
    wait_for(lambda: text().startswith("error: cannot read the image text.png"))

    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        request["params"]["request"]["url"]
        for request in requests
        if request["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    for url in asked:
        assert re.match(rf"{address}|data:|blob:|chrome", url), url
