"""What a folder of images has and lacks since a split was drawn from it, in one line."""

import pytest
import tiny
from tiny_images import split_of

from gait_latents.images.changes import describe_changes, tell_changes_of_cache, tell_changes_of_run

THEN = {"a": ["1", "2", "3"], "b": ["1", "2"]}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (THEN, None),
        ({**THEN, "empty": []}, None),
        ({**THEN, "b": ["1", "2", "3", "4"]}, "has 2 images of b that this run does not know"),
        ({**THEN, "c": ["1"]}, "has the class c that this run does not know"),
        (
            {"a": ["1", "2", "3", "9"], "b": ["1", "2", "8"], "c": ["1"], "d": ["1"]},
            "has 2 images of a, b and the classes c, d that this run does not know",
        ),
        ({**THEN, "a": ["2", "3"]}, "lacks 1 image of a that this run knows"),
        ({"a": THEN["a"]}, "lacks the class b that this run knows"),
        ({**THEN, "b": []}, "lacks the class b that this run knows"),
        (
            {"a": ["1", "2", "7"], "c": ["1"]},
            "has 1 image of a and the class c that this run does not know, and "
            "lacks 1 image of a and the class b that this run knows",
        ),
    ],
)
def test_what_came_and_what_went_is_told_by_class(now, told):
    split = split_of(THEN, images_per_user=1, num_users="all")
    assert describe_changes(split, now, who="this run") == told


def test_an_image_of_the_gap_is_known():
    split = split_of({"a": list("12345")}, images_per_user=2, split="contiguous", split_gap=1)
    assert describe_changes(split, {"a": list("12345")}, who="this run") is None


def test_of_a_split_with_a_number_of_classes_only_so_many_of_the_folder_are_looked_at():
    split = split_of(THEN, images_per_user=1, num_users=2)
    assert describe_changes(split, {**THEN, "c": ["1"]}, who="this run") is None  # it may have been there then


def test_a_class_beyond_the_number_that_the_split_knows_is_no_missing_one():
    split = split_of(THEN, images_per_user=1, num_users=2)
    assert describe_changes(split, {"_first": ["1"], **THEN}, who="this run") == (
        "has the class _first that this run does not know"
    )


def test_the_folder_of_a_run_is_compared_with_its_split(tmp_path, capsys):
    tiny.make_images(tmp_path, {"a": 3, "b": 2})
    index = {"a": [f"walk_{i}.jpg" for i in range(3)], "b": ["walk_0.jpg", "walk_1.jpg"]}
    split = split_of(index, images_per_user=1, num_users="all")
    tell_changes_of_run(split, str(tmp_path))
    assert capsys.readouterr().out == ""
    tiny.make_images(tmp_path, {"a": 5})
    tell_changes_of_run(split, str(tmp_path))
    assert capsys.readouterr().out == (
        f"{tmp_path} has 2 images of a that this run does not know; the split of a run is fixed when it begins, and "
        "another --results_folder trains on what is there now\n"
    )


def test_edited_test_images_are_counted_where_their_content_is_known(tmp_path, capsys):
    tiny.make_images(tmp_path, {"a": 3})
    split = split_of({"a": [f"walk_{i}.jpg" for i in range(3)]}, images_per_user=1)
    before = split.with_keys({("a", f"walk_{i}.jpg"): f"{i}" * 64 for i in range(3)})
    edited = split.test[0]
    tell_changes_of_run(before, str(tmp_path), fresh=before)
    assert capsys.readouterr().out == ""
    tell_changes_of_run(before, str(tmp_path), fresh=before.with_keys({(edited.class_name, edited.name): "f" * 64}))
    assert "has 1 image edited since then; the split of a run" in capsys.readouterr().out
    tell_changes_of_run(split, str(tmp_path), fresh=before)  # a split without keys says nothing of content
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_listed_is_told_and_stops_nothing(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    tell_changes_of_run(split_of(THEN, images_per_user=1), str(tmp_path))
    said = capsys.readouterr().out
    assert said.startswith("the images of this run were not compared with what is in its folder now: no images in")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("num_users", "told"),
    [
        ("all", "has 1 image of a and the class c that the split in cache does not know; the split is drawn anew"),
        (2, "has 1 image of a that the split in cache does not know; the split is drawn anew"),
    ],
)
def test_the_split_of_a_cache_is_compared_with_the_one_drawn_now(tmp_path, monkeypatch, capsys, num_users, told):
    monkeypatch.chdir(tmp_path)
    now = {"a": ["0", *THEN["a"]], "b": THEN["b"], "c": ["1"]}
    stored = split_of(THEN, images_per_user=1, num_users="all")
    tell_changes_of_cache(stored, split_of(now, images_per_user=1, num_users=num_users), "images", tmp_path / "cache")
    tell_changes_of_cache(stored, stored, "images", tmp_path / "cache")
    hashed = stored.with_keys({("a", "1"): "1" * 64, ("b", "1"): "2" * 64})
    edited = stored.with_keys({("a", "1"): "1" * 64, ("b", "1"): "3" * 64, ("b", "2"): "4" * 64})
    tell_changes_of_cache(hashed, edited, "images", tmp_path / "cache")
    said = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    lines = [f"images {told} from what is there now", "images has 1 image edited since then; the split is drawn anew"]
    assert said == f"{lines[0]}\n{lines[1]} from what is there now\n"
