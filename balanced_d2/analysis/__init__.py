"""Numbers about data, the inside of a model and the course of training."""
