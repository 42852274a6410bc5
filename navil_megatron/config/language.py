"""``[model.language]``: the decoder."""

from dataclasses import dataclass
from typing import Literal

from navil_megatron.config.modality import ModalityPart


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """The language model: a decoder whose attention and FFN hold one expert per modality (paper, section 3.2.2)."""

    family: Literal["qwen3", "qwen2", "llama", "internlm2"]
    """Names the Hugging Face layout that weights are read from and written to."""
    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the SwiGLU feed-forward network, per modality."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads (grouped-query attention)."""
    head_dim: int
    """Channels of one attention head."""
    vocab_size: int
    """Rows of the embedding table and of the LM head, special tokens included."""
    qk_norm: bool
    """RMSNorm over each head's query and key, one per modality (Qwen3: true, the others: false)."""
    qkv_bias: bool = False
    """Bias on query, key and value, one per modality (Qwen2: true, the others: false)."""
    modality_experts: tuple[ModalityPart, ...] = ("attention", "ffn")
    """Parts of a layer with weights of their own for each modality. In a part that is left out both modalities go
    through the text weights, for studies of what the experts are worth; checkpoints hold those weights twice."""
    num_experts: int = 1
    """Feed-forward experts of each modality; more than one come with a router for each modality."""
    experts_per_token: int = 1
    """Experts that the router of a token's modality chooses; their weights sum to 1."""
    composed_visual_output_projection: bool = False
    """Visual tokens get W_visual(W_text(attn)) as the released 2B code computes it, instead of W_visual(attn)."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary position frequencies."""
    rope_scaling_factor: float | None = None
    """Divides the slow rotary frequencies as Llama 3.1 does; ``None``: none is scaled."""
    rope_low_freq_factor: float = 1.0
    """Turns over the original length up to which a frequency is slow. Read where ``rope_scaling_factor`` is set."""
    rope_high_freq_factor: float = 4.0
    """Turns over the original length from which a frequency is fast and stays. Read as above."""
    rope_original_length: int = 8_192
    """Tokens of a row before the scaling was introduced. Read as above."""
    norm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm of the decoder."""
    max_position_embeddings: int = 32_768
    """Longest position, in tokens; written to the exported folder."""
    tied_embeddings: bool = False
    """The LM head shares the embedding table."""
    visual_expert_init: Literal["copy", "random"] = "copy"
    """How visual experts start when a text-only LLM is the origin of the weights."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices."""

    def shares(self, part: ModalityPart) -> bool:
        """Whether both modalities go through the same weights in a part of a layer."""
        return part not in self.modality_experts
