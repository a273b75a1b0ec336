"""The processes of one run, as torchrun starts them: one for each GPU, or several on a CPU.

    torchrun --nproc_per_node=2 train_latent_cfg.py

A *rank* is the number of a process, from 0; rank 0 alone prints and writes what there is one of. What the processes
tell each other goes through gloo, on CPUs, so that it waits for no GPU; gradients go through NCCL where there are GPUs.
A process that is alone has no group, and each method below then does nothing. No block of `together` may hold another
exchange: a process that failed in it would answer with something else.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gait_latents.common import console, errors, hardware, process
from gait_latents.common.errors import Failed, Stopped, Told, UserError
from gait_latents.common.process import StopSignals

TIME_IS_UP = 1  # beside the numbers of signals, which are larger: 2 and 15
_JOIN_SECONDS = 300.0  # for all processes to start and import
_LAST_WORDS_SECONDS = 20.0  # for rank 0 to say why the run ended; torchrun gives 30 after a signal
_ANSWER_SECONDS = 1800.0  # the longest that one waits for another in an exchange
_LOOK_SECONDS, _LOOK_SHARE = 0.5, 0.1  # between two looks at the others, at most; of the time waited so far
_PATIENCE_SECONDS = 300.0  # without anything new; latents are published each minute
_WORD = "word left"  # in the store, by the first process that ended by itself: its rank, and what `explain` says
Item = TypeVar("Item")


class OtherFailed(Exception):
    """Another process has failed, and says why where the block of `Ranks.together` ends, which this one leaves."""


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
        self._device_group: Any = None  # the group of all, until there are GPUs

    @property
    def is_main(self) -> bool:
        """Says whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Returns this process's share of what all of them list alike."""
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
        """Makes ready to add up what lies on a device; all processes call this together."""
        if self.count > 1 and device.type == "cuda":
            torch.cuda.set_device(device)
            if dist.is_nccl_available():
                self._device_group = dist.new_group(backend="nccl")

    def say_unused(self, asked: str, command: str) -> None:
        """Says how to use the other GPUs of this machine, where there are any and --device is left to us."""
        num_gpus = torch.cuda.device_count()
        if self.count == 1 and asked == "auto" and num_gpus > 1:
            console.say(
                f"one of {num_gpus} GPUs is used; torchrun --nproc_per_node={num_gpus} {command}, with the same flags, "
                "uses them all"
            )

    def must_be_alone(self, what: str) -> None:
        """Raises UserError where there are several processes."""
        if self.count > 1:
            raise UserError(f"{what} is for one process; start it without torchrun")

    # --- one for all ---

    @contextmanager
    def together(self) -> Iterator[None]:
        """Makes what fails on one process in the block fail on all, told once, by rank 0."""
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except OtherFailed:
            pass
        except (UserError, Failed, OSError, Stopped) as caught:
            error = caught
        except torch.OutOfMemoryError as caught:
            error = Failed(hardware.TOO_LITTLE_MEMORY)
            error.__cause__ = caught
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
        """Raises UserError, told by rank 0, unless all processes have the same facts {what: value}."""
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
        """Returns the first value, of plain types, that is not None, in the order of the ranks."""
        told = [value] if self.count == 1 else self._gather(value)
        return next((one for one in told if one is not None), None)

    def of_main(self, value: Item) -> Item:
        """Returns the value that rank 0 has, of plain types."""
        return value if self.count == 1 else self._gather(value)[0]

    def copy_of_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors on the device with those of rank 0."""
        if self.count > 1:
            for tensor in tensors:
                if tensor.numel():
                    dense = tensor.detach().contiguous()
                    with self._reaching_others():
                        dist.broadcast(dense, src=0, group=self._device_group)
                    tensor.detach().copy_(dense)

    # --- in a step ---

    def add_up(self, network: nn.Module, *values: Tensor) -> list[Tensor]:
        """Adds the gradients of all processes up, in place, and returns the sums of other float32 values.

        One exchange for all, after the backward pass: the compiled code holds none, nothing is wrapped around the
        network, and a sum is what one process would have had (a mean would change where float16 overflows).
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
        """Returns why all processes stop after this step: a signal that any has got, rank 0's clock, or None."""
        own = signal_number or (TIME_IS_UP if time_is_up and self.is_main else 0)
        return self._largest(own) or None

    # --- without waiting ---

    def tell(self, topic: str) -> None:
        """Lets the others know that this process has come so far."""
        if self._store is not None:
            with self._reaching_others():
                self._store.set(f"{topic} {self.rank}", "")

    def have_told(self, topic: str) -> list[int]:
        """Returns the ranks that have told of a topic, without waiting for the rest."""
        if self._store is None:
            return []
        with self._reaching_others():
            return [rank for rank in range(self.count) if self._store.check([f"{topic} {rank}"])]

    def raise_if_stopped(self, signals: StopSignals) -> None:
        """Looks, between two exchanges, whether there is a reason to end.

        Raises:
            Stopped: when this process has got a signal, which it tells the others, or another has told of one.
            UserError or Failed: on rank 0, when another process has ended and left word why; Told elsewhere.
        """
        for number in process.STOP_SIGNALS:
            if signals.received == number:
                self.tell(f"signal {number}")
            elif not self.have_told(f"signal {number}"):
                continue
            raise Stopped(number)
        with self._reaching_others():
            self._raise_word_left()

    def raise_if_failed(self, topic: str) -> None:
        """Raises OtherFailed when another process has told that it failed in its share of a topic."""
        if self.have_told(f"{topic} failed"):
            raise OtherFailed(topic)

    def await_others(self, topic: str, look: Callable[[], tuple[int, int]]) -> None:
        """Waits until the others have told of a topic, or all that they do is there; gives up on them without news.

        It looks at what they do instead of waiting for them in an exchange, which has its limit of time.

        Args:
            look: finds out what there is by now; returns how much has come, and how much is still to come.
        """
        last_news = time.monotonic()
        while time.monotonic() - last_news < _PATIENCE_SECONDS:
            are_done = len(self.have_told(topic)) == self.count  # before the look, which then misses nothing
            found, to_come = look()
            if are_done or not to_come:
                return
            if found:
                last_news = time.monotonic()
            else:
                time.sleep(_LOOK_SECONDS)

    def sign_of_life(self, topic: str) -> None:
        """Lets those that wait for the end of a topic know that this process is at work on it."""
        if self._store is not None:
            with self._reaching_others():
                self._store.add(f"{topic} alive", 1)

    def await_end(self, topic: str, between: Callable[[], object]) -> None:
        """Waits until all have told of a topic; gives up on the others without a sign of life.

        Args:
            between: called before each look; what it raises ends the waiting.
        """
        self._await(topic, lambda told: len(told) == self.count, between)

    @contextmanager
    def while_main_works(self, topic: str, between: Callable[[], object]) -> Iterator[None]:
        """Lets the others wait at the end of a block until rank 0 has come there, as long as it gives signs of life.

        An exchange, for which they would else wait, has its limit of time.

        Args:
            topic: another one each time.
            between: called before each look; what it raises ends the waiting.
        """
        try:
            yield
        finally:
            if self.is_main:  # which then hears at once, in an exchange, of a process that has died
                self.tell(topic)
        if not self.is_main:
            self._await(topic, lambda told: 0 in told, between)

    def _await(self, topic: str, is_enough: Callable[[list[int]], bool], between: Callable[[], object]) -> None:
        started = last_news = time.monotonic()
        last_sign = -1
        while not is_enough(self.have_told(topic)) and time.monotonic() - last_news < _PATIENCE_SECONDS:
            between()
            with self._reaching_others():
                sign = self._store.add(f"{topic} alive", 0)  # type: ignore[union-attr]
            if sign != last_sign:
                last_sign, last_news = sign, time.monotonic()
            time.sleep(min(_LOOK_SECONDS, 0.01 + _LOOK_SHARE * (time.monotonic() - started)))

    def await_words_of_main(self) -> bool:
        """Lets rank 0 finish and say why: once any process has ended badly, torchrun ends the rest.

        Returns:
            Whether it has done so, as far as can be known.
        """
        if self.is_main:
            return True
        until = time.monotonic() + _LAST_WORDS_SECONDS
        has_ended = False
        with suppress(Told):  # the store may have gone with rank 0
            while not has_ended and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS / 5)
                has_ended = 0 in self.have_told("ended")
            self.tell("heard")
            time.sleep(_LOOK_SECONDS)  # in which it prints
            return has_ended
        return True

    def let_others_hear(self) -> None:
        """Lets the others learn that rank 0 has ended, before the store goes with it, of which torch would tell."""
        self.tell("ended")
        until = time.monotonic() + _LOOK_SECONDS / 2  # else they would end before it prints
        while len(self.have_told("heard")) < self.count - 1 and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS / 50)

    def leave_word(self, error: Exception) -> bool:
        """Leaves word why this process, which is not rank 0, ends by itself, and lets rank 0 tell it.

        Rank 0 finds it where it looks between its work, or in the exchange that this process is missing in.

        Returns:
            Whether rank 0 has told it.
        """
        with suppress(Told):  # the store may be gone
            with self._reaching_others():
                self._store.set(_WORD, json.dumps([self.rank, *errors.explain(error)]))  # type: ignore[union-attr]
            dist.destroy_process_group()  # without which the others would wait for this one
            return self.await_words_of_main()
        return False

    def _raise_word_left(self) -> None:
        if self._store is not None and self._store.check([_WORD]):
            rank, text, code = json.loads(self._store.get(_WORD))
            raise _error_in(rank, text, code) if self.is_main else Told(code)

    # --- gloo ---

    def _largest(self, value: int) -> int:
        if self.count == 1:
            return value
        largest = torch.tensor([int(value)])
        with self._reaching_others():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def _gather(self, value: Any) -> list[Any]:
        """Returns the value of each process, in the order of their ranks.

        Values are sent as JSON: what comes from another process runs nothing here, as a pickle might.
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
    def _reaching_others(self) -> Iterator[None]:
        """Ends this process when another cannot be reached any more: it was killed, or has told why it failed."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.is_main:
                raise Told(errors.FAILED) from error
            with suppress(RuntimeError):  # the store may have gone with the other
                self._raise_word_left()
            raise Failed(
                "another process of this run has ended or cannot be reached, so that this one ends too; what was saved "
                f"before is whole, and the same command goes on from there ({_first_sentence(error)})"
            ) from error


