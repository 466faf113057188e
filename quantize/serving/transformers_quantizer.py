"""What transformers asks of a quantization method, in names that do not depend on its release.

Apart from `transformers_api`, because importing it makes transformers import pq's own method.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
)
from transformers.quantizers.auto import register_quantizer as register_quantizer_class
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantize.formats.native import WEIGHTS_FIELD

log = logging.getLogger(__name__)

__all__ = ["QuantizationConfigMixin", "Quantizer", "register_quantizer"]


def register_quantizer(name: str, config: type, quantizer: type) -> None:
    """Make a `quant_method` known; does nothing the second time."""
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(name)(config)
        register_quantizer_class(name)(quantizer)


def _let_load(config: Any) -> Any:
    if hasattr(config, WEIGHTS_FIELD):
        delattr(config, WEIGHTS_FIELD)
    return config


class Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """A quantization method whose checkpoints are loaded as they were packed, for inference."""

    requires_calibration = True
    """A model cannot be packed while it is loaded."""

    def update_tp_plan(self, config: Any) -> Any:
        """Take away what keeps loaders off that do not know the method. Releases of transformers
        before 5.18 show the config here alone."""
        return _let_load(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """The same; the others, before they look for files."""
        return _let_load(config)

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
        """Whether save_pretrained works: it writes the packed tensors as they are.

        Of config.json it leaves out what keeps loaders off that do not know the method, whatever
        a method does about it, and asks this first: the moment to say so.
        """
        log.warning(
            "save_pretrained leaves %s out of config.json: without `import quantize`, transformers "
            "would fill the copy with random weights and only warn; copy the field from the model's",
            WEIGHTS_FIELD,
        )
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the packed weights can be trained: they are integers."""
        return False
