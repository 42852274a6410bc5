"""What the routers of several experts per modality did: how evenly they load the experts, and how sure they are.

Routers count on the device; the sums are read, and set to zero, where a record is made.
"""

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor, nn

from navil_megatron.config.modality import MODALITIES
from navil_megatron.layers.modality_router import MEASURED, ModalityRouter
from navil_megatron.layers.transformer_layer import NaViLTransformerLayer


class ExpertLoad:
    """The sums of all routers of the model; with one expert of each modality there is nothing to count."""

    def __init__(self, chunks: Sequence[nn.Module], num_layers: int, num_experts: int):
        columns = num_experts + len(MEASURED) if num_experts > 1 else 0
        self.shape = (num_layers, len(MODALITIES), columns)
        self._routers: dict[int, ModalityRouter] = {}
        for layer in (layer for chunk in chunks for layer in chunk.modules()):
            if columns and isinstance(layer, NaViLTransformerLayer):
                (router,) = (part for part in layer.modules() if isinstance(part, ModalityRouter))
                self._routers[layer.layer_number - 1] = router
        self._buffers = [router.get_buffer(name) for router in self._routers.values() for name in ("load", "sums")]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def settle(self, counts: bool) -> None:
        """At the end of a step: keeps what its routers added, or takes it back."""
        if self._buffers:
            into, source = (self._kept, self._buffers) if counts else (self._buffers, self._kept)
            torch._foreach_copy_(into, source)

    def take(self, device: torch.device) -> Tensor:
        """[layers, modalities, experts and measured sums] float64: this rank's rows of its own layers since the last
        call.
        """
        sums = torch.zeros(self.shape, dtype=torch.float64, device=device)
        for layer, router in self._routers.items():
            buffers = (router.get_buffer("load"), router.get_buffer("sums"))
            sums[layer] = torch.cat(buffers, dim=1)
        for buffer in (*self._buffers, *self._kept):
            buffer.zero_()
        return sums


def balance(sums: Tensor) -> dict[str, float]:
    """What a record says of each modality, as means over the layers; a modality without tokens is left out.

    An expert's most tokens over the mean (1 is even, the number of experts is collapse), also of the worst layer; the
    entropy of the scores over that of a router without preference; both losses without their weights. ``sums`` as
    ``ExpertLoad.take`` gives, of all ranks, on the host.
    """
    record = {}
    for modality, of_modality in zip(MODALITIES, sums.unbind(1), strict=True):
        load, measured = of_modality[:, : -len(MEASURED)], of_modality[:, -len(MEASURED) :]
        if not load.shape[1] or not bool((measured[:, 0] > 0).all()):
            continue
        ratio = load.amax(-1) / load.mean(-1)
        entropy, even, smallness = (measured[:, 1:] / measured[:, :1]).mean(0).tolist()
        record[f"{modality}_expert_imbalance"] = float(ratio.mean())
        record[f"{modality}_expert_imbalance_worst_layer"] = float(ratio.max())
        record[f"{modality}_router_entropy"] = entropy / log(load.shape[1])
        record[f"{modality}_router_aux_loss"] = even
        record[f"{modality}_router_z_loss"] = smallness
    return record
