"""The demo: its simulated walkers, the script that trains a small VAE, and the VAE that it ships."""

import itertools
import shutil
from pathlib import Path

import make_demo
import numpy as np
import pytest
import torch
import train_vae
from PIL import Image
from safetensors.torch import load_file
from torch._inductor.exc import CppCompileError

from gait_latents.common import pictures
from gait_latents.images import folders, reading
from gait_latents.vae import load, trained_on

DEMO = Path(make_demo.__file__).parent
UNSEEN = range(5001, 5007)  # people whom the shipped VAE has never met


def test_simulated_walk_depends_on_person_seed_and_walk_alone():
    first = make_demo.walk_image(2, 0, 3)
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    make_demo.walk_image(5, 1, 0)
    assert np.array_equal(make_demo.walk_image(2, 0, 3), first)
    for other in ((3, 0, 3), (2, 1, 3), (2, 0, 4)):
        assert not np.array_equal(make_demo.walk_image(*other), first)


def test_torso_moves_at_the_walking_speed():
    scale = make_demo.jet(np.linspace(0, 1, 64)).astype(int)
    for number in (1, 4, 6):
        image = make_demo.walk_image(number, 0, 0).astype(int)
        level = np.abs(image[:, :, None] - scale).sum(axis=-1).argmin(axis=-1)  # S S, the colours read backwards
        row = make_demo.IMAGE_SIZE - 1 + make_demo.LOWEST_ROW - level.argmax(axis=0).mean()
        hertz = row * make_demo.PULSES_PER_SECOND / make_demo.STFT_LENGTH
        assert hertz * make_demo.WAVELENGTH_M / 2 == pytest.approx(make_demo.person(number).speed, rel=0.1)


def test_standing_foot_stands_still():
    who = make_demo.person(2)
    seconds = np.linspace(0, 1 / who.cadence, 2000)
    hip = np.stack([who.speed * seconds, 0 * seconds, np.full_like(seconds, 0.53 * who.height_m)])
    ankle = make_demo.leg_points(who, hip, who.cadence * seconds)[0][-5][0]  # lowest of the shank
    speed = np.gradient(ankle, seconds)
    assert np.abs(speed[300:900]).max() < 0.45 * who.speed
    assert speed.max() > 2.5 * who.speed  # and the swinging one overtakes the body


def test_jet_runs_from_dark_blue_to_dark_red():
    ends = make_demo.jet(np.array([0.0, 0.5, 1.0]))
    assert ends.tolist() == [[0, 0, 128], [128, 255, 128], [128, 0, 0]]


