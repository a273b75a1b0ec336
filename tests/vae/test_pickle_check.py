"""What no checkpoint needs is refused before anything is built, and all that torch saves is read."""

import collections
import datetime
import enum
import io
import pathlib
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from bounds import in_child
from pickles import (
    APPEND,
    BUILD,
    DICT,
    EMPTY,
    LIST,
    MARK,
    NEW,
    NOTHING,
    REDUCE,
    SET,
    SETITEM,
    call,
    dict_of,
    get,
    list_of,
    name,
    number,
    put,
    storage,
    tensor,
    text,
    tuple_of,
    whole,
    write_legacy,
    write_zip,
)
from tiny_vae import save_tiny_vae

from gait_latents.common.errors import UserError
from gait_latents.vae import containers, pickle_check
from gait_latents.vae.load import read_identity
from gait_latents.vae.weight_files import read_weights

MEMORY = 300_000_000  # bytes that a refusal may cost at most
ORDERED = "collections.OrderedDict"


def doubled(levels):
    """A tuple of one tuple twice, and so on: of 2 ** levels values, in a few bytes a level."""
    return number(1) + b"".join(put(i) + get(i) + b"\x86" for i in range(levels))


def often(body, times):
    """A list of the same bytes many times."""
    return LIST + MARK + body * times + b"e"


