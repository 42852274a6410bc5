"""Where shards lie: local paths, or any URL that ``fsspec`` opens."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from fsspec.spec import AbstractFileSystem
from fsspec.utils import get_protocol

from navil_megatron.config.errors import NetworkError, UserError
from navil_megatron.data.shards.remote_file import USUAL, RemoteFile, RemoteStream, ask


def is_url(shard: str) -> bool:
    """Opened by ``fsspec``; all else is a path of this machine."""
    return "://" in shard or "::" in shard


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """The shards behind paths, URLs and glob patterns: patterns in order, the files of each sorted by name.

    Raises:
        UserError: a pattern matches nothing, or two match the same shard.
    """
    shards: dict[str, None] = {}
    for pattern in patterns:
        found = _find(pattern)
        if not found:
            raise UserError(f"no shard matches {pattern!r}: check the path, or build shards first")
        for shard in found:
            if shard in shards:
                raise UserError(f"shard {shard} is matched twice: make the patterns disjoint")
            shards[shard] = None
    return list(shards)


def _find(pattern: str) -> list[str]:
    for url in pattern.split("::"):
        about = known_implementations.get(get_protocol(url), {})
        package = about["class"].partition(".")[0] if about else "fsspec"
        if package == "fsspec" and get_protocol(url) in ("http", "https"):
            package = "aiohttp"
        if find_spec(package) is None:
            raise UserError(f"shards {pattern!r} cannot be opened: {about['err']}")
    try:
        files, path = url_to_fs(pattern)
        found = [path] if _is_file(pattern, files, path) else _list(pattern, files, path)
    except UserError:
        raise
    except Exception as error:  # every remote file system raises types of its own, also where it lacks credentials
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"shards {pattern!r} cannot be listed ({reason}): check the URL and your rights") from None
    if isinstance(files, LocalFileSystem):
        return found
    _, chain, outer = pattern.partition("::")
    return [f"{files.unstrip_protocol(path)}{chain}{outer}" for path in found]


def _is_file(pattern: str, files: AbstractFileSystem, path: str) -> bool:
    try:
        return bool(ask(pattern, USUAL, files, "info", path)["type"] == "file")
    except FileNotFoundError:
        return False


def _list(pattern: str, files: AbstractFileSystem, path: str) -> list[str]:
    """What a glob pattern matches; fsspec would leave out, without a word, a folder that cannot be listed."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    # Not with "**", which some list in one request that takes no such option and raises by itself.
    is_walked = isinstance(files, AsyncFileSystem) and ("*" in path or "[" in path) and "**" not in path
    options = {"on_error": fail} if is_walked else {}
    return sorted(ask(pattern, USUAL, files, "glob", path, **options))


def stored_path(shard: str, folder: Path) -> str:
    """How an index in a folder names a shard: below the folder relative to it, so that both can be moved."""
    folder = Path(os.path.abspath(folder))
    return shard if is_url(shard) or not Path(shard).is_relative_to(folder) else str(Path(shard).relative_to(folder))


def resolve_path(stored: str, folder: Path) -> str:
    """The path or URL behind a name in an index."""
    return stored if is_url(stored) else str(folder / stored)


@contextmanager
def reaching(
    shard: str,
    missing: str = "check the path",
    unreadable: str = "check the path and its rights",
    errors: type[Exception] = OSError,
) -> Iterator[None]:
    """Around access to a shard: a UserError where it fails, a NetworkError where the network does; ``missing`` and
    ``unreadable`` say what to do.
    """
    try:
        yield
    except NetworkError:
        raise
    except FileNotFoundError:
        raise UserError(f"shard {shard} is missing: {missing}") from None
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"shard {shard} cannot be read ({reason}): {unreadable}") from error


def version_of(shard: str) -> str:
    """A name for the bytes that a shard holds now, from its size and its time or tag; errors as of ``reaching``."""
    with reaching(shard):
        if not is_url(shard):
            status = os.stat(shard)
            return f"{status.st_size} {status.st_mtime_ns}"
        about = RemoteFile(shard).info
    tags = ("ETag", "etag", "Content-MD5", "mtime", "LastModified", "Last-Modified", "created")
    return " ".join(str(about.get(name, "")) for name in ("size", *tags))


@contextmanager
def open_file(shard: str) -> Iterator[IO[bytes]]:
    """A shard, opened for reading from front to back; errors as of ``reaching``."""
    with reaching(shard):
        if not is_url(shard):
            with open(shard, "rb") as file:
                yield file
            return
        with RemoteStream(RemoteFile(shard)) as file:
            yield file
