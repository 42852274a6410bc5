"""The folder of a run's checkpoints: saved whole or not at all, newest first restored, oldest deleted.

A save goes to ``step_00000100.partial`` and is renamed when every file is on disk; the rename is the commit, so a
killed save is never read. Under ``checkpoint.async_save`` training goes on in between, until a record finds it written.
"""

import logging
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from navil_megatron.blueprint.parameters import checkpoint_shapes
from navil_megatron.checkpoint.compatibility import (
    require_kept_optimizer,
    require_keys,
    require_same_model,
    require_same_optimizer,
)
from navil_megatron.checkpoint.finite import require_finite
from navil_megatron.checkpoint.sharded import (
    load_model,
    load_optimizer,
    load_sharded,
    read_contents,
    saved_bytes,
    stage_sharded,
)
from navil_megatron.checkpoint.staged_save import StagedSave
from navil_megatron.config.errors import BadNumbers, DamagedError, UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.files.atomic_file import PARTIAL, partial_of
from navil_megatron.files.atomic_folder import commit_folder
from navil_megatron.files.checkpoint_folder import (
    DAMAGED,
    STEP_PREFIX,
    complete_checkpoints,
    find_checkpoint,
    step_folder,
    step_of,
    still_there,
    write_config,
)
from navil_megatron.files.checkpoint_metadata import Contents
from navil_megatron.files.disk_space import free_bytes, require_space
from navil_megatron.runtime.session import Session

logger = logging.getLogger(__name__)

_READ_ERRORS = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError),
    *(pickle.UnpicklingError, CheckpointException, CheckpointingException),
)
"""What the readers of torch and megatron-core raise."""
_NOT_DAMAGE = (OSError, RuntimeError)
"""What they raise, too, where a connection or a device fails."""

_END = "mend that and start again: the run goes on from"
_GO_ON = "training goes on, and the next save is another try; until then a start would go on from"
"""What follows when a checkpoint cannot be written."""


@dataclass(frozen=True, slots=True)
class _Save:
    """A checkpoint that is not complete yet."""

    final: Path
    staged: StagedSave
    keep_older: bool


