"""`--set key=value` and recipes: what is taken, and what each wrong one is told."""

import dataclasses

import pytest

from twicing.training.recipe import RECIPES, Primary, digits, find_recipe, imagefolder, mnist
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


def test_flags_are_true_or_false():
    assert apply_settings(digits(), ["augmentation.flip=True"]).augmentation.flip is True
    assert apply_settings(imagefolder(), ["augmentation.flip=false"]).augmentation.flip is False
    with pytest.raises(ValueError, match=r"augmentation\.flip takes a value like false: got 'yes'\."):
        apply_settings(digits(), ["augmentation.flip=yes"])


@pytest.mark.parametrize("settings", [["image_size=28", "patch_size=7"], ["patch_size=7", "image_size=28"]])
def test_settings_that_fit_each_other_need_not_fit_what_was_before(settings):
    changed = apply_settings(imagefolder(), settings)
    assert (changed.image_size, changed.patch_size) == (28, 7)
    changed = apply_settings(
        mnist(), ["evaluation.probes=50", "evaluation.spsa_images=5", "evaluation.verdict_images=9"]
    )
    assert (changed.evaluation.probes, changed.evaluation.verdict_images, changed.evaluation.spsa_images) == (50, 9, 5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epoch=3", r"unknown key 'epoch': did you mean 'epochs'\? Known are 'mean', "),
        ("evaluation.esp=1/8", r"unknown key 'evaluation\.esp': did you mean 'evaluation\.eps'\? "),
        ("eps=1/8", r"unknown key 'eps': did you mean 'evaluation\.eps'\? "),
        ("evaluation=3", "unknown key 'evaluation'"),
        ("epochs.more=3", r"unknown key 'epochs\.more'"),
        ("primary=3", "unknown key 'primary'"),
        ("cosine.warmup_epochs=3", r"unknown key 'cosine\.warmup_epochs'"),
        ("epochs=many", r"epochs takes a value like 12: got 'many'\."),
        ("epochs=1.5", r"epochs takes a value like 12: got '1\.5'\."),
        ("epochs", r"a setting is key=value: got 'epochs'\."),
        ("epochs=0", r"epochs must be 1 or larger: got 0\."),
        ("heads=3", "width of heads"),
        ("patch_size=3", "image_size must be a multiple of patch_size"),
        ("warmup_share=1", r"warmup_share must lie between 0 and 1: got 1\.0\."),
        ("learning_rate=0", r"learning_rate must be a finite number above 0: got 0\.0\."),
        ("learning_rate=nan", r"learning_rate must be a finite number above 0: got nan\."),
        ("training_length=0", r"training_length must be a finite number above 0: got 0\.0\."),
        ("weight_decay=-1", r"weight_decay must be a finite number 0 or larger: got -1\.0\."),
        ("train_images=-1", r"train_images must be 0 or larger: got -1\."),
        ("mean=0.3,0.4", "mean and std must have one number for each of the 1 channels"),
        ("std=0", "mean and std must have one number for each of the 1 channels, std above 0"),
        ("std=nan", "mean and std must have one number for each of the 1 channels, std above 0"),
        ("image_size=16", "unknown key 'image_size'"),
        ("classes=5", "unknown key 'classes'"),
        ("dataset=hfds/name", "unknown key 'dataset'"),
        ("attention_passes=2", "unknown key 'attention_passes'"),
        ("title={foo}", "unknown key 'title'"),
        ("evaluation.eps=1/8,1/16", "evaluation.eps must be sizes above 0 in ascending order: got 1/8, 1/16"),
        (
            "evaluation.eps50=false",
            "evaluation.eps50 must be true, as 'eps50 under PGD' is a primary metric: got false",
        ),
        ("evaluation.eps=2/1", "eps must not exceed the whole pixel range"),
        ("evaluation.noise=lots", "evaluation.noise must read like"),
        ("evaluation.noise=0", r"evaluation.noise must be above 0: got 0\."),
        ("evaluation.pgd_steps=0", "steps and restarts must be 1 or more: got 0 and 1"),
        ("evaluation.verdict_eps=0", r"evaluation.verdict_eps must be above 0: got 0\."),
        ("evaluation.verdict_eps=2", "eps must not exceed the whole pixel range"),
        ("evaluation.verdict_images=0", r"evaluation.verdict_images must be 1 or larger: got 0\."),
        ("evaluation.verdict_seeds=-1", r"evaluation.verdict_seeds must be 0 or larger: got -1\."),
        ("evaluation.spsa_iterations=0", r"evaluation.spsa_iterations must be 1 or larger: got 0\."),
        ("evaluation.probes=-1", r"evaluation.probes must be 0 or larger: got -1\."),
        (
            "evaluation.probes=59",
            "evaluation.verdict_images are among the probes, of which there are 59: got 60. Lower",
        ),
        ("evaluation.spsa_images=61", "spsa_images are among the verdict_images, of which there are 60: got 61"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(setting, message):
    with pytest.raises(ValueError, match=message):
        apply_settings(digits(), [setting])


def test_a_primary_metric_must_be_measured():
    at_eps = Primary("PGD", "accuracy [share of images]", {"threat": "pgd", "eps": "1/16"}, "higher")
    recipe = dataclasses.replace(digits(), primary=(at_eps,))
    with pytest.raises(ValueError, match=r"evaluation.eps must contain 1/16, spelt so, as 'PGD' is a primary metric"):
        apply_settings(recipe, ["evaluation.eps=1/8"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "svhn"}, "data must be one of digits, mnist, cifar10, imagefolder, timm: got 'svhn'"),
        ({"folds": 1}, "folds must be 0 or from 2 to 99: got 1"),
        ({"classes": 0}, "classes must be 1 or larger: got 0"),
        ({"dataset": "hfds/x"}, "dataset is a name of timm's and the recipe digits reads no such: leave it empty"),
        ({"attention_passes": 3}, "attention_passes must be 1 or 2: got 3"),
        ({"data": "imagefolder"}, "image files are read as RGB, so channels must be 3: got 1"),
    ],
)
def test_recipes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(digits(), **change)


@pytest.mark.parametrize("name", RECIPES)
def test_every_listed_key_can_be_set_to_what_it_is(name):
    recipe = find_recipe(name)
    for key, value in settable_keys(recipe).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert apply_settings(recipe, [f"{key}={text}"]) == recipe, key


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert "12 layers" in recipe.headline
    assert "undefended" in recipe.limits
    assert [primary.name for primary in recipe.primary] == [
        "eps50 under PGD",
        "clean accuracy",
        "token similarity after the last block",
    ]
    assert recipe.evaluation.verdict_eps in recipe.evaluation.eps
    assert recipe.needs_folder == (name != "digits")
    assert recipe.all_epochs == recipe.epochs + (10 if name == "imagenet_deit_tiny" else 0)


def test_undertrained_is_said_to_be_undertrained():
    assert "undertrained (one epoch)" in mnist().limits
    assert mnist().epochs == 1
    cifar10 = find_recipe("cifar10")
    assert "undertrained (two epochs)" in cifar10.limits
    assert cifar10.epochs == 2
    assert "CIFAR-10 (JPEG), whose accuracies cannot be compared" in cifar10.limits


def test_a_name_of_timms_needs_no_folder():
    assert not apply_settings(find_recipe("imagenet_deit_tiny"), ["dataset=hfds/timm/imagenet-1k"]).needs_folder


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'digit': did you mean 'digits'\? Known are 'digits', "):
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
