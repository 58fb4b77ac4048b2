"""AOTInductor packages, and exported files from C++."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from balanced_d2 import Detector, export
from balanced_d2.export import run_exported
from balanced_d2.export.aoti import COMPILER_OPTIONS, COMPILERS
from balanced_d2.export.batched import PaddedDeployable
from balanced_d2.export.forwards import computed_by, constant_padding, symmetric_padding
from balanced_d2.export.program import export_padded_program, export_program
from balanced_d2.export.transposed_conv import convolve_transposed
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_CONFIG, assert_user_error
from .test_export import ARCHITECTURES, small_model, smooth_image
from .test_export_program import OPTIONS, SMALLEST, assert_equal, stored

METADATA = {
    **{
        "format_version": 2,
        "input_format": "BGR",
        "class_names": ["a", 'b "é"', "c", *map(str, range(2000))],
    },
    **{"min_size": 96, "max_size": 200, "gray_range": 0},
}
OUTPUTS = {
    "torchscript": ["boxes", "classes", "scores", "image_size"],
    "aoti": ["num_detections", "boxes", "scores", "classes"],
}
# Numbers of images, heights and widths; in the last ones, levels have a single position.
SIZES = [(1, 97, 211), (2, 64, 96), (1, 300, 400), (3, 1, 65), (2, 31, 64), SMALLEST]
has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler"
)


def described(format):
    return {**METADATA, "format": format, "outputs": OUTPUTS[format]}


def padded(detect, fill=0.0):
    """A function of padded images as one of images of one size."""

    def run(images):
        height, width = images.shape[2:]
        padding = (0, -width % 32, 0, -height % 32)
        sizes = torch.tensor([[height, width]] * len(images))
        return detect(F.pad(images, padding, value=fill), sizes)

    return run


def assert_sizes_go_together(model, detect):
    """Images of several sizes, at most ``model``'s padding of all of them."""
    images = [smooth_image(90, 61, seed=1), smooth_image(33, 128, seed=2)]
    batch = torch.full((2, 3, 96, 128), 99.0)
    for place, image in zip(batch, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    sizes = torch.tensor([image.shape[1:] for image in images])
    with torch.no_grad():
        expected = model([{"image": image} for image in images])
        numbers, boxes, scores, classes = detect(batch, sizes)
    for i, output in enumerate(expected):
        instances = output["instances"]
        used = slice(int(numbers[i]))
        assert len(instances) == numbers[i] > 0
        torch.testing.assert_close(boxes[i, used], instances.pred_boxes.tensor, rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i, used], instances.scores, rtol=0, atol=1e-5)
        assert torch.equal(classes[i, used], instances.pred_classes)


@pytest.mark.parametrize("name", ["plain", "RetinaNet", "cascade with masks"])
def test_padded_images_equal_single_ones(name):
    model = small_model(*ARCHITECTURES.get(name, []))
    deployable = PaddedDeployable(model)
    assert deployable.multiple == 32
    assert assert_equal(model, padded(deployable, fill=99.0), (2, 97, 150)) > 10
    assert_equal(model, padded(deployable), SMALLEST)


def test_padded_images_of_several_sizes():
    model = small_model()
    assert_sizes_go_together(model, PaddedDeployable(model))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A model and its package, which takes two minutes to compile."""
    model = small_model()
    path = str(tmp_path_factory.mktemp("aoti") / "model.aoti.pt2")
    export.export_aoti(model, smooth_image(120, 140, seed=1), path, described("aoti"))
    return model, path


@pytest.mark.slow
@has_compiler
def test_package_equals_the_model(package):
    model, path = package
    detect = torch._inductor.aoti_load_package(path)
    for batch in SIZES:
        assert assert_equal(model, padded(detect, fill=99.0), batch) > 0
    assert_sizes_go_together(model, detect)


class OfBoxes(torch.nn.Module):
    """A transposed convolution of as many boxes as are valid."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.up = torch.nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.predictor = torch.nn.Conv2d(8, 3, 1)

    def forward(self, boxes, valid):
        x = boxes[valid.nonzero()[:, 0]]
        return self.predictor(convolve_transposed(self.up, self.conv(x).relu()).relu())


