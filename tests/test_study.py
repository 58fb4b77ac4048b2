"""studies/bccd_ablation: comparable and resumable runs, and correct tables."""

import json
import math
import sys
from itertools import islice

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from balanced_d2.config import load_config
from balanced_d2.data.datasets.shapes import TAIL, VERSION
from balanced_d2.data.loader import TrainLoader

from .conftest import ROOT, TINY_MODEL, load_tool, run_program, write_bccd

pytestmark = pytest.mark.slow

FOLDER = "studies/bccd_ablation"
# A few iterations (the first are not timed) of a tiny model that do not change its weights.
OPTS = [*TINY_MODEL[2:], "SOLVER.MAX_ITER", "5", "SOLVER.BASE_LR", "0.0"]


@pytest.fixture(scope="module")
def programs():
    """Programs of the study by name, which import each other."""
    pytest.importorskip("scipy")
    sys.path.insert(0, str(ROOT / FOLDER))
    try:
        yield {name: load_tool(name, FOLDER) for name in ("table", "gradients")}
    finally:
        sys.path.remove(str(ROOT / FOLDER))


@pytest.fixture
def table(programs):
    return programs["table"]


@pytest.fixture
def gradients(programs):
    return programs["gradients"]


def train(results, output, datasets, *arguments, opts=()):
    return run_program(
        f"{FOLDER}/train.py",
        *(*arguments, "--results", results, "--output", output, *OPTS, *opts),
        env={"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
    )


def test_runs_start_from_the_same_weights_and_are_not_repeated(tmp_path):
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

    plain = output / "bccd" / "plain-3" / "model_final.pth"
    result = run_program(
        *(f"{FOLDER}/gradients.py", "--config-file", "configs/BCCD/faster_rcnn_R_18_FPN.yaml"),
        *("--iterations", "1", *OPTS, "MODEL.WEIGHTS", plain),
        env={"DETECTRON2_DATASETS": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "| loss_box_reg | " in result.stdout and "| L1 | " in result.stdout

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
    assert math.isnan(table.estimate([1.0]).margin) and str(table.estimate([1.0])) == "1.0"

    plain = dict(enumerate(values))
    row = {seed: value + gain for (seed, value), gain in zip(plain.items(), (1, 2, 1, 3, 3))}
    gain = table.difference({**row, 99: 1000.0}, plain)  # a seed without a pair does not count
    assert gain.mean == pytest.approx(2)
    assert gain.margin == pytest.approx(2.776 * 1 / math.sqrt(5), rel=1e-3)
    # t = 4.472 with four degrees of freedom.
    assert gain.p == pytest.approx(0.0111, abs=2e-4)
    assert table.difference({0: 1.0}, plain) is None
    assert table.difference(plain, plain).p == 1
    assert table.difference(dict.fromkeys(plain, math.nan), plain) is None


def test_tables_and_picture(table, tmp_path):
    lines = [
        {
            **{"data": data, "row": row, "seed": seed, "parameters": 12_000_000},
            **{"seconds_per_iteration": seconds, "peak_memory_mib": 900},
            "results": {
                **dict.fromkeys(table.METRICS, 40.0 + seed + gain),
                **{"APl": math.nan, "AP-RBC": 60.0},
            },
        }
        for data, row, gain, seconds in (
            *(("bccd", "plain", 0, 1.0), ("bccd", "all", 2, 1.1)),
            *(("shapes_1", "plain", 9, 1.0), ("shapes_1", "all, averaged only", 0, 1.5)),
        )
        for seed in (1, 2, 3)
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = tmp_path / "gains.png"
    result = run_program(
        *(f"{FOLDER}/table.py", results, "--plot", picture, "--data", "bccd", "shapes_1")
    )
    assert result.returncode == 0, result.stderr
    assert picture.stat().st_size > 1000
    cells = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| all")]
    means, gains, costs, _, shapes_gains, shapes_costs = cells
    assert means[1:3] == ["3", "44.0 ± 2.5"] and means[7:9] == ["–", "60.0 ± 0.0 |"]
    assert gains[1] == "+2.0 ± 0.0 (p = 0.000)" and gains[6:] == ["–", "+0.0 ± 0.0 (p = 1.000) |"]
    assert costs[3] == "1.10"
    assert shapes_gains[1].startswith("-9.0 ± 0.0") and shapes_costs[3] == "1.50"
    result = run_program(f"{FOLDER}/table.py", results, "--to", "all")
    assert "| plain | -2.0 ± 0.0 (p = 0.000) | " in result.stdout, result.stderr
    result = run_program(f"{FOLDER}/table.py", results, "--data", "shapes_3")
    assert result.returncode == 2 and "no line for the row 'plain'" in result.stderr
    result = run_program(f"{FOLDER}/table.py", results, "--to", "best")
    assert result.returncode == 2 and "unknown row 'best'" in result.stderr


def test_inlier_shares(gradients):
    """By hand: the gradients of smooth L1 are 0.5, 1 and 1, those of L1 are 1, 1 and 1."""
    errors = torch.tensor([[0.5, -1.5, 3.0, 0.0]])
    balanced = 0.5 * math.log((math.exp(3) - 1) * 0.5 + 1)
    assert gradients.inlier_shares(errors) == pytest.approx(
        {"smooth L1, beta 1": 0.5 / 2.5, "L1": 1 / 3, "Balanced L1": balanced / (balanced + 3)}
    )
    share = gradients.inlier_table(errors)[-1]
    assert share == ["inliers among all", "50%"]


def test_gradients_are_those_of_training(gradients, tiny_coco):
    """Against the backward pass of the whole model, and the box loss summed up by hand."""
    name = "tiny_for_gradients"
    register_coco_instances(name, {}, str(tiny_coco), str(tiny_coco.parent / "images"))
    try:
        opts = [*OPTS, "MODEL.DEVICE", "cpu", "SEED", "3"]
        opts += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.3"]
        opts += ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
        cfg = load_config("configs/BCCD/faster_rcnn_R_18_FPN.yaml", opts)
        torch.manual_seed(0)
        model = build_model(cfg)
        measured = gradients.measure(cfg, model, 1)

        (batch,) = islice(TrainLoader(cfg), 1)
        gradients.seed_all(gradients.GRADIENT_SEEDS, cfg.SEED, 0)
        model.train()
        with EventStorage():
            losses = model(batch)
        sum(losses.values()).backward()
        norms = {key: parameter.grad.norm() for key, parameter in model.named_parameters()}
        shared = [norm for key, norm in norms.items() if key.startswith("backbone.")]
        assert measured.norms["all"] == [pytest.approx(float(torch.stack(shared).norm()), rel=1e-3)]
        assert measured.clipped == [sum(norm > 0.3 for norm in norms.values()) / len(norms)]
        assert 0 < measured.clipped[0] < 1
        num_samples = len(batch) * cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        box_loss = float(measured.errors.abs().sum()) / num_samples
        assert box_loss == pytest.approx(losses["loss_box_reg"].item(), rel=1e-4)
        assert len(measured.levels) == len(measured.errors) > 0
        # Images of 64 pixels: all boxes are far below 112, where P3 begins.
        assert gradients.level_table(cfg, measured)[-1][1:] == ["100.0%", "0.0%", "0.0%", "0.0%"]

        for key in ("loss_cls", "loss_rpn_cls"):  # alone, through the whole model
            model.zero_grad()
            gradients.seed_all(gradients.GRADIENT_SEEDS, cfg.SEED, 0)
            with EventStorage():
                model(batch)[key].backward()
            found = [p.grad.norm() for p in model.backbone.parameters() if p.grad is not None]
            norm = float(torch.stack(found).norm())
            assert measured.norms[key] == [pytest.approx(norm, rel=1e-3)]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# studies/class_balance


def test_class_balance(tmp_path):
    """Two rows on generated data in small, and what their lines become."""
    results, output = tmp_path / "results.jsonl", tmp_path / "output"
    shapes = output / "data" / "tail-7"
    json_file = write_bccd_as_tail(shapes)
    rows = ("--rows", "plain", "repeat factors and seesaw", "--seeds", "7")
    opts = [
        *OPTS,
        "SOLVER.MAX_ITER",
        "2",
        "SOLVER.AMP.ENABLED",
        "False",
        "TEST.AMP.ENABLED",
        "False",
    ]
    result = run_program(
        *("-m", "studies.class_balance.train", *rows, "--results", results),
        *("--output", output, *opts),
        env={"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["plain", "repeat factors and seesaw"]
    content = json.loads(json_file.read_text())
    images = [
        len({a["image_id"] for a in content["annotations"] if a["category_id"] == c["id"]})
        for c in content["categories"]
    ]
    number = len({a["image_id"] for a in content["annotations"]})
    threshold = f"{round(sum(images) / len(images) / number, 3):g}"
    assert lines[1]["options"][:4] == [
        *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        *("DATALOADER.REPEAT_THRESHOLD", threshold),
    ]
    assert {"AP", "APr", "APc", "APf"} <= lines[0]["results"].keys()

    for seed, gain in ((11, 4.0), (12, 6.0)):  # of which the table is
        for row, more in (("plain", 0.0), ("seesaw", gain)):
            found = dict.fromkeys(("AP", "APr", "APc", "APf"), 10.0 + more)
            line = {"data": "tail", "row": row, "seed": seed, "results": found}
            with open(results, "a") as file:
                file.write(json.dumps(line) + "\n")
    result = run_program(
        *("-m", "studies.class_balance.table", results, "--seeds", "11", "12"),
    )
    assert result.returncode == 0, result.stderr
    assert "| plain | 2 | 10.0 ± 0.0 | " in result.stdout
    assert "| seesaw | +5.0 ± 12.7 (p = 0.126) | " in result.stdout
    result = run_program("-m", "studies.class_balance.table", results, "--data", "aquarium")
    assert result.returncode == 2 and "no line for the row 'plain'" in result.stderr


def write_bccd_as_tail(folder):
    """A few images in the place of those that would be drawn; the file of the training split."""
    write_bccd(folder.parent)
    (folder.parent / "bccd").rename(folder)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"][0]["category_id"] = 3
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(json.dumps(content))
        (folder / split).symlink_to(folder / "images")
    info = {"generator": "balanced_shapes", "version": VERSION, **TAIL._replace(seed=7)._asdict()}
    (folder / "info.json").write_text(json.dumps(info))
    return folder / "train.json"
