"""A checkpoint read by the names of modules holds what stock transformers loads, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from quantize.errors import ModelError
from quantize.files.checkpoint import SINGLE_NAME, Checkpoint
from quantize.files.headers import tensor_headers
from quantize.formats.compressed_tensors import quantization_config
from quantize.formats.packed_int import SUFFIXES, IntScheme, PackedInt
from quantize.model.build import meta_model
from quantize.model.experts import kept_whole, split_experts
from quantize.model.lazy import lazy, where
from quantize.model.stored import StoredCheckpoint
from quantize.model.where import fetch

MLA: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPS: dict[str, Any] = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# Type → its words for the number of experts, and what else it needs to be small.
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("num_experts", {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("num_experts", {"head_dim": 8}),
    "mixtral": ("num_local_experts", {}),
    "phimoe": ("num_local_experts", {}),
    "olmoe": ("num_experts", {}),
    "gpt_oss": ("num_local_experts", {"head_dim": 8}),
    "llama4_text": ("num_local_experts", {"head_dim": 8, "intermediate_size_mlp": 16}),
    "deepseek_v3": ("n_routed_experts", MLA | GROUPS),
    "glm4_moe": ("n_routed_experts", {"head_dim": 8} | GROUPS),
    "granitemoe": ("num_local_experts", {}),
    "lfm2_moe": (
        "num_experts",
        {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "minimax_m2": ("num_local_experts", {"head_dim": 8}),
}


def build(kind: str, **fields: Any) -> Any:
    """A random model of a random small size."""
    experts, special = TYPES.get(kind, ("unused", {}))
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 64,
            "hidden_size": random.choice((32, 48)),
            "intermediate_size": random.choice((16, 40)),
            "moe_intermediate_size": random.choice((16, 24)),
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            # Ten and more: names of experts sort in another order than experts.
            experts: random.choice((3, 11)),
            **special,
            **fields,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def stored(folder: Path) -> StoredCheckpoint:
    return StoredCheckpoint(Checkpoint(folder), meta_model(folder, torch.bfloat16))


def loaded(folder: Path) -> dict[str, Tensor]:
    """What stock transformers loads, its experts split."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    split_experts(model)
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors


def require_same(found: StoredCheckpoint, wanted: dict[str, Tensor], tied: bool = False) -> None:
    absent = set(wanted) - set(found.names())
    assert absent <= ({"lm_head.weight"} if tied else set())
    assert set(found.names()) <= set(wanted)
    for name in found.names():
        tensor = found.tensor(name)
        assert torch.equal(tensor.to(wanted[name].dtype), wanted[name]), name
        assert found.shapes[name] == tuple(tensor.shape)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # holds no other expert
    assert found.missing == found.surplus == ()
    assert found.misfit() is None


