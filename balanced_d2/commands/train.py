"""Train and evaluate a detector with balanced learning.

Takes Detectron2's usual arguments, with a YAML config or a LazyConfig, and --register for datasets
in the formats COCO JSON, YOLO, Pascal VOC XML, CSV and VIA.
"""

import argparse
from typing import Optional, Type

# First, so that importing Detectron2 is quiet.
from balanced_d2.checkpoint import BalancedCheckpointer
from balanced_d2.engine import BalancedTrainer, argument_parser, dry_run, setup, trainer_for

# isort: split
from detectron2.evaluation import verify_results
from detectron2.utils import comm


def main(args: argparse.Namespace, trainer_class: Optional[Type[BalancedTrainer]] = None):
    """
    Args:
        args: as :func:`parse_args` returns them.
        trainer_class: by default that of the config.
    """
    cfg = setup(args)
    trainer_class = trainer_class or trainer_for(cfg)

    if args.eval_only:
        model = trainer_class.build_model(cfg)
        averaged = cfg.SOLVER.EMA.ENABLED
        BalancedCheckpointer(model, save_dir=cfg.OUTPUT_DIR, averaged=averaged).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = trainer_class.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(trainer_class.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    if args.dry_run:
        return dry_run(trainer_class, cfg)

    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def parse_args() -> argparse.Namespace:
    return argument_parser().parse_args()
