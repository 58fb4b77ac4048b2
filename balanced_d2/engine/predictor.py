"""Trained models, ready for inference."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from balanced_d2.checkpoint import load_weights, read_contents
from balanced_d2.config.checks import check_weights
from balanced_d2.data.classes import model_metadata
from balanced_d2.engine.speed import speed_up, use_available_device
from balanced_d2.utils.errors import check_choice


def build_predictor(cfg: CfgNode, purpose: str) -> DefaultPredictor:
    """Detectron2's predictor, with all weights of its model loaded from ``MODEL.WEIGHTS``.

    Its ``metadata`` has the names of the classes: those in the weights, if they say them. Its
    ``cfg`` has their ``INPUT.GRAY_RANGE``, for :func:`balanced_d2.data.image.read_image`.

    Args:
        cfg: set to the CPU if there is no CUDA.
        purpose: what the weights are needed for, such as "draw", for the message if there are none.

    Raises:
        UserError: if there are no weights, or they do not fit the model, or the predictor does not
            take its ``INPUT.FORMAT``.
    """
    check_weights(cfg, purpose)
    check_choice("INPUT.FORMAT", cfg.INPUT.FORMAT, ("BGR", "RGB"))
    use_available_device(cfg)
    weights = read_contents(cfg.MODEL.WEIGHTS)
    cfg.INPUT.GRAY_RANGE = cfg.INPUT.GRAY_RANGE or weights.gray_range
    metadata = model_metadata(cfg, weights.class_names)
    untrained = cfg.clone()
    untrained.MODEL.WEIGHTS = ""  # Detectron2 would leave missing weights random
    for backbone in (untrained.MODEL.TIMM, untrained.MODEL.TORCHVISION):
        backbone.PRETRAINED, backbone.WEIGHTS = False, ""
    predictor = DefaultPredictor(untrained)
    load_weights(speed_up(cfg, predictor.model), cfg.MODEL.WEIGHTS, cfg.SOLVER.EMA.ENABLED)
    predictor.metadata = metadata
    return predictor
