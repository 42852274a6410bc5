"""What goes into a sharded checkpoint, and out of it again: weights, optimizer state, generators, training state.

Weights and moments are megatron-core sharded tensors, so any layout reads what another wrote. Of the optimizer's
hyperparameters only the step count is stored: the config of the resumed run decides the rest.
"""

import queue
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import ChainedOptimizer

from navil_megatron.blueprint.parameters import is_trainable, parameters_by_key
from navil_megatron.checkpoint.checked_reader import checked_reading
from navil_megatron.checkpoint.staged_save import StagedSave
from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.files.checkpoint_metadata import Contents, read_metadata
from navil_megatron.runtime.seeding import restore_rng_state, rng_state
from navil_megatron.runtime.session import Session

_RNG_KEY = "rng_state"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""Optimizer state in the shape of the weights, and without the ``chained_0.`` prefixes that depend on the layout."""


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model chunk itself, without data-parallel or precision wrappers."""
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The sharded weights of this rank's chunks.

    Core's linear layers add an empty ``_extra_state``, which converted checkpoints lack; it is left out.
    """
    states = [unwrap(chunk).sharded_state_dict(prefix="", metadata=dict(_METADATA)) for chunk in chunks]  # type: ignore[operator]
    return {
        f"model{index}": {name: entry for name, entry in state.items() if not name.endswith("._extra_state")}
        for index, state in enumerate(states)
    }


def stage_sharded(
    folder: Path,
    session: Session,
    chunks: Sequence[torch.nn.Module],
    optimizer: ChainedOptimizer,
    training_state: dict[str, Any],
) -> StagedSave:
    """One checkpoint in host memory; every rank calls it, ``folder`` exists and is empty."""
    state: dict[str, Any] = {
        **model_state(chunks),
        "training": training_state,
        "layout": _layout(session),
        "optimizer_step": optimizer_step(optimizer),
        _RNG_KEY: _sharded_rng(session),
    }
    if not optimizer.is_stub_optimizer:
        state["optimizer"] = _keep_local(_optimizer_state(optimizer, state, is_loading=False))
    # Left alone, core spawns a server process for this queue, which imports the whole main module again. A plain queue
    # does, for what fills it is this process.
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy(thread_count=1)
    return StagedSave(
        dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True, async_strategy="mcore")
    )


def saved_bytes(config: NaViLConfig) -> int:
    """Bytes of a checkpoint of all ranks together, without the few of its metadata.

    Of what trains, the fp32 weights and both of Adam's moments are saved too.
    """
    rows, size = parameters_by_key(config.model), config.precision.number_bytes
    total = 0
    for key, row in rows.items():
        held = rows[key.replace(".visual.", ".text.")] if row.is_shared else row
        trained = is_trainable(held.part, config.training.phase)
        total += row.numel * (size + 3 * torch.float32.itemsize * trained)
    return total


def read_contents(folder: Path) -> Contents:
    """What a checkpoint holds and where; nothing but its metadata is read.

    Raises:
        UserError: It is damaged, or holds what would be read unchecked.
    """
    if (folder / COMMON_STATE_FNAME).exists():
        raise UserError(
            f"checkpoint {folder} holds {COMMON_STATE_FNAME}, which no checkpoint of ours does and nothing checks; if "
            "you trust the rest, take it out"
        )
    return read_metadata(folder)


def load_sharded(
    folder: Path, contents: Contents, session: Session, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer
) -> dict[str, Any]:
    """Restores weights, optimizer and generators in place; gives the training state.

    Generators are restored where the layout is the one that saved; at another layout they keep their seeds.
    """
    with checked_reading(folder, contents):
        stored = dist_checkpointing.load_common_state_dict(str(folder))
        wanted = model_state(chunks)
        if not optimizer.is_stub_optimizer:
            optimizer_state = _optimizer_state(optimizer, wanted, is_loading=True)
            wanted["optimizer"] = _keep_local(optimizer_state)
        same_layout = stored["layout"] == _layout(session)
        if same_layout:
            wanted[_RNG_KEY] = _sharded_rng(session)
        loaded = dist_checkpointing.load(wanted, str(folder))
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=True)
    if not optimizer.is_stub_optimizer:
        optimizer.load_state_dict(_with_lists(loaded["optimizer"], optimizer_state))
        set_optimizer_step(optimizer, stored["optimizer_step"])
    if same_layout:
        restore_rng_state(loaded[_RNG_KEY])
    return stored["training"]


def load_model(folder: Path, contents: Contents, chunks: Sequence[torch.nn.Module]) -> None:
    """Restores the weights alone."""
    with checked_reading(folder, contents):
        loaded = dist_checkpointing.load(model_state(chunks), str(folder))
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=True)


def load_optimizer(
    folder: Path, contents: Contents, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer
) -> None:
    """Restores the optimizer state of another run, whose weights the chunks hold already.

    What it does not hold, because those parameters were frozen there, stays as the new optimizer has it: no moments,
    and the weights as they are. Adam's count of updates is one for all, so their bias correction is that of the others.
    """
    if optimizer.is_stub_optimizer:
        return
    weights = model_state(chunks)
    now = _optimizer_state(optimizer, weights, is_loading=False)
    wanted = _optimizer_state(optimizer, weights, is_loading=True)
    taken = _keep_local(_take_stored(wanted, now, contents.tensors))
    with checked_reading(folder, contents):
        loaded = dist_checkpointing.load({"optimizer": taken}, str(folder))
        updates = dist_checkpointing.load_common_state_dict(str(folder))["optimizer_step"]
    optimizer.load_state_dict(_with_lists(loaded["optimizer"], wanted))
    set_optimizer_step(optimizer, updates)


def optimizer_step(optimizer: ChainedOptimizer) -> int:
    """Adam's count of updates, one for all parameters; empty groups count too, so every rank gives the same number."""
    return max((int(group["step"]) for group in optimizer.param_groups), default=0)


