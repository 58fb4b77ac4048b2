"""Reading the ``metrics.json`` of training runs."""

import json
import logging
import os
from typing import Dict, List

from balanced_d2.utils.errors import UserError

FILE = "metrics.json"

Metrics = Dict[str, Dict[int, float]]
"""The values of each metric by iteration, in ascending order."""


def read_metrics(folder: str) -> Metrics:
    """Read the metrics of a training run.

    A run that was killed leaves an incomplete line, to which the resumed run appends its first
    record: only that record is read, and a warning counts such lines. If a resumed run repeated
    iterations, the later values are used.

    Args:
        folder: the ``OUTPUT_DIR`` of the run.

    Raises:
        UserError: if there is no such file, or it has no metrics.
    """
    path = os.path.join(folder, FILE)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.strip()]
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the OUTPUT_DIR of a training run"
        ) from error
    by_iteration: Dict[str, Dict[int, float]] = {}
    num_cut = 0
    for line in lines:
        # Records are flat, so the last brace of a line begins its last record.
        record = _parse(line[line.rfind("{") :])
        num_cut += line.count("{") != 1 or not record
        iteration = record.pop("iteration", None)
        if not isinstance(iteration, int):
            continue
        for name, value in record.items():
            if isinstance(value, (int, float)):
                by_iteration.setdefault(name, {})[iteration] = float(value)
    if not by_iteration:
        raise UserError(f"{path} has no metrics: has training reached its first log entry?")
    if num_cut:
        logging.getLogger(__name__).warning(
            f"{path}: {num_cut} line(s) are cut off; the incomplete records were skipped"
        )
    return {name: dict(sorted(values.items())) for name, values in by_iteration.items()}


def _parse(text: str) -> Dict:
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def names_of_runs(folders: List[str]) -> List[str]:
    """Short, distinct names of runs: their folders without the parts that all begin or end with.

    Raises:
        UserError: if a folder is given twice.
    """
    parts = [os.path.normpath(os.path.abspath(folder)).split(os.sep) for folder in folders]
    if len(set(map(tuple, parts))) < len(parts):
        raise UserError("the same folder is given twice")
    if len(parts) == 1:
        return [parts[0][-1]]
    while min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return [os.sep.join(part) for part in parts]
