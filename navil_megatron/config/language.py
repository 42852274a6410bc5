"""``[model.language]``: the decoder."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, get_args

from navil_megatron.config.modality import Sublayer
from navil_megatron.config.numbers import Count, NotNegative, Positive, Range, divides


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """The language model: a decoder whose attention and FFN hold one expert per modality (paper, section 3.2.2)."""

    family: Literal["qwen3", "qwen2", "llama", "internlm2"]
    """Names the Hugging Face layout that weights are read from and written to."""
    num_layers: Count
    """Decoder layers."""
    hidden_size: Count
    """Width of the residual stream."""
    ffn_hidden_size: Count
    """Width of the SwiGLU feed-forward network, per modality."""
    num_attention_heads: Count
    """Query heads."""
    num_query_groups: Count
    """Key/value heads (grouped-query attention)."""
    head_dim: Count
    """Channels of one attention head."""
    vocab_size: Count
    """Rows of the embedding table and of the LM head, special tokens included; any number at any layout."""
    qk_norm: bool
    """RMSNorm over each head's query and key, one per modality (Qwen3: true, the others: false)."""
    qkv_bias: bool = False
    """Bias on query, key and value, one per modality (Qwen2: true, the others: false)."""
    modality_experts: tuple[Sublayer, ...] = ("attention", "ffn")
    """Sublayers with weights of their own for each modality. In one that is left out both modalities go
    through the text weights, for studies of what the experts are worth; checkpoints hold those weights twice."""
    num_experts: Count = 1
    """Feed-forward experts of each modality; more than one come with a router for each modality."""
    experts_per_token: Count = 1
    """Experts that the router of a token's modality chooses; their weights sum to 1."""
    composed_visual_output_projection: bool = False
    """Visual tokens get W_visual(W_text(attn)) as the released 2B code computes it, instead of W_visual(attn)."""
    rope_theta: Positive = 1_000_000.0
    """Base of the rotary position frequencies."""
    rope_scaling_factor: Annotated[float, Range(1)] | None = None
    """Divides the slow rotary frequencies as Llama 3.1 does; ``None``: none is scaled."""
    rope_low_freq_factor: Positive = 1.0
    """Turns over the original length up to which a frequency is slow. Read where ``rope_scaling_factor`` is set."""
    rope_high_freq_factor: Positive = 4.0
    """Turns over the original length from which a frequency is fast and stays. Read as above."""
    rope_original_length: Count = 8_192
    """Tokens of a row before the scaling was introduced. Read as above."""
    norm_epsilon: Positive = 1e-6
    """Epsilon of every RMSNorm of the decoder."""
    max_position_embeddings: Count = 32_768
    """Longest position, in tokens; written to the exported folder."""
    tied_embeddings: bool = False
    """The LM head shares the embedding table."""
    visual_expert_init: Literal["copy", "random"] = "copy"
    """How visual experts start when a text-only LLM is the origin of the weights."""
    init_std: NotNegative = 0.02
    """Standard deviation of randomly initialised matrices."""

    def shares(self, sublayer: Sublayer) -> bool:
        """Whether both modalities go through the same weights in a sublayer."""
        return sublayer not in self.modality_experts


@dataclass(frozen=True, slots=True)
class FamilyTraits:
    """The values of ``LanguageConfig`` that come with a family's name."""

    qk_norm: bool = False
    qkv_bias: bool = False
    may_compose_visual_output: bool = False
    """The released code of a NaViL of this family applies the visual output projection after the text one."""

    @property
    def fixed(self) -> dict[str, bool]:
        """Settings of ``model.language`` that have one value in the family."""
        return {name: value for name, value in asdict(self).items() if name != "may_compose_visual_output"}


FAMILIES: dict[str, FamilyTraits] = {
    "qwen3": FamilyTraits(qk_norm=True),
    "qwen2": FamilyTraits(qkv_bias=True),
    "llama": FamilyTraits(),
    "internlm2": FamilyTraits(may_compose_visual_output=True),
}
"""By ``model.language.family``."""


def language_rules(language: LanguageConfig) -> Iterator[str]:
    """One line for every rule that the decoder breaks by itself."""
    yield from divides(
        "model.language.num_query_groups",
        language.num_query_groups,
        "model.language.num_attention_heads",
        language.num_attention_heads,
    )
    yield from family_rules(language)
    if language.rope_scaling_factor is not None and language.rope_low_freq_factor >= language.rope_high_freq_factor:
        yield (
            f"model.language.rope_low_freq_factor = {language.rope_low_freq_factor:g} is not less than "
            f"rope_high_freq_factor = {language.rope_high_freq_factor:g}; swap or change them"
        )
    if language.experts_per_token > language.num_experts:
        yield (
            f"model.language.experts_per_token = {language.experts_per_token} is more than num_experts = "
            f"{language.num_experts}; a token's experts are different ones"
        )
    yield from _shared_sublayer_rules(language)
    if language.head_dim % 2:
        yield f"model.language.head_dim = {language.head_dim}: rotary positions turn pairs of channels; make it even"
    width = language.num_attention_heads * language.head_dim
    if language.composed_visual_output_projection and width != language.hidden_size:
        yield (
            "model.language.composed_visual_output_projection needs num_attention_heads * head_dim = hidden_size; "
            f"found {width} and {language.hidden_size}; change head_dim or switch it off"
        )


def family_rules(language: LanguageConfig) -> Iterator[str]:
    """One line for every setting that the family's published code could not read or would compute otherwise."""
    traits = FAMILIES[language.family]
    for name, expected in traits.fixed.items():
        found = getattr(language, name)
        if found != expected:
            yield (
                f"model.language.{name} is {str(found).lower()}, but models of the {language.family} family have "
                f"{str(expected).lower()}; change it or model.language.family"
            )
    if language.composed_visual_output_projection and not traits.may_compose_visual_output:
        known = ", ".join(name for name, other in FAMILIES.items() if other.may_compose_visual_output)
        yield (
            f"model.language.composed_visual_output_projection is true, but the {language.family} family has no such "
            f"output; set it to false or use family {known}"
        )


def _shared_sublayer_rules(language: LanguageConfig) -> Iterator[str]:
    """What a sublayer without modality experts excludes."""
    parts = language.modality_experts
    named = f"model.language.modality_experts = {list(parts)}"
    if len(set(parts)) < len(parts):
        yield f"{named} holds a name more than once; name each part once"
    shared = [sublayer for sublayer in get_args(Sublayer) if language.shares(sublayer)]
    if not shared:
        return
    of_both = f"{named}: both modalities share the text weights of {' and '.join(shared)}"
    if language.visual_expert_init == "random":
        yield f'{of_both}, so no visual ones start at random; set model.language.visual_expert_init = "copy"'
    if language.shares("attention") and language.composed_visual_output_projection:
        yield f"{of_both}; switch model.language.composed_visual_output_projection off"
    if language.shares("ffn") and language.num_experts > 1:
        yield f"{of_both}, and routers belong to a modality; set model.language.num_experts = 1"
