"""Writes files in a background thread while the next ones are made."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec

Facts = ParamSpec("Facts")


class WriteBehind(Generic[Facts]):
    """Used as a block (`with`): does in the background, one after the other, what it is given; at its end all is done.

    An error in the background is raised by the next call or at the end of the block, and what was given after it is
    dropped. When the block itself raises an error, what was given before is still done.

    Args:
        write: the function to call with the arguments of each `put`, such as one that writes a file.
        at_most: how many may wait. With more, `put` waits for the first of them, so that memory stays bounded.
    """

    def __init__(self, write: Callable[Facts, object], *, at_most: int) -> None:
        self.write, self.at_most = write, at_most
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._waiting: deque[Future[object]] = deque()

    def __enter__(self) -> "WriteBehind[Facts]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(self, *args: Facts.args, **kwargs: Facts.kwargs) -> int:
        """Takes the arguments of one call; returns how many calls were finished since the last `put`."""
        self._waiting.append(self._pool.submit(self.write, *args, **kwargs))
        return self._collect(self.at_most)

    def finish(self) -> int:
        """Waits until all calls are finished; returns how many were since the last `put`."""
        return self._collect(0)

    def _collect(self, num_left: int) -> int:
        """Takes off finished calls and waits until at most `num_left` are left; raises the error of one that failed."""
        done = 0
        while self._waiting and (len(self._waiting) > num_left or self._waiting[0].done()):
            try:
                self._waiting.popleft().result()
            except BaseException:
                for dropped in self._waiting:
                    dropped.cancel()
                self._waiting.clear()
                raise
            done += 1
        return done
