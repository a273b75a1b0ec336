"""The processes of one run, as torchrun starts them, and the protocol by which they work together and end.

    torchrun --nproc_per_node=2 train_latent_cfg.py

**Who joins.** Each script enters `join_ranks` once, with as many processes as torchrun has started: one for each GPU,
or several on a CPU. preprocess_latents.py, train_latent_cfg.py and generate.py share their work; evaluate_images.py,
--verify and --prune join only to refuse company (`must_be_alone`). A *rank* is the number of a process, from 0. Rank 0
alone prints, and writes what there is only one of. A process that is alone has neither group nor store, and each
method below returns what one process would get, without waiting.

**Collectives** wait until all processes have called them: the end of `together`, `check_same`, `first_of`, `of_main`,
`copy_of_main`, `add_up`, `agree_to_stop` and `use`. torch matches the calls of the processes by their order alone, so
all must make the same calls in the same order. What may fail on one process belongs in a block of `together`; a process
that fails there goes on to the collective at the end of the block. Hence such a block must hold no other collective:
those that have not failed would be waiting in it, and would take the failed one's answer for their own question.
Values go through gloo, on CPUs, so that they wait for no GPU; gradients and weights go through NCCL where there are
GPUs. A collective fails when a process is gone, or after _ANSWER_SECONDS.

**The store** is a table of texts that all can read and write at any time, in a block of `together` too. Its keys are

    <topic> <rank>      the process has come so far (`tell`)
    <topic> alive       a count that grows while a process works on the topic: a sign of life (`sign_of_life`)
    signal              the number of a signal that one has got, and all are to stop (`raise_if_stopped`)
    word left           why a process that is not rank 0 ended by itself: [rank, message, exit code]

with the topics

    encoded             it has encoded its share of the images (latents.filling)
    filled              it has all latents, its own and those of the others; "filled failed": it could not encode
    drawn <step>        rank 0 has saved and drawn what was due after a step (training.loop)
    made                it has made its share of the images (training.generation)
    ended, heard        rank 0 has come to its end; another process knows of that

Whoever waits through the store (`await_others`, `await_end`, `while_main_works`) gives up after _PATIENCE_SECONDS
without news, and does the work itself or lets the next collective find out what has happened.

**How a run ends.** torchrun ends all processes soon after the first that exits with an error, so rank 0, which prints
the reason, has to come first:

1. All is done: rank 0 tells "ended", and all leave.
2. All agree, in a collective, that one has failed or got a signal: rank 0 raises the error, those of others with their
   rank named; the others raise `Told` with the same exit code, or `Stopped`, and wait for "ended" (at most
   _LAST_WORDS_SECONDS) before they leave.
3. One that is not rank 0 fails outside of `together`: it leaves word and leaves the group. Rank 0 finds the word where
   it looks between its work (`raise_if_stopped`), or when the collective fails that the other is missing in.
4. One dies without a word, or rank 0 fails outside of `together`: the next collective or look into the store fails on
   the others. Rank 0 then raises `Failed` and says that another cannot be reached; any other process ends in silence.
5. torchrun is killed: the system sends each process SIGTERM (`process.end_with_torchrun`), and they stop as on that.
   The store has gone with torchrun, so whoever would look into it is `Stopped`; the group is still there, and the state
   of a training is saved.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gait_latents.common import console, errors, process, shortage
from gait_latents.common.errors import Failed, Stopped, Told, UserError
from gait_latents.common.process import StopSignals

TIME_IS_UP = 0  # a reason to stop, as are the numbers of the signals, which are larger and so win
_NO_REASON = -1
_JOIN_SECONDS = 300.0  # within which all processes must have started and imported torch
# Whoever waits for others at the start says so after this time, and then each time that this has passed.
_REST_SECONDS = 0.05
_FIRST_NEWS_SECONDS, _NEWS_SECONDS = 3.0, 60.0
_LAST_WORDS_SECONDS = 20.0  # that others wait for rank 0 to say why the run ends; torchrun kills 30 s after a signal
_ANSWER_SECONDS = 1800.0  # the longest that one process waits for another in a collective
# Between two looks into the store: this share of the time waited so far, but no more than so many seconds.
_LOOK_SECONDS, _LOOK_SHARE = 0.5, 0.1
_PATIENCE_SECONDS = 300.0  # without news, after which others are given up; latents are published each minute
# Store keys: under which a failing process leaves [rank, message, exit code], and the number of a signal.
_WORD, _SIGNAL = "word left", "signal"
Item = TypeVar("Item")


class OtherFailed(Exception):
    """Another process has failed in this block of `Ranks.together`; leave the block, whose end tells all why."""


class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local_rank: its number on this machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, store: dist.Store | None = None) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._store = store
        self._device_group: Any = None  # the NCCL group for tensors on GPUs; None is the gloo group of all

    @property
    def is_main(self) -> bool:
        """Says whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Returns this process's share of a list that all have alike: every count-th item from its rank on."""
        return items[self.rank :: self.count]

    # --- devices ---

    def device_name(self, asked: str) -> str:
        """Returns the device of this process for a --device of auto, cpu or cuda.

        Raises:
            UserError: when this machine has no GPU for it.
        """
        if self.count == 1 or asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            return asked
        if asked not in ("auto", "cuda"):
            raise UserError(f"--device {asked} is one device, and there are {self.count} processes; use --device auto")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{self.local_rank + 1} processes were started on a machine with {torch.cuda.device_count()} GPU(s); "
                "start one for each: torchrun --nproc_per_node=gpu"
            )
        return f"cuda:{self.local_rank}"

    def use(self, device: torch.device) -> None:
        """Prepares collectives over tensors on a device. A collective."""
        if self.count > 1 and device.type == "cuda":
            torch.cuda.set_device(device)
            if dist.is_nccl_available():
                self._device_group = dist.new_group(backend="nccl", timeout=timedelta(seconds=_ANSWER_SECONDS))

    def say_unused(self, asked: str, command: str) -> None:
        """Prints how to use the other GPUs of this machine, where there are any and --device is auto.

        It is for work that they share without a word to each other. By arithmetic, not measured, the exchange at each
        step of training takes two T4 about as long as the step.
        """
        num_gpus = torch.cuda.device_count()
        if self.count == 1 and asked == "auto" and num_gpus > 1:
            console.say(
                f"one of {num_gpus} GPUs is used; torchrun --nproc_per_node={num_gpus} {command}, with the same flags, "
                "uses them all"
            )

    def must_be_alone(self, what: str) -> None:
        """Raises UserError where there are several processes, for work that is not shared; on each of them."""
        if self.count > 1:
            raise UserError(f"{what} is for one process; start it without torchrun")

    # --- collectives: all processes call them in the same order, and outside of `together` ---

    @contextmanager
    def together(self) -> Iterator[None]:
        """Makes what fails on one process in the block fail on all of them, told once, by rank 0.

        The end of the block is a collective, and the block itself must hold none: a process that failed in it is
        already at the end, and would answer the collective of the others with its failure.

        Raises:
            UserError, Failed, OSError or Stopped: on rank 0, its own or else that of the first rank that has failed.
            Told: on the others, with the exit code of that error.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except OtherFailed:
            pass
        except Exception as caught:
            if not errors.is_told(caught):
                raise
            error = caught
        found = None if error is None else errors.explain(error)
        if not self._largest(found is not None):
            return
        told = self._gather(found)
        if self.is_main and error is not None:
            raise error
        first = next(rank for rank, one in enumerate(told) if one is not None)
        text, code = told[first]
        if not self.is_main:
            raise Told(code)
        raise _error_in(first, text, code)

    def check_same(self, facts: Mapping[str, object], remedy: str) -> None:
        """Makes sure that all processes have the same facts {what: value}. A collective.

        Raises:
            UserError: on rank 0, naming the first fact that differs; Told on the others.
        """
        if self.count == 1:
            return
        told = self._gather({what: str(value) for what, value in facts.items()})
        for rank, theirs in enumerate(told):
            for what, value in told[0].items():
                if theirs.get(what) != value:
                    if not self.is_main:
                        raise Told(errors.USER_ERROR)
                    raise UserError(f"process {rank} has {what} {theirs.get(what)}, process 0 has {value}; {remedy}")

    def first_of(self, value: Item | None) -> Item | None:
        """Returns the value of the lowest rank whose value, of JSON types, is not None. A collective."""
        told = [value] if self.count == 1 else self._gather(value)
        return next((one for one in told if one is not None), None)

    def of_main(self, value: Item) -> Item:
        """Returns the value, of JSON types, that rank 0 has. A collective."""
        return value if self.count == 1 else self._gather(value)[0]

    def copy_of_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors on the device with those of rank 0. One collective for each tensor."""
        if self.count > 1:
            for tensor in tensors:
                if tensor.numel():
                    dense = tensor.detach().contiguous()
                    with self._reaching_others():
                        dist.broadcast(dense, src=0, group=self._device_group)
                    tensor.detach().copy_(dense)

    def add_up(self, network: nn.Module, *values: Tensor) -> list[Tensor]:
        """Adds up the gradients of all processes, in place, and returns the sums of other float32 values.

        It is one collective for all of them, called after the backward pass, so that compiled code holds none and the
        network needs no wrapper. Sums are what one process would have computed; a mean would move the point where
        float16 overflows.
        """
        if self.count == 1:
            return list(values)
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        own = [*gradients, *values]
        everything = torch.cat([tensor.flatten() for tensor in own])
        with self._reaching_others():
            dist.all_reduce(everything, group=self._device_group)
        parts = everything.split([tensor.numel() for tensor in own])
        sums = [part.view(tensor.shape) for part, tensor in zip(parts, own, strict=True)]
        torch._foreach_copy_(gradients, sums[: len(gradients)])
        return sums[len(gradients) :]

    def agree_to_stop(self, signal_number: int | None, time_is_up: bool) -> int | None:
        """Returns why all processes stop after this step, or None. A collective.

        The reason is the number of a signal that any of them has got, or TIME_IS_UP by the clock of rank 0.
        """
        own = TIME_IS_UP if time_is_up and self.is_main else _NO_REASON
        reason = self._largest(own if signal_number is None else signal_number)
        return None if reason == _NO_REASON else reason

    # --- the store: without waiting for an answer, in a block of `together` too ---

    def tell(self, topic: str) -> None:
        """Lets the others know that this process has come to the point that a topic names."""
        if self._store is not None:
            with self._reaching_store():
                self._store.set(f"{topic} {self.rank}", "")

    def _have_told(self, topic: str) -> list[int]:
        """Returns the ranks that have told of a topic by now."""
        if self._store is None:
            return []
        with self._reaching_store():
            return [rank for rank in range(self.count) if self._store.check([f"{topic} {rank}"])]

    def raise_if_stopped(self, signals: StopSignals) -> None:
        """Looks whether there is a reason to end; called between pieces of work, so that nobody works on in vain.

        Raises:
            Stopped: when this process has got a signal, which it tells the others, or another has told of one.
            UserError or Failed: on rank 0, when another process has ended and left word why; Told elsewhere.
        """
        number = signals.received
        if self._store is not None:
            with self._reaching_store():
                if number is not None:
                    self._store.set(_SIGNAL, str(number))
                elif self._store.check([_SIGNAL]):
                    number = int(self._store.get(_SIGNAL))
                else:
                    self._raise_word_left()
        if number is not None:
            raise Stopped(number)

    def raise_if_failed(self, topic: str) -> None:
        """Raises OtherFailed when another process has told that it failed in its share of a topic."""
        if self._have_told(f"{topic} failed"):
            raise OtherFailed(topic)

    def await_others(self, topic: str, look: Callable[[], tuple[int, int]]) -> None:
        """Waits until all have told of a topic or all results are there; gives up after _PATIENCE_SECONDS without news.

        It looks at the others' results (files on a disk) and does not wait in a collective, which has a limit of time.

        Args:
            look: looks for results; returns how much has come since the last look, and how much is still to come.
        """
        last_news = time.monotonic()
        while time.monotonic() - last_news < _PATIENCE_SECONDS:
            are_done = len(self._have_told(topic)) == self.count  # before the look, which then misses nothing
            found, to_come = look()
            if are_done or not to_come:
                return
            if found:
                last_news = time.monotonic()
            else:
                time.sleep(_LOOK_SECONDS)

    def sign_of_life(self, topic: str) -> None:
        """Lets those that wait for the end of a topic know that this process still works on it."""
        if self._store is not None:
            with self._reaching_store():
                self._store.add(f"{topic} alive", 1)

    def await_end(self, topic: str, between: Callable[[], object]) -> None:
        """Waits until all have told of a topic; gives up on them after _PATIENCE_SECONDS without a sign of life.

        Args:
            between: called before each look; what it raises ends the waiting.
        """
        self._await(topic, lambda told: len(told) == self.count, between)

    @contextmanager
    def while_main_works(self, topic: str, between: Callable[[], object]) -> Iterator[None]:
        """Lets the others wait at the end of a block until rank 0 has come there, as long as it gives signs of life.

        Without it they would wait for rank 0 in the next collective, which fails after _ANSWER_SECONDS.

        Args:
            topic: must not have been used before in this run.
            between: called before each look; what it raises ends the waiting.
        """
        try:
            yield
        finally:
            if self.is_main:  # it does not wait: of a process that has died, the next collective tells it at once
                self.tell(topic)
        if not self.is_main:
            self._await(topic, lambda told: 0 in told, between)

    def _await(self, topic: str, is_enough: Callable[[list[int]], bool], between: Callable[[], object]) -> None:
        """Waits until enough ranks have told of a topic, or no sign of life comes any more."""
        if self._store is None:
            return
        started = last_news = time.monotonic()
        last_sign = -1
        while not is_enough(self._have_told(topic)) and time.monotonic() - last_news < _PATIENCE_SECONDS:
            between()
            with self._reaching_store():
                sign = self._store.add(f"{topic} alive", 0)
            if sign != last_sign:
                last_sign, last_news = sign, time.monotonic()
            time.sleep(min(_LOOK_SECONDS, 0.01 + _LOOK_SHARE * (time.monotonic() - started)))

    def await_words_of_main(self) -> bool:
        """Waits, on the others, until rank 0 has ended: when one of them exits first, torchrun ends rank 0 unheard.

        Returns:
            Whether rank 0 has ended, as far as can be known; True on rank 0 itself.
        """
        if self.is_main:
            return True
        until = time.monotonic() + _LAST_WORDS_SECONDS
        has_ended = False
        with suppress(Told, Stopped):  # the store may be gone, since rank 0 or torchrun holds it
            while not has_ended and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS / 5)
                has_ended = 0 in self._have_told("ended")
            self.tell("heard")
            time.sleep(_LOOK_SECONDS)  # the time that rank 0 needs to print
            return has_ended
        return True

    def let_others_hear(self) -> None:
        """Tells, on rank 0, that it ends, and waits a moment until the others know.

        The store goes with rank 0, and torch would print complaints of processes that still look into it.
        """
        self.tell("ended")
        until = time.monotonic() + _LOOK_SECONDS / 2  # less than they wait after "heard", so that rank 0 prints first
        while len(self._have_told("heard")) < self.count - 1 and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS / 50)

    def leave_word(self, error: Exception) -> bool:
        """Leaves word why this process, which is not rank 0, ends outside of `together`, and lets rank 0 print it.

        Rank 0 finds the word in `raise_if_stopped`, or when the collective fails that this process is missing in.

        Returns:
            Whether rank 0 has ended in time, and so has printed it.
        """
        if self._store is None:
            return False
        with suppress(Told, Stopped):  # the store may be gone
            with self._reaching_store():
                self._store.set(_WORD, json.dumps([self.rank, *errors.explain(error)]))
            dist.destroy_process_group()  # so that a collective in which the others wait for this process fails at once
            return self.await_words_of_main()
        return False

    def _raise_word_left(self) -> None:
        """Raises the error of which another process has left word; Told unless this is rank 0."""
        if self._store is not None and self._store.check([_WORD]):
            rank, text, code = json.loads(self._store.get(_WORD))
            raise _error_in(rank, text, code) if self.is_main else Told(code)

    # --- gloo ---

    def _largest(self, value: int) -> int:
        """Returns the largest of the values of all processes. A collective."""
        if self.count == 1:
            return value
        largest = torch.tensor([int(value)])
        with self._reaching_others():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def _gather(self, value: Any) -> list[Any]:
        """Returns the value of each process, in the order of their ranks. Two collectives.

        Values are sent as JSON, which, unlike a pickle, cannot make this process run anything.
        """
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        longest = self._largest(len(text))
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(self.count)]
        with self._reaching_others():
            dist.all_gather(texts, padded)
        return [json.loads(bytes(one.tolist())) for one in texts]

    @contextmanager
    def _reaching_store(self) -> Iterator[None]:
        """Surrounds each use of the store as `_reaching_others` does; a store that went with torchrun is not used.

        torch would print where in its code the use of that failed.
        """
        if process.has_lost_torchrun():
            raise Stopped(signal.SIGTERM)
        with self._reaching_others():
            yield

    @contextmanager
    def _reaching_others(self) -> Iterator[None]:
        """Surrounds each use of the group and of the store, which fail when another process is gone.

        Raises:
            UserError or Failed: on rank 0, what the other process left word of, or that it cannot be reached.
            Told: on the others.
            Stopped: on each, when torchrun is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if shortage.kind_of(error) is not None:  # of this process
                raise
            if process.has_lost_torchrun(within=_LOOK_SECONDS):  # its files are closed a moment before it is gone
                raise Stopped(signal.SIGTERM) from error
            if not self.is_main:
                raise Told(errors.FAILED) from error
            with suppress(RuntimeError):  # the store may have gone with the other
                self._raise_word_left()
            raise Failed(
                "another process of this run has ended or cannot be reached, so that this one ends too; what was saved "
                f"before is whole, and the same command goes on from there ({_first_sentence(error)})"
            ) from error


ALONE = Ranks()  # one process, which joins nobody


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun has started beside this one; on the way out, lets rank 0 say why the run ends.

    A process that is alone joins nobody. The top of this module says how a run ends.
    """
    if process.num_ranks() == 1:
        yield ALONE
        return
    ranks = _join()
    is_done = False
    try:
        yield ranks
        is_done = True
    except (Stopped, Told):  # all processes know of it
        ranks.await_words_of_main()
        raise
    except Exception as error:
        if not errors.is_told(error) or ranks.is_main or not ranks.leave_word(error):
            raise
        raise Told(errors.explain(error)[1]) from error
    finally:
        if ranks.is_main:
            with suppress(Stopped):  # the store has gone with torchrun, and so nobody waits for a word in it
                ranks.tell("ended") if is_done else ranks.let_others_hear()
    # In torch 2.6 the end of a group waits for its threads and holds the interpreter meanwhile, which a thread that
    # lets go of its last tensor waits for: they are given a moment to come to rest.
    time.sleep(_REST_SECONDS)
    dist.destroy_process_group()


