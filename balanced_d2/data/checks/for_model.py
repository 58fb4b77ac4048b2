"""Checks of a config's datasets before anything is built."""

import os
from collections import Counter
from typing import (
    Collection,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from balanced_d2.data.adapted import Change
from balanced_d2.data.checks.coco_file import check_coco
from balanced_d2.data.checks.image_files import (
    missing_findings,
    missing_images,
    unreadable_findings,
    with_files,
)
from balanced_d2.data.checks.image_headers import Header, header_findings, read_headers
from balanced_d2.data.checks.records import (
    Finding,
    Findings,
    clean,
    label_of,
    left_out_findings,
    report,
)
from balanced_d2.data.class_balance import usable_annotations
from balanced_d2.data.classes import (
    check_known,
    check_names,
    check_num_classes,
    join_classes,
    num_classes_key,
    numbers_in,
    some,
)
from balanced_d2.data.datasets.coco_json import annotation_errors_in
from balanced_d2.data.train_samplers import SAMPLERS
from balanced_d2.utils.errors import UserError, check_choice
from balanced_d2.utils.progress import WithBar

# Types of evaluators that number the classes themselves.
IN_ORDER = ("cityscapes_instance", "coco_panoptic_seg", "lvis", "pascal_voc")


class CheckedData(NamedTuple):
    """What a config's datasets are for its model."""

    classes: Optional[List[str]]
    """The names of the model's classes, in its order; None if the data do not say them."""
    changes: Dict[str, Change]
    """The datasets to :func:`~balanced_d2.data.adapted.adapt`."""
    deep: List[str]
    """The datasets with gray images of more than 8 bits, as far as a sample of them shows."""
    class_counts: Optional[List[int]] = None
    """The number of training objects of each of the model's classes; None if not known."""


def check_datasets(
    cfg: CfgNode,
    train: bool = True,
    annotations: bool = True,
    known: Optional[Sequence[str]] = None,
    number_follows: bool = False,
) -> CheckedData:
    """Check that all datasets of a config can be loaded and match the model.

    Every dataset is loaded once, so that a broken test set is reported before training and not
    after it. Boxes that :func:`balanced_d2.data.checks.records.clean` drops or clips cause a
    warning, and so do images without a file if ``DATALOADER.SKIP_BAD_IMAGES`` leaves them out.

    Args:
        train: whether ``DATASETS.TRAIN`` will be used.
        annotations: whether to check the annotations and the images' files and to compare the
            classes with the model's. If not, the datasets still have to exist and to load.
        known: the names of the classes of the weights that are evaluated or resumed, if these say
            them.
        number_follows: whether the model's number of classes is not set, but that of the data.

    Raises:
        UserError: naming the dataset and everything that is wrong with it.
    """
    trained, evaluated = _names(cfg, "TRAIN") if train else (), _names(cfg, "TEST")
    if train:
        check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS)
    if train and not trained:
        raise UserError("DATASETS.TRAIN is empty: there is nothing to train on")
    if not train and not evaluated:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate on")
    usable = crowds = 0
    names = list(dict.fromkeys((*trained, *evaluated)))
    classes: Dict[str, List[str]] = {}
    missing: Dict[str, Dict[str, str]] = {}
    deep: List[str] = []
    counts: Dict[str, Counter] = {}
    for name in names:
        check_registered(name)
    for name in WithBar(names, desc="checking data", unit="dataset"):
        check_files(name)
        json_file = coco_file(name)
        if annotations and json_file:
            in_file = check_coco(name, json_file, name in evaluated, cfg.MODEL.MASK_ON)
            # Loading drops or clips the others, and warns about them.
            source = MetadataCatalog.get(name).get("origin") or json_file
            report(name, [finding for finding in in_file if finding.refused], source)
        records = load(name)
        if not records:
            raise UserError(f"data set {name!r} has no images")
        of_this = MetadataCatalog.get(name).get("thing_classes")
        if of_this is not None:
            classes[name] = [str(each) for each in of_this]
        findings: List[Finding] = []
        if annotations:
            check_names(name, classes.get(name, []))
            missing[name] = missing_images(records)
            if missing[name] and cfg.DATALOADER.SKIP_BAD_IMAGES:
                _check_left_out(name, missing[name], len(records), name in evaluated)
                records = with_files(records, missing[name])
            else:
                findings += missing_findings(missing[name])
            if not cfg.DATALOADER.SKIP_BAD_IMAGES:
                findings += unreadable_findings(name)
        present = with_files(records, missing.get(name, ()))
        headers = read_headers(present)
        if any(isinstance(header, Header) and header.is_deep for header in headers.values()):
            deep.append(name)
        if annotations:
            skip = cfg.DATALOADER.SKIP_BAD_IMAGES and name not in evaluated
            findings += header_findings(present, headers, skip)
            records = clean(name, records)
            report(name, [*findings, *model_findings(cfg, name, records, name in trained)])
            if name in trained:
                report(name, left_out_findings(records, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS))
                counts[name] = Counter(a["category_id"] for _, a in usable_annotations(records))
                usable += sum(counts[name].values())
                crowds += sum(len(r.get("annotations", ())) for r in records)
                crowds -= sum(counts[name].values())
                usable += sum("sem_seg_file_name" in record for record in records)
    if trained and annotations and not usable:
        why = f": all {crowds} are marked iscrowd, for groups of objects" if crowds else ""
        raise UserError(
            f"DATASETS.TRAIN ({', '.join(trained)}): there are no usable annotations to train on"
            + why
        )
    model = _model_classes(trained, evaluated, classes, known)
    if not number_follows and model is not None:
        if annotations and known is None:
            check_num_classes(cfg, model, _whose(trained or evaluated[:1]))
        if num_classes_key(cfg)[1] != len(model):  # as with a mapper that changes them
            model = None
    changes = _changes(classes, missing, model, evaluated, annotations)
    return CheckedData(model, changes, deep, _class_counts(trained, counts, changes, model))


