"""Which images the settings mean.

They are chosen from the image folder where it is there, else from the split that a cache or run has stored: with a
complete cache the images need not exist.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gait_latents.common import mounts
from gait_latents.common.cli import is_explicit, show
from gait_latents.common.console import progress, show_name, warn
from gait_latents.common.errors import UserError
from gait_latents.images import data_report, reading
from gait_latents.images.folders import LAYOUT_REMEDY, OUTPUTS, list_folder, missing_classes_warning, refuse_nested
from gait_latents.images.names import (
    ALL,
    choose_names,
    name_list,
    natural_key,
    nfc,
    refuse_alike,
    refuse_unusable,
    unusable,
)
from gait_latents.images.reading import read_file
from gait_latents.images.shapes import Shape, ShapeReader
from gait_latents.images.split import Entry, Split, make_split, read_split
from gait_latents.settings import ImageSettings


def images_at_hand(settings: ImageSettings, sources: Mapping[str, str], *, may_lack: bool) -> bool:
    """Says whether the image folder is there and has class folders.

    Args:
        sources: where each setting comes from; a folder of the command line or the config file was asked for.
        may_lack: accept a missing folder even if --data_path was given, as a run that goes on does: its latents may all
            be cached.

    Raises:
        UserError: when a folder that was asked for is missing.
    """
    folder = Path(settings.data_path)
    is_needed = not may_lack and is_explicit(sources, "data_path")
    if is_needed and not folder.is_dir():
        raise UserError(no_images_message(settings.data_path))
    return is_needed or (folder.is_dir() and any(child.is_dir() for child in folder.iterdir()))


def no_images_message(data_path: str, *, also: str = "") -> str:
    """Says what is wrong with an image folder that cannot be used, and what to give instead.

    Args:
        also: what else to say before the remedy, beginning with a comma.
    """
    folder = Path(data_path)
    state = "has no sub-folders" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    remedy = mounts.why_missing("data_path", data_path) or LAYOUT_REMEDY
    return f"--data_path {show_name(data_path)} {state}{also}; {remedy}"


def choose_images(
    settings: ImageSettings, *, at_hand: bool, stored: Split | None, where: str, in_use: Collection[str] = ()
) -> Split:
    """Chooses training and test images: from the image folder when it is there, else from the images of a stored split.

    Both give the same split when the folder has not changed. Every entry comes with its content key. Of a folder it is
    said what it holds (`data_report.py`).

    Args:
        at_hand: whether the image folder is there, as `images_at_hand` says.
        stored: the split in the cache; None where there is none.
        where: the cache folder, for messages.
        in_use: classes of the run or the cache that goes on; with a name that no new one may have, they go on.

    Raises:
        UserError: when neither is there, a class has too few images or most of them in sub-folders, no class fits a
            name that was given, a class has a name that no folder of generated images can have, or the cache lies among
            the class folders.
    """
    if at_hand:
        return _choose_from_folder(settings, where, in_use)
    if stored is None:
        also = f", and {where} holds no split of earlier images"
        raise UserError(no_images_message(settings.data_path, also=also))
    return _choose_from_stored(settings, stored, where, in_use)


def _choose_from_folder(settings: ImageSettings, where: str, in_use: Collection[str]) -> Split:
    refuse_to_be_a_class(Path(where), settings.data_path)
    listing = list_folder(settings.data_path)
    place = f"--data_path {show_name(settings.data_path)}"
    named = _choose_classes(settings, listing.classes, place)
    chosen = named if settings.num_users == "all" else named[: int(settings.num_users)]
    refuse_alike(chosen, place)
    _check_names(chosen, place, in_use)
    _refuse_own_outputs(settings, chosen)
    nested = refuse_nested(listing, chosen)
    index = {name: listing.classes[name].images for name in named}
    all_names = (name for class_name, names in index.items() for name in (class_name, *names))
    before = None if all(nfc(name) == name for name in all_names) else read_split(Path(where))
    split, shapes = _look_at_files(_draw(settings, index, before), settings.data_path, ShapeReader().shape_of)
    small = [name for name in chosen if _is_small(len(index[name]), settings.images_per_user, split)]
    data_report.report(listing, split, nested=nested, shapes=shapes, small_classes=small, resize=settings.resize)
    return split


def _check_names(classes: Sequence[str], where: str, in_use: Collection[str]) -> None:
    """Raises UserError for a new class that cannot have its name; warns of one that is in use already."""
    refuse_unusable((name for name in classes if name not in in_use), where)
    old = unusable(classes)
    if old:
        warn(
            f"no run that begins now can have the classes {name_list(list(old))}, for which generate.py may be unable "
            "to make a folder; rename their folders, or name the other classes with --class_names"
        )


def _is_small(count: int, images_per_user: int | str, split: Split) -> bool:
    """Says whether training takes all images of a class and wants more, or leaves it alone without a test image."""
    return images_per_user != "all" and (
        count < int(images_per_user) or (count == images_per_user and bool(split.test))
    )


def _choose_from_stored(settings: ImageSettings, stored: Split, where: str, in_use: Collection[str]) -> Split:
    index = stored.index()
    _check_classes_known(settings, stored, where)
    named = _choose_classes(settings, index, where)
    split, known = _draw(settings, {name: index[name] for name in named}, stored), stored.keys()
    _check_names(split.classes, where, in_use)
    return split.with_keys({place: known.get(place, _key_of_no_content(*place)) for place in _places(split)})


def _choose_classes(settings: ImageSettings, names: Iterable[str], where: str) -> list[str]:
    """Returns the classes that --class_names names, in natural order; warns when --num_users asks for more."""
    ordered = sorted(names, key=natural_key)
    named = choose_names(settings.class_names, ordered, setting="class_names", where=where)
    notice = missing_classes_warning(named, settings.num_users, are_named=tuple(settings.class_names) != ALL)
    if notice:
        warn(notice)
    return named


def _draw(settings: ImageSettings, index: Mapping[str, Sequence[str]], stored: Split | None) -> Split:
    """Draws the split of the images in an index {class: names}.

    Earlier versions drew names that are not in NFC as they stand. Where `stored` was drawn so, it stays as it was.
    """

    def draw(form: Callable[[str], str]) -> Split:
        return make_split(
            index,
            num_users=settings.num_users,
            images_per_user=settings.images_per_user,
            seed=settings.seed,
            split=settings.split,
            split_gap=settings.split_gap,
            split_start=settings.split_start,
            validation_per_user=settings.validation_per_user,
            class_names=settings.class_names,
            small_classes=settings.small_classes,
            form=form,
        )

    split = draw(nfc)
    if stored is None or _is_drawn_as(stored, split):
        return split
    before = draw(str)
    return before if _is_drawn_as(stored, before) else split


def _is_drawn_as(stored: Split, split: Split) -> bool:
    """Says whether a stored split has the classes of another, and its images but for those that were skipped."""
    same_train, same_test = (
        {(e.class_name, e.name) for e in mine} <= {(e.class_name, e.name) for e in other}
        for mine, other in ((stored.train, split.train), (stored.test, (*split.validation, *split.test)))
    )
    return stored.classes == split.classes and same_train and same_test


def refuse_to_be_a_class(folder: Path, data_path: str | None) -> None:
    """Raises UserError when a folder to write to lies among the class folders: its pictures would become a class.

    Args:
        folder: the folder to write to.
        data_path: the image folder, which need not exist; None where it is not known.
    """
    place = folder.resolve()
    if data_path and Path(data_path).resolve() in (place, place.parent):
        raise UserError(
            f"{show_name(folder)} is among the class folders of --data_path {show_name(data_path)} and would count as "
            "one; give a folder outside"
        )


def _refuse_own_outputs(settings: ImageSettings, folders: list[str]) -> None:
    """Raises UserError when a script wrote one of the class folders in use: its pictures are no class."""
    for name in folders:
        for files, what in OUTPUTS.items():
            if all((Path(settings.data_path) / name / file).is_file() for file in files):
                raise UserError(
                    f"the folder {show_name(name)} in --data_path {show_name(settings.data_path)} {what}, and its "
                    "pictures would count as a class; move it elsewhere"
                )


def _check_classes_known(settings: ImageSettings, stored: Split, where: str) -> None:
    """Raises UserError when more classes are asked for than the stored split has, and there may have been more.

    A split drawn with a number or with names of classes does not say how many more there were in the folder.
    """
    known, asked = stored.rule["num_users"], settings.num_users
    was_cut = known == len(stored.classes)
    if was_cut and (asked == "all" or int(asked) > int(known)):
        also = f"--num_users is {asked}, but {where} knows {known} classes, and "
        raise UserError(also + no_images_message(settings.data_path))
    names, knows_all = list(settings.class_names), stored.rule["class_names"] == list(ALL)
    if not knows_all and names != stored.rule["class_names"] and not set(names) <= set(stored.classes):
        also = f"--class_names is {show(names)}, but {where} knows only {name_list(stored.classes)}, and "
        raise UserError(also + no_images_message(settings.data_path))


def with_fresh_keys(split: Split, data_path: str) -> Split:
    """Returns the split with the content key of each file as it is now; one that cannot be read keeps its key."""
    return _look_at_files(split, data_path, lambda _data: None)[0]


def _look_at_files(
    split: Split, data_path: str, shape_of: Callable[[bytes], Shape | None]
) -> tuple[Split, list[Shape | None]]:
    """Reads each file once.

    Args:
        shape_of: called with the bytes of a file, by several threads.

    Returns:
        The split with fresh keys, and the shapes of its training and then its test images; of those that cannot be
        read, None.
    """

    def look(entry: Entry) -> tuple[str, Shape | None]:
        try:
            data = read_file(data_path, entry)
        except OSError:
            return entry.key or _key_of_no_content(entry.class_name, entry.name), None
        return reading.image_key(data), shape_of(data)

    entries = split.used
    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(entries), unit="files", label="read image files", only_if_slow=True) as bar,
    ):
        found = [bar.counted(seen) for seen in pool.map(look, entries)]
    keys = dict(zip(_places(split), (key for key, _ in found), strict=True))
    return split.with_keys(keys), [shape for _, shape in found]


def _places(split: Split) -> list[tuple[str, str]]:
    return [(entry.class_name, entry.name) for entry in split.used]


def _key_of_no_content(class_name: str, name: str) -> str:
    # No image has this key, so it is in no cache: the image is read when it is needed, and the error then names it.
    return reading.image_key(json.dumps(["unreadable", class_name, name]).encode())


def common_suffix(split: Split) -> str:
    """Returns the commonest ending of the training images, such as .jpg."""
    return Counter(Path(entry.name).suffix.lower() for entry in split.train).most_common(1)[0][0]
