"""How a run begins: model, optimizer and state, from a checkpoint, from given weights or from nothing."""

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from navil_megatron.checkpoint.local_copies import LocalCopies
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.checkpoint.rank_state import restore_rank_state
from navil_megatron.config.run import NaViLConfig
from navil_megatron.models.build import build_model
from navil_megatron.models.navil_model import NaViLModel
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.state import TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """What a step works with."""

    model: list[NaViLModel]
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    state: TrainingState


def start_run(
    config: NaViLConfig,
    session: Session,
    manager: CheckpointManager,
    copies: LocalCopies | None = None,
    before: int | None = None,
) -> Run:
    """The run as its newest copy or checkpoint left it, or its newest checkpoint of a step before this one; without
    one, as it starts.

    Where its data goes on is for the caller, who has the loader (``state.loader``). Under ``checkpoint.fall_back`` a
    damaged checkpoint is passed by, but not where a step is given: a replay leaves checkpoints as they are.

    Raises:
        UserError: A checkpoint does not fit the config or is damaged.
    """
    model = build_model(config, session.groups, session.device)
    folder = manager.latest(before)
    copy = copies.find(folder) if copies is not None else None
    is_new = folder is None and copy is None
    start = Path(config.checkpoint.initial_weights) if is_new and config.checkpoint.initial_weights else None
    if start is not None:
        session.together(lambda: manager.load_weights(start, model))
    chunks = wrap_ddp(config, session, model)
    session.watchdog.position.follow(chunks)
    optimizer = build_optimizer(config, chunks, session)
    if start is not None and config.checkpoint.initial_optimizer == "kept":
        session.together(lambda: manager.load_optimizer(start, model, optimizer))
    stored = None
    if copy is not None:
        session.together(lambda: restore_rank_state(copy, model, optimizer))
        stored = copy["training"]
        logger.info("restored %s, a copy on the nodes", copy["name"])
    elif before is None:
        stored = session.together(lambda: manager.restore_latest(model, optimizer))
    elif folder is not None:
        stored = session.together(lambda: manager.restore(folder, model, optimizer))
    state = TrainingState() if stored is None else TrainingState.from_dict(stored)
    return Run(model, chunks, optimizer, state)
