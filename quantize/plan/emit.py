"""Files that start what a plan says: vLLM's command lines, docker compose, values of two Helm charts.

Only what vLLM 0.32 takes is written. A checkpoint that it does not load is refused here, not there.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.errors import UsageError
from quantize.files import strict_yaml
from quantize.plan.deploy import Engines, Plan
from quantize.plan.kv import KV_TYPES
from quantize.plan.sizing import Option

KINDS = ("vllm", "compose", "production-stack", "llm-d")
IMAGE = "vllm/vllm-openai"
TAG = "v0.32.0"
_PORT = 8000
_MOUNT = "/model"
"""Where a container sees a local folder."""
_HUB = "/root/.cache/huggingface"


def emit(kind: str, plan: Plan) -> str:
    """The text of one kind. UsageError for an unknown kind, for a plan that has no engines, and for
    a model that vLLM does not load."""
    makers = {"vllm": _commands, "compose": _compose, "production-stack": _stack, "llm-d": _llm_d}
    if kind not in makers:
        raise UsageError(f"--emit {kind}: choose one of {', '.join(KINDS)}")
    if not plan.feasible:
        raise UsageError(f"--emit {kind}: {', '.join(plan.missing)} cannot be served so")
    if problem := _unshared(kind, plan):
        raise UsageError(f"--emit {kind}: {problem}")
    for name, option in plan.chosen.items():
        if problem := unservable(option):
            raise UsageError(f"--emit {kind}: {name}: {problem}")
    return makers[kind](plan)


def _unshared(kind: str, plan: Plan) -> str | None:
    """What of a plan with shared GPUs the files cannot say; None where they can."""
    how = plan.request.sharing
    if how is None:
        return None
    if how.memory != "shares":
        return "vLLM shares no slabs between engines; set memory: shares below sharing"
    if how.policy != "fcfs" or how.drop:
        return "vLLM takes requests as they come and drops none; set policy: fcfs and drop: false"
    if kind in ("production-stack", "llm-d"):
        return "Kubernetes gives a GPU to one pod; take vllm or compose, or no sharing"
    return None


_SHARED = "# of engines on one GPU start one after the other: each measures what memory is free\n"


def unservable(option: Option) -> str | None:
    """Why vLLM alone does not run an option as it was planned; None where it does."""
    for note in option.model.notes:
        if "plugin" in note:
            return f"{note}; convert to compressed-tensors, or serve with transformers"
    if option.model.compute == "fp8" and _packed_w4a8(option) and option.gpu.capability != 9.0:
        return (
            f"vLLM multiplies packed integers by FP8 inputs on H100 and H200 alone, not on "
            f"{option.gpu.name}; convert with activations: none"
        )
    return None


def _packed_w4a8(option: Option) -> bool:
    linears = sum(part.bytes for part in option.model.parts if not part.looked_up)
    return linears < 0.8 * option.model.parameters_per_token


def serve_arguments(option: Option, name: str) -> list[str]:
    """What stands behind `vllm serve MODEL`."""
    engine, demand = option.engine, option.demand
    arguments = [
        "--served-model-name",
        name,
        "--tensor-parallel-size",
        str(option.tp),
        "--max-model-len",
        str(demand.longest),
        "--max-num-seqs",
        str(engine.max_sequences),
        "--max-num-batched-tokens",
        str(engine.batched_tokens),
        "--gpu-memory-utilization",
        f"{engine.utilization:g}",
    ]
    if (kind := _cache_type(option)) is not None:
        arguments += ["--kv-cache-dtype", kind]
    return arguments


def _cache_type(option: Option) -> str | None:
    """The value of --kv-cache-dtype; None where vLLM finds it by itself."""
    if option.demand.kv in ("auto", "bf16"):
        return None
    return next(kind.vllm for kind in KV_TYPES if kind.name == option.demand.kv)


def _is_local(model: str) -> bool:
    return Path(model).expanduser().is_dir()


def _commands(plan: Plan) -> str:
    """One line an engine, under a comment that names its node."""
    lines = []
    ports: dict[tuple[int, int], int] = {}
    for engine in _by_node(plan):
        option = plan.chosen[engine.name]
        place = (engine.nodes, engine.node)
        if place not in ports:
            lines.append(f"# node {node_name(plan, engine)}")
        port = ports.get(place, _PORT)
        ports[place] = port + 1
        devices = ",".join(map(str, engine.gpus))
        command = ["vllm", "serve", option.demand.model, *serve_arguments(option, engine.name)]
        command += ["--port", str(port)]
        lines.append(f"CUDA_VISIBLE_DEVICES={devices} {shlex.join(command)}")
    return (_SHARED if plan.shared else "") + "\n".join(lines) + "\n"


def _by_node(plan: Plan) -> Sequence[Engines]:
    return sorted(plan.engines, key=lambda e: (e.nodes, e.node, e.gpus))


def node_name(plan: Plan, engine: Engines) -> str:
    """How a node is called: its GPU, and its number among its kind."""
    return f"{plan.request.cluster[engine.nodes].kind.name}-{engine.node}"


def _compose(plan: Plan) -> str:
    """Services of all nodes, each in its node's profile: a host starts its own."""
    services: dict[str, Any] = {}
    ports: dict[tuple[int, int], int] = {}
    for engine in _by_node(plan):
        option = plan.chosen[engine.name]
        place = (engine.nodes, engine.node)
        port = ports.get(place, _PORT)
        ports[place] = port + 1
        local = _is_local(option.demand.model)
        source = str(Path(option.demand.model).expanduser().resolve()) if local else _hub_home()
        target = _MOUNT if local else option.demand.model
        services[f"{_label(engine.name)}-{node_name(plan, engine)}-{engine.gpus[0]}"] = {
            "image": f"{IMAGE}:{TAG}",
            "profiles": [node_name(plan, engine)],
            "command": [target, *serve_arguments(option, engine.name)],
            "ports": [f"{port}:8000"],
            "volumes": [f"{source}:{_MOUNT}:ro" if local else f"{source}:{_HUB}"],
            "ipc": "host",
            "restart": "unless-stopped",
            "deploy": {
                "resources": {
                    "reservations": {
                        "devices": [
                            {
                                "driver": "nvidia",
                                "device_ids": [str(gpu) for gpu in engine.gpus],
                                "capabilities": ["gpu"],
                            }
                        ]
                    }
                }
            },
        }
    names = sorted({node_name(plan, engine) for engine in plan.engines})
    head = "".join(f"# on node {n}: docker compose --profile {n} up\n" for n in names)
    return head + (_SHARED if plan.shared else "") + strict_yaml.dump({"services": services})