class CheckpointManager:
    """Saves and restores one run. Every rank makes one and calls each method at the same point.

    It looks at ``checkpoint.directory`` only when asked to save or restore.
    """

    def __init__(self, config: NaViLConfig, session: Session) -> None:
        self.config, self.session, self.directory = config, session, Path(config.checkpoint.directory)
        self.shapes = checkpoint_shapes(config.model)  # key and whole shape of every weight of a checkpoint
        self._under_way: _Save | None = None
        self._told_of_waiting = False

    def save(
        self,
        step: int,
        chunks: Sequence[torch.nn.Module],
        optimizer: ChainedOptimizer,
        training_state: dict[str, Any],
        *,
        keep_older: bool = False,
        wait: bool = True,
    ) -> Path:
        """Writes the checkpoint of a step and deletes those beyond ``keep_last``, unless all older ones are to be kept.

        A step that is already saved stays as it is. Without ``wait``, under ``checkpoint.async_save``, it is only
        copied to host memory now, and is complete after some later ``settle``; the next save waits for that.

        Raises:
            UserError: It cannot be written, for one because the disk is full; older ones stay as they are.
            BadNumbers: It is not finite.
        """
        self.settle(due=step)
        final = step_folder(self.directory, step)
        if self._agree(final.is_dir):
            return final
        self.session.together(lambda: self._require_finite(final, chunks, optimizer))
        partial = partial_of(final)
        self._written(final, lambda: self._begin(partial), OSError)
        staged = stage_sharded(partial, self.session, chunks, optimizer, training_state)
        save = _Save(final, staged, keep_older)
        if self.config.checkpoint.async_save and not wait:
            staged.start()
            self._under_way = save
        else:
            staged.write()
            self._commit(save, _END)
        return final

    def settle(self, *, due: int | None = None, wait: bool = False) -> None:
        """Commits the checkpoint that is being written in the background, if there is one and all its files are there;
        where it is to be waited for, or the save of another step is due, when they are.

        One that cannot be written is told in a warning, and leaves older ones as they are.
        """
        save = self._under_way
        if save is None:
            return
        if self.session.on_any_rank(not save.staged.is_written()):
            if due is None and not wait:
                return
            if due is not None and self.session.is_main and not self._told_of_waiting:
                self._told_of_waiting = True
                logger.warning(
                    "the save of step %d waits for %s, which is still being written: a larger "
                    "checkpoint.save_every_steps or a faster disk would spare that; this is said once",
                    *(due, save.final.name),
                )
        self._under_way = None
        try:
            self._commit(save, _GO_ON)
        except UserError as error:
            logger.warning("%s", error)
        except SystemExit:
            pass  # how a rank other than the first learns of it

    def _commit(self, save: "_Save", advice: str) -> None:
        """Makes a whole checkpoint of the files that all ranks have written."""
        # Core raises this on every rank when one cannot write its files. What else it raises, it raises on that rank
        # alone while the others wait for it, so that is not for us to tell them of.
        self._written(save.final, save.staged.finish, CheckpointException, advice)
        self._written(save.final, lambda: self._finish(save), OSError, advice)

    def require_space(self) -> None:
        """Refuses to train where the disk has no room for one checkpoint.

        Raises:
            UserError: It has not.
        """
        if self.session.is_main:
            require_space(self.directory, saved_bytes(self.config))

    def latest(self, before: int | None = None) -> Path | None:
        """The newest complete checkpoint, or the newest of a step before this one; the same one on every rank."""
        return self._agree(lambda: self._newest(before))

    def restore_latest(self, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> dict[str, Any] | None:
        """Restores the newest complete checkpoint and gives its training state; ``None`` where there is none.

        Under ``checkpoint.fall_back``, one that is damaged is renamed and the one before it is tried.

        Raises:
            UserError: The checkpoint belongs to another model or optimizer, or is damaged.
        """
        damaged = None
        while (folder := self.latest()) is not None:
            try:
                return self.restore(folder, chunks, optimizer)
            except DamagedError as error:
                if not self.config.checkpoint.fall_back:
                    raise DamagedError(
                        f"{error}; checkpoint.fall_back = true goes on from the newest whole one before it"
                    ) from None
                damaged = self._agree(partial(_set_aside, folder, error))
                logger.warning("%s; it is %s now; going on from the one before it", error, damaged.name)
        if damaged is not None:
            raise UserError(
                f"no whole checkpoint is left in {self.directory}: copy one there, or start in a new folder"
            )
        return None

    def restore(self, folder: Path, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> dict[str, Any]:
        """Restores a complete checkpoint and gives its training state.

        Raises:
            DamagedError: It is damaged.
            UserError: It belongs to another model or optimizer.
        """
        self._agree(lambda: require_same_model(folder, self.config))
        self._agree(lambda: require_same_optimizer(folder, self.config))
        contents = self._contents(folder)
        state = self._guarded(folder, lambda: load_sharded(folder, contents, self.session, chunks, optimizer))
        logger.info("restored %s", folder)
        return state

    def load_weights(self, folder: Path, chunks: Sequence[torch.nn.Module]) -> None:
        """Loads weights, and nothing else, from a checkpoint folder or from the newest one in a run's folder.

        To be called before the optimizer is built, which copies the weights.

        Raises:
            UserError: There is no checkpoint, it holds another model, or it is damaged.
        """
        folder = self._agree(lambda: find_checkpoint(folder, "correct checkpoint.initial_weights"))
        self._agree(lambda: require_same_model(folder, self.config, only_function=True))
        contents = self._contents(folder)
        self._guarded(folder, lambda: load_model(folder, contents, chunks))
        logger.info("loaded weights of %s", folder)

    def load_optimizer(self, folder: Path, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> None:
        """Takes the optimizer state of the checkpoint that ``load_weights`` read; see ``sharded.load_optimizer``.

        Raises:
            UserError: The checkpoint holds the state of another optimizer, or none, or is damaged.
        """
        folder = self._agree(lambda: find_checkpoint(folder, "correct checkpoint.initial_weights"))
        self._agree(lambda: require_kept_optimizer(folder, self.config))
        contents = self._agree(lambda: _contents_of(folder))
        self._guarded(folder, lambda: load_optimizer(folder, contents, chunks, optimizer))
        logger.info("kept the optimizer state of %s", folder)

    def _contents(self, folder: Path) -> Contents:
        """What rank 0 finds in a checkpoint, which must hold the model's weights."""
        contents = self._agree(lambda: _contents_of(folder))
        require_keys(folder, {key: tensor.shape for key, tensor in contents.weights.items()}, self.shapes)
        return contents

    def _agree[T](self, look: Callable[[], T]) -> T:
        """What rank 0 sees on its file system, on every rank."""
        found: list[Any] = [None]
        if self.session.is_main:
            try:
                found = [look()]
            except (UserError, OSError) as error:
                found = [error]
        torch.distributed.broadcast_object_list(found, src=0)
        if isinstance(found[0], UserError | OSError):
            raise found[0]
        return found[0]

    def _guarded[T](self, folder: Path, read: Callable[[], T]) -> T:
        """What ``read`` gives; if it fails on any rank, every rank says why."""
        problem: UserError | None = None
        result = None
        try:
            with still_there(folder):
                result = _read(folder, read)
        except UserError as error:
            problem = error
        problems: list[UserError | None] = [None] * self.session.world_size
        torch.distributed.all_gather_object(problems, problem)
        for found in filter(None, problems):
            raise found
        return result  # type: ignore[return-value]

    def _written(
        self, final: Path, write: Callable[[], object], failure: type[BaseException], advice: str = _END
    ) -> None:
        """Writes a part of a checkpoint; if that fails on any rank, all raise, and what is half written goes."""

        def attempt() -> None:
            try:
                write()
            except failure as error:
                logger.debug("writing %s failed", final, exc_info=True)
                raise UserError(
                    f"cannot write checkpoint {final} ({_in_a_line(_cause(error))}), the disk has "
                    f"{free_bytes(final) / 1e6:,.0f} MB free; {advice} {self._newest() or 'its start'}"
                ) from error

        try:
            self.session.together(attempt)
        except (UserError, SystemExit):
            if self.session.is_main:
                shutil.rmtree(partial_of(final), ignore_errors=True)
            raise

    def _require_finite(self, final: Path, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> None:
        try:
            require_finite(chunks, optimizer, self.session.rank)
        except BadNumbers as error:
            newest = self._newest() or "none"
            raise BadNumbers(f"{final.name} is not saved: {error}; the newest checkpoint is {newest}") from None

    def _begin(self, partial: Path) -> None:
        if self.session.is_main:
            for path in self.directory.glob(f"{STEP_PREFIX}*{PARTIAL}"):
                logger.info("removing %s, left behind by a save that did not finish", path)
                shutil.rmtree(path)
            partial.mkdir(parents=True)

    def _finish(self, save: "_Save") -> None:
        if self.session.is_main:
            partial, keep_last = partial_of(save.final), self.config.checkpoint.keep_last
            write_config(partial, asdict(self.config))
            commit_folder(partial, save.final)
            older = [] if save.keep_older else complete_checkpoints(self.directory)[:-keep_last]
            for path in older:
                # Renamed first: a deletion that is interrupted must not leave half a checkpoint under a good name.
                shutil.rmtree(path.rename(partial_of(path)))
            logger.info("saved %s", save.final)

    def _newest(self, before: int | None = None) -> Path | None:
        complete = complete_checkpoints(self.directory)
        return next((path for path in reversed(complete) if before is None or (step_of(path) or 0) < before), None)


def _contents_of(folder: Path) -> Contents:
    with still_there(folder):
        return read_contents(folder)


def _read[T](folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` gives.

    Raises:
        UserError: It cannot; a ``DamagedError`` unless the machine is to blame.
    """
    try:
        return read()
    except _READ_ERRORS as error:
        logger.debug("reading %s failed", folder, exc_info=True)
        cause = _cause(error)
        if isinstance(cause, _NOT_DAMAGE) and not isinstance(cause, FileNotFoundError):
            raise UserError(
                f"cannot read checkpoint {folder} ({_in_a_line(cause)}); mend that and start again"
            ) from error
        raise DamagedError(f"cannot read checkpoint {folder}, it is damaged ({_in_a_line(cause)})") from error


def _set_aside(folder: Path, error: DamagedError) -> Path:
    """Renames a damaged checkpoint, so that it is neither restored nor in the way of the step's next save."""
    names = (folder.with_name(f"{folder.name}{DAMAGED}{number or ''}") for number in count())
    try:
        return folder.rename(next(name for name in names if not name.exists()))
    except OSError as failure:
        raise UserError(f"{error}; it cannot be renamed either ({failure}): move it away to go on") from None


def _cause(error: BaseException) -> BaseException:
    """What went wrong; torch wraps it, with its traceback, in an exception that names the ranks."""
    failures = getattr(error, "failures", None) or {0: (error,)}
    return next(iter(failures.values()))[0]


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
