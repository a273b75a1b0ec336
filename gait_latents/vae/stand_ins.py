"""What takes the place of classes in a pickle that are not tensors: stand-ins that keep what they are given.

None of these classes is imported or called. Of Python's own library only the names listed here are taken: a checkpoint
needs no others, and those that run code are there.
"""

import _compat_pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any


class Inert:
    """Stands in the place of an object in a checkpoint that no weight depends on; keeps the arguments and the state."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.args = args
        return inert

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain_dict(*_factory: Any) -> dict[Any, Any]:
    """Stands in the place of collections.defaultdict."""
    return {}


def _plain_list(*_: Any) -> list[Any]:
    """Stands in the place of collections.deque."""
    return []


def _inert_class(*_: Any) -> type[Inert]:
    """Stands in the place of getattr, by which pickles name members of enums and classes in classes."""
    return Inert


_NUMPY_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "u4": "I", "u8": "Q", "b1": "?"}


def _number(dtype: Any, data: Any) -> Any:
    """Returns the number in a pickled numpy scalar, or its bytes where it is of another type."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if not isinstance(code, str) or code not in _NUMPY_FORMATS or not isinstance(data, bytes):
        return data
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    big_endian = isinstance(order, str) and order == ">"
    return struct.unpack((">" if big_endian else "<") + _NUMPY_FORMATS[code], data)[0]


# What training checkpoints often hold of Python's own library and of numpy. None of it is given to the unpickler, which
# gets a stand-in: numpy's types were not made to be restored from hostile bytes, and only single numbers are needed.
INERT = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.bytes",
    "builtins.frozenset",
    "builtins.object",
    "builtins.range",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "builtins.type",
    "copyreg._reconstructor",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "decimal.Decimal",
    "functools.partial",
    "logging.getLogger",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"{module}.{kind}"
        for module in ("pathlib", "pathlib._local")
        for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    "re._compile",
    "types.SimpleNamespace",
    "typing.Any",
    "typing.Optional",
    "typing.Union",
    "uuid.UUID",
)
DICT, LIST, GETATTR = "collections.defaultdict", "collections.deque", "builtins.getattr"
NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
PLAIN_TYPES = ("builtins.list", "builtins.dict", "builtins.int", "builtins.float")  # named, but never called
_SPECIAL: dict[str, Any] = {
    DICT: _plain_dict,
    LIST: _plain_list,
    GETATTR: _inert_class,
    **dict.fromkeys(NUMBERS, _number),
    **dict(zip(PLAIN_TYPES, (list, dict, int, float), strict=True)),
}


def is_known(name: str) -> bool:
    """Says whether a name of Python's own library or of numpy has a stand-in."""
    return name in INERT or name in _SPECIAL


def is_of_python(name: str) -> bool:
    """Says whether a name is of Python's own library; protocol 2 has the names of Python 2 for what has moved since."""
    module, dot, _ = name.partition(".")
    return not dot or not module or module in sys.stdlib_module_names or module in _compat_pickle.IMPORT_MAPPING


def stand_ins(known: frozenset[str], foreign: Mapping[str, str]) -> list[Any]:
    """Returns (stand-in, name) for what a pickle names.

    Args:
        known: names for which `is_known` holds.
        foreign: {class of another program: what its objects take: "nothing", "dict" items or "list" items}.
    """
    # Inert itself is what the stand-in of getattr returns.
    pairs = [(_SPECIAL.get(name, Inert), name) for name in sorted({*known, "builtins.object"})]
    makers = {
        "nothing": lambda: type("_StandIn", (Inert,), {}),
        "dict": lambda: _items_stand_in(OrderedDict),
        "list": lambda: _items_stand_in(list),
    }
    return pairs + [(makers[takes](), name) for name, takes in foreign.items()]


def _items_stand_in(container: type) -> type:
    """Returns a stand-in whose instances are plain containers, which take items."""

    class Items:
        def __new__(cls, *_: Any) -> Any:
            return container()

    return Items
