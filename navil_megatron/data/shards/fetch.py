"""A picture behind a URL of a manifest, which nobody has to trust: no address inside, no endless answer.

The address that was checked is the one that is connected to, also behind a redirection, so that a name cannot lead
elsewhere the second time it is asked for.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

MAX_FETCHED_BYTES = 2**26
FETCH_SECONDS = 30.0  # for a picture, redirections included
TRIES = 3
_MAX_REDIRECTIONS = 5
_BYTES_AT_ONCE = 2**16
_PASSING_STATUS = {408, 425, 429, *range(500, 600)}


class FetchError(Exception):
    """There is no picture; the message is the reason, short enough to count by."""


class _PassingError(Exception):
    """Another try may help; the message is the reason."""


def is_public(address: str) -> bool:
    """Whether an IP address lies in no private, local or reserved network, also not as a part of it."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if found in ipaddress.ip_network("64:ff9b::/96"):  # a gateway to IPv4
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def is_address(value: Any) -> bool:
    """Whether a manifest names a picture by URL."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def fetch(
    url: str,
    *,
    seconds: float = FETCH_SECONDS,
    max_bytes: int = MAX_FETCHED_BYTES,
    allows: Callable[[str], bool] = is_public,
) -> bytes:
    """The bytes behind a URL; ``allows`` is asked for every IP address. FetchError: there are none."""
    reason = ""
    for _ in range(TRIES):
        try:
            return _follow(url, time.monotonic() + seconds, max_bytes, allows)
        except _PassingError as error:
            reason = str(error)
    raise FetchError(reason)


def _follow(url: str, deadline: float, max_bytes: int, allows: Callable[[str], bool]) -> bytes:
    for _ in range(_MAX_REDIRECTIONS + 1):
        try:
            answer = _ask(url, deadline, max_bytes, allows)
        except ssl.SSLCertVerificationError:
            raise FetchError("certificate is not valid") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise _PassingError("timed out") from None
            if isinstance(error, ValueError):
                raise FetchError("not a URL") from None
            raise _PassingError("no connection") from None
        if isinstance(answer, bytes):
            return answer
        url = answer
    raise FetchError(f"more than {_MAX_REDIRECTIONS} redirections")


def _ask(url: str, deadline: float, max_bytes: int, allows: Callable[[str], bool]) -> bytes | str:
    """The content, or where it is said to be."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("not a URL of http or https")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = connected = _connect(parts.hostname, port, parts.scheme == "https", deadline, allows)
    # a server that sends a byte now and then would outlast the time limits of single reads
    alarm = threading.Timer(_left(deadline), partial(connected.shutdown, socket.SHUT_RDWR))
    alarm.daemon = True
    alarm.start()
    try:
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        connection.request("GET", path, headers={"User-Agent": "navil-megatron", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and (place := answer.headers.get("Location")):
            return urljoin(url, place)
        if answer.status != 200:
            raise (_PassingError if answer.status in _PASSING_STATUS else FetchError)(f"status {answer.status}")
        content = bytearray()
        while block := answer.read1(_BYTES_AT_ONCE):
            content += block
            if len(content) > max_bytes:
                raise FetchError(f"more than {max_bytes} bytes")
        if answer.length:
            _left(deadline)  # or the alarm ended it
            raise _PassingError("the answer ended early")
        return bytes(content)
    finally:
        alarm.cancel()
        connection.close()


def _connect(host: str, port: int, is_secure: bool, deadline: float, allows: Callable[[str], bool]) -> socket.socket:
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(allows(str(place[4][0])) for place in places):
        raise FetchError("a private address")
    family, kind, protocol, _, address = places[0]
    connected = socket.socket(family, kind, protocol)
    try:
        connected.settimeout(_left(deadline))
        connected.connect(address)
        if is_secure:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
    except BaseException:
        connected.close()
        raise
    return connected


def _left(deadline: float) -> float:
    """Seconds that are left; TimeoutError: none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