def _hub_home() -> str:
    return "${HF_HOME:-~/.cache/huggingface}"


def _label(name: str) -> str:
    """A name that DNS and compose take: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:40] or "model"


def _stack(plan: Plan) -> str:
    """Values of vllm-project/production-stack's chart."""
    specs = []
    for name, option in plan.chosen.items():
        extra = serve_arguments(option, name)
        # What the chart has fields for is not said twice.
        for flag in (
            "--tensor-parallel-size",
            "--max-model-len",
            "--max-num-seqs",
            "--gpu-memory-utilization",
        ):
            at = extra.index(flag)
            del extra[at : at + 2]
        weights = option.model.weights(1) / 2**30
        specs.append(
            {
                "name": _label(name),
                "repository": IMAGE,
                "tag": TAG,
                "modelURL": _path_in_cluster(option.demand.model),
                "replicaCount": option.replicas,
                "requestCPU": 2 + 2 * option.tp,
                "requestMemory": f"{math.ceil(8 + 1.2 * weights)}Gi",
                "requestGPU": option.tp,
                "vllmConfig": {
                    "dtype": "auto",
                    "tensorParallelSize": option.tp,
                    "maxModelLen": option.demand.longest,
                    "maxNumSeqs": option.engine.max_sequences,
                    "gpuMemoryUtilization": option.engine.utilization,
                    "extraArgs": extra,
                },
            }
        )
    return _volumes_note(plan) + strict_yaml.dump({"servingEngineSpec": {"modelSpec": specs}})


def _path_in_cluster(model: str) -> str:
    return f"/models/{Path(model).expanduser().resolve().name}" if _is_local(model) else model


def _volumes_note(plan: Plan) -> str:
    """What must be in the cluster, where models are folders."""
    local = [o.demand.model for o in plan.chosen.values() if _is_local(o.demand.model)]
    if not local:
        return ""
    paths = ", ".join(f"{model} as {_path_in_cluster(model)}" for model in local)
    return f"# mount {paths} in the pods (extraVolumes, extraVolumeMounts or a PVC)\n"


def _llm_d(plan: Plan) -> str:
    """Values of llm-d-modelservice's chart, which holds one model: one document each."""
    texts = []
    for name, option in plan.chosen.items():
        local = _is_local(option.demand.model)
        folder = Path(option.demand.model).expanduser().resolve().name
        weights = option.model.weights(1) / 2**30
        uri = f"pvc://models/{folder}" if local else f"hf://{option.demand.model}"
        values = {
            "modelArtifacts": {
                "name": name,
                "uri": uri,
                "size": f"{math.ceil(1.2 * weights) + 1}Gi",
            },
            "decode": {
                "create": True,
                "replicas": option.replicas,
                "parallelism": {"tensor": option.tp, "data": 1},
                "containers": [
                    {
                        "name": "vllm",
                        "image": f"{IMAGE}:{TAG}",
                        "modelCommand": "vllmServe",
                        "args": _llm_d_arguments(option, name),
                        "mountModelVolume": True,
                        "resources": {
                            "limits": {"nvidia.com/gpu": str(option.tp)},
                            "requests": {"nvidia.com/gpu": str(option.tp)},
                        },
                    }
                ],
            },
            "prefill": {"create": False},
        }
        texts.append(f"# {name}: helm install {_label(name)} … -f this\n{strict_yaml.dump(values)}")
    return "---\n".join(texts)


def _llm_d_arguments(option: Option, name: str) -> list[str]:
    """Without what the chart itself passes with `modelCommand: vllmServe`."""
    arguments = serve_arguments(option, name)
    for flag in ("--served-model-name", "--tensor-parallel-size"):
        at = arguments.index(flag)
        del arguments[at : at + 2]
    return arguments
