"""Pictures behind URLs: what comes, what is refused, and that nothing lasts for ever or leads inside."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from navil_megatron.data.shards.fetch import TRIES, FetchError, fetch, is_address, is_public


def anywhere(address: str) -> bool:
    """The servers of the tests are on this machine."""
    return True


class Site(http.server.BaseHTTPRequestHandler):
    """Answers by the first word of the path."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        word, _, rest = self.path.strip("/").partition("/")
        if word == "to":
            self.send_response(302)
            self.send_header("Location", rest if rest.startswith("http") else f"/{rest}")
            self.end_headers()
        elif word.isdigit():
            self.send_error(int(word))
        else:
            self.send_response(200)
            self.send_header("Content-Length", "9" if word == "cut" else "5")
            self.end_headers()
            if word == "drip":
                self.server.over.wait()  # type: ignore[attr-defined]
            self.wfile.write(b"bytes")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def site() -> Iterator[tuple[str, list[str]]]:
    """A server's URL, and the paths that it was asked for."""
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Site,), {"asked": asked}))
    server.daemon_threads, server.over = True, threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.over.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()


def test_what_is_there_comes_whole() -> None:
    with site() as (url, asked):
        assert fetch(f"{url}/a.png?x=1", allows=anywhere) == b"bytes"
        assert fetch(f"{url}/to/to/a.png", allows=anywhere, max_bytes=5) == b"bytes"
        assert asked == ["/a.png?x=1", "/to/to/a.png", "/to/a.png", "/a.png"]


@pytest.mark.parametrize(
    ("path", "options", "reason", "times"),
    [
        ("404", {}, "status 404", 1),
        ("503", {}, "status 503", TRIES),
        ("a", {"max_bytes": 4}, "more than 4 bytes", 1),
        ("cut", {}, "the answer ended early", TRIES),
        ("to/" * 7, {}, "more than 5 redirections", 6),
        ("to/https:", {}, "not a URL of http or https", 1),
        ("to/http://[", {}, "not a URL", 1),
    ],
)
def test_what_is_not_there_has_its_reason(path: str, options: dict, reason: str, times: int) -> None:
    with site() as (url, asked):
        with pytest.raises(FetchError, match=f"^{reason}$"):
            fetch(f"{url}/{path}", allows=anywhere, **options)
        assert len(asked) == times


def test_nothing_is_waited_for_for_ever() -> None:
    """Whether the time is over before the question is asked, or before its answer."""
    with site() as (url, asked):
        for seconds in (0.0, 0.2):
            with pytest.raises(FetchError, match="^timed out$"):
                fetch(f"{url}/drip", allows=anywhere, seconds=seconds)
        assert len(asked) <= TRIES


def test_no_address_leads_inside() -> None:
    """Neither at once nor behind a redirection."""
    with site() as (url, asked):
        with pytest.raises(FetchError, match="a private address"):
            fetch(url)
        assert not asked
        elsewhere = url.replace("127.0.0.1", "127.0.0.2")
        with pytest.raises(FetchError, match="a private address"):
            fetch(f"{url}/to/{elsewhere}/a", allows=lambda address: address == "127.0.0.1")
        assert len(asked) == 1
    for address in (
        *(
            "127.0.0.1",
            "10.0.0.1",
            "172.16.5.5",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "::"),
    ):
        assert not is_public(address), address
    for address in ("1.1.1.1", "2606:4700:4700::1111", "64:ff9b::101:101"):
        assert is_public(address), address


def test_what_is_a_url() -> None:
    assert is_address("https://x/a.png") and is_address("HTTP://x")
    assert not any(map(is_address, ("a.png", "file:///etc/passwd", "ftp://x", b"http://", None, 3)))
