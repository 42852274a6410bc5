"""``transformer_engine_torch`` put together: functions, enumerations, versions, and names without meaning."""

from types import ModuleType
from typing import Any, NoReturn

from tests.engine.standin import activations, attention, norms, optimizer, padding, products, quantize, rope
from tests.engine.standin.calls import FUNCTIONS, exported
from tests.engine.standin.enums import ENUMERATIONS

PARTS = (activations, attention, norms, optimizer, padding, products, quantize, rope)


@exported
def get_cudnn_version():
    """9.14."""
    return 91400


@exported
def get_cublasLt_version():
    """13.0: before the grouped products of 13.3, as with CUDA 13.0."""
    return 130000


@exported
def device_supports_multicast(device_id=-1):
    """One GPU of one machine."""
    return False


@exported
def ubuf_built_with_mpi():
    """Not."""
    return False


@exported
def nvte_built_with_cublasmp():
    """Not."""
    return False


@exported
def get_stream_priority_range(device_id=-1):
    """Lowest and highest."""
    return 0, -1


class Unwritten:
    """A function or class that has no stand-in: it may be imported and passed around."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"transformer_engine_torch.{self.name} has no stand-in (tests/engine/standin)")

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


CLASSES = ("CommOverlap", "CommOverlapBase", "CommOverlapCore", "CommOverlapHelper", "CommOverlapP2P", "FP8TensorMeta")
"""Classes of theirs that annotations name."""


def build_module() -> ModuleType:
    """A new module; names that it is asked for and does not have are ``unwritten``, by name."""
    module = ModuleType("transformer_engine_torch", __doc__)
    names: dict[str, Any] = module.__dict__
    names.update(FUNCTIONS)
    names.update(ENUMERATIONS)
    names.update({name: type(name, (), {"__init__": Unwritten(name)}) for name in CLASSES})
    unwritten: dict[str, Unwritten] = {}
    names["unwritten"] = unwritten

    def missing(name: str) -> Unwritten:
        if name.startswith("__"):
            raise AttributeError(name)
        return unwritten.setdefault(name, Unwritten(name))

    names["__getattr__"] = missing
    return module
