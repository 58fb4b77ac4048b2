"""Detectron2's default trainer, with evaluation, exact resume and clear errors."""

import contextlib
import logging
import os
import sys
import weakref
from typing import Any, Callable, Dict, List

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import SimpleTrainer, TrainerBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from balanced_d2.checkpoint import AVERAGED, BalancedCheckpointer, check_space, start_from
from balanced_d2.config.yaml_config import flat
from balanced_d2.data.classes import training_classes
from balanced_d2.data.loader import TrainLoader
from balanced_d2.data.mapper import ImageMapper
from balanced_d2.engine.accumulate import accumulating
from balanced_d2.engine.after_evaluation import (
    EarlyStopping,
    ResumableBestCheckpointer,
    StopEarly,
    last_iteration,
)
from balanced_d2.engine.averaging import AveragedWeights, AverageWeights
from balanced_d2.engine.hooks import ResumablePreciseBN, SeedIterations, StopOnSignal
from balanced_d2.engine.mlflow import MLflowWriter
from balanced_d2.engine.optimizer import build_optimizer, settings_kept
from balanced_d2.engine.speed import autocast, mixed_precision, speed_up
from balanced_d2.engine.wandb import WandbWriter
from balanced_d2.evaluation.evaluators import build_evaluator, check_evaluator
from balanced_d2.modeling.checks import check_balanced
from balanced_d2.utils.compat import ddp_arguments
from balanced_d2.utils.errors import StopTraining, no_traceback_of
from balanced_d2.utils.progress import WithBar
from balanced_d2.visualization.validation_images import ValidationImages


