import pytest
import torch
from close import assert_no_worse


def test_judges_against_the_same_dtype():
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    same = exact.bfloat16()
    assert_no_worse(same, same, exact, atol=0.0)
    off = exact.clone()
    off[40] += 3 * (same.double() - exact).abs().max()
    with pytest.raises(AssertionError, match=r"at \(40,\)"):
        assert_no_worse(off, same, exact, atol=0.0)
    assert_no_worse(off, same, exact, atol=0.01)


def test_nan_and_shapes_fail():
    exact = torch.ones(2, 3)
    bad = exact.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(AssertionError, match=r"\(1, 2\)"):
        assert_no_worse(bad, exact, exact, atol=1.0)
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse(exact, exact, bad, atol=1.0)
    with pytest.raises(AssertionError):
        assert_no_worse(exact[0], exact, exact, atol=1.0)
