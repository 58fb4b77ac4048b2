"""Detectron2's RoIAlign with sparse products on CPUs."""

import logging

import torch
from detectron2.layers import ROIAlign
from torch import nn

from balanced_d2.layers.exporting import is_exporting
from balanced_d2.layers.sparse_roi_align import roi_align


class SparseROIAlign(ROIAlign):
    """Detectron2's ``ROIAlign``, which on CPUs is computed by
    :func:`balanced_d2.layers.sparse_roi_align.roi_align`. On other devices, and for traces,
    compilers and exporters, it stays Detectron2's.

    Args: as for Detectron2's ``ROIAlign``.
    """

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: shape (N, C, H, W).
            rois: shape (K, 5): index of the image, then x1, y1, x2, y2.

        Returns:
            Tensor of shape (K, C, height, width) of ``output_size``.
        """
        is_eager = not (torch.jit.is_tracing() or torch.compiler.is_compiling() or is_exporting())
        if input.device.type != "cpu" or not is_eager:
            return super().forward(input, rois)
        output_size = nn.modules.utils._pair(self.output_size)
        return roi_align(
            input, rois, output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )


def use_sparse_roi_align(model: nn.Module) -> None:
    """Let any model of Detectron2 compute RoIAlign by sparse products on CPUs.

    Only warns where PyTorch has no MKL, whose products they are (CPUs other than x86).
    """
    if not torch.backends.mkl.is_available():
        logging.getLogger(__name__).warning(
            "MODEL.SPARSE_ROI_ALIGN has no effect: this PyTorch has no MKL"
        )
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is ROIAlign:
                sparse = SparseROIAlign(
                    child.output_size,
                    child.spatial_scale,
                    child.sampling_ratio,
                    aligned=child.aligned,
                )
                setattr(module, name, sparse)
