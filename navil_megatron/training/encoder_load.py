"""How evenly the visual encoder's work lies on the ranks: what ``blueprint.vision_plan`` and the packer came to."""

from collections.abc import Sequence

import torch

from navil_megatron.blueprint.flops import encoding_cost
from navil_megatron.blueprint.image_plan import grids_of
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import needed_images


class EncoderLoad:
    """Cost of the scale-images that this rank encodes, step by step.

    Later pipeline stages encode nothing but know the plan, so each counts as the first stage's rank does.
    """

    def __init__(self, config: NaViLConfig, session: Session):
        self._vision, self._device = config.model.vision, session.device
        self._mine = needed_images(config.model, session.row_rank, session.row_size)
        self._loads: list[float] = []

    def add(self, microbatches: Sequence[Microbatch]) -> None:
        """Count one step of this rank."""
        total = 0
        for microbatch in microbatches:
            mine = self._mine(microbatch.image_grid_thw)
            total += sum(encoding_cost(grid, self._vision) for grid in grids_of(microbatch.image_grid_thw[mine]))
        self._loads.append(float(total))

    def take(self) -> float:
        """Load of the fullest rank over the mean, averaged over the steps since the last call; 1 is even, and so is a
        step without an image. Every rank calls it.
        """
        largest = torch.tensor(self._loads, dtype=torch.float64, device=self._device)
        mean = largest / torch.distributed.get_world_size()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(mean)
        self._loads = []
        return float(torch.where(mean > 0, largest / mean, 1.0).mean())
