"""Entry point of one rank: ``torchrun -m navil_megatron.pretrain CONFIG.toml [MORE.toml section.field=value ...]``."""

import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from navil_megatron.config.errors import EXIT_CODE, OTHERS_STOPPED_EXIT_CODE, UserError, describe
from navil_megatron.config.load import load_config
from navil_megatron.config.validate import validate
from navil_megatron.data.run_inputs import require_inputs
from navil_megatron.launch import end_with_launcher

_STDERR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the config says. 0: finished or stopped on request; 2: something the user can mend; 5: bad numbers;
    1: the network gave up, or anything else.

    A run whose ranks wait for one another too long ends with 3, from its watchdog. Ranks that stop because only others
    were asked to (one node of several is drained) end with 4: for them the run is not over.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words:
            raise UserError("no config given; start with: torchrun -m navil_megatron.pretrain CONFIG.toml")
        config = load_config(Path(words[0]), words[1:])
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
        require_inputs(config)
    except UserError as error:
        # Every rank reads the same config and finds the same problems; one of them tells.
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(describe(error) + "\n")
        return EXIT_CODE
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        # Imported late: a config that cannot run is refused before torch and megatron-core are loaded.
        from navil_megatron.checkpoint.run_lock import owned_run
        from navil_megatron.runtime.session import Session
        from navil_megatron.training.loop import train

        gc.freeze()  # core looks for garbage at every save: not among all that is loaded by now
        with Session.start(config) as session, owned_run(config, session):
            state = train(config, session)
    except UserError as error:
        sys.stderr.write(describe(error) + "\n")
        return error.exit_code
    except OSError as error:
        # A disk that takes no more, noticed anywhere; the run goes on from its newest checkpoint.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        sys.stderr.write(f"error: {error}; mend that and start again\n")
        return EXIT_CODE
    finally:
        signal.signal(signal.SIGTERM, previous)
    finished = state.step >= config.training.train_steps
    return 0 if finished or session.was_asked_to_stop else OTHERS_STOPPED_EXIT_CODE


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Ends a rank that is asked to stop before its session listens: nothing is begun that could be saved."""
    if os.environ.get("RANK", "0") == "0":
        os.write(_STDERR, b"stopped on request while starting: nothing was trained\n")
    os._exit(0)


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main())
