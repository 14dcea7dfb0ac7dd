"""twicing evaluate on a model of timm: weights from every form of file, conversions, corruptions, ImageNet's sets."""

import dataclasses
import functools
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from twicing.adapters.surgery import convert, spec
from twicing.data.decode import to_tensor
from twicing.data.shifted import IMAGENET_C, IMAGENET_C_EXTRA
from twicing.experiments.evaluate import bench, pretrained, tasks
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.pretrained import image_size, imagenet_synsets, synsets_of, timm_subject
from twicing.experiments.evaluate.run import evaluate
from twicing.experiments.evaluate.section import evaluation_section
from twicing.experiments.results import read_json, read_predictions, read_records, select
from twicing.robustness.auto_attack import auto_attack
from twicing.robustness.corruption_error import ALEXNET_ERRORS
from twicing.robustness.corruptions import CORRUPTIONS, corrupt
from twicing.torchvision_import import mend_torchvision_import
from twicing.training.choice import balanced_order
from twicing.training.streams import stream_seed

sys.path.append(str(Path(__file__).parents[1] / "data"))
from made_folders import make_class_folders, picture

NAME = "vit_tiny_patch16_224"
# Its attention is not known to the library.
SWIN = "swin_tiny_patch4_window7_224"
SWIN_TINY = ("img_size=32", "patch_size=2", "window_size=4", "embed_dim=12", "num_classes=3")
SMALL = ("embed_dim=16", "num_heads=2", "depth=2")
TINY = (*SMALL, "img_size=32", "patch_size=8", "num_classes=3")
CLASSES = ("cat", "cow", "dog")
ACCURACY = "accuracy [share of images]"
MEAN = STD = 0.5  # of this model, as timm has it


