"""What a checkpoint of another detector gives to a model: what fits, and classes by their names."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Collection, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import detectron2.data.datasets  # noqa: F401  # registers COCO's names
import torch
import yaml
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from balanced_d2.utils.errors import UserError

State = Mapping[str, torch.Tensor]

CLASS_NAMES = "class_names"  # the key of a checkpoint
COCO = "coco_2017_val"
# Of Detectron2's and Detectron's files with weights, whose detectors of 80 classes are COCO's.
ZOOS = ("Detectron2 Model Zoo", "Caffe2")

# What begins with the first belongs to the second; the first row that fits counts. In the order
# of the report.
PARTS = (
    ("backbone.bottom_up.", "backbone"),
    ("backbone.fpn_", "pyramid"),
    ("backbone.top_block.", "pyramid"),
    ("backbone.balancer.", "balancer"),
    ("backbone.", "backbone"),  # without a pyramid
    ("proposal_generator.", "proposal generator"),
    ("roi_heads.box_head.", "box head"),
    ("roi_heads.box_predictor.", "predictor of classes and boxes"),
    ("roi_heads.mask_head.", "mask head"),
    ("roi_heads.keypoint_head.", "keypoint head"),
    ("roi_heads.", "RoI heads"),
    ("head.", "RetinaNet head"),
)

# Modules whose rows belong to classes.
_RETINANET = "head.cls_score"
_OF_CLASSES = re.compile(
    r"roi_heads\.box_predictor(\.\d+)?\.(cls_score|bbox_pred)|roi_heads\.mask_head\.predictor"
    r"|head\.cls_score"
)
# What Seesaw loss has counted so far, of the classes and the background.
_COUNTS = ".classification_loss.counts"
_BOX_SIZES = (4, 5)  # the second of rotated boxes

# How tensors are named in files of other projects, and what those are.
_KINDS = (
    (
        r"(module\.)?(neck|bbox_head|roi_head)\.",
        "a model of MMDetection, whose Libra R-CNNs balanced-d2 convert-mmdet converts",
    ),
    (r"backbone\.body\.", "a detector of torchvision"),
    (r"layer1\.0\.conv1\.weight", "a ResNet by the names of torchvision"),
    (r"conv_stem\.weight", "a network of timm"),
    (r"res2_0_branch2a_w", "a ResNet by Caffe2's names"),
    (r"roi_heads\.|proposal_generator\.|head\.cls_score|backbone\.", "another Detectron2 model"),
)


@dataclass(frozen=True)
class Adapted:
    """What becomes of the tensors that depend on the classes.

    Attributes:
        tensors: those with the rows of some classes taken from the checkpoint, in the model's
            shapes, by the model's names.
        dropped: names of those in the checkpoint that are not to be loaded.
        classes: the model's classes whose rows were taken.
        num_classes: how many the model has.
        message: what the user should know of it, or ``""``.
    """

    tensors: Dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: List[str] = field(default_factory=list)
    classes: List[str] = field(default_factory=list)
    num_classes: int = 0
    message: str = ""


def num_classes(state: State, config: str = "") -> Optional[int]:
    """How many classes a detector tells apart; None if it has none.

    Args:
        state: of Detectron2's R-CNNs, cascades or RetinaNet.
        config: of its training, as text, which says it. If it is not known, the shapes of the
            tensors do, but not with classification losses of others, which may have any number of
            rows.
    """
    for predictor in ("box_predictor", "box_predictor.0"):
        scores = state.get(f"roi_heads.{predictor}.cls_score.weight")
        stated = _num_classes_in(config) if scores is not None else None
        if stated is not None:
            return stated
        counts = state.get(f"roi_heads.{predictor}{_COUNTS}")
        if counts is not None:  # of Seesaw loss, which may have more rows of scores
            return len(counts) - 1
        if scores is not None:
            return len(scores) - 1  # the last is the background
    scores, boxes = (state.get(f"head.{name}.weight") for name in ("cls_score", "bbox_pred"))
    if scores is None or boxes is None:
        return None
    num_anchors = len(boxes) // 4
    return len(scores) // num_anchors if num_anchors else None


def _num_classes_in(config: str) -> Optional[int]:
    try:
        return int(yaml.safe_load(config)["MODEL"]["ROI_HEADS"]["NUM_CLASSES"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):  # none, or that of another project
        return None


def class_names_of(checkpoint: Mapping[str, Any], num_ours: Optional[int]) -> Optional[List[str]]:
    """The names of a checkpoint's classes: those that it says, or COCO's.

    Detectron2's zoo does not say them. Of other files that do not, 80 classes are taken for COCO's
    only where the model has another number: a model of 80 may come from the user's own data.

    Args:
        checkpoint: with the tensors as ``model``.
        num_ours: of the model that is to begin with it.
    """
    names = checkpoint.get(CLASS_NAMES)
    if names:
        return [str(name) for name in names]
    coco = list(MetadataCatalog.get(COCO).thing_classes)
    is_coco = checkpoint.get("__author__") in ZOOS or num_ours != len(coco)
    return coco if num_classes(checkpoint["model"]) == len(coco) and is_coco else None


def match_names(theirs: Sequence[str], ours: Sequence[str]) -> List[Optional[int]]:
    """For each of our classes the index of theirs with the same name, None if there is none.

    Where none is the same to the letter, upper and lower case, spaces, underscores and hyphens
    make no difference.
    """
    exact = {name: index for index, name in enumerate(theirs)}
    alike = {_plain(name): index for index, name in reversed(list(enumerate(theirs)))}
    return [exact.get(name, alike.get(_plain(name))) for name in ours]


def adapt_classes(
    weights: State,
    model: State,
    their_names: Optional[Sequence[str]],
    our_names: Optional[Sequence[str]],
    theirs: Optional[int] = None,
    ours: Optional[int] = None,
) -> Adapted:
    """Match the rows of classes by name.

    Rows of classes that have no counterpart stay as the model has them. Without names, classes are
    taken in their order if both have the same number, and none of them otherwise.

    Args:
        weights: of the checkpoint, by Detectron2's names.
        model: as it was initialised.
        their_names: of the checkpoint's classes, if known.
        our_names: of the model's, if known.
        theirs, ours: the numbers of classes; by default those that the tensors have.
    """
    modules: Dict[str, List[str]] = {}
    for key in weights:
        module = key.rpartition(".")[0]
        if key in model and _OF_CLASSES.fullmatch(module):
            modules.setdefault(module, []).append(key)
    theirs = num_classes(weights) if theirs is None else theirs
    ours = num_classes(model) if ours is None else ours
    if not modules or theirs is None or ours is None:
        return Adapted()
    # Names of another number are those of something else.
    their_names = their_names if their_names and len(their_names) == theirs else None
    our_names = our_names if our_names and len(our_names) == ours else None
    in_order = [(index, index) for index in range(ours)] if theirs == ours else None
    message = ""
    if their_names and our_names:
        sources = match_names(their_names, our_names)
        pairs = [(to, source) for to, source in enumerate(sources) if source is not None]
    else:
        unknown = "training data" if their_names else "checkpoint"
        message = f"the names of the classes of the {unknown} are not known: " + (
            f"the {theirs} of the checkpoint are taken in their order"
            if in_order
            else f"what predicts the {theirs} of the checkpoint begins again for the model's {ours}"
        )
        pairs = in_order or []
    # Counts of another training say nothing of this one.
    counted = [key for key in weights if key.endswith(_COUNTS)]
    has_same_rows = all(
        len(weights[key]) == len(model[key])
        for module, keys in modules.items()
        if module != _RETINANET and module.endswith("cls_score")
        for key in keys
    )
    if pairs == in_order and has_same_rows:
        return Adapted(dropped=counted, num_classes=ours, message=message)

    adapted = Adapted(
        {}, counted, [our_names[to] for to, _ in pairs] if our_names else [], ours, message
    )
    for module, keys in modules.items():
        layouts = {
            key: (_layout(module, weights[key], theirs), _layout(module, model[key], ours))
            for key in keys
        }
        if any(layout is None for pair in layouts.values() for layout in pair):
            continue  # boxes or masks are the same for all classes
        others = _rows_of_no_class(module, weights, model, theirs, ours)
        rows = [*pairs, *others] if pairs or our_names and their_names else []
        tensors = {key: _with_rows_of(weights[key], model[key], layouts[key], rows) for key in keys}
        if any(tensor is None for tensor in tensors.values()):
            adapted.dropped.extend(keys)
        else:
            adapted.tensors.update(tensors)
    return adapted


def report(
    model: Iterable[str],
    taken: Collection[str],
    adapted: Adapted,
    left_over: Iterable[str],
) -> str:
    """What a model begins with, as a table of its parts, and what of the checkpoint is left over.

    Args:
        model: names of its tensors.
        taken: those that came from the checkpoint as they are.
        adapted: those of which some rows did.
        left_over: names of the checkpoint's tensors that are not used.
    """
    counts: Dict[str, Counter] = {part: Counter() for _, part in PARTS}
    for name in model:
        state = "adapted" if name in adapted.tensors else "taken" if name in taken else "new"
        counts.setdefault(part_of(name), Counter())[state] += 1
    matched = "background only"
    if adapted.classes:
        number, more = len(adapted.classes), len(adapted.classes) - 5
        matched = f"{number} of {adapted.num_classes} classes: {', '.join(adapted.classes[:5])}"
        matched += f", … and {more} more" if more > 0 else ""
    rows = [
        (
            part,
            count["taken"] or "",
            f"{count['adapted']} ({matched})" if count["adapted"] else "",
            count["new"] or "",
        )
        for part, count in counts.items()
        if count
    ]
    table = tabulate(
        rows, ["tensors of", "taken", "adapted", "new"], tablefmt="pipe", disable_numparse=True
    )
    rest = Counter(part_of(name) for name in left_over)
    line = ", ".join(f"{part} ({number})" for part, number in rest.items()) or "nothing"
    return f"{table}\nleft over in the checkpoint: {line}"


def check_fits(model: Iterable[str], fitting: Collection[str], checkpoint: Sequence[str]) -> None:
    """Refuse a checkpoint that gives the model nothing, or nothing of its backbone.

    Args:
        model: names of its tensors.
        fitting: those that the checkpoint has in the same shape, or in part.
        checkpoint: names of the tensors in the file.

    Raises:
        UserError: with what the checkpoint seems to hold.
    """
    has_backbone = any(part_of(name) == "backbone" for name in model)
    parts = sorted({part_of(name) for name in fitting})
    if parts and ("backbone" in parts or not has_backbone):
        return
    fits = f"only {', '.join(parts)} fits, nothing of the backbone" if parts else "nothing fits"
    raise UserError(
        f"{fits}; it seems to hold {_seems(checkpoint)}. Choose weights of this model or of its "
        'backbone, or "" to start from random ones'
    )


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to, in words."""
    for prefix, part in PARTS:
        if name.startswith(prefix):
            return part
    return name.partition(".")[0]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _rows_of_no_class(
    module: str, weights: State, model: State, theirs: int, ours: int
) -> List[Tuple[int, int]]:
    """Pairs of rows of the background, and of an objectness branch, if both have the same ones."""
    if module == _RETINANET or not module.endswith("cls_score"):
        return []
    number = len(model[f"{module}.weight"]) - ours
    if len(weights[f"{module}.weight"]) - theirs != number:
        return []
    return [(ours + i, theirs + i) for i in range(number)]


