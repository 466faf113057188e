"""Who may import whom, read from the source text; between rooms, imports for types alone count as well."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantize
from quantize.formats.registry import FORMATS

ROOT = Path(quantize.__file__).parent
FILES = {
    ".".join(("quantize", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# Room → the rooms of ours that it may import; a room is a folder or a module beside them.
ROOMS: dict[str, str] = {
    "errors": "",
    "pictures": "",
    "tested": "",
    "import_hook": "",
    "version": "",
    "threads": "",
    "cost": "errors",
    "formats": "files",
    "kernels": "formats threads",
    "parallel": "errors",
    "files": "errors parallel",
    "calibration": "errors files",
    "solvers": "cost formats threads",
    "model": "errors files formats kernels",
    "serving": "errors formats kernels model tested",
    "vllm": "formats kernels model serving",
    "inspect": "errors files formats model",
    "block": "cost errors files formats model parallel solvers threads",
    "methods": "block cost errors files formats kernels model parallel pictures solvers threads",
    "recipe": "errors files formats methods",
    "bench": "cost errors formats kernels methods model serving solvers",
    "conversion": (
        "block calibration cost errors evaluation files formats inspect methods model parallel recipe solvers "
        "threads version"
    ),
    "evaluation": "block calibration errors files model parallel version",
    "draft": "calibration errors evaluation files model plan serving",
    "verification": "block calibration conversion errors files formats kernels methods model recipe serving",
    "plan": "errors files formats inspect model recipe",
    "gate": "conversion errors evaluation files model recipe version",
    "report": "block draft errors evaluation files formats inspect model pictures plan recipe",
    "recommend": "conversion errors files formats inspect plan recipe",
    "api": "conversion cost errors evaluation files formats inspect model parallel pictures recipe report version",
    "cli": (
        "api bench conversion cost draft errors evaluation files formats gate inspect methods parallel pictures "
        "plan recipe recommend report tested verification version"
    ),
    "__main__": "cli",
    "": "api import_hook serving version",
}
# Methods see blocks and tensors: none of these, wherever a room would let them.
METHODS_NEVER = tuple(
    f"quantize.{name}"
    for name in (
        "files.checkpoint",
        "files.resume",
        "files.transaction",
        "files.writer",
        "formats.registry",
        "model.load",
        "model.skeleton",
    )
)
# What methods share among themselves; nothing else of one is another's business.
METHODS_SHARE = (
    "quantize.methods.adaptation",
    "quantize.methods.base",
    "quantize.methods.edges",
    "quantize.methods.encode",
)
# Third-party package → the only modules that may import it.
OWNERS: dict[str, tuple[str, ...]] = {
    "typer": ("quantize.cli",),
    "click": ("quantize.cli",),
    "rich": ("quantize.cli", "quantize.report"),
    "datasets": ("quantize.calibration",),
    "lm_eval": ("quantize.evaluation",),
    "gguf": ("quantize.files.gguf",),
    "matplotlib": ("quantize.report",),
    "jinja2": ("quantize.report",),
    "triton": ("quantize.kernels",),
    "vllm": ("quantize.vllm",),
    "yaml": ("quantize.files.strict_yaml",),
    "huggingface_hub": (
        "quantize.files.hub",
        "quantize.files.hub_problems",
        "quantize.files.hub_push",
    ),
    "transformers": (
        "quantize.model.transformers_api",
        "quantize.model.transformers_decoder",
        "quantize.model.transformers_generate",  # the parent writes: cache and its argument
        "quantize.model.transformers_names",
        "quantize.serving.transformers_assistant",  # subclasses its generator of candidates
        "quantize.serving.transformers_quantizer",
    ),
}
ADAPTERS = OWNERS["transformers"]
# What models and layers of transformers take and return, in any release.
NAMES_OF_TRANSFORMERS = {
    "attention_mask",
    "attn_implementation",
    "_attn_implementation",
    "cache_params",
    "cache_position",
    "inputs_embeds",
    "last_hidden_state",
    "merge_with_config_defaults",
    "output_attentions",
    "output_hidden_states",
    "past_key_value",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "rotary_emb",
    "use_cache",
}


def below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def type_only(tree: ast.AST) -> set[ast.AST]:
    """Return the nodes that only a type checker runs."""
    tests = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {inner for test in tests for statement in test.body for inner in ast.walk(statement)}


def imports(module: str, types: bool = False) -> Iterator[str]:
    """Yield the dotted names that a module imports, those inside functions included; with `types`, also for types."""
    tree = TREES[module]
    skipped = set() if types else type_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = str(node.module)
            yield from (
                f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (ast.literal_eval(arg) for arg in node.args if isinstance(arg, ast.Constant))


GRAPH = {module: sorted(set(imports(module))) for module in FILES}
WITH_TYPES = {module: sorted(set(imports(module, types=True))) for module in FILES}


def ours(module: str, types: bool = False) -> list[str]:
    return [name for name in (WITH_TYPES if types else GRAPH)[module] if below(name, ("quantize",))]


def test_the_walk_sees_imports():
    assert "quantize.errors" in GRAPH["quantize.model.arch"]
    assert "quantize.conversion.loop" in GRAPH["quantize.cli.convert"]  # inside a function
    assert "quantize.block.block" not in GRAPH["quantize.methods.base"]  # for types alone
    assert "rich.console" in GRAPH["quantize.cli.conversion_summary"]


def room_of(module: str) -> str:
    """Folder below quantize/ (or module beside them) that a module stands in; empty for the package itself."""
    return module.removeprefix("quantize").removeprefix(".").partition(".")[0]


def test_every_room_has_its_row():
    assert {room_of(module) for module in FILES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below_them(room: str):
    allowed = {room, "", *ROOMS[room].split()}
    for module in (name for name in FILES if room_of(name) == room):
        wrong = [name for name in ours(module, types=True) if room_of(name) not in allowed]
        assert not wrong, f"{module} imports {wrong}"


def test_every_row_is_needed():
    for room, row in ROOMS.items():
        used = {
            room_of(name)
            for module in FILES
            if room_of(module) == room
            for name in ours(module, types=True)
        }
        assert set(row.split()) <= used, room


def test_rooms_stand_on_floors():
    """No room imports, even through others, a room that imports it: the table alone shows it."""
    floors: dict[str, int] = {}

    def floor(room: str, path: tuple[str, ...]) -> int:
        assert room not in path, " → ".join((*path, room))
        if room not in floors:
            below_it = [floor(name, (*path, room)) for name in ROOMS[room].split()]
            floors[room] = 1 + max(below_it, default=0)
        return floors[room]

    for room in ROOMS:
        floor(room, ())


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("quantize.methods.")])
def test_methods_see_blocks_and_tensors_and_no_other_method(module: str):
    own = ".".join(module.split(".")[:3])
    for name in ours(module):
        assert not below(name, METHODS_NEVER), f"{module} imports {name}"
        assert not below(name, ("quantize.methods",)) or below(name, (own, *METHODS_SHARE)), (
            f"{module} imports {name}"
        )


@pytest.mark.parametrize("package", OWNERS)
def test_third_parties_have_one_home(package: str):
    users = [
        module for module, names in GRAPH.items() if any(below(name, (package,)) for name in names)
    ]
    assert not [module for module in users if not below(module, OWNERS[package])]


def words(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names, attributes, arguments and strings of a module that are a single word, with their lines."""
    for node in ast.walk(tree):
        found = {
            ast.Name: lambda n: n.id,
            ast.Attribute: lambda n: n.attr,
            ast.keyword: lambda n: n.arg,
            ast.arg: lambda n: n.arg,
            ast.Constant: lambda n: n.value,
        }.get(type(node))
        word = found and found(node)
        if isinstance(word, str):
            yield word, node.lineno


