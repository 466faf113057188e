"""Measuring a model: perplexity protocols, divergence from the parent, tasks."""

from quantize.evaluation.figures import Evaluation
from quantize.evaluation.run import evaluate

__all__ = ["Evaluation", "evaluate"]
