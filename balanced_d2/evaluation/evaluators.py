"""The evaluator of a dataset, chosen by its ``evaluator_type``."""

import logging
import types
from typing import Callable, Dict, Sequence
from unittest import mock

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    coco_evaluation,
)
from pycocotools.coco import COCO

from balanced_d2.data.datasets.coco_json import read_coco
from balanced_d2.evaluation.ground_truth import GroundTruth
from balanced_d2.layers.class_counts import class_groups
from balanced_d2.utils.errors import UserError, check_package


class _COCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, for datasets that have some of the model's classes, in any order, and
    without the images that were left out. If nothing was detected, AP is 0 instead of NaN. The
    annotations are those that are trained on, and not as pycocotools reads the file.

    With the counts of the classes in the training data there are also ``APr``, ``APc`` and ``APf``,
    named as by LVIS: the mean AP of rare, common and frequent classes
    (:func:`balanced_d2.layers.class_groups`) that the dataset has."""

    def __init__(
        self, dataset_name: str, output_dir: str, class_counts: Sequence[int] = (), **kwargs
    ):
        self._groups = class_groups(class_counts)

        def read(json_file: str) -> COCO:
            return GroundTruth(read_coco(dataset_name, json_file, evaluated=True)[0])

        with mock.patch.object(coco_evaluation, "COCO", read):
            super().__init__(dataset_name, output_dir=output_dir, **kwargs)

    def _eval_predictions(self, predictions, img_ids=None):
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        in_file = self._coco_api.cats
        of_others = {number for category, number in ids.items() if category not in in_file}
        if of_others:
            predictions = [
                {
                    **prediction,
                    "instances": [
                        instance
                        for instance in prediction["instances"]
                        if instance["category_id"] not in of_others
                    ],
                }
                for prediction in predictions
            ]
        if img_ids is None and self._metadata.get("images_left_out"):
            numbers = self._coco_api.numbers
            img_ids = [numbers[prediction["image_id"]] for prediction in predictions]
        super()._eval_predictions(predictions, img_ids)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        # Detectron2 takes the names in the order of the file's ids.
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        numbers = list(range(len(class_names or ())))
        if coco_eval is not None and class_names and ids.keys() >= set(coco_eval.params.catIds):
            numbers = [ids[category] for category in coco_eval.params.catIds]
            class_names = [class_names[number] for number in numbers]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        groups = {"APr": 0, "APc": 1, "APf": 2} if self._groups.max(initial=-1) >= 0 else {}
        if coco_eval is None:
            results = {**results, **dict.fromkeys(groups, 0.0)}
            return _zeros(results, iou_type, self._logger)
        for metric, group in groups.items():
            of_group = [
                results.get(f"AP-{name}", np.nan)  # which data of a single class do not have
                for name, number in zip(class_names or (), numbers)
                if number < len(self._groups) and self._groups[number] == group
            ]
            present = [ap for ap in of_group if not np.isnan(ap)]
            if present:  # among the test data
                results[metric] = float(np.mean(present))
        return results


class _LVISEvaluator(LVISEvaluator):
    """Detectron2's evaluator, with an AP of 0 instead of NaN if nothing was detected."""

    def _eval_predictions(self, predictions):
        super()._eval_predictions(predictions)
        if not any(prediction["instances"] for prediction in predictions):
            for task, results in self._results.items():
                self._results[task] = _zeros(results, task, self._logger)


def _zeros(results: Dict[str, float], task: str, logger: logging.Logger) -> Dict[str, float]:
    logger.warning(f"nothing was detected: every AP of {task} is 0")
    return dict.fromkeys(results, 0.0)


