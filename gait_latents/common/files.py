"""Publishing files, so that each appears under its name whole and on the disk or not at all; and careful reading.

A file is written under a temporary name, synced, and renamed. Every file-system call is spelt `os.<name>`, so that a
test can replace any of them by one that fails.
"""

# os and descriptors instead of pathlib, which can neither sync a file nor create one exclusively with a mode.
# ruff: noqa: PTH102, PTH104, PTH106, PTH108

import errno
import functools
import hashlib
import os
import socket
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path

from gait_latents.common.errors import UserError, let_shortage_pass


def check_writable(folder: Path, setting: str, *, by_trying: bool = True) -> None:
    """Raises UserError, naming the setting, when files cannot be made in a folder; it need not exist yet.

    Args:
        by_trying: whether to make a file; otherwise permissions decide, so that a full disk is no obstacle.
    """
    reason = why_not_writable(folder) if by_trying else why_not_permitted(folder)
    if reason is not None:
        raise UserError(f"--{setting} {folder} cannot be written to ({reason}); give another, or mend that one")


TEMPORARY_PREFIX = ".tmp-"
_STALE_SECONDS = 24 * 3600  # age at which a temporary of another machine counts as abandoned
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # what file systems without folder syncing answer
_CANNOT_RENAME = {errno.EPERM, errno.ENOTSUP, errno.EXDEV}  # what object-store mounts answer
_REPLY_LOST = {errno.ENOENT, errno.EIO}  # what NFS may answer to a rename that took place
Buffer = bytes | bytearray | memoryview


def publish(
    path: str | os.PathLike[str], data: Buffer | Sequence[Buffer], *, below: str | os.PathLike[str] | None = None
) -> None:
    """Writes `data` (one buffer, or several in a row) as `path`, replacing what had that name, be it a link.

    Returns only when the content and the name have reached the disk; missing folders are made.

    Args:
        below: the folder that the file must stay in: it has to be there, and no folder on the way from it to the file
            may be a link. None makes and follows whatever leads to the file, as suits a path that the user names.

    Raises:
        OSError: naming `path`. The old file, if any, is then whole and no temporary is left; only where the
            sync of the folder failed is the new file in place, though it may not outlive a power cut.
    """
    path, top = Path(path).absolute(), None if below is None else Path(below).absolute()
    views = [memoryview(part) for part in ([data] if isinstance(data, Buffer) else data)]
    chunks = [view.cast("B") for view in views if view.nbytes]
    if top is not None:
        refuse_links(path, below=top)
    try:
        try:
            _publish_once(path, chunks, top)
        except FileNotFoundError:  # another process removed the temporary or the folder meanwhile: write once more
            _publish_once(path, chunks, top)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def appending(path: str | os.PathLike[str]) -> Iterator[BufferedWriter]:
    """Opens a file that is there to write at its end, which does not wait for the disk.

    Raises:
        OSError: naming `path`, when that fails, or when a link or anything else but a file has that name.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
    with naming(path), open(_open_regular(path, flags), "ab") as file:
        yield file


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Makes a folder and what is missing above it, each name safely on the disk; raises OSError, naming it."""
    with naming(folder):
        _make_folder(Path(folder).absolute())


def _publish_once(path: Path, chunks: list[memoryview], top: Path | None) -> None:
    folder = path.parent
    _make_folder(folder, top)
    temporary = folder / _temporary_name()
    written = _write_new(temporary, chunks)
    try:
        _put_in_place(temporary, path, chunks, written)
    except BaseException:
        _discard(temporary)
        raise
    _sync_folder(folder)
    # A killed process may have made the folder and not got to sync its name.
    _sync_if_allowed(folder.parent)


def _write_new(path: Path, chunks: list[memoryview]) -> os.stat_result:
    """Creates `path`, fills and syncs it, and returns its checked stat; removes it when that fails."""
    # Mode 0666 leaves the umask to decide; the tempfile module would force 0600.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return _fill_and_close(descriptor, chunks)
    except BaseException:
        _discard(path)
        raise


