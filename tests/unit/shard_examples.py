"""Pictures, tars and a tokenizer for the tests of shards and their index."""

import io
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from navil_megatron.data.shards.index_build import TokenCounter
from navil_megatron.data.shards.index_shards import index_shards
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer
from navil_megatron.data.types import RawSample


def picture(height: int, width: int, seed: int = 0, kind: str = "PNG", **options: object) -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def small_tokenizer(folder: Path) -> SampleTokenizer:
    """A tokenizer that knows bytes and few words."""
    return build_tokenizer(["one two three red green apple"] * 4, folder, vocab_size=300)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **options: object) -> Path:
    """A tar of plain files."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def index_tar(path: Path, counter: TokenCounter, **options: object) -> tuple[Source, dict[str, int], list[RawSample]]:
    """The source over one tar, its rejected samples by reason, and all it reads."""
    index = path.with_suffix(".index")
    report = index_shards([str(path)], index, counter, **options)
    source = Source(index)
    return source, report["rejected_reasons"], [source.read(number) for number in range(len(source))]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def exit_code(work: Callable[..., object], *arguments: object, **options: object) -> int | None:
    """How a process of its own ends that does this work; minus the signal that killed it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["navil_megatron.data.shards.pieces"])
    process = context.Process(target=work, args=arguments, kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


@dataclass(frozen=True)
class DieAt:
    """Kills the process when so many shards are done."""

    wanted: int

    def __call__(self, done: int, total: int) -> None:
        if done == self.wanted:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DeadlyCounter:
    """Kills the process that asks it for tokens."""

    fingerprint: str

    def count(self, *_: object) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
