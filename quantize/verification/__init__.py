"""Does a checkpoint still hold what its conversion wrote, and does that stand for its parent?"""

from quantize.verification.checks import Check
from quantize.verification.run import Verification, verify

__all__ = ["Check", "Verification", "verify"]
