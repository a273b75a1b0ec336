"""Files that somebody made to do harm: no code of theirs runs, and one error comes of them, at little cost."""

import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from bounds import in_child
from fault_account import Account
from os_faults import fork, overwrite, wait_for
from pipeline import STEPS, generate, make_world, preprocess, train
from tiny_cache import SPACE, found_rows, key, reader, stored
from tiny_checkpoint import same, saved, tiny_tensors
from tiny_images import png, small_split
from tiny_vae import save_tiny_diffusers_vae, save_tiny_vae, tiny_vae

import generate as generate_script
import preprocess_latents
import train_latent_cfg
from gait_latents import export
from gait_latents.common import cli, files, layout
from gait_latents.common.errors import UserError
from gait_latents.common.layout import METRICS_NAME, SETTINGS_NAME, SPLIT_NAME
from gait_latents.evaluation import report
from gait_latents.images import generated, reading
from gait_latents.images.split import Split, read_split
from gait_latents.latents import manifest
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache, spaces
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.manifest import read_manifest
from gait_latents.latents.vae_fit import space_of_manifest
from gait_latents.latents.verify import verify
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.checkpoint import DamagedCheckpoint
from gait_latents.training.metrics_log import Metrics
from gait_latents.training.run_folder import read_state
from gait_latents.vae import weight_files
from gait_latents.vae.load import load_vae, read_identity

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gait_latents"
MEMORY = 150_000_000  # bytes that a refusal may cost at most
SCRIPTS = {
    "preprocess": preprocess_latents,
    "train": train_latent_cfg,
    "generate": generate_script,
    "export": export,
}


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A world of one's own after preprocessing and a whole training run."""
    return shutil.copytree(trained, tmp_path / "world")


def with_length(header: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    """Returns the bytes of a safetensors file with this header, and another length of it where one is given."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def put_oddity(kind: str, path: Path) -> None:
    """Makes what is no file under the name of one."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop of links": path.name, "dangling link": "nowhere", "device": "/dev/zero"}[kind])


ODDITIES = ("folder", "loop of links", "dangling link", "pipe", "device")


# --- shards ------------------------------------------------------------------------------------------------


def hostile_headers(good: dict[str, Any]) -> dict[str, bytes]:
    """Returns headers that no shard has, made from one that a shard of one row has."""
    text = json.dumps(good)
    deep = b"[" * 100_000
    metadata = good["__metadata__"]

    def changed(name: str, **fields: object) -> bytes:
        return json.dumps({**good, name: {**good[name], **fields}}).encode()

    return {
        "empty": b"",
        "not json": b"\xff\xfe{",
        "nested": deep,
        "nested inside": b'{"__metadata__":' + deep,
        "nested but closed": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        "very many things": b'{"a":[' + b"[]," * 340_000 + b"[]]}",
        "a list": b"[]",
        "a number": b"7",
        "null": b"null",
        "metadata are text": json.dumps({**good, "__metadata__": "x"}).encode(),
        "metadata are numbers": json.dumps({**good, "__metadata__": {**metadata, "format": 1}}).encode(),
        "no metadata": json.dumps({name: good[name] for name in ("keys", "moments", "seals")}).encode(),
        "one tensor less": json.dumps({name: good[name] for name in good if name != "seals"}).encode(),
        "one tensor more": json.dumps({**good, "more": good["seals"]}).encode(),
        "an entry is a list": json.dumps({**good, "keys": []}).encode(),
        "another format": json.dumps({**good, "__metadata__": {**metadata, "format": "2"}}).encode(),
        "a space beyond floats": json.dumps(
            {**good, "__metadata__": {**metadata, "space": metadata["space"].replace("256", "1e999")}}
        ).encode(),
        "a bool as length": changed("keys", shape=[True, 32]),
        "a float as length": changed("keys", shape=[1.0, 32]),
        "a negative shape": changed("moments", shape=[-1, 2, 2, 1]),
        "a huge shape": changed("moments", shape=[2**62, 2, 2, 1]),
        "an endless number": text.replace("[1, 32]", "[" + "9" * 5000 + ", 32]").encode(),
        "a large number": text.replace("[1, 32]", "[" + "9" * 4000 + ", 32]").encode(),
        "NaN": text.replace("[1, 32]", "[NaN, 32]").encode(),
        "infinity": text.replace("[1, 32]", "[1e999, 32]").encode(),
        "another type": changed("moments", dtype="BF16"),
        "overlapping": changed("keys", data_offsets=[0, 32]),
        "offsets reversed": changed("keys", data_offsets=[44, 12]),
        "an unknown field": changed("keys", more=1),
        "keys named twice": text[:-1].encode() + b', "keys": ' + json.dumps(good["keys"]).encode() + b"}",
        "format named twice": text.replace('"format": "1"', '"format": "1", "format": "1"').encode(),
        "surrogates": text.replace("jpg", "\\ud800").replace('"1"', '"\\ud800"').encode(),
    }


@pytest.mark.slow
def test_hostile_headers_of_a_shard_are_reported_misses(tmp_path: Path, account: Account) -> None:
    path = stored(tmp_path, [0])
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    headers = hostile_headers(json.loads(data[8:start]))

    def open_all() -> int:
        wrong = 0
        for header in headers.values():
            overwrite(path, with_length(header, data[start:]))
            cache = reader(tmp_path)
            wrong += int(cache.read([key(0)])[1].sum())
            assert len(cache.problems) == 1 and len(cache.problems[0]) < len(str(path)) + 160
            assert verify(cache, [key(0)]).missing == [key(0)]
            assert spaces(tmp_path).keys() <= {SPACE.id}
        return wrong

    wrong, memory = in_child(open_all)
    assert memory < MEMORY
    account.add("hostile header of a shard", "JSON made to do harm", cases=len(headers), wrong=wrong)


def test_headers_and_shards_that_claim_terabytes_are_refused_unread(tmp_path: Path, account: Account) -> None:
    good = stored(tmp_path, [1])
    path = good.with_name(f"{'0' * 32}.safetensors")
    many = (1 << 40) // 44
    header = shard_file.header_bytes(SPACE, many, [], [])

    def open_all() -> int:
        cases = 0
        for length in (1, 100 << 20, 2**31, 2**62, 2**64 - 1):
            path.write_bytes(with_length(b"{}", length=length))
            os.truncate(path, min(length + 8, 1 << 33))
            cases += found_rows(reader(tmp_path), [0, 1]) == [1] and len(reader(tmp_path).problems) == 1
        path.write_bytes(header)  # all is as it should be, but for the hole of a terabyte that follows
        os.truncate(path, len(header) + 44 * many)
        return cases + (found_rows(reader(tmp_path), [0, 1]) == [1])

    cases, memory = in_child(open_all)
    assert memory < MEMORY
    account.add("hostile header of a shard", "100 MB to terabytes", cases=6, lost=6 - cases)


