"""The one-rank oracle: the same weights and the same global batch at any layout, compared as whole tensors."""

import dataclasses
from dataclasses import dataclass

import torch

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import ALONE, Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import place_of
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import StepResult, train_step
from tests.ranks import start_session, tiny_config
from tests.whole import assemble, slices_of
from tools.bench.synthetic import synthetic_microbatch

SEQ_LENGTH = 64
MIXED = ((9, ((4, 4),)), (12, ()), (5, ((2, 4), (4, 6))))
TEXT_ONLY = ((20, ()), (11, ()))
IMAGE_ONLY = ((1, ((4, 6),)), (1, ((4, 4), (2, 2))))
TINY_IMAGE = ((30, ((2, 2),)),)

Composition = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


@dataclass
class Outcome:
    """What the steps of one rank gave."""

    losses: list[float]
    grad_norms: list[float]
    gradients: list
    parameters: list


def oracle_config(**sections) -> NaViLConfig:
    """A tiny fp32 run with 64-token rows.

    Adam divides a gradient by its own size, so where a gradient is nothing but rounding noise the update is noise of
    full size. The large epsilon keeps the update a smooth function of the gradient and the comparison meaningful.
    """
    defaults = {
        "data": {"seq_length": SEQ_LENGTH, "pad_segments_to": 4},
        # A row predicts more tokens than a chunk of the loss holds.
        "training": {"loss_chunk_tokens": 8},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0, "clip_grad": 1.0, "epsilon": 1e-3},
    }
    merged = merge_sections(defaults, sections)
    changes = merge_sections({"language": {"num_layers": 4}}, merged.pop("model", {}))
    model = tiny_config().model
    parts = {name: dataclasses.replace(getattr(model, name), **fields) for name, fields in changes.items()}
    return tiny_config(model=dataclasses.replace(model, **parts), **merged)


def merge_sections(first: dict, second: dict) -> dict:
    """Both tables of tables; the second wins field by field."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {*first, *second}}


def global_batch(
    config: NaViLConfig, compositions: tuple[Composition, ...], session: Session | None = None
) -> list[Microbatch]:
    """One row per composition, each from its own seed, planned for a rank; without one for a run's only rank."""
    place = ALONE if session is None else place_of(session)
    return [
        synthetic_microbatch(config.model, SEQ_LENGTH, 100 + number, [composition], pad_segments_to=4, place=place)
        for number, composition in enumerate(compositions)
    ]


def run_steps(
    rank: int, world_size: int, sections: dict, compositions: tuple[Composition, ...], num_steps: int = 2
) -> Outcome:
    """Some optimizer steps on this rank's share of the same global batch."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        batch = global_batch(config, compositions, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        outcome = Outcome([], [], [], [])
        for step in range(num_steps):
            result = train_step(config, session, chunks, optimizer, mine, lr=1e-2)
            outcome.losses.append(global_loss(result, session))
            outcome.grad_norms.append(float(result.grad_norm))
            if step == 0 and (
                session.groups.dp.size() * session.groups.cp.size() == 1 or not config.optimizer.distributed
            ):
                outcome.gradients = _gradients(chunks)
        outcome.parameters = slices_of([chunk.module for chunk in chunks])
        return outcome


def global_loss(result: StepResult, session) -> float:
    """The loss of the global batch: every last-stage rank's sum, replicas of a tensor-parallel group counted once."""
    total = result.loss_sum.clone()
    torch.distributed.all_reduce(total)
    return float(total / session.groups.tp.size() / result.loss_weight)


def _gradients(chunks) -> list:
    """Gradient slices as they stand after the reduction. The distributed optimizer leaves each data-parallel rank only
    its piece of them, so there the updated parameters speak for the gradients.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            assert not parameter.requires_grad or parameter.main_grad is not None
    return slices_of([chunk.module for chunk in chunks], "main_grad")


def compare(found: list[Outcome], expected: Outcome, *, rtol: float, atol: float) -> None:
    """Every rank's view against one rank's."""
    for outcome in found:
        torch.testing.assert_close(outcome.losses, expected.losses, rtol=rtol, atol=atol)
        torch.testing.assert_close(outcome.grad_norms, expected.grad_norms, rtol=rtol, atol=atol)
    for name in ("gradients", "parameters"):
        if name == "gradients" and not found[0].gradients:
            continue
        whole = assemble(getattr(expected, name))
        seen = set()
        for outcome in found:
            for key, _, index, values in getattr(outcome, name):
                seen.add(key)
                torch.testing.assert_close(
                    values, whole[key][index], rtol=rtol, atol=atol, msg=lambda m, k=key, n=name: f"{n} of {k}: {m}"
                )
        assert seen == set(whole)
