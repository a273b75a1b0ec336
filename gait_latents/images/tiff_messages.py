"""What libtiff says while it decodes: kept for the reason of a refusal, instead of printed without the file's name.

libtiff, which Pillow uses for compressed TIFF files, prints its errors and warnings on the descriptor of stderr, beside
whatever Python prints. It has one handler of each for the whole process, which it calls in the thread that decodes.
"""

import ctypes
import functools
import threading
from typing import Any

from PIL import _imaging

_LONGEST, _MOST = 200, 4  # bytes of a message, and messages of one picture
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)  # module, format, va_list
_SETTERS = ("TIFFSetErrorHandler", "TIFFSetWarningHandler")

_kept = threading.local()


def start() -> None:
    """Forgets what libtiff said in this thread."""
    _kept.errors = []


def errors() -> list[str]:
    """Returns the first errors of libtiff in this thread since `start`."""
    return getattr(_kept, "errors", [])


@_HANDLER
def _keep_error(_module: bytes | None, form: bytes | None, arguments: int | None) -> None:
    if len(errors()) < _MOST:
        text = ctypes.create_string_buffer(_LONGEST)
        _print_into()(text, _LONGEST, form, arguments)
        errors().append(text.value.decode("utf-8", "replace"))


@_HANDLER
def _drop_warning(_module: bytes | None, _form: bytes | None, _arguments: int | None) -> None:
    """A warning is about what does not change the pixels, such as a tag that libtiff does not know."""


@functools.cache
def _print_into() -> Any:
    """Returns C's vsnprintf, which puts the arguments of a message into its text."""
    function = ctypes.CDLL(None).vsnprintf
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]
    return function


@functools.cache
def _setters() -> list[Any]:
    """Returns libtiff's functions that set a handler and return the one before; none where Pillow hides its libtiff."""
    library = ctypes.CDLL(_imaging.__file__)  # whose functions and those of the libraries that it uses are found
    try:
        found = [getattr(library, name) for name in _SETTERS]
    except AttributeError:
        return []
    for function in found:
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    return found


def take_over() -> list[int | None]:
    """Lets libtiff tell us instead of stderr; returns the handlers before, for `give_back`."""
    ours = [ctypes.cast(handler, ctypes.c_void_p) for handler in (_keep_error, _drop_warning)]
    return [setter(handler) for setter, handler in zip(_setters(), ours, strict=False)]


def give_back(handlers: list[int | None]) -> None:
    """Sets the handlers that were there before."""
    for setter, handler in zip(_setters(), handlers, strict=True):
        setter(handler)
