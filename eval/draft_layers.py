"""Does the error of single blocks foretell whether a drafted token is accepted?

    python eval/draft_layers.py --target PARENT --output eval/results/draft-layers.json DRAFT ...

On the parent's own text both models' blocks are compared token by token: ‖h_draft − h_parent‖ /
‖h_parent‖ behind the first, the middle and the last block, in logarithms. Of the token that is being
drafted the parent's states are not known; what a policy can use is that of the last token that the
parent has checked, one place before the first drafted token and k + 1 places before the k-th behind
it. "own error" is what a block of the draft does otherwise than the parent's block *with the draft's
input*: known while drafting to whoever runs the parent's block as well, and the per-token form of the
error that a conversion reports.

Each signal alone: ROC area against rejection. Beside what `policy: fitted` goes by (log-odds,
entropy and margin of the draft, running acceptance): the log loss that it saves, fitted on every other
text and judged on the rest, both ways, with the 95 % interval by text; positive is better. Where a usable
signal saves something, the policy with it is replayed beside the policy without.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import measuring  # the script beside this one
import numpy as np
import torch
from torch import Tensor, nn

from quantize.draft.bursts import roc_area
from quantize.draft.fit import difference, logistic
from quantize.draft.policies import Costs, Outcome, stories
from quantize.draft.replay import Array, Interval, mean
from quantize.draft.run import Settings, measure
from quantize.draft.trace import Trace
from quantize.model.load import load_model
from quantize.serving.speculation.fitted import KEEP, features_of
from quantize.serving.speculation.policy import MOST, Signal

LAGS = (1, 4)
"""Places between a drafted token and the last checked one: of the first token of a draft, and of a
common last one."""
Columns = dict[str, list[Array]]


def block_errors(parent: nn.Module, draft: nn.Module, trace: Trace) -> Columns:
    """Signal → its value at every token that the parent wrote, an array for each text."""
    theirs, ours = (list(m.get_submodule("model.layers")) for m in (parent, draft))
    places = {"first block": 0, "middle block": len(ours) // 2, "last block": len(ours) - 1}
    states: dict[str, dict[int, Tensor]] = {"parent": {}, "draft": {}}
    own: dict[int, Tensor] = {}

    def keep(who: str, index: int) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            states[who][index] = _hidden(out).double()
            if who == "draft":
                # .forward: the parent's own hooks are for its own pass
                other = _hidden(theirs[index].forward(*args, **kwargs)).double()
                own[index] = (states[who][index] - other).norm(dim=-1) / other.norm(dim=-1)

        return hook

    hooks = [
        block.register_forward_hook(keep(who, index), with_kwargs=True)
        for who, blocks in (("parent", theirs), ("draft", ours))
        for index, block in enumerate(blocks)
    ]
    found: Columns = {}
    with torch.no_grad():
        for prompt, written in zip(trace.rollout.prompts, trace.rollout.tokens, strict=True):
            ids = torch.tensor([[*prompt.ids, *written][:-1]])
            for model in (parent, draft):
                model(input_ids=ids, use_cache=False)
            here = slice(len(prompt.ids) - 1, None)
            for name, index in places.items():
                p, q = states["parent"][index][0, here], states["draft"][index][0, here]
                ratio = ((q - p).norm(dim=-1) / p.norm(dim=-1)).clamp_min(1e-9)
                found.setdefault(name, []).append(ratio.log().numpy())
            errors = torch.stack([own[index][0, here] for index in range(len(ours))])
            half = errors[: len(ours) // 2]
            for name, part in (("own error, first half", half), ("own error, all", errors)):
                middle = part.clamp_min(1e-9).log().mean(0)  # no block outweighs the others
                found.setdefault(name, []).append(middle.numpy())
    for hook in hooks:
        hook.remove()
    return found


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def lagged(values: list[Array], lag: int) -> list[Array]:
    """The value so many places before; the first of a text where there is none."""
    return [np.concatenate([v[:1].repeat(min(lag, len(v))), v[:-lag]]) for v in values]


def recent(values: list[Array], keep: float = 0.8) -> list[Array]:
    """Running mean up to and with each token."""
    found = []
    for column in values:
        running, out = column[0], np.empty_like(column)
        for t, value in enumerate(column):
            out[t] = running = keep * running + (1 - keep) * value
        found.append(out)
    return found


def candidates(errors: Columns, trace: Trace) -> dict[str, tuple[str, list[Array]]]:
    """Signal → (what is needed to know it, its values)."""
    blocks = [name for name in errors if not name.startswith("own")]
    found = {f"{name}, this token": ("the parent's states", errors[name]) for name in blocks}
    found |= {
        f"{name}, this token": ("the parent's blocks", values)
        for name, values in errors.items()
        if name.startswith("own")
    }
    past = {name: errors[name] for name in blocks}
    past["last block, recent mean"] = recent(errors["last block"])
    past["KL"] = [np.log(np.maximum(kl, 1e-9)) for kl in trace["kl"]]
    for name, values in past.items():
        for lag in LAGS:
            found[f"{name}, {lag} back"] = ("nothing more", lagged(values, lag))
    return found


def today(trace: Trace) -> list[Array]:
    """What the fitted policy goes by, [n, F] of each text."""
    start = float(np.mean(np.concatenate(trace["accept"])))
    found = []
    for text, accept in enumerate(trace["accept"]):
        running, rows = start, []
        names = ("entropy", "confidence", "margin")
        for values in zip(*(trace[n][text] for n in names), accept, strict=True):
            rows.append(features_of(Signal(*map(float, values[:3])), running))
            running = KEEP * running + (1 - KEEP) * float(values[3])
        found.append(np.array(rows))
    return found


def losses(rows: list[Array], accept: list[Array]) -> list[Array]:
    """Log loss of every token by weights fitted on the texts of the other half."""
    found: list[Array] = [np.zeros(0)] * len(rows)
    for half in (0, 1):
        weights = logistic(np.concatenate(rows[half::2]), np.concatenate(accept[half::2]))
        for text in range(1 - half, len(rows), 2):
            p = np.clip(1 / (1 + np.exp(-np.clip(rows[text] @ weights, -30, 30))), 1e-6, 1 - 1e-6)
            found[text] = -(accept[text] * np.log(p) + (1 - accept[text]) * np.log(1 - p))
    return found


def with_signal(rows: list[Array], values: list[Array]) -> list[Array]:
    """One more column."""
    return [np.column_stack([r, v]) for r, v in zip(rows, values, strict=True)]


def played(trace: Trace, costs: Costs, past: list[Array] | None) -> Outcome:
    """The rule of the fitted policy, each half of the texts by weights of the other. past: a signal that
    is known up to the last checked token, beside what it goes by today."""
    rows, accept = today(trace), trace["accept"]
    texts = len(rows)
    tokens, steps, drafted = (np.zeros(texts) for _ in range(3))
    rng = np.random.default_rng(3)  # weights learn lags as they come: one to six places
    fitted = rows
    if past is not None:
        mixed = [np.array([v[max(0, t - rng.integers(1, 7))] for t in range(len(v))]) for v in past]
        fitted = with_signal(rows, mixed)
    told, cost = stories(trace, 4), costs.draft + costs.check_token
    for half in (0, 1):
        weights = logistic(np.concatenate(fitted[half::2]), np.concatenate(accept[half::2]))
        average = float(np.mean(np.concatenate(accept[half::2])))
        learn = [s for s in told if s.text % 2 == half]
        rest = [s for s in told if s.text % 2 != half]
        rate = 1.0
        for _ in range(4):
            count = [_walk(s, rows, past, weights, cost * rate / average, average) for s in learn]
            written = sum(len(s.outcomes) for s in learn)
            rate = written / sum(costs.check * n + cost * d for n, d in count)
        for s in rest:
            n, d = _walk(s, rows, past, weights, cost * rate / average, average)
            tokens[s.text] += len(s.outcomes)
            steps[s.text] += n
            drafted[s.text] += d
    return Outcome(tokens, steps, drafted, "fitted" if past is None else "fitted and signal")


def _walk(
    story: Any,
    rows: list[Array],
    past: list[Array] | None,
    weights: Array,
    bar: float,
    average: float,
) -> tuple[int, int]:
    """Steps and drafted tokens of one text. bar: chance that all are accepted behind which a draft
    ends; above 1 nothing is drafted. average: running acceptance before anything is known."""
    at, steps, drafted, running = 0, 0, 0, average
    columns = rows[story.text]
    while at < len(story.outcomes):
        most = 0 if bar > 1 else min(MOST, len(story.outcomes) - at - 1)
        k, chance = 0, 1.0
        while k < most:
            values = [*columns[at + k][:-1], running]
            if past is not None:
                values.append(past[story.text][max(0, at - 1)])
            k += 1
            chance *= 1 / (1 + np.exp(-np.clip(np.dot(values, weights), -30, 30)))
            if chance < bar:
                break
        accepted = 0
        while accepted < k and story.outcomes[at + accepted]:
            accepted += 1
        for value in [1.0] * accepted + [0.0] * (accepted < k):
            running = KEEP * running + (1 - KEEP) * value
        at, steps, drafted = at + accepted + 1, steps + 1, drafted + k
    return steps, drafted


def table(trace: Trace, errors: Columns, costs: Costs) -> dict[str, Any]:
    """All figures of one draft at one temperature."""
    rows, accept = today(trace), trace["accept"]
    rejected = np.concatenate([s.outcomes for s in stories(trace, 1, seed=5)]) == 0
    base = losses(rows, accept)
    margin = -np.concatenate(trace["margin"])
    found: list[dict[str, Any]] = []
    for name, (needs, values) in candidates(errors, trace).items():
        flat = np.concatenate(values)
        more = losses(with_signal(rows, values), accept)
        saved = mean([b - m for b, m in zip(base, more, strict=True)])
        found.append(
            {
                "signal": name,
                "needs": needs,
                "area": roc_area(flat, rejected),
                "correlation": float(np.corrcoef(flat, np.concatenate(accept))[0, 1]),
                "loss_saved": _rounded(saved),
            }
        )
    without = played(trace, costs, None)
    policies = []
    for name in ("first block", "middle block", "last block"):
        policy = played(trace, costs, errors[name])
        gain = difference(policy, without, costs)
        policies.append({"signal": f"{name}, last checked token", "gain": _rounded(gain)})
    return {
        "temperature": trace.temperature,
        "tokens": trace.rollout.count,
        "acceptance": _rounded(mean(accept)),
        "margin_area": roc_area(margin, rejected),
        "loss_today": _rounded(mean(base)),
        "signals": found,
        "fitted_speed_up": _rounded(without.speed_up(costs)),
        "policies": policies,
    }


def _rounded(value: Interval) -> dict[str, float | None]:
    return {
        name: None if x is None else float(f"{x:.4g}")
        for name, x in (("value", value.value), ("low", value.low), ("high", value.high))
    }


def main() -> None:
    """Run as a script."""
    arguments = measuring.draft_parser(__doc__ or "", prompts=64, tokens=128)
    arguments.add_argument("--cost", type=float, default=0.53)
    args = arguments.parse_args()
    settings = Settings((args.text,), args.prompts, 64, args.tokens)
    found = measure(args.target, args.drafts, settings)
    device, dtype = torch.device("cpu"), torch.float32
    parent = load_model(args.target, device, dtype)
    rows = []
    for folder, figures, traces in zip(args.drafts, found.drafts, found.traces, strict=False):
        draft = load_model(folder, device, dtype)
        by_temperature = [
            table(trace, block_errors(parent, draft, trace), Costs(args.cost)) for trace in traces
        ]
        rows.append(
            {"draft": folder.name, "bits": figures.bits_per_weight, "temperatures": by_temperature}
        )
        print(json.dumps(rows[-1]), flush=True)
    asked = {name: getattr(args, name) for name in ("text", "prompts", "tokens", "cost")}
    head = {"target": args.target.name, **asked, "rows": rows}
    if args.output:
        args.output.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
