"""Every operator is a folder of four modules of the same names, and every kernel has a twin in plain torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import quantize.kernels

FOLDER = Path(quantize.kernels.__file__).parent
OPERATORS = sorted(path.name for path in FOLDER.iterdir() if (path / "__init__.py").exists())
FOUR = {"api", "kernels", "launch", "reference"}
# Parts of an operator that is too large for four modules.
MORE = {
    "attention": {"checks", "ops", "kv_kernels", "prefill_kernels"}
    | {"paged", "paged_kernels", "paged_launch"}  # for an engine's pages
    | {
        "affine"
    },  # what keys and values go through on their way into a cache and back: products alone
    "bitvec": {"lookup"},  # without decompression on a CPU
    "int4": {"cpu", "decode"},
}


def functions(operator: str, module: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((FOLDER / operator / f"{module}.py").read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def starters(operator: str) -> set[str]:
    """Functions of `launch` that start a kernel (`name_kernel[grid](…)`), by themselves or through others."""
    found = functions(operator, "launch")
    calls = {
        name: {ast.unparse(n.func) for n in ast.walk(f) if isinstance(n, ast.Call)}
        for name, f in found.items()
    }
    starting = {
        name for name, called in calls.items() if any("_kernel[" in text for text in called)
    }
    while more := {name for name, called in calls.items() if called & starting} - starting:
        starting |= more
    return starting


def test_the_walk_sees_what_starts_kernels():
    assert OPERATORS == ["attention", "bitvec", "experts", "fp8", "int4"]
    assert {"multiply", "_sum", "_by_planes"} <= starters("bitvec")
    assert "_split" not in starters("bitvec")
    assert "tile_for" not in starters("int4")


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_the_same_four_modules(operator: str):
    modules = {path.stem for path in (FOLDER / operator).glob("*.py")} - {"__init__"}
    assert modules == FOUR | MORE.get(operator, set())


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kernel_that_others_start_has_a_twin(operator: str):
    public = {name for name in starters(operator) if not name.startswith("_")}
    assert public
    assert {f"{name}_reference" for name in public} <= set(functions(operator, "reference"))


def test_nothing_but_operators_and_the_device_stands_beside_them():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", "by_rows", "device"}
