"""The refinement of balanced features: an embedded Gaussian non-local block."""

import torch
from torch import nn
from torch.nn import functional as F

from balanced_d2.layers.exporting import is_exporting


class NonLocal2d(nn.Module):
    """Embedded Gaussian non-local block with residual connection, at full channel width.

    ``x + conv_out(softmax(theta(x)^T phi(x)) g(x))`` with the softmax over all positions and no
    scaling of the logits (Libra R-CNN, section 3.2; Non-local Neural Networks, equation 4). The
    positions x positions matrix is not held in memory: the product is computed by PyTorch's fused
    attention. Only for derivatives that the latter lacks (``create_graph=True``, ``torch.func``,
    forward mode) is it. ``conv_out`` starts at zero, so a new block is the identity.

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
        attended = _attend(
            _as_tokens(self.theta(channels_last)),
            _as_tokens(self.phi(attended_to)),
            _as_tokens(self.g(attended_to)),
        )
        refined = channels_last + self.conv_out(
            attended.squeeze(1).transpose(1, 2).reshape(x.shape)
        )
        if x.is_contiguous(memory_format=torch.channels_last):
            return refined
        return _channels_first(refined)


def _as_tokens(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) to (N, 1 head, H * W, C)."""
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    # A size that is a symbol hides from torch.export that the channels are contiguous already.
    return tokens.contiguous() if is_exporting() else tokens


def _channels_first(x: torch.Tensor) -> torch.Tensor:
    """``x.contiguous()`` of what is in channels-last order, several times faster on CPUs.

    As the transposition of a matrix, (N * H * W, C) to (C, N * H * W), and a copy of whole planes.
    """
    number, channels, height, width = x.shape
    planes = x.permute(0, 2, 3, 1).reshape(-1, channels).t().contiguous()
    return planes.view(channels, number, height, width).transpose(0, 1).contiguous()


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention without scaling, of tokens (N, 1, positions, C), differentiable as often as needed.

    PyTorch's fused attention has first derivatives in reverse mode only. All others are those of
    the explicit matrix, which is then held in memory.
    """
    try:
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    except NotImplementedError:  # forward mode, as in torch.func.jvp
        return _attend_explicitly(query, key, value)
    if attended.requires_grad and not torch.compiler.is_compiling():
        return _TwiceDifferentiable.apply(attended, query, key, value)
    return attended


def _attend_explicitly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.transpose(-2, -1), dim=-1) @ value


class _TwiceDifferentiable(torch.autograd.Function):
    """Fused attention as it is, with the explicit gradient where that is differentiated again,
    as ``create_graph=True`` and ``torch.func`` ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(attended, *tokens):
        return attended.view_as(attended)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient):
        if not torch.is_grad_enabled():  # without create_graph: the fused attention's own
            return gradient, None, None, None
        explicit_gradient = torch.func.vjp(_attend_explicitly, *ctx.saved_tensors)[1]
        return None, *explicit_gradient(gradient)
