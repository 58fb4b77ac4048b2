"""Pictures of data and results."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.visualization.contact_sheet import draw_contact_sheet
from balanced_d2.visualization.detections import as_records

__all__ = ["as_records", "draw_contact_sheet"]
