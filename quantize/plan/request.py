"""What is asked of a plan: one strict YAML file of models and a cluster, read into frozen types.

Every problem of a file is reported at once, one line each, with file, line, path, value and remedy,
as recipes' are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from quantize.errors import UsageError
from quantize.files import strict_yaml
from quantize.files.problems import Place, Problem, error_of, no_mapping, show_key, show_value
from quantize.files.strict_yaml import Document
from quantize.plan.gpus import Gpu, gpu_named
from quantize.plan.kv import KV_TYPES
from quantize.recipe.files import nearest
from quantize.recipe.messages import misfit

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
_Positive = Annotated[float, Field(gt=0)]


class Demand(BaseModel):
    """One model, and what is asked of it."""

    model_config = _STRICT

    model: str
    """Checkpoint folder or Hub id, plain or quantized."""
    name: str | None = None
    """How tables and files call it; null: the folder's name."""
    rate: _Positive | None = None
    """Requests a second, arriving at random; null with a trace, or to ask what fits."""
    sequences: int | None = Field(default=None, ge=1)
    """Sequences of `context` tokens that must run at once, in the place of a rate."""
    trace: str | None = None
    """File or name of a trace of requests in place of a rate: azure-code, azure-conv, mooncake,
    poisson:RATE:COUNT:INPUT:OUTPUT."""
    input: int = Field(default=1024, ge=1)
    """Tokens of a prompt, in the mean."""
    output: int = Field(default=256, ge=1)
    """Tokens of an answer, in the mean."""
    spread: float = Field(default=0.5, ge=0, le=2)
    """Standard deviation of the logarithm of both lengths, drawn log-normally around the means."""
    context: int | None = Field(default=None, ge=1)
    """Tokens of the longest sequence that must fit; null: a prompt and its answer."""
    prefix_cache: bool = True
    """Whether prompts' leading tokens that a trace says were seen before are taken from a cache."""
    ttft: _Positive | None = None
    """Seconds to the first token that `attainment` of requests should stay below."""
    tpot: _Positive | None = None
    """Seconds a token after the first."""
    attainment: float = Field(default=0.9, gt=0, lt=1)
    """Share of requests that should meet the goal of TTFT."""
    priority: int = Field(default=0, ge=0)
    """Who is placed first where not all fit; higher goes first."""
    kv: str = "auto"
    """Type of the KV cache; auto: what the checkpoint asks for."""
    tp: int | None = Field(default=None, ge=1, le=64)
    """GPUs of one engine (tensor parallel); null: the fewest in all."""
    utilization: float = Field(default=0.92, gt=0, le=1)
    """Share of a GPU's memory that an engine takes (--gpu-memory-utilization)."""

    @field_validator("kv")
    @classmethod
    def _is_kv(cls, kv: str) -> str:
        names = ["auto", *(one.name for one in KV_TYPES)]
        if kv not in names:
            raise PydanticCustomError("kv", "must be one of {names}", {"names": ", ".join(names)})
        return kv

    @model_validator(mode="after")
    def _one_load(self) -> Self:
        given = [key for key in ("rate", "sequences", "trace") if getattr(self, key) is not None]
        if len(given) > 1:
            text = f"give {' or '.join(given)}, not both"
            raise PydanticCustomError("load", "{text}", {"text": text, "field": given[-1]})
        if self.trace is not None and self.ttft is None and self.tpot is None:
            text = "a trace is played against goals; add ttft, tpot or both"
            raise PydanticCustomError("load", "{text}", {"text": text, "field": "trace"})
        if self.context is not None and self.context < self.input + self.output:
            text = (
                f"context {self.context} is shorter than input + output, {self.input + self.output}"
            )
            raise PydanticCustomError("load", "{text}", {"text": text, "field": "context"})
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that must fit."""
        return self.context or self.input + self.output


class Nodes(BaseModel):
    """Nodes of one kind."""

    model_config = _STRICT

    gpu: str
    """Name of the table of GPUs."""
    gpus: int = Field(default=1, ge=1, le=64)
    """GPUs of one node."""
    nodes: int = Field(default=1, ge=1)
    """How many such nodes there are."""
    memory_gib: _Positive | None = None
    """Memory of a GPU, where it is not the table's."""
    link_gb: _Positive | None = None
    """10⁹ bytes a second between two GPUs, where it is not the table's."""

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            gpu_named(name)
        except UsageError as err:
            raise PydanticCustomError("gpu", "{text}", {"text": str(err)}) from None
        return name

    @property
    def kind(self) -> Gpu:
        """The GPU, with what the file says of it."""
        found = gpu_named(self.gpu)
        return dataclasses.replace(
            found,
            memory_gib=self.memory_gib or found.memory_gib,
            link_gb=self.link_gb or found.link_gb,
        )


class Sharing(BaseModel):
    """How engines of several models share GPUs."""

    model_config = _STRICT

    placement: Literal["best", "fineserve", "prism"] = "best"
    """Where engines stand: `best` keeps the load of the fullest GPU least, `fineserve` leaves most
    blocks of KV cache free, `prism` spreads the rate per goal and free memory."""
    memory: Literal["shares", "slabs", "paper"] = "shares"
    """How engines of a GPU divide what weights leave: `shares` that are fixed, by rate and bytes a
    token, as vLLM does; `slabs` of one power of two for all formats; `paper`, FineServe's slabs of
    twice the least common multiple."""
    policy: Literal["fcfs", "sjf", "lsf", "prism", "fineserve"] = "fcfs"
    """In which order an engine takes requests: as they came (vLLM), shortest prompt first, longest
    slowdown first, or those that together meet their goals."""
    drop: bool = False
    """Whether requests that cannot meet `ttft` any more are refused."""


