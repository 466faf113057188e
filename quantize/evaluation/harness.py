"""Tasks of lm-eval on a plain or packed model, whose packed layers compute
as the serving kernel does."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantize.calibration.bos import Bos, bos_of
from quantize.calibration.fit import warn_of_tokenizer, warn_without_bos
from quantize.errors import DataError, ModelError, UsageError
from quantize.evaluation.sharing import require_alike
from quantize.evaluation.task_results import TaskRun, figures_of, make_folder, write_samples
from quantize.evaluation.task_sources import Source, load_tasks, resolve
from quantize.files.hub_origin import called, commit_of
from quantize.model.attention_cache import CacheNumerics
from quantize.model.linear import Numerics
from quantize.model.load_others import load_any
from quantize.model.tokenizer import load_tokenizer
from quantize.parallel.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SEED, _TORCH_SEED, _FEWSHOT_SEED = 0, 1234, 1234  # those of lm-eval


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: str = "auto",
    apply_chat_template: bool = False,
    log_samples: Path | None = None,
    model_args: Mapping[str, str] = {},
    bos: Bos = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = "kernel",
    attention: CacheNumerics | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ranks: Ranks = ALONE,
) -> TaskRun:
    """Score a model folder on tasks of lm-eval.

    tasks: names of lm-eval's library (only these may need the network), task files (.yaml; Python
    functions that such a file names are run), or TEMPLATE:FILE with a template of eval/tasks/ and
    a local .jsonl or .txt file.
    num_fewshot: examples before each question; None: as the task says. limit: first
    documents of each task, or a
    fraction below 1. batch_size: requests at once, or `auto` for as many as memory holds.
    log_samples: folder for samples_TASK.jsonl, what lm-eval knows of each document.
    model_args: arguments of lm-eval's HFLM; `dtype` and `numerics` override
    the parameters of that name.
    bos: whether texts begin with BOS; auto: where the tokenizer adds it. What stands before the first
    token of a text that nothing stands before is lm-eval's to say.
    ranks: divide the batches among themselves; all of them return what one process
    would, the first writes samples.
    Logits are taken to float32 before the softmax. Seeds are set as lm-eval sets
    them. Raises PqError subclasses.
    """
    with _quiet(), ranks.explain():
        task_model, task_arguments = _lm_eval_modules()
        rest, dtype, numerics = _overrides(dict(model_args), dtype, numerics)
        options = task_arguments.model_options(rest, ("dtype", "numerics"))
        if bos != "auto" and "add_bos_token" in options:
            raise UsageError(f"bos {bos} and the model argument add_bos_token: give one of them")
        batch, limit = _check_numbers(batch_size, num_fewshot, limit)
        place = device or torch.device("cpu")
        _seed()
        sources = resolve(tasks)
        told: dict[str, Any] = {
            "dtype": str(dtype),
            "numerics": numerics,
            "attention": str(attention),
        }
        told |= {
            "tasks": [[s.wanted, s.sha256] for s in sources],
            "few-shot examples": num_fewshot,
            "limit": limit,
        }
        told |= {
            "batch size": batch_size,
            "chat template": apply_chat_template,
            "model arguments": rest,
            "bos": bos,
        }
        require_alike(ranks, place, [folder], told, "lm_eval")
        loaded = load_tasks(sources)
        _prepare(loaded, sources, num_fewshot)
        if log_samples is not None and ranks.first:
            make_folder(log_samples)
        tokenizer = _tokenizer(folder, apply_chat_template)
        begins = bos_of(tokenizer, bos)
        if ranks.first:
            warn_without_bos(tokenizer, bos)
        if bos != "auto":
            options["add_bos_token"] = bos == "always"
        model = load_any(folder, place, dtype, numerics, attention)
        lm = task_model.TaskModel(
            model, tokenizer, batch, progress, ranks, begins if bos == "always" else None, **options
        )
        if ranks.first:
            warn_of_tokenizer(tokenizer, lm.vocab)
        results = _evaluate(lm, loaded, limit, apply_chat_template, folder)
        if log_samples is not None and ranks.first:
            write_samples(log_samples, results["samples"])
    if lm.truncated:
        log.warning(
            "%d requests were longer than %d tokens and were cut from the left",
            lm.truncated,
            lm.max_length,
        )
    return TaskRun(
        model=called(folder),
        model_commit=commit_of(folder),
        limit=limit,
        chat_template=apply_chat_template,
        model_args=dict(model_args),
        bos_token_id=None if options.get("add_bos_token") is False else begins,
        max_length=lm.max_length,
        truncated=lm.truncated,
        numerics=numerics,
        dtype=str(dtype).removeprefix("torch."),
        versions={
            name: importlib.metadata.version(name) for name in ("lm_eval", "torch", "transformers")
        },
        files={
            s.name: {"task": s.wanted, "sha256": s.sha256} for s in sources if s.sha256 is not None
        },
        **figures_of(results),
    )


def _lm_eval_modules() -> tuple[Any, Any]:
    try:
        from lm_eval.tasks import TaskManager

        TaskManager.load  # noqa: B018 - absent from older releases
        from quantize.evaluation import task_arguments, task_model
    # Releases of lm-eval that are too old for transformers 5 fail with AttributeError as well.
    except (ImportError, AttributeError) as err:
        raise UsageError(
            f"tasks need lm-eval 0.4.12 or later ({' '.join(str(err).split())[:200]}); "
            "install it with: pip install -U 'lm-eval>=0.4.12'"
        ) from err
    return task_model, task_arguments


class _ToLog(io.TextIOBase):
    def write(self, text: str) -> int:
        if text.strip():
            log.debug("%s", text.rstrip())
        return len(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what lm-eval prints to the log, and show neither its progress bars nor its advice.

    Standard output belongs to the caller, who may print JSON there.
    """
    bar = importlib.import_module("tqdm.std").tqdm
    draw = bar.__init__

    @functools.wraps(draw)
    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        draw(self, *args, **(kwargs | {"disable": True}))

    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")}
    levels = {name: logger.level for name, logger in loggers.items()}
    bar.__init__ = hidden
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(_ToLog()):
            yield
    finally:
        bar.__init__ = draw
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _overrides(
    arguments: dict[str, str], dtype: torch.dtype, numerics: Numerics
) -> tuple[dict[str, str], torch.dtype, Numerics]:
    """Take `dtype` and `numerics` out of the model arguments: (the other
    arguments, dtype, numerics)."""
    name = arguments.pop("dtype", None)
    if name is not None and name not in _DTYPES:
        raise UsageError(f"model argument dtype={name}: choose among {', '.join(_DTYPES)}")
    choice = arguments.pop("numerics", numerics)
    if choice not in ("kernel", "stock"):
        raise UsageError(f"model argument numerics={choice}: choose kernel or stock")
    return arguments, _DTYPES[name] if name else dtype, "kernel" if choice == "kernel" else "stock"


