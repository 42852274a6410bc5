"""Runs the core of the suite with the lowest and the newest torch, megatron-core and transformers that setup.py admits.

    make test-versions        # or: .venv/bin/python tools/test_versions.py newest --python 3.13

uv makes an environment for each, about 8 GB, in a temporary folder (TMPDIR says where), with the newest of everything
else, whatever pip is configured to; it prints a table in the end. CONTRIBUTING.md holds the last one.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from navil_megatron.doctor import read_requirements

ROOT = Path(__file__).resolve().parent.parent
BOUNDED = ("torch", "megatron-core", "transformers")
CORE = (
    "tests/unit/test_config_load.py",
    "tests/unit/test_config_validate.py",
    "tests/unit/test_data_tokenizer.py",
    "tests/unit/test_data_loader.py",
    "tests/unit/test_hf_config.py",
    "tests/unit/test_hf_portable_tokenizer.py",
    "tests/unit/test_hf_citizen.py",
    "tests/unit/test_hf_generation.py",
    "tests/unit/test_hf_text_peer.py",
    "tests/unit/test_hf_llm_start.py",
    "tests/unit/test_training_flops.py",
    "tests/parity",
    "tests/distributed/test_no_host_reads.py",
    "tests/distributed/test_core_traps.py",
    "tests/distributed/test_checkpoint.py",
    "tests/distributed/test_layouts.py::test_layout_equals_one_rank[tp2-sp]",
    "tests/distributed/test_layouts.py::test_layout_equals_one_rank[pp2-interleaved]",
    "tests/distributed/test_layouts.py::test_layout_equals_one_rank[dp2-distributed-optimizer]",
    "tests/distributed/test_layouts.py::test_layout_equals_one_rank[ep2]",
    "tests/distributed/test_layouts.py::test_layout_equals_one_rank[cp2]",
    "tests/distributed/test_watchdog.py::test_train_command",
    "tests/e2e/test_quickstart.py",
)
"""What leans on these three: config and data, Hugging Face, ranks, checkpoints, golden files, the whole way once."""


def main() -> int:
    """0 if the core of the suite is green in every environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("end", nargs="?", choices=("lowest", "newest"), help="one end of the bounds (default: both)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter, or its version (default: this one)")
    arguments = parser.parse_args()
    rows = []
    for end in [arguments.end] if arguments.end else ["lowest", "newest"]:
        with tempfile.TemporaryDirectory(prefix=f"navil-{end}-") as folder:
            python = make_environment(Path(folder) / "venv", end, arguments.python)
            rows.append([end, *versions_of(python), *run_core(python, Path(folder) / "results.xml")])
    print("| | python | " + " | ".join(BOUNDED) + " | passed | failed | skipped | minutes |")
    print("|" + "---|" * (len(BOUNDED) + 6))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return int(any(row[-3] != "0" or row[-4] == "0" for row in rows))


def make_environment(folder: Path, end: str, python: str) -> str:
    """An environment with this checkout and one end of the bounds; gives its interpreter."""
    uv = str(Path(sysconfig.get_path("scripts")) / "uv")
    wanted = read_requirements()[1]
    lowest = {name: wanted[name].bounds.split(",")[0].replace(">=", "==") for name in BOUNDED}
    asked = [name + lowest[name] for name in BOUNDED] if end == "lowest" else list(BOUNDED)
    subprocess.run([uv, "venv", "--python", python, str(folder)], check=True)
    inside = str(folder / "bin" / "python")
    # As pip does: no compiler's warning is printed in the middle of a test, and the machine's certificates count.
    install = [uv, "pip", "install", "--compile-bytecode", "--system-certs", "--python", inside]
    subprocess.run([*install, "--editable", f"{ROOT}[test]", *asked], check=True)
    return inside


def versions_of(python: str) -> list[str]:
    """Versions of an interpreter and of what setup.py bounds."""
    program = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))"
    )
    printed = subprocess.run([python, "-c", program, *BOUNDED], check=True, capture_output=True, text=True)
    return list(json.loads(printed.stdout))


def run_core(python: str, results: Path) -> list[str]:
    """Runs the core of the suite: how many tests passed, failed and were skipped, and minutes."""
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={results}", *CORE]
    subprocess.run(command, check=False, cwd=ROOT)
    suite = next(ElementTree.parse(results).iter("testsuite")).attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    return [str(passed), str(failed), str(skipped), f"{float(suite['time']) / 60:.1f}"]


if __name__ == "__main__":
    sys.exit(main())