@pytest.mark.slow
@has_compiler
def test_convolutions_of_boxes_are_compiled_right(tmp_path):
    """AOTInductor gives other values, without a word, for transposed ones that are left as they
    are, and for all with its own options."""
    torch.manual_seed(0)
    model = OfBoxes().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        example = (torch.randn(8, 8, 14, 14), torch.rand(8) > 0.5)
        program = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch}))
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(
            program, package_path=path, inductor_configs=dict(COMPILER_OPTIONS)
        )
        detect = torch._inductor.aoti_load_package(path)
        for number in (8, 13):
            boxes, valid = torch.randn(number, 8, 14, 14), torch.rand(number) > 0.3
            expected = model.predictor(model.up(model.conv(boxes[valid]).relu()).relu())
            torch.testing.assert_close(detect(boxes, valid), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_mask_heads_have_no_transposed_convolutions():
    model = small_model(*ARCHITECTURES["masks"])
    program = export_padded_program(model, smooth_image(120, 140, seed=1))
    assert "forward" not in vars(model.roi_heads.mask_head.deconv)
    names = [str(node.target) for node in program.graph.nodes]
    assert any("pixel_shuffle" in name for name in names)
    assert not any("conv_transpose" in name for name in names)


@pytest.mark.slow
def test_levels_are_pooled_as_multiples_of_each_other():
    """All but the coarsest, as in the program of images of any size; in windows of sizes that
    are computed they would take far longer."""
    model, image = small_model(), smooth_image(120, 140, seed=1)
    programs = export_padded_program(model, image), export_program(model, image)
    of_padded, of_any = (
        sum(node.target is torch.ops.aten.amax.default for node in program.graph.nodes)
        for program in programs
    )
    assert of_padded == of_any > 0


@pytest.mark.parametrize("size, stride, dilation", [(3, 2, 1), (5, 2, 1), (4, 1, 1), (3, 2, 2)])
def test_convolutions_pad_equally_at_both_ends(size, stride, dilation):
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    conv = Conv2dSame(4, 6, size, stride, dilation=dilation, groups=2)
    model = torch.nn.Sequential(conv)
    x = torch.randn(2, 4, 12, 18)
    with torch.no_grad():
        expected = model(x)
        for forwards in (constant_padding(model), symmetric_padding(model)):
            assert set(forwards) <= {conv}
            with computed_by(forwards):
                torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    assert bool(symmetric_padding(model)) == (dilation == 1)


@pytest.mark.slow
def test_levels_may_have_a_single_position():
    model = small_model(*ARCHITECTURES["RetinaNet"])
    program = export_padded_program(model, smooth_image(120, 140, seed=1))
    assertions = [
        node.args[1]
        for node in program.graph.nodes
        if node.target is torch.ops.aten._assert_scalar.default
    ]
    assert assertions and not any("Ne(" in text for text in assertions)


# Each takes minutes to compile: `make soak`.
@pytest.mark.slow
@has_compiler
@pytest.mark.skipif(not os.environ.get("EXPORT_IMAGES"), reason="EXPORT_IMAGES is not set")
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "masks and keypoints"])
def test_packages_of_other_models(name, tmp_path):
    model = small_model(*OPTIONS[name])
    path = str(tmp_path / "model.pt2")
    export.export_aoti(model, smooth_image(120, 140, seed=1), path, described("aoti"))
    detect = padded(torch._inductor.aoti_load_package(path), fill=99.0)
    # timm's has so many layers that their rounding adds up to 1.6e-5 in a score.
    kind = "onnx" if name == "timm" else "tracing"
    for batch in SIZES:
        assert assert_equal(model, detect, batch, kind) > 0


@pytest.mark.slow
@has_compiler
def test_package_is_loaded_by_torch_alone(package, tmp_path):
    """And run on a picture, and by a detector; its metadata tell it from a program."""
    _, path = package
    metadata = json.loads(stored(path))
    assert metadata == {**described("aoti"), "size_divisibility": 32}
    program = f"""
import sys, torch, torchvision
found = torch._inductor.aoti_load_package({path!r})(
    torch.zeros(1, 3, 64, 96), torch.tensor([[50, 90]])
)
assert [tuple(output.shape) for output in found] == [(1,), (1, 100, 4), (1, 100), (1, 100)]
assert not {{"detectron2", "balanced_d2"}} & set(sys.modules)
"""
    environment = {**os.environ, "PATH": "", "CXX": "/nowhere"}  # no compiler
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()
    pixels = smooth_image(150, 221).permute(1, 2, 0).numpy()
    found = Detector.load(path, threshold=0)(pixels)
    outputs = run_exported.ExportedDetector(path)(
        run_exported.ExportedDetector.preprocess(
            Loaded(metadata), Image.fromarray(pixels[:, :, ::-1])
        )
    )
    assert len(found) == len(outputs["scores"]) > 0
    np.testing.assert_array_equal(found.scores, outputs["scores"])
    small = run_exported.ExportedDetector(path)(smooth_image(30, 40).float().numpy())
    assert len(small["scores"]) > 0


class Loaded(run_exported.ExportedDetector):
    """Only what describes a file."""

    def __init__(self, metadata):
        self.metadata = metadata


