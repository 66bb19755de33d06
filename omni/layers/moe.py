"""Mixture of experts: router table, stacked experts, load-balancing loss.

Shapes: N tokens, D model width, E experts, k experts a token, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config.decoder import MoEConfig
from omni.layers.experts_backends import EXPERTS, choose_experts
from omni.layers.swiglu import SwiGLU


class Routing(NamedTuple):
    """ids int64 [N, k]; weights [N, k] in the activations' dtype; logits [N, E] for the balancing loss."""

    ids: Tensor
    weights: Tensor
    logits: Tensor


def topk_softmax(logits: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """fp32 softmax over all experts, the k largest kept (and made to sum to one if `normalise`) -> (ids, weights)."""
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(k, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


# (logits [N, E], k, whether the weights are to sum to one) -> (ids int64 [N, k], weights fp32 [N, k]). A token's ids
# differ, and the weights carry the gradient. The first entry is the released models'.
ROUTERS: dict[str, Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]] = {"topk_softmax": topk_softmax}


class Router(nn.Module):
    """Linear scores D -> E without bias, then an entry of `ROUTERS`: the one that `config.router` names, or the first.

    Raises ValueError for a name that the table does not have.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        kind = next(iter(ROUTERS)) if config.router is None else config.router
        if kind not in ROUTERS:
            raise ValueError(f"router {kind!r} is not one of {', '.join(ROUTERS)}; add it to omni.layers.moe.ROUTERS")
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.select = ROUTERS[kind]

    def initialise(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x, self.weight)
        ids, weights = self.select(logits, self.k, self.normalise)
        return Routing(ids, weights.to(x.dtype), logits)


class Experts(nn.Module):
    """E gated feed-forward experts, stacked: gate_up_proj [E, 2I, D] (gate first), down_proj [E, D, I].

    `backend` names an entry of `EXPERTS` to use for every input; None lets `choose_experts` decide for each one.
    """

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, hidden))
        self.backend: str | None = None

    def initialise(self, std: float) -> None:
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, backend: str | None = None) -> Tensor:
        """x [N, D], ids and weights [N, k] -> [N, D]. `backend` overrides the module's. ValueError if it is unknown.

        Under torch.autocast all of it is in autocast's type: grouped products know nothing of autocast.
        """
        device = x.device.type
        if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return self._run(backend, x, ids, weights, self.gate_up_proj, self.down_proj)
        dtype = torch.get_autocast_dtype(device)
        x, weights, gate_up, down = (t.to(dtype) for t in (x, weights, self.gate_up_proj, self.down_proj))
        with torch.autocast(device, enabled=False):
            return self._run(backend, x, ids, weights, gate_up, down)

    def _run(self, backend: str | None, *inputs: Tensor) -> Tensor:
        return EXPERTS[_known(backend or self.backend or choose_experts(*inputs))](*inputs)


def _known(backend: str) -> str:
    if backend not in EXPERTS:
        raise ValueError(f"experts backend {backend!r} is not one of {sorted(EXPERTS)}")
    return backend


def set_experts_backend(model: nn.Module, backend: str | None) -> None:
    """Make all experts of a model use one backend whatever the input, or choose by input again (None).

    Raises ValueError for a name that `EXPERTS` does not have.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.backend = None if backend is None else _known(backend)


class RouterLog:
    """Takes the router logits [N, E] of one sparse layer after the other. No list: hooks rebuild those."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def append(self, logits: Tensor) -> None:
        self.logits.append(logits)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.logits)


class MoE(nn.Module):
    """Router and experts, plus one always-on shared expert behind a sigmoid gate where the config has one."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_expert: SwiGLU | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = SwiGLU(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor, router_logits: RouterLog | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; appends this layer's router logits [B * T, E] to the log if one is given."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.gate(flat)
        if router_logits is not None:
            router_logits.append(routing.logits)
        y = self.experts(flat, routing.ids, routing.weights)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            y = y + self.shared_expert_gate(flat).sigmoid() * self.shared_expert(flat)
        return y.reshape(x.shape)


def load_balancing_loss(router_logits: list[Tensor], k: int, mask: Tensor | None = None) -> Tensor:
    """Switch Transformer's auxiliary loss (Fedus et al., 2021, eq. 4-6) over all layers; equals k at uniform routing.

    router_logits: one [N, E] a layer; mask bool [N], True for tokens that count. Gradient flows through the mean
    probabilities only.
    """
    experts = router_logits[0].shape[-1]
    logits = torch.stack(router_logits).float()  # [L, N, E]
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(k, dim=-1).indices, experts).sum(-2).float()  # [L, N, E]
    if mask is None:
        mask = torch.ones(logits.shape[1], device=logits.device)
    weight = mask.float().reshape(1, -1, 1) / (mask.float().sum() * logits.shape[0])
    return experts * ((chosen * weight).sum((0, 1)) * (probabilities * weight).sum((0, 1))).sum()
