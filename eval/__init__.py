"""Evaluation: the offline picture world, the benchmark and its reports.

The command `vtprune` is a thin layer over `vtprune.eval.evaluation.evaluate`, which can be called with any supported
model, its processor, and examples of `vtprune.eval.world`.
"""
