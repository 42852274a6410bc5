"""Bytes that a rank holds: weights, gradients, optimizer state, and what a microbatch keeps for its backward pass.

Activations are read off the layers: each line below is a tensor that autograd saves. ``fused`` says how RMSNorm runs:
the CUDA kernel keeps its input and one number a row; the CPU's composite form keeps the scaled rows too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from navil_megatron.blueprint.held_parameters import HeldParameter, expert_replicas, is_routed
from navil_megatron.blueprint.image_plan import num_patches
from navil_megatron.blueprint.parameters import is_trainable
from navil_megatron.blueprint.vision_plan import fullest_share
from navil_megatron.blueprint.workload import Workload, expert_loads
from navil_megatron.config.run import NaViLConfig

FP32, INT64 = 4, 8


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What outlives a step; the distributed optimizer's padding is left out."""

    weights: float = 0
    """In the precision of the run."""
    gradients: float = 0
    """FP32, of trained parameters."""
    optimizer: float = 0
    """Two FP32 moments, and FP32 master weights under bf16."""

    def __add__(self, other: "StateBytes") -> "StateBytes":
        """Both together."""
        return StateBytes(
            self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer
        )

    @property
    def total(self) -> int:
        """All of it."""
        return round(self.weights + self.gradients + self.optimizer)


def state_bytes(config: NaViLConfig, held: Iterable[HeldParameter], dp_size: int) -> StateBytes:
    """State of a rank that holds these parameters, one of so many replicas."""
    size = config.precision.number_bytes
    optimizer = 2 * FP32 + (FP32 if size == 2 else 0)
    sharing = dp_size * config.parallel.context_parallel_size
    of_experts = expert_replicas(config.parallel, dp_size) if is_routed(config.model, config.parallel) else sharing
    found = StateBytes()
    for piece in held:
        trained = piece.numel if is_trainable(piece.parameter.part, config.training.phase) else 0
        holders = of_experts if piece.parameter.num_experts else sharing
        shares = holders if config.optimizer.distributed else 1
        found += StateBytes(piece.numel * size, trained * FP32, trained * optimizer / shares)
    return found


