"""What a checkpoint says of its run: read from what it stored, and stored again as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from gait_latents.common.errors import UserError
from gait_latents.diffusion import build
from gait_latents.settings import AUTO_STEPS, with_later_settings_of_runs
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.run_meta import RunMeta

PATH = Path("state-00000008.safetensors")


@pytest.fixture
def stored(trained: Path) -> dict[str, Any]:
    """What the last full state of a run stores, as plain values."""
    return checkpoint.load(max((trained / "results").glob("state-*")))[1]


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def test_what_is_stored_is_read_and_stored_again_as_it_was(stored):
    meta = RunMeta.from_json(stored, PATH)
    assert canonical(meta.to_json()) == canonical(stored)
    assert meta.training is not None and meta.to_json()["training"] == stored["training"]


def test_each_fact_is_stored_under_its_own_name(stored):
    norm = {"scale": [1.5, 2.5, 3.5, 4.5], "shift": [0.25, 0.5, 0.75, 1.0]}
    digests = {"data_digest": "a" * 64, "moments_digest": "b" * 64, "image_suffix": ".webp", "torch": "2.6.0"}
    others = {"step": 77, "classes": ["x", "y"], "scale_factor": 0.5, "shift_factor": 0.125, "latent_norm": norm}
    others |= {**digests, "auto_steps": {"ddim": 9}, "compiled": True, "threads": 7, "training": {"scaler": {}}}
    others |= {"began_from": {"place": "./other", "step": 5, "digest": "c" * 64}}
    assert all(stored.get(name) != value for name, value in others.items())
    assert RunMeta.from_json({**stored, **others}, PATH).to_json() == {**stored, **others}


def test_averages_alone_say_nothing_of_training(trained, stored):
    state = run_folder.read_state(max((trained / "results").glob("ema-*")))
    assert state.meta.training is None and not state.is_full
    assert "training" not in state.meta.to_json()
    assert state.meta.to_json() == {name: value for name, value in stored.items() if name != "training"}


def test_the_stored_names_are_those_that_older_versions_read(stored):
    assert sorted(stored) == [
        "auto_steps",
        "classes",
        "compiled",
        "data_digest",
        "image_suffix",
        "latent_norm",
        "latent_shape",
        "moments_digest",
        "scale_factor",
        "settings",
        "shift_factor",
        "space",
        "step",
        "threads",
        "torch",
        "training",
    ]


def test_an_older_run_counts_as_having_done_what_was_done_then(stored):
    for name in ("auto_steps", "compiled", "torch", "threads"):
        del stored[name]
    for name in ("guidance_interval", "time_shift", "noise_shift"):
        del stored["settings"][name]
    meta = RunMeta.from_json(stored, PATH)
    assert meta.auto_steps == {"dpm++": 20, "ddim": 250} != AUTO_STEPS
    assert (meta.compiled, meta.torch, meta.threads) == (False, "", None)
    assert meta.settings["guidance_interval"] == [0.0, 1.0]
    assert meta.settings["time_shift"] == meta.settings["noise_shift"] == 0.0


def test_what_follows_from_the_facts_is_what_training_had(stored):
    meta = RunMeta.from_json(stored, PATH)
    assert list(meta.latent_shape) == stored["latent_shape"]
    assert meta.image_size == stored["settings"]["image_size"]
    assert meta.network_facts["num_classes"] == len(stored["classes"])
    facts = meta.network_facts
    assert [facts["latent_channels"], facts["latent_size"]] == stored["latent_shape"][:2]
    assert meta.network_facts.items() >= {name: stored["settings"][name] for name in build.NETWORK_SETTINGS}.items()
    assert meta.chosen_settings("dim", "seed", "no_such_setting") == {"dim": 8, "seed": stored["settings"]["seed"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": -1}, "its step is no number of steps"),
        ({"step": True}, "its step is no number of steps"),
        ({"classes": ["a", "../b", "c"]}, "'../b' is not the name of a class"),
        ({"classes": ["a", "a", "c"]}, "its classes are no list of names"),
        ({"latent_shape": [4, 8, 9]}, "another shape than its space"),
        ({"latent_norm": {"shift": [0.0], "scale": [1.0]}}, "its normalisation is of other latents"),
        ({"scale_factor": "x"}, "its scale_factor or shift_factor is no number"),
        ({"shift_factor": True}, "its scale_factor or shift_factor is no number"),
        ({"image_suffix": 5}, "its data_digest or image_suffix is no text"),
        ({"moments_digest": 5}, "its moments_digest is no text"),
        ({"settings": []}, "its settings are no table"),
        ({"auto_steps": {"dpm++": 0}}, "its auto_steps are no numbers of steps"),
        ({"threads": 0}, "its threads are no number of threads"),
        ({"threads": "2"}, "its threads are no number of threads"),
        ({"space": {}}, "it does not describe a space"),
        ({"began_from": "a run"}, "TypeError: "),
        ({"began_from": {"place": "a"}}, "KeyError: "),
        ({"began_from": {"place": 1, "step": 1, "digest": "a"}}, "its began_from names no run"),
        ({"began_from": {"place": "a", "step": "1", "digest": "a"}}, "its began_from names no run"),
    ],
)
def test_what_training_would_not_have_stored_is_refused_and_the_file_named(stored, change, told):
    before = copy.deepcopy(stored)
    with pytest.raises(UserError) as caught:
        RunMeta.from_json({**stored, **change}, PATH)
    assert str(caught.value).startswith(f"{PATH} is no checkpoint of a training run") and told in str(caught.value)
    assert stored == before


@pytest.mark.parametrize("value", [1.5, True, 7])
def test_a_stored_path_that_is_no_text_is_refused(stored, value):
    settings = {**stored["settings"], "data_path": value}
    with pytest.raises(UserError, match="data_path in its settings is"):
        RunMeta.from_json({**stored, "settings": settings}, PATH)


def test_every_fact_that_has_no_default_of_older_runs_is_needed(stored):
    optional = {"auto_steps", "compiled", "torch", "threads", "training"}
    for name in stored.keys() - optional:
        with pytest.raises(UserError, match=f"KeyError: '{name}'"):
            RunMeta.from_json({key: value for key, value in stored.items() if key != name}, PATH)
    for name in (*build.NETWORK_SETTINGS, "image_size"):
        settings = {key: value for key, value in stored["settings"].items() if key != name}
        if name in with_later_settings_of_runs(settings):
            continue
        with pytest.raises(UserError, match=f"its settings lack {name}"):
            RunMeta.from_json({**stored, "settings": settings}, PATH)
