"""Pictures of data and results."""

from balanced_d2.visualization.contact_sheet import draw_contact_sheet

__all__ = ["draw_contact_sheet"]
