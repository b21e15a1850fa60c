"""Trains the parameters of methods that have learned ones, on a stock model that stays as it is.

    result = train(model, processor, vtprune.methods.create("atp-llava", keep=48))
    result.write("atp-llava-48.safetensors")

Pictures and questions are those of the picture world, split `train`. The world's answer stands behind each question; what the
model is to say at each of its words is what it says without pruning. The better of two checkpoints is chosen on split `val`.
"""

from .loop import STEPS, Step, TrainingResult, learner_for, train

__all__ = ["STEPS", "Step", "TrainingResult", "learner_for", "train"]
