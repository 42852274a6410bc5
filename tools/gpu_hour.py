"""All that needs a GPU, in the order of what teaches most: where one is at hand, this is the first thing to run.

    python tools/gpu_hour.py [PART ...] [--minutes N] [--out FOLDER]

Parts are those of ``all_parts``; without any, all run. Each is a process of its own with its own time limit; a
failure, a crash or a hang stops no other. ``benchmarks/results/<device>-<time>`` gets a folder for each part, with
what it printed as it was printed, and after each part ``summary.json`` and ``summary.md`` anew: a machine that
vanishes leaves what was done by then.
"""

import argparse
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from navil_megatron import doctor
from navil_megatron.files.json_file import write_json

REPOSITORY = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 8.0
"""Between asking a part to stop, asking it for its stacks, and killing it."""
LEAST_SECONDS = 20.0
"""With less time left no part is started."""
NO_TESTS = 5
"""Pytest's exit code where it selects none."""
TAIL_LINES = 60
"""Of what a part that failed printed last, in the summary."""
ASK_TORCH = """
import json, torch
devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
print(json.dumps({"devices": devices, "versions": versions}))
"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of the hour."""

    name: str
    what: str
    """What it shows, on a line."""
    limit: float
    """Seconds after which it is stopped."""
    command: tuple[str, ...]
    """Words behind the interpreter; ``{folder}`` is where this part's results go."""
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run."""
    gpus: int = 1
    """The fewest that it needs."""


def all_parts() -> list[Part]:
    """The hour, in its order."""
    engine = ("transformer_engine",)
    parts = [
        tests(
            "device",
            "uploads, our own kernels, torch's attention",
            180,
            "platform",
            "triton_kernels",
            "flash_attention",
            "apex_kernels",
        ),
        tests("kernels", "Transformer Engine against torch", 360, "kernels", "products", "no_rows", needs=engine),
        tests("layouts", "two GPUs over NCCL equal one", 360, "nccl_layouts", gpus=2),
        tests("layouts-engine", "the same with Transformer Engine", 360, "layouts", needs=engine, gpus=2),
        tests("fp8", "FP8 by every recipe beside BF16", 420, "recipes", "recompute", needs=engine),
        tests("decode", "DALI's pixels and images a second", 150, "image_decode", needs=("nvidia.dali",)),
        tests("step", "a step waits for nothing and takes what is planned", 240, "no_syncs", "planner_memory"),
    ]
    named = {word for part in parts for word in part.command}
    for name, folder, needs in (("others", "gpu", ()), ("others-engine", "engine", engine)):
        paths = [Path(path) for path in test_files("*") if path not in named]
        stems = [path.stem.removeprefix("test_") for path in paths if path.parent.name == folder]
        if stems:
            parts.append(tests(name, "what no part above names", 300, *stems, needs=needs))
    kernels = "engine engine-tensorwise engine-delayed engine-blockwise"
    return [
        *parts,
        benchmark("step-torch", "whole steps on JPEGs, where their time goes", 240, "whole_step profile", "torch"),
        benchmark("step-engine", "the same", 300, "whole_step profile", "engine engine-tensorwise", needs=engine),
        benchmark("layers-torch", "each layer alone", 300, "decoder_layers encoder loss_head experts", "torch"),
        benchmark("layers-engine", "the same by recipe", 480, "decoder_layers encoder experts", kernels, needs=engine),
    ]


def test_files(*names: str) -> list[str]:
    """Files of tests for a GPU, by the ends of their names."""
    folders = ("tests/gpu", "tests/engine")
    found = [path for name in names for folder in folders for path in REPOSITORY.glob(f"{folder}/test_{name}.py")]
    return sorted(path.relative_to(REPOSITORY).as_posix() for path in found)


def tests(name: str, what: str, limit: float, *names: str, needs: tuple[str, ...] = (), gpus: int = 1) -> Part:
    """The tests marked ``gpu`` of some files."""
    # The runtime first, as in a run; a line a test as it ends; in the end what the good ones printed too.
    words = ("-m", "pytest", "-p", "navil_megatron.runtime", "-v", "-raP", "--color=no", "-m", "gpu")
    return Part(
        name=name, what=what, limit=limit, command=(*words, *test_files(*names)), needs=("pytest", *needs), gpus=gpus
    )


def benchmark(name: str, what: str, limit: float, names: str, kernels: str, needs: tuple[str, ...] = ()) -> Part:
    """Benchmarks of ``tools/bench/gpu.py`` with some kernels."""
    words = ("tools/bench/gpu.py", *names.split(), "--kernels", *kernels.split(), "--out", "{folder}")
    return Part(name=name, what=what, limit=limit, command=words, needs=needs)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing that ran failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.name: part for part in all_parts()}
    parser.add_argument("names", nargs="*", metavar="PART", help=f"of {', '.join(parts)}")
    parser.add_argument("--minutes", type=float, default=30, help="for all of it (default: 30)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    # Everything at tiny size on a CPU, where tests skip, so that it cannot rot where no GPU is.
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(parts))
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; choose of {', '.join(parts)}")
    machine = look_at_machine()
    if not (options.rehearse or machine["devices"]):
        print("error: torch finds no usable GPU; run `navil-megatron doctor`", file=sys.stderr)
        return 2
    now = datetime.now(UTC)
    device = "rehearsal" if options.rehearse else machine["devices"][0]
    folder = options.out / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{now:%Y-%m-%d-%H%M%S}"
    about = {
        "device": device,
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "minutes": options.minutes,
        **machine,
    }
    chosen = [parts[name] for name in options.names or parts]
    # Handled here, so that the parts start with their defaults, also where a shell in the background ignores Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    results = run_parts(chosen, folder, about, time.monotonic() + 60 * options.minutes, options.rehearse)
    return 1 if any(result["status"] in ("failed", "stopped", "interrupted") for result in results) else 0


def look_at_machine() -> dict[str, Any]:
    """GPUs and versions. Torch is asked in a process of its own: this one opens no device."""
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"error: torch does not load:\n{asked.stderr}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    machine = json.loads(asked.stdout)
    found = {check.name: check.found if check.status == "ok" else check.status for check in doctor.diagnose()}
    return {**machine, "versions": {**found, **machine["versions"]}, "commit": commit or None}


def run_parts(
    parts: Sequence[Part], folder: Path, about: Mapping[str, Any], deadline: float, rehearse: bool = False
) -> list[dict[str, Any]]:
    """Runs some parts in turn, until ``deadline`` on the monotonic clock, and writes the summary after each."""
    results: list[dict[str, Any]] = []
    for part in parts:
        (folder / part.name).mkdir(parents=True)
        missing = [module for module in part.needs if not is_installed(module)]
        left = deadline - time.monotonic()
        result: dict[str, Any] = {"part": part.name, "what": part.what, "seconds": 0.0}
        if missing:
            result |= {"status": "not installed", "why": ", ".join(missing)}
        elif part.gpus > max(len(about["devices"]), rehearse):
            result |= {"status": "skipped", "why": f"needs {part.gpus} GPUs, here {len(about['devices'])}"}
        elif left < min(LEAST_SECONDS, part.limit):
            result |= {"status": "skipped", "why": f"the {about['minutes']:g} minutes were used up"}
        else:
            print(f"{part.name}: {part.what}; prints to {folder / part.name / 'output.txt'}", flush=True)
            result |= run_part(part, folder / part.name, min(part.limit, left), rehearse)
        results.append(result)
        print(f"{part.name}: {result['status']} ({result['why']}), {result['seconds']:.0f} s", flush=True)
        write_summary(folder, about, results)
        if result["status"] == "interrupted":
            break
    print(folder / "summary.md")
    return results


def is_installed(module: str) -> bool:
    """Whether a module is on the path, the packages around it first."""
    return all(find_spec(name) is not None for name in accumulate(module.split("."), "{}.{}".format))


def run_part(part: Part, folder: Path, limit: float, rehearse: bool) -> dict[str, Any]:
    """Runs one part to its end, or to its limit, and reads what it printed."""
    words = [word.replace("{folder}", str(folder)) for word in part.command]
    if rehearse and "tools/bench/gpu.py" in words:
        words.append("--rehearse")
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    around = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    started = time.monotonic()
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=os.environ | around | ({} if rehearse else {"NAVIL_REQUIRE_CUDA": "1"}),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            status, why = ("passed", "") if code == 0 else ("failed", f"exit code {code}")
            if code == NO_TESTS and "pytest" in part.needs:
                status, why = "skipped", "no test there is for a GPU"
        except subprocess.TimeoutExpired:
            status, why = "stopped", f"at its limit of {limit:.0f} s"
        except KeyboardInterrupt:
            status, why = "interrupted", "as asked"
        finally:
            stop(process)
    found = read_output(output.read_text("utf-8", errors="replace"))
    counts = found["tests"]
    if counts:
        why = "; ".join([*filter(None, [why]), *(f"{number} {word}" for word, number in counts.items())])
    if status == "passed" and counts.keys() == {"skipped"}:
        status = "skipped"
    return {
        "status": status,
        "why": why or f"{len(found['measurements'])} measurements",
        "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": round(limit, 1),
        "command": shlex.join([Path(sys.executable).name, *words]),
        **{name: value for name, value in found.items() if value and (name != "tail" or status != "passed")},
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a part with all that it started: by Ctrl-C, on which pytest tells what failed; by the signal on which Python
    tells where it hangs; by force.
    """
    for number in (signal.SIGINT, signal.SIGABRT):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_output(text: str) -> dict[str, Any]:
    """What pytest and the benchmarks said: how tests ended, what they printed, measurements, and the last lines."""
    ended = re.findall(r"^(\S+\.py::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    printed = re.findall(r"^-+ Captured stdout call -+\n(.*?)(?=^[-_=]{3})", text, re.MULTILINE | re.DOTALL)
    measured = re.findall(r"^(\w+) (\{.*\})$", text, re.MULTILINE)
    return {
        "tests": dict(Counter(outcome.lower() for _, outcome in ended)),
        "failed": [name for name, outcome in ended if outcome in ("FAILED", "ERROR")],
        "skipped": re.findall(r"^SKIPPED \[\d+\] (.*)$", text, re.MULTILINE),
        "printed": [line for lines in printed for line in lines.splitlines()],
        "measurements": [{"benchmark": name, **json.loads(found)} for name, found in measured],
        "tail": text.splitlines()[-TAIL_LINES:],
    }


def write_summary(folder: Path, about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """All that is known so far, for programs and for people; each file is whole at any time."""
    lines = [f"# {about['device']}, {about['date']}", "", f"`{about['command']}` at {about['commit']}", ""]
    lines += [f"{name} {version}" for name, version in about["versions"].items()]
    lines += ["", "| part | shows | result | seconds |", "|---|---|---|---|"]
    for result in results:
        lines.append(
            f"| {result['part']} | {result['what']} | {result['status']}: {result['why']} | {result['seconds']} |"
        )
    for result in results:
        lines += ["", f"## {result['part']}", "", f"`{result['command']}`", ""] if "command" in result else []
        lines += [f"- {line}" for name in ("failed", "skipped", "printed") for line in result.get(name, [])]
        lines += [f"- `{json.dumps(measured)}`" for measured in result.get("measurements", [])]
        lines += ["", "```", *result["tail"], "```"] if "tail" in result else []
    write_json(folder / "summary.json.partial", {**about, "parts": list(results)})
    (folder / "summary.md.partial").write_text("\n".join(lines) + "\n", "utf-8")
    for name in ("summary.json", "summary.md"):
        (folder / f"{name}.partial").replace(folder / name)


if __name__ == "__main__":
    sys.exit(main())
