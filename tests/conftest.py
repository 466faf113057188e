"""Tiny offline models, one per architecture, and the fixtures that several test files share."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from rows import ARCHITECTURES, block_architecture
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from quantize.block.block import Block
from quantize.block.walk import Pass
from quantize.conversion.loop import Request, convert
from quantize.files.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from quantize.model.arch import CONTAINER, Architecture, Shape
from quantize.model.moe import place_experts
from quantize.model.prove import prove
from quantize.model.skeleton import Skeleton
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import load_recipe
from quantize.tested import SILENCE

# What commands print is compared whole, also with releases that were never tested.
os.environ.setdefault(SILENCE, "1")

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},  # shorter than every sequence in the tests
    "qwen2": {},
    "qwen3": {},
    "helium": {"num_attention_heads": 2},  # its o_proj is square
    # Its second block has a dense FFN.
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "mlp_only_layers": [1],
    },
    "ministral": {"sliding_window": 8},
    "ministral3": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},  # its second block does not rotate
    "ernie4_5": {},
}
COMMON = ("llama", "mistral", "qwen2", "qwen3", "helium", "qwen2_moe")
"""Types that differ in what pq does with them; the others go through
tests/model/test_decoders.py."""
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Numbers such as 3.14159, 2.71828 and 1.41421 have names; the others go without.",
    "A model that is quantized well says the same things as its parent, in fewer bits.",
    "Straße, naïve, 量子化: bytes that are not ASCII need their own tokens.",
]
CPU = torch.device("cpu")

# Threads that wait for each other cost far more than they bring on matrices this small, above all on a busy machine.
torch.set_num_threads(1)

# The machine may be busy: a slow example is no fault of the code.
hypothesis.settings.register_profile("pq", deadline=None)
hypothesis.settings.load_profile("pq")


def row_of(model_type: str, index: int = 0) -> Architecture:
    """Row of a block of a tiny model, its experts written out."""
    return block_architecture(ARCHITECTURES[model_type], config_of(model_type), index)


def common_folder(factory: pytest.TempPathFactory, *key: object) -> Path:
    """A folder that all worker processes of this run of the tests find under the same key."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in there
    folder = root / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other workers out, so that what all of them need is made once; whoever comes later finds it."""
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


ModelMaker = Callable[..., Path]
BlockMaker = Callable[..., Block]


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN (or an absurd integer), so that whatever reads it before writing it shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.is_meta or out.is_complex() or out.dtype == torch.bool:
                return out
            with torch.no_grad():
                value = float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max // 3
                return out.fill_(value)

        return made

    with torch.device("meta"):
        torch.empty(
            0
        )  # lets torch note what makes tensors, or it would not know the patched from then on
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poison(getattr(torch, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What pq keeps between commands goes into a folder of this run's."""
    os.environ["PQ_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the models and texts that lie beside the checkout and are no part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"{folder} is absent; it holds models and texts that are not part of the project"
        )
    return folder


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """Parsed config.json of a tiny model, as transformers writes it."""
    config = AutoConfig.for_model(
        model_type, **(SIZES | TINY.get(model_type, {}) | changes)
    ).to_dict()
    cls = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(model_type))]
    return config | {"architectures": [cls.__name__], "dtype": "bfloat16"}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Seeded bfloat16 weights; norms and biases are far from one and zero, and channels differ in size."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    place_experts(model, "model.layers", config)  # checkpoints hold every expert's tensors apart
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.4 * noise.tanh()
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed" in name:
            value = noise
        else:
            columns = torch.rand(parameter.shape[1], generator=generator) + 0.5
            value = noise * columns * parameter.shape[1] ** -0.5
        out[name] = value.to(torch.bfloat16)
    if config["tie_word_embeddings"]:
        out.pop("lm_head.weight", None)
    return out


def save_model(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 1
) -> Path:
    """Write config.json and weights, in one file or in `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / SINGLE_NAME, metadata={"format": "pt"})
        return folder
    where = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(weights)
    }
    for shard in set(where.values()):
        part = {name: tensor for name, tensor in weights.items() if where[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
        "weight_map": where,
    }
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def save_side_files(folder: Path) -> None:
    """Write a byte-level BPE tokenizer and the files that stand beside the weights of a real model."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": 1,\n"odd": "spacing"}'
    )
    (folder / "LICENSE").write_text("Do what you like.\r\n")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    )


