"""tests/gpu.py on the CPU: the arithmetic of its checks, at small sizes."""
import gpu
import pytest

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.mark.parametrize("check", gpu.CHECKS)
def test_on_the_cpu(check):
    check("cpu")


def test_differences_are_seen():
    """A velocity that is a thousandth off is not the same in float32."""
    here = gpu.results("cpu", gpu.torch.float32)["velocity"]
    assert gpu.far(here * 1.001, here) > 5e-4 and gpu.far(here, here) == 0
