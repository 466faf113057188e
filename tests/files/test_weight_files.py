"""Which files of a folder are read: those that transformers loads, whatever else lies there."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, modeling_utils

from quantize.errors import ModelError
from quantize.files.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model without its weights."""
    made = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (made / SINGLE_NAME).unlink()
    return made


@pytest.fixture
def tensors(tiny: Callable[..., Path]) -> dict[str, torch.Tensor]:
    return load_file(tiny("llama") / SINGLE_NAME)


class Put:
    """Puts the same tensors under many names, the final norm of each filled with another number."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.folder, self.tensors, self.number = folder, tensors, 0

    def single(self, name: str) -> float:
        self.number += 1
        marked = self.tensors | {NORM: torch.full_like(self.tensors[NORM], self.number)}
        save_file(marked, self.folder / name, metadata={"format": "pt"})
        return float(self.number)

    def shards(self, *names: str, index: str = INDEX_NAME) -> float:
        self.number += 1
        marked = self.tensors | {NORM: torch.full_like(self.tensors[NORM], self.number)}
        where = {key: names[i % len(names)] for i, key in enumerate(sorted(marked))}
        for name in names:
            part = {key: marked[key] for key in marked if where[key] == name}
            save_file(part, self.folder / name, metadata={"format": "pt"})
        (self.folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return float(self.number)

    def config(self, **fields: object) -> None:
        facts = json.loads((self.folder / "config.json").read_text())
        (self.folder / "config.json").write_text(json.dumps(facts | fields))


def beside_stale_index(put: Put) -> float:
    put.shards(FIRST, SECOND)
    return put.single(SINGLE_NAME)


def beside_lost_shards(put: Put) -> float:
    put.shards(FIRST, SECOND)
    (put.folder / SECOND).unlink()
    return put.single(SINGLE_NAME)


def beside_broken_index(put: Put) -> float:
    (put.folder / INDEX_NAME).write_text("{")
    return put.single(SINGLE_NAME)


def index_of_the_single_file(put: Put) -> float:
    return put.shards(SINGLE_NAME)


def beside_consolidated(put: Put) -> float:
    put.single("consolidated.safetensors")
    return put.shards(FIRST, SECOND)


def beside_variants(put: Put) -> float:
    put.single("model.fp16.safetensors")
    put.shards("model.fp16-00001-of-00001.safetensors", index="model.safetensors.index.fp16.json")
    wanted = put.shards(FIRST, SECOND)
    (put.folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return wanted


def leftovers_of_another_sharding(put: Put) -> float:
    put.shards("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    return put.shards(FIRST, SECOND)


def named_in_config(put: Put) -> float:
    put.single(SINGLE_NAME)
    put.config(transformers_weights="best.safetensors")
    return put.single("best.safetensors")


def index_named_in_config(put: Put) -> float:
    put.single(SINGLE_NAME)
    put.config(transformers_weights="other.safetensors.index.json")
    return put.shards(FIRST, SECOND, index="other.safetensors.index.json")


def one_is_a_folder(put: Put) -> float:
    (put.folder / SINGLE_NAME).mkdir()
    return put.shards(FIRST, SECOND)


FOLDERS = [
    beside_stale_index,
    beside_lost_shards,
    beside_broken_index,
    index_of_the_single_file,
    beside_consolidated,
    beside_variants,
    leftovers_of_another_sharding,
    named_in_config,
    index_named_in_config,
    one_is_a_folder,
]
TOLD = {
    beside_stale_index: ("model.safetensors", INDEX_NAME, "2 more"),
    beside_lost_shards: ("model.safetensors", INDEX_NAME, "1 more"),
    beside_broken_index: ("model.safetensors", INDEX_NAME),
    leftovers_of_another_sharding: (INDEX_NAME, "model-00001-of-00003.safetensors", "1 more"),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_the_weights_read_are_those_that_transformers_loads(
    folder: Path, tensors: dict[str, torch.Tensor], layout: Callable[[Put], float]
):
    wanted = layout(Put(folder, tensors))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stock = model.get_parameter(NORM)
    assert stock.unique().tolist() == [wanted]
    source = Checkpoint(folder)
    assert source.tensor(NORM).unique().tolist() == [wanted]
    assert source.names() == sorted(tensors)
    assert not [name for name in map(str, source.side_files()) if "safetensors" in name]
    assert len(source.notes) == (layout in TOLD)
    for words in TOLD.get(layout, ()):
        assert words in source.notes[0]


def only_a_variant(put: Put) -> str:
    put.single("model.fp16.safetensors")
    return "model.fp16.safetensors: is the variant 'fp16'"


def only_shards_of_a_variant(put: Put) -> str:
    put.shards("model.fp16-00001-of-00001.safetensors", index="model.safetensors.index.fp16.json")
    return "is the variant 'fp16'"


def only_consolidated(put: Put) -> str:
    put.single("consolidated.safetensors")
    return "consolidated.safetensors: holds weights in their authors' own names"


def shards_without_index(put: Put) -> str:
    put.shards(FIRST, SECOND)
    (put.folder / INDEX_NAME).unlink()
    return f"{FIRST}: is a shard without {INDEX_NAME}"


def a_shard_is_missing(put: Put) -> str:
    put.single("consolidated.safetensors")
    put.shards(FIRST, SECOND)
    (put.folder / SECOND).unlink()
    return f"{SECOND}: shard is missing"


def named_pickle(put: Put) -> str:
    put.single(SINGLE_NAME)
    put.config(transformers_weights="adapter_model.bin")
    return "transformers_weights 'adapter_model.bin' is no safetensors file"


def named_outside(put: Put) -> str:
    put.single(SINGLE_NAME)
    put.config(transformers_weights="../model.safetensors")
    return "is not a plain file name"


def named_and_missing(put: Put) -> str:
    put.single(SINGLE_NAME)
    put.config(transformers_weights="best.safetensors")
    return "transformers_weights 'best.safetensors' is missing"


@pytest.mark.parametrize(
    "layout",
    [
        only_a_variant,
        only_shards_of_a_variant,
        only_consolidated,
        shards_without_index,
        a_shard_is_missing,
        named_pickle,
        named_outside,
        named_and_missing,
    ],
)
def test_what_transformers_does_not_load_is_refused_by_name(
    folder: Path, tensors: dict[str, torch.Tensor], layout: Callable[[Put], str]
):
    says = layout(Put(folder, tensors))
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        Checkpoint(folder)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_order_is_still_that_of_transformers():
    """What is tried, in order; a release that tries more needs a look here."""
    text = inspect.getsource(modeling_utils._get_resolved_checkpoint_files)
    local = text[
        text.index("if is_local:") : text.index("elif os.path.isfile(os.path.join(subfolder")
    ]
    names = (
        "transformers_explicit_filename is not None",
        "(SAFE_WEIGHTS_NAME",
        "(SAFE_WEIGHTS_INDEX_NAME",
    )
    places = [local.index(name) for name in (*names, "(WEIGHTS_NAME", "(WEIGHTS_INDEX_NAME")]
    assert places == sorted(places)
