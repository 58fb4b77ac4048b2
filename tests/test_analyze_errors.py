"""AP by class and size, the kinds of errors, their picture, and tools/analyze_errors.py."""

import contextlib
import copy
import csv
import io
import json
import math
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from matplotlib.text import Text
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from balanced_d2.evaluation.errors import KINDS, Breakdown, analyze_errors
from balanced_d2.evaluation.matching import match
from balanced_d2.utils.errors import UserError, report_user_errors
from balanced_d2.visualization.error_chart import draw_error_chart
from balanced_d2.visualization.score_chart import draw_score_chart

from .conftest import load_tool

NO_ERRORS = dict.fromkeys(KINDS, 0)


def scene(truth, classes=("cat", "dog"), num_images=1):
    """Annotations from (image, class, box) or (image, class, box, "crowd"); ids start at 1."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": int(bool(crowd)),
            }
            for number, (image, category, box, *crowd) in enumerate(truth)
        ],
    }


def detect(*detections):
    """Predictions from (image, class, box, score)."""
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, detection, strict=True)) for detection in detections]


CAT, DOG = 1, 2
OBJECT, FAR = (100, 100, 100, 100), (400, 300, 50, 50)
HALF = (100, 100, 100, 40)  # IoU with OBJECT: 0.4
TRUE = (1, CAT, OBJECT, 0.9)

# Detections in an image with one cat, OBJECT; the number of errors; AP50, which is that of cats
# alone; and what the errors cost. If two errors each prevent a match, neither alone costs anything.
SCENES = {
    "found": ([TRUE], {}, 100, {}),
    "nothing detected": ([], {"missed": 1}, 0, {"missed": 100}),
    "classification": ([(1, DOG, OBJECT, 0.9)], {"classification": 1}, 0, {"classification": 100}),
    "localisation": ([(1, CAT, HALF, 0.9)], {"localisation": 1}, 0, {"localisation": 100}),
    "both": ([(1, DOG, HALF, 0.9)], {"both": 1, "missed": 1}, 0, {"missed": 100}),
    "both, beside a found object": ([TRUE, (1, DOG, HALF, 0.95)], {"both": 1}, 100, {}),
    "duplicate": ([TRUE, (1, CAT, OBJECT, 0.8)], {"duplicate": 1}, 100, {}),
    "localisation, beside a found object": (
        [TRUE, (1, CAT, HALF, 0.95)],
        {"localisation": 1},
        50,
        {"localisation": 50},
    ),
    "background": ([(1, CAT, FAR, 0.95), TRUE], {"background": 1}, 50, {"background": 50}),
    "background of an image without objects": (
        [(2, CAT, OBJECT, 0.95), TRUE],
        {"background": 1},
        50,
        {"background": 50},
    ),
    "IoU of just 0.5": ([(1, CAT, (100, 100, 100, 50), 0.9)], {}, 100, {}),
    "IoU of just 0.1": (
        [(1, CAT, (100, 100, 100, 10), 0.9)],
        {"localisation": 1},
        0,
        {"localisation": 100},
    ),
    "IoU below 0.1": (
        [(1, CAT, (100, 100, 100, 9), 0.9)],
        {"background": 1, "missed": 1},
        0,
        {},
    ),
    "detection without area": (
        [(1, CAT, (100, 100, 0, 0), 0.9)],
        {"background": 1, "missed": 1},
        0,
        {},
    ),
    "below the threshold": ([(1, CAT, OBJECT, 0.4)], {"missed": 1}, 100, {}),
    "at the threshold": ([(1, CAT, OBJECT, 0.5)], {}, 100, {}),
}


@pytest.mark.parametrize("name", SCENES)
def test_one_error(name):
    detections, counts, ap50, lost = SCENES[name]
    annotations = scene([(1, CAT, OBJECT)], num_images=2)
    analysis = analyze_errors(annotations, detect(*detections), threshold=0.5)
    assert {error.kind: error.number for error in analysis.errors} == {**NO_ERRORS, **counts}
    assert analysis.ap50 == pytest.approx(ap50)
    costs = {error.kind: error.lost for error in analysis.errors}
    assert costs == pytest.approx({**NO_ERRORS, **lost})


def test_duplicate_before_another_object():
    annotations = scene([(1, CAT, OBJECT), (1, CAT, FAR)])
    detections = detect(TRUE, (1, CAT, OBJECT, 0.8), (1, CAT, FAR, 0.7))
    costs = {error.kind: error.lost for error in analyze_errors(annotations, detections).errors}
    # 50 of the 101 recalls are reached at a precision of 2/3.
    assert costs == pytest.approx({**NO_ERRORS, "duplicate": 100 * 50 / 101 / 3})


def test_crowds_are_not_ground_truth():
    crowd = (300, 200, 300, 200)
    annotations = scene([(1, CAT, OBJECT), (1, CAT, crowd, "crowd")])
    in_crowd = [(1, CAT, (350, 250, 50, 50), 0.95), (1, CAT, (450, 250, 50, 50), 0.94)]
    analysis = analyze_errors(annotations, detect(TRUE, *in_crowd))
    assert {error.kind: error.number for error in analysis.errors} == NO_ERRORS
    assert analysis.ap50 == pytest.approx(100)
    assert analysis.total.num_boxes == {"all": 1, "small": 0, "medium": 0, "large": 1}

    # A crowd of another class does not excuse errors, and is not ground truth.
    other = detect(TRUE, *[(image, DOG, box, score) for image, _, box, score in in_crowd])
    analysis = analyze_errors(annotations, other)
    counts = {error.kind: error.number for error in analysis.errors}
    assert counts == {**NO_ERRORS, "background": 2}


def test_classes_and_sizes_without_ground_truth():
    annotations = scene([(1, CAT, OBJECT), (1, CAT, (10, 10, 20, 20))])
    analysis = analyze_errors(annotations, detect(TRUE, (1, DOG, FAR, 0.9)))
    cat, dog = analysis.classes
    assert (cat.name, dog.name) == ("cat", "dog")
    assert cat.ap["medium"] is None and cat.ap["small"] == 0 and cat.ap["large"] > 99
    assert set(dog.ap.values()) == {None} and set(dog.num_boxes.values()) == {0}
    assert analysis.total.ap == pytest.approx(cat.ap)
    assert cat.num_boxes == {"all": 2, "small": 1, "medium": 0, "large": 1}


def test_box_without_area_is_missed():
    annotations = scene([(1, CAT, OBJECT), (1, CAT, (50, 50, 0, 0))])
    analysis = analyze_errors(annotations, detect(TRUE))
    assert analysis.errors[-1].number == 1
    assert analysis.ap50 == pytest.approx(100 * 51 / 101)
    assert analysis.errors[-1].lost == pytest.approx(100 - analysis.ap50)

    # The IoU of two boxes without area, 0 / 0, counts as 0.
    found_as_dog = detect(TRUE, (1, DOG, (50, 50, 0, 0), 0.8))
    counts = Breakdown(match(annotations, found_as_dog)).counts()
    assert counts == {**NO_ERRORS, "background": 1, "missed": 1}


def test_best_hundred_of_an_image_and_class():
    detections = [(1, CAT, FAR, 0.6 + i / 1000) for i in range(100)]
    analysis = analyze_errors(scene([(1, CAT, OBJECT)]), detect(*detections, (1, CAT, OBJECT, 0.5)))
    counts = {error.kind: error.number for error in analysis.errors}
    assert counts == {**NO_ERRORS, "background": 100, "missed": 1}


def test_fixed_detection_replaces_a_worse_one():
    """The oracle keeps the best detection of an object, whether it was fixed or not."""
    other = (1, CAT, FAR)
    detections = detect((1, CAT, HALF, 0.9), (1, CAT, (0, 0, 9, 9), 0.8), (1, CAT, OBJECT, 0.7))
    breakdown = Breakdown(match(scene([(1, CAT, OBJECT), other]), detections))
    # The first precision is 1 only if the better one stays.
    assert breakdown.ap50(["localisation"]) == pytest.approx(100 * 51 / 101)


def test_nothing_to_find():
    with pytest.raises(UserError, match="no ground truth"):
        analyze_errors(scene([(1, CAT, OBJECT, "crowd")]), detect(TRUE))


def random_scene(seed):
    """Annotations with crowds, and detections near and far from them; no two scores are equal."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = 6, 4
    truth, detections = [], []
    for image in range(1, num_images):  # the last one has no ground truth
        for _ in range(rng.integers(0, 7)):
            box = np.append(rng.uniform(0, 300, 2), np.exp(rng.uniform(2.5, 5.5, 2)))
            crowd = ["crowd"] if rng.random() < 0.15 else []
            truth.append((image, int(rng.integers(1, num_classes)), box.tolist(), *crowd))
    for image, category, box, *_ in truth:
        for _ in range(rng.integers(0, 4)):
            noise = rng.normal(0, rng.choice([0.05, 0.25]), 4) * np.tile(box[2:], 2)
            moved = np.maximum(np.array(box) + noise, 1).tolist()
            # The last class has no ground truth.
            wrong = rng.random() < 0.3
            named = int(rng.integers(1, num_classes + 1)) if wrong else category
            detections.append((image, named, moved))
    for _ in range(12):
        box = np.append(rng.uniform(0, 400, 2), rng.uniform(5, 150, 2)).tolist()
        detections.append(
            (int(rng.integers(1, num_images + 1)), int(rng.integers(1, num_classes + 1)), box)
        )
    scores = (rng.permutation(len(detections)) + 1) / (len(detections) + 1)
    classes = [f"class {i}" for i in range(1, num_classes + 1)]
    return scene(truth, classes, num_images), detect(
        *[(*detection, float(score)) for detection, score in zip(detections, scores, strict=True)]
    )


