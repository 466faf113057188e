"""Folders with an adapter, which makes another model of a folder's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}


def put_adapter(folder: Path, **changes: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    save_file(
        {"base_model.q.lora_A.weight": torch.ones(8, 4)}, folder / "adapter_model.safetensors"
    )


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_alone_names_its_base_and_how_to_merge(
    tmp_path: Path, tiny: Callable[..., Path], config: bool
):
    put_adapter(tmp_path)
    if config:  # as some trainers leave it beside the adapter
        shutil.copy(tiny("llama") / "config.json", tmp_path)
    said = refusal(tmp_path)
    assert f"{tmp_path}: is an adapter (LORA) of org/base and no model" in said
    assert f"from_pretrained('org/base'), '{tmp_path}').merge_and_unload()" in said
    code = said[said.index('"') + 1 : said.rindex('"')]
    compile(code, "command", "exec")


def test_an_adapter_in_a_models_folder_is_refused(tmp_path: Path, tiny: Callable[..., Path]):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    put_adapter(folder)
    said = refusal(folder)
    assert f"{folder}/adapter_config.json: is an adapter (LORA) beside a whole model" in said
    assert f"from_pretrained('{folder}'), 'ADAPTER')" in said


def test_prompts_cannot_be_merged(tmp_path: Path):
    put_adapter(tmp_path, peft_type="PREFIX_TUNING", base_model_name_or_path=None)
    said = refusal(tmp_path)
    assert "of a model that it does not name and no model; it puts tokens before" in said
    assert "merge_and_unload" not in said


def test_adapter_weights_that_nothing_reads_stay_behind(tmp_path: Path, tiny: Callable[..., Path]):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    put_adapter(folder)
    (folder / "adapter_config.json").unlink()  # transformers looks for this one alone
    assert not [path for path in Checkpoint(folder).side_files() if "adapter" in path.name]
