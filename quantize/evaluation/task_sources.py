"""What `--tasks` names: offline templates filled with a local file, task files,
tasks of lm-eval's library."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import DataError, PqError, UsageError
from quantize.files import strict_yaml
from quantize.files.resources import data_dir

_HOW = (
    "name a task of lm-eval (for example arc_easy), a task file (path/to/task.yaml), "
    "or an offline one as TEMPLATE:FILE with TEMPLATE among"
)


class Rows(list[dict[str, Any]]):
    """Documents of one file in the form lm-eval expects of a data set: a
    list that knows its columns."""

    @property
    def features(self) -> dict[str, str]:
        """Names of the columns; their types are of no use to lm-eval."""
        return dict.fromkeys(self[0], "") if self else {}


@dataclass(frozen=True)
class Source:
    """One entry of `--tasks`."""

    wanted: str
    """As the user wrote it."""
    name: str
    """Of its results; for a task file or a name of the library lm-eval may
    report several, other names."""
    config: dict[str, Any] | None = None
    """lm-eval's configuration of an offline task."""
    rows: Rows | None = None
    path: Path | None = None
    """The local file: documents of an offline task, else the task file."""
    sha256: str | None = None


def resolve(tasks: Sequence[str]) -> list[Source]:
    """Read every local file that `tasks` names, before any model is loaded;
    nothing here touches the network.

    UsageError for unknown names and for two results of one name, DataError (with the
    line) for files that do not fit.
    """
    if not tasks:
        raise UsageError(f"no task given; {_how()}")
    sources = [_source(task) for task in tasks]
    first: dict[str, str] = {}
    for source in sources:
        if source.name in first:
            raise UsageError(
                f"tasks {first[source.name]} and {source.wanted} would both report as "
                f"{source.name!r}; run them one at a time or rename a file"
            )
        first[source.name] = source.wanted
    return sources


def templates() -> dict[str, Path]:
    """Return the offline templates of eval/tasks/ by name."""
    return {path.stem: path for path in sorted((data_dir("eval") / "tasks").glob("*.yaml"))}


def _how() -> str:
    return f"{_HOW} {', '.join(templates())}"


