"""The trainer of a LazyConfig."""

from typing import Type

from detectron2.config import instantiate
from detectron2.solver import LRMultiplier
from omegaconf import DictConfig

from balanced_d2.engine.trainer import BalancedTrainer
from balanced_d2.utils.progress import WithBar


def lazy_trainer(lazy: DictConfig) -> Type[BalancedTrainer]:
    """A trainer whose model, optimizer and data loaders are those of a LazyConfig.

    Args:
        lazy: as :func:`balanced_d2.config.lazy.load_lazy_config` returns it.
    """

    class LazyTrainer(BalancedTrainer):
        @classmethod
        def build_model(cls, cfg):
            return instantiate(lazy.model).to(cfg.MODEL.DEVICE)

        @classmethod
        def build_optimizer(cls, cfg, model):
            optimizer = lazy.optimizer.copy()
            optimizer.params.model = model
            return instantiate(optimizer)

        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

        @classmethod
        def build_train_loader(cls, cfg):
            return instantiate(lazy.dataloader.train)

        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            loader = lazy.dataloader.test.copy()
            loader.dataset.names = dataset_name
            return WithBar(instantiate(loader), desc=f"evaluating {dataset_name}", unit="batch")

    return LazyTrainer
