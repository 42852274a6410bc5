"""Faults on purpose: the tests that kill, damage, fill, freeze and hang, and what became of each, as a table.

    python tools/campaign.py [--kills 10] [--seed 20261127]

Two files of tests at a time. A fault is survived if its test holds what docs/reliability.md says of it; kills count one
by one, of every other kind of fault a test is one. Ends with 1 if a fault was not survived.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]
FAULTS = {
    "tests/e2e/test_kill_9.py": "all ranks killed at drawn moments, while checkpoints and copies are written",
    "tests/e2e/test_two_nodes.py": "a node dies, freezes, is drained, or is lost with its disk",
    "tests/distributed/test_local_copies.py": "copies on nodes lost, damaged, not whole, of another run",
    "tests/distributed/test_async_save.py": "saves beside the training that fail or overlap",
    "tests/distributed/test_damaged_checkpoint.py": "bits of a checkpoint flipped, files cut or missing",
    "tests/distributed/test_no_hang.py": "one rank fails where the others wait",
    "tests/distributed/test_watchdog.py": "ranks that hang",
    "tests/distributed/test_bad_steps.py": "numbers that are not finite, replicas that differ",
    "tests/e2e/test_bad_numbers.py": "the same in whole runs",
    "tests/e2e/test_full_disk.py": "disks that fill up",
    "tests/e2e/test_one_owner.py": "a second start of the same run",
    "tests/unit/test_lock.py": "owners that die, freeze, or meet",
    "tests/unit/test_launch.py": "launchers that die",
    "tests/unit/test_data_source.py": "bits of an index flipped, shards changed or gone",
    "tests/unit/test_data_weather.py": "stores that fail, stall or stay away",
    "tests/unit/test_hf_faults.py": "conversions of damaged or vanishing folders",
    "tests/fuzz": "damaged files of each kind, 1,000 a test",
}
"""Where the tests lie, and what they do."""


def main() -> int:
    """Runs the tests and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="for each of two layouts")
    parser.add_argument("--seed", type=int, default=20_261_127, help="draws the moments of kills")
    options = parser.parse_args()
    drawn = [f"--kills={options.kills}", f"--seed={options.seed}"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="navil-campaign-") as folder:
        results = Path(folder) / "results.xml"
        words = ["-q", "-m", "", "-n", "2", "--dist", "loadfile", "--timeout", "1500", f"--junitxml={results}", *drawn]
        subprocess.run([sys.executable, "-m", "pytest", *words, *FAULTS], cwd=REPOSITORY, check=False)
        counts = count(results)
    print(f"\n{' '.join(drawn)}, {(time.monotonic() - started) / 60:.0f} minutes\n")
    print("| faults | tried | survived | lost | skipped here | command |\n|---|---|---|---|---|---|")
    for place, what in FAULTS.items():
        found = counts[place]
        tried = found["survived"] + found["lost"]
        command = f'`pytest -m "" {place}{" " + " ".join(drawn) if "kill_9" in place else ""}`'
        print(f"| {what} | {tried} | {found['survived']} | {found['lost']} | {found['skipped']} | {command} |")
    return int(any(found["lost"] or not found["survived"] for found in counts.values()))


def count(results: Path) -> dict[str, Counter[str]]:
    """Place of tests -> how many faults were survived, lost or not tried."""
    counts: dict[str, Counter[str]] = {place: Counter() for place in FAULTS}
    for case in ElementTree.parse(results).iter("testcase"):
        module = case.attrib["classname"].replace(".", "/")
        place = next(place for place in FAULTS if f"{module}.py".startswith(place))
        outcomes = {"failure": "lost", "error": "lost", "skipped": "skipped"}
        outcome = next((outcomes[part.tag] for part in case if part.tag in outcomes), "survived")
        faults = [part.attrib["value"] for part in case.iter("property") if part.attrib["name"] == "faults"]
        counts[place][outcome] += int(faults[0]) if faults else 1
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
