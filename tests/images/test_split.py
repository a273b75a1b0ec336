"""Which images are used: the same for a seed for ever, whatever other classes hold; and the split as it is stored."""

import hashlib
import json
from typing import Any

import pytest
from properties import given, quick, st
from tiny_images import small_split, split_of

from gait_latents.common.errors import UserError
from gait_latents.images import folders, reading
from gait_latents.images.folders import natural_key
from gait_latents.images.split import PARTS, Skipped, Split, shared_content

# --- which of them are used --------------------------------------------------------------------------------


indexes = st.dictionaries(
    st.text(alphabet="ab12", min_size=1, max_size=3),
    st.lists(st.text(alphabet="xy12", min_size=1, max_size=3), min_size=3, max_size=9, unique=True),
    min_size=1,
    max_size=4,
)
kinds = st.sampled_from(["random", "contiguous"])


def places(entries) -> set[tuple[str, str]]:
    return {(entry.class_name, entry.name) for entry in entries}


@quick
@given(indexes, kinds, st.sampled_from([1, 3, "all"]), st.integers(0, 9))
def test_a_split_divides_all_images_in_natural_order(index, kind, images_per_user, seed):
    split = split_of(index, images_per_user=images_per_user, split=kind, seed=seed)
    assert list(split.classes) == sorted(index, key=natural_key)
    parts = (split.train, split.test, split.gap)
    everything = [(class_name, name) for class_name in index for name in index[class_name]]
    assert sorted(everything) == sorted((e.class_name, e.name) for part in parts for e in part)
    for part in parts:
        order = [(natural_key(e.class_name), natural_key(e.name)) for e in part]
        assert order == sorted(order)
    for class_name, names in index.items():
        wanted = len(names) if images_per_user == "all" else images_per_user
        assert sum(entry.class_name == class_name for entry in split.train) == wanted


@quick
@given(indexes, kinds, st.integers(0, 9))
def test_another_class_changes_nobody_elses_split(index, kind, seed):
    before = split_of(index, split=kind, seed=seed)
    after = split_of({**index, "new 5": ["1", "2", "3"]}, split=kind, seed=seed)
    for part in ("train", "test", "gap"):
        others = tuple(e for e in getattr(after, part) if e.class_name != "new 5")
        assert others == getattr(before, part)


@quick
@given(indexes, kinds, st.integers(0, 9), st.text(alphabet="xyz0", min_size=4, max_size=4))
def test_another_image_displaces_at_most_one(index, kind, seed, name):
    before = split_of(index, split=kind, seed=seed)
    class_name = next(iter(index))
    after = split_of({**index, class_name: [*index[class_name], name]}, split=kind, seed=seed)
    assert len(places(before.train) - places(after.train)) <= 1


@quick
@given(indexes, kinds, st.integers(0, 9), st.sampled_from([1, 2, "all"]))
def test_a_stored_split_stands_in_for_the_folder(index, kind, seed, num_users):
    split = split_of(index, split=kind, seed=seed, num_users=num_users)
    skipped = Skipped(split.train[0].class_name, split.train[0].name, "truncated")
    for stored in (split, split.without([skipped])):
        stored = Split.from_bytes(stored.to_bytes(), "here")
        assert split_of(stored.index(), split=kind, seed=seed, num_users=num_users) == split


def test_the_images_of_a_seed_are_the_same_for_ever():
    # Were this order another one, the test images of every user would move into training.
    index = {"ID_1": [f"{i}.jpg" for i in range(12)], "ID_2": [f"{i}.jpg" for i in range(12)]}
    ranks = {name: hashlib.sha256(f'[42, "ID_2", "{name}"]'.encode()).digest() for name in index["ID_2"]}
    expected = sorted(sorted(ranks, key=lambda name: ranks[name])[:4], key=natural_key)
    names = [(entry.class_name, entry.name) for entry in split_of(index, images_per_user=4, seed=42).train]
    assert names[4:] == [("ID_2", name) for name in expected]
    assert [name for _, name in names] == ["7.jpg", "8.jpg", "9.jpg", "11.jpg", "3.jpg", "6.jpg", "7.jpg", "9.jpg"]


