#!/usr/bin/env python3
"""Turn the lines of a study into tables and a picture.

Prints the mean of every metric with its 95 % confidence interval, and the difference to the plain
row, paired by seed, with its interval and the p-value of Student's t-test for pairs.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from scipy import stats

# First, so that importing Detectron2 is quiet.
from balanced_d2.errors import UserError, tell_user_errors
from balanced_d2.visualization.figure import COLORS, GREY, new_figure, place_picture, save_figure

# isort: split
from matplotlib.figure import Figure
from train import ROWS, read_lines

PLAIN = next(iter(ROWS))
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CONFIDENCE = 0.95

Results = Dict[str, Dict[int, Dict]]
"""The line of each run by row and seed."""


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its confidence interval (NaN for a single seed)."""

    mean: float
    margin: float

    def __str__(self) -> str:
        if np.isnan(self.mean):  # no such objects in the data
            return "–"
        return f"{self.mean:.1f} ± {self.margin:.1f}"


class Difference(NamedTuple):
    """The mean of differences paired by seed, with its margin and p-value."""

    mean: float
    margin: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.margin:.1f} (p = {self.p:.3f})"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and the margin of Student's t-distribution."""
    number = len(values)
    if number < 2:
        return Estimate(float(np.mean(values)), float("nan"))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1)
    return Estimate(
        float(np.mean(values)), float(quantile * np.std(values, ddof=1) / np.sqrt(number))
    )


def difference(row: Dict[int, float], plain: Dict[int, float]) -> Optional[Difference]:
    """What a row gains over plain; None with fewer than two seeds in common."""
    seeds = sorted(row.keys() & plain.keys())
    if len(seeds) < 2:
        return None
    differences = [row[seed] - plain[seed] for seed in seeds]
    p = 1.0 if not any(differences) else stats.ttest_1samp(differences, 0).pvalue
    return Difference(*estimate(differences), float(p))


def main(args: argparse.Namespace) -> None:
    plot = args.plot and place_picture(args.plot, ".", "study.png")
    results: Results = defaultdict(dict)
    for line in read_lines(args.results):
        if line["data"] == args.data:
            results[line["row"]][line["seed"]] = line
    if PLAIN not in results:
        raise UserError(f"{args.results} has no line of the row {PLAIN!r} on {args.data}")
    for table in (metric_table(results), class_table(results), cost_table(results)):
        print("\n".join(map(as_markdown_row, table)) + "\n")
    if plot:
        save_figure(draw(results, args.data), plot)
        print(f"picture: {plot}")


def values(results: Results, row: str, metric: str) -> Dict[int, float]:
    return {seed: line["results"][metric] for seed, line in results[row].items()}


def rows_of(results: Results) -> List[str]:
    return [row for row in ROWS if row in results]


def metric_table(results: Results) -> List[List[str]]:
    table = [["", "seeds", *METRICS, "AP to plain", "AP50 to plain"], ["---"] * (len(METRICS) + 4)]
    for row in rows_of(results):
        gains = [
            difference(values(results, row, metric), values(results, PLAIN, metric))
            for metric in ("AP", "AP50")
        ]
        table.append(
            [
                row,
                str(len(results[row])),
                *(str(estimate(list(values(results, row, m).values()))) for m in METRICS),
                *("–" if row == PLAIN or gain is None else str(gain) for gain in gains),
            ]
        )
    return table


def class_table(results: Results) -> List[List[str]]:
    first = next(iter(results[PLAIN].values()))["results"]
    metrics = [name for name in first if name.startswith("AP-")]
    head = ["", *(name.removeprefix("AP-") for name in metrics)]
    table = [[*head, *(f"{name} to plain" for name in head[1:])], ["---"] * (1 + 2 * len(metrics))]
    for row in rows_of(results):
        gains = [
            difference(values(results, row, metric), values(results, PLAIN, metric))
            for metric in metrics
        ]
        table.append(
            [
                row,
                *(str(estimate(list(values(results, row, m).values()))) for m in metrics),
                *("–" if row == PLAIN or gain is None else str(gain) for gain in gains),
            ]
        )
    return table


def cost_table(results: Results) -> List[List[str]]:
    table = [["", "parameters", "ms per iteration", "to plain", "peak memory (MiB)"], ["---"] * 5]
    for row in rows_of(results):
        lines, plain = results[row], results[PLAIN]
        # Seed by seed, since the speed of a machine changes over a day.
        ratios = [
            lines[seed]["seconds_per_iteration"] / plain[seed]["seconds_per_iteration"]
            for seed in lines.keys() & plain.keys()
        ]

        def median(key: str, lines=lines) -> float:
            return statistics.median(line[key] for line in lines.values())

        table.append(
            [
                row,
                f"{median('parameters') / 1e6:.3f} M",
                f"{1000 * median('seconds_per_iteration'):.0f}",
                f"{statistics.median(ratios):.2f}" if ratios else "–",
                f"{median('peak_memory_mib'):.0f}",
            ]
        )
    return table


def as_markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(results: Results, data: str) -> Figure:
    """The gain over plain of each row, seed by seed, with the mean and its interval."""
    rows = [row for row in rows_of(results) if row != PLAIN]
    figure = new_figure(8, 0.5 * len(rows) + 1.3)
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("AP", "AP50")):
        plain = values(results, PLAIN, metric)
        for y, row in enumerate(rows):
            gained = values(results, row, metric)
            each = [gained[seed] - plain[seed] for seed in gained.keys() & plain.keys()]
            axes.plot(each, [y] * len(each), "o", color=GREY, markersize=4, alpha=0.5)
            gain = difference(gained, plain)
            if gain is not None:
                axes.errorbar(gain.mean, y, xerr=gain.margin, fmt="D", color=COLORS[0], capsize=4)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(title=f"{metric} gained over plain (points)", yticks=range(len(rows)))
        axes.set_yticklabels(rows)
        axes.grid(axis="x", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(f"{data}: each seed, and the mean with its 95 % interval", fontsize=10)
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="FILE.jsonl", help="as train.py writes it")
    parser.add_argument("--data", default="bccd", metavar="NAME")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the gains")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(tell_user_errors(main, parse_args()))