class Reference:
    """Kinds of errors and AP50 by plain loops, from the definitions alone."""

    def __init__(self, annotations, predictions):
        self.truth = [a for a in annotations["annotations"] if not a["iscrowd"]]
        crowds = [a for a in annotations["annotations"] if a["iscrowd"]]
        self.detections, self.about, taken = [], {}, set()
        for d in sorted(predictions, key=lambda d: -d["score"]):
            free = [t for t in self.truth if t["id"] not in taken and self.is_own(d, t)]
            best = max(free, key=lambda t: self.iou(d, t), default=None)
            if best is not None and self.iou(d, best) >= 0.5:
                taken.add(best["id"])
                self.about[len(self.detections)] = best
                self.detections.append((d, "true"))
            elif not any(self.is_own(d, c) and self.share_inside(d, c) >= 0.5 for c in crowds):
                kind, about = self.kind(d)
                if about is not None:
                    self.about[len(self.detections)] = about
                self.detections.append((d, kind))

    @staticmethod
    def is_own(d, t):
        return d["image_id"] == t["image_id"] and d["category_id"] == t["category_id"]

    @staticmethod
    def shared(d, t):
        (x, y, w, h), (u, v, a, b) = d["bbox"], t["bbox"]
        width, height = min(x + w, u + a) - max(x, u), min(y + h, v + b) - max(y, v)
        return max(width, 0) * max(height, 0)

    def iou(self, d, t):
        shared = self.shared(d, t)
        (_, _, w, h), (_, _, a, b) = d["bbox"], t["bbox"]
        return shared / (w * h + a * b - shared)

    def share_inside(self, d, crowd):
        return self.shared(d, crowd) / (d["bbox"][2] * d["bbox"][3])

    def kind(self, d):
        of_image = [t for t in self.truth if t["image_id"] == d["image_id"]]
        own = max([(self.iou(d, t), t["id"]) for t in of_image if self.is_own(d, t)], default=(0,))
        other = max(
            [(self.iou(d, t), t["id"]) for t in of_image if not self.is_own(d, t)], default=(0,)
        )
        by_id = {t["id"]: t for t in self.truth}
        if 0.1 <= own[0] < 0.5:
            return "localisation", by_id[own[1]]
        if other[0] >= 0.5:
            return "classification", by_id[other[1]]
        if own[0] >= 0.5:
            return "duplicate", None
        if other[0] >= 0.1:
            return "both", None
        return "background", None

    def missed(self, threshold=0.0):
        known = [
            t["id"] for i, t in self.about.items() if self.detections[i][0]["score"] >= threshold
        ]
        return [t for t in self.truth if t["id"] not in known]

    def counts(self, threshold):
        kinds = [kind for d, kind in self.detections if d["score"] >= threshold]
        return {**{k: kinds.count(k) for k in KINDS}, "missed": len(self.missed(threshold))}

    def ap50(self, fixed=()):
        found, results = set(), []  # (class, whether true), the best first
        for i, (d, kind) in enumerate(self.detections):
            if kind == "true" or (kind in fixed and i in self.about):
                if self.about[i]["id"] not in found:
                    found.add(self.about[i]["id"])
                    results.append((self.about[i]["category_id"], True))
            elif kind not in fixed:
                results.append((d["category_id"], False))
        missed = self.missed() if "missed" in fixed else []
        aps = []
        for category in sorted({t["category_id"] for t in self.truth}):
            asked = sum(t["category_id"] == category and t not in missed for t in self.truth)
            of_class = [is_true for c, is_true in results if c == category]
            aps.append(self.ap(of_class, asked))
        return 100 * sum(aps) / len(aps)

    @staticmethod
    def ap(of_class, asked):
        if asked == 0:
            return 0 if of_class else 1
        points = [  # recall, precision
            (sum(of_class[: i + 1]) / asked, sum(of_class[: i + 1]) / (i + 1))
            for i in range(len(of_class))
        ]
        total = 0
        for recall in np.linspace(0, 1, 101):  # as COCO rounds them
            total += max([p for r, p in points if r >= recall], default=0)
        return total / 101


