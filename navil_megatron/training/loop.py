"""The whole of training on one screen."""

import logging
from functools import partial
from itertools import product

from navil_megatron.checkpoint.local_copies import LocalCopies
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import TrainLoader
from navil_megatron.data.source_names import source_names
from navil_megatron.data.validation import ValidationLoader
from navil_megatron.kernels.provider import choose_kernels
from navil_megatron.runtime.profiler import StepProfiler
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import place_of
from navil_megatron.training.captions import HeldOutCaptions
from navil_megatron.training.evaluate import evaluate
from navil_megatron.training.failures import settle_failures
from navil_megatron.training.lr_schedule import learning_rate
from navil_megatron.training.metrics import MetricsLog, StepMeter
from navil_megatron.training.number_watch import NumberWatch
from navil_megatron.training.overlap import gather_parameters
from navil_megatron.training.progress import TrainingProgress
from navil_megatron.training.run_id import settle_run_id
from navil_megatron.training.start import start_run
from navil_megatron.training.state import TrainingState, is_due
from navil_megatron.training.step import train_step
from navil_megatron.training.wandb_run import check_wandb

logger = logging.getLogger(__name__)

_STOPPED_EARLY = "stopped on request while starting, at step %d of %d; start again to go on"


def train(config: NaViLConfig, session: Session) -> TrainingState:
    """Train from the newest checkpoint, or from the start, to ``training.train_steps`` or until asked to stop.

    A stop (SIGTERM, SIGINT) saves after the current record and returns; so does the end. Bad numbers end it without a
    save (``BadNumbers``).
    """
    session.together(lambda: choose_kernels(config))
    session.together(lambda: check_wandb(config.logging) if session.is_main else None)
    loader, held_out = session.together(lambda: _open_data(config, session))
    asks = config.training.generate_every_steps is not None
    captions = session.together(lambda: HeldOutCaptions(config, session)) if asks else None
    manager, copies = CheckpointManager(config, session), LocalCopies(config, session)
    session.together(manager.require_space)
    run = start_run(config, session, manager, copies)
    model, chunks, optimizer, state = run.model, run.chunks, run.optimizer, run.state
    total = config.training.train_steps
    if state.step >= total or session.stop_asked():
        logger.info("already at step %d of %d" if state.step >= total else _STOPPED_EARLY, state.step, total)
        loader.close()
        return state
    if state.step:
        session.together(lambda: loader.restore(state.loader))
    state.run_id = settle_run_id(config, session, state.run_id)
    log, meter = MetricsLog(config, session, state.run_id), StepMeter(config, session, model, optimizer, state)
    log.start(state.step)
    numbers = NumberWatch(config, session, chunks, state, partial(manager.settle, wait=True))
    steps = session.watchdog.position.steps(loader, state.step)
    profiler = StepProfiler(config, session)

    with TrainingProgress(config, session, state.step) as progress:
        while state.step < total:
            data = next(steps)
            microbatches, failed = settle_failures(session, data.microbatches)
            log.write_failures(state.step + 1, microbatches)
            loader.count_failed(failed)
            lr = learning_rate(state.step + 1, config.optimizer, total)
            profiler.before(state.step + 1)
            result = train_step(config, session, chunks, optimizer, microbatches, lr, numbers.judge)
            state.step += 1
            meter.add(result, microbatches, data, len(failed), loader.wait_seconds)
            if profiler.after(state.step):
                meter.restart()
            stopping, saving = False, is_due(state.step, config.checkpoint.save_every_steps, total)
            copying = not saving and copies.is_due(state.step)
            # A checkpoint counts what all its steps consumed, so a save makes a record too.
            if saving or copying or is_due(state.step, config.training.log_every_steps, total):
                record, scales = meter.record(lr)
                state.consumed_samples += int(record["samples"])
                state.consumed_tokens += int(record["tokens"])
                consumed = {"consumed_samples": state.consumed_samples, "consumed_tokens": state.consumed_tokens}
                log.write_train(state.step, {**record, **consumed})
                log.write("feature_scale", state.step, scales)
                progress.update(state.step, record)
                stopping = session.stop_asked()
                manager.settle()
                meter.restart()
            numbers.settle(result, microbatches)
            if held_out and is_due(state.step, config.evaluation.every_steps, total):
                losses = {name: evaluate(config, session, chunks, rows) for name, rows in held_out.items()}
                log.write("evaluation", state.step, losses)
                progress.evaluated(state.step, losses)
                meter.restart()
            if captions and is_due(state.step, config.training.generate_every_steps, total):
                captions.write(state.step, chunks)
                meter.restart()
            if stopping or saving or copying:
                state.loader = loader.state()
                gather_parameters(chunks)
                if stopping or saving:
                    last, refused = stopping or state.step == total, bool(result.refused)
                    manager.save(state.step, model, optimizer, state.to_dict(), keep_older=refused, wait=last)
                else:
                    copies.save(state.step, model, optimizer, state.to_dict())
                meter.restart()
            if stopping:
                logger.info("stopped on request at step %d of %d; start again to go on", state.step, total)
                break
    copies.close()
    profiler.close()
    loader.close()
    meter.close()
    log.close()
    return state


def _open_data(config: NaViLConfig, session: Session) -> tuple[TrainLoader, dict[str, ValidationLoader]]:
    """The training rows, and held-out rows by the name of the loss on them."""
    place = place_of(session)
    held_out = {}
    swaps = (False, True) if config.evaluation.swapped_images else (False,)
    indexes = config.evaluation.sources
    for (index, source), swap in product(zip(indexes, source_names(indexes), strict=True), swaps):
        name = "loss_swapped_images" if swap else "loss"
        name += f"/{source}" if len(indexes) > 1 else ""
        held_out[name] = ValidationLoader(config, index, place, swap_images=swap)
    return TrainLoader(config, place), held_out