BIG_LIST = list_of(*(text(f"k{i}") for i in range(50_000)))
BIG_DICT = dict_of(*(text(f"k{i}") + NOTHING for i in range(50_000)))
BIG_TUPLE = MARK + NOTHING * 100_000 + b"t"
COLLIDING = b"".join(number(i * (2**61 - 1)) + NOTHING for i in range(1, 4))
HOSTILE = {
    "endless key": (dict_of(doubled(60), NOTHING), "a key of a dict"),
    "endless key, set singly": (DICT + doubled(60) + NOTHING + SETITEM, "a key of a dict"),
    "endless key inside another": (dict_of(tuple_of(doubled(60), number(1)), NOTHING), "a key of a dict"),
    "endless element of a set": (call("builtins.set", list_of(doubled(60))), "a key of a dict"),
    "endless element of an old set": (call("__builtin__.set", list_of(doubled(60))), "a key of a dict"),
    "endless key of an ordered dict": (call(ORDERED, list_of(tuple_of(doubled(60), NOTHING))), "a key of a dict"),
    "endless name of a type of numpy": (
        call("numpy.core.multiarray.scalar", call("numpy.dtype", doubled(60)), text("x")),
        None,
    ),
    "deep key": (dict_of(number(1) + b"\x85" * 100_000, NOTHING), "a key of a dict"),
    "a list as key": (dict_of(LIST, NOTHING), "a key of a dict"),
    "a list in a key": (dict_of(tuple_of(LIST), NOTHING), "a key of a dict"),
    "a large number as key": (dict_of(number(2**63), NOTHING), "a key of a dict"),
    "keys that collide": (
        dict_of(*(number((i * 2**40) % (2**62)) + NOTHING for i in range(1, 64_000))),
        "too many keys that are no texts",
    ),
    "bytearray of a number": (call("builtins.bytearray", number(2**32)), "a bytearray of what are no bytes"),
    "bytearray of a list": (call("builtins.bytearray", often(number(7), 9)), "a bytearray of what are no bytes"),
    "bytearray in UTF-32": (call("builtins.bytearray", text("a"), text("utf-32")), "it encodes"),
    "a slow encoding": (call("_codecs.encode", text("a" * 9), text("punycode")), "it encodes"),
    "bytes again and again": (
        text("a" * 1_000_000) + put(0) + often(name("_codecs.encode") + get(0) + text("latin1") + b"\x86R", 500),
        "far more memory",
    ),
    "a dict of pairs again and again": (
        list_of(*(tuple_of(text(f"k{i}"), NOTHING) for i in range(50_000)))
        + put(0)
        + often(name(ORDERED) + get(0) + b"\x85R", 500),
        "far more memory",
    ),
    "a set again and again": (
        BIG_LIST + put(0) + often(name("builtins.set") + get(0) + b"\x85R", 500),
        "far more memory",
    ),
    "a counter again and again": (
        BIG_DICT + put(0) + often(name("collections.Counter") + get(0) + b"\x85R", 500),
        "far more memory",
    ),
    "attributes again and again": (
        BIG_DICT + put(0) + often(name(ORDERED) + EMPTY + REDUCE + get(0) + BUILD, 500),
        "far more memory",
    ),
    "arguments again and again": (
        BIG_TUPLE + put(0) + often(name("other.Kind") + get(0) + NEW, 3000),
        "far more memory",
    ),
    "marks alone": (MARK * 1_000_000, "far more memory|a value is missing"),
    "sets alone": (often(SET, 1_000_000), "far more memory"),
    "too many stand-ins": (often(name("other.Kind") + EMPTY + NEW, 300_000), "too many objects"),
    "a tensor beyond its storage": (tensor(size=(2**40,)), "more bytes than its storage"),
    "a tensor beyond its storage by strides": (tensor(size=(2, 2), stride=(2**40, 1)), "more bytes than its storage"),
    "a tensor beyond its storage by its place": (tensor(offset=2**40), "more bytes than its storage"),
    "a tensor of negative sides": (tensor(size=(-1,)), "impossible shape"),
    "a tensor of too many sides": (tensor(size=(1,) * 100, stride=(1,) * 100), "impossible shape"),
    "more numbers than a long": (tensor(size=(2**32, 2**32), stride=(0, 0)), "impossible shape"),
    "a storage beyond the file": (storage(2**40), "more bytes than the file"),
    "a storage that is not there": (storage(1, "7"), "more bytes than the file"),
    "a storage in two ways": (list_of(storage(4), storage(2)), "in two ways"),
    "a storage of a class": (tuple_of(text("module"), *[NOTHING] * 4) + b"Q", "no storage"),
    "an endless reference": (doubled(60) + b"Q", "no storage"),
    "an empty tensor of torch": (call("torch.FloatTensor", number(2**40)), "holds torch.FloatTensor"),
    "a storage of torch": (call("torch.storage.UntypedStorage", number(2**40)), "calls what no checkpoint"),
    "a tensor of torch": (call("torch.Tensor", number(2**40)), "calls what no checkpoint"),
    "a shape of a million": (call("torch.Size", MARK + number(1) * 100_000 + b"t"), "impossible shape"),
    "a copied tensor that repeats itself": (
        call(
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            tensor(size=(2**34,), stride=(0,)),
            name("torch.float64"),
            text("cpu"),
            b"\x89",
        ),
        "copies more bytes",
    ),
    "a quantised tensor that repeats itself": (
        call(
            "torch._utils._rebuild_qtensor",
            storage(4, kind="torch.QInt32Storage"),
            number(0),
            tuple_of(number(2**36)),
            tuple_of(number(0)),
            tuple_of(name("torch.per_tensor_affine"), number(1), number(0)),
            b"\x89",
            call(ORDERED),
        ),
        "copies more bytes",
    ),
    "a sparse tensor that repeats itself": (
        call(
            "torch._utils._rebuild_sparse_tensor",
            call("torch.serialization._get_layout", text("torch.sparse_coo")),
            tuple_of(tensor(size=(1, 2**40), stride=(0, 0)), tensor(), tuple_of(number(2**60)), b"\x89"),
        ),
        "copies more bytes",
    ),
    "a nested tensor": (call("torch._utils._rebuild_nested_tensor", tensor()), "_rebuild_nested_tensor"),
    "an endless state in an error": (
        call(
            "torch._tensor._rebuild_from_type_v2",
            name("torch._utils._rebuild_parameter"),
            name("torch.Tensor"),
            tuple_of(tensor(), b"\x89", NOTHING),
            tuple_of(doubled(60), NOTHING, NOTHING),
        ),
        "attributes",
    ),
    "an attribute that hides a method": (
        call(
            "torch._utils._rebuild_parameter_with_state",
            tensor(),
            b"\x89",
            call(ORDERED),
            dict_of(text("float"), NOTHING),
        ),
        "attributes",
    ),
    "a dict whose items are hidden": (
        call(ORDERED) + dict_of(text("items"), NOTHING) + BUILD,
        "a state to what has none",
    ),
    "hooks": (
        call(
            "torch._utils._rebuild_parameter",
            tensor(),
            b"\x89",
            call(ORDERED, list_of(tuple_of(text("a"), NOTHING))),
        ),
        "hooks",
    ),
    "a call of a tuple": (tuple_of() + EMPTY + REDUCE, "calls what no checkpoint"),
    "a call with a list": (name(ORDERED) + LIST + REDUCE, "what is no tuple"),
    "a call with too much": (call("builtins.complex", NOTHING, NOTHING, NOTHING), "other arguments"),
    "items of a tensor": (tensor() + number(0) + number(1) + SETITEM, "what is no dict"),
    "items of a tuple": (tuple_of() + number(1) + APPEND, "what is no list"),
    "a state of a dict": (DICT + DICT + BUILD, "a state to what has none"),
    "a number out of turn": (NOTHING + put(2**31), "out of turn"),
    "a number of nothing": (get(7), "no value under the number 7"),
    "a missing value": (b"0", "opcode"),
    "a tuple of nothing": (b"\x86", "a value is missing"),
    "an unknown opcode": (b"\x95" + bytes(8), "opcode b'.x95'"),
    "a text that is not there": (b"X\xff\xff\xff\x7fabc", "ends in the middle"),
    "a name without an end": (b"cos" + b"a" * 100_000, "does not end"),
    "escapes in a name": (b"ccollections\\x2eabc\nFoo\\n\n" + EMPTY + REDUCE, None),
    "values left over": (NOTHING + NOTHING, "left over"),
    "eval": (call("builtins.eval", text("1")), "eval, which is no weight"),
    "eval of Python 2": (call("__builtin__.eval", text("1")), "eval, which is no weight"),
    "another program of Python": (call("ctypes.CDLL", text("libc.so.6")), "ctypes.CDLL, which is no weight"),
}


