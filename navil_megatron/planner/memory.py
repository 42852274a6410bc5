"""Bytes that a rank holds: weights, gradients, optimizer state, and what a microbatch keeps for its backward pass.

Activations are read off the layers: each line below is a tensor that autograd saves. ``fused`` says how RMSNorm runs:
the CUDA kernel keeps its input and one number a token; the CPU's composite form keeps the scaled input too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from navil_megatron.blueprint.held_parameters import HeldParameter, expert_replicas, is_routed
from navil_megatron.blueprint.image_plan import num_patches
from navil_megatron.blueprint.parameters import is_trainable
from navil_megatron.blueprint.vision_plan import fullest_share
from navil_megatron.blueprint.workload import Workload, expert_loads
from navil_megatron.config.run import NaViLConfig

FP32, INT64 = 4, 8


class StateBytes(NamedTuple):
    """What outlives a step; the distributed optimizer's padding is left out."""

    weights: int
    """In the precision of the run."""
    gradients: int
    """FP32, of trained parameters."""
    optimizer: float
    """Two FP32 moments, and FP32 master weights under bf16."""


def state_bytes(config: NaViLConfig, held: Iterable[HeldParameter], dp_size: int) -> StateBytes:
    """State of a rank that holds these parameters, one of so many replicas."""
    size = config.precision.number_bytes
    optimizer = 2 * FP32 + (FP32 if size == 2 else 0)
    sharing = dp_size * config.parallel.context_parallel_size
    of_experts = expert_replicas(config.parallel, dp_size) if is_routed(config.model, config.parallel) else sharing
    whole = trained = 0
    moments = 0.0
    for piece in held:
        whole += piece.numel
        if is_trainable(piece.parameter.part, config.training.phase):
            trained += piece.numel
            holders = of_experts if piece.parameter.num_experts else sharing
            moments += piece.numel * optimizer / (holders if config.optimizer.distributed else 1)
    return StateBytes(whole * size, trained * FP32, moments)


