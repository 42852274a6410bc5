"""Importing this loads the engine, before anything looks for it: what the server of its ranks imports first."""

from navil_megatron.runtime.platform import DEVICES_OF_KERNELS
from tests.engine.load import load_engine

load_engine()
DEVICES_OF_KERNELS["transformer_engine"].add("cpu")
