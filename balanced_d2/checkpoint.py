"""Loading of a checkpoint that has to fit its model."""

import pickle

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from balanced_d2.errors import UserError


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint that holds this very model, not one that a training starts from.

    Detectron2's checkpointer leaves weights that the checkpoint lacks as they were initialised.

    Raises:
        UserError: if the checkpoint cannot be read, or weights are missing in it, left over or of
            another shape.
    """
    try:
        _FittingCheckpointer(model).load(path)
    except (  # what reading a file that is no checkpoint ends in
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"MODEL.WEIGHTS: cannot load {path}: {reason}") from error


class _FittingCheckpointer(DetectionCheckpointer):
    def _log_incompatible_keys(self, incompatible):
        reshaped = {key for key, _, _ in incompatible.incorrect_shapes}
        problems = [
            *(f"{key} is missing" for key in incompatible.missing_keys if key not in reshaped),
            *(f"{key} is left over" for key in incompatible.unexpected_keys),
            *(
                f"{key} has shape {theirs}, not {ours}"
                for key, theirs, ours in incompatible.incorrect_shapes
            ),
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                "it does not hold the model that the config describes: "
                f"{'; '.join(problems[:3])}{more}"
            )
