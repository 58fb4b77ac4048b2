"""CONTRIBUTING.md's instructions for new samplers, losses and refinements, outside the package."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from balanced_d2 import load_config
from balanced_d2.checkpoint import BalancedCheckpointer, read_contents, start_from
from balanced_d2.commands import train
from balanced_d2.config import CONFIG_KEYS
from balanced_d2.engine import BalancedTrainer, argument_parser
from balanced_d2.modeling import (
    BOX_REG_LOSSES,
    CLS_LOSSES,
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    REFINEMENTS,
    BalancedBoxLossMixin,
    BalancedSamplingMixin,
    ClassLoss,
    check_balanced,
)
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.registry import Registry

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, cleaned_up, logged, run_program
from .test_architectures import retinanet
from .test_roi_heads import ground_truth, heads, predictor, shifted_proposals


@pytest.fixture
def registered(monkeypatch):
    """Registers an entry, or what else the test registers there, until the test ends."""

    def register(registry, entry, name=""):
        monkeypatch.setattr(registry, "_obj_map", {**registry._obj_map})
        return entry and registry.register(entry, name=name)

    return register


def recipes():
    """The pieces of Python in CONTRIBUTING.md: sampler, loss, refinement, program, trainer."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


WITNESS = """
import pathlib

def witness(name):
    entry, used = globals()[name], pathlib.Path(__file__).with_name(f"{name}.used")

    def call(*arguments):
        used.touch()
        return entry(*arguments)

    return call

NEGATIVE_SAMPLERS.register(witness("hardest_first"), name="hardest_first_seen")
BOX_REG_LOSSES.register(witness("squared"), name="squared_seen")
REFINEMENTS.register(witness("Depthwise"), name="depthwise_seen")
"""


@pytest.mark.parametrize("suffix", ["", "_seen"])
def test_recipes_of_contributing(tiny_coco, tmp_path, suffix):
    *entries, program, _ = recipes()
    (tmp_path / "my_balances.py").write_text("".join(entries) + WITNESS)
    (tmp_path / "my_program.py").write_text(program)
    names = {"hardest_first": f"hardest_first{suffix}", "squared": f"squared{suffix}"}
    names["Depthwise"] = "depthwise_seen" if suffix else "Depthwise"
    result = run_program(
        *(tmp_path / "my_program.py", "train", "--config-file", TINY_CONFIG),
        *("--register", "mine", tiny_coco, tiny_coco.parent / "images"),
        *(*TINY_MODEL, "OUTPUT_DIR", tmp_path / "output"),
        *("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"),
        *("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", names["hardest_first"]),
        *("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", names["squared"]),
        *("MODEL.BALANCED_FPN.REFINE_TYPE", names["Depthwise"]),
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    used = {path.stem for path in tmp_path.glob("*.used")}
    assert used == (set(names) if suffix else set())
    # The hardest are sampled first: if any are from the first bin, the last bin is used up.
    last = logged(tmp_path / "output")[-1]
    if last["roi_head/num_neg_bin0"] > 0:
        bin2 = (last[f"roi_head/num_neg_bin2{end}"] for end in ("", "_available"))
        assert len(set(bin2)) == 1
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)["model"]
    assert weights["backbone.balancer.refine.weight"].shape[1] == 1


def test_a_sampler_of_contributing_with_a_key_of_its_own(registered):
    for registry in (CONFIG_KEYS, NEGATIVE_SAMPLERS):
        registered(registry, None)
    (recipe,) = (text for text in recipes() if "CONFIG_KEYS.register" in text)
    exec(recipe, {})
    own = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "HarderLikelier", "MODEL.DEVICE", "meta"]
    counts = []
    for hardness in (None, "0.0", "1000000.0"):
        key = ["MODEL.ROI_HEADS.HARDNESS", hardness] if hardness else []
        cfg = load_config(str(ROOT / TINY_CONFIG), [*TINY_MODEL, *own, *key])
        with torch.device("meta"):
            sample = build_model(cfg).roi_heads._sample_negatives
        assert sample.hardness == float(hardness or 4)
        indices = sample(torch.linspace(0, 0.5, 2000), 1000)
        assert len(indices.unique()) == 1000
        counts.append((indices >= 1000).sum().item())
    likelier, at_random, hardest = counts
    assert abs(at_random - 500) < 60 < likelier - 500 and hardest == 1000


