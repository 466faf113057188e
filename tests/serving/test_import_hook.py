"""`import quantize` registers pq's own format with transformers, in any order of imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from natives import Maker, native
from transformers import AutoConfig, AutoModelForCausalLM

from quantize.conversion.loop import Request, convert
from quantize.files.checkpoint import Checkpoint
from quantize.files.weight_files import NAMED, NO_FILE, weight_files
from quantize.formats.native import WEIGHTS_FIELD
from quantize.import_hook import after_import
from quantize.recipe.recipe import parse_recipe
from quantize.serving.int_linear import IntLinear
from quantize.serving.register import register

ORDERS = {
    "quantize first": "import quantize; print([m for m in HEAVY if m in sys.modules]); import transformers",
    "transformers first": "from transformers import AutoModelForCausalLM; import quantize",
}
LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(converted: Maker, tmp_path: Path, order: str):
    folder = native(tmp_path / "native", converted("rtn", "llama"))
    start = f"import sys; HEAVY = ('torch', 'transformers', 'safetensors'); {ORDERS[order]}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", start + LOAD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    heavy = ["[]"] if order == "quantize first" else []
    assert done.stdout.split() == [*heavy, "IntLinear"], done.stderr


def test_registering_again_does_nothing():
    register()
    register()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported."""
    (tmp_path / "probe_module.py").write_text("DONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "probe_module", raising=False)
    return "probe_module"


def test_an_action_follows_the_import_once(module: str):
    seen: list[bool] = []

    def act() -> None:
        seen.append(hasattr(sys.modules[module], "DONE"))

    finders = len(sys.meta_path)
    after_import(module, act)
    assert seen == []
    __import__(module)
    __import__(module)
    assert seen == [True]
    assert len(sys.meta_path) == finders
    after_import(module, act)  # has been imported: at once
    assert seen == [True, True]
    assert isinstance(sys.modules.pop(module), ModuleType)


def test_an_import_that_fails_may_be_tried_again(module: str, tmp_path: Path):
    path = tmp_path / f"{module}.py"
    good = path.read_text()
    path.write_text("raise ValueError")
    seen: list[int] = []
    after_import(module, lambda: seen.append(1))
    with pytest.raises(ValueError, match=r"^$"):
        __import__(module)
    assert seen == []
    path.write_text(good)
    __import__(module)
    assert seen == [1]
    sys.modules.pop(module)


STOCK = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, pipeline
for load in (AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained, lambda f: pipeline("text-generation", f)):
    try:
        load(sys.argv[1])
    except Exception as err:
        print(type(err).__name__, "import quantize" in str(err), "pq-quantize" in str(err))
    else:
        print("loaded")
"""


@pytest.fixture(scope="module")
def ours(tiny: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a conversion to pq's own format wrote, not put together by hand."""
    folder = tmp_path_factory.mktemp("ours") / "out"
    recipe = parse_recipe(
        "description: d\nformat: pq\nstages: [{method: rtn, group_size: 64}]", "r.yaml"
    )
    convert(Request(tiny("llama"), recipe, folder, torch.device("cpu"), torch.float32))
    return folder


def test_stock_transformers_refuses_what_it_cannot_read_and_says_what_to_do(ours: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STOCK, str(ours)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "loaded" not in done.stdout, done.stdout
    assert done.stdout.splitlines() == ["ValueError True True"] * 3, done.stdout + done.stderr


def test_pq_itself_passes_over_it(ours: Path):
    assert WEIGHTS_FIELD == NAMED
    config = json.loads((ours / "config.json").read_text())
    assert config[WEIGHTS_FIELD].startswith(NO_FILE)
    assert weight_files(ours, config) == weight_files(ours, {})
    assert WEIGHTS_FIELD not in Checkpoint(ours).config


def test_with_pq_the_refusal_is_taken_away(ours: Path):
    config = AutoConfig.from_pretrained(ours)
    assert hasattr(config, WEIGHTS_FIELD)
    for given in ({}, {"config": config}):
        model = AutoModelForCausalLM.from_pretrained(ours, **given)
        assert isinstance(model.model.layers[0].mlp.up_proj, IntLinear)
        assert not hasattr(model.config, WEIGHTS_FIELD)
    assert hasattr(config, WEIGHTS_FIELD)  # which is the caller's