def set_optimizer_step(optimizer: ChainedOptimizer, step: int) -> None:
    """Puts the count back."""
    for group in optimizer.param_groups:
        group["step"] = step


def _layout(session: Session) -> dict[str, int]:
    return {
        "tensor": session.groups.tp.size(),
        "pipeline": session.groups.pp.size(),
        "chunks": session.parallel.virtual_pipeline_model_parallel_size or 1,
        "context": session.groups.cp.size(),
        "expert": session.groups.ep.size(),
        "data": session.groups.dp.size(),
    }


def _sharded_rng(session: Session) -> ShardedObject:
    return ShardedObject(_RNG_KEY, rng_state(), (session.world_size,), (session.rank,), replica_id=0)


def _optimizer_state(optimizer: ChainedOptimizer, weights: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    only_weights = {name: entry for name, entry in weights.items() if name.startswith("model")}
    return optimizer.sharded_state_dict(only_weights, is_loading=is_loading, metadata=dict(_METADATA))


def _take_stored(wanted: Any, now: Any, stored: Collection[str]) -> Any:
    """The tree to load, with what lies now in the place of every tensor that is not stored."""
    if isinstance(wanted, dict):
        return {key: _take_stored(part, now[key], stored) for key, part in wanted.items()}
    if isinstance(wanted, list):
        return [_take_stored(part, there, stored) for part, there in zip(wanted, now, strict=True)]
    is_missing = isinstance(wanted, ShardedTensor | ShardedTensorFactory) and wanted.key not in stored
    return LocalNonpersistentObject(now.data) if is_missing else wanted


def _keep_local(entry: Any) -> Any:
    """The same tree for core to save or load: dicts alone, and every leaf either sharded or left with the process.

    While it loads, core drops empty containers and closes the gaps in lists (dist_checkpointing/dict_utils.py,
    ``extract_matching_values``), so a rank whose experts are frozen could not take its optimizer state back.
    """
    if isinstance(entry, ShardedBase | LocalNonpersistentObject):
        return entry
    if isinstance(entry, list) and entry:
        return {index: _keep_local(part) for index, part in enumerate(entry)}
    if isinstance(entry, dict) and entry:
        return {key: _keep_local(part) for key, part in entry.items()}
    return LocalNonpersistentObject(entry)


def _with_lists(loaded: Any, tree: Any) -> Any:
    """What was loaded, with the lists that the tree had before ``_keep_local``."""
    if isinstance(tree, list) and tree:
        return [_with_lists(loaded[index], part) for index, part in enumerate(tree)]
    if isinstance(tree, dict) and tree:
        return {key: _with_lists(loaded[key], part) for key, part in tree.items()}
    return loaded
