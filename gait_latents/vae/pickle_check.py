"""Looks at the opcodes of a pickle before anything is built, and refuses what no checkpoint needs.

A pickle is a program for a machine with a stack. One of some hundred bytes can ask for terabytes, or for a dict key
that takes years to hash, inside C, where no signal ends it. So the program is first run with stand-ins of its values.
They say what kind of value each is and how large, and cost time and memory in proportion to the bytes of the pickle.
What this machine lets pass, torch's restricted unpickler (`torch/_weights_only_unpickler.py`) builds; it knows the same
opcodes, and gives each the same effect. Whatever is not known here is refused:

- a global, unless it is a type of torch that is listed below, or one that has an inert stand-in (`stand_ins.py`);
- a call, unless of a global that takes such arguments;
- items and states, unless of what holds such;
- keys of dicts and elements of sets that are more than a few values, for hashing walks through all of them;
- tensors that reach beyond their storage, and storages that are not in the file.
"""

import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch._weights_only_unpickler import _get_allowed_globals

from gait_latents.vae import stand_ins

MAX_PICKLE_BYTES = 128 << 20  # the pickle of 50,000 tensors has some 8 MB; that of arrays of numpy holds their numbers
MAX_OPCODES = 10_000_000  # 50,000 tensors with the two averages of Adam take some 5,000,000
MAX_OBJECT_BYTES = 1 << 30  # of what is built, without tensors; 300,000 tensors take so much
_FREE_OBJECT_BYTES = 64 << 20  # that any pickle may take; above that, _BYTES_PER_BYTE for each byte of the pickle
_BYTES_PER_BYTE = 64  # those of 150 bytes that name a tensor become about 4,000 bytes of objects
_MOST_CLASSES = 100  # of other programs
_MAX_NAME = 300  # letters of the name of a class
_MAX_KEY = 64  # values in a tuple that is a key
_MAX_KEY_PAIRS = 2_000_000_000  # of keys that are no texts, in one container: each may have to be compared with each
_MAX_CALL_WORK = 50_000_000  # torch looks through all the names that it was given at each call of a stand-in
_MAX_DIMENSIONS = 64
_LONG = 2**63


class Refused(Exception):
    """A pickle does what no checkpoint needs; the text says what.

    Attributes:
        name: the class that is no weight, where that is the reason; else empty.
    """

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name


class Buffer(Protocol):
    """Bytes in memory or mapped from a file."""

    def __getitem__(self, place: slice, /) -> bytes: ...
    def __len__(self) -> int: ...
    def find(self, sub: bytes, start: int, stop: int, /) -> int: ...


@dataclass
class Checked:
    """What a pickle names and claims.

    Attributes:
        end: where the pickle ends.
        value: what it builds: plain values as they are, others as stand-ins.
        known: names that have a stand-in of their own.
        foreign: {class of another program: "nothing", "dict" or "list", by the items that its objects take}, in the
            order in which they are named.
        storages: {key: bytes} of the storages of tensors.
    """

    end: int
    value: Any
    known: frozenset[str]
    foreign: dict[str, str]
    storages: dict[str, int]


def check_pickle(data: Buffer, start: int = 0, *, records: Mapping[str, int] | None = None) -> Checked:
    """Runs the pickle at `start` without building anything.

    Args:
        data: what holds the pickle; what comes after its end is not looked at.
        start: where it begins.
        records: {key: bytes} of the storages in the file; None where they are counted later.

    Raises:
        Refused: for what no checkpoint needs.
    """
    return _Machine(data, start, records).run()


@dataclass(eq=False, slots=True)
class _Global:
    """A global by its name; `takes` says what its objects take, where it is a class of another program."""

    name: str
    takes: str = "nothing"
    is_foreign: bool = False
    odd_state: bool = False  # whether an object of it got a state that a dict with items could not take


@dataclass(eq=False, slots=True)
class _Tuple:
    """A tuple; `size` counts its values and theirs, as hashing does."""

    items: tuple[Any, ...]
    size: int


@dataclass(eq=False, slots=True)
class _Made:
    """Something that is no plain value: a container, a tensor, an object.

    Attributes:
        kind: one of "list", "dict", "OrderedDict", "Counter", "set", "storage", "tensor", "object", "class", "value".
        items: the items of a list, the keys and values of a dict in turn, the sizes of a torch.Size.
        bytes: of a storage, or as many as the elements of a tensor take.
        dtype: of a storage or a tensor.
        of: the class of an object, where it is of another program.
        num_keys: how many keys it has that are no texts.
    """

    kind: str
    items: list[Any] = field(default_factory=list)
    bytes: int = 0
    dtype: torch.dtype | None = None
    of: _Global | None = None
    num_keys: int = 0


