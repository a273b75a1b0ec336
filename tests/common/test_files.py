import errno
import os
import stat
import time
from pathlib import Path

import pytest
from os_faults import dead_process, fault_at, fork, raising, wait_for
from properties import given, settings, st

from gait_latents.common import files

OLD, NEW = b"old content", b"new content, and longer"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "cache" / "file.bin"
    files.publish(target, OLD)
    return target


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftovers(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.startswith(files.TEMPORARY_PREFIX)]


def label(calls, path: Path) -> list[str]:
    """Writes a log of calls with roles for names."""
    roles = {str(path.parent): "folder", str(path.parent.parent): "parent", str(path): "file"}
    return [f"{name} {roles.get(target, 'temporary')}" for name, target in calls.log]


# --- what a publish does -----------------------------------------------------------------------------------


def test_publish_syncs_the_content_before_the_rename_and_the_folder_after_it(path):
    with fault_at(None) as calls:
        files.publish(path, NEW)
    assert label(calls, path) == [
        "open temporary",
        "write temporary",
        "fsync temporary",
        "fstat temporary",
        "close temporary",
        "rename temporary",
        "open folder",
        "fsync folder",
        "close folder",
        "open parent",
        "fsync parent",
        "close parent",
    ]
    assert path.read_bytes() == NEW


def test_publish_syncs_the_name_of_every_folder_that_it_makes(tmp_path):
    with fault_at(None) as calls:
        files.publish(tmp_path / "a" / "b" / "c" / "file", NEW)
    made = [target for name, target in calls.log if name == "mkdir"]
    assert made == [str(tmp_path / part) for part in ("a", "a/b", "a/b/c")]
    for folder in made:
        after = calls.log[calls.log.index(("mkdir", folder)) :]
        synced = after.index(("fsync", str(Path(folder).parent)))
        assert not [name for name, _ in after[1:synced] if name in ("mkdir", "rename")]


def test_publish_takes_several_buffers_and_empty_ones(tmp_path):
    files.publish(tmp_path / "x", [b"ab", b"", memoryview(bytearray(b"cd")), bytearray(b"e")])
    files.publish(tmp_path / "empty", b"")
    assert (tmp_path / "x").read_bytes() == b"abcde"
    assert (tmp_path / "empty").read_bytes() == b""


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.binary(max_size=40), max_size=5), longest=st.integers(1, 17))
def test_short_writes_still_give_the_whole_content(tmp_path_factory, parts, longest):
    path = tmp_path_factory.mktemp("short") / "file"
    with fault_at(-1, lambda name, real, args: real(args[0], args[1][:longest]), only=("write",)):
        files.publish(path, parts)
    assert path.read_bytes() == b"".join(parts)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_alone_decides_the_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.publish(tmp_path / "file", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_names_may_be_any_that_the_file_system_knows(tmp_path):
    for name in ("步态 ü.bin", "line\nbreak", os.fsdecode(b"not-utf8-\xff"), "n" * 255):
        files.publish(tmp_path / name, NEW)
        assert (tmp_path / name).read_bytes() == NEW
    assert len(names_in(tmp_path)) == 4


# --- what happens when something fails ---------------------------------------------------------------------


def test_a_write_that_takes_nothing_is_an_error_and_not_an_endless_loop(path):
    with fault_at(0, lambda name, real, args: 0, only=("write",)):
        with pytest.raises(OSError, match="takes no more bytes"):
            files.publish(path, NEW)
    assert path.read_bytes() == OLD


def test_a_file_of_another_size_than_written_is_an_error(path):
    with fault_at(0, lambda name, real, args: path.stat(), only=("fstat",)):
        with pytest.raises(OSError, match="kept 11 bytes of 23"):
            files.publish(path, NEW)
    assert path.read_bytes() == OLD


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_rename_that_took_place_but_reports_an_error_is_a_success(path, number):
    def rename_and_complain(name, real, args):
        real(*args)
        raise OSError(number, os.strerror(number))

    with fault_at(0, rename_and_complain, only=("rename",)):
        files.publish(path, NEW)
    assert path.read_bytes() == NEW
    assert leftovers(path.parent) == []


def test_a_failed_rename_is_not_taken_for_done_because_an_old_file_has_the_same_size(path):
    with fault_at(-1, raising(errno.EIO), only=("rename",)), pytest.raises(OSError):
        files.publish(path, OLD.upper())
    assert path.read_bytes() == OLD


def test_a_temporary_that_vanished_is_written_anew_once(path):
    def remove_first(name, real, args):
        Path(args[0]).unlink()
        return real(*args)

    with fault_at(0, remove_first, only=("rename",)):
        files.publish(path, NEW)
    assert path.read_bytes() == NEW
    with fault_at(-1, remove_first, only=("rename",)), pytest.raises(FileNotFoundError):
        files.publish(path, OLD)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EXDEV])
