"""What has changed in a folder of images since a split was drawn from it: images and classes that came or went.

Only names are compared, in one Unicode form, which takes one listing of the folder, and content keys where they are at
hand anyway.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gait_latents.common.console import say, show_name
from gait_latents.common.errors import UserError
from gait_latents.images.folders import list_images
from gait_latents.images.names import fitting_classes, name_list, nfc
from gait_latents.images.split import Entry, Split

_MOST_LISTED = 5  # names of classes in a line


def tell_changes_of_run(split: Split, data_path: str, *, fresh: Split | None = None) -> None:
    """Says in one line how the image folder differs from the split of a run that goes on, which stays as it was.

    Args:
        split: the split of the run.
        data_path: the image folder.
        fresh: the same split with the content keys of the files as they are now, where they were computed.
    """
    try:
        index = list_images(data_path)
    except (UserError, OSError) as error:
        say(f"the images of this run were not compared with what is in its folder now: {error}")
        return
    edited = (
        0 if fresh is None else _num_edited([*split.validation, *split.test], fresh)
    )  # an edited training image ends the run
    found = describe_changes(split, index, who="this run", edited=_count(edited, "image"))
    if found:
        say(
            f"{show_name(data_path)} {found}; the split of a run is fixed when it begins, and another "
            "--results_folder trains on what is there now"
        )


def tell_changes_of_cache(stored: Split, drawn: Split, data_path: str, cache: Path) -> None:
    """Says in one line how the image folder differs from the one that the split in a cache was drawn from.

    Args:
        stored: the split in the cache.
        drawn: the split that is drawn now. Where it has other classes by its settings, only images are compared.
        data_path: the image folder, from which it is drawn.
        cache: the folder of the cache.
    """
    is_same_rule = all(stored.rule[name] == drawn.rule[name] for name in ("num_users", "class_names"))
    who = f"the split in {show_name(cache)}"
    edited = _num_edited([*stored.used, *stored.gap], drawn)
    found = describe_changes(
        stored, drawn.index(), who=who, only_common=not is_same_rule, edited=_count(edited, "image")
    )
    if found:
        say(f"{show_name(data_path)} {found}; the split is drawn anew from what is there now")


def describe_changes(
    split: Split, index: Mapping[str, Sequence[str]], *, who: str, only_common: bool = False, edited: str = ""
) -> str | None:
    """Says how the images of a folder differ from those that a split was drawn from; None where they do not.

    Args:
        split: the split; where it was drawn with some classes alone, by name or number, those are compared with it.
        index: class -> file names in the folder, as `list_images` returns them.
        who: whose split this is, such as "this run".
        only_common: compare the images of those classes only that both have.
        edited: how many images of the split have another content now, in words.
    """
    then, now = _in_one_form(split.index()), _in_one_form(index)
    limit = split.rule["num_users"]
    taken = fitting_classes(split.rule["class_names"], list(now))[: None if limit == "all" else int(limit)]
    both = [name for name in then if name in now]
    came = {name: len(set(now[name]) - set(then[name])) for name in both}
    went = {name: len(set(then[name]) - set(now[name])) for name in both}
    new = [] if only_common else [name for name in taken if name not in then]
    gone = [] if only_common else [name for name in then if name not in now]
    parts = [
        f"{verb} {what} {relation}"
        for verb, relation, what in (
            ("has", f"that {who} does not know", _list(came, new)),
            ("lacks", f"that {who} knows", _list(went, gone)),
            ("has", "edited since then", edited),
        )
        if what
    ]
    return ", and ".join(parts) or None


def _in_one_form(index: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {nfc(name): [nfc(image) for image in images] for name, images in index.items() if images}


def _list(counts: Mapping[str, int], classes: Sequence[str]) -> str:
    """Names images by their number and classes by their names."""
    total, owners = sum(counts.values()), [name for name, count in counts.items() if count]
    texts = [f"{_count(total, 'image')} of {name_list(owners, _MOST_LISTED)}"] if total else []
    texts += [f"the class{'es' * (len(classes) > 1)} {name_list(classes, _MOST_LISTED)}"] if classes else []
    return " and ".join(texts)


def _count(number: int, word: str) -> str:
    """Returns such as "1 image" and "2 images"; nothing for none."""
    return f"{number:,} {word}{'s' * (number > 1)}" if number else ""


def _num_edited(entries: Iterable[Entry], now: Split) -> int:
    """Counts the images of which a split knows another content key, where both are known."""
    keys = now.keys()
    return sum(bool(e.key) and keys.get((e.class_name, e.name), e.key) != e.key for e in entries)
