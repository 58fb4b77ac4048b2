"""studies/bccd_ablation: runs that are comparable and resumable, and honest tables."""

import json
import math
import sys

import pytest
import torch

from .conftest import ROOT, TINY_MODEL, load_tool, run_program, write_bccd

FOLDER = "studies/bccd_ablation"
# A few iterations (the first are not timed) that change no weight, of a tiny model.
OPTS = [*TINY_MODEL[2:], "SOLVER.MAX_ITER", "5", "SOLVER.BASE_LR", "0.0"]


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("scipy")
    sys.path.insert(0, str(ROOT / FOLDER))
    try:
        yield load_tool("table", FOLDER)
    finally:
        sys.path.remove(str(ROOT / FOLDER))


def train(results, output, datasets, *arguments, opts=()):
    return run_program(
        f"{FOLDER}/train.py",
        *(*arguments, "--results", results, "--output", output, *OPTS, *opts),
        env={"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
    )


def test_runs_begin_alike_and_are_not_repeated(tmp_path):
    write_bccd(tmp_path / "datasets")
    results, output = tmp_path / "results.jsonl", tmp_path / "output"
    arguments = (results, output, tmp_path / "datasets")
    done = {"data": "bccd", "row": "sampling", "seed": 3}
    results.write_text(json.dumps(done) + "\n")
    rows = ("--rows", "plain", "sampling", "all", "--seeds", "3")
    result = train(*arguments, *rows, "--jobs", "2")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert lines[0] == done and {line["row"] for line in lines[1:]} == {"plain", "all"}
    by_row = {line["row"]: line for line in lines[1:]}
    # The balancer: four convolutions of 16 to 16 channels, with biases.
    more = by_row["all"]["parameters"] - by_row["plain"]["parameters"]
    assert more == 4 * (16 * 16 + 16)
    for line in by_row.values():
        assert line["iterations"] == 5 and line["seconds_per_iteration"] > 0
        assert {"AP", "AP50", "AP75", "AP-bright"} <= set(line["results"])

    initial = torch.load(output / "bccd" / "initial-3.pth", weights_only=True)["model"]
    for row in by_row:
        final = output / "bccd" / f"{row}-3" / "model_final.pth"
        weights = torch.load(final, weights_only=True)["model"]
        assert set(initial) <= set(weights)
        for name, value in initial.items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(weights[name], value), name

    before = results.read_text()
    assert train(*arguments, *rows).returncode == 0
    assert results.read_text() == before
    result = train(*arguments, "--rows", "everything")
    assert result.returncode == 2 and "unknown row 'everything'" in result.stderr
    result = train(*arguments, "--rows", "plain", "--seeds", "4", opts=["MODEL.RESNETS.DEPTH", "7"])
    assert result.returncode != 0 and len(results.read_text().splitlines()) == len(lines)


def test_estimates(table):
    """Against a table of Student's t: 2.776 for four degrees of freedom, 95 %."""
    values = [50.0, 52.0, 51.0, 54.0, 53.0]
    mean, margin = table.estimate(values)
    assert mean == 52
    assert margin == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert math.isnan(table.estimate([1.0]).margin)

    plain = dict(enumerate(values))
    row = {seed: value + gain for (seed, value), gain in zip(plain.items(), (1, 2, 1, 3, 3))}
    gain = table.difference({**row, 99: 1000.0}, plain)  # a seed without its pair does not count
    assert gain.mean == pytest.approx(2)
    assert gain.margin == pytest.approx(2.776 * 1 / math.sqrt(5), rel=1e-3)
    # t = 4.472 with four degrees of freedom.
    assert gain.p == pytest.approx(0.0111, abs=2e-4)
    assert table.difference({0: 1.0}, plain) is None
    assert table.difference(plain, plain).p == 1


def test_tables_and_picture(table, tmp_path):
    lines = [
        {
            **{"data": "bccd", "row": row, "seed": seed, "parameters": 12_000_000},
            **{"seconds_per_iteration": seconds, "peak_memory_mib": 900},
            "results": {**dict.fromkeys(table.METRICS, 40.0 + seed + gain), "AP-RBC": 60.0},
        }
        for row, gain, seconds in (("plain", 0, 1.0), ("all", 2, 1.1))
        for seed in (1, 2, 3)
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = tmp_path / "gains.png"
    result = run_program(f"{FOLDER}/table.py", results, "--plot", picture)
    assert result.returncode == 0, result.stderr
    assert picture.stat().st_size > 1000
    cells = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| all")]
    assert cells[0][1:3] == ["3", "44.0 ± 2.5"] and cells[0][-2] == "+2.0 ± 0.0 (p = 0.000)"
    assert cells[2][3] == "1.10"
    result = run_program(f"{FOLDER}/table.py", results, "--data", "shapes_1")
    assert result.returncode == 2 and "no line of the row 'plain'" in result.stderr
