"""NaViL's language models: Qwen3, Qwen2, Llama and InternLM2 decoders with a visual expert beside every matrix.

As the reference does it, text projections run on all tokens and visual ones again on visual tokens; attention is
one joint causal softmax (paper, section 3.2.2). Norms are shared, except Qwen3's q and k norms.
Shapes: b batch, s tokens, h hidden, n query heads, g KV heads, d channels of a head.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache

from .configuration_navil_chat import NaViLLanguageConfig


@dataclass(frozen=True)
class DecoderContext:
    """What every layer of one forward pass shares."""

    cos: torch.Tensor
    """[b, 1, s, d]."""
    sin: torch.Tensor
    """[b, 1, s, d]."""
    mask: torch.Tensor | None
    """[b, 1, s, keys] bool, True where a query sees a key; ``None``: plain causal."""
    text: torch.Tensor
    """Flat positions in [b * s] of the tokens for the text experts."""
    visual: torch.Tensor | None
    """Flat positions of the tokens for the visual experts; ``None``: there are none."""
    cache: Cache | None
    """Keys and values of earlier tokens."""
    num_keys: int
    """Tokens so far, cached and new; a static cache gives more keys than that."""

    def to(self, device: torch.device | int | str, **settings: Any) -> "DecoderContext":
        """The same on another device: accelerate calls it where layers are spread over devices."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device, **settings) for name, value in tensors.items()})


class NaViLRMSNorm(nn.Module):
    """RMSNorm; InternLM2 returns to the activations' type after the weight, the others before it."""

    def __init__(self, size: int, eps: float, cast_before_weight: bool) -> None:
        """Starts as the identity scale."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.cast_before_weight = cast_before_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.cast_before_weight:
            return self.weight * normed.to(x.dtype)
        return (self.weight.float() * normed).to(x.dtype)


def rotary_tables(
    position_ids: torch.Tensor, config: NaViLLanguageConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Cosine and sine [b, 1, s, d] of rotate-half RoPE; computed each time, so there is no buffer to load or lose."""
    frequencies = _rotary_frequencies(config, position_ids.device)
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotary_frequencies(config: NaViLLanguageConfig, device: torch.device) -> torch.Tensor:
    """[d / 2] float32. Llama 3.1 divides the slow ones, by their turns over the original length of a row."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = config.rope_theta ** (-channels / config.head_dim)
    scaling = getattr(config, "rope_parameters", None)
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = frequencies * (scaling["original_max_position_embeddings"] / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def _rotate(x: torch.Tensor, context: DecoderContext) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * context.cos + torch.cat((-second, first), dim=-1) * context.sin


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_index: int, context: DecoderContext
) -> torch.Tensor:
    """[b, s, n, d], [b, s, g, d], [b, s, g, d] -> [b * s, n * d] before the output projection."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = _rotate(q, context), _rotate(k, context)
    if context.cache is not None:
        # Some versions place a static cache's keys by these positions, others count themselves.
        places = {"cache_position": torch.arange(context.num_keys - k.shape[2], context.num_keys, device=k.device)}
        k, v = (x[:, :, : context.num_keys] for x in context.cache.update(k, v, layer_index, places))
    causal = context.mask is None and q.shape[2] > 1
    mixed = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=context.mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return mixed.transpose(1, 2).flatten(0, 1).flatten(1)