class BalancedTrainer(DefaultTrainer):
    """Trains and evaluates like ``DefaultTrainer``; resumed training ends with the same weights as
    uninterrupted training, on the CPU bitwise equal.

    The batches and all random numbers follow from the seed and the iteration, see
    :class:`TrainLoader` and :class:`SeedIterations`. Detectron2 0.6 does not save the optimizer's
    state in its checkpoints, main does; this trainer does with both versions, in main's format, so
    that each can resume from the other's checkpoints.

    Raises:
        UserError: if the output folder is not writable or has no room for a checkpoint.
    """

    start_iter: int
    _trainer: SimpleTrainer

    def __init__(self, cfg):
        if self.build_evaluator.__qualname__ == BalancedTrainer.build_evaluator.__qualname__:
            for name in cfg.DATASETS.TEST:
                check_evaluator(name)
        mixed_on_cpu = cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu"
        with ddp_arguments(self.ddp_arguments(cfg)):
            # Detectron2's trainer for mixed precision takes CUDA only.
            super().__init__(_without_amp(cfg) if mixed_on_cpu else cfg)
        if cfg.SOLVER.ACCUMULATE > 1:
            self._trainer = accumulating(self._trainer, cfg.SOLVER.ACCUMULATE)
        if mixed_on_cpu:
            autocast(_unwrapped(self.model), "cpu", training=True)
        check_space(cfg.OUTPUT_DIR, size_of_checkpoint(self))

    @classmethod
    def ddp_arguments(cls, cfg) -> Dict[str, Any]:
        """Arguments for ``DistributedDataParallel`` in addition to Detectron2's."""
        return {"device_ids": None} if cfg.MODEL.DEVICE.startswith("cpu") else {}

    def build_hooks(self):
        ema = self.cfg.SOLVER.EMA
        self.averaged = AveragedWeights(_unwrapped(self.model), ema.DECAY) if ema.ENABLED else None
        parts: Dict[str, Any] = {AVERAGED: self.averaged} if self.averaged else {}
        # Replaces the one that DefaultTrainer has just created.
        self.checkpointer = BalancedCheckpointer(
            self._trainer.model,
            self.cfg.OUTPUT_DIR,
            class_names=training_classes(self.cfg),
            config=self.cfg.dump(),
            gray_range=self.cfg.INPUT.GRAY_RANGE,
            trainer=weakref.proxy(self),
            **parts,
        )
        built = [
            ResumablePreciseBN(
                self.cfg.TEST.EVAL_PERIOD,
                self.model,
                hook._data_loader,
                self.cfg.TEST.PRECISE_BN.NUM_ITER,
            )
            if isinstance(hook, hooks.PreciseBN) and isinstance(hook._data_loader, TrainLoader)
            else hook
            for hook in super().build_hooks()
        ]
        evaluation = _index_of_evaluation(built)
        if self.averaged:

            def test_and_save_results():  # as DefaultTrainer's
                self._last_eval_results = self._evaluate(self.test)
                return self._last_eval_results

            built[evaluation] = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, test_and_save_results)
        if self.cfg.TEST.AUG.ENABLED:  # once, at the end
            augmented = hooks.EvalHook(0, lambda: self._evaluate(self.test_with_TTA))
            built.insert(evaluation + 1, augmented)
        # After the schedule and the periodic checkpoint, before the evaluation, which is slow.
        built.insert(evaluation, StopOnSignal(self.checkpointer))
        if self.averaged:
            # Before the checkpoint, which has the average.
            built.insert(0, AverageWeights(self.averaged))
        if isinstance(self._trainer.data_loader, TrainLoader):
            built.insert(0, SeedIterations(self._trainer.data_loader))
        # In all processes, unlike the writers before them, which have then written the results.
        return [*built, *self.build_hooks_after_evaluation()]

    def _evaluate(self, test: Callable[[CfgNode, nn.Module], Dict[str, Any]]) -> Dict[str, Any]:
        if self.averaged is None:
            return test(self.cfg, self.model)
        logging.getLogger(__name__).info("evaluating the averaged weights (SOLVER.EMA)")
        with self.averaged.applied():
            return test(self.cfg, self.model)

    def build_hooks_after_evaluation(self) -> List[HookBase]:
        """What ``TEST.BEST_CHECKPOINT`` and ``SOLVER.EARLY_STOPPING`` ask for."""
        period, built = self.cfg.TEST.EVAL_PERIOD, []
        best, stopping = self.cfg.TEST.BEST_CHECKPOINT, self.cfg.SOLVER.EARLY_STOPPING
        if best.METRIC:
            built.append(
                ResumableBestCheckpointer(period, self.checkpointer, best.METRIC, best.MODE)
            )
        if stopping.PATIENCE:
            built.append(
                EarlyStopping(
                    period,
                    self.checkpointer,
                    stopping.METRIC,
                    stopping.PATIENCE,
                    stopping.MODE,
                    stopping.MIN_CHANGE,
                )
            )
        return built

    @classmethod
    def build_model(cls, cfg):
        return speed_up(cfg, super().build_model(cfg))

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return TrainLoader(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        """
        Args:
            output_folder: by default ``inference`` in ``OUTPUT_DIR``, or a folder in that for each
                of several test sets.
        """
        folder = output_folder or results_folder(cfg, "inference", dataset_name)
        evaluator = build_evaluator(
            dataset_name, folder, cfg.TEST.KEYPOINT_OKS_SIGMAS, cfg.MODEL.CLASS_COUNTS
        )
        return evaluator if output_folder else with_validation_images(cfg, dataset_name, evaluator)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = ImageMapper(cfg, is_train=False)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        return WithBar(loader, desc=f"evaluating {dataset_name}", unit="batch")

    @classmethod
    def test_with_TTA(cls, cfg, model):
        """Evaluate with Detectron2's test-time augmentation (``TEST.AUG``).

        Returns:
            The results of ``test``, with ``_TTA`` appended to each name.
        """
        logging.getLogger(__name__).info("evaluating with test-time augmentation")
        evaluators = [
            cls.build_evaluator(cfg, name, results_folder(cfg, "inference_TTA", name))
            for name in cfg.DATASETS.TEST
        ]
        # It calls parts of the model, and not the forward that has mixed precision.
        with mixed_precision(cfg.MODEL.DEVICE, cfg.TEST.AMP.ENABLED):
            results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    def build_writers(self):
        writers = super().build_writers()
        trainer, config = weakref.proxy(self), yaml.safe_load(self.cfg.dump())
        folder = self.cfg.OUTPUT_DIR
        wandb, mlflow = self.cfg.WANDB, self.cfg.MLFLOW

        def is_resumed() -> bool:
            return trainer.start_iter > 0

        if wandb.ENABLED:  # before TensorBoard's writer
            writers.insert(0, WandbWriter(folder, wandb.PROJECT, wandb.NAME, config, is_resumed))
        if mlflow.ENABLED:
            params = dict(flat(config))
            writers.append(
                MLflowWriter(folder, mlflow.EXPERIMENT, mlflow.NAME, mlflow.URI, params, is_resumed)
            )
        return writers

    def resume_or_load(self, resume=True):
        """
        Raises:
            UserError: if there are checkpoints to resume from but none can be read, or if training
                starts with balances that its model does not support, or with weights that do not
                fit it.
        """
        newest = self.checkpointer.get_checkpoint_file() if resume else ""
        if newest:
            self.checkpointer.load(newest)
        else:
            weights, class_names = self.cfg.MODEL.WEIGHTS, self.checkpointer.class_names
            averaged = self.cfg.SOLVER.EMA.ENABLED
            start_from(self._trainer.model, weights, class_names, averaged=averaged)
        if self.start_iter == 0:
            check_balanced(self.cfg, self.model)
        if not resume or self.start_iter != self.max_iter:
            return
        # Training was stopped after its last iteration, before the final weights were saved.
        newest = os.path.basename(self.checkpointer.get_checkpoint_file())
        if newest and newest != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self.iter)

    def train(self):
        logger = logging.getLogger(__name__)
        for hook in self._hooks:
            if isinstance(hook, EarlyStopping) and hook.reason():
                logger.info(
                    f"this training has been stopped early: {hook.reason()}; a larger PATIENCE "
                    "continues it"
                )
                return None
        with no_traceback_of(StopTraining):
            try:
                return super().train()
            except StopEarly as stop:
                logger.info(stop)
                return None

    def before_train(self):
        super().before_train()
        self._finish_iteration()

    def _finish_iteration(self) -> None:
        """Do what was left of the iteration after which the checkpoint was saved: checkpoints are
        saved before the evaluation, which decides on the best one and on stopping."""
        iteration = self.start_iter - 1
        deciding = (ResumableBestCheckpointer, EarlyStopping)
        if not any(h.is_missing(iteration) for h in self._hooks if isinstance(h, deciding)):
            return
        logging.getLogger(__name__).info(
            f"evaluating after iteration {iteration}: the checkpoint does not have the results"
        )
        self.iter = self.storage.iter = iteration
        for hook in self._hooks[_index_of_evaluation(self._hooks) :]:
            hook.after_step()

    def after_train(self):
        error = sys.exc_info()[1]
        if isinstance(error, StopEarly):  # after an evaluation, which is the final one
            self.max_iter = self.iter + 1
            del self._hooks[_index_of_evaluation(self._hooks)]
        if error is None or isinstance(error, StopEarly):
            return super().after_train()
        # Detectron2 evaluates after the last iteration even if it failed. A later failure, such as
        # writing to a full disk, must not hide the first error.
        for hook in list(self._hooks):
            if isinstance(hook, hooks.EvalHook):
                self._hooks.remove(hook)
        with contextlib.suppress(OSError):
            super().after_train()

    def run_step(self):
        """
        Raises:
            StopTraining: if the loss is not finite.
        """
        # PyTorch optimises scripted functions after their first runs, which changes the rounding.
        on_cpu = self.cfg.MODEL.DEVICE == "cpu"
        try:
            with torch.jit.optimized_execution(not on_cpu):
                super().run_step()
        except FloatingPointError as error:  # raised before the weights are changed
            rates = sorted({group["lr"] for group in self._trainer.optimizer.param_groups})
            loader = self._trainer.data_loader
            images = loader.last_batch() if isinstance(loader, TrainLoader) else ["unknown"]
            raise StopTraining(
                f"iteration {self.iter}: {' '.join(str(error).split())} "
                f"Learning rate: {', '.join(f'{rate:g}' for rate in rates)}. "
                f"Images: {', '.join(images)}. "
                "You can resume from the last checkpoint. Try a lower SOLVER.BASE_LR, a longer "
                "warm-up or SOLVER.CLIP_GRADIENTS, and check the annotations of these images"
            ) from error

    def state_dict(self):
        loader = self._trainer.data_loader
        return {
            **super().state_dict(),
            "iteration": last_iteration(self),
            "_trainer": self._trainer.state_dict(),
            # RetinaNet divides its losses by a running mean that is not a buffer.
            "normalizers": {
                name: module.loss_normalizer
                for name, module in _unwrapped(self.model).named_modules()
                if hasattr(module, "loss_normalizer")
            },
            **({"loader": loader.state_dict()} if isinstance(loader, TrainLoader) else {}),
        }

    def load_state_dict(self, state_dict):
        # Not DefaultTrainer's, which on main requires the optimizer's state.
        TrainerBase.load_state_dict(self, state_dict)
        self.start_iter = self.iter + 1  # checkpoints are saved at the end of an iteration
        logger = logging.getLogger(__name__)
        if "_trainer" in state_dict:
            with settings_kept(self._trainer.optimizer, getattr(self, "scheduler", None)):
                self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning(
                "the checkpoint has no optimizer state (Detectron2 0.6's own trainer saves none): "
                "momentum starts from zero"
            )
        modules = dict(_unwrapped(self.model).named_modules())
        for name, value in state_dict.get("normalizers", {}).items():
            modules[name].loss_normalizer = value
        if "loader" in state_dict and isinstance(self._trainer.data_loader, TrainLoader):
            self._trainer.data_loader.load_state_dict(state_dict["loader"])
        else:
            logger.warning(
                "the checkpoint does not contain the position in the data: the images start again "
                "in a new order"
            )


