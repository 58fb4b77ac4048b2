"""The refinement of balanced features: an embedded Gaussian non-local block."""

import torch
from torch import nn
from torch.nn import functional as F


class NonLocal2d(nn.Module):
    """Embedded Gaussian non-local block with residual connection, at full channel width.

    ``x + conv_out(softmax(theta(x)^T phi(x)) g(x))`` with the softmax over all positions and no
    scaling of the logits (Libra R-CNN, section 3.2; Non-local Neural Networks, equation 4). The
    positions x positions matrix is never held in memory: the product is computed by PyTorch's
    fused attention. ``conv_out`` starts at zero, so a new block is the identity.

    Args:
        channels: number of channels of input and output.
        pool_keys: whether keys and values (phi and g) are computed from ``x`` max-pooled by 2,
            which makes the product four times cheaper (Non-local Neural Networks, section 3.3,
            "subsampling trick"; there it is phi and g that are pooled, which saves less).
    """

    def __init__(self, channels: int, pool_keys: bool = False):
        super().__init__()
        self.pool_keys = pool_keys
        self.theta = nn.Conv2d(channels, channels, 1)
        self.phi = nn.Conv2d(channels, channels, 1)
        self.g = nn.Conv2d(channels, channels, 1)
        self.conv_out = nn.Conv2d(channels, channels, 1)
        for conv in (self.theta, self.phi, self.g):
            nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(self.conv_out.weight)
        for conv in (self.theta, self.phi, self.g, self.conv_out):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: shape (N, channels, H, W).

        Returns:
            Tensor of the same shape.
        """
        # The fused attention on CPU needs the channels to be contiguous; with any other layout
        # PyTorch silently falls back to the explicit matrix.
        channels_last = x.contiguous(memory_format=torch.channels_last)
        attended_to = channels_last
        if self.pool_keys:
            attended_to = F.max_pool2d(channels_last, 2, ceil_mode=True)
        attended = F.scaled_dot_product_attention(
            _as_tokens(self.theta(channels_last)),
            _as_tokens(self.phi(attended_to)),
            _as_tokens(self.g(attended_to)),
            scale=1.0,
        )
        return x + self.conv_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


def _as_tokens(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) to (N, 1 head, H * W, C)."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
