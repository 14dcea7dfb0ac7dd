"""What an attack promises whatever it finds: its set, its model, its batches, and what it refuses to attack."""

import copy

import pytest
import torch
from torch import nn

from twicing.robustness.attacks import fgsm, pgd
from twicing.robustness.threat import Threat


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("eps", ["0", "4/255", "1/4", "1"])
def test_ball_bounds_and_success_hold_on_real_digits(attack, eps, network, digits):
    images, labels = digits[0].float(), digits[1]
    model = nn.Sequential(_ToDouble(), network).eval()
    result = attack(model, images, labels, Threat(eps))
    change = (result.adversarial - images).abs()
    assert change.max() <= float(Threat(eps).eps) + 1e-7
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert result.adversarial.dtype == torch.float32
    # What is reported is what the model says to the images that are returned.
    assert torch.equal(model(result.adversarial).argmax(1) == labels, result.correct)
    assert torch.equal(model(images).argmax(1) == labels, result.correct_before)
    assert not (result.correct & ~result.correct_before).any()
    assert change.flatten(1).amax(1)[~result.correct_before].sum() == 0


class _ToDouble(nn.Module):
    def forward(self, images):
        return images.double()


def test_no_eps_changes_nothing(attack, network, digits):
    images, labels = digits
    result = attack(network, images, labels, Threat(0))
    assert torch.equal(result.adversarial, images)
    assert torch.equal(result.correct, result.correct_before)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_does_not_matter(batch_size, network, digits):
    images, labels = digits
    expected = pgd(network, images, labels, Threat("1/16"), restarts=2, generator=seeded())
    result = pgd(network, images, labels, Threat("1/16"), restarts=2, generator=seeded(), batch_size=batch_size)
    assert torch.equal(result.correct, expected.correct)
    torch.testing.assert_close(result.adversarial, expected.adversarial, rtol=0, atol=1e-12)


def test_the_other_images_do_not_matter(network, digits):
    images, labels = digits
    expected = pgd(network, images, labels, Threat("1/16"), restarts=2, generator=seeded())
    result = pgd(network, images[:31], labels[:31], Threat("1/16"), restarts=2, generator=seeded())
    assert torch.equal(result.correct, expected.correct[:31])
    torch.testing.assert_close(result.adversarial, expected.adversarial[:31], rtol=0, atol=1e-12)


