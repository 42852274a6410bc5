"""Work done ahead of time by background threads, handed out in order.

Pillow and the tokenizers release the interpreter lock while they work, so threads suffice and nothing is pickled.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter


class Prefetch[T]:
    """Iterates over ``make(start), make(start + 1), ...``, each made in a thread before it is asked for."""

    def __init__(
        self, make: Callable[[int], T], start: int, stop: int | None, *, num_threads: int, num_ahead: int
    ) -> None:
        """Starts the first ``num_ahead`` items; ``stop`` ends the sequence, ``None`` never does."""
        self._make, self._next, self._stop = make, start, stop
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="data")
        self._pending: deque[Future[T]] = deque()
        self.wait_seconds = 0.0  # how long the last item kept its consumer waiting
        for _ in range(max(1, num_ahead)):
            self._submit()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        """The next item; an exception of the thread that made it is raised here, and ends the sequence."""
        if not self._pending:
            self.close()
            raise StopIteration
        started = perf_counter()
        future = self._pending.popleft()
        try:
            item = future.result()
        except BaseException:
            self.close()
            raise
        self.wait_seconds = perf_counter() - started
        self._submit()
        return item

    def close(self) -> None:
        """Drops what is not done and lets the threads end."""
        self._pending.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        if self._stop is None or self._next < self._stop:
            self._pending.append(self._threads.submit(self._make, self._next))
            self._next += 1
