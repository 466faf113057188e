"""The lock files: made of pyproject.toml, hashed, complete for each Python, and what the Makefile installs."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {part: ROOT / ".ci" / "locks" / f"{part}.txt" for part in ("build", "base", "cuda")}
PYTHONS = ["3.10.13", "3.11.7", "3.12.1", "3.13.0"]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}


def environment(python: str) -> dict[str, str]:
    """What a marker sees under a Python on Linux."""
    return {
        **LINUX,
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "extra": "",
    }


def pinned(part: str, python: str) -> dict[str, list[str]]:
    """Name → versions that a lock file would install there."""
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^([a-z0-9].*?) *\\?$", LOCKS[part].read_text(), re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            version = str(requirement.specifier).removeprefix("==")
            found.setdefault(canonicalize_name(requirement.name), []).append(version)
    return found


@pytest.fixture(scope="module")
def wanted() -> list[Requirement]:
    """Everything that pyproject.toml and build.in ask for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = list(project["dependencies"])
    texts += [text for extra in project["optional-dependencies"].values() for text in extra]
    lines = (ROOT / ".ci" / "locks" / "build.in").read_text().splitlines()
    texts += [line for line in lines if line and not line.startswith("#")]
    return [Requirement(text) for text in texts if not text.startswith("pq-quantize[")]


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / ".ci" / "locks")
    return importlib.import_module("lock")


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_gets_one_release_of_all_that_is_declared(
    python: str, wanted: list[Requirement]
):
    parts = [pinned(part, python) for part in LOCKS]
    everything = {name: versions for part in parts for name, versions in part.items()}
    assert sum(map(len, parts)) == len(everything), "a package stands in two parts"
    assert all(len(versions) == 1 for versions in everything.values())
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate(environment(python)):
            continue
        name = canonicalize_name(requirement.name)
        assert name in everything, f"{name} is not locked; run make lock"
        assert requirement.specifier.contains(everything[name][0]), f"{name}: run make lock"


@pytest.mark.parametrize("part", LOCKS)
def test_every_release_has_its_hashes(part: str):
    blocks = re.split(r"^(?=[a-z0-9])", LOCKS[part].read_text(), flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        assert re.match(r"[\w.\[\],-]+==\S+", block), block.splitlines()[0]
        assert re.search(r"^    --hash=sha256:[0-9a-f]{64}\b", block, re.MULTILINE), (
            block.splitlines()[0]
        )


def test_only_torch_and_its_cuda_libraries_are_left_to_machines_with_a_gpu():
    names = {name for python in PYTHONS for name in pinned("cuda", python)}
    assert "torch" in names
    assert all(re.match(r"torch$|nvidia-|cuda-", name) for name in names)
    others = {name for part in ("build", "base") for name in pinned(part, PYTHONS[1])}
    assert not [name for name in others if re.match(r"torch$|nvidia-|cuda-", name)]
    assert "triton" in others  # interprets the kernels where torch is a CPU build


def test_the_makefile_installs_the_torch_that_is_locked():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    version = re.search(r"^TORCH_VERSION := (\S+)$", makefile, re.MULTILINE)
    assert version
    assert pinned("cuda", PYTHONS[1])["torch"] == [version[1]]


def dry_run(*arguments: str, path: str | None = None) -> str:
    """What `make setup` would run."""
    command = ["make", "--dry-run", "--always-make", "setup", *arguments]
    environment = {"PATH": path} if path else None
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def folder_with(command: str, folder: Path) -> str:
    (folder / command).write_text("#!/bin/sh\n")
    (folder / command).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_what_is_installed_with_and_without_a_gpu(tmp_path: Path):
    (tmp_path / "none").mkdir()
    without = dry_run(path=f"{tmp_path / 'none'}:/usr/bin:/bin")
    if "nvidia-smi" not in str(list(Path("/usr/bin").glob("nvidia-smi"))):
        assert "-r .ci/locks/base.txt;" in without
        assert "cuda.txt" not in without
        assert re.search(r'pip install --quiet "torch==[\d.]+"', without)
    path = folder_with("nvidia-smi", tmp_path)
    with_gpu = dry_run(path=path)
    assert "-r .ci/locks/base.txt -r .ci/locks/cuda.txt;" in with_gpu
    assert '"torch' not in with_gpu
    other = dry_run("TORCH=torch==2.11.0", path=path)
    assert "cuda.txt" not in other
    assert 'pip install --quiet "torch==2.11.0"' in other


def test_every_hashed_install_checks_hashes_and_builds_with_what_is_locked():
    lines = [line for line in dry_run().splitlines() if "-r .ci/locks/" in line]
    assert len(lines) == 2
    assert ".ci/locks/build.txt" in lines[0]
    for line in lines:
        assert {"--require-hashes", "--no-deps", "--no-build-isolation"} <= set(line.split())


FULL = """\
pq-tool==1.0 \\
    --hash=sha256:aa
    # via -r .ci/locks/build.in
torch==2.13.0 ; sys_platform == 'linux' \\
    --hash=sha256:ab
    # via
    #   accelerate
    #   pq-quantize (pyproject.toml)
nvidia-cufile==1.15 ; sys_platform == 'linux' \\
    --hash=sha256:ac
    # via cuda-toolkit
cuda-toolkit==13.0.3.0 \\
    --hash=sha256:ad
    # via torch
nvidia-ml-py==12.0 \\
    --hash=sha256:ae
    # via
    #   accelerate
    #   torch
sympy==1.14 \\
    --hash=sha256:af
    # via torch
triton==3.7.1 ; sys_platform == 'linux' \\
    --hash=sha256:b0
    # via
    #   pq-quantize (pyproject.toml)
    #   torch
numpy==2.2.6 ; python_full_version < '3.11' \\
    --hash=sha256:b1
    # via torch
numpy==2.4.6 ; python_full_version >= '3.11' \\
    --hash=sha256:b2
    # via torch
"""


def test_what_only_torch_needs_goes_with_it(lock: ModuleType):
    packages = lock.entries(FULL)
    assert [len(blocks) for blocks in packages.values()] == [1, 1, 1, 1, 1, 1, 1, 2]
    assert lock.askers(packages["triton"][0]) == {"pq-quantize", "torch"}
    assert lock.cuda_part(packages) == {"torch", "cuda-toolkit", "nvidia-cufile"}


def test_the_tested_range_is_bound_and_lock(lock: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock, "WATCHED", ("numpy", "triton"))
    bounds = {"dependencies": ["numpy>=1.26,<3", "triton>=3.6; platform_system == 'Linux'"]}
    assert lock.tested(bounds, lock.entries(FULL)) == {
        "numpy": ["1.26", "2.4.6"],
        "triton": ["3.6", "3.7.1"],
    }


def test_the_tested_ranges_that_are_shipped_are_those_of_the_lock(lock: ModuleType):
    packages: dict[str, list[str]] = {}
    for path in LOCKS.values():
        packages |= lock.entries(path.read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shipped = json.loads((ROOT / "quantize" / "tested.json").read_text(encoding="utf-8"))
    assert shipped == lock.tested(project, packages), "run make lock"
    for low, high in shipped.values():
        assert Version(low) <= Version(high)
