"""Conversion against ``cp``: rate and peak memory of both directions, on a random model of NaViL-2B's real shapes.

    python tools/bench/convert.py                   8.1 GB bf16; needs 26 GB of disk
    python tools/bench/convert.py --scale 0.1       a tenth of the layers and of the vocabulary

``cp -r`` of the source and the conversion take turns on the same disk, and the fastest of each are compared: disks of
virtual machines are throttled for seconds at a time. Both are treated alike: the files of the source are dropped from
the page cache before, the target is new, and the clock runs until every file of the target is flushed (fsync). The
converter runs as it does for a user, one process from the start of Python to the end, and reads back and compares what
it wrote. Memory is the sum, over its processes, of the largest resident size that each ever had.

``to_hf`` reads a checkpoint saved at one rank, ``to_hf_tp2_pp2_ep2`` one cut as tensor parallel 2 x pipeline 2 x expert
parallel 2 saves it. The last line is JSON.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools" / "bench"))

import numpy as np
import torch
from navil_2b import NAVIL_2B

from navil_megatron.blueprint.parameters import Parameter, Shape, parameters
from navil_megatron.blueprint.vocabulary import words_of_rank
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.atomic_folder import flush_folder
from navil_megatron.files.checkpoint_folder import write_config
from navil_megatron.hf.checkpoint.writer import Written, finish_checkpoint, save_chunk
from navil_megatron.hf.hf_parameters import hf_parameters

LAYOUTS = {"to_hf": (1, 1, 1), "to_hf_tp2_pp2_ep2": (2, 2, 2)}
"""Name of a measurement -> tensor, pipeline and expert parallel size of the checkpoint that it reads."""
PAPER_GB = {"9B": 33.0, "70B decoder": 2 * 2 * 70.0}
"""Bytes of bf16: the 9B as the issue gives it; a 70B decoder with a text and a visual expert for every weight."""
_POOL = np.random.Generator(np.random.SFC64(7)).integers(0, 256, 64_000_000, dtype=np.uint8)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to measure (a temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers and of the vocabulary (1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of the converter (1)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of cp and of each conversion (2)")
    parser.add_argument("--part-size", default="1GB", help="largest safetensors file (1GB)")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="navil-convert-", dir=options.folder) as folder:
        result = measure(Path(folder), options)
    print(json.dumps(result))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every direction, one after the other; each leaves only what the next one needs."""
    say = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    model = scaled(NAVIL_2B, options.scale)
    num_bytes = sum(parameter.numel for parameter in parameters(model)) * 2
    say(f"{num_bytes / 1e9:.2f} GB bf16, {options.jobs} process(es), files of {options.part_size}")
    result: dict[str, Any] = {"gb": round(num_bytes / 1e9, 3), "jobs": options.jobs, "scale": options.scale}
    source, exported, again = folder / "checkpoint", folder / "exported", folder / "again"
    for name, layout in LAYOUTS.items():
        shutil.rmtree(exported, ignore_errors=True)
        write_checkpoint(source, model, *layout)
        command = ["to-hf", str(source), str(exported), "--max-part-size", options.part_size]
        result[name] = _against_cp(source, exported, command, options, num_bytes)
        say(f"{name}: {_line(result[name])}")
        shutil.rmtree(source)
    command = ["from-hf", str(exported), str(again)]
    result["from_hf"] = _against_cp(exported, again, command, options, num_bytes)
    say(f"from_hf: {_line(result['from_hf'])}")
    for size, gigabytes in PAPER_GB.items():
        minutes = {name: gigabytes / result[name]["gb_per_s"] / 60 for name in ("to_hf", "from_hf")}
        result[f"paper_{size}"] = {"gb": gigabytes} | {f"{name}_minutes": round(m, 1) for name, m in minutes.items()}
        say(f"on paper, {size} ({gigabytes:.0f} GB): {', '.join(f'{n} {m:.1f} min' for n, m in minutes.items())}")
    return result


def scaled(model: ModelConfig, scale: float) -> ModelConfig:
    """The model with a share of its layers and of its vocabulary; widths stay."""
    layers = {part: max(2, round(getattr(model, part).num_layers * scale / 2) * 2) for part in ("language", "vision")}
    vocabulary = max(64, round(model.language.vocab_size * scale) // 2 * 2)
    return replace(
        model,
        language=replace(model.language, num_layers=layers["language"], vocab_size=vocabulary),
        vision=replace(model.vision, num_layers=layers["vision"]),
        special_token_ids=tuple(range(vocabulary - 12, vocabulary)),
    )


def write_checkpoint(folder: Path, model: ModelConfig, tp: int, pp: int, ep: int) -> None:
    """A checkpoint of random bf16 numbers, cut and spread over files as ranks of that layout save it."""
    folder.mkdir()
    ranks = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(tp * pp * ep)]
    written: list[Written] = []
    for rank, parameter, offsets, sizes in chunks(model, tp, pp, ep):
        written.append(
            save_chunk(ranks[rank], parameter.key, parameter.whole_shape, offsets, _random(sizes, len(written)))
        )
    for stream in ranks:
        stream.close()
    finish_checkpoint(folder, written, "__0_1.distcp")
    write_config(folder, {"model": config_to_dict(model), "data": {"tokenizer": None}})
    flush_folder(folder)


