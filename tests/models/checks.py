"""What the sweep asks of every model by itself: is it alive, and the same after a round trip?"""

from __future__ import annotations

import math

import torch

from models import zoo
from models.subject import Check, Row, Subject


def alive(subject: Subject) -> Row:
    """Whether logits are finite and neither flat nor certain, and every block changes its stream."""
    ids = zoo.tokens(seed=7)
    blocks = zoo.find_blocks(subject.model, lambda: zoo.logits(subject.model, ids))
    changes, scores = zoo.measure(subject.model, blocks, ids)
    entropy = zoo.entropy(scores)
    return {
        "ok": bool(torch.isfinite(scores).all())
        and zoo.ENTROPY[0] < entropy < zoo.ENTROPY[1]
        and len(changes) > 0
        and all(zoo.CHANGE[0] < change < zoo.CHANGE[1] for change in changes),
        "entropy": rounded(entropy),
        "changes": [rounded(change) for change in changes],
        "blocks": list(blocks.names),
        "classes": sorted({type(block).__name__ for block in blocks.modules}),
    }


def round_trip(subject: Subject) -> Row:
    """Whether the saved model loads whole and gives the same logits."""
    loaded, info = subject.loader.from_pretrained(
        subject.folder, dtype=torch.float32, output_loading_info=True
    )
    ids = zoo.tokens(seed=10)
    difference = zoo.apart(zoo.logits(subject.model, ids), zoo.logits(loaded.eval(), ids))
    wrong = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
    return {"ok": difference < 1e-5 and not wrong, "difference": rounded(difference), "keys": wrong}


def rounded(value: float) -> float | str:
    """Four digits; JSON has no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


CHECKS: tuple[Check, ...] = (alive, round_trip)
"""What `sweep.main` runs when told no others."""
