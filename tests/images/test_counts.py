"""How many images of each class are generated: as asked, or as many as fill the real ones up; and how that is told."""

import pytest

from gait_latents.common.errors import UserError
from gait_latents.images.counts import counts_as_asked, counts_to_fill, describe_counts

CLASSES = tuple(f"ID_{number}" for number in range(1, 32))


def test_a_class_has_its_own_number_and_all_others_the_bare_one():
    counts = counts_as_asked(CLASSES[:4], {"ID_3": 100, "ID_4": 20}, 50)
    assert counts == {"ID_1": 50, "ID_2": 50, "ID_3": 100, "ID_4": 20}
    assert list(counts) == list(CLASSES[:4])  # in the order of the labels


def test_real_images_count_when_classes_are_filled_up():
    assert counts_to_fill(("a", "b", "c", "d"), 100, {"a": 37, "b": 100, "c": 140, "d": 99}) == {
        "a": 63,
        "b": 0,
        "c": 0,
        "d": 1,
    }


def test_nothing_to_fill_up_is_told():
    told = "--fill_up_to is 30, but each of these classes has 31 or more training images, so that there is nothing"
    with pytest.raises(UserError, match=told):
        counts_to_fill(("a", "b"), 30, {"a": 40, "b": 31})


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"a": 50, "b": 50}, "50 of each class"),
        ({"a": 1_500}, "1,500 of each class"),
        ({"a": 100, "b": 20}, "100 of a, 20 of b"),
        ({"a": 5, "b": 100, "c": 5}, "100 of b, 5 of each of the other 2 classes"),
        ({"a": 5, "b": 100, "c": 5, "d": 100, "e": 5}, "100 of each of b, d, 5 of each of the other 3 classes"),
        ({"a": 63, "b": 0, "c": 0}, "63 of a, none of each of the other 2 classes"),
        (dict.fromkeys(CLASSES, 50) | {"ID_31": 1}, "1 of ID_31, 50 of each of the other 30 classes"),
        (
            {name: number for number, name in enumerate(CLASSES[:9], start=1)},
            "1 of ID_1, 2 of ID_2, 3 of ID_3, 4 of ID_4, 5 of ID_5, 6 of ID_6, 24 of 3 more classes together",
        ),
    ],
)
def test_the_numbers_are_told_in_one_short_line(counts, text):
    assert describe_counts(counts) == text