@pytest.mark.parametrize("seed", range(25))
def test_reference(seed):
    annotations, predictions = random_scene(seed)
    reference = Reference(annotations, predictions)
    breakdown = Breakdown(match(annotations, predictions))
    for threshold in (0, 0.5, 0.9):
        assert breakdown.counts(threshold) == reference.counts(threshold)
    for fixed in ([], *([kind] for kind in KINDS), ["classification", "missed"]):
        assert breakdown.ap50(fixed) == pytest.approx(reference.ap50(fixed), abs=1e-9), fixed
    # A class without ground truth left is perfect only without detections.
    assert breakdown.ap50(KINDS) == pytest.approx(100)
    analysis = analyze_errors(annotations, predictions, 0.3)
    assert all(0 <= error.lost <= 100 - analysis.ap50 + 1e-9 for error in analysis.errors)


def test_random_scenes_have_every_kind_of_error():
    totals = dict.fromkeys(KINDS, 0)
    for seed in range(25):
        for kind, count in Breakdown(match(*random_scene(seed))).counts().items():
            totals[kind] += count
    assert min(totals.values()) >= 20, totals


@pytest.mark.parametrize("seed", range(5))
def test_ap_is_that_of_pycocotools(seed, capsys):
    annotations, predictions = random_scene(seed)
    for annotation in annotations["annotations"]:
        annotation["id"] += 1  # pycocotools never matches an id of 0
    analysis = analyze_errors(annotations, predictions)
    assert capsys.readouterr().out == ""

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluated = COCOeval(truth, truth.loadRes(predictions), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    stats = 100 * evaluated.stats
    assert analysis.ap50 == pytest.approx(stats[1])
    for size, expected in zip(("all", "small", "medium", "large"), stats[[0, 3, 4, 5]]):
        assert analysis.total.ap[size] == pytest.approx(expected)
    for k, result in enumerate(analysis.classes):
        for a, ap in enumerate(result.ap.values()):
            precision = evaluated.eval["precision"][:, :, k, a, -1]
            assert ap == (None if precision.max() < 0 else pytest.approx(100 * precision.mean()))


def png(figure, path):
    figure.savefig(path)
    image = cv2.imread(str(path))
    assert path.stat().st_size <= 150_000 and image.std() > 10
    return image


def texts(figure):
    return {text.get_text(): text for text in figure.findobj(Text)}


def test_chart_shows_the_worst_of_many_classes(tmp_path):
    names = [f"class {i}" for i in range(23)] + ["$5 and $6 " + "long " * 9, "no truth"]
    truth = [(i + 1, i + 1, OBJECT) for i in range(24)]
    # Classes 19 to 22 are detected.
    detections = detect(*[(i + 1, i + 1, OBJECT, 0.9) for i in range(19, 23)])
    figure = draw_error_chart(analyze_errors(scene(truth, names, 24), detections), "$1 and $2")
    png(figure, tmp_path / "a.png")
    shown = texts(figure)
    assert "AP by class: the 20 worst of 24" in shown
    assert "class 0 (1)" in shown and "$5 and $6 long long lon… (1)" in shown
    assert not {"class 20 (1)", "no truth (0)"} & set(shown)
    assert not any(text.get_parse_math() for label, text in shown.items() if "$" in label)
    png(draw_error_chart(analyze_errors(scene(truth[23:], names, 24), []), "a"), tmp_path / "b.png")


def ten_scores(predictions):
    """The predictions with scores of which many are equal."""
    return [{**p, "score": math.ceil(10 * p["score"]) / 10} for p in predictions]


@pytest.mark.parametrize("change", [list, ten_scores])
@pytest.mark.parametrize("seed", range(5))
def test_thresholds(seed, change):
    """Precision, recall and F1 of every threshold, by evaluating what it keeps alone."""
    annotations, predictions = random_scene(seed)
    predictions = change(predictions)
    *classes, total = analyze_errors(annotations, predictions).curves
    assert [curve.name for curve in classes] == [c["name"] for c in annotations["categories"]]
    best = {}
    for threshold in sorted({p["score"] for p in predictions}):
        kept = match(annotations, [p for p in predictions if p["score"] >= threshold])
        for k, curve in enumerate((*classes, total)):
            counted = range(len(classes)) if curve is total else [k]
            chosen = [i for i, number in enumerate(kept.class_of) if number in counted]
            truth = sum(number in counted for number in kept.truth_classes)
            found = sum(kept.matched[i] >= 0 for i in chosen)
            assert curve.num_truth == truth
            f1 = 2 * found / max(len(chosen) + truth, 1)
            if f1 and f1 >= best.get(curve.name, (0, 0))[0] - 1e-12:  # the highest of equal ones
                best[curve.name] = (f1, threshold)
            above = [j for j, score in enumerate(curve.scores) if score >= threshold]
            if above:
                assert curve.precision[above[-1]] == pytest.approx(found / len(chosen))
                assert curve.recall[above[-1]] == pytest.approx(found / max(truth, 1))
                assert curve.f1[above[-1]] == pytest.approx(f1)
    for curve in (*classes, total):
        if curve.name not in best:
            assert curve.best is None
            continue
        f1, threshold = best[curve.name]
        assert curve.f1[curve.best] == pytest.approx(f1)
        # A threshold between two scores of the class keeps the same detections.
        assert curve.scores[curve.best] >= threshold
        assert not [s for s in curve.scores if threshold <= s < curve.scores[curve.best]]


def test_score_chart(tmp_path):
    names = ["$5 and $6 " + "long " * 9, *(f"class {i}" for i in range(24)), "never found"]
    truth = [(i + 1, i + 1, OBJECT) for i in range(26)]
    detections = detect(*[(i + 1, i + 1, OBJECT, 0.5 + i / 100) for i in range(25)])
    figure = draw_score_chart(analyze_errors(scene(truth, names, 26), detections).curves, "$1, $2")
    png(figure, tmp_path / "a.png")
    shown = texts(figure)
    assert "Score of the best F1, the 20 most frequent of 25" in shown
    assert "$5 and $6 long long lon…" in shown and "never found" not in shown
    assert "0.500: P 1.00, R 1.00, F1 1.00" in shown
    assert not any(text.get_parse_math() for label, text in shown.items() if "$" in label)
    nothing = draw_score_chart(analyze_errors(scene([(1, CAT, OBJECT)]), []).curves, "nothing")
    nothing.savefig(tmp_path / "b.png")


@pytest.fixture
def analyze(tmp_path, monkeypatch, capsys):
    """Run the tool in this process on data or file contents; return exit code, output, errors."""

    def run(predictions, annotations, *arguments, truth="gt.json"):
        for name, content in (("dt.json", predictions), ("gt.json", annotations)):
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_text(text)
        path = str(tmp_path / truth) if truth.endswith(".json") else truth
        paths = [str(tmp_path / "dt.json"), path]
        monkeypatch.setattr(sys, "argv", ["analyze_errors.py", *paths, *map(str, arguments)])
        tool = load_tool("analyze_errors")
        exit_code = report_user_errors(tool.main, tool.parse_args())
        return (exit_code, *capsys.readouterr())

    return run


def test_tool(analyze, tmp_path):
    annotations = scene([(1, CAT, OBJECT), (1, CAT, FAR)], classes=("cat", "dog, or so"))
    exit_code, out, err = analyze(detect(TRUE), annotations, "--output", tmp_path / "new" / "out")
    assert (exit_code, err) == (0, "")
    assert "AP50 is 50.5 %" in out and "nan" not in out.lower()
    for line in (
        "  cat            50.5         -        0.0     100.0          2            0",
        "  dog, or so        -         -          -         -          0            0",
        "  all classes    50.5         -        0.0     100.0          2            0",
        "  missed               49.5                       1  object not found",
        "  cat          0.900      1.000   0.500  0.667      2",
        "  dog, or so       -          -       -      -      0",
    ):
        assert line in out
    folder = tmp_path / "new" / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("ap.csv", "errors.csv", "errors.png", "scores.png", "thresholds.csv"),
    ]
    for name in ("errors.png", "scores.png"):
        assert cv2.imread(str(folder / name)).std() > 10
    with open(folder / "ap.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["cat", "dog, or so", "all classes"]
    assert (rows[0]["AP all"], rows[1]["AP all"], rows[0]["boxes large"]) == ("50.5", "-", "1")
    with open(folder / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows] == list(KINDS)
    assert rows[-1]["AP50 lost"] == "49.5" and rows[-1]["errors at score >= 0.5"] == "1"
    with open(folder / "thresholds.csv", newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["cat", "dog, or so", "all classes"]
    assert (rows["all classes"]["score"], rows["all classes"]["F1"]) == ("0.900", "0.667")


def test_tool_with_nothing_detected(analyze, tmp_path):
    exit_code, out, _ = analyze([], scene([(1, CAT, OBJECT)]))
    assert exit_code == 0 and "AP50 is 0.0 %" in out and "nan" not in out.lower()
    assert (tmp_path / "errors.png").is_file()  # beside the predictions


def test_ground_truth_of_a_registered_dataset(analyze, tmp_path, monkeypatch):
    monkeypatch.setattr(DatasetCatalog, "data", copy.copy(DatasetCatalog.data))  # undone afterwards
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((480, 640, 3), np.uint8))
    table = tmp_path / "boxes.csv"
    table.write_text("filename,xmin,ymin,xmax,ymax,class\n1.png,100,100,200,200,cat\n")
    register = ("--register", "analysed", table)
    exit_code, out, err = analyze(detect(TRUE), None, *register, truth="analysed")
    assert (exit_code, err) == (0, "") and "AP50 is 100.0 %" in out and "  cat " in out
    exit_code, _, err = analyze(detect(TRUE), None, truth="analised")
    assert exit_code == 2 and "data set 'analised' is not registered" in err
    exit_code, _, err = analyze(detect(TRUE), None, truth="voc_2007_val")
    assert exit_code == 2 and "no annotation file in COCO's format" in err


GOOD = scene([(1, CAT, OBJECT)])


def with_field(**fields):
    return [{**detect(TRUE)[0], **fields}]


# Predictions, annotations, and what the error has to say; None: no such file.
BAD = {
    "no predictions": (None, GOOD, ["dt.json", "No such file"]),
    "no annotations": ([], None, ["gt.json", "No such file"]),
    "broken predictions": ("[{", GOOD, ["dt.json", "not valid JSON"]),
    "broken annotations": ([], "[{", ["gt.json", "not a valid annotation file"]),
    "predictions are an object": ({}, GOOD, ["dt.json", "a list of detections"]),
    "annotations are a list": ([], [], ["gt.json", "not an object"]),
    "a number": ([1], GOOD, ["detection number 1", "COCO's result format"]),
    "no score": ([{"image_id": 1, "category_id": 1, "bbox": OBJECT}], GOOD, ["with", "score"]),
    "unknown image": (with_field(image_id=7), GOOD, ["image 7", "are these its predictions?"]),
    "unknown category": (with_field(category_id=9), GOOD, ["category 9", "not in", "gt.json;"]),
    "list as image": (with_field(image_id=[1]), GOOD, ["image [1]"]),
    "score NaN": (with_field(score=math.nan), GOOD, ["number 1 (image 1)", "score nan", "finite"]),
    "score in words": (with_field(score="high"), GOOD, ["score 'high'"]),
    "box of three": (with_field(bbox=[1, 2, 3]), GOOD, ["bbox [1, 2, 3]", "x, y, width, height"]),
    "box infinite": (with_field(bbox=[0, 0, math.inf, 1]), GOOD, ["bbox [0, 0, inf, 1]"]),
    "box of negative width": (with_field(bbox=[9, 9, -3, 4]), GOOD, ["bbox [9, 9, -3, 4]"]),
    "nothing to find": (detect(TRUE), scene([]), ["no ground truth"]),
    "only crowds": ([], scene([(1, CAT, OBJECT, "crowd")]), ["no ground truth"]),
    "unknown image in annotations": ([], scene([(3, CAT, OBJECT)]), ["belong to no image"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(analyze, tmp_path, name):
    predictions, annotations, parts = BAD[name]
    exit_code, out, err = analyze(predictions, annotations)
    assert (exit_code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.csv"))


def test_output_is_not_a_folder(analyze, tmp_path):
    exit_code, _, err = analyze([], GOOD, "--output", tmp_path / "dt.json")
    assert exit_code == 2 and err.startswith("error: cannot write to the folder")
