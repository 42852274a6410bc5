"""Files behind a URL, by ``fsspec``: what the network spoils is asked for again, and no answer is waited for for ever.

The file systems differ in both: fsspec's http never tries again and waits for five minutes, s3fs and gcsfs try some
errors again, each in its own way. So whatever they do, one rule stands above them.
"""

import logging
import random
import time
from functools import partial
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from navil_megatron.config.data import RemoteConfig
from navil_megatron.config.errors import NetworkError

logger = logging.getLogger(__name__)

USUAL = RemoteConfig()
"""Where no config says more."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_BLOCK_BYTES = 1 << 24
_PASSING_STATUS = (408, 425, 429)  # of the answers that blame the question, those that a later one may not get
_LASTING = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError),
)
_LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError")  # botocore's


def ask(url: str, remote: RemoteConfig, files: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of a file system gives, tried as often and as long as ``remote`` says.

    Raises:
        NetworkError: It failed every time.
        Exception: What the file system raises where another try would give the same, such as FileNotFoundError.
    """
    call = partial(getattr(files, method), *arguments, **options)
    if isinstance(files, AsyncFileSystem):
        coroutine = partial(getattr(files, f"_{method}"), *arguments, **options)
        call = partial(sync, files.loop, coroutine, timeout=remote.timeout_seconds)
    for number in range(1, remote.tries + 1):
        try:
            return call()
        except Exception as raised:  # every file system raises types of its own
            error = _behind(raised)
            if not _may_pass(error):
                raise
            silence = f"nothing came within {remote.timeout_seconds:g} s"
            reason = " ".join(str(error).split()) or (silence if isinstance(error, TimeoutError) else repr(error))
            if number == remote.tries:
                raise NetworkError(
                    f"{url} gave no good answer, tried {number} times ({reason}): run the same again when the network "
                    "is well; a run goes on from its newest checkpoint"
                ) from error
            pause = min(_FIRST_PAUSE_SECONDS * 2 ** (number - 1), _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.5)
            logger.warning("%s: %s; try %d of %d in %.1f s", url, reason, number + 1, remote.tries, pause)
            time.sleep(pause)
    raise AssertionError("there is at least one try")


def _behind(error: BaseException) -> BaseException:
    """What went wrong: fsspec's http says that a file is missing whenever it could not ask for its size."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _may_pass(error: BaseException) -> bool:
    """Whether a later try may succeed: everything but what says that the question is wrong."""
    if isinstance(error, _LASTING) or type(error).__name__ in _LASTING_NAMES:
        return False
    status = _status(error)
    return not 400 <= status < 500 or status in _PASSING_STATUS


def _status(error: Any) -> int:
    """The status of http behind an error of aiohttp, gcsfs or botocore; 0: none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    found = str(error.status if hasattr(error, "status") else getattr(error, "code", ""))
    return int(found) if found.isdigit() else 0


class RemoteFile:
    """A file that is read by ranges; nothing stays open. Errors as of ``ask``."""

    def __init__(self, url: str, remote: RemoteConfig = USUAL) -> None:
        self.url, self._remote = url, remote
        self.files, self.path = url_to_fs(url)
        self.info: dict[str, Any] = ask(url, remote, self.files, "info", self.path)
        self.num_bytes = int(self.info["size"])

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``; fewer where the file is shorter."""
        return bytes(ask(self.url, self._remote, self.files, "cat_file", self.path, start=start, end=end))


class RemoteStream(AbstractBufferedFile):
    """A remote file from front to back, with short ways back: headers are read one ahead of the files before them."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        blocks = {"cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
        super().__init__(file.files, file.path, block_size=_BLOCK_BYTES, size=file.num_bytes, **blocks)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._file.read(start, end)