def test_where_nothing_can_be_renamed_a_new_name_is_written_directly(path, number):
    new_path = path.with_name("other.bin")
    with fault_at(-1, raising(number), only=("rename",)):
        files.publish(new_path, NEW)
        with pytest.raises(OSError):  # never at the cost of a whole file
            files.publish(path, NEW)
    assert new_path.read_bytes() == NEW
    assert path.read_bytes() == OLD
    assert leftovers(path.parent) == []


def test_a_direct_write_that_fails_removes_what_it_began_and_nothing_else(path):
    new_path = path.with_name("other.bin")

    def no_rename_and_full_disk(name, real, args):
        if name == "rename":
            raise OSError(errno.EXDEV, "no rename")
        if fsyncs.append(1) or len(fsyncs) % 2 == 0:
            raise OSError(errno.ENOSPC, "full")
        return real(*args)

    for target in (new_path, path):
        fsyncs: list[int] = []
        with fault_at(-1, no_rename_and_full_disk, only=("rename", "fsync")), pytest.raises(OSError):
            files.publish(target, NEW)
    assert names_in(path.parent) == [path.name]
    assert path.read_bytes() == OLD


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_synced_is_accepted_and_a_file_is_not(path, number):
    def only_folders(name, real, args):
        if stat.S_ISDIR(os.fstat(args[0]).st_mode):
            raise OSError(number, os.strerror(number))
        return real(*args)

    with fault_at(-1, only_folders, only=("fsync",)):
        files.publish(path, NEW)
    assert path.read_bytes() == NEW
    with fault_at(0, raising(number), only=("fsync",)), pytest.raises(OSError):
        files.publish(path, OLD)
    assert path.read_bytes() == NEW


def test_a_folder_above_that_may_not_be_read_does_not_matter(path):
    def unreadable_parent(name, real, args):
        if str(args[0]) == str(path.parent.parent):
            raise PermissionError(errno.EACCES, "no")
        return real(*args)

    with fault_at(-1, unreadable_parent, only=("open",)):
        files.publish(path, NEW)
    assert path.read_bytes() == NEW


def test_two_processes_that_publish_one_name_leave_one_whole_file(path):
    contents = [bytes([i]) * 50_000 for i in range(4)]

    def publish_often(content: bytes) -> None:
        for _ in range(20):
            files.publish(path, content)

    children = [fork(lambda content=content: publish_often(content)) for content in contents]
    assert [wait_for(child) for child in children] == [0] * 4
    assert path.read_bytes() in contents
    assert leftovers(path.parent) == []


# --- folders -----------------------------------------------------------------------------------------------


def test_can_write_tries_it_and_leaves_nothing(tmp_path):
    assert files.can_write(tmp_path / "new" / "folder")
    assert names_in(tmp_path) == []
    (tmp_path / "old").mkdir()
    assert files.can_write(tmp_path / "old")
    assert names_in(tmp_path) == ["old"]
    (tmp_path / "file").write_bytes(b"")
    assert files.why_not_writable(tmp_path / "file" / "folder") == "Not a directory"
    assert not files.can_write(tmp_path / "file")
    assert not files.can_write(tmp_path / "file" / "folder")