def test_without_a_compiler(run_here, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(UserError, match="needs a C.. compiler, and there is no /nowhere/c.."):
        export.export_aoti(small_model(), smooth_image(64, 64), str(tmp_path / "m.pt2"), {})
    torch.save({"model": {}}, tmp_path / "model.pth")
    result = run_here(
        *("tools/export_model.py", "--config-file", TINY_CONFIG, "--format", "aoti"),
        *("--output", tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "model.pth"),
    )
    assert_user_error(result, "needs a C++ compiler", "--format pt2")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The one of examples/cpp."""
    if not shutil.which("cmake"):
        pytest.skip("there is no CMake")
    build = tmp_path_factory.mktemp("cpp")
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    for command in (
        ["cmake", "-S", ROOT / "examples/cpp", "-B", build, python],
        ["cmake", "--build", build],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return build / "detect"


@pytest.mark.slow
@has_compiler
def test_detection_from_cpp(program, package, tmp_path):
    """Both kinds of files, as tools/run_exported.py detects with them."""
    model, aoti = package
    script = str(tmp_path / "model.ts")
    export.export_torchscript(
        model, smooth_image(120, 140, seed=1), script, described("torchscript")
    )
    photo = tmp_path / "photo.png"
    Image.fromarray(smooth_image(150, 221).permute(1, 2, 0).numpy()).save(photo)
    for path in (script, aoti):
        result = subprocess.run([program, path, photo], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert_same(json.loads(result.stdout), *detected(path, photo))


def sizes(image):
    """A detector whose scores are the height and width of its input, as parts of 10,000."""
    sides = torch.stack([torch.ones_like(image[0, :, 0]).sum(), torch.ones_like(image[0, 0]).sum()])
    boxes = torch.tensor([[-5.0, 0.25, 99999.0, 0.5], [0.0, 0.0, 0.5, 0.5], [-9.0, 0.0, -1.0, 0.5]])
    return boxes, torch.tensor([0, 1, 1]), sides[[0, 1, 1]] / 10000, sides.long()


@pytest.mark.slow
@has_compiler
def test_inputs_and_outputs_from_cpp(program, tmp_path):
    """Images are scaled, and boxes scaled back, as by tools/run_exported.py; what cannot be read
    stops no others."""
    described = {**METADATA, "format": "torchscript", "min_size": 800, "max_size": 1333}
    described["outputs"] = export.output_names()
    traced = torch.jit.trace(sizes, torch.zeros(3, 20, 30))
    for name, changes in (("model.ts", {}), ("newer.ts", {"format_version": 99})):
        stored = {"balanced_d2.json": json.dumps({**described, **changes})}
        torch.jit.save(traced, str(tmp_path / name), _extra_files=stored)
    # Of 611 x 1222, other arithmetic than Detectron2's makes 667 x 1333.
    pixels = {(611, 1222): (666, 1333), (1, 3000): (1, 1333), (90, 40): (1333, 592)}
    photos = [tmp_path / f"{height}.png" for height, _ in pixels]
    for photo, (height, width) in zip(photos, pixels):
        Image.new("RGB", (width, height)).save(photo)
    photos.append(tmp_path / "animated.gif")  # of which the first image is taken
    frames = [Image.new("RGB", (60, 40), color) for color in ("red", "blue")]
    frames[0].save(photos[-1], save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.full((40, 60), 999, np.uint16)).save(tmp_path / "deep.png")
    result = subprocess.run(
        [program, tmp_path / "model.ts", tmp_path / "text.png", tmp_path / "deep.png", *photos],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and f"error: {tmp_path / 'text.png'}: " in result.stderr
    assert f"error: {tmp_path / 'deep.png'}: it has more than 8 bits a channel" in result.stderr
    found = list(map(json.loads, result.stdout.splitlines()))
    expected = detected(tmp_path / "model.ts", *photos)
    for record, other, scaled in zip(found, expected, [*pixels.values(), (800, 1200)], strict=True):
        scores = [detection["score"] for detection in record["detections"]]
        assert [round(10000 * score) for score in scores] == list(scaled)
        assert_same(record, other)
    result = subprocess.run([program, photos[0], photos[0]], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: ")
    newer = [program, tmp_path / "newer.ts", photos[0]]
    result = subprocess.run(newer, capture_output=True, text=True)
    assert result.returncode == 1 and "newer" in result.stderr and not result.stdout


def detected(path, *photos):
    command = [sys.executable, run_exported.__file__, path, *photos, "--threshold", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(map(json.loads, result.stdout.splitlines()))


def assert_same(found, expected):
    assert [found[key] for key in ("image", "height", "width")] == [
        expected[key] for key in ("image", "height", "width")
    ]
    found, expected = found["detections"], expected["detections"]
    assert len(found) == len(expected) > 0
    assert {d["class"] for d in found} <= set(METADATA["class_names"])
    # Scaling may round a pixel in another way, which moves detections a little: the best are same.
    for one, other in zip(found[:5], expected[:5]):
        assert one["class_id"] == other["class_id"] and one["class"] == other["class"]
        np.testing.assert_allclose(one["bbox"], other["bbox"], rtol=0, atol=0.5)
        assert abs(one["score"] - other["score"]) < 0.01
