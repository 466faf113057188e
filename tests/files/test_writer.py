from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from quantize.errors import OutputError, VerifyError
from quantize.files import shards as shards_module
from quantize.files import transaction as transaction_module
from quantize.files.checkpoint import INDEX_NAME, Checkpoint
from quantize.files.shards import Shards
from quantize.files.transaction import Transaction, require_free
from quantize.files.writer import CheckpointWriter

ONE = {"b": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "a": torch.ones(3, dtype=torch.int32)}
TWO = {"c": torch.tensor([1.0, float("nan")])}


def write(
    output: Path, before_commit: Callable[[CheckpointWriter], None] = lambda w: None
) -> CheckpointWriter:
    with CheckpointWriter(output, Shards(2)) as writer:
        writer.add(ONE)
        writer.add(TWO)
        config = {"model_type": "x", "é": 1}
        writer.finish(config, {})
        writer.write_json("config.json", config)
        before_commit(writer)
        writer.commit()
    return writer


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_reads_back(tmp_path: Path):
    side = tmp_path / "LICENSE"
    side.write_bytes(b"text\r\n\xff")
    out = tmp_path / "deep" / "er" / "out"
    writer = write(out, lambda w: w.copy(side))
    assert left_over(out.parent) == ["out"]
    back = Checkpoint(out)
    assert back.config == {"model_type": "x", "é": 1}
    assert back.names() == ["a", "b", "c"]
    for name, tensor in (ONE | TWO).items():
        assert back.tensor(name).dtype == tensor.dtype
        assert torch.equal(back.tensor(name).view(torch.uint8), tensor.view(torch.uint8))
    assert (out / "LICENSE").read_bytes() == side.read_bytes()
    index = json.loads((out / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == writer.total_size == 6 * 2 + 3 * 4 + 2 * 4
    assert set(writer.hashes) == set(left_over(out))


def test_equal_input_gives_equal_bytes(tmp_path: Path):
    write(tmp_path / "x")
    write(tmp_path / "y")
    for name in left_over(tmp_path / "x"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    write(tmp_path / "out")
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    wanted = {kind: stat.S_IMODE((tmp_path / kind).stat().st_mode) for kind in ("plain", "folder")}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == wanted["folder"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {
        wanted["plain"]
    }


@pytest.mark.parametrize("name", ["Größe 量子 🧮", "with space", "-dash", "a.b.c", "x" * 200])
def test_odd_output_names(tmp_path: Path, name: str):
    write(tmp_path / name)
    assert left_over(tmp_path) == [name]
    assert Checkpoint(tmp_path / name).names() == ["a", "b", "c"]


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert INDEX_NAME in left_over(tmp_path / "out")


def test_relative_outputs_stay_where_they_were_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    write(Path("out"), lambda w: os.chdir(tmp_path / "other"))
    assert left_over(tmp_path) == ["other", "out"]


# Refusals


@pytest.mark.parametrize("name", ["file", ".hidden"])
def test_a_folder_in_use_is_refused(tmp_path: Path, name: str):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(
        OutputError, match="exists and is not an empty folder; give another --output"
    ):
        write(out)
    assert (out / name).read_text() == "mine"
    assert left_over(tmp_path) == ["out"]


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        require_free(tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be written"):
        require_free(tmp_path / "out" / "below")


def test_a_folder_filled_meanwhile_is_not_overwritten(tmp_path: Path):
    out = tmp_path / "out"

    def intrude(_: CheckpointWriter) -> None:
        out.mkdir()
        (out / "theirs").write_text("x")

    with pytest.raises(OutputError, match="not an empty folder"):
        write(out, intrude)
    assert left_over(tmp_path) == ["out"]
    assert left_over(out) == ["theirs"]


def old_output(folder: Path) -> Path:
    folder.mkdir()
    (folder / "pq.json").write_text("{}")
    (folder / "old").write_text("x")
    return folder


def test_an_output_of_pqs_is_replaced_where_that_is_asked_for(tmp_path: Path):
    out = old_output(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite replaces what pq wrote"):
        require_free(out)
    with Transaction(out, overwrite=True) as files:
        files.write("new", lambda path: path.write_text("y"))
        assert left_over(out) == ["old", "pq.json"]  # until the other is whole
        files.commit()
    assert left_over(out) == ["new"]
    assert left_over(tmp_path) == ["out"]


@pytest.mark.parametrize("wrong", ["left", "rename"])
def test_an_output_stays_where_its_successor_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
):
    out = old_output(tmp_path / "out")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if "partial" in path.name:
            raise OSError(errno.EIO, "boom")
        return rename(path, target)

    def commit() -> None:
        with Transaction(out, overwrite=True) as files:
            files.write("new", lambda path: path.write_text("y"))
            if wrong == "left":
                raise BoomError
            files.commit()

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BoomError if wrong == "left" else OutputError):
        commit()
    assert left_over(out) == ["old", "pq.json"]
    assert left_over(tmp_path) == ["out"]


def test_what_pq_did_not_write_is_never_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match=r"has no pq.json, so that --overwrite leaves it alone"):
        Transaction(tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"--overwrite leaves it alone"):
        require_free(tmp_path / "file", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_refused(tmp_path: Path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot be written to"):
            require_free(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)


def test_a_parent_without_write_access_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputError, match="cannot be written to; give another --output"):
        require_free(tmp_path / "not" / "there" / "yet")


# Nothing is left behind


class BoomError(Exception):
    pass


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_remains_after_an_error(tmp_path: Path, error: type[BaseException]):
    def fail(_: CheckpointWriter) -> None:
        raise error

    with pytest.raises(error):
        write(tmp_path / "out", fail)
    assert left_over(tmp_path) == []


def test_leaving_without_commit_writes_nothing(tmp_path: Path):
    with CheckpointWriter(tmp_path / "out", Shards(1)) as writer:
        writer.add(ONE)
        assert len(left_over(tmp_path)) == 1
    assert left_over(tmp_path) == []


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DISK_FULL = SafetensorError(
    'Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'
)


@pytest.mark.parametrize(
    ("place", "name", "error", "says"),
    [
        (shards_module, "save_file", FULL, "no space left on the disk; free some"),
        (shards_module, "save_file", DISK_FULL, "no space left on the disk; free some"),
        (shards_module, "save_file", OSError(errno.EDQUOT, "quota"), "no space left"),
        (
            shards_module,
            "save_file",
            OSError(errno.EIO, "Input/output error"),
            "cannot be written (Input/output error)",
        ),
        (os, "fsync", FULL, "no space left"),
        (Path, "write_text", FULL, "no space left"),
        (
            Path,
            "rename",
            OSError(errno.EXDEV, "Invalid cross-device link"),
            "cannot be written (Invalid cross-device",
        ),
        (transaction_module.tempfile, "mkdtemp", FULL, "no space left"),
    ],
)
def test_a_disk_that_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    error: Exception,
    says: str,
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(place, name, refuse)
    with pytest.raises(OutputError) as caught:
        write(tmp_path / "out")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == []


def test_a_full_disk_while_copying_side_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "source"
    source.write_text("x")

    def refuse(*args: object, **kwargs: object) -> None:
        raise FULL

    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(OutputError, match="no space left"):
        write(tmp_path / "out", lambda w: w.copy(source))
    assert left_over(tmp_path) == ["source"]


# Verification


def flip(path: Path, place: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", INDEX_NAME])
def test_a_bit_that_flips_before_the_commit_is_found(tmp_path: Path, name: str):
    with pytest.raises(VerifyError, match="reads back differently"):
        write(tmp_path / "out", lambda w: flip(w.folder / name))
    assert left_over(tmp_path) == []


def test_a_bit_that_flips_while_writing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = shards_module.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        real(tensors, path, metadata=metadata)
        flip(path)

    monkeypatch.setattr(shards_module, "save_file", save)
    with pytest.raises(VerifyError, match=r"b reads back differently from what was written"):
        write(tmp_path / "out")
    assert left_over(tmp_path) == []


def test_shards_are_counted_and_names_unique(tmp_path: Path):
    with CheckpointWriter(tmp_path / "out", Shards(2)) as writer:
        writer.add(ONE)
        with pytest.raises(VerifyError, match="b would be written twice"):
            writer.add({"b": torch.ones(1)})
        with pytest.raises(VerifyError, match="1 of 2 shards"):
            writer.finish({}, {})


# Transactions without tensors


def test_any_file_may_be_written_and_is_checked(tmp_path: Path):
    with Transaction(tmp_path / "out") as files:
        files.write("a.bin", lambda path: path.write_bytes(b"one"))
        files.write("b.bin", lambda path: path.write_bytes(b"two"), lambda path: None)
        files.discard("a.bin")
        assert left_over(files.folder) == list(files.hashes) == ["b.bin"]
        files.commit()
    assert (tmp_path / "out" / "b.bin").read_bytes() == b"two"
    assert left_over(tmp_path) == ["out"]


def test_what_a_check_refuses_is_no_part_of_the_output(tmp_path: Path):
    def refuse(path: Path) -> None:
        raise VerifyError(f"{path.name} is not what was written")

    with Transaction(tmp_path / "out") as files:
        with pytest.raises(VerifyError, match=r"a\.bin is not what was written"):
            files.write("a.bin", lambda path: path.write_bytes(b"one"), refuse)
        assert not files.hashes


def test_another_one_goes_on_where_files_stayed(tmp_path: Path):
    kept = tmp_path / "kept"
    with Transaction(tmp_path / "out", kept) as files:
        files.write("a.bin", lambda path: path.write_bytes(b"one"))
        hashes = dict(files.hashes)
        (kept / "half").write_bytes(b"tw")
    with Transaction(tmp_path / "out", kept, hashes) as files:
        assert left_over(kept) == ["a.bin"]
        files.commit()
    assert left_over(tmp_path) == ["out"]
    assert left_over(tmp_path / "out") == ["a.bin"]


def test_shards_go_on_where_others_stopped(tmp_path: Path):
    first, kept = Shards(2), tmp_path / "kept"
    with CheckpointWriter(tmp_path / "out", first, kept) as writer:
        writer.add(ONE)
        written = json.loads(json.dumps(writer.progress))
    with CheckpointWriter(tmp_path / "out", Shards(2), kept, written) as writer:
        writer.add(TWO)
        writer.finish({}, {})
        writer.commit()
        assert writer.total_size == first.total_size + 2 * 4
    assert INDEX_NAME in left_over(tmp_path / "out")
    assert len(left_over(tmp_path / "out")) == 3


# Files in folders


@pytest.mark.parametrize("across", [False, True])
def test_files_in_folders_appear_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across: bool
):
    source, kept = tmp_path / "rag.jinja", tmp_path / "kept"
    source.write_text("{{ x }}")
    (kept / "templates").mkdir(parents=True)
    (kept / "templates" / "half").write_text("written by a run that was killed")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if across and self == kept:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with Transaction(tmp_path / "out", kept) as files:
        files.copy(source, "templates/rag.jinja")
        files.copy(source)
        files.commit()
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"rag.jinja", "out/rag.jinja", "out/templates/rag.jinja"}
    assert (tmp_path / "out" / "templates" / "rag.jinja").read_text() == "{{ x }}"
