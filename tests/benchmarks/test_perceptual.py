"""Networks that judge pictures: loaded from files of random weights, which tell right wiring, not right judgement."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import perceptual
from runtime.errors import RequestError

from .vision import torchvision

LPIPS = pytest.importorskip("torchmetrics.functional.image.lpips", reason="needs the extra `quality`")._LPIPS


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """As torchvision's file has them, but for the classifier, which LPIPS does not look at."""
    torch.manual_seed(0)
    state = {f"features.{k}": v for k, v in torchvision.models.alexnet(weights=None).features.state_dict().items()}
    file = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(state | {"classifier.1.weight": torch.zeros(1)}, file)
    return file, state


def pictures(seed, count=3):
    return np.random.default_rng(seed).random((count, 64, 64, 3)).astype(np.float32)


def test_lpips_is_the_librarys_with_the_files_weights(alexnet):
    """By hand: the library's module, its backbone's parameters set in the order of its layers."""
    file, state = alexnet
    model = LPIPS(net="alex", pnet_rand=True)
    with torch.no_grad():
        for own, given in zip(model.net.parameters(), state.values(), strict=True):
            own.copy_(given)
        one, other = (torch.from_numpy(pictures(seed)).permute(0, 3, 1, 2) for seed in (1, 2))
        expected = model(one, other, normalize=True).flatten().numpy()
    judge = perceptual.lpips(file)
    np.testing.assert_allclose(judge(pictures(1), pictures(2)), expected, rtol=1e-5)
    assert (expected > 0).all()
    np.testing.assert_allclose(judge(pictures(1), pictures(1)), 0, atol=1e-7)


def test_lpips_reads_safetensors_and_batches_alike(alexnet, tmp_path, monkeypatch):
    file, state = alexnet
    save_file(state, tmp_path / "alexnet.safetensors")
    one, other = pictures(3), pictures(4)
    expected = perceptual.lpips(file)(one, other)
    monkeypatch.setattr(perceptual, "_BATCH", 2)
    np.testing.assert_allclose(perceptual.lpips(tmp_path / "alexnet.safetensors")(one, other), expected, rtol=1e-5)


def test_files_that_are_no_weights_are_told(alexnet, tmp_path):
    _, state = alexnet
    (tmp_path / "text.pth").write_bytes(b"no weights")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({name: value for name, value in state.items() if name != "features.3.bias"}, tmp_path / "part.pth")
    cases = {"text.pth": "no weights", "other.pth": "not torchvision's", "part.pth": "slice2.3.bias is missing"}
    for name, message in cases.items():
        with pytest.raises(RequestError, match=rf"{name}: .*{message}"):
            perceptual.lpips(tmp_path / name)
    for load in (perceptual.inception, perceptual.lpips):
        with pytest.raises((RequestError, OSError)):
            load(tmp_path / "nowhere.pth")


@pytest.mark.slow
def test_inception_features_of_random_weights(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="the extra `quality`")
    torch.manual_seed(1)

    class Random(fidelity.FeatureExtractorInceptionV3):
        """The architecture without its weights."""

        def load_state_dict(self, state):
            return None

    torch.save({}, tmp_path / "empty.pth")
    made = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(made.state_dict(), tmp_path / "inception.pth")
    found = perceptual.inception(tmp_path / "inception.pth")(pictures(5, 2))
    assert found.shape == (2, 2048)
    shown = torch.from_numpy(np.rint(pictures(5, 2) * 255).astype(np.uint8)).permute(0, 3, 1, 2)
    np.testing.assert_allclose(found, made.eval()(shown)[0].detach().numpy(), rtol=1e-4, atol=1e-5)
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(RequestError, match=r"other.pth: not torch-fidelity's Inception weights"):
        perceptual.inception(tmp_path / "other.pth")
