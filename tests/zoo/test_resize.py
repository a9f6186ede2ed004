import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_attn.resize import spread, stretch


@pytest.mark.parametrize("old, new", [(7, 19), (19, 7), (5, 6), (1, 11), (11, 1), (2, 3)])
def test_it_is_the_linear_interpolation_of_torch(old, new):
    table = torch.randn(3, 2, old, dtype=torch.float64)
    matrix = stretch(old, new, dtype=torch.float64)
    expected = F.interpolate(table, size=new, mode="linear", align_corners=False)
    torch.testing.assert_close(table @ matrix.mT, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(new, dtype=torch.float64))  # constants stay


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_its_own_size_it_is_the_identity(dtype):
    for size in (1, 2, 7, 263):  # exactly, also where the type has not a number for each pixel
        assert torch.equal(stretch(size, size, dtype=dtype), torch.eye(size, dtype=dtype))
        assert torch.equal(spread(size, size, dtype=dtype), torch.eye(size, dtype=dtype))


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 23), st.integers(1, 23))
def test_what_is_spread_keeps_its_sum_and_its_place(parts, length):
    matrix = spread(parts, length, dtype=torch.float64)
    assert matrix.shape == (parts, length) and (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(parts, dtype=torch.float64))
    centres = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    mean = matrix @ centres  # where the pixels are that share a part: around its own centre
    assert ((mean - (torch.arange(parts) + 0.5) / parts).abs() <= 0.5 / length + 1e-12).all()
