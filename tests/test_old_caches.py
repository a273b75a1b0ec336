"""Latents of older scripts become a cache that trains and generates, whatever is wrong with them is named."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pipeline
import pytest
import tiny
import tiny_vae
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

import latent_cache
import old_caches
import preprocess_latents
import vae
from config import UserError
from images import Entry
from latent_dataset import LatentDataset, read_split
from old_caches import BadLatent, NameLists, read_latent, read_name_lists, split_of

SCALE = 0.18215
NUMBERS = {"ID_1": 1, "ID_2": 2, "ID_10": 10}
NUM_OLD = 5  # of the eight images of a class, those that the older script took


def save_as_usual(world: Path, folder: Path) -> dict[str, Tensor]:
    """Writes a file per image as hand-made scripts do; returns each latent by the name of its file."""
    torch.manual_seed(0)
    model = vae.load_vae(str(world / "vae.pt"), "cpu", parts="encoder")
    size = pipeline.SIZE
    transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    folder.mkdir()
    saved = {}
    for class_name, number in NUMBERS.items():
        for path in sorted((world / "data" / class_name).iterdir())[:NUM_OLD]:
            image = transform(Image.open(path).convert("RGB"))[None]  # type: ignore[index]
            mean, logvar = model.encode(image).chunk(2, dim=1)
            latent = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * SCALE
            name = f"user_{number:02d}_{path.stem}.pt"
            torch.save(latent[0].clone(), folder / name)
            saved[name] = latent[0]
    return saved


@pytest.fixture(scope="module")
def _old(_pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("old") / "old_cache"
    return folder, save_as_usual(_pristine, folder)


@pytest.fixture
def latents(_old: tuple[Path, dict[str, Tensor]], world: Path) -> dict[str, Tensor]:
    """Puts an old cache into the world, as `old_cache`; returns the latent of each file."""
    shutil.copytree(_old[0], world / "old_cache")
    return _old[1]


def import_old(world: Path, **changes: object) -> int:
    settings = {"import_folder": world / "old_cache", "output_folder": world / "latents_cache"}
    return preprocess_latents.main(tiny.flags({**settings, "vae_path": world / "vae.pt", "device": "cpu", **changes}))


def train(world: Path, **changes: object) -> int:
    """Trains on what the cache says, without naming images or VAE."""
    left_out = dict.fromkeys(("data_path", "vae_path", "image_size", "images_per_user"))
    return pipeline.train(world, **{**left_out, **changes})


def stored_split(world: Path):
    split = read_split(world / "latents_cache")
    assert split is not None
    return split


def places(entries) -> list[str]:
    return [f"{entry.class_name}/{entry.name}" for entry in entries]


# --- the whole way -----------------------------------------------------------------------------------------


def test_an_old_cache_trains_and_generates(world, latents, encoder, capsys):
    shutil.rmtree(world / "data")
    assert import_old(world) == 0
    said = capsys.readouterr().out
    assert "15 latents [4 8 8] of float32" in said and "15 for training, 0 for testing" in said
    assert "lost " in said and "with no images to compare" in said
    dataset = LatentDataset.open(world / "latents_cache")
    assert dataset.norm is not None
    unscaled = dataset.norm.to_unscaled(torch.stack([dataset[i][0] for i in range(15)]))
    assert stored_split(world).classes == ("ID_1", "ID_2", "ID_10")
    for position, name in enumerate(dataset.names):
        class_name, stem = name.split("/")
        old = latents[f"user_{NUMBERS[class_name]:02d}_{stem}.pt"]
        torch.testing.assert_close(unscaled[position] * SCALE, old, rtol=2**-10, atol=2e-5)
        assert dataset.labels[position] == ("ID_1", "ID_2", "ID_10").index(class_name)
    assert train(world, train_num_steps=4) == 0
    assert "15 images asked, 15 cached, 0 to encode" in capsys.readouterr().out
    assert train(world) == 0  # goes on
    assert "going on from step 4" in capsys.readouterr().out
    assert pipeline.generate(world, images_per_class=1) == 0
    assert len(list((world / "synthetic").rglob("ID_*_000000.png"))) == 3
    assert encoder.num_images == 0 and "encoder" not in encoder.built


def test_the_check_of_an_imported_cache(world, latents, capsys):
    import_old(world)
    capsys.readouterr()
    code = preprocess_latents.main(["--verify", "--output_folder", str(world / "latents_cache"), "--device", "cpu"])
    said = capsys.readouterr().out
    assert code == 0
    assert "15 asked for, 15 cached (imported, content not checked)" in said
    assert "15 rows with imported one draw, frozen, scale_factor 0.18215" in said
    assert "0.0%" in said and "15 latents" not in said


def test_the_same_files_again_add_nothing_and_another_factor_is_another_space(world, latents):
    import_old(world)
    before = {path: path.read_bytes() for path in (world / "latents_cache").rglob("*.safetensors")}
    assert import_old(world) == 0
    assert {path: path.read_bytes() for path in (world / "latents_cache").rglob("*.safetensors")} == before
    assert import_old(world, import_scale_factor=0.5) == 0
    assert len(latent_cache.spaces(world / "latents_cache")) == 2
    dataset = LatentDataset.open(world / "latents_cache")
    stem = dataset.names[0].split("/")[1]
    old = latents[f"user_01_{stem}.pt"]
    assert dataset.norm is not None
    torch.testing.assert_close(dataset.norm.to_unscaled(dataset[0][0]) * 0.5, old, rtol=2**-10, atol=2e-5)


def test_a_vae_never_hits_on_imported_latents(world, latents, encoder):
    import_old(world)
    (world / "latents_cache" / "manifest.json").unlink()
    assert pipeline.preprocess(world) == 0
    assert encoder.num_images == 15
    assert len(latent_cache.spaces(world / "latents_cache")) == 2
    manifest = latent_cache.read_manifest(world / "latents_cache")
    assert manifest is not None and not manifest.space.is_imported


def test_who_asks_for_images_gets_them_encoded(world, latents, encoder):
    import_old(world)
    assert pipeline.train(world, train_num_steps=1) == 0  # with data_path
    assert encoder.num_images == 15


def test_a_vae_of_other_channels_is_refused(world, latents, capsys):
    assert import_old(world) == 0
    tiny_vae.save_tiny_vae(world / "other.pt", embed_dim=3)
    capsys.readouterr()
    assert train(world, vae_path=world / "other.pt") == 2
    assert "decodes latents of 3 channels, and these have 4" in pipeline.one_error(capsys)
    assert train(world, train_num_steps=1) == 0
    capsys.readouterr()
    assert pipeline.generate(world, vae_path=world / "other.pt") == 2
    assert "decodes latents of 3 channels, and these have 4" in pipeline.one_error(capsys)
    assert import_old(world, vae_path=world / "other.pt") == 2


def test_settings_that_would_draw_another_split_are_refused(world, latents, capsys):
    assert import_old(world, num_users=3, images_per_user=5) == 0
    for changes in ({"num_users": 2}, {"images_per_user": 4}, {"split": "contiguous"}):
        capsys.readouterr()
        assert train(world, **changes) == 2
        assert "were imported; leave it out" in pipeline.one_error(capsys)
        assert import_old(world, **changes) == 2
    assert train(world, image_size=32) == 2


# --- names and classes -------------------------------------------------------------------------------------


def test_with_the_images_names_are_theirs_and_the_rest_is_for_testing(world, latents, capsys):
    for class_name, number in NUMBERS.items():
        (world / "data" / class_name).rename(world / "data" / f"walker {number}")
    assert import_old(world, data_path=world / "data") == 0
    split = stored_split(world)
    assert split.classes == ("walker 1", "walker 2", "walker 10")
    assert len(split.train) == 15 and len(split.test) == 9
    assert {entry.name for entry in (*split.train, *split.test)} == {f"walk_{i}.jpg" for i in range(8)}
    assert all(len(entry.key) == 64 for entry in split.test)
    assert "round trip" in capsys.readouterr().out


def test_a_signal_ends_an_import_with_a_word(world, latents, monkeypatch, capsys):
    read = old_caches.read_latent

    def signalled(path: Path) -> tuple[torch.Tensor, str]:
        pipeline.signal_self(signal.SIGTERM)()
        return read(path)

    monkeypatch.setattr(old_caches, "first_shape", lambda files: (4, 8, 8))
    monkeypatch.setattr(old_caches, "read_latent", signalled)
    monkeypatch.setattr(old_caches, "_batches", lambda files: [files[:1], files[1:]])
    assert import_old(world) == 128 + signal.SIGTERM
    assert "stopped; no cache was made, and the same command begins anew" in capsys.readouterr().out
    monkeypatch.undo()
    assert import_old(world) == 0 and len(stored_split(world).train) == 15


def test_an_imported_cache_does_not_become_a_class(world, latents, capsys):
    assert import_old(world, data_path=world / "data", output_folder=world / "data" / "cache") == 2
    assert "is among the class folders of --data_path" in pipeline.one_error(capsys)


def test_a_user_without_a_class_folder_is_refused(world, latents, capsys):
    shutil.rmtree(world / "data" / "ID_2")
    assert import_old(world, data_path=world / "data") == 2
    assert "no class folder ends in the number 2" in pipeline.one_error(capsys)


def test_an_old_split_is_continued(world, latents, capsys):
    lists = {"train": [f"{c}/walk_{i}.jpg" for c in NUMBERS for i in (0, 1)], "test": ["ID_2/walk_3", "ID_2/walk_9"]}
    (world / "split.json").write_text(json.dumps(lists))
    assert import_old(world, import_split=world / "split.json") == 0
    split = stored_split(world)
    assert places(split.train) == [f"{c}/walk_{i}" for c in NUMBERS for i in (0, 1)]
    assert places(split.test) == ["ID_2/walk_3"]
    captured = capsys.readouterr()
    assert "1 names in" in captured.err and "ID_2/walk_9" in captured.out
    assert train(world, train_num_steps=1) == 0
    assert "6 images asked, 6 cached" in capsys.readouterr().out


ENTRIES = [Entry("ID_1", "a"), Entry("ID_1", "b.c"), Entry("ID_2", "a"), Entry("ID_2", "d")]


@pytest.mark.parametrize(
    "names",
    [
        ["ID_1/a", "d"],
        ["ID_1/a.jpg", "d.png"],
        ["/data/ID_1/a.jpg", "/data/ID_2/d.jpg"],
        ["ID_1\\a.jpg", "ID_2\\d.jpg"],
        ["user_01_a.pt", "user_2_d"],
        ["old/user_01_a.pt", "old/user_02_d.pt"],
    ],
)
def test_names_may_have_folders_and_endings(names):
    split, unknown = split_of(ENTRIES, [], NameLists(names, None), [])
    assert places(split.train) == ["ID_1/a", "ID_2/d"] and not unknown
    assert places(split.test) == ["ID_1/b.c", "ID_2/a"]


def test_names_are_never_guessed():
    split, unknown = split_of(ENTRIES, [], NameLists(["ID_1/d.jpg", "b.x", "e", "ID_1/b.c", "ID_3/a"], None), [])
    assert unknown == ["ID_1/d.jpg", "b.x", "e", "ID_3/a"]
    assert places(split.train) == ["ID_1/b.c"] and split.classes == ("ID_1",)
    assert places(split_of(ENTRIES, [], NameLists(["train/d.jpg"], None), [])[0].train) == ["ID_2/d"]
    with pytest.raises(UserError, match="which may be ID_1/a and ID_2/a"):
        split_of(ENTRIES, [], NameLists(["a.jpg"], None), [])
    with pytest.raises(UserError, match="for training and for testing"):
        split_of(ENTRIES, [], NameLists(["ID_1/a"], ["ID_1/a.jpg"]), [])
    with pytest.raises(UserError, match="names no image"):
        split_of(ENTRIES, [], NameLists(["x"], None), [])


def test_an_image_without_a_latent_can_only_be_for_testing():
    others = [Entry("ID_1", "e.jpg", "0" * 64)]
    split, unknown = split_of(ENTRIES, others, NameLists(["ID_1/a", "ID_1/e"], ["ID_2/d"]), [])
    assert unknown == ["ID_1/e.jpg"] and places(split.train) == ["ID_1/a"]
    split, _ = split_of(ENTRIES, others, NameLists(["ID_1/a"], ["e"]), [])
    assert places(split.test) == ["ID_1/e.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("s.json", '{"train": ["a"], "test": ["b"], "seed": 3}', NameLists(["a"], ["b"])),
        ("s.json", '["a", "b"]', NameLists(["a", "b"], None)),
        ("s.txt", "a\n\n  ID_1/b c.jpg \r\n", NameLists(["a", "ID_1/b c.jpg"], None)),
        ("s.csv", "file,split\na.jpg,train\nb.jpg,test\n", NameLists(["a.jpg"], ["b.jpg"])),
        ("s.csv", "train,a.jpg\n", NameLists(["a.jpg"], None)),
        ("s.csv", ",file,split\n0,a.jpg,train\n1,b.jpg,test\n", NameLists(["a.jpg"], ["b.jpg"])),  # with an index
    ],
)
def test_lists_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_name_lists(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", b'{"train": "a"}', "is not JSON of the form"),
        ("s.json", b"{", "is not JSON of the form"),
        ("s.json", b"[" * 100_000, "is not JSON of the form"),
        ("s.json", b'{"test": ["a"]}', "names no training image"),
        ("s.csv", b"a" * 200_000, "is no CSV table: field larger than"),
        ("s.csv", b"a.jpg\n", "no line with a name and the word train"),
        ("s.txt", b"\xff", "no UTF-8"),
        ("s.txt", None, "No such file"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_name_lists(tmp_path / name)


def test_files_that_stand_for_one_image_are_refused(tmp_path):
    for name in ("user_7_a.pt", "user_07_a.pt"):
        torch.save(torch.zeros(1), tmp_path / name)
    with pytest.raises(UserError, match="stand for one image"):
        old_caches.list_files(tmp_path, None)


# --- what a file may hold ----------------------------------------------------------------------------------


class RunsCode:
    """Runs a command when a careless program opens it."""

    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-appear",)


GOOD = torch.linspace(-3, 3, 4 * 8 * 8).reshape(4, 8, 8)
HOSTILE = {
    "user_01_code.pt": (RunsCode(), "could run code"),
    "user_01_flat.pt": (torch.zeros(4, 64), "has the shape [4, 64]"),
    "user_01_wide.pt": (torch.zeros(4, 8, 9), "has the shape [4, 8, 9]"),
    "user_01_two.pt": (torch.zeros(2, 4, 8, 8), "has the shape [2, 4, 8, 8]"),
    "user_01_empty.pt": (torch.zeros(4, 0, 0), "has the shape [4, 0, 0]"),
    "user_01_large.pt": (torch.zeros(1).expand(4, 512, 512), "claims"),
    "user_01_nan.pt": (GOOD.clone().index_fill_(1, torch.tensor(3), float("nan")), "not finite"),
    "user_01_inf.pt": (GOOD * float("inf"), "not finite"),
    "user_01_huge.pt": (GOOD * 1e5, "more than float16 holds"),
    "user_01_whole.pt": (GOOD.int(), "not floating-point"),
    "user_01_text.pt": ("latent", "not a plain tensor"),
    "user_01_pair.pt": ({"a": GOOD, "b": GOOD}, "2 tensors that could be the latent (a, b)"),
    "user_01_other.pt": (torch.zeros(8, 4, 4), "that of the first latent"),
}


def test_what_holds_no_latent_is_named_and_nothing_of_it_taken(world, latents, capsys):
    for name, (content, _) in HOSTILE.items():
        torch.save(content, world / "old_cache" / name)
    (world / "old_cache" / "user_01_page.pt").write_text("<html>")
    (world / "old_cache" / "user_01_zero.pt").write_bytes(b"")
    whole = (world / "old_cache" / "user_02_walk_0.pt").read_bytes()
    (world / "old_cache" / "user_02_cut.pt").write_bytes(whole[: len(whole) // 2])
    assert import_old(world) == 1
    captured = capsys.readouterr()
    for name, (_, reason) in HOSTILE.items():
        (line,) = [line for line in captured.out.splitlines() if line.startswith(f"    {name}: ")]
        assert reason in line, line
    for name in ("user_01_page.pt", "user_01_zero.pt", "user_02_cut.pt"):
        assert f"    {name}: " in captured.out
    assert "16 of 31 files hold no good latent, and no cache was made" in captured.err
    assert not Path("/tmp/this-must-not-appear").exists()
    assert not (world / "latents_cache" / "manifest.json").exists()
    assert import_old(world, skip_bad_images="true") == 0
    split = stored_split(world)
    assert len(split.train) == 15 and len(split.skipped) == 16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits_are_read(tmp_path, dtype):
    torch.save(GOOD.to(dtype), tmp_path / "user_01_a.pt")
    latent, _ = read_latent(tmp_path / "user_01_a.pt")
    assert torch.equal(latent, GOOD.to(dtype).float())
    torch.save((GOOD * float("nan")).to(dtype), tmp_path / "user_01_b.pt")
    with pytest.raises(BadLatent, match="not finite"):
        read_latent(tmp_path / "user_01_b.pt")


@pytest.mark.parametrize("content", [GOOD, GOOD[None], {"latent": GOOD, "user": 7}, {"z": GOOD[None]}, GOOD.double()])
def test_the_usual_forms_are_read(tmp_path, content):
    torch.save(content, tmp_path / "user_01_a.pt")
    latent, key = read_latent(tmp_path / "user_01_a.pt")
    assert torch.equal(latent.float(), GOOD) and len(key) == 64


def test_an_old_pickle_and_a_part_of_a_batch_are_read(tmp_path):
    torch.save(GOOD, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.stack([GOOD, GOOD + 1])[1], tmp_path / "part.pt")
    assert torch.equal(read_latent(tmp_path / "old.pt")[0], GOOD)
    assert torch.equal(read_latent(tmp_path / "part.pt")[0], GOOD + 1)
    with pytest.raises(BadLatent, match="No such file"):
        read_latent(tmp_path / "gone.pt")


def test_a_draw_from_imported_moments_is_the_latent():
    moments = torch.from_numpy(old_caches.to_moments(GOOD, SCALE)).double()
    mean, logvar = moments.chunk(2)
    draw = mean + torch.exp(0.5 * logvar) * 5
    np.testing.assert_allclose((draw * SCALE).numpy(), GOOD.numpy(), rtol=2**-10, atol=2e-6)


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_cache_of_images_is_not_overwritten(world, latents, trained, capsys):
    shutil.copytree(trained / "latents_cache", world / "latents_cache")
    assert import_old(world) == 2
    assert "holds latents of images already" in pipeline.one_error(capsys)


def test_an_imported_split_is_not_overwritten(world, latents, encoder, capsys):
    assert import_old(world) == 0
    split = (world / "latents_cache" / "split.json").read_bytes()
    capsys.readouterr()
    assert pipeline.preprocess(world) == 2
    assert "holds imported latents; give another --output_folder" in pipeline.one_error(capsys)
    assert (world / "latents_cache" / "split.json").read_bytes() == split and encoder.num_images == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verify": "true"}, "are two commands"),
        ({"import_folder": "nowhere"}, "nowhere cannot be listed"),
        ({"import_folder": None, "import_split": "a.txt"}, "--import_split belongs to --import_folder"),
        ({"import_folder": None, "import_scale_factor": 0.5}, "--import_scale_factor belongs to --import_folder"),
        ({"vae_path": "nowhere.pt"}, "does not exist"),
        ({"import_scale_factor": 0}, "the smallest allowed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(world, latents, capsys, changes, message):
    assert import_old(world, **changes) == 2
    assert message in pipeline.one_error(capsys)


def test_other_files_are_left_alone_and_counted(world, latents, capsys):
    torch.save(GOOD, world / "old_cache" / "mean.pt")
    (world / "old_cache" / "config.json").write_text("{}")
    assert import_old(world) == 0
    captured = capsys.readouterr()
    assert "1 .pt files are not called user_NUMBER_NAME.pt, such as mean.pt" in captured.err
    for name in latents:
        (world / "old_cache" / name).unlink()
    assert import_old(world) == 2
