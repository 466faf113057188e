"""Registry of methods: one literal. A new method is one file here and one name in this tuple."""

from quantize.methods.awq import Awq
from quantize.methods.base import Stage
from quantize.methods.cas import Cas
from quantize.methods.equalize import Equalize
from quantize.methods.fireq.attention import FireqAttention
from quantize.methods.fireq.stage import Fireq
from quantize.methods.gguf import Blocks
from quantize.methods.gptq import Gptq
from quantize.methods.ladimo.stage import Ladimo
from quantize.methods.rotate import Rotate
from quantize.methods.rtn import Rtn
from quantize.methods.sbvr.stage import Sbvr

STAGES: tuple[type[Stage], ...] = (
    Ladimo,
    Cas,
    Awq,
    Equalize,
    Rotate,
    FireqAttention,
    Rtn,
    Gptq,
    Fireq,
    Sbvr,
    Blocks,
)

__all__ = ["STAGES", "Stage"]
