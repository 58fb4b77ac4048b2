"""Timing in turns, and peaks of memory."""

import math
import statistics
import time

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm


class Bench:
    """Runs comparisons on a device and keeps their results.

    Args:
        device: "cpu" or "cuda".
        turns: how often each variant is run.
    """

    def __init__(self, device: str, turns: int):
        self.device = torch.device(device)
        self.turns = turns
        self.results = {}

    def compare(
        self, title: str, variants: dict, calls: int = 1, settle: int = 0, memory: bool = True
    ) -> dict:
        """Time functions in turns, print the table and keep the figures.

        Args:
            variants: functions by name; ratios are to the first.
            calls: how often a function is called in each measurement.
            settle: how often before it, which is not measured: where variants are of several
                libraries, the threads of one still take time for a while when another is called.
            memory: whether to measure the peak of the memory that each allocates.
        """
        seconds = {name: [] for name in variants}
        for run in variants.values():  # warm-up
            run()
        for _ in tqdm(range(self.turns), desc=title, unit="turn", disable=None, leave=False):
            for name, run in variants.items():
                for _ in range(settle):
                    run()
                seconds[name].append(self.seconds(run, calls))
        first = next(iter(variants))
        rows = {}
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds[first])]
            rows[name] = {
                "median_ms": 1e3 * statistics.median(times),
                "min_ms": 1e3 * min(times),
                "max_ms": 1e3 * max(times),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
            if memory:
                rows[name]["peak_mib"] = self.peak(variants[name]) / 2**20
        self.results[title] = rows
        print(f"\n{title}\n{self._table(rows, first, memory)}", flush=True)
        return rows

    def _table(self, rows: dict, first: str, memory: bool) -> str:
        columns = ["", "median (ms)", "range (ms)", f"/ {first}", "range of it"]
        columns += ["peak (MiB)"] * memory
        lines = []
        for name, row in rows.items():
            lines.append(
                [
                    name,
                    f"{row['median_ms']:.4g}",
                    f"{row['min_ms']:.4g} - {row['max_ms']:.4g}",
                    f"{row['ratio']:.3f}",
                    f"{min(row['ratios']):.2f} - {max(row['ratios']):.2f}",
                    *([f"{row['peak_mib']:.0f}"] if memory else []),
                ]
            )
        return tabulate(lines, columns, disable_numparse=True, stralign="right")

    def seconds(self, run, calls: int) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3 / calls
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def peak(self, run) -> float:
        """The most bytes that a function has allocated at one time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def growth(self, title: str, runs: dict) -> None:
        """Fit how time and memory grow with a size: runs by size."""
        rows = {}
        for size, run in runs.items():
            run()
            times = [self.seconds(run, 1) for _ in range(self.turns)]
            rows[size] = {
                "median_ms": 1e3 * statistics.median(times),
                "peak_mib": self.peak(run) / 2**20,
            }
        log_size = np.log(list(rows))
        exponents = {
            key: float(np.polyfit(log_size, [math.log(row[key]) for row in rows.values()], 1)[0])
            for key in ("median_ms", "peak_mib")
        }
        self.results[title] = {"sizes": rows, "exponents": exponents}
        lines = [
            (f"x {size}", f"{row['median_ms']:.4g}", f"{row['peak_mib']:.1f}")
            for size, row in rows.items()
        ]
        lines.append(("exponent", f"{exponents['median_ms']:.2f}", f"{exponents['peak_mib']:.2f}"))
        columns = ("", "median (ms)", "peak (MiB)")
        print(f"\n{title}\n{tabulate(lines, columns, disable_numparse=True, stralign='right')}")