@dataclass(frozen=True, slots=True)
class ActivationModel:
    """Activations of one microbatch on one rank of a layout."""

    config: NaViLConfig
    work: Workload
    fused: bool
    """RMSNorm keeps no scaled input: on CUDA."""

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.config.precision.number_bytes

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def tokens(self) -> int:
        """Tokens of a context-parallel rank."""
        return self.config.rank_tokens

    @property
    def hidden_bytes(self) -> int:
        """Hidden states between the matrices, where sequence parallelism shares out the tokens."""
        return self.tokens * self.config.model.language.hidden_size * self.size // self.config.parallel.sequence_ranks

    def _norm(self, tokens: int, width: int) -> int:
        """An RMSNorm: its input, a number a token, and unless fused the scaled input."""
        return tokens * width * self.size * (1 if self.fused else 2) + tokens * FP32

    def layer(self) -> int:
        """One decoder layer."""
        if self.config.training.recompute == "full":
            return self.hidden_bytes
        language = self.config.model.language
        kept = 2 * self.final_norm()
        kept += self.hidden_bytes  # input of linear_qkv
        kept += self._attention(again=self.config.training.recomputes("attention"))
        if language.composed_visual_output_projection:
            kept += self.hidden_bytes  # output of the text projection, input of the visual one
        if self.config.training.recomputes("mlp"):
            return kept + self.hidden_bytes
        return kept + self._feed_forward()

    def _attention(self, again: bool) -> int:
        """From linear_qkv's output to linear_proj's input; the softmax and its gathers may be computed again."""
        language, t = self.config.model.language, self.tokens
        heads, groups = language.num_attention_heads // self.tensor, language.num_query_groups // self.tensor
        query, key = (t * n * language.head_dim * self.size for n in (heads, groups))
        qkv = query + 2 * key
        kept = query  # input of linear_proj
        if not again:
            # In attention order: query, key, value, output, and a logarithm of each softmax's sum.
            on_cpu = 1 if self.fused else FP32 // self.size
            kept += (qkv + query) * on_cpu + t * heads * FP32
        else:
            kept += query + key  # turned by their positions; the value is a view of linear_qkv's output
        if language.qk_norm:
            copied = query if groups > 1 else 0  # heads of several groups do not lie side by side
            kept += copied + query + key + t * (heads + groups) * FP32
        if language.qk_norm or again:
            kept += qkv
        return kept

    def _feed_forward(self) -> int:
        """Inputs of linear_fc1, SwiGLU and linear_fc2."""
        language = self.config.model.language
        parallel, tokens = self.config.parallel, self.tokens
        if not is_routed(self.config.model, parallel):
            return self.hidden_bytes + tokens * 3 * language.ffn_hidden_size // self.tensor * self.size
        # Tokens of the fullest expert-parallel rank, of all that send to it; one counts once for each of its experts.
        arriving = tokens * language.experts_per_token * max(expert_loads(self.work, self.config))
        arriving = arriving * parallel.expert_tensor_size / self.tensor
        kept = int(
            arriving
            * ((language.hidden_size + 3 * language.ffn_hidden_size // parallel.expert_tensor_size) * self.size)
        )
        if language.num_experts > 1:
            # The router's input; logits and two scores; weights beside their order and its inverse, there and back.
            scores = 5 * language.num_experts * FP32 + language.experts_per_token * (4 * INT64 + 2 * FP32)
            kept += self.hidden_bytes + tokens * scores
        # Core also keeps where each token came from.
        return kept + (tokens * INT64 if parallel.expert_model_parallel_size > 1 else 0)

    def shared_by_layers(self) -> int:
        """Rotary tables, and under attention without recompute the orders of all ranks' tokens."""
        tables = self.tokens * 2 * self.config.model.language.head_dim * self.size
        orders = 0 if self.config.training.recomputes("attention") else 2 * INT64
        return tables + self.config.microbatch_tokens * orders

    def final_norm(self) -> int:
        """That after the last layer; those inside keep as much."""
        return self._norm(self.tokens // self.config.parallel.sequence_ranks, self.config.model.language.hidden_size)

    def embedding(self) -> int:
        """Token ids, entries of special tokens, places of image tokens; under sequence parallelism the embeddings of
        all tokens, of which the first layer's input is a view.
        """
        kept = self.tokens * (2 * INT64 + 1) + self._image_places
        return kept + self.tokens * self.config.model.language.hidden_size * self.size - self.hidden_bytes

    @property
    def _image_places(self) -> int:
        return self._share(self.work.image_tokens(self.config.model.vision)) * INT64

    def encoder(self) -> int:
        """Encoder and connector on the rank with most patches."""
        vision, hidden = self.config.model.vision, self.config.model.language.hidden_size
        patches = self._patches
        tokens = patches // vision.merge_size**2
        kept = patches * vision.patch_dim * self.size  # input of the patch embedding
        kept += 2 * patches * vision.head_dim * self.size  # rotary tables
        for number in range(vision.num_layers):
            windowed = vision.full_attention_layers is not None and number not in vision.full_attention_layers
            kept += self._vision_layer(patches, windowed)
        # Connector: the norm's input, also scaled, and two numbers a token; then the inputs of GELU and linear_fc2.
        kept += 2 * patches * vision.hidden_size * self.size + tokens * (2 * FP32 + 2 * hidden * self.size)
        return kept + self._image_places

    def _vision_layer(self, patches: int, windowed: bool) -> int:
        vision = self.config.model.vision
        hidden = patches * vision.hidden_size * self.size
        if self.config.training.recomputes("encoder"):
            return hidden
        norm = self._norm(patches, vision.hidden_size) if vision.norm == "rmsnorm" else hidden + 2 * patches * FP32
        value = hidden if windowed else 3 * hidden  # in place it is a view of linear_qkv's output
        attention = 3 * hidden + value + patches * vision.num_attention_heads * FP32
        # Inputs of linear_qkv, linear_proj, both LayerScales and linear_fc1; of GELU and linear_fc2.
        return 2 * norm + attention + 5 * hidden + 2 * patches * vision.ffn_hidden_size * self.size

    def head(self) -> int:
        """Predicted tokens with their places in the row and in this rank's vocabulary, and the log-sum of each."""
        hidden = self.config.model.language.hidden_size * self.size
        return self._share(self.work.num_predictions) * (hidden + 2 * INT64 + FP32)

    def _share(self, count: int) -> int:
        """Of so many tokens, those of the context-parallel rank with most."""
        return -(-count // self.config.parallel.context_parallel_size)

    def head_working(self) -> int:
        """Logits of one chunk, in FP32 beside the run's precision, and the FP32 sum of a trained head's gradient."""
        language = self.config.model.language
        tokens = min(self._share(self.work.num_predictions), self.config.training.loss_chunk_tokens)
        words = language.vocab_size // self.tensor
        rounded = 0 if self.size == FP32 else self.size
        trained = is_trainable("output_layer", self.config.training.phase)
        return words * (tokens * (FP32 + rounded) + language.hidden_size * (FP32 + rounded) * trained)

    def layer_working(self) -> int:
        """Beyond what is kept, while one layer runs backward: gradients of the widest activation and of its input and
        output, and with recompute the layer's own activations.
        """
        language, training = self.config.model.language, self.config.training
        wide = self.tokens * 3 * language.ffn_hidden_size // self.tensor * self.size * language.experts_per_token
        whole = replace(self, config=replace(self.config, training=replace(training, recompute="none")))
        return wide + 2 * self.hidden_bytes + whole.layer() - self.layer()

    @property
    def _patches(self) -> int:
        """Of the rank that encodes most."""
        return num_patches(fullest_share(self.work.grids, self.config.model.vision, self.config.parallel.row_ranks))

    def inputs(self, is_first: bool, num_microbatches: int) -> int:
        """What the device is given of the microbatch in work and of the next: ids and orders, and the first stage's
        share of the pixels, a byte each.
        """
        ids = (3 * self.tokens + 2 * self.config.microbatch_tokens) * INT64
        return min(2, num_microbatches) * (ids + is_first * self._patches * self.config.model.vision.patch_dim)

    def encoder_working(self) -> int:
        """The patches in encoder order, and normalised, before the first layer runs."""
        return self._patches * self.config.model.vision.patch_dim * (1 + FP32)
