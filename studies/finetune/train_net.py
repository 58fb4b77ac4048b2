#!/usr/bin/env python3
"""The project's train_net.py, with one more negative sampler: IoU-balanced sampling in bins over
[0, 1].

MMDetection's bins end at the largest IoU of an image's boxes. The ground truth is among them, so
that is 1, and no negative is in the last of three bins (its issue #5323).
"""

import runpy
from pathlib import Path

from balanced_d2.modeling import NEGATIVE_SAMPLERS, IoUBalancedSampler


@NEGATIVE_SAMPLERS.register(name="iou_balanced_up_to_1")
class UpToOne(IoUBalancedSampler):
    @classmethod
    def from_config(cls, node, iou_range):
        return {"num_bins": node.NUM_BINS, "iou_range": (0.0, 1.0)}


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "train_net.py"), run_name="__main__")
