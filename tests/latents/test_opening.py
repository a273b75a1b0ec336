"""What preprocessing and training do first: which images, and which space of the cache."""

import dataclasses
import shutil
from pathlib import Path

import pipeline
import pytest
import tiny
import tiny_vae

from gait_latents.common import cli
from gait_latents.common.errors import UserError
from gait_latents.images import data_report, reading, selection
from gait_latents.images.reading import BadImage
from gait_latents.images.split import Entry, Skipped, Split
from gait_latents.latents import opening, vae_fit
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.manifest import read_manifest
from gait_latents.settings import ImageSettings, PreprocessSettings
from gait_latents.vae import load

FLAG = dict.fromkeys(cli.specs(PreprocessSettings), "flag")
MANIFEST = dict.fromkeys(cli.specs(PreprocessSettings), "manifest of latents_cache")


def settings_of(root: Path, **changes) -> ImageSettings:
    standard = {"data_path": str(root / "data"), "vae_path": str(root / "vae.pt"), "image_size": 16}
    return dataclasses.replace(PreprocessSettings(), **{**standard, "images_per_user": 5, **changes})


def choose(root: Path, stored: Split | None = None, *, at_hand: bool = True, **changes) -> Split:
    return selection.choose_images(settings_of(root, **changes), at_hand=at_hand, stored=stored, where="here")


def place_and_key(split: Split) -> list[tuple[str, str, str]]:
    return [(entry.class_name, entry.name, entry.key) for entry in (*split.train, *split.test)]


# --- which images ------------------------------------------------------------------------------------------


def test_every_chosen_image_has_the_key_of_its_file(world):
    split = choose(world)
    assert len(split.train) == 15 and len(split.test) == 9
    for entry in (*split.train, *split.test):
        assert entry.key == reading.image_key(reading.image_path(world / "data", entry).read_bytes())


@pytest.mark.parametrize(
    "changes", [{}, {"images_per_user": 3}, {"num_users": 2}, {"seed": 7}, {"split": "contiguous"}]
)
def test_a_stored_split_stands_in_for_the_images(world, changes):
    stored = Split.from_bytes(choose(world).to_bytes(), "here")
    assert place_and_key(choose(world, stored, at_hand=False, **changes)) == place_and_key(choose(world, **changes))


def test_skipped_images_of_a_stored_split_have_a_key_that_is_never_cached(world):
    split = choose(world, images_per_user="all")
    first = split.train[0]
    stored = split.without([Skipped(first.class_name, first.name, "it is broken")])
    again = choose(world, stored, at_hand=False, images_per_user="all")
    assert [(e.class_name, e.name) for e in again.train] == [(e.class_name, e.name) for e in split.train]
    assert len(again.train[0].key) == 64 and again.train[0].key != first.key


def test_a_file_that_cannot_be_read_costs_nobody_else_a_thing(world):
    (world / "data" / "ID_2" / "walk_3.jpg").unlink()
    (world / "data" / "ID_2" / "walk_3.jpg").symlink_to("nowhere")
    (world / "data" / "ID_2" / "walk_4.jpg").unlink()
    (world / "data" / "ID_2" / "walk_4.jpg").symlink_to("nowhere either")
    split = choose(world, images_per_user="all")
    keys = {entry.name: entry.key for entry in split.train if entry.class_name == "ID_2"}
    assert len(split.train) == 24 and len(set(keys.values())) == 8
    bad = reading.find_bad_images(split.train, data_path=str(world / "data"), image_size=16)
    assert [(item.name, item.reason) for item in bad] == [
        ("walk_3.jpg", "cannot be read: No such file or directory"),
        ("walk_4.jpg", "cannot be read: No such file or directory"),
    ]


def test_a_file_that_is_gone_keeps_its_key_and_a_new_content_has_a_new_one(world):
    split = choose(world)
    gone, changed, *others = split.train
    reading.image_path(world / "data", gone).unlink()
    reading.image_path(world / "data", changed).write_bytes(b"other")
    fresh = selection.with_fresh_keys(split, str(world / "data")).train
    assert fresh[0] == gone
    assert fresh[1].key == reading.image_key(b"other")
    assert list(fresh[2:]) == others


