"""The parent's run that is kept: the same figures to the last bit, and nothing of another parent, text or setting."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of, random_weights, save_model, save_side_files
from safetensors.torch import load_file, save_file

from quantize.evaluation import Evaluation, evaluate
from quantize.evaluation.parents import HiddenStates, ParentCache
from quantize.evaluation.streamed import StreamedModel
from quantize.files import cache

Maker = Callable[..., Path]


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A parent that a test may change."""
    config = config_of("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    folder = save_model(tmp_path / "parent", config, random_weights(config))
    save_side_files(folder)
    return folder


@pytest.fixture
def model(parent: Path, tmp_path: Path) -> Path:
    """Its weights, a little off: what another tool may have made, without a pq.json."""
    folder = shutil.copytree(parent, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    noisy = {name: t + 0.02 * torch.randn_like(t) for name, t in tensors.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def measured(
    parent: Path, model: Path, text_file: Path, tmp_path: Path
) -> Callable[..., tuple[Evaluation, ParentCache]]:
    def run(**changes: Any) -> tuple[Evaluation, ParentCache]:
        kept = ParentCache(tmp_path / "kept")
        how = {"dataset": str(text_file), "seqlen": 24, "max_windows": 3} | changes
        return evaluate(model, parent, parents=kept, **how), kept

    return run


def test_a_kept_run_gives_the_same_figures_and_runs_no_block_of_the_parent(
    measured: Callable[..., tuple[Evaluation, ParentCache]],
    parent: Path,
    model: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    plain = evaluate(model, parent, dataset=str(text_file), seqlen=24, max_windows=3)
    first, made = measured()
    assert (made.used, made.made) == (0, 1)
    ran: list[Path] = []
    hidden = StreamedModel._hidden

    def counted(self: StreamedModel, *args: Any) -> Any:
        ran.append(self.source.folder)
        return hidden(self, *args)

    monkeypatch.setattr(StreamedModel, "_hidden", counted)
    second, found = measured()
    assert (found.used, found.made) == (1, 0)
    assert ran == [model]
    assert dataclasses.asdict(first) == dataclasses.asdict(second) == dataclasses.asdict(plain)
    assert (first.kld_mean or 0) > 0


def test_whatever_decides_on_the_run_is_in_its_key(
    measured: Callable[..., tuple[Evaluation, ParentCache]], parent: Path
):
    measured()
    for changes in (
        {"seqlen": 16},
        {"max_windows": 2},
        {"bos": "always"},
        {"dtype": torch.bfloat16},
        {"protocol": "rolling"},
        {"numerics": "stock"},
    ):
        assert measured(**changes)[1].made == 1, changes
    tensors = load_file(parent / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    assert measured()[1].made == 1
    config = json.loads((parent / "tokenizer_config.json").read_text()) | {"extra": 1}
    (parent / "tokenizer_config.json").write_text(json.dumps(config))
    assert measured()[1].made == 1
    assert measured()[1].used == 1


def test_a_damaged_run_is_made_anew_and_told_of(
    measured: Callable[..., tuple[Evaluation, ParentCache]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    first, _ = measured()
    (entry,) = (tmp_path / "kept").iterdir()
    raw = bytearray(entry.read_bytes())
    raw[-3] ^= 0x40  # within the hidden states
    entry.write_bytes(raw)
    second, again = measured()
    assert (again.used, again.made) == (0, 1)
    assert "damaged" in caplog.text
    assert first == second
    entry.write_bytes(b"no safetensors")
    assert measured()[1].made == 1


def test_a_cache_that_cannot_be_written_costs_no_figures(
    measured: Callable[..., tuple[Evaluation, ParentCache]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    (tmp_path / "kept").write_text("a file where the folder should be")
    found, kept = measured()
    assert found.kld_mean is not None
    assert kept.made == 1
    assert "not kept" in caplog.text


def test_visits_of_experts_are_kept(tmp_path: Path):
    kept = HiddenStates(ParentCache(tmp_path), {"a": 1}, torch.device("cpu"))
    inputs = torch.randint(9, (2, 5))
    batches = [torch.randn(1, 5, 4), torch.randn(1, 5, 4)]
    assert kept.recall(inputs) is None
    kept.keep(inputs, batches, {3: (7, 10)})
    found = kept.recall(inputs)
    assert found is not None
    assert found[1] == {3: (7, 10)}
    assert all(torch.equal(a, b) for a, b in zip(found[0], batches, strict=True))
    assert kept.recall(inputs + 1) is None


# The folder


def test_the_longest_unused_go_first(tmp_path: Path):
    kept = ParentCache(tmp_path / "kept", limit=3000)
    states = HiddenStates(kept, {}, torch.device("cpu"))
    inputs = [torch.full((1, 2), i) for i in range(4)]
    for i in range(2):
        states.keep(inputs[i], [torch.zeros(1, 2, 100)], {})
        for path in kept.folder.iterdir():
            cache.os.utime(path, (i, i)) if path.stat().st_mtime > 10 else None
    assert cache.size_of(kept.folder).entries == 2
    assert states.recall(inputs[0])  # which is a use of it
    states.keep(inputs[2], [torch.zeros(1, 2, 100)], {})
    states.keep(inputs[3], [torch.zeros(1, 2, 100)], {})
    assert cache.size_of(kept.folder).bytes <= 3000
    assert states.recall(inputs[1]) is None
    assert states.recall(inputs[3])
    states.keep(inputs[1], [torch.zeros(1, 2, 1000)], {})  # alone more than the limit
    assert states.recall(inputs[1]) is None


def test_the_folder_is_where_it_is_told_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PQ_CACHE", str(tmp_path / "a"))
    assert cache.cache_folder("parents") == tmp_path / "a" / "parents"
    monkeypatch.delenv("PQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.cache_folder("parents") == tmp_path / "b" / "pq" / "parents"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder("parents") == tmp_path / ".cache" / "pq" / "parents"
    assert cache.size_of(tmp_path / "none").entries == 0


def test_clearing_removes_what_is_pqs_alone(tmp_path: Path):
    for name in ("a.safetensors", "b.7.part", "README"):
        (tmp_path / name).write_text("12345")
    found = cache.clear(tmp_path)
    assert (found.entries, found.bytes) == (2, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["README"]
