"""`--set key=value` and recipes: what is taken, and what each wrong one is told."""

import dataclasses

import pytest

from twicing.training.recipe import digits, find_recipe
from twicing.training.settings import apply_settings, parse_options, settable_keys


def test_settings_take_the_type_of_their_field():
    changed = apply_settings(digits(), ["epochs=3", "learning_rate=2e-3", "evaluation.eps=1/16, 1/4", "mean=0.5"])
    assert (changed.epochs, changed.learning_rate) == (3, 2e-3)
    assert changed.evaluation.eps == ("1/16", "1/4")
    assert changed.mean == (0.5,)
    assert (
        dataclasses.replace(changed, epochs=12, learning_rate=1e-3, mean=(0.3,), evaluation=digits().evaluation)
        == digits()
    ), "only what was named may change"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epoch=3", r"unknown key 'epoch': known are 'mean', .*\. Did you mean 'epochs'\?"),
        ("evaluation.esp=1/8", r"unknown key 'evaluation\.esp': .* Did you mean 'evaluation\.eps'\?"),
        ("evaluation=3", "unknown key 'evaluation'"),
        ("epochs.more=3", r"unknown key 'epochs\.more'"),
        ("primary=3", "unknown key 'primary'"),
        ("epochs=many", r"epochs takes a value like 12: got 'many'\."),
        ("epochs=1.5", r"epochs takes a value like 12: got '1\.5'\."),
        ("epochs", r"a setting is key=value: got 'epochs'\."),
        ("epochs=0", r"epochs must be 1 or larger: got 0\."),
        ("heads=3", "width of heads"),
        ("patch_size=3", "image_size must be a multiple of patch_size"),
        ("warmup_share=1", r"warmup_share must lie between 0 and 1: got 1\.0\."),
        ("learning_rate=0", r"learning_rate must be a finite number above 0: got 0\.0\."),
        ("learning_rate=nan", r"learning_rate must be a finite number above 0: got nan\."),
        ("weight_decay=-1", r"weight_decay must be a finite number 0 or larger: got -1\.0\."),
        ("mean=0.3,0.4", "mean and std must have one number for each of the 1 channels"),
        ("std=0", "mean and std must have one number for each of the 1 channels, std above 0"),
        ("image_size=16", "unknown key 'image_size'"),
        ("classes=5", "unknown key 'classes'"),
        ("title={foo}", "unknown key 'title'"),
        ("evaluation.eps=1/8,1/16", "evaluation.eps must be sizes above 0 in ascending order: got 1/8, 1/16"),
        (
            "evaluation.eps=1/8",
            r"evaluation.eps must contain 1/16, spelt so, as 'PGD accuracy at eps 1/16'",
        ),
        ("evaluation.eps=2/1", "eps must not exceed the whole pixel range"),
        ("evaluation.noise=lots", "evaluation.noise must read like"),
        ("evaluation.noise=0", r"evaluation.noise must be above 0: got 0\."),
        ("evaluation.pgd_steps=0", "steps and restarts must be 1 or more: got 0 and 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(setting, message):
    with pytest.raises(ValueError, match=message):
        apply_settings(digits(), [setting])


def test_every_listed_key_can_be_set_to_what_it_is():
    for key, value in settable_keys(digits()).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert apply_settings(digits(), [f"{key}={text}"]) == digits(), key


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'digit': known are 'digits'\. Did you mean 'digits'\?"):
        find_recipe("digit")


def test_options_are_read_as_numbers_flags_and_text():
    assert parse_options(["gain=-1", "order=3", "learn_gain=true", "backend=sdpa", "x=1e-3"]) == {
        "gain": -1,
        "order": 3,
        "learn_gain": True,
        "backend": "sdpa",
        "x": 1e-3,
    }
    with pytest.raises(ValueError, match=r"an option is name=value: got 'gain'\."):
        parse_options(["gain"])
