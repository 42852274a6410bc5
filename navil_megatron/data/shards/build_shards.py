"""From what people have to shards with an index: lines or rows of captions, documents, conversations, or pure text.

Behind ``navil-megatron data build``. Every chunk of the manifest becomes one shard, so the files depend neither on how
many processes work nor on how often they were interrupted.
"""

import json
import shutil
from dataclasses import astuple
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample, parse_content
from navil_megatron.data.shards.index_build import (
    MAX_TEXT_BYTES,
    TokenCounter,
    check_image,
    index_shard,
)
from navil_megatron.data.shards.manifest import LineRange, Manifest
from navil_megatron.data.shards.manifest_line import Keys, Line
from navil_megatron.data.shards.manifest_pictures import Images, NotAllowedError, Pictures
from navil_megatron.data.shards.pieces import PieceFiles, merge_pieces, owned_index, pieces_folder, run_tasks
from navil_megatron.data.shards.shard_index import SourceIndex
from navil_megatron.data.shards.shard_writer import tar_sample, write_tar
from navil_megatron.files.atomic_file import new_file
from navil_megatron.files.json_file import read_json
from navil_megatron.files.worker_pool import OnProgress, Tell

type Task = tuple[LineRange, Path, PieceFiles]
"""Lines, the shard that they become, and its piece of the index."""


def build_shards(
    manifest: Path,
    output: Path,
    counter: TokenCounter,
    *,
    prefix: str = "shard",
    samples_per_shard: int = 10_000,
    keys: Keys | None = None,
    text_column: str | None = None,
    allow_outside: bool = False,
    fetch: bool = False,
    overwrite: bool = False,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Writes tar shards and the index over them, and reports what it holds and what was left out why.

    What an unfinished run did is not done again. Shards are called ``<prefix>-000000.tar`` and so on, the index
    ``<prefix>.index``. ``counter`` pickles where ``jobs``, the processes, are more than 1.

    A line of ``manifest``, as of ``Manifest``, has a ``caption`` or ``text``, ``texts`` or ``text_list``, or
    ``conversations`` or ``messages``; and it may have an ``image`` (or ``images``), a path or a list of paths, relative
    to the manifest's folder, and in it unless ``allow_outside``; or a URL, if ``fetch`` is given. Image files are
    stored as they are. Lines that are left out are missing from their shard. ``overwrite`` removes what was there.

    Raises:
        UserError: the manifest cannot be read, has a key that is not known or names a file elsewhere, the output holds
            other shards of this name or another process is writing them, or no sample is any good.
    """
    index = output / f"{prefix}.index"
    lines = Manifest(manifest, keys, text_column)
    with owned_index(index):
        if overwrite:
            _remove(index)
        tasks: list[Task] = []
        for chunk in _resume_or_start(index, lines, samples_per_shard, counter.fingerprint):
            files = PieceFiles(pieces_folder(index) / f"{chunk.number:06d}.index")
            tasks.append((chunk, output / f"{prefix}-{chunk.number:06d}.tar", files))
        left = [task for task in tasks if not _is_done(task)]
        inside = None if allow_outside else lines.folder.resolve()
        build = partial(_build_one, manifest=lines, counter=counter, pictures=Pictures(lines.folder, inside, fetch))
        run_tasks(build, left, len(tasks), jobs, on_progress)
        return merge_pieces(index, [files for _, _, files in tasks], counter.fingerprint)


def _resume_or_start(index: Path, manifest: Manifest, samples_per_shard: int, tokenizer: str) -> list[LineRange]:
    """The chunks of a build that was interrupted, or of a new one, where no other build was interrupted or finished."""
    record = pieces_folder(index) / "build.json"
    made_from = [manifest.version, samples_per_shard, tokenizer]
    named = f"{index.with_suffix('')}*"
    if record.exists():
        known = read_json(record, f"remove {named} to start anew")
        if known.get("made_from") != made_from:
            raise UserError(
                f"{index.parent} holds an unfinished build of another manifest, tokenizer or shard size than now: "
                f"give the same to go on, or --overwrite to start anew"
            )
        manifest.unpack(record.parent)
        chunks = manifest.chunks(samples_per_shard)
        if known.get("chunks") != [[*astuple(chunk)] for chunk in chunks]:
            raise UserError(f"{record} is damaged (its chunks are not the manifest's): remove {named} to start anew")
        return chunks
    if index.exists() or _shards_of(index):
        what = f"{index} is finished" if index.exists() else f"{index.parent} already holds {index.stem} shards"
        raise UserError(f"{what}: give --overwrite to make it anew, or choose another --prefix")
    shutil.rmtree(record.parent, ignore_errors=True)  # a finished build may have been killed as it tidied up
    record.parent.mkdir(parents=True)
    manifest.unpack(record.parent)
    chunks = manifest.chunks(samples_per_shard)
    with new_file(record) as file:
        file.write(json.dumps({"made_from": made_from, "chunks": [astuple(chunk) for chunk in chunks]}).encode())
    return chunks


def _remove(index: Path) -> None:
    """Takes away an index, finished or not, and its shards."""
    for path in (index, Path(f"{index}.rejected.jsonl"), *_shards_of(index)):
        path.unlink(missing_ok=True)
    shutil.rmtree(pieces_folder(index), ignore_errors=True)


def _shards_of(index: Path) -> list[Path]:
    """Those that lie there; ``web-val-000000.tar`` is none of ``web``."""
    return [*index.parent.glob(f"{escape(index.stem)}-{'[0-9]' * 6}.tar")]


def _is_done(task: Task) -> bool:
    """The piece is there, and the shard with it unless it would hold nothing."""
    _, path, files = task
    if not files.is_complete():
        return False
    (shard,) = SourceIndex(files.index).shards
    return not shard.num_samples or (path.exists() and path.stat().st_size == shard.num_bytes)


def _build_one(
    _: int, task: Task, tell: Tell, *, manifest: Manifest, counter: TokenCounter, pictures: Pictures
) -> None:
    """Writes one shard and its piece of the index; images are decoded here, once."""
    chunk, path, files = task
    rejected: list[tuple[str, str]] = []
    with write_tar(path) as tar:
        for number, line, images in pictures.of(manifest.read(chunk)):
            try:
                if isinstance(line, RejectedSample):
                    raise line
                tar.write(_read_sample(f"{number:09d}", line, images))
            except NotAllowedError as error:
                raise UserError(f"{manifest.path}, line {number + 1}, names {error}") from None
            except RejectedSample as rejection:
                rejected.append((f"line {number + 1}", str(rejection)))
    entries = index_shard(str(path), counter, decode=False, name=path.name)
    entries.rejected[:0] = rejected
    files.save(entries, str(manifest.path), counter.fingerprint)
    if not len(entries.samples):
        path.unlink()
    tell(1)


def _read_sample(key: str, line: Line, images: Images) -> dict[str, Any]:
    """One line as a sample of a tar, checked; raises ``RejectedSample`` where it cannot be trained on."""
    if len(line.text) > MAX_TEXT_BYTES:
        raise RejectedSample(f"text of more than {MAX_TEXT_BYTES} bytes")
    parse_content(line.text, line.extension == "json", len(line.images))
    files = [read() for read in images]
    for file in files:
        check_image(file, decode=True)
    return tar_sample(key, line.extension, line.text, files)
