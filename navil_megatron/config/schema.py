"""Every setting of a run, as frozen dataclasses; the docstring under a field says what it means and its unit.

A required field has no default. ``None`` means off. Derived numbers are properties, so nothing is stored twice.
"""

from dataclasses import dataclass, field
from typing import Literal

SPECIAL_TOKENS = (
    "</box>",
    "<box>",
    "<IMG_CONTEXT>",
    "</img>",
    "<img>",
    "</quad>",
    "<quad>",
    "</ref>",
    "<ref>",
    "<img_uncond>",
    "<IMG_LINE_BREAK>",
    "<IMG_FRAME_BREAK>",
)
"""The 12 special tokens in the row order of the special-token embedding (reference: SPECIAL_TOKEN_LIST)."""

Modality = Literal["text", "visual"]
MODALITIES: tuple[Modality, Modality] = ("text", "visual")
"""The two modalities, in the order in which a modality-major row holds them."""

ModalityPart = Literal["attention", "ffn"]
"""Parts of a decoder layer that can hold weights for each modality."""


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

    @property
    def router_weights(self) -> int:
        """Weights of one modality's router in one layer; one expert needs none."""
        return self.hidden_size * self.num_experts if self.num_experts > 1 else 0

    @property
    def feed_forward_weights_per_token(self) -> int:
        """Weights that a token meets in one layer's feed-forward network: its experts' and its router's."""
        return 3 * self.hidden_size * self.ffn_hidden_size * self.experts_per_token + self.router_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The visual encoder V_{d,w}: packed images of any size, 2D RoPE, LayerScale (paper, section 3.1)."""

    num_layers: int
    """Depth d; 0 leaves only the patch embedding."""
    hidden_size: int
    """Width w."""
    ffn_hidden_size: int
    """Width of the GELU feed-forward network."""
    num_attention_heads: int
    """Attention heads (multi-head, no grouping)."""
    patch_size: int = 16
    """Side of a square patch, in pixels; the stride of the patch embedding."""
    merge_size: int = 2
    """Patches merged along each side by the pixel shuffle; one visual token covers patch_size * merge_size pixels."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of the two norms in each layer."""
    norm_epsilon: float = 1e-6
    """Epsilon of the norms."""
    qkv_bias: bool = False
    """Bias on the fused query/key/value projection."""
    layer_scale_init: float = 0.1
    """Initial value of the per-channel LayerScale."""
    rope_theta: float = 10_000.0
    """Base of the 2D rotary frequencies; half of them turn with the row, half with the column."""
    token_order: Literal["raster", "window"] = "raster"
    """Order in which visual tokens leave the encoder: ``raster`` as the paper describes, ``window`` as the released
    code does (merge blocks permuted window by window and never put back)."""
    window_size: int = 8
    """Side of an attention window, in patches; also the unit of the ``window`` token order."""
    full_attention_layers: tuple[int, ...] | None = None
    """Layers that attend over the whole image; the others attend inside windows. ``None``: every layer attends fully.
    Windowed attention needs ``token_order = "window"``."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened RGB patch."""
        return 3 * self.patch_size * self.patch_size

    @property
    def merged_size(self) -> int:
        """Width of one pixel-shuffled token, the connector's input."""
        return self.hidden_size * self.merge_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A NaViL model. Everything that decides the weights' shapes or the function they compute."""

    language: LanguageConfig
    """The decoder with modality experts."""
    vision: VisionConfig
    """The visual encoder."""
    special_token_ids: tuple[int, ...]
    """Token ids of the 12 special tokens, in the order of ``SPECIAL_TOKENS``."""
    connector_norm_epsilon: float = 1e-5
    """Epsilon of the connector's LayerNorm."""

    def special_token_id(self, token: str) -> int:
        """The id of one of ``SPECIAL_TOKENS``, e.g. ``"<IMG_CONTEXT>"``."""
        return self.special_token_ids[SPECIAL_TOKENS.index(token)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One source of training samples: a ``[[data.train_sources]]`` table."""

    index: str
    """File that ``navil-megatron data build`` or ``data index`` wrote."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become packed rows."""

    train_sources: tuple[SourceConfig, ...]
    """The mixture; every global stretch of samples holds each source's share to within one sample."""
    tokenizer: str
    """Folder with a Hugging Face tokenizer that holds the 12 special tokens."""
    validation_sources: tuple[str, ...] = ()
    """Index files of held-out sources; empty: no evaluation."""
    seq_length: int = 16_384
    """Tokens of one packed row, padding included."""
    min_image_pixels: int = 65_536
    """Smallest image area, in pixels; smaller images are enlarged to it, smaller scales are not made."""
    max_image_pixels: int = 1_048_576
    """Largest image area, in pixels, before padding (patches times 256)."""
    multi_scale: bool = True
    """Visual multi-scale packing: the image again at tau^i of its size, small to large (paper, section 4.1)."""
    scale_ratio: float = 0.7071
    """tau, the side ratio of successive scales."""
    share_shrunk_limit: bool = False
    """Reproduce the released demo: the limit left by one image's smallest scale caps the next image of the sample."""
    image_decoder: Literal["pillow", "dali"] = "pillow"
    """What decodes and resizes images: ``pillow`` as the reference does, to the bit; ``dali`` NVIDIA DALI, on the GPU
    where ``runtime.device`` is ``cuda``, with the rest as tensor operations, within 2/255 of it."""
    max_source_pixels: int = 67_108_864
    """Largest image file that is decoded, in pixels, read from its header first; a larger one is a failed sample."""
    num_workers: int = 1
    """Background threads that read, decode and pack ahead of the step."""
    prefetch_steps: int = 2
    """Steps prepared ahead."""
    max_failed_share: float = 0.05
    """Largest share of samples seen so far that may fail to decode before the run stops."""
    pad_segments_to: int = 16
    """Each modality's segment of a row is padded to a multiple of this many tokens (FP8: 16, blockwise: 128)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The layout: how one model and one batch are laid over the ranks. Data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages that split the decoder's depth; the first also holds encoder and connector."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks a stage holds under the interleaved schedule; ``None``: plain 1F1B."""
    pipeline_layers: tuple[int, ...] | None = None
    """Decoder layers of each stage, first to last; ``None``: even."""
    expert_model_parallel_size: int = 1
    """Ranks that share out the FFN experts of both modalities, out of the data-parallel ones. 2 with one expert per
    modality: text expert on one, visual on the other; half of their memory each, but work as uneven as the tokens."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each matrix of such an expert; ``None``: as many as ``tensor_model_parallel_size``."""
    context_parallel_size: int = 1
    """Ranks that split a row's tokens, where it is too long for one. Divides key/value heads / tensor-parallel size."""
    sequence_parallel: bool = False
    """Split activations outside the matrices over the tensor-parallel ranks too."""

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that split each matrix of an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one set of experts."""
        return self.expert_tensor_size * self.pipeline_model_parallel_size * self.expert_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.pipeline_model_parallel_size * self.row_ranks

    @property
    def row_ranks(self) -> int:
        """Ranks of a pipeline stage that share its rows."""
        return self.tensor_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay and FP32 master weights, and its learning-rate schedule."""

    lr: float
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = 200
    """Steps of linear warm-up from zero."""
    min_lr: float = 0.0
    """Floor of the cosine, reached at ``training.train_steps``."""
    weight_decay: float = 0.05
    """Decoupled weight decay; norms, biases, LayerScale and one-dimensional parameters are exempt."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    clip_grad: float | None = 1.0
    """Largest global gradient norm; ``None``: no clipping."""
    distributed: bool = True
    """Split optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks bucket by bucket during a step's last backward pass, not after it."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket during the next forward pass, not after the update. Needs ``distributed``
    and ``overlap_grad_reduce``."""


Recomputed = Literal["attention", "mlp", "encoder"]
"""Parts of the model whose activations can be computed again in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How long, how much at once, and what is trained."""

    train_steps: int
    """Optimizer updates of the whole run."""
    global_batch_size: int
    """Packed rows of one update, over all data-parallel ranks."""
    micro_batch_size: int = 1
    """Packed rows of one forward pass of one rank."""
    phase: Literal["s1.1", "s1.2", "s2"] = "s2"
    """Stage of the recipe, which decides what is trainable (paper, tables 7 and 8): ``s1.1`` encoder, connector,
    visual experts and special tokens; ``s1.2`` also the text attention; ``s2`` everything."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; gradients, master weights and moments are FP32."""
    seed: int = 1234
    """Decides initial weights and data order."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Recipe of the decoder's matrix products (``runtime.kernels = "transformer_engine"``): ``delayed`` scales by the
    largest values of past steps, ``tensorwise`` by those of the tensor itself, ``blockwise`` by those of 128-wide
    blocks. Weights and checkpoints stay BF16. The scales of ``delayed`` are not saved: a resumed run starts with 1, as
    a new one does. ``mxfp8`` needs Blackwell and is refused."""
    fp8_first_last_layers_bf16: bool = False
    """Keep the decoder's first and last layer in BF16; not with ``delayed``, whose scales are updated once a pass."""
    fp8_encoder: bool = False
    """Run the encoder's layers in FP8 too; not with ``delayed``."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of ``recompute_modules``, or those of every layer of
    decoder and encoder."""
    recompute_modules: tuple[Recomputed, ...] = ("attention",)
    """What ``recompute = "selective"`` computes again: ``attention`` the decoder's softmax and its gathers, ``mlp`` its
    feed-forward experts, ``encoder`` every layer of the visual encoder. Read where ``recompute`` is selective."""
    loss_chunk_tokens: int = 1_024
    """Predicted positions whose logits exist at once, in tokens: 1,024 fill a GPU's GEMM, and their FP32 logits over
    152k words take 0.6 GB."""
    router_aux_loss: float = 0.01
    """Weight of the loss that balances the experts of one modality (Switch Transformer), each layer's mean over the
    modality's tokens; 0: off. Read where ``num_experts`` is more than 1."""
    router_z_loss: float = 0.001
    """Weight of the loss that keeps router logits small (ST-MoE), averaged and read as above; 0: off."""
    evaluate_every_steps: int | None = None
    """Steps between evaluations on the held-out shards; ``None``: never."""
    evaluate_swapped_images: bool = False
    """Evaluate a second time with each sample showing another one's picture: the loss must rise if images are read."""
    log_every_steps: int = 1
    """Steps between metric records."""

    def recomputes(self, part: Recomputed) -> bool:
        """Whether the activations of a part are computed again in the backward pass."""
        return self.recompute == "full" or (self.recompute == "selective" and part in self.recompute_modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Where and when state is saved, and where weights come from."""

    directory: str
    """Folder that holds the run's checkpoints."""
    save_every_steps: int | None = None
    """Steps between saves; ``None``: only at the end and on SIGTERM."""
    keep_last: int = 2
    """Newest checkpoints kept; older ones are deleted after a good save."""
    initial_weights: str | None = None
    """Checkpoint whose weights (and not its data state) start a run that has no checkpoint of its own."""
    initial_optimizer: Literal["fresh", "kept"] = "fresh"
    """Optimizer state of such a start. ``kept``: moments and FP32 weights of ``initial_weights``; parameters that were
    frozen there start with clean moments. Steps, learning rate and data start anew either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Where the run executes."""

    device: Literal["cuda", "cpu"]
    """``cuda`` with NCCL, or ``cpu`` with gloo. Never guessed."""
    kernels: Literal["torch", "transformer_engine"] = "torch"
    """Which arithmetic the layers use. Weights and checkpoints are the same, so a run may change it on resume."""
    gradient_accumulation_fusion: Literal["none", "apex", "transformer_engine"] = "none"
    """What adds weight gradients to the FP32 sums inside the matrix product: ``apex`` in megatron-core's own layers
    (the LM head), ``transformer_engine`` in the linear layers of those kernels."""
    collective_timeout_seconds: int = 600
    """A collective that does not come back within this time ends the run."""
    cpu_threads: int | None = None
    """Threads of one CPU rank; ``None``: cores divided by local ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """What a run leaves behind besides checkpoints."""

    directory: str
    """Folder for ``metrics.jsonl``, TensorBoard files and failed-sample lists."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    progress: bool = True
    """Show a progress bar on the terminal of rank 0."""
    feature_scale_every_steps: int | None = None
    """Steps between measurements of the decoder's hidden states, text and visual apart, layer by layer; ``None``: none.
    They are written with the next record (``training.log_every_steps``)."""
    wandb_project: str | None = None
    """Weights & Biases project that rank 0 sends the records to; ``None``: none. Where the service is away or
    ``WANDB_MODE`` is ``offline``, they stay in ``directory`` for ``wandb sync``."""
    wandb_entity: str | None = None
    """Its user or team; ``None``: that of the API key, or ``WANDB_ENTITY``."""
    wandb_name: str | None = None
    """The run's name there; ``None``: W&B finds one, or ``WANDB_NAME``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NaViLConfig:
    """A whole run."""

    model: ModelConfig
    """The model."""
    data: DataConfig
    """Its samples."""
    training: TrainingConfig
    """Its length and phase."""
    optimizer: OptimizerConfig
    """Its update rule."""
    checkpoint: CheckpointConfig
    """Its state on disk."""
    runtime: RuntimeConfig
    """Its machine."""
    logging: LoggingConfig
    """Its records."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Its layout."""

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one microbatch: its rows laid end to end."""
        return self.training.micro_batch_size * self.data.seq_length

    @property
    def rank_tokens(self) -> int:
        """Tokens of one microbatch on a context-parallel rank."""
        return self.microbatch_tokens // self.parallel.context_parallel_size
