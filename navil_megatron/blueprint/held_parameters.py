"""What a rank of a layout holds of the table of parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from navil_megatron.blueprint.experts_placement import local_experts
from navil_megatron.blueprint.parameters import EMBEDDING, HEAD, Parameter, Shape, parameters, parameters_by_key
from navil_megatron.blueprint.vocabulary import held_rows
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class HeldParameter:
    """One parameter of one layer on one rank."""

    name: str
    """As the rank's model chunk has it."""
    shape: Shape
    """Of the rank's piece, padding included."""
    parameter: Parameter

    @property
    def numel(self) -> int:
        """Numbers in the piece."""
        return prod(self.shape)


def layers_of_chunks(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Decoder layers of each pipeline chunk, in the order of the model."""
    return parallel.pipeline_layers or (num_layers // parallel.num_chunks,) * parallel.num_chunks


def chunk_parameters(
    model: ModelConfig, parallel: ParallelConfig, chunk: int, ep_rank: int = 0
) -> Iterator[HeldParameter]:
    """The parameters of one chunk on a rank with this place in its expert-parallel group, in the order of the model."""
    layers = layers_of_chunks(parallel, model.language.num_layers)
    for _, together in groupby(parameters(model), key=lambda entry: entry.num_layers):
        pieces = ((entry, piece_shape(entry, parallel, ep_rank), _copies(entry, chunk, layers)) for entry in together)
        held = [(entry, shape, copies) for entry, shape, copies in pieces if shape is not None]
        for number in range(max((copies for *_, copies in held), default=0)):
            yield from (HeldParameter(e.name(number), shape, e) for e, shape, copies in held if number < copies)
    if model.language.tied_embeddings and 0 < chunk == len(layers) - 1:
        table = parameters_by_key(model)[EMBEDDING]  # a copy, since another chunk embeds
        yield HeldParameter(HEAD, piece_shape(table, parallel, ep_rank) or table.shape, table)


def piece_shape(entry: Parameter, parallel: ParallelConfig, ep_rank: int) -> Shape | None:
    """Shape of a rank's piece of one layer; ``None`` where it holds nothing of it."""
    shape, ranks = list(entry.shape), parallel.tensor_model_parallel_size
    if entry.num_experts is not None and entry.modality is not None:
        held = local_experts(ep_rank, parallel.expert_model_parallel_size, entry.num_experts).get(entry.modality)
        if held is None:
            return None
        ranks = parallel.expert_tensor_size
        if entry.num_experts > 1:
            shape[0] = len(held)
    if entry.is_vocabulary:
        shape[0] = held_rows(shape[0], ranks)
    elif entry.split_dim is not None:
        shape[entry.split_dim] //= ranks
    return None if entry.is_shared else tuple(shape)


def is_routed(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether the feed-forward experts have ranks, or a router, of their own."""
    return model.language.num_experts > 1 or parallel.expert_model_parallel_size > 1


def expert_replicas(parallel: ParallelConfig, dp_size: int) -> int:
    """Ranks of a pipeline stage that hold the same part of the same experts."""
    ranks = dp_size * parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return ranks // (parallel.expert_tensor_size * parallel.expert_model_parallel_size)


def _copies(entry: Parameter, chunk: int, layers: Sequence[int]) -> int:
    """How many layers of the chunk have the parameter; of one outside the layers 1 or 0."""
    if entry.key.startswith("decoder.layers."):
        return layers[chunk]
    home = len(layers) - 1 if entry.key.startswith(("decoder.", HEAD)) else 0
    return (entry.num_layers or 1) * (chunk == home)
