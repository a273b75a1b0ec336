"""The programs in examples/ run and learn, and a DataLoader draws from a LatentDataset what the README says."""

import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from pipeline import CLASSES
from torch import Tensor
from torch.utils.data import DataLoader

from gait_latents.latents.dataset import LatentDataset

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_IMAGES = 5 * len(CLASSES)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core


def main_of(name: str) -> Callable[..., list[float]]:
    """Loads an example; returns its `main`."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(autouse=True)
def _own_random_numbers():
    with torch.random.fork_rng(devices=[]):
        yield


# --- the programs ------------------------------------------------------------------------------------------


def test_every_example_is_short_and_tested():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() == {"plain_loop", "with_accelerate", "with_lightning", "with_webdataset"}
    assert max(lengths.values()) < 60


def test_the_plain_loop_encodes_what_is_missing_and_learns(emptied, encoder):
    losses = main_of("plain_loop")(str(emptied / "latents_cache"), num_epochs=60)
    assert encoder.num_images == NUM_IMAGES and encoder.built == ["encoder"]
    assert len(losses) == 60 and losses[-1] < 0.6 * losses[0]
    encoder.forget()
    main_of("plain_loop")(str(emptied / "latents_cache"), num_epochs=1)
    assert encoder.built == []


@pytest.mark.parametrize("name", ["plain_loop", "with_accelerate", "with_lightning"])
@pytest.mark.parametrize("words", [[], ["one_cache", "another"]])
def test_without_a_folder_an_example_says_how_it_is_called(name, words, monkeypatch):
    if name != "plain_loop":
        pytest.importorskip(name.removeprefix("with_"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit, match=rf"\n(python|accelerate launch) examples/{name}\.py latents_cache\n"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_the_plain_loop_says_which_image_cannot_be_encoded(emptied):
    shutil.rmtree(emptied / "data" / "ID_2")
    with pytest.raises(SystemExit, match=r"5 images cannot be encoded; the first is number 5: cannot be read"):
        main_of("plain_loop")(str(emptied / "latents_cache"))


def test_the_loop_with_accelerate_learns(trained, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    losses = main_of("with_accelerate")(str(trained / "latents_cache"), num_epochs=60)
    assert len(losses) == 60 and losses[-1] < 0.6 * losses[0]


@pytest.mark.filterwarnings("default")
def test_the_loop_with_lightning_learns(trained, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    losses = main_of("with_lightning")(str(trained / "latents_cache"), num_epochs=60)
    assert len(losses) == 60 and losses[-1] < 0.6 * losses[0]


# --- what a DataLoader draws -------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaded(dataset: LatentDataset, num_workers: int) -> tuple[list[Tensor], list[list[int]]]:
    """Returns the latents and the labels of each batch of one shuffled epoch."""
    batches = list(DataLoader(dataset, 4, shuffle=True, generator=seeded(5), num_workers=num_workers))
    return [latents for latents, _ in batches], [labels.tolist() for _, labels in batches]


def expected_batches(dataset: LatentDataset, noise: Callable[[int, int], Tensor]) -> list[Tensor]:
    """Returns the batches [B C h w] that an epoch in the order of seed 5 gives with noise(batch number, size)."""
    order = DataLoader(range(len(dataset)), 4, shuffle=True, generator=seeded(5))  # type: ignore[arg-type]
    return [dataset.batch(positions, noise(i, len(positions)))[0] for i, positions in enumerate(order)]


def test_each_worker_draws_from_its_own_seed_and_the_order_is_that_without_workers(trained):
    dataset = LatentDataset.open(trained / "latents_cache")
    latents, labels = loaded(dataset, 2)
    first = int(torch.empty((), dtype=torch.int64).random_(generator=seeded(5)))
    own = [seeded(first), seeded(first + 1)]  # the batches go to the workers in turn
    expected = expected_batches(dataset, lambda i, size: torch.randn(size, *dataset.latent_shape, generator=own[i % 2]))
    assert len(latents) == 4 and all(map(torch.equal, latents, expected))
    assert labels == loaded(dataset, 0)[1] and sorted(chain(*labels)) == [0] * 5 + [1] * 5 + [2] * 5


def test_without_workers_the_latents_come_from_the_global_generator(trained):
    dataset = LatentDataset.open(trained / "latents_cache")
    torch.manual_seed(3)
    latents, _ = loaded(dataset, 0)
    one = seeded(3)
    expected = expected_batches(dataset, lambda i, size: torch.randn(size, *dataset.latent_shape, generator=one))
    assert all(map(torch.equal, latents, expected))


def test_a_worker_that_gets_the_dataset_as_a_pickle_has_the_same_latents(trained):
    dataset = LatentDataset.open(trained / "latents_cache")
    positions, noise = torch.arange(NUM_IMAGES), torch.zeros(NUM_IMAGES, *dataset.latent_shape)
    sent = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(sent.batch(positions, noise)[0], dataset.batch(positions, noise)[0])


def test_two_epochs_draw_other_latents_of_the_same_images(trained):
    dataset = LatentDataset.open(trained / "latents_cache")
    for num_workers in (0, 1):
        loader = DataLoader(dataset, NUM_IMAGES, num_workers=num_workers)
        (one, labels), (two, again) = next(iter(loader)), next(iter(loader))
        assert torch.equal(labels, again) and not (one == two).any()