def test_the_seed_decides_and_a_larger_share_contains_the_smaller():
    index = {"a": [str(i) for i in range(100)]}
    ten, twenty = split_of(index, images_per_user=10), split_of(index, images_per_user=20)
    assert places(ten.train) < places(twenty.train)
    assert places(split_of(index, images_per_user=10, seed=1).train) != places(ten.train)


def test_a_contiguous_split_trains_on_one_end_and_leaves_a_gap():
    index = {"ID_1": [f"{i}.jpg" for i in reversed(range(12))], "ID_2": ["1", "2", "3", "4", "5", "6"]}
    split = split_of(index, images_per_user=5, split="contiguous", split_gap=4)
    names = {
        part: [e.name for e in getattr(split, part) if e.class_name == "ID_1"] for part in ("train", "gap", "test")
    }
    assert names["train"] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert names["gap"] == ["5.jpg", "6.jpg", "7.jpg", "8.jpg"]
    assert names["test"] == ["9.jpg", "10.jpg", "11.jpg"]
    assert [e.name for e in split.gap if e.class_name == "ID_2"] == ["6"]


def test_a_contiguous_split_may_begin_elsewhere():
    index = {"a": [f"{i}.jpg" for i in range(12)]}
    split = split_of(index, images_per_user=4, split="contiguous", split_gap=1, split_start=0.75, validation_per_user=1)
    names = {part: [e.name.removesuffix(".jpg") for e in getattr(split, part)] for part in (*PARTS, "gap")}
    assert names["train"] == ["0", "9", "10", "11"]  # from the ninth on, and on at the first
    assert names["gap"] == ["1", "3", "8"]  # after the training images, after the validation image, before the ninth
    assert names["validation"] == ["2"] and names["test"] == ["4", "5", "6", "7"]
    assert Split.from_bytes(split.to_bytes(), "here") == split and split.rule["split_start"] == 0.75
    first = split_of(index, images_per_user=4, split="contiguous")
    assert split_of(index, images_per_user=4, split="contiguous", split_start=1.0).train == first.train
    assert b"split_start" not in first.to_bytes()  # as earlier versions wrote it
    with pytest.raises(UserError, match="a random split begins nowhere: give --split contiguous, or --split_start 0"):
        split_of(index, split_start=0.5)


@pytest.mark.parametrize("start", [0.0, 0.1, 0.35, 0.5, 0.8, 0.99])
@pytest.mark.parametrize(("count", "gap"), [(1, 0), (3, 2), (10, 4), (26, 3), (30, 3)])
def test_no_image_of_another_part_is_within_the_gap_of_a_training_image(start, count, gap):
    index = {"a": [f"{i:02}" for i in range(30)]}
    how: dict[str, Any] = {"split": "contiguous", "split_gap": gap, "split_start": start, "validation_per_user": 2}
    split = split_of(index, images_per_user=count, **how)
    trained, validated, tested = ([int(e.name) for e in split.part(part)] for part in PARTS)
    assert len(trained) == count and len(split.used) + len(split.gap) == 30
    assert all(abs(one - other) > gap for one in trained for other in (*validated, *tested))
    assert all(abs(one - other) > gap for one in validated for other in tested)
    assert len(split.gap) <= 3 * gap  # no more is left out than that needs


def test_no_gap_is_left_where_the_recording_ends():
    index = {"a": [f"{i:02}" for i in range(30)]}
    split = split_of(index, images_per_user=10, split="contiguous", split_gap=4, split_start=0.67)
    assert [e.name for e in split.train] == [f"{i}" for i in range(20, 30)]
    assert [e.name for e in split.gap] == ["16", "17", "18", "19"] and len(split.test) == 16


