"""What transformers asks of a quantization method, in names that do not depend on its release.

Apart from `transformers_api`, because importing it makes transformers import pq's own method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
)
from transformers.quantizers.auto import register_quantizer as register_quantizer_class
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["QuantizationConfigMixin", "Quantizer", "register_quantizer"]


def register_quantizer(name: str, config: type, quantizer: type) -> None:
    """Make a `quant_method` known; does nothing the second time."""
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(name)(config)
        register_quantizer_class(name)(quantizer)


class Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """A quantization method whose checkpoints are loaded as they were packed, for inference."""

    requires_calibration = True
    """A model cannot be packed while it is loaded."""

    def prepare(self, model: Any, files: Sequence[str]) -> None:
        """Put modules for packed tensors into a model; files: the checkpoint's, none in memory."""
        raise NotImplementedError

    def finish(self, model: Any) -> None:
        """Do what loaded weights need."""
        raise NotImplementedError

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        self.prepare(model, checkpoint_files or ())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.finish(model)
        return model

    def update_weight_conversions(self, weight_conversions: Sequence[Any], *args: Any) -> list[Any]:
        """The model's conversions but those that stack experts: pq has them as checkpoints do.

        args: the model, in releases of transformers that pass it.
        """
        stacks = [any("experts" in p for p in c.source_patterns) for c in weight_conversions]
        kept = [c for c, stacked in zip(weight_conversions, stacks, strict=True) if not stacked]
        return list(super().update_weight_conversions(kept, *args))

    def is_serializable(self, safe_serialization: object = None) -> bool:
        """Whether save_pretrained works: it writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the packed weights can be trained: they are integers."""
        return False
