"""What a file is by its first bytes, where it is none of the image formats that are read."""

import re

_CONVERT = "which is not read; convert it to PNG or JPEG"
_AGAIN = "not an image; download it again"
_UNPACK = "not an image; unpack it"
_ARRAY = "not an image; save what it holds as PNG"
# (place in the file, bytes there, what it is). No file of a format that is read begins like any of them.
_BEGINNINGS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git-LFS pointer instead of the image; run `git lfs pull`"),
    (0, b"\0\0\0\x0cjP  ", f"a JPEG 2000 picture, {_CONVERT}"),
    (0, b"\xff\x4f\xff\x51", f"a JPEG 2000 picture, {_CONVERT}"),
    (0, b"\0\0\0\x0cJXL ", f"a JPEG XL picture, {_CONVERT}"),
    (0, b"\xff\x0a", f"a JPEG XL picture, {_CONVERT}"),
    (0, b"\xff\xd8\xff\xf7", f"a JPEG-LS picture, {_CONVERT}"),
    (0, b"8BPS", f"a Photoshop picture, {_CONVERT}"),
    (0, b"gimp xcf", f"a GIMP picture, {_CONVERT}"),
    (0, b"\0\0\1\0", f"an ICO picture, {_CONVERT}"),
    (0, b"icns", f"an ICNS picture, {_CONVERT}"),
    (0, b"DDS ", f"a DDS picture, {_CONVERT}"),
    (0, b"qoif", f"a QOI picture, {_CONVERT}"),
    (0, b"v/1\1", f"an OpenEXR picture, {_CONVERT}"),
    (0, b"#?RADIANCE", f"a Radiance HDR picture, {_CONVERT}"),
    (0, b"AT&TFORM", f"a DjVu document, {_CONVERT}"),
    (0, b"II*\0\x10\0\0\0CR", f"a camera's raw file (CR2), {_CONVERT}"),
    (0, b"FUJIFILMCCD-RAW", f"a camera's raw file (RAF), {_CONVERT}"),
    (0, b"IIRO", f"a camera's raw file (ORF), {_CONVERT}"),
    (0, b"IIU\0", f"a camera's raw file (RW2), {_CONVERT}"),
    (128, b"DICM", f"a DICOM file, {_CONVERT}"),
    (0, b"SIMPLE  =", f"a FITS file, {_CONVERT}"),
    (0, b"\x93NUMPY", f"a NumPy array, {_ARRAY}"),
    (0, b"MATLAB 5.0", f"a MATLAB file, {_ARRAY}"),
    (0, b"\x89HDF\r\n", f"an HDF5 file (MATLAB's, too), {_ARRAY}"),
    (0, b"%!PS", "PostScript, not an image"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript, not an image"),
    (0, b"%PDF", "a PDF, not an image"),
    (0, b"PK\3\4", f"a zip archive, {_UNPACK}"),
    (0, b"\x1f\x8b", f"a gzip archive, {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive, {_UNPACK}"),
    (0, b"Rar!\x1a\7", f"a RAR archive, {_UNPACK}"),
    (257, b"ustar", f"a tar archive, {_UNPACK}"),
    (0, b"\0\5\x16\7", "what macOS notes about a file (AppleDouble), not an image; remove it"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM), not an image"),
    (8, b"AVI ", "a video (AVI), not an image"),
    (8, b"WAVE", "a sound (WAV), not an image"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a file of Windows (such as Thumbs.db), not an image; remove it"),
)
_READ = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")  # the commonest of the formats that are read
# The brands of the container that these formats share with videos, by their first letters.
_BRANDS = (
    (b"avi[fs]", f"an AVIF picture, {_CONVERT}"),
    (b"hei[cmsx]|hev[cmsx]|mif1|msf1|mif2|miaf", f"a HEIC picture, {_CONVERT}"),
    (b"crx ", f"a camera's raw file (CR3), {_CONVERT}"),
    (b"", "a video (MP4 or QuickTime), not an image"),
)


def stranger(data: bytes) -> str | None:
    """Says what a file is that begins like no format that is read, and what to do; None for any other file."""
    if data.startswith(_READ) and not data.startswith(b"\xff\xd8\xff\xf7"):
        return None
    for place, beginning, what in _BEGINNINGS:
        if data.startswith(beginning, place):
            return what
    if data.startswith(b"ftyp", 4):
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 64)]  # the first one, a version, and compatible ones
        first, others = brands[:4], b" ".join(brands[at : at + 4] for at in range(8, len(brands), 4))
        if re.match(b"mif|msf|mia", first) and re.search(rb"avi[fs]", others):
            first = b"avif"
        return next(what for brand, what in _BRANDS if re.match(brand, first))
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"<"):
        return _markup(start)
    return None


def _markup(start: bytes) -> str:
    if re.search(rb"<!doctype html|<html|<head|<body|<script|<title", start):
        return f"a web page, {_AGAIN}"
    if b"<svg" in start:
        return "an SVG drawing, not an image of pixels; convert it to PNG"
    return f"an XML text, {_AGAIN}"


def plain_text(data: bytes) -> str | None:
    """Says of a file that no reader takes that it is a text, with its beginning, such as an error message; else None.

    Some images are texts, too, so this is asked after reading has failed.
    """
    try:
        text = data[:200].decode("ascii")
    except UnicodeDecodeError:
        return None
    shown = " ".join(text.split())[:60]
    if not shown or not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    kind = "a JSON text" if shown[0] in "{[" else "a text"
    return f"{kind}, {_AGAIN} (it begins {shown!r})"