def chunks(model: ModelConfig, tp: int, pp: int, ep: int) -> Iterator[tuple[int, Parameter, Shape, Shape]]:
    """Rank, parameter, offsets and sizes of every chunk; ranks count tensor first, then expert, then pipeline."""
    for parameter in (found.parameter for found in hf_parameters(model)):
        in_decoder = parameter.key.startswith("decoder.layers.")
        is_last = parameter.key.startswith(("decoder.final", "output_layer."))
        expert = ep - 1 if ".mlp." in parameter.key and ".visual." in parameter.key else 0
        for layer in range(parameter.num_layers or 1):
            stage = layer * pp // (parameter.num_layers or 1) if in_decoder else (pp - 1) * is_last
            for tensor_rank, offsets, sizes in _slices(parameter, tp):
                if parameter.num_layers is not None:
                    offsets, sizes = (layer, *offsets), (1, *sizes)
                yield (stage * ep + expert) * tp + tensor_rank, parameter, offsets, sizes


def _slices(parameter: Parameter, tp: int) -> Iterator[tuple[int, Shape, Shape]]:
    """Tensor-parallel rank, offsets and sizes of the chunks of one layer."""
    key, shape = parameter.key, parameter.shape
    if parameter.is_vocabulary:
        words = (words_of_rank(shape[0], rank, tp) for rank in range(tp))
        yield from ((rank, (held.start, 0), (len(held), shape[1])) for rank, held in enumerate(words) if held)
        return
    rows_are_cut = False
    if key.startswith("decoder.layers."):
        rows_are_cut = "linear_qkv" in key or "linear_fc1" in key
        if "linear_proj" in key or "linear_fc2" in key:
            width = shape[1] // tp
            yield from ((rank, (0, rank * width), (shape[0], width)) for rank in range(tp))
            return
        if "linear_fc1" in key:
            # Gate and up are cut each by itself, and saved as chunks of their own.
            height = shape[0] // 2 // tp
            for rank in range(tp):
                yield from ((rank, (half * shape[0] // 2 + rank * height, 0), (height, shape[1])) for half in range(2))
            return
    parts = tp if rows_are_cut else 1
    height = shape[0] // parts
    for rank in range(parts):
        yield rank, (rank * height, *(0 for _ in shape[1:])), (height, *shape[1:])


def _random(sizes: Shape, seed: int) -> torch.Tensor:
    """Random bits: conversions move them and compute nothing."""
    count, start = 2 * math.prod(sizes), seed * 4099 % (len(_POOL) // 2)
    return torch.from_numpy(np.resize(_POOL[start:], count)).view(torch.bfloat16).view(sizes)


def _against_cp(
    source: Path, target: Path, command: list[str], options: argparse.Namespace, num_bytes: int
) -> dict[str, Any]:
    """One direction in turns with cp."""
    copies, conversions, peaks, started = [], [], [], []
    for _ in range(options.repeats):
        shutil.rmtree(target, ignore_errors=True)
        copies.append(_copy(source, target.with_name("copied")))
        seconds, peak, inside = _convert(source, target, command, options.jobs)
        conversions.append(seconds)
        peaks.append(peak)
        started.append(seconds - inside)
    return {
        "ratio_vs_cp": round(min(copies) / min(conversions), 3),
        "startup_seconds": round(min(started), 2),
        "peak_rss_gb": round(max(peaks) / 1e9, 3),
        "gb_per_s": round(num_bytes / 1e9 / min(conversions), 3),
        "cp_gb_per_s": round(num_bytes / 1e9 / min(copies), 3),
        "seconds": [round(seconds, 2) for seconds in conversions],
        "cp_seconds": [round(seconds, 2) for seconds in copies],
    }


def _copy(source: Path, target: Path) -> float:
    """Seconds that cp takes, with the flush of what it wrote."""
    _drop_from_cache(source)
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    flush_folder(target)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def _convert(source: Path, target: Path, command: list[str], jobs: int) -> tuple[float, int, float]:
    """Seconds and peak memory of the converter, a process of its own, and the seconds that it converted for."""
    _drop_from_cache(source)
    program = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *command, "--jobs", str(jobs), "--json"]
    started = time.monotonic()
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    largest: dict[int, int] = {}
    watcher = threading.Thread(target=_watch_memory, args=(process, largest))
    watcher.start()
    output, errors = process.communicate()
    watcher.join()
    flush_folder(target)
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"the converter failed: {errors[-2000:]}")
    return seconds, sum(largest.values()), json.loads(output.splitlines()[-1])["seconds"]


def _watch_memory(process: "subprocess.Popen[str]", largest: dict[int, int]) -> None:
    """Keeps the largest resident size that each process under this one ever had."""
    while process.poll() is None:
        for pid in [process.pid, *_descendants(process.pid)]:
            largest[pid] = max(largest.get(pid, 0), _high_water_mark(pid))
        time.sleep(0.02)


def _descendants(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue  # the process has ended
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def _high_water_mark(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _drop_from_cache(folder: Path) -> None:
    """Makes the next reader of these files wait for the disk; needs no rights."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['seconds']} s, {found['gb_per_s']} GB/s; cp {found['cp_seconds']} s, {found['cp_gb_per_s']} GB/s; "
        f"ratio {found['ratio_vs_cp']}, peak memory {found['peak_rss_gb']} GB, {found['startup_seconds']} s to start"
    )


if __name__ == "__main__":
    main()
