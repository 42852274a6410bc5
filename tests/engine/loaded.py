"""Importing this makes a process one of the rehearsal's: what the server of its ranks does before all else."""

from tests.engine.load import load_engine

load_engine()

from navil_megatron.runtime.mcore_on_cpu import enable_megatron_core_on_cpu  # noqa: E402 # core looks for the engine
from navil_megatron.runtime.platform import DEVICES_OF_KERNELS  # noqa: E402

enable_megatron_core_on_cpu()
DEVICES_OF_KERNELS["transformer_engine"].add("cpu")
