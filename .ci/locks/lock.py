"""Make the lock files of this folder and quantize/tested.json: `make lock` runs this beside uv.

    python .ci/locks/lock.py --uv UV --torch 2.13.0

uv resolves everything once, for Python 3.10 to 3.13 and all platforms (environment markers say
which line is for whom), and the result is written in three parts, each with the hashes of all files
of a release:

- build.txt: pip itself and what builds packages from source. Installed first, so that nothing is
  built with what was never locked.
- base.txt: everything else that pq and its development tools need, but for
- cuda.txt: torch from PyPI and the CUDA libraries that nothing but that torch needs. A machine
  without a GPU leaves this file out and takes torch from where its pip finds a CPU build, whose
  hashes are not those of PyPI's.

Triton stands in base.txt at the version that this torch asks for: with a CPU build of torch it
interprets the kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCKS = Path(__file__).resolve().parent
ROOT = LOCKS.parents[1]
OLDEST = "3.10"
"""uv resolves for this release of Python and all later ones, and picks for each the newest that it can have."""
WATCHED = (
    "torch",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "triton",
    "lm-eval",
    "datasets",
)
"""What pq says a line about where it is beyond what was tested (`quantize/tested.py`)."""
HEAD = """\
# Made by `make lock`; not to be edited. {what}
"""
PARTS = {
    "build": "Installers and build tools, for Python 3.10 to 3.13.",
    "base": "All that pq and its tools need but torch, for Python 3.10 to 3.13.",
    "cuda": "torch and the CUDA libraries that it alone needs, for machines with an NVIDIA GPU.",
}


def entries(text: str) -> dict[str, list[str]]:
    """Name of each package in uv's output → its blocks: a requirement, its hashes, and who asks for it."""
    found: dict[str, list[str]] = {}
    for block in re.findall(r"^[a-zA-Z0-9].*\n(?:[ ].*\n)*", text, re.MULTILINE):
        found.setdefault(re.split(r"[=\[ ;]", block)[0], []).append(block)
    return found


def askers(block: str) -> set[str]:
    """Names behind `# via`: what needs this package."""
    return set(re.findall(r"^    #(?: via)? +(?!via\b)([\w.-]+)", block, re.MULTILINE))


def cuda_part(packages: dict[str, list[str]]) -> set[str]:
    """torch, and all that is needed by nothing outside this set but triton, which the CPU build's users need too."""
    part = {"torch"}
    while True:
        more = {
            name
            for name, blocks in packages.items()
            if name not in part | {"triton"} and {a for b in blocks for a in askers(b)} <= part
        }
        # setuptools, sympy and others that torch's CPU build needs as well stay in the base.
        more = {name for name in more if re.match(r"nvidia-|cuda-", name)}
        if not more:
            return part
        part |= more


def tested(project: dict[str, list[str]], packages: dict[str, list[str]]) -> dict[str, list[str]]:
    """Lowest (pyproject.toml's bound) and highest version (the lock's) of each watched package."""
    bounds = {}
    for text in project["dependencies"]:
        requirement = Requirement(text)
        lowest = [s.version for s in requirement.specifier if s.operator == ">="]
        bounds[requirement.name] = lowest[0]
    highest = {
        name: max((version(block) for block in packages[name]), key=Version) for name in WATCHED
    }
    return {name: [bounds[name], highest[name]] for name in WATCHED}


def version(block: str) -> str:
    """What a block pins its package to."""
    found = re.match(r"[^=]+==([^ ;\\]+)", block)
    if not found:
        raise SystemExit(f".ci/locks/lock.py: no pinned version in {block.splitlines()[0]!r}")
    return found[1]


def resolve(uv: str, constraint: Iterable[str], *sources: Path, extras: bool = False) -> str:
    """What uv would install, as requirements with hashes."""
    with tempfile.TemporaryDirectory() as folder:
        limits = Path(folder) / "constraints.txt"
        limits.write_text("".join(f"{line}\n" for line in constraint), encoding="utf-8")
        command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST]
        command += ["--generate-hashes", "--no-header", "--constraint", str(limits)]
        command += ["--all-extras"] * extras
        command += [str(path) for path in sources]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    # Not a word about this run's temporary folder, or equal resolutions would differ.
    return "".join(line for line in done.stdout.splitlines(True) if folder not in line)


def write(part: str, names: Iterable[str], packages: dict[str, list[str]]) -> None:
    """Write one lock file."""
    lines = [block for name in sorted(names) for block in packages[name]]
    text = HEAD.format(what=PARTS[part]) + "".join(lines)
    (LOCKS / f"{part}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Resolve, split, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uv", default="uv", help="the command")
    parser.add_argument("--torch", required=True, help="the release of torch to lock")
    args = parser.parse_args()
    pinned = [f"torch=={args.torch}"]
    sources = ROOT / "pyproject.toml", LOCKS / "build.in"
    everything = entries(resolve(args.uv, pinned, *sources, extras=True))
    same = [
        block.splitlines()[0].rstrip(" \\") for blocks in everything.values() for block in blocks
    ]
    building = set(entries(resolve(args.uv, same, LOCKS / "build.in")))
    cuda = cuda_part(everything)
    write("build", building, everything)
    write("cuda", cuda, everything)
    write("base", everything.keys() - building - cuda, everything)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = tested(project, everything)
    rows = [f" {json.dumps(name)}: {json.dumps(bounds)}" for name, bounds in ranges.items()]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    (ROOT / "quantize" / "tested.json").write_text(text, encoding="utf-8")
    print(", ".join(f"{name} {low} to {high}" for name, (low, high) in ranges.items()))


if __name__ == "__main__":
    main()
