"""tools/convert_mmdet_weights.py on checkpoints with the names and shapes of MMDetection's."""

import argparse
import functools
import itertools
import json
import os
import pickle
import re
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from balanced_d2 import load_config
from balanced_d2.checkpoint import conversion, load_weights, mmdet
from balanced_d2.checkpoint.unpickle import Nothing, load_inert
from balanced_d2.utils.errors import UserError, report_user_errors

from .conftest import SHARED_DATA, load_tool, run_program

KEYS = SHARED_DATA / "mmdet_keys"
CONFIGS = "configs/MMDetection"
RETINANET = "libra-retinanet_r50_fpn_1x_coco"
FASTER_RCNN = "libra-faster-rcnn_r50_fpn_1x_coco"
GROUPED = "backbone.layer1.0.conv2.weight"
MODELS = {
    FASTER_RCNN: "libra_faster_rcnn_R_50_FPN_1x.yaml",
    "libra-faster-rcnn_r101_fpn_1x_coco": "libra_faster_rcnn_R_101_FPN_1x.yaml",
    "libra-faster-rcnn_x101-64x4d_fpn_1x_coco": "libra_faster_rcnn_X_101_64x4d_FPN_1x.yaml",
    RETINANET: "libra_retinanet_R_50_FPN_1x.yaml",
}


def state_dict(name, num_classes=80):
    """Tensors that differ from each other, by MMDetection's names."""
    if not KEYS.is_dir():
        pytest.skip("needs mmdet_keys in ../shared/data, which does not exist")
    of_classes = {81: num_classes + 1, 320: 4 * num_classes, 720: 9 * num_classes}
    state = OrderedDict()
    for key, shape in json.loads((KEYS / f"{name}.json").read_text()).items():
        if re.search(r"fc_cls|fc_reg|retina_cls", key):
            shape = [of_classes[shape[0]], *shape[1:]]
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(len(state))
        else:  # all values differ within the first axis, which the anchors are in
            rows = torch.arange(shape[0], dtype=torch.float32) / 1024 + len(state)
            state[key] = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)  # small in the file
    return state


class Runs:
    """What pickle calls a function for when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Other:
    """As the classes of other libraries: cannot be imported where the file is read."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Attributes(dict):
    """A dict of another library."""


class Items(list):
    """A list of another library."""


def beside(marker):
    """What may lie in a checkpoint beside the weights; two of them write the file ``marker``."""
    return {
        "meta": {
            "args": argparse.Namespace(lr=0.02, files=["a.jpg"]),
            "hook": functools.partial(int, base=2),
            "time": np.float64(3.5),
            "array": np.arange(3),
            "cfg": Attributes(a=Attributes(b=1)),
            "set": {1, 2, (3, 4)},
            "shape": torch.Size([2, 3]),
            "dtype": torch.float16,
            Other: "a class as a key",
        },
        "message_hub": Other(history=Items([1, 2, Other(x=1)]), array=np.zeros(2)),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{}]},
        "system": Runs(os.system, f"touch '{marker}'"),
        "eval": [Runs(eval, f"open({str(marker)!r}, 'w').close()")],
        "bytes": b"bytes",
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "was run"


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request):
    return functools.partial(torch.save, _use_new_zipfile_serialization=request.param)


