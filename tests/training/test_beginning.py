"""A new run that begins with the weights of another run, which has other classes."""

import re
import shutil
import signal
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_vae
import torch
from pipeline import (
    CLASSES,
    HALF,
    STEPS,
    at_step,
    forget_setting,
    generate,
    one_error,
    signal_self,
    state_digests,
    train,
    train_flags,
)

from gait_latents.common.errors import UserError
from gait_latents.diffusion import build
from gait_latents.latents.space import Space
from gait_latents.training import beginning, checkpoint, run_folder
from gait_latents.training.plan import TrainingPlan, make_plan, num_steps
from gait_latents.training.run_data import open_data
from gait_latents.training.run_folder import SavedState
from gait_latents.training.trainer import Trainer, start_trainer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "format_1"
EMBEDDINGS = "model.classes_emb.weight"
CPU = torch.device("cpu")


@pytest.fixture
def other(trained: Path, cached: Path) -> Path:
    """A world with the classes ID_2, ID_3 and ID_10; the run of `trained` knows ID_1, ID_2 and ID_10."""
    (cached / "data" / "ID_1").rename(cached / "data" / "ID_3")
    return cached


@pytest.fixture
def state(trained: Path) -> SavedState:
    """The last state of the run to begin with."""
    found = run_folder.newest_state(trained / "results")
    assert found is not None
    return found


@pytest.fixture
def apart(state: SavedState, tmp_path: Path) -> SavedState:
    """The same with an average that differs from the weights, as that of a longer run does."""
    path = tmp_path / run_folder.full_name(STEPS)
    averages = {f"ema.{name}": tensor / 2 for name, tensor in state.averages.items()}
    checkpoint.save(path, state.tensors | averages, state.meta.to_json())
    return run_folder.read_state(path)


def plan_of(world: Path, **changes: object) -> TrainingPlan:
    return make_plan(train_flags(world, **{"num_samples": 0, **changes}))


def start(world: Path, **changes: object) -> Trainer:
    """Returns the trainer of a new run before its first step."""
    plan = plan_of(world, **changes)
    return start_trainer(plan, open_data(plan, CPU), CPU)


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if name.startswith("model.")}


# --- what is taken along -----------------------------------------------------------------------------------


def test_weights_and_average_are_taken_and_embeddings_by_the_name_of_the_class(other, apart, capsys):
    new = start(other)
    capsys.readouterr()
    begun = start(other, init_from=apart.path)
    said = capsys.readouterr().out
    for network, stored in ((begun.diffusion, apart.weights), (begun.ema.model, apart.averages)):
        found, fresh = weights(network), weights(new.diffusion)
        assert found.keys() == {name for name in stored if name.startswith("model.")}
        assert all(torch.equal(found[name], stored[name]) for name in found if name != EMBEDDINGS)
        own, theirs = found[EMBEDDINGS], stored[EMBEDDINGS]
        assert torch.equal(own[0], theirs[1]) and torch.equal(own[2], theirs[2])  # ID_2 and ID_10
        assert torch.equal(own[1], fresh[EMBEDDINGS][1])  # ID_3, as a new model of this seed has it
    assert not torch.equal(begun.diffusion.model.null_classes_emb, begun.ema.model.model.null_classes_emb)
    assert (
        f"begins with the weights of {apart.path} at step 8: embeddings of 2 of 3 classes kept; new: ID_3; "
        "not taken along: ID_1\n"
    ) in said
    assert begun.finished_steps == 0 and not begun.optimizer.state_dict()["state"]


def test_latents_are_normalised_as_the_weights_know_them(other, trained, state, capsys):
    begun = start(other, init_from=trained / "results", latent_norm_images=1)
    assert begun.norm.to_json() == state.meta.latent_norm.to_json()
    assert "the latents are normalised as in that run; optimizer and steps begin anew\n" in capsys.readouterr().out
    assert start(other, latent_norm_images=1, results_folder=other / "new").norm.to_json() != begun.norm.to_json()