def _check_numbers(
    batch_size: str, num_fewshot: int | None, limit: int | float | None
) -> tuple[int | None, int | float | None]:
    """Return (requests at once or None for auto, limit); UsageError for
    numbers that mean nothing."""
    if batch_size != "auto" and not re.fullmatch(r"0*[1-9][0-9]{0,6}", batch_size):
        raise UsageError(f"batch size {batch_size}: give auto or a positive whole number")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"few-shot examples {num_fewshot}: give zero or more")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise UsageError(
            f"limit {limit}: give a positive whole number of documents or a fraction below 1"
        )
    limit = int(limit) if limit is not None and limit >= 1 else limit
    return None if batch_size == "auto" else int(batch_size), limit


def _tokenizer(folder: Path, chat_template: bool) -> Any:
    tokenizer = load_tokenizer(folder)
    if chat_template and not tokenizer.chat_template:
        raise DataError(f"{folder}: its tokenizer has no chat template; run without one")
    return tokenizer


def _seed() -> None:
    # Tasks may shuffle choices as they load: two models must see the same order.
    random.seed(_SEED)
    importlib.import_module("numpy").random.seed(_TORCH_SEED)
    torch.manual_seed(_TORCH_SEED)


def _prepare(loaded: Mapping[str, Any], sources: Sequence[Source], num_fewshot: int | None) -> None:
    """Set the number of examples, as lm-eval does: a task that fixes it to
    0 in its file keeps that."""
    rows = {source.name: len(source.rows) for source in sources if source.rows is not None}
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        name, shots = task.config.task, task.get_config("num_fewshot")
        if shots and name in rows and shots >= rows[name]:
            raise UsageError(
                f"task {name}: {shots} few-shot examples and one question need more than "
                f"{rows[name]} lines"
            )


def _evaluate(
    lm: Any, loaded: Mapping[str, Any], limit: int | float | None, chat_template: bool, folder: Path
) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    try:
        results: dict[str, Any] = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,  # standard errors are made in task_scores: exact and at once
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=False,
        )
    except OverflowError:
        raise ModelError(
            f"{folder}: its perplexity is too large for a float; the model is damaged"
        ) from None
    except ModelError as err:
        raise ModelError(f"{folder}: {err}") from None
    except ValueError as err:
        if "unsafe" in str(err):
            raise UsageError(
                f"{str(err).split('.')[0]}; it runs code that the model writes, which is not done "
                "here"
            ) from None
        raise
    return results
