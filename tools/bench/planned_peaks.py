"""Peak memory and FLOPs of each pipeline stage at some layouts of the recipes, beside what the planner expects.

    python tools/bench/planned_peaks.py [--models navil_2b] [--layouts "tp2-sp;ep2"] [--layers N]

A whole step of stage 2 at full size on a GPU that is not there (``navil_megatron.dry_step``), a few minutes each; a row
a pipeline stage. How far off the plan is: of the peak, of the peak without weights, gradients and optimizer, of FLOPs.
``--layers`` cuts encoder and decoder short.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from navil_megatron.config.load import load_config
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate

if TYPE_CHECKING:
    from navil_megatron.dry_step import SteppedRank

MODELS = ("navil_2b", "navil_9b")
TP2, TP4, PP2 = ({f"{kind}_model_parallel_size": n} for kind, n in (("tensor", 2), ("tensor", 4), ("pipeline", 2)))
SP, CP2, EP2 = {"sequence_parallel": True}, {"context_parallel_size": 2}, {"expert_model_parallel_size": 2}
PP4, INTERLEAVED = {"pipeline_model_parallel_size": 4}, {"virtual_pipeline_model_parallel_size": 2}
NONE, FULL = {"recompute": "none"}, {"recompute": "full"}


def selective(*modules: str) -> dict[str, Any]:
    """Recompute of some modules."""
    return {"recompute": "selective", "recompute_modules": modules}


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp8, full recompute": (8, {}, FULL),
    "tp2-dp2": (4, TP2, selective("encoder")),
    "tp2-sp": (2, {**TP2, **SP}, NONE),
    "tp4-sp, attention and mlp again": (4, {**TP4, **SP}, selective("attention", "mlp")),
    "tp4-sp-dp2": (8, {**TP4, **SP}, NONE),
    "tp2-sp-pp2": (4, {**TP2, **PP2, **SP}, selective("encoder")),
    "pp4, full recompute": (4, PP4, FULL),
    "tp2-sp-pp2-interleaved": (4, {**TP2, **PP2, **INTERLEAVED, **SP}, selective("encoder", "mlp")),
    "tp2-sp-cp2": (4, {**TP2, **CP2, **SP}, selective("encoder")),
    "ep2": (2, EP2, selective("encoder")),
    "tp2-sp-ep2": (4, {**TP2, **EP2, **SP}, selective("encoder")),
}
"""GPUs, and what differs in ``[parallel]`` and ``[training]``."""

HEADER = """| model | layout | stage | peak, GB | planned | off | without state | products | attention |
|---|---|---|---|---|---|---|---|---|"""


def run_at(model: str, layout: str) -> tuple[NaViLConfig, int]:
    """Stage 2 of a recipe at another layout, on so many GPUs."""
    gpus, parallel, training = LAYOUTS[layout]
    config = load_config(REPOSITORY / "examples" / model / "stage2.toml")
    alone = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    config = replace(
        config,
        parallel=replace(config.parallel, **{**alone, **parallel}),
        training=replace(config.training, **{"recompute_modules": (), **training}),
    )
    validate(config, gpus)
    return config, gpus


def with_layers(config: NaViLConfig, num_layers: int) -> NaViLConfig:
    """As wide, with fewer layers in encoder and decoder."""
    language, vision = (replace(part, num_layers=num_layers) for part in (config.model.language, config.model.vision))
    return replace(config, model=replace(config.model, language=language, vision=vision))


def row(model: str, layout: str, step: "SteppedRank") -> str:
    """What one stage holds at most beside what is planned: all of it, and without weights, gradients and optimizer."""
    expected = step.expected
    of_state, planned_state = (of.weights + of.gradients + of.optimizer for of in (step, expected))
    cells = [model, layout, step.stage, f"{step.peak / 1e9:.2f}", f"{expected.peak / 1e9:.2f}"]
    pairs = [(expected.peak, step.peak), (expected.peak - planned_state, step.peak - of_state)]
    pairs += zip(step.expected_flops, step.flops, strict=True)
    cells += [f"{planned / found - 1:+.1%}" for planned, found in pairs]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row a layout as it is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="which of them (default: both)")
    parser.add_argument("--layouts", default=";".join(LAYOUTS), help="which of them, with a semicolon between (all)")
    parser.add_argument("--layers", type=int, help="of encoder and decoder each (default: as many as they have)")
    options = parser.parse_args(arguments)

    from navil_megatron.dry_step import step_ranks

    print(HEADER)
    for model in options.models.split(","):
        for layout in options.layouts.split(";"):
            config, gpus = run_at(model, layout)
            config = with_layers(config, options.layers) if options.layers else config
            for step in step_ranks(config, gpus, text_tokens=256, image_side=1024):
                print(row(model, layout, step), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
