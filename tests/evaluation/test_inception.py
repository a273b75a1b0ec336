"""The Inception features with random weights in a local file, against the package's own way to them."""

import urllib.error
from pathlib import Path

import pytest
import torch

from gait_latents import settings
from gait_latents.common.errors import UserError
from gait_latents.evaluation import inception

package = pytest.importorskip("pytorch_fid.inception")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with random weights of the right names and shapes, at which the features are neither 0 nor infinite."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_state(), path)
    return path


def random_state() -> dict[str, torch.Tensor]:
    shapes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda module, _: shapes.update(module.state_dict()))
        package.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    return {name: random_like(name, tensor, generator) for name, tensor in shapes.items()}


def random_like(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    if name.endswith(("running_var", "bn.weight")):
        return torch.ones_like(tensor)
    scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.0
    return scale * torch.randn(tensor.shape, generator=generator)


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 20, 20, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.slow
def test_the_features_are_those_of_the_package(weights, monkeypatch):
    network = inception.load_network(inception.find_weights(str(weights)), CPU)
    counts: list[int] = []
    monkeypatch.setattr(inception, "_BATCH_SIZE", 2)
    found = inception.features(network, images(3), advance=counts.append)
    assert found.shape == (3, inception.NUM_FEATURES) and counts == [2, 1]
    assert found.std(0).mean() > 1e-3
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True))
    theirs = package.InceptionV3().eval()
    with torch.no_grad():
        expected = theirs((images(3) / 255).permute(0, 3, 1, 2))[0][:, :, 0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_way_to_download_is_there_again_afterwards(weights, tmp_path):
    before = package.load_state_dict_from_url
    inception.load_network(weights, CPU)
    assert package.load_state_dict_from_url is before
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights of pytorch-fid's InceptionV3"):
        inception.load_network(tmp_path / "other.pth", CPU)
    assert package.load_state_dict_from_url is before


def test_files_that_are_no_weights_are_refused(weights, tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        inception.load_network(tmp_path / "list.pth", CPU)
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="is a web page"):
        inception.load_network(tmp_path / "page.pth", CPU)
    state = torch.load(weights, weights_only=True)
    state["Mixed_7c.branch1x1.conv.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"Mixed_7c.*not finite"):
        inception.load_network(tmp_path / "nan.pth", CPU)
    with pytest.raises(UserError, match=r"absent.pth does not exist; give a file, or download to fetch https"):
        inception.find_weights(str(tmp_path / "absent.pth"))


def test_a_download_that_fails_says_what_to_do_and_one_that_is_there_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"no route to host.*download it elsewhere"):
        inception.find_weights(settings.DOWNLOAD)
    place = tmp_path / "checkpoints" / package.FID_WEIGHTS_URL.rpartition("/")[2]
    place.write_bytes(b"here")
    assert inception.find_weights(settings.DOWNLOAD) == place


def test_a_download_is_checked_against_the_digest_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    source.write_bytes(b"something else")
    monkeypatch.setattr(package, "FID_WEIGHTS_URL", source.as_uri())
    with pytest.raises(UserError, match="invalid hash value"):
        inception.find_weights(settings.DOWNLOAD)
    assert not list((tmp_path / "checkpoints").iterdir())
