"""Joins NaViL's layers with the chosen kernels into megatron-core's layer spec."""

from functools import partial

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from navil_megatron.config.language import LanguageConfig
from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.modality_attention import ModalityAttentionSubmodules, ModalitySelfAttention
from navil_megatron.layers.modality_experts import ModalityExperts
from navil_megatron.layers.modality_mlp import ModalityMLP
from navil_megatron.layers.transformer_layer import NaViLTransformerLayer, decoder_norm, residual_add


def decoder_block_spec(
    language: LanguageConfig,
    config: TransformerConfig,
    kernels: Kernels,
    recomputes_all: bool,
    vp_stage: int | None,
    pp_rank: int,
) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage (one chunk of it under the interleaved schedule)."""
    experts = (
        partial(ModalityMLP, kernels=kernels, shared=language.shares("ffn"))
        if config.num_moe_experts is None
        else partial(ModalityExperts, kernels=kernels)
    )
    norm = partial(decoder_norm, kernels.norms["rmsnorm"])
    attention = ModuleSpec(module=ModalitySelfAttention, submodules=ModalityAttentionSubmodules(kernels, language))
    layer = ModuleSpec(
        module=NaViLTransformerLayer,
        params={"recompute": kernels.recompute, "recomputes_all": recomputes_all},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=residual_add,
            pre_mlp_layernorm=norm,
            mlp=experts,
            mlp_bda=residual_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