def test_random_starts_come_from_the_generator(network, digits):
    images, labels = digits
    runs = [pgd(network, images, labels, Threat("1/16"), steps=1, generator=seeded(k)).adversarial for k in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_broken_images_cost_no_further_forward():
    seen = []

    class Fragile(nn.Module):
        """Calls an image 1 as soon as its mean rises above 0.55."""

        def forward(self, images):
            seen.append(len(images))
            return torch.stack([0.55 - images.mean(1), images.mean(1) - 0.55], dim=1) * 100

    images = torch.cat([torch.full((2, 4), 0.54), torch.full((1, 4), 0.1), torch.full((1, 4), 0.9)])
    result = pgd(
        Fragile().eval(), images, torch.zeros(4, dtype=torch.int64), Threat("1/16"), random_start=False, steps=4
    )
    # All clean; first loss: the 3 right ones, the same after one step, which shows that 1 still stands; judge the 3;
    # second loss: 4 steps and a judgement for that one.
    assert seen == [4, 3, 3, 1, 1, 3, 1, 1, 1, 1, 1]
    assert result.correct.tolist() == [False, False, True, False]
    assert result.correct_before.tolist() == [True, True, True, False]
    assert (result.accuracy, result.accuracy_before) == (0.25, 0.75)


def test_the_model_is_left_as_it_was(attack, network, digits):
    images, labels = digits
    model = nn.Sequential(copy.deepcopy(network), nn.Linear(10, 10).double()).eval()
    model.zero_grad()
    model[1].weight.requires_grad_(False)
    model[1].bias.grad = torch.full((10,), 7.0, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack(model, images, labels, Threat("1/16"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert [p.grad is None for p in model.parameters()] == [True] * 5 + [False]
    assert model[1].bias.grad.eq(7).all()
    assert not images.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_it_works_inside_an_evaluation_loop(mode, network, digits):
    expected = pgd(network, *digits, Threat("1/16"), generator=seeded())
    with mode():
        # Made inside, as a data loader would.
        images, labels = digits[0].clone(), digits[1].clone()
        result = pgd(network, images, labels, Threat("1/16"), generator=seeded())
        assert torch.equal(fgsm(network, images, labels, Threat("1/16")).correct_before, expected.correct_before)
    assert torch.equal(result.correct, expected.correct)


def test_a_model_that_computes_in_half_precision_inside(network, digits):
    images, labels = digits[0].float(), digits[1]
    half = copy.deepcopy(network).bfloat16()
    result = pgd(lambda x: half(x.bfloat16()), images, labels, Threat("1/16"), generator=seeded())
    exact = pgd(network, *digits, Threat("1/16"), generator=seeded())
    assert result.adversarial.dtype == torch.float32
    assert abs(result.accuracy - exact.accuracy) < 0.05


def test_nothing_to_attack_where_all_is_wrong(attack, network, digits):
    images, _ = digits
    wrong = (network(images).argmax(1) + 1) % 10
    result = attack(network, images, wrong, Threat("1/16"))
    assert (result.accuracy, result.accuracy_before, result.zero_gradient_share) == (0, 0, 0)
    assert torch.equal(result.adversarial, images)


def plain(images):
    return images.flatten(1) @ torch.eye(4)[:, :3]


def with_dropout():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout()).train()


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        pytest.param(
            with_dropout(), [0, 1], r"eval mode.*training mode in the model itself \(3 mod.*eval\(\)", id="train"
        ),
        pytest.param(
            plain, [0.0, 1.0], r"labels must be int64 class numbers of shape \[2\].*got torch.float32", id="float"
        ),
        pytest.param(plain, [0, 1, 2], r"one per image: got torch.int64 of shape \[3\]", id="three labels"),
        pytest.param(
            plain, [0, 3], "labels must lie in 0 to 2, the model's 3 classes: got values from 0 to 3", id="large"
        ),
        pytest.param(plain, [-1, 0], "got values from -1 to 0", id="negative label"),
        pytest.param(
            lambda x: plain(x)[:, 0], [0, 1], r"logits \[2, classes\].*for 2 images: got \[2\]", id="one axis"
        ),
        pytest.param(lambda x: plain(x)[:, :1], [0, 0], r"two classes or more.*got \[2, 1\]", id="one class"),
        pytest.param(lambda x: (plain(x),), [0, 1], r"logits \[2, classes\].*got tuple", id="a tuple"),
        pytest.param(
            lambda x: plain(x).detach(), [0, 0], "carry no gradient to the images.*remove no_grad", id="detached"
        ),
        pytest.param(
            lambda x: plain(x.detach()) * torch.ones(1, requires_grad=True),
            [0, 0],
            "carry no gradient to the images.*remove no_grad",
            id="detached, but with weights",
        ),
        pytest.param(
            lambda x: plain(x) / 0, [0, 0], "logits have values that are not finite.*diverge", id="nan logits"
        ),
        pytest.param(
            lambda x: plain(x) + (plain(x) * 0).sqrt(),
            [0, 0],
            "gradient at the images has values that are not",
            id="nan grad",
        ),
    ],
)
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_what_cannot_be_attacked_is_refused(attack, model, labels, message):
    images = torch.tensor([[0.5, 0.1, 0.2, 0.3], [0.6, 0.1, 0.2, 0.3]])
    with pytest.raises(ValueError, match=message):
        attack(model, images, torch.tensor(labels), Threat("1/16"))


def test_a_training_submodule_is_named():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"got training mode in 1 \(1 modules in all\)"):
        fgsm(model, torch.zeros(1, 4), torch.tensor([0]), Threat("1/16"))


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_normalised_images_are_refused(attack):
    with pytest.raises(
        ValueError, match=r"must lie in \[0, 1\] \(pixels\): got values from -2 to 0; put the normalisation"
    ):
        attack(plain, torch.tensor([[-2.0, 0, 0, 0]]), torch.tensor([0]), Threat("1/16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps and restarts must be 1 or more: got 0 and 1"),
        ({"restarts": 0}, "steps and restarts must be 1 or more: got 20 and 0"),
        ({"losses": ()}, r"losses must be one or more of cross-entropy, margin: got \[\]"),
        ({"losses": ("cw",)}, r"losses must be one or more of cross-entropy, margin: got \['cw'\]"),
        ({"relative_step_size": 0.0}, r"must lie in \(0, 2\], in units of eps .*: got 0.0"),
        ({"relative_step_size": 20.0}, "got 20.0"),
        ({"restarts": 3, "random_start": False}, "3 restarts without random_start would all be the same"),
        ({"batch_size": 0}, "batch_size must be 1 or larger: got 0"),
    ],
    ids=str,
)
def test_settings_that_make_no_attack_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pgd(plain, torch.rand(2, 4), torch.tensor([0, 1]), Threat("1/16"), **options)