# Builds the evaluator of each type from dataset name, output folder, TEST.KEYPOINT_OKS_SIGMAS and
# MODEL.CLASS_COUNTS.
EVALUATORS: Dict[str, Callable[[str, str, Sequence[float], Sequence[int]], DatasetEvaluator]] = {
    "coco": lambda name, folder, sigmas, counts: _COCOEvaluator(
        name, output_dir=folder, kpt_oks_sigmas=sigmas, class_counts=counts
    ),
    "lvis": lambda name, folder, sigmas, counts: _lvis(name, folder),
    "pascal_voc": lambda name, folder, sigmas, counts: PascalVOCDetectionEvaluator(name),
    "sem_seg": lambda name, folder, sigmas, counts: SemSegEvaluator(name, output_dir=folder),
    "coco_panoptic_seg": lambda name, folder, sigmas, counts: DatasetEvaluators(
        [
            SemSegEvaluator(name, output_dir=folder),
            _COCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=sigmas, class_counts=counts),
            COCOPanopticEvaluator(name, folder),
        ]
    ),
    "cityscapes_instance": lambda name, folder, sigmas, counts: CityscapesInstanceEvaluator(name),
    "cityscapes_sem_seg": lambda name, folder, sigmas, counts: CityscapesSemSegEvaluator(name),
}
# Packages that some evaluators import only when they evaluate, and what to install.
PACKAGES = {
    "coco_panoptic_seg": (
        "panopticapi",
        "git+https://github.com/cocodataset/panopticapi.git",  # it is not on PyPI
    ),
    "cityscapes_instance": ("cityscapesscripts", ""),
    "cityscapes_sem_seg": ("cityscapesscripts", ""),
}


def _lvis(name: str, folder: str) -> DatasetEvaluator:
    _patch_lvis()
    return _LVISEvaluator(name, output_dir=folder)


def _patch_lvis() -> None:
    """Make ``lvis`` (0.5.3, its last release) work with current NumPy, which has no ``np.float``.

    Only the module ``lvis.eval`` sees the alias; NumPy itself does not change.
    """
    try:
        import lvis.eval
    except ImportError:  # an optional package; Detectron2's evaluator says how to install it
        return
    if hasattr(lvis.eval.np, "float"):
        return
    numpy = types.ModuleType("numpy")
    numpy.__dict__.update(lvis.eval.np.__dict__, float=float)
    lvis.eval.np = numpy


def check_packages(dataset_names: Sequence[str]) -> None:
    """Raise :class:`UserError` if a package that the datasets' evaluators need is missing."""
    for name in dataset_names:
        module, source = PACKAGES.get(MetadataCatalog.get(name).get("evaluator_type"), ("", ""))
        if module:
            check_package(module, f"data set {name!r} (DATASETS.TEST): its evaluation", source)


def check_evaluator(dataset_name: str) -> str:
    """The ``evaluator_type`` of a dataset.

    Raises:
        UserError: if it has none, or one that :func:`build_evaluator` does not support.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in EVALUATORS:
        raise UserError(
            f"data set {dataset_name!r} cannot be evaluated: its evaluator_type is "
            f"{evaluator_type!r}, but has to be one of: {', '.join(EVALUATORS)}. To use another "
            "evaluator, override build_evaluator in your own trainer"
        )
    return evaluator_type


def build_evaluator(
    dataset_name: str,
    output_dir: str,
    kpt_oks_sigmas: Sequence[float] = (),
    class_counts: Sequence[int] = (),
) -> DatasetEvaluator:
    """Build Detectron2's evaluator for a dataset, by the ``evaluator_type`` of its metadata.

    Args:
        output_dir: where the evaluator writes the detections.
        kpt_oks_sigmas: for keypoints other than COCO's 17, how precisely each can be annotated
            (``TEST.KEYPOINT_OKS_SIGMAS``).
        class_counts: the number of training objects of each of the model's classes, if known, for
            the AP of rare, common and frequent ones (``MODEL.CLASS_COUNTS``).

    Raises:
        UserError: see :func:`check_evaluator`.
    """
    build = EVALUATORS[check_evaluator(dataset_name)]
    return build(dataset_name, output_dir, kpt_oks_sigmas, class_counts)
