"""JSON that is sealed has one text for one value, and JSON of others is read with distrust."""

import pytest

from gait_latents.common import json_text


def test_equal_values_give_one_text_in_ascii():
    assert json_text.canonical({"b": 1.5, "a": ["é", None, True]}) == '{"a":["\\u00e9",null,true],"b":1.5}'
    assert json_text.canonical({"a": 1, "b": 2}) == json_text.canonical({"b": 2, "a": 1})
    assert json_text.parse(json_text.canonical({"name \udcff": [1, 2.5, {}]})) == {"name \udcff": [1, 2.5, {}]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text.canonical(float("nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "a name occurs twice"),
        ("[NaN]", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[1e999]", "1e999 is not a number"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
        (b"\xff", "can't decode"),
    ],
)
def test_what_is_no_plain_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        json_text.parse(text)