def test_make_demo_writes_one_folder_per_person_and_the_same_bytes_again(tmp_path, capsys):
    for name in ("a", "b"):
        argv = ["--output", str(tmp_path / name), "--people", "2", "--first_person", "6", "--walks", "2"]
        assert make_demo.main(argv) == 0
    assert "2 walkers x 2 images" in capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.jpg"))
    assert files == ["ID_6/ID_6_000.jpg", "ID_6/ID_6_001.jpg", "ID_7/ID_7_000.jpg", "ID_7/ID_7_001.jpg"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_make_demo_refuses_what_it_cannot_make(tmp_path, capsys):
    (tmp_path / "file").touch()
    for argv, word in ((["--walks", "0"], "--walks is 0"), (["--output", str(tmp_path / "file")], "file")):
        with pytest.raises(SystemExit) as stopped:
            make_demo.main(argv)
        assert stopped.value.code == 2
        assert word in capsys.readouterr().err


def test_shipped_walkers_are_what_make_demo_makes():
    index = folders.list_images(DEMO / "walkers")
    assert list(index) == [f"ID_{number}" for number in range(1, 7)]
    assert all(len(names) == 40 for names in index.values())
    assert sum(path.stat().st_size for path in (DEMO / "walkers").rglob("*.jpg")) <= 2_000_000
    for number in range(1, 7):
        shipped = reading.decode(
            (DEMO / "walkers" / f"ID_{number}" / f"ID_{number}_007.jpg").read_bytes(), image_size=128
        )
        assert pictures.psnr(make_demo.walk_image(number, 0, 7), shipped) > 25  # JPEG is what differs


def test_shipped_vae_reconstructs_shipped_and_unseen_walkers():
    shipped = [DEMO / "walkers" / f"ID_{number}" / f"ID_{number}_000.jpg" for number in range(1, 7)]
    seen = [reading.decode(path.read_bytes(), image_size=128) for path in shipped]
    unseen = [make_demo.walk_image(number, 9, 0) for number in UNSEEN]
    model = load.load_vae(DEMO / "demo_vae.safetensors", "cpu")
    for originals in (seen, unseen):
        batch = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            moments = model.encode(batch)
            decoded = pictures.to_uint8(model.decode(moments.chunk(2, dim=1)[0]))
        quality = [pictures.psnr(a, b) for a, b in zip(originals, decoded, strict=True)]
        assert min(quality) >= 20
        assert 0.7 < model.scale_factor * train_vae.latent_std(moments).mean() < 1.4


# --- training a VAE ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Ten images of 16x16 in two classes."""
    rng = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "images" / f"class_{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(tile).resize((16, 16), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "images"


def train(folder: Path, output_folder: Path | str, **settings: object) -> int:
    shown = {"data_path": folder, "output_folder": output_folder, "image_size": 16, "train_num_steps": 6, **settings}
    words = [[f"--{name}", str(value)] for name, value in shown.items()]
    return train_vae.main(
        [*itertools.chain(*words), "--multipliers", "1", "1", "--device", "cpu", "--train_batch_size", "2"]
    )


def test_training_stopped_and_resumed_equals_training_in_one_go(folder, tmp_path, monkeypatch):
    assert train(folder, tmp_path / "whole") == 0
    taken = train_vae.Trainer.train_step

    def pull_the_plug_after_four(trainer):
        if trainer.step == 4:
            raise KeyboardInterrupt
        return taken(trainer)

    monkeypatch.setattr(train_vae.Trainer, "train_step", pull_the_plug_after_four)
    assert train(folder, tmp_path / "parts", save_and_sample_every=3) == 130
    monkeypatch.setattr(train_vae.Trainer, "train_step", taken)
    assert train(folder, tmp_path / "parts", save_and_sample_every=3) == 0
    whole, parts = (load_file(tmp_path / name / "vae.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_trained_vae_is_a_vae_that_the_other_scripts_take(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "float32 on CPU" in said and "torch.float32" not in said
    assert f"with --vae_path {tmp_path / 'out' / 'vae.safetensors'} --image_size 16\n" in said
    model = load.load_vae(tmp_path / "out" / "vae.safetensors", "cpu")
    assert (model.latent_channels, model.downsampling) == (4, 2)
    assert model.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 8, 8, 8)
    with Image.open(tmp_path / "out" / "preview.png") as preview:
        assert preview.height > 2 * 16
    assert load_file(tmp_path / "out" / "vae.safetensors")["quant_conv.weight"].dtype == torch.float16
    _, keys = train_vae.read_images(str(folder), 16)
    held_out = sum(train_vae.are_held_out(len(keys)).tolist())
    assert trained_on.num_seen(str(tmp_path / "out" / "vae.safetensors"), keys) == len(keys) - held_out > 0


def test_a_vae_is_written_in_the_same_bytes_each_time_and_read_by_safetensors(tmp_path):
    network, keys = train_vae.build_vae(train_vae.VAESettings(multipliers=(1, 1))), [f"{i:064x}" for i in range(9)]
    written = {train_vae.vae_bytes(network, 0.5, keys) for _ in range(20)}
    assert len(written) == 1
    path = tmp_path / "vae.safetensors"
    path.write_bytes(written.pop())
    assert load.read_identity(path).scale_factor == 0.5 and trained_on.num_seen(str(path), keys[:3]) == 3
    assert load_file(path).keys() == network.state_dict().keys()


def test_training_lowers_the_error(folder, tmp_path):
    settings = train_vae.VAESettings(
        image_size=16, multipliers=(1, 1), train_num_steps=80, train_batch_size=4, train_lr=5e-3
    )
    pixels, _ = train_vae.read_images(str(folder), 16)
    trainer = train_vae.Trainer(settings, train_vae.hold_out(pixels)[0], "of no folder", torch.device("cpu"))
    errors = [float(trainer.train_step()[0]) for _ in range(30)]
    assert np.mean(errors[-5:]) < 0.8 * np.mean(errors[:5])


def test_a_vae_that_cannot_be_compiled_is_trained_without(folder, tmp_path, capsys, monkeypatch):
    """The same VAE comes out, and the compiler's pages of complaints stay one line."""

    def compile(function):
        def fail(*arguments):
            raise CppCompileError(["g++"], "no room\n" * 10_000)

        return fail

    assert train(folder, tmp_path / "plain", compile="false") == 0
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(train_vae, "pick_compile", lambda *_: True)
    capsys.readouterr()
    assert train(folder, tmp_path / "out") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "cannot be compiled, and trains without" in line and len(line) < 400
    plain, out = (load_file(tmp_path / name / "vae.safetensors") for name in ("plain", "out"))
    assert all(torch.equal(plain[name], out[name]) for name in plain)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", compile)
    assert train(folder, tmp_path / "asked", compile="true") == 1
    assert "give --compile false" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_ends_the_training_before_its_weights_are_saved(
    folder, tmp_path, capsys, monkeypatch
):
    """The loss of that very step is still finite."""
    assert train(folder, tmp_path / "out", train_num_steps=2) == 0
    before = (tmp_path / "out" / "vae.safetensors").read_bytes()
    gradients = train_vae.Trainer._gradients

    def poisoned(trainer, *arguments):
        error = gradients(trainer, *arguments)
        if trainer.step == 3:
            next(trainer.vae.parameters()).grad.fill_(torch.inf)
        return error

    monkeypatch.setattr(train_vae.Trainer, "_gradients", poisoned)
    assert train(folder, tmp_path / "out", train_num_steps=4) == 1
    assert "the gradient is not finite at step 4; lower --train_lr" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("state-*")] == ["state-00000002.safetensors"]
    assert (tmp_path / "out" / "vae.safetensors").read_bytes() == before


def test_too_little_memory_is_told_in_one_line(folder, tmp_path, capsys, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_vae, "vae_loss", no_room)
    assert train(folder, tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the GPU has too little memory for --train_batch_size 2 and --image_size 16; lower one" in line


def test_finished_training_says_so(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out", train_num_steps=2) == 0
    before = (tmp_path / "out" / "vae.safetensors").read_bytes()
    assert train(folder, tmp_path / "out", train_num_steps=2) == 0
    assert "trained already" in capsys.readouterr().out
    assert (tmp_path / "out" / "vae.safetensors").read_bytes() == before


def test_unreadable_image_is_named_and_left_out(folder, tmp_path, capsys):
    (folder / "class_0" / "broken.png").write_bytes(b"")
    assert train(folder, tmp_path / "out", train_num_steps=1) == 0
    assert "broken.png is left out" in capsys.readouterr().err


def test_flat_folder_will_do(folder):
    flat = folder / "class_0"
    (flat / ".hidden.png").touch()
    assert [path.name for path in train_vae.find_images(str(flat))] == ["0.png", "2.png", "4.png", "6.png", "8.png"]
    pixels, _ = train_vae.read_images(str(flat), 16)
    kept, held_out = train_vae.hold_out(pixels)
    assert (len(kept), len(held_out)) == (4, 1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"data_path": "nowhere"}, "nowhere"),
        ({"width": 48}, "--width is 48"),
        ({"image_size": 17}, "--image_size is 17"),
        ({"output_folder": __file__}, "--output_folder"),
        ({"num_step": 3}, "train_num_steps"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, capsys, change, word):
    assert train(**{"folder": folder, "output_folder": tmp_path / "out"} | change) == 2
    error = capsys.readouterr().err.splitlines()
    assert word in error[-1] and error[-1].startswith("error: ")


def test_the_output_does_not_become_a_class_of_images(folder, capsys):
    assert train(folder, folder / "my_vae") == 2
    assert "is among the class folders of --data_path" in capsys.readouterr().err
    assert not (folder / "my_vae").exists()
    assert train(folder, folder / "class_0" / "my_vae") == 2
    assert "is in --data_path" in capsys.readouterr().err


def test_other_settings_or_other_images_do_not_continue_a_training(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out", train_num_steps=1) == 0
    assert train(folder, tmp_path / "out", kl_weight=0.5) == 2
    assert "--kl_weight 0.0002, not 0.5" in capsys.readouterr().err
    shutil.copy(folder / "class_0" / "0.png", folder / "class_1" / "copy.png")
    assert train(folder, tmp_path / "out") == 2
    assert "other images" in capsys.readouterr().err
