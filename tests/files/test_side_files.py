"""What goes with a model from its folder, and what stays behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quantize.errors import ModelError
from quantize.files.side_files import (
    is_recorded_name,
    names_in,
    side_files,
    without_model_code,
)

KEPT = (
    *("LICENSE", "LICENSE.txt", "LICENSE-Llama", "NOTICE", "USE_POLICY.md", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "tekken.json", "qwen.tiktoken", "vocab.json", "merges.txt"),
    *("vocab.txt", "bpe.codes", "tiktoken.model", "o200k_base.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "image_processor_config.json"),
)
LEFT = (
    *("config.json", "pq.json", "pq-statistics.json", ".gitattributes", "params.json"),
    *("model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"),
    *("model.safetensors.index.json", "model.safetensors.index.fp16.json"),
    *("consolidated.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model-Q4_K_M.gguf", "model.onnx", "model.onnx_data", "tf_model.h5", "flax_model.msgpack"),
    *("rust_model.ot", "consolidated.00.pth", "optimizer.pt", "training_args.bin"),
    *("model.sig", "SHA256SUMS", "checklist.chk", "openvino_model.xml", "latest"),
    *("trainer_state.json", "adapter_config.json", "adapter_model.safetensors"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml"),
    *("modeling_x.py", "configuration_x.py", "tokenization_x.py"),
)


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in side_files(folder)]


def test_what_goes_with_a_model_and_what_stays(tmp_path: Path):
    for name in (*KEPT, *LEFT):
        (tmp_path / name).write_text("{}")
    for folder in ("original", "onnx", "1_Pooling", "checkpoint-500", "additional_chat_templates"):
        (tmp_path / folder).mkdir()
        for name in ("config.json", "tool_use.jinja", "model.safetensors"):
            (tmp_path / folder / name).write_text("{}")
    templates = ["additional_chat_templates/tool_use.jinja"]
    assert names(tmp_path) == [*sorted(KEPT), *templates]


def test_code_of_tokenizers_and_processors_goes_along_with_its_imports(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}})
    )
    table = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoImageProcessor": "image_x.XImages",
        "AutoProcessor": "org/other--processing_x.X",
        "AutoFeatureExtractor": "../evil.X",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": table}))
    (tmp_path / "tokenization_x.py").write_text("import os\nfrom .words_x import A\n")
    (tmp_path / "words_x.py").write_text("from . import loop\nfrom .tokenization_x import B\n")
    for name in ("image_x", "configuration_x", "modeling_x", "processing_x", "loop"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path.parent / "evil.py").write_text("")
    assert names(tmp_path) == [
        "image_x.py",
        "tokenization_x.py",
        "tokenizer_config.json",
        "words_x.py",
    ]


def test_config_names_no_code_of_the_model():
    table = {"AutoConfig": "a.A", "AutoModel": "b.B", "AutoModelForCausalLM": "b.C"}
    assert without_model_code({"x": 1, "auto_map": table}) == {"x": 1}
    kept = {"AutoTokenizer": ["t.T", None]}
    assert without_model_code({"auto_map": table | kept}) == {"auto_map": kept}


def test_links_and_closed_files_are_refused(tmp_path: Path):
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside the model folder"):
        side_files(folder)


def test_recorded_names_and_those_that_are_there(tmp_path: Path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("LICENSE", ".hidden", "additional_chat_templates/rag.jinja"):
        (tmp_path / name).write_text("x")
    os.mkdir(tmp_path / "stray")
    assert names_in(tmp_path) == {"LICENSE", "additional_chat_templates/rag.jinja", "stray"}
    good = ("LICENSE", "additional_chat_templates/rag.jinja")
    assert all(map(is_recorded_name, good))
    bad = (
        "../x",
        "additional_chat_templates/../x",
        "stray/x",
        "a\\b",
        "additional_chat_templates/",
    )
    assert not any(map(is_recorded_name, bad))
