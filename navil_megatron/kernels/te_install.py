"""Whether Transformer Engine can run here, and what to do if not, in one line."""

import ctypes
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from navil_megatron.config.errors import UserError

VERSION = (2, 20)
"""The kernels are written against this one: they use what the next may change."""
REQUIREMENT = "transformer-engine[pytorch]>={0}.{1},<{0}.{2}".format(*VERSION, VERSION[1] + 1)
INSTALL = f'pip install --no-build-isolation "{REQUIREMENT}" (docs/hopper.md), or set runtime.kernels = "torch"'


def require_transformer_engine(fp8: str = "none") -> None:
    """Nothing, if Transformer Engine is installed for this torch and its GPU can do what ``precision.fp8`` asks.

    Raises:
        UserError: says what was found and what to do.
    """
    problem = installation_problem()
    if problem is not None:
        raise UserError(f'runtime.kernels = "transformer_engine", but {problem}; {INSTALL}')
    if fp8 == "none":
        return
    engine = import_module("transformer_engine.pytorch")
    ask = engine.is_fp8_block_scaling_available if fp8 == "blockwise" else engine.is_fp8_available
    available, reason = ask(return_reason=True)
    if not available:
        found = f"torch is built for CUDA {torch.version.cuda}"
        raise UserError(
            f'precision.fp8 = "{fp8}" cannot run here: {" ".join(reason.split()).rstrip(".")}; {found}; set it to '
            '"none" or another recipe'
        )


def installation_problem() -> str | None:
    """What keeps Transformer Engine from loading beside this torch; ``None`` if nothing does."""
    if "transformer_engine_torch" in sys.modules:
        return None
    spec = find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return "transformer_engine is not installed"
    extension = _torch_extension(Path(spec.origin).parent)
    if extension is None:
        return f"transformer_engine in {Path(spec.origin).parent} has no part for torch"
    version = next((found.version for found in metadata.distributions(name="transformer-engine")), None)
    if version is None:
        return f"transformer_engine in {Path(spec.origin).parent} was copied there, not installed"
    if tuple(map(int, version.split(".")[:2])) != VERSION:
        return f"transformer_engine is {version}, expected {'.'.join(map(str, VERSION))}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    try:
        # The package loads CUDA's libraries and its own core; a torch part that does not fit it skips without a word.
        import_module("transformer_engine.common")
        ctypes.CDLL(str(extension))
    except (OSError, RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        return f"transformer_engine {version} does not load beside torch {torch.__version__} ({said})"
    return None


def _torch_extension(package: Path) -> Path | None:
    """The extension module for torch, where the package's own loader looks for it."""
    folders = (package.parent, package, package / "wheel_lib")
    found = (path for folder in folders for path in sorted(folder.glob("transformer_engine_torch*.so")))
    return next(found, None)
