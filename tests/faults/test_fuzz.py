"""Every opener of files, on valid files that were mangled at random: only the errors that it documents come out.

Where a file ends in a checksum it is mangled twice: as bytes, which nothing may take for another file; and inside,
with a checksum that fits, which is what somebody would do on purpose.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from bounds import in_child
from fault_account import Account
from os_faults import overwrite
from pipeline import STEPS, generate, preprocess, train
from tiny_cache import SPACE, key, reader, row, stored, strangers
from tiny_checkpoint import same, saved, tiny_tensors
from tiny_images import SAMPLES, small_split
from tiny_vae import save_tiny_diffusers_vae, save_tiny_vae

from gait_latents.common import cli
from gait_latents.common.charts import loss_curve
from gait_latents.common.errors import UserError
from gait_latents.common.layout import MANIFEST_NAME, METRICS_NAME, SPLIT_NAME
from gait_latents.images.reading import BadImage, decode
from gait_latents.images.split import Split
from gait_latents.latents.cache import spaces
from gait_latents.latents.manifest import read_manifest, write_manifest
from gait_latents.latents.vae_fit import space_of_manifest
from gait_latents.latents.verify import verify
from gait_latents.settings import PreprocessSettings, TrainSettings
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.checkpoint import DamagedCheckpoint
from gait_latents.training.metrics_log import Metrics
from gait_latents.training.run_folder import read_state
from gait_latents.vae.load import load_vae, read_identity

CASES, SECONDS = 300, 8.0  # of the short form, and of the long one
MEMORY = 800_000_000  # bytes that all cases of one opener may add to its process

Try = Callable[[random.Random], bool]  # mangles and opens one file; says whether what came out is wrong


def fuzz(account: Account, what: str, how: str, attempt: Try, *, is_long: bool, cases: int = CASES) -> None:
    """Runs `attempt` many times in a child, each time with a generator of its own number."""

    def run() -> list[int]:
        warnings.simplefilter("error")
        wrong, number, started = 0, 0, time.monotonic()
        while (time.monotonic() - started < SECONDS) if is_long else (number < cases):
            try:
                wrong += attempt(random.Random(number))
            except BaseException as error:
                raise AssertionError(f"{what}, {how}: case {number}") from error
            number += 1
        return [number, wrong]

    (number, wrong), memory = in_child(run, seconds=SECONDS + 300)
    assert memory < MEMORY
    account.add(f"fuzz: {what}", how, cases=number, wrong=wrong)


# --- mangling ----------------------------------------------------------------------------------------------

TOKENS = [b"[" * 3000, b"{", b"}", b'"', b"null", b"NaN", b"1e999", b"-1", b"9" * 400, b"\\ud800", b"\0", b"\xff" * 8]
TOKENS += [
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b"\x80\x04",
    b"PK\x03\x04",
    b"true",
    b"&a [*a]",
    b"!!python/object:os.system",
]


def mangled(data: bytes, draw: random.Random) -> bytes:
    """Returns the content after one to four changes: bits, bytes, pieces lost, moved, doubled or put in."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        # Beginnings hold lengths and names, so that half of the changes hit them.
        begin = draw.randrange(max(1, draw.choice((len(content), min(len(content), 200)))))
        end = min(len(content), begin + draw.choice((1, 2, 8, 40, 400)))
        piece = bytes(content[begin:end])
        match draw.randrange(8):
            case 0 if piece:
                content[begin] ^= 1 << draw.randrange(8)
            case 1:
                content[begin:end] = draw.randbytes(end - begin)
            case 2:
                del content[begin:end]
            case 3:
                content[begin:begin] = draw.choice(TOKENS)
            case 4:
                content[begin:end] = draw.choice(TOKENS)
            case 5:
                content[begin:begin] = piece * draw.choice((1, 5))
            case 6:
                there = draw.randrange(len(content) + 1)
                content[there:there] = piece
            case _:
                del content[draw.randrange(len(content) + 1) :]
    return bytes(content)


NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    -1e300,
    "",
    "x",
    "\0",
    "\ud800",
    "../x",
    "/",
    [],
]
NASTY += [{}, [[]], [None], "\x1b[2J", "9" * 5000, ["x"] * 1000, [[[[[[1]]]]]], {"a": {"a": {"a": 1}}}, -(10**400)]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the way to each value in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield (*path, name)
        yield from places(item, (*path, name))


def twisted(document: Any, draw: random.Random) -> Any:
    """Returns a document with one to three of its values exchanged for others, lost, doubled or renamed."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 2, 3))):
        ways = list(places(document))
        if not ways:
            return document
        *way, last = draw.choice(ways)
        holder = document
        for name in way:
            holder = holder[name]
        match draw.randrange(6):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(("", "x", "\ud800", "format", "9" * 300))] = holder.pop(last)
            case 2:
                other: Any = document
                for name in draw.choice(ways):
                    other = other[name] if isinstance(other, dict | list) and _has(other, name) else other
                holder[last] = copy.deepcopy(other)
            case _:
                holder[last] = copy.deepcopy(draw.choice(NASTY))
    return document


def _has(holder: Any, name: Any) -> bool:
    return name in holder if isinstance(holder, dict) else isinstance(name, int) and name < len(holder)


def compact(value: object) -> str:
    """Returns JSON as the checksums are made over it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sealed_manifest(document: dict[str, Any]) -> bytes:
    """Returns a manifest with a checksum that fits whatever it holds."""
    return compact({**document, "sha256": hashlib.sha256(compact(document).encode()).hexdigest()}).encode()


def sealed_split(document: dict[str, Any]) -> bytes:
    """Returns a split with a checksum that fits whatever it holds."""
    body = (compact(document).removesuffix("}") + ",\n").encode("utf-8", "surrogatepass")
    return body + f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def test_mangling_changes_what_it_is_given() -> None:
    data, document = bytes(range(256)) * 4, {"a": [1, {"b": "c"}], "d": 2}
    changed = [mangled(data, random.Random(number)) != data for number in range(200)]
    assert sum(changed) > 180
    assert sum(twisted(document, random.Random(number)) != document for number in range(200)) > 150


# --- the cache ---------------------------------------------------------------------------------------------


def served_wrong(folder: Path) -> bool:
    """Says whether a cache of rows 0 to 2 serves anything else, and looks at all else that reads it."""
    cache = reader(folder)
    moments, found = cache.read([key(i) for i in range(3)])
    wrong = any(f and not np.array_equal(moments[i], row(i, SPACE)) for i, f in enumerate(found))
    invented = strangers(cache, range(3))
    verify(cache, [key(0)])
    spaces(folder)
    return wrong or bool(invented and cache.read(invented)[1].any())


def test_shards(tmp_path: Path, account: Account, is_long: bool) -> None:
    path = stored(tmp_path, range(3))
    data = path.read_bytes()

    def attempt(draw: random.Random) -> bool:
        overwrite(path, mangled(data, draw))
        return served_wrong(tmp_path)

    fuzz(account, "shard", "bytes", attempt, is_long=is_long)


def test_headers_of_shards(tmp_path: Path, account: Account, is_long: bool) -> None:
    path = stored(tmp_path, range(3))
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name in ("space", "names", "records"):
        header["__metadata__"][name] = json.loads(header["__metadata__"][name])

    def attempt(draw: random.Random) -> bool:
        changed = twisted(header, draw)
        facts = changed.get("__metadata__")
        if isinstance(facts, dict):
            facts |= {n: v if isinstance(v, str) and draw.random() < 0.5 else compact(v) for n, v in facts.items()}
        text = compact(changed).encode()
        overwrite(path, len(text).to_bytes(8, "little") + text + data[start:])
        return served_wrong(tmp_path)

    fuzz(account, "shard", "header, written anew", attempt, is_long=is_long)


