"""Weights & Biases, for those who ask for it: it is sent what TensorBoard gets."""

from detectron2.config import CfgNode


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
