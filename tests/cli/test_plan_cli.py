"""`pq plan` on one model, without a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ModelMaker

Call = Callable[..., tuple[int, str, str]]


def test_lengths_that_nobody_named_end_where_the_model_does(pq: Call, tiny: ModelMaker):
    arguments = ("plan", "--model", tiny("llama"), "--gpu", "l4")
    code, out, err = pq(*arguments)
    assert code == 0, err
    assert "short of" not in out
    assert pq(*arguments, "--json")[0] == 0
    assert json.loads(pq(*arguments, "--json")[1])


@pytest.mark.parametrize("asked", [("--input", "300"), ("--output", "300")])
def test_lengths_that_were_named_are_kept(pq: Call, tiny: ModelMaker, asked: tuple[str, str]):
    code, out, err = pq("plan", "--model", tiny("llama"), "--gpu", "l4", *asked)
    assert code == 10
    assert "the model ends at 256 tokens" in out + err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--rate", "3", "--tp", "2"), "--tp, --rate go with --model; write it into"),
        (("--gpus", "4"), "--gpus goes with --model"),
        (("--emit", "k8s"), "choose one of vllm, compose"),
        (("--emit", "vllm", "--json"), "leave --json out"),
        (("--html", "page.pdf"), "must end in .html"),
        (("--compare", "gptq", "--profile", "x.csv"), "leave one of them out"),
    ],
)
def test_nothing_is_left_unsaid_beside_a_file(
    pq: Call, tmp_path: Path, more: tuple[str, ...], words: str
):
    file = tmp_path / "fleet.yaml"
    file.write_text("models:\n  - {model: nowhere, rate: 1}\ncluster:\n  - {gpu: l4}\n")
    code, _, err = pq("plan", file, *more)
    assert code == 2
    assert words in err
