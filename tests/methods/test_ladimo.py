"""LaDiMo: dense FFNs become experts, within a budget, and any loader of the container computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ModelMaker
from rows import architecture_of
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.files.memo import Memo, digest
from quantize.methods.ladimo.budget import Budget, default_layout, ffn_cost
from quantize.methods.ladimo.container import stock_misfit
from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.distill import Training, distill, refit_down
from quantize.methods.ladimo.lesson import Lesson
from quantize.methods.ladimo.pruning import prune
from quantize.methods.ladimo.routing import Budget as Visits
from quantize.methods.ladimo.split import Layout, cluster, contiguous, shuffle
from quantize.methods.ladimo.trial import Start
from quantize.model.arch import ExpertSizes, Shape
from quantize.model.moe import MoeFfn

LAYOUT = Layout(n=3, size=8, shared=16)


def random_ffn(
    neurons: int = LAYOUT.neurons, hidden: int = 24, seed: int = 0
) -> tuple[Ffn, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(neurons, hidden, generator=generator) * hidden**-0.5 for _ in range(2))
    down = torch.randn(hidden, neurons, generator=generator) * neurons**-0.5
    return Ffn(gate, up, down, F.silu), torch.randn(4000, hidden, generator=generator)


# Splits


@pytest.mark.parametrize("layout", [LAYOUT, Layout(2, 16, 8), Layout(1, 4, 36), Layout(5, 8, 0)])
def test_a_split_is_a_partition_of_the_sizes_asked_for(layout: Layout):
    ffn, x = random_ffn()
    for split in (
        contiguous(layout),
        shuffle(layout, 3),
        cluster(layout, ffn.contributions(x[:200]), 0),
    ):
        sizes = torch.bincount(split.owner, minlength=layout.n + 1).tolist()
        assert sizes == [layout.size] * layout.n + [layout.shared]
        parts = torch.cat([split.of_expert(index) for index in range(layout.n + 1)])
        assert torch.equal(parts.sort().values, torch.arange(layout.neurons))


def test_neurons_that_work_on_the_same_tokens_come_together():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(24)[torch.randperm(24, generator=generator)] % 3
    kind = torch.randint(3, (600,), generator=generator)
    active = (kind[:, None] == group).float() + 0.1 * torch.rand(600, 24, generator=generator)
    always = 5 + torch.rand(600, 16, generator=generator)
    split = cluster(LAYOUT, torch.cat([active, always], dim=1), 0)
    assert (split.owner[24:] == 3).all()
    assert all(len(group[split.of_expert(index)].unique()) == 1 for index in range(3))


# Routing and the student


def test_a_threshold_keeps_to_the_mean_and_a_number_to_every_token():
    scores = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0))
    for mean in (0.0, 0.3, 1.0, 2.5, 6.0):
        visits = Visits(mean, adaptive=True).policy(scores).select(scores)
        assert float(visits.sum(dim=1).double().mean()) == pytest.approx(mean, abs=1e-3)
    assert (Visits(2.0, adaptive=False).policy(scores).select(scores).sum(dim=1) == 2).all()


@pytest.mark.parametrize("mean", [1.0, 2.0, 1.4])
def test_the_stored_experts_compute_what_was_taught(mean: float):
    ffn, x = random_ffn()
    start = Start.of(ffn, Lesson(x, ffn(x)), LAYOUT, "clustered", 0)
    budget = Visits(mean, adaptive=mean != round(mean))
    student = start.student(budget, start.router(budget, 0))
    moe = MoeFfn(24, ExpertSizes(3, 8, 16, 1, False, frozenset()), nn.SiLU()).requires_grad_(False)
    student.write(moe)
    moe.policy = student.stored_policy()
    # The temperature leaves the weights of the experts a part in a few hundred apart.
    assert float((moe(x) - student(x)).norm() / student(x).norm()) < 0.004


def test_teaching_lowers_the_error_and_repeats_bit_for_bit():
    ffn, x = random_ffn()
    y = ffn(x)
    start = Start.of(ffn, Lesson(x, y), LAYOUT, "clustered", 0)
    budget = Visits(1.0, adaptive=False)
    router = start.router(budget, 0)
    before = ffn.down.clone()
    taught = []
    for _ in range(2):
        student = start.student(budget, router)
        untrained = Lesson(x, y).error(student)
        own = type(student)(
            Ffn(*(t.clone() for t in (ffn.gate, ffn.up, ffn.down)), ffn.act),
            start.split,
            router,
            student.policy,
        )
        refit_down(own, Lesson(x, y))
        refitted = Lesson(x, y).error(own)
        losses = distill(
            own, Lesson(x, y), Training(steps=60, batch=256, rate=0.025, weight_decay=0.0, seed=0)
        )
        taught.append(own)
        assert Lesson(x, y).error(own) < 0.95 * refitted < 0.9 * untrained
        assert len(losses) == 60
    assert torch.equal(taught[0].down, taught[1].down)
    assert torch.equal(ffn.down, before)


def test_a_refit_is_the_least_squares_solution():
    ffn, x = random_ffn()
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    start = Start.of(ffn, Lesson(x, y), LAYOUT, "contiguous", 0)
    budget = Visits(1.0, adaptive=False)
    student = start.student(budget, start.router(budget, 0))
    h = student.hidden(x).double()
    ridge = 1e-2 * (h.T @ h).diagonal().mean()
    wanted = torch.linalg.solve(
        h.T @ h + ridge * torch.eye(40), h.T @ y.double() + ridge * ffn.down.T.double()
    ).T
    student.down = nn.Parameter(ffn.down.clone(), requires_grad=False)
    refit_down(student, Lesson(x, y))
    assert torch.allclose(student.down.double(), wanted, atol=1e-5)


def test_pruning_nothing_changes_nothing_and_a_constant_neuron_becomes_bias():
    ffn, x = random_ffn()
    assert not prune(ffn, x, 40).bias.any()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)  # a channel that never changes
    gate, up = torch.zeros(40, 25), torch.zeros(40, 25)
    gate[:, :24], up[:, :24] = ffn.gate, ffn.up
    gate[7], up[7] = 0, 0
    gate[7, 24], up[7, 24] = 2.0, 3.0
    wide = Ffn(gate, up, torch.cat([ffn.down, torch.zeros(1, 40)]), F.silu)
    found = prune(wide, x, 39)
    assert 7 not in found.kept
    kept = Ffn(gate[found.kept], up[found.kept], wide.down[:, found.kept], F.silu)
    assert torch.allclose(kept(x) + found.bias, wide(x), atol=1e-4)


# Budget and container


def budget_of(folder: Path, reduction: float, layout: Layout | None = None) -> Budget:
    source = Checkpoint(folder)
    return Budget.of(
        architecture_of(source.config), Shape.of(source.config), source.shapes, reduction, layout
    )


def test_the_budget_counts_what_a_token_meets(tiny: ModelMaker):
    budget = budget_of(tiny("llama"), 0.1)
    weights = Checkpoint(tiny("llama")).shapes
    everything = sum(Tensor.numel(torch.empty(shape, device="meta")) for shape in weights.values())
    assert budget.dense == everything - 300 * 128
    assert budget_of(tiny("llama", tie_word_embeddings=True), 0.1).dense == budget.dense
    levels = {0: 1.0, 1: 0.0}
    saved = 2 * 3 * 128 * 256 - sum(ffn_cost(128, budget.layout, mean) for mean in levels.values())
    assert budget.reduction(levels) == pytest.approx(saved / budget.dense)
    with pytest.raises(ModelError, match=r"activated_reduction 0\.9 is out of reach"):
        budget_of(tiny("llama"), 0.9, Layout(2, 64, 128))
    with pytest.raises(ModelError, match="are 160 neurons, the FFN has 256"):
        budget_of(tiny("llama"), 0.1, Layout(2, 16, 128))


def test_the_choice_meets_the_budget_where_it_costs_least(tiny: ModelMaker):
    budget = budget_of(tiny("llama"), 0.1, Layout(2, 64, 128))
    errors = [{0.0: 9.0, 1.0: 4.0}, {0.0: 1.0, 1.0: 0.5}]
    assert budget.choose(errors, 0.1) == {1: 0.0}
    with pytest.raises(ModelError, match="out of reach"):
        budget.choose(errors, 0.9)


@pytest.mark.parametrize("neurons", [256, 384, 768, 11008, 14336, 8960])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_default_sizes_fill_the_ffn_and_can_be_quantized(neurons: int, share: float):
    layout = default_layout(neurons, share)
    assert layout.neurons == neurons
    assert layout.shared > 0
    assert layout.n >= 2
    unit = 128 if neurons >= 512 else 64
    assert layout.size % unit == layout.shared % unit == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen3"}, "a qwen3 model fits no stock Mixture of Experts"),
        ({"attention_bias": True}, "attention_bias: true"),
    ],
)
def test_what_the_stock_container_cannot_hold_is_told(changes: dict[str, Any], says: str):
    parent = {"model_type": "llama", "num_hidden_layers": 2}
    assert stock_misfit(parent) is None
    found = stock_misfit(parent | changes)
    assert found is not None
    assert says in found


def test_a_broken_memory_is_no_memory(tmp_path: Path):
    memo, tensors = Memo(tmp_path / "m"), {"a": torch.arange(4.0)}
    key = digest({"x": 1}, tensors.values())
    assert memo.recall(key) is None
    memo.keep(key, tensors, {"fact": 2})
    found = memo.recall(key)
    assert found is not None
    assert torch.equal(found[0]["a"], tensors["a"])
    assert found[1] == {"fact": 2}
    (path,) = (tmp_path / "m").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert memo.recall(key) is None
    assert key != digest({"x": 1}, [torch.arange(4.0).double()])