def test_factors_that_are_given_have_no_effect_beside_those_of_the_other_run_and_that_is_said(
    other, trained, state, capsys
):
    begun = start(other, init_from=trained / "results", scale_factor=0.5)
    assert begun.norm.to_json() == state.meta.latent_norm.to_json()
    told = "scale_factor and shift_factor are not used, as the latents are normalised as in the run of --init_from\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("ID_1", "ID_2", "ID_10"), "embeddings of 3 of 3 classes kept\n"),
        (("ID_1", "ID_2", "ID_7", "ID_10", "ID_30"), "embeddings of 3 of 5 classes kept; new: ID_7, ID_30\n"),
        (("ID_10",), "embeddings of 1 of 1 classes kept; not taken along: ID_1, ID_2\n"),
        (("x", "y"), "embeddings of 0 of 2 classes kept; new: x, y; not taken along: ID_1, ID_2, ID_10\n"),
        (
            tuple(f"new_{number}" for number in range(10)),
            "new: new_0, new_1, new_2, new_3, new_4, new_5, new_6, new_7 and 2 more; not",
        ),
    ],
)
def test_classes_may_be_more_or_fewer_or_others(trained, state, capsys, names, told):
    facts = {"settings": state.meta.settings, "latent_shape": state.meta.latent_shape}
    network = build.build_diffusion(**facts, num_classes=len(names))
    average = build.build_diffusion(**facts, num_classes=len(names))
    before = weights(network)[EMBEDDINGS].clone()
    place = str(trained / "results")
    beginning.begin(beginning.read_beginning(place), network, average, names)
    for label, name in enumerate(names):
        theirs = state.weights[EMBEDDINGS]
        expected = theirs[CLASSES.index(name)] if name in CLASSES else before[label]
        assert torch.equal(weights(network)[EMBEDDINGS][label], expected)
    said = capsys.readouterr().out
    assert told in said
    assert ("--freeze_network may serve them better" in said) == (not {*names} & {*CLASSES})


def test_a_name_is_the_same_in_both_ways_to_write_an_accent():
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert beginning._rows_of((apart, "b"), ("b", composed)) == {0: 1, 1: 0}
    assert beginning._rows_of((composed, "b"), (apart,)) == {0: 0}
    assert beginning._rows_of((apart, composed), (composed, apart)) == {0: 1, 1: 0}  # where both are classes


