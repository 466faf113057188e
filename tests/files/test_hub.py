"""Hub ids: which files are fetched, which commit they are of, and what is said where they cannot be had."""

from __future__ import annotations

import errno
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, point_to, serve_hub
from huggingface_hub import constants
from safetensors.torch import save_file

from quantize.cli.common import local_model
from quantize.errors import ModelError, OutputError, PqError, UsageError
from quantize.files import hub as hub_module
from quantize.files.hub_origin import HubOrigin, called, hub_origin

NAME = "org/some-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as server:
        point_to(server, tmp_path / "cache", monkeypatch)
        yield server


def write(folder: Path, *names: str, size: int = 10) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # all of them differ: the cache keeps equal files once
        text = json.dumps({"file": name}) if name.endswith(".json") else name.ljust(size)[:size]
        path.write_text(text)
    return folder


def sharded(folder: Path, *shards: str) -> Path:
    """A model folder whose index places a tensor in each shard."""
    write(folder, "config.json", "tokenizer.json")
    for i, shard in enumerate(shards):
        save_file({f"t{i}": torch.full((300,), float(i))}, folder / shard)
    where = {f"t{i}": shard for i, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "merges.txt",
    "tokenizer.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "README.md",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "preprocessor_config.json",
)
UNNEEDED = (
    "consolidated.safetensors",
    "consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "onnx/model.onnx",
    "onnx/config.json",
    "model.fp16.safetensors",
    "model-q4.gguf",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "flax_model.msgpack",
    "tf_model.h5",
    "modeling_own.py",
    "training_args.bin",
    "trainer_state.json",
    ".gitattributes",
    "picture.png",
)


def test_only_what_is_needed_is_fetched(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = write(tmp_path / "source", *NEEDED, *UNNEEDED)
    sharded(source, "model-00001-of-00002.safetensors", "odd-name.safetensors")
    shards = {"model-00001-of-00002.safetensors", "odd-name.safetensors"}
    commit = hub.put(NAME, source)
    folder = local_model(NAME)
    assert files_in(folder) == {*NEEDED, *shards, "model.safetensors.index.json"}
    assert sorted(hub.fetched()) == sorted(files_in(folder))  # each of them once
    said = capsys.readouterr().err
    assert said.startswith(f"pq: {NAME}@{commit[:7]}: fetches 15 files, ")
    assert f"; {len(UNNEEDED)} files, " in said
    assert said.count("\n") == 1
    before = len(hub.fetched())
    assert local_model(NAME) == folder
    assert (len(hub.fetched()), capsys.readouterr().err) == (before, "")


def test_a_single_file_comes_before_an_index_as_in_transformers(hub: Hub, tmp_path: Path):
    source = sharded(tmp_path / "source", "model-00001-of-00001.safetensors")
    hub.put(NAME, write(source, "model.safetensors"))
    assert files_in(local_model(NAME)) == {"config.json", "tokenizer.json", "model.safetensors"}


def test_sizes_are_those_of_the_files(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write(tmp_path / "source", "config.json")
    write(source, "model.safetensors", size=7_123_456)
    write(source, "pytorch_model.bin", size=2_000)
    hub.put(NAME, source)
    local_model(NAME)
    said = capsys.readouterr().err
    assert "fetches 2 files, 7.12 MB; 1 file, 2 kB of its repository are not needed" in said


@pytest.mark.parametrize("as_part", [True, False])
@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", "commit"])
def test_revisions(hub: Hub, tmp_path: Path, revision: str, as_part: bool):
    new = write(tmp_path / "new", "config.json", "model.safetensors")
    old = write(tmp_path / "old", "config.json", "model.safetensors", "vocab.txt")
    main, earlier = hub.put(NAME, new), hub.put(NAME, old, "refs/pr/3")
    hub.put(NAME, new, "v0")
    hub.repositories[NAME].names["v1.0"] = earlier
    wanted = earlier if revision == "commit" else revision
    found = local_model(f"{NAME}@{wanted}") if as_part else local_model(NAME, wanted)
    assert hub_origin(found) == HubOrigin(NAME, earlier)
    assert (found / "vocab.txt").exists()
    assert hub_origin(local_model(NAME)) == HubOrigin(NAME, main)


# ---- what cannot be had ----


def refused(
    kind: type[PqError], *words: str, model: str = NAME, revision: str | None = None
) -> str:
    with pytest.raises(kind) as caught:
        local_model(model, revision)
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said
    return said


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "source", "config.json", "model.safetensors")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: Hub, model: Path, status: int):
    hub.put(NAME, model, gated=status)
    refused(ModelError, f"{NAME}: is gated", f"{hub.address}/{NAME}", "HF_TOKEN")