def _fill_and_close(descriptor: int, chunks: list[memoryview]) -> os.stat_result:
    size = sum(map(len, chunks))
    try:
        for chunk in chunks:
            _write_all(descriptor, chunk)
        os.fsync(descriptor)  # never repeated: after a failure the kernel may have dropped the pages
        status = os.fstat(descriptor)
        if status.st_size != size:
            raise OSError(errno.EIO, f"the file system kept {status.st_size} bytes of {size}")
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    os.close(descriptor)  # network file systems may report a full disk only here
    return status


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        count = os.write(descriptor, chunk)
        if count == 0:
            raise OSError(errno.EIO, "the file system takes no more bytes and gives no reason")
        chunk = chunk[count:]


def _put_in_place(temporary: Path, path: Path, chunks: list[memoryview], written: os.stat_result) -> None:
    """Renames `temporary` to `path`; where the file system cannot rename, writes `path` itself."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in _REPLY_LOST and _is_same_file(path, written):
            return
        if error.errno not in _CANNOT_RENAME:
            raise
        try:
            _write_new(path, chunks)  # a reader may see half of it for a moment, but each checks a checksum
        except FileExistsError:
            raise error from None
        _discard(temporary)


def _is_same_file(path: Path, written: os.stat_result) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (found.st_ino, found.st_dev, found.st_size) == (written.st_ino, written.st_dev, written.st_size)


def _make_folder(folder: Path, top: Path | None = None) -> None:
    """Makes `folder` and what is missing above it, but not `top`; each name is synced before the next is made."""
    if folder.is_dir():
        return
    if folder == top:
        raise FileNotFoundError(errno.ENOENT, "its folder is not there any more", str(folder))
    _make_folder(folder.parent, top)
    with suppress(FileExistsError):  # another writer was faster; a plain file here fails at the next step
        os.mkdir(folder)
    _sync_folder(folder.parent)
    _sync_if_allowed(folder.parent.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def _sync_if_allowed(folder: Path) -> None:
    """Syncs a folder that others made, and that may not be readable."""
    with suppress(PermissionError):
        _sync_folder(folder)


def _discard(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)


# --- reading -----------------------------------------------------------------------------------------------


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the name of the file to an OSError of the block: reading and writing, unlike opening, raise it without."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def open_file(path: str | os.PathLike[str], *, follow_link: bool = False) -> int:
    """Opens a file for reading, and returns its descriptor; whatever else has that name is refused and not waited for.

    Args:
        follow_link: whether the name may be a link. In a folder that this project writes there are no links of its
            own, and one that somebody else put there could name any file of the user.

    Raises:
        OSError: when it cannot be opened, or is no file: a named pipe would wait, a device never end.
    """
    return _open_regular(path, os.O_RDONLY | (0 if follow_link else os.O_NOFOLLOW))


def _open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """Opens a file with these flags, and nothing else that may have its name; raises OSError."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        let_shortage_pass(error)
        if error.errno == errno.ELOOP and os.path.islink(path) and flags & os.O_NOFOLLOW:  # noqa: PTH114
            raise OSError(
                errno.ELOOP, "it is a link, and may lead anywhere; put the file itself there", str(path)
            ) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def reading(path: str | os.PathLike[str], *, follow_link: bool = False) -> Iterator[BufferedReader]:
    """Opens a file as `open_file` does, for a block that reads from it; an OSError of the block names it."""
    with naming(path), open(open_file(path, follow_link=follow_link), "rb") as file:
        yield file


def read_whole(path: str | os.PathLike[str], *, at_most: int, follow_link: bool = False) -> bytes:
    """Reads a file of no more than `at_most` bytes.

    Args:
        follow_link: as in `open_file`; True for what the user names, and for images and VAEs.

    Raises:
        OSError: naming `path`, when it cannot be read, is longer, or is no file.
    """
    with reading(path, follow_link=follow_link) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise OSError(errno.EFBIG, f"it is larger than {at_most:,} bytes")
        data = file.read(size + 1)  # no more at once: as much as is asked for is taken of the memory first
        if len(data) > size:  # it has grown meanwhile
            data += file.read(at_most + 1 - len(data))
    if len(data) > at_most:
        raise OSError(errno.EFBIG, f"it is larger than {at_most:,} bytes", str(path))
    return data


