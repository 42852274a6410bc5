"""How large the decoder's hidden states are, layer by layer, text and visual tokens apart (paper, section 3.2.2).

The paper's reason for experts in attention too: without them the scales of both modalities drift apart. Layers are
watched from outside, in the steps that are asked for; sums stay on the device until a record is made.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.run import NaViLConfig
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.transformer_layer import NaViLTransformerLayer
from navil_megatron.training.state import TrainingState, is_due

_SUMS = 4  # over tokens: 1, mean square, mean absolute value, and the square of that


class FeatureScale:
    """The sums of this rank's layers. Rows that recompute or replicas count again leave all means as they are.

    ``state`` says whether the step that is made is one to measure.
    """

    def __init__(
        self,
        config: NaViLConfig,
        chunks: Sequence[nn.Module],
        groups: ProcessGroupCollection,
        device: torch.device,
        state: TrainingState,
    ):
        self._config, self._state = config, state
        is_wanted = config.logging.feature_scale_every_steps is not None
        num_layers = config.model.language.num_layers if is_wanted else 0
        self._sums = torch.zeros(num_layers + 1, len(MODALITIES), _SUMS, dtype=torch.float64, device=device)
        self._kept = self._sums.clone()
        # Under sequence parallelism each rank of the group holds its share of the rows.
        is_split = config.parallel.sequence_parallel
        self._share = (groups.tp.rank(), groups.tp.size()) if is_split else (0, 1)
        for layer in (layer for chunk in chunks for layer in chunk.modules()):
            if is_wanted and isinstance(layer, NaViLTransformerLayer):
                layer.register_forward_hook(partial(self._leaving, layer.layer_number), with_kwargs=True)
                if layer.layer_number == 1:
                    layer.register_forward_pre_hook(self._entering, with_kwargs=True)

    def take(self) -> Tensor:
        """[layers + 1, modalities, sums] float64 of this rank since the last call, the token embeddings first."""
        sums = self._sums.clone()
        self._sums.zero_()
        self._kept.zero_()
        return sums

    def settle(self, counts: bool) -> None:
        """At the end of a step: keeps what was measured in it, or takes it back."""
        if len(self._sums) > 1:
            into, source = (self._kept, self._sums) if counts else (self._sums, self._kept)
            into.copy_(source)

    def _entering(self, layer: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self._add(layer, 0, named["hidden_states"], named["packed_seq_params"])

    def _leaving(self, place: int, layer: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        self._add(layer, place, output[0], named["packed_seq_params"])

    @torch.no_grad()
    def _add(self, layer: nn.Module, place: int, hidden_states: Tensor, plan: NaViLPackedSeqParams) -> None:
        """Rows of this rank, [t/tp, 1, h] or [t, 1, h], padding not counted."""
        every, last = self._config.logging.feature_scale_every_steps, self._config.training.train_steps
        if not (layer.training and is_due(self._state.step + 1, every, last)):
            return
        rows = hidden_states.detach().flatten(0, 1)
        rank, num_shares = self._share
        num_text, width = plan.local_num_text_tokens(rank, num_shares), rows.shape[1]
        # Norms read rows of any type and give FP32: no copy of the rows is made.
        mean_square = torch.linalg.vector_norm(rows, 2, 1, dtype=torch.float32).double().square() / width
        mean_size = torch.linalg.vector_norm(rows, 1, 1, dtype=torch.float32).double() / width
        columns = torch.stack([torch.ones_like(mean_size), mean_square, mean_size, mean_size.square()], 1)
        columns *= plan.sample_tokens[rank * len(rows) :][: len(rows)].unsqueeze(1)
        parts = columns.split([num_text, len(rows) - num_text])
        self._sums[place] += torch.stack([part.sum(0) for part in parts])


def scales(sums: Tensor) -> dict[str, float | int]:
    """What a record says: by layer the root mean square, and at the end what the authors' code prints.

    Layer 0 is the token embeddings, layer n what leaves the n-th decoder layer. ``spread``: standard deviation over the
    last layer's tokens of their mean absolute value. ``sums`` as ``take`` gives, of all ranks, on the host.
    """
    record: dict[str, float | int] = {}
    digits = len(str(len(sums) - 1))
    for modality, of_modality in zip(MODALITIES, sums.unbind(1), strict=True):
        tokens, squares, sizes, squared_sizes = of_modality.unbind(1)
        if not bool((tokens > 0).all()):
            continue
        for layer, scale in enumerate((squares / tokens).sqrt().tolist()):
            record[f"{modality}/layer_{layer:0{digits}}"] = scale
        variance = squared_sizes[-1] / tokens[-1] - (sizes[-1] / tokens[-1]).square()
        record[f"{modality}/last_layer_spread"] = float(variance.clamp(min=0).sqrt())
    return record
