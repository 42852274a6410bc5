"""Where a run executes: device, process groups, seeds and logs. The only folder that names a device backend."""

import os

from navil_megatron.runtime.logs import quiet_known_warnings

# Before megatron-core is imported below this package: it warns at import, before anybody could ask it not to.
quiet_known_warnings()
# Kernels and collectives of one layer then start in the order in which they were enqueued (megatron-core asks for it
# under tensor parallelism). CUDA reads it when it starts, which an import may make it do: so before torch's.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
