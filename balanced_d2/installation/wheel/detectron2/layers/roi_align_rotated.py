"""RoIAlign of rotated boxes in plain PyTorch, on any device.

Part of the pure-Python build of Detectron2 0.6; replaces its compiled operator.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair


def roi_align_rotated(
    input: torch.Tensor,
    rois: torch.Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
) -> torch.Tensor:
    """Average features over the bins of rotated boxes; differentiable in ``input``.

    Each bin is the mean of a grid of points, and each point is interpolated bilinearly from the
    four pixels around it: a weighted sum of pixels whose weights depend only on the boxes. Points
    more than one pixel outside the features are 0.

    Args:
        input: (N, C, H, W).
        rois: (R, 6): index into N, x and y of the center, width, height (pixels), and angle
            (degrees, counter-clockwise).
        output_size: height and width of the output.
        spatial_scale: factor by which the boxes are multiplied.
        sampling_ratio: points per bin in each direction; 0 for one point per pixel.

    Returns:
        (R, C, output height, output width) in the dtype of ``input``, computed at least in float32.

    Raises:
        ValueError: for a box of negative size.
    """
    num_channels = input.shape[1]
    height, width = _pair(output_size)
    dtype = torch.promote_types(input.dtype, torch.float32)
    with torch.no_grad():
        pixels, weights, starts = _weights(
            rois.to(dtype), input.shape, (height, width), spatial_scale, sampling_ratio
        )
    # One row per pixel; one "bag" of rows is one bin.
    features = input.to(dtype).permute(0, 2, 3, 1).reshape(-1, num_channels)
    if len(pixels) == 0:  # here, embedding_bag would return zeros without a gradient
        output = features[:0].sum() + features.new_zeros(len(starts), num_channels)
    else:
        output = F.embedding_bag(pixels, features, starts, mode="sum", per_sample_weights=weights)
    output = output.reshape(len(rois), height, width, num_channels).permute(0, 3, 1, 2)
    return output.contiguous().to(input.dtype)


def _weights(
    rois: torch.Tensor,
    shape: torch.Size,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pixels of all bins, concatenated, their weights, and where each bin starts."""
    _, _, height, width = shape
    bins_y, bins_x = output_size
    if bool((rois[:, 3:5] < 0).any()):
        raise ValueError("roi_align_rotated: a box has a negative width or height")
    batch_index = rois[:, 0].long()
    # Pixel centers are at half coordinates.
    center_x, center_y = (rois[:, 1:3] * spatial_scale - 0.5).unbind(1)
    roi_width, roi_height = (rois[:, 3:5] * spatial_scale).unbind(1)
    angle = rois[:, 5].deg2rad()

    if sampling_ratio > 0:
        points_y = points_x = torch.full_like(batch_index, sampling_ratio)
    else:
        points_y = (roi_height / bins_y).ceil().long()
        points_x = (roi_width / bins_x).ceil().long()
    num_points = points_y * points_x  # of each bin, (R,)
    bin_sizes = num_points.repeat_interleave(bins_y * bins_x)
    starts = bin_sizes.cumsum(0) - bin_sizes

    # For each point of all bins: its RoI, its bin, and its place in the bin's grid.
    bin_of = torch.arange(len(bin_sizes), device=rois.device).repeat_interleave(bin_sizes)
    place = torch.arange(len(bin_of), device=rois.device) - starts[bin_of]
    roi = bin_of // (bins_y * bins_x)
    bin_y, bin_x = bin_of // bins_x % bins_y, bin_of % bins_x
    place_y, place_x = place // points_x[roi], place % points_x[roi]

    # Its place in the RoI, from -0.5 to 0.5 of height and width, then in the image.
    y = (bin_y + (place_y.to(rois.dtype) + 0.5) / points_y[roi]) / bins_y - 0.5
    x = (bin_x + (place_x.to(rois.dtype) + 0.5) / points_x[roi]) / bins_x - 0.5
    y, x = y * roi_height[roi], x * roi_width[roi]
    cos, sin = angle.cos()[roi], angle.sin()[roi]
    y, x = y * cos - x * sin + center_y[roi], y * sin + x * cos + center_x[roi]

    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    weight = inside.to(rois.dtype) / num_points[roi]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    # Beyond the last row and column the weight is 0, but the index still has to be valid.
    rows = torch.stack((top, (top + 1).clamp(max=height - 1)), dim=1).long()
    columns = torch.stack((left, (left + 1).clamp(max=width - 1)), dim=1).long()
    weight_y = torch.stack((1 - down, down), dim=1)
    weight_x = torch.stack((1 - right, right), dim=1)
    weights = weight[:, None, None] * weight_y[:, :, None] * weight_x[:, None, :]
    pixels = (batch_index[roi, None, None] * height + rows[:, :, None]) * width + columns[
        :, None, :
    ]
    return pixels.flatten(), weights.flatten(), starts * 4


class ROIAlignRotated(nn.Module):
    """:func:`roi_align_rotated` with its options, as used in Detectron2's poolers."""

    def __init__(self, output_size: tuple[int, int], spatial_scale: float, sampling_ratio: int):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features and (R, 6) boxes to (R, C, *output_size)."""
        assert rois.dim() == 2 and rois.size(1) == 6
        return roi_align_rotated(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        )