@pytest.mark.parametrize("published", [True, False], ids=["published", "stacked"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_tensor_is_what_transformers_loads(
    kind: str, published: bool, tmp_path: Path
) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path, save_original_format=published)
    found = stored(tmp_path)
    require_same(found, loaded(tmp_path), model.config.tie_word_embeddings)
    name = next(n for n in found.names() if n.endswith("experts.2.down_proj.weight"))
    first, end = 1, found.shapes[name][0] - 1
    assert torch.equal(found.rows(name, first, end), found.tensor(name)[first:end])
    header = tensor_headers(found)[name]
    assert (header.dtype, header.shape) == (found.dtypes[name], found.shapes[name])
    assert header.bytes == found.tensor(name).nbytes


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_a_checkpoint_of_the_model_without_its_head_has_no_prefix(
    kind: str, tmp_path: Path
) -> None:
    model = build(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "base")
    source = Checkpoint(tmp_path / "base")
    assert "embed_tokens.weight" in source
    found = stored(tmp_path / "base")
    require_same(found, loaded(tmp_path / "base"), tied=True)
    assert {found.output.name(name) for name in found.names()} == set(source.names())


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_prefixes_of_a_text_decoder_in_a_larger_model(prefix: str, tmp_path: Path) -> None:
    """As Gemma 3 was published, and as transformers 5 saves it."""
    from transformers import Gemma3ForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28}
    vision |= {"num_attention_heads": 2, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=prefix == "language_model.")
    source = Checkpoint(tmp_path)
    assert any(name.startswith(prefix) for name in source.names())
    with torch.device("meta"):
        empty = Gemma3ForConditionalGeneration(config)
    found = StoredCheckpoint(source, empty)
    wanted = Gemma3ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    require_same(found, wanted.state_dict(), tied=True)
    assert {found.output.name(name) for name in found.names()} == set(source.names())


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The same checkpoint with other tensors."""
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    return folder


def call_packed(folder: Path) -> Path:
    """The same checkpoint, of which config.json says that it is packed."""
    config = json.loads((folder / "config.json").read_text())
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return folder


def test_a_missing_expert_is_named_as_it_is_stored(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    absent = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    changed(tmp_path, lambda tensors: tensors.__delitem__(absent))
    with pytest.raises(ModelError, match=absent.replace(".", r"\.")):
        stored(tmp_path)


def test_missing_and_surplus_tensors_are_named(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_norm.weight"]
        for name in [n for n in tensors if n.startswith("model.layers.0.mlp.experts.")]:
            del tensors[name]
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(2, 3)
        tensors["visual.patch.weight"] = torch.ones(4)
        tensors["visual.x"] = torch.ones(4)

    found = stored(changed(tmp_path, change))
    experts = [n for n in found.missing if n.startswith("model.layers.0.mlp.experts.")]
    count = json.loads((tmp_path / "config.json").read_text())["num_local_experts"]
    assert len(experts) == 3 * count
    assert set(found.missing) - set(experts) == {"model.layers.1.self_attn.q_norm.weight"}
    assert found.leftovers.carried == {
        "model.layers.2": ("model.layers.2.eh_proj.weight",),
        "visual": ("visual.patch.weight", "visual.x"),
    }
    assert not found.surplus
    told = found.misfit()
    assert told is not None
    assert f"and {len(found.missing) - 1} more" in told
    names = found.kept_names(())
    assert names == {name: name for name in found.leftovers.carried_names}
    for name in names:
        assert name not in found
        assert found.stored.tensor(name).eq(1).all()


def test_surplus_tensors_of_a_packed_model_are_seen_by_checks(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.k_scale"
    found = stored(call_packed(changed(tmp_path, lambda t: t.update({name: torch.ones(1)}))))
    assert found.surplus == (name,)
    assert not found.leftovers.ignored
    assert "has no place in the model for model.layers.0.self_attn.k_scale" in str(found.misfit())
    assert found.tensor(name).eq(1).all()


def test_two_tensors_of_one_name_are_an_error(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.norm\.weight and norm\.weight"):
        stored(changed(tmp_path, lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1})))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("published", [True, False])
def test_only_what_is_asked_for_is_read(
    kind: str, published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(kind).save_pretrained(tmp_path, save_original_format=published)
    source = Checkpoint(tmp_path)
    read: list[int] = []

    def counted(method: str) -> None:
        plain = getattr(Checkpoint, method)

        def call(self: Checkpoint, *args: Any) -> Tensor:
            tensor: Tensor = plain(self, *args)
            if self is source:
                read.append(tensor.nbytes)
            return tensor

        monkeypatch.setattr(Checkpoint, method, call)

    counted("rows")
    counted("tensor")
    found = StoredCheckpoint(source, meta_model(tmp_path, torch.bfloat16))
    assert not read
    names = [n for n in found.names() if ".experts.1." in n and n.endswith("proj.weight")]
    for name in names:
        read.clear()
        size = found.tensor(name).nbytes
        # Of a stack of gate and up projections, an expert's entry holds both.
        assert size <= sum(read) <= size * (1 if "down" in name else 2)


@pytest.mark.parametrize("published", [True, False], ids=["published", "stacked"])
@pytest.mark.parametrize("kind", TYPES)
def test_untouched_tensors_are_written_as_they_were_published(
    kind: str, published: bool, tmp_path: Path
) -> None:
    model = build(kind)
    for folder, form in ((tmp_path / "source", published), (tmp_path / "published", True)):
        model.save_pretrained(folder, save_original_format=form)
    found, wanted = stored(tmp_path / "source"), Checkpoint(tmp_path / "published")
    tensors = found.output.written({name: found.tensor(name) for name in found.names()})
    assert set(tensors) == set(wanted.names())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted.tensor(name)), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "phimoe", "lfm2_moe", "nemotron_h"])
def test_names_to_write_are_the_published_ones_whatever_the_source(
    kind: str, tmp_path: Path
) -> None:
    if kind == "nemotron_h":
        extra = {
            "n_routed_experts": 3,
            "hybrid_override_pattern": "*E",
            "head_dim": 8,
            "n_group": 1,
        }
        extra |= {"topk_group": 1, "moe_shared_expert_intermediate_size": 16}
        model = build(kind, **extra)
    else:
        model = build(kind)
    names: dict[bool, set[str]] = {}
    for published in (True, False):
        folder = tmp_path / str(published)
        model.save_pretrained(folder, save_original_format=published)
        found = stored(folder)
        names[published] = {found.output.name(name) for name in found.names()}
        packed = next(n for n in found.names() if n.endswith("experts.0.up_proj.weight"))
        assert found.output.name(f"{packed}_packed") == f"{found.output.name(packed)}_packed"
    assert names[True] == names[False] == set(Checkpoint(tmp_path / "True").names())


def test_experts_that_were_left_alone_among_packed_ones(tmp_path: Path) -> None:
    model = build("mixtral", num_local_experts=3)
    model.save_pretrained(tmp_path)
    wanted = loaded(tmp_path)
    plain = "model.layers.1.mlp.experts.1.up_proj.weight"

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n and ".experts.1.w3" not in n]:
            tensors[f"{name}_packed"] = tensors.pop(name)

    found = stored(call_packed(changed(tmp_path, pack)))
    assert torch.equal(found.tensor(plain), wanted[plain])
    assert plain not in found.missing
    assert f"{plain}_packed" not in found
    assert f"{plain.replace('up', 'gate')}_packed" in found
    assert not found.surplus
    assert found.output.name(plain).endswith("block_sparse_moe.experts.1.w3.weight")


def test_parts_of_packed_linears_are_found_under_their_published_names(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    expert, attention = "model.layers.0.block_sparse_moe.experts.2.w1", "model.layers.0.self_attn"
    codes = torch.randint(9, (4, 4), dtype=torch.int32)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]
            tensors[f"{name}_packed"] = codes.clone()
        tensors[f"{expert}.weight_packed"] += 1
        tensors[f"{attention}.kv.scale"] = torch.ones(2)

    found = stored(call_packed(changed(tmp_path, pack)))
    name = "model.layers.0.mlp.experts.2.gate_proj.weight_packed"
    assert torch.equal(found.tensor(name), codes + 1)
    assert found.output.name(name) == f"{expert}.weight_packed"
    assert found.tensor(f"{attention}.kv.scale").eq(1).all()
    assert found.output.name(f"{attention}.kv.scale") == f"{attention}.kv.scale"


def packed(found: StoredCheckpoint, linears: list[str]) -> dict[str, Tensor]:
    """What is written of a model with these linears rounded to 8 bits."""
    out: dict[str, Tensor] = {}
    for name in found.names():
        owner, _, part = name.rpartition(".")
        if owner not in linears or part != "weight":
            out[name] = found.tensor(name)
            continue
        weight = found.tensor(name).float()
        groups = weight.unflatten(1, (-1, 8))
        scale = (groups.abs().amax(-1) / 127).bfloat16()
        codes = (groups / scale.float()[..., None]).round().clamp(-128, 127).flatten(1)
        one = PackedInt(codes.to(torch.int8), scale, 8, 8)
        out |= {f"{owner}.{part}": tensor for part, tensor in one.tensors().items()}
    return found.output.written(out)


LOADED = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "llama4_text", "deepseek_v3", "lfm2_moe")
REFUSED = ("gpt_oss", "granitemoe")


@pytest.mark.parametrize("kind", [*LOADED, *REFUSED])
def test_stock_transformers_loads_packed_experts_but_where_it_is_said_that_it_does_not(
    kind: str, tmp_path: Path
) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    build(kind).save_pretrained(parent)
    found = stored(parent)
    skeleton = meta_model(parent, torch.bfloat16)
    homes = split_experts(skeleton)
    linears = [n for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)]
    experts = [n for n in linears if any(n.startswith(f"{home}.") for home in homes)]
    child.mkdir()
    scheme = IntScheme(8, 8, False)
    section = quantization_config(dict.fromkeys(experts, scheme), sorted({*linears} - {*experts}))
    config = json.loads((parent / "config.json").read_text()) | {"quantization_config": section}
    (child / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in packed(found, experts).items()}
    save_file(tensors, child / SINGLE_NAME, metadata={"format": "pt"})
    again = stored(child)  # which knows its own names
    parts = {f"{name}.{part}" for name in experts for part in SUFFIXES}
    assert parts <= set(again.names())
    assert not again.surplus

    model, info = AutoModelForCausalLM.from_pretrained(
        child, dtype=torch.float32, output_loading_info=True
    )
    clean = not info["missing_keys"] and not info["unexpected_keys"]
    assert clean == (not found.output.unloadable(experts)) == (kind in LOADED)
    if not clean:
        assert set(found.output.unloadable(experts)) == set(homes)
        return
    reference = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    split_experts(reference)
    for name in experts:
        parts_of_one = {part: again.tensor(f"{name}.{part}") for part in SUFFIXES}
        weight = PackedInt.from_tensors(parts_of_one, 8, 8).unpack()
        reference.get_submodule(name).weight.data = weight
    tokens = torch.arange(64).unsqueeze(1)
    with torch.no_grad():
        both = (
            torch.nn.Module.float(model),
            reference,
        )  # releases before 5.24 leave experts in bfloat16
        logits, wanted = (m(tokens, use_cache=False).logits[:, 0] for m in both)
    far = (logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # Stock transformers rounds experts to bfloat16, which may send a token to other ones.
    assert far.quantile(0.9) < 0.02


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_linear_is_called_in_config_json_as_each_reader_looks_for_it(
    kind: str, tmp_path: Path
) -> None:
    build(kind).save_pretrained(tmp_path)
    names = stored(tmp_path).output
    expert, query = "model.layers.1.mlp.experts.2.gate_proj", "model.layers.0.self_attn.q_proj"
    moe = "model.layers.1.block_sparse_moe.experts.2"
    aliases = (f"{moe}.w1", f"{moe}.gate_proj") if kind == "mixtral" else ()
    assert names.in_config(expert) == (expert, *aliases)
    assert names.in_config(query) == (query,)


def test_matrices_that_are_no_linear_are_refused_by_name_or_kept_with_a_reason() -> None:
    model = build("qwen3_moe")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        kept_whole(model)
    split_experts(model)
    assert kept_whole(model) == {}
    assert kept_whole(build("lfm2_moe").model.layers[0]) == {}  # a convolution
    model.model.layers[1].mlp.stack = torch.nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.stack"):
        kept_whole(model)
    recurrent = build("recurrent_gemma", lru_width=32, num_hidden_layers=3, head_dim=8)
    assert any(name.endswith("input_gate_weight") for name in kept_whole(recurrent))


OPERATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[2],
    lambda x: x[-1].chunk(2)[1],
    lambda x: x.transpose(1, 2)[2][:, ::2],
    lambda x: x[1][5:9].T,
    lambda x: x[0, 1::5],
    lambda x: x.reshape(3, 2, 6, 4)[1, 1],  # is computed
    lambda x: x.flip(0)[1],
    lambda x: torch.chunk(x, 3)[1].squeeze(0),
    lambda x: torch.chunk(x, 3)[1].squeeze(),
    lambda x: x[1:2, 3:4].squeeze((0, 1)),
    lambda x: torch.stack(list(x.unbind(0)), 1)[:, 2],
    lambda x: torch.split(x, [1, 2])[1][:, 4:8, 1],
]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_lazy_tensors(operation: Callable[[Tensor], Tensor]) -> None:
    real = {f"{kind}{e}": torch.randn(6, 4) for kind in "wv" for e in range(3)}

    def stack(tensors: dict[str, Tensor]) -> Tensor:
        halves = [torch.stack([tensors[f"{kind}{e}"] for e in range(3)]) for kind in "wv"]
        return torch.cat(halves, 1)

    def rows(name: str, first: int | None, end: int | None) -> Tensor:
        return real[name][first:end].clone()

    made = operation(stack({n: lazy(n, tuple(t.shape), t.dtype) for n, t in real.items()}))
    wanted = operation(stack(real))
    assert made.shape == wanted.shape
    assert torch.equal(fetch(where(made), rows), wanted)