def test_an_image_is_read_only_while_it_has_the_content_of_its_key(world):
    entry = choose(world).train[0]
    path = reading.image_path(world / "data", entry)
    pixels = reading.read_image(str(world / "data"), entry, image_size=16)
    assert pixels.shape == (16, 16, 3)
    tiny.make_image(99).save(path)
    with pytest.raises(BadImage, match="changed since"):
        reading.read_image(str(world / "data"), entry, image_size=16)
    assert reading.read_image(str(world / "data"), Entry(entry.class_name, entry.name), image_size=16) is not None
    path.unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        reading.read_image(str(world / "data"), entry, image_size=16)


def test_fewer_class_folders_than_asked_for_is_a_warning_that_lists_them(world, capsys):
    assert choose(world, num_users=31).classes == pipeline.CLASSES
    assert "warning: --num_users is 31 but there are only 3 class folders: ID_1, ID_2, ID_10" in capsys.readouterr().err


def test_more_classes_than_a_stored_split_knows_need_the_images(world):
    stored = choose(world, num_users=2)
    with pytest.raises(UserError, match=r"--num_users is 3, but here knows 2 classes"):
        choose(world, stored, at_hand=False, num_users=3)
    assert choose(world, stored, at_hand=False, num_users=1).classes == ("ID_1",)


def test_the_same_content_in_training_and_test_is_a_warning(world, capsys):
    split = choose(world)
    data_report.warn_of_equal_pictures(split)
    assert capsys.readouterr().err == ""
    train, test = split.train[0], next(entry for entry in split.test if entry.class_name == "ID_10")
    shutil.copy(reading.image_path(world / "data", train), reading.image_path(world / "data", test))
    data_report.warn_of_equal_pictures(choose(world))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: 1 test image(s) have the same content as a training image")
    assert f"{test.class_name}/{test.name} and {train.class_name}/{train.name}" in warning


def test_the_commonest_ending_counts(world):
    assert selection.common_suffix(choose(world)) == ".jpg"
    tiny.make_images(world / "data", {"A": 8, "B": 8, "C": 8, "D": 8}, suffix=".PNG")
    assert selection.common_suffix(choose(world)) == ".png"


def test_a_folder_without_class_folders_counts_as_no_images_only_where_they_may_lack(world):
    shutil.rmtree(world / "data")
    (world / "data").mkdir()
    assert not selection.images_at_hand(settings_of(world), FLAG, may_lack=True)
    assert not selection.images_at_hand(settings_of(world), MANIFEST, may_lack=False)


# --- which space -------------------------------------------------------------------------------------------


def space_of(root: Path, known: vae_fit.ChosenSpace | None = None, sources: dict[str, str] = FLAG, **changes):
    return vae_fit.choose_space(settings_of(root, **changes), sources, known, may_lack=False)


def test_the_space_follows_encoder_image_size_and_resize_and_nothing_else(world):
    chosen = space_of(world)
    assert chosen.vae_at_hand and chosen.space.moments_shape == (8, 8, 8)
    assert space_of(world, seed=1, images_per_user="all", encode_precision="float16").space == chosen.space
    assert space_of(world, image_size=32).space.id != chosen.space.id
    assert len({space_of(world, resize=how).space.id for how in ("crop", "squash", "pad")} | {chosen.space.id}) == 3
    tiny_vae.save_tiny_vae(world / "other.pt", seed=1)
    assert space_of(world, vae_path=str(world / "other.pt")).space.id != chosen.space.id
    tiny_vae.save_tiny_vae(world / "same.safetensors", wrapped=True)
    assert space_of(world, vae_path=str(world / "same.safetensors")).space.id == chosen.space.id


def test_choosing_a_space_builds_no_vae(world, monkeypatch):
    monkeypatch.setattr(load, "load_vae", lambda *args, **kwargs: pytest.fail("built"))
    assert space_of(world).vae_at_hand


def test_without_a_vae_the_known_space_is_taken(world, capsys):
    known = space_of(world)
    (world / "vae.pt").unlink()
    chosen = space_of(world, known, MANIFEST)
    assert chosen == known
    assert "no VAE at hand" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--image_size is 32, but the cached latents are of images of 16"):
        space_of(world, known, MANIFEST, image_size=32)
    with pytest.raises(UserError, match=r"vae\.pt"):
        space_of(world, known, FLAG)
    with pytest.raises(UserError, match=r"vae\.pt"):
        space_of(world, None, MANIFEST)


