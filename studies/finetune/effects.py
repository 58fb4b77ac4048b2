#!/usr/bin/env python3
"""What each balance changes, from the runs with all combinations of the three.

Run from the project's root: python -m studies.finetune.effects FILE.jsonl. Each balance is on in
half of the runs and off in the other half, which tells more than one row against plain. Least
squares with the seeds as blocks and without interactions, and Student's 95 % confidence intervals.
"""

import argparse
import sys
from typing import Dict, List, Sequence, Tuple

# First, so that importing Detectron2 is quiet.
from balanced_d2.utils.errors import UserError, report_user_errors

# isort: split
import numpy as np
from scipy import stats

from studies.estimates import CONFIDENCE, Difference
from studies.finetune.train import FEATURES, LOSS, ROWS, SAMPLING
from studies.study import read_lines
from studies.table import as_markdown_row

BALANCES = {"sampling": SAMPLING, "feature balance": FEATURES, "Balanced L1": LOSS}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def main(args: argparse.Namespace) -> None:
    combinations = combinations_of_balances()
    runs: Dict[Tuple[str, int], Dict] = {}
    for line in read_lines(args.results):
        if line["data"] == args.data and line["row"] in combinations:
            runs[line["row"], line["seed"]] = line["results"]
    seeds = sorted({seed for _, seed in runs})
    missing = [(row, seed) for row in combinations for seed in seeds if (row, seed) not in runs]
    if missing or not seeds:
        row, seed = missing[0] if missing else (next(iter(combinations)), 1)
        raise UserError(f"{args.results} has no line for {row!r}, seed {seed} on {args.data}")
    print(as_markdown_row(["on instead of off", *METRICS]))
    print(as_markdown_row(["---"] * (1 + len(METRICS))))
    effects = [
        main_effects(
            [combinations[row] for row, _ in runs],
            [seed for _, seed in runs],
            [results[metric] for results in runs.values()],
        )
        for metric in METRICS
    ]
    for name, of_balance in zip(BALANCES, zip(*effects)):
        print(as_markdown_row([name, *map(str, of_balance)]))


def combinations_of_balances() -> Dict[str, Tuple[bool, ...]]:
    """Which balances are on, of each row that has no other options."""
    found = {}
    for on in np.ndindex(2, 2, 2):
        options = [
            option for switch, balance in zip(on, BALANCES.values()) if switch for option in balance
        ]
        (row,) = (name for name, of_row in ROWS.items() if of_row == options)
        found[row] = tuple(map(bool, on))
    return found


def main_effects(
    switches: Sequence[Sequence[bool]], blocks: Sequence[int], values: Sequence[float]
) -> List[Difference]:
    """
    Args:
        switches: of N runs, which of S factors are on.
        blocks: of N runs, what they have in common with others, such as their seed.
        values: of N runs, what is measured.

    Returns:
        For each factor, how much larger the values are with it than without.
    """
    is_block = np.array([[block == other for other in sorted(set(blocks))] for block in blocks])
    design = np.hstack([np.array(switches, float), is_block])
    y = np.array(values, float)
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ design.T @ y
    freedom = len(y) - design.shape[1]
    variance = ((y - design @ solution) ** 2).sum() / freedom
    effects = []
    for i in range(len(switches[0])):
        error = np.sqrt(variance * inverse[i, i])
        margin = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error
        p = 2 * stats.t.sf(abs(solution[i]) / error, freedom)
        effects.append(Difference(float(solution[i]), float(margin), float(p)))
    return effects


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="FILE.jsonl", help="as train.py writes it")
    parser.add_argument("--data", default="aquarium", metavar="NAME")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
