"""A space: its id is that of its spec, and spaces that differ say in what."""

from gait_latents.latents.space import FORMAT, Space


def test_a_space_is_its_spec_whatever_the_order_and_kind_of_sequence():
    one = Space.of({"a": 1, "b": [1, 2]}, 256, {"v": 1}, (8, 32, 32))
    other = Space.of({"b": (1, 2), "a": 1}, 256, {"v": 1}, [8, 32, 32])
    assert one == other
    assert one.id == other.id
    assert len(one.id) == 16
    assert one.moments_shape == (8, 32, 32)
    assert one.spec["format"] == FORMAT


def test_differing_fields_name_the_field_and_both_values():
    here = Space.of({"weights": "aa", "old": 1}, 256, {"v": {"size": 1}}, (8, 32, 32))
    there = Space.of({"weights": "bb", "new": None}, 128, {"v": {"size": 2}}, (8, 32, 32))
    assert here.differing_fields(there) == [
        "image_size: 256 vs 128",
        "recipe.v.size: 1 vs 2",
        "vae.new: absent vs null",
        "vae.old: 1 vs absent",
        'vae.weights: "aa" vs "bb"',
    ]
    assert here.differing_fields(here) == []