def results_folder(cfg: CfgNode, what: str, dataset_name: str) -> str:
    """The folder for the results on a test set: a part of ``OUTPUT_DIR``, which several share in
    folders of their own."""
    several = len(cfg.DATASETS.TEST) > 1
    return os.path.join(cfg.OUTPUT_DIR, what, *([dataset_name] if several else []))


def with_validation_images(
    cfg: CfgNode, dataset_name: str, evaluator: DatasetEvaluator
) -> DatasetEvaluator:
    """The evaluator, plus one that shows images in TensorBoard if the config enables it."""
    if cfg.TEST.NUM_IMAGES_SHOWN <= 0:
        return evaluator
    gray_range = cfg.INPUT.GRAY_RANGE or None
    shown = ValidationImages(dataset_name, cfg.TEST.NUM_IMAGES_SHOWN, gray_range=gray_range)
    return DatasetEvaluators([evaluator, shown])


def _index_of_evaluation(built: List[HookBase]) -> int:
    return next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))


def _without_amp(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    return cfg


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def size_of_checkpoint(trainer: BalancedTrainer) -> int:
    """Size in bytes: the model, its average, and what the optimizer keeps of each trained
    parameter."""
    model = trainer._trainer.model
    moments = 2 if isinstance(trainer._trainer.optimizer, torch.optim.AdamW) else 1
    copies = 2 if trainer.averaged else 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [*copies * list(model.state_dict().values()), *moments * trained]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