def _class_counts(
    trained: Sequence[str],
    counts: Mapping[str, Counter],
    changes: Mapping[str, Change],
    model: Optional[Sequence[str]],
) -> Optional[List[int]]:
    if model is None or not trained or any(name not in counts for name in trained):
        return None
    total = [0] * len(model)
    for name in trained:
        numbers = changes[name].numbers if name in changes else None
        for category, number in counts[name].items():
            total[category if numbers is None else numbers[category]] += number
    return total


def _model_classes(
    trained: Sequence[str],
    evaluated: Sequence[str],
    classes: Mapping[str, Sequence[str]],
    known: Optional[Sequence[str]],
) -> Optional[List[str]]:
    """The names of the model's classes: those of its weights, or else those of its data."""
    if any(name not in classes for name in trained):
        return None if known is None else list(known)
    joined = join_classes({name: classes[name] for name in trained})
    if known is None:
        of_test = next((list(classes[name]) for name in evaluated if name in classes), None)
        return joined if trained else of_test
    if trained:
        numbers = numbers_in(known, ", ".join(trained), joined)
        new = [name for name, number in zip(joined, numbers) if number is None]
        gone = [name for number, name in enumerate(known) if number not in numbers]
        if new or gone:
            raise UserError(
                f"DATASETS.TRAIN ({', '.join(trained)}) has other classes than the weights (new: "
                f"{some(new) or 'none'}; gone: {some(gone) or 'none'}); a training of these "
                "classes can begin with them: MODEL.WEIGHTS, another OUTPUT_DIR, no --resume"
            )
    return list(known)


