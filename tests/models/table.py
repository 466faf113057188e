"""Make the table of models from what a sweep over all types found.

    PYTHONPATH=tests:. python -m models.table out/models.json

It writes `eval/results/models.json`, one row a type, and a short form of it that is packaged,
`quantize/model/known.json`, which `pq models` and docs/models.md show.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import quantize
from models.law import CHECKS
from models.subject import Row

ROOT = Path(__file__).resolve().parents[2]
FAMILIES: Mapping[str, Sequence[str]] = {
    "Llama": ["llama"],
    "Mistral": ["mistral"],
    "Ministral": ["ministral", "ministral3"],
    "Mixtral": ["mixtral"],
    "Qwen2": ["qwen2"],
    "Qwen2-MoE": ["qwen2_moe"],
    "Qwen3": ["qwen3"],
    "Qwen3-MoE": ["qwen3_moe"],
    "Qwen3-Next": ["qwen3_next"],
    "Qwen3.5": ["qwen3_5_text"],
    "Qwen-VL": ["qwen2_5_vl:image-text", "qwen3_vl:image-text"],
    "Gemma 2": ["gemma2"],
    "Gemma 3": ["gemma3_text", "gemma3:image-text"],
    "Gemma 3n": ["gemma3n_text"],
    "Gemma 4": ["gemma4_text"],
    "Phi-3, Phi-4": ["phi3"],
    "gpt-oss": ["gpt_oss"],
    "DeepSeek-V2": ["deepseek_v2"],
    "DeepSeek-V3": ["deepseek_v3"],
    "GLM-4": ["glm4"],
    "GLM-4-MoE": ["glm4_moe"],
    "SmolLM3": ["smollm3"],
    "OLMo 2, OLMo 3": ["olmo2", "olmo3"],
    "Granite": ["granite", "granitemoehybrid"],
    "Llama 4": ["llama4_text", "llama4:image-text"],
    "Cohere": ["cohere", "cohere2"],
    "Nemotron": ["nemotron", "nemotron_h"],
    "Falcon": ["falcon", "falcon_h1"],
    "EXAONE": ["exaone4"],
    "LFM2": ["lfm2"],
}
"""The 30 families that people download, and the types that stand for them."""
NEEDED = ("stream", "rtn8")
"""Without these a model is of no use to pq."""


def short(row: Row) -> Row:
    """What is told of a type: a sweep's row without figures that nobody asks for."""
    checks = row["checks"]
    status = {name: found.get("status", "fails") for name, found in checks.items()}
    proofs, rounded = checks.get("proofs", {}), checks.get("rtn8", {})
    out: Row = {"class": row["class"], "works": verdict(status)}
    if "kind" in proofs:
        out["kind"] = proofs["kind"]
    out["status"] = status
    out["kld"] = {name: found["kld"] for name, found in checks.items() if "kld" in found}
    changes = {n: f["difference"] for n, f in checks.items() if "difference" in f}
    out["change"] = changes
    if "stock_kld" in rounded:
        out["stock"] = "loads"
    elif "said" in rounded:
        out["stock"] = rounded["said"][0].partition(": ")[2]
    for name in ("proved", "dropped", "cache_16bit"):
        if proofs.get(name):
            out[name] = proofs[name]
    why: dict[str, list[str]] = {}
    for name, found in checks.items():
        if "why" in found:
            why.setdefault(found["why"], []).append(name)
    if why:
        out["refused"] = why
    if "derive_seconds" in proofs:
        out["seconds"] = {n: proofs[f"{n}_seconds"] for n in ("derive", "prove")}
    return out


def verdict(status: Mapping[str, str]) -> str:
    """`yes`, `in part` where a recipe is refused, `no` where all are, `wrong` where one is that."""
    if any(found in ("wrong", "fails") for found in status.values()):
        return "wrong"
    if any(status.get(name) != "holds" for name in NEEDED):
        return "no"
    return "yes" if all(found == "holds" for found in status.values()) else "in part"


def table(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """All rows of decoder-only types, and of what does not build why."""
    types, unbuilt = {}, {}
    for row in sweep["rows"]:
        name = row["type"] + (":image-text" if row["auto"] == "image-text" else "")
        if row["status"] != "builds":
            unbuilt[name] = row["why"]
        elif row["kind"] == "decoder-only":
            types[name] = short(row)
    works = [row["works"] for row in types.values()]
    counts = {verdict: works.count(verdict) for verdict in ("yes", "in part", "no", "wrong")}
    families = {name: [kind for kind in kinds if kind in types] for name, kinds in FAMILIES.items()}
    good = [
        name
        for name, kinds in families.items()
        if any(types[kind]["works"] in ("yes", "in part") for kind in kinds)
    ]
    return {
        "versions": {
            "pq": quantize.__version__,
            "torch": sweep["torch"],
            "transformers": sweep["transformers"],
        },
        "checks": {check.__name__: (check.__doc__ or "").strip() for check in CHECKS},
        "counts": {"types": len(types), **counts, "families": len(good), "of": len(FAMILIES)},
        "families": families,
        "types": dict(sorted(types.items())),
        "unbuilt": unbuilt,
    }


def merged(sweeps: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a type, with the checks of all sweeps in the order of the law; where several did the
    same check the last one counts."""
    rows: dict[tuple[str, str], Row] = {}
    for row in (row for sweep in sweeps for row in sweep["rows"]):
        key = row["type"], row["auto"]
        before = rows.get(key, {}).get("checks", {})
        checks = before | row.get("checks", {})
        order = [check.__name__ for check in CHECKS if check.__name__ in checks]
        rows[key] = row | ({"checks": {name: checks[name] for name in order}} if checks else {})
    return [rows[key] for key in sorted(rows)]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Make the table of models from a sweep.")
    parser.add_argument("sweeps", type=Path, nargs="+", help="later ones add to earlier")
    told = parser.parse_args()
    read = [json.loads(path.read_text(encoding="utf-8")) for path in told.sweeps]
    rows = merged(read)
    found = table(read[-1] | {"rows": rows})
    full = {name: found[name] for name in ("versions", "counts")} | {"rows": rows}
    write(ROOT / "eval" / "results" / "models.json", full)
    write(ROOT / "quantize" / "model" / "known.json", found)


def write(path: Path, found: Mapping[str, Any]) -> None:
    """One line for each type, so that a change shows as one."""
    lines = []
    for key, value in found.items():
        if key in ("types", "rows"):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            each = [
                f"  {json.dumps(name) + ': ' if key == 'types' else ''}{json.dumps(row)}"
                for name, row in inner
            ]
            brackets = "{}" if key == "types" else "[]"
            lines.append(f'"{key}": {brackets[0]}\n' + ",\n".join(each) + f"\n {brackets[1]}")
        else:
            lines.append(f'"{key}": {json.dumps(value, indent=1)}')
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
