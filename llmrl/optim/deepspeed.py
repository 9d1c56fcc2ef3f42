"""DeepSpeed's ZeRO: optimizer states (1), gradients (2) and weights (3) are split over ranks. Rajbhandari et al. 2020,
arXiv:1910.02054.

The launch file sets the stage, and what is kept in the memory of the CPU; the recipe sets optimizer, clipping and
precision. Gradients are accumulated over as many microbatches as there are.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmrl.distributed.launch import deepspeed_settings
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import adamw, check_same, learning_parameters, shapes_of
from llmrl.optim.schedule import StepSchedule
from llmrl.roles import Collectives


class DeepSpeedTrainable(StepSchedule):
    """`Trainable` for a module inside a DeepSpeed engine. An actor and a critic are two engines."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        num_steps: int,
        collectives: Collectives,
        device: torch.device,
        peaks: Mapping[str, float] | None = None,
    ) -> None:
        """Splits the weights of `module`, which stand on the CPU at stage 3 and are then used on `device`; see
        `LocalTrainable` for the other arguments."""
        import deepspeed

        collectives.barrier()  # waits longer for a rank that is still loading than what comes next would
        settings = _of_engine(config.max_grad_norm)
        self.module = module
        self.collectives = collectives
        self.device = device
        self.parameters = learning_parameters(module)
        self.shapes = shapes_of(self.parameters)
        self.splits_weights = settings["zero_optimization"]["stage"] == 3
        self.holds_all = collectives.world_size == 1
        optimizer = adamw(self.parameters, config, peaks or {})  # which asks for shapes: before weights are split
        if self.splits_weights:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
            for buffer in module.buffers():  # which the engine leaves where they are, if weights are split already
                buffer.data = buffer.to(self.device)
        super().__init__(config, num_steps)
        self.wrapped: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]

    def backward(self, loss: Tensor) -> None:
        """Runs backward. The engine takes the mean over ranks; losses are parts of a sum, so a factor undoes it."""
        self.wrapped.backward(loss * self.collectives.world_size, scale_wrt_gas=False)

    def optimizer_step(self) -> Tensor:
        """See `LocalTrainable.optimizer_step`. The engine passes over a gradient that is not finite by itself."""
        self.begin_step(self.wrapped.optimizer.param_groups)
        self.wrapped.step()
        norm = torch.as_tensor(self.wrapped.get_global_grad_norm(), device=self.device)
        self.accept(norm)
        return norm

    @torch.no_grad()
    def whole(self, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Trainable`."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, p in part.named_parameters():
            with GatheredParameters([p], enabled=self.splits_weights):
                yield name, p.detach()

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """See `Trainable`."""
        from deepspeed.runtime.zero import GatheredParameters

        p = self.module.get_parameter(name)
        with GatheredParameters([p], modifier_rank=0, enabled=self.splits_weights):
            p.copy_(value)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state of `LocalTrainable`, gathered; empty on every rank except the first."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_moments()
        parameters: dict[str, Tensor] = {}
        optimizer: dict[str, dict[str, Tensor]] = {}
        for name, p in self.parameters.items():
            weight = safe_get_full_fp32_param(p)
            moments = {key: safe_get_full_optimizer_state(p, key) for key in self._moments}
            if self.collectives.is_first:
                parameters[name] = cast(Tensor, weight).cpu()
                if moments:
                    optimizer[name] = {key: cast(Tensor, x).cpu() for key, x in moments.items()} | {
                        "step": self._num_updates
                    }
        return {"parameters": parameters, "optimizer": optimizer, **self.steps()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `LocalTrainable.load_state_dict`."""
        check_same(shapes_of(state["parameters"]), self.shapes)
        self._begin_moments(state["optimizer"])
        for name, p in self.parameters.items():
            self._set_weight(p, state["parameters"][name])
            for key in self._moments:
                x = state["optimizer"][name][key] if name in state["optimizer"] else torch.zeros(self.shapes[name])
                self._set(p, x, key)
        self.set_steps(state)

    # --- inside the engine --------------------------------------------------------------------------------------------

    @property
    def _moments(self) -> tuple[str, ...]:
        """Names of AdamW's moments of each weight; none before its first step."""
        return ("exp_avg", "exp_avg_sq") if self._flat_state else ()

    @property
    def _flat_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of AdamW, whose parameters are this rank's parts of many weights laid end to end."""
        return self.wrapped.optimizer.optimizer.state

    @property
    def _num_updates(self) -> Tensor:
        return next(iter(self._flat_state.values()))["step"].detach().cpu().clone()

    def _begin_moments(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Allocates AdamW's moments, with the number of updates in them; clears them if none were saved."""
        inner = self.wrapped.optimizer
        self._flat_state.clear()
        if not saved:
            return
        num_updates = max(float(moments["step"]) for moments in saved.values())
        flat = inner.fp32_partitioned_groups_flat if self.splits_weights else inner.single_partition_of_fp32_groups
        for weights in flat:
            step = torch.tensor(num_updates, device=weights.device)
            zeros = {key: torch.zeros_like(weights) for key in ("exp_avg", "exp_avg_sq")}
            self._flat_state[weights] = {"step": step, **zeros}
        self._link_moments()

    def _link_moments(self) -> None:
        """Links each weight to its part of the state. The engine does so once, in the step of its first group, when
        there is no state of the other groups yet."""
        if self._flat_state and not self.splits_weights:
            self.wrapped.optimizer._hp_optimizer_states_linked = False
            self.wrapped.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_weight(self, p: nn.Parameter, value: Tensor) -> None:
        """Sets a weight in the module, and in the optimizer, which may hold parts of its own."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([p], modifier_rank=0, enabled=self.splits_weights):
            p.copy_(value)
        self._set(p, value, None)

    def _set(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Sets this rank's part of a weight as the optimizer holds it, or of its moment `key`."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.device)
        if self.splits_weights:
            value = self._own_part(p, value)
            set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        else:
            set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if key is None:
            set_weight(p, value)
        else:
            set_moment(p, value, key)

    def _own_part(self, p: Any, value: Tensor) -> Tensor:
        """This rank's part of a tensor. Parts have equal size; the last may be padded with zeros."""
        size = p.ds_tensor.numel()
        padded = value.new_zeros(size * self.collectives.world_size)
        padded[: value.numel()] = value.flatten()
        return padded.narrow(0, size * self.collectives.rank, size)


def _of_engine(max_grad_norm: float) -> dict[str, Any]:
    """Settings of an engine: those of the launch file, and those that the loop needs."""
    return deepspeed_settings() | {
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": 1,  # which nothing reads
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `step` ends the accumulation, however many passes there were
        "gradient_clipping": 0.0 if math.isinf(max_grad_norm) else max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW computes on the CPU as well
    }
