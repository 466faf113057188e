"""Copies of conversions, ways to damage them, and pq.json made consistent with the damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.files.checkpoint import INDEX_NAME
from quantize.files.provenance import canonical_json, provenance_digest
from quantize.verification import Check, Verification

Maker = Callable[..., Path]

OWN = ["provenance", "files", "layout", "values", "packing"]
WITH_PARENT = [*OWN, "source", "untouched", "recomputed", "outputs"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 5000)
    | st.floats(allow_nan=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
Q0 = "model.layers.0.self_attn.q_proj"


def sign(folder: Path, **changes: Any) -> None:
    """Write pq.json so that it is consistent with itself and with the files as they are now."""
    data = json.loads((folder / "pq.json").read_text(encoding="utf-8")) | changes
    names = [path.name for path in folder.iterdir() if path.name != "pq.json"]
    data["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)
    }
    data.pop("sha256", None)
    text = canonical_json(data | {"sha256": provenance_digest(data)})
    (folder / "pq.json").write_text(text, encoding="utf-8")


def checks_of(result: Verification) -> dict[str, Check]:
    return {check.name: check for check in result.checks}


def failed(result: Verification) -> list[str]:
    return [check.name for check in result.checks if check.ok is False]


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the shard that holds block 0, and the index with them."""
    index = json.loads((folder / INDEX_NAME).read_text())
    shard = index["weight_map"][f"{Q0}.weight_packed"]
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    rest = {name: at for name, at in index["weight_map"].items() if at != shard}
    index["weight_map"] = rest | dict.fromkeys(tensors, shard)
    sizes = [t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    index["metadata"]["total_size"] = sum(sizes)
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    sign(folder)


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    sign(folder)


def pop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def group_edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value

    return change