_MAPPINGS = ("dict", "OrderedDict", "Counter")
_HASHED_BY_PLACE = ("tensor", "object", "class", "value")
# What objects take in memory, in bytes, roughly, and an entry of the memo, of a list, of a dict.
_MEMO, _ITEM, _ENTRY = 120, 10, 110
_SIZES = {"list": 64, "dict": 72, "OrderedDict": 400, "Counter": 200, "set": 224}
_SIZES |= {"storage": 500, "tensor": 1000, "object": 250, "class": 8, "value": 200}


class _Machine:
    """Runs one pickle; each method named after an opcode does what the unpickler does, with stand-ins."""

    def __init__(self, data: Buffer, start: int, records: Mapping[str, int] | None) -> None:
        self.data, self.at, self.start, self.records = data, start, start, records
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: list[Any] = []
        self.globals: dict[str, _Global] = {}
        self.values: dict[str, _Made] = {}
        self.known: set[str] = set()
        self.storages: dict[str, _Made] = {}
        self.taken = self.stored = self.copied = self.key_pairs = self.call_work = 0

    def run(self) -> Checked:
        last = min(len(self.data), self.start + MAX_PICKLE_BYTES)
        for _ in range(MAX_OPCODES):
            if self.at >= last:
                break
            opcode = self.data[self.at : self.at + 1]
            self.at += 1
            if opcode == pickle.STOP:
                return self._result()
            step = _STEPS.get(opcode)
            if step is None:
                raise Refused(f"the opcode {opcode!r} at byte {self.at - 1:,} is not of a checkpoint")
            step[0](self)
            self.taken += step[1]
            if self.taken > _FREE_OBJECT_BYTES:
                self._check_taken()
        if self.at >= len(self.data):
            raise Refused("it ends in the middle")
        raise Refused(f"its pickle has more than {MAX_OPCODES:,} opcodes or {MAX_PICKLE_BYTES >> 20} MiB")

    def _result(self) -> Checked:
        value = self.pop()
        if self.stack or self.below:
            raise Refused("values are left over")
        foreign = {name: found.takes for name, found in self.globals.items() if found.is_foreign}
        for name, found in self.globals.items():
            if found.takes != "nothing" and found.odd_state:
                raise Refused(f"an object of {name} has items and an odd state", name)
        storages = {key: storage.bytes for key, storage in self.storages.items()}
        return Checked(self.at, value, frozenset(self.known), foreign, storages)

    def _check_taken(self) -> None:
        allowed = _FREE_OBJECT_BYTES + _BYTES_PER_BYTE * (self.at - self.start)
        if self.taken > min(allowed, MAX_OBJECT_BYTES):
            raise Refused("it would take far more memory than its bytes account for")

    def take(self, num_bytes: int) -> None:
        """Counts memory; raises Refused where it is more than the bytes of the pickle so far account for."""
        self.taken += num_bytes
        if self.taken > _FREE_OBJECT_BYTES:
            self._check_taken()

    # --- the stack -----------------------------------------------------------------------------------------

    def pop(self) -> Any:
        if not self.stack:
            raise Refused("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise Refused("a value is missing")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise Refused("a mark is missing")
        items, self.stack = self.stack, self.below.pop()
        return items

    def make(self, kind: str, **facts: Any) -> _Made:
        self.take(_SIZES[kind])
        return _Made(kind, **facts)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        # Picklers number what they remember: others could be chosen so that all fall into one place of the memo.
        if index == len(self.memo):
            self.memo.append(self.top())
        elif index < len(self.memo):
            self.memo[index] = self.top()
        elif index == len(self.memo) + 1:  # pickles of Python 2 count from 1
            self.memo += [_NOTHING, self.top()]
        else:
            raise Refused(f"it remembers a value under the number {index:,}, out of turn")

    def get(self, index: int) -> None:
        if index >= len(self.memo) or self.memo[index] is _NOTHING:
            raise Refused(f"it remembers no value under the number {index:,}")
        self.stack.append(self.memo[index])

    # --- plain values --------------------------------------------------------------------------------------

    def read(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise Refused("it ends in the middle")
        self.at += count
        return found

    def number(self, form: str, size: int) -> None:
        self.stack.append(struct.unpack(form, self.read(size))[0])

    def text(self, length: int, errors: str) -> None:
        try:
            found = str(self.read(length), "utf-8", errors)
        except UnicodeDecodeError as error:
            raise Refused("a text in it is not UTF-8") from error
        self.take(sys.getsizeof(found))
        self.stack.append(found)

    def long(self) -> None:
        data = self.read(self.read(1)[0])
        self.take(len(data))
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def proto(self) -> None:
        if self.at != self.start + 1 or self.read(1)[0] > pickle.HIGHEST_PROTOCOL:
            raise Refused("its protocol is unknown")

    def tuple_of(self, items: Sequence[Any]) -> None:
        size = 1
        for item in items:
            size += item.size if type(item) is _Tuple else 1
        self.take(48 + 8 * len(items))
        self.stack.append(_Tuple(tuple(items), size))

    def short_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise Refused("a value is missing")
        items = self.stack[-length:]
        del self.stack[-length:]
        self.tuple_of(items)

    # --- containers ----------------------------------------------------------------------------------------

    def container(self, kind: str) -> None:
        self.stack.append(_Made(kind))

    def extend(self, items: Sequence[Any]) -> None:
        target = self.top()
        self.check_takes(target, "list", ("list",))
        self.take(_ITEM * len(items))
        target.items += items

    def set_items(self, items: Sequence[Any]) -> None:
        target = self.top()
        self.check_takes(target, "dict", _MAPPINGS)
        if len(items) % 2:
            raise Refused("a key has no value")
        self.take(_ENTRY * len(items) // 2)
        for key in items[::2]:
            self.add_key(target, key)
        target.items += items

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items((key, value))

    def check_takes(self, target: Any, what: str, kinds: tuple[str, ...]) -> None:
        """Raises Refused unless something takes items; an object of another program then gets a container for them."""
        if type(target) is not _Made or (target.kind not in kinds and target.of is None):
            raise Refused(f"it puts items into what is no {what}")
        if target.of is not None:
            if target.of.takes not in ("nothing", what):
                raise Refused(f"an object of {target.of.name} takes items in two ways", target.of.name)
            target.of.takes = what

    def add_key(self, container: _Made, key: Any) -> None:
        """Raises Refused for a key that is costly to hash or, together with the others, to tell from them."""
        if type(key) is str or type(key) is bytes:  # their hashes cannot be foreseen
            return
        _check_key(key)
        if not (type(key) is int and 0 <= key - container.num_keys <= 1):  # those that count up never collide
            self.key_pairs += container.num_keys
            if self.key_pairs > _MAX_KEY_PAIRS:
                raise Refused("its dicts have too many keys that are no texts")
        container.num_keys += 1

    # --- globals, calls, states ----------------------------------------------------------------------------

    def read_line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 2 * _MAX_NAME)
        if end < 0:
            raise Refused("the name of a class in it does not end")
        try:
            text = self.data[self.at : end].decode()
        except UnicodeDecodeError as error:
            raise Refused("the name of a class in it is not UTF-8") from error
        self.at = end + 1
        return text

    def global_(self) -> None:
        module, name = self.read_line(), self.read_line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.stack.append(self.named(f"{module}.{name}"))

    def named(self, name: str) -> Any:
        """Returns what stands for a global; raises Refused where it is no weight."""
        if name in self.values:
            return self.values[name]
        if name in self.globals:
            return self.globals[name]
        if len(name) > _MAX_NAME or not name.isprintable() or " " in name:
            raise Refused("the name of a class in it is none")
        of_torch = _get_allowed_globals().get(name)
        if isinstance(of_torch, torch.dtype | torch.qscheme):
            return self.values.setdefault(name, _Made("value", dtype=of_torch))  # pyright: ignore[reportArgumentType]
        is_storage = isinstance(of_torch, torch.serialization.StorageType) or of_torch is torch.UntypedStorage
        if is_storage:
            dtype = torch.uint8 if of_torch is torch.UntypedStorage else of_torch.dtype  # pyright: ignore
            return self.values.setdefault(name, _Made("storage type", dtype=dtype))
        found = _Global(name)
        if stand_ins.is_known(name):
            self.known.add(name)
        elif name not in _CALLS and name not in _NEVER_CALLED:
            self._check_foreign(name, is_of_torch=of_torch is not None)
            found.is_foreign = True
        return self.globals.setdefault(name, found)

    def _check_foreign(self, name: str, *, is_of_torch: bool) -> None:
        num_foreign = sum(other.is_foreign for other in self.globals.values())
        if is_of_torch or stand_ins.is_of_python(name) or num_foreign >= _MOST_CLASSES:
            raise Refused(f"it holds {name}", name)

    def reduce(self) -> None:
        args, called = self.pop(), self.pop()
        self.stack.append(self.call(called, args))

    def call(self, called: Any, args: Any) -> Any:
        """Returns what a call gives; raises Refused unless it is of something that takes such arguments."""
        if type(args) is not _Tuple:
            raise Refused("it calls something with what is no tuple")
        if type(called) is _Global and called.name in _CALLS:
            self.take(_ITEM * len(args.items))
            try:
                return _CALLS[called.name](self, *args.items)
            except TypeError as error:  # another number of arguments
                raise Refused(f"it calls {called.name} with other arguments than a checkpoint has") from error
        return self.inert(called, args)

    def new(self) -> None:
        args, called = self.pop(), self.pop()
        if type(args) is not _Tuple:
            raise Refused("it makes an object of what is no tuple")
        is_parameter = type(called) is _Global and called.name == _PARAMETER
        self.stack.append(self.call(called, args) if is_parameter else self.inert(called, args))

    def work(self, amount: int) -> None:
        """Counts what torch looks through at each call of a stand-in: all names that it was given."""
        self.call_work += amount + len(self.globals)
        if self.call_work > _MAX_CALL_WORK:
            raise Refused("it makes too many objects that are no tensors")

    def inert(self, called: Any, args: _Tuple) -> _Made:
        self.work(200)
        self.take(_ITEM * len(args.items))  # which the stand-in keeps
        if type(called) is _Made and called.kind == "class":
            return self.make("object")
        if type(called) is not _Global or not (called.is_foreign or called.name in stand_ins.INERT):
            raise Refused("it calls what no checkpoint calls")
        return self.make("object", of=called if called.is_foreign else None)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        self.work(100)
        is_state = self.is_state(state, OrderedDict)
        if type(target) is _Made and target.kind == "object":
            if target.of is not None and not (is_state and target.of.takes != "list"):
                target.of.odd_state = True
        elif not (type(target) is _Made and target.kind == "OrderedDict" and is_state):
            raise Refused("it gives a state to what has none")

    def is_state(self, state: Any, of: type) -> bool:
        """Says whether something is a dict of attributes, none of which hides one that the type has."""
        if type(state) is not _Made or state.kind not in _MAPPINGS:
            return False
        self.take(_ENTRY * len(state.items) // 2)  # which are copied
        return all(type(key) is str and not hasattr(of, key) for key in state.items[::2])

    # --- tensors -------------------------------------------------------------------------------------------

    def persistent(self) -> None:
        found = self.pop()
        items = list(found.items) if type(found) is _Tuple else []
        if len(items) not in (5, 6) or items[0] != "storage" or items[5:] not in ([], [None]):
            raise Refused("it refers to what is no storage of a tensor")
        kind, key, location, count = items[1:5]
        dtype = kind.dtype if type(kind) is _Made and kind.kind == "storage type" else None
        is_right = type(key) is str and len(key) <= _MAX_NAME and type(location) is str and _is_size(count)
        if dtype is None or not is_right:
            raise Refused("it refers to a storage in another way than torch.save does")
        wanted = count * dtype.itemsize
        if self.records is not None and wanted > self.records.get(key, -1):
            raise Refused("a storage of a tensor claims more bytes than the file has")
        if key not in self.storages:
            self.storages[key] = self.make("storage", bytes=wanted, dtype=dtype)
            self.stored += wanted
        storage = self.storages[key]
        if (storage.bytes, storage.dtype) != (wanted, dtype):
            raise Refused("it refers to one storage in two ways")
        self.stack.append(storage)

    def tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        dtype: torch.dtype | None = None,
        metadata: Any = None,
    ) -> _Made:
        """Returns a tensor that lies within its storage; raises Refused for others."""
        if type(storage) is not _Made or storage.kind != "storage" or type(requires_grad) is not bool:
            raise Refused("it makes a tensor of what is no storage")
        self.check_hooks(hooks)
        sides, steps = _sides(size), _sides(stride)
        if len(sides) != len(steps) or not _is_size(offset):
            raise Refused("a tensor in it has an impossible shape")
        if metadata is not None:
            marks = metadata.items if type(metadata) is _Made and metadata.kind == "dict" else [None]
            if len(marks) > 4 or not all(type(mark) is str and mark in ("conj", "neg") for mark in marks[::2]):
                raise Refused("a tensor in it has unknown marks")
        dtype = dtype or storage.dtype
        assert dtype is not None
        reach = 0 if 0 in sides else offset + 1 + sum((a - 1) * b for a, b in zip(sides, steps, strict=True))
        if reach * dtype.itemsize > storage.bytes:
            raise Refused("a tensor in it claims more bytes than its storage has")
        return self.make("tensor", bytes=_num_elements(sides) * dtype.itemsize, dtype=dtype)

    def check_hooks(self, hooks: Any) -> None:
        if hooks is not None and not (type(hooks) is _Made and hooks.kind == "OrderedDict" and not hooks.items):
            raise Refused("a tensor in it has hooks")

    def copy_of(self, tensor: Any, num_bytes: int) -> None:
        """Counts bytes of tensors that torch copies or looks through; those of the file at most."""
        if type(tensor) is not _Made or tensor.kind != "tensor":
            raise Refused("it makes a tensor of what is none")
        self.copied += num_bytes
        if self.copied > self.stored:
            raise Refused("it copies more bytes of tensors than it has")

    def attributes(self, state: Any) -> None:
        """Raises Refused unless a tensor may have these attributes."""
        parts = state.items if type(state) is _Tuple and len(state.items) == 2 else (state,)
        if not all(part is None or self.is_state(part, torch.nn.Parameter) for part in parts):
            raise Refused("a tensor in it has attributes that hide its own")


_NOTHING = object()
_PARAMETER = "torch.nn.parameter.Parameter"


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LONG


def _sides(value: Any) -> Sequence[int]:
    """Returns the numbers of a shape or of strides; raises Refused where there are none."""
    items = value.items if type(value) is _Tuple or (type(value) is _Made and value.kind == "value") else None
    if items is None or len(items) > _MAX_DIMENSIONS or not all(_is_size(item) for item in items):
        raise Refused("a tensor in it has an impossible shape")
    return items


def _num_elements(sides: Sequence[int]) -> int:
    product = 1
    for side in sides:
        product *= side
    if product >= _LONG:
        raise Refused("a tensor in it has an impossible shape")
    return product


def _check_key(key: Any) -> None:
    """Raises Refused for what cannot be a key of a dict, or is costly as one."""
    if key is None or type(key) in (str, bytes, bool, float, complex, _Global):
        return
    if type(key) is int and abs(key) < _LONG:
        return
    if type(key) is _Made and key.kind in _HASHED_BY_PLACE:
        return
    if type(key) is not _Tuple or key.size > _MAX_KEY:
        raise Refused("a key of a dict, or an element of a set, in it is none")
    for item in key.items:
        _check_key(item)


# --- what may be called ------------------------------------------------------------------------------------
# Each function gets the arguments of the call. One of another number is a TypeError, which is refused.


def _pairs(machine: _Machine, kind: str, pairs: Any) -> _Made:
    made = machine.make(kind)
    if pairs is None:
        return made
    is_list = type(pairs) is _Made and pairs.kind == "list"
    for pair in pairs.items if is_list else [None]:
        inner = pair.items if type(pair) is _Tuple or (type(pair) is _Made and pair.kind == "list") else ()
        if len(inner) != 2:
            raise Refused("it makes a dict of what are no pairs")
        machine.take(_ENTRY)
        machine.add_key(made, inner[0])
        made.items += inner
    return made


def _counter(machine: _Machine, counts: Any = None) -> _Made:
    made = machine.make("Counter")
    if counts is not None:
        if type(counts) is not _Made or counts.kind not in _MAPPINGS:
            raise Refused("it counts what is no dict")
        machine.take(_ENTRY * len(counts.items) // 2)
        for key in counts.items[::2]:
            machine.add_key(made, key)
        made.items += counts.items
    return made


def _set(machine: _Machine, elements: Any = None) -> _Made:
    made = machine.make("set")
    if elements is not None:
        if type(elements) is not _Made or elements.kind != "list":
            raise Refused("it makes a set of what is no list")
        machine.take(_ENTRY * len(elements.items))
        for element in elements.items:
            machine.add_key(made, element)
    return made


def _size(machine: _Machine, sides: Any) -> _Made:
    return machine.make("value", items=list(_sides(sides)))


def _named(machine: _Machine, name: Any, index: Any = 0) -> _Made:
    if type(name) is not str or len(name) > _MAX_NAME or not (_is_size(index) and index < 1 << 15):
        raise Refused("it names a device or a layout that does not exist")
    return machine.make("value")


def _complex(machine: _Machine, real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise Refused("it makes a complex number of what are no numbers")
    machine.take(_ITEM)
    return complex(real, imaginary)


def _encode(machine: _Machine, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("it encodes what is no text of bytes")
    machine.take(len(text))
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise Refused("it encodes what is no text of bytes") from error


def _bytearray(machine: _Machine, data: Any = b"", encoding: Any = None) -> _Made:
    found = _encode(machine, data, encoding) if encoding is not None else data
    if type(found) is not bytes:  # of a number it would be so many bytes
        raise Refused("it makes a bytearray of what are no bytes")
    made = machine.make("set")
    machine.take(len(found))
    return made


def _rebuild_v3(
    machine: _Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Made:
    kind = _dtype(dtype)
    return machine.tensor(storage, offset, size, stride, requires_grad, hooks, kind, metadata)


def _dtype(value: Any) -> torch.dtype:
    if type(value) is not _Made or not isinstance(value.dtype, torch.dtype) or value.kind != "value":
        raise Refused("it takes for a type of numbers what is none")
    return value.dtype


def _rebuild_v2(
    machine: _Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> _Made:
    return machine.tensor(storage, offset, size, stride, requires_grad, hooks, None, metadata)


def _rebuild(machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any) -> _Made:
    return machine.tensor(storage, offset, size, stride)


def _parameter(machine: _Machine, data: Any, requires_grad: Any = True, hooks: Any = None) -> _Made:
    machine.check_hooks(hooks)
    if type(data) is not _Made or data.kind != "tensor" or type(requires_grad) is not bool:
        raise Refused("it makes a parameter of what is no tensor")
    return machine.make("tensor", bytes=data.bytes, dtype=data.dtype)


def _parameter_with_state(machine: _Machine, data: Any, requires_grad: Any, hooks: Any, state: Any) -> _Made:
    machine.attributes(state)
    return _parameter(machine, data, requires_grad, hooks)


def _meta(machine: _Machine, dtype: Any, size: Any, stride: Any, requires_grad: Any) -> _Made:
    kind, sides, steps = _dtype(dtype), _sides(size), _sides(stride)
    if len(sides) != len(steps) or type(requires_grad) is not bool:
        raise Refused("a tensor in it has an impossible shape")
    _num_elements(sides)
    return machine.make("tensor", dtype=kind)


def _sparse(machine: _Machine, layout: Any, data: Any) -> _Made:
    if type(layout) is not _Made or layout.kind != "value" or type(data) is not _Tuple or len(data.items) not in (3, 4):
        raise Refused("it makes a sparse tensor of what is none")
    for part in data.items:
        if type(part) is _Made and part.kind == "tensor":
            machine.copy_of(part, part.bytes)
        elif part is not None and type(part) is not bool:
            _num_elements(_sides(part))
    return machine.make("tensor")


def _quantised(
    machine: _Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    parameters: Any,
    requires_grad: Any,
    hooks: Any,
) -> _Made:
    made = machine.tensor(storage, offset, size, stride, requires_grad, hooks)
    machine.copy_of(made, made.bytes)
    if type(parameters) is not _Tuple or len(parameters.items) not in (3, 4):
        raise Refused("it makes a quantised tensor of what is none")
    for part in parameters.items:
        if type(part) is _Made and part.kind == "tensor":
            machine.copy_of(part, part.bytes)
        elif type(part) is _Made and part.kind == "list":
            machine.take(_ITEM * len(part.items))
    return made


def _moved(machine: _Machine, data: Any, dtype: Any, device: Any, requires_grad: Any) -> _Made:
    kind = _dtype(dtype)
    if type(device) is not str or type(requires_grad) is not bool or type(data) is not _Made or data.dtype is None:
        raise Refused("it moves what is no tensor")
    machine.copy_of(data, data.bytes // data.dtype.itemsize * kind.itemsize)
    return machine.make("tensor", bytes=data.bytes, dtype=kind)


def _with_attributes(machine: _Machine, made_by: Any, kind: Any, args: Any, state: Any) -> _Made:
    is_rebuilt = type(made_by) is _Global and made_by.name in _REBUILDS and type(args) is _Tuple
    if not is_rebuilt or type(kind) is not _Global or kind.name not in (_PARAMETER, "torch.Tensor"):
        raise Refused("it makes a tensor of what is none")
    machine.attributes(state)
    return _REBUILDS[made_by.name](machine, *args.items)


def _numpy_number(machine: _Machine, dtype: Any, data: Any) -> _Made:
    machine.work(200)
    return machine.make("value")


_REBUILDS: dict[str, Callable[..., _Made]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _moved,
}
_CALLS: dict[str, Callable[..., Any]] = {
    **_REBUILDS,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    _PARAMETER: _parameter,
    "torch.Size": _size,
    "torch.device": _named,
    "torch.serialization._get_layout": _named,
    "collections.OrderedDict": lambda machine, pairs=None: _pairs(machine, "OrderedDict", pairs),
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.complex": _complex,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    stand_ins.DICT: lambda machine, *_: machine.make("dict"),
    stand_ins.LIST: lambda machine, *_: machine.make("list"),
    stand_ins.GETATTR: lambda machine, *_: machine.make("class"),
    **dict.fromkeys(stand_ins.NUMBERS, _numpy_number),
}
_NEVER_CALLED = ("torch.Tensor",)


def _steps() -> dict[bytes, tuple[Callable[[_Machine], None], int]]:
    """Returns {opcode: (what it does, how many bytes of memory it takes apart from what that counts)}."""
    push = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
    steps: dict[bytes, tuple[Callable[[_Machine], None], int]] = {
        opcode: (lambda machine, value=value: machine.stack.append(value), _ITEM) for opcode, value in push.items()
    }
    made = {pickle.EMPTY_LIST: "list", pickle.EMPTY_DICT: "dict", pickle.EMPTY_SET: "set"}
    for opcode, kind in made.items():
        steps[opcode] = (lambda machine, kind=kind: machine.container(kind), _SIZES[kind] + _ITEM)
    numbers = {
        pickle.BININT: ("<i", 4),
        pickle.BININT1: ("<B", 1),
        pickle.BININT2: ("<H", 2),
        pickle.BINFLOAT: (">d", 8),
    }
    for opcode, (form, size) in numbers.items():
        steps[opcode] = (lambda machine, form=form, size=size: machine.number(form, size), 40)
    for opcode, length in ((pickle.TUPLE1, 1), (pickle.TUPLE2, 2), (pickle.TUPLE3, 3)):
        steps[opcode] = (lambda machine, length=length: machine.short_tuple(length), _ITEM)
    steps |= {
        pickle.PROTO: (_Machine.proto, 0),
        pickle.MARK: (_Machine.mark, 80),
        pickle.LONG1: (_Machine.long, 48),
        pickle.BINUNICODE: (lambda m: m.text(int.from_bytes(m.read(4), "little"), "surrogatepass"), _ITEM),
        pickle.SHORT_BINSTRING: (lambda m: m.text(m.read(1)[0], "strict"), _ITEM),
        pickle.EMPTY_TUPLE: (lambda m: m.tuple_of(()), _ITEM),
        pickle.TUPLE: (lambda m: m.tuple_of(m.pop_mark()), _ITEM),
        pickle.BINPUT: (lambda m: m.put(m.read(1)[0]), _MEMO),
        pickle.LONG_BINPUT: (lambda m: m.put(int.from_bytes(m.read(4), "little")), _MEMO),
        pickle.BINGET: (lambda m: m.get(m.read(1)[0]), _ITEM),
        pickle.LONG_BINGET: (lambda m: m.get(int.from_bytes(m.read(4), "little")), _ITEM),
        pickle.APPEND: (lambda m: m.extend((m.pop(),)), 0),
        pickle.APPENDS: (lambda m: m.extend(m.pop_mark()), 0),
        pickle.SETITEM: (_Machine.set_item, 0),
        pickle.SETITEMS: (lambda m: m.set_items(m.pop_mark()), 0),
        pickle.GLOBAL: (_Machine.global_, _ITEM),
        pickle.REDUCE: (_Machine.reduce, _ITEM),
        pickle.NEWOBJ: (_Machine.new, _ITEM),
        pickle.BUILD: (_Machine.build, 0),
        pickle.BINPERSID: (_Machine.persistent, _ITEM),
    }
    return steps


_STEPS = _steps()
