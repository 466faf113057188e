from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from quantize.errors import ModelError
from quantize.files.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    read_json,
    require_finite_floats,
    sha256_file,
)

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CPU = torch.device("cpu")


@pytest.fixture
def sharded(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A writable copy of a model of two shards, in a folder of its own."""
    return Path(shutil.copytree(tiny("llama", shards=2), tmp_path / "root" / "model"))


@pytest.fixture
def single(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "root" / "model"))


def refused(folder: Path, *says: str) -> None:
    """Opening and reading everything gives one line that says what is wrong and names the file."""
    with pytest.raises(ModelError) as caught:
        Checkpoint(folder).tensors("")
    message = str(caught.value)
    assert "\n" not in message
    for words in says:
        assert words in message


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


# Reading what is sound


def test_single_and_sharded_files_read_alike(tiny: Callable[..., Path]):
    one, two = Checkpoint(tiny("llama")), Checkpoint(tiny("llama", shards=2))
    assert one.names() == two.names()
    assert len(one.shards) == 1
    assert two.shards == [FIRST, SECOND]
    for name, tensor in one.tensors("").items():
        assert torch.equal(two.tensor(name), tensor)
    assert "lm_head.weight" in one
    assert "lm_head.bias" not in one


def test_prefixes_are_cut_off(tiny: Callable[..., Path]):
    source = Checkpoint(tiny("qwen2", shards=2))
    block = source.tensors("model.layers.1.")
    assert "self_attn.q_proj.bias" in block
    assert len(block) == len(source.names("model.layers.1.")) == 12
    assert source.tensors("nothing.") == {}


def test_tensors_outlive_the_file(single: Path):
    tensors = Checkpoint(single).tensors("model.norm.")
    kept = tensors["weight"].clone()
    (single / SINGLE_NAME).write_bytes(b"\xff" * 100)
    assert torch.equal(tensors["weight"], kept)


def test_side_files_leave_weights_and_hidden_files_out(sharded: Path):
    for name in ("pytorch_model.bin", "extra.gguf", "old.safetensors", ".hidden", "pq.json"):
        (sharded / name).write_bytes(b"x")
    (sharded / "folder").mkdir()
    names = [path.name for path in Checkpoint(sharded).side_files()]
    assert names == [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_hashes_name_config_and_shards(sharded: Path):
    hashes = Checkpoint(sharded).hashes()
    assert set(hashes) == {"config.json", FIRST, SECOND}
    (sharded / "empty").write_bytes(b"")
    assert sha256_file(sharded / "empty").startswith("e3b0c44298fc1c14")


def test_hub_cache_links_are_followed(single: Path, tmp_path: Path):
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(single.iterdir()):
        shutil.copy(file, cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert Checkpoint(snapshot).names() == Checkpoint(single).names()
    assert [p.name for p in Checkpoint(snapshot).side_files()] == [
        p.name for p in Checkpoint(single).side_files()
    ]


# Hostile and broken folders


def test_no_folder_and_no_weights(tmp_path: Path, single: Path):
    refused(tmp_path / "nothing", "no such folder", "Hub id")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json: not found")
    (single / SINGLE_NAME).unlink()
    refused(single, f"holds neither {SINGLE_NAME} nor {INDEX_NAME}")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"]
)
def test_pickles_are_not_opened(single: Path, name: str):
    (single / SINGLE_NAME).unlink()
    (single / name).write_bytes(b"\x80\x04.")
    refused(single, name, "pickle weights can run code", "save_pretrained")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not a readable safetensors file"),
        (b"\x01\x02", "not a readable safetensors file"),
        (struct.pack("<Q", 1 << 62) + b"{}", "not a readable safetensors file"),
        (struct.pack("<Q", (1 << 63) - 1), "not a readable safetensors file"),
        (struct.pack("<Q", 90_000_000) + b"{}", "not a readable safetensors file"),
        (struct.pack("<Q", 8) + b"\xff\xfegarbag", "not a readable safetensors file"),
        (struct.pack("<Q", 4) + b"[[[[", "not a readable safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_broken_headers(single: Path, raw: bytes, says: str):
    (single / SINGLE_NAME).write_bytes(raw)
    refused(single, says)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("shard", [FIRST, SECOND])
def test_truncated_shards(sharded: Path, shard: str, keep: float):
    raw = (sharded / shard).read_bytes()
    (sharded / shard).write_bytes(raw[: int(len(raw) * keep)])
    refused(sharded, shard, "not a readable safetensors file", "download it again")


def test_a_file_that_shrinks_after_opening_is_refused(single: Path):
    source = Checkpoint(single)
    raw = (single / SINGLE_NAME).read_bytes()
    (single / SINGLE_NAME).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        source.tensor("model.norm.weight")


def test_missing_shard(sharded: Path):
    (sharded / SECOND).unlink()
    refused(sharded, SECOND, "shard is missing")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "sub/x.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "a\\b",
    ],
)
def test_shard_names_that_leave_the_folder(sharded: Path, name: str):
    shutil.copy(sharded / FIRST, sharded.parent / "x.safetensors")
    edit_index(sharded, lambda where: where.update({"model.norm.weight": name}))
    refused(sharded, INDEX_NAME, "not a plain file name")


def test_links_that_leave_the_folder(sharded: Path, tmp_path: Path):
    outside = tmp_path / "elsewhere" / FIRST
    outside.parent.mkdir()
    shutil.move(sharded / FIRST, outside)
    (sharded / FIRST).symlink_to(outside)
    refused(sharded, FIRST, "outside the model folder")
    (sharded / FIRST).unlink()
    (sharded / "inner").symlink_to(sharded / FIRST)
    (sharded / FIRST).symlink_to(sharded / "inner")  # a loop
    refused(sharded, FIRST, "missing")


def test_shards_go_before_an_index_that_disagrees(sharded: Path):
    tensors = Checkpoint(sharded).tensors("")
    edit_index(sharded, lambda where: where.update(phantom=FIRST))
    edit_index(sharded, lambda where: where.pop("model.norm.weight"))
    edit_index(sharded, lambda where: where.update({"lm_head.weight": SECOND}))
    source = Checkpoint(sharded)
    assert source.tensors("").keys() == tensors.keys()
    assert all(torch.equal(source.tensor(name), tensors[name]) for name in tensors)
    assert source.problems == (
        f"{FIRST}: tensor phantom is in the index but not in the shard",
        f"{FIRST}: tensor lm_head.weight is in the shard but the index places it in {SECOND}",
        f"{SECOND}: tensor model.norm.weight is in the shard but the index places it in no file",
    )


@pytest.mark.parametrize("other", [False, True])
def test_a_tensor_in_two_shards(sharded: Path, other: bool):
    both = Checkpoint(sharded).tensors("")
    where = json.loads((sharded / INDEX_NAME).read_text())["weight_map"]
    head = both["lm_head.weight"].clone()
    head[0, 0] += other
    part = {name: tensor for name, tensor in both.items() if where[name] == SECOND}
    assert where["lm_head.weight"] == FIRST
    save_file(part | {"lm_head.weight": head}, sharded / SECOND)
    if other:
        refused(sharded, f"tensor lm_head.weight is in {FIRST} and in {SECOND}, with other values")
    else:
        assert torch.equal(Checkpoint(sharded).tensor("lm_head.weight"), head)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read as JSON"), ("{", "cannot be read as JSON"), ("[]", "expected a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"), ("\udcff", "cannot be read as JSON"), ("null", "JSON object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_broken_json(sharded: Path, name: str, text: str, says: str):
    (sharded / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(sharded, name, says)


def test_json_of_absurd_size(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(ModelError, match="larger than 64 MiB"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}, "x"])
def test_broken_weight_map(sharded: Path, weight_map: object):
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refused(sharded, INDEX_NAME, "weight_map must map tensor names to shard files")
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {}}))
    refused(sharded, "holds no tensors")


def test_weights_that_cannot_be_quantized():
    require_finite_floats({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}, "")
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ModelError, match=r"model\.x: holds NaN or Inf"):
            require_finite_floats({"x": torch.tensor([1.0, bad])}, "model.")
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32):
        with pytest.raises(ModelError, match="quantized already"):
            require_finite_floats({"x": torch.zeros(2).to(dtype)}, "model.")


# Fuzzing

SMALL = save(
    {"a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)},
    {"format": "pt"},
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6
    ),
    st.integers(0, len(SMALL)) | st.just(len(SMALL)),
)
def test_random_bytes_give_tensors_or_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
):
    raw = bytearray(SMALL)
    for place, byte in changes:
        raw[place] = byte
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / SINGLE_NAME).write_bytes(raw[:length])
    began = time.process_time()
    with suppress(ModelError):
        require_finite_floats(Checkpoint(folder).tensors(""), "")
    assert time.process_time() - began < 5


def test_rotary_buffers_of_early_llama_checkpoints_are_passed_over(single: Path) -> None:
    folder = single
    tensors = load_file(folder / SINGLE_NAME)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / SINGLE_NAME)
    assert not [name for name in Checkpoint(folder).names() if "inv_freq" in name]
