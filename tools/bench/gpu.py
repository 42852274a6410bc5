"""How fast the parts of a step are on this machine's GPU; writes benchmarks/results/<device>-<date>.json.

    python tools/bench/gpu.py [NAME ...] [--kernels NAME ...] [--rounds N] [--out FOLDER]

Names are those of ``BENCHMARKS``; without any, all run. What each does and how large it is: ``gpu_layers.py``,
``gpu_steps.py`` and ``gpu_scale.py``. Each result holds the median and the spread of its rounds. MFU
is against the GPU's dense BF16 peak, in FP8 too, so that the figures of one shape compare. The file is written after
each measurement; one that fails leaves its traceback there and stops no other.
"""

import argparse
import dataclasses
import json
import platform
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

import navil_megatron.runtime  # noqa: F401  sets what CUDA reads when it starts, and quiets core's import

# isort: split
import torch
from gpu_layers import decoder_layers, encoder, experts, loss_head
from gpu_scale import CHOICES, ON_GPU, REHEARSAL, Measurements, Scale
from gpu_steps import profile, whole_step

BENCHMARKS: dict[str, Callable[[Scale], Measurements]] = {
    "decoder_layers": decoder_layers,
    "encoder": encoder,
    "loss_head": loss_head,
    "experts": experts,
    "whole_step": whole_step,
    "profile": profile,
}
"""Name -> what gives its measurements at a scale."""

PACKAGES = ("torch", "megatron-core", "transformer-engine", "navil_megatron")


def versions() -> dict[str, str | None]:
    """What the figures depend on."""
    found = {package.name: package.version for package in metadata.distributions()}
    return {
        **{name: found.get(name, found.get(name.replace("-", "_"))) for name in PACKAGES},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--kernels", nargs="+", choices=CHOICES, help="by which of them (default: all)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of each measurement (default: 10)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    # Everything once at tiny size on a CPU, so that it cannot rot where no GPU is.
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; choose of {', '.join(BENCHMARKS)}")
    if not (options.rehearse or torch.cuda.is_available()):
        print("error: torch finds no usable GPU; run `navil-megatron doctor`", file=sys.stderr)
        return 2
    scale = REHEARSAL if options.rehearse else dataclasses.replace(ON_GPU, rounds=options.rounds)
    if options.kernels:
        scale = dataclasses.replace(scale, choices=tuple(options.kernels))
    device, now = "rehearsal" if options.rehearse else torch.cuda.get_device_name(), datetime.now(UTC)
    report: dict[str, Any] = {
        "device": device,
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": versions(),
        "results": {},
        "errors": [],
        "seconds": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = options.out / f"{slug}-{now:%Y-%m-%d}.json"
    for name in options.names or BENCHMARKS:
        started = time.perf_counter()
        report["results"][name] = []
        for measurement in BENCHMARKS[name](scale):
            try:
                result = measurement()
            except Exception:
                said = traceback.format_exc()
                report["errors"].append({"benchmark": name, **measurement.keywords, "traceback": said})
                print(f"{name} {measurement.keywords} failed:\n{said}", file=sys.stderr, flush=True)
            else:
                report["results"][name].append(result)
                print(name, json.dumps(result), flush=True)
            report["seconds"][name] = round(time.perf_counter() - started, 1)
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
