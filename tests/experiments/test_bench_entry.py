"""python -m twicing.experiments.bench: what is misspelt is answered in a sentence."""

import pytest

from twicing.experiments.bench.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Unknown benchmark '': known are 'ops', 'decode', 'model', 'linear'."),
        (["op"], "Unknown benchmark 'op': did you mean 'ops'\\? Known are 'ops', 'decode', 'model', 'linear'."),
        (["ops", '{"shape": []}'], "Unknown option 'shape': did you mean 'shapes'?"),
        (["ops", "{shapes}"], "Expecting property name"),
        (["decode", '{"groups": [3]}'], "--groups must divide --heads: got 3 and 8."),
    ],
)
def test_what_is_misspelt_is_answered(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)
