"""Detectron2's default trainer with evaluators and complete checkpoints."""

import logging
import os

from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import TrainerBase

from balanced_d2.evaluation.build import build_evaluator


class BalancedTrainer(DefaultTrainer):
    """Trains and evaluates as ``DefaultTrainer``, and resumes with the optimizer's state.

    Detectron2 0.6 writes no optimizer state into its checkpoints, main does; this trainer does on
    both, in main's format, so that either resumes what the other has saved.
    """

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(dataset_name, folder, cfg.TEST.KEYPOINT_OKS_SIGMAS)

    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        # Not DefaultTrainer's: on main it insists on the optimizer's state.
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logging.getLogger(__name__).warning(
                "the checkpoint has no optimizer state (Detectron2 0.6's own trainer saves none): "
                "momentum starts anew"
            )
