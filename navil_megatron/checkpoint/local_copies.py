"""Copies of a run's state on its nodes' own disks, between the checkpoints: a lost node costs few steps.

What a rank holds, as its layout splits it, is one archive by ``torch.save``. It lies on the rank's node and on the next
one, and is restored into the same layout alone.
"""

import io
import json
import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer

from navil_megatron.checkpoint.finite import require_finite
from navil_megatron.checkpoint.rank_state import copy_rank_state
from navil_megatron.config.errors import BadNumbers, UserError
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.run import NaViLConfig
from navil_megatron.files.archive import require_plain
from navil_megatron.files.checkpoint_folder import complete_checkpoints, step_of
from navil_megatron.files.copies_folder import CopiesFolder, run_id
from navil_megatron.files.hashes import fingerprint
from navil_megatron.runtime.host_messages import receive, start_send
from navil_megatron.runtime.session import Session

logger = logging.getLogger(__name__)

_SECTIONS = ("model", "data", "training", "optimizer", "parallel", "precision")
"""Of the config: where one of them changes, earlier copies are not taken."""


class LocalCopies:
    """Copies of one run; every rank makes one and calls its methods at the same point. Without
    ``checkpoint.local_directory`` none is due, none is found, and nothing is touched.
    """

    def __init__(self, config: NaViLConfig, session: Session) -> None:
        """Raises ``UserError`` where the folder cannot be written, or nodes have different numbers of ranks."""
        self._every = config.checkpoint.local_every_steps
        self._session, self._checkpoints = session, Path(config.checkpoint.directory)
        self._whole: str | None = None  # the newest copy that all ranks have
        self._under_way: str | None = None
        self._writer = threading.Thread()
        self._failure: Exception | None = None
        if config.checkpoint.local_directory is None:
            return
        run, self._life = self._from_main(lambda: (run_id(self._checkpoints), uuid.uuid4().hex[:8]))
        settings = {name: config_to_dict(getattr(config, name)) for name in _SECTIONS}
        settings_and_world = fingerprint(json.dumps([settings, session.world_size], sort_keys=True))[:16]
        self._folder = CopiesFolder(Path(config.checkpoint.local_directory) / run, settings_and_world)
        session.together(self._folder.make)
        self._group = session.host_group()
        if len(sizes := set(self._from_all(session.local_world_size))) > 1:
            raise UserError(f"checkpoint.local_directory needs as many ranks on every node, found {sorted(sizes)}")
        if session.local_world_size == session.world_size:
            logger.info("one node: copies in %s outlive its processes, and not the node", self._folder.path)

    def is_due(self, step: int) -> bool:
        """Whether a copy is made after this step."""
        return self._every is not None and step % self._every == 0

    def save(
        self, step: int, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer, training_state: dict[str, Any]
    ) -> None:
        """Copies the state to host memory; a thread brings it to the disks. If that fails, the next call warns.

        Raises:
            BadNumbers: It is not finite.
        """
        name = self._from_main(lambda: self._folder.name(step, self._newest_checkpoint(), self._life))
        self.settle()
        self._keep(self._whole, name)
        self._session.together(lambda: _require_finite(step, chunks, optimizer, self._session.rank))
        content = io.BytesIO()
        state = {"name": name, "rank": self._session.rank, "training": training_state}
        torch.save(state | copy_rank_state(chunks, optimizer), content)
        self._under_way = name
        self._writer = threading.Thread(target=self._write, args=(name, content.getbuffer()), daemon=True)
        self._writer.start()

    def find(self, checkpoint: Path | None) -> dict[str, Any] | None:
        """This rank's part of the newest copy that every rank can have, checked, in host memory: from this node's disk,
        or else from another node. ``None`` where none is newer than ``checkpoint``, the run's newest.

        Raises:
            UserError: A damaged part cannot be removed.
        """
        if self._every is None:
            return None
        rank, newest = self._session.rank, 0 if checkpoint is None else step_of(checkpoint) or 0
        while (chosen := self._choose(newest)) is not None:
            name, holders = chosen
            state, problem = None, None
            try:
                state = self._checked(name, self._fetch(name, holders))
            except ValueError as error:
                problem = str(error)
            problems = self._from_all(problem)
            bad = {owner: found for owner, found in enumerate(problems) if found is not None}
            if not bad:
                self._whole = name
                return state
            for owner, found in bad.items():
                if holders[owner] == rank:
                    logger.warning("%s is damaged (%s) and removed", self._folder.file(name, owner), found)
            mine = [owner for owner in bad if holders[owner] == rank]
            self._session.together(partial(self._folder.remove, name, mine))
        return None

    def settle(self) -> None:
        """Waits for the copy that is under way, if there is one; a warning tells where it could not be written."""
        if self._under_way is None:
            return
        self._writer.join()
        try:
            self._session.together(self._tell)
            self._whole = self._under_way
        except UserError as error:
            logger.warning("%s", error)
        except SystemExit:
            pass  # how a rank other than the first learns of it
        self._under_way = self._failure = None

    def close(self) -> None:
        """Removes all copies of the run, after a checkpoint that was waited for."""
        if self._every is not None:
            self.settle()
            self._keep()

    def _newest_checkpoint(self) -> int:
        return max((step_of(path) or 0 for path in complete_checkpoints(self._checkpoints)), default=0)

    def _keep(self, *names: str | None) -> None:
        if self._session.rank % self._session.local_world_size == 0:
            self._folder.keep(*names)

    def _tell(self) -> None:
        if self._failure is not None:
            why = " ".join(f"{type(self._failure).__name__}: {self._failure}".split())[:200]
            raise UserError(
                f"cannot write copy {self._folder.path / str(self._under_way)} on the node of rank "
                f"{self._session.rank} ({why}); training goes on, and the next copy is another try"
            )

    def _write(self, name: str, content: memoryview) -> None:
        """In the thread: to the next node, from the node before, and both to this node's disk."""
        rank, world_size, node = self._session.rank, self._session.world_size, self._session.local_world_size
        parts = {rank: content}
        try:
            if node < world_size:
                sent = start_send(content, (rank + node) % world_size, self._group)
                before = (rank - node) % world_size
                parts[before] = receive(before, self._group)
                for work in sent:
                    work.wait()
            for owner, part in parts.items():
                self._folder.write(name, owner, part)
        except (OSError, RuntimeError) as error:
            self._failure = error

    def _choose(self, newest: int) -> tuple[str, list[int]] | None:
        """The newest copy whose parts are all there, and for each rank who gives its part: itself where it can."""
        seen = self._from_all(self._folder.parts(newest))
        ranks = range(self._session.world_size)
        for name in sorted({name for name, _ in set().union(*seen)}, reverse=True):
            holders = [[by for by in (owner, *ranks) if (name, owner) in seen[by]] for owner in ranks]
            if all(holders):
                return name, [by for by, *_ in holders]
        return None

    def _fetch(self, name: str, holders: list[int]) -> memoryview:
        """This rank's part, after giving others theirs; nothing where who has it cannot read it."""
        rank = self._session.rank
        others = [owner for owner, holder in enumerate(holders) if holder == rank != owner]
        sent = [start_send(self._folder.read(name, owner), owner, self._group) for owner in others]
        own = self._folder.read(name, rank) if holders[rank] == rank else receive(holders[rank], self._group)
        for work in chain.from_iterable(sent):
            work.wait()
        return own

    def _checked(self, name: str, content: memoryview) -> dict[str, Any]:
        """The state that a part holds, once every record fits its CRC; nothing that it names is executed.

        Raises:
            ValueError: It is damaged.
        """
        require_plain(content)
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the damage leads to
            raise ValueError(" ".join(str(error).split())[:200]) from None
        if (state.get("name"), state.get("rank")) != (name, self._session.rank):
            raise ValueError(f"it is {state.get('name')} of rank {state.get('rank')}")
        return state

    def _from_main[T](self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank."""
        made: list[Any] = [self._session.together(lambda: make() if self._session.is_main else None)]
        torch.distributed.broadcast_object_list(made, src=0)
        return made[0]

    def _from_all[T](self, mine: T) -> list[T]:
        """What every rank gives, on every rank."""
        found: list[Any] = [None] * self._session.world_size
        torch.distributed.all_gather_object(found, mine)
        return found


def _require_finite(step: int, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer, rank: int) -> None:
    try:
        require_finite(chunks, optimizer, rank)
    except BadNumbers as error:
        raise BadNumbers(f"no copy is made of step {step}: {error}") from None
