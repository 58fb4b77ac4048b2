#!/usr/bin/env python3
"""Turn the lines of the study of class balance into tables.

Run from the project's root: python -m studies.class_balance.table. Prints the mean AP of all, rare,
common and frequent classes with its 95 % confidence interval, and the difference from plain, paired
by seed, with its interval and the p-value of Student's paired t-test.
"""

import argparse
import sys
from collections import defaultdict
from typing import Dict, List, Sequence

from balanced_d2.utils.errors import UserError, report_user_errors
from studies.bccd_ablation.estimates import difference, estimate
from studies.bccd_ablation.train import read_lines
from studies.class_balance.train import DATA, ROWS

METRICS = {"AP": "AP", "APr": "rare", "APc": "common", "APf": "frequent"}

Values = Dict[str, Dict[int, Dict[str, float]]]
"""The results of each run by row and seed."""


def main(args: argparse.Namespace) -> None:
    values: Values = defaultdict(dict)
    for line in read_lines(args.results):
        if line["data"] == args.data and (not args.seeds or line["seed"] in args.seeds):
            values[line["row"]][line["seed"]] = line["results"]
    if "plain" not in values:
        raise UserError(f"{args.results} has no line for the row 'plain' on {args.data}")
    print(f"**{args.data}**\n")
    for table in (means(values), gains(values)):
        print("\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n")


def of(values: Values, row: str, metric: str) -> Dict[int, float]:
    return {seed: results[metric] for seed, results in values[row].items()}


def heading(first: str, others: Sequence[str]) -> List[List[str]]:
    return [[first, *others], ["---"] * (len(others) + 1)]


def means(values: Values) -> List[List[str]]:
    table = heading("mean", ["seeds", *METRICS.values()])
    for row in (row for row in ROWS if row in values):
        found = [str(estimate(list(of(values, row, metric).values()))) for metric in METRICS]
        table.append([row, str(len(values[row])), *found])
    return table


def gains(values: Values) -> List[List[str]]:
    table = heading("gained over plain", list(METRICS.values()))
    for row in (row for row in ROWS if row in values and row != "plain"):
        found = [
            difference(of(values, row, metric), of(values, "plain", metric)) for metric in METRICS
        ]
        table.append([row, *("–" if gain is None else str(gain) for gain in found)])
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="FILE.jsonl", help="as train.py writes it")
    parser.add_argument("--data", default="tail", choices=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