def test_classes_with_too_few_images_are_listed_with_the_number_that_would_do():
    index = {"ID_1": list("abcdefghi"), "ID_2": ["a", "b"], "ID_10": ["a", "b", "c"]}
    with pytest.raises(UserError) as caught:
        split_of(index, images_per_user=5)
    assert str(caught.value) == (
        "--images_per_user is 5 but ID_2 has 2, ID_10 has 3; lower it to 2, add images, or give "
        "--small_classes take for all that such classes have"
    )
    assert len(split_of(index, images_per_user=5, num_users=1).train) == 5


@pytest.mark.parametrize("images_per_user", [3, "all"])
def test_a_class_without_images_is_an_error_that_names_it(images_per_user):
    with pytest.raises(UserError, match=r"ID_2 has none; .*remove the folders that have none"):
        split_of({"ID_1": ["a", "b", "c"], "ID_2": []}, images_per_user=images_per_user)


def test_fewer_classes_than_asked_for_is_a_warning_that_lists_them():
    index = {"ID_1": ["a"], "ID_2": ["a"]}
    assert folders.missing_classes_warning(index, "all") is None
    assert folders.missing_classes_warning(index, 2) is None
    assert (
        folders.missing_classes_warning(index, 3) == "--num_users is 3 but there are only 2 class folders: ID_1, ID_2"
    )
    assert split_of(index, images_per_user=1, num_users=3).classes == ("ID_1", "ID_2")
    told = folders.missing_classes_warning(["ID_1"], 3)
    assert told == "--num_users is 3 but there is only 1 class folder: ID_1"


def test_fewer_named_classes_than_asked_for_are_told_as_named():
    told = folders.missing_classes_warning(["a", "b"], 3, are_named=True)
    assert told == "--num_users is 3 but --class_names names only 2: a, b"


def test_entries_know_their_labels_and_keys():
    split = split_of({"ID_2": ["a", "b"], "ID_10": ["a", "b"]}, images_per_user=1)
    assert split.labels(split.train) == [0, 1]
    assert split.labels(reversed(split.test)) == [1, 0]
    assert split.keys() == {}
    keys = {(entry.class_name, entry.name): reading.image_key(entry.name.encode()) for entry in split.train}
    assert split.with_keys(keys).keys() == keys
    assert split.with_keys(keys).with_keys({}) == split.with_keys(keys)


def test_skipped_images_leave_the_split_but_not_its_record():
    split = split_of({"a": ["1", "2", "3"], "b": ["1", "2", "3"]})
    gone = [Skipped("a", split.train[0].name, "empty"), Skipped("b", split.test[-1].name, "cut short")]
    left = split.without(gone[:1]).without(gone)
    assert left.skipped == tuple(gone)
    assert places(left.train) == places(split.train) - places(gone)
    assert places(left.test) == places(split.test) - places(gone)
    with pytest.raises(UserError, match="no training image can be read of a;"):
        split.without([Skipped("a", name, "empty") for name in "123"])


def test_content_in_both_parts_is_found():
    split = split_of({"a": ["1", "2", "3", "4"]}, images_per_user=2)
    assert shared_content(split) == []
    same = reading.image_key(b"same")
    split = split.with_keys({(e.class_name, e.name): same for e in (*split.train, split.test[0])})
    assert shared_content(split) == [(split.train[0], split.test[0])]


# --- the stored split --------------------------------------------------------------------------------------


def test_a_stored_split_is_readable_with_one_image_a_line():
    data = small_split().to_bytes()
    lines = data.decode().splitlines()
    assert json.loads(data)["rule"]["split"] == "contiguous"
    assert sum("3.jpg" in line for line in lines) == 1 and all(len(line) < 200 for line in lines)
    key = reading.image_key(b"1.jpg")
    assert f'    {{"class": "ID_1", "name": "1.jpg", "key": "{key}"}}' in lines
    assert Split.from_bytes(data, "here") == small_split()
