"""The manifest of a cache: it comes back as it was written, and one of another format is refused."""

import os

import pytest
from tiny_cache import SPACE

from gait_latents.common.errors import UserError
from gait_latents.latents.manifest import read_manifest, write_manifest

SETTINGS = {"data_path": "/数据/gait", "odd": os.fsdecode(b"/x\xff"), "images_per_user": 50, "lr": 1e-4, "none": None}


def test_the_manifest_comes_back_and_is_readable(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "absent") is None
    write_manifest(tmp_path, SETTINGS, SPACE, {"num_images": 3})
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert (manifest.settings, manifest.space, manifest.record) == (SETTINGS, SPACE, {"num_images": 3})
    assert manifest.space.id == SPACE.id
    assert '\n  "format": 1,\n' in (tmp_path / "manifest.json").read_text(errors="surrogateescape")
    assert "/数据/gait" in (tmp_path / "manifest.json").read_text(errors="surrogateescape")


def test_a_manifest_of_another_format_number_is_a_user_error(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 2, "spec": {}}')
    with pytest.raises(UserError, match="has format 2, and this version reads 1"):
        read_manifest(tmp_path)