@pytest.mark.parametrize(("call", "number"), [("open", errno.EROFS), ("write", errno.ENOSPC), ("mkdir", errno.EACCES)])
def test_can_write_says_no_for_read_only_and_full_disks(tmp_path, call, number):
    with fault_at(-1, raising(number), only=(call,)):
        assert not files.can_write(tmp_path / "folder")
    assert leftovers(tmp_path) == []


# --- temporaries -------------------------------------------------------------------------------------------


def temporary(folder: Path, *, process: int, host: str | None = None, age_hours: float = 0.0) -> Path:
    path = folder / f"{files.TEMPORARY_PREFIX}{host or files.host_digest()}-{process}-{'0' * 32}"
    path.write_bytes(b"half")
    then = time.time() - 3600 * age_hours
    os.utime(path, (then, then))
    return path


def test_temporaries_of_dead_writers_and_old_ones_are_removed(tmp_path):
    gone = [
        temporary(tmp_path, process=dead_process()),
        temporary(tmp_path, process=os.getpid(), host="0" * 8, age_hours=25),
    ]
    kept = [
        temporary(tmp_path, process=os.getpid()),
        temporary(tmp_path, process=dead_process(), host="1" * 8, age_hours=23),
        temporary(tmp_path, process=dead_process(), host="2" * 8, age_hours=-1000),
        tmp_path / "shard.safetensors",
        tmp_path / f"{files.TEMPORARY_PREFIX}folder",
    ]
    kept[3].write_bytes(b"")
    kept[4].mkdir()
    assert files.remove_stale_temporaries(tmp_path) == 2
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert not any(path.exists() for path in gone)


@pytest.mark.parametrize(
    "name", ["", "x", "x-y", "-1-z", "{host}-99999999999999-0", "{host}--0", "{host}-1", "{host}-x"]
)
def test_strange_names_are_left_alone_while_they_are_young(tmp_path, name):
    (tmp_path / (files.TEMPORARY_PREFIX + name.format(host=files.host_digest()))).write_bytes(b"")
    assert files.remove_stale_temporaries(tmp_path) == 0


def test_our_clock_has_no_say_in_what_is_old(tmp_path, monkeypatch):
    young = temporary(tmp_path, process=1, host="3" * 8, age_hours=1)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert files.remove_stale_temporaries(tmp_path) == 0
    assert young.exists()


def test_nothing_is_removed_and_nothing_raised_where_it_cannot_be(tmp_path):
    old = temporary(tmp_path, process=1, host="4" * 8, age_hours=100)
    with fault_at(-1, raising(errno.EROFS), only=("open", "unlink")):
        assert files.remove_stale_temporaries(tmp_path) == 0
    assert old.exists()
    assert files.remove_stale_temporaries(tmp_path / "absent") == 0
    assert files.remove_stale_temporaries(old) == 0


def test_permissions_are_told_without_trying(tmp_path):
    assert files.why_not_permitted(tmp_path / "new" / "folder") is None
    (tmp_path / "file").write_text("x")
    assert files.why_not_permitted(tmp_path / "file" / "folder") == "Not a directory"
    assert files.why_not_permitted("/proc/self/folder") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_link_is_followed_only_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("secret")
    assert files.read_whole(tmp_path / "link", at_most=6, follow_link=True) == b"secret"
    with pytest.raises(OSError, match="it is a link, and may lead anywhere") as caught:
        files.read_whole(tmp_path / "link", at_most=6)
    assert caught.value.filename == str(tmp_path / "link")


def test_no_folder_on_the_way_to_a_file_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "out").symlink_to("real")
    files.refuse_links(tmp_path / "out" / "a" / "x.png", below=tmp_path / "out")  # the user names the first folder
    (tmp_path / "real" / "b").symlink_to("a")
    for inner in ("b/x.png", "b/c/x.png"):
        with pytest.raises(OSError, match="it is a link, and may lead out of") as caught:
            files.refuse_links(tmp_path / "out" / inner, below=tmp_path / "out")
        assert caught.value.filename == str(tmp_path / "out" / "b")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert files.read_whole(tmp_path / "x", at_most=5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        files.read_whole(tmp_path / "x", at_most=4)