def test_another_space_than_the_known_one_is_told_in_the_names_of_settings(world, capsys):
    known = space_of(world)
    space_of(world, known)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("VAE vae.pt: ") for line in lines)
    space_of(world, known, image_size=32)
    _, said = capsys.readouterr().out.splitlines()
    assert "(--image_size 32, the cache has 16)" in said and "vae_path" not in said
    tiny_vae.save_tiny_vae(world / "vae.pt", seed=1)
    space_of(world, known)
    assert f"(--vae_path {world / 'vae.pt'} has another encoder" in capsys.readouterr().out


def test_the_manifest_gives_the_space_back(world):
    chosen = space_of(world)
    opening.record_manifest(world / "cache", settings_of(world), chosen, 15)
    manifest = read_manifest(world / "cache")
    assert manifest is not None
    assert vae_fit.space_of_manifest(manifest) == dataclasses.replace(chosen, vae_at_hand=False)
    assert manifest.settings["data_path"] == str(world / "data")


# --- a cache in other people's loops -----------------------------------------------------------------------


def test_a_complete_cache_opens_without_vae_and_images(cached, encoder):
    shutil.rmtree(cached / "data")
    (cached / "vae.pt").unlink()
    dataset = opening.open_cache(cached / "latents_cache")
    assert dataset.fill() == [] and len(dataset) == 15 and encoder.built == []


def test_what_a_cache_lacks_is_encoded_to_the_same_latents(emptied, trained, encoder):
    assert opening.open_cache(emptied / "latents_cache").fill() == []
    assert encoder.num_images == 15
    assert pipeline.stored_moments(emptied / "latents_cache") == pipeline.stored_moments(trained / "latents_cache")
    assert len(LatentDataset.open(emptied / "latents_cache")) == 15


def test_the_test_images_can_be_encoded_later(cached, encoder):
    with pytest.raises(UserError, match="9 of 9 test images are not in"):
        LatentDataset.open(cached / "latents_cache", split="test")
    assert opening.open_cache(cached / "latents_cache", split="test").fill() == []
    assert encoder.num_images == 9
    assert len(LatentDataset.open(cached / "latents_cache", split="test")) == 9


def test_images_that_are_gone_are_named_with_the_reason(emptied):
    shutil.rmtree(emptied / "data" / "ID_1")
    dataset = opening.open_cache(emptied / "latents_cache")
    failed = dataset.fill()
    assert [dataset.names[position].split("/")[0] for position, _ in failed] == ["ID_1"] * 5
    assert {reason for _, reason in failed} == {"cannot be read: No such file or directory"}


def test_an_image_that_was_edited_since_is_named_with_what_helps(emptied):
    dataset = opening.open_cache(emptied / "latents_cache")
    tiny.make_image(77).save(emptied / "data" / dataset.names[7])
    ((position, reason),) = dataset.fill()
    assert position == 7
    assert reason.startswith("was edited since the cache was made; put it back as it was, or run preprocess_latents.py")
    assert pipeline.preprocess(emptied) == 0  # which is said to help
    assert opening.open_cache(emptied / "latents_cache").fill() == []


def test_another_vae_does_not_complete_a_cache(emptied):
    tiny_vae.save_tiny_vae(emptied / "vae.pt", seed=1)
    with pytest.raises(UserError, match=r"makes other latents than those of the cache \(vae\.weights: .* vs .*\)"):
        opening.open_cache(emptied / "latents_cache")


def test_a_split_that_is_none_is_refused(cached):
    for opened in (opening.open_cache, LatentDataset.open):
        with pytest.raises(UserError, match="split is 'tests'; it is train, validation or test"):
            opened(cached / "latents_cache", split="tests")


def test_a_split_without_test_images_is_told(world):
    assert pipeline.preprocess(world, images_per_user="all") == 0
    with pytest.raises(UserError, match="has no test images; lower --images_per_user"):
        LatentDataset.open(world / "latents_cache", split="test")


def test_a_folder_that_is_no_cache_is_refused(tmp_path, cached):
    for folder in (tmp_path, cached / "data"):
        with pytest.raises(UserError, match=r"has no manifest\.json or no split\.json; run preprocess_latents\.py"):
            opening.open_cache(folder)