def convert(source, output, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert_mmdet_weights.py", str(source), str(output)])
    tool = load_tool("convert_mmdet_weights")
    return report_user_errors(tool.main, tool.parse_args())


def original(name, tensor, is_retinanet):
    """The name and value in MMDetection of a converted tensor; not by the tool's table."""
    module, parameter = name.rsplit(".", 1)
    first = 3 if is_retinanet else 2
    if found := re.fullmatch(r"backbone\.bottom_up\.res(.)\.(\d+)\.(.+)", module):
        layer, block, rest = int(found[1]) - 1, found[2], found[3]
        is_norm = rest.endswith(".norm")
        if rest.startswith("shortcut"):
            rest = "downsample.1" if is_norm else "downsample.0"
        else:
            rest = f"bn{rest[4]}" if is_norm else rest
        module = f"backbone.layer{layer}.{block}.{rest}"
    elif module.startswith("backbone.bottom_up.stem"):
        module = "backbone.bn1" if module.endswith("norm") else "backbone.conv1"
    elif found := re.fullmatch(r"backbone\.fpn_(lateral|output)(\d)", module):
        kind = {"lateral": "lateral_convs", "output": "fpn_convs"}[found[1]]
        module = f"neck.0.{kind}.{int(found[2]) - first}.conv"
    elif module.startswith("backbone.top_block.p"):
        module = f"neck.0.fpn_convs.{int(module[-1]) - 3}.conv"
    elif module.startswith("backbone.balancer."):
        module = f"neck.1.{module[len('backbone.balancer.') :]}.conv"
    elif found := re.fullmatch(r"head\.(cls|bbox)_subnet\.(\d)", module):
        module = f"bbox_head.{found[1].replace('bbox', 'reg')}_convs.{int(found[2]) // 2}.conv"
    elif module in ("head.cls_score", "head.bbox_pred"):
        module = "bbox_head.retina_" + {"s": "cls", "p": "reg"}[module.split("_")[1][0]]
        per_anchor = tensor.chunk(9)
        tensor = torch.cat(
            [per_anchor[3 * size + ratio] for ratio in range(3) for size in range(3)]
        )
    else:
        module = {
            "proposal_generator.rpn_head.conv": "rpn_head.rpn_conv",
            "proposal_generator.rpn_head.objectness_logits": "rpn_head.rpn_cls",
            "proposal_generator.rpn_head.anchor_deltas": "rpn_head.rpn_reg",
            "roi_heads.box_head.fc1": "roi_head.bbox_head.shared_fcs.0",
            "roi_heads.box_head.fc2": "roi_head.bbox_head.shared_fcs.1",
            "roi_heads.box_predictor.cls_score": "roi_head.bbox_head.fc_cls",
            "roi_heads.box_predictor.bbox_pred": "roi_head.bbox_head.fc_reg",
        }[module]
    return f"{module}.{parameter}", tensor


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_converted_and_loads(name, tmp_path, marker, monkeypatch, capsys):
    state, output = state_dict(name), tmp_path / "made" / "converted.pth"
    torch.save({"state_dict": state, **beside(marker)}, tmp_path / "source.pth")
    assert convert(tmp_path / "source.pth", output, monkeypatch) == 0
    (tmp_path / "source.pth").unlink()
    assert not marker.exists()
    said = capsys.readouterr().out
    converted = torch.load(output, weights_only=True, mmap=True)
    assert converted["__author__"] == "MMDetection" and list(output.parent.iterdir()) == [output]
    expected = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert f"({len(expected)} tensors, " in said
    assert f"--config-file {CONFIGS}/{MODELS[name]} MODEL.WEIGHTS {output}\n" in said

    back = dict(original(k, v, name == RETINANET) for k, v in converted["model"].items())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())

    cfg = load_config(f"{CONFIGS}/{MODELS[name]}", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    model.to_empty(device="cpu")
    load_weights(model, str(output))  # refuses what is missing, left over or of another shape
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in converted["model"].items())
    output.unlink()


@pytest.mark.parametrize(
    "name, options",
    [
        (FASTER_RCNN, ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]),
        (RETINANET, ["MODEL.RETINANET.NUM_CLASSES", "3"]),
    ],
)
def test_other_classes_prefix_and_half_precision(name, options):
    """A bare state dict of a model that was fine-tuned on several GPUs."""
    state = state_dict(name, num_classes=3)
    source = {f"module.{k}": v.half() if v.dim() else v for k, v in state.items()}
    tensors = conversion.state_dict_of(source)
    recognised = mmdet.recognise(tensors)
    assert recognised.config == MODELS[name] and recognised.options == options
    cfg = load_config(f"{CONFIGS}/{recognised.config}", recognised.options)
    converted = mmdet.convert(tensors, recognised, cfg)
    assert {v.dtype for v in converted.values()} == {torch.float32}
    for key, value in converted.items():
        old_name, value = original(key, value, name == RETINANET)
        assert torch.equal(value, state[old_name].half().float())


def test_parts_of_large_tensors_are_written_alone():
    large = torch.zeros(1000, 3)
    (tensor,) = conversion.state_dict_of({"a.weight": large[0]}).values()
    assert tensor.untyped_storage().nbytes() == 12


