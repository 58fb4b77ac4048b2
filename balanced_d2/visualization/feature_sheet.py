"""The pyramid of an image before and after balancing, in one figure."""

from typing import Sequence

import numpy as np
from matplotlib.figure import Figure

from balanced_d2.analysis.features import Level, energy
from balanced_d2.visualization.figure import new_figure

COLUMN_INCHES = 1.8


def draw_features(image: np.ndarray, levels: Sequence[Level], title: str) -> Figure:
    """Draw one row for each level: before, after, and what is added.

    Each picture shows the norm of the features over the channels, with one colour scale per row.
    The energy, the mean of the squared norm, is written above it.

    Args:
        image: uint8, shape (H, W, 3), RGB.
        levels: as :func:`balanced_d2.analysis.features.balance_levels` returns them.
    """
    row_inches = COLUMN_INCHES * image.shape[0] / image.shape[1] + 0.35
    figure = new_figure(4 * COLUMN_INCHES + 0.6, len(levels) * row_inches + 0.4)
    figure.suptitle(title)
    grid = figure.add_gridspec(len(levels), 4)
    axes = figure.add_subplot(grid[0, 0])
    axes.imshow(image)
    axes.set_title("image", fontsize=9)
    axes.axis("off")
    for row, level in enumerate(levels):
        highest = max(level.before.max(), level.after.max())
        pictures = {"before": level.before, "after": level.after, "added": level.added}
        for column, (name, norms) in enumerate(pictures.items(), start=1):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(norms, vmin=0, vmax=highest, interpolation="nearest")
            label = f"{level.name} {name}" if column == 1 else name
            axes.set_title(f"{label}: energy {energy(norms):.3g}", fontsize=9)
            axes.set(xticks=[], yticks=[])
        figure.colorbar(axes.images[0], ax=axes, shrink=0.9).ax.tick_params(labelsize=7)
    return figure
