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
from navil_megatron.blueprint.vocabulary import held_rows
from navil_megatron.blueprint.workload import Workload, expert_loads
from navil_megatron.config.run import NaViLConfig

FP32, INT64 = 4, 8


class StateBytes(NamedTuple):
    """What outlives a step; the distributed optimizer's padding is left out."""

    weights: int  # in the precision of the run
    gradients: int  # FP32, of trained parameters
    optimizer: float  # two FP32 moments, and FP32 master weights under bf16


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


def quantized_weight_bytes(config: NaViLConfig, held: Iterable[HeldParameter]) -> int:
    """FP8 copies of matrices, one as it lies and one transposed, which a rank holds from a step's first microbatch to
    its last. Layers that stay in BF16 are not left out.
    """
    if config.precision.fp8 == "none":
        return 0
    encoder = config.precision.fp8_encoder
    matrices = (piece for piece in held if len(piece.shape) > 1)
    return 2 * sum(
        piece.numel
        for piece in matrices
        if piece.parameter.modality is not None or (encoder and piece.parameter.part == "vision_encoder")
    )


@dataclass(frozen=True, slots=True)
class ActivationModel:
    """Activations of one microbatch on one rank of a layout."""

    config: NaViLConfig
    work: Workload
    fused: bool  # RMSNorm keeps no scaled input: on CUDA

    @property
    def _size(self) -> int:
        return self.config.precision.number_bytes

    @property
    def _tensor(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def _tokens(self) -> int:
        return self.config.rank_tokens

    @property
    def hidden_bytes(self) -> int:
        """Hidden states between the matrices, where sequence parallelism shares out the tokens."""
        return self._embeddings_bytes // self.config.parallel.sequence_ranks

    def _as_operand(self, num_bytes: int, gathered: bool = False) -> int:
        """Of an input of a decoder's linear that has so many bytes: in FP8 a byte for each number, but for rows that
        are gathered in BF16 since their blocks span ranks. Layers that stay in BF16 are not left out.
        """
        fp8 = self.config.precision.fp8
        in_bf16 = gathered and fp8 == "blockwise" and self.config.parallel.sequence_parallel
        return num_bytes if fp8 == "none" or in_bf16 else num_bytes // self._size

    def _norm(self, tokens: int, width: int) -> int:
        """An RMSNorm: its input, a number a token, and unless fused the scaled input."""
        return tokens * width * self._size * (1 if self.fused else 2) + tokens * FP32

    def layer(self) -> int:
        """One decoder layer."""
        if self.config.training.recompute == "full":
            return self.hidden_bytes
        # The norms, and the input of linear_qkv.
        kept = 2 * self.final_norm() + self._as_operand(self.hidden_bytes, gathered=True) + self._attention()
        if self.config.model.language.composed_visual_output_projection:
            kept += self.hidden_bytes  # output of the text projection, input of the visual one
        return kept + (self.hidden_bytes if self.config.training.recomputes("mlp") else self._feed_forward())

    def _attention(self) -> int:
        """From linear_qkv's output to linear_proj's input; all of it may be computed again."""
        language, t, again = self.config.model.language, self._tokens, self.config.training.recomputes("attention")
        heads, groups = language.num_attention_heads // self._tensor, language.num_query_groups // self._tensor
        query, key = (t * n * language.head_dim * self._size for n in (heads, groups))
        qkv = query + 2 * key
        kept = self._as_operand(query)  # input of linear_proj
        if not again:
            # In attention order: query, key, value, output, and a logarithm of each softmax's sum.
            on_cpu = 1 if self.fused else FP32 // self._size
            kept += (qkv + query) * on_cpu + t * heads * FP32
        if language.qk_norm or again:
            kept += qkv  # linear_qkv's output
        return kept

    def _feed_forward(self) -> int:
        """Inputs of linear_fc1, SwiGLU and linear_fc2."""
        language = self.config.model.language
        parallel, tokens = self.config.parallel, self._tokens
        if not is_routed(self.config.model, parallel):
            inner = tokens * language.ffn_hidden_size // self._tensor * self._size
            return self._as_operand(self.hidden_bytes, gathered=True) + 2 * inner + self._as_operand(inner)
        # Tokens of the fullest expert-parallel rank, of all that send to it; one counts once for each of its experts.
        arriving = tokens * language.experts_per_token * max(expert_loads(self.work, self.config))
        arriving = arriving * parallel.expert_tensor_size / self._tensor
        width = language.hidden_size + 3 * language.ffn_hidden_size // parallel.expert_tensor_size
        kept = int(arriving * (width * self._size))
        if language.num_experts > 1:
            # The router's input; logits and two scores; weights beside their order and its inverse, there and back.
            scores = 5 * language.num_experts * FP32 + language.experts_per_token * (4 * INT64 + 2 * FP32)
            kept += self.hidden_bytes + tokens * scores
        # Core also keeps where each token came from.
        return kept + (tokens * INT64 if parallel.expert_model_parallel_size > 1 else 0)

    def shared_by_layers(self) -> int:
        """Of all context-parallel ranks' tokens: the rotary table, and under attention without recompute their orders
        and, for the norms of heads, their modalities.
        """
        language = self.config.model.language
        orders = 0 if self.config.training.recomputes("attention") else 2 * INT64 + language.qk_norm
        return self.config.microbatch_tokens * (language.head_dim * FP32 + orders)

    def final_norm(self) -> int:
        """That after the last layer; those inside keep as much."""
        return self._norm(self._tokens // self.config.parallel.sequence_ranks, self.config.model.language.hidden_size)

    def embedding(self) -> int:
        """Token ids, entries of special tokens, places and features of image tokens; of a split table also which ids
        lie elsewhere; under sequence parallelism the embeddings of all tokens, of which the first layer's input is a
        view.
        """
        kept = self._tokens * (2 * INT64 + (self._tensor > 1)) + self._image_places
        image_tokens = self._share(self.work.image_tokens(self.config.model.vision))
        kept += image_tokens * self.config.model.language.hidden_size * self._size
        return kept + self._embeddings_bytes - self.hidden_bytes

    @property
    def _embeddings_bytes(self) -> int:
        """Embeddings of all tokens, before sequence parallelism shares them out."""
        return self._tokens * self.config.model.language.hidden_size * self._size

    @property
    def _image_places(self) -> int:
        return self._share(self.work.image_tokens(self.config.model.vision)) * INT64

    def encoder(self) -> int:
        """Encoder and connector on the rank with most patches."""
        vision, patches = self.config.model.vision, self._patches
        kept = patches * vision.patch_dim * self._size  # input of the patch embedding
        kinds = 2 if vision.full_attention_layers else 1
        kept += kinds * patches * vision.head_dim * FP32  # a rotary table in each attention order
        kept += vision.num_layers * self._vision_layer(patches)
        return kept + self.connector() + self._image_places

    def connector(self) -> int:
        """The norm's input, also scaled, and two numbers a token; the inputs of GELU and linear_fc2."""
        vision, hidden = self.config.model.vision, self.config.model.language.hidden_size
        tokens = self._patches // vision.merge_size**2
        return 2 * self._patches * vision.hidden_size * self._size + tokens * (2 * FP32 + 2 * hidden * self._size)

    def _vision_layer(self, patches: int) -> int:
        vision = self.config.model.vision
        hidden = patches * vision.hidden_size * self._size
        if self.config.training.recomputes("encoder"):
            return hidden
        norm = self._norm(patches, vision.hidden_size) if vision.norm == "rmsnorm" else hidden + 2 * patches * FP32
        # Query, key, value and output, and a logarithm of each softmax's sum.
        attention = 4 * hidden + patches * vision.num_attention_heads * FP32
        # Inputs of linear_qkv, both LayerScales and linear_fc1; of GELU and linear_fc2.
        kept = 2 * norm + attention + 4 * hidden + 2 * patches * vision.ffn_hidden_size * self._size
        # Attention's output is linear_proj's input, but for a copy: on a CPU, or back from the order of windows.
        return kept if self.fused and vision.full_attention_layers is None else kept + hidden

    def head(self) -> int:
        """Predicted tokens with their places in the row and in this rank's vocabulary, and the log-sum of each."""
        hidden = self.config.model.language.hidden_size * self._size
        return self._share(self.work.num_predictions) * (hidden + 2 * INT64 + FP32)

    def _share(self, count: int) -> int:
        """Of so many tokens, those of the context-parallel rank with most."""
        return -(-count // self.config.parallel.context_parallel_size)

    def head_working(self) -> int:
        """Logits of one chunk, in FP32 beside the run's precision; on a CPU also its part of a trained head's gradient,
        which on CUDA the product itself adds to the sum.
        """
        language = self.config.model.language
        tokens = min(self._share(self.work.num_predictions), self.config.training.loss_chunk_tokens)
        rows = held_rows(language.vocab_size, self._tensor)
        rounded = 0 if self._size == FP32 else self._size
        trained = is_trainable("output_layer", self.config.training.phase)
        return rows * (tokens * (FP32 + rounded) + language.hidden_size * rounded * (trained and not self.fused))

    def layer_working(self) -> int:
        """Beyond what is kept, while one layer runs backward: gradients of the feed-forward network and of the layer's
        input and output, and with recompute the layer's own activations.

        In linear_fc2 these are the gradients of its input and weights, and under sequence parallelism that of its
        output, gathered. In SwiGLU it is its input's, which is wider, and that of its output is where linear_fc2's
        input was.
        """
        language, training, parallel = self.config.model.language, self.config.training, self.config.parallel
        width = language.ffn_hidden_size // self._tensor
        inner = self._tokens * width * self._size * language.experts_per_token
        trained = sum(is_trainable(part, training.phase) for part in ("text feed-forward", "visual feed-forward"))
        weights = trained * width * language.hidden_size * self._size
        wide = max(2 * inner, inner + weights + parallel.sequence_parallel * self._embeddings_bytes)
        whole = replace(self, config=replace(self.config, training=replace(training, recompute="none")))
        return wide + 2 * self.hidden_bytes + whole.layer() - self.layer()

    @property
    def _patches(self) -> int:
        return num_patches(fullest_share(self.work.grids, self.config.model.vision, self.config.parallel.row_ranks))

    def inputs(self, is_first: bool, num_microbatches: int) -> int:
        """What the device is given of the microbatch in work and of the next: ids and orders, and the first stage's
        share of the pixels, a byte each. Core's interleaved schedule also holds three hidden states that it received
        ahead or has not let go of.
        """
        interleaved = self.config.parallel.virtual_pipeline_model_parallel_size is not None
        ids = 2 * self._tokens * INT64 + self.config.microbatch_tokens * (3 * INT64 + 1)
        pixels = is_first * self._patches * self.config.model.vision.patch_dim
        return min(2, num_microbatches) * (ids + pixels) + interleaved * 3 * self.hidden_bytes

    def encoder_working(self) -> int:
        """The patches in encoder order, and normalised, before the first layer runs."""
        return self._patches * self.config.model.vision.patch_dim * (1 + FP32)

    def encoder_layer_working(self) -> int:
        """As ``layer_working``, while one layer of the encoder runs backward."""
        vision, training = self.config.model.vision, self.config.training
        gradients = self._patches * (vision.ffn_hidden_size + 2 * vision.hidden_size) * self._size
        whole = replace(self, config=replace(self.config, training=replace(training, recompute="none")))
        return gradients + whole._vision_layer(self._patches) - self._vision_layer(self._patches)
