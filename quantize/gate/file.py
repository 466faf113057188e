"""Gate files: the accuracy that each recipe must reach on one model. Every
mistake in a file is one line.

`value` with `tolerance` is a figure measured before; the tolerance is in the metric's
unit, in percent of the value, or in standard errors (`3 se`) of which `stderr` is one.
`recovery` is the least share of the parent's accuracy: model / parent, or parent /
model where lower is better.
`protocol` of an entry names the one under which its values were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import RecipeError, UsageError
from quantize.evaluation.protocols import Protocol
from quantize.files import strict_yaml
from quantize.files.problems import Place, error_of, no_mapping, show_value
from quantize.files.strict_yaml import Document
from quantize.gate.checks import HIGHER_IS_BETTER, ROLLING_ONLY, WITH_PARENT, Check, Unit
from quantize.gate.entries import Entry, GateFile, Settings
from quantize.gate.fields import (
    CHECK,
    CHECKPOINT,
    ENTRY,
    ERRORS,
    EVALUATION,
    PERCENT,
    TEXT,
    TOP,
    Test,
    close,
)
from quantize.recipe.files import shipped_recipes
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Calibration, Recipe, load_recipe


def load_gate(path: Path) -> GateFile:
    """Read a gate file. Raises RecipeError with a line
    `file:line: path: problem; remedy` for each problem."""
    return parse_gate(read_gate(path), path)


def read_gate(path: Path) -> bytes:
    """Return the bytes of a gate file; RecipeError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(strict_yaml.MAX_BYTES + 1)
    except OSError as err:
        raise RecipeError(
            f"{path}: cannot be read: {err.strerror}; give the path of a gate file",
        ) from None


def parse_gate(raw: bytes, path: Path) -> GateFile:
    """Parse and validate the text of the gate file at `path`, whose folder
    relative paths in it start from."""
    doc = strict_yaml.load(raw, str(path))
    if not isinstance(doc.data, dict):
        text = no_mapping(doc.data, "begin with 'recipes:'")
        raise error_of(doc.source, doc.problems or [doc.problem((), text)])
    reader = _Reader(doc, path.parent)
    gate = reader.gate(path)
    if reader.problems:
        raise error_of(doc.source, reader.problems)
    return gate


