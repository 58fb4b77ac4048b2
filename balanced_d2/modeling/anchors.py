"""Anchors as torchvision's detectors have them."""

from typing import List

import torch
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors with torchvision's rounding, for weights that were trained with it.

    Corners of the anchors of a cell are whole numbers. The stride of a level is the size of the
    padded image divided by that of the level, rounded down, and may differ between x and y: for P6
    of an image of 800 pixels it is 61, where Detectron2 has 64.

    Args: those of ``DefaultAnchorGenerator``, for levels whose first divides the size of the image.
    """

    # TorchScript takes the constants of each class from its own annotations only.
    box_dim: torch.jit.Final[int] = 4

    def generate_cell_anchors(self, sizes=(32, 64, 128, 256, 512), aspect_ratios=(0.5, 1, 2)):
        """
        Returns:
            Shape (len(sizes) * len(aspect_ratios), 4): boxes around (0, 0) in pixels.
        """
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def _grid_anchors(self, grid_sizes: List[List[int]]):
        height = grid_sizes[0][0] * self.strides[0]
        width = grid_sizes[0][1] * self.strides[0]
        # TorchScript has named_buffers() only.
        buffers: List[torch.Tensor] = [x[1] for x in self.cell_anchors.named_buffers()]
        anchors = []
        for size, cell_anchors in zip(grid_sizes, buffers):
            rows, columns = size[0], size[1]
            y = torch.arange(rows, dtype=torch.float32, device=cell_anchors.device)
            x = torch.arange(columns, dtype=torch.float32, device=cell_anchors.device)
            y = (y + self.offset) * (height // rows)
            x = (x + self.offset) * (width // columns)
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack((grid_x, grid_y, grid_x, grid_y), dim=2).reshape(-1, 1, 4)
            anchors.append((shifts + cell_anchors).reshape(-1, 4))
        return anchors