def _join() -> Ranks:
    rank, count = process.rank(), process.num_ranks()
    place = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        wait = timedelta(seconds=_JOIN_SECONDS)
        waiting = _Waiting(rank, count, place)
        if rank:
            waiting.until_open()
        # The store would wait for as many processes as it is told of, and say nothing: it is told of one.
        store, _, _ = next(dist.rendezvous("env://", rank, 1, timeout=wait))
        store = dist.PrefixStore(_attempt(), store)
        waiting.until_all_are_here(store)
        answer = timedelta(seconds=_ANSWER_SECONDS)
        # Joining takes its limit of time from the store; collectives take theirs from the group.
        store.set_timeout(wait)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=answer)
    except (RuntimeError, ValueError) as error:
        raise _alone_error(rank, count, place, _first_sentence(error)) from error
    local_rank = os.environ.get("LOCAL_RANK", "")
    return Ranks(
        rank, count, int(local_rank) if local_rank.isdecimal() else rank, dist.PrefixStore("gait-latents", store)
    )


def _alone_error(rank: int, count: int, place: str, reason: str) -> Failed:
    return Failed(
        f"process {rank} of {count} does not find the others at {place} ({reason}); start them with torchrun, or leave "
        "RANK and WORLD_SIZE unset"
    )


class _Waiting:
    """The time in which the processes of a run come together: who waits says for whom, and gives up in the end."""

    def __init__(self, rank: int, count: int, place: str) -> None:
        self.rank, self.count, self.place = rank, count, place
        self.started = time.monotonic()
        self.next_news = _FIRST_NEWS_SECONDS

    def until_open(self) -> None:
        """Waits, on another than rank 0, until the store of rank 0 or of torchrun can be reached."""
        address = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "0"))
        while address[0] and address[1]:  # else torch says what is not set
            try:
                socket.create_connection(address, timeout=1.0).close()
            except OSError as error:
                self._look([0], error.strerror or str(error))
            else:
                return

    def until_all_are_here(self, store: dist.Store) -> None:
        """Waits until each process has come to the store."""
        store.set(f"here {self.rank}", "")
        while missing := [rank for rank in range(self.count) if not store.check([f"here {rank}"])]:
            self._look(missing, "no sign of it" if len(missing) == 1 else "no sign of them")

    def _look(self, missing: list[int], reason: str) -> None:
        """Sleeps until the next look; the first process that waits tells of it now and then.

        Raises:
            Failed: when the time is over.
        """
        passed = time.monotonic() - self.started
        names = f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {self.count}"
        if passed >= _JOIN_SECONDS:
            raise _alone_error(
                self.rank, self.count, self.place, f"waited {console.duration(passed)} for {names}: {reason}"
            )
        if passed >= self.next_news and (self.rank == 0 or missing[0] == 0):
            self.next_news += _NEWS_SECONDS
            who = f"process {self.rank}: " if self.rank else ""
            left = console.duration(_JOIN_SECONDS - passed)
            console.print_error(
                f"{who}waiting at {self.place} for {names}, {left} at most; unset WORLD_SIZE to work without others"
            )
        time.sleep(min(_LOOK_SECONDS, 0.01 + _LOOK_SHARE * passed))


def _attempt() -> str:
    """Names the attempt of a torchrun that starts all again: its store still has the keys of the attempt before.

    Each machine counts restarts by itself, so that with several machines there is no number that all of them know.
    """
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if is_one_machine else 0}"


def _error_in(rank: int, text: str, code: int) -> Exception:
    """Returns the error that another process has raised, from the message and exit code of `errors.explain`."""
    if code > errors.SIGNALLED:
        return Stopped(code - errors.SIGNALLED)
    return (UserError if code == errors.USER_ERROR else Failed)(f"{text} (in process {rank})")


def _first_sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0][:200]
