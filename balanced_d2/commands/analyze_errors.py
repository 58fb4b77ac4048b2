"""Show where a detector loses AP, by class, size and kind of error, and which score to ask for.

Prints three tables and writes them, with two pictures: ap.csv, errors.csv and errors.png;
thresholds.csv and scores.png for precision and recall over the score.
"""

import argparse
import csv
import os
from pathlib import Path
from typing import Dict, List, Optional, Sequence

# First, so that importing Detectron2 is quiet.
from balanced_d2.data import add_register_argument, check_registered, register_from
from balanced_d2.data.checks.coco_file import findings_in
from balanced_d2.data.checks.records import report
from balanced_d2.data.datasets.coco_json import read_coco
from balanced_d2.evaluation.errors import KINDS, Analysis, analyze_errors
from balanced_d2.evaluation.predictions import (
    add_predictions_argument,
    check_predictions,
    load_predictions,
)
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing
from balanced_d2.visualization.error_chart import draw_error_chart
from balanced_d2.visualization.figure import place_picture, save_figure
from balanced_d2.visualization.score_chart import cut_down, draw_score_chart

# isort: split
from detectron2.data import MetadataCatalog

NONE = "-"


def main(args: argparse.Namespace) -> None:
    folder = args.output or os.path.dirname(args.predictions) or "."
    picture = place_picture(None, folder, "errors.png")
    register_from(args)
    annotations = load_annotations(annotation_file(args.annotations))
    predictions = load_predictions(args.predictions)
    check_predictions(
        predictions,
        {image["id"] for image in annotations["images"]},
        {category["id"] for category in annotations["categories"]},
        args.annotations,
    )
    analysis = analyze_errors(annotations, predictions, args.threshold)

    tables = {
        "ap.csv": ap_table(analysis),
        "errors.csv": error_table(analysis),
        "thresholds.csv": threshold_table(analysis),
    }
    print(f"AP (IoU 0.50 to 0.95, in %) by class and size, of {len(predictions)} detections")
    print_table(tables["ap.csv"])
    print(f"\nAP50 is {analysis.ap50:.1f} %; fixing one kind of error alone would add:")
    print_table(tables["errors.csv"])
    print("\nthe minimum score of the best F1, at an IoU of 0.5:")
    print_table(tables["thresholds.csv"])
    for name, table in tables.items():
        with (
            replacing(os.path.join(folder, name)) as path,
            open(path, "w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(table)
    title = f"{os.path.basename(args.predictions)} on {os.path.basename(args.annotations)}"
    save_figure(draw_error_chart(analysis, title), picture)
    save_figure(draw_score_chart(analysis.curves, title), os.path.join(folder, "scores.png"))
    print(f"\npicture: {picture}; scores.png and tables: {', '.join(tables)} beside it")


def annotation_file(given: str) -> str:
    """The annotation file that is given, or that of the registered dataset of this name: those of
    other formats, and the parts of ``--split``, have one, too.

    Raises:
        UserError: if there is no such dataset, or it has none.
    """
    if os.path.isfile(given) or given.lower().endswith(".json"):
        return given
    check_registered(given)
    metadata = MetadataCatalog.get(given)
    if metadata.get("evaluator_type") != "coco":
        raise UserError(f"data set {given!r} has no annotation file in COCO's format")
    return metadata.json_file


def load_annotations(path: str) -> Dict:
    """Read an annotation file in COCO's format.

    Raises:
        UserError: naming everything that is wrong with it.
    """
    name = Path(path).stem
    content, _ = read_coco(name, path, evaluated=True)
    report(name, [finding for finding in findings_in(content) if finding.refused], path)
    return content


def ap_table(analysis: Analysis) -> List[List[str]]:
    sizes = list(analysis.total.ap)
    head = [*(f"AP {size}" for size in sizes), *(f"boxes {size}" for size in sizes)]
    rows = [
        [
            result.name,
            *(as_text(result.ap[size]) for size in sizes),
            *(str(result.num_boxes[size]) for size in sizes),
        ]
        for result in (*analysis.classes, analysis.total)
    ]
    return [["class", *head], *rows]


def error_table(analysis: Analysis) -> List[List[str]]:
    head = ["error", "AP50 lost", f"errors at score >= {analysis.threshold:g}", "meaning"]
    rows = [[e.kind, as_text(e.lost), str(e.number), KINDS[e.kind]] for e in analysis.errors]
    return [head, *rows]


def threshold_table(analysis: Analysis) -> List[List[str]]:
    rows = []
    for curve in analysis.curves:
        values = [NONE] * 4
        if curve.best is not None:
            parts = (curve.precision, curve.recall, curve.f1)
            values = [cut_down(curve.scores[curve.best])]
            values += [f"{part[curve.best]:.3f}" for part in parts]
        rows.append([curve.name, *values, str(curve.num_truth)])
    return [["class", "score", "precision", "recall", "F1", "boxes"], *rows]


def as_text(value: Optional[float]) -> str:
    return NONE if value is None else f"{value:.1f}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in columns; numbers are aligned to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_text = [column[1][:1].isalpha() for column in columns]
    for row in rows:
        cells = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        ]
        print("  " + "  ".join(cells).rstrip())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_predictions_argument(parser)
    parser.add_argument(
        "annotations",
        metavar="ANNOTATIONS.json|NAME",
        help="the ground truth: a file in COCO's format, or a registered dataset",
    )
    parser.add_argument("--output", metavar="DIR", help="default: the folder of the predictions")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="minimum score of a detection to count as an error; AP uses all detections",
    )
    add_register_argument(parser)
    return parser.parse_args()
