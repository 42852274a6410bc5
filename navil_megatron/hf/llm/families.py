"""The families of language models as data: what each calls its parameters in Hugging Face files, and its config.json.

The names are those of the family's pretrained LLM. ``{ve}`` is empty for the text expert, which keeps the LLM's name,
and ``_ve`` for the visual one beside it; a name without it is shared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from navil_megatron.hf.transforms import EXPERTS, EXPERTS_GATE_UP, GATE_UP, GROUPED_QKV, SAME, Transform


@dataclass(frozen=True, slots=True)
class Names:
    """Where one parameter of a decoder layer lies in Hugging Face files."""

    keys: tuple[str, ...]
    """Names inside the layer."""
    transform: Transform = SAME
    """Between the tensors of these names and the one of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Family:
    """One family. What its decoder computes is in ``config.language``, under the same name."""

    title: str
    """Name for readers."""
    architecture: str
    """``architectures`` of its NaViL; without ``VE`` it is that of the pretrained LLM."""
    layer: Mapping[str, Names]
    """Parameter of a checkpoint's decoder layer, without its modality -> names in ``model.layers.{i}``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``llm_config`` that have one supported value; a config that lacks them means that value."""
    stated: tuple[str, ...] = ("max_position_embeddings",)
    """Sizes that the LLM's config must state, for what transformers takes instead follows from no other size."""
    embedding: str = "model.embed_tokens"
    """The embedding table."""
    head: str = "lm_head"
    """The LM head, where it is no view of the embedding table."""

    @property
    def llm_architecture(self) -> str:
        """``architectures`` of the pretrained LLM."""
        return self.architecture.replace("VE", "")

    def names(self, num_experts: int) -> dict[str, Names]:
        """``layer`` of a model with so many feed-forward experts in each modality."""
        names = dict(self.layer)
        if num_experts == 1:
            return names
        for parameter, transform in (("mlp.linear_fc1.weight", EXPERTS_GATE_UP), ("mlp.linear_fc2.weight", EXPERTS)):
            one = names[parameter].keys
            several = (key.replace("{ve}.", f"{{ve}}.experts.{n}.") for n in range(num_experts) for key in one)
            names[parameter] = Names(tuple(several), transform)
        feed_forward = self.layer["mlp.linear_fc2.weight"].keys[0].partition("{ve}")[0]
        return names | {"mlp.router.weight": Names((f"{feed_forward}{{ve}}.gate.weight",))}


def _split_qkv(kind: str) -> Names:
    return Names(tuple(f"self_attn.{name}_proj{{ve}}.{kind}" for name in "qkv"), GROUPED_QKV)


LLAMA_LAYER = {
    "input_layernorm.weight": Names(("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Names(("post_attention_layernorm.weight",)),
    "self_attention.linear_qkv.weight": _split_qkv("weight"),
    "self_attention.linear_proj.weight": Names(("self_attn.o_proj{ve}.weight",)),
    "mlp.linear_fc1.weight": Names(("mlp{ve}.gate_proj.weight", "mlp{ve}.up_proj.weight"), GATE_UP),
    "mlp.linear_fc2.weight": Names(("mlp{ve}.down_proj.weight",)),
}
QWEN2_LAYER = LLAMA_LAYER | {"self_attention.linear_qkv.bias": _split_qkv("bias")}
QWEN3_LAYER = LLAMA_LAYER | {
    "self_attention.q_layernorm.weight": Names(("self_attn.q_norm{ve}.weight",)),
    "self_attention.k_layernorm.weight": Names(("self_attn.k_norm{ve}.weight",)),
}
INTERNLM2_LAYER = {
    "input_layernorm.weight": Names(("attention_norm.weight",)),
    "pre_mlp_layernorm.weight": Names(("ffn_norm.weight",)),
    # wqkv already holds, for each KV group, q_0 .. q_{n/g-1}, k, v.
    "self_attention.linear_qkv.weight": Names(("attention.wqkv{ve}.weight",)),
    "self_attention.linear_proj.weight": Names(("attention.wo{ve}.weight",)),
    "mlp.linear_fc1.weight": Names(("feed_forward{ve}.w1.weight", "feed_forward{ve}.w3.weight"), GATE_UP),
    "mlp.linear_fc2.weight": Names(("feed_forward{ve}.w2.weight",)),
}

HF_FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        title="Qwen3",
        architecture="Qwen3VEForCausalLM",
        layer=QWEN3_LAYER,
        settings={"attention_bias": False},
        stated=("max_position_embeddings", "num_key_value_heads", "head_dim"),
    ),
    "qwen2": Family(
        title="Qwen2",
        architecture="Qwen2VEForCausalLM",
        layer=QWEN2_LAYER,
        stated=("max_position_embeddings", "num_key_value_heads"),
    ),
    "llama": Family(
        title="Llama",
        architecture="LlamaVEForCausalLM",
        layer=LLAMA_LAYER,
        settings={"attention_bias": False, "mlp_bias": False},
    ),
    "internlm2": Family(
        title="InternLM2",
        architecture="InternLM2VEForCausalLM",
        layer=INTERNLM2_LAYER,
        settings={"bias": False},
        embedding="model.tok_embeddings",
        head="output",
    ),
}
"""By ``model.language.family``, which is also the ``model_type`` of the pretrained LLM."""
