"""Numbers about data, the inside of a model and the course of training."""

import balanced_d2.utils.requirements  # noqa: F401
