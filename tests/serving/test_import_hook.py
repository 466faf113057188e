"""`import quantize` registers pq's own format with transformers, in any order of imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from natives import Maker, native

from quantize.import_hook import after_import
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
