"""From what people have to shards with an index: JSON lines over image files, conversations, or pure text.

Behind ``navil-megatron data build``. Every chunk of the manifest becomes one shard, so the files depend neither on how
many processes work nor on how often they were interrupted.
"""

import json
import shutil
import stat
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample, parse_content
from navil_megatron.data.shards.index_build import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    TokenCounter,
    check_image,
    index_shard,
)
from navil_megatron.data.shards.manifest import Chunk, Manifest
from navil_megatron.data.shards.pieces import PieceFiles, merge_pieces, owned_index, pieces_folder, run_tasks
from navil_megatron.data.shards.shard_index import SourceIndex
from navil_megatron.data.shards.shard_writer import tar_sample, write_tar
from navil_megatron.files.atomic_file import new_file
from navil_megatron.files.json_file import read_json
from navil_megatron.files.worker_pool import OnProgress, Tell

type Task = tuple[Chunk, Path, PieceFiles]
"""Lines, the shard that they become, and its piece of the index."""


def build_shards(
    manifest: Path,
    output: Path,
    counter: TokenCounter,
    *,
    prefix: str = "shard",
    samples_per_shard: int = 10_000,
    text_column: str = "text",
    allow_outside: bool = False,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Writes tar shards and the index over them, and reports what it holds and what was left out why.

    What an unfinished run did is not done again. Shards are called ``<prefix>-000000.tar`` and so on, the index
    ``<prefix>.index``. ``counter`` pickles where ``jobs``, the processes, are more than 1.

    A line of ``manifest``, JSON lines or parquet of texts alone, has a ``caption`` or ``text``, or ``conversations`` or
    ``messages``; and it may have an ``image`` (or ``images``), a path or a list of paths, relative to the manifest's
    folder, and in it unless ``allow_outside``. Image files are stored as they are. Lines that are left out are missing
    from their shard.

    Raises:
        UserError: the manifest cannot be read or names a file elsewhere, the output holds other shards of this name or
            another process is writing them, or no sample is any good.
    """
    index = output / f"{prefix}.index"
    lines = Manifest(manifest, text_column)
    with owned_index(index):
        tasks: list[Task] = []
        for chunk in _resume_or_start(index, lines, samples_per_shard, counter.fingerprint):
            files = PieceFiles(pieces_folder(index) / f"{chunk.number:06d}.index")
            tasks.append((chunk, output / f"{prefix}-{chunk.number:06d}.tar", files))
        left = [task for task in tasks if not _is_done(task)]
        build = partial(_build_one, manifest=lines, counter=counter, allow_outside=allow_outside)
        run_tasks(build, left, len(tasks), jobs, on_progress)
        return merge_pieces(index, [files for _, _, files in tasks], counter.fingerprint)


def _resume_or_start(index: Path, manifest: Manifest, samples_per_shard: int, tokenizer: str) -> list[Chunk]:
    """The chunks of a build that was interrupted, or of a new one, where no other build was interrupted or finished."""
    record = pieces_folder(index) / "build.json"
    made_from = [manifest.version, samples_per_shard, tokenizer]
    named = f"{index.with_suffix('')}*"
    if record.exists():
        known = read_json(record, f"remove {named} to start anew")
        if known.get("made_from") != made_from:
            raise UserError(
                f"{index.parent} holds an unfinished build of another manifest, tokenizer or shard size than now: "
                f"give the same to go on, or remove {named} to start anew"
            )
        chunks = manifest.chunks(samples_per_shard)
        if known.get("chunks") != [[*astuple(chunk)] for chunk in chunks]:
            raise UserError(f"{record} is damaged (its chunks are not the manifest's): remove {named} to start anew")
        return chunks
    if index.exists() or any(index.parent.glob(f"{index.stem}-*.tar")):
        raise UserError(f"{index.parent} already holds {index.stem} shards: remove {named}, or choose another prefix")
    shutil.rmtree(record.parent, ignore_errors=True)  # a finished build may have been killed as it tidied up
    chunks = manifest.chunks(samples_per_shard)
    record.parent.mkdir(parents=True)
    with new_file(record) as file:
        file.write(json.dumps({"made_from": made_from, "chunks": [astuple(chunk) for chunk in chunks]}).encode())
    return chunks


def _is_done(task: Task) -> bool:
    """The piece is there, and the shard with it unless it would hold nothing."""
    _, path, files = task
    if not files.is_complete():
        return False
    (shard,) = SourceIndex(files.index).shards
    return not shard.num_samples or (path.exists() and path.stat().st_size == shard.num_bytes)


def _build_one(
    _: int, task: Task, tell: Tell, *, manifest: Manifest, counter: TokenCounter, allow_outside: bool
) -> None:
    """Writes one shard and its piece of the index; images are decoded here, once."""
    chunk, path, files = task
    folder = manifest.path.parent
    inside = None if allow_outside else folder.resolve()
    rejected: list[tuple[str, str]] = []
    with write_tar(path) as tar:
        for number, line in manifest.read(chunk):
            try:
                if isinstance(line, RejectedSample):
                    raise line
                tar.write(_read_line(f"{number:09d}", line, folder, inside))
            except _OutsideError as error:
                raise UserError(
                    f"{manifest.path}, line {number + 1}, names {error}, which is not in the manifest's folder: if you "
                    "trust the manifest with all that you can read, give --allow-outside"
                ) from None
            except RejectedSample as rejection:
                rejected.append((f"line {number + 1}", str(rejection)))
    entries = index_shard(str(path), counter, decode=False, name=path.name)
    entries.rejected[:0] = rejected
    files.save(entries, str(manifest.path), counter.fingerprint)
    if not len(entries.samples):
        path.unlink()
    tell(1)


class _OutsideError(Exception):
    """A file that does not lie where it may; its name."""


def _read_line(key: str, fields: dict[str, Any], folder: Path, inside: Path | None) -> dict[str, Any]:
    """One line as a sample of a tar, checked; raises ``RejectedSample`` where it cannot be trained on."""
    named = fields.get("image", fields.get("images"))
    paths = [] if named is None else named if isinstance(named, list) else [named]
    extension, text = _text_member(fields)
    if len(text) > MAX_TEXT_BYTES:
        raise RejectedSample(f"text of more than {MAX_TEXT_BYTES} bytes")
    parse_content(text, extension == "json", len(paths))
    images = [_read_image(folder, path, inside) for path in paths]
    for image in images:
        check_image(image, decode=True)
    return tar_sample(key, extension, text, images)


def _text_member(fields: dict[str, Any]) -> tuple[str, bytes]:
    try:
        for name in ("conversations", "messages"):
            if name in fields:
                return "json", json.dumps({name: fields[name]}, ensure_ascii=False, separators=(",", ":")).encode()
        text = fields.get("caption", fields.get("text"))
        if not isinstance(text, str):
            raise RejectedSample("line without a caption")
        return "txt", text.encode()
    except UnicodeEncodeError:
        raise RejectedSample("text is not Unicode") from None


def _read_image(folder: Path, name: Any, inside: Path | None) -> bytes:
    """The bytes of an image file; what is no file, too large, or not ``inside`` (links followed) stays closed."""
    try:
        path = folder / name
        if inside is not None and not path.resolve().is_relative_to(inside):
            raise _OutsideError(path)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RejectedSample("image file cannot be read")
        if status.st_size > MAX_IMAGE_BYTES:
            raise RejectedSample(f"image of more than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, TypeError, ValueError, RuntimeError):  # the last: links in a circle, until Python 3.13
        raise RejectedSample("image file cannot be read") from None
