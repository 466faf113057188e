"""A packed model against its parent: perplexity, KL divergence and agreement on the same windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantize.arch import Shape, architecture_of
from quantize.calib import check_vocab, evaluation_tokens
from quantize.checkpoint import Checkpoint
from quantize.errors import DataError, ModelError
from quantize.formats.compressed_tensors import Scheme, schemes_of
from quantize.formats.packed_int import PackedInt
from quantize.linear import Numerics, PackedLinear
from quantize.skeleton import load_tokenizer, meta_model

Progress = Callable[[str, int, int], None]
_LOGIT_TOKENS = 4096  # tokens whose logits are compared at once
_SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Evaluation:
    """Figures of one comparison; field names are the keys of `pq eval --json`."""

    protocol: str
    """strided-N: one continuous token stream, no BOS, windows of N tokens without overlap, N − 1 predictions each."""
    data: str
    numerics: str
    tokens: int
    perplexity: float
    baseline_perplexity: float | None
    kld_mean: float | None
    kld_p99: float | None
    top1_agreement: float | None
    bits_per_weight: float | None


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, numerics: Numerics = "kernel") -> nn.Module:
    """Load a plain or packed checkpoint; packed linears compute with the given numerics.

    ModelError for a packing that pq does not read or tensors that do not match it.
    """
    source = Checkpoint(folder)
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return _load_plain(folder, device, dtype)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "compressed-tensors":
        raise ModelError(f"{folder}: quant_method {method!r} is not one that pq reads")
    model = meta_model(folder, dtype)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        schemes = schemes_of(quantization, linears)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ModelError(f"{folder}/config.json: quantization_config is not one that pq reads ({err})") from None
    _materialize(model, source, schemes, device, dtype, numerics)
    return _frozen(model)


def _load_plain(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    meta_model(folder, dtype)  # refuses a broken config.json in one line
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError) as err:
        reason = " ".join(str(err).split())[:300]
        raise ModelError(f"{folder}: transformers cannot load this model ({reason})") from None
    if missing := sorted(info["missing_keys"]):
        # transformers would go on with random weights.
        raise ModelError(f"{folder}: tensor {missing[0]} is missing from the checkpoint")
    return _frozen(model.to(device))


def _materialize(
    model: nn.Module,
    source: Checkpoint,
    schemes: dict[str, Scheme],
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics,
) -> None:
    for name, scheme in schemes.items():
        parts = {suffix: source.tensor(f"{name}.{suffix}").to(device) for suffix in _SUFFIXES}
        try:
            packed = PackedInt.from_tensors(parts, scheme.bits, scheme.group_size)
        except ValueError as err:
            raise ModelError(f"{source.folder}: {name}: {err}") from None
        bias = source.tensor(f"{name}.bias") if f"{name}.bias" in source else None
        parent, _, attribute = name.rpartition(".")
        linear = PackedLinear(packed, bias, scheme.fp8_activations, dtype, numerics)
        setattr(model.get_submodule(parent), attribute, linear.to(device))
    packed_names = {f"{name}.{suffix}" for name in schemes for suffix in (*_SUFFIXES, "bias")}
    plain = {n: source.tensor(n).to(device, dtype) for n in source.names() if n not in packed_names}
    try:
        result = model.load_state_dict(plain, assign=True, strict=False)
    except RuntimeError as err:
        raise ModelError(f"{source.folder}: {' '.join(str(err).split())[:300]}") from None
    model.tie_weights()  # type: ignore[operator]  # every transformers model has it
    if result.unexpected_keys:
        raise ModelError(f"{source.folder}: tensor {result.unexpected_keys[0]} has no place in the model")
    arch = architecture_of(source.config)
    root, _, _ = arch.blocks.rpartition(".")
    decoder = model.get_submodule(root)
    # Rotary tables are computed buffers: absent from checkpoints, and empty on the meta device.
    decoder.rotary_emb = type(decoder.get_submodule("rotary_emb"))(config=model.config).to(device)
    if missing := [n for n, p in model.named_parameters() if p.is_meta]:
        raise ModelError(f"{source.folder}: tensor {missing[0]} is missing from the checkpoint")


def _frozen(model: nn.Module) -> nn.Module:
    model.eval()
    model.requires_grad_(False)
    return model


def bits_per_weight(model: nn.Module) -> float | None:
    """Mean stored bits of quantized weights, scales counted; None for a model without any."""
    packed = [m.packed for m in model.modules() if isinstance(m, PackedLinear)]
    weights = sum(p.codes.numel() for p in packed)
    return sum(p.bits_per_weight * p.codes.numel() for p in packed) / weights if weights else None


@dataclass
class _Totals:
    nll: float = 0.0
    baseline_nll: float = 0.0
    agree: int = 0
    predictions: int = 0
    kld: list[Tensor] = field(default_factory=list)


def evaluate(
    model: Path,
    baseline: Path | None,
    *,
    dataset: str = "builtin",
    seqlen: int = 512,
    max_windows: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = "kernel",
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Strided perplexity of `model`, and its divergence from `baseline` where one is given.

    KL divergence is KL(baseline ‖ model) in nats, over every predicted position. Raises PqError subclasses.
    """
    device = device or torch.device("cpu")
    ours = load_model(model, device, dtype, numerics)
    parent = None if baseline is None else load_model(baseline, device, dtype, numerics)
    _same_vocabulary(model, baseline)
    text = evaluation_tokens(load_tokenizer(model), dataset=dataset, seqlen=seqlen, max_windows=max_windows)
    check_vocab(text.tokens, Shape.of(Checkpoint(model).config).vocab)

    totals = _Totals()
    batches = torch.split(text.tokens, max(1, _LOGIT_TOKENS // seqlen))
    for done, windows in enumerate(batches):
        progress("evaluating", done, len(batches))
        _compare(ours, parent, windows.to(device), totals)
    progress("evaluating", len(batches), len(batches))
    kld = torch.cat(totals.kld) if totals.kld else None
    n = totals.predictions
    return Evaluation(
        protocol=f"strided-{seqlen}",
        data=text.source,
        numerics=numerics,
        tokens=n,
        perplexity=_perplexity(totals.nll / n, model),
        baseline_perplexity=None if parent is None else _perplexity(totals.baseline_nll / n, model),
        kld_mean=None if kld is None else float(kld.double().mean()),
        kld_p99=None if kld is None else float(_quantile(kld, 0.99)),
        top1_agreement=None if kld is None else totals.agree / n,
        bits_per_weight=bits_per_weight(ours),
    )


def _same_vocabulary(model: Path, baseline: Path | None) -> None:
    if baseline is None:
        return
    ours, parents = (Shape.of(Checkpoint(folder).config).vocab for folder in (model, baseline))
    if ours != parents:
        raise DataError(f"{model} has {ours} tokens and {baseline} {parents}; --baseline must be the model's parent")


@torch.no_grad()
def _compare(ours: nn.Module, parent: nn.Module | None, windows: Tensor, totals: _Totals) -> None:
    targets = windows[:, 1:].flatten()
    for log_q, log_p, wanted in _log_probabilities(ours, parent, windows, targets):
        totals.nll += float(F.nll_loss(log_q, wanted, reduction="sum"))
        totals.predictions += len(wanted)
        if log_p is not None:
            totals.baseline_nll += float(F.nll_loss(log_p, wanted, reduction="sum"))
            totals.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            # Rounding can make a divergence of equal distributions slightly negative.
            totals.kld.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp_min(0).cpu())


def _log_probabilities(
    ours: nn.Module, parent: nn.Module | None, windows: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield (ours [P, V], parent's [P, V], targets [P]) for one window after another, in float32."""
    q = ours(windows, use_cache=False).logits
    p = None if parent is None else parent(windows, use_cache=False).logits
    T = windows.shape[1] - 1
    for i in range(windows.shape[0]):
        log_p = None if p is None else p[i, :-1].float().log_softmax(-1)
        yield q[i, :-1].float().log_softmax(-1), log_p, targets[i * T : (i + 1) * T]


def _quantile(values: Tensor, q: float) -> Tensor:
    # torch.quantile refuses more than 16 million values.
    return values.sort().values[min(len(values) - 1, math.ceil(q * len(values)) - 1)]


def _perplexity(mean_nll: float, model: Path) -> float:
    if not math.isfinite(mean_nll):
        raise ModelError(f"{model}: its logits are not finite")
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