def test_what_is_no_file_but_named_like_a_shard_is_reported_and_skipped(tmp_path: Path, account: Account) -> None:
    folder = stored(tmp_path, [0]).parent
    for kind, digit in zip(ODDITIES, "abcde", strict=True):
        put_oddity(kind, folder / f"{digit * 32}.safetensors")
    (folder / f"{'f' * 32}.safetensors").write_bytes(b"")

    def open_it() -> list[str]:
        cache = reader(tmp_path)
        assert found_rows(cache, [0]) == [0]
        writer = LatentCache(tmp_path, SPACE, writable=True)
        writer.merge()
        verify(cache, [key(0)])
        return [Path(line.split(": ")[0]).name[0] for line in cache.problems]

    assert in_child(open_it)[0] == ["a", "b", "c", "d", "e", "f"]
    account.add("no file where a shard should be", "folder, links, pipe, device, empty", cases=len(ODDITIES) + 1)


@pytest.mark.slow
def test_ten_thousand_orphans_cost_little_and_go(tmp_path: Path, account: Account) -> None:
    folder = stored(tmp_path, [0]).parent
    ended = fork(lambda: None)
    wait_for(ended)
    for number in range(10_000):
        host = files.host_digest() if number % 2 else "00000000"
        os.close(os.open(folder / f"{files.TEMPORARY_PREFIX}{host}-{ended}-{number}", os.O_CREAT | os.O_WRONLY))

    def open_it() -> list[int]:
        return found_rows(LatentCache(tmp_path, SPACE, writable=True), [0])

    found, memory = in_child(open_it)
    left = len(list(folder.glob(f"{files.TEMPORARY_PREFIX}*")))
    assert memory < MEMORY and left == 5_000  # those of another machine may be in use
    account.add("abandoned temporaries", "10,000 in the folder of a space", cases=1, lost=int(found != [0]))


# --- checkpoints -------------------------------------------------------------------------------------------


def one_tensor(shape: str, dtype: str = "F32", size: int = 4) -> bytes:
    """Returns a safetensors file of one tensor with this shape, written as JSON."""
    entry = f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{size}]}}}}'
    return with_length(entry.encode(), bytes(size))


