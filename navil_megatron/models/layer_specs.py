"""Joins NaViL's layers with the chosen kernels into megatron-core's layer spec."""

from functools import partial
from typing import get_args

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import Sublayer
from navil_megatron.kernels.provider import Kernels
from navil_megatron.layers.modality_attention import ModalityAttentionSubmodules, ModalitySelfAttention
from navil_megatron.layers.modality_experts import ModalityExperts
from navil_megatron.layers.modality_linear import LinearKernels, modality_product
from navil_megatron.layers.modality_mlp import ModalityMLP
from navil_megatron.layers.transformer_layer import NaViLTransformerLayer, residual_add


def decoder_block_spec(
    language: LanguageConfig, config: TransformerConfig, kernels: Kernels, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage (one chunk of it under the interleaved schedule)."""
    linears = {
        part: LinearKernels(kernels.linear, kernels.modality_product or modality_product, shared=language.shares(part))
        for part in get_args(Sublayer)
    }
    experts = ModalityMLP if config.num_moe_experts is None else ModalityExperts
    layer = ModuleSpec(
        module=NaViLTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=kernels.rms_norm,
            self_attention=ModuleSpec(
                module=ModalitySelfAttention,
                submodules=ModalityAttentionSubmodules(
                    attention=kernels.segment_attention,
                    linears=linears["attention"],
                    language=language,
                ),
            ),
            self_attn_bda=residual_add,
            pre_mlp_layernorm=kernels.rms_norm,
            mlp=partial(experts, linears=linears["ffn"]),
            mlp_bda=residual_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=kernels.rms_norm)