def with_added_bos(folder: Path, copy: Path) -> Path:
    """The same model with a tokenizer that writes BOS in front of a text itself, as Llama's do."""
    shutil.copytree(folder, copy)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(copy)
    return copy


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """Make (once) a model folder: tiny("llama"), tiny("llama", shards=2), tiny("qwen3", tie_word_embeddings=True).

    Folders are shared by all tests: read them, never write into them.
    """

    @functools.cache
    def make(model_type: str, shards: int = 1, **changes: Any) -> Path:
        config = config_of(model_type, **changes)
        folder = save_model(
            tmp_path_factory.mktemp(model_type), config, random_weights(config), shards
        )
        save_side_files(folder)
        return folder

    return make


@pytest.fixture(params=COMMON)
def model_type(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn that is not just another one's under a name of its own."""
    return str(request.param)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"{SENTENCES[i * 7 % 4]} Line {i * i % 97} of many." for i in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def request_for(model: Path, recipe: str, output: Path, text: Path, *changes: str) -> Request:
    """A conversion in float32 on the CPU; changes are those of `--set`.

    Calibrated on 6 windows of 32 tokens, of which an expert would see too few.
    """
    nsamples = 48 if Checkpoint(model).config.get("model_type") == CONTAINER else 6
    chosen = with_stage_fields(
        load_recipe(recipe).with_overrides(str(text), nsamples=nsamples, seqlen=32), changes
    )
    return Request(model, chosen, output, CPU, torch.float32, batch_tokens=96)


@pytest.fixture(scope="session")
def converted(
    tiny: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> ModelMaker:
    """Convert (once) a tiny model: converted("gptq", "llama", "bits=3"). Read the folder, never write into it."""

    @functools.cache
    def run(recipe: str, model_type: str, *changes: str, **model: Any) -> Path:
        folder = common_folder(
            tmp_path_factory, "converted", recipe, model_type, changes, sorted(model.items())
        )
        output = folder / "out"
        with locked(folder):
            if not output.exists():
                convert(request_for(tiny(model_type, **model), recipe, output, text_file, *changes))
        return output

    return run


@pytest.fixture
def copied(converted: ModelMaker, tmp_path: Path) -> ModelMaker:
    """A copy of a tiny conversion that a test may damage."""

    def make(recipe: str = "gptq", model_type: str = "llama", *changes: str, **model: Any) -> Path:
        return shutil.copytree(converted(recipe, model_type, *changes, **model), tmp_path / "copy")

    return make


@pytest.fixture(scope="session")
def make_block(tiny: ModelMaker) -> BlockMaker:
    """Make a fresh float32 block with batches of random hidden states, two sequences of 24 tokens each.

    Three batches, or enough of them for every expert to see more tokens than its linears have inputs.
    """

    def make(
        model_type: str,
        index: int = 0,
        with_parent: bool = False,
        seed: int = 0,
        batches: int | None = None,
    ) -> Block:
        folder = tiny(model_type)
        source = Checkpoint(folder)
        shape = Shape.of(source.config)
        skeleton = Skeleton(folder, CPU, torch.float32)
        weights = source.tensors(f"{skeleton.outer.blocks}.{index}.")
        module = skeleton.layer(index, weights)
        generator = torch.Generator().manual_seed(seed)
        block_arch = skeleton.block_arch(index)
        batches = batches or (14 if block_arch.experts else 3)
        inputs = [torch.randn(2, 24, shape.hidden, generator=generator) for _ in range(batches)]
        return Block(
            index=index,
            arch=prove(block_arch, module, Pass(skeleton, index), skeleton.stream).arch,
            shape=shape,
            module=module,
            storage={name: tensor.dtype for name, tensor in weights.items()},
            forward=Pass(skeleton, index),
            inputs=inputs,
            parent_inputs=[x.clone() for x in inputs] if with_parent else None,
            device=CPU,
            keeps_post_scales=True,
        )

    return make


@pytest.fixture
def pq(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the console entry point in this process → (exit code, stdout, stderr)."""

    from quantize.cli import main

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pq", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return (0 if left.value.code is None else int(str(left.value.code))), out, err

    return run
