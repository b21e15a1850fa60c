"""Evaluation: the offline picture world, the benchmark and its reports."""
