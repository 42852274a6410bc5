"""What a run reads, looked for before torch is loaded: what is not there is said in a second."""

from pathlib import Path

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.shards.shard_index import SourceIndex
from navil_megatron.files.checkpoint_folder import complete_checkpoints, find_checkpoint
from navil_megatron.files.tokenizer_file import require_tokenizer_folder


def require_inputs(config: NaViLConfig) -> None:
    """Looks for tokenizer, indexes and initial weights; what they hold is for those who open them.

    Raises:
        UserError: One is missing.
    """
    require_tokenizer_folder(Path(config.data.tokenizer))
    held_out = () if config.evaluation.every_steps is None else config.evaluation.sources
    for index in (*(source.index for source in config.data.train_sources), *held_out):
        if not Path(index).is_file():
            SourceIndex(index)  # says what is wrong
    start = config.checkpoint.initial_weights
    if start is not None and not complete_checkpoints(Path(config.checkpoint.directory)):
        find_checkpoint(Path(start), "correct checkpoint.initial_weights")
