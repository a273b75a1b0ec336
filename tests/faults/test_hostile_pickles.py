"""Weight files mutated at random, and pickles drawn from a grammar of opcodes: none hangs, dies or fills the memory.

Each case is opened in a worker process, which notes its number and the time before it begins. The parent sees a hang, a
death, or memory above the bound; the worker itself a case that gives neither contents nor a UserError.
"""

import mmap
import os
import random
import resource
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pickles
import pytest
import torch
from fault_account import Account
from os_faults import fork, overwrite
from pickles import DICT, EMPTY, LIST, MARK, NEW, NOTHING, REDUCE, SET, TUPLE, get, name, number, put, text
from test_fuzz import mangled
from tiny_vae import tiny_vae

from gait_latents.common.errors import UserError
from gait_latents.vae import containers, pickle_check, stand_ins
from gait_latents.vae.load import read_identity

CASES, LONG_CASES = 250, 10_000
MEMORY = 400_000_000  # bytes by which one case may make the worker grow
SECONDS = 30.0  # that one case may take, on a machine that has much else to do
ADDRESS_SPACE = 6 << 30  # above what the worker has: so that a fault of these tests fills no machine

Draw = random.Random
Case = Callable[[Draw, Path], None]  # writes a weight file


@dataclass
class Outcome:
    """What came of many cases.

    Attributes:
        cases: how many were opened.
        faults: what was wrong, each with the number of its case.
        worst_bytes, worst_seconds: of the case that took most.
    """

    cases: int = 0
    faults: list[str] = field(default_factory=list)
    worst_bytes: int = 0
    worst_seconds: float = 0.0


def run_cases(folder: Path, make: Case, numbers: Sequence[int], *, seconds: float = SECONDS) -> Outcome:
    """Opens the file that `make` writes for each number, in workers; goes on with a new one where one is lost."""
    outcome = Outcome()
    left = list(numbers)
    while left and len(outcome.faults) < 5:
        board = mmap.mmap(-1, 4096)  # shared: cases begun, worst bytes, worst milliseconds, length of a complaint, it
        worker = fork(lambda left=left, board=board: _work(folder, make, left, board))
        begun, since = 0, time.monotonic()
        ended: int | None = None
        while ended is None:
            time.sleep(0.02)
            pid, status = os.waitpid(worker, os.WNOHANG)
            ended = status if pid else None
            now = struct.unpack_from("<q", board)[0]
            if now != begun:
                begun, since = now, time.monotonic()
            elif ended is None and time.monotonic() - since > seconds:
                os.kill(worker, signal.SIGKILL)
                _, ended = os.waitpid(worker, 0)
                outcome.faults.append(f"case {left[begun - 1]}: a hang of more than {seconds:g} seconds")
        _, worst_bytes, worst_ms, length = struct.unpack_from("<4q", board)
        outcome.cases += begun
        outcome.worst_bytes = max(outcome.worst_bytes, worst_bytes)
        outcome.worst_seconds = max(outcome.worst_seconds, worst_ms / 1000)
        if ended and length:
            outcome.faults.append(f"case {left[begun - 1]}: {board[32 : 32 + length].decode()}")
        elif ended and not (outcome.faults and outcome.faults[-1].startswith(f"case {left[begun - 1]}:")):
            outcome.faults.append(f"case {left[begun - 1]}: the process ended with {ended}")
        left = left[begun:]
    return outcome


def _work(folder: Path, make: Case, numbers: Sequence[int], board: mmap.mmap) -> None:
    signal.alarm(0)  # of `fork`: the parent looks after the time
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    held = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_SPACE, held + ADDRESS_SPACE))
    path = folder / f"{os.getpid()}.pt"
    for index, seed in enumerate(numbers):
        make(Draw(seed), path)
        struct.pack_into("<q", board, 0, index + 1)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of earlier cases
        before, started = _status("VmRSS"), time.monotonic()
        complaint = _open(path)
        grown, took = _status("VmHWM") - before, time.monotonic() - started
        _, worst, slowest, _ = struct.unpack_from("<4q", board)
        struct.pack_into("<2q", board, 8, max(worst, grown), max(slowest, int(1000 * took)))
        if grown > MEMORY:
            complaint = f"{grown / 1e6:.0f} MB of memory"
        if complaint:
            told = complaint.encode()[:4000]
            struct.pack_into("<q", board, 24, len(told))
            board[32 : 32 + len(told)] = told
            os._exit(3)
    path.unlink(missing_ok=True)


