"""A web server over a folder that answers ranges, as stores do, and has bad days."""

import http.server
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

type Mood = Callable[[int], str]
"""Number of a request for a range, from 0 -> ``""`` (it is served), ``500``, another status, ``close`` or ``stall``."""


@contextmanager
def served(folder: Path, mood: Mood = lambda _: "") -> Iterator[str]:
    """The server's URL, on this machine."""
    numbers, over = itertools.count(), threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            answer = mood(next(numbers)) if asked else ""
            path = folder / self.path.strip("/")
            if answer == "stall":
                over.wait()
                self.close_connection = True
                return
            if answer.isdigit() or not path.is_file():
                self.send_response(int(answer or 404))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            start, end = 0, len(content)
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), min(end, int(last) + 1 if last else end)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.end_headers()
            if answer == "close":
                end -= (end - start) // 2
                self.close_connection = True
            self.wfile.write(content[start:end])

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *_: object) -> None:
            pass  # clients that gave up

    server = Server(("127.0.0.1", 0), lambda *about: Handler(*about, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