def test_the_average_goes_on_from_the_other_one_instead_of_copying_the_first_weights(other, apart):
    begun = start(other, init_from=apart.path, ema_update_every=1)
    before = {name: tensor.clone() for name, tensor in weights(begun.ema.model).items()}
    begun.train_step()
    decay = 1 - 2 ** (-2 / 3)
    for name, value in weights(begun.ema.model).items():
        expected = decay * before[name] + (1 - decay) * weights(begun.diffusion)[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_a_frozen_network_is_the_average_and_only_embeddings_are_learnt(other, apart, capsys):
    begun = start(other, init_from=apart.path, freeze_network="true", ema_update_every=1)
    said = capsys.readouterr().out
    assert f"begins with the averaged weights of {apart.path} at step 8" in said
    assert "the network stays as it is, and the embeddings of classes alone are learnt\n" in said
    assert " M parameters (24 of them learnt), 3 classes" in said  # 8 for each
    before = weights(begun.diffusion)[EMBEDDINGS].clone()
    assert torch.equal(before, weights(begun.ema.model)[EMBEDDINGS])
    for _ in range(3):
        begun.train_step()
    for network in (begun.diffusion, begun.ema.model):
        found = weights(network)
        assert all(torch.equal(found[name], apart.averages[name]) for name in found if name != EMBEDDINGS)
        assert not torch.equal(found[EMBEDDINGS], before)
    assert len(begun.optimizer.state_dict()["state"]) == 1


def test_a_frozen_network_has_a_rate_and_a_number_of_steps_of_its_own(other, trained, capsys):
    frozen = {"init_from": trained / "results", "freeze_network": "true", "train_num_steps": "auto", "train_lr": None}
    plan = plan_of(other, **frozen)
    assert (plan.settings.train_lr, plan.settings.fewest_steps) == (0.03, 400)
    assert num_steps(plan.settings, 15) == 400 and num_steps(plan.settings, 1000) == 25 * 1000 // 4
    assert "--freeze_network" in plan.sources["train_lr"]
    assert re.search(r"from --freeze_network:\s+", capsys.readouterr().out)
    asked = plan_of(other, **{**frozen, "train_lr": 0.5, "fewest_steps": 7}).settings
    assert (asked.train_lr, asked.fewest_steps) == (0.5, 7)


def test_a_rate_for_whole_networks_is_told_where_embeddings_alone_are_learnt(other, trained, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("train_lr: 0.0004\n")
    frozen = {"init_from": trained / "results", "freeze_network": "true", "config": file, "train_lr": None}
    assert plan_of(other, **frozen).settings.train_lr == 0.0004
    told = "warning: --train_lr is 0.0004, with which embeddings hardly move; without it, --freeze_network takes 0.03\n"
    assert told in capsys.readouterr().err
    plan_of(other, **{**frozen, "freeze_network": "false"})
    assert told not in capsys.readouterr().err


@pytest.mark.parametrize("is_older", [False, True])
def test_a_run_that_learns_all_cannot_go_on_frozen(other, trained, capsys, is_older):
    assert train(other, init_from=trained / "results", num_samples=0, train_num_steps=1) == 0
    found = run_folder.newest_state(other / "results")
    assert found is not None
    if is_older:
        forget_setting(found.path, "freeze_network")
    capsys.readouterr()
    assert train(other, freeze_network="true", num_samples=0) == 2
    assert "freeze_network" in one_error(capsys)


def test_a_frozen_run_goes_on_at_its_own_rate(other, trained):
    frozen = {"init_from": trained / "results", "freeze_network": "true", "num_samples": 0, "train_lr": None}
    assert train(other, **frozen, results_folder=other / "whole") == 0
    assert train(other, **frozen, results_folder=other / "parts", train_num_steps=HALF) == 0
    assert train(other, results_folder=other / "parts", num_samples=0, train_lr=None) == 0
    assert state_digests(other / "parts") == state_digests(other / "whole")


def test_a_new_network_cannot_be_frozen(other, capsys):
    assert train(other, freeze_network="true") == 2
    assert capsys.readouterr().err.startswith("error: --freeze_network leaves the network as it is, and a new one has")


@pytest.mark.parametrize("is_frozen", ["false", "true"])
def test_a_run_that_began_so_is_the_same_each_time_and_after_a_stop(other, trained, monkeypatch, is_frozen):
    flags: dict[str, Any] = {"init_from": trained / "results", "num_samples": 0, "train_lr": 2e-3}
    flags |= {"freeze_network": is_frozen}
    assert train(other, **flags, results_folder=other / "whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, HALF, signal_self(signal.SIGTERM))
        assert train(other, **flags, results_folder=other / "parts") == 143
    found = run_folder.newest_state(other / "parts")
    assert found is not None and found.step == HALF
    asked_again = {**flags, "init_from": None, "freeze_network": None}
    assert train(other, **asked_again, results_folder=other / "parts") == 0
    assert state_digests(other / "parts") == state_digests(other / "whole")
    assert generate(other, checkpoint=other / "parts", images_per_class=1) == 0
    assert sorted(path.name for path in (other / "synthetic").glob("ID_*")) == ["ID_10", "ID_2", "ID_3"]


def test_a_checkpoint_says_where_its_run_began(other, trained, state):
    assert train(other, init_from=trained / "results", num_samples=0, train_num_steps=1) == 0
    place = trained / "results"
    expected = {"place": str(place), "step": STEPS, "digest": checkpoint.stamp(state.path)}
    for name in (run_folder.full_name(1), run_folder.ema_name(1)):
        assert run_folder.read_state(other / "results" / name).meta.began_from == expected
    assert "began_from" not in state.meta.to_json()


def test_test_images_that_the_other_run_was_trained_on_are_told(cached, trained, capsys):
    start(cached, init_from=trained / "results")
    assert "test images were training images" not in capsys.readouterr().err
    start(cached, init_from=trained / "results", images_per_user=3)  # two more of each class are held out
    told = "warning: 6 of 15 validation and test images were training images of the run in --init_from "
    told += f"{trained / 'results'}; scores"
    assert told in capsys.readouterr().err
    base = shutil.copytree(trained / "results", cached / "base")
    (base / "split.json").write_text("{}")
    start(cached, init_from=base, images_per_user=3)
    told = f"warning: which images the run in --init_from {base} was trained on is not known: {base}/split.json is"
    assert told in capsys.readouterr().err


# --- which settings ----------------------------------------------------------------------------------------

SIZES = ("dim", "dim_mults", "attn_heads", "attn_dim_head", "image_size", "vae_path")


def test_what_decides_what_weights_mean_is_taken_from_the_other_run_unless_given(trained, other, capsys):
    changes = {**dict.fromkeys(SIZES), "train_lr": 0.01, "latents_cache_folder": other / "none"}
    plan = plan_of(other, init_from=trained / "results", **changes)
    found = plan.settings
    assert (found.dim, found.dim_mults, found.attn_heads, found.attn_dim_head, found.image_size) == (8, (1,), 2, 8, 16)
    assert (found.vae_path, found.train_lr, found.latent_norm_images) == (str(trained / "vae.pt"), 0.01, 6)
    assert plan.sources["dim"] == "the run in --init_from" and plan.sources["train_batch_size"] == "flag"
    assert re.search(r"from the run in --init_from:\s+vae_path", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": 16}, "--dim is 16, but the run in --init_from RUN has 8,"),
        ({"dim_mults": [1, 2]}, "--dim_mults is 1 2, but the run in --init_from RUN has 1,"),
        ({"attn_heads": 1}, "--attn_heads is 1, but the run in --init_from RUN has 2,"),
        ({"attn_dim_head": 4}, "--attn_dim_head is 4, but the run in --init_from RUN has 8,"),
        ({"objective": "pred_noise"}, "--objective is pred_noise, but the run in --init_from RUN has pred_v,"),
        ({"image_size": 32}, "--image_size is 32, but the run in --init_from RUN has 16,"),
        ({"latent_norm": "scale_factor"}, "--latent_norm is scale_factor, but the run in --init_from RUN has moments,"),
    ],
)
def test_a_setting_that_makes_the_weights_useless_is_refused(other, trained, capsys, changes, told):
    place = str(trained / "results")
    assert train(other, init_from=place, **changes) == 2
    line = one_error(capsys)
    assert line.startswith("error: " + told.replace("RUN", place)) and line.endswith("or leave --init_from out")
    assert not (other / "results").exists()


def test_another_noise_schedule_is_a_warning(other, trained, capsys):
    changes = {"noise_shift": 0.25, "beta_schedule": "linear", "timesteps": 500, "cond_drop_prob": 0.5, "train_lr": 0.1}
    assert plan_of(other, init_from=trained / "results", **changes).settings.noise_shift == 0.25
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in lines] == ["--timesteps", "--beta_schedule", "--noise_shift"]
    assert all(line.endswith("noise than its weights have learnt, and they learn anew") for line in lines)


def test_the_vae_must_be_that_of_the_other_run(other, trained, capsys):
    tiny_vae.save_tiny_vae(other / "vae.pt", seed=1)
    assert train(other, init_from=trained / "results", latents_cache_folder=other / "new") == 2
    line = one_error(capsys)
    assert f"makes other latents than those that the run in --init_from {trained / 'results'} was trained on (" in line
    assert "vae.weights: " in line and "leave --init_from out" in line


# --- which places ------------------------------------------------------------------------------------------


def test_one_checkpoint_file_is_enough_and_averaged_weights_alone_too(other, trained, state, capsys):
    for name, what in ((run_folder.full_name(HALF), "weights"), (run_folder.ema_name(STEPS), "averaged weights")):
        place = shutil.copy(trained / "results" / name, other / name)
        begun = start(other, init_from=place, results_folder=other / name[:3])
        assert f"begins with the {what} of {place} at step" in capsys.readouterr().out
        stored = run_folder.read_state(place)
        assert torch.equal(
            weights(begun.ema.model)["model.null_classes_emb"], stored.averages["model.null_classes_emb"]
        )
    assert torch.equal(
        weights(begun.diffusion)["model.null_classes_emb"], state.averages["model.null_classes_emb"]
    )  # where there are no others
    assert torch.equal(weights(begun.diffusion)[EMBEDDINGS][0], state.averages[EMBEDDINGS][1])


def test_a_folder_with_averaged_weights_alone_will_do(other, trained):
    (other / "base").mkdir()
    shutil.copy(trained / "results" / run_folder.ema_name(HALF), other / "base")
    found = beginning.read_beginning(str(other / "base"))
    assert found.state.step == HALF and not found.state.is_full


@pytest.mark.parametrize("run", ["finished", "older"])
def test_runs_of_earlier_versions_will_do(tmp_path, capsys, run):
    root = shutil.copytree(GOLDEN, tmp_path / "golden")
    tiny.make_images(root / "images", {"ID_3": 5})
    flags = {"data_path": root / "images", "vae_path": root / "vae.safetensors", "images_per_user": 3}
    flags |= {"latents_cache_folder": root / "latents_cache", "results_folder": root / "new", "device": "cpu"}
    plan = make_plan(tiny.flags({**flags, "init_from": root / run, "trackers": "none"}))
    assert plan.settings.noise_shift == (0.5 if run == "finished" else 0.0)
    trainer = start_trainer(plan, open_data(plan, CPU), CPU)
    said = capsys.readouterr().out
    assert f"begins with the weights of {root / run} at step" in said
    assert "embeddings of 3 of 4 classes kept; new: ID_3\n" in said
    trainer.train_step()
    trainer.check_finite()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "--init_from nowhere does not exist; give the folder of a run, or a checkpoint file in it"),
        ("data", "--init_from data is neither a checkpoint nor a folder of a run that has saved one"),
        ("vae.pt", "does not begin like a checkpoint; give another, or the folder of the run"),
    ],
)
def test_what_is_no_run_is_refused(other, monkeypatch, place, told):
    monkeypatch.chdir(other)
    with pytest.raises(UserError) as error:
        plan_of(other, init_from=place)
    assert told in str(error.value)


