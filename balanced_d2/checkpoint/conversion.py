"""What the conversions of other projects' checkpoints share: names, shapes and the new file."""

import os
import re
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from balanced_d2.utils.errors import UserError, first_of
from balanced_d2.utils.files import check_writable, replacing

State = Dict[str, torch.Tensor]
Shapes = Dict[str, Tuple[int, ...]]
# Another project's names of modules, and those of Detectron2 or this project. {i} stands for a
# number, {i+2} and {2i} for numbers computed from it. The first rule that matches is used.
Rules = Tuple[Tuple[str, str], ...]

COCO_CLASSES = 80
NUM_SIZES = NUM_RATIOS = 3  # of RetinaNet's anchors at a location
NUM_ANCHORS = NUM_SIZES * NUM_RATIOS

# Of torchvision's ResNets, on which MMDetection's are modelled.
RESNET: Rules = (
    ("conv1", "stem.conv1"),
    ("bn1", "stem.conv1.norm"),
    ("layer{k}.{i}.conv{j}", "res{k+1}.{i}.conv{j}"),
    ("layer{k}.{i}.bn{j}", "res{k+1}.{i}.conv{j}.norm"),
    ("layer{k}.{i}.downsample.0", "res{k+1}.{i}.shortcut"),
    ("layer{k}.{i}.downsample.1", "res{k+1}.{i}.shortcut.norm"),
)


def below(theirs: str, ours: str, rules: Rules) -> Rules:
    """The rules for modules inside of others, which are named ``theirs`` and ``ours``."""
    return tuple((f"{theirs}.{before}", f"{ours}.{after}") for before, after in rules)


@dataclass(frozen=True)
class Recognised:
    """A model of another project, recognised by its tensors.

    Args:
        detector: its kind, such as ``"RetinaNet"``.
        num_classes: number of classes, without background.
    """

    project: ClassVar[str]  # its name, and that of its folder in configs/

    detector: str
    num_classes: int

    @property
    def config(self) -> str:
        """The file in the project's folder of ``configs/``."""
        raise NotImplementedError

    @property
    def options(self) -> List[str]:
        """``KEY VALUE`` pairs that the config also needs."""
        if self.num_classes == COCO_CLASSES:
            return []
        node = "RETINANET" if self.detector == "RetinaNet" else "ROI_HEADS"
        return [f"MODEL.{node}.NUM_CLASSES", str(self.num_classes)]


def state_dict_of(checkpoint: object, key: str = "state_dict") -> State:
    """The model's tensors from the content of a checkpoint file.

    Args:
        checkpoint: a state dict, or a dict with a state dict under ``key``. Names may have the
            prefix ``module.`` of distributed training.

    Returns:
        The tensors in float32, by the other project's names.

    Raises:
        UserError: if there are no such tensors.
    """
    state = checkpoint
    if isinstance(state, dict) and key in state:
        state = state[key]
    if not isinstance(state, dict) or not state:
        raise UserError("it contains no state dict")
    tensors = {}
    for name, tensor in dict.items(state):
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"it contains no state dict: {name!r} is not a tensor with a name")
        # Copied, because a view would later be saved together with the whole tensor behind it.
        tensors[name] = tensor.detach().to(torch.float32, copy=True).contiguous()
    if all(name.startswith("module.") for name in tensors):
        tensors = {name[len("module.") :]: tensor for name, tensor in tensors.items()}
    return tensors


def has_counters(state: State) -> bool:
    """Whether a model's batch norm counted batches, which a frozen one does not do."""
    return any(map(_is_counter, state))


def rename(state: State, rules: Rules, recognised: Recognised, expected: Shapes) -> State:
    """The tensors by the names, and in the order, of this project's model.

    Args:
        state: tensors by the other project's names; counters of batches are left out.
        recognised: the model, for messages.
        expected: this project's names, with the shapes that the tensors have to have.

    Raises:
        UserError: if tensors are missing, left over or of another shape.
    """
    backwards = tuple((theirs, ours) for ours, theirs in rules)
    new_names = {name: _translate(name, rules) for name in state if not _is_counter(name)}
    old_names = {new: old for old, new in new_names.items() if new is not None}
    problems = [
        *(
            f"{_translate(name, backwards) or name} is missing"
            for name in expected
            if name not in old_names
        ),
        *(
            f"{old} is left over"
            for old, new in new_names.items()
            if new not in expected or old_names[new] != old
        ),
        *(
            f"{old} has shape {tuple(state[old].shape)}, not {expected[new]}"
            for new, old in old_names.items()
            if new in expected and tuple(state[old].shape) != expected[new]
        ),
    ]
    if problems:
        raise UserError(f"it does not contain a {recognised}: {first_of(problems)}")
    return {name: state[old_names[name]] for name in expected}


