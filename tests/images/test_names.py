"""Names: one order and one comparison for both Unicode forms, and the classes that a user means by what is typed."""

import unicodedata

import pytest

from gait_latents.common.errors import UserError
from gait_latents.images import names
from gait_latents.images.names import choose_names, natural_key, nfc, nfd

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café 2") for form in ("NFC", "NFD"))
ODD = ["-1", "-x", "all", "none", "a,b", 'q"t', "sp ace", "trail ", "100%", "#7", "new\nline", "a[1]", "人 1"]


def test_both_unicode_forms_of_a_name_have_one_place_in_the_order():
    others = ["b", "cafe", "caff", "café 10", "z"]
    for own in (COMPOSED, DECOMPOSED):
        assert sorted([*others, own], key=natural_key) == ["b", "cafe", "caff", own, "café 10", "z"]
    assert natural_key(COMPOSED) != natural_key(DECOMPOSED)
    assert nfc(DECOMPOSED) == COMPOSED and nfd(COMPOSED) == DECOMPOSED and COMPOSED != DECOMPOSED


def test_two_classes_of_one_name_in_two_unicode_forms_are_refused_by_their_code_points():
    names.refuse_alike(["cafe", COMPOSED, "CAFÉ 2"], "here")
    with pytest.raises(UserError, match=r"here have the same name, .*'cafe\\u0301 2' and 'caf\\xe9 2'"):
        names.refuse_alike(["b", DECOMPOSED, COMPOSED], "here")


def choose(*asked: str, known: list[str]) -> list[str]:
    return choose_names(asked, known, setting="classes", where="the model")


@pytest.mark.parametrize("stored", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("asked", [COMPOSED, DECOMPOSED, "caf?*", nfd("caf[éè] 2")])
def test_a_class_is_found_by_either_form_of_its_name(stored, asked):
    assert choose(asked, known=["b", stored]) == [stored]


@pytest.mark.parametrize("name", ODD)
def test_any_name_stands_for_itself(name):
    assert choose(*([name] if name != "all" else ["[a]ll"]), known=ODD) == [name]
    assert choose(name.strip() if name != "all" else "?ll", known=ODD) == [name]


def test_patterns_name_many_and_come_in_the_order_of_the_labels():
    known = [f"ID_{i}" for i in range(1, 32)]
    assert choose("all", known=known) == known
    assert choose("ID_3", "ID_1?", known=known) == ["ID_3", *(f"ID_1{i}" for i in range(10))]
    assert choose("ID_[12]", "*_31", known=known) == ["ID_1", "ID_2", "ID_31"]
    assert choose("all", "ID_2", known=["all", "ID_2", "x"]) == ["all", "ID_2"]


@pytest.mark.parametrize(
    ("known", "told"),
    [
        (["ID_1", "ID_6"], "the model has no class ID_9; did you mean ID_6? it has ID_1, ID_6"),
        (
            [f"ID_{i}" for i in range(31) if i != 9],
            "; did you mean ID_29? it has ID_0, ID_1, ID_2, ID_3, ID_4, ID_5, ID_6, ID_7, ID_8, ID_10, ID_11, ID_12 "
            "and 18 more",
        ),
        (["zebra"], "no class ID_9; it has zebra"),
    ],
)
def test_a_name_of_no_class_is_told_with_the_nearest_and_the_list(known, told):
    with pytest.raises(UserError) as caught:
        choose("ID_9", known=known)
    assert str(caught.value).startswith("--classes: the model has no class ID_9; ")
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id_1", "has no class id_1; did you mean ID_1? it has"),
        ("ID_1,x y", "has no class ID_1,x y; give the names as separate words: --classes ID_1 'x y'; it has"),
        ("ID_*, q,r", "has no class ID_*, q,r; it has"),
    ],
)
def test_a_name_in_other_case_and_names_joined_by_commas_are_told_as_they_should_be(text, told):
    with pytest.raises(UserError) as caught:
        choose(text, known=["ID_1", "ID_2", "x y"])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "found"), [("a.jpg", ".jpg"), ("a.b.HEIC", ".HEIC"), ("noending_0", ""), ("x.", ""), (" .png", ".png")]
)
def test_the_ending_of_a_name(name, found):
    assert names.ending(name) == found


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("labels.csv", "generate.py writes a file of that name"),
        ("Settings.JSON", "generate.py writes a file of that name"),
        ("overview.png", "generate.py writes a file of that name"),
        ("STRIP.png", "generate.py writes a file of that name"),
        (".hidden", "hidden or the system's own"),
        (".tmp-0", "hidden or the system's own"),
        ("__MACOSX", "hidden or the system's own"),
        ("a" * 256, "more than the 255 bytes"),
        ("步" * 86, "more than the 255 bytes"),
    ],
)
def test_a_class_whose_name_no_folder_of_generated_images_can_have_is_refused_with_the_remedy(name, why):
    assert list(names.unusable(["ID_1", name])) == [name]
    with pytest.raises(UserError) as error:
        names.refuse_unusable(["ID_1", name], "here")
    told = str(error.value)
    assert told.startswith(f"the class {name} in here cannot have that name: ") and why in told
    assert told.endswith("rename its folder, or name the other classes with --class_names")


def test_every_other_name_is_left_alone():
    usable = [*ODD, "labels", "labels.csv.old", "x..", "x. ", "CON", "a" * 255, "步" * 85, "a\udcff", "settings.yaml"]
    assert names.unusable(usable) == {}
    assert [name for name in usable if names.is_for_linux_alone(name)] == [
        *['q"t', "trail ", "new\nline", "x..", "x. ", "CON"]
    ]


def test_a_name_like_a_flag_is_proposed_in_a_form_that_works():
    with pytest.raises(UserError, match=r"has no class -rg; did you mean --classes=-rf\? it has -rf, ID_1"):
        choose("-rg", known=["-rf", "ID_1"])
    with pytest.raises(UserError, match=r"give the names as separate words: --classes=-rf ID_1; it has"):
        choose("-rf,ID_1", known=["-rf", "ID_1"])
    with pytest.raises(UserError, match=r"did you mean --classes \$'a\\x1b\[31mbcdef'\? it has"):
        choose("a[31mbcdef", known=["a\x1b[31mbcdef"])
    with pytest.raises(UserError, match=r"did you mean --images_per_class=-rf=5\?"):
        choose_names(["-rg"], ["-rf"], setting="images_per_class", where="the model", number="=5")
