"""The readers on inputs that nobody wrote: one line, or the same bits; never a crash, a hang or a huge allocation.

Headers, indexes, configs and metadata are changed at random, by seed, in a process with little memory and a clock.
"""

import multiprocessing
import random
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.config.errors import UserError
from navil_megatron.files.archive import find_numbers
from navil_megatron.files.checkpoint_metadata import read_metadata
from navil_megatron.files.checksums import CHECKSUMS_FILE
from navil_megatron.files.hashes import digest
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.inspect import describe_contents, inspect
from navil_megatron.hf.memory import raw_bytes
from navil_megatron.hf.model_source import open_source
from navil_megatron.hf.safetensors_io import INDEX_FILE
from tests.unit.hf_examples import tiny_model, write_checkpoint

TRIED, MANY_TRIED = 120, 3000
SECONDS_EACH, MORE_MEMORY = 20, 1_500_000_000
SEED = 20_251_122
NUMBERS = (
    "0",
    "-1",
    "1e999",
    "NaN",
    "9" * 30,
    "4294967296",
    "18446744073709551615",
    "null",
    "[]",
    '"x"',
    "1.5",
    "true",
)
TOKENS = (
    b"..",
    b"/",
    b"\\u0000",
    b'"',
    b"{",
    b"[",
    b"]",
    b",",
    b"\xff",
    b"\x00",
    b"__metadata__",
    b"r\xff\xff\xff\x7f",
)

PLACES = {
    "weights": ("hf", "model-00002-of-00003.safetensors"),
    "index": ("hf", INDEX_FILE),
    "config": ("hf", "config.json"),
    "checksums": ("hf", CHECKSUMS_FILE),
    "metadata": ("checkpoint", ".metadata"),
    "entries": ("checkpoint", "__0_0.distcp"),
    "checkpoint config": ("checkpoint", "navil_config.json"),
}
"""What is changed -> folder and file."""


def mutate(content: bytes, stretches: list[tuple[int, int]], draw: random.Random) -> bytes:
    """The content with a few changes inside the given stretches."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        start, end = draw.choice(stretches)
        if start >= len(changed):
            continue
        place = draw.randrange(start, min(end, len(changed)))
        kind = draw.choices(range(7), weights=(6, 6, 2, 1, 3, 6, 1))[0]
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + 1] = bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))])
        elif kind == 2:
            del changed[place : place + draw.choice((1, 2, 8, 100))]
        elif kind == 3:
            changed[place:place] = changed[start : start + draw.choice((1, 4, 40))]
        elif kind == 4:
            changed[place:place] = draw.choice(TOKENS)
        elif kind == 5:
            number = re.compile(rb"-?\d+(\.\d+)?").search(bytes(changed[place : min(place + 200, end)]))
            if number:
                changed[place + number.start() : place + number.end()] = draw.choice(NUMBERS).encode()
        else:
            del changed[place:]
    return bytes(changed)


def stretches(kind: str, path: Path) -> list[tuple[int, int]]:
    """Where a file holds anything but the numbers of tensors."""
    content = path.read_bytes()
    if kind == "weights":
        return [(0, 8), (8, 8 + int.from_bytes(content[:8], "little"))]
    if kind != "entries":
        return [(0, len(content))]
    found = []
    for tensor in read_metadata(path.parent).weights.values():
        for chunk in tensor.chunks:
            numbers, place = find_numbers(path.parent, chunk, tensor.dtype), chunk.place
            after = numbers.position + numbers.num_bytes
            if place.file == path.name:
                found += [(place.start, numbers.position), (after, place.start + place.length)]
    return found


def read_all(folder: Path) -> dict[str, str]:
    """A hash of every tensor, read as a conversion reads it, with everything that it checks before."""
    source = open_source(folder)
    found = {key: digest(raw_bytes(tensor)) for key in source.signatures for tensor in [source.read(key)[key]]}
    assert describe_contents(inspect(folder))
    return found


def _alarm(number: int, frame: Any) -> None:
    raise TimeoutError("a reader hangs")


def _fuzz(kind: str, root: str, count: int, seed: int, told: Any) -> None:
    """Tries inputs, one after the other; tells what came out, or the first that broke a reader."""
    folder_name, name = PLACES[kind]
    folder = Path(root) / folder_name
    path = folder / name
    original, allowed, expected = path.read_bytes(), stretches(kind, path), read_all(folder)
    status = Path("/proc/self/status").read_text()
    used = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
    signal.signal(signal.SIGALRM, _alarm)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        draw = random.Random(f"{seed} {kind} {number}")
        path.write_bytes(mutate(original, allowed, draw))
        signal.alarm(SECONDS_EACH)
        try:
            outcomes["as before" if _same(read_all(folder), expected, kind) else "DIFFERENT"] += 1
        except UserError as error:
            line = str(error)
            outcomes["refused" if len(line) < 20_000 else "REFUSED WITH A BOOK"] += 1
        except BaseException as error:
            told.put((outcomes, f"input {number}: {type(error).__name__}: {error}"[:2000]))
            return
        finally:
            signal.alarm(0)
        if outcomes["DIFFERENT"] or outcomes["REFUSED WITH A BOOK"]:
            told.put((outcomes, f"input {number}"))
            return
    told.put((outcomes, None))


def _same(found: dict[str, str], expected: dict[str, str], kind: str) -> bool:
    """Equal tensors. A config may say another thing that fits them, such as other heads of the same width."""
    if "config" in kind:
        return True
    return found == expected


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_checkpoint(folder / "checkpoint", tiny_model())
    convert_to_hf(folder / "checkpoint", folder / "hf", max_file_bytes=300_000)
    return folder


def check(kind: str, root: Path, tmp_path: Path, count: int, say: Callable[[str], None]) -> None:
    shutil.copytree(root, tmp_path / "copy")
    if kind not in ("checksums", "weights"):
        # With hashes beside them, changed numbers would be found by them alone.
        (tmp_path / "copy" / "hf" / CHECKSUMS_FILE).unlink()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.test_hf_fuzz"])
    told = context.Queue()
    process = context.Process(target=_fuzz, args=(kind, str(tmp_path / "copy"), count, SEED, told))
    process.start()
    while process.is_alive() and told.empty():
        process.join(0.1)
    assert not told.empty(), f"the reader of {kind} died with exit code {process.exitcode}"
    outcomes, broken = told.get()
    process.join()
    assert broken is None, f"{kind}: {broken}; {dict(outcomes)}"
    assert sum(outcomes.values()) == count
    assert outcomes["refused"] > count // 10
    say(f"{kind}: {count} inputs, {outcomes['refused']} refused in one line, {outcomes['as before']} read as before")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def tell(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return tell


@pytest.mark.parametrize("kind", PLACES)
def test_changed_files(kind: str, root: Path, tmp_path: Path, say: Callable[[str], None]) -> None:
    check(kind, root, tmp_path, TRIED, say)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", PLACES)
def test_many_more_changed_files(kind: str, root: Path, tmp_path: Path, say: Callable[[str], None]) -> None:
    check(kind, root, tmp_path, MANY_TRIED, say)
