"""``navil-megatron replay``: a step of a run again."""

import os
import sys
from argparse import Namespace

from navil_megatron.verbs.arguments import count, value
from navil_megatron.verbs.verb import Outcome, verb


@verb(
    "replay",
    "make a step of a run again, and say which sample, layer and rank made its numbers bad",
    "navil-megatron replay runs/a/checkpoints 1234 --nproc 2\n\n"
    "on a cluster:\n"
    "  torchrun --nnodes 4 --nproc-per-node 8 ... -m navil_megatron.replay runs/a/checkpoints 1234",
    value("run", "RUN", "the folder of its checkpoints"),
    value("step", "STEP", "as in bad_steps.jsonl", count),
    value("--nproc", "N", "ranks, as the run had (1)", count, default=1),
    has_json=False,
)
def replay(options: Namespace) -> Outcome:
    """Starts the ranks, which make the steps from the newest checkpoint before it; nothing is written."""
    from navil_megatron.launch import run_ranks
    from navil_megatron.replay import config_of_run

    config_of_run(options.run)
    arguments = [str(options.run), str(options.step)]
    if options.nproc > 1:
        return Outcome({}, "", run_ranks("navil_megatron.replay", arguments, options.nproc))
    os.execv(sys.executable, [sys.executable, "-m", "navil_megatron.replay", *arguments])
