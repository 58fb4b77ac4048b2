"""Balancing and sampling, written in the straightforward way."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class ExplicitNonLocal(nn.Module):
    """The non-local block with the positions x positions matrix in memory."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("theta", "phi", "g", "conv_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        theta, phi, g = (conv(x).flatten(2) for conv in (self.theta, self.phi, self.g))
        attention = torch.softmax(theta.transpose(1, 2) @ phi, dim=-1)
        y = (attention @ g.transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return x + self.conv_out(y)


class ExplicitBalancer(nn.Module):
    """Gather, refine and scatter with PyTorch's general operators."""

    def __init__(self, channels: int, refine_level: int = 2):
        super().__init__()
        self.refine_level = refine_level
        self.refine = ExplicitNonLocal(channels)

    def forward(self, features):
        size = features[self.refine_level].shape[-2:]
        gathered = [
            F.adaptive_max_pool2d(x, size) if i < self.refine_level else F.interpolate(x, size)
            for i, x in enumerate(features)
        ]
        balanced = self.refine(sum(gathered) / len(gathered))
        return [
            x
            + (
                F.interpolate(balanced, x.shape[-2:])
                if i < self.refine_level
                else F.adaptive_max_pool2d(balanced, x.shape[-2:])
            )
            for i, x in enumerate(features)
        ]


def sample_with_sets(ious: torch.Tensor, num_samples: int, num_bins: int = 3) -> torch.Tensor:
    """IoU-balanced sampling with NumPy and sets."""
    values = ious.cpu().numpy()
    chosen = []
    for k in range(num_bins):
        low, high = 0.5 * k / num_bins, 0.5 * (k + 1) / num_bins
        members = set(np.flatnonzero((values >= low) & (values < high)))
        if len(members) > num_samples // num_bins:
            chosen.append(np.random.choice(list(members), num_samples // num_bins, replace=False))
        else:
            chosen.append(np.array(list(members), dtype=int))
    chosen = np.concatenate(chosen)
    rest = np.array(list(set(range(len(values))) - set(chosen)))
    missing = num_samples - len(chosen)
    if missing > 0:
        chosen = np.concatenate([chosen, np.random.choice(rest, missing, replace=False)])
    return torch.from_numpy(chosen).to(ious.device)
