"""What is written behind: in order, bounded, and with its errors told."""

import threading

import pytest

from gait_latents.images.write_behind import WriteBehind


class Gate:
    """Writes numbers into a list, each once it may, and fails at the one that it is told to."""

    def __init__(self, *, fails_at: int | None = None, is_open: bool = True) -> None:
        self.written: list[int] = []
        self.fails_at, self.may_go = fails_at, threading.Event()
        self.threads: set[int] = set()
        if is_open:
            self.may_go.set()

    def write(self, number: int) -> None:
        assert self.may_go.wait(timeout=30)
        self.threads.add(threading.get_ident())
        if number == self.fails_at:
            raise OSError(28, "No space left on device", str(number))
        self.written.append(number)


def test_all_is_done_in_order_in_one_thread_that_is_not_ours():
    gate = Gate()
    with WriteBehind(gate.write, at_most=3) as writer:
        done = sum(writer.put(number) for number in range(50))
        done += writer.finish()
    assert gate.written == list(range(50)) and done == 50
    assert len(gate.threads) == 1 and threading.get_ident() not in gate.threads


def test_the_caller_goes_on_until_too_many_wait():
    gate, put = Gate(is_open=False), []
    with WriteBehind(gate.write, at_most=3) as writer:

        def fill() -> None:
            for number in range(5):
                writer.put(number)
                put.append(number)

        caller = threading.Thread(target=fill)
        caller.start()
        caller.join(timeout=0.5)
        assert put == [0, 1, 2] and not gate.written  # the fourth call waits for the first number
        gate.may_go.set()
        caller.join(timeout=30)
        assert put == [0, 1, 2, 3, 4]
    assert gate.written == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fails_at", [0, 4, 9])
def test_an_error_ends_the_block_and_what_came_after_it_is_dropped(fails_at):
    gate = Gate(fails_at=fails_at)
    with pytest.raises(OSError, match="No space left"):
        with WriteBehind(gate.write, at_most=2) as writer:
            for number in range(10):
                writer.put(number)
    assert gate.written[:fails_at] == list(range(fails_at)) and fails_at not in gate.written
    assert len(gate.written) <= fails_at + 2  # what was begun before the error was seen


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_caller_lets_what_is_waiting_be_done(kind):
    gate = Gate(is_open=False)
    with pytest.raises(kind):
        with WriteBehind(gate.write, at_most=8) as writer:
            for number in range(4):
                writer.put(number)
            gate.may_go.set()
            raise kind
    assert gate.written == [0, 1, 2, 3]


def test_a_failure_behind_is_told_even_when_the_caller_fails_too():
    gate = Gate(fails_at=1, is_open=False)
    with pytest.raises(OSError, match="No space left") as caught:
        with WriteBehind(gate.write, at_most=8) as writer:
            for number in range(3):
                writer.put(number)
            gate.may_go.set()
            raise ValueError("mine")
    assert isinstance(caught.value.__context__, ValueError)
