"""``navil-megatron train``: starts the ranks, or builds everything without a GPU."""

import os
import sys
from argparse import Namespace

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.arguments import CONFIG, OVERRIDES, count, flag, value
from navil_megatron.verbs.verb import Outcome, verb


@verb(
    "train",
    "train on this machine, resuming from the newest checkpoint",
    "navil-megatron train run.toml training.train_steps=100 --nproc 2\n\n"
    "on a cluster:\n"
    "  torchrun --nnodes 4 --nproc-per-node 8 ... -m navil_megatron.pretrain run.toml",
    CONFIG,
    OVERRIDES,
    value("--nproc", "N", "ranks to start on this machine (1)", count, default=1),
    flag("--dry-run", "check and build everything without a GPU, and stop"),
    flag("--step", "with --dry-run: also take a step of each stage at full size without a GPU (minutes)"),
    value("--gpus", "N", "of the dry run (the fewest that hold the layout)", count),
    has_json=False,
)
def train(options: Namespace) -> Outcome:
    """Starts the ranks; a config that cannot run is refused before any of them."""
    from navil_megatron.config.load import load_config
    from navil_megatron.config.validate import validate
    from navil_megatron.data.run_inputs import require_inputs
    from navil_megatron.launch import run_ranks

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from navil_megatron.runtime.logs import quiet_known_warnings

        quiet_known_warnings()  # comes before the first import of megatron-core
        from navil_megatron.dry_run import dry_run

        return Outcome({}, dry_run(config, options.gpus, options.step))
    if options.gpus is not None:
        raise UserError("--gpus belongs to --dry-run; a run has the ranks that --nproc or torchrun starts")
    if options.step:
        raise UserError("--step belongs to --dry-run; a run takes training.train_steps of them")
    arguments = [str(options.config), *options.overrides]
    if "RANK" not in os.environ:
        validate(config, options.nproc)
        require_inputs(config)
        if options.nproc > 1:
            return Outcome({}, "", run_ranks("navil_megatron.pretrain", arguments, options.nproc))
    # One rank, or a rank that torchrun started: this process becomes it, so that signals and the exit code are its own.
    os.execv(sys.executable, [sys.executable, "-m", "navil_megatron.pretrain", *arguments])