def _open(path: Path) -> str:
    """Opens a file; returns what is wrong with what came out, if anything."""
    try:
        read_identity(path)
    except UserError as error:
        told = str(error)
        is_short = told.isprintable() and len(told) < 1500
        # Memory that was claimed and not there is a claim that nobody checked.
        return "" if is_short and "MemoryError" not in told and "alloc" not in told else f"the message {told[:300]!r}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    return ""


def _status(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) * 1024


# --- mutations of real checkpoints -------------------------------------------------------------------------


def real_content() -> dict[str, Any]:
    """Returns what a training checkpoint holds, of small tensors."""
    network = tiny_vae(multipliers=(1,))
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "state_dict": network.state_dict(),
        "ema": {"shadow_params": [torch.rand(2), torch.rand(3, 2).T], "decay": 0.99},
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0)}},
            "param_groups": optimizer.state_dict()["param_groups"],
        },
        "parameter": torch.nn.Parameter(torch.rand(2)),
        "scale_factor": np.float64(0.2),
        "array": np.arange(4.0),
        "sizes": [torch.Size((1, 2)), {3, 4}, b"bytes", bytearray(b"more"), 1 + 2j],
        "sparse": torch.eye(2).to_sparse(),
        "epoch": 3,
    }


def records_of(path: Path) -> dict[str, bytes]:
    reader = torch._C.PyTorchFileReader(str(path))
    return {record: reader.get_record(record) for record in reader.get_all_records()}


def edited(data: bytes, draw: Draw) -> bytes:
    """Returns a pickle with a few of its opcodes lost, doubled, moved, exchanged, or put in."""
    pieces = split(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        here, there = draw.randrange(len(pieces)), draw.randrange(len(pieces))
        match draw.randrange(6):
            case 0:
                del pieces[here]
            case 1:
                pieces.insert(there, pieces[here])
            case 2:
                pieces[here], pieces[there] = pieces[there], pieces[here]
            case 3:
                pieces[here] = draw.choice(WORDS)
            case 4:
                pieces.insert(there, draw.choice(WORDS))
            case _:
                run = pieces[here : here + draw.randrange(1, 20)]
                pieces[there:there] = run * draw.choice((1, 3, 50))
        pieces = pieces or [NOTHING]
    return b"".join(pieces)


def split(data: bytes) -> list[bytes]:
    """Cuts a pickle of protocol 2 into its opcodes."""
    lengths = {b"\x80": 1, b"K": 1, b"M": 2, b"J": 4, b"G": 8, b"h": 1, b"j": 4, b"q": 1, b"r": 4}
    pieces, at = [], 0
    while at < len(data):
        opcode = data[at : at + 1]
        end = at + 1 + lengths.get(opcode, 0)
        if opcode == b"c":
            end = data.index(b"\n", data.index(b"\n", at) + 1) + 1
        elif opcode == b"X":
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "little")
        elif opcode == b"\x8a":
            end = at + 2 + data[at + 1]
        pieces.append(data[at:end])
        at = end
    return pieces


NAMES = sorted({*pickle_check._CALLS, *pickle_check._NEVER_CALLED, *stand_ins.INERT, *stand_ins.PLAIN_TYPES})
NAMES += ["torch.FloatStorage", "torch.storage.UntypedStorage", "torch.float32", "torch.FloatTensor", "other.Kind"]
NAMES += ["builtins.eval", "os.system", "torch._utils._rebuild_nested_tensor", "torch._utils._rebuild_wrapper_subclass"]
HUGE = (-1, 0, 1, 2, 4, 255, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64)
WORDS = [NOTHING, MARK, TUPLE, REDUCE, NEW, DICT, LIST, SET, EMPTY, b"\x85", b"\x86", b"\x87", b"b", b"s", b"u", b"a"]
WORDS += [b"e", b"Q", b".", b"\x88", b"\x95" + bytes(8), *map(number, HUGE), *map(name, NAMES)]
WORDS += [get(i) for i in range(8)] + [put(i) for i in (0, 1, 2, 2**31)] + [text("latin1"), text("a" * 1000)]