def changed_copy(path: Path, to: Path, tensors: dict[str, torch.Tensor | None], **meta: object) -> Path:
    """Saves a checkpoint with some tensors changed, or left out where None stands."""
    state = run_folder.read_state(path)
    found = {**state.tensors, **tensors}
    checkpoint.save(to, {n: t for n, t in found.items() if t is not None}, {**state.meta.to_json(), **meta})
    return to


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (f"model.{EMBEDDINGS}", torch.zeros(2, 8), "[2, 8] of float32 in it, and [3, 8] of float32 in a network"),
        (f"ema.{EMBEDDINGS}", None, f"{EMBEDDINGS} is absent in it, and [3, 8] of float32 in a network"),
        ("model.model.null_classes_emb", torch.zeros(9), "model.null_classes_emb is [9] of float32 in it"),
        ("ema.model.null_classes_emb", torch.zeros(8, dtype=torch.int64), "[8] of int64 in it"),
    ],
)
def test_other_weights_than_those_of_its_network_are_refused(other, state, name, value, told):
    place = changed_copy(state.path, other / "odd.safetensors", {name: value})
    with pytest.raises(UserError) as error:
        start(other, init_from=place)
    assert told in str(error.value) and str(place) in str(error.value)


def test_a_run_on_imported_latents_is_refused(other, state):
    spec = {**state.meta.space.spec, "vae": {"imported": "latents of another program"}}
    assert Space(spec).is_imported
    place = changed_copy(state.path, other / "imported.safetensors", {}, space=spec)
    with pytest.raises(UserError, match="that run was trained on imported latents, whose VAE nobody knows"):
        plan_of(other, init_from=place)


