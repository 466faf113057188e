"""Commands, Python, JSON and YAML in the documentation are what pq takes and gives."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import DOCS, ROOT, blocks, each_page, spans, text_of

from quantize.cli import app
from quantize.files import strict_yaml
from quantize.gate.file import load_gate
from quantize.plan.request import load_request
from quantize.recipe.recipe import load_recipe

LAUNCHERS = ("accelerate launch", "torchrun")

# Commands


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of every command in a shell block, `#` and what follows left out."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def arguments_of_pq(words: list[str]) -> list[str] | None:
    """What `pq` is given in a command; None where it is another command."""
    if ">" in words:
        words = words[: words.index(">")]
    if words[0] == "pq":
        return words[1:]
    if " ".join(words).startswith(LAUNCHERS):
        return words[words.index("quantize") + 1 :]
    return None


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


def parse(arguments: list[str]) -> None:
    """Parse what `pq` is given, and do nothing; an exception where it would refuse."""
    command, name, context = root_command(), "pq", None
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        settings = command.context_settings
        context = command.context_class(command, info_name=name, parent=context, **settings)
        name = arguments[0]
        command, arguments = command.commands[name], arguments[1:]
    if hasattr(command, "commands"):
        known = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(arguments) <= known | {"--help"}, arguments
        return
    command.make_context(name, list(arguments), parent=context)


@each_page
def test_commands_parse(page: Path):
    for words in command_lines(page):
        arguments = arguments_of_pq(words)
        if arguments is not None:
            parse(arguments)


def test_the_parser_refuses_what_pq_refuses():
    wrongs = ("convert --modle x", "convert --model x", "recipe show", "bench fit")
    for wrong in map(str.split, wrongs):
        with pytest.raises(Exception, match=r"(?i)no such option|missing"):
            parse(wrong)
    with pytest.raises(KeyError):
        parse(["convertt"])
    parse(["eval", "x", "--num_fewshot", "1"])


def options(command: Any) -> set[str]:
    """Options of a command and of all below it."""
    own = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return own.union(*(options(child) for child in getattr(command, "commands", {}).values()))


@each_page
def test_commands_and_options_in_a_sentence_exist(page: Path):
    others = ("--num_processes", "--nproc-per-node", "--kv-cache-dtype", "--help")
    others += (
        "--gpu-memory-utilization",
        "--max-model-len",
        "--save-result",
        "--attention-backend",
        "--enforce-eager",
        "--speculative-config",
        "--tensor-parallel-size",
    )  # vLLM's
    known = options(root_command())
    for span in spans(page):
        words = span.split()
        if words[0] == "pq" and len(words) > 1 and words[1] in root_command().commands:
            command = root_command().commands[words[1]]
            if len(words) > 2 and words[2] in getattr(command, "commands", {}):
                command = command.commands[words[2]]
            given = {word for word in words if word.startswith("--")}
            assert given <= options(command) | {"--help"}, span
        elif words[0] == "pq" and len(words) > 1 and words[1].islower():
            raise AssertionError(f"{span}: no such command")
        for word in words:
            if re.fullmatch(r"--[a-z][a-z_-]*", word) and word not in others:
                assert word.replace("_", "-") in known, span


@each_page
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    lines = "\n".join([shlex.join(words) for words in command_lines(page)] + spans(page))
    for target in re.findall(r"^make ((?:[a-z-]+ ?)+)", lines, re.MULTILINE):
        assert set(target.split()) <= targets, target


# Code


@each_page
def test_python_blocks_compile_and_import_what_there_is(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantize"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_worked_bytes_are_right():
    found = blocks(DOCS / "formats.md", "python")
    assert len(found) >= 6
    space: dict[str, Any] = {}
    for block in found:
        exec(block, space)


@each_page
def test_json_blocks_are_json(page: Path):
    for block in blocks(page, "json"):
        json.loads(block)


@each_page
def test_recipes_and_gate_files_are_valid(page: Path, tmp_path: Path):
    for i, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(block, encoding="utf-8")
        if "\ncluster:" in block:
            assert load_request(path).models
        elif "\nrecipes:" in block:
            assert load_gate(path).entries
        else:
            assert load_recipe(str(path)).stages


WORKFLOWS = sorted((DOCS / "ci").glob("*.yml"))


def test_there_is_a_workflow():
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_yaml_whose_commands_exist(path: Path):
    found = strict_yaml.load(path.read_bytes(), str(path))
    assert not found.problems
    assert {"name", "on", "jobs"} <= set(found.data)
    given = []
    for job in found.data["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
            for line in step.get("run", "").splitlines():
                words = shlex.split(line, comments=True)
                if words and (arguments := arguments_of_pq(words)) is not None:
                    parse(arguments)
                    given.append(arguments)
    (run,) = (arguments for arguments in given if arguments[:2] == ["gate", "run"])
    assert {"--junit", "--summary-file"} <= set(run)
    junit = run[run.index("--junit") + 1]
    steps = [step for job in found.data["jobs"].values() for step in job["steps"]]
    assert junit in [step["with"].get("path") for step in steps if "with" in step]


@each_page
def test_files_that_are_named_exist(page: Path):
    for span in spans(page):
        if re.fullmatch(r"(?:quantize|tests|eval|docs|recipes|calib_data)/[\w/.-]*", span):
            assert (ROOT / span).exists() or re.search("DEVICE|NAME", span), span
