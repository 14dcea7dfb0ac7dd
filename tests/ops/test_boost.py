"""The formula itself, on matrices that need no attention."""

import pytest
import torch

from twicing.ops.boost import boost, boosted_values


def smoother_matrix(n=6, dtype=torch.float64):
    return torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=dtype).softmax(-1)


@pytest.mark.parametrize("gain", [0.0, 0.4, 1.0, -1.0], ids="gain{}".format)
@pytest.mark.parametrize("order", [1, 2, 3, 4], ids="order{}".format)
def test_any_order_is_its_closed_form(order, gain):
    S, identity = smoother_matrix(), torch.eye(6, dtype=torch.float64)
    values = torch.randn(6, 3, dtype=torch.float64)
    closed = identity - (identity - S) @ torch.linalg.matrix_power(identity - gain * S, order - 1)
    torch.testing.assert_close(boost(lambda v: S @ v, values, order, gain), closed @ values, rtol=0, atol=1e-14)


def test_the_default_is_twicing():
    S, values = smoother_matrix(), torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(boost(lambda v: S @ v, values), (2 * S - S @ S) @ values, rtol=0, atol=1e-14)


def test_smoothing_the_boosted_values_is_the_boosted_result():
    S, values = smoother_matrix(), torch.randn(6, 3, dtype=torch.float64)
    boosted = boosted_values(lambda v: S @ v, values, 3, 0.5)
    assert torch.equal(S @ boosted, boost(lambda v: S @ v, values, 3, 0.5))


def test_order_one_smooths_once_and_leaves_the_values_alone():
    values = torch.randn(6, 3)
    assert boosted_values(lambda v: v + 1, values, order=1) is values


def test_any_smoother_in_any_layout():
    """A moving average along the first axis of a three-axis tensor, which knows nothing of attention."""
    values = torch.randn(8, 2, 3, dtype=torch.float64)

    def average(v):
        return (v + v.roll(1, 0) + v.roll(-1, 0)) / 3

    once = average(values)
    torch.testing.assert_close(boost(average, values), once + average(values - once), rtol=0, atol=1e-14)


def test_half_precision_rounds_the_boosted_values_once():
    """Forming v + g (v - S v) in bf16 would round three times: seen as a value that is not the rounded exact sum."""
    S = smoother_matrix(64, torch.float32)
    values = torch.randn(64, 16).bfloat16()
    smoothed = (S @ values.float()).bfloat16()
    exact = values.double() + 0.3 * (values.double() - smoothed.double())
    boosted = boosted_values(lambda v: smoothed, values, 2, 0.3)
    assert boosted.dtype == torch.bfloat16
    assert torch.equal(boosted, exact.to(torch.bfloat16))
    rounded_each_time = values + 0.3 * (values - smoothed)
    assert not torch.equal(rounded_each_time, exact.to(torch.bfloat16))
    # Nor is what one round adds rounded before the next.
    further = exact + 0.3 * (values.double() - smoothed.double())
    assert torch.equal(boosted_values(lambda v: smoothed, values, 3, 0.3), further.to(torch.bfloat16))


def test_a_gain_tensor_of_another_dtype_does_not_change_the_dtype_of_the_values():
    values = torch.randn(4, 3)
    for dtype in (torch.float64, torch.bfloat16):
        assert boosted_values(lambda v: 0.5 * v, values, 2, torch.full((3,), 0.5, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize(
    ("order", "error", "text"),
    [
        (0, ValueError, "order must be at least 1 (1 is plain smoothing, 2 is twicing): got 0."),
        (-2, ValueError, "order must be at least 1 (1 is plain smoothing, 2 is twicing): got -2."),
        (2.0, TypeError, "order must be an integer, how many times to smooth: got 2.0, a float."),
        (True, TypeError, "order must be an integer, how many times to smooth: got True, a bool."),
        ("2", TypeError, "order must be an integer, how many times to smooth: got '2', a str."),
    ],
    ids=repr,
)
def test_wrong_orders_are_refused(order, error, text):
    with pytest.raises(error) as caught:
        boost(lambda v: v, torch.zeros(2, 2), order)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("gain", "error", "text"),
    [
        (float("nan"), ValueError, "gain must be finite (1 is twicing, 0 is plain smoothing): got nan."),
        (float("inf"), ValueError, "gain must be finite (1 is twicing, 0 is plain smoothing): got inf."),
        (-float("inf"), ValueError, "gain must be finite (1 is twicing, 0 is plain smoothing): got -inf."),
        ("1", TypeError, "gain must be a number or a tensor: got '1', a str."),
        (None, TypeError, "gain must be a number or a tensor: got None, a NoneType."),
        (True, TypeError, "gain must be a number or a tensor: got True, a bool."),
    ],
    ids=repr,
)
def test_wrong_gains_are_refused(gain, error, text):
    with pytest.raises(error) as caught:
        boost(lambda v: v, torch.zeros(2, 2), gain=gain)
    assert str(caught.value) == text
