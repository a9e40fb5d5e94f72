"""The commands that are not a training run: under 100 lines each, nothing in them is imported elsewhere."""
