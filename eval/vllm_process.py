"""Questions to a vLLM that is installed in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


def ask(engine: Path, code: str, argument: str, **variables: str) -> dict[str, Any]:
    """What `code`, which prints one line `FOUND {…}`, finds when vLLM's Python `engine` runs it with
    one argument; RuntimeError with its last lines where it does not run.

    variables: of the environment, beside those that keep vLLM in one process and off the network.
    """
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | own | variables
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(engine), "-c", code, argument],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd="/",
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-12:]))
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("FOUND "))
    return found
