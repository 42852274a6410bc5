"""megatron-core as this package imports it: what must be said before, and less than what it would load by itself.

Core marks its small fusions with ``torch.compile``, which loads the compiler there and then: a fifth of the time in
which a rank starts. Here it is loaded when such a function is first called, on a CPU never. And where ``wandb`` is
installed core imports it, for timers that nothing here uses.
"""

import functools
import gc
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from navil_megatron.runtime.logs import quiet_known_warnings

_stay_eager = False


def import_megatron_core() -> None:
    """Imports core, with all of its modules that mark functions."""
    quiet_known_warnings()
    # Kernels and collectives of one layer then start in the order in which they were enqueued (core asks for it under
    # tensor parallelism). CUDA reads it when it starts, which an import may make it do: so before torch's.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Modules are made to stay: looking for garbage among them takes a fifth of the time in which they load.
    collects = gc.isenabled()
    gc.disable()
    try:
        _import_without_compiler()
    finally:
        if collects:
            gc.enable()


def _import_without_compiler() -> None:
    import torch
    import torch._dynamo  # optimizers would: here it meets torch's functions before mcore_on_cpu replaces some

    compile_now, hides_wandb = torch.compile, "wandb" not in sys.modules
    torch.compile = functools.partial(compile_when_called, compile_now)
    if hides_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # how Python notes that a module is not to be found
    try:
        importlib.import_module("megatron.core.transformer.moe.router")
    finally:
        torch.compile = compile_now
        if hides_wandb:
            del sys.modules["wandb"]


def stay_eager() -> None:
    """Nothing is compiled from now on: eager is faster to start, and bit-stable on a CPU."""
    global _stay_eager
    _stay_eager = True


def compile_when_called(compile_now: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that its first call compiles."""
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(function if _stay_eager else compile_now(function))
        return compiled[0](*args, **kwargs)

    return call
