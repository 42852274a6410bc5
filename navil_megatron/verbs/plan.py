"""``navil-megatron plan``: what a run takes, and which layout suits it."""

from argparse import Namespace

from navil_megatron.planner.hardware import Hardware
from navil_megatron.verbs.arguments import OVERRIDES, chosen, count, positive, value
from navil_megatron.verbs.verb import Outcome, verb

_GPU = Hardware(gpus=1)


@verb(
    "plan",
    "what a run takes and which layout suits it: parameters, memory, expected step time; needs no GPU",
    "navil-megatron plan run.toml --gpus 64 --hbm 80 --picture schedule.svg",
    value("config", "CONFIG", "TOML file of the run; its layout is not read"),
    OVERRIDES,
    value("--gpus", "N", "GPUs of the run", count, required=True),
    value("--hbm", "GB", f"memory of a GPU ({_GPU.hbm:g})", positive, default=_GPU.hbm),
    value("--nvlink", "GB/s", f"what a GPU sends inside its node ({_GPU.nvlink:g})", positive, default=_GPU.nvlink),
    value("--network", "GB/s", f"what a GPU sends to other nodes ({_GPU.network:g})", positive, default=_GPU.network),
    value("--rate", "TFLOP/s", f"model FLOPs of a GPU while it computes ({_GPU.rate:g})", positive, default=_GPU.rate),
    value("--gpus-per-node", "N", f"({_GPU.gpus_per_node})", count, default=_GPU.gpus_per_node),
    value("--image-side", "PIXELS", "of each sample's image (1024)", count, default=1024),
    value("--text-tokens", "N", "text of each sample (256)", count, default=256),
    value("--top", "N", "layouts to show (8)", count, default=8),
    value("--picture", "FILE.svg", "draw the fastest layout's pipeline"),
)
def plan(options: Namespace) -> Outcome:
    """Searches the layouts; 1 if none fits."""
    from dataclasses import replace

    from navil_megatron.blueprint.workload import typical_workload
    from navil_megatron.config.load import load_config
    from navil_megatron.config.parallel import ParallelConfig
    from navil_megatron.config.validate import validate
    from navil_megatron.planner.report import as_json, as_text, describe_layout
    from navil_megatron.planner.search import search_layouts

    config = load_config(options.config, options.overrides)
    # What is wrong beside the layout is wrong with every layout.
    validate(replace(config, parallel=ParallelConfig()))
    hardware = Hardware(**chosen(options, "gpus", "hbm", "gpus_per_node", "nvlink", "network", "rate"))
    work = typical_workload(config, options.text_tokens, options.image_side)
    found = search_layouts(config, hardware, work)
    fitting = [candidate.estimate for candidate in found if candidate.fits and candidate.estimate]
    if options.picture is not None and fitting:
        from navil_megatron.planner.picture import draw_schedule

        # One stage makes no picture: the fastest layout with several, if there is one.
        drawn = next((estimate for estimate in fitting if len(estimate.stages) > 1), fitting[0])
        idle = f"{drawn.schedule.bubble:.1%} idle over {drawn.num_microbatches} microbatches"
        title = f"{describe_layout(drawn.config)}: {idle}"
        options.picture.write_text(draw_schedule(drawn.schedule, title), "utf-8")
    text = as_text(config, hardware, work, found, options.top)
    return Outcome(as_json(config, hardware, work, found), text, 0 if fitting else 1)
