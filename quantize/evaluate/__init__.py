"""Measuring a model: perplexity protocols, divergence from the parent, tasks."""

from quantize.evaluate.figures import Evaluation
from quantize.evaluate.run import evaluate

__all__ = ["Evaluation", "evaluate"]
