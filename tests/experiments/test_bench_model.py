"""`twicing bench model`: the multiply-adds that DESIGN holds, a gate for whole models, and the table of a small one."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from twicing.adapters.surgery import convert
from twicing.experiments.bench.model import BATCHED, SINGLE, STEP, bench_model, complaint
from twicing.experiments.bench.multiply_adds import multiply_adds
from twicing.experiments.bench.options import ModelOptions
from twicing.experiments.bench.rows import MEASURED, read_rows
from twicing.experiments.bench.screen import PlainScreen
from twicing.mechanisms.base import Mechanism
from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()
import timm  # noqa: E402 (only after the mending)

SMALL = "test_vit"


def small():
    return timm.create_model(SMALL, pretrained=False).eval()


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, "1.254"), ("10-12", "1.276"), ("7-12", "1.298"), ("1-12", "1.343")]
)
def test_multiply_adds_of_deit_tiny(layers, expected):
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
    if layers is not None:
        convert(model, "twicing", layers=layers)
    images = torch.zeros(1, 3, 224, 224)
    assert f"{multiply_adds(model, images) / 1e9:.3f}" == expected
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_multiply_adds_are_half_the_flops_that_torch_counts():
    """An independent count: torch's, on the dense form of attention, of which it sees every product."""
    model = small()
    convert(model, "twicing", options={"order": 3, "backend": "reference"})
    images = torch.zeros(2, *model.default_cfg["input_size"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert multiply_adds(model, images) == counter.get_total_flops() / 2


class Strange(Mechanism):
    def forward(self, query, key, value, **options):
        return value


def test_a_mechanism_that_cannot_be_counted_is_refused():
    model = small()
    convert(model, Strange)
    with pytest.raises(ValueError, match="has no order, by which its products could be counted"):
        multiply_adds(model, torch.zeros(1, *model.default_cfg["input_size"]))


@pytest.mark.parametrize("layers", [None, "1-2", "all"])
def test_right_models_pass(layers):
    model = small()
    if layers:
        convert(model, "twicing", layers=layers)
    assert complaint(model, torch.randn(2, *model.default_cfg["input_size"])) is None


def test_a_model_with_wrong_attention_gets_no_time():
    """The gate reads the formula from the spec, so that a mechanism that does something else is found."""
    model = small()
    convert(model, "twicing")
    wrong = copy.deepcopy(model)
    for block in wrong.blocks:
        block.attn.twicing_mechanism.order = 1
    images = torch.randn(2, *model.default_cfg["input_size"])
    assert complaint(model, images) is None
    assert complaint(wrong, images).startswith("wrong: logits off by ")


def test_a_row_for_every_model_and_job(tmp_path, capsys):
    options = ModelOptions(SMALL, layers=("5-6", "1-6"), batch=2, threads=1, repeats=3, seconds=0.01, out=tmp_path)
    assert bench_model(options, PlainScreen())
    rows, _ = read_rows(tmp_path / f"model-cpu-1-threads-{SMALL}.csv")
    models = [("none (standard)", "sdpa"), ("5-6", "auto"), ("1-6", "auto"), ("1-6", "sdpa")]
    assert [(row.job, row.layers, row.backend) for row in rows] == [
        (job, *model) for job in (SINGLE, BATCHED, STEP) for model in models
    ]
    assert all(row.status == MEASURED for row in rows)
    assert {row.parameters for row in rows} == {sum(p.numel() for p in small().parameters())}
    adds = {row.layers: row.multiply_adds for row in rows}
    assert adds["none (standard)"] < adds["5-6"] < adds["1-6"]
    assert adds["1-6"] - adds["none (standard)"] == 3 * (adds["5-6"] - adds["none (standard)"])
    printed = capsys.readouterr().out
    assert "ms per image" in printed
    assert "ms per step" in printed
    assert "the mean of 1,000 runs after as many to warm up" in printed


def test_bfloat16_by_autocast_and_other_backends(tmp_path):
    options = ModelOptions(
        SMALL,
        ("all",),
        ("reference", "blocked", "sdpa"),
        "bfloat16",
        2,
        threads=1,
        repeats=3,
        seconds=0.01,
        out=tmp_path,
    )
    assert bench_model(options, PlainScreen())
    rows, _ = read_rows(tmp_path / f"model-cpu-1-threads-{SMALL}-bfloat16.csv")
    assert [row.backend for row in rows[:4]] == ["sdpa", "reference", "blocked", "sdpa"]
    assert {(row.status, row.dtype) for row in rows} == {(MEASURED, "bfloat16")}


def test_the_gate_computes_the_truth_outside_of_autocast():
    torch.manual_seed(0)
    model = small()
    with torch.no_grad():
        for block in model.blocks:
            # Of new weights attention changes so little that bfloat16 hides most of a wrong formula.
            block.attn.qkv.weight.mul_(5.0)
    convert(model, "twicing")
    wrong = copy.deepcopy(model)
    for block in wrong.blocks:
        block.attn.twicing_mechanism.order = 1
    images = torch.randn(2, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert complaint(model, images) is None
        found = complaint(wrong, images)
    # Twice the error of the dense form in bfloat16, against fp64: in bfloat16 itself that would be no error at all.
    assert found is not None
    assert 1e-3 < float(found.split()[-1]) < 1e-1


def test_a_training_step_leaves_the_timed_model_as_it_was():
    from twicing.experiments.bench.model import _training

    model = small()
    before = copy.deepcopy(model.state_dict())
    step = _training(model, torch.randn(2, *model.default_cfg["input_size"]))
    first, second = float(step().detach()), float(step().detach())
    assert second < first, "it learns"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "test_vt"}, r"timm knows no model 'test_vt': did you mean 'test_vit'\?"),
        ({"model": "12345"}, r"timm knows no model '12345': see timm.list_models"),
        ({"batch": 0}, "--batch must be 1 or larger: got 0"),
        ({"layers": ()}, "--layers must name one choice at least"),
        ({"model": SMALL, "layers": ("99",)}, r"test_vit cannot be twiced in --layers 99: .*out of range"),
        ({"repeats": 0}, "--repeats must be 1 or larger"),
        ({"dtype": "float64"}, "bfloat16 or float16 by autocast: got float64"),
        ({"backends": ()}, "--backends must name one at least"),
        ({"model": SMALL, "layers": ("all",), "backends": ("tritn",)}, "Unknown backend 'tritn'"),
    ],
    ids=["model", "no model", "batch", "no layers", "layers", "repeats", "dtype", "no backend", "backend"],
)
def test_options_that_mean_nothing(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        bench_model(ModelOptions(**changed, out=tmp_path), PlainScreen())
