"""Train the reference model from the text that comes with Python and write it as a Hugging Face checkpoint.

Run `python eval/reference-model/build.py [--output DIR]` in an environment with pq and `tokenizers`; about twelve
minutes on two cores. All is seeded: the same Python, torch and processor should give the same file.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from outliers import add_outliers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantize.calibration import pydocs

VOCABULARY = 1536
WINDOW = 512
BATCH = 8
STEPS = 800
WARM_UP = 40
PEAK_LR = 8e-3
WEIGHT_DECAY = 0.1
BOS_SHARE = 0.125
"""Share of training windows that begin with <s>, so that evaluators may put it before any text."""
SEED = 0
OUTLIER_CHANNELS = 3
OUTLIER_LOG2 = (4, 6)


def main() -> None:
    """Build the model and report its held-out bits per byte as written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder of the checkpoint"
    )
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    tokenizer = train_tokenizer(pydocs.text("train"))
    tokenizer.save_pretrained(output)
    train = torch.tensor(tokenizer.encode(pydocs.text("train"), verbose=False))
    heldout = torch.tensor(tokenizer.encode(pydocs.text("heldout"), verbose=False))
    token_bytes = bytes_per_token(tokenizer)
    size = token_bytes[heldout].float().mean()
    print(
        f"{len(train)} training and {len(heldout)} held-out tokens of {size:.2f} bytes on average"
    )

    model = LlamaForCausalLM(config(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    fit(model, train, tokenizer.bos_token_id, lambda: bits_per_byte(model, heldout, token_bytes))
    save(model, output)
    written = LlamaForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    print(f"held-out bits per byte as written: {bits_per_byte(written, heldout, token_bytes):.4f}")


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY` tokens that adds neither <s> nor </s> by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the UTF-8 bytes of each token, int64 [vocabulary]; byte-level tokens write a byte as one character."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if i in special else len(token) for i, token in enumerate(tokens)])


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the shape: grouped queries and widths that are multiples of 128, as packed formats ask for."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def fit(model: LlamaForCausalLM, tokens: Tensor, bos: int, evaluate: Callable[[], float]) -> None:
    """Train in fp32 with linear warm-up and cosine decay to zero; print progress."""
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate) for optimizer in optimizers
    ]
    start = time.monotonic()
    model.train()
    for step, batch in zip(range(1, STEPS + 1), batches(tokens, bos), strict=False):
        loss = losses(model, batch).mean()
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        if step % 50 == 0:
            print(
                f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - start:5.0f} s",
                flush=True,
            )
        if step % 200 == 0:
            print(f"step {step:5d}  held-out bits per byte {evaluate():.4f}", flush=True)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, which learns most from so little text, and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    return [
        torch.optim.Muon(
            matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int) -> float:
    """Return the factor of the peak rate at a step."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))


def batches(tokens: Tensor, bos: int) -> Iterator[Tensor]:
    """Yield [BATCH, WINDOW] without end; each pass cuts the text at another offset and shuffles the windows."""
    generator = torch.Generator().manual_seed(SEED)
    pool: list[Tensor] = []
    while True:
        while len(pool) < BATCH:
            offset = int(torch.randint(WINDOW, (), generator=generator))
            windows = (
                tokens[offset : len(tokens) - (len(tokens) - offset) % WINDOW]
                .view(-1, WINDOW)
                .clone()
            )
            windows[torch.rand(len(windows), generator=generator) < BOS_SHARE, 0] = bos
            pool += windows[torch.randperm(len(windows), generator=generator)].unbind()
        yield torch.stack([pool.pop() for _ in range(BATCH)])


def losses(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return the negative log likelihood in nats of all but the first token of each window, [B * (T - 1)]."""
    logits = model(windows).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokens: Tensor, token_bytes: Tensor) -> float:
    """Return the bits per UTF-8 byte of the predicted tokens of `tokens` [N] in windows that do not overlap."""
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    nats = sum(
        losses(model, windows[i : i + BATCH]).sum().item() for i in range(0, len(windows), BATCH)
    )
    model.train()
    return nats / math.log(2) / int(token_bytes[windows[:, 1:]].sum())


def save(model: LlamaForCausalLM, output: Path) -> None:
    """Write the weights in bfloat16, with outliers, as one model.safetensors with its configurations."""
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    outlying = add_outliers(model.state_dict(), model.config, SEED, OUTLIER_CHANNELS, OUTLIER_LOG2)
    model.load_state_dict(outlying)
    model.save_pretrained(output)


if __name__ == "__main__":
    main()
