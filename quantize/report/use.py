"""What to do with a conversion: which engines load it, and commands that come next."""

from __future__ import annotations

import shlex

from quantize.pictures import Cell, Table
from quantize.report.model import Item, Listing, Section, items, mapping, text
from quantize.report.sources import Sources


def use(sources: Sources) -> Section:
    """A table of engines, and the next commands."""
    shown: list[Item] = []
    if found := sources.loads:
        rows: list[list[Cell]] = []
        for loading in found.distinct:
            needs = " and ".join(loading.install)
            notes = "; ".join((*loading.notes, *([loading.first] if loading.first else ())))
            said = "yes" if loading.loads else "no"
            rows.append([loading.engine, loading.where, said, needs, notes])
        columns = ("engine", "on", "loads", "needs", "to know")
        keep = [c for c in range(len(columns)) if c < 3 or any(row[c] for row in rows)]
        shown.append(
            Table(
                "Loads in",
                f"Format {found.format}, {found.architecture}. From config.json and tensor headers.",
                [columns[c] for c in keep],
                [[row[c] for c in keep] for row in rows],
            )
        )
    shown.append(Listing("What next", "Commands for this checkpoint.", "\n".join(_next(sources))))
    return Section("use", "Use", "", shown)


def _next(sources: Sources) -> list[str]:
    here, parent = sources.command_path, sources.parent_path
    lines = []
    if not any(text(data, "baseline") for data in sources.evaluations.values()):
        lines += ["# what was lost against the parent", f"pq eval {here} --baseline {parent}"]
    if not sources.tasks:
        lines += ["# lm-eval's tasks", f"pq eval {here} --baseline {parent} --tasks arc_easy,piqa"]
    lines += ["# is it what the conversion wrote", f"pq verify {here} --parent {parent}"]
    lines += ["# how to start it, in which engine, on which GPUs", f"pq serve-check {here}"]
    lines += ["# guard its accuracy in CI", f"pq gate init {here} --baseline {parent}"]
    return lines


def made_by(sources: Sources) -> list[Item]:
    """The command that converted: as its log has it, else as pq.json lets it be written."""
    argv = [word for word in items(sources.started, "argv") if isinstance(word, str)]
    if argv:
        cwd = text(sources.started, "cwd")
        caption = f"As it was given{f', in {cwd}' if cwd else ''}."
        return [Listing("Command", caption, shlex.join(["pq", *argv]))]
    command = f"pq convert --model {sources.parent_path} {_recipe(sources)} "
    command += f"--output {sources.new_path}"
    calibration = mapping(sources.provenance, "calibration")
    options = {"dataset": "--dataset", "nsamples": "--nsamples", "seqlen": "--seqlen"}
    for key, option in {**options, "seed": "--seed"}.items():
        if value := text(calibration, key):
            command += f" {option} {shlex.quote(value)}"
    return [Listing("Command", "Written from pq.json: there is no log of the command.", command)]


def _recipe(sources: Sources) -> str:
    name = text(mapping(sources.provenance, "recipe"), "name", "RECIPE")
    return f"--recipe {shlex.quote(name)}"
