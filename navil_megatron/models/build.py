"""Builds the model chunks of one rank and fills them by seed, with the same values at every layout."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from navil_megatron.blueprint.experts_placement import local_experts
from navil_megatron.blueprint.parameters import Parameter, initial_seed, is_trainable, parameter_of
from navil_megatron.blueprint.vocabulary import held_rows, words_of_rank
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.provider import choose_kernels
from navil_megatron.models.mcore_config import build_transformer_config
from navil_megatron.models.navil_model import NaViLModel
from navil_megatron.models.sharded_weights import layer_number


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
        # Before any gradient buffer is made.
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(is_trainable(parameter_of(config.model, name).part, config.training.phase))
    return chunks


@torch.no_grad()
def initialize_weights(chunk: NaViLModel, model: ModelConfig, seed: int) -> None:
    """Fills a chunk as the table of parameters says.

    Every whole tensor has a generator of its own, seeded by (seed, name, layer), and a tensor-parallel rank keeps its
    slice. Text and visual experts start different; copying one from the other is the converter's business.
    """
    if any(parameter.is_meta for parameter in chunk.parameters()):
        return  # a dry run: shapes without values
    for name, parameter in chunk.named_parameters():
        row = parameter_of(model, name)
        if row.std == 0:
            parameter.fill_(row.mean)
        else:
            whole_name = row.name(layer_number(row, name, chunk.first_layer))
            parameter.copy_(random_slice(row, whole_name, seed, chunk.pg_collection, parameter.device))


def random_slice(
    row: Parameter, name: str, seed: int, pg_collection: ProcessGroupCollection, device: torch.device
) -> Tensor:
    """This rank's slice of the whole random tensor, of which every rank draws all; rows behind the last word are 0."""
    generator = torch.Generator(device).manual_seed(initial_seed(seed, name))
    whole = torch.empty(row.shape, device=device).normal_(row.mean, row.std, generator=generator)
    group = pg_collection.tp
    if row.is_vocabulary:
        words = words_of_rank(len(whole), group.rank(), group.size())
        padding = held_rows(len(whole), group.size()) - len(words)
        return nn.functional.pad(whole[words.start : words.stop], (0, 0, 0, padding))
    if row.num_experts is not None and row.modality is not None:
        group = pg_collection.expt_tp
        if row.num_experts > 1:
            held = local_experts(pg_collection.ep.rank(), pg_collection.ep.size(), row.num_experts)[row.modality]
            whole = whole[held.start : held.stop]
    if row.split_dim is None or group.size() == 1:
        return whole
    blocks = whole.chunk(row.split_blocks, dim=row.split_dim)
    return torch.cat([block.chunk(group.size(), dim=row.split_dim)[group.rank()] for block in blocks], row.split_dim)