def _whose(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"data set {names[0]!r} has"
    return f"the data sets {', '.join(map(repr, names))} together have"


def _changes(
    classes: Mapping[str, Sequence[str]],
    missing: Mapping[str, Collection[str]],
    model: Optional[Sequence[str]],
    evaluated: Sequence[str],
    annotations: bool,
) -> Dict[str, Change]:
    changes: Dict[str, Change] = {}
    for name in {**classes, **missing}:
        numbers: Optional[List[int]] = None
        if model is not None and name in classes:
            found = numbers_in(model, name, classes[name])
            if annotations or None not in found:
                numbers = check_known(name, classes[name], model)
            if numbers == list(range(len(model))):
                numbers = None
        if numbers is not None and name in evaluated:
            _check_reorderable(name, classes[name], model or [])
        if numbers is not None or missing.get(name):
            changes[name] = Change(numbers, frozenset(missing.get(name, ())))
    return changes


def _check_reorderable(name: str, classes: Sequence[str], model: Sequence[str]) -> None:
    evaluator_type = MetadataCatalog.get(name).get("evaluator_type")
    if evaluator_type in IN_ORDER:
        raise UserError(
            f"data set {name!r} has the classes {some(classes)}, but the model {some(model)}: the "
            f"evaluation of {evaluator_type} needs the same ones in the same order"
        )


def _check_left_out(name: str, missing: Mapping[str, str], num_images: int, tested: bool) -> None:
    """Warn about images that are left out; refuse it if all are, or if they would count as images
    without a detection."""
    if len(missing) == num_images:
        raise UserError(
            f"data set {name!r}: none of its {num_images} images has a file, such as "
            f"{next(iter(missing.values()))}; check the folder and the names"
        )
    if tested and MetadataCatalog.get(name).get("evaluator_type") != "coco":
        report(name, missing_findings(missing))
    finding = Finding("left out", "image(s) without a file", list(missing.values()))
    report(name, [finding])


def _names(cfg: CfgNode, key: str) -> Tuple[str, ...]:
    names = cfg.DATASETS[key]
    if isinstance(names, str):
        raise UserError(
            f"DATASETS.{key} is the string {names!r}, but has to be a tuple of names: write "
            f"({names!r},), with the comma"
        )
    return tuple(names)


def load(name: str) -> List[Dict]:
    """The records of a registered dataset.

    Raises:
        UserError: if its annotations are invalid or a package that it needs is missing.
    """
    source = MetadataCatalog.get(name).get("json_file", "its source")
    try:
        with annotation_errors_in(name, source):
            return DatasetCatalog.get(name)
    except ModuleNotFoundError as error:
        # lvis would install opencv-python beside another build of OpenCV; its other requirements
        # are already installed.
        package = "--no-deps lvis" if error.name == "lvis" else error.name
        raise UserError(
            f"data set {name!r} cannot be loaded without the package {error.name}; run: "
            f"pip install {package}"
        ) from error


def coco_file(name: str) -> Optional[str]:
    """The annotation file of a dataset in COCO's format, None for any other dataset."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or metadata.get("generated"):
        return None
    return metadata.get("json_file")


def check_registered(name: str) -> None:
    """Raise :class:`UserError` if there is no dataset with that name."""
    if name not in DatasetCatalog:
        splits = [other for other in DatasetCatalog if other.startswith(f"{name}_")]
        if splits:
            raise UserError(
                f"data set {name!r} is not registered, but {', '.join(splits)} are: use these"
            )
        if os.path.exists(name):
            raise UserError(
                f"{name!r} is a path, not the name of a data set: --register my {name} gives it "
                "the name my"
            )
        raise UserError(
            f"data set {name!r} is not registered; a dataset in the format COCO JSON, YOLO, Pascal "
            f"VOC XML or CSV can be registered with --register {name} PATH"
        )


def check_files(name: str) -> None:
    """Raise :class:`UserError` if a file or folder that the metadata names does not exist.

    Loaders of Detectron2's built-in datasets do not say what is missing.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("generated"):
        return
    for key in (
        *("json_file", "image_root", "dirname"),
        *("panoptic_root", "panoptic_json", "sem_seg_root", "image_dir", "gt_dir"),
    ):
        path = metadata.get(key)
        if path and "://" not in path and not os.path.exists(path):
            raise UserError(
                f"data set {name!r}: {path} does not exist (built-in datasets are expected in "
                "$DETECTRON2_DATASETS, by default ./datasets)"
            )


def model_findings(cfg: CfgNode, name: str, records: List[Dict], trained: bool) -> List[Finding]:
    """Find what the model of a config needs but the annotations of a dataset do not have.

    Args:
        records: as :func:`balanced_d2.data.checks.records.clean` returns them.
        trained: whether the dataset is used for training.
    """
    # Other datasets can evaluate such a model by its boxes alone, for example Pascal VOC.
    if not trained and MetadataCatalog.get(name).get("evaluator_type") not in ("coco", "lvis"):
        return []
    usable = list(usable_annotations(records))
    findings: List[Finding] = []
    if cfg.MODEL.MASK_ON:
        findings += _mask_findings(cfg, usable, trained)
    if cfg.MODEL.KEYPOINT_ON:
        findings += _keypoint_findings(cfg, name, usable, trained)
    return findings


def _mask_findings(cfg: CfgNode, usable: List[Tuple[Dict, Dict]], trained: bool) -> List[Finding]:
    masks = [(r, a) for r, a in usable if _has(a, "segmentation")]
    polygons_only = trained and cfg.INPUT.MASK_FORMAT == "polygon"
    findings = Findings()
    findings.refuse(
        "annotation(s) have no segmentation, but MODEL.MASK_ON is True",
        [(r, a) for r, a in usable if not _has(a, "segmentation")],
        lambda item: label_of(*item),
        "add them or set MODEL.MASK_ON to False",
    )
    findings.refuse(
        "annotation(s) have an RLE mask, but INPUT.MASK_FORMAT is polygon",
        [(r, a) for r, a in masks if polygons_only and not isinstance(a["segmentation"], list)],
        lambda item: label_of(*item),
        "set INPUT.MASK_FORMAT to bitmask",
    )
    return findings


def _keypoint_findings(
    cfg: CfgNode, name: str, usable: List[Tuple[Dict, Dict]], trained: bool
) -> List[Finding]:
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    with_keypoints = [(r, a) for r, a in usable if _has(a, "keypoints")]
    if usable and not with_keypoints:
        raise UserError(
            f"data set {name!r}: no annotation has keypoints, but MODEL.KEYPOINT_ON is True; add "
            "them or set MODEL.KEYPOINT_ON to False"
        )
    if trained and usable and MetadataCatalog.get(name).get("keypoint_names") is None:
        raise UserError(
            f"data set {name!r}: its keypoints have no names; add them to the categories of the "
            "annotation file, or to the metadata (keypoint_names, keypoint_flip_map)"
        )
    # Detectron2 leaves out images without keypoints, and fails if only some annotations have them.
    images = {id(record) for record, _ in with_keypoints}
    visible = Counter(
        id(record) for record, a in with_keypoints for value in a["keypoints"][2::3] if value > 0
    )
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    if trained and usable and max(visible.values(), default=0) < least:
        raise UserError(
            f"data set {name!r}: no image has a visible keypoint, or as many as "
            f"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE, {least}; the third number of a "
            "keypoint is 2 if it is visible, 1 if it is hidden, 0 if it is not labelled"
        )
    findings = Findings()
    findings.refuse(
        "annotation(s) have no keypoints, but others in their image do",
        [(r, a) for r, a in usable if id(r) in images and not _has(a, "keypoints")],
        lambda item: label_of(*item),
        "write invisible ones as 0, 0, 0",
    )
    findings.refuse(
        "annotation(s) have a number of keypoints other than "
        f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, which is {num_keypoints}",
        [(r, a) for r, a in with_keypoints if len(a["keypoints"]) != 3 * num_keypoints],
        lambda item: f"{label_of(*item)} ({len(item[1]['keypoints']) // 3})",
        "set it to their number",
    )
    return findings


def _has(annotation: Dict, part: str) -> bool:
    value = annotation.get(part)
    return value is not None and len(value) > 0
