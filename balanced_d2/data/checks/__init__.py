"""Checks of data sets, each of what the one before has let through."""
