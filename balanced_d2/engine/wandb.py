"""Weights & Biases, optional: it receives everything that TensorBoard does."""

from detectron2.config import CfgNode


def start_wandb(cfg: CfgNode) -> None:
    """Start a run that copies the events of every TensorBoard writer created after this.

    Call this in the main process only. The run ends with the process.
    """
    import wandb

    wandb.init(
        project=cfg.WANDB.PROJECT,
        name=cfg.WANDB.NAME or None,
        dir=cfg.OUTPUT_DIR,
        config=cfg,
        sync_tensorboard=True,
    )
