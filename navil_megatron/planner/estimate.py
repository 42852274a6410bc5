"""One layout: memory of its fullest rank, seconds of its step, and where they go."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from navil_megatron.blueprint.flops import Term, backward_flops, encoder_terms, head_terms, layer_terms, training_flops
from navil_megatron.blueprint.held_parameters import HeldParameter, chunk_parameters, layers_of_chunks
from navil_megatron.blueprint.parameters import Part, is_trainable
from navil_megatron.blueprint.vision_plan import fullest_share
from navil_megatron.blueprint.workload import Workload, expert_loads
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.training import TrainingConfig
from navil_megatron.planner.communication import (
    MicrobatchSizes,
    RankView,
    Sent,
    edge_traffic,
    gradient_traffic,
    layer_traffic,
)
from navil_megatron.planner.machine import Machine, ring_share
from navil_megatron.planner.memory import ActivationModel, StateBytes, state_bytes
from navil_megatron.planner.schedule import ChunkTime, Schedule, balanced_layers, most_in_flight, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage, at the fullest moment of a step."""

    stage: int
    parameters: int
    """Numbers, not bytes."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Decoder, embeddings and head, of all microbatches in flight."""
    encoder: float
    """Encoder and connector, the same."""
    inputs: float
    """Pixels and ids of the step's microbatches, which are all on the device at once."""
    working: float
    """Beside these while a layer or the head runs."""

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(getattr(self, kind) for kind in MEMORY_KINDS)


MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "encoder", "inputs", "working")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is expected of a layout."""

    config: NaViLConfig
    """The run with this layout."""
    dp_size: int
    """Replicas."""
    num_microbatches: int
    """Of a step and replica."""
    stages: tuple[StageMemory, ...]
    """Memory of a rank of each pipeline stage."""
    schedule: Schedule
    """The pipeline in time."""
    step_seconds: float
    """One update."""
    layer_traffic_seconds: float
    """Of it, collectives inside the layers, of the stage with most of them."""
    gradient_seconds: float
    """Of it, gradients and updated weights over the ranks that share them."""
    update_seconds: float
    """Of it, the optimizer."""
    model_flops: float
    """Of the step, all ranks."""

    @property
    def fullest(self) -> StageMemory:
        """The stage whose rank takes most memory."""
        return max(self.stages, key=lambda stage: stage.peak)


class Estimator:
    """Estimates layouts of one run.

    Args:
        machine: What it runs on.
        work: One microbatch.
    """

    def __init__(self, machine: Machine, work: Workload):
        self.machine, self.work = machine, work

    def estimate(self, config: NaViLConfig) -> Estimate:
        """What to expect of the run with its layout, which ``validate`` has passed."""
        parallel, phase = config.parallel, config.training.phase
        stages, dp_size = parallel.pipeline_model_parallel_size, self.machine.gpus // parallel.model_parallel_size
        num_microbatches = config.training.global_batch_size // (config.training.micro_batch_size * dp_size)
        memory = tuple(self._stage_memory(config, stage, dp_size, num_microbatches) for stage in range(stages))
        layer, first, last = self._part_times(config)
        counts = layers_of_chunks(parallel, config.model.language.num_layers)
        times = [layer * count for count in counts]
        times[0] += first
        times[-1] += last
        send = self._link(config, "pp") * config.rank_tokens * config.model.language.hidden_size
        send *= config.precision.number_bytes / (
            parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        )
        schedule = simulate(times, stages, num_microbatches, send)
        views = [self._view(config, stage) for stage in range(stages)]
        gradients = max(self._seconds(config, gradient_traffic(view)) for view in views)
        # Gradient and state are read, state is written.
        update = max(2 * stage.optimizer + stage.gradients for stage in memory) / (self.machine.hbm_bandwidth * 1e9)
        flops = training_flops(config.model, self.work, phase)
        on_stage = max(sum(counts[stage::stages]) for stage in range(stages))
        return Estimate(
            config=config,
            dp_size=dp_size,
            num_microbatches=num_microbatches,
            stages=memory,
            schedule=schedule,
            step_seconds=schedule.seconds + gradients + update,
            layer_traffic_seconds=num_microbatches * on_stage * self._layer_traffic(config),
            gradient_seconds=gradients,
            update_seconds=update,
            model_flops=flops * num_microbatches * dp_size,
        )

    def balance(self, config: NaViLConfig) -> NaViLConfig:
        """The run with the decoder layers laid over the stages so that the slowest is as fast as can be."""
        parallel, num_layers = config.parallel, config.model.language.num_layers
        chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
        layer, first, last = self._part_times(config)
        extra = [0.0] * chunks
        extra[0] += first.both
        extra[-1] += last.both
        counts: tuple[int, ...] | None = balanced_layers(parallel, num_layers, layer.both, extra)
        if num_layers % chunks == 0 and counts == (num_layers // chunks,) * chunks:
            counts = None
        return replace(config, parallel=replace(parallel, pipeline_layers=counts))

    def _part_times(self, config: NaViLConfig) -> tuple[ChunkTime, ChunkTime, ChunkTime]:
        """Of one microbatch: one decoder layer; encoder, connector and embeddings; the head."""
        model, parallel, training = config.model, config.parallel, config.training
        work = self.work
        flops = list(layer_terms(model, work))
        fullest = max(expert_loads(work, config))
        if fullest > 1:
            # A rank holds one modality's experts: the fullest computes its rows of all ranks, the others wait for it.
            rows = round(fullest * sum(forward for part, forward in flops if _is_feed_forward(part)))
            flops = [term for term in flops if not _is_feed_forward(term[0])] + [("visual feed-forward", rows)]
        again = sum(forward for part, forward in flops if _is_repeated(part, training))
        layer = self._compute(config, flops, parallel.row_ranks, again, self._layer_traffic(config))
        encoded = replace(work, grids=fullest_share(work.grids, model.vision, parallel.row_ranks))
        last_stage = parallel.pipeline_model_parallel_size - 1
        before, behind = (self._edge_traffic(config, stage) for stage in (0, last_stage))
        encoder = list(encoder_terms(model, encoded))
        again = sum(forward for _, forward in encoder) if training.recomputes("encoder") else 0
        first = self._compute(config, encoder, 1, again, before)
        # One stage is first and last at once: its collectives are counted with the encoder.
        head = list(head_terms(model, work))
        again = sum(forward for _, forward in head)  # the backward pass makes the logits again, chunk by chunk
        last = self._compute(config, head, parallel.row_ranks, again, behind if last_stage else 0)
        return layer, first, last

    def _compute(
        self, config: NaViLConfig, terms: list[Term], ranks: int, again: int, traffic_seconds: float
    ) -> ChunkTime:
        """Seconds of some matrices; ``again`` FLOPs of them are repeated in the backward pass."""
        forward = sum(flops for _, flops in terms)
        backward = backward_flops(terms, config.training.phase) + again
        scale = 1 / (ranks * self.machine.rate * 1e12)
        # Collectives of the two passes are nearly the same.
        return ChunkTime(forward * scale + traffic_seconds / 2, backward * scale + traffic_seconds / 2)

    def _layer_traffic(self, config: NaViLConfig) -> float:
        """Seconds of the collectives inside one decoder layer."""
        return self._seconds(config, layer_traffic(self._view(config, 0), 0))

    def _edge_traffic(self, config: NaViLConfig, stage: int) -> float:
        """Seconds of the collectives before the first layer or behind the last."""
        view = self._view(config, stage)
        return self._seconds(config, edge_traffic(view, view.batch[0][0]))

    def _seconds(self, config: NaViLConfig, parts: Iterable[Sent]) -> float:
        """Time of these collectives, one after the other, at ring cost."""
        return sum(
            num_bytes * ring_share(word, self._ranks(config, axis)[0]) * self._link(config, axis)
            for axis, word, _, num_bytes in parts
        )

    def _ranks(self, config: NaViLConfig, axis: str) -> tuple[int, int]:
        """Ranks of a group along an axis and how far apart they lie: core orders tensor, context, data, pipeline."""
        parallel = config.parallel
        tensor, experts = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        stages = parallel.pipeline_model_parallel_size
        sharing = self.machine.gpus // (tensor * stages)  # hold the same weights
        split = parallel.expert_tensor_size
        return {
            "tp": (tensor, 1),
            "cp": (parallel.context_parallel_size, tensor),
            "ep": (experts, split),
            "dp": (sharing, tensor),
            "expert dp": (sharing * tensor // (split * experts), split * experts),
            "pp": (stages, tensor * sharing),
        }[axis]

    def _link(self, config: NaViLConfig, axis: str) -> float:
        """Seconds a byte along an axis."""
        return 1 / self.machine.link(*self._ranks(config, axis))

    def _view(self, config: NaViLConfig, stage: int) -> RankView:
        """A rank of a stage and one microbatch, as the formula of the traffic wants it."""
        ranks, context = config.parallel.row_ranks, config.parallel.context_parallel_size
        share = replace(self.work, grids=fullest_share(self.work.grids, config.model.vision, ranks))
        sizes = MicrobatchSizes(
            num_predictions=self.work.num_predictions // context,
            gathered_features=ranks * share.image_tokens(config.model.vision),
            rows_by_modality=(self.work.text_tokens // context, self.work.visual_tokens // context),
        )
        phase = config.training.phase
        return RankView(
            config=config,
            pp_rank=stage,
            dp_rank=self._expert_rank(config),
            world_size=self.machine.gpus,
            batch=[[sizes]] * (self.machine.gpus // config.parallel.model_parallel_size),
            parameters=[
                [piece for piece in chunk if is_trainable(piece.parameter.part, phase)]
                for chunk in self._parameters(config, stage)
            ],
        )

    def _parameters(self, config: NaViLConfig, stage: int) -> list[list[HeldParameter]]:
        """What the rank with the fullest experts holds, chunk by chunk."""
        parallel, num_layers = config.parallel, config.model.language.num_layers
        chunks = range(stage, len(layers_of_chunks(parallel, num_layers)), parallel.pipeline_model_parallel_size)
        return [list(chunk_parameters(config.model, parallel, chunk, self._expert_rank(config))) for chunk in chunks]

    def _expert_rank(self, config: NaViLConfig) -> int:
        loads = expert_loads(self.work, config)
        return loads.index(max(loads))

    def _stage_memory(self, config: NaViLConfig, stage: int, dp_size: int, num_microbatches: int) -> StageMemory:
        activations = ActivationModel(config, self.work, fused=config.runtime.device == "cuda")
        stages = config.parallel.pipeline_model_parallel_size
        counts = layers_of_chunks(config.parallel, config.model.language.num_layers)
        decoder = [count * activations.layer() + activations.shared_by_layers() for count in counts]
        # A chunk's output stays until its gradient arrives.
        decoder[:-1] = [kept + activations.row_bytes for kept in decoder[:-1]]
        decoder[0] += activations.embedding()
        decoder[-1] += activations.final_norm() + activations.head()
        encoder = [activations.encoder(), *[0] * (len(counts) - 1)]
        held = [piece for chunk in self._parameters(config, stage) for piece in chunk]
        state: StateBytes = state_bytes(config, held, dp_size)
        is_last = stage == stages - 1
        return StageMemory(
            stage=stage,
            parameters=sum(piece.numel for piece in held),
            weights=state.weights,
            gradients=state.gradients,
            optimizer=state.optimizer,
            activations=most_in_flight(stage, stages, num_microbatches, decoder),
            encoder=most_in_flight(stage, stages, num_microbatches, encoder),
            inputs=activations.inputs(stage == 0, num_microbatches),
            working=max(
                activations.layer_working(),
                activations.head_working() if is_last else 0,
                activations.encoder_working() if stage == 0 else 0,
            ),
        )


def _is_feed_forward(part: Part | None) -> bool:
    return part in ("text feed-forward", "visual feed-forward")


def _is_repeated(part: Part | None, training: TrainingConfig) -> bool:
    """Whether the backward pass repeats a group of a decoder layer's products; those of the softmax have no part."""
    if training.recompute == "full":
        return True
    return training.recomputes("mlp") if _is_feed_forward(part) else part is None and training.recomputes("attention")