def test_each_anchor_keeps_its_outputs():
    """MMDetection's anchors, by plain loops in its order, against those of the built model."""
    cfg = load_config(f"{CONFIGS}/{MODELS[RETINANET]}", ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    strides = [8, 16, 32, 64, 128]
    theirs = []
    for stride in strides:
        cells = []
        for ratio, scale in itertools.product((0.5, 1.0, 2.0), range(3)):
            side = stride * 4 * 2 ** (scale / 3)
            width, height = side / ratio**0.5, side * ratio**0.5
            cells.append([-width / 2, -height / 2, width / 2, height / 2])
        theirs.append(torch.tensor(cells))
    ours = list(model.anchor_generator.cell_anchors)
    assert not torch.allclose(ours[0], theirs[0])  # the orders do differ
    num_classes = 80
    weight = torch.randn(9 * num_classes, 4)
    x = torch.randn(4)
    logits = {"theirs": weight @ x, "ours": conversion.sizes_before_ratios(weight) @ x}
    per_anchor = {key: value.view(9, num_classes) for key, value in logits.items()}
    for level in range(len(strides)):
        for i, anchor in enumerate(theirs[level]):
            (j,) = (ours[level] - anchor).abs().amax(dim=1).lt(1e-3).nonzero().flatten().tolist()
            assert torch.equal(per_anchor["ours"][j], per_anchor["theirs"][i])


def test_pickled_code_is_not_run(save, marker, tmp_path):
    content = {"state_dict": {"a": torch.arange(4.0)}, **beside(marker)}
    save(content, tmp_path / "file.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pth", weights_only=True)
    read = load_inert(str(tmp_path / "file.pth"))
    assert not marker.exists()
    assert read["state_dict"]["a"].tolist() == [0, 1, 2, 3]
    assert read["optimizer"]["state"][0]["momentum_buffer"].tolist() == [1, 1, 1]
    assert read["parameter"].tolist() == [1, 1]
    assert (read["meta"]["shape"], read["meta"]["dtype"]) == ((2, 3), torch.float16)
    stand_ins = read["meta"]["args"], read["message_hub"], read["system"], read["eval"][0]
    assert {type(stand_in) for stand_in in stand_ins} == {Nothing}

    torch.load(tmp_path / "file.pth", weights_only=False)  # the trap does work
    assert marker.exists()


def test_a_pickle_cannot_change_pytorch(tmp_path):
    """By setting attributes of a function that it may name."""
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    state = b"(N(S'__defaults__'\n(I1\ntdt"  # (None, {"__defaults__": (1,)})
    (tmp_path / "file.pth").write_bytes(b"ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b.")
    with pytest.raises(UserError, match="magic number"):
        load_inert(str(tmp_path / "file.pth"))
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def drop(state, *names):
    for name in names:
        del state[name]


@pytest.mark.parametrize(
    "change, parts",
    {
        "no Libra": (
            lambda state: drop(state, *[k for k in state if k.startswith("neck.1")]),
            ["plain Faster R-CNN, not a Libra model", "neck.1.refine"],
        ),
        "missing": (
            lambda state: drop(
                state,
                "rpn_head.rpn_cls.bias",
                "backbone.layer3.4.bn2.bias",
                "neck.1.refine.g.conv.bias",
            ),
            [
                "rpn_head.rpn_cls.bias is missing",
                "backbone.layer3.4.bn2.bias is missing",
                "neck.1.refine.g.conv.bias is missing",
            ],
        ),
        "left over": (
            lambda state: state.update(
                {f"mask_head.convs.{i}.bias": torch.ones(1) for i in "01234"}
            ),
            ["mask_head.convs.0.bias is left over", "and 2 more"],
        ),
        "shape": (
            lambda state: state.update({"neck.0.fpn_convs.0.conv.bias": torch.ones(128)}),
            ["neck.0.fpn_convs.0.conv.bias has shape (128,), not (256,)"],
        ),
        "agnostic": (
            lambda state: state.update({"roi_head.bbox_head.fc_reg.bias": torch.ones(4)}),
            ["roi_head.bbox_head.fc_reg.bias has shape (4,), not (320,)"],
        ),
        "groups": (
            lambda state: state.update({GROUPED: torch.ones(128, 4, 3, 3)}),
            ["no config for a Libra Faster R-CNN X-50-32x4d", "X-101-64x4d"],
        ),
        "depth": (
            lambda state: state.update({"backbone.layer3.35.conv1.weight": torch.ones(1)}),
            ["its backbone is no ResNet", "7 blocks"],
        ),
        "other detector": (
            lambda state: drop(state, *[k for k in state if "bbox_head" in k]),
            ["holds no Faster R-CNN and no RetinaNet", "bbox_head.retina_cls.bias"],
        ),
        "no classes": (
            lambda state: state.update({"roi_head.bbox_head.fc_cls.bias": torch.tensor(1.0)}),
            ["a Faster R-CNN that has no classes"],
        ),
        "twice": (
            lambda state: state.update({"neck.0.fpn_convs.00.conv.bias": torch.ones(256)}),
            ["neck.0.fpn_convs.00.conv.bias is left over"],
        ),
        "not tensors": (lambda state: state.update(epoch=3), ["'epoch' is not a tensor"]),
    }.values(),
)
def test_what_does_not_fit_is_named(change, parts):
    state = state_dict(FASTER_RCNN)
    change(state)
    with pytest.raises(UserError) as told:
        tensors = conversion.state_dict_of(state)
        recognised = mmdet.recognise(tensors)
        cfg = load_config(f"{CONFIGS}/{recognised.config}", recognised.options)
        mmdet.convert(tensors, recognised, cfg)
    assert all(part in str(told.value) for part in parts), told.value


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.save({"state_dict": {"a": torch.ones(1)}}, folder / "other.pth")
    torch.save({"model": {"a": torch.ones(1)}}, folder / "model.pth")
    torch.save([torch.ones(1)], folder / "list.pth")
    torch.save({"state_dict": {}}, folder / "empty.pth")
    torch.save({"state_dict": Other()}, folder / "stand_in.pth")
    data = (folder / "other.pth").read_bytes()
    (folder / "cut.pth").write_bytes(data[: len(data) // 2])
    (folder / "text.pth").write_text("not a checkpoint")
    (folder / "nothing.pth").write_bytes(b"")
    torch.jit.save(torch.jit.trace(lambda x: x + 1, torch.zeros(1)), str(folder / "script.pth"))
    return folder


@pytest.mark.parametrize(
    "source, output, parts",
    {
        "no file": ("none.pth", "out.pth", ["there is no file", "none.pth"]),
        "folder": ("", "out.pth", ["there is no file"]),
        "text": ("text.pth", "out.pth", ["text.pth is not a PyTorch checkpoint"]),
        "nothing": ("nothing.pth", "out.pth", ["nothing.pth is not a PyTorch checkpoint"]),
        "cut": ("cut.pth", "out.pth", ["cut.pth is not a PyTorch checkpoint, or is damaged"]),
        "TorchScript": ("script.pth", "out.pth", ["script.pth is a TorchScript model"]),
        "list": ("list.pth", "out.pth", ["list.pth: it contains no state dict"]),
        "empty": ("empty.pth", "out.pth", ["empty.pth: it contains no state dict"]),
        "stand-in": ("stand_in.pth", "out.pth", ["stand_in.pth: it contains no state dict"]),
        "Detectron2's": ("model.pth", "out.pth", ["'model' is not a tensor"]),
        "other model": ("other.pth", "out.pth", ["other.pth: it holds no Faster R-CNN"]),
        "output below a file": ("other.pth", "text.pth/out.pth", ["cannot write to the folder"]),
        "output is the input": ("other.pth", "other.pth", ["would replace the checkpoint"]),
    }.values(),
)
def test_wrong_files(source, output, parts, files, tmp_path, monkeypatch, capsys):
    output = tmp_path / output if output == "out.pth" else files / output
    assert convert(files / source, output, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in parts), said
    assert not list(tmp_path.iterdir())


def test_output_that_is_a_folder(tmp_path, monkeypatch, capsys):
    torch.save(state_dict(RETINANET), tmp_path / "source.pth")
    (tmp_path / "out.pth").mkdir()
    assert convert(tmp_path / "source.pth", tmp_path / "out.pth", monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write") and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source.pth", "out.pth"}


def test_program(tmp_path):
    torch.save(state_dict(RETINANET, num_classes=2), tmp_path / "source.pth")
    result = run_program(
        "tools/convert_mmdet_weights.py", tmp_path / "source.pth", tmp_path / "out.pth"
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    size = (tmp_path / "out.pth").stat().st_size
    assert result.stdout.splitlines() == [
        "recognised: Libra RetinaNet, R-50, 2 classes",
        f"written: {tmp_path}/out.pth (309 tensors, {size / 1e6:.1f} MB)",
        f"use it with: --config-file {CONFIGS}/{MODELS[RETINANET]} MODEL.WEIGHTS "
        f"{tmp_path}/out.pth MODEL.RETINANET.NUM_CLASSES 2",
    ]