def mutations(tmp_path: Path) -> dict[str, Case]:
    """Returns ways to change real checkpoints, in both containers."""
    zipped, legacy = tmp_path / "zip.pt", tmp_path / "legacy.pt"
    torch.save(real_content(), zipped)
    torch.save(real_content(), legacy, _use_new_zipfile_serialization=False)
    records, bytes_of = records_of(zipped), {path: path.read_bytes() for path in (zipped, legacy)}
    storages = {key.removeprefix("data/"): value for key, value in records.items() if key.startswith("data/")}
    # The pickles of the older form, which are in its first part.
    start = len(bytes_of[legacy]) - sum(8 + len(value) for value in storages.values())

    def of_zip(draw: Draw, path: Path) -> None:
        overwrite(path, mangled(bytes_of[zipped], draw))

    def of_directory(draw: Draw, path: Path) -> None:
        cut = max(0, len(bytes_of[zipped]) - draw.choice((22, 98, 300, 10_000)))
        overwrite(path, bytes_of[zipped][:cut] + mangled(bytes_of[zipped][cut:], draw))

    def of_pickle(draw: Draw, path: Path) -> None:
        data = mangled(records["data.pkl"], draw) if draw.random() < 0.4 else edited(records["data.pkl"], draw)
        pickles.write_zip(path, data or b".", storages)

    def of_legacy(draw: Draw, path: Path) -> None:
        head, body = bytes_of[legacy][:start], bytes_of[legacy][start:]
        overwrite(path, mangled(head, draw) + body if draw.random() < 0.8 else mangled(head + body, draw))

    return {"zip": of_zip, "directory of a zip": of_directory, "pickle in a zip": of_pickle, "older form": of_legacy}


# --- a grammar ---------------------------------------------------------------------------------------------


