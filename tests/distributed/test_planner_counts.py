"""Planned parameters and state are those of the built model: real sizes on the meta device, tiny ones on real ranks."""

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.blueprint.held_parameters import HeldParameter, chunk_parameters
from navil_megatron.blueprint.parameters import is_trainable
from navil_megatron.cli import main
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.dry_run import BuiltRank, build_ranks, dry_run
from navil_megatron.models.build import build_model
from navil_megatron.planner.memory import state_bytes
from tests.oracle import oracle_config
from tests.ranks import run_ranks, start_session, tiny_config
from tests.real_sizes import NAVIL_2B, NAVIL_9B
from tests.unit.config_examples import EXAMPLE_TOML

TIED = {"model": {"language": {"tied_embeddings": True}}}
COMPOSED = {"model": {"language": {"family": "internlm2", "qk_norm": False, "composed_visual_output_projection": True}}}

EXPERTS = {"model": {"language": {"num_experts": 4, "experts_per_token": 2}}}

LAYOUTS: dict[int, list[dict[str, dict[str, Any]]]] = {
    1: [{}, TIED, EXPERTS],
    2: [
        {"parallel": {"tp": 2, "sequence_parallel": True}},
        {"parallel": {"tp": 2}, **COMPOSED},
        {"parallel": {"pp": 2, "pipeline_layers": (1, 3)}, **TIED},
        {"parallel": {"pp": 2, "vpp": 2}},
        {"parallel": {"ep": 2}},
        {"parallel": {"ep": 2}, **EXPERTS},
        {"parallel": {"tp": 2, "sequence_parallel": True, "etp": 1}, **EXPERTS},
        {"parallel": {"cp": 2}},
    ],
    4: [{"parallel": {"ep": 4}, "model": {"language": {"num_experts": 2}}}],
}
"""Ranks -> sections of the configs."""


def planned(config: NaViLConfig, stage: int, expert: int) -> list[list[HeldParameter]]:
    """What a rank holds by the plan, chunk by chunk."""
    stages = config.parallel.pipeline_model_parallel_size
    chunks = stages * (config.parallel.virtual_pipeline_model_parallel_size or 1)
    return [
        list(chunk_parameters(config.model, config.parallel, chunk, expert)) for chunk in range(stage, chunks, stages)
    ]


def built(
    rank: int, world_size: int, layouts: list[dict]
) -> list[tuple[dict, str, list[dict[str, int]], list[dict[str, int]]]]:
    """(layout, phase, trained by the model, by the plan) of one rank."""
    found = []
    for sections, phase in product(layouts, ("s2", "s1.1", "s1.2")):
        config = oracle_config(**sections, training={"phase": phase})
        with start_session(rank, world_size, config) as session:
            chunks = build_model(config, session.groups, session.device)
            held = [{n: p.numel() for n, p in chunk.named_parameters() if p.requires_grad} for chunk in chunks]
            plan = [
                {piece.name: piece.numel for piece in chunk if is_trainable(piece.parameter.part, phase)}
                for chunk in planned(config, session.groups.pp.rank(), session.groups.ep.rank())
            ]
            found.append((sections, phase, held, plan))
    return found


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_each_rank_holds_what_is_planned(num_ranks: int) -> None:
    for rank in run_ranks(num_ranks, built, LAYOUTS[num_ranks]):
        for sections, phase, held, plan in rank:
            assert held == plan, (sections, phase)


def meta_ranks(_rank: int, _world_size: int, runs: list[tuple[NaViLConfig, int]]) -> list[list[BuiltRank]]:
    """In a process of its own: fake groups and the CPU form of core do not leak into other tests."""
    return [list(build_ranks(config, gpus)) for config, gpus in runs]


def real_run(model: ModelConfig, **sections: Any) -> NaViLConfig:
    training = {"global_batch_size": 64, **sections.pop("training", {})}
    precision = {"type": "bf16"}
    return tiny_config(model=model, runtime={"device": "cuda"}, training=training, precision=precision, **sections)


def test_real_sizes_are_exact_on_the_meta_device() -> None:
    small = dataclasses.replace(
        NAVIL_2B,
        language=dataclasses.replace(NAVIL_2B.language, vocab_size=92_544),
        special_token_ids=tuple(range(92_532, 92_544)),
    )
    (found,) = run_ranks(1, meta_ranks, [(real_run(model), 1) for model in (small, NAVIL_2B, NAVIL_9B)], timeout=200)
    # Of the 2B's tables the last 116 rows are no words.
    padding = 2 * 116 * NAVIL_2B.language.hidden_size
    assert [sum(rank.sizes.values()) for (rank,) in found] == [4_040_871_872, 4_040_921_024 + padding, 16_417_797_888]
    assert all(sum(rank.sizes.values()) == rank.num_trained for (rank,) in found)


def test_state_of_each_stage_is_exact() -> None:
    runs = []
    several = dataclasses.replace(NAVIL_9B.language, num_experts=4, experts_per_token=2)
    of_experts = dataclasses.replace(NAVIL_9B, language=several)
    for model, parallel, gpus in (
        (NAVIL_9B, {"tp": 2, "pp": 2, "sequence_parallel": True, "pipeline_layers": (8, 28)}, 16),
        (NAVIL_9B, {"tp": 2, "ep": 2, "sequence_parallel": True}, 8),
        (of_experts, {"tp": 2, "ep": 4, "etp": 1, "sequence_parallel": True}, 8),
    ):
        runs += [(real_run(model, parallel=parallel, training={"phase": phase}), gpus) for phase in ("s1.1", "s2")]
    (found,) = run_ranks(1, meta_ranks, runs, timeout=200)
    assert [len(ranks) for ranks in found] == [2, 2, 2, 2, 4, 4]
    for (config, gpus), ranks in zip(runs, found, strict=True):
        for rank in ranks:
            (plan,) = planned(config, rank.stage, rank.expert)
            sizes = {name.split(".", 1)[1]: numbers for name, numbers in rank.sizes.items()}
            assert sizes == {piece.name: piece.numel for piece in plan}
            state = state_bytes(config, plan, gpus // config.parallel.model_parallel_size)
            assert rank.num_trained == state.gradients / 4
            # Padding of the distributed optimizer, and shares that end inside a parameter.
            assert rank.optimizer_bytes == pytest.approx(state.optimizer, rel=1e-3)


def dry(_rank: int, _world_size: int, config: NaViLConfig, gpus: int | None) -> str:
    return dry_run(config, gpus)


def test_dry_run_of_a_cuda_config_needs_no_gpu() -> None:
    config = real_run(NAVIL_9B, parallel={"tp": 4, "pp": 2, "sequence_parallel": True}, data={"seq_length": 16_384})
    (text,) = run_ranks(1, dry, config, None)
    assert "settings and layout are valid on 8 GPUs" in text
    assert "NOT CHECKED: source none is not on this machine" in text
    (last,) = planned(config, stage=1, expert=0)
    assert "16,417,797,888" in text and f"stage 1: {sum(piece.numel for piece in last):,} parameters a rank" in text
    assert "fit 80 GB" in text or "fits 80 GB" in text


def test_dry_run_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE_TOML)
    assert main(["train", str(path), "parallel.tensor_model_parallel_size=2", "--dry-run", "--gpus", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: world size 3 does not hold whole replicas")
    assert main(["train", str(path), "--gpus", "2"]) == 2
    assert "--gpus belongs to --dry-run" in capsys.readouterr().err
