"""Formats of datasets, and the datasets of this project."""
