"""Where a run executes: device, process groups, seeds and logs. The only folder that names a device backend."""

from navil_megatron.runtime.logs import quiet_known_warnings

# Before megatron-core is imported below this package: it warns at import, before anybody could ask it not to.
quiet_known_warnings()
