"""Links that somebody has put into a cache, a run or an export: nothing goes through them, and each is told.

A link that the user names is followed: the folder itself, a checkpoint, a file of settings.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pipeline
import pytest
import tiny
from fault_account import Account
from os_faults import Tally, dead_process, said
from pipeline import STEPS, preprocess, train
from test_hostile_files import contents

from gait_latents import export
from gait_latents.common import files, layout
from gait_latents.common.layout import LOSS_NAME, MANIFEST_NAME, METRICS_NAME, PREVIEW_NAME, SETTINGS_NAME, SPLIT_NAME
from gait_latents.latents.cache import LatentCache, spaces
from gait_latents.latents.prune import plan_prune
from gait_latents.training import run_folder, trackers

Command = Callable[[Path], int]


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A world of one's own after preprocessing and a whole training run."""
    return shutil.copytree(trained, tmp_path / "world")


def _train(world: Path) -> int:
    return train(world, train_num_steps=STEPS + 1, num_samples=0, trackers="tensorboard")


def _encode(world: Path) -> int:
    return preprocess(world, images_per_user="all")


def _encode_anew(world: Path) -> int:
    """Encodes all images, those of the linked shard among them."""
    return preprocess(world)


def _verify(world: Path) -> int:
    return preprocess(world, verify="true")


def _prune(world: Path) -> int:
    return preprocess(world, prune="true", yes="true", keep_for=None)


def _generate(world: Path) -> int:
    return pipeline.generate(world)


def _export(world: Path) -> int:
    return export.main(tiny.flags({"checkpoint": world / "results", "output_folder": world / "exported"}))


STATE, AVERAGE = run_folder.full_name(STEPS), run_folder.ema_name(STEPS)
IS_LINK = "it is a link, and may lead anywhere; put the file itself there"
LEADS_OUT = "it is a link, and may lead out of"
# What is a link: the command, its exit code, and what it says; an empty text where the file is only written, so that
# the link makes way for it.
PLANTED: dict[str, tuple[Command, int, str]] = {
    f"results/{METRICS_NAME}": (_train, 1, IS_LINK),
    f"results/{SPLIT_NAME}": (_train, 2, IS_LINK),
    f"results/{STATE}": (_train, 0, f"{IS_LINK}; taking the one before"),
    f"results/{SETTINGS_NAME}": (_train, 0, ""),
    f"results/{LOSS_NAME}": (_train, 0, ""),
    f"results/{trackers.TENSORBOARD_FOLDER}": (
        _train,
        0,
        f"tensorboard gets no more figures ([Errno 40] {LEADS_OUT}",
    ),
    f"results/{AVERAGE}": (_generate, 0, f"{IS_LINK}; taking the one before"),
    f"latents_cache/{MANIFEST_NAME}": (_encode, 2, IS_LINK),
    f"latents_cache/{SPLIT_NAME}": (_encode, 0, IS_LINK),
    f"latents_cache/{PREVIEW_NAME}": (_encode, 0, ""),
    f"latents_cache/{layout.CHANNELS_NAME}": (_verify, 0, ""),
    "latents_cache/SPACE/SHARD": (_encode_anew, 0, f"{IS_LINK}; its rows count as missing"),
    "latents_cache/SPACE/SHARD ": (_verify, 1, f"{IS_LINK}; its rows count as missing"),
    "latents_cache/SPACE": (_encode, 2, "is a link, and may lead anywhere; remove it, or put the folder itself there"),
    "latents_cache/SPACE ": (_prune, 0, LEADS_OUT),
    "latents_cache/SPACE  ": (_train, 0, f"{LEADS_OUT}"),
    "exported/model.safetensors": (_export, 2, "is there already and differs"),
    "exported/config.json": (_export, 2, "is there already and differs"),
}


