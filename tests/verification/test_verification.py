"""`pq verify`: sound conversions pass, and a changed byte of any file is found and named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from damage import (
    WITH_PARENT,
    checks_of,
    failed,
    sign,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from quantize.cli.verify import verify as verify_command
from quantize.errors import VerifyError
from quantize.files.checkpoint import INDEX_NAME
from quantize.files.provenance import canonical_json, provenance_digest, read_provenance
from quantize.verification import verify

Maker = Callable[..., Path]


# Sound conversions


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen2_moe"])
@pytest.mark.parametrize("recipe", ["rtn", "gptq", "fireq", "fireq-paper-linear"])
def test_a_sound_conversion_passes(copied: Maker, tiny: Maker, recipe: str, model_type: str):
    result = verify(copied(recipe, model_type), tiny(model_type))
    checks = checks_of(result)
    assert list(checks) == WITH_PARENT
    assert result.ok, result.first_failure
    assert result.first_failure is None
    skipped = {name for name, check in checks.items() if check.ok is None}
    assert skipped == (set() if recipe in ("rtn", "fireq-paper-linear") else {"recomputed"})
    assert "equal bit for bit" in checks["recomputed"].detail or "calibration" in str(
        checks["recomputed"].skipped_reason
    )
    first = "o" if recipe == "fireq" else "q"  # its pre-RoPE scales change queries and keys
    assert f"block 1: {first} " in checks["outputs"].detail


def test_other_shapes_and_bits_pass_too(copied: Maker, tiny: Maker):
    folder = copied(
        "rtn", "qwen3", "bits=3", "group_size=16", intermediate_size=272, tie_word_embeddings=True
    )
    result = verify(folder, tiny("qwen3", intermediate_size=272, tie_word_embeddings=True))
    assert result.ok, result.first_failure


def test_linears_left_alone_pass_and_are_compared(copied: Maker, tiny: Maker):
    folder = copied("rtn", "llama", "ignore=model.layers.0.*")
    assert verify(folder, tiny("llama")).ok

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"][3] += 0.5

    tensors = (
        folder
        / json.loads((folder / INDEX_NAME).read_text())["weight_map"][
            "model.layers.1.input_layernorm.weight"
        ]
    )
    held = load_file(tensors)
    change(held)
    save_file(held, tensors, metadata={"format": "pt"})
    sign(folder)
    assert failed(verify(folder, tiny("llama"))) == ["untouched", "recomputed"]


def test_the_seed_chooses_the_blocks(copied: Maker, tiny: Maker):
    folder = copied("rtn", "llama")
    details = {
        verify(folder, tiny("llama"), blocks=1, seed=seed).checks[7].detail for seed in range(8)
    }
    assert {detail[:7] for detail in details} == {"block 0", "block 1"}


def test_without_a_tokenizer_random_tokens_are_used(copied: Maker, tiny: Maker, tmp_path: Path):
    parent = shutil.copytree(
        tiny("llama"), tmp_path / "parent", ignore=shutil.ignore_patterns("tokenizer*")
    )
    result = verify(copied("gptq"), parent)
    assert result.ok, result.first_failure
    assert "random tokens" in checks_of(result)["outputs"].detail


def test_hidden_files_of_download_tools_are_no_failure(copied: Maker):
    folder = copied()
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    assert verify(folder).ok


# Damage that hashes show


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_bit_of_pq_json_counts(converted: Maker, tmp_path: Path, data: st.DataObject):
    folder = tmp_path / "pq"
    if not folder.exists():
        shutil.copytree(converted("gptq", "llama"), folder)
        sign(folder)
    path = folder / "pq.json"
    sound = path.read_bytes()
    at, mask = data.draw(st.integers(0, len(sound) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(sound[:at] + bytes([sound[at] ^ mask]) + sound[at + 1 :])
    try:
        assert "provenance" in failed(verify(folder))
    finally:
        path.write_bytes(sound)


def test_missing_and_extra_files_are_named(copied: Maker):
    folder = copied()
    (folder / "LICENSE").unlink()
    (folder / "model-99999-of-00004.safetensors").write_text("")
    (folder / "backup").mkdir()
    detail = checks_of(verify(folder))["files"].detail
    assert "LICENSE is missing (and 2 more)" in detail
    (folder / "LICENSE").write_text("Do what you like.\r\n", newline="")
    assert checks_of(verify(folder))["files"].detail == "backup does not belong here (and 1 more)"


def test_file_names_that_leave_the_folder_are_not_followed(copied: Maker, tmp_path: Path):
    folder = copied()
    (tmp_path / "secret").write_text("x")
    data = json.loads((folder / "pq.json").read_text())
    data["files"]["../secret"] = hashlib.sha256(b"x").hexdigest()
    data["sha256"] = provenance_digest(data)
    (folder / "pq.json").write_text(canonical_json(data))
    result = verify(folder)
    assert failed(result) == ["files"]
    assert "no plain file name" in str(result.first_failure)


# The command and pq.json's digest


def pq_verify(*args: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verify_command)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_prints_a_line_per_check(copied: Maker, tiny: Maker):
    folder = copied("gptq")
    done = pq_verify(folder, "--parent", tiny("llama"))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == WITH_PARENT
    assert [line.split()[0] for line in lines] == ["ok"] * 7 + ["skipped", "ok"]


def test_the_command_ends_with_the_first_failure_and_its_remedy(copied: Maker):
    folder = copied("gptq")
    (folder / "LICENSE").write_text("mine")
    done = pq_verify(folder)
    assert isinstance(done.exception, VerifyError)  # `main` makes it one line and exit code 7
    assert done.exception.exit_code == 7
    assert str(done.exception) == (
        f"{folder}: files: LICENSE is not the file that was written; copy the folder again, or convert again"
    )
    assert "FAILED   files" in done.stdout


def test_json_is_the_function_s_result(copied: Maker):
    folder = copied("gptq")
    (folder / "LICENSE").write_text("mine\x1b")
    done = pq_verify(folder, "--json")
    assert json.loads(done.stdout) == dataclasses.asdict(verify(folder))
    assert isinstance(done.exception, VerifyError)


def test_the_digest_covers_every_other_key(copied: Maker):
    folder = copied("gptq")
    data = read_provenance(folder)
    assert data is not None
    assert provenance_digest(data) == data["sha256"]
    assert provenance_digest(data | {"sha256": "another"}) == data["sha256"]
    for key in set(data) - {"sha256"}:
        assert provenance_digest(data | {key: "another"}) != data["sha256"]
    assert provenance_digest(dict(reversed(data.items()))) != data["sha256"]


def test_an_unsigned_pq_json_is_not_accepted(copied: Maker):
    folder = copied("gptq")
    data = json.loads((folder / "pq.json").read_text())
    del data["sha256"]
    (folder / "pq.json").write_text(canonical_json(data))
    assert failed(verify(folder)) == ["provenance"]


def test_what_convert_wrote_passes_as_it_is(converted: Maker, tiny: Maker):
    result = verify(converted("gptq", "llama"), tiny("llama"))
    assert result.ok, result.first_failure