def _layout(module: str, tensor: torch.Tensor, classes: int) -> Optional[Tuple[int, int, int]]:
    """The rows of a tensor as (anchors, classes, rows of each); None if they are of no class."""
    rows = len(tensor)
    if module == _RETINANET:  # anchor by anchor
        return rows // classes, classes, 1
    if module.endswith("cls_score"):  # with the background and, if there is one, objectness
        return 1, rows, 1
    sizes = _BOX_SIZES if module.endswith("bbox_pred") else (1,)
    return next(((1, classes, size) for size in sizes if rows == classes * size), None)


def _with_rows_of(theirs, ours, layouts, pairs):
    """Our tensor with rows of theirs; None if there are none, or the rows are of another shape."""
    from_layout, to_layout = layouts
    same_rows = (from_layout[0], from_layout[2]) == (to_layout[0], to_layout[2])
    if not pairs or not same_rows or theirs.shape[1:] != ours.shape[1:]:
        return None
    to, source = zip(*pairs)
    result = ours.detach().clone()
    rows = theirs.reshape(*from_layout, *theirs.shape[1:])[:, list(source)]
    result.view(*to_layout, *ours.shape[1:])[:, list(to)] = rows.to(result)
    return result


def _seems(names: Sequence[str]) -> str:
    number = f"{len(names)} tensors, such as {', '.join(names[:2])}" if names else "no tensors"
    for pattern, kind in _KINDS:
        if any(re.match(pattern, name) for name in names):
            return f"{kind} ({number})"
    return number
