"""The trainer of a LazyConfig, and which trainer a config has."""

import copy
import os
from typing import Type

from detectron2.config import CfgNode, instantiate
from detectron2.engine import hooks
from detectron2.evaluation import DatasetEvaluators
from detectron2.solver import LRMultiplier

from balanced_d2.config.lazy import LazyCfgNode, evaluators_in
from balanced_d2.engine.speed import speed_up
from balanced_d2.engine.trainer import BalancedTrainer, with_validation_images
from balanced_d2.utils.progress import WithBar


class LazyTrainer(BalancedTrainer):
    """A trainer that builds model, optimizer, schedule, data loaders and evaluator from a
    LazyConfig and takes everything else from its ``train``.

    Args:
        cfg: a :class:`balanced_d2.config.lazy.LazyCfgNode`.
    """

    @classmethod
    def ddp_arguments(cls, cfg):
        return {**super().ddp_arguments(cfg), **cfg.lazy.train.get("ddp", {})}

    @classmethod
    def build_model(cls, cfg):
        return speed_up(cfg, instantiate(cfg.lazy.model).to(cfg.MODEL.DEVICE))

    @classmethod
    def build_optimizer(cls, cfg, model):
        optimizer = cfg.lazy.optimizer.copy()
        optimizer.params.model = model
        return instantiate(optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return LRMultiplier(optimizer, instantiate(cfg.lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg):
        return instantiate(cfg.lazy.dataloader.train)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        loader = instantiate(_with_test_set(cfg, dataset_name).dataloader.test)
        return WithBar(loader, desc=f"evaluating {dataset_name}", unit="batch")

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        evaluators = evaluators_in(_with_test_set(cfg, dataset_name))
        if not evaluators:
            return super().build_evaluator(cfg, dataset_name, output_folder)
        for evaluator in evaluators:
            if len(cfg.DATASETS.TEST) > 1 and evaluator.get("output_dir"):
                evaluator.output_dir = os.path.join(evaluator.output_dir, dataset_name)
        built = [instantiate(evaluator) for evaluator in evaluators]
        evaluator = built[0] if len(built) == 1 else DatasetEvaluators(built)
        return with_validation_images(cfg, dataset_name, evaluator)

    def build_hooks(self):
        train, built = self.cfg.lazy.train, super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = train.checkpointer.get("max_to_keep")
            elif isinstance(hook, hooks.PeriodicWriter):
                hook._period = train.get("log_period", 20)
        return built


def _with_test_set(cfg, dataset_name):
    """A copy of the whole LazyConfig, whose parts may refer to each other, with one test set."""
    lazy = copy.deepcopy(cfg.lazy)
    lazy.dataloader.test.dataset.names = dataset_name
    return lazy


def trainer_for(cfg: CfgNode) -> Type[BalancedTrainer]:
    """The trainer class for a config that :func:`~balanced_d2.engine.defaults.setup` returns."""
    return LazyTrainer if isinstance(cfg, LazyCfgNode) else BalancedTrainer
