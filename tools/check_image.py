"""Ends the build of an image in which something is missing: ``python3 tools/check_image.py``, without a GPU.

What ``navil-megatron doctor`` decides by metadata, and the imports that only a build against this torch survives.
Transformer Engine is linked to the driver's library, for which the build shows it the toolkit's stub.
"""

import importlib
import sys

from navil_megatron import doctor

NEEDED = ("cuda", "transformer-engine", "dali")
"""Checks of the doctor that elsewhere may be absent."""
COMPILED = ("transformer_engine.pytorch", "nvidia.dali.fn")


def main() -> int:
    """0 if a GPU node can train with this image; else 1, and what is wrong."""
    checks = [check for check in doctor.diagnose() if check.name != "gpu"]
    print(doctor.as_table(checks))
    broken = [check.name for check in checks if check.is_problem or (check.name in NEEDED and check.status != "ok")]
    apex_is_there = any(check.name == "apex" and check.status == "ok" for check in checks)
    for module in (*COMPILED, *(("fused_weight_gradient_mlp_cuda",) if apex_is_there else ())):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever keeps it from loading is the finding
            print(f"wrong    {module}: {type(error).__name__}: {error}")
            broken.append(module)
    if broken:
        print(f"error: this image cannot train: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