# --- a run that goes on ------------------------------------------------------------------------------------


def test_a_run_that_goes_on_keeps_its_beginning_and_says_so(other, trained, capsys):
    base = shutil.copytree(trained / "results", other / "base")
    assert train(other, init_from=base, num_samples=0, train_num_steps=1) == 0
    shutil.rmtree(base)  # as in another session
    told = f"the run in {other / 'results'} goes on; --init_from "
    for place, line in (
        (base, f"{told}{base} was used when it began\n"),
        (
            other / "else",
            f"{told}{other / 'else'} is for a new run, with another --results_folder and without --resume_from\n",
        ),
        (None, ""),
    ):
        capsys.readouterr()
        plan = plan_of(other, init_from=place)
        assert plan.settings.init_from == str(base) and plan.beginning is None
        said = capsys.readouterr().out
        assert (line in said) if line else (told not in said)


def test_a_run_that_began_with_new_weights_stays_one(cached, trained, capsys):
    shutil.copytree(trained / "results", cached / "results")
    plan = plan_of(cached, init_from=trained / "results", train_num_steps=STEPS + 1)
    assert plan.settings.init_from is None and plan.beginning is None
    told = f"goes on; --init_from {trained / 'results'} is for a new run, with another --results_folder and without "
    assert f"{told}--resume_from\n" in capsys.readouterr().out
    plan = plan_of(cached, init_from="nowhere", resume_from=trained / "results", results_folder=cached / "new")
    assert plan.state is not None and plan.beginning is None
