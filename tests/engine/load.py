"""Loads the real Python of ``transformer_engine`` over the stand-in, in a process of CPU ranks that pose as Hopper's.

``ENGINE`` names the folder that holds it, where nobody finds it who does not look (``tools/make_venv.sh`` makes it).
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ENGINE = Path(os.environ.get("NAVIL_ENGINE", Path(sys.prefix) / "engine"))
"""The folder of Transformer Engine's Python and of what it imports."""


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _pose() -> None:
    """What Transformer Engine asks torch about its GPU, beside what ``enable_megatron_core_on_cpu`` answers."""
    import torch

    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="NVIDIA H100, posed")
    torch.cuda.is_available = _always(True)  # every module refuses to be built otherwise
    torch.cuda.get_device_capability = _always((9, 0))  # which recipes and kernels there are
    torch.cuda.get_device_properties = _always(gpu)  # workspaces, which recipes
    torch.cuda.nvtx = SimpleNamespace(range_push=_always(None), range_pop=_always(None))  # around every forward
    torch.Tensor.is_cuda = property(_always(True))  # every module refuses other inputs


def _adapt_to_gloo(engine: Any) -> None:
    """What of Transformer Engine's Python reaches past torch's public face."""
    import torch

    # torch.cuda.default_generators is empty without a GPU; recompute saves and restores what stands there.
    engine.distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    engine.distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Named with a device, collectives are grouped by the backend, which gloo cannot; without one, by torch.
    manager = torch.distributed._coalescing_manager
    torch.distributed._coalescing_manager = lambda group=None, device=None, async_ops=False: manager(
        group, None, async_ops
    )


def load_engine() -> None:
    """Puts ``transformer_engine`` and ``transformer_engine_torch`` into this process, once.

    Raises:
        FileNotFoundError: The environment was made without them.
        RuntimeError: It comes too late.
    """
    if "transformer_engine_torch" in sys.modules:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron-core was loaded before Transformer Engine, and so without it")
    if not (ENGINE / "transformer_engine").is_dir():
        raise FileNotFoundError(f"no transformer_engine in {ENGINE}: make venv puts it there")
    from tests.engine.standin.module import build_module

    sys.path.append(str(ENGINE))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # their own switch: load no CUDA library
    sys.modules["transformer_engine_torch"] = build_module()
    _pose()
    # The first import gives up on the compiled part, which is not here: the second finds the stand-in in its place.
    with warnings.catch_warnings(action="ignore"):
        importlib.import_module("transformer_engine")
    importlib.import_module("transformer_engine.common").load_framework_extension = _always(None)
    _adapt_to_gloo(importlib.import_module("transformer_engine.pytorch"))
