"""Builds the model chunks of one rank and fills them by seed, with the same values at every layout."""

import hashlib
import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from navil_megatron.blueprint.initial_values import initial_values
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.provider import choose_kernels
from navil_megatron.models.freezing import apply_phase
from navil_megatron.models.mcore_config import build_transformer_config
from navil_megatron.models.navil_model import NaViLModel


def build_model(config: NaViLConfig, pg_collection: ProcessGroupCollection, device: torch.device) -> list[NaViLModel]:
    """This rank's chunks, one unless the schedule is interleaved, initialised and frozen for the phase."""
    transformer_config = build_transformer_config(config)
    pp_rank, pp_size = pg_collection.pp.rank(), pg_collection.pp.size()
    num_chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for chunk in range(num_chunks):
        with torch.device(device):
            chunks.append(
                NaViLModel(
                    config.model,
                    config.training,
                    transformer_config,
                    choose_kernels(config),
                    pg_collection,
                    pre_process=pp_rank == 0 and chunk == 0,
                    post_process=pp_rank == pp_size - 1 and chunk == num_chunks - 1,
                    vp_stage=chunk if num_chunks > 1 else None,
                )
            )
    for built in chunks:
        initialize_weights(built, config.model, config.training.seed)
    apply_phase(chunks, config.training.phase)
    return chunks


@torch.no_grad()
def initialize_weights(chunk: NaViLModel, model: ModelConfig, seed: int) -> None:
    """Fills a chunk as ``config.initial_values`` says.

    Every whole tensor has a generator of its own, seeded by (seed, name, layer), and a tensor-parallel rank keeps its
    slice. Text and visual experts start different; copying one from the other is the converter's business.
    """
    if any(parameter.is_meta for parameter in chunk.parameters()):
        return  # a dry run: shapes without values
    first_layer = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    for name, parameter in chunk.named_parameters():
        mean, std = initial_values(name, parameter.dim(), model)
        if std == 0:
            parameter.fill_(mean)
        else:
            whole_name = _whole_name(name, first_layer, model.language.tied_embeddings)
            parameter.copy_(_random_slice(parameter, std, seed, whole_name, chunk.tp_group))


def _whole_name(name: str, first_layer: int, tied: bool) -> str:
    """Name that is the same at every pipeline layout: decoder layers by their global number."""
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    if name.startswith("decoder.layers."):
        number, rest = name.removeprefix("decoder.layers.").split(".", 1)
        return f"decoder.layers.{int(number) + first_layer}.{rest}"
    return name


def _random_slice(parameter: nn.Parameter, std: float, seed: int, name: str, tp_group: ProcessGroup) -> Tensor:
    """This rank's slice of the whole random tensor. Experts are drawn all, split over ranks of their own."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    experts: range | None = getattr(parameter, "experts", None)
    tp_group = getattr(parameter, "tp_group", tp_group)
    dim, size = getattr(parameter, "partition_dim", -1), tp_group.size()
    shape = list(parameter.shape)
    if experts is not None:
        shape[0] = parameter.num_experts  # type: ignore[attr-defined]
    held = slice(None) if experts is None else slice(experts.start, experts.stop)
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return torch.empty(shape, device=parameter.device).normal_(0.0, std, generator=generator)[held]
    shape[dim] *= size
    whole = torch.empty(shape, device=parameter.device).normal_(0.0, std, generator=generator)
    piece = math.ceil(parameter.shape[dim] / parameter.partition_stride)  # type: ignore[attr-defined]
    return torch.cat(whole[held].split(piece, dim=dim)[tp_group.rank() :: size], dim=dim)
