"""What may change when a training is resumed, and what may not."""

from typing import Any, Dict, NamedTuple, Tuple

import yaml
from detectron2.config import CfgNode

from balanced_d2.config.yaml_config import flat

# Of the keys of MODEL, those that do not change what the weights mean.
FREE = (
    "MODEL.CHANNELS_LAST",
    "MODEL.DEVICE",
    "MODEL.FOLD_NORM",
    "MODEL.SPARSE_ROI_ALIGN",
)
# Besides the others of MODEL.
FIXED = (
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.TRAIN",
    "DATASETS.TRAIN_REPEAT_FACTOR",
    "INPUT.FORMAT",
    "INPUT.GRAY_RANGE",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.OPTIMIZER",
)
# Without a meaning for a training that has begun, or, as mixed precision, chosen by the machine;
# the seed is always that of the checkpoint.
IRRELEVANT = (
    "MODEL.TIMM.PRETRAINED",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.TORCHVISION.PRETRAINED",
    "MODEL.TORCHVISION.WEIGHTS",
    "MODEL.WEIGHTS",
    "OUTPUT_DIR",
    "SEED",
    "SOLVER.AMP.ENABLED",
    "VERSION",
)


class Changes(NamedTuple):
    """The keys that differ, each with its old and new value."""

    applied: Dict[str, Tuple[Any, Any]]
    refused: Dict[str, Tuple[Any, Any]]


def changes(before: str, cfg: CfgNode) -> Changes:
    """Compare a config with that of the training that it resumes.

    Args:
        before: ``cfg.dump()`` of that training. Keys that it does not have are not compared.
    """
    found = Changes({}, {})
    old = dict(flat(yaml.safe_load(before)))
    for key, value in flat(yaml.safe_load(cfg.dump())):
        if key in old and old[key] != value and key not in IRRELEVANT:
            (found.refused if _is_fixed(key) else found.applied)[key] = old[key], value
    return found


def seed_of(before: str) -> int:
    """``SEED`` of the training with that config; arguments as for :func:`changes`."""
    return yaml.safe_load(before)["SEED"]


def as_text(differing: Dict[str, Tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in differing.items())


def _is_fixed(key: str) -> bool:
    if key in FIXED:
        return True
    # Thresholds of the inference, such as MODEL.RPN.NMS_THRESH_TEST.
    return key.startswith("MODEL.") and not key.endswith("_TEST") and key not in FREE
