"""The ``navil-megatron plan`` verb: its options, and what it reports."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from navil_megatron.config.arguments import count, positive
from navil_megatron.config.load import load_config
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.planner.machine import Machine

Outcome = tuple[dict[str, Any], str, int]
"""Report, its text for a terminal, and the exit status."""


def add_plan_verb(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb; ``add_verb(name, run, what, example)`` makes its parser."""
    parser = add_verb(
        "plan",
        run_plan,
        "what a run takes and which layout suits it: parameters, memory, expected step time; needs no GPU",
        "navil-megatron plan run.toml --gpus 64 --hbm 80 --picture schedule.svg",
    )
    default = Machine(gpus=1)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file of the run; its layout is not read")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change, in TOML")
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="GPUs of the run")
    for option, unit, what in (
        ("hbm", "GB", "memory of a GPU"),
        ("nvlink", "GB/s", "what a GPU sends inside its node"),
        ("network", "GB/s", "what a GPU sends to other nodes"),
        ("rate", "TFLOP/s", "model FLOPs of a GPU while it computes"),
    ):
        value = getattr(default, option)
        parser.add_argument(f"--{option}", type=positive, default=value, metavar=unit, help=f"{what} ({value:g})")
    parser.add_argument("--gpus-per-node", type=count, default=default.gpus_per_node, metavar="N", help="(8)")
    parser.add_argument(
        "--image-side", type=count, default=1024, metavar="PIXELS", help="of each sample's image (1024)"
    )
    parser.add_argument("--text-tokens", type=count, default=256, metavar="N", help="text of each sample (256)")
    parser.add_argument("--top", type=count, default=8, metavar="N", help="layouts to show (8)")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the fastest layout's pipeline")


def run_plan(options: argparse.Namespace) -> Outcome:
    """Searches the layouts; 1 if none fits."""
    config = load_config(options.config, [*options.overrides, *options.rest])
    machine = Machine(
        gpus=options.gpus,
        hbm=options.hbm,
        gpus_per_node=options.gpus_per_node,
        nvlink=options.nvlink,
        network=options.network,
        rate=options.rate,
    )
    return plan(config, machine, options)


def plan(config: NaViLConfig, machine: Machine, options: argparse.Namespace) -> Outcome:
    """The report of a run on a machine."""
    from dataclasses import replace

    from navil_megatron.blueprint.workload import typical_workload
    from navil_megatron.config.validate import validate
    from navil_megatron.planner.report import as_json, as_text, describe_layout
    from navil_megatron.planner.search import search_layouts

    # What is wrong beside the layout is wrong with every layout.
    validate(replace(config, parallel=ParallelConfig()))
    work = typical_workload(config, options.text_tokens, options.image_side)
    found = search_layouts(config, machine, work)
    fitting = [candidate.estimate for candidate in found if candidate.fits and candidate.estimate]
    if options.picture is not None and fitting:
        from navil_megatron.planner.picture import draw_schedule

        # One stage makes no picture: the fastest layout with several, if there is one.
        drawn = next((estimate for estimate in fitting if len(estimate.stages) > 1), fitting[0])
        idle = f"{drawn.schedule.bubble:.1%} idle over {drawn.num_microbatches} microbatches"
        title = f"{describe_layout(drawn.config)}: {idle}"
        options.picture.write_text(draw_schedule(drawn.schedule, title), "utf-8")
    text = as_text(config, machine, work, found, options.top)
    return as_json(config, machine, work, found), text, 0 if fitting else 1
