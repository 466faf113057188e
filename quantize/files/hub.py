"""Models and data sets on the Hugging Face Hub: which commit a name means, and a model's files.

`huggingface_hub` does the transfers; a file that is whole in its cache is never fetched again.
"""

from __future__ import annotations

import importlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from quantize.errors import ModelError, OutputError, PqError
from quantize.files.checkpoint import INDEX_NAME, SINGLE_NAME, read_json
from quantize.files.hub_origin import HubOrigin
from quantize.files.hub_problems import is_final, is_offline, reason_of
from quantize.files.needed import NOT_NEEDED, SIDE_FILES, is_side_file

Say = Callable[[str], None]
"""Called with a line for people."""
_OTHER_WEIGHTS = (".bin", ".gguf", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx")


def fetch(name: str, revision: str | None, say: Say, bars: bool = False) -> Path:
    """The folder in the Hub's cache that holds what is needed of a model at one commit.

    name: org/name. revision: branch, tag or commit; None: the main branch. say: told what will be
    fetched, and where the cache stands in for a Hub that cannot be asked. bars: whether to show
    progress bars on stderr.
    Raises ModelError for what cannot be had, OutputError where the disk refuses.
    """
    from huggingface_hub import HfApi, constants

    patience = constants.HF_HUB_ETAG_TIMEOUT  # seconds, which HF_HUB_ETAG_TIMEOUT sets
    with library(bars):
        try:
            info = HfApi().model_info(
                name, revision=revision, files_metadata=True, timeout=patience
            )
        except Exception as err:  # unrelated classes, of several HTTP libraries
            return _without_hub(name, revision, err, say)
        origin = HubOrigin(name, str(info.sha))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        with _explained(name, revision):
            return _fetch(origin, revision, sizes, say)


def dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit that a data set's revision means now; raises what huggingface_hub does."""
    from huggingface_hub import HfApi, constants

    patience = constants.HF_HUB_ETAG_TIMEOUT
    with library(bars=False):
        return HfApi().dataset_info(name, revision=revision, timeout=patience).sha


def _fetch(origin: HubOrigin, revision: str | None, sizes: Mapping[str, int], say: Say) -> Path:
    """Fetch what is needed of a commit whose files have these sizes in bytes."""
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

    names = {name for name in sizes if is_side_file(name)}
    if SINGLE_NAME in sizes:  # transformers reads it, whatever an index says
        names = (names | {SINGLE_NAME}) - {INDEX_NAME}
    elif INDEX_NAME in sizes:
        index = Path(hf_hub_download(origin.id, INDEX_NAME, revision=origin.commit))
        names |= _shards(origin, index, sizes)
    elif "adapter_config.json" not in sizes:
        raise _no_weights(origin, sizes)
    if not {"config.json", "adapter_config.json"} & names:  # of an adapter its folder tells more
        raise ModelError(
            f"{origin}: its repository has no config.json, so that transformers loads no model from "
            "it; give another revision or repository"
        )
    missing = {
        name: sizes[name]
        for name in names
        if not isinstance(try_to_load_from_cache(origin.id, name, revision=origin.commit), str)
    }
    if missing:
        _require_room(origin, sum(missing.values()))
        rest = [size for name, size in sizes.items() if name not in names]
        what = f"fetches {files_of(missing.values())}"
        left = f"; {files_of(rest)} of its repository are not needed" if rest else ""
        say(f"{origin}: {what}{left}")
    # A pattern that is a name: nothing in it stands for other characters.
    wanted = [escape(name) for name in sorted(names)]
    # By the revision, not by the commit: the cache then knows what the revision meant.
    folder = Path(snapshot_download(origin.id, revision=revision, allow_patterns=wanted))
    if folder.name == origin.commit:
        return folder
    # The branch has moved on meanwhile.
    return Path(snapshot_download(origin.id, revision=origin.commit, allow_patterns=wanted))


def _shards(origin: HubOrigin, index: Path, sizes: Mapping[str, int]) -> set[str]:
    """The files with weights that the index names; all of them must be in the repository."""
    where = read_json(index).get("weight_map")
    shards = set(where.values()) if isinstance(where, dict) else set()
    if lacking := sorted(str(shard) for shard in shards if shard not in sizes):
        raise ModelError(
            f"{origin}: its {INDEX_NAME} names {lacking[0]}, which the repository lacks; give "
            "another revision"
        )
    return shards


def _no_weights(origin: HubOrigin, sizes: Mapping[str, int]) -> ModelError:
    if theirs := sorted(name for name in sizes if name.endswith(".safetensors")):
        return ModelError(
            f"{origin}: has {theirs[0]}, but neither {SINGLE_NAME} nor {INDEX_NAME}, which "
            "transformers would load; give another revision or repository"
        )
    others = sorted(name for name in sizes if name.endswith(_OTHER_WEIGHTS))
    if not others:
        return ModelError(f"{origin}: its repository holds no weights; give another revision")
    return ModelError(
        f"{origin}: its weights are not in safetensors ({others[0]}), and others are not read; "
        "give a revision or a repository that has them so"
    )


def _require_room(origin: HubOrigin, wanted: int) -> None:
    """OutputError where the disk of the Hub's cache has no room for so many bytes."""
    folder = _cache()
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise OutputError(
            f"{folder}: {origin} takes {size_of(wanted)} and {size_of(free)} are free; free some, or "
            "set HF_HOME to a folder with more room"
        )


def _without_hub(name: str, revision: str | None, err: Exception, say: Say) -> Path:
    """The commit in the cache that a revision meant when the Hub was last asked; ModelError where
    there is none, or the Hub says that there is no such revision."""
    reason = reason_of(name, revision, err)
    folder = None if is_final(err) else _cached(name, revision)
    if folder is None:
        raise ModelError(f"{_asked(name, revision)}: {reason}") from None
    if not is_offline(err):
        say(f"{_asked(name, revision)}: {reason}; goes on with {folder.name[:7]} from {_cache()}")
    return folder


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder in the cache, None unless all is there that is needed, as far as can be told."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    ignored = ["*/*", INDEX_NAME, *NOT_NEEDED]
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(SIDE_FILES),
                ignore_patterns=ignored,
            )
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    if (folder / SINGLE_NAME).exists():
        return folder
    if not (folder / INDEX_NAME).exists():
        return None
    where = read_json(folder / INDEX_NAME).get("weight_map")
    shards = set(where.values()) if isinstance(where, dict) else set()
    return folder if all((folder / str(shard)).exists() for shard in shards) else None


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises while it fetches into OutputError where the disk refuses, else
    into ModelError."""
    try:
        yield
    except PqError:
        raise
    except Exception as err:
        if isinstance(err, OSError) and err.errno is not None and not hasattr(err, "response"):
            raise OutputError(
                f"{_cache()}: {err.strerror}; the Hub's cache must be writable: free some, or set "
                "HF_HOME to another folder"
            ) from None
        raise ModelError(f"{_asked(name, revision)}: {reason_of(name, revision, err)}") from None


def _asked(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextmanager
def library(bars: bool) -> Iterator[None]:
    """Let huggingface_hub show progress bars or not, and keep its advice off the terminal."""
    import huggingface_hub

    utils: Any = importlib.import_module("huggingface_hub.utils")  # no attribute until imported
    logger = logging.getLogger("huggingface_hub")
    level, off = logger.level, utils.are_progress_bars_disabled()
    # HF_HUB_DISABLE_PROGRESS_BARS has the last word
    ours = huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is None

    def show(shown: bool) -> None:
        if ours:
            (utils.enable_progress_bars if shown else utils.disable_progress_bars)()

    logger.setLevel(logging.ERROR)
    show(bars)
    try:
        yield
    finally:
        logger.setLevel(level)
        show(not off)


def files_of(sizes: Any) -> str:
    """How many files of these sizes, and what they come to."""
    found = list(sizes)
    return f"{len(found)} file{'s' if len(found) != 1 else ''}, {size_of(sum(found))}"


def size_of(n: float) -> str:
    """Bytes in words."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} bytes"
