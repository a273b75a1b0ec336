"""Latents exported as WebDataset shards: they are the rows of the cache, and a training on two processes reads them."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from pipeline import CLASSES

from gait_latents.export import main
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.shard import keys_of_rows, seal_rows

NUM_IMAGES = 5 * len(CLASSES)
EXAMPLE = Path(__file__).parents[2] / "examples" / "with_webdataset.py"


def export(world: Path, folder: Path, **changes: object) -> int:
    settings = {"latents": "webdataset", "latents_cache_folder": world / "latents_cache", "output_folder": folder}
    return main(tiny.flags({**settings, "rows_per_shard": 4, **changes}))


def members(folder: Path) -> dict[str, bytes]:
    """Returns the content of each member of each shard, in their order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    return found


def test_each_row_of_the_cache_stands_in_the_shards_in_order(trained: Path, tmp_path: Path) -> None:
    assert export(trained, tmp_path / "shards") == 0
    dataset = LatentDataset.open(trained / "latents_cache")
    rows, _ = dataset.cache.read(dataset.keys)
    seals = seal_rows(dataset.cache.space, keys_of_rows(dataset.keys), rows)
    found = members(tmp_path / "shards")
    assert list(found) == [f"{row:09d}.{kind}" for row in range(NUM_IMAGES) for kind in ("npy", "cls", "json")]
    for row in range(NUM_IMAGES):
        (tmp_path / "row.npy").write_bytes(found[f"{row:09d}.npy"])
        assert np.array_equal(np.load(tmp_path / "row.npy"), rows[row])
        assert int(found[f"{row:09d}.cls"]) == dataset.labels[row]
        facts = json.loads(found[f"{row:09d}.json"])
        assert facts["key"] == dataset.keys[row] and facts["seal"] == seals[row]
        assert f"{facts['class']}/{facts['image']}" == dataset.names[row]
    facts = json.loads((tmp_path / "shards" / "dataset.json").read_text())
    assert facts["rows"] == NUM_IMAGES and facts["class_names"] == list(CLASSES)
    assert dataset.norm is not None and facts["latent_norm"] == dataset.norm.to_json()
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 4


def test_an_export_is_the_same_each_time_and_replaces_no_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(trained, tmp_path / "one") == export(trained, tmp_path / "two") == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "dataset.json").unlink()  # as where an export was stopped
    (tmp_path / "two" / "latents-000003.tar").unlink()
    assert export(trained, tmp_path / "two") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == one
    assert export(trained, tmp_path / "one", rows_per_shard=5) == 2
    assert "holds other latents (dataset.json); remove it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == one


def test_an_incomplete_cache_is_not_exported(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = shutil.copytree(trained / "latents_cache", tmp_path / "latents_cache")
    for path in cache.rglob("*.safetensors"):
        path.unlink()
    assert export(tmp_path, tmp_path / "shards") == 2
    assert f"{NUM_IMAGES} of {NUM_IMAGES} train images are not in" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


# Runs the example as it is, and keeps its first two batches. It joins the processes once: a second group finds the
# addresses of the first in the store.
PROGRAM = """
import importlib.util, os, sys, numpy as np
from pathlib import Path
example, shards, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location("example", example)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found, batches_of = [], module.batches_of

def kept(*arguments):
    for batch in batches_of(*arguments):
        found.append(batch)
        yield batch

module.batches_of = kept
losses = module.main(shards, num_steps=60, batch_size=4)
moments, labels = (np.concatenate(part) for part in zip(*found[:2]))
np.savez(f"{out}/{os.environ['RANK']}.npz", moments=moments, labels=labels)
Path(out, f"{os.environ['RANK']}.txt").write_text(f"{losses[0]} {losses[-1]}")
"""


@pytest.mark.slow
def test_two_processes_train_from_shards_of_their_own_and_see_the_rows_of_the_cache(
    trained: Path, tmp_path: Path
) -> None:
    pytest.importorskip("webdataset")
    assert export(trained, tmp_path / "shards") == 0
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [tmp_path / "program.py", EXAMPLE, tmp_path / "shards", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    dataset = LatentDataset.open(trained / "latents_cache")
    rows, _ = dataset.cache.read(dataset.keys)
    # Four shards of 4, 4, 4 and 3 rows: the first process has the first and the third, the other those between.
    for rank, order in enumerate(([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14])):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert np.array_equal(found["moments"], rows[order])
            assert found["labels"].tolist() == dataset.labels[order].tolist()
        first, last = map(float, (tmp_path / f"{rank}.txt").read_text().split())
        assert last < 0.6 * first