def _plant(world: Path, name: str) -> tuple[Path, Path]:
    """Moves a file or folder out of the world, with a link in its place; returns the link and where that leads."""
    (space,) = spaces(world / "latents_cache")
    place = world / name.strip().replace("SPACE", space)
    if place.name == "SHARD":
        (place,) = place.parent.iterdir()
    outside = world.parent / "outside" / place.name
    outside.parent.mkdir()
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(outside)
    elif place.suffix:
        outside.write_text("secret")
    else:
        outside.mkdir()
    place.symlink_to(outside)
    return place, outside


def _outcome(world: Path, name: str) -> Tally:
    """Runs the command; counts it as wrong when the outside has changed, or the code or the words are others."""
    command, code, words = PLANTED[name]
    place, outside = _plant(world, name)
    if outside.is_dir():
        _put_abandoned(outside)
    before = contents(outside.parent)
    found, output = said(lambda: command(world))
    output = output.replace(f"{world}/", "")
    is_replaced = words or (place.is_file() and not place.is_symlink())
    is_right = contents(outside.parent) == before and found == code and words in output and is_replaced
    assert is_right, (name, found, output[-2000:])
    return Tally(1, 0, int(not is_right))


def _put_abandoned(folder: Path) -> Path:
    """Makes a temporary that a killed process has left."""
    path = folder / f"{files.TEMPORARY_PREFIX}{files.host_digest()}-{dead_process()}-{'0' * 32}"
    path.write_bytes(b"half")
    return path


QUICK = (f"results/{METRICS_NAME}", "latents_cache/SPACE/SHARD", "latents_cache/SPACE", "exported/config.json")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLANTED]
)
def test_nothing_is_read_or_written_through_a_planted_link(finished: Path, account: Account, name: str) -> None:
    tally = _outcome(finished, name)
    account.add("a link planted in a folder", f"in place of {name.partition('/')[0]}/...", **vars(tally))


def test_a_linked_shard_is_encoded_again_and_never_changed(finished: Path) -> None:
    expected = pipeline.stored_moments(finished / "latents_cache")
    place, outside = _plant(finished, "latents_cache/SPACE/SHARD")
    assert said(lambda: _encode_anew(finished))[0] == 0
    assert pipeline.stored_moments(finished / "latents_cache") == expected
    shards = [path for path in place.parent.iterdir() if not path.is_symlink()]
    assert len(shards) == 1 and outside.exists()


def test_temporaries_behind_a_link_are_not_removed(finished: Path) -> None:
    folder = finished / "latents_cache"
    space = pipeline.open_cache(folder).space
    own = _put_abandoned(folder / space.id)
    (finished / "outside").mkdir()
    strange = _put_abandoned(finished / "outside")
    (folder / "0123456789abcdef").symlink_to(finished / "outside")
    assert plan_prune(folder, space, {}).temporaries == [own]
    shutil.move(folder / space.id, finished / "moved")
    (folder / space.id).symlink_to(finished / "outside")
    LatentCache(folder, space, writable=True)
    assert strange.exists()


def test_links_that_the_user_names_are_followed(finished: Path, account: Account) -> None:
    state = finished / "results" / AVERAGE
    (finished / "state.safetensors").symlink_to(state)
    (finished / "settings.yaml").symlink_to(finished / "results" / SETTINGS_NAME)
    for name in ("results", "latents_cache"):
        (finished / name).rename(finished / f"real {name}")
        (finished / name).symlink_to(finished / f"real {name}")
    folder = os.path.realpath(finished / "results")
    shutil.copy(Path(folder) / AVERAGE, finished / "kept.safetensors")
    (finished / "state.safetensors").unlink()
    (finished / "state.safetensors").symlink_to("kept.safetensors")
    codes = [
        _train(finished),
        _encode(finished),
        pipeline.generate(finished, checkpoint=finished / "state.safetensors", images_per_class=1),
        train(finished, config=finished / "settings.yaml", results_folder=finished / "other", train_num_steps=1),
    ]
    account.add("a link that the user names", "results, cache, checkpoint, config", cases=4, wrong=codes != [0] * 4)
