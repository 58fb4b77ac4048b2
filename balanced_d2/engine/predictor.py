"""Trained models, ready to detect."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from balanced_d2.checkpoint import load_weights
from balanced_d2.config.checks import check_weights
from balanced_d2.data.classes import model_metadata
from balanced_d2.engine.speed import speed_up, use_available_device


def build_predictor(cfg: CfgNode, purpose: str) -> DefaultPredictor:
    """Detectron2's predictor, with the weights of ``MODEL.WEIGHTS`` in all of its model.

    Its ``metadata`` has the names of the classes.

    Args:
        cfg: set to the CPU where there is no CUDA.
        purpose: what it is needed for, such as "draw", for the message if there are no weights.

    Raises:
        UserError: if there are no weights, or they are not those of the model.
    """
    check_weights(cfg, purpose)
    use_available_device(cfg)
    metadata = model_metadata(cfg)
    untrained = cfg.clone()
    untrained.MODEL.WEIGHTS = ""  # Detectron2 would leave what a checkpoint lacks at random
    for backbone in (untrained.MODEL.TIMM, untrained.MODEL.TORCHVISION):
        backbone.PRETRAINED, backbone.WEIGHTS = False, ""
    predictor = DefaultPredictor(untrained)
    load_weights(speed_up(cfg, predictor.model), cfg.MODEL.WEIGHTS)
    predictor.metadata = metadata
    return predictor
