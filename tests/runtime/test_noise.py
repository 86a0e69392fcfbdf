import numpy as np
import pytest

from runtime.noise import Stream, randn

# torch 2.13: torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed)), the last three values
STORED = {
    (5, 1): [0.06167726, 0.62131733, -0.45190597],
    (16, 2**32 + 7): [1.01275539, 0.23039687, 1.09016514],
    (37, 42): [0.04990539, 2.26671791, 1.17895091],
}


@pytest.mark.parametrize(("count", "seed"), STORED)
def test_stored_values_of_torch(count, seed):
    np.testing.assert_allclose(randn((count,), seed)[-3:], STORED[count, seed], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**40 + 7, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1,), (2,), (15,), (16,), (17,), (31,), (4, 5, 5), (16, 32, 32)])
def test_equals_torch(shape, seed):
    torch = pytest.importorskip("torch")
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    np.testing.assert_allclose(randn(shape, seed), expected, rtol=0, atol=1e-6)


def test_only_the_low_32_bits_of_a_seed_count():
    assert np.array_equal(randn((20,), 5), randn((20,), 5 + 2**32))
    assert not np.array_equal(randn((20,), 5), randn((20,), 6))


@pytest.mark.parametrize("counts", [(64, 64, 64), (20, 37, 16), (3, 3, 1, 5), (7, 40, 2, 17, 3)])
def test_a_stream_goes_on_as_a_generator_does(counts):
    torch = pytest.importorskip("torch")
    generator, stream = torch.Generator("cpu").manual_seed(11), Stream(11)
    for count in counts:
        expected = torch.randn(count, generator=generator).numpy()
        np.testing.assert_allclose(stream.randn((count,)), expected, rtol=0, atol=1e-6)
