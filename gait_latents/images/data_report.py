"""What there is in the image folder, in a few lines before anything is encoded: what is used, what not, and why.

A folder in which nothing is odd gets one line.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gait_latents.common.console import say, show_name, warn
from gait_latents.images import reading
from gait_latents.images.folders import Contents, Listing, called_like_images, parts_warning
from gait_latents.images.names import alike, ending, is_for_linux_alone, name_list, natural_key, nfc
from gait_latents.images.shapes import Shape
from gait_latents.images.split import Entry, Split, in_two_classes, shared_content

MUCH_CUT = 0.1  # of an image's area
LITTLE_RANGE = 255 / 4  # of the 255 steps between black and white
_FEW_CLASSES, _LONG_NAME, _MOST_ENDINGS, _MOST_PAIRS, _MOST_ODD = 4, 40, 8, 3, 3
_LOOKED_AT, _LOOKED_AT_IN_DOUBT = 3, 40  # images whose values are looked at
_OTHER_PICTURES = frozenset(
    {".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".svg", ".psd", ".tga", ".ico", ".eps", ".pdf", ".dcm"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".exr", ".hdr", ".npy", ".npz", ".mat"}
)


def report(
    listing: Listing,
    split: Split,
    *,
    nested: Mapping[str, int],
    shapes: Sequence[Shape | None],
    small_classes: Sequence[str],
    resize: str,
) -> None:
    """Says what is used of an image folder, what is passed over, and what looks odd.

    Args:
        listing: what lies in the folder.
        split: the images that are used.
        nested: "class/sub-folder" -> number of images in it.
        shapes: of the training and then the test images; None where a header cannot be read.
        small_classes: those that have no more images than are asked for.
        resize: how an image becomes a square.
    """
    say(_found_line(split, shapes))
    for line in (_passed_over_line(listing, split), _left_out_line(listing), _loose_line(listing)):
        if line:
            say(line)
    warnings = [
        _nested_warning(nested),
        parts_warning(split.classes),
        _case_warning(listing, split.classes),
        _linux_warning(split.classes),
        _small_warning(split, small_classes),
        _cut_warning(split, shapes) if resize == "crop" else None,
        _range_warning(listing, split, shapes),
    ]
    for text in warnings:
        if text:
            warn(text)


def warn_of_equal_pictures(split: Split) -> None:
    """Warns when a picture lies in two classes, or in the training and the test images."""
    for text in (shared_content_warning(split), two_classes_warning(split)):
        if text:
            warn(text)


# --- what is used ------------------------------------------------------------------------------------------


def _found_line(split: Split, shapes: Sequence[Shape | None]) -> str:
    entries = (*split.used, *split.gap)
    counts = Counter(entry.class_name for entry in entries)
    fewest, most = min(counts.values()), max(counts.values())
    each = _plural(most, "image") if fewest == most else f"{fewest:,} to {most:,} images"
    each += " each" if len(counts) > 1 else ""
    validation = f", {len(split.validation):,} for validation" if split.validation else ""
    gap = f", {len(split.gap):,} left out between them" if split.gap else ""
    return (
        f"images: {_plural(len(split.classes), 'class')} ({_class_names(split.classes)}) with {each}, "
        f"{len(split.train):,} for training{validation} and {len(split.test):,} for testing{gap}; {_sizes(shapes)}"
    )


def _class_names(classes: Sequence[str]) -> str:
    names = [show_name(name if len(name) <= _LONG_NAME else f"{name[:_LONG_NAME]}…") for name in classes]
    return ", ".join(names) if len(names) <= _FEW_CLASSES else f"{names[0]} to {names[-1]}"


def _sizes(shapes: Sequence[Shape | None]) -> str:
    counts: Counter[tuple[int, int]] = Counter()
    for shape, count in _by_shape(shapes):
        counts[shape.width, shape.height] += count
    unknown = len(shapes) - counts.total()
    also = f", {unknown:,} of no readable size" if unknown else ""
    if not counts:
        return "no size can be read"
    (width, height), count = counts.most_common(1)[0]
    if len(counts) == 1:
        return f"all {width} x {height} pixels{also}"
    low, *_, high = sorted(counts, key=lambda size: (size[0] * size[1], size))
    others = counts.total() - count
    return f"{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels, {others:,} other than {width} x {height}{also}"


def _by_shape(shapes: Sequence[Shape | None]) -> list[tuple[Shape, int]]:
    """Returns the shapes that are known, most of which are one object, each with a number of images."""
    found = {id(shape): shape for shape in shapes}
    counts = Counter(map(id, shapes))
    return [(shape, counts[key]) for key, shape in found.items() if shape is not None]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


# --- what is not used --------------------------------------------------------------------------------------


def _passed_over_line(listing: Listing, split: Split) -> str | None:
    used = {name: listing.classes[name] for name in split.classes}
    counts = _endings(name for inside in used.values() for name in inside.others)
    hidden = sum(len(inside.hidden) for inside in used.values())
    odd = _odd_ones(used)
    number = _plural(counts.total() + hidden + sum(map(len, odd.values())), "file")
    parts = _ending_texts(counts)
    parts += [f"{hidden:,} hidden"] if hidden else []
    parts += _odd_texts(odd)
    if not parts:
        return None
    return f"passed over {number} in the class folders: {', '.join(parts)}{_remedy(counts)}"


def odd_ones_line(classes: Mapping[str, Contents]) -> str | None:
    """Says what in some class folders has the name of a file and is none, by kind and number; None without any."""
    texts = _odd_texts(_odd_ones(classes))
    return f"passed over in the class folders: {', '.join(texts)}" if texts else None


def _odd_ones(classes: Mapping[str, Contents]) -> dict[str, list[str]]:
    """Returns kind -> "class/name" of what is passed over for being no file: pipes, and folders called like images."""
    found: dict[str, list[str]] = {}
    for class_name, inside in classes.items():
        folders = dict.fromkeys(called_like_images(inside.folders), "folder")
        for name, kind in {**inside.special, **folders}.items():
            found.setdefault(kind, []).append(f"{class_name}/{name}")
    return found


def _odd_texts(odd: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{_plural(len(names), kind)} ({name_list(names, limit=_MOST_ODD)})" for kind, names in odd.items()]


def _endings(names: Iterable[str]) -> Counter[str]:
    return Counter(ending(name) for name in names)


def _ending_texts(counts: Counter[str]) -> list[str]:
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0].casefold(), item[0]))[:_MOST_ENDINGS]
    texts = [f"{count:,} {show_name(name) or 'without ending'}" for name, count in shown]
    rest = counts.total() - sum(count for _, count in shown)
    return [*texts, f"{rest:,} of other endings"] if rest else texts


def _remedy(counts: Counter[str]) -> str:
    remedies = []
    if any(name.lower() in _OTHER_PICTURES for name in counts):
        remedies.append("convert pictures to PNG or JPEG")
    if "" in counts:
        remedies.append("give images an ending such as .jpg")
    return f"; to use them, {' and '.join(remedies)}" if remedies else ""


def _left_out_line(listing: Listing) -> str | None:
    if not listing.left_out:
        return None
    names: list[str] = []
    found: Counter[str] = Counter()
    for name in sorted(listing.left_out, key=natural_key):
        inside = listing.left_out[name]
        counts = _endings(inside.others if inside else [])
        found += counts
        texts = _ending_texts(counts) + (_odd_texts(_odd_ones({name: inside})) if inside else [])
        names.append(show_name(name) + (f" ({', '.join(texts)})" if texts else ""))
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
    what = "1 folder is no class" if len(names) == 1 else f"{len(names):,} folders are no classes"
    return f"{what}, for want of images or as the system's own: {listed}{_remedy(found)}"


def _loose_line(listing: Listing) -> str | None:
    loose = len(listing.loose.images)
    if not loose:
        return None
    return f"{_plural(loose, 'image')} beside the class folders, not in one, {'is' if loose == 1 else 'are'} not used"


def _nested_warning(nested: Mapping[str, int]) -> str | None:
    if not nested:
        return None
    listing = ", ".join(f"{show_name(place)}: {count:,}" for place, count in list(nested.items())[:_MOST_ENDINGS])
    more = f" and {len(nested) - _MOST_ENDINGS:,} more" if len(nested) > _MOST_ENDINGS else ""
    return (
        f"{_plural(sum(nested.values()), 'image')} in sub-folders of the class folders are not used ({listing}{more}); "
        "put the images of a class directly into its folder to use them"
    )


# --- what looks odd ----------------------------------------------------------------------------------------


def _case_warning(listing: Listing, classes: Sequence[str]) -> str | None:
    for group in alike(classes, _plain):
        return (
            f"the classes {name_list(group)} differ in upper and lower case alone; if they are one class, put their "
            "images into one folder (on Windows and macOS, generated images of both would share one)"
        )
    same = {}
    for class_name in classes:
        images = listing.classes[class_name].images
        if len(set(map(_plain, images))) < len(images):
            same[class_name] = alike(images, _plain)
    if not same:
        return None
    number = sum(len(group) for groups in same.values() for group in groups)
    class_name, (group, *_) = next(iter(same.items()))
    first, second = (ascii(f"{class_name}/{name}")[1:-1] for name in group[:2])  # which differ in nothing that is seen
    return (
        f"{number:,} images have the name of another but for case or Unicode form, such as {first} and {second}; on "
        "Windows and macOS these are one file"
    )


def _linux_warning(classes: Sequence[str]) -> str | None:
    found = [name for name in classes if is_for_linux_alone(name)]
    if not found:
        return None
    return (
        f"Windows takes no folder called {name_list(found, limit=_MOST_ENDINGS)}: generated images of such a class "
        "cannot be copied there; rename its folder if they are to be"
    )


def _plain(name: str) -> str:
    return nfc(name).casefold()


def _small_warning(split: Split, small: Sequence[str]) -> str | None:
    if not small:
        return None
    counts = Counter(entry.class_name for entry in split.train)
    listing = ", ".join(f"{show_name(name)} has {counts[name]:,}" for name in small[:_MOST_ENDINGS])
    more = f" and {len(small) - _MOST_ENDINGS:,} more" if len(small) > _MOST_ENDINGS else ""
    return f"all images of {_plural(len(small), 'small class')} are for training, and none for testing: {listing}{more}"


def _cut_warning(split: Split, shapes: Sequence[Shape | None]) -> str | None:
    known = _by_shape(shapes)
    number = sum(count for shape, count in known if shape.cut_away > MUCH_CUT)
    if not number:
        return None
    most = max((shape for shape, _ in known), key=lambda shape: shape.cut_away)
    entry = split.used[[shape is most for shape in shapes].index(True)]
    return (
        f"{number:,} of {_plural(len(shapes), 'image')} lose more than {MUCH_CUT:.0%} of their area, since only the "
        f"square in the centre is kept: up to {most.cut_away:.0%} ({_place(entry)}, {most}); --resize squash and "
        "--resize pad keep all of it"
    )


def _range_warning(listing: Listing, split: Split, shapes: Sequence[Shape | None]) -> str | None:
    """Looks at the values of a few images and, where these use little of the range, of more."""

    def little(entries: Sequence[Entry]) -> dict[Entry, tuple[int, int]]:
        ranges = {entry: _range_of(listing, entry) for entry in entries}
        return {entry: ends for entry, ends in ranges.items() if ends is not None and ends[1] - ends[0] < LITTLE_RANGE}

    entries = split.used
    for bits in (8, 16):
        of_bits = {id(shape) for shape, _ in _by_shape(shapes) if shape.bits == bits}
        known = [entry for entry, shape in zip(entries, shapes, strict=True) if id(shape) in of_bits]
        if little(_spread(known, _LOOKED_AT)):
            looked_at = _spread(known, _LOOKED_AT_IN_DOUBT)
            found = little(looked_at)
            entry, (low, high) = next(iter(found.items()))
            deeper = " (12 bits stored in a file of 16 look like this)" if bits == 16 else ""
            return (
                f"{len(found)} of {_plural(len(looked_at), 'image')} looked at use less than a quarter of the range "
                f"between black and white, such as {_place(entry)}: {low} to {high} of "
                f"0 to 255{deeper}; spread their values over the whole range"
            )
    return None


def _spread(entries: Sequence[Entry], count: int) -> list[Entry]:
    """Returns so many entries, evenly spaced."""
    count = min(count, len(entries))
    return [entries[i * len(entries) // count] for i in range(count)]


def _range_of(listing: Listing, entry: Entry) -> tuple[int, int] | None:
    try:
        data = reading.read_file(str(listing.path), entry)
    except OSError:  # it is named when it is encoded
        return None
    ends = reading.value_range(data, in_haste=True)
    if ends is not None and ends[1] - ends[0] < LITTLE_RANGE:
        ends = reading.value_range(data, in_haste=False)
    return ends


def two_classes_warning(split: Split) -> str | None:
    """Returns a warning that names the pictures that lie in two classes, else None."""
    pairs = in_two_classes(split)
    if not pairs:
        return None
    listing = ", ".join(f"{_place(first)} and {_place(second)}" for first, second in pairs[:_MOST_PAIRS])
    more = f" and {len(pairs) - _MOST_PAIRS:,} more" if len(pairs) > _MOST_PAIRS else ""
    return (
        f"{_plural(len(pairs), 'picture')} in two classes, of which one must be wrong: {listing}{more} have the same "
        "content; remove one of each pair"
    )


def shared_content_warning(split: Split) -> str | None:
    """Returns a warning when the same file content is in two parts of the split, else None."""
    pairs = shared_content(split)
    if not pairs:
        return None
    first, second = pairs[0]
    if split.validation:
        what = "validation or test image(s) have the same content as one of another part"
    else:
        what = "test image(s) have the same content as a training image"
    return f"{len(pairs)} {what}, such as {_place(second)} and {_place(first)}; scores on them will look too good"


def _place(entry: Entry) -> str:
    return show_name(f"{entry.class_name}/{entry.name}")
