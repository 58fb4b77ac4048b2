"""What goes on inside a model and a training, in numbers."""
