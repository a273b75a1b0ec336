"""Which images the settings mean.

They are chosen from the image folder where it is there, else from the split that a cache or run has stored: with a
complete cache the images need not exist.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gait_latents.common.cli import is_explicit
from gait_latents.common.console import progress, show_name, warn
from gait_latents.common.errors import UserError
from gait_latents.common.layout import (
    LABELS_NAME,
    MANIFEST_NAME,
    PAGE_NAME,
    RECORD_NAME,
    REPORT_NAME,
    SETTINGS_NAME,
    SPLIT_NAME,
)
from gait_latents.images import reading
from gait_latents.images.folders import LAYOUT_REMEDY, list_images, missing_classes_warning
from gait_latents.images.reading import read_file
from gait_latents.images.split import Entry, Split, make_split, shared_content
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
    return f"--data_path {show_name(data_path)} {state}{also}; {LAYOUT_REMEDY}"


def choose_images(settings: ImageSettings, *, at_hand: bool, stored: Split | None, where: str) -> Split:
    """Chooses training and test images: from the image folder when it is there, else from the images of a stored split.

    Both give the same split when the folder has not changed. Every entry comes with its content key.

    Args:
        at_hand: whether the image folder is there, as `images_at_hand` says.
        stored: the split in the cache; None where there is none.
        where: the cache folder, for messages.

    Raises:
        UserError: when neither is there, a class has too few images, or the cache lies among the class folders.
    """
    if at_hand:
        return _choose_from_folder(settings, where)
    if stored is None:
        also = f", and {where} holds no split of earlier images"
        raise UserError(no_images_message(settings.data_path, also=also))
    return _choose_from_stored(settings, stored, where)


def _choose_from_folder(settings: ImageSettings, where: str) -> Split:
    refuse_to_be_a_class(Path(where), settings.data_path)
    index = list_images(settings.data_path)
    _refuse_own_outputs(settings, list(index))
    return with_fresh_keys(_draw(settings, index), settings.data_path)


def _choose_from_stored(settings: ImageSettings, stored: Split, where: str) -> Split:
    _check_classes_known(settings, stored, where)
    split, known = _draw(settings, stored.index()), stored.keys()
    return split.with_keys({place: known.get(place, _key_of_no_content(*place)) for place in _places(split)})


def _draw(settings: ImageSettings, index: Mapping[str, Sequence[str]]) -> Split:
    """Draws the split of the images in an index {class: names}; warns when there are fewer classes than asked for."""
    notice = missing_classes_warning(index, settings.num_users)
    if notice:
        warn(notice)
    return make_split(
        index,
        num_users=settings.num_users,
        images_per_user=settings.images_per_user,
        seed=settings.seed,
        split=settings.split,
        split_gap=settings.split_gap,
    )


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


_OUTPUTS = {  # files that lie together in a folder of ours -> what wrote them
    (MANIFEST_NAME, SPLIT_NAME): "is a cache of latents",
    (SETTINGS_NAME, SPLIT_NAME): "was written by train_latent_cfg.py",
    (RECORD_NAME, LABELS_NAME): "was written by generate.py",
    (REPORT_NAME, PAGE_NAME): "was written by evaluate_images.py",
}


def _refuse_own_outputs(settings: ImageSettings, folders: list[str]) -> None:
    """Raises UserError when a script wrote one of the class folders in use: its pictures are no class."""
    for name in folders if settings.num_users == "all" else folders[: int(settings.num_users)]:
        for files, what in _OUTPUTS.items():
            if all((Path(settings.data_path) / name / file).is_file() for file in files):
                raise UserError(
                    f"the folder {show_name(name)} in --data_path {show_name(settings.data_path)} {what}, and its "
                    "pictures would count as a class; move it elsewhere"
                )


def _check_classes_known(settings: ImageSettings, stored: Split, where: str) -> None:
    """Raises UserError when more classes are asked for than the stored split has, and there may have been more.

    A split drawn with a number of classes does not say how many more there were in the folder.
    """
    known, asked = stored.rule["num_users"], settings.num_users
    was_cut = known == len(stored.classes)
    if was_cut and (asked == "all" or int(asked) > int(known)):
        also = f"--num_users is {asked}, but {where} knows {known} classes, and "
        raise UserError(also + no_images_message(settings.data_path))


def with_fresh_keys(split: Split, data_path: str) -> Split:
    """Returns the split with the content key of each file as it is now; one that cannot be read keeps its key."""

    def key_of(entry: Entry) -> str:
        try:
            return reading.image_key(read_file(data_path, entry))
        except OSError:
            return entry.key or _key_of_no_content(entry.class_name, entry.name)

    entries = [*split.train, *split.test]
    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(entries), unit="files", label="read image files", only_if_slow=True) as bar,
    ):
        keys = [bar.counted(key) for key in pool.map(key_of, entries)]
    return split.with_keys(dict(zip(_places(split), keys, strict=True)))


def _places(split: Split) -> list[tuple[str, str]]:
    return [(entry.class_name, entry.name) for entry in (*split.train, *split.test)]


def _key_of_no_content(class_name: str, name: str) -> str:
    # No image has this key, so it is in no cache: the image is read when it is needed, and the error then names it.
    return reading.image_key(json.dumps(["unreadable", class_name, name]).encode())


def warn_of_shared_content(split: Split) -> None:
    """Warns when the same file content is in the training and the test images."""
    notice = shared_content_warning(split)
    if notice:
        warn(notice)


def shared_content_warning(split: Split) -> str | None:
    """Returns a warning when the same file content is in the training and the test images, else None."""
    pairs = shared_content(split)
    if not pairs:
        return None
    train, test = pairs[0]
    return (
        f"{len(pairs)} test image(s) have the same content as a training image, such as "
        f"{test.class_name}/{test.name} and {train.class_name}/{train.name}; scores on them will look too good"
    )


def common_suffix(split: Split) -> str:
    """Returns the commonest ending of the training images, such as .jpg."""
    return Counter(Path(entry.name).suffix.lower() for entry in split.train).most_common(1)[0][0]
