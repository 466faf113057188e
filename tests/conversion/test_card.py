"""README.md of an output: the parent by id and commit, and of its own card what is still true."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ModelMaker, request_for

from quantize.conversion.loop import convert
from quantize.files import strict_yaml
from quantize.files.provenance import read_provenance

COMMIT = "c0ffee" + "0" * 34
PARENTS = """\ufeff---
license: other
license_name: house-licence
license_link: LICENSE
# a remark
language:
  - en
  - de
base_model: org/base
base_model_relation: finetune
tags:
  - chat
model-index:
- name: parent
  results: [{metrics: [{value: 99.9}]}]
pipeline_tag: text-generation
---

# The Parent

It says --- much.
"""
Make = Callable[[str, str | None], str]


@pytest.fixture
def made(tiny: ModelMaker, text_file: Path, tmp_path: Path) -> Make:
    """Convert a model in this folder, with this card, by rounding → README.md of the output."""

    def make(place: str, card: str | None) -> str:
        model = Path(shutil.copytree(tiny("llama"), tmp_path / place))
        if card is not None:
            (model / "README.md").write_text(card, encoding="utf-8")
        convert(request_for(model, "rtn", tmp_path / "out", text_file))
        text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
        shutil.rmtree(tmp_path / "out")
        return text

    return make


def front(card: str) -> dict[str, object]:
    rule, head, _ = card.split("---\n", 2)
    assert rule == ""
    data = strict_yaml.load(head.encode(), "card").data
    assert isinstance(data, dict)
    return data


def test_of_a_parent_on_the_hub(made: Make):
    card = made(f"models--org--parent/snapshots/{COMMIT}", PARENTS)
    assert front(card) == {
        "license": "other",
        "license_name": "house-licence",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "base_model": "org/parent",
        "base_model_relation": "quantized",
        "tags": ["compressed-tensors", "pq"],
    }
    assert f"[{COMMIT}](https://huggingface.co/org/parent/tree/{COMMIT})" in card
    assert f"--parent org/parent@{COMMIT}" in card
    assert "4.125 bits per weight" in card
    assert "| scheme | 4-bit g128 pack-quantized with 16-bit activations |" in card
    assert "| calibrated on | nothing: the recipe reads no text |" in card
    assert re.search(r"^\| loads in \| transformers.*vLLM", card, re.MULTILINE)
    assert "```bash\nvllm serve DIR --max-model-len 256 --max-num-seqs 8\n```" in card
    assert "Not measured when it was made" in card
    assert card.endswith("## The parent's card\n\n# The Parent\n\nIt says --- much.\n")
    assert "99.9" not in card


@pytest.mark.parametrize(
    "parents", [None, "", "# No front\n", "---\nlicense: mit\nnever: closed\n"]
)
def test_of_a_local_parent(made: Make, parents: str | None):
    card = made("some-folder", parents)
    told = front(card)
    assert told.pop("license", "mit") == "mit"  # a rule that is never closed begins no front matter
    assert told == {
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["compressed-tensors", "pq"],
    }
    assert "some-folder" not in card
    assert ("The parent's card" in card) == bool(parents)
    assert made("another-folder", parents) == card


def test_pq_json_names_what_came_from_the_hub(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    """Everything but that name and the card is the same, byte for byte, from wherever it came."""
    records = []
    for i, place in enumerate((f"models--org--parent/snapshots/{COMMIT}", "local")):
        model = Path(shutil.copytree(tiny("llama"), tmp_path / place))
        convert(request_for(model, "gptq", tmp_path / f"out{i}", text_file))
        record = read_provenance(tmp_path / f"out{i}")
        assert record is not None
        records.append(record)
    assert [record.pop("origin") for record in records] == [
        {"id": "org/parent", "commit": COMMIT},
        None,
    ]
    hub, local = (record.pop("files") for record in records)
    assert {name for name in hub | local if hub[name] != local[name]} == {"README.md"}
    first, second = ({k: v for k, v in r.items() if k != "sha256"} for r in records)
    assert first == second


def test_of_a_calibrated_gguf_that_was_looked_at(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    request = request_for(tiny("llama"), "gguf-q4_0", tmp_path / "out", text_file)
    summary = convert(dataclasses.replace(request, check_windows=2))
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    record = read_provenance(tmp_path / "out")
    assert record is not None
    assert front(card)["library_name"] == "gguf"
    assert record["calibration"]["sha256"] in card
    assert "`text.txt`: 6 windows of 32 tokens" in card
    assert f"torch {record['versions']['torch']}" in card
    assert "llama-server -m DIR/model.gguf -c 2048 -np 8" in card
    assert summary.held_out is not None
    assert f"| {summary.held_out['kld_mean']:.3g} ± " in card
    assert summary.held_out["size"] in card
    assert "llama.cpp rounds inputs" in card