HOSTILE_CHECKPOINTS = {
    "empty file": b"",
    "empty header": with_length(b""),
    "nested": with_length(b"[" * 100_000),
    "nested metadata": with_length(b'{"__metadata__":' + b"[" * 100_000),
    "a list": with_length(b"[]"),
    "no metadata": with_length(b"{}"),
    "metadata are text": with_length(b'{"__metadata__":"x"}'),
    "metadata are null": with_length(b'{"__metadata__":null}'),
    "impossible length": with_length(b"{}", length=2**62),
    "100 MB header": with_length(b"{}", length=100 << 20),
    "endless shape": one_tensor(f"[{'9' * 5000}]"),
    "overflowing shape": one_tensor("[4294967296,4294967296]", size=0),
    "negative shape": one_tensor("[-1]"),
    "bool shape": one_tensor("[true]"),
    "NaN shape": one_tensor("[NaN]"),
    "shape of nothing, times too much": one_tensor("[0,9223372036854775807,9223372036854775807]", size=0),
    "shape of nothing, times more than a long": one_tensor("[0,18446744073709551615]", size=0),
    "unknown type": one_tensor("[1]", "F33"),
    "half bytes": one_tensor("[2]", "F4", 1),
    "complex": one_tensor("[1]", "C64", 8),
    "overlapping": with_length(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "named twice": with_length(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "a pickle": pickle.dumps({"model.w": [1.0]}),
    "another program's file": safetensors.torch.save({"model.w": torch.ones(2)}, {"format": "pt"}),
    "pickle renamed": pickle.dumps({"model.w": [1.0]}, protocol=4),
    "meta are a list": None,
    "meta are a number": None,
    "meta are cut short": None,
    "meta are nested": None,
}
METAS = {
    "meta are a list": "[1]",
    "meta are a number": "7",
    "meta are cut short": "{",
    "meta are nested": "[" * 100_000,
}


def hostile_checkpoint(which: str) -> bytes:
    """Returns the content of a hostile checkpoint; the checksum of one with hostile meta holds."""
    content = HOSTILE_CHECKPOINTS[which]
    if content is not None:
        return content
    tensors, text = tiny_tensors(), METAS[which]
    return safetensors.torch.save(tensors, {"format": "1", "meta": text, "sha256": checkpoint._checksum(tensors, text)})


def test_a_hostile_checkpoint_is_damaged_and_the_one_before_is_taken(tmp_path: Path, account: Account) -> None:
    saved(tmp_path, 2)
    path = tmp_path / run_folder.full_name(4)

    def open_all() -> int:
        wrong = 0
        for which in HOSTILE_CHECKPOINTS:
            path.write_bytes(hostile_checkpoint(which))
            with pytest.raises(DamagedCheckpoint) as caught:
                checkpoint.load(path)
            assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < len(str(path)) + 130
            found = run_folder.find_newest(tmp_path)
            wrong += found is None or found[2] != {"step": 2} or not same(found[1], tiny_tensors(2))
        return wrong

    wrong, memory = in_child(open_all)
    assert memory < MEMORY
    account.add("hostile checkpoint", "header or meta made to do harm", cases=len(HOSTILE_CHECKPOINTS), wrong=wrong)


def test_checkpoints_with_holes_of_terabytes_are_refused_unread(tmp_path: Path, account: Account) -> None:
    saved(tmp_path, 2)
    path = tmp_path / run_folder.full_name(4)

    def open_all() -> int:
        path.write_bytes(with_length(b"{}".ljust(4000)))
        os.truncate(path, 1 << 40)
        first = run_folder.find_newest(tmp_path)
        path.write_bytes(with_length(b"{}", length=4 << 20))
        os.truncate(path, 1 << 40)
        second = run_folder.find_newest(tmp_path)
        return sum(found is None or found[2] != {"step": 2} for found in (first, second))

    wrong, memory = in_child(open_all)
    assert memory < MEMORY
    account.add("hostile checkpoint", "a hole of a terabyte", cases=2, wrong=wrong)


def test_the_newest_falls_back_over_whatever_is_in_the_way(tmp_path: Path, account: Account) -> None:
    saved(tmp_path, 2)
    made = [run_folder.full_name(step) for step in (8, 7, 6, 5, 4)]
    for kind, name in zip(ODDITIES, made, strict=True):
        put_oddity(kind, tmp_path / name)
    saved(tmp_path, 3).write_bytes(b"")

    def find() -> list[Any]:
        found = run_folder.find_newest(tmp_path)
        assert found is not None and same(found[1], tiny_tensors(2))
        return [found[2], [warning.split(":")[0] for warning in found[3]]]

    (meta, told), _ = in_child(find)
    assert told == [str(tmp_path / name) for name in (*made, run_folder.full_name(3))]
    account.add(
        "no file where a checkpoint should be", "folder, links, pipe, device, empty", cases=6, wrong=meta != {"step": 2}
    )


# --- files whose checksum holds ----------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    """Returns objects that lie in each other."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def sealed_manifest(document: dict[str, Any]) -> str:
    """Returns a manifest with a checksum that fits whatever it holds."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return json.dumps({**document, "sha256": hashlib.sha256(text.encode()).hexdigest()})


Change = Callable[[Any], object]

MANIFESTS: dict[str, Change] = {
    "no spec": lambda m: m.pop("spec"),
    "spec is a list": lambda m: m.update(spec=[]),
    "no shape": lambda m: m["spec"].pop("moments_shape"),
    "shape overflows": lambda m: m["spec"].update(moments_shape=[2**32, 2**32, 1]),
    "shape is huge": lambda m: m["spec"].update(moments_shape=[1 << 19, 1 << 19, 1]),
    "shape is negative": lambda m: m["spec"].update(moments_shape=[-8, 8, 8]),
    "shape is text": lambda m: m["spec"].update(moments_shape=["8", 8, 8]),
    "shape is true": lambda m: m["spec"].update(moments_shape=[True, 8, 8]),
    "shape is odd": lambda m: m["spec"].update(moments_shape=[7, 8, 8]),
    "image_size is text": lambda m: m["spec"].update(image_size="16"),
    "no image_size": lambda m: m["spec"].pop("image_size"),
    "no VAE": lambda m: m["spec"].pop("vae"),
    "nested": lambda m: m["spec"].update(vae=nested(400)),
    "settings are a list": lambda m: m.update(settings=[]),
    "no settings": lambda m: m.pop("settings"),
    "record is null": lambda m: m.update(record=None),
    "record is empty": lambda m: m.update(record={}),
    "scale is text": lambda m: m["record"].update(scale_factor="x"),
    "scale has 4000 digits": lambda m: m["record"].update(scale_factor=10**4000),
}
DEFAULTS: dict[str, Change] = {  # settings of a manifest, which scripts take as defaults
    "splits names an attribute": lambda m: m["settings"].update(splits=["__class__"]),
    "splits is a number": lambda m: m["settings"].update(splits=7),
    "seed is text": lambda m: m["settings"].update(seed="x"),
    "seed is a list of lists": lambda m: m["settings"].update(seed=[[1]]),
    "seed has 4000 digits": lambda m: m["settings"].update(seed=10**4000),
    "a path holds NUL": lambda m: m["settings"].update(data_path="a\0b"),
    "a path is no text": lambda m: m["settings"].update(data_path="a\ud800b"),
    "a path is nested": lambda m: m["settings"].update(data_path=nested(400)),
}


def test_a_sealed_manifest_of_nonsense_is_a_clear_error(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished / "latents_cache"
    path = folder / layout.MANIFEST_NAME
    whole = json.loads(path.read_text())
    del whole["sha256"]
    assert read_manifest(folder) is not None
    for change in MANIFESTS.values():
        document = copy.deepcopy(whole)
        change(document)
        path.write_text(sealed_manifest(document))
        with pytest.raises(UserError, match=r"manifest"):
            space_of_manifest(read_manifest(folder))  # type: ignore[arg-type]
    for what, change in DEFAULTS.items():
        document = copy.deepcopy(whole)
        change(document)
        path.write_text(sealed_manifest(document))
        capsys.readouterr()
        assert preprocess_latents.main(["--verify", "--output_folder", str(folder), "--device", "cpu"]) == 2, what
        assert len(capsys.readouterr().err.splitlines()) == 1
    account.add("hostile manifest", "sealed anew", cases=len(MANIFESTS) + len(DEFAULTS))


METAS_OF_A_RUN: dict[str, Change] = {
    "no settings": lambda m: m.pop("settings"),
    "settings are a list": lambda m: m.update(settings=[]),
    "step is text": lambda m: m.update(step="x"),
    "step is negative": lambda m: m.update(step=-5),
    "step is huge": lambda m: m.update(step=10**30),
    "no classes": lambda m: m.pop("classes"),
    "a class leads elsewhere": lambda m: m.update(classes=["../../evil", "b", "c"]),
    "a class is absolute": lambda m: m.update(classes=["/tmp/evil", "b", "c"]),
    "a class is ..": lambda m: m.update(classes=["..", "b", "c"]),
    "a class holds NUL": lambda m: m.update(classes=["a\0", "b", "c"]),
    "a class is no text": lambda m: m.update(classes=["a\ud800", "b", "c"]),
    "a class is a number": lambda m: m.update(classes=[1, 2, 3]),
    "a class twice": lambda m: m.update(classes=["a", "a", "c"]),
    "classes are a text": lambda m: m.update(classes="abc"),
    "latents are huge": lambda m: m.update(latent_shape=[4, 2**40, 2**40]),
    "latents are text": lambda m: m.update(latent_shape=["4", 8, 8]),
    "no latents": lambda m: m.update(latent_shape=None),
    "no normalisation": lambda m: m.update(latent_norm={}),
    "normalisation below 0": lambda m: m["latent_norm"].update(scale=[-1.0] * 4),
    "normalisation of one channel": lambda m: m["latent_norm"].update(scale=[1.0], shift=[1.0]),
    "normalisation of 400 digits": lambda m: m["latent_norm"].update(scale=[10**400] * 4),
    "dim is huge": lambda m: m["settings"].update(dim=10**6),
    "dim is more than a long": lambda m: m["settings"].update(dim=10**40),
    "dim is text": lambda m: m["settings"].update(dim="8"),
    "heads are many": lambda m: m["settings"].update(attn_heads=10**8),
    "timesteps are many": lambda m: m["settings"].update(timesteps=10**12),
    "levels are many": lambda m: m["settings"].update(dim_mults=[1] * 100_000),
    "an unknown objective": lambda m: m["settings"].update(objective="rm -rf"),
    "a setting is a list of lists": lambda m: m["settings"].update(seed=[[1]]),
    "a path holds NUL": lambda m: m["settings"].update(vae_path="a\0b"),
    "no space": lambda m: m.update(space=None),
    "space is nested": lambda m: m.update(space={**m["space"], "vae": nested(400)}),
    "space has no VAE": lambda m: m["space"].pop("vae"),
    "scale is text": lambda m: m.update(scale_factor="x"),
    "no moments_digest": lambda m: m.pop("moments_digest"),
    "data_digest is a number": lambda m: m.update(data_digest=5),
    "suffix is a number": lambda m: m.update(image_suffix=5),
}
TRAINING_STATES: dict[str, Change] = {  # what only a run that goes on looks at
    "training is a list": lambda m: m.update(training=[]),
    "no groups": lambda m: m["training"]["optimizer"].update(param_groups=[]),
    "groups are text": lambda m: m["training"]["optimizer"].update(param_groups="x"),
    "lr is text": lambda m: m["training"]["optimizer"]["param_groups"][0].update(lr="x"),
    "parameters are text": lambda m: m["training"]["optimizer"]["param_groups"][0].update(params="x"),
    "betas are a number": lambda m: m["training"]["optimizer"]["param_groups"][0].update(betas=5),
    "parameters exchanged": lambda m: m["training"]["optimizer"]["param_groups"][0]["params"].reverse(),
    "a parameter twice": lambda m: m["training"]["optimizer"]["param_groups"][0]["params"].__setitem__(0, 1),
    "a parameter is true": lambda m: m["training"]["optimizer"]["param_groups"][0]["params"].__setitem__(1, True),
    "lr below 0": lambda m: m["training"]["optimizer"]["param_groups"][0].update(lr=-1),
    "loss scale is text": lambda m: m["training"].update(scaler={"scale": "x"}),
    "values of no parameter": lambda m: m["training"]["optimizer"].update(values={"x.y": 1}),
}


def contents(root: Path) -> dict[str, bytes]:
    """Returns the content of each file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_sealed_checkpoint_of_nonsense_is_refused_and_writes_nothing(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str], is_long: bool
) -> None:
    results = finished / "results"
    path = results / run_folder.full_name(STEPS)
    tensors, whole = checkpoint.load(path)
    for other in results.glob("*.safetensors"):
        other.unlink()
    cases = [(change, generate) for change in METAS_OF_A_RUN.values()]
    # Both read a checkpoint in one place, so that training need not see them all.
    cases += [
        (change, train)
        for change in [*list(METAS_OF_A_RUN.values())[:: 1 if is_long else 7], *TRAINING_STATES.values()]
    ]
    wrong = 0
    for change, run in cases:
        meta = copy.deepcopy(whole)
        change(meta)
        checkpoint.save(path, tensors, meta)
        before = contents(finished.parent)
        capsys.readouterr()
        code = run(finished, **({"train_num_steps": STEPS + 1} if run is train else {}))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        wrong += code != 2 or contents(finished.parent) != before
    account.add("hostile meta of a checkpoint", "sealed anew", cases=len(cases), wrong=wrong)


def test_an_optimizer_without_all_its_moments_is_refused(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "results" / run_folder.full_name(STEPS)
    tensors, meta = checkpoint.load(path)
    changes: list[Callable[[dict[str, torch.Tensor]], object]] = [
        lambda t: t.pop("optimizer.0.exp_avg"),
        lambda t: t.pop("optimizer.1.step"),
        lambda t: [t.pop(f"optimizer.2.{name}") for name in ("step", "exp_avg", "exp_avg_sq")],
        lambda t: t.update({"optimizer.0.step": torch.zeros(3)}),
        lambda t: t.update({"optimizer.0.exp_avg": torch.zeros(())}),
        lambda t: t.update({"optimizer.0.exp_avg_sq": torch.zeros(1)}),
        lambda t: t.update({"optimizer.-1.exp_avg": t["optimizer.1.exp_avg"].clone()}),
        lambda t: t.update({"optimizer.0.more": torch.zeros(())}),
        lambda t: t.update({"optimizer.x.step": torch.zeros(())}),
        lambda t: t.update({"log.losses": torch.zeros(2, 2)}),
    ]
    for change in changes:
        changed = dict(tensors)
        change(changed)
        checkpoint.save(path, changed, meta)
        capsys.readouterr()
        assert train(finished, train_num_steps=STEPS + 1) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    account.add("hostile meta of a checkpoint", "a state of another optimizer", cases=len(changes))


def test_weights_of_another_network_than_the_meta_say_are_refused(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "results" / run_folder.ema_name(STEPS)
    tensors, meta = checkpoint.load(path)
    name = next(iter(tensors))
    for changed in ({name: torch.zeros(3)}, {"ema.more": torch.zeros(1)}):
        checkpoint.save(path, {**tensors, **changed}, meta)
        capsys.readouterr()
        assert generate(finished, checkpoint=path) == 2
        assert "holds other weights than those of its network" in capsys.readouterr().err
    account.add("hostile meta of a checkpoint", "weights of another network", cases=2)


# --- splits, metrics, settings, labels ---------------------------------------------------------------------


def sealed_split(old: str, new: str) -> bytes:
    """Returns the small split with one piece of text replaced and its checksum made to fit."""
    body = small_split().to_bytes().decode()
    body = body[: body.index('  "sha256"')]
    assert old in body
    body = body.replace(old, new).encode("utf-8", "surrogatepass")
    return body + f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


SPLITS = [
    ('"4.jpg"', '"../4.jpg"'),
    ('"name": "4.jpg"', '"name": ".."'),
    ('"4.jpg"', "4"),
    ('"4.jpg"', '"1.jpg"'),
    ('"4.jpg"', '"\ud800"'),
    ('"4.jpg"', '"\\ud800"'),
    ('"4.jpg"', '"a\\u0000"'),
    ('"class": "ID_1"', '"class": "ID_2"'),
    ('"class": "ID_1"', '"class": ["ID_1"]'),
    ('"key": ""', '"key": "abc"'),
    ('"gap": [', '"gap": 5, "gop": ['),
    ('"seed": 0', '"seed": ' + "[" * 100_000),
    ('"seed": 0', '"seed": ' + "9" * 5000),
    ('"seed": 0', '"seed": [0]'),
    ('"seed": 0, ', ""),
    ('"rule": {', '"rule": 1, "role": {'),
    ('"train": [', '"train": null, "tram": ['),
    ('"train": [', '"train": [[1, 2, 3],'),
    ('"classes": [', '"classes": ["ID_1",'),
    ('"train": [', '"train": [], "tram": ['),
    ('"format": 1', '"format": {}'),
    ('"format": 1', '"format": 2'),
]


def test_a_sealed_split_of_nonsense_is_refused(account: Account) -> None:
    for old, new in SPLITS:
        with pytest.raises(UserError, match=r"^split.json (does not hold a split|has format)") as caught:
            Split.from_bytes(sealed_split(old, new), "split.json")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 250
    account.add("hostile split", "sealed anew", cases=len(SPLITS))


def test_a_split_without_content_keys_is_a_clear_error(finished: Path, account: Account) -> None:
    path = finished / "latents_cache" / SPLIT_NAME
    split = Split.from_bytes(path.read_bytes(), "")
    overwrite(path, split.with_keys(dict.fromkeys(split.keys(), "")).to_bytes())
    with pytest.raises(UserError, match="no content key of ID_"):
        LatentDataset.open(finished / "latents_cache")
    account.add("hostile split", "no content keys", cases=1)


def test_what_is_no_file_named_like_a_manifest_or_a_split_is_an_error(tmp_path: Path, account: Account) -> None:
    readers: dict[str, Callable[[Path], object]] = {layout.MANIFEST_NAME: read_manifest, SPLIT_NAME: read_split}
    kinds = [kind for kind in ODDITIES if kind != "dangling link"]

    def open_all() -> None:
        for name, read in readers.items():
            for kind in kinds:
                (tmp_path / f"{kind}, {name}").mkdir()
                put_oddity(kind, tmp_path / f"{kind}, {name}" / name)
                with pytest.raises(UserError, match="cannot be read"):
                    read(tmp_path / f"{kind}, {name}")
            (tmp_path / name).touch()
            os.truncate(tmp_path / name, 1 << 40)
            with pytest.raises(UserError, match="cannot be read"):
                read(tmp_path)

    _, memory = in_child(open_all)
    assert memory < MEMORY
    cases = len(readers) * (len(kinds) + 1)
    account.add("no file where manifest or split should be", "folder, link, pipe, device, a terabyte", cases=cases)


HOSTILE_ROWS = [
    "[" * 100_000,
    '{"step": ' + "9" * 5000 + ', "loss": 1}',
    '{"step": -' + "9" * 400 + ', "loss": 1}',
    '{"step": true, "loss": 1}',
    '{"step": 1.5, "loss": 1}',
    '{"step": 1, "loss": "\\u001b[2J"}',
    '{"step": 1, "loss": [1, 2]}',
    '{"step": 1, "loss": null}',
    '{"step": 2, "loss": ' + "9" * 400 + "}",
    '{"step": 2, "loss": 1e999}',
    '{"step": 2, "loss": NaN}',
    '{"step": 2, "loss": -5}',
    '{"step": {"step": 1}}',
    "\0" * 1000,
    "\ud800",
]


def test_hostile_metrics_are_passed_over(finished: Path, account: Account) -> None:
    path = finished / "results" / METRICS_NAME
    with path.open("ab") as file:
        file.write("\n".join(HOSTILE_ROWS).encode("utf-8", "surrogatepass"))
    assert train(finished, train_num_steps=STEPS + 1, num_samples=0) == 0
    steps, losses = Metrics(finished / "results", step=STEPS + 1).series("loss")
    wrong = [*range(1, STEPS + 1), STEPS + 1] != [step for step, loss in zip(steps, losses, strict=True) if loss > 0]
    account.add("hostile lines of metrics", "training goes on", cases=len(HOSTILE_ROWS), wrong=wrong)


YAML_BOMBS = {
    "ten to the ninth": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghi")),
    "nested": "seed: " + "[" * 100_000,
    "nested mappings": "seed: " + "{a: " * 100_000,
    "a list in itself": "seed: &a [*a]\n",
    "code": "seed: !!python/object/apply:os.mkdir [trace]\n",
    "a class": "!!python/object/new:os.mkdir [trace]\n",
    "20,000 keys": "".join(f"k{number}: 1\n" for number in range(20_000)),
    "one key 5,000 times": "seed: 1\n" * 5_000,
    "a merge": "<<: &a {seed: 1}\n",
    "an endless number": f"seed: {'9' * 5000}\n",
    "a large number": f"train_num_steps: {'9' * 4000}\n",
    "NUL in a path": 'data_path: "a\\0b"\n',
    "half a character": 'data_path: "a\\uD800b"\n',
    "control characters": 'data_pth: "\\e[2J"\n',
    "NUL": "\0",
    "no text": "\ud800",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_hostile_yaml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Account, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    # One reader serves all scripts, so that one of them tries the slow ones.
    bombs = {what: text for what, text in YAML_BOMBS.items() if name == "train" or len(text) < 10_000}

    def run_all() -> list[str]:
        failed = []
        for what, text in bombs.items():
            Path("bomb.yaml").write_text(text, errors="surrogatepass")
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                code = SCRIPTS[name].main(["--config", "bomb.yaml"])
            lines = said.getvalue().splitlines()
            is_one_line = len(lines) == 1 and lines[0].startswith("error: ") and "\x1b" not in lines[0]
            failed += [] if code == 2 and is_one_line else [what]
        return failed

    failed, memory = in_child(run_all)
    assert failed == [] and memory < 2 * MEMORY  # PyYAML takes kilobytes for each key
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.yaml"]
    account.add("hostile --config", name, cases=len(bombs))


def test_the_settings_file_of_a_run_is_written_and_not_believed(finished: Path, account: Account) -> None:
    path = finished / "results" / SETTINGS_NAME
    bombs = [YAML_BOMBS["ten to the ninth"], YAML_BOMBS["code"], "\ud800\0junk"]
    for number, text in enumerate(bombs, 1):
        overwrite(path, text.encode("utf-8", "surrogatepass"))
        assert train(finished, train_num_steps=STEPS + number, num_samples=0) == 0
        assert f"train_num_steps: {STEPS + number}\n" in path.read_text()
    account.add("hostile settings.yaml", "training goes on", cases=len(bombs))


RECORDS = [b"", b"[]", b"{", b'"seed"', b"[" * 100_000, b"\xff", b"9" * 5000, b'{"seed": "\\u001b[2J"}', b'{"a": 1}']


def test_a_hostile_record_of_generated_images_is_refused(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(finished, images_per_class=1) == 0
    path = finished / "synthetic" / "settings.json"
    before = {name: data for name, data in contents(finished).items() if not name.endswith("settings.json")}

    def is_refused() -> bool:
        capsys.readouterr()
        code = generate(finished, images_per_class=1)
        said = capsys.readouterr().err
        return code == 2 and "\x1b" not in said and "give another --output_folder" in said

    for record in RECORDS:
        path.write_bytes(record)
        assert is_refused(), record[:40]
    for kind in ("folder", "pipe", "device"):
        path.rmdir() if path.is_dir() else path.unlink()
        put_oddity(kind, path)
        assert is_refused(), kind
    path.unlink()
    after = {name: data for name, data in contents(finished).items() if not name.endswith("settings.json")}
    account.add("hostile settings.json", "generating goes on", cases=len(RECORDS) + 3, wrong=int(after != before))


def test_pictures_in_the_output_folder_are_read_as_strictly_as_training_images(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(finished, images_per_class=1) == 0
    path = finished / "synthetic" / "ID_1" / "ID_1_000000.jpg"
    before = contents(finished / "synthetic")
    bomb = png(20_000, 20_000, 8, 2, b"\0")
    programs = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(trace) (w) file closefile\n%%EOF\n"
    wrong = 0
    for content in (bomb, programs, b"", b"GIF89a"):
        path.write_bytes(content)
        assert generate(finished, images_per_class=1) == 0
        assert "are made again: ID_1/ID_1_000000.jpg" in capsys.readouterr().err
        wrong += contents(finished / "synthetic") != before
    account.add("hostile picture in the output folder", "generating goes on", cases=4, wrong=wrong)


ODD_CLASSES = (
    "=1+1|'x'!A0",
    "\x1b[2J\x1b]0;x\x07",
    "two\nlines",
    "x..",
    "-rf",
    "n" * 200,
    "步态,\"'",
    "a\udcff",
)


def test_hostile_names_of_classes_stay_names(
    tmp_path: Path, account: Account, capfd: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path / "world")
    shutil.rmtree(world / "data")
    tiny.make_images(world / "data", dict.fromkeys(ODD_CLASSES, 2))
    flags = {"images_per_user": 1}
    assert preprocess(world, **flags) == 0
    assert train(world, train_num_steps=1, num_samples=1, **flags) == 0
    assert generate(world, images_per_class=1) == 0
    assert generate(world, images_per_class=1, classes=["\x1b[2J"]) == 2
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err and "\x07" not in said.out + said.err
    text = (world / "synthetic" / "labels.csv").read_text(encoding="utf-8", errors="surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert sorted(row[1].removeprefix("'") for row in rows) == sorted(ODD_CLASSES)
    wrong = sum(not (world / "synthetic" / row[0]).is_file() for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"world"}
    account.add("hostile names of classes", "the three scripts", cases=len(ODD_CLASSES), wrong=wrong)


# --- weights -----------------------------------------------------------------------------------------------


class Harm:
    """Makes a folder where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def write_harm(folder: Path, trace: Path) -> list[Path]:
    """Writes files that make `trace` where they are unpickled, in every form that a pickle has."""
    content = {"model_state_dict": tiny_vae().state_dict(), "extra": Harm(trace)}
    torch.save(content, folder / "zip.pt")
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    for protocol in range(6):
        (folder / f"plain{protocol}.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    np.save(folder / "object.npy", np.array([Harm(trace)], dtype=object), allow_pickle=True)
    shutil.copy(folder / "zip.pt", folder / "renamed.safetensors")
    shutil.copy(folder / "plain4.pkl", folder / "plain.safetensors")
    shutil.copy(folder / "object.npy", folder / "object.pt")
    (folder / "diffusers").mkdir()
    (folder / "diffusers" / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 4}')
    shutil.copy(folder / "zip.pt", folder / "diffusers" / "diffusion_pytorch_model.bin")
    shutil.copy(folder / "zip.pt", folder / "diffusers" / "diffusion_pytorch_model.safetensors")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("force", [None, "1"])
def test_code_in_a_pickle_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Account, force: str | None
) -> None:
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    (tmp_path / "files").mkdir()
    trace = tmp_path / "trace"
    paths = write_harm(tmp_path / "files", trace)
    for path in paths:
        for open_it in (read_identity, lambda path: load_vae(path, "cpu"), checkpoint_refusal(path)):
            with pytest.raises(UserError) as caught:
                open_it(path)
            assert str(path) in str(caught.value) and "weights_only" not in str(caught.value)
    told = error_of(tmp_path / "files" / "zip.pt")
    assert "posix.mkdir" in told and "torch.save(model.state_dict()" in told
    how = f"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD={force}" if force else "pickles in every form"
    account.add("code in a weight file", how, cases=3 * len(paths), wrong=int(trace.exists()))
    if force:  # the same file does run where nobody says weights_only
        with pytest.warns(UserWarning, match="FORCE_NO_WEIGHTS_ONLY_LOAD"):
            torch.load(tmp_path / "files" / "zip.pt")
        assert trace.exists()


def checkpoint_refusal(path: Path) -> Callable[[Path], object]:
    """Returns how a file or folder is opened as a checkpoint."""
    return newest_averages_or_error if path.is_dir() else read_state


def newest_averages_or_error(folder: Path) -> object:
    """Opens a folder as that of a run, as generate.py does."""
    return run_folder.read_averages(folder)


def error_of(path: Path) -> str:
    """Returns why a file is not taken as a VAE."""
    with pytest.raises(UserError) as caught:
        read_identity(path)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(10**12,), (32, 3, 3, 10**10)])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_small_file_that_claims_terabytes_is_refused(
    tmp_path: Path, account: Account, shape: tuple[int, ...], new_format: bool
) -> None:
    huge = torch.zeros(1).expand(shape)
    state = {"encoder.conv_in.weight": huge, "encoder.conv_out.weight": huge}
    path = tmp_path / "vae.pt"
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    assert path.stat().st_size < 2000
    told, memory = in_child(lambda: error_of(path))
    assert re.search(r"claims [0-9,]+,000,000,000 bytes, more than the file holds", told) and memory < MEMORY
    account.add("weight file larger than it is", "stride 0", cases=1)


def rezipped(source: Path, target: Path, compression: int) -> None:
    """Writes an archive anew, compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


def overlapping(source: Path, target: Path) -> None:
    """Copies an archive, with a directory that names its largest record a thousand times."""
    shutil.copy(source, target)
    with zipfile.ZipFile(target, "a") as archive:
        largest = max(archive.filelist, key=lambda record: record.file_size)
        for number in range(1000):
            again = copy.copy(largest)
            again.filename = f"{largest.filename}{number}"
            archive.filelist.append(again)
        archive.writestr("last", b"")  # so that the directory is written anew


def test_zip_bombs_are_refused(tmp_path: Path, account: Account) -> None:
    save_tiny_vae(tmp_path / "vae.pt")
    rezipped(tmp_path / "vae.pt", tmp_path / "zipped.pt", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    overlapping(tmp_path / "vae.pt", tmp_path / "overlapping.pt")
    for name, told in (
        ("zipped", "was compressed after"),
        ("bomb", "was compressed after"),
        ("overlapping", "two of its records"),
    ):
        path = tmp_path / f"{name}.pt"
        found, memory = in_child(lambda path=path: error_of(path))
        assert told in found and memory < MEMORY, (name, found)
    account.add("weight file larger than it is", "zip bombs", cases=3)


def many_levels() -> dict[str, torch.Tensor]:
    """Returns tensors that name 2,000 levels and 2,000 blocks: four million layers."""
    one = torch.zeros(32, 32, 1, 1)
    names = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(2000)]
    names += [f"encoder.down.0.block.{i}.conv1.weight" for i in range(2000)]
    conv = {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3), "encoder.conv_out.weight": torch.zeros(8, 32, 3, 3)}
    return {**dict.fromkeys(names, one), **conv}


def mappings_in_mappings() -> dict[str, object]:
    """Returns 9 billion mappings, in 40 kB."""
    found: object = 1
    for _ in range(3):
        found = {f"k{number}": found for number in range(3000)}
    return found  # type: ignore[return-value]


def test_small_files_that_would_take_for_ever_are_refused(tmp_path: Path, account: Account) -> None:
    state = dict(tiny_vae().state_dict())
    contents_of = {
        "levels": many_levels(),
        "mappings": mappings_in_mappings(),
        "scale": {"model_state_dict": state, "scale_factor": 10**5000},
        "text": {"model_state_dict": state, "scale_factor": "x" * 10**6},
        "wide": {
            name: torch.zeros(2**18, 1, 1, 1)
            for name in ("encoder.conv_in.weight", "encoder.conv_out.weight", "encoder.down.0.block.0.conv1.weight")
        },
    }

    def open_all() -> None:
        for name, content in contents_of.items():
            torch.save(content, tmp_path / f"{name}.pt")
            assert len(error_of(tmp_path / f"{name}.pt")) < 1000

    _, memory = in_child(open_all)
    assert memory < MEMORY
    account.add("hostile weight file", "sizes that would take for ever", cases=len(contents_of))


def safetensors_headers() -> dict[str, bytes]:
    """Returns headers that no VAE has."""
    tensor = "encoder.conv_in.weight"
    kinds = {"F4": (2, 1), "F6_E2M3": (4, 3), "F8_E8M0": (1, 1), "C64": (1, 8), "I64": (1, 8), "BOOL": (1, 1)}
    headers = {
        kind: with_length(
            json.dumps({tensor: {"dtype": kind, "shape": [n, 1, 1, 1], "data_offsets": [0, size]}}).encode(),
            bytes(size),
        )
        for kind, (n, size) in kinds.items()
    }
    return {**headers, **{name: data for name, data in HOSTILE_CHECKPOINTS.items() if data and data[8:9] == b"{"}}


def test_hostile_headers_of_safetensors_are_refused(tmp_path: Path, account: Account) -> None:
    path, headers = tmp_path / "vae.safetensors", safetensors_headers()

    def open_all() -> int:
        for data in headers.values():
            path.write_bytes(data)
            assert str(path) in error_of(path)
        for length in (15_000_000, 100_000_000):
            path.write_bytes(with_length(b'{"a":1', length=length))
            os.truncate(path, length + 100)
            error_of(path)
        return len(headers) + 2

    cases, memory = in_child(open_all)
    assert memory < MEMORY
    account.add("hostile weight file", "headers of safetensors", cases=cases)


def test_what_is_no_file_is_no_vae(tmp_path: Path, account: Account) -> None:
    for number, kind in enumerate(ODDITIES):
        path = tmp_path / f"{number}.pt"
        put_oddity(kind, path)
        assert str(path) in in_child(lambda path=path: error_of(path))[0]
    account.add("no file where a VAE should be", "folder, links, pipe, device", cases=len(ODDITIES))


CONFIGS: dict[str, dict[str, object] | str] = {
    "nested": "[" * 100_000,
    "a list": "[]",
    "no JSON": "{",
    "a class that is a list": {"_class_name": ["AutoencoderKL"]},
    "a class with control characters": {"_class_name": "\x1b[2J"},
    "NaN": {"x": float("nan")},
    "a number beyond floats": '{"_class_name": "AutoencoderKL", "x": 1e999}',
    "an endless number": '{"_class_name": "AutoencoderKL", "x": ' + "9" * 5000 + "}",
    "channels are text": {"latent_channels": "4"},
    "channels below 0": {"latent_channels": -4},
    "no channels": {"latent_channels": 0},
    "a billion channels": {"latent_channels": 10**9},
    "a thousand levels": {"block_out_channels": [32] * 1000},
    "levels are text": {"block_out_channels": "ab"},
    "wide levels": {"block_out_channels": [10**9, 32]},
    "a billion layers": {"layers_per_block": 10**9},
    "layers are text": {"layers_per_block": "x"},
    "scale is text": {"scaling_factor": "x"},
    "scale is infinite": {"scaling_factor": "1e999"},
    "scale is a list": {"scaling_factor": [1]},
    "shift is text": {"shift_factor": "x"},
    "shift is a list": {"shift_factor": [1]},
    "downsampling by 0": {"_class_name": "AutoencoderKLHunyuanImage", "spatial_compression_ratio": 0},
}
WHOLE_CONFIGS: dict[str, dict[str, object]] = {  # what is found only when the network is built
    "an unknown activation": {"act_fn": "evil"},
    "unknown blocks": {"down_block_types": ["X", "Y"]},
    "a norm of no groups": {"norm_num_groups": 0},
    "a norm of 7 groups": {"norm_num_groups": 7},
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "quantised by a number": {"quantization_config": 5},
}


def test_hostile_configs_of_diffusers_are_refused(tmp_path: Path, account: Account) -> None:
    save_tiny_diffusers_vae(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    whole = json.loads(path.read_text())

    def open_all() -> None:
        for what, change in {**CONFIGS, **WHOLE_CONFIGS}.items():
            path.write_text(change if isinstance(change, str) else json.dumps({**whole, **change}))
            with pytest.raises(UserError) as caught:
                if what in CONFIGS:
                    read_identity(path.parent)
                load_vae(path.parent, "cpu")
            assert str(caught.value).isprintable() and len(str(caught.value)) < 1000, what

    _, memory = in_child(open_all)
    assert memory < 2 * MEMORY  # diffusers itself is imported there
    account.add("hostile config.json", "settings of diffusers", cases=len(CONFIGS) + len(WHOLE_CONFIGS))


def test_other_weights_beside_a_diffusers_vae_are_not_taken_for_its_own(tmp_path: Path, account: Account) -> None:
    folder, file = tmp_path / "vae", "diffusion_pytorch_model.safetensors"
    save_tiny_diffusers_vae(folder)
    save_tiny_diffusers_vae(tmp_path / "other", seed=5)
    shutil.copy(tmp_path / "other" / file, folder / "other-00001-of-00001.safetensors")
    names = safetensors.torch.load_file(folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "other-00001-of-00001.safetensors")}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    network = load_vae(folder, "cpu")
    own = {f"model.{name}": tensor for name, tensor in names.items()}
    wrong = sum(not torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())
    assert len(own) == len(network.state_dict()) and network.identity == read_identity(folder)
    account.add("hostile weight file", "an index of diffusers that names others", cases=1, wrong=wrong)


# --- what the code never does ------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """Returns the text of every module by its path, those of demo and benchmarks too."""
    below = [path for name in ("gait_latents", "demo", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    paths = sorted([*ROOT.glob("*.py"), *below])
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_nothing_opens_a_pickle_or_runs_a_text_in_any_other_way() -> None:
    texts = sources()
    assert len(texts) > 75
    unsafe = (
        "pickle.load",
        "Unpickler(",
        "allow_pickle=True",
        "weights_only=False",
        "joblib",
        "import dill",
        "marshal",
    )
    unsafe += ("yaml.load", "yaml.unsafe", "yaml.full", "UnsafeLoader", "FullLoader", "np.load(", "shell=True")
    unsafe += ("os.system", "os.popen", "trust_remote_code", "torch.hub.load", "exec(", " eval(")
    unsafe += ("__import__", "shelve", "_object(", "_object_list(")  # these of torch.distributed send pickles
    assert [(name, word) for name, text in texts.items() for word in unsafe if word in text] == []
    loads = [name for name, text in texts.items() if re.search(r"(?<!safetensors\.)torch\.load\(", text)]
    assert loads == ["benchmarks/bench_train.py", f"{PACKAGE}/vae/weight_files.py"]  # the first loads its own file
    assert texts[f"{PACKAGE}/vae/weight_files.py"].count("torch.load(") == 1
    opens = [name for name, text in texts.items() if "Image.open(" in text and not name.startswith(("demo/", "bench"))]
    assert opens == [f"{PACKAGE}/images/reading.py"]


def test_the_network_is_named_in_few_places() -> None:
    words = re.compile(r"\b(socket|urllib|requests|httpx|http\.client|ftplib|huggingface_hub)\b")
    texts = {name: text for name, text in sources().items() if not name.startswith(("demo/", "benchmarks/"))}
    assert len(texts) > 60
    named = {name.removeprefix(f"{PACKAGE}/") for name, text in texts.items() if words.search(text)}
    asking = {"common/files.py", "training/trackers.py"}  # for the name of this machine
    waiting = {"common/distributed.py", "common/process.py"}  # ask whether what torchrun names answers
    naming = {"images/folders.py"}  # calls a kind of file by its name
    assert named == {"vae/load.py", "evaluation/inception.py", *waiting, *asking, *naming}
    for name in waiting:
        assert set(re.findall(r"socket\.\w+", texts[f"{PACKAGE}/{name}"])) == {"socket.create_connection"}
    assert "import socket" not in texts[f"{PACKAGE}/images/folders.py"]
    for name in asking:
        assert set(re.findall(r"socket\.\w+", texts[f"{PACKAGE}/{name}"])) == {"socket.gethostname"}
    fetches = {name: found for name, text in texts.items() if (found := re.findall(r"torch\.hub\.\w+", text))}
    assert fetches.keys() == {f"{PACKAGE}/evaluation/inception.py"}
    assert set(*fetches.values()) == {"torch.hub.get_dir", "torch.hub.download_url_to_file"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae.pt", "diffusers"])
def test_nothing_connects_to_anything_without_a_hub_id(world: Path, account: Account, kind: str) -> None:
    if kind == "diffusers":
        save_tiny_diffusers_vae(world / kind)
    settings = {"vae_path": world / kind}

    def refuse(*arguments: object, **_: object) -> None:
        os.write(2, f"a connection was tried: {arguments}\n".encode())
        os._exit(9)

    def run_all() -> list[int]:
        socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse  # type: ignore[method-assign, assignment]
        socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse  # type: ignore[assignment]
        codes = [preprocess(world, **settings), train(world, train_num_steps=1, **settings)]
        codes.append(generate(world, images_per_class=1, **settings))
        return [*codes, preprocess(world, vae_path=world / "absent.pt", output_folder=world / "another")]

    codes, _ = in_child(run_all)
    account.add("no network", "every connection ends the process", cases=len(codes), wrong=int(codes != [0, 0, 0, 2]))


def test_the_limits_that_are_promised_are_those_of_the_code() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promised = {
        f"headers above {weight_files.MAX_HEADER_BYTES // 10**6} MB": weight_files.MAX_HEADER_BYTES % 10**6,
        f"headers above {shard_file._HEADER_BYTES >> 20} MiB": shard_file._HEADER_BYTES % (1 << 20),
        f"files above {shard_file._LARGEST_SHARD_BYTES >> 30} GiB": shard_file._LARGEST_SHARD_BYTES % (1 << 30),
        f"above {manifest._LARGEST_MANIFEST_BYTES >> 20} MiB": manifest._LARGEST_MANIFEST_BYTES % (1 << 20),
        f"headers above {checkpoint._HEADER_BYTES >> 20} MiB": checkpoint._HEADER_BYTES % (1 << 20),
        f"| above {cli._LARGEST_CONFIG_BYTES >> 20} MiB;": cli._LARGEST_CONFIG_BYTES % (1 << 20),
        f"files above {reading.MAX_FILE_BYTES >> 20} MiB": reading.MAX_FILE_BYTES % (1 << 20),
        f"{reading.MAX_PIXELS:,} pixels": 0,
        f"above 1 GiB and {generated.LARGEST_RECORD_BYTES >> 20} MiB": generated.LARGEST_RECORD_BYTES % (1 << 20),
        f"above {report._LARGEST_REPORT_BYTES >> 20} MiB; links": report._LARGEST_REPORT_BYTES % (1 << 20),
        f"above {report._LARGEST_PICTURE_BYTES >> 20} MiB; links": report._LARGEST_PICTURE_BYTES % (1 << 20),
        f"{reading.MAX_SCANS} scans": 0,
    }
    assert [words for words, rest in promised.items() if rest or words not in text] == []
    assert len(reading._FORMATS) == 7 and "seven formats" in text
