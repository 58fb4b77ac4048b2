"""RoIAlign on CPUs as a product with a sparse matrix (Mask R-CNN, section 3; Detectron2's
``aligned`` variant too).

RoIAlign is linear in the features. What a bin of a box samples is a weighted sum of feature values
whose weights are products of one along y and one along x, since bilinear interpolation and the mean
over a grid of samples are separable. So the output is a sparse matrix, with a row for each bin,
times the features as a matrix of (positions, channels); the gradient is its transpose times the
gradient of the output. The sparse products of MKL are several times faster than torchvision's
loops, most of all backwards, where torchvision uses one thread.

In float32 the matrix takes 8 bytes for each weight: 49 bins of 10 weights for each of 1,000 boxes
are 4 MB. It is kept until the backward pass, which makes its transpose for a moment.
"""

import warnings
from typing import Tuple

import torch

# PyTorch says so once in every process, of its own function for the matrix below.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


def roi_align(
    features: torch.Tensor,
    rois: torch.Tensor,
    output_size: Tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = False,
) -> torch.Tensor:
    """``torchvision.ops.roi_align`` on a CPU, with gradients of any order.

    Args:
        features: shape (N, C, H, W), float32 or float64; others are computed in float32.
        rois: shape (K, 5): index of the image, then x1, y1, x2, y2.
        output_size: bins along y and x, (PH, PW).
        spatial_scale: of the features, relative to the boxes.
        sampling_ratio: samples along each side of a bin; 0: one for each pixel, rounded up.
        aligned: whether boxes are moved by half a pixel, which is right.

    Returns:
        Tensor of shape (K, C, PH, PW) with the dtype of ``features``, channels last in memory.
    """
    num_images, channels, height, width = features.shape
    dtype = features.dtype if features.dtype == torch.float64 else torch.float32
    rois = rois.detach().to(dtype)
    offset = 0.5 if aligned else 0.0
    start = rois[:, 1:3] * spatial_scale - offset  # x, y
    size = rois[:, 3:5] * spatial_scale - offset - start
    if not aligned:
        size = size.clamp(min=1)
    begin_x, count_x, weight_x = _weights(
        start[:, 0], size[:, 0], output_size[1], sampling_ratio, width
    )
    begin_y, count_y, weight_y = _weights(
        start[:, 1], size[:, 1], output_size[0], sampling_ratio, height
    )
    image = rois[:, 0].long()
    # One row for each bin, its weights in the order of the positions.
    counts = (count_y[:, :, None] * count_x[:, None, :]).flatten()
    rows = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=rows[1:])
    total = int(rows[-1])
    bins = torch.repeat_interleave(torch.arange(len(counts)), counts, output_size=total)
    place = torch.arange(total) - rows[:-1].long()[bins]
    bin_x = bins % output_size[1] + bins // (output_size[0] * output_size[1]) * output_size[1]
    bin_y = bins // output_size[1]
    step = count_x.flatten()[bin_x]
    y, x = place // step, place % step
    values = weight_y.flatten(0, 1)[bin_y, y] * weight_x.flatten(0, 1)[bin_x, x]
    y += begin_y.flatten()[bin_y]
    x += begin_x.flatten()[bin_x]
    positions = (image[bin_y // output_size[0]] * height + y) * width + x
    matrix = torch.sparse_csr_tensor(
        rows,
        positions.int(),
        values,
        (len(counts), num_images * height * width),
        check_invariants=False,
    )
    with torch.autocast("cpu", enabled=False):
        flat = features.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
        pooled = _Product.apply(matrix, flat, False)
    pooled = pooled.view(len(rois), *output_size, channels).permute(0, 3, 1, 2)
    return pooled.to(features.dtype)


def _weights(
    start: torch.Tensor, size: torch.Tensor, bins: int, sampling_ratio: int, length: int
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each bin takes of the positions along one axis.

    Args:
        start, size: shape (K,), of the boxes.
        bins: of each box.
        length: number of positions.

    Returns:
        The first position, shape (K, bins), the number of positions, shape (K, bins), and their
        weights, shape (K, bins, R), of which the first are used.
    """
    bin_size = size / bins
    if sampling_ratio > 0:
        num_samples = torch.full_like(start, sampling_ratio, dtype=torch.long)
    else:
        num_samples = bin_size.ceil().long().clamp(min=0)
    most = max(int(num_samples.max()), 1) if len(start) else 1
    index = torch.arange(most, dtype=start.dtype)
    divisor = num_samples.clamp(min=1)[:, None, None].to(start.dtype)
    at = torch.arange(bins)[:, None] + (index + 0.5) / divisor
    at = start[:, None, None] + bin_size[:, None, None] * at  # (K, bins, samples)
    used = (index < num_samples[:, None, None]) & (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)
    low = at.long().clamp(max=max(length - 2, 0))
    share = at - low
    scale = used / divisor
    low = torch.where(used, low, length)
    begin = low.amin(2).clamp(max=max(length - 2, 0))
    low = torch.where(used, low - begin[:, :, None], 0)
    count = low.amax(2) + min(2, length)
    weights = at.new_zeros(*at.shape[:2], int(count.max()) if count.numel() else 1)
    weights.scatter_add_(2, low, (1 - share) * scale)
    if length > 1:
        weights.scatter_add_(2, low + 1, share * scale)
    return begin, count, weights


class _Product(torch.autograd.Function):
    """``matrix @ x`` or ``matrix.T @ x``, each the gradient of the other."""

    @staticmethod
    def forward(ctx, matrix, x, transposed):
        ctx.matrix, ctx.transposed = matrix, transposed
        if transposed:
            matrix = matrix.t().to_sparse_csr()
        return matrix @ x

    @staticmethod
    def backward(ctx, gradient):
        return None, _Product.apply(ctx.matrix, gradient.contiguous(), not ctx.transposed), None