def _source(task: str) -> Source:
    template, colon, file = task.partition(":")
    if colon and template in templates():
        return _offline(task, template, Path(file).expanduser())
    path = Path(task).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise DataError(f"{task}: no such task file; {_how()}")
        return Source(
            task, path.stem, path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
    if colon or path.suffix in (".jsonl", ".txt") or "/" in task:
        close = difflib.get_close_matches(template, templates(), n=1) if colon else []
        hint = f"did you mean {close[0]}:{file}? " if close else ""
        raise UsageError(f"task {task}: {hint}{_how()}")
    if task not in library().all_tasks:
        close = difflib.get_close_matches(task, [*library().all_tasks, *templates()], n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"unknown task {task!r}; {hint}{_how()}")
    return Source(task, task)


@functools.cache
def library() -> Any:
    """lm-eval's index of its own tasks; it reads thousands of small files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _offline(task: str, template: str, path: Path) -> Source:
    try:
        data = path.read_bytes()
    except OSError as err:
        raise DataError(
            f"task {task}: {path} cannot be read ({err.strerror}); check the path"
        ) from None
    config = strict_yaml.load(templates()[template].read_bytes(), template).data
    fields: dict[str, str] = config["metadata"].pop("fields")
    rows = Rows(_rows(path, data, fields))
    if not rows:
        raise DataError(f"{path} holds no documents; {template} needs lines of {_example(fields)}")
    config["task"] = path.stem
    return Source(task, path.stem, config, rows, path, hashlib.sha256(data).hexdigest())


def _rows(path: Path, data: bytes, fields: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        bad = data.count(b"\n", 0, err.start) + 1
        raise DataError(
            f"{path} line {bad}: not UTF-8 ({err.reason}); convert the file to UTF-8"
        ) from None
    if path.suffix == ".txt" and fields == {"text": "text"}:
        yield {"text": _text(text, str(path))}
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; each line is {_example(fields)}")
        if missing := [name for name in fields if name not in row]:
            raise DataError(f"{where}: no field {missing[0]!r}; each line is {_example(fields)}")
        # Other fields are left out: they are of no use, and results need not repeat them.
        yield {
            name: _CHECKS[kind](row[name], f"{where}, field {name!r}", row)
            for name, kind in fields.items()
        }


def _example(fields: Mapping[str, str]) -> str:
    shown = {"text": '"…"', "words": '"…"', "texts": '["…", "…"]', "index": "0"}
    return "{" + ", ".join(f'"{name}": {shown[kind]}' for name, kind in fields.items()) + "}"


def _text(value: object, where: str, row: Mapping[str, Any] | None = None) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: give text that is not blank")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair is no text; repair the line") from None
    return value


def _words(value: object, where: str, row: Mapping[str, Any] | None = None) -> str:
    # else the last word, which is the one to predict, would be empty
    text = _text(value, where).rstrip()
    if " " not in text.strip():
        raise DataError(
            f"{where}: the last word is predicted from those before it, so give at least two words"
        )
    return text


def _texts(value: object, where: str, row: Mapping[str, Any] | None = None) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where}: give a list of at least two texts")
    return [_text(text, where) for text in value]


def _index(value: object, where: str, row: Mapping[str, Any]) -> int:
    choices = row.get("choices", ())
    if type(value) is not int or not 0 <= value < len(choices):
        raise DataError(f"{where}: give the index of the right choice, 0 to {len(choices) - 1}")
    return value


_CHECKS: dict[str, Callable[[Any, str, Mapping[str, Any]], Any]] = {
    "text": _text,
    "words": _words,
    "texts": _texts,
    "index": _index,
}
"""Kinds of fields that a template's metadata may name."""


def load_tasks(sources: Sequence[Source]) -> dict[str, Any]:
    """Build lm-eval's tasks: {"tasks": …, "groups": …}, as its `evaluate` takes them.

    Only names of its library may need the network. DataError names the task that
    cannot be loaded and says why.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for source in sources:
        for kind, found in _load(source).items():
            if doubled := set(found) & set(loaded[kind]):
                raise UsageError(
                    f"task {source.wanted} holds {min(doubled)}, which another task holds too"
                )
            loaded[kind].update(found)
    return loaded


def _load(source: Source) -> dict[str, Any]:
    if source.rows is not None:
        return {"tasks": {source.name: _offline_task(source)}}
    try:
        return _from_lm_eval(source)
    except PqError:
        raise
    # Python code of tasks, HTTP libraries and parsers of data files raise classes of every kind.
    except Exception as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split())[:300].rstrip(". ")
        if source.path is not None:
            raise DataError(f"task file {source.path}: lm-eval cannot load it ({reason})") from err
        raise DataError(
            f"task {source.name}: its data cannot be loaded from the Hugging Face Hub ({reason}). "
            "Check the network, or use a local file as TEMPLATE:FILE with TEMPLATE among "
            f"{', '.join(templates())}"
        ) from err


def _from_lm_eval(source: Source) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    spec: Any = source.name
    if source.path is None:
        manager = library()
    else:
        spec = str(source.path)
        manager = TaskManager(include_defaults=False)
        if re.search(r"^group\s*:", source.path.read_text(encoding="utf-8"), re.MULTILINE):
            raise DataError(
                f"task file {source.path} holds a group; give the files of its tasks instead"
            )
    found: dict[str, Any] = manager.load([spec])
    return {key: found[key] for key in ("tasks", "groups") if key in found}


def _offline_task(source: Source) -> Any:
    from lm_eval.api.task import ConfigurableTask

    class OfflineTask(ConfigurableTask):  # type: ignore[misc]
        """A task whose documents are already read; the data sets library, its cache
        and the Hub stay out of it."""

        def download(self, *args: Any, **kwargs: Any) -> None:
            self.dataset = {"test": source.rows}

    return OfflineTask(config=dict(source.config or {}))
