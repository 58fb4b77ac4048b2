"""Weights & Biases, for those who ask for it: it is sent what TensorBoard gets."""

import importlib.util

from detectron2.config import CfgNode

from balanced_d2.errors import UserError


def check_wandb(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if Weights & Biases is asked for, but not installed."""
    if cfg.WANDB.ENABLED and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "WANDB.ENABLED is True, but Weights & Biases is not installed: pip install wandb"
        )


def start_wandb(cfg: CfgNode) -> None:
    """Start a run that copies the events of every TensorBoard writer made after this.

    In the main process only. The run ends with the process.
    """
    import wandb

    wandb.init(
        project=cfg.WANDB.PROJECT,
        name=cfg.WANDB.NAME or None,
        dir=cfg.OUTPUT_DIR,
        config=cfg,
        sync_tensorboard=True,
    )