def test_any_bytes_named_like_a_shard_are_no_more_than_a_problem(
    tmp_path: Path, account: Account, is_long: bool
) -> None:
    path = stored(tmp_path, [0]).with_name(f"{'0' * 32}.safetensors")

    def attempt(draw: random.Random) -> bool:
        overwrite(path, draw.randbytes(draw.randrange(200)))
        cache = reader(tmp_path)
        return cache.keys() != [key(0)] or len(cache.problems) != 1

    fuzz(account, "shard", "random bytes", attempt, is_long=is_long)


def read_all_of_manifest(folder: Path) -> object:
    """Reads a manifest as the scripts do, or returns None where that is a clear error."""
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            space_of_manifest(manifest)
            for cls in (PreprocessSettings, TrainSettings):
                cli.stored_layer(cls, "manifest", manifest.settings, only_about_cache=True)
            manifest.space.differing_fields(SPACE)
        return manifest
    except UserError:
        return None


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest as preprocess_latents.py writes it."""
    settings = cli.to_dict(PreprocessSettings())
    write_manifest(tmp_path, settings, SPACE, {"scale_factor": 0.18215, "shift_factor": 0.0, "images": 3})
    return tmp_path / MANIFEST_NAME


def test_manifests(manifest: Path, account: Account, is_long: bool) -> None:
    data, original = manifest.read_bytes(), read_all_of_manifest(manifest.parent)
    assert original is not None

    def attempt(draw: random.Random) -> bool:
        overwrite(manifest, mangled(data, draw))
        return read_all_of_manifest(manifest.parent) not in (None, original)

    fuzz(account, "manifest", "bytes", attempt, is_long=is_long)


def test_sealed_manifests(manifest: Path, account: Account, is_long: bool) -> None:
    document = json.loads(manifest.read_text())
    del document["sha256"]

    def attempt(draw: random.Random) -> bool:
        overwrite(manifest, sealed_manifest(twisted(document, draw)))
        read_all_of_manifest(manifest.parent)
        return False

    fuzz(account, "manifest", "sealed anew", attempt, is_long=is_long)


# --- splits ------------------------------------------------------------------------------------------------


def test_splits(account: Account, is_long: bool) -> None:
    data, original = small_split().to_bytes(), small_split()

    def attempt(draw: random.Random) -> bool:
        try:
            return Split.from_bytes(mangled(data, draw), "split.json") != original
        except UserError:
            return False

    fuzz(account, "split", "bytes", attempt, is_long=is_long)


def test_sealed_splits(account: Account, is_long: bool) -> None:
    document = json.loads(small_split().to_bytes())
    del document["sha256"]

    def attempt(draw: random.Random) -> bool:
        try:
            split = Split.from_bytes(sealed_split(twisted(document, draw)), "split.json")
        except UserError:
            return False
        split.labels(split.train)
        split.index()
        split.keys()
        return Split.from_bytes(split.to_bytes(), "split.json") != split

    fuzz(account, "split", "sealed anew", attempt, is_long=is_long)


# --- checkpoints -------------------------------------------------------------------------------------------


def test_checkpoints(tmp_path: Path, account: Account, is_long: bool) -> None:
    path = saved(tmp_path, 3)
    data = path.read_bytes()

    def attempt(draw: random.Random) -> bool:
        overwrite(path, mangled(data, draw))
        try:
            tensors, meta = checkpoint.load(path)
        except (DamagedCheckpoint, UserError):
            return False
        return meta != {"step": 3} or not same(tensors, tiny_tensors(3))

    fuzz(account, "checkpoint", "bytes", attempt, is_long=is_long)


def test_sealed_checkpoints(trained: Path, tmp_path: Path, account: Account, is_long: bool) -> None:
    _, meta = checkpoint.load(next((trained / "results").glob("state-*")))
    path = tmp_path / run_folder.full_name(8)
    tensors = tiny_tensors()

    def attempt(draw: random.Random) -> bool:
        text = json.dumps(twisted(meta, draw))
        facts = {"format": "1", "meta": text, "sha256": checkpoint._checksum(tensors, text)}
        overwrite(path, safetensors.torch.save(tensors, facts))
        try:
            state = read_state(path)
        except UserError:
            return False
        cli.stored_layer(TrainSettings, "run", state.meta.settings)
        return any("/" in name for name in state.meta.classes) or state.step < 0

    fuzz(account, "checkpoint", "meta, sealed anew", attempt, is_long=is_long)


# --- weight files ------------------------------------------------------------------------------------------


def takes_a_vae(path: Path) -> bool:
    """Opens a VAE in both ways; says whether it was taken."""
    try:
        read_identity(path)
        load_vae(path, "cpu", parts="encoder")
    except UserError as error:
        assert str(error) and "\n" not in str(error) and "weights_only" not in str(error)
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_weight_files(tmp_path: Path, account: Account, is_long: bool, form: str) -> None:
    path = tmp_path / ("vae.safetensors" if form == "safetensors" else "vae.pt")
    network = save_tiny_vae(path, multipliers=(1,))
    if form == "legacy":
        content = {"state_dict": network.state_dict(), "epoch": 3, "scale_factor": np.float64(0.2)}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    pickled = pickled_part(path) if form == "zip" else range(4000)

    def attempt(draw: random.Random) -> bool:
        head, middle, tail = data[: pickled.start], data[pickled.start : pickled.stop], data[pickled.stop :]
        # The pickle is a small part of the file, and where the harm would be.
        overwrite(path, mangled(data, draw) if draw.random() < 0.3 else head + mangled(middle, draw) + tail)
        takes_a_vae(path)
        return False

    fuzz(account, "weight file", form, attempt, is_long=is_long)


def pickled_part(path: Path) -> range:
    """Returns where the pickle of a .pt file lies."""
    with zipfile.ZipFile(path) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    return range(record.header_offset + 60, record.header_offset + 60 + record.file_size)


@pytest.mark.slow
def test_configs_of_diffusers(tmp_path: Path, account: Account, is_long: bool) -> None:
    save_tiny_diffusers_vae(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    document = json.loads(path.read_text())

    def attempt(draw: random.Random) -> bool:
        text = compact(twisted(document, draw)).encode()
        overwrite(path, mangled(text, draw) if draw.random() < 0.2 else text)
        try:
            read_identity(path.parent)
        except UserError as error:
            assert "\n" not in str(error)
        return False

    fuzz(account, "weight file", "config.json of diffusers", attempt, is_long=is_long)


# --- images, settings, metrics -----------------------------------------------------------------------------


def test_images(account: Account, is_long: bool) -> None:
    kinds = list(SAMPLES)

    def attempt(draw: random.Random) -> bool:
        data = mangled(SAMPLES[draw.choice(kinds)], draw) if draw.random() < 0.95 else draw.randbytes(200)
        try:
            pixels = decode(data, image_size=8)
        except BadImage as error:
            assert str(error).isprintable()
            return False
        return pixels.shape != (8, 8, 3) or pixels.dtype != np.uint8

    fuzz(account, "image", "bytes", attempt, is_long=is_long, cases=4 * CASES)


def test_config_files(tmp_path: Path, account: Account, is_long: bool) -> None:
    text = cli.to_yaml(TrainSettings()).encode()
    path = tmp_path / "my.yaml"

    def attempt(draw: random.Random) -> bool:
        content = mangled(text, draw)
        if draw.random() < 0.5:
            changed = twisted(cli.to_dict(TrainSettings()), draw)
            content = json.dumps(changed).encode()  # JSON is YAML, and keeps what dumping would quote
        overwrite(path, content)
        try:
            layer = cli.read_file(TrainSettings, str(path))
        except UserError as error:
            assert str(error)
            return False
        settings = cli.resolve(TrainSettings, [layer]).settings
        again = cli.stored_layer(TrainSettings, "again", cli.to_dict(settings)).values
        paths = [again[name] for name, spec in cli.specs(TrainSettings).items() if spec.path and again[name]]
        return any(b"\0" in os.fsencode(path) for path in paths)

    fuzz(account, "--config", "bytes, values", attempt, is_long=is_long)


@pytest.mark.slow
def test_metrics(tmp_path: Path, account: Account, is_long: bool) -> None:
    rows = [{"step": step, "loss": 0.5, "lr": 1e-4, "hours": 0.1} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def attempt(draw: random.Random) -> bool:
        changed = "".join(json.dumps(row) + "\n" for row in twisted(rows, draw)).encode()
        overwrite(tmp_path / METRICS_NAME, mangled(text, draw) if draw.random() < 0.5 else changed)
        metrics = Metrics(tmp_path, step=4)
        with np.errstate(all="raise", under="ignore"):
            loss_curve(*metrics.series("loss"))
        return any(row["step"] > 4 for row in metrics.rows)

    fuzz(account, "metrics.jsonl", "bytes, rows", attempt, is_long=is_long, cases=CASES // 3)


# --- the scripts -------------------------------------------------------------------------------------------


class Sealed:
    """The documents of a world's cache and run, written anew with other values and checksums that fit."""

    def __init__(self, root: Path) -> None:
        self.cache, self.results = root / "latents_cache", root / "results"
        self.state = self.results / run_folder.full_name(STEPS)
        self.tensors, self.meta = checkpoint.load(self.state)
        self.split = json.loads((self.results / SPLIT_NAME).read_bytes())
        self.manifest = json.loads((self.cache / MANIFEST_NAME).read_bytes())
        del self.split["sha256"], self.manifest["sha256"]

    def twist_split(self, draw: random.Random) -> None:
        """Changes the split of both."""
        content = sealed_split(twisted(self.split, draw))
        for folder in (self.cache, self.results):
            overwrite(folder / SPLIT_NAME, content)

    def twist_manifest(self, draw: random.Random) -> None:
        """Changes the manifest of the cache."""
        manifest = twisted(self.manifest, draw)
        settings = manifest.get("settings") if isinstance(manifest, dict) else None
        if isinstance(settings, dict):
            size = settings.get("image_size", 256)  # its default
            if isinstance(size, int) and 64 < size <= 4096:  # is taken, and with this VAE needs many gigabytes
                settings["image_size"] = 64
        overwrite(self.cache / MANIFEST_NAME, sealed_manifest(manifest))

    def twist_state(self, draw: random.Random) -> None:
        """Changes the meta of the last state of the run, and leaves it the only one."""
        for path in self.results.glob("*.safetensors"):
            path.unlink()
        text = json.dumps(twisted(self.meta, draw))
        facts = {"format": "1", "meta": text, "sha256": checkpoint._checksum(self.tensors, text)}
        overwrite(self.state, safetensors.torch.save(self.tensors, facts))