def network(seed=1, **changes):
    mend_torchvision_import()
    import timm

    torch.manual_seed(seed)
    arguments = {"embed_dim": 16, "num_heads": 2, "depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
    model = timm.create_model(NAME, **(arguments | changes)).eval()
    # Random weights answer the same to everything; without what they always say, the pictures decide.
    side = image_size(model)
    with torch.no_grad():
        seen = torch.stack([to_tensor(picture((side, side), seed=place)) for place in range(24)])
        model.head.bias -= model((seen - MEAN) / STD).mean(0)
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven pictures of each of three classes, 40 x 40 pixels."""
    return make_class_folders(tmp_path_factory.mktemp("pictures"), CLASSES, per_class=7, size=(40, 40), seed=5)


@pytest.fixture
def options(tmp_path, pictures):
    return Evaluate(
        NAME, model_args=TINY, data_dir=pictures, out=tmp_path / "out", batch_size=4, device="cpu", images=9
    )


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(network().state_dict(), tmp_path / "plain.pth")
    return tmp_path / "plain.pth"


def run_evaluation(options):
    evaluate(options, Console(quiet=True), "twicing evaluate")
    return read_records(options.out / "results.jsonl")


def by_hand(root, model, resize=(36, 36), crop=32, classes=CLASSES):
    """The model's answers to the pictures of each class, prepared by torchvision: [n, classes] and labels."""
    from torchvision.transforms.functional import center_crop, to_tensor

    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((root / name).iterdir()):
            image = Image.open(path).convert("RGB")
            image = image.resize(resize, Image.Resampling.BICUBIC) if resize else image
            pixels.append(to_tensor(center_crop(image, [crop, crop])))
            labels.append(label)
    images = torch.stack(pixels)
    with torch.no_grad():
        return images, model((images - MEAN) / STD), torch.tensor(labels)


def share(right):
    return right.double().mean().item()


def test_clean_accuracy_is_that_of_the_weights_on_the_prepared_pictures(options, checkpoint, pictures):
    records = run_evaluation(dataclasses.replace(options, checkpoint=checkpoint))
    _, logits, labels = by_hand(pictures, network())
    right = logits.argmax(1) == labels
    (record,) = records
    assert record.value == pytest.approx(share(right))
    assert (record.metric, record.conditions, record.n) == (ACCURACY, {"threat": "clean"}, 21)
    assert (record.arm, record.mechanism, record.layers, record.spec) == (NAME, "standard", "all", [])
    found = read_predictions(options.out / "predictions.npz")[NAME, 0]
    assert found.correct["clean"].tolist() == right.tolist()
    assert found.index.tolist() == list(range(21))
    weights = read_json(options.out / "evaluation.json")["subjects"][f"{NAME}, seed 0"]["weights"]
    assert weights.startswith("plain.pth ")


def test_the_other_transform_resizes_to_another_size(options, checkpoint, pictures):
    subject = timm_subject(dataclasses.replace(options, checkpoint=checkpoint, transform="0.9"))
    images, *_ = by_hand(pictures, network(), resize=(35, 35))
    assert torch.equal(subject.held_out().images.load(range(21)), images)
    subject = timm_subject(dataclasses.replace(options, checkpoint=checkpoint))
    images, *_ = by_hand(pictures, network(), resize=(36, 36))
    assert torch.equal(subject.held_out().images.load(range(21)), images)


def test_the_generated_corruptions_are_those_of_the_chosen_images(options, checkpoint, pictures):
    records = run_evaluation(dataclasses.replace(options, checkpoint=checkpoint, corruptions=("generated",)))
    images, logits, labels = by_hand(pictures, network())
    assert len(logits.argmax(1).unique()) == 3
    chosen = balanced_order(labels)[:9].sort().values
    answers = read_predictions(options.out / "predictions.npz")[NAME, 0].correct
    model, values = network(), []
    for kind in CORRUPTIONS:
        for severity in (1, 2, 3, 4, 5):
            generator = torch.Generator().manual_seed(stream_seed(0, 35, 0))
            corrupted = corrupt(images[chosen], kind, severity, indices=chosen.tolist(), generator=generator)
            with torch.no_grad():
                right = model((corrupted - MEAN) / STD).argmax(1) == labels[chosen]
            values.append(share(right))
            assert answers[f"corruption kind={kind} severity={severity}"].tolist() == right.tolist()
            conditions = {"threat": "corruption", "kind": kind, "severity": severity}
            (record,) = select(records, metric=ACCURACY, conditions=conditions)
            assert record.value == pytest.approx(values[-1])
    (mean,) = select(records, metric="mean corruption accuracy [share of images]")
    assert mean.value == pytest.approx(sum(values) / 40)
    assert not [record for record in records if "mCE" in record.metric]
    page = (options.out / "evaluation.html").read_text()
    assert "Generated corruptions (not ImageNet-C)" in page
    section = evaluation_section(options.out)
    assert [picture.name for picture in section.pictures] == ["generated"]
    assert not section.attacked


def test_one_corruption_alone_has_no_mean_over_all(options, checkpoint):
    changes = {"checkpoint": checkpoint, "corruptions": ("contrast", "contrast"), "attacks": ("none",)}
    records = run_evaluation(dataclasses.replace(options, **changes))
    assert len(records) == 5
    assert not select(records, metric="mean corruption accuracy [share of images]")


@pytest.mark.filterwarnings("ignore")
def test_autoattack_is_run_at_every_size(options, checkpoint, monkeypatch):
    # The whole ensemble is tested where it lives.
    monkeypatch.setattr(bench, "auto_attack", functools.partial(auto_attack, attacks=("apgd-ce",)))
    changes = {"checkpoint": checkpoint, "attacks": ("autoattack",), "eps": ("1/255", "8/255")}
    records = run_evaluation(dataclasses.replace(options, **changes))
    values = {record.conditions["eps"]: record.value for record in records}
    assert list(values) == ["1/255", "8/255"]
    assert values["1/255"] >= values["8/255"]
    assert {record.conditions["threat"] for record in records} == {"autoattack"}


FORMS = {
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model": lambda weights: {"model": weights},
    "wrapped": lambda weights: {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
    "compiled and wrapped": lambda weights: {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()},
    "ours": lambda weights: {
        "state_dict": {f"model.network.{name}": tensor for name, tensor in weights.items()}
        | {f"ema.module.network.{name}": tensor + 1 for name, tensor in weights.items()},
        "twicing": {"spec": [], "recipe": "imagefolder", "seed": 0},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_every_usual_form(options, tmp_path, form):
    torch.save(FORMS[form](network().state_dict()), tmp_path / "weights.pth")
    built = timm_subject(dataclasses.replace(options, checkpoint=tmp_path / "weights.pth")).build()
    for name, tensor in network().state_dict().items():
        assert torch.equal(built.state_dict()[f"network.{name}"], tensor)


def test_safetensors_are_read(options, tmp_path):
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "w.safetensors")
    built = timm_subject(dataclasses.replace(options, checkpoint=tmp_path / "w.safetensors")).build()
    assert torch.equal(built.network.head.weight, network().head.weight)
    (tmp_path / "w.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        timm_subject(dataclasses.replace(options, checkpoint=tmp_path / "w.safetensors"))


def converted(layers="2", gain=0.5):
    model = network()
    convert(model, "twicing", layers=layers, options={"gain": gain})
    return model


def test_a_conversion_changes_the_answers_and_is_named(options, checkpoint, pictures):
    asked = {"mechanism": "twicing", "layers": "2", "options": ("gain=0.5",), "checkpoint": checkpoint}
    subject = timm_subject(dataclasses.replace(options, **asked))
    assert (subject.label, subject.mechanism, subject.layers) == (f"{NAME}, twicing [2]", "twicing", "2")
    images, logits, _ = by_hand(pictures, converted())
    with torch.no_grad():
        torch.testing.assert_close(subject.build()(images), logits)
        assert not torch.allclose(logits, network()((images - MEAN) / STD), atol=1e-6)


def test_a_model_that_cannot_be_converted_is_evaluated_as_it_is(options, tmp_path, pictures):
    mend_torchvision_import()
    import timm
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "num_classes": 3}
    model = timm.create_model(SWIN, **arguments).eval()
    images, _, labels = by_hand(pictures, model)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    with torch.no_grad():
        logits = model((images - mean) / std)
    for name, saved in {
        "plain.pth": model.state_dict(),
        "ours.ckpt": {"state_dict": model.state_dict(), "twicing": {"spec": [], "recipe": "r", "seed": 0}},
    }.items():
        torch.save(saved, tmp_path / name)
        changes = {"model": SWIN, "model_args": SWIN_TINY, "checkpoint": tmp_path / name, "out": tmp_path / name[:4]}
        (record,) = run_evaluation(dataclasses.replace(options, **changes))
        assert (record.arm, record.mechanism, record.layers, record.spec) == (SWIN, "standard", "all", [])
        assert record.value == pytest.approx(share(logits.argmax(1) == labels))


def test_a_checkpoint_of_ours_brings_its_conversion(options, tmp_path, pictures):
    model = converted()
    saved = {"state_dict": model.state_dict(), "twicing": {"spec": spec(model), "recipe": "r", "seed": 0}}
    torch.save(saved, tmp_path / "ours.ckpt")
    given = dataclasses.replace(options, checkpoint=tmp_path / "ours.ckpt")
    subject = timm_subject(given)
    assert (subject.label, subject.layers) == (f"{NAME}, twicing [2]", "2")
    images, logits, _ = by_hand(pictures, model)
    with torch.no_grad():
        torch.testing.assert_close(subject.build()(images), logits)
    same = dataclasses.replace(given, mechanism="twicing", layers="2", options=("gain=0.5",))
    assert timm_subject(same).label == subject.label
    for other in ({"layers": "1"}, {"layers": "2", "options": ("gain=0.25",)}):
        with pytest.raises(ValueError, match=r"ours\.ckpt was trained with .*, and the command asks for"):
            timm_subject(dataclasses.replace(given, mechanism="twicing", **other))
    torch.save(saved | {"twicing": {"spec": [], "recipe": "r", "seed": 0}}, tmp_path / "ours.ckpt")
    with pytest.raises(ValueError, match="was trained with standard attention, and the command asks for"):
        timm_subject(dataclasses.replace(given, mechanism="twicing"))


def test_weights_that_a_mechanism_learned_are_loaded_too(options, tmp_path):
    model = network()
    convert(model, "twicing", options={"learn_gain": True})
    for name, parameter in model.named_parameters():
        if "twicing" in name:
            parameter.data.fill_(0.125)
    torch.save(model.state_dict(), tmp_path / "gain.pth")
    given = dataclasses.replace(options, checkpoint=tmp_path / "gain.pth")
    with pytest.raises(ValueError, match=r"gain\.pth does not fit the model: .*twicing_mechanism.* unknown"):
        timm_subject(given)
    built = timm_subject(dataclasses.replace(given, mechanism="twicing", options=("learn_gain=true",))).build()
    gains = [p for name, p in built.named_parameters() if "twicing" in name]
    assert gains
    assert all((gain == 0.125).all() for gain in gains)


def test_without_weights_the_model_is_random_but_always_the_same_one(options, capsys):
    one, other = (timm_subject(options) for _ in range(2))
    assert torch.equal(one.build().network.head.weight, other.build().network.head.weight)
    assert one.weights == "random, of seed 0: not trained"
    seeded = timm_subject(dataclasses.replace(options, seed=1))
    assert not torch.equal(one.build().network.head.weight, seeded.build().network.head.weight)
    console = Console(width=300)
    with console.capture() as told:
        evaluate(options, console, "twicing evaluate")
    assert f"{NAME} has random weights; give --checkpoint FILE or --pretrained" in told.get()


def test_pretrained_weights_are_taken_only_when_asked_for_and_it_is_said(options, monkeypatch):
    mend_torchvision_import()
    import timm

    made, asked = timm.create_model, []

    def create_model(name, pretrained=False, **arguments):
        asked.append(pretrained)
        return made(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    assert timm_subject(options).weights.startswith("random")
    console = Console(width=300)
    with console.capture() as told:
        evaluate(dataclasses.replace(options, pretrained=True), console, "twicing evaluate")
    assert asked == [False, True]
    assert "it downloads them" in told.get()
    assert "random" not in told.get()


SYNSETS = ("n01", "n02", "n03", "n04", "n05")
OF_A = ("n02", "n03", "n05")
THOUSAND = (*SMALL, "patch_size=56", "num_classes=5")


@pytest.fixture
def imagenet(monkeypatch, pictures, tmp_path):
    """An ImageNet of five classes, and a model for it at 224 pixels."""
    for module in (pretrained, tasks):
        monkeypatch.setattr(module, "imagenet_synsets", lambda: SYNSETS)
        monkeypatch.setattr(module, "IMAGENET_CLASSES", 5)
    monkeypatch.setattr(tasks, "synsets_of", lambda _name: OF_A)
    clean = make_class_folders(tmp_path / "val", SYNSETS, per_class=2, size=(256, 256), seed=1)
    model = network(img_size=224, patch_size=56, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "imagenet.pth")
    return model, Evaluate(
        NAME,
        model_args=THOUSAND,
        data_dir=clean,
        checkpoint=tmp_path / "imagenet.pth",
        attacks=(),
        out=tmp_path / "out",
        device="cpu",
    )


def test_the_fifteen_corruptions_make_an_mce_and_the_extra_four_stand_apart(imagenet, tmp_path):
    model, options = imagenet
    root = tmp_path / "imagenet-c"
    errors = {}
    for place, kind in enumerate((*IMAGENET_C, *IMAGENET_C_EXTRA)):
        errors[kind] = []
        for severity in (1, 2, 3, 4, 5):
            folder = root / kind / str(severity)
            if place >= 4:
                shutil.copytree(root / IMAGENET_C[place % 4] / str(severity), folder, copy_function=os.link)
            else:
                make_class_folders(folder, SYNSETS, 1, (225, 224), seed=place * 5 + severity, suffix=".jpg")
                _, logits, labels = by_hand(folder, model, resize=None, crop=224, classes=SYNSETS)
                errors[kind].append(1 - share(logits.argmax(1) == labels))
        errors[kind] = errors[kind] or errors[IMAGENET_C[place % 4]]
    records = run_evaluation(dataclasses.replace(options, imagenet_c=root))
    found = {
        record.conditions["kind"]: record.value
        for record in records
        if record.metric == "corruption error [share of AlexNet's error]"
    }
    expected = {kind: np.mean(errors[kind]) / ALEXNET_ERRORS[kind] for kind in IMAGENET_C}
    for kind, one in expected.items():
        assert found[kind] == pytest.approx(one), kind
    assert len(set(found.values())) > 4
    (mce,) = select(records, metric="mCE, fifteen corruptions [share of AlexNet's error]")
    assert mce.value == pytest.approx(np.mean(list(expected.values())))
    assert mce.n == 15 * 5 * 5
    extra = dict(zip(IMAGENET_C_EXTRA, (0.845, 0.787, 0.718, 0.658), strict=True))
    (mean,) = select(records, metric="mean corruption error, extra four [share of AlexNet's error]")
    assert mean.value == pytest.approx(np.mean([np.mean(errors[kind]) / extra[kind] for kind in extra]))
    assert len(select(records, metric=ACCURACY, conditions={"threat": "ImageNet-C"})) == 19 * 5
    predictions = read_predictions(options.out / "predictions-imagenet-c.npz")[NAME, 0]
    assert len(predictions.correct) == 19 * 5
    assert 1 - predictions.correct["ImageNet-C kind=fog severity=2"].mean() == pytest.approx(errors["fog"][1])
    section = evaluation_section(options.out)
    (table,) = section.tables
    assert [line.what for line in table.lines][-2:] == [
        "mCE, fifteen corruptions",
        "mean corruption error, extra four",
    ]
    (picture,) = section.pictures
    assert [panel.title for panel in picture.panels] == ["noise", "blur", "weather", "digital", "extra"]


def test_some_corruptions_alone_make_no_mce(imagenet, tmp_path):
    _, options = imagenet
    for severity in (1, 2, 3, 4, 5):
        make_class_folders(tmp_path / "c" / "fog" / str(severity), SYNSETS, per_class=1, size=(224, 224))
    with pytest.raises(ValueError, match="must hold a folder for each corruption: gaussian_noise"):
        run_evaluation(dataclasses.replace(options, imagenet_c=tmp_path / "c"))
    records = run_evaluation(dataclasses.replace(options, imagenet_c=tmp_path / "c", imagenet_c_kinds=("fog",)))
    assert {record.metric for record in records} == {ACCURACY, "corruption error [share of AlexNet's error]"}
    make_class_folders(tmp_path / "c" / "fog" / "3", SYNSETS, per_class=2, size=(224, 224))
    with pytest.raises(ValueError, match=r"holds 5 images and .*3 10: all severities are of the same images"):
        run_evaluation(dataclasses.replace(options, imagenet_c=tmp_path / "c", imagenet_c_kinds=("fog",)))


def test_imagenet_a_is_judged_among_its_own_classes_and_v2_among_all(imagenet, tmp_path):
    model, options = imagenet
    some = OF_A
    a = make_class_folders(tmp_path / "a", some, per_class=3, size=(256, 256), seed=8)
    v2 = make_class_folders(tmp_path / "v2", [str(place) for place in range(5)], per_class=2, size=(256, 256), seed=9)
    sketch = make_class_folders(tmp_path / "sketch", SYNSETS, per_class=2, size=(256, 256), seed=10)
    # A class that A does not have wins most of its images.
    logits = by_hand(a, model, resize=None, crop=224, classes=some)[1]
    with torch.no_grad():
        model.head.bias[0] += (logits[:, 1:].amax(1) - logits[:, 0]).quantile(0.8)
    torch.save(model.state_dict(), options.checkpoint)
    records = run_evaluation(
        dataclasses.replace(options, imagenet_a=a, imagenet_r=a, imagenet_v2=v2, sketch=sketch, attacks=("clean",))
    )
    values = {record.conditions["threat"]: record.value for record in records}
    _, logits, labels = by_hand(a, model, resize=None, crop=224, classes=some)
    assert len(logits.argmax(1).unique()) > 2
    cut = logits[:, [1, 2, 4]]
    assert values["ImageNet-A"] == values["ImageNet-R"] == pytest.approx(share(cut.argmax(1) == labels))
    answers = read_predictions(options.out / "predictions-imagenet-a.npz")[NAME, 0].correct["ImageNet-A"].tolist()
    assert answers == (cut.argmax(1) == labels).tolist()
    assert answers != (logits.argmax(1) == torch.tensor([1, 2, 4])[labels]).tolist()
    assert answers != (logits.argmax(1) == labels).tolist()
    for name, root, classes in (("ImageNet-V2", v2, "01234"), ("ImageNet-Sketch", sketch, SYNSETS)):
        _, logits, labels = by_hand(root, model, resize=None, crop=224, classes=classes)
        assert values[name] == pytest.approx(share(logits.argmax(1) == labels))
    assert {path.name for path in options.out.glob("*.npz")} == {
        "predictions.npz",
        "predictions-imagenet-a.npz",
        "predictions-imagenet-r.npz",
        "predictions-imagenet-v2.npz",
        "predictions-imagenet-sketch.npz",
    }
    (table,) = [table for table in evaluation_section(options.out).tables if table.title == "Shifted test sets"]
    assert [line.what for line in table.lines] == ["ImageNet-A", "ImageNet-R", "ImageNet-V2", "ImageNet-Sketch"]


def test_a_part_of_imagenet_a_or_another_set_in_its_place_is_refused(imagenet, tmp_path):
    _, options = imagenet
    part = make_class_folders(tmp_path / "part", OF_A[:2], per_class=1, size=(256, 256))
    with pytest.raises(ValueError, match="must hold a folder for each of the 3 classes: n05 missing"):
        run_evaluation(dataclasses.replace(options, imagenet_a=part))
    with pytest.raises(ValueError, match=r"named by the set's 3 classes .* got n01, n04"):
        run_evaluation(dataclasses.replace(options, imagenet_r=options.data_dir))


def test_many_classes_have_a_top_5(options, tmp_path):
    names = [f"c{place:02}" for place in range(21)]
    root = make_class_folders(tmp_path / "many", names, per_class=1, size=(32, 32))
    model = network(num_classes=21)
    torch.save(model.state_dict(), tmp_path / "many.pth")
    changes = {"model_args": (*TINY[:-1], "num_classes=21"), "data_dir": root, "checkpoint": tmp_path / "many.pth"}
    records = run_evaluation(dataclasses.replace(options, **changes))
    _, logits, labels = by_hand(root, model, classes=names)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    (top5,) = select(records, metric="top-5 accuracy [share of images]")
    assert top5.value == pytest.approx(share(ranks < 5))


def test_timms_list_of_synsets_is_imagenets(real_data):
    assert list(imagenet_synsets()) == (real_data / "meta" / "imagenet_synsets.txt").read_text().split()


@pytest.mark.parametrize("name", ["ImageNet-A", "ImageNet-R"])
def test_timms_lists_of_a_and_r_are_the_released_ones(name, real_data):
    released = (real_data / "meta" / f"{name.lower().replace('-', '_')}_synsets.txt").read_text().split()
    assert list(synsets_of(name)) == released
    assert len(set(released)) == 200
    assert set(released) < set(imagenet_synsets())


def test_the_image_size_is_the_models_own():
    assert image_size(network()) == 32
    assert image_size(network(img_size=48)) == 48
    with pytest.raises(ValueError, match="images of 32 x 64 pixels: expected square ones"):
        network(img_size=(32, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vit_tiny_patch16_225"}, r"neither a run folder .* nor one of timm's \d+ models\. Did you mean"),
        ({"model_args": ("colour=red",)}, f"timm cannot make {NAME} with .*colour"),
        ({"data_dir": None}, "needs --data-dir, the folder of held-out images"),
        ({"model_args": (*TINY[:-1], "num_classes=4")}, "holds 3 class folders, and the model has 4 classes"),
        ({"mechanism": "twicign"}, "twicign.*did you mean 'twicing'"),
        ({"mechanism": "twicing", "layers": "3"}, "3"),
        ({"mechanism": "twicing", "options": ("gian=1",)}, "gian"),
        ({"layers": "2"}, "--layers and --options are of a mechanism: name it with --mechanism"),
        ({"options": ("gain=1",)}, "--layers and --options are of a mechanism"),
        ({"imagenet_a": Path("x")}, f"need a model of its 1000 classes: {NAME} has 3"),
        ({"model_args": (*TINY, "num_heads=0")}, f"timm cannot make {NAME} with .*'num_heads': 0"),
        (
            {"model": SWIN, "model_args": SWIN_TINY, "mechanism": "twicing"},
            f"^The attention of {SWIN} is not known to the library: ",
        ),
        ({"transform": "1.0"}, "--transform is one of papers, 0.9: got '1.0'"),
        ({"pretrained": True, "checkpoint": Path("x")}, "--pretrained and --checkpoint are two sources"),
        ({"checkpoint": Path("nowhere.pth")}, r"nowhere\.pth is no file: give --checkpoint the file"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(options, changes, message):
    with pytest.raises(ValueError, match=message):
        run_evaluation(dataclasses.replace(options, **changes))


def test_imagenet_c_is_not_resized_for_models_of_other_sizes(imagenet, tmp_path):
    _, options = imagenet
    (tmp_path / "c").mkdir()
    args = (*SMALL, "img_size=112", "patch_size=56", "num_classes=5")
    with pytest.raises(ValueError, match=r"released for 224 pixels and not to be resized: .* takes 112"):
        run_evaluation(dataclasses.replace(options, model_args=args, checkpoint=None, imagenet_c=tmp_path / "c"))


class Forbidden:
    """Something that a checkpoint must not hold."""


def test_files_that_hold_no_weights_are_named(options, tmp_path):
    path = tmp_path / "bad.pth"

    def error():
        with pytest.raises(ValueError, match=r"bad\.pth") as told:
            timm_subject(dataclasses.replace(options, checkpoint=path))
        return str(told.value)

    path.write_bytes(b"this is no checkpoint")
    assert "bad.pth" in error()
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:3000])
    assert "bad.pth is damaged" in error()
    torch.save({"weights": Forbidden()}, path)
    assert "could run code" in error()
    torch.save({"epoch": 3, "lr": 0.1}, path)
    assert "bad.pth holds no state dict: expected tensors by name" in error()
    torch.save([1, 2], path)
    assert "holds no state dict" in error()
    weights = network().state_dict()
    del weights["head.bias"]
    weights["norm.weight"] = weights["norm.weight"][:3]
    torch.save(weights | {"extra": torch.zeros(1)}, path)
    told = error()
    assert "head.bias missing" in told
    assert "extra unknown" in told
    assert "norm.weight is [3] instead of [16]" in told


def test_points_at_which_nothing_is_left_are_marked(options, tmp_path):
    # A model that calls everything a cat falls at no size, one that is as unsure as can be falls at each.
    sure, unsure = network(), network()
    sure.head.weight.data.zero_()
    sure.head.bias.data.copy_(torch.tensor([9.0, 0.0, 0.0]))
    unsure.head.bias.data.zero_()
    found = []
    for name, model in (("sure", sure), ("unsure", unsure)):
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        changes = {"checkpoint": tmp_path / f"{name}.pth", "out": tmp_path / name, "pgd_steps": 10}
        attacked = dataclasses.replace(options, attacks=("clean", "pgd"), eps=("1/16", "1"), **changes)
        run_evaluation(attacked)
        (table,) = evaluation_section(tmp_path / name).tables
        found.append([line.what for line in table.lines])
    assert found[0][:2] == ["as they are", "as they are, the images disturbed below"]
    assert found[0][2:] == ["PGD eps 1/16", "PGD eps 1", "eps50 under PGD"]
    assert found[1][-2:] == ["PGD eps 1 (floor)", "eps50 under PGD"]


def test_data_that_are_not_there_are_told_before_anything_is_written(options, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        run_evaluation(dataclasses.replace(options, data_dir=tmp_path / "nowhere"))
    assert not options.out.exists()


def test_a_broken_picture_is_named_and_what_was_finished_is_kept(options, checkpoint, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "copy")
    broken = sorted((tmp_path / "copy" / "dog").iterdir())[3]
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"{broken.name} cannot be read as an image"):
        run_evaluation(dataclasses.replace(options, checkpoint=checkpoint, data_dir=tmp_path / "copy"))


def test_accuracy_on_all_images_goes_with_any_choice_of_images_but_choices_are_not_mixed(options, checkpoint):
    given = dataclasses.replace(options, checkpoint=checkpoint, images=5)
    run_evaluation(given)
    run_evaluation(dataclasses.replace(given, attacks=("noise",), noise=("1/4",), images=9))
    found = read_predictions(options.out / "predictions.npz")[NAME, 0]
    assert (len(found.correct["clean"]), len(found.correct["noise sd=1/4"]), len(found.probes)) == (21, 9, 9)
    with pytest.raises(ValueError, match=r"noise\.json was made with --images 9: give the same here, or another --out"):
        run_evaluation(dataclasses.replace(given, attacks=("fgsm",)))
    assert not list(options.out.glob("*/fgsm.json"))


def test_other_weights_are_another_evaluation(options, checkpoint):
    run_evaluation(dataclasses.replace(options, checkpoint=checkpoint))
    torch.save(network(seed=2).state_dict(), checkpoint)
    with pytest.raises(ValueError, match="holds another evaluation"):
        run_evaluation(dataclasses.replace(options, checkpoint=checkpoint))