def refusal_of(path):
    with pytest.raises(UserError) as caught:
        read_identity(path)
    return str(caught.value)


@pytest.mark.parametrize("which", HOSTILE)
def test_what_no_checkpoint_needs_is_refused_at_little_cost(tmp_path, which):
    body, reason = HOSTILE[which]
    path = write_zip(tmp_path / "vae.pt", whole(body))

    def read():
        started = time.process_time()
        told = refusal_of(path)
        return told, time.process_time() - started

    (told, seconds), memory = in_child(read)
    assert memory < MEMORY and seconds < 60
    assert str(path) in told and len(told) < 600 and told.isprintable()
    if reason is not None:
        assert re.search(reason, told)


DEEP = {
    "lists": LIST + b"]" * 300_000 + APPEND * 300_000,
    "tuples": NOTHING + b"\x85" * 300_000,
    "dicts": DICT + (text("a") + DICT) * 300_000 + SETITEM * 300_000,
    "ordered dicts": call(ORDERED) + (text("a") + call(ORDERED)) * 20_000 + SETITEM * 20_000,
    "objects": NOTHING + b"".join([put(0), name("other.K"), get(0), b"\x85", NEW]) * 100_000,
    "states": name("other.K") + EMPTY + NEW + (name("other.K") + EMPTY + NEW) * 100_000 + BUILD * 100_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEEP)
def test_depth_overflows_nothing(tmp_path, kind):
    path = write_zip(tmp_path / "vae.pt", whole(DEEP[kind]))
    told, memory = in_child(lambda: refusal_of(path))
    assert ("not a KL-VAE" in told or "other.K" in told or "left over" in told) and memory < 900_000_000