def test_the_adapter_alone_names_what_transformers_takes():
    for module, tree in TREES.items():
        wrong = [(word, line) for word, line in words(tree) if word in NAMES_OF_TRANSFORMERS]
        assert not wrong or below(module, ADAPTERS), f"{module}: {wrong}"
    adapter = {word for name in ADAPTERS for word, _ in words(TREES[name])}
    assert {"past_key_values", "use_cache", "attn_implementation"} <= adapter


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, text) for every literal that a comparison, a membership test or a match is made with."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare | ast.pattern):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                yield inner.lineno, inner.value


def test_a_comparison_with_a_name_of_a_format_is_seen():
    found = compared(ast.parse("a == 'pq'\nb in ('x', 'y')\nmatch c:\n    case 'z': pass\nd = 'w'"))
    assert list(found) == [(1, "pq"), (2, "x"), (2, "y"), (4, "z")]


def test_nobody_but_formats_asks_which_format_it_is():
    """What depends on the output's format is asked of its object, so that one more format is one more file."""
    for module, tree in TREES.items():
        if not below(module, ("quantize.formats",)):
            wrong = [f"{module}:{line}: {text}" for line, text in compared(tree) if text in FORMATS]
            assert not wrong
            names = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.Compare) and "NATIVE" in ast.unparse(node)
            ]
            # transformers' own registry is asked whether it knows pq's format already.
            assert not names or below(module, ("quantize.serving",))


