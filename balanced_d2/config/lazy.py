"""LazyConfig files: loading with errors that name the key, and the values the trainer reads."""

import traceback
from typing import ContextManager, FrozenSet, List, Sequence

from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from balanced_d2.config.yaml_config import flat, load_config, set_by_hand
from balanced_d2.utils.errors import UserError, raise_user_errors

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

# Nodes of train that may be missing, with the key in YAML configs and its parts.
OPTIONAL = {
    "best_checkpoint": ("TEST.BEST_CHECKPOINT", ("metric", "mode")),
    "mlflow": ("MLFLOW", ("enabled", "experiment", "name", "uri")),
    "model_ema": ("SOLVER.EMA", ("enabled", "decay")),
    "wandb": ("WANDB", ("enabled", "project", "name")),
    "early_stopping": (
        "SOLVER.EARLY_STOPPING",
        ("patience", "metric", "mode", "min_change"),
    ),
}


def is_lazy(config_file: str) -> bool:
    """Whether a config file is a LazyConfig, not YAML, judging by its name."""
    return config_file.endswith(".py")


def load_lazy_config(config_file: str, opts: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig file and apply options of the form ``key=value``.

    Returns:
        A config with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``, as
        in Detectron2's own LazyConfigs.

    Raises:
        UserError: naming the file or key that is wrong.
    """
    with _mistakes_in(f"config file {config_file}"):
        cfg = LazyConfig.load(config_file)
    missing = [part for part in PARTS if part not in cfg]
    if missing:
        raise UserError(f"config file {config_file}: it defines no {' and no '.join(missing)}")
    for opt in opts:
        if "=" not in opt:
            raise UserError(f"options of a .py config come as key=value; {opt!r} has no =")
        with _mistakes_in(f"command line: {opt}"):
            LazyConfig.apply_overrides(cfg, [opt])
    return cfg


class LazyCfgNode(CfgNode):
    """A config for the trainer of YAML configs, with the values of a LazyConfig.

    Attributes:
        lazy: the LazyConfig, from which model, optimizer and so on are built.
    """

    lazy: DictConfig


def trainer_config(lazy: DictConfig) -> LazyCfgNode:
    """The trainer's config for a LazyConfig.

    Args:
        lazy: as :func:`load_lazy_config` returns it.

    Raises:
        UserError: if a key is missing from the LazyConfig, or one in it is not supported.
    """
    with _mistakes_in("config file"):
        train, loader = lazy.train, lazy.dataloader
        mapper = loader.train.get("mapper") or {}
        if "roi_heads" in lazy.model:
            architecture, key = "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"
            num_classes = lazy.model.roi_heads.num_classes
        else:
            architecture, key = "RetinaNet", "MODEL.RETINANET.NUM_CLASSES"
            num_classes = lazy.model.num_classes
        values = {
            "MODEL.META_ARCHITECTURE": architecture,
            key: num_classes,
            "MODEL.DEVICE": train.device,
            "MODEL.WEIGHTS": train.init_checkpoint,
            "DATASETS.TRAIN": _names(loader.train.dataset.names),
            "DATASETS.TEST": _names(loader.test.dataset.names),
            "DATALOADER.SKIP_BAD_IMAGES": loader.train.get("skip_bad_images", False),
            "INPUT.CROP.ENABLED": "Crop" in str(mapper.get("augmentations")),
            "INPUT.GRAY_RANGE": float(mapper.get("gray_range", 0)),
            "INPUT.MASK_FORMAT": mapper.get("instance_mask_format", "polygon"),
            "MODEL.MASK_ON": mapper.get("use_instance_mask", False),
            "OUTPUT_DIR": train.output_dir,
            "SOLVER.MAX_ITER": train.max_iter,
            "SOLVER.STEPS": (),  # its schedule is lr_multiplier
            "SOLVER.CHECKPOINT_PERIOD": train.checkpointer.period,
            "SOLVER.ACCUMULATE": train.get("accumulate", 1),
            "SOLVER.AMP.ENABLED": train.amp.enabled,
            "TEST.EVAL_PERIOD": train.eval_period,
        }
        for node, (key, names) in OPTIONAL.items():
            given = train.get(node) or {}
            unknown = sorted(given.keys() - set(names))
            if unknown:
                raise KeyError(f"train.{node} has no {', '.join(unknown)}, only {', '.join(names)}")
            values.update({f"{key}.{name.upper()}": value for name, value in given.items()})
    cfg = LazyCfgNode()
    # Not through yacs, which would turn each node into another LazyCfgNode.
    dict.update(cfg, load_config("", [part for item in values.items() for part in item]))
    cfg.__dict__["lazy"] = lazy
    return cfg


def read_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Load a config file, YAML or Python, judging by its name.

    Raises:
        UserError: naming the file or key that is wrong.
    """
    if is_lazy(config_file):
        return trainer_config(load_lazy_config(config_file, opts))
    return load_config(config_file, opts)


def keys_set_by_hand(config_file: str, opts: Sequence[str] = ()) -> FrozenSet[str]:
    """The keys whose values somebody has chosen; of a LazyConfig, which has no defaults, all."""
    if is_lazy(config_file):
        return frozenset(key for key, _ in flat(load_config("")))
    return set_by_hand(config_file, opts)


def as_read(cfg: CfgNode) -> CfgNode | DictConfig:
    """The config in the form of its file, as Detectron2 saves it."""
    return cfg.lazy if isinstance(cfg, LazyCfgNode) else cfg


def evaluators_in(lazy: DictConfig) -> List[DictConfig]:
    """The evaluators of a LazyConfig: none, one, or, as in Detectron2's panoptic ones, several."""
    given = lazy.dataloader.get("evaluator")
    if not given:
        return []
    return list(given) if isinstance(given, ListConfig) else [given]


def _names(names) -> tuple:
    return (names,) if isinstance(names, str) else tuple(names)


def _mistakes_in(source: str) -> ContextManager[None]:
    # The file is Python, which can raise anything.
    return raise_user_errors(source, Exception, explain=_explain)


def _explain(error: Exception) -> str:
    if isinstance(error, OmegaConfBaseException):
        return str(error).splitlines()[0]
    text = f"{type(error).__name__}: {error}"
    # Of the config, or of a module that it imports.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