def refuse_links(path: str | os.PathLike[str], *, below: str | os.PathLike[str]) -> None:
    """Raises OSError where a folder between `below` and a file is a link: it may lead out of `below`.

    `below` itself may be a link, for the user names it.
    """
    for place in reversed(Path(path).relative_to(below).parents[:-1]):
        folder = Path(below) / place
        if folder.is_symlink():
            raise OSError(errno.ELOOP, f"it is a link, and may lead out of {below}; remove it", str(folder))


# --- temporaries -------------------------------------------------------------------------------------------


@functools.cache
def host_digest() -> str:
    """Names where process ids mean the same as here: the machine, its boot, and the namespace of a container."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _temporary_name() -> str:
    return f"{TEMPORARY_PREFIX}{host_digest()}-{os.getpid()}-{uuid.uuid4().hex}"


def can_write(folder: str | os.PathLike[str]) -> bool:
    """Says whether files can be made in `folder`, by making one; see `why_not_writable`."""
    return why_not_writable(folder) is None


def why_not_writable(folder: str | os.PathLike[str]) -> str | None:
    """Tries to make a file in `folder`, which need not exist; returns the reason when that fails.

    Nothing is left of the try, so that a run that is refused for another reason leaves no empty folders.
    """
    folder = Path(folder).absolute()
    missing: list[Path] = []
    try:
        missing += [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            _write_probe(folder)
        except FileNotFoundError:  # another process took its own empty folder away again
            _write_probe(folder)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for place in missing:
            with suppress(OSError):  # not made, or in use by now
                os.rmdir(place)
    return None


def why_not_permitted(folder: str | os.PathLike[str]) -> str | None:
    """Returns why no file can be made in `folder`, as far as permissions say; None where one can be made."""
    place = Path(folder).absolute()
    try:
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            return os.strerror(errno.ENOTDIR)
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            return os.strerror(errno.EROFS)
        return None if os.access(place, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        return error.strerror or str(error)


def _write_probe(folder: Path) -> None:
    _make_folder(folder)
    probe = folder / _temporary_name()
    _write_new(probe, [memoryview(b"x")])
    _discard(probe)


def remove_stale_temporaries(folder: str | os.PathLike[str]) -> int:
    """Removes what killed writers left in `folder`, and returns how many files that were."""
    return sum(_remove(path) for path in stale_temporaries(folder))


def stale_temporaries(folder: str | os.PathLike[str]) -> list[Path]:
    """Finds what killed writers left in `folder`.

    A temporary of this machine is stale when its process is dead. One of another machine, or of this one under another
    name or before its last start, is stale when it is a day older than a file made just now in the same folder: the
    clock of the file system decides, not ours.
    """
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_temporary(entry)]
    except OSError:
        return []
    oldest = _file_system_time(folder) - _STALE_SECONDS if names else 0.0
    return [folder / name for name in names if _is_stale(folder / name, oldest)]


def _is_temporary(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(TEMPORARY_PREFIX) and entry.is_file(follow_symlinks=False)


def _file_system_time(folder: Path) -> float:
    """Returns the time that a file made now in `folder` gets, or minus infinity if none can be made."""
    probe = folder / _temporary_name()
    try:
        status = _write_new(probe, [])
    except OSError:
        return float("-inf")
    _discard(probe)
    return status.st_mtime


def _is_stale(path: Path, oldest: float) -> bool:
    is_alive = _is_writer_alive(path.name)
    if is_alive is not None:
        return not is_alive  # however old it is: somebody may have set the clock
    try:
        return path.lstat().st_mtime < oldest
    except OSError:  # gone already
        return False


def _remove(path: Path) -> bool:
    try:
        os.unlink(path)
    except OSError:  # gone already, or not ours to remove
        return False
    return True


def _is_writer_alive(name: str) -> bool | None:
    """Says whether the process that made a temporary of this name goes on; None where that cannot be known."""
    host, _, rest = name.removeprefix(TEMPORARY_PREFIX).partition("-")
    process = rest.partition("-")[0]
    if host != host_digest() or not process.isdecimal() or not 0 < int(process[:10]) < 10**9:
        return None
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