class SplitVEAttention(nn.Module):
    """Separate q, k, v; every one of them, and the output, once per modality. Biases and head norms by family."""

    qkv_bias = False
    qk_norm = False

    def __init__(self, config: NaViLLanguageConfig, layer_index: int) -> None:
        """Sizes from the config; ``head_dim`` need not be hidden size over heads."""
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        h, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        n, g = config.num_attention_heads, config.num_key_value_heads
        for suffix in ("", "_ve"):
            for name, heads in (("q", n), ("k", g), ("v", g)):
                self.add_module(f"{name}_proj{suffix}", nn.Linear(h, heads * d, bias=self.qkv_bias))
            self.add_module(f"o_proj{suffix}", nn.Linear(n * d, h, bias=False))
            for name in "qk" if self.qk_norm else "":
                self.add_module(f"{name}_norm{suffix}", NaViLRMSNorm(d, eps, cast_before_weight=True))

    def _project(self, x: torch.Tensor, suffix: str) -> list[torch.Tensor]:
        """[t, h] -> q [t, n, d], k [t, g, d], v [t, g, d] by the experts of one modality, q and k normed."""
        experts = self._modules
        q, k, v = (experts[f"{name}_proj{suffix}"](x).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        if self.qk_norm:
            q, k = experts[f"q_norm{suffix}"](q), experts[f"k_norm{suffix}"](k)
        return [q, k, v]

    def forward(self, x: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        batch, flat = x.shape[0], x.flatten(0, 1)
        qkv = self._project(flat, "")
        if context.visual is not None:
            for part, visual_part in zip(qkv, self._project(flat[context.visual], "_ve"), strict=True):
                part[context.visual] = visual_part
        q, k, v = (part.unflatten(0, (batch, -1)) for part in qkv)
        mixed = _attend(q, k, v, self.layer_index, context)
        out = self.o_proj(mixed)
        if context.visual is not None:
            out[context.visual] = self.o_proj_ve(mixed[context.visual])
        return out.unflatten(0, (batch, -1))


class Qwen3VEAttention(SplitVEAttention):
    """A norm per head on query and key."""

    qk_norm = True


class Qwen2VEAttention(SplitVEAttention):
    """Biases on query, key and value."""

    qkv_bias = True


class InternLM2VEAttention(nn.Module):
    """Fused q, k, v per KV group; visual tokens leave through W_visual(W_text(.)) where the config says composed."""

    def __init__(self, config: NaViLLanguageConfig, layer_index: int) -> None:
        """Rows of ``wqkv``: for each KV group its query heads, then k, then v."""
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.num_groups = config.num_key_value_heads
        self.composed = config.composed_visual_output_projection
        h, n = config.hidden_size, config.num_attention_heads
        rows = (n + 2 * self.num_groups) * self.head_dim
        self.wqkv = nn.Linear(h, rows, bias=False)
        self.wqkv_ve = nn.Linear(h, rows, bias=False)
        self.wo = nn.Linear(n * self.head_dim, h, bias=False)
        self.wo_ve = nn.Linear(h if self.composed else n * self.head_dim, h, bias=False)

    def forward(self, x: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        batch, flat = x.shape[0], x.flatten(0, 1)
        qkv = self.wqkv(flat)
        if context.visual is not None:
            qkv[context.visual] = self.wqkv_ve(flat[context.visual])
        grouped = qkv.view(batch, -1, self.num_groups, qkv.shape[-1] // self.num_groups // self.head_dim, self.head_dim)
        q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        mixed = _attend(q, k, v, self.layer_index, context)
        out = self.wo(mixed)
        if context.visual is not None:
            source = out if self.composed else mixed
            out[context.visual] = self.wo_ve(source[context.visual])
        return out.unflatten(0, (batch, -1))


class SplitVEMLP(nn.Module):
    """SwiGLU under the names of Llama and both Qwen."""

    def __init__(self, config: NaViLLanguageConfig) -> None:
        """No biases."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[t, h] -> [t, h]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class InternLM2VEMLP(nn.Module):
    """SwiGLU under InternLM2's names."""

    def __init__(self, config: NaViLLanguageConfig) -> None:
        """No biases."""
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[t, h] -> [t, h]."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class ExpertsVE(nn.Module):
    """Several experts of one modality and the router that weighs the chosen ones; the weights sum to 1."""

    def __init__(self, config: NaViLLanguageConfig, expert_class: type[nn.Module]) -> None:
        """All experts of one size, no biases."""
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(expert_class(config) for _ in range(config.num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]; no token is dropped."""
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).float().softmax(-1).topk(self.num_chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


def _build_feed_forward(config: NaViLLanguageConfig, expert_class: type[nn.Module]) -> nn.Module:
    """One modality's share: an expert, or several behind a router."""
    return ExpertsVE(config, expert_class) if config.num_experts > 1 else expert_class(config)


def _feed_forward(x: torch.Tensor, text: nn.Module, visual: nn.Module, context: DecoderContext) -> torch.Tensor:
    """[b, s, h] -> [b, s, h]; each token through the expert of its modality."""
    if context.visual is None:
        return text(x)
    flat = x.flatten(0, 1)
    out = torch.empty_like(flat)
    out[context.text] = text(flat[context.text])
    out[context.visual] = visual(flat[context.visual])
    return out.view_as(x)


class LlamaVEDecoderLayer(nn.Module):
    """One layer under the names of Llama and both Qwen."""

    attention_class = SplitVEAttention

    def __init__(self, config: NaViLLanguageConfig, layer_index: int) -> None:
        """Norms before both branches, shared by the modalities."""
        super().__init__()
        self.self_attn = self.attention_class(config, layer_index)
        self.mlp = _build_feed_forward(config, SplitVEMLP)
        self.mlp_ve = _build_feed_forward(config, SplitVEMLP)
        self.input_layernorm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps, cast_before_weight=True)
        self.post_attention_layernorm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps, cast_before_weight=True)

    def forward(self, x: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + _feed_forward(self.post_attention_layernorm(x), self.mlp, self.mlp_ve, context)


class Qwen3VEDecoderLayer(LlamaVEDecoderLayer):
    """With head norms."""

    attention_class = Qwen3VEAttention


class Qwen2VEDecoderLayer(LlamaVEDecoderLayer):
    """With biases."""

    attention_class = Qwen2VEAttention


class InternLM2VEDecoderLayer(nn.Module):
    """One layer under InternLM2's names."""

    def __init__(self, config: NaViLLanguageConfig, layer_index: int) -> None:
        """Norms before both branches, shared by the modalities."""
        super().__init__()
        self.attention = InternLM2VEAttention(config, layer_index)
        self.feed_forward = _build_feed_forward(config, InternLM2VEMLP)
        self.feed_forward_ve = _build_feed_forward(config, InternLM2VEMLP)
        self.attention_norm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps, cast_before_weight=False)
        self.ffn_norm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps, cast_before_weight=False)

    def forward(self, x: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.attention(self.attention_norm(x), context)
        return x + _feed_forward(self.ffn_norm(x), self.feed_forward, self.feed_forward_ve, context)


class _VEForCausalLM(nn.Module):
    """A decoder and its head. A tied head is no module of its own, so a file never holds the table twice."""

    embedding_name: str
    head_name: str
    layer_class: type[nn.Module]
    cast_before_weight: bool
    gradient_checkpointing = False  # transformers sets it, and the function below, on every module that has it

    def __init__(self, config: NaViLLanguageConfig) -> None:
        """Builds the tree of names that the authors' files have."""
        super().__init__()
        self.config = config
        norm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps, self.cast_before_weight)
        layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({self.embedding_name: table, "layers": layers, "norm": norm})
        if not config.tie_word_embeddings:
            self.add_module(self.head_name, nn.Linear(config.hidden_size, config.vocab_size, bias=False))

    @property
    def embedding(self) -> nn.Embedding:
        """The plain token table."""
        return self.model[self.embedding_name]

    def forward(self, inputs_embeds: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """[b, s, h] -> hidden states after the final norm [b, s, h]."""
        x = inputs_embeds
        for layer in self.model["layers"]:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, context)
            else:
                x = layer(x, context)
        return self.model["norm"](x)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., vocabulary]."""
        head = getattr(self, self.head_name, None)
        if head is None:
            return functional.linear(hidden_states, self.embedding.weight.to(hidden_states.device))
        return head(hidden_states)


class LlamaVEForCausalLM(_VEForCausalLM):
    """A NaViL that started from Llama or a model in its layout."""

    embedding_name = "embed_tokens"
    head_name = "lm_head"
    layer_class = LlamaVEDecoderLayer
    cast_before_weight = True


class Qwen2VEForCausalLM(LlamaVEForCausalLM):
    """A NaViL that started from Qwen2 or Qwen2.5."""

    layer_class = Qwen2VEDecoderLayer


class Qwen3VEForCausalLM(LlamaVEForCausalLM):
    """The language model of NaViL-9B."""

    layer_class = Qwen3VEDecoderLayer


class InternLM2VEForCausalLM(_VEForCausalLM):
    """The language model of NaViL-2B."""

    embedding_name = "tok_embeddings"
    head_name = "output"
    layer_class = InternLM2VEDecoderLayer
    cast_before_weight = False


LANGUAGE_MODELS = {
    model.__name__: model
    for model in (Qwen3VEForCausalLM, Qwen2VEForCausalLM, LlamaVEForCausalLM, InternLM2VEForCausalLM)
}
"""By the name in ``llm_config.architectures``."""
