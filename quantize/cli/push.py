"""`pq push`: an output as a model on the Hugging Face Hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from quantize.cli.inspect import printable
from quantize.errors import ModelError, UsageError


def push(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Folder that pq convert wrote.")],
    name: Annotated[str, typer.Argument(metavar="org/name", help="Name on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the new repository private.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Put the files into a repository that holds some, in a new commit."
        ),
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", help="Of the commit; default: recipe and release.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and touch no network.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was done as JSON on stdout.")
    ] = False,
) -> None:
    """Upload an output to the Hugging Face Hub, with its card; needs a token that may write.

    Only what pq.json names goes, each file as it was written.
    """
    from quantize.files.hub import files_of, size_of
    from quantize.files.hub_push import address_of, require_id
    from quantize.files.hub_push import push as run
    from quantize.files.provenance import read_provenance
    from quantize.inspect.publish import publication

    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{model}: no such folder; give the folder that pq convert wrote")
    require_id(name)
    if private and update:
        raise UsageError("--private is for a new repository; one that is there keeps what it is")
    found = publication(folder, name)
    facts = {"model": str(folder), "name": name, "url": address_of(name), "files": found.sizes}
    if not as_json:
        _show(found.sizes, size_of)
        for note in found.notes:
            typer.echo(printable(note), err=True)
    if dry_run:
        what = f"{files_of(found.sizes.values())} to {facts['url']}"
        if as_json:
            typer.echo(json.dumps(facts | {"dry_run": True, "notes": found.notes}, indent=2))
        else:
            typer.echo(f"dry run, nothing was sent: {what}", err=True)
        return
    record = read_provenance(folder) or {}
    told = message or f"{record['recipe']['name']}, pq {record['pq']}"

    def say(line: str) -> None:
        typer.echo(f"pq: {line}", err=True)

    done = run(
        name,
        found.files,
        told,
        private=private,
        update=update,
        say=say,
        bars=sys.stderr.isatty(),
    )
    if as_json:
        more = {"commit": done.commit, "private": done.private, "removed": done.removed}
        typer.echo(json.dumps(facts | more | {"notes": found.notes}, indent=2))
        return
    for path in done.removed:
        typer.echo(f"removed of an earlier upload: {printable(path)}", err=True)
    typer.echo(
        f"{done.url}: {files_of(found.sizes.values())} in commit {done.commit[:7]}, "
        f"{'private' if done.private else 'public'}",
        err=True,
    )
    typer.echo(f"next: pq serve-check {name}", err=True)


def _show(sizes: Mapping[str, int], in_words: Callable[[float], str]) -> None:
    """The files, one a line."""
    for path, size in sizes.items():
        typer.echo(f"{in_words(size):>10}  {printable(path)}")
