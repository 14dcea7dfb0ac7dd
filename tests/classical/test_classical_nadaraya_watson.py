"""The estimator against sums written out, against scikit-learn's own checks, and against its known bias."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from twicing.classical import nadaraya_watson
from twicing.classical.kernels import KERNELS
from twicing.classical.nadaraya_watson import NadarayaWatson, nadaraya_watson_weights

# Written out, not as logarithms.
KERNEL_VALUES = {
    "gaussian": lambda t: np.exp(-(t**2) / 2),
    "laplace": lambda t: np.exp(-t),
    "box": lambda t: (t <= 1) * 1.0,
    "triangular": lambda t: np.maximum(0, 1 - t),
    "epanechnikov": lambda t: np.maximum(0, 1 - t**2),
    "biweight": lambda t: np.maximum(0, 1 - t**2) ** 2,
    "tricube": lambda t: np.maximum(0, 1 - t**3) ** 3,
}


def data(n=30, d=2, outputs=None):
    draw = np.random.default_rng(0)
    return draw.normal(size=(n, d)), draw.normal(size=n if outputs is None else (n, outputs))


def weights_by_hand(points, train, h, kernel, period=None):
    """One pair at a time; a period looks at the copies on either side."""
    rows = []
    for x in points:
        row = []
        for z in train:
            apart = np.abs(x - z)
            if period is not None:
                apart = np.min([np.abs(x - z + k * np.asarray(period)) for k in range(-3, 4)], axis=0)
            row.append(KERNEL_VALUES[kernel](np.sqrt((apart**2).sum()) / h))
        rows.append(np.array(row) / sum(row))
    return np.array(rows)


def test_every_kernel_is_covered():
    assert set(KERNEL_VALUES) == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_are_the_kernel_over_its_sum(kernel):
    X, y = data()
    new = X[:9] + 0.2
    model = NadarayaWatson(1.3, kernel, order=1).fit(X, y)
    by_hand = weights_by_hand(new, X, 1.3, kernel)
    np.testing.assert_allclose(model.weights(new), by_hand, atol=1e-13)
    np.testing.assert_allclose(model.predict(new), by_hand @ y, atol=1e-13)


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_are_repeated_smoothing_of_what_is_left(order, outputs):
    X, y = data(outputs=outputs)
    new, S = X[:5] - 0.3, weights_by_hand(X, X, 0.7, "gaussian")
    r = y.copy()
    for _ in range(order - 1):
        r = r + 0.8 * (y - S @ r)
    model = NadarayaWatson(0.7, order=order, gain=0.8).fit(X, y)
    np.testing.assert_allclose(model.boosted_values_, r, atol=1e-12)
    np.testing.assert_allclose(model.predict(new), weights_by_hand(new, X, 0.7, "gaussian") @ r, atol=1e-12)


@pytest.mark.parametrize("period", [1.5, (1.5, 4.0)], ids=["one", "each"])
def test_a_period_closes_the_space(period):
    X, y = data()
    model = NadarayaWatson(0.5, order=1, period=period).fit(X, y)
    by_hand = weights_by_hand(X + 0.1, X, 0.5, "gaussian", np.broadcast_to(period, 2))
    np.testing.assert_allclose(model.weights(X + 0.1), by_hand, atol=1e-12)
    turned = np.asarray(period) * np.array([3, -2])
    np.testing.assert_allclose(model.predict(X + turned), model.predict(X), atol=1e-11)


def test_twicing_is_the_default():
    X, y = data()
    S = weights_by_hand(X, X, 1.0, "gaussian")
    np.testing.assert_allclose(NadarayaWatson().fit(X, y).predict(X), (2 * S - S @ S) @ y, atol=1e-12)


def test_rows_in_blocks_are_the_same(monkeypatch):
    X, y = data()
    whole = NadarayaWatson(0.6).fit(X, y).predict(X)
    monkeypatch.setattr(nadaraya_watson, "ROWS", 7)
    np.testing.assert_allclose(NadarayaWatson(0.6).fit(X, y).predict(X), whole, rtol=0, atol=1e-14)


def test_points_far_from_all_do_not_underflow():
    X, y = data()
    far = np.array([[1e3, 1e3]])
    nearest = y[np.linalg.norm(far - X, axis=1).argmin()]
    assert NadarayaWatson(0.1, order=1).fit(X, y).predict(far) == pytest.approx(nearest)


def test_near_points_keep_their_distance_far_from_the_origin():
    points = torch.tensor([[1e6], [1e6 + 1e-3]], dtype=torch.float64).repeat(40, 1)
    weights = nadaraya_watson_weights(points, points, bandwidth=1e-3)
    assert weights[0, 1] / weights[0, 0] == pytest.approx(np.exp(-0.5), rel=1e-4)


@pytest.mark.parametrize(
    "parameters", [{}, {"order": 1}, {"kernel": "laplace", "order": 3}], ids=["twicing", "plain", "laplace"]
)
def test_it_is_an_estimator_of_scikit_learn(parameters):
    checks = check_estimator(NadarayaWatson(**parameters), on_fail="raise", on_skip=None)
    skipped = {check["check_name"] for check in checks if check["status"] == "skipped"}
    # They need pandas and SCIPY_ARRAY_API, which are not part of this.
    assert skipped <= {"check_array_api_input", "check_regressor_data_not_an_array"}
    assert len(checks) > 40


def test_it_can_be_cloned_and_searched():
    model = clone(NadarayaWatson(0.3, "box", order=3, gain=0.5, period=2.0))
    assert model.get_params() == {"bandwidth": 0.3, "kernel": "box", "order": 3, "gain": 0.5, "period": 2.0}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bandwidth": 0}, "bandwidth must be a positive number"),
        ({"bandwidth": float("nan")}, "bandwidth must be a positive number"),
        ({"kernel": "gauss"}, "no kernel 'gauss': choose one of gaussian"),
        ({"order": 0}, "order must be at least 1"),
        ({"gain": float("inf")}, "gain must be finite"),
        ({"period": -1.0}, "period must be positive"),
        ({"period": float("inf")}, "period must be positive"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        NadarayaWatson(**parameters).fit(*data())


def test_a_point_without_neighbours_is_refused():
    X, y = data()
    with pytest.raises(ValueError, match=r"within the epanechnikov kernel's bandwidth 0.5 of 1 of the 2 points"):
        NadarayaWatson(0.5, "epanechnikov").fit(X, y).predict(np.array([X[0], [99.0, 99.0]]))


@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "biweight"])
def test_the_bias_has_slope_two_and_four(kernel):
    x = np.arange(900)[:, None] / 900
    y = np.cos(2 * np.pi * x[:, 0])
    wide = 1.0 if kernel == "gaussian" else 2.5
    for order, expected in ((1, 2), (2, 4)):
        worst = [
            np.abs(NadarayaWatson(h * wide, kernel, order=order, period=1.0).fit(x, y).predict(x) - y).max()
            for h in (0.008, 0.016)
        ]
        assert np.log2(worst[1] / worst[0]) == pytest.approx(expected, abs=0.05)


def test_without_scikit_learn_it_says_what_to_install():
    blocked = "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.base'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + "import twicing.classical.nadaraya_watson"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'twicing[lab]'" in done.stderr
