"""Configuration of NaViL in the layout of the authors' ``config.json``, with a few keys more.

Keys that the authors' files lack default to what their code does: ``token_order`` "window", the composed visual
output projection for InternLM2, ``connector_norm_eps`` 1e-5, encoder ``rope_theta`` 10,000.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class NaViLVisionConfig(PretrainedConfig):
    """The visual encoder."""

    model_type = "navil_vit"

    def __init__(
        self,
        num_hidden_layers: int = 24,
        hidden_size: int = 1472,
        intermediate_size: int = 5888,
        num_attention_heads: int = 23,
        patch_size: int = 16,
        downsample_ratio: float = 0.5,
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        initializer_factor: float = 0.1,
        initializer_range: float = 0.02,
        rope_theta: float = 10_000.0,
        token_order: str = "window",
        window_size: int = 8,
        fullatt_block_indexes: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps every setting; unknown keys are kept too."""
        if kwargs.get("qk_normalization"):
            raise ValueError("qk_normalization=True is not supported (the reference crashes on it); set it to false")
        if token_order not in ("window", "raster"):
            raise ValueError(f"token_order is {token_order!r}, expected 'window' or 'raster'")
        if token_order == "raster" and fullatt_block_indexes is not None:
            raise ValueError("fullatt_block_indexes needs token_order='window'")
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.qkv_bias = qkv_bias
        self.initializer_factor = initializer_factor
        self.initializer_range = initializer_range
        self.rope_theta = rope_theta
        self.token_order = token_order
        self.window_size = window_size
        self.fullatt_block_indexes = fullatt_block_indexes
        super().__init__(**kwargs)


class NaViLLanguageConfig(PretrainedConfig):
    """The language model; ``architectures[0]`` names its family, as in the authors' files."""

    model_type = "navil_llm"

    def __init__(
        self,
        architectures: list[str] | None = None,
        num_hidden_layers: int = 24,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        vocab_size: int = 92_556,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1_000_000.0,
        max_position_embeddings: int = 32_768,
        initializer_range: float = 0.02,
        composed_visual_output_projection: bool | None = None,
        num_experts: int = 1,
        num_experts_per_tok: int = 1,
        **kwargs: Any,
    ) -> None:
        """Keeps every setting; dynamic-NTK scaling is dropped, for it only acts beyond ``max_position_embeddings``.

        ``rope_parameters`` exists where the rotary frequencies are scaled, as Llama 3.1's are.
        """
        architectures = architectures or ["Qwen3VEForCausalLM"]
        scaling = {**(kwargs.pop("rope_scaling", None) or {}), **(kwargs.pop("rope_parameters", None) or {})}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in ("default", "dynamic", "llama3"):
            raise ValueError(f"rope scaling {kind!r} is not supported, only 'default', 'dynamic' and 'llama3'")
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.vocab_size = vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = scaling.get("rope_theta", rope_theta)
        if kind == "llama3":
            self.rope_parameters = {**scaling, "rope_type": kind, "rope_theta": self.rope_theta}
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        if composed_visual_output_projection is None:
            composed_visual_output_projection = architectures[0] == "InternLM2VEForCausalLM"
        self.composed_visual_output_projection = composed_visual_output_projection
        super().__init__(architectures=architectures, **kwargs)


class NaViLChatConfig(PretrainedConfig):
    """The whole model: ``llm_config``, ``vision_config`` and how an image becomes tokens."""

    model_type = "navil_chat"
    sub_configs: ClassVar[dict[str, type]] = {"llm_config": NaViLLanguageConfig, "vision_config": NaViLVisionConfig}

    def __init__(
        self,
        llm_config: dict[str, Any] | NaViLLanguageConfig | None = None,
        vision_config: dict[str, Any] | NaViLVisionConfig | None = None,
        special_token_ids: list[int] | None = None,
        downsample_ratio: float = 0.5,
        connector_norm_eps: float = 1e-5,
        min_dynamic_patch: int = 256,
        max_dynamic_patch: int = 24_576,
        scale_downsample_ratio: float = 0.7071,
        **kwargs: Any,
    ) -> None:
        """Builds the two parts.

        Args:
            llm_config: Settings of the language model.
            vision_config: Settings of the visual encoder.
            special_token_ids: Ids of the 12 special tokens in the row order of the special-token embedding.
                The authors' folders lack it; ``NaViL.init_special_token_ids(tokenizer)`` fills it in.
            downsample_ratio: One over the side, in patches, of the block that becomes one visual token.
            connector_norm_eps: Epsilon of the connector's LayerNorm.
            min_dynamic_patch: Fewest patches of an image scale.
            max_dynamic_patch: Most patches of an image scale, before padding.
            scale_downsample_ratio: Side ratio of successive scales.
            **kwargs: Whatever else the file holds.
        """
        if not isinstance(llm_config, NaViLLanguageConfig):
            llm_config = NaViLLanguageConfig(**llm_config or {})
        if not isinstance(vision_config, NaViLVisionConfig):
            vision_config = NaViLVisionConfig(**vision_config or {})
        self.llm_config = llm_config
        self.vision_config = vision_config
        self.special_token_ids = special_token_ids
        self.downsample_ratio = downsample_ratio
        self.connector_norm_eps = connector_norm_eps
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.scale_downsample_ratio = scale_downsample_ratio
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> NaViLLanguageConfig:
        """The part that transformers sizes caches and vocabularies by."""
        return self.llm_config

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: every value of both parts.

        transformers 4 leaves out what equals a default, and the readers of a folder need not share this class's.
        """
        return super().to_diff_dict() | {name: getattr(self, name).to_dict() for name in self.sub_configs}
