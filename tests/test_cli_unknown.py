"""A misspelt command or option is answered with the one that was meant."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["compare", "digits", "--sedes", "2"], "compare has no option --sedes: did you mean --seeds?"),
        (["compare", "--sedes=2"], "compare has no option --sedes: did you mean --seeds?"),
        (["compare", "--no-control"], "compare has no option --no-control: did you mean --no-controls?"),
        (["compare", "--mech", "twicing"], "compare has no option --mech: did you mean --mechanisms?"),
        # An option of `train`, and a positional one.
        (["compare", "--num-nodes", "2"], "compare has no option --num-nodes: see twicing compare --help."),
        (["compare", "--recipe", "digits"], "compare has no option --recipe: see twicing compare --help."),
        # Said before the model that is missing as well.
        (["evaluate", "--imags", "3"], "evaluate has no option --imags: did you mean --images?"),
        (["bench", "linear", "--lenghts", "3"], "bench linear has no option --lenghts: did you mean --lengths?"),
        (["bench", "op"], "bench has no 'op': did you mean 'ops'? Known are 'ops', 'decode', 'model', 'linear'."),
        (["compar", "digits"], "unknown command 'compar': did you mean 'compare'? Known are 'diagnose', 'compare', "),
        (["train", "digits", "more"], "train does not take 'more': see twicing train --help."),
        (["bench", "ops", "more"], "bench ops does not take 'more': see twicing bench ops --help."),
        # tyro would take 5 for the recipe.
        (["compare", "--controls=5"], "--controls takes no value: leave out '=5'. See twicing compare --help."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelt_word_is_answered_in_one_sentence(type_in, arguments, answer):
    done = type_in(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"twicing: {answer}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