def model_shapes(cfg: CfgNode) -> Shapes:
    """The names and shapes of the tensors of the model that a config describes."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"  # tensors without memory: only their shapes are needed
    with torch.device("meta"):
        model = build_model(cfg)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def sizes_before_ratios(per_anchor: torch.Tensor) -> torch.Tensor:
    """Reorder the anchors of a location from the other projects' order to Detectron2's.

    MMDetection and torchvision list all sizes for each ratio, Detectron2 all ratios for each size.

    Args:
        per_anchor: weight or bias of a layer, shape (9 * K, ...): K values per anchor.

    Returns:
        A tensor of the same shape.
    """
    grouped = per_anchor.reshape(NUM_RATIOS, NUM_SIZES, -1, *per_anchor.shape[1:])
    return grouped.transpose(0, 1).reshape(per_anchor.shape).contiguous()


def convert_file(
    source: str,
    output: str,
    checkpoint: object,
    recognise: Callable[[State], Recognised],
    convert: Callable[[State, Any, CfgNode], State],
    config_of: Callable[[str, List[str]], CfgNode],
    key: str = "state_dict",
) -> None:
    """Write the model of a checkpoint as one of this project, and print how to use it.

    Args:
        source: the name of the checkpoint.
        output: the new file.
        checkpoint: its content, for :func:`state_dict_of` with ``key``.
        recognise: what model its tensors are of.
        convert: the new tensors; the last argument is the config of the model.
        config_of: gives it, for the name of a file in ``configs/`` and further options.

    Raises:
        UserError: if it is no such checkpoint, or the new file cannot be written or would replace
            the old one.
    """
    if os.path.exists(source) and os.path.exists(output) and os.path.samefile(source, output):
        raise UserError(f"the output would replace the checkpoint {source}")
    check_writable(output)
    try:
        state = state_dict_of(checkpoint, key)
        recognised = recognise(state)
        config = f"{recognised.project}/{recognised.config}"
        converted = convert(state, recognised, config_of(config, recognised.options))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    print(f"recognised: {recognised}", flush=True)
    try:
        with replacing(output) as temporary:
            torch.save({"model": converted, "__author__": recognised.project}, temporary)
    except (OSError, RuntimeError) as error:  # PyTorch raises the second for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {output}: {reason}") from error
    size = os.path.getsize(output) / 1e6
    print(f"written: {output} ({len(converted)} tensors, {size:.1f} MB)")
    options = " ".join(["MODEL.WEIGHTS", output, *recognised.options])
    print(f"use it with: --config-file configs/{config} {options}")


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


# {i}, {2i} or {i+3} in a rule
_TERM = re.compile(r"\{(\d*)([a-z])\+?(\d*)\}")


def _translate(name: str, rules: Sequence[Tuple[str, str]]) -> Optional[str]:
    """The new name of a tensor by the first rule (template, template) that matches, if any."""
    module, _, parameter = name.rpartition(".")
    for template, other in rules:
        numbers = _match(template, module)
        if numbers is not None:
            return f"{_fill(other, numbers)}.{parameter}"
    return None


def _fill(template: str, numbers: Dict[str, int]) -> str:
    return _TERM.sub(
        lambda term: str(int(term[1] or 1) * numbers[term[2]] + int(term[3] or 0)), template
    )


def _match(template: str, module: str) -> Optional[Dict[str, int]]:
    """The number for each letter, if the name of a module matches a template."""
    literals = _TERM.split(template)[::4]
    match = re.fullmatch(r"(0|[1-9][0-9]*)".join(map(re.escape, literals)), module)
    if match is None:
        return None
    numbers = {}
    for (factor, letter, offset), digits in zip(_TERM.findall(template), match.groups()):
        numbers[letter], rest = divmod(int(digits) - int(offset or 0), int(factor or 1))
        if rest or numbers[letter] < 0:
            return None
    return numbers