def test_nothing_below_the_command_line_imports_it():
    for module in FILES:
        if not below(module, ("quantize.cli", "quantize.__main__")):
            assert not [name for name in ours(module) if below(name, ("quantize.cli",))], module


def test_imports_form_no_circle():
    """Those for types alone count as well: modules that name each other's types are one module in two files."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for name in ours(module, types=True):
                if name in FILES and name != module:
                    visit(name, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_library_code_never_prints():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "breakpoint", "input"), (
                    f"{module}:{node.lineno}"
                )
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "sys.stdout",
                "sys.stderr",
            ):
                assert below(module, ("quantize.cli",)), f"{module}:{node.lineno}"


def test_only_the_command_line_exits():
    for module, tree in TREES.items():
        if not below(module, ("quantize.cli",)):
            source = {
                ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)
            }
            assert not source & {"sys.exit", "exit", "quit", "os._exit"}, module


def test_no_code_is_run_from_data():
    for module, tree in TREES.items():
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        wrong = {
            "eval",
            "exec",
            "torch.load",
            "pickle.load",
            "pickle.loads",
            "yaml.load",
            "os.system",
        }
        assert not calls & wrong, module
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", module


def test_the_command_line_starts_without_torch():
    heavy = ("torch", "transformers", "datasets", "safetensors", "pydantic", "rich.progress")
    code = f"import sys, quantize.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# Packages that others call for by name: transformers for a device_map, datasets for parquet.
NEVER_IMPORTED = {"accelerate", "pyarrow"}
DISTRIBUTIONS = {"yaml": "pyyaml", "lm_eval": "lm-eval", "compressed_tensors": "compressed-tensors"}
# These come with transformers, pydantic and jinja2 by their own declaration.
INHERITED = {"huggingface_hub", "markupsafe", "numpy", "pydantic_core", "tqdm", "typing_extensions"}
PEERS = {"gemlite"}
"""Measured beside our kernels where they are installed."""
HOST = {"vllm", "regex"}
"""What the plugin for vLLM finds there: vLLM and what comes with it."""


def declared() -> set[str]:
    text = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = text[text.index("\ndependencies = [") :].partition("\n]")[0]
    return {
        re.split("[<>=!~]", name)[0] for name in re.findall(r'^    "([^"]+)"', listed, re.MULTILINE)
    }


def test_every_third_party_import_is_declared_and_every_declared_one_imported():
    roots = {name.partition(".")[0] for names in GRAPH.values() for name in names}
    foreign = {
        r
        for r in roots
        if r not in sys.stdlib_module_names and r not in {"quantize"} | INHERITED | PEERS | HOST
    }
    imported = {DISTRIBUTIONS.get(root, root) for root in foreign}
    assert imported - declared() == set()
    assert declared() - imported <= NEVER_IMPORTED