class Request(BaseModel):
    """What is to be deployed, and on what."""

    model_config = _STRICT

    models: tuple[Demand, ...] = Field(min_length=1)
    """Models and what is asked of each."""
    cluster: tuple[Nodes, ...] = Field(min_length=1)
    """Nodes by kind."""
    sharing: Sharing | None = None
    """Lets several engines share a GPU; null: each has its own."""

    @model_validator(mode="after")
    def _can_share(self) -> Self:
        if self.sharing is None:
            return self
        if len(self.cluster) > 1:
            text = "GPUs that are shared are all of one kind; give one entry of cluster"
            raise PydanticCustomError("load", "{text}", {"text": text, "field": "sharing"})
        for index, demand in enumerate(self.models):
            if demand.rate is None and demand.trace is None:
                text = "engines that share GPUs are simulated together; give it a rate or a trace"
                context = {"text": text, "field": "model", "index": index}
                raise PydanticCustomError("load", "{text}", context)
        return self

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        names: set[str] = set()
        for index, demand in enumerate(self.models):
            name = demand.name or demand.model
            if name in names:
                text = f"a second model is called {name!r}; give each its own 'name'"
                context = {"text": text, "field": "name", "index": index}
                raise PydanticCustomError("load", "{text}", context)
            names.add(name)
        return self


_HEAD = "begin with 'models:' and 'cluster:', each a list"


def load_request(path: Path) -> Request:
    """Read a file. RecipeError with a line for each problem; UsageError where there is no file."""
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise UsageError(f"{path}: cannot be read ({err.strerror}); name a YAML file") from None
    return parse_request(raw, str(path))


def parse_request(text: str | bytes, source: str) -> Request:
    """Parse and validate. source: the file's name for messages."""
    doc = strict_yaml.load(text, source)
    if not isinstance(doc.data, dict):
        problem = doc.problem((), no_mapping(doc.data, _HEAD))
        raise error_of(source, doc.problems or [problem])
    problems, request = list(doc.problems), None
    try:
        request = Request.model_validate_json(json.dumps(doc.data))
    except ValidationError as err:
        problems += [problem for error in err.errors() for problem in _translate(error, doc)]
    if request is None or problems:
        raise error_of(source, problems)
    return request


def _translate(error: ErrorDetails, doc: Document) -> Iterator[Problem]:
    path: Place = tuple(error["loc"])
    if path in doc.spoiled:
        return
    kind, value = error["type"], error["input"]
    if kind == "too_short" and value:  # its entries are there, and told to be wrong
        return
    cls = _class_at(path)
    name = str(path[-1]) if path else ""
    if kind == "load":
        context = error["ctx"]
        if "index" in context:
            path = ("models", context["index"])
        yield doc.problem((*path, context["field"]), str(context["text"]))
        return
    if kind == "missing":
        text = f"required field is missing; add '{name}: ...'"
    elif kind == "extra_forbidden":
        known = list(cls.model_fields) if cls else []
        shown = "" if isinstance(value, dict | list) else f" (value {show_value(value)})"
        remedy = nearest(name, known).strip() or f"fields: {', '.join(known)}"
        text = f"unknown field {show_key(name)!r}{shown}; {remedy}"
    elif kind in ("kv", "gpu"):
        text = f"{error['msg']} (value {show_value(value)})" if kind == "kv" else error["msg"]
    elif path == ("sharing",):
        text = f"must be a mapping (value {show_value(value)}); write 'memory: ...' below it"
    elif len(path) == 2 and path[0] != "sharing" and not isinstance(value, dict):
        first = "model" if path[0] == "models" else "gpu"
        text = f"must be a mapping (value {show_value(value)}); write '- {first}: ...'"
    elif kind == "too_short":
        text = "the list is empty; add an entry"
    elif len(path) == 1:
        text = f"must be a list (value {show_value(value)}); write an entry a line, '- ...'"
    else:
        text = misfit(cls, name, error)
    yield doc.problem(path, text)


def _class_at(path: Place) -> type[BaseModel] | None:
    """The class whose field `path` is."""
    if len(path) == 1:
        return Request
    if path[:1] == ("sharing",):
        return Sharing
    lists: dict[str, type[BaseModel]] = {"models": Demand, "cluster": Nodes}
    return lists.get(str(path[0])) if len(path) == 3 else None


def single(model: str, gpu: str, gpus: int, nodes: int, **changes: object) -> Request:
    """The request that a command line makes. UsageError, a line for each value out of range."""
    given = {key: value for key, value in changes.items() if value is not None}
    try:
        demand = Demand.model_validate({"model": model, **given})
        cluster = Nodes.model_validate({"gpu": gpu, "gpus": gpus, "nodes": nodes})
    except ValidationError as err:
        lines = [
            f"--{error['loc'][-1] if error['loc'] else error.get('ctx', {}).get('field', '')}: "
            f"{error['msg']}"
            for error in err.errors()
        ]
        raise UsageError("\n".join(lines)) from None
    return Request(models=(demand,), cluster=(cluster,))
