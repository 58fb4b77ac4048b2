"""studies/: comparable and resumable runs, and correct tables."""

import argparse
import fcntl
import importlib
import json
import math
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from balanced_d2.config import load_config
from balanced_d2.data.datasets.shapes import TAIL, VERSION
from balanced_d2.data.loader import TrainLoader
from balanced_d2.utils.errors import UserError

from .conftest import TINY_MODEL, run_program, write_bccd

pytestmark = pytest.mark.slow

# A few iterations (the first are not timed) of a tiny model that do not change its weights.
OPTS = [*TINY_MODEL[2:], "SOLVER.MAX_ITER", "5", "SOLVER.BASE_LR", "0.0"]


@pytest.fixture(scope="module")
def gradients():
    pytest.importorskip("scipy")
    return importlib.import_module("studies.gradients")


@pytest.fixture(scope="module")
def estimates():
    pytest.importorskip("scipy")
    return importlib.import_module("studies.estimates")


def train(results, output, datasets, *arguments, opts=(), study="bccd_ablation"):
    return run_program(
        *("-m", f"studies.{study}.train", "--results", results, "--output", output),
        *(*arguments, *OPTS, *opts),
        env={"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
    )


def test_runs_start_from_the_same_weights_and_are_not_repeated(tmp_path):
    write_bccd(tmp_path / "datasets")
    results, output = tmp_path / "results.jsonl", tmp_path / "output"
    arguments = (results, output, tmp_path / "datasets")
    done = {"data": "bccd", "row": "sampling", "seed": 3, "iterations": 5}
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
        assert list(final.parent.glob("*.pth")) == [final]
        weights = torch.load(final, weights_only=True)["model"]
        assert set(initial) <= set(weights)
        for name, value in initial.items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(weights[name], value), name

    plain = output / "bccd" / "plain-3" / "model_final.pth"
    result = run_program(
        *(
            "-m",
            "studies.gradients",
            "--config-file",
            "configs/BCCD/faster_rcnn_R_18_FPN.yaml",
        ),
        *("--iterations", "1", *OPTS, "MODEL.WEIGHTS", plain),
        env={"DETECTRON2_DATASETS": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "| loss_box_reg | " in result.stdout and "| L1 | " in result.stdout

    before = results.read_text()
    assert train(*arguments, *rows).returncode == 0
    assert results.read_text() == before
    result = train(*arguments, *rows, opts=["SOLVER.MAX_ITER", "6"])
    assert result.returncode == 2 and "runs on bccd that are not of 6 iterations" in result.stderr
    result = train(*arguments, "--rows", "everything")
    assert result.returncode == 2 and "unknown row 'everything'" in result.stderr
    # Runs of other options would be continued, or start from weights of another model.
    other = ("--rows", "plain", "--seeds", "4")
    result = train(*arguments, *other, opts=["MODEL.RESNETS.DEPTH", "7"])
    assert result.returncode == 2 and "has runs with other options" in result.stderr
    arguments = (results, tmp_path / "of_depth_7", tmp_path / "datasets")
    result = train(*arguments, *other, opts=["MODEL.RESNETS.DEPTH", "7"])
    assert result.returncode != 0 and results.read_text() == before
    # A run that was trained, but whose line was lost, is only evaluated again.
    results.write_text("".join(before.splitlines(keepends=True)[:-1]))
    assert train(results, output, tmp_path / "datasets", *rows).returncode == 0
    again = json.loads(results.read_text().splitlines()[-1])
    assert (again["row"], again["results"]) == (lines[-1]["row"], lines[-1]["results"])


def test_runs_of_several_processes(tmp_path):
    """None is trained by two at once, or again when another has finished it."""
    from studies.study import Data, Run, Study, _Program

    results = tmp_path / "results.jsonl"
    study = Study({"plain": []}, {}, {"bccd": Data("any.yaml", 3)}, "no_such_program.py")
    args = argparse.Namespace(data="bccd", jobs=1, output=str(tmp_path), results=str(results))
    args.opts = []
    program, run = _Program(study, args), Run("bccd", "plain", 1)
    assert "exit code" in program._train(run)
    with open(tmp_path / "bccd" / "plain-1" / "output.txt") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert program._train(run) == "another process is at it"
    results.write_text(json.dumps(run._asdict()) + "\n")
    assert program._train(run) == ""


def test_a_line_that_is_cut_off(tmp_path):
    """As a crash of the machine may leave the last one."""
    from studies.study import read_lines

    results = tmp_path / "results.jsonl"
    results.write_text('{"seed": 1}\n{"seed": 2}\n{"se')
    with pytest.raises(UserError, match="line 3 is cut off"):
        read_lines(str(results))
    results.write_text('{"seed": 1}\n')
    assert read_lines(str(results)) == [{"seed": 1}] and read_lines(f"{results}.other") == []


def test_estimates(estimates):
    """Against a table of Student's t: 2.776 for four degrees of freedom, 95 %."""
    values = [50.0, 52.0, 51.0, 54.0, 53.0]
    mean, margin = estimates.estimate(values)
    assert mean == 52
    assert margin == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert math.isnan(estimates.estimate([1.0]).margin) and str(estimates.estimate([1.0])) == "1.0"

    plain = dict(enumerate(values))
    row = {seed: value + gain for (seed, value), gain in zip(plain.items(), (1, 2, 1, 3, 3))}
    gain = estimates.difference({**row, 99: 1000.0}, plain)  # a seed without a pair does not count
    assert gain.mean == pytest.approx(2)
    assert gain.margin == pytest.approx(2.776 * 1 / math.sqrt(5), rel=1e-3)
    # t = 4.472 with four degrees of freedom.
    assert gain.p == pytest.approx(0.0111, abs=2e-4)
    single = estimates.difference({0: 51.0, 99: 1.0}, plain)
    assert str(single) == "+1.0" and math.isnan(single.p)
    assert estimates.difference({99: 1.0}, plain) is None
    assert str(estimates.Difference(1.0, 0.5, 0.0004)) == "+1.0 ± 0.5 (p < 0.001)"
    assert str(estimates.Difference(1.0, 0.5, 0.0006)) == "+1.0 ± 0.5 (p = 0.001)"
    assert estimates.difference(plain, plain).p == 1
    assert estimates.difference(dict.fromkeys(plain, math.nan), plain) is None


def test_corrected_p_values(estimates):
    """By hand: 4 x 0.01, 3 x 0.02, 2 x 0.04, 0.04 and never below the one before."""
    assert estimates.holm([0.04, 0.01, 0.02, 0.04]) == pytest.approx([0.08, 0.04, 0.06, 0.08])
    assert estimates.holm([0.6, 0.9]) == [1.0, 1.0] and estimates.holm([]) == []


def test_what_so_many_seeds_can_find(estimates):
    """Against draws: a difference of that size is found four times in five."""
    generator = np.random.default_rng(0)
    base = dict.fromkeys(range(8), 0.0)
    row = dict(enumerate([1.0, -1.0, 2.0, -2.0, 1.0, -1.0, 2.0, -2.0]))
    deviation = math.sqrt(20 / 7)
    size = estimates.detectable(row, base)
    draws = generator.normal(size, deviation, (20_000, 8))
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(8))
    found = (abs(t) > 2.3646).mean()  # Student's t, seven degrees of freedom, 95 %
    assert found == pytest.approx(0.8, abs=0.012)  # four standard errors
    assert estimates.effect_size({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0}) == pytest.approx(math.sqrt(2))
    assert math.isnan(estimates.effect_size(base, base))
    assert math.isnan(estimates.detectable({0: 1.0}, {0: 2.0}))


def test_ap_of_each_level(tmp_path):
    """Images are shown at half their size; P3 begins at 112 pixels there. A box of exactly that
    size belongs to P3 alone."""
    from studies.levels import ap_by_level

    cfg = load_config("configs/BCCD/faster_rcnn_R_18_FPN.yaml", ["INPUT.MIN_SIZE_TEST", "400"])
    boxes = [[0, 0, 220, 220], [300, 0, 224, 224], [600, 0, 100, 100], [0, 300, 450, 450]]
    images = [{"id": 7, "width": 1000, "height": 800, "file_name": "a.jpg"}]
    content = {
        "images": images,
        "categories": [{"id": 3, "name": "x"}],
        "annotations": [
            {
                **{"id": i, "image_id": 7, "category_id": 3, "bbox": box, "iscrowd": 0},
                "area": box[2] * box[3] / 2,  # of a mask: it does not decide
            }
            for i, box in enumerate(boxes, 1)
        ],
    }
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    truth.write_text(json.dumps(content))
    detections = [
        {"image_id": 7, "category_id": 3, "bbox": box, "score": 0.9} for box in (boxes[0], boxes[3])
    ]
    found.write_text(json.dumps(detections))
    aps = ap_by_level(cfg, str(truth), str(found))
    # Of two objects on P2 one is found: 51 of 101 recalls are reached.
    assert aps.pop("AP-level p5") != aps.get("AP-level p5")  # NaN: no objects
    assert aps == {
        "AP-level p2": pytest.approx(100 * 51 / 101),
        "AP-level p3": 0.0,
        "AP-level p4": pytest.approx(100),
    }
    found.write_text("[]")
    aps = ap_by_level(cfg, str(truth), str(found))
    assert math.isnan(aps.pop("AP-level p5")) and set(aps.values()) == {0.0}


def test_tables_and_picture(tmp_path):
    lines = [
        {
            **{"data": data, "row": row, "seed": seed, "parameters": 12_000_000},
            **{"seconds_per_iteration": seconds, "peak_memory_mib": 900},
            "results": {
                **dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 40.0 + seed + gain),
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
        *("-m", "studies.table", results, "--plot", picture, "--data", "bccd", "shapes_1")
    )
    assert result.returncode == 0, result.stderr
    assert picture.stat().st_size > 1000
    cells = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| all")]
    means, gains, powers, costs, _, shapes_gains, _, shapes_costs = cells
    assert means[1:3] == ["3", "44.0 ± 2.5"] and means[7:9] == ["–", "60.0 ± 0.0 |"]
    assert gains[1] == "+2.0 ± 0.0 (p < 0.001)" and gains[6:] == ["–", "+0.0 ± 0.0 (p = 1.000) |"]
    assert powers[1:] == ["3", "< 0.001", "< 0.001", "–", "± 0.0 |"] and costs[3] == "1.10"
    assert shapes_gains[1].startswith("-9.0 ± 0.0") and shapes_costs[3] == "1.50"
    result = run_program("-m", "studies.table", results, "--to", "all")
    assert "| plain | -2.0 ± 0.0 (p < 0.001) | " in result.stdout, result.stderr
    result = run_program("-m", "studies.table", results, "--data", "shapes_3")
    assert result.returncode == 2 and "no line for the row 'plain'" in result.stderr
    result = run_program("-m", "studies.table", results, "--to", "best")
    assert result.returncode == 2 and "no line for the row 'best'" in result.stderr
    plot = ("-m", "studies.table", results, "--data", "bccd", "--plot", picture, "--metrics")
    result = run_program(*plot, "AP50", "AP-RBC")
    assert result.returncode == 0, result.stderr
    result = run_program(*plot, "APr")
    assert result.returncode == 2 and "metric of bccd" in result.stderr, result.stderr
    bccd = ("-m", "studies.table", results, "--data", "bccd")
    result = run_program(*bccd, "--primary", "AP-RBC", "--seeds", "1", "2")
    assert "| AP-RBC over plain | " in result.stdout and "| all | 2 | 1.000 | " in result.stdout
    result = run_program(*bccd, "--seeds", "1", "--plot", picture)
    assert "| all | +2.0 | " in result.stdout and result.returncode == 0, result.stderr
    result = run_program(*bccd, "--seeds", "7")
    assert result.returncode == 2 and "on bccd with these seeds" in result.stderr
    with open(results, "a") as file:
        file.write(json.dumps(lines[0]) + "\n")
    result = run_program(*bccd)
    assert result.returncode == 2 and "two lines for the row 'plain', seed 1" in result.stderr
    result = run_program("-m", "studies.table", tmp_path / "nothing.jsonl")
    assert result.returncode == 2 and "has no results" in result.stderr


def test_table_of_all_data_together(tmp_path):
    """A run is paired with that of the same data: the gains are 1, 1, -7 and -7."""
    lines = [
        {
            **{"data": data, "row": row, "seed": seed, "parameters": 1},
            **{"seconds_per_iteration": 1.0, "peak_memory_mib": 1, "results": {"AP": ap}},
        }
        for data, row, ap in (
            *(("bccd", "plain", 40.0), ("bccd", "all", 41.0)),
            *(("shapes_1", "plain", 60.0), ("shapes_1", "all", 53.0)),
        )
        for seed in (1, 2)
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_program("-m", "studies.table", results, "--together")
    assert result.returncode == 0, result.stderr
    together = result.stdout.split("**bccd, shapes_1 together**")[1]
    # Student's t for three degrees of freedom: the quantile of 95 %, and the distribution at 1.3.
    margin = 3.182 * math.sqrt(64 / 3) / 2
    p = 1 - 2 / math.pi * (math.atan(0.75) + 0.75 / (1 + 0.75**2))
    assert f"| all | -3.0 ± {margin:.1f} (p = {p:.3f}) |" in together
    assert f"| all | 4 | {p:.3f} | " in together


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
    opts = ["SOLVER.AMP.ENABLED", "False", "TEST.AMP.ENABLED", "False"]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    result = train(results, output, tmp_path, *rows, opts=opts, study="class_balance")
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
            line |= {"parameters": 1, "seconds_per_iteration": 1.0, "peak_memory_mib": 1}
            with open(results, "a") as file:
                file.write(json.dumps(line) + "\n")
    result = run_program(
        *("-m", "studies.table", results, "--data", "tail", "--seeds", "11", "12"),
    )
    assert result.returncode == 0, result.stderr
    assert "| plain | 2 | 10.0 ± 0.0 | " in result.stdout
    assert "| seesaw | +5.0 ± 12.7 (p = 0.126) | " in result.stdout
    result = run_program("-m", "studies.table", results, "--data", "aquarium")
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


# studies/finetune


def test_finetune(tmp_path):
    """The rows whose parts are not in other studies, in small."""
    write_bccd(tmp_path / "datasets")
    results = tmp_path / "results.jsonl"
    arguments = (results, tmp_path / "output", tmp_path / "datasets", "--data", "bccd")
    rows = ("plain", "sampling, bins of MMDetection", "feature balance at once, pooled keys")
    opts = ["MODEL.TIMM.PRETRAINED", "False", "SOLVER.AMP.ENABLED", "False"]
    opts += ["TEST.AMP.ENABLED", "False"]
    result = train(*arguments, "--rows", *rows, "--seeds", "1", opts=opts, study="finetune")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(rows)
    for line in lines:
        assert {"AP", "AP-level p2", "AP-level p5"} <= set(line["results"])
    for row in rows:
        output = tmp_path / "output" / "bccd" / f"{row.replace(' ', '_')}-1"
        names = (output / "config.yaml").read_text()
        assert ("iou_balanced_up_to_1" in names) == (row == rows[1])


def test_bins_of_mmdetection():
    """No negative is in the last bin, so its share is drawn from all others."""
    from balanced_d2.modeling import NEGATIVE_SAMPLERS
    from studies.finetune import train_net

    assert NEGATIVE_SAMPLERS.get("iou_balanced_up_to_1") is train_net.UpToOne
    cfg = load_config("configs/BCCD/faster_rcnn_R_18_FPN.yaml", [])
    sampler = NEGATIVE_SAMPLERS.build(
        "iou_balanced_up_to_1", cfg.MODEL.ROI_HEADS, iou_range=(0.0, 0.5)
    )
    ious = torch.cat([torch.full((900,), 0.1), torch.full((100,), 0.4)])
    torch.manual_seed(0)
    hard = [int((ious[sampler(ious, 90)] > 0.3).sum()) for _ in range(400)]
    # 30 of the hundred of the second bin, and of the other 30 of 940 that 70 of them are in.
    assert np.mean(hard) == pytest.approx(30 + 30 * 70 / 940, abs=0.3)


def test_effects_are_differences_of_means_within_seeds():
    """All combinations of the balances, with as many runs each: written out in plain loops."""
    pytest.importorskip("scipy")
    effects = importlib.import_module("studies.finetune.effects")
    rows = effects.combinations_of_balances()
    assert rows["plain"] == (False, False, False) and rows["all"] == (True, True, True)
    assert rows["sampling and Balanced L1"] == (True, False, True) and len(set(rows.values())) == 8

    random = np.random.default_rng(0)
    runs = [(switches, seed) for switches in rows.values() for seed in (1, 2, 3)]
    values = [3 * on[0] - 5 * on[2] + 10 * seed + random.normal() for on, seed in runs]
    found = effects.main_effects(*map(list, zip(*runs)), values)

    expected, residuals = [], list(values)
    for factor in range(3):
        on = sum(v for (switches, _), v in zip(runs, values) if switches[factor]) / 12
        off = sum(v for (switches, _), v in zip(runs, values) if not switches[factor]) / 12
        expected.append(on - off)
    for i, (switches, seed) in enumerate(runs):
        residuals[i] -= sum(v for (_, s), v in zip(runs, values) if s == seed) / 8
        for factor in range(3):
            residuals[i] -= expected[factor] * (0.5 if switches[factor] else -0.5)
    deviation = math.sqrt(sum(r * r for r in residuals) / (24 - 1 - 2 - 3))
    for effect, difference in zip(found, expected):
        assert effect.mean == pytest.approx(difference)
        # 2.1009: of Student's t, 18 degrees of freedom, 95 %
        assert effect.margin == pytest.approx(2.1009 * deviation * math.sqrt(2 / 12), rel=1e-4)
    assert found[0].p < 1e-4 and found[1].p > 1e-3