class Grammar:
    """Draws pickles that torch's unpickler would mostly take, and which like to share, to copy and to claim."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.remembered, self.left = draw, 0, 60

    def value(self) -> bytes:
        """Returns opcodes that leave one value, and mostly remember it."""
        self.left -= 1
        kinds = [self.atom, self.atom, self.shared, self.shared]
        if self.left > 0:
            kinds += [self.items, self.pairs, self.tuples, self.call, self.call, self.made, self.tensor, self.doubling]
            kinds += [self.state, self.often]
        body = self.draw.choice(kinds)()
        if self.draw.random() < 0.5:
            body += put(self.remembered)
            self.remembered += 1
        return body

    def values(self, most: int = 4) -> bytes:
        return b"".join(self.value() for _ in range(self.draw.randrange(most + 1)))

    def atom(self) -> bytes:
        words = [NOTHING, b"\x88", EMPTY, DICT, LIST, SET, text("k"), text("a" * 10_000), text("latin1")]
        return self.draw.choice([*words, number(self.draw.choice(HUGE)), name(self.draw.choice(NAMES))])

    def shared(self) -> bytes:
        return get(self.draw.randrange(self.remembered)) if self.remembered else NOTHING

    def items(self) -> bytes:
        return LIST + MARK + self.values() + b"e"

    def tuples(self) -> bytes:
        return MARK + self.values() + TUPLE

    def pairs(self) -> bytes:
        pairs = [self.value() + self.value() for _ in range(self.draw.randrange(4))]
        holder = self.draw.choice([DICT, name("collections.OrderedDict") + EMPTY + REDUCE, self.made()])
        return holder + MARK + b"".join(pairs) + b"u"

    def call(self) -> bytes:
        return name(self.draw.choice(NAMES)) + self.tuples() + REDUCE

    def made(self) -> bytes:
        return name(self.draw.choice(["other.Kind", "other.More", "types.SimpleNamespace"])) + self.tuples() + NEW

    def state(self) -> bytes:
        return self.value() + self.value() + b"b"

    def doubling(self) -> bytes:
        """A value that holds one value 2 ** n times, by any container."""
        body = self.atom()
        how = self.draw.randrange(3)
        for _ in range(self.draw.choice((3, 20, 64, 500))):
            body += put(self.remembered)
            twice = get(self.remembered)
            self.remembered += 1
            body += [
                twice + b"\x86",
                b"\x85" + put(self.remembered) + LIST + MARK + get(self.remembered) * 2 + b"e" + b"\x86",
                twice + twice + b"\x87",
            ][how]
            self.remembered += how == 1
        users = [body, DICT + body + NOTHING + b"s", name(self.draw.choice(NAMES)) + body + b"\x85R"]
        users.append(name("builtins.set") + LIST + body + b"a" + b"\x85R")
        return self.draw.choice(users)

    def often(self) -> bytes:
        """One call again and again, with something large."""
        large = self.draw.choice(
            [MARK + NOTHING * 20_000 + TUPLE, LIST + MARK + b"".join(map(number, range(5000))) + b"e"]
        )
        large = self.draw.choice([large, text("a" * 100_000)]) + put(self.remembered)
        again = name(self.draw.choice(NAMES)) + get(self.remembered)
        again += self.draw.choice([b"\x85R", b"R", b"\x81", text("latin1") + b"\x86R", b"b"])
        self.remembered += 1
        return large + LIST + MARK + again * self.draw.choice((2, 400, 4000)) + b"e" + b"\x86"

    def tensor(self) -> bytes:
        pick = lambda: tuple(self.draw.choice(HUGE[1:]) for _ in range(self.draw.randrange(4)))  # noqa: E731
        size = self.draw.choice([(4,), (2, 2), pick()])
        stride = self.draw.choice([(1,), (2, 1), (0, 0), pick()])
        count = self.draw.choice([4, 4, 4, *HUGE])
        return pickles.tensor(count, self.draw.choice((0, 0, *HUGE)), size, stride)


def from_grammar(draw: Draw, path: Path) -> None:
    """Writes a file of a pickle that the grammar gives, in either container."""
    body = pickles.whole(
        Grammar(draw).value() if draw.random() < 0.3 else pickles.dict_of(text("a"), Grammar(draw).value())
    )
    (pickles.write_zip if draw.random() < 0.8 else pickles.write_legacy)(path, body)


# --- tests -------------------------------------------------------------------------------------------------

WAYS = ("zip", "directory of a zip", "pickle in a zip", "older form", "a grammar of opcodes")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ten_thousand_weight_files_hang_nothing_and_fill_nothing(tmp_path: Path, account: Account, way: str) -> None:
    check(tmp_path, account, way, LONG_CASES // len(WAYS))


def test_a_few_hundred_weight_files_hang_nothing_and_fill_nothing(tmp_path: Path, account: Account) -> None:
    for way in WAYS:
        check(tmp_path, account, way, CASES // len(WAYS))


def check(folder: Path, account: Account, way: str, cases: int) -> None:
    """Opens so many files of one way and notes what was wrong."""
    make = {**mutations(folder), "a grammar of opcodes": from_grammar}[way]
    outcome = run_cases(folder, make, range(cases))
    print(f"{way}: {outcome.cases:,} cases, worst {outcome.worst_bytes / 1e6:.0f} MB, {outcome.worst_seconds:.2f} s")
    assert not outcome.faults, "\n".join(outcome.faults)
    account.add("fuzz: weight file in a worker", way, cases=outcome.cases, wrong=len(outcome.faults))


def endless_key(draw: Draw, path: Path) -> None:
    body = number(1) + b"".join(put(i) + get(i) + b"\x86" for i in range(draw.randrange(50, 70)))
    pickles.write_zip(path, pickles.whole(DICT + body + NOTHING + b"s"))


def bytes_of_a_number(draw: Draw, path: Path) -> None:
    pickles.write_zip(
        path, pickles.whole(pickles.call("builtins.bytearray", number(draw.randrange(450_000_000, 500_000_000))))
    )


def unchecked(path: Path) -> pickle_check.Checked:
    """Stands in the place of the check, and lets everything pass."""
    return pickle_check.Checked(0, None, frozenset(NAMES), {}, {})


@pytest.mark.parametrize(
    ("make", "fault", "seconds"),
    [(endless_key, "a hang of more than", 2.0), (bytes_of_a_number, "MB of memory", 4 * SECONDS)],
)
def test_without_the_check_the_workers_find_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Case, fault: str, seconds: float
) -> None:
    assert run_cases(tmp_path, make, range(3)).faults == []
    monkeypatch.setattr(containers, "check_zip", unchecked)
    found = run_cases(tmp_path, make, range(1), seconds=seconds).faults
    assert len(found) == 1 and fault in found[0]
