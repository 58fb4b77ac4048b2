"""The project's config keys, and loading of configs with errors that name the key."""

import difflib
import re
from contextlib import contextmanager
from typing import Iterator, Sequence

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    RetinaNet,
)

from balanced_d2.errors import UserError
from balanced_d2.modeling.box_losses import DETECTRON2_LOSSES


def add_balanced_config(cfg: CN) -> None:
    """Add the keys of balanced_d2 to a Detectron2 config, with all balances off. No key that is
    there changes; ``configs/Balanced.yaml`` turns the balances on."""
    # Balanced feature pyramid, for the builders `build_balanced_*fpn_backbone`.
    cfg.MODEL.BALANCED_FPN = CN()
    # The backbone that `build_balanced_fpn_backbone` and `build_balanced_retinanet_fpn_backbone`
    # build the pyramid on: any name of Detectron2's BACKBONE_REGISTRY.
    cfg.MODEL.BALANCED_FPN.BOTTOM_UP = "build_resnet_backbone"
    # Whether the pyramid is balanced; if not, the same builders give Detectron2's plain FPN.
    cfg.MODEL.BALANCED_FPN.ENABLED = False
    # The level, counted from the finest, at whose resolution the levels are averaged and refined:
    # 2 for P2-P6, 1 for P3-P7 (stride 16 in both).
    cfg.MODEL.BALANCED_FPN.REFINE_LEVEL = 2
    # What refines the averaged features: "none", "conv" (3x3), "non_local" (the paper's) or
    # "non_local_pooled", the same with keys pooled by 2, which is cheaper.
    cfg.MODEL.BALANCED_FPN.REFINE_TYPE = "non_local"
    # Of P3-P7: whether there is a ReLU between P6 and P7 (in MMDetection there is none).
    cfg.MODEL.BALANCED_FPN.P7_RELU = True

    # Sampling of proposals, for BalancedROIHeads.
    # Negatives: "random" as in Detectron2, "iou_balanced", evenly over bins of IoU, or any other
    # entry of NEGATIVE_SAMPLERS.
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = "random"
    # Positives: "random" as in Detectron2, "instance_balanced", evenly over the ground truth, or
    # any other entry of POSITIVE_SAMPLERS.
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER = "random"
    # Into how many bins the IoU of negatives is split.
    cfg.MODEL.ROI_HEADS.NUM_BINS = 3

    # Of Balanced L1, for BBOX_REG_LOSS_TYPE "balanced_l1" of MODEL.ROI_BOX_HEAD (with
    # BalancedROIHeads or BalancedCascadeROIHeads) and of MODEL.RETINANET (with BalancedRetinaNet).
    for node, beta in ((cfg.MODEL.ROI_BOX_HEAD, 1.0), (cfg.MODEL.RETINANET, 0.11)):
        # How much the gradient of inliers rises: the smaller, the more.
        node.BALANCED_L1_ALPHA = 0.5
        # The gradient of outliers.
        node.BALANCED_L1_GAMMA = 1.5
        # Where outliers begin, in units of the (weighted) box deltas.
        node.BALANCED_L1_BETA = beta

    # The share of the images that RandomSubsetTrainingSampler takes; Detectron2 has no default.
    if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # Whether training goes on without images that cannot be read, and without how many at most.
    cfg.DATALOADER.SKIP_BAD_IMAGES = False
    cfg.DATALOADER.MAX_BAD_IMAGES = 100

    # How many images of each test data set TensorBoard shows with ground truth and detections,
    # every time a training evaluates; 0: none.
    cfg.TEST.NUM_IMAGES_SHOWN = 4

    # Weights & Biases, which has to be installed (`pip install wandb`): whether what TensorBoard
    # gets is sent there too, to which project and under which name (by default one that it gives).
    cfg.WANDB = CN({"ENABLED": False, "PROJECT": "balanced_d2", "NAME": ""})

    # Of BalancedRetinaNet: whether boxes are clipped to the image before non-maximum suppression
    # too, as in MMDetection.
    cfg.MODEL.RETINANET.CLIP_BEFORE_NMS = False


def load_config(config_file: str, opts: Sequence[str] = ()) -> CN:
    """Detectron2's defaults and this project's, then a YAML file, then ``KEY VALUE`` pairs.

    Raises:
        UserError: naming the file or key that is wrong.
    """
    cfg = get_cfg()
    add_balanced_config(cfg)
    if config_file:
        with _told_as(f"config file {config_file}", cfg):
            cfg.merge_from_file(config_file, allow_unsafe=False)
    if len(opts) % 2:
        raise UserError(f"config options come as KEY VALUE pairs; {opts[-1]!r} has no value")
    with _told_as("command line", cfg):
        cfg.merge_from_list(list(opts))
    _check_names(cfg)
    return cfg


def _check_names(cfg: CN) -> None:
    model = cfg.MODEL
    for key, name, registry in (
        ("META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
        ("ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS_REGISTRY),
    ):
        if name not in registry:
            names = [known for known, _ in registry]
            close = difflib.get_close_matches(name, names, n=1) or names
            raise UserError(f"MODEL.{key}: there is no {name!r}; did you mean {', '.join(close)}?")
    meta_architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    if issubclass(meta_architecture, RetinaNet):
        key, loss_type, cls = "RETINANET", model.RETINANET.BBOX_REG_LOSS_TYPE, meta_architecture
        ours = "MODEL.META_ARCHITECTURE BalancedRetinaNet"
    else:
        key, loss_type = "ROI_BOX_HEAD", model.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE
        cls = ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)
        ours = "MODEL.ROI_HEADS.NAME BalancedROIHeads or BalancedCascadeROIHeads"
    if loss_type not in DETECTRON2_LOSSES and cls.__module__.startswith("detectron2."):
        raise UserError(
            f'MODEL.{key}.BBOX_REG_LOSS_TYPE "{loss_type}" needs {ours}; {cls.__name__} does not '
            "know it"
        )


@contextmanager
def _told_as(source: str, cfg: CN):
    """Turn what a mistake in ``source`` raises, within yacs or the YAML parser, into UserError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{source}: cannot read {error.filename}: {error.strerror}") from error
    except (AssertionError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        message = str(error.args[0]) if error.args else type(error).__name__
        if isinstance(error, yaml.YAMLError):
            message = " ".join(f"not valid YAML: {error}".split())
        raise UserError(f"{source}: {_explain(message, cfg)}") from error


def _explain(message: str, cfg: CN) -> str:
    """What yacs says of a wrong key or value, in words for the user."""
    unknown = re.match(r"Non-existent (?:config )?key: (\S+)", message)
    if unknown:
        close = difflib.get_close_matches(unknown[1], _keys(cfg), n=1)
        return f"there is no key {unknown[1]}" + (f"; did you mean {close[0]}?" if close else "")
    mismatch = re.match(
        r"Type mismatch \(<class '(\w+)'> vs. <class '(\w+)'>\) with values \((.*) vs. (.*)\) "
        r"for config key: (\S+)",
        message,
        re.DOTALL,
    )
    if mismatch:
        expected, got, old, new, key = mismatch.groups()
        told = f"{key} is {new} ({got}), but it has to be of type {expected}, such as {old}"
        if key.startswith("DATASETS.") and (expected, got) == ("tuple", "str"):
            told += f"; write ('{new}',), with the comma"
        return told
    return message


def _keys(node: CN, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CN):
            yield from _keys(value, f"{prefix}{key}.")
