"""Mixtures of experts in training: what their routers choose, and two ways to keep the choices balanced.

    Switch loss       E Σ_e f_e p_t,e  at each token t, the mean over the layers that route; 1 where all is even
    loss-free bias    b_e <- b_e + rate sign(mean count - count_e)  after each optimizer step

p_t,e is the router's probability of expert e at token t, and f_e the share of expert e in all choices of a layer. Both
read counts of a whole optimizer step, over all its microbatches and ranks: those of the step before, which are known
before the first backward pass. So neither depends on how the step was split; before the first step f is even, which
has no gradient.

Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6; Wang et al. 2024, arXiv:2408.15664, algorithm 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor, nn

from llmrl.functional.statistics import Loads
from llmrl.metrics import LOADS, Metrics
from llmrl.models.folders import ModelError
from llmrl.routing import route_of, watching

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BIAS = "e_score_correction_bias"
"""Buffer of a router, added to the scores by which experts are chosen, and only there."""

Routed = list[tuple[Float[Tensor, "tokens E"], Int[Tensor, "tokens k"]]]
"""Logits and chosen experts of each token that a pass read, by layer."""


def router_class(model_class: "type[PreTrainedModel]") -> type[nn.Module] | None:
    """Class of the routers of a family, as transformers records them; None for one without."""
    recorder = (getattr(model_class, "_can_record_outputs", None) or {}).get("router_logits")
    return getattr(recorder, "target_class", None)


class Experts:
    """The routers of a mixture of experts: `Balance` of it, and what `PolicyModule` adds to its outputs.

    Args:
        trunk: Base model of transformers, without its head.
        bias_rate: Step of the loss-free bias; 0 leaves it as it is.
    """

    def __init__(self, trunk: nn.Module, *, bias_rate: float = 0.0) -> None:
        self.routers = routers(trunk)
        self.bias_rate = bias_rate
        self.shares: Float[Tensor, "L E"] | None = None
        """Share of each expert in the choices of the last optimizer step; None before the first."""
        self.normalized: set[int] = set()
        """Layers whose routers return probabilities in place of logits, as in older versions of transformers."""

    @contextmanager
    def watching(self) -> Iterator[Routed]:
        """Yields what the routers say, while the trunk runs inside."""
        routed: Routed = []
        with watching(self.routers, lambda logits, chosen: routed.append((logits, chosen))):
            yield routed

    def read(
        self, routed: Routed, tokens: Int[Tensor, " M"], mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "B L E"], Int16[Tensor, "M L"]]:
        """The Switch loss of each token of the mask, how often each response chose each expert, and the routes of each
        token. `tokens`: where in the pass the M tokens were predicted."""
        responses = mask.nonzero(as_tuple=True)[0]
        losses, counts = [], []
        for layer, (logits, chosen) in enumerate(routed):
            probabilities, experts = self._probabilities(layer, logits[tokens]), chosen[tokens]
            num_experts = probabilities.shape[1]
            even = probabilities.new_full((num_experts,), 1 / num_experts)
            shares = even if self.shares is None else self.shares[layer].to(even)
            losses.append(num_experts * probabilities @ shares)
            ones = torch.zeros_like(probabilities).scatter(1, experts, 1.0).detach()
            counts.append(ones.new_zeros(len(mask), num_experts).index_add(0, responses, ones))
        routes = route_of(torch.stack([chosen[tokens] for _, chosen in routed], dim=1))
        return torch.stack(losses).mean(dim=0), torch.stack(counts, dim=1), routes

    def _probabilities(self, layer: int, logits: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
        """Softmax of the logits; where a bias corrects scores, these are sigmoids, here divided by their sum
        (DeepSeek-V3, arXiv:2412.19437, eq. 19)."""
        if layer in self.normalized:
            return logits.float()
        if not hasattr(self.routers[layer], BIAS):
            return logits.float().softmax(dim=1)
        scores = logits.float().sigmoid()
        return scores / scores.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def finish_step(self, metrics: Metrics) -> None:
        """See `Balance`."""
        loads = metrics.statistics.get(LOADS)
        if not isinstance(loads, Loads) or not loads.counts.any():
            return
        counts = loads.counts.double()
        self.shares = (counts / counts.sum(dim=1, keepdim=True)).float()
        if self.bias_rate:
            for router, count in zip(self.routers, counts, strict=True):
                bias = router.get_buffer(BIAS)
                bias.add_(self.bias_rate * (count.mean() - count).sign().to(bias))

    def state_dict(self) -> dict[str, Any]:
        """See `Balance`."""
        biases = {str(layer): router.get_buffer(BIAS) for layer, router in enumerate(self.routers) if self.bias_rate}
        return {"biases": biases, **({} if self.shares is None else {"shares": self.shares})}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Balance`."""
        self.shares = state.get("shares")
        for layer, bias in state.get("biases", {}).items():
            self.routers[int(layer)].get_buffer(BIAS).copy_(bias)


def watched(trunk: nn.Module, *, bias_rate: float = 0.0) -> Experts | None:
    """What watches the routers of a trunk; None for one that is no mixture of experts, and for a mixture whose routers
    don't say which experts they choose."""
    experts = Experts(trunk, bias_rate=bias_rate)
    if not experts.routers:
        return None
    device = next(trunk.parameters()).device
    try:
        with torch.no_grad(), experts.watching() as routed:
            trunk(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    except (TypeError, ValueError):  # the router returned something else than three tensors
        return None
    experts.normalized = {layer for layer, (logits, _) in enumerate(routed) if _are_probabilities(logits)}
    return experts if len(routed) == len(experts.routers) else None


def _are_probabilities(logits: Float[Tensor, "tokens E"]) -> bool:
    total = logits.float().sum(dim=1)
    return bool((logits >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-2))


def check_balance(kind: "type[PreTrainedModel]", shape: "PretrainedConfig", *, path: str, bias: bool) -> None:
    """Refuses to balance the experts of a model of this class and shape that has none, or none with a `bias`.

    Raises:
        ModelError: It has not.
    """
    router = router_class(kind)
    if router is None:
        raise ModelError(
            f"model.path ({path}) is no mixture of experts whose routers transformers records ({kind.__name__}), so "
            "nothing can be balanced; set algorithm.balance_coef and algorithm.balance_bias_rate to 0"
        )
    with torch.device("meta"):
        has_bias = hasattr(router(shape.get_text_config()), BIAS)
    if bias and not has_bias:
        raise ModelError(
            f"model.path ({path}): its routers ({router.__name__}) choose experts without a bias that "
            "algorithm.balance_bias_rate could move; set that to 0, and algorithm.balance_coef to 0.01, say"
        )


def routers(trunk: nn.Module) -> list[nn.Module]:
    """Routers in the order of their layers; none where the model is no mixture of experts."""
    kind = router_class(type(trunk))  # type: ignore[arg-type]
    return [] if kind is None else [module for module in trunk.modules() if isinstance(module, kind)]