@pytest.mark.slow
def test_the_scripts_on_documents_of_nonsense(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Account, is_long: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand folders are made and thrown away
    whole, root = shutil.copytree(trained, tmp_path / "whole"), tmp_path / "world"
    nothing = dict.fromkeys(("images_per_user", "data_path", "vae_path", "image_size"))
    quick: dict[str, Any] = {"num_samples": 0}
    runs: list[Callable[[], int]] = [
        lambda: train(root, train_num_steps=STEPS + 1, **quick),
        lambda: train(root, train_num_steps=1, results_folder=root / "new", **quick, **nothing),
        lambda: generate(root, images_per_class=1),
        lambda: preprocess(root, verify=True),
        lambda: preprocess(root),
    ]

    def attempt(draw: random.Random) -> bool:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole, root)
        sealed = Sealed(root)
        draw.choice((sealed.twist_split, sealed.twist_manifest, sealed.twist_state))(draw)
        if draw.random() < 0.3:
            shutil.rmtree(root / "data")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            codes = [run() for run in draw.sample(runs, 2)]
        is_wrong = not set(codes) <= {0, 1, 2} or "Traceback" in said.getvalue()
        made = {path.name for path in root.iterdir()} - {path.name for path in whole.iterdir()}
        return (
            is_wrong or not made <= {"new", "synthetic"} or {p.name for p in tmp_path.iterdir()} != {"whole", "world"}
        )

    fuzz(account, "the scripts", "documents sealed anew", attempt, is_long=is_long, cases=12)