@dataclass(frozen=True, slots=True)
class ActivationModel:
    """Activations of one microbatch on one rank of a layout."""

    config: NaViLConfig
    """The run, its layout included."""
    work: Workload
    """The microbatch."""
    fused: bool
    """RMSNorm keeps no scaled rows: on CUDA."""

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
    def row_bytes(self) -> int:
        """Hidden states between the matrices: this rank's share of the rows under sequence parallelism."""
        shares = self.tensor if self.config.parallel.sequence_parallel else 1
        return self.tokens * self.config.model.language.hidden_size * self.size // shares

    def norm(self, rows: int, width: int) -> int:
        """An RMSNorm: its input, a number a row, and unless fused the scaled rows."""
        return rows * width * self.size * (1 if self.fused else 2) + rows * FP32

    def layer(self) -> int:
        """One decoder layer."""
        if self.config.training.recompute == "full":
            return self.row_bytes
        language = self.config.model.language
        shares = self.tensor if self.config.parallel.sequence_parallel else 1
        rows = self.tokens // shares
        kept = 2 * self.norm(rows, language.hidden_size)
        kept += self.row_bytes  # input of linear_qkv
        kept += self._attention(again=self.config.training.recomputes("attention"))
        if language.composed_visual_output_projection:
            kept += self.row_bytes  # output of the text projection, input of the visual one
        if self.config.training.recomputes("mlp"):
            return kept + self.row_bytes
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
            return self.row_bytes + tokens * 3 * language.ffn_hidden_size // self.tensor * self.size
        row = (language.hidden_size + 3 * language.ffn_hidden_size // parallel.expert_tensor_size) * self.size
        kept = int(self.arriving_rows * row)
        if language.num_experts > 1:
            # The router's input; logits and two scores; weights beside their order and its inverse, there and back.
            scores = 5 * language.num_experts * FP32 + language.experts_per_token * (4 * INT64 + 2 * FP32)
            kept += self.row_bytes + tokens * scores
        # Core also keeps where each row came from.
        return kept + (tokens * INT64 if parallel.expert_model_parallel_size > 1 else 0)

    @property
    def arriving_rows(self) -> float:
        """Rows of the fullest expert-parallel rank, of all that send to it; a token counts once for each expert."""
        parallel, language = self.config.parallel, self.config.model.language
        rows = self.tokens * language.experts_per_token
        return rows * max(expert_loads(self.work, self.config)) * parallel.expert_tensor_size / self.tensor

    def shared_by_layers(self) -> int:
        """Rotary tables, and under attention without recompute the orders of the rows."""
        orders = 0 if self.config.training.recomputes("attention") else 2 * INT64
        # The orders are of the tokens of all ranks.
        return (
            self.tokens * 2 * self.config.model.language.head_dim * self.size + self.config.microbatch_tokens * orders
        )

    def final_norm(self) -> int:
        """After the last layer."""
        shares = self.tensor if self.config.parallel.sequence_parallel else 1
        return self.norm(self.tokens // shares, self.config.model.language.hidden_size)

    def embedding(self) -> int:
        """Token ids, rows of special tokens, places of image tokens; under sequence parallelism the embeddings of all
        rows, of which the first layer's input is a view.
        """
        tokens = self.tokens
        kept = tokens * (2 * INT64 + 1) + self._share(self.image_tokens) * INT64
        return kept + tokens * self.config.model.language.hidden_size * self.size - self.row_bytes

    @property
    def image_tokens(self) -> int:
        """Image tokens of the microbatch."""
        return self.work.image_tokens(self.config.model.vision)

    def encoder(self) -> int:
        """Encoder and connector on the rank with most patches."""
        vision, hidden = self.config.model.vision, self.config.model.language.hidden_size
        grids = fullest_share(self.work.grids, vision, self.config.parallel.row_ranks)
        patches = num_patches(grids)
        tokens = patches // vision.merge_size**2
        kept = patches * vision.patch_dim * self.size  # input of the patch embedding
        kept += 2 * patches * vision.head_dim * self.size  # rotary tables
        for number in range(vision.num_layers):
            windowed = vision.full_attention_layers is not None and number not in vision.full_attention_layers
            kept += self._vision_layer(patches, windowed)
        # Connector: input and scaled input of the norm with two numbers a row, then the inputs of GELU and linear_fc2.
        kept += 2 * patches * vision.hidden_size * self.size + tokens * (2 * FP32 + 2 * hidden * self.size)
        return kept + self._share(self.image_tokens) * INT64

    def _vision_layer(self, patches: int, windowed: bool) -> int:
        vision = self.config.model.vision
        rows = patches * vision.hidden_size * self.size
        if self.config.training.recomputes("encoder"):
            return rows
        norm = self.norm(patches, vision.hidden_size) if vision.norm == "rmsnorm" else rows + 2 * patches * FP32
        value = rows if windowed else 3 * rows  # in place it is a view of linear_qkv's output
        attention = 3 * rows + value + patches * vision.num_attention_heads * FP32
        # Inputs of linear_qkv, linear_proj, both LayerScales and linear_fc1; of GELU and linear_fc2.
        return 2 * norm + attention + 5 * rows + 2 * patches * vision.ffn_hidden_size * self.size

    def head(self) -> int:
        """Picked rows with their places in the row and in this rank's vocabulary, and the log-sum of each."""
        row = self.config.model.language.hidden_size * self.size
        return self._share(self.work.num_predictions) * (row + 2 * INT64 + FP32)

    def _share(self, count: int) -> int:
        """Of so many tokens, those of the context-parallel rank with most."""
        return -(-count // self.config.parallel.context_parallel_size)

    def head_working(self) -> int:
        """Logits of one chunk, in FP32 beside the run's precision, and the FP32 sum of a trained head's gradient."""
        language = self.config.model.language
        rows = min(self._share(self.work.num_predictions), self.config.training.loss_chunk_tokens)
        words = language.vocab_size // self.tensor
        rounded = 0 if self.size == FP32 else self.size
        trained = is_trainable("output_layer", self.config.training.phase)
        return words * (rows * (FP32 + rounded) + language.hidden_size * (FP32 + rounded) * trained)

    def layer_working(self) -> int:
        """Beyond what is kept, while one layer runs backward: gradients of the widest activation and of its input and
        output, and with recompute the layer's own activations.
        """
        language, training = self.config.model.language, self.config.training
        wide = self.tokens * 3 * language.ffn_hidden_size // self.tensor * self.size
        wide *= language.experts_per_token
        nothing = replace(self, config=replace(self.config, training=replace(training, recompute="none")))
        again = nothing.layer() - self.layer()
        return wide + 2 * self.row_bytes + again

    @property
    def patch_numbers(self) -> int:
        """Numbers in the patches of the rank that encodes most."""
        vision = self.config.model.vision
        return num_patches(fullest_share(self.work.grids, vision, self.config.parallel.row_ranks)) * vision.patch_dim

    def inputs(self, is_first: bool, num_microbatches: int) -> int:
        """What the device is given of the microbatch in work and of the next: ids and orders, and the first stage's
        share of the pixels, a byte each.
        """
        ids = (3 * self.tokens + 2 * self.config.microbatch_tokens) * INT64
        return min(2, num_microbatches) * (ids + (self.patch_numbers if is_first else 0))

    def encoder_working(self) -> int:
        """The patches in encoder order, and normalised, before the first layer runs."""
        return self.patch_numbers * (1 + FP32)
