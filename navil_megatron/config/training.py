"""``[training]``: length, batch, phase and what is computed again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from navil_megatron.config.numbers import Count, CountFromZero, NotNegative, Range
from navil_megatron.config.parallel import ParallelConfig

Recomputed = Literal["attention", "mlp", "encoder"]
"""Parts of the model whose activations can be computed again in the backward pass."""
SEED = Range(0, 2**31, below=True)
"""Of the generators of torch and NumPy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How long, how much at once, and what is trained."""

    train_steps: Count
    """Optimizer updates of the whole run."""
    global_batch_size: Count
    """Packed rows of one update, over all data-parallel ranks."""
    micro_batch_size: Count = 1
    """Packed rows of one forward pass of one rank."""
    phase: Literal["s1.1", "s1.2", "s2"] = "s2"
    """Stage of the recipe, which decides what is trainable (paper, tables 7 and 8): ``s1.1`` encoder, connector,
    visual experts and special tokens; ``s1.2`` also the text attention; ``s2`` everything."""
    seed: Annotated[int, SEED] = 1234
    """Decides initial weights and data order."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of ``recompute_modules``, or those of every layer of
    decoder and encoder."""
    recompute_modules: tuple[Recomputed, ...] = ("attention",)
    """What ``recompute = "selective"`` computes again: ``attention`` the decoder's softmax and its gathers, ``mlp`` its
    feed-forward experts, ``encoder`` every layer of the visual encoder. Read where ``recompute`` is selective."""
    loss_chunk_tokens: Count = 1_024
    """Predicted positions whose logits exist at once, in tokens: 1,024 fill a GPU's GEMM, and their FP32 logits over
    152k words take 0.6 GB."""
    router_aux_loss: NotNegative = 0.01
    """Weight of the loss that balances the experts of one modality (Switch Transformer), each layer's mean over the
    modality's tokens; 0: off. Read where ``num_experts`` is more than 1."""
    router_z_loss: NotNegative = 0.001
    """Weight of the loss that keeps router logits small (ST-MoE), averaged and read as above; 0: off."""
    log_every_steps: Count = 1
    """Steps between metric records."""
    generate_every_steps: Count | None = None
    """Steps between captions of a few pictures of ``evaluation.sources``, and one at the end; ``None``: never. They are
    written to ``captions/`` in ``logging.directory``, as text and as a page."""
    profile_steps: tuple[Count, ...] | None = None
    """First and last step under torch's profiler; ``None``: none. ``profile/`` in ``logging.directory`` gets a trace of
    each of ``profile_ranks`` and, on a GPU, a snapshot of its memory; the log, the longest kernels."""
    profile_ranks: tuple[CountFromZero, ...] = (0,)
    """Ranks that are profiled. Read where ``profile_steps`` is set."""
    on_bad_step: Literal["skip", "stop"] = "skip"
    """What follows a step whose loss or gradient norm is not finite, or whose norm is over ``grad_norm_limit``. Its
    update is refused either way. ``skip``: the run goes on with the next samples; ``stop``: it ends, exit code 5."""
    max_bad_steps_in_a_row: CountFromZero = 5
    """Bad steps one after the other that ``skip`` takes; one more ends the run."""
    max_bad_steps_per_1000: CountFromZero = 20
    """Bad steps among the last 1,000 that ``skip`` takes; one more ends the run."""
    grad_norm_limit: Annotated[float, Range(1, above=True)] | None = None
    """Largest gradient norm, as a multiple of the median of the last 100 updates; from the 20th on. ``None``: none."""

    def recomputes(self, part: Recomputed) -> bool:
        """Whether the activations of a part are computed again in the backward pass."""
        return self.recompute == "full" or (self.recompute == "selective" and part in self.recompute_modules)


def training_rules(training: TrainingConfig, parallel: ParallelConfig, world_size: int | None) -> Iterator[str]:
    """One line for every rule about recompute and the batch that the run breaks."""
    chosen = training.recompute_modules
    if training.recompute == "selective" and not chosen:
        yield (
            'training.recompute = "selective", but training.recompute_modules is empty; name some of '
            f'{", ".join(get_args(Recomputed))}, or set training.recompute = "none"'
        )
    if len(set(chosen)) < len(chosen):
        yield f"training.recompute_modules = {list(chosen)} holds a name more than once; name each part once"
    yield from _profile_rules(training, world_size)
    yield from _batch_rules(training, parallel, world_size)


def _profile_rules(training: TrainingConfig, world_size: int | None) -> Iterator[str]:
    steps, ranks = training.profile_steps, training.profile_ranks
    if steps is None:
        return
    if len(steps) != 2 or not steps[0] <= steps[1] <= training.train_steps:
        yield (
            f"training.profile_steps = {list(steps)}, expected the first and the last step of a part of the run's "
            f"{training.train_steps}, e.g. [10, 12]"
        )
    wrong = [rank for rank in ranks if world_size is not None and rank >= world_size]
    if wrong or not ranks:
        yield f"training.profile_ranks = {list(ranks)}, expected some of the ranks from 0 to {(world_size or 1) - 1}"


def _batch_rules(training: TrainingConfig, parallel: ParallelConfig, world_size: int | None) -> Iterator[str]:
    """Rows over microbatches and ranks."""
    micro, total = training.micro_batch_size, training.global_batch_size
    replica, stages = parallel.model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size is not None and world_size % replica:
        yield (
            f"world size {world_size} does not hold whole replicas: one takes tensor * pipeline * context = {replica} "
            f"ranks; start a multiple of {replica} ranks or change [parallel]"
        )
        return
    experts = parallel.expert_ranks
    if world_size is not None and world_size % experts:
        yield (
            f"world size {world_size} does not hold whole sets of experts: one takes tensor * pipeline * expert = "
            f"{experts} ranks; start a multiple of {experts} ranks or change [parallel]"
        )
        return
    data_parallel = 1 if world_size is None else world_size // replica
    if total % (micro * data_parallel):
        yield (
            f"training.global_batch_size = {total} is not a multiple of micro_batch_size * data-parallel ranks = "
            f"{micro} * {data_parallel} = {micro * data_parallel}; change one of them"
        )
        return
    num_microbatches = total // (micro * data_parallel)
    # Without a world size data_parallel is 1, and more data-parallel ranks may still make the number right or wrong.
    if parallel.virtual_pipeline_model_parallel_size and world_size is not None and num_microbatches % stages:
        yield (
            f"the interleaved schedule needs microbatches in multiples of pipeline_model_parallel_size = {stages}, "
            f"found {num_microbatches}; change training.global_batch_size"
        )