@pytest.mark.slow
def test_trainer_of_contributing(tiny_coco, tmp_path):
    """One class from data of two."""
    (tmp_path / "one_class.py").write_text(recipes()[-1])
    arguments = [
        *(tmp_path / "one_class.py", "--config-file", TINY_CONFIG, "--skip-data-check"),
        *("--register", "mine", tiny_coco, tiny_coco.parent / "images"),
        *(*TINY_MODEL, "OUTPUT_DIR", tmp_path / "output", "MODEL.ROI_HEADS.NUM_CLASSES", "1"),
        *("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"),
    ]
    result = run_program(*arguments, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert logged(tmp_path / "output")[-1]["iteration"] == 1


def test_a_trainer_of_others_evaluates(tiny_coco, tmp_path, monkeypatch):
    """With --eval-only nothing is trained."""

    class Trainer(BalancedTrainer):
        @classmethod
        def build_model(cls, cfg):
            return torch.nn.Linear(1, 1)

        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": 7.0}}

    torch.save({"model": torch.nn.Linear(1, 1).state_dict()}, tmp_path / "weights.pth")
    arguments = argument_parser().parse_args(
        [
            *("--eval-only", "--config-file", str(ROOT / TINY_CONFIG)),
            *("--register", "evaluated", str(tiny_coco), str(tiny_coco.parent / "images")),
            *(*TINY_MODEL, "OUTPUT_DIR", str(tmp_path / "output")),
            *("DATASETS.TEST", "('evaluated',)", "MODEL.WEIGHTS", str(tmp_path / "weights.pth")),
        ]
    )
    with cleaned_up():
        assert train.main(arguments, trainer_class=Trainer) == {"bbox": {"AP": 7.0}}


@pytest.mark.parametrize(
    "key, registry",
    [
        ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", NEGATIVE_SAMPLERS),
        ("MODEL.ROI_HEADS.POSITIVE_SAMPLER", POSITIVE_SAMPLERS),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", BOX_REG_LOSSES),
        ("MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", CLS_LOSSES),
        ("MODEL.BALANCED_FPN.REFINE_TYPE", REFINEMENTS),
    ],
)
def test_an_unknown_name_is_refused_and_the_known_ones_listed(key, registry):
    cfg = load_config(str(ROOT / TINY_CONFIG), [*TINY_MODEL, key, "hardest_furst"])
    cfg.MODEL.DEVICE = "meta"
    with pytest.raises(UserError) as error:
        build_model(cfg)
    assert "'hardest_furst'" in str(error.value) and key.rsplit(".")[-1] in str(error.value)
    for name in registry.names():
        assert name in str(error.value)


def test_one_loss_for_retinanet_and_cascade(monkeypatch):
    registered = dict(BOX_REG_LOSSES)
    try:
        loss = BOX_REG_LOSSES.register(lambda deltas, targets: deltas - targets, name="difference")
        for config, key in (
            ("COCO-Detection/balanced_retinanet_R_50_FPN_1x.yaml", "RETINANET"),
            ("Misc/balanced_cascade_rcnn_R_50_FPN_1x.yaml", "ROI_BOX_HEAD"),
        ):
            options = [f"MODEL.{key}.BBOX_REG_LOSS_TYPE", "difference", "MODEL.DEVICE", "meta"]
            cfg = load_config(str(ROOT / "configs" / config), options)
            with torch.device("meta"):
                model = build_model(cfg)
            parts = [model] if key == "RETINANET" else list(model.roi_heads.box_predictor)
            assert len(parts) == (1 if key == "RETINANET" else 3)
            assert all(part.regression_loss is loss for part in parts)
    finally:
        BOX_REG_LOSSES._obj_map = registered


def test_registry():
    registry = Registry("THINGS", "MODEL.THING", others=["theirs"])

    @registry.register()
    def function(x):
        return x

    @registry.register(name="with_parameters")
    class Thing:
        def __init__(self, size, known):
            self.size, self.known = size, known

        @classmethod
        def from_config(cls, node, known):
            return {"size": node["SIZE"], "known": known}

    assert registry.names() == ["function", "with_parameters"]
    assert registry.build("function", None) is function
    thing = registry.build("with_parameters", {"SIZE": 3}, known=7)
    assert (thing.size, thing.known) == (3, 7)
    registry.check("theirs")

    @registry.register()
    class Plain:
        pass

    assert isinstance(registry.build("Plain", None), Plain)
    with pytest.raises(AssertionError, match="MODEL.THING 'theirs' is Detectron2's own"):
        registry.register(function, name="theirs")
    with pytest.raises(UserError, match="MODEL.THING: .*'thing'.*theirs, function, with.*Plain"):
        registry.check("thing")
    with pytest.raises(AssertionError, match="already registered"):
        registry.register(function)


class Sigmoids(ClassLoss):
    """A loss with as many logits as classes, and a tensor of its own in the checkpoint."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.num_logits = num_classes
        self.register_buffer("counts", torch.zeros(()))

    def count(self, classes):
        self.counts += len(classes)

    def loss(self, logits, classes):
        wanted = one_hot(classes, self.num_classes + 1)[:, :-1].to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=1)

    def probabilities(self, logits):
        scores = logits.float().sigmoid() / self.num_classes
        return torch.cat([scores, 1 - scores.sum(dim=1, keepdim=True)], dim=1)


def with_own_class_loss(registered, *options):
    """The config of a tiny detector of two classes, and the detector."""
    if "Sigmoids" not in CLS_LOSSES:
        registered(CLS_LOSSES, Sigmoids)
    own = ["MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", "Sigmoids", "MODEL.DEVICE", "cpu"]
    cfg = load_config(str(ROOT / TINY_CONFIG), [*TINY_MODEL, *own, *options])
    return cfg, build_model(cfg)


def test_weights_of_an_own_class_loss_say_their_classes(registered, tmp_path):
    cfg, model = with_own_class_loss(registered)
    names = ["bright", "dark"]
    BalancedCheckpointer(model, str(tmp_path), class_names=names, config=cfg.dump()).save("own")
    contents = read_contents(str(tmp_path / "own.pth"))
    assert (contents.num_classes, contents.class_names) == (2, names)

    _, other = with_own_class_loss(registered)
    start_from(other, str(tmp_path / "own.pth"), names[::-1])
    theirs, ours = (m.roi_heads.box_predictor.cls_score.weight for m in (model, other))
    assert torch.equal(ours, theirs.flip(0))


# What entries of others do wrong


def mistaken(name, value):
    """A loss or sampler of that name, which returns something else than it has to."""

    def entry(*arguments):
        return value(*arguments)

    entry.__name__ = name
    return entry


def assert_refused(roi_heads, message, **fields):
    proposals = shifted_proposals()
    for name, value in fields.items():
        proposals.set(name, value)
    with pytest.raises(UserError, match=f"the sampler mine returned {message}"), EventStorage():
        roi_heads.label_and_sample_proposals([proposals], [ground_truth()])


@pytest.mark.parametrize(
    "sampler, got",
    [
        (lambda ious, number: ious.argsort(), r"torch.int64 of shape \(\d{3},\).* at most 45"),
        (lambda ious, number: ious > 0.1, r"torch.bool of shape \(\d{3},\)"),
        (lambda ious, number: ious.topk(1).values, r"torch.float32 of shape \(1,\)"),
        (lambda ious, number: ious.topk(1), "topk"),
        (lambda ious, number: ious.topk(9).indices[:, None], r"torch.int64 of shape \(9, 1\)"),
    ],
)
def test_what_samplers_have_to_return(sampler, got):
    assert_refused(heads(negative_sampler=mistaken("mine", sampler)), got)


def test_what_other_samplers_have_to_return(monkeypatch):
    everything = mistaken("mine", lambda candidates, *others: torch.arange(len(candidates)))
    assert_refused(heads(positive_sampler=everything), ".* at most 15")
    everything.needs_losses = True
    monkeypatch.setattr(BalancedSamplingMixin, "offers_losses", True)
    assert_refused(heads(negative_sampler=everything), ".* at most 60", losses=torch.ones(400))


@pytest.mark.parametrize("number", [0, 3])
def test_box_losses_must_not_be_reduced(number):
    """Of no boxes, the mean would be NaN."""
    mean = mistaken("mean", lambda deltas, targets: (deltas - targets).abs().mean())
    message = rf"the regression loss mean returned the shape \(\) .* of {number} boxes"
    layers = predictor(box_reg_loss=mean)
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 5)
    classes = torch.tensor([1] * number + [3] * (5 - number))
    with pytest.raises(UserError, match=message):
        layers.box_reg_loss(boxes, boxes, torch.randn(5, 12), classes)
    proposals = Instances((20, 20), proposal_boxes=Boxes(boxes), gt_boxes=Boxes(boxes))
    proposals.gt_classes = classes
    with pytest.raises(UserError, match=message):
        layers.proposal_losses((torch.randn(5, 4), torch.randn(5, 12)), [proposals])
    model = retinanet()
    model.regression_loss = mean
    classes[number:] = 80
    with pytest.raises(UserError, match=message), EventStorage():
        model.losses(
            [Boxes(boxes)],
            [torch.randn(1, 5, 80)],
            [classes],
            [torch.randn(1, 5, 4)],
            [boxes],
        )


@pytest.mark.parametrize(
    "method, result, message",
    [
        ("loss", lambda logits: logits.mean(), r"loss\(\) .* Own .* \(\) for 2 .* \(2,\) is"),
        ("loss", lambda logits: logits, r"loss\(\) .* \(2, 3\) for 2 proposals; \(2,\) is"),
        ("probabilities", lambda logits: logits, r"probabilities\(\) .* \(2, 3\) .* \(2, 4\) is"),
    ],
)
def test_what_class_losses_have_to_return(method, result, message):
    class Own(Sigmoids):
        pass

    setattr(Own, method, lambda self, logits, *classes: result(logits))
    layers = predictor(cls_loss=Own(3))
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10]] * 2))
    proposals = Instances((20, 20), proposal_boxes=boxes, gt_boxes=boxes)
    proposals.gt_classes = torch.tensor([0, 3])
    predictions = torch.randn(2, 3), torch.randn(2, 12)
    with pytest.raises(UserError, match=message), EventStorage():
        layers.losses(predictions, [proposals])
    if method == "loss":
        with pytest.raises(UserError, match=message):
            layers.proposal_losses(predictions, [proposals])


def test_a_mixin_that_would_be_ignored():
    with pytest.raises(TypeError, match="Heads would ignore BalancedSamplingMixin.*from ROIHeads"):

        class Heads(StandardROIHeads, BalancedSamplingMixin):
            pass

    with pytest.raises(TypeError, match="Boxes would ignore BalancedBoxLossMixin"):

        class Boxes(CascadeROIHeads, BalancedBoxLossMixin):
            pass


class SamplingHeads(BalancedSamplingMixin, StandardROIHeads):
    """Heads of others, with one of the mixins."""


@pytest.mark.parametrize(
    "key, value",
    [("BBOX_REG_LOSS_TYPE", "balanced_l1"), ("CANONICAL_BOX_SIZE", 96), ("CANONICAL_LEVEL", 3)],
)
def test_heads_of_others_that_ignore_a_key(key, value, registered):
    registered(ROI_HEADS_REGISTRY, None)
    ROI_HEADS_REGISTRY.register(SamplingHeads)
    plain = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1", "MODEL.DEVICE", "meta"]
    options = [*TINY_MODEL, *plain, "MODEL.ROI_HEADS.NAME", "SamplingHeads"]
    cfg = load_config(str(ROOT / TINY_CONFIG), options)
    with torch.device("meta"):
        model = build_model(cfg)
    check_balanced(cfg, model)
    cfg.MODEL.ROI_BOX_HEAD[key] = value
    with pytest.raises(UserError, match=rf"{key} is '?{value}.*SamplingHeads does not know"):
        check_balanced(cfg, model)
