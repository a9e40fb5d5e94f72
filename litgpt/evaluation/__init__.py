"""Scores by the tasks of lm-eval."""
