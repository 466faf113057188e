"""A routed FFN in the form it is trained in: all experts at once, those that a
token does not visit masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.split import Split
from quantize.model.moe import MoeFfn, Policy, Threshold

TEMPERATURE = 2.0**-10
"""The stored router's rows are multiplied by it: a softmax then weighs
experts alike and still ranks them.

Weights that follow the scores, trained with the rest, gave larger errors than weights that do not.
"""


class Student(nn.Module):
    """y = Σ_visited E_e(x) + S(x) over a split of the neurons of a dense FFN, which
    stay in the dense FFN's order.

    The router is a buffer: it is fitted to what the experts contribute. Trained
    together with them, through a sigmoid around the point where a visit begins, it gave
    larger errors at every step size.

    Weights are shared with what they are made of; copy the module before training it.
    """

    router: Tensor

    def __init__(self, ffn: Ffn, split: Split, router: Tensor, policy: Policy) -> None:
        super().__init__()
        self.act, self.split, self.policy = ffn.act, split, policy
        self.up = nn.Parameter(ffn.up, requires_grad=False)
        self.gate = nn.Parameter(ffn.gate, requires_grad=False)
        self.down = nn.Parameter(ffn.down, requires_grad=False)
        self.register_buffer("router", router)
        self.register_buffer("owner", split.owner.to(router.device), persistent=False)

    def scores(self, x: Tensor) -> Tensor:
        """Inputs [M, D] → scores [M, N]."""
        return x @ self.router.T

    def hidden(self, x: Tensor) -> Tensor:
        """Inputs [M, D] → hidden activations [M, F], zero in experts that are not visited."""
        visits = self.policy.select(self.scores(x)).to(x.dtype)
        always = torch.ones_like(visits[:, :1])
        mask = torch.cat([visits, always], dim=1)[:, self.get_buffer("owner")]
        h: Tensor = self.act(x @ self.gate.T) * (x @ self.up.T)
        return h * mask

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [M, D] → outputs [M, D]."""
        return self.hidden(x) @ self.down.T

    def stored_policy(self) -> Policy:
        """The policy in units of the stored router's scores."""
        if isinstance(self.policy, Threshold):
            return Threshold(self.policy.threshold * TEMPERATURE)
        return self.policy

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """Round all weights to what a dtype holds."""
        for weight in (*self.parameters(), self.router):
            weight.copy_(weight.to(dtype))

    @torch.no_grad()
    def write(self, moe: MoeFfn) -> None:
        """Fill the tensors of a `MoeFfn` of the split's sizes so that it computes this function.

        The softmax over almost equal scores gives every visited expert the weight 1/N, and a gate
        of zero gives the shared expert 1/2: both are undone in the down projections.
        """
        n = self.split.layout.n
        for index, expert in enumerate([*moe.experts, moe.shared_expert]):
            part = self.split.of_expert(index).to(self.down.device)
            expert.gate_proj.weight.copy_(self.gate[part])
            expert.up_proj.weight.copy_(self.up[part])
            expert.down_proj.weight.copy_(self.down[:, part] * (n if index < n else 2))
        moe.gate.weight.copy_(self.router * TEMPERATURE)
        moe.shared_expert_gate.weight.zero_()
