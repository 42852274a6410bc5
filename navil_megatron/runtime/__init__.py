"""Where a run executes: device, process groups, seeds and logs. The only folder that names a device backend."""

from navil_megatron.runtime.core_import import import_megatron_core

# Before any module below this package does so in core's own way.
import_megatron_core()
