"""How large images are, read from the first bytes of their files."""

import struct
from dataclasses import dataclass

from gait_latents.images import reading

_NO_CONTENT = frozenset({0x01, *range(0xD0, 0xD9)})  # markers of a JPEG that stand alone
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APP1 = 0xE1  # with the EXIF data, which may turn the picture
_MOST_LAYOUTS = 4
# How the tag of the turn is written in EXIF data up to its value, in both orders of bytes.
_ORIENTATIONS = (b"\x12\x01\x03\0\x01\0\0\0", b"\x01\x12\0\x03\0\0\0\x01\0")
_ON_ITS_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True)
class Shape:
    """The size of an image as it is seen, in pixels, and the bits of its values: 8 or 16."""

    width: int
    height: int
    bits: int = 8

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def cut_away(self) -> float:
        """The share of its area, from 0 to 1, that is lost when the centre is cut out as a square."""
        return 1 - min(self.width, self.height) / max(self.width, self.height)


@dataclass(frozen=True)
class _Layout:
    """Where size and turn stand in a JPEG, and the bytes there; the files of a data set mostly agree in them."""

    size_at: int
    size: bytes
    turn_at: int
    turn: bytes
    shape: Shape


class ShapeReader:
    """Reads the shapes of many images; any number of threads may use it at once."""

    def __init__(self) -> None:
        self._layouts: tuple[_Layout, ...] = ()  # of the last JPEGs that differed

    def shape_of(self, data: bytes) -> Shape | None:
        """Returns the shape of an image, given the bytes of its file; None where its header cannot be read."""
        for layout in self._layouts:
            if data.startswith(layout.size, layout.size_at) and data.startswith(layout.turn, layout.turn_at):
                return layout.shape
        if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 24:
            width, height, bits = struct.unpack_from(">IIB", data, 16)
            return Shape(width, height, 16 if bits == 16 else 8) if _is_possible(width, height) else None
        layout = _jpeg_layout(data) if data.startswith(b"\xff\xd8") else None
        if layout is not None:
            self._layouts = (layout, *self._layouts)[:_MOST_LAYOUTS]
            return layout.shape
        size = reading.header(data)
        return None if size is None else Shape(*size)


def _is_possible(width: int, height: int) -> bool:
    return 0 < width * height <= reading.MAX_PIXELS


def _jpeg_layout(data: bytes) -> _Layout | None:
    """Finds the size and the turn of a JPEG; None where it is no whole header."""
    at, turn_at, turn = 2, 0, data[:4]
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, at + 5)
            if not _is_possible(width, height):
                return None
            shape = Shape(height, width) if turn[-1] in _ON_ITS_SIDE and turn_at else Shape(width, height)
            return _Layout(at, data[at : at + 9], turn_at, turn, shape)
        if marker in _NO_CONTENT or marker == 0xFF:
            return None
        if marker == _APP1 and data.startswith(b"Exif", at + 4):
            for entry in _ORIENTATIONS:
                place = data.find(entry, at, at + length)
                if place > 0:
                    turn_at, turn = place, data[place : place + len(entry) + 1]
        at += 2 + length
    return None
