"""Pickles written opcode by opcode, and the two containers of torch.save around them."""

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

NOTHING, MARK, TUPLE, REDUCE, BUILD, NEW, STOP = b"N", b"(", b"t", b"R", b"b", b"\x81", b"."
DICT, LIST, EMPTY, SETITEM, APPEND, SET = b"}", b"]", b")", b"s", b"a", b"\x8f"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(full: str) -> bytes:
    module, _, rest = full.rpartition(".")
    return f"c{module}\n{rest}\n".encode()


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + TUPLE


def list_of(*items: bytes) -> bytes:
    return LIST + MARK + b"".join(items) + b"e"


def dict_of(*items: bytes) -> bytes:
    return DICT + MARK + b"".join(items) + b"u"


def call(full: str, *args: bytes) -> bytes:
    return name(full) + tuple_of(*args) + REDUCE


def storage(count: int, key: str = "0", kind: str = "torch.FloatStorage") -> bytes:
    return tuple_of(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(count: int = 4, offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,)) -> bytes:
    """A tensor in the storage "0", which holds `count` numbers."""
    shape, steps = (tuple_of(*map(number, values)) for values in (size, stride))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage(count), number(offset), shape, steps, b"\x89", hooks)


def whole(body: bytes) -> bytes:
    """A pickle of protocol 2 that builds one value."""
    return b"\x80\x02" + body + STOP


def write_zip(path: Path, data: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Writes the container of today's torch.save; the storage "0" has 16 bytes where none are given."""
    writer = torch._C.PyTorchFileWriter(str(path))
    records = {"data.pkl": data, "byteorder": b"little"}
    records |= {f"data/{key}": value for key, value in (storages or {"0": bytes(16)}).items()}
    for key, value in records.items():
        writer.write_record(key, value, len(value))
    writer.write_end_of_file()
    return path


def write_legacy(path: Path, data: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Writes the older container, of storages of four bytes for each number."""
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}))
    kept = storages or {}
    body = b"".join(struct.pack("<q", len(value) // 4) + value for value in kept.values())
    path.write_bytes(head + data + pickle.dumps(list(kept), 2) + body)
    return path
