"""``[parallel]``: the layout over ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.numbers import Count, CountFromZero, Range, divides

_GROUPED_WIDTH = 8  # numbers in 16 bytes of BF16: torch's grouped product wants rows to start there


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The layout: how one model and one batch are laid over the ranks. Data parallelism takes what is left."""

    tensor_model_parallel_size: Count = 1
    """Ranks that split each matrix."""
    pipeline_model_parallel_size: Count = 1
    """Stages that split the decoder's depth; the first also holds encoder and connector."""
    virtual_pipeline_model_parallel_size: Annotated[int, Range(2)] | None = None
    """Chunks a stage holds under the interleaved schedule; ``None``: plain 1F1B."""
    pipeline_layers: tuple[CountFromZero, ...] | None = None
    """Decoder layers of each stage, first to last; ``None``: even."""
    expert_model_parallel_size: Count = 1
    """Ranks that share out the FFN experts of both modalities, out of the data-parallel ones. 2 with one expert per
    modality: text expert on one, visual on the other; half of their memory each, but work as uneven as the tokens."""
    expert_tensor_parallel_size: Count | None = None
    """Ranks that split each matrix of such an expert; ``None``: as many as ``tensor_model_parallel_size``."""
    context_parallel_size: Count = 1
    """Ranks that split a row's tokens, where it is too long for one. Divides key/value heads / tensor-parallel size."""
    sequence_parallel: bool = False
    """Split activations outside the matrices over the tensor-parallel ranks too."""

    @property
    def num_chunks(self) -> int:
        """Pieces of the decoder's depth; chunk c lies on stage c modulo stages."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share out the tokens outside the matrices."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

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


def parallel_rules(parallel: ParallelConfig, language: LanguageConfig, seq_length: int) -> Iterator[str]:
    """What tensor parallelism splits, and what no module of this version does."""
    tensor = parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(language, name)
        yield from divides("parallel.tensor_model_parallel_size", tensor, f"model.language.{name}", value)
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel = true splits activations over the tensor-parallel ranks, but "
            "parallel.tensor_model_parallel_size = 1; raise it or switch sequence_parallel off"
        )
    if parallel.sequence_parallel:
        yield from divides("parallel.tensor_model_parallel_size", tensor, "data.seq_length", seq_length)
    yield from _expert_rules(parallel, language)
    if parallel.context_parallel_size > 1:
        yield from _context_rules(parallel, language, seq_length)
    yield from _pipeline_rules(parallel, language.num_layers)


def _context_rules(parallel: ParallelConfig, language: LanguageConfig, seq_length: int) -> Iterator[str]:
    """Ranks that share a row hold equally many tokens of each modality, and exchange whole groups of heads."""
    size = parallel.context_parallel_size
    groups = language.num_query_groups // parallel.tensor_model_parallel_size
    yield from divides(
        "parallel.context_parallel_size",
        size,
        "model.language.num_query_groups / parallel.tensor_model_parallel_size",
        groups,
    )
    ranks = size * parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and seq_length % ranks:
        yield (
            f"data.seq_length = {seq_length} does not divide over tensor * context = {ranks} ranks under "
            f"parallel.sequence_parallel; make it a multiple of {ranks}"
        )


def _expert_rules(parallel: ParallelConfig, language: LanguageConfig) -> Iterator[str]:
    ranks, split = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    tensor = parallel.tensor_model_parallel_size
    yield from divides(
        "parallel.expert_model_parallel_size",
        ranks,
        f"the feed-forward experts, {len(MODALITIES)} modalities * model.language.num_experts",
        len(MODALITIES) * language.num_experts,
    )
    if ranks > 1 and language.shares("ffn"):
        yield (
            f"parallel.expert_model_parallel_size = {ranks}, but model.language.modality_experts = "
            f"{list(language.modality_experts)} leaves one feed-forward network for both modalities; set it to 1"
        )
    if ranks == 1 and language.num_experts == 1:
        if split != tensor:
            yield (
                f"parallel.expert_tensor_parallel_size = {split}, but with one expert per modality on every rank "
                f'tensor_model_parallel_size = {tensor} splits the experts too; set it to "none"'
            )
        return
    if tensor > 1 and not parallel.sequence_parallel:
        # Every tensor-parallel rank would hold, and send, all rows.
        yield (
            f"sending rows to experts (num_experts = {language.num_experts}, expert_model_parallel_size = {ranks}) "
            f"with tensor_model_parallel_size = {tensor} needs parallel.sequence_parallel = true; switch it on"
        )
    yield from divides("parallel.expert_tensor_parallel_size", split, "tensor_model_parallel_size", tensor)
    yield from divides("parallel.expert_tensor_parallel_size", split, "ffn_hidden_size", language.ffn_hidden_size)
    if language.num_experts > 1:
        sizes = {"hidden_size": language.hidden_size, "ffn_hidden_size": language.ffn_hidden_size // split}
        for name, size in sizes.items():
            if size % _GROUPED_WIDTH:
                yield (
                    f"model.language.{name} is {size} on one of {split} expert tensor-parallel ranks; the grouped "
                    f"product of several experts takes multiples of {_GROUPED_WIDTH}: change one of the two"
                )


def _pipeline_rules(parallel: ParallelConfig, num_layers: int) -> Iterator[str]:
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None and stages == 1:
        yield (
            "parallel.virtual_pipeline_model_parallel_size is set, but parallel.pipeline_model_parallel_size = 1; "
            'interleaving needs at least 2 stages: set it to "none"'
        )
    chunks, layers = parallel.num_chunks, parallel.pipeline_layers
    if layers is None:
        if num_layers % chunks:
            yield (
                f"model.language.num_layers = {num_layers} does not divide evenly over {chunks} pipeline chunks; "
                "set parallel.pipeline_layers to the layers of each chunk"
            )
        return
    if len(layers) != chunks:
        yield (
            f"parallel.pipeline_layers has {len(layers)} entries, expected {chunks}: pipeline_model_parallel_size "
            "times virtual_pipeline_model_parallel_size"
        )
    if sum(layers) != num_layers:
        yield (
            f"parallel.pipeline_layers = {list(layers)} sums to {sum(layers)}, expected model.language.num_layers = "
            f"{num_layers}"
        )
