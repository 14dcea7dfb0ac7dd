import pytest

from twicing.adapters.layers import chosen_layers


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", list(range(1, 13))),
        ("10-12", [10, 11, 12]),
        ("3-3", [3]),
        ("last-3", [10, 11, 12]),
        ("first-2", [1, 2]),
        ("5", [5]),
        ("1, 4,7-9", [1, 4, 7, 8, 9]),
        (5, [5]),
        ([11, 10], [10, 11]),
        ((1,), [1]),
        (range(1, 4), [1, 2, 3]),
    ],
    ids=str,
)
def test_layers_are_counted_from_one(layers, numbers):
    assert chosen_layers(layers, 12) == numbers


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("last", ValueError, r"layers='last' was not understood: expected 'all', a range such as '10-12'"),
        ("", ValueError, "layers='' was not understood"),
        ("1,,2", ValueError, "layers='1,,2' was not understood"),
        ("-3", ValueError, "layers='-3' was not understood"),
        ("12-10", ValueError, "layers='12-10' runs backwards: write '10-12'"),
        ("0", ValueError, r"has 12 attention layers, counted from 1 to 12; got 0\."),
        (13, ValueError, r"layers=13 is out of range: .* got 13\."),
        ([-1], ValueError, r"out of range: .* got -1\."),
        ("10-40", ValueError, r"out of range: .* got 13, 14, 15, 16, 17, \.\.\.\."),
        ("last-13", ValueError, r"out of range: .* got 0\."),
        ([1, 2, 1], ValueError, r"layers=\[1, 2, 1\] names 1 more than once"),
        ("1-3,3", ValueError, "names 3 more than once"),
        ([], ValueError, r"No layers are given: layers is \[\]"),
        ("last-0", ValueError, "No layers are given"),
        (True, TypeError, "layers must be 'all', a range .*: got True"),
        ([1.0], TypeError, r"layers must be .*: got \[1.0\]"),
        (None, TypeError, "layers must be .*: got None"),
    ],
    ids=str,
)
def test_what_is_no_layer_is_refused(layers, error, message):
    with pytest.raises(error, match=message):
        chosen_layers(layers, 12)
