"""Checks of datasets; each assumes that the earlier ones have passed."""