def test_a_value_may_hold_itself(tmp_path):
    body = DICT + put(0) + text("a") + LIST + get(0) + APPEND + SETITEM
    tree = read_weights(write_zip(tmp_path / "vae.pt", whole(body))).tree
    assert tree["a"][0] is tree


@pytest.mark.parametrize("limit", ["MAX_OPCODES", "MAX_PICKLE_BYTES"])
def test_long_pickles_are_refused(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(pickle_check, limit, 1000)
    path = write_zip(tmp_path / "vae.pt", whole(often(text("abc"), 2000)))
    assert "more than" in refusal_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_ctrl_c_ends_the_reading_of_a_long_pickle(tmp_path, form):
    data = whole(often(dict_of(text("a"), number(1)), 1_000_000))
    path = write_zip(tmp_path / "vae.pt", data) if form == "zip" else write_legacy(tmp_path / "vae.pt", data)
    code = (
        "import sys; from pathlib import Path; from gait_latents.vae.weight_files import read_weights\n"
        "print('begins', flush=True)\n"
        "try:\n    read_weights(Path(sys.argv[1]))\nexcept KeyboardInterrupt:\n    sys.exit(7)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "begins\n"
        time.sleep(0.5)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 7


# --- what is read ------------------------------------------------------------------------------------------


class Mode(enum.Enum):
    """A setting of a training program."""

    FAST = 1


def contents_of_checkpoints():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    marked = torch.nn.Parameter(torch.rand(3))
    marked.is_special = True  # pyright: ignore[reportAttributeAccessIssue]
    shared = torch.rand(6)
    return {
        "state": network.state_dict(),
        "parameters": dict(network.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "averages": {"decay": 0.999, "shadow_params": list(network.parameters()), "num_updates": 7},
        "views": [shared, shared[2:4], shared.view(2, 3).T, shared[:1].expand(5), torch.zeros(0, 3)],
        "types": [torch.zeros(2, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.int64, torch.bool)],
        "eighths": torch.zeros(2).to(torch.float8_e4m3fn),
        "complex": [torch.zeros(2, dtype=torch.complex64), 1 + 2j, torch.zeros(2, dtype=torch.complex64).conj()],
        "sparse": torch.eye(3).to_sparse(),
        "marked": marked,
        "meta": torch.zeros(3, device="meta"),
        "shape": torch.zeros(2, 3).shape,
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "layout": torch.strided,
        "bytes": [b"", b"abc\xff", bytearray(b"abc")],
        "sets": [set(), {1, 2}, {"a"}, frozenset({1})],
        "counter": collections.Counter(a=2),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, a=[1]),
        "queue": collections.deque([1, 2], maxlen=4),
        "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 0.5, float("nan"), True, None],
        "texts": ["", "ä", "\u4e2d", "a" * 1000],
        "numpy": [np.float32(2), np.float64(2), np.int64(3), np.arange(6).reshape(2, 3), np.dtype("int8")],
        "path": pathlib.Path("a/b"),
        "date": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "mode": Mode.FAST,
        "keys": {1: 2, (1, "a"): 3, 1.5: 4, None: 5, torch.float32: 6, Mode.FAST: 7},
        "history": dict.fromkeys(range(1, 2000), 0.5),
        "random": torch.get_rng_state(),
    }


def plain(value):
    """Brings what torch gives to what can be compared."""
    if isinstance(value, torch.Tensor):
        is_plain = value.layout == torch.strided and value.device.type == "cpu" and value.element_size() > 1
        return str(value.dtype), tuple(value.shape), value.tolist() if is_plain else None
    if isinstance(value, dict):
        return [(plain(key), plain(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return repr(value)


@pytest.mark.parametrize("kind", contents_of_checkpoints())
@pytest.mark.parametrize("form", ["zip", "zip 3", "legacy"])
def test_all_that_checkpoints_hold_is_read(tmp_path, kind, form):
    content = contents_of_checkpoints()[kind]
    path = tmp_path / "vae.pt"
    protocol = 3 if form == "zip 3" else 2
    try:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy", pickle_protocol=protocol)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch does not save it: {error}")
    try:
        found = read_weights(path)
    except UserError as error:
        if kind == "eighths" and form == "legacy":  # torch cannot read what it wrote there
            return
        assert protocol == 3 and "opcode" in str(error)  # of bytes, which torch's unpickler does not know either
        return
    if kind in (
        "state",
        "parameters",
        "optimizer",
        "averages",
        "views",
        "types",
        "keys",
        "history",
        "texts",
        "counter",
    ):
        if kind != "keys":
            assert plain(found.tree) == plain(content)
        else:
            assert list(found.tree.values()) == list(content.values())
    assert found.foreign in ((), (f"{Mode.__module__}.Mode",))


def test_large_arrays_of_numpy_are_read(tmp_path):
    array = np.random.default_rng(0).random(3_000_000)  # which the pickle holds as a text of 36 MB
    torch.save({"array": array, "a": torch.ones(2)}, tmp_path / "vae.pt")
    assert read_weights(tmp_path / "vae.pt").tree["a"].tolist() == [1, 1]


def test_other_code_that_allows_classes_changes_nothing(tmp_path):
    torch.save({"mode": Mode.FAST}, tmp_path / "vae.pt")
    with torch.serialization.safe_globals([Mode]):
        before = set(torch.serialization.get_safe_globals())
        assert not isinstance(read_weights(tmp_path / "vae.pt").tree["mode"], Mode)
        assert set(torch.serialization.get_safe_globals()) == before


# --- containers --------------------------------------------------------------------------------------------


def ended(path, change):
    """Changes the last bytes of an archive."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def with_python(path, *, compress=False, twice=False, comment=b"", other_case=False):
    """Writes an archive as Python does, of what torch writes."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for record, data in records.items():
            archive.writestr(record, data)
            if record.endswith("data.pkl") and twice:
                archive.writestr(record, data)
            if record.endswith("data.pkl") and other_case:
                archive.writestr(record.upper(), data)
        archive.comment = comment


def put_at(place, value):
    def change(data):
        data[len(data) + place : len(data) + place + len(value)] = value

    return change


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: with_python(p, compress=True), "was compressed after torch.save made it"),
        (lambda p: with_python(p, twice=True), "have one name"),
        (lambda p: with_python(p, other_case=True), "have one name"),
        (lambda p: with_python(p, comment=b"x" * 30), "does not end like"),
        (lambda p: p.write_bytes(p.read_bytes() + bytes(8)), "does not end like"),
        (lambda p: ended(p, put_at(-10, struct.pack("<I", 2**31))), "ends differ|should be"),  # bytes of the directory
        (lambda p: ended(p, put_at(-34, struct.pack("<Q", 3))), "second end"),  # where the locator points
        (lambda p: ended(p, put_at(-12, struct.pack("<H", 9))), "ends differ|not end like"),  # number of records
        (lambda p: ended(p, put_at(-98 + 32, struct.pack("<Q", 9))), "second end"),
    ],
)
def test_archives_that_torch_does_not_write_are_refused(tmp_path, change, reason):
    save_tiny_vae(tmp_path / "vae.pt")
    change(tmp_path / "vae.pt")
    assert re.search(reason, refusal_of(tmp_path / "vae.pt"))


def test_an_archive_that_python_packed_anew_is_read(tmp_path):
    saved = save_tiny_vae(tmp_path / "vae.pt")
    with_python(tmp_path / "vae.pt")
    assert read_identity(tmp_path / "vae.pt").fingerprint == saved.fingerprint


def sparse_end(path, size, start, length, count):
    """Makes a file of holes that ends like a large archive."""
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, size - 98, 1)
    small = [min(count, 0xFFFF)] * 2 + [min(length, 0xFFFFFFFF), min(start, 0xFFFFFFFF)]
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(size - 98)
        file.write(end64 + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *small, 0))


