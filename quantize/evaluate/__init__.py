"""Measuring a model: perplexity protocols, divergence from the parent, tasks."""

from quantize.evaluate.run import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
