"""The error rule of the kernel tests: a result is judged against what torch itself loses in the same dtype."""

import torch


def assert_no_worse(
    actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, *, atol: float, factor: float = 2.0
) -> None:
    """max|actual - exact| <= factor * max|same_dtype - exact| + atol.

    Args:
        actual: result under test, any float dtype.
        same_dtype: torch's result from the same inputs in the same dtype, same shape.
        exact: the result in float32 or float64, same shape, finite.
        atol: absolute slack in the result's unit.
        factor: how much worse than torch is allowed.
    """
    assert actual.shape == same_dtype.shape == exact.shape, (actual.shape, same_dtype.shape, exact.shape)
    truth = exact.double()
    assert torch.isfinite(truth).all(), "the exact result is not finite"
    error = (actual.double() - truth).abs()
    allowed = factor * (same_dtype.double() - truth).abs().max().item() + atol
    worst = error.max().item()
    # Written so that a NaN fails.
    if not worst <= allowed:
        at = torch.unravel_index(error.nan_to_num(float("inf")).argmax(), error.shape)
        where = tuple(int(i) for i in at)
        raise AssertionError(
            f"error {worst:.3e} > allowed {allowed:.3e} at {where}: got {actual[where].item():.8g}, "
            f"exact {truth[where].item():.8g}, torch in the same dtype {same_dtype[where].item():.8g}"
        )
