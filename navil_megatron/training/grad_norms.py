"""Gradient norms of the parts of the model, before clipping, at any layout.

They are taken of the gradients that the optimizer has just used, where a record is made: one more pass over what this
rank holds of them (its slice, under the distributed optimizer), and no step without a record pays for it.
"""

from collections.abc import Iterable, Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from navil_megatron.blueprint.parameters import Parameter, parameter_of
from navil_megatron.checkpoint.updated_parameters import updated_parameters
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.model import ModelConfig

PARTS = ("encoder", "connector", *(f"decoder_{modality}" for modality in MODALITIES), "decoder_shared")


def part_of(row: Parameter) -> str:
    """The one of ``PARTS`` that a parameter belongs to. The decoder's shared one is norms, token tables and LM head."""
    if row.modality:
        return f"decoder_{row.modality}"
    return {"vision_encoder": "encoder", "connector": "connector"}.get(row.part, "decoder_shared")


class GradNorms:
    """Which part each parameter of this rank belongs to."""

    def __init__(self, chunks: Iterable[nn.Module], optimizer: ChainedOptimizer, model: ModelConfig):
        parts = {
            parameter: PARTS.index(part_of(parameter_of(model, name)))
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
        }
        self._held: list[tuple[MegatronOptimizer, list[list[nn.Parameter]]]] = []
        for piece in optimizer.chained_optimizers:
            of_parts: list[list[nn.Parameter]] = [[] for _ in PARTS]
            for parameter, updated in updated_parameters(piece):
                of_parts[parts[parameter]].append(updated)
            self._held.append((piece, of_parts))

    def take(self, grad_norm: float, device: torch.device) -> dict[str, float]:
        """Norm of each part in the last update, 0 where it is frozen; their squares sum to that of ``grad_norm``, the
        global one before clipping. Every rank calls it.

        Clipping has shortened all gradients by one factor, so a part's share of the squares is what it was.
        """
        sums: dict[ProcessGroup, Tensor] = {}
        for piece, of_parts in self._held:
            group = piece.get_grad_stats_parallel_group()
            # Core's own choice: tensor-parallel replicas and tied tables count once.
            squares = [_sum_of_squares(piece._filter_grads_for_norm(updated), device) for updated in of_parts]
            sums[group] = torch.stack(squares) + sums.get(group, 0)
        for group, of_group in sums.items():
            torch.distributed.all_reduce(of_group, group=group)
        total = torch.stack(list(sums.values())).sum(0).cpu()
        norms = grad_norm * (total / total.sum()).sqrt() if grad_norm else torch.zeros_like(total)
        return {f"grad_norm/{part}": float(norm) for part, norm in zip(PARTS, norms, strict=True)}


def _sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return nn.utils.get_total_norm(gradients).double().square()
