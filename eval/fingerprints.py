"""Hash what every shipped recipe makes of a model, or compare two such records file by file.

    python eval/fingerprints.py make --output before.json
    python eval/fingerprints.py compare before.json after.json

Outputs depend on the machine (number of threads, kind of processor) and on the versions of torch and transformers: both
records must come from one machine and one environment. The comparison exits with 1 where a file differs, unless it is
named by --allow.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@app.command()
def make(
    output: Annotated[Path, typer.Option(help="Where the record is written.")],
    model: Annotated[Path, typer.Option(help="The model to convert.")] = HERE / "reference-model",
    recipes: Annotated[Path, typer.Option(help="Folder of recipes.")] = HERE.parent / "recipes",
    nsamples: int = 8,
    seqlen: int = 256,
) -> None:
    """Convert with every recipe and record the SHA-256 of each file."""
    record: dict[str, dict[str, str]] = {}
    for recipe in sorted(recipes.glob("*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "out"
            options = ["--nsamples", str(nsamples), "--seqlen", str(seqlen), "--device", "cpu"]
            command = [
                "convert",
                "--model",
                str(model),
                "--recipe",
                str(recipe),
                "--output",
                str(target),
                *options,
            ]
            subprocess.run(
                [sys.executable, "-m", "quantize", *command], check=True, stdout=subprocess.DEVNULL
            )
            record[recipe.stem] = _hashes(target)
        print(recipe.stem, len(record[recipe.stem]), "files", flush=True)
        output.write_text(json.dumps(record, indent=1) + "\n")


@app.command()
def compare(
    before: Path,
    after: Path,
    allow: Annotated[list[str] | None, typer.Option(help="Name of a file that may differ.")] = None,
) -> None:
    """Name every file that differs between two records."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    allowed, wrong = set(allow or ()), 0
    for recipe in sorted(old.keys() | new.keys()):
        ours, theirs = old.get(recipe, {}), new.get(recipe, {})
        differ = sorted(
            name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
        )
        same = len(ours.keys() & theirs.keys()) - len(
            [name for name in differ if name in ours and name in theirs]
        )
        wrong += len([name for name in differ if name not in allowed])
        print(
            f"{recipe}: {same} files equal" + (f"; differ: {', '.join(differ)}" if differ else "")
        )
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app()
