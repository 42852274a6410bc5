"""One layout: memory of its fullest rank, seconds of its step, and where they go."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from navil_megatron.blueprint.flops import (
    Term,
    backward_flops,
    encoder_terms,
    forward_flops,
    head_terms,
    layer_terms,
    training_flops,
)
from navil_megatron.blueprint.held_parameters import HeldParameter, chunk_parameters, layers_of_chunks
from navil_megatron.blueprint.parameters import Part, is_trainable
from navil_megatron.blueprint.vision_plan import fullest_share
from navil_megatron.blueprint.workload import Workload, expert_loads
from navil_megatron.config.run import NaViLConfig
from navil_megatron.planner.communication import MicrobatchSizes, RankTraffic, Sent
from navil_megatron.planner.hardware import PEAK_TFLOPS, Hardware, ring_share
from navil_megatron.planner.memory import ActivationModel, quantized_weight_bytes, state_bytes
from navil_megatron.planner.schedule import ChunkTime, Schedule, balanced_layers, most_in_flight, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage, at the fullest moment of a step."""

    stage: int
    parameters: int  # numbers, not bytes
    weights: float
    gradients: float
    optimizer: float
    activations: float  # decoder, embeddings and head, of all microbatches in flight
    encoder: float  # encoder and connector, the same
    inputs: float  # pixels and ids of the step's microbatches, which are all on the device at once
    working: float  # beside these while a layer or the head runs, and FP8 copies of weights

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(getattr(self, kind) for kind in MEMORY_KINDS)


MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "encoder", "inputs", "working")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is expected of a layout."""

    config: NaViLConfig
    dp_size: int
    num_microbatches: int  # of a step and replica
    stages: tuple[StageMemory, ...]
    schedule: Schedule
    step_seconds: float
    layer_traffic_seconds: float
    """Of the step, collectives inside the layers, of the stage with most of them."""
    gradient_seconds: float  # of the step, gradients and updated weights over the ranks that share them
    update_seconds: float  # of the step, the optimizer
    model_flops: float  # of the step, all ranks

    @property
    def fullest(self) -> StageMemory:
        """The stage whose rank takes most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def gpus(self) -> int:
        """Of the run."""
        return self.dp_size * self.config.parallel.model_parallel_size

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens of packed rows, padding included."""
        tokens = self.config.training.global_batch_size * self.config.data.seq_length
        return tokens / self.step_seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPUs could do at their peak."""
        return self.model_flops / self.step_seconds / self.gpus / (PEAK_TFLOPS * 1e12)


@dataclass(frozen=True, slots=True)
class Products:
    """Matrix products of a part of the model."""

    terms: list[Term]  # of the forward pass
    again: list[Term]  # repeated in the backward pass
    ranks: int  # share them evenly


