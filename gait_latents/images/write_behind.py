"""Files written in a thread of their own, while the next ones are made."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec

Facts = ParamSpec("Facts")


class WriteBehind(Generic[Facts]):
    """Within the block, does what it is given one after the other in the background; at its end, all is done.

    An error in the background is raised by the next call or at the end of the block, and what came after it is
    dropped. An error in the block lets what was given before be done: what is whole is kept.

    Args:
        write: what is done, such as writing one file.
        at_most: how many may wait; a further one waits for the first of them, so that memory stays bounded.
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
        """Takes one thing to do; returns how many were done since the last call."""
        self._waiting.append(self._pool.submit(self.write, *args, **kwargs))
        return self._collect(self.at_most)

    def finish(self) -> int:
        """Waits until all is done; returns how many were done since the last call."""
        return self._collect(0)

    def _collect(self, num_left: int) -> int:
        """Takes off what is done, and waits where more than `num_left` is not; raises what went wrong there."""
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