ALONE = Ranks()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun has started beside this one; a process that is alone joins nobody."""
    if process.num_ranks() == 1:
        yield Ranks()
        return
    ranks = _join()
    is_done = False
    try:
        yield ranks
        is_done = True
    except (Stopped, Told):  # agreed upon
        ranks.await_words_of_main()
        raise
    except (UserError, Failed, OSError) as error:
        if ranks.is_main or not ranks.leave_word(error):
            raise
        raise Told(errors.explain(error)[1]) from error
    finally:
        if ranks.is_main and is_done:
            ranks.tell("ended")
        elif ranks.is_main:
            ranks.let_others_hear()
    dist.destroy_process_group()


def _join() -> Ranks:
    rank, count = process.rank(), process.num_ranks()
    place = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        wait = timedelta(seconds=_JOIN_SECONDS)
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=wait))
        store = dist.PrefixStore(_attempt(), store)
        answer = timedelta(seconds=_ANSWER_SECONDS)
        # Of the time to join, the group knows through the store; of the time to answer, from here.
        store.set_timeout(wait)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=answer)
    except (RuntimeError, ValueError) as error:
        raise Failed(
            f"process {rank} of {count} does not find the others at {place} ({_first_sentence(error)}); start them "
            "with torchrun, or leave RANK and WORLD_SIZE unset"
        ) from error
    local_rank = os.environ.get("LOCAL_RANK", "")
    return Ranks(
        rank, count, int(local_rank) if local_rank.isdecimal() else rank, dist.PrefixStore("gait-latents", store)
    )


def _attempt() -> str:
    """Names the attempt of a torchrun that starts all again: its store still has what the last one left.

    Of several machines each counts for itself, so that the number is none that all know.
    """
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if is_one_machine else 0}"


def _error_in(rank: int, text: str, code: int) -> Exception:
    """Returns what another process has raised, as `script.explain` told of it."""
    if code > errors.SIGNALLED:
        return Stopped(code - errors.SIGNALLED)
    return (UserError if code == errors.USER_ERROR else Failed)(f"{text} (in process {rank})")


def _first_sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0][:200]
