#!/usr/bin/env python3
"""Turn the lines of a study into tables and a picture.

Run from the project's root: python -m studies.table. Prints the mean of every metric with its 95 %
confidence interval; the difference from the plain row or another, paired by seed, with its interval
and the p-value of Student's paired t-test; of AP or another metric, the p-value corrected for the
number of rows (Holm), the effect size, and the difference that so many seeds would show; and what
each row costs. With --together, also the differences in all data, paired by data and seed.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from math import isnan
from typing import Any, Dict, List, Sequence, Tuple

# First, so that importing Detectron2 is quiet.
from balanced_d2.utils.errors import UserError, check_choice, report_user_errors
from balanced_d2.visualization.figure import COLORS, GREY, new_figure, place_picture, save_figure

# isort: split
from matplotlib.figure import Figure

from studies.estimates import (
    Values,
    detectable,
    difference,
    effect_size,
    estimate,
    holm,
    p_as_text,
    paired,
)
from studies.study import read_lines

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")

Results = Dict[str, Dict[Any, Dict]]
"""The line of each run, by row and seed; of several data, by row and (data, seed)."""


def main(args: argparse.Namespace) -> None:
    plot = args.plot and place_picture(args.plot, ".", "study.png")
    lines = read_lines(args.results)
    if not lines:
        raise UserError(f"{args.results} has no results")
    compared = {}
    together: Results = defaultdict(dict)
    names = args.data or list(dict.fromkeys(line["data"] for line in lines))
    for data in names:
        results: Results = defaultdict(dict)
        for line in lines:
            if line["data"] == data and (not args.seeds or line["seed"] in args.seeds):
                row, seed = line["row"], line["seed"]
                if seed in results[row]:
                    raise UserError(
                        f"{args.results} has two lines for the row {row!r}, seed {seed} on {data}"
                    )
                results[row][seed] = line
        for row in (args.to, *(args.rows or ())):
            if row not in results:
                seeds = " with these seeds" if args.seeds else ""
                raise UserError(f"{args.results} has no line for the row {row!r} on {data}{seeds}")
        rows = [row for row in args.rows or results if row != args.to]
        results = {row: results[row] for row in (args.to, *rows)}
        for metric in (args.primary, *(args.metrics if plot else ())):
            check_choice(f"metric of {data}", metric, metrics_of(results))
        print_tables(
            data,
            mean_table(results),
            gain_table(results, args.to),
            power_table(results, args.to, args.primary),
            cost_table(results, args.to),
        )
        prefix = f"{data}: " if len(names) > 1 else ""
        compared.update({prefix + row: (results, row) for row in results})
        for row in results:
            together[row].update({(data, seed): line for seed, line in results[row].items()})
    if args.together:
        print_tables(
            f"{', '.join(names)} together",
            gain_table(together, args.to),
            power_table(together, args.to, args.primary),
        )
    if plot:
        save_figure(draw(compared, args.to, args.metrics), plot)
        print(f"picture: {plot}")


def values(results: Results, row: str, metric: str) -> Values:
    return {key: line["results"][metric] for key, line in results[row].items()}


def metrics_of(results: Results) -> List[str]:
    """All metrics that every run has, and the AP of each class and level."""
    runs = [line["results"] for lines in results.values() for line in lines.values()]
    names = [name for name in runs[0] if all(name in run for run in runs)]
    known = [name for name in METRICS if name in names]
    return [*known, *(name for name in names if name.startswith("AP-"))]


def mean_table(results: Results) -> List[List[str]]:
    metrics = metrics_of(results)
    table = [["mean", "seeds", *(name.removeprefix("AP-") for name in metrics)]]
    table.append(["---"] * len(table[0]))
    for row in results:
        means = [str(estimate(list(values(results, row, name).values()))) for name in metrics]
        table.append([row, str(len(results[row])), *means])
    return table


def gain_table(results: Results, to: str) -> List[List[str]]:
    metrics = metrics_of(results)
    table = [[f"gained over {to}", *(name.removeprefix("AP-") for name in metrics)]]
    table.append(["---"] * len(table[0]))
    for row in results:
        if row != to:
            gains = [
                difference(values(results, row, name), values(results, to, name))
                for name in metrics
            ]
            table.append([row, *("–" if gain is None else str(gain) for gain in gains)])
    return table


def power_table(results: Results, to: str, primary: str = "AP") -> List[List[str]]:
    table = [
        [
            *(f"{primary} over {to}", "pairs", "p", "p, corrected", "effect size (d_z)"),
            "would be found four times in five, not corrected",
        ],
        ["---"] * 6,
    ]
    base = values(results, to, primary)
    others = {row: values(results, row, primary) for row in results if row != to}
    gains = {row: difference(gained, base) for row, gained in others.items()}
    known = {row: gain.p for row, gain in gains.items() if gain and not isnan(gain.p)}
    for row, corrected in zip(known, holm(list(known.values()))):
        size = effect_size(others[row], base)
        table.append(
            [
                *(row, str(len(paired(others[row], base)))),
                *(p_as_text(known[row]), p_as_text(corrected)),
                "–" if isnan(size) else f"{size:+.2f}",
                f"± {detectable(others[row], base):.1f}",
            ]
        )
    return table


def cost_table(results: Results, to: str) -> List[List[str]]:
    table = [
        ["cost", "parameters", "ms per iteration", f"to {to}", "peak memory (MiB)"],
        ["---"] * 5,
    ]
    for row in results:
        lines, others = results[row], results[to]
        # Seed by seed, because the speed of a machine changes over the day.
        ratios = [
            lines[seed]["seconds_per_iteration"] / others[seed]["seconds_per_iteration"]
            for seed in lines.keys() & others.keys()
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


def print_tables(title: str, *tables: List[List[str]]) -> None:
    print(f"**{title}**\n")
    for table in tables:
        print("\n".join(map(as_markdown_row, table)) + "\n")


def as_markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(compared: Dict[str, Tuple[Results, str]], to: str, metrics: Sequence[str]) -> Figure:
    """Draw the gains of each row, by its label: every seed, and the mean with its interval. Of
    several data, those of one row are together."""
    rows = list(dict.fromkeys(row for _, row in compared.values()))
    others = {label: pair for label, pair in compared.items() if pair[1] != to}
    compared = dict(sorted(others.items(), key=lambda item: rows.index(item[1][1])))
    figure = new_figure(10, 0.4 * len(compared) + 1.3)
    all_axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)
    for axes, metric in zip(all_axes.flat, metrics):
        for y, (results, row) in enumerate(compared.values()):
            gained, base = values(results, row, metric), values(results, to, metric)
            each = paired(gained, base)
            axes.plot(each, [y] * len(each), "o", color=GREY, markersize=4, alpha=0.5)
            gain = difference(gained, base)
            if gain is not None and not isnan(gain.margin):
                axes.errorbar(gain.mean, y, xerr=gain.margin, fmt="D", color=COLORS[0], capsize=4)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(title=f"{metric} (points)", yticks=range(len(compared)))
        axes.set_yticklabels(compared)
        axes.grid(axis="x", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(
        f"gained over {to}: each seed, and the mean with its 95 % interval", fontsize=10
    )
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="FILE.jsonl", help="as train.py writes it")
    parser.add_argument("--data", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="only these, in this order; p-values are corrected for their number",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="only these")
    parser.add_argument("--to", default="plain", metavar="ROW", help="the row to compare with")
    parser.add_argument(
        "--primary", default="AP", metavar="METRIC", help="whose p-values are corrected"
    )
    parser.add_argument(
        "--together", action="store_true", help="also compare the runs on all data at once"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the gains")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["AP", "AP50", "AP75"],
        metavar="METRIC",
        help="in the picture (default: AP AP50 AP75)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