def test_absent_and_private_ones(hub: Hub, model: Path):
    hub.put(NAME, model, private=True)
    for name in ("org/other", NAME, "oneword"):
        words = f"{name}: neither a local folder nor a model on {hub.address}", "HF_TOKEN"
        refused(ModelError, *words, model=name)


def test_a_private_one_with_a_token(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    hub.put(NAME, model, private=True)
    hub.token = "hf_good"
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    refused(ModelError, "does not accept the token", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert (local_model(NAME) / "model.safetensors").exists()


@pytest.mark.parametrize("wrong", ["v9", "0" * 40, "refs/pr/9"])
def test_no_such_revision(hub: Hub, model: Path, wrong: str):
    hub.put(NAME, model)
    local_model(NAME)  # what is in the cache is not what was asked for
    refused(ModelError, f"{NAME}@{wrong}: ", f"no revision '{wrong}'", "tag", revision=wrong)


@pytest.mark.parametrize(("status", "words"), [(403, "denies access"), (500, "error 500")])
def test_other_answers(hub: Hub, model: Path, status: int, words: str):
    hub.put(NAME, model)
    hub.status = status
    refused(ModelError, NAME, words)


def test_without_a_network(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    refused(ModelError, NAME, "cannot be read from here", "check the network")


def test_offline_by_the_variable(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    hub.put(NAME, model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(ModelError, NAME, "not whole in the Hub's cache", "HF_HUB_OFFLINE")
    assert hub.asked == []


def test_offline_from_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    commit = hub.put(NAME, sharded(tmp_path / "source", "a.safetensors", "b.safetensors"))
    folder = local_model(NAME)
    capsys.readouterr()
    # the Hub cannot be asked: the user is told
    hub.status = 503
    assert local_model(NAME) == folder
    said = capsys.readouterr().err
    assert "error 503" in said
    assert f"goes on with {commit[:7]} from " in said
    # the user has said so: nothing to tell
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    for name in (NAME, f"{NAME}@main", f"{NAME}@{commit}"):
        assert local_model(name) == folder
    assert (len(hub.asked), capsys.readouterr().err) == (asked, "")
    refused(ModelError, "HF_HUB_OFFLINE", revision="v1")
    # a cache with a hole is no model
    (folder / "b.safetensors").unlink()
    refused(ModelError, "not whole in the Hub's cache")


def test_a_connection_that_breaks_off_is_taken_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is lost of a stream
    source = write(tmp_path / "source", "config.json")
    save_file({"t": torch.arange(300_000, dtype=torch.float32)}, source / "model.safetensors")
    hub.put(NAME, source)
    hub.breaks["model.safetensors"] = 700_000
    folder = local_model(NAME)
    assert (folder / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    starts = [at for _, path, at in hub.asked if path.endswith("model.safetensors") and at]
    assert len(starts) == 1
    assert 0 < int(str(starts[0]).removeprefix("bytes=").split("-")[0]) <= 700_000


def just_before_the_download(patch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Do this when the listing is known and nothing is fetched, once."""

    def once(*told: object) -> None:
        patch.undo()
        change()

    patch.setattr(hub_module, "_require_room", once)


def test_files_that_are_whole_are_not_fetched_again(hub: Hub, tmp_path: Path):
    source = sharded(tmp_path / "source", "a.safetensors", "b.safetensors")
    hub.put(NAME, source)
    hub.gone = {"b.safetensors"}
    refused(ModelError, NAME, "error 404")
    hub.gone = set()
    before = len(hub.fetched())
    local_model(NAME)
    assert "b.safetensors" in hub.fetched()[before:]
    assert sorted(hub.fetched()) == sorted(files_in(source))


def test_a_branch_that_moves_on_meanwhile(hub: Hub, tmp_path: Path):
    commit = hub.put(NAME, write(tmp_path / "old", "config.json", "model.safetensors"))
    newer = write(tmp_path / "new", "config.json", "pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:
        just_before_the_download(patch, lambda: hub.put(NAME, newer))
        folder = local_model(NAME)
    assert folder.name == commit
    assert files_in(folder) == {"config.json", "model.safetensors"}


def test_a_shard_that_the_repository_lacks(hub: Hub, tmp_path: Path):
    source = sharded(tmp_path / "source", "a.safetensors", "b.safetensors")
    (source / "b.safetensors").unlink()
    hub.put(NAME, source)
    refused(ModelError, "names b.safetensors, which the repository lacks")


def test_weights_in_other_forms_are_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path):
    hub.put(NAME, write(tmp_path / "source", "config.json", "pytorch_model.bin"))
    refused(ModelError, "not in safetensors (pytorch_model.bin)")
    hub.put(NAME, write(tmp_path / "empty", "config.json"))
    refused(ModelError, "holds no weights")
    hub.put(NAME, write(tmp_path / "theirs", "params.json", "consolidated.safetensors"))
    refused(ModelError, "has consolidated.safetensors, but neither model.safetensors nor")
    hub.put(NAME, write(tmp_path / "bare", "model.safetensors", "README.md"))
    refused(ModelError, "no config.json")
    assert hub.fetched() == []


def test_an_adapter_is_left_to_what_reads_folders(hub: Hub, tmp_path: Path):
    hub.put(NAME, write(tmp_path / "source", "adapter_config.json", "adapter_model.safetensors"))
    assert files_in(local_model(NAME)) == {"adapter_config.json"}


def test_no_room(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    hub.put(NAME, model)
    monkeypatch.setattr(
        hub_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 95, 5)
    )
    refused(OutputError, "bytes and 5 bytes are free", "HF_HOME")
    assert hub.fetched() == []


def test_a_cache_that_cannot_be_written(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    hub.put(NAME, model)

    def full(*args: object, **more: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    refused(OutputError, "Read-only file system", "HF_HOME")


# ---- names ----


def test_a_folder_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "at@home").mkdir()
    assert local_model("org/name") == Path("org/name")
    assert local_model("at@home") == Path("at@home")
    refused(UsageError, "--revision v1", "local folder", model="org/name", revision="v1")
    refused(UsageError, "org/name@REVISION", model="a/b@v1", revision="v2")
    refused(UsageError, "org/name@REVISION", model="a/b@")
    refused(ModelError, "no such folder", model="./at@work")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (f"models--org--a.b-c/snapshots/{'0a' * 20}", "org/a.b-c@0a0a0a0"),
        (f"models--gpt2/snapshots/{'0b' * 20}", "gpt2@0b0b0b0"),
        (f"models--org--name/other/{'0a' * 20}", "0a" * 20),
        (f"datasets--org--name/snapshots/{'0a' * 20}", "0a" * 20),
        ("models--org--name/snapshots/main", "main"),
        (f"models--a--b--c/snapshots/{'0a' * 20}", "0a" * 20),
        ("plain", "plain"),
    ],
)
def test_what_a_model_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
):
    path = tmp_path / folder
    path.mkdir(parents=True)
    assert called(path) == name
    (tmp_path / "link").symlink_to(path)
    assert called(tmp_path / "link") == (name if "@" in name else "link")
    monkeypatch.chdir(path)
    assert called(Path(".")) == name
