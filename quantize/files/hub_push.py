"""A folder of files as one commit of a model on the Hugging Face Hub.

`huggingface_hub` does the transfers. Nothing is changed there before it is known that the user may
write, and that nothing of others would be replaced.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import OutputError, PqError, UsageError
from quantize.files.hub import library
from quantize.files.hub_problems import is_offline, push_reason_of

_INITIAL = ".gitattributes"
"""What the Hub itself puts into a new repository."""
_STALE = (".safetensors", ".gguf", ".bin", ".index.json")
"""Endings of files that a loader would take for the model's: of an earlier upload they must go."""


@dataclass(frozen=True)
class Pushed:
    """What is there now."""

    url: str
    commit: str
    private: bool
    removed: tuple[str, ...]
    """Weights of an earlier upload that are no part of this one."""


def require_id(name: str) -> None:
    """UsageError for what is no org/name that the Hub would take."""
    from huggingface_hub.errors import HFValidationError

    utils: Any = importlib.import_module("huggingface_hub.utils")  # no attribute until imported
    try:
        utils.validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(
            f"{name[:100]}: is no name on the Hub; write org/name (letters, digits, -, _, .)"
        )


def address_of(name: str) -> str:
    """Where the model's page is."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def push(
    name: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    private: bool = False,
    update: bool = False,
    say: Callable[[str], None] = lambda line: None,
    bars: bool = False,
) -> Pushed:
    """Upload files (path in the repository → file or content) to org/name in one commit.

    private: whether a new repository is. update: whether one that holds files already may be
    changed. say: told what is done. bars: whether to show progress bars on stderr.
    Raises OutputError, a line with the remedy, where the Hub or the network does not allow it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    api = HfApi()
    try:
        with library(bars):
            there = _files_there(api, name)
            if get_token() is None:
                raise OutputError(
                    f"{name}: there is no token; log in with `hf auth login` or set HF_TOKEN, to one "
                    "that may write"
                )
            if there is None:
                say(f"{name}: makes a {'private' if private else 'public'} repository")
                api.create_repo(name, private=private, repo_type="model")
            held = sorted(set(there.files) - {_INITIAL}) if there else []
            if held and not update:
                raise OutputError(
                    f"{name}: exists and holds {len(held)} files ({held[0]}, …); give another name, "
                    "or --update to put these files there in a new commit"
                )
            gone = [path for path in held if path.endswith(_STALE) and path not in files]
            operations: list[Any] = [CommitOperationDelete(path) for path in gone]
            operations += [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in files.items()
            ]
            found = api.create_commit(name, operations, commit_message=message)
    except PqError:
        raise
    except Exception as err:  # unrelated classes, of several HTTP libraries
        raise OutputError(f"{name}: {push_reason_of(name, err)}") from None
    shown = there.private if there else private
    return Pushed(address_of(name), str(found.oid), shown, tuple(gone))


@dataclass(frozen=True)
class _There:
    files: tuple[str, ...]
    private: bool


def _files_there(api: Any, name: str) -> _There | None:
    """What a repository holds; None where there is none that may be read."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(name)
    except RepositoryNotFoundError as err:
        if is_offline(err):
            raise
        return None
    return _There(tuple(file.rfilename for file in info.siblings or ()), bool(info.private))