class _Reader:
    """Reads the parts of one file and collects what is wrong with them."""

    def __init__(self, doc: Document, folder: Path) -> None:
        self.doc, self.folder = doc, folder
        self.problems = list(doc.problems)

    def say(self, path: Place, text: str) -> None:
        """Note a problem, unless the value at `path` is refused already."""
        if not any(path[:n] in self.doc.spoiled for n in range(len(path) + 1)):
            self.problems.append(self.doc.problem(path, text))

    def fields(
        self,
        path: Place,
        data: Mapping[str, Any],
        table: Mapping[str, Test],
    ) -> dict[str, Any]:
        """Return the values of a mapping that pass their tests; unknown keys are problems."""
        good: dict[str, Any] = {}
        for key, value in data.items():
            if key not in table:
                self.say(
                    (*path, key),
                    f"unknown field; {close(key, table)}the fields are {', '.join(table)}",
                )
            elif not table[key][0](value):
                self.say((*path, key), f"must be {table[key][1]} (value {show_value(value)})")
            else:
                good[key] = value
        return good

    def gate(self, path: Path) -> GateFile:
        top = self.fields((), self.doc.data, TOP)
        if not {"recipes", "checkpoints"} & set(self.doc.data):
            remedy = "add 'recipes: {NAME: {METRIC: {value: ..., tolerance: ...}}}'"
            self.say((), f"'recipes' is missing; {remedy}, or 'checkpoints' with folders as names")
        settings = self.settings(top.get("evaluation", {}))
        # Other values are the recipe's to judge, when it takes them up.
        known: dict[str, Test] = dict.fromkeys(Calibration.model_fields, (lambda v: True, ""))
        known["dataset"] = TEXT
        calibration = self.fields(("calibration",), top.get("calibration", {}), known)
        if "dataset" in calibration:
            calibration["dataset"] = self.beside(calibration["dataset"])
        tasks = tuple(self.task(name) for name in top.get("tasks", []))
        entries: list[Entry | None] = []
        for name, data in top.get("checkpoints", {}).items():
            if name in top.get("recipes", {}):
                self.say(("checkpoints", name), "is a recipe's name as well; give it another")
            entries.append(self.entry(("checkpoints", name), data, {}, settings, bool(tasks)))
        for name, data in top.get("recipes", {}).items():
            entries.append(self.entry(("recipes", name), data, calibration, settings, bool(tasks)))
        return GateFile(
            path=path,
            model=self.folder / top["model"] if "model" in top else None,
            evaluation=settings,
            tasks=tasks,
            task_limit=top.get("task_limit"),
            entries=tuple(entry for entry in entries if entry),
            document=self.doc,
        )

    def settings(self, data: Mapping[str, Any]) -> Settings:
        values = self.fields(("evaluation",), data, EVALUATION)
        if "dataset" in values:
            values["dataset"] = self.beside(values["dataset"])
        settings = Settings(**values)
        try:
            Protocol(settings.protocol, settings.seqlen, settings.context)
        except UsageError as err:
            self.say(("evaluation", "context"), str(err))
        if settings.protocol == "rolling" and settings.bos != "auto":
            self.say(
                ("evaluation", "bos"),
                f"{settings.bos} belongs to the strided protocol; remove it",
            )
        return settings

    def entry(
        self,
        path: tuple[str, str],
        data: Any,
        calibration: Mapping[str, Any],
        settings: Settings,
        tasks: bool,
    ) -> Entry | None:
        fields = CHECKPOINT if path[0] == "checkpoints" else ENTRY
        if not isinstance(data, dict):
            self.say(
                path,
                f"must be a mapping (value {show_value(data)}); write 'METRIC: {{recovery: 0.95}}'",
            )
            return None
        own = self.fields(
            path,
            {key: value for key, value in data.items() if key in fields},
            fields,
        )
        metrics = [metric for metric in data if metric not in fields]
        if not metrics:
            self.say(
                path,
                "checks nothing; add a metric, such as 'kld_mean: {value: ..., tolerance: 20%}'",
            )
        checks = [
            check
            for metric in metrics
            if self.metric((*path, metric), metric, fields, settings, tasks)
            for check in self.checks((*path, metric), metric, data[metric])
        ]
        if fields is CHECKPOINT:
            folder = own.get("folder", path[1])
            return Entry(path[1], None, tuple(checks), own.get("protocol"), folder)
        recipe = self.recipe(path, own, calibration)
        return Entry(path[1], recipe, tuple(checks), own.get("protocol")) if recipe else None

    def recipe(
        self,
        path: tuple[str, str],
        own: Mapping[str, Any],
        calibration: Mapping[str, Any],
    ) -> Recipe | None:
        shipped = {file.stem: str(file) for file in shipped_recipes()}
        wanted = own.get("recipe", path[1])
        where = (*path, "recipe") if "recipe" in own else path
        try:
            recipe = load_recipe(shipped.get(wanted) or self.beside(wanted))
        except RecipeError as err:
            for line in str(err).splitlines():
                self.say(
                    where,
                    line if "recipe" in own else f"{line}; or name a file with 'recipe: FILE'",
                )
            return None
        try:
            recipe = recipe.with_overrides(**calibration)
        except UsageError as err:
            for key, _, text in (line.partition(": ") for line in str(err).splitlines()):
                self.say(("calibration", key), text)
        try:
            return with_stage_fields(recipe, own.get("set", []))
        except UsageError as err:
            self.say((*path, "set"), str(err))
            return None

    def metric(
        self,
        path: Place,
        metric: str,
        fields: Mapping[str, Test],
        settings: Settings,
        tasks: bool,
    ) -> bool:
        if "/" in metric:
            if not tasks:
                self.say(
                    path,
                    "is a task's metric, but the file names no tasks; add 'tasks: [...]'",
                )
            return tasks
        if metric not in HIGHER_IS_BETTER:
            hint = close(metric, (*HIGHER_IS_BETTER, *fields))
            known = f"{', '.join(HIGHER_IS_BETTER)}, and TASK/METRIC"
            self.say(path, f"unknown metric; {hint}the metrics are {known}")
        elif metric in ROLLING_ONLY and settings.protocol != "rolling":
            self.say(
                path,
                "only the rolling protocol gives it; write 'protocol: rolling' under 'evaluation'",
            )
        return metric in HIGHER_IS_BETTER

    def checks(self, path: Place, metric: str, data: Any) -> list[Check]:
        remedy = "write {value: ..., tolerance: ...} or {recovery: ...}"
        if not isinstance(data, dict):
            self.say(path, f"must be a mapping (value {show_value(data)}); {remedy}")
            return []
        good = self.fields(path, data, CHECK)
        if not data or ("tolerance" in data and "value" not in data):
            self.say(path, f"'value' is missing; {remedy}")
        if "value" in data and "tolerance" not in data:
            self.say(
                path,
                "'tolerance' is missing; add 'tolerance: 20%', or 0 for a figure that never varies",
            )
        out: list[Check] = []
        if "value" in good and "tolerance" in good:
            share = PERCENT.fullmatch(str(good["tolerance"]))
            errors = ERRORS.fullmatch(str(good["tolerance"]))
            found = share or errors
            amount = float(found[1] if found else good["tolerance"])
            stderr = float(good["stderr"]) if "stderr" in good else None
            unit: Unit = "percent" if share else "se" if errors else "metric"
            if unit == "se" and "stderr" not in data:
                self.say(
                    (*path, "tolerance"),
                    "is in standard errors, but 'stderr' is missing; add 'stderr: ...', one "
                    "standard error of the value",
                )
            out.append(Check(metric, "value", float(good["value"]), amount, unit, stderr))
        if "recovery" in good:
            if "/" not in metric and metric not in WITH_PARENT:
                self.say(
                    (*path, "recovery"),
                    f"{metric} is no figure of the parent; write value and tolerance",
                )
            out.append(Check(metric, "recovery", float(good["recovery"])))
        return out

    def beside(self, name: str) -> str:
        """Return the path of the file of this name beside the gate file, else the name itself."""
        there = self.folder / name
        return str(there) if name != "builtin" and there.is_file() else name

    def task(self, name: str) -> str:
        template, colon, file = name.partition(":")
        return f"{template}:{self.beside(file)}" if colon else self.beside(name)
