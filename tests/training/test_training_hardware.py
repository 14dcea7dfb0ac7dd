"""Hardware: what Lightning takes is handed on, and what it would quietly replace or start by itself is refused."""

import pytest

from twicing.training.classification import build_model, train_classifier
from twicing.training.hardware import Hardware, default_hardware, process_rank
from twicing.training.recipe import digits, imagefolder, imagenet_deit_tiny
from twicing.training.settings import apply_settings
from twicing.training.split import load_split

TORCHRUN = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _started_plainly(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "8-mixed"}, r"^--precision must be one of 32-true, .*: got '8-mixed'\.$"),
        ({"accelerator": "tpu"}, r"^--accelerator must be one of cpu, auto, .*: got 'tpu'\.$"),
        ({"strategy": "deepspeed"}, r"^--strategy must be one of auto, ddp, fsdp: got 'deepspeed'\.$"),
        ({"devices": "0"}, r'^--devices must be "auto" or a number from 1 on: got \'0\'\.$'),
        ({"devices": "-1"}, r'^--devices must be "auto" or a number from 1 on: got \'-1\'\.$'),
        ({"num_nodes": 0}, r"^--num-nodes must be 1 or larger: got 0\.$"),
        ({"workers": -1}, r"^--workers must be 0 or larger: got -1\.$"),
        ({"precision": "16-mixed"}, r"^--precision 16-mixed needs a GPU: on the CPU take bf16-mixed or 32-true\.$"),
        ({"strategy": "fsdp"}, r"^--strategy fsdp needs GPUs: on the CPU take ddp\.$"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Hardware(**options)


def test_options_are_lightnings():
    assert Hardware().trainer_options() == {
        "precision": "32-true",
        "devices": 1,
        "accelerator": "cpu",
        "num_nodes": 1,
        "strategy": "auto",
    }
    several = Hardware(precision="bf16-mixed", devices="4", accelerator="gpu", num_nodes=2)
    assert several.trainer_options() == {
        "precision": "bf16-mixed",
        "devices": 4,
        "accelerator": "gpu",
        "num_nodes": 2,
        "strategy": "ddp",
    }


def test_fsdp_writes_one_file_with_all_weights():
    from lightning.pytorch.strategies import FSDPStrategy

    strategy = Hardware(strategy="fsdp", accelerator="gpu", devices="2").trainer_options()["strategy"]
    assert isinstance(strategy, FSDPStrategy)
    assert strategy._state_dict_type == "full"


def test_processes_are_those_that_torchrun_started(monkeypatch):
    Hardware().check_processes()
    assert process_rank() == 0
    message = (
        r"^2 processes were asked for and 1 started: start the command by torchrun --nproc-per-node 2 "
        r"-m twicing \.\.\., with --devices and --num-nodes to match\.$"
    )
    with pytest.raises(ValueError, match=message):
        Hardware(devices="2").check_processes()
    for name, value in zip(TORCHRUN, ("4", "2", "3", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert process_rank() == 3
    assert Hardware(num_nodes=2).processes_here == 2
    Hardware(num_nodes=2).check_processes()
    Hardware(devices="2", num_nodes=2).check_processes()
    for wrong in (Hardware(), Hardware(devices="4"), Hardware(devices="1", num_nodes=4)):
        with pytest.raises(ValueError, match=r"processes were asked for and 4 started: start the command by torchrun"):
            wrong.check_processes()


def test_a_training_is_not_begun_with_the_wrong_processes(tmp_path):
    recipe = apply_settings(digits(), ["depth=1"])
    split = load_split(recipe, 0)
    with pytest.raises(ValueError, match="2 processes were asked for and 1 started"):
        train_classifier(build_model(recipe, 0), recipe, split, 0, tmp_path, print, Hardware(devices="2"))
    kept = apply_settings(digits(), ["ema_decay=0.9"])
    with pytest.raises(ValueError, match="no running mean is kept then: set ema_decay=0"):
        train_classifier(
            build_model(kept, 0), kept, split, 0, tmp_path, print, Hardware(strategy="fsdp", accelerator="gpu")
        )


def test_small_images_are_trained_on_the_cpu():
    assert default_hardware(digits()) == Hardware()
    for recipe in (imagefolder(), imagenet_deit_tiny()):
        assert default_hardware(recipe).accelerator == "auto"


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_mixed_precision_reaches_the_products(tiny, tmp_path):
    import torch

    recipe = tiny(digits(), "epochs=1", "train_images=64", "batch_size=32")
    model, seen = build_model(recipe, 0), set()
    model.network.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    hardware = Hardware(precision="bf16-mixed")
    train_classifier(model, recipe, load_split(recipe, 0), 0, tmp_path, lambda share: None, hardware)
    assert seen == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_workers_read_for_both_parts(tiny, tmp_path, monkeypatch):
    recipe = tiny(digits(), "train_images=64")
    places = []

    class EnoughError(Exception):
        pass

    def watched(images, *rest, **place):
        places.append(place)
        if len(places) == 2:
            raise EnoughError

    for loader in ("train_loader", "held_out_loader"):
        monkeypatch.setattr(f"twicing.training.classification.{loader}", watched)
    with pytest.raises(EnoughError):
        train_classifier(build_model(recipe, 0), recipe, load_split(recipe, 0), 0, tmp_path, print, Hardware(workers=3))
    assert places == [{"rank": 0, "world": 1, "workers": 3}] * 2