def sparse_files(folder):
    """Makes files of 100 GB, of holes, that begin and end like each kind of weights."""
    size = 100 << 30
    sparse_end(folder / "directory.pt", size, 98, size - 98 - 98, (size - 196) // 46)
    sparse_end(folder / "entries.ckpt", size, size - 98 - 46 * 10**6, 46 * 10**6, 10**6)
    (folder / "legacy.bin").write_bytes(b"\x80\x02" + b"N" * 100)
    torch.save({"a": torch.rand(3)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    header = b'{"encoder.conv_in.weight":{"dtype":"F16","shape":[32,3,20000,20000],"data_offsets":[0,76800000000]}}'
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "long.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    (folder / "unknown.pt").write_bytes(b"")
    (folder / "array.pth").write_bytes(b"\x93NUMPY\1\0")
    with (folder / "a.safetensors").open("r+b") as file:
        file.truncate(8 + len(header) + 76_800_000_000)
    for path in folder.iterdir():
        if path.stat().st_size < size and path.name != "a.safetensors":
            with path.open("r+b") as file:
                file.truncate(size)
    return sorted(folder.iterdir())


def test_files_of_a_hundred_gigabytes_of_nothing_cost_nothing(tmp_path):
    paths = sparse_files(tmp_path)
    told, memory = in_child(lambda: [refusal_of(path) if path.name != "old.pt" else "" for path in paths])
    assert len(told) == 9 and memory < MEMORY
    assert read_weights(tmp_path / "old.pt").tree["a"].shape == (3,)  # what comes after its end is not looked at


def test_a_tensor_of_a_hundred_gigabytes_of_nothing_costs_nothing(tmp_path):
    path, count = tmp_path / "vae.pt", 25 * 10**9
    saved = whole(dict_of(text("encoder.conv_in.weight"), tensor(count, size=(count,))))
    refused = write_zip(tmp_path / "small.pt", saved)
    assert "more bytes than the file" in refusal_of(refused)
    legacy = write_legacy(path, saved, {"0": bytes(16)})
    with legacy.open("r+b") as file:
        file.truncate(4 * count + 10**6)
    told, memory = in_child(lambda: refusal_of(legacy))
    assert memory < MEMORY and ("to be read whole" in told or "another way" in told or "opcode" in told)


def test_facts_of_an_archive_are_short(tmp_path):
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "vae.pt"))
    for record, data in {"data.pkl": whole(DICT), "byteorder": b"little" * 10_000}.items():
        writer.write_record(record, data, len(data))
    writer.write_end_of_file()
    assert "its record byteorder has more than 1,024 bytes" in refusal_of(tmp_path / "vae.pt")


def test_a_tar_archive_that_begins_like_a_pickle_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("\x80\x02N.storages"), io.BytesIO())
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[:2], data[148:156] = b"\x80\x02", b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "vae.pt").write_bytes(data)
    with tarfile.open(tmp_path / "vae.pt", "r:") as archive:  # it is one
        assert len(archive.getnames()) == 1
    assert "cannot be read as a PyTorch checkpoint" in refusal_of(tmp_path / "vae.pt")
    assert not hasattr(containers.MappedFile(tmp_path / "vae.pt"), "fileno")


@pytest.mark.parametrize("keys", [[], ["0", "0"], ["1"], ["0", "1"]])
def test_an_older_file_lists_its_storages(tmp_path, keys):
    storage_of_legacy = tuple_of(
        text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4), NOTHING
    )
    path = write_legacy(tmp_path / "vae.pt", whole(storage_of_legacy + b"Q"), {"0": bytes(16)})
    assert read_weights(path).tree is not None
    data = path.read_bytes()
    listed = pickle.dumps(["0"], 2)
    assert data.count(listed) == 1
    path.write_bytes(data.replace(listed, pickle.dumps(keys, 2)))
    assert "lists" in refusal_of(path)
