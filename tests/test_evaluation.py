"""Evaluators by evaluator_type, each on detections with a known score."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from balanced_d2.evaluation import build_evaluator
from balanced_d2.utils.errors import UserError


@pytest.fixture
def dataset(tiny_coco):
    """Register the tiny dataset with a given evaluator_type; return its annotations."""

    def register(evaluator_type, **metadata):
        MetadataCatalog.get("test_evaluation").set(
            evaluator_type=evaluator_type,
            json_file=str(tiny_coco),
            thing_classes=["bright", "dark"],
            thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
            **metadata,
        )
        return json.loads(tiny_coco.read_text())

    yield register
    MetadataCatalog.pop("test_evaluation", None)
    if "test_evaluation" in DatasetCatalog:
        DatasetCatalog.remove("test_evaluation")


def perfect_detections(content):
    """Model inputs and outputs that detect exactly the ground truth."""
    for image in content["images"]:
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in annotations]).float()
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        instances.scores = torch.linspace(0.9, 0.8, len(annotations))
        instances.pred_classes = torch.tensor([a["category_id"] - 1 for a in annotations])
        yield {"image_id": image["id"]}, {"instances": instances}


def nothing_detected():
    instances = Instances((64, 80))
    instances.pred_boxes = Boxes(torch.zeros(0, 4))
    instances.scores, instances.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    return instances


def evaluate(evaluator, content):
    evaluator.reset()
    for inputs, outputs in perfect_detections(content):
        evaluator.process([inputs], [outputs])
    return evaluator.evaluate()["bbox"]


def test_coco(dataset, tmp_path):
    content = dataset("coco")
    evaluator = build_evaluator("test_evaluation", str(tmp_path))
    assert isinstance(evaluator, COCOEvaluator)
    assert evaluate(evaluator, content)["AP"] == pytest.approx(100)


def test_lvis(dataset, tmp_path):
    pytest.importorskip("lvis")
    content = dataset("lvis")
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category in content["categories"]:
        category["frequency"] = "f"
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    json_file = tmp_path / "lvis.json"
    json_file.write_text(json.dumps(content))
    MetadataCatalog.get("test_evaluation").__dict__["json_file"] = str(json_file)
    evaluator = build_evaluator("test_evaluation", str(tmp_path))
    assert isinstance(evaluator, LVISEvaluator)
    assert evaluate(evaluator, content)["AP"] == pytest.approx(100)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": nothing_detected()}])
    results = evaluator.evaluate()["bbox"]
    assert "APr" in results and set(results.values()) == {0.0}


def test_pascal_voc(dataset, tmp_path):
    content = dataset("pascal_voc", dirname=str(tmp_path), split="test", year=2007)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    ids = [str(image["id"]) for image in content["images"]]
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n".join(ids))
    for image_id in ids:
        objects = ""
        for annotation in content["annotations"]:
            if annotation["image_id"] == int(image_id):
                x, y, width, height = annotation["bbox"]
                name = ["bright", "dark"][annotation["category_id"] - 1]
                objects += (
                    f"<object><name>{name}</name><pose/><truncated>0</truncated>"
                    f"<difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                    f"<xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>"
                )
        annotation_file = tmp_path / "Annotations" / f"{image_id}.xml"
        annotation_file.write_text(f"<annotation>{objects}</annotation>")
    evaluator = build_evaluator("test_evaluation", str(tmp_path))
    assert type(evaluator) is PascalVOCDetectionEvaluator
    assert evaluate(evaluator, content)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("evaluator_type", ["segmentation", None])
def test_unsupported_evaluator_type(dataset, evaluator_type):
    dataset(evaluator_type)
    with pytest.raises(UserError, match="'test_evaluation' cannot be evaluated"):
        build_evaluator("test_evaluation", "output")
