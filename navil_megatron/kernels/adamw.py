"""AdamW (Loshchilov and Hutter, 2019) whose step count sits in the parameter groups, as megatron-core expects it.

torch's own AdamW keeps one step per parameter; core's distributed optimizer then shares a single step tensor after a
restore, and the bias correction drifts. The arithmetic is torch's fused kernel, on CPU and CUDA alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw as adamw_update


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay on FP32 tensors. Groups may be empty: a stage with nothing to train still counts steps."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """Takes what megatron-core hands to a fused Adam.

        Raises:
            ValueError: Weight decay that is not decoupled, or a capturable step, is asked for.
        """
        if not adam_w_mode or capturable:
            raise ValueError(f"found adam_w_mode={adam_w_mode}, capturable={capturable}; only AdamW, not captured")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained:
                self._update(group, trained)

    def _update(self, group: dict[str, Any], trained: list[torch.Tensor]) -> None:
        moments = [self._moments(parameter) for parameter in trained]
        # The kernel raises each step count by one before it uses it.
        steps = torch.full((len(trained),), group["step"] - 1.0, device=trained[0].device)
        adamw_update(
            trained,
            [parameter.grad for parameter in trained],  # type: ignore[misc]
            [first for first, _ in moments],
            [second for _, second in moments],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _moments(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"]
