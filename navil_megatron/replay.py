"""Entry point of one rank of ``navil-megatron replay``: ``torchrun -m navil_megatron.replay CHECKPOINTS STEP``."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from navil_megatron.config.errors import UserError, describe
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.renamed import with_new_names
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, find_checkpoint, read_config
from navil_megatron.launch import end_with_launcher


def config_of_run(checkpoints: Path) -> NaViLConfig:
    """The config of a run, from the newest checkpoint in its folder.

    Raises:
        UserError: There is none, or it holds no whole config, as a converted one.
    """
    newest = find_checkpoint(checkpoints, "give the checkpoint.directory of a run")
    stored = section_from_dict(NaViLConfig, with_new_names(read_config(newest)), str(newest / CONFIG_FILE))
    return replace(stored, checkpoint=replace(stored.checkpoint, directory=str(checkpoints)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays a step; rank 0 says what it found. Exit codes as of training."""
    checkpoints, step = sys.argv[1:] if arguments is None else arguments
    try:
        config = config_of_run(Path(checkpoints))
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
        from navil_megatron.runtime.session import Session
        from navil_megatron.training.replay import replay

        with Session.start(config) as session:
            lines = replay(config, session, int(step))
            if session.is_main:
                sys.stdout.write("\n".join(lines) + "\n")
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(describe(error) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main())