class Estimator:
    """Estimates one layout of a run, by one microbatch of its work."""

    def __init__(self, config: NaViLConfig, hardware: Hardware, work: Workload) -> None:
        self.config, self.hardware, self.work = config, hardware, work
        self._stages = config.parallel.pipeline_model_parallel_size
        self._dp_size = hardware.gpus // config.parallel.model_parallel_size
        self._loads = expert_loads(work, config)

    def estimate(self) -> Estimate:
        """What to expect of the layout, which ``validate`` has passed."""
        config, stages, training = self.config, self._stages, self.config.training
        num_microbatches = training.global_batch_size // (training.micro_batch_size * self._dp_size)
        memory = tuple(self._stage_memory(stage, num_microbatches) for stage in range(stages))
        layer, first, last = self._part_times()
        times = [layer * count for count in self._layers]
        times[0] += first
        times[-1] += last
        send = self._link("pp") * config.rank_tokens * config.model.language.hidden_size
        send *= config.precision.number_bytes / config.parallel.sequence_ranks
        schedule = simulate(times, stages, num_microbatches, send)
        gradients = max(self._seconds(rank.of_gradients()) for rank in self._ranks)
        # Gradient and state are read, state is written.
        update = max(2 * stage.optimizer + stage.gradients for stage in memory) / (self.hardware.hbm_bandwidth * 1e9)
        flops = training_flops(config.model, self.work, training.phase)
        on_stage = max(sum(self._layers[stage::stages]) for stage in range(stages))
        return Estimate(
            config=config,
            dp_size=self._dp_size,
            num_microbatches=num_microbatches,
            stages=memory,
            schedule=schedule,
            step_seconds=schedule.seconds + gradients + update,
            layer_traffic_seconds=num_microbatches * on_stage * self._layer_traffic,
            gradient_seconds=gradients,
            update_seconds=update,
            model_flops=flops * num_microbatches * self._dp_size,
        )

    def balanced(self) -> NaViLConfig:
        """The run with the decoder layers laid over the stages so that the slowest is as fast as can be."""
        parallel, num_layers = self.config.parallel, self.config.model.language.num_layers
        layer, first, last = self._part_times()
        extra = [0.0] * parallel.num_chunks
        extra[0] += first.both
        extra[-1] += last.both
        counts = balanced_layers(parallel, num_layers, layer.both, extra)
        laid = replace(parallel, pipeline_layers=counts if len(set(counts)) > 1 else None)
        return replace(self.config, parallel=laid)

    @cached_property
    def _layers(self) -> tuple[int, ...]:
        return layers_of_chunks(self.config.parallel, self.config.model.language.num_layers)

    @cached_property
    def _held(self) -> list[list[list[HeldParameter]]]:
        """Of each stage what the rank with the fullest experts holds, chunk by chunk."""
        model, parallel, rank = self.config.model, self.config.parallel, self._loads.index(max(self._loads))
        chunks = [list(chunk_parameters(model, parallel, chunk, rank)) for chunk in range(len(self._layers))]
        return [chunks[stage :: self._stages] for stage in range(self._stages)]

    @cached_property
    def _ranks(self) -> list[RankTraffic]:
        """A rank of each stage, whose microbatches are all alike."""
        model, parallel, phase = self.config.model, self.config.parallel, self.config.training.phase
        context = parallel.context_parallel_size
        sizes = MicrobatchSizes(
            num_predictions=self.work.num_predictions // context,
            gathered_features=parallel.row_ranks * self._fullest_images.image_tokens(model.vision),
            text_tokens=self.work.text_tokens // context,
            visual_tokens=self.work.visual_tokens // context,
        )
        return [
            RankTraffic(
                config=self.config,
                pp_rank=stage,
                dp_rank=self._loads.index(max(self._loads)),
                world_size=self.hardware.gpus,
                batch=[[sizes]] * self._dp_size,
                parameters=[[p for p in chunk if is_trainable(p.parameter.part, phase)] for chunk in chunks],
            )
            for stage, chunks in enumerate(self._held)
        ]

    @property
    def _fullest_images(self) -> Workload:
        """The microbatch with the images of the rank that encodes most."""
        grids = fullest_share(self.work.grids, self.config.model.vision, self.config.parallel.row_ranks)
        return replace(self.work, grids=grids)

    def products(self) -> tuple[Products, Products, Products]:
        """Of one microbatch: one decoder layer; encoder and connector; the head."""
        model, ranks, training = self.config.model, self.config.parallel.row_ranks, self.config.training
        layer = list(layer_terms(model, self.work))
        if max(self._loads) > 1:
            # A rank holds one modality's experts: the fullest computes its tokens of all ranks, the others wait for it.
            of_experts = round(max(self._loads) * forward_flops(term for term in layer if _is_feed_forward(term[0])))
            layer = [term for term in layer if not _is_feed_forward(term[0])] + [("visual feed-forward", of_experts)]
        encoder, head = list(encoder_terms(model, self._fullest_images)), list(head_terms(model, self.work))
        of_layers = [term for term in encoder if term[0] != "connector"] if training.recomputes("encoder") else []
        return (
            Products(layer, [term for term in layer if self._is_repeated(term[0])], ranks),
            Products(encoder, of_layers, 1),
            # The backward pass makes the logits again, chunk by chunk.
            Products(head, head, ranks),
        )

    def _part_times(self) -> tuple[ChunkTime, ChunkTime, ChunkTime]:
        """The same in seconds, with their collectives; embeddings are counted with the encoder."""
        before, behind = (self._seconds(rank.of_edges(rank.batch[0][0])) for rank in (self._ranks[0], self._ranks[-1]))
        layer, encoder, head = self.products()
        return (
            self._compute(layer, self._layer_traffic),
            self._compute(encoder, before),
            # One stage is first and last at once: its collectives are counted with the encoder.
            self._compute(head, behind if self._stages > 1 else 0),
        )

    def _is_repeated(self, part: Part | None) -> bool:
        """Whether the backward pass repeats a group of a layer's products; those of the softmax have no part."""
        training = self.config.training
        if training.recompute == "full":
            return True
        is_softmax = part is None and training.recomputes("attention")
        return training.recomputes("mlp") if _is_feed_forward(part) else is_softmax

    def _compute(self, products: Products, traffic_seconds: float) -> ChunkTime:
        backward = backward_flops(products.terms, self.config.training.phase) + forward_flops(products.again)
        scale = 1 / (products.ranks * self.hardware.rate * 1e12)
        # Collectives of the two passes are nearly the same.
        return ChunkTime(
            forward_flops(products.terms) * scale + traffic_seconds / 2, backward * scale + traffic_seconds / 2
        )

    @cached_property
    def _layer_traffic(self) -> float:
        """Seconds of the collectives inside one decoder layer."""
        return self._seconds(self._ranks[0].of_layer(0))

    def _seconds(self, sent: Iterable[Sent]) -> float:
        """Time of these collectives, one after the other, at ring cost."""
        return sum(
            num_bytes * ring_share(word, self._groups[axis][0]) * self._link(axis) for axis, word, _, num_bytes in sent
        )

    @cached_property
    def _groups(self) -> dict[str, tuple[int, int]]:
        """Ranks of a group along an axis and how far apart they lie: core orders tensor, context, data, pipeline."""
        parallel = self.config.parallel
        tensor, split = parallel.tensor_model_parallel_size, parallel.expert_tensor_size
        experts = parallel.expert_model_parallel_size
        sharing = self.hardware.gpus // (tensor * self._stages)  # hold the same weights
        return {
            "tp": (tensor, 1),
            "cp": (parallel.context_parallel_size, tensor),
            "ep": (experts, split),
            "dp": (sharing, tensor),
            "expert dp": (sharing * tensor // (split * experts), split * experts),
            "pp": (self._stages, tensor * sharing),
        }

    def _link(self, axis: str) -> float:
        """Seconds a byte along an axis."""
        return 1 / self.hardware.link(*self._groups[axis])

    def _stage_memory(self, stage: int, num_microbatches: int) -> StageMemory:
        activations = ActivationModel(self.config, self.work, fused=self.config.runtime.device == "cuda")
        decoder = [count * activations.layer() + activations.shared_by_layers() for count in self._layers]
        # A chunk's output stays until its gradient arrives.
        decoder[:-1] = [kept + activations.hidden_bytes for kept in decoder[:-1]]
        decoder[0] += activations.embedding()
        decoder[-1] += activations.final_norm() + activations.head()
        encoder = [activations.encoder(), *[0] * (len(decoder) - 1)]
        # When the encoder runs backward, its microbatch has nothing left in decoder and connector.
        in_encoder = activations.encoder_layer_working() - decoder[0] - activations.connector()
        held = [piece for chunk in self._held[stage] for piece in chunk]
        is_first, is_last = stage == 0, stage == self._stages - 1
        return StageMemory(
            stage=stage,
            parameters=sum(piece.numel for piece in held),
            **state_bytes(self.config, held, self._dp_size)._asdict(),
            activations=most_in_flight(stage, self._stages, num_microbatches, decoder),
            encoder=most_in_flight(stage, self._stages, num_microbatches, encoder),
            inputs=activations.inputs(is_first, num_microbatches),
            working=quantized_weight_bytes(self.config, held)
            + max(
                activations.layer_working(),
                activations.head_working() if is_last else 0,
                max(activations.encoder_working(), in_encoder) if is_first else 0,
            ),
        )


def _is_feed_forward(part: Part | None) -> bool:
    return part in ("text feed-forward", "visual feed-forward")
