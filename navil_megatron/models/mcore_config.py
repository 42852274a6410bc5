"""The sole place where our config becomes megatron-core's."""

import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.precision import PrecisionConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.training import Recomputed, TrainingConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_transformer_config(config: NaViLConfig) -> TransformerConfig:
    """megatron-core's view of the decoder and of the layout.

    Weights are left uninitialised: ``models.build`` fills them by seed, the same at every layout. The loss is a sum, so
    ``calculate_per_token_loss`` makes core divide by the global weight and by nothing else.
    """
    language, parallel = config.model.language, config.parallel
    dtype = DTYPES[config.precision.type]
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.head_dim,
        qk_layernorm=language.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_pipeline_layout(config),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        **_experts(config),
        **_interleaving(parallel),
        **_recompute(config.training),
        **_fp8(config.precision),
    )


def _experts(config: NaViLConfig) -> dict:
    """What our router and core's token dispatcher read; where each modality has one expert and every rank has both,
    core need not know that there are experts.
    """
    language, parallel = config.model.language, config.parallel
    if language.num_experts == 1 and parallel.expert_model_parallel_size == 1:
        return {}
    return {
        "num_moe_experts": len(MODALITIES) * language.num_experts,
        "moe_router_topk": language.experts_per_token,
        # Our router takes a softmax over the experts of one modality; core refuses one expert per token without it.
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": config.training.router_aux_loss,
        "moe_z_loss_coeff": config.training.router_z_loss,
        "moe_token_dispatcher_type": "alltoall",
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }


def _interleaving(parallel: ParallelConfig) -> dict:
    """Under the interleaved schedule two stages send each other activations and gradients at once. Batched sends and
    receives are matched by order alone, so with two stages they would be swapped, silently; overlapped ones are not.
    """
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {"overlap_p2p_comm": interleaved, "batch_p2p_comm": not interleaved, "batch_p2p_sync": False}


def _fp8(precision: PrecisionConfig) -> dict:
    """Core enters the recipe around each layer, and around the whole pass for delayed scaling."""
    if precision.fp8 == "none":
        return {}
    return {
        "fp8": "e4m3" if precision.fp8 == "blockwise" else "hybrid",
        "fp8_recipe": precision.fp8,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        # The ranks that hold parts of a layer share scales; replicas need not, and would wait for one another.
        "tp_only_amax_red": True,
        "first_last_layers_bf16": precision.fp8_first_last_layers_bf16,
    }


def _recompute(training: TrainingConfig) -> dict:
    """Pieces of the decoder's layers; whole layers and the encoder's are not core's."""
    if training.recompute == "full":
        return {}
    core_names: dict[Recomputed, str] = {"attention": "core_attn", "mlp": "mlp"}
    modules = [name for part, name in core_names.items() if training.recomputes(part)]
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


def _pipeline_layout(config: NaViLConfig) -> PipelineParallelLayerLayout | None:
    """Uneven stages: the first also holds encoder and connector, so it usually takes fewer decoder layers."""
    layers = config.parallel.pipeline_layers
    if layers is None:
        return None
    stages = [["decoder"] * count for count in layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return PipelineParallelLayerLayout(stages, config.parallel.pipeline_model_parallel_size)
