"""The plugin's wheel holds all that its modules import, and is found by its entry point."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import quantize

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(quantize.__file__).parent
PLUGIN = ROOT / "vllm"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))


def shipped(project: dict[str, Any]) -> dict[str, Path]:
    """Module → file, of all modules in the wheel."""
    out: dict[str, Path] = {}
    for source, target in project["tool"]["hatch"]["build"]["targets"]["wheel"][
        "force-include"
    ].items():
        found = (PLUGIN / source).resolve()
        assert found == ROOT / Path(target).relative_to("quantize"), source
        for path in [found] if found.is_file() else found.rglob("*.py"):
            if path.suffix == ".py":
                parts = ("quantize", *path.relative_to(ROOT).with_suffix("").parts)
                out[".".join(parts).removesuffix(".__init__")] = path
    return out


def needed(tree: ast.Module) -> set[str]:
    """Names that a module imports when it is imported, not inside functions or for types alone."""
    out: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def test_every_import_of_ours_is_shipped(project: dict[str, Any]):
    modules = shipped(project)
    assert {"quantize.vllm", "quantize.kernels.int4.cpu", "quantize.formats.native"} <= set(modules)
    for name, path in modules.items():
        for wanted in needed(ast.parse(path.read_text(encoding="utf-8"))):
            if wanted.startswith("quantize."):
                module = wanted if (ROOT.parent / wanted.replace(".", "/")).is_dir() else ""
                held = {wanted, wanted.rpartition(".")[0], module} & set(modules)
                assert held, f"{name} imports {wanted}, which the wheel lacks"


def test_what_is_shipped_needs_no_more_than_is_declared(project: dict[str, Any]):
    declared = {line.partition(">")[0] for line in project["project"]["dependencies"]}
    # torch brings numpy's and Triton's users what they need; vLLM itself is there.
    host = {"vllm", "regex", "triton", "compressed_tensors", "transformers"}
    for name, path in shipped(project).items():
        for wanted in needed(ast.parse(path.read_text(encoding="utf-8"))):
            root = wanted.partition(".")[0]
            ours = root in {"quantize", "__future__"} | sys.stdlib_module_names
            assert ours or root in declared | host, f"{name} imports {root}"


def test_both_distributions_name_the_same_entry_point(project: dict[str, Any]):
    whole = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    group = "vllm.general_plugins"
    (named,) = {str(p["project"]["entry-points"][group]) for p in (project, whole)}
    module, _, function = ast.literal_eval(named)["pq"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_importing_the_entry_point_needs_no_vllm():
    source = (PLUGIN / "__init__.py").read_text(encoding="utf-8")
    assert not any(name.startswith("vllm") for name in needed(ast.parse(source)))
