"""A recipe is a function that returns a whole configuration; derive another one by changing two fields.

The protocols of the small ones are this library's own: no paper trains these models on these images.
"""

from collections.abc import Callable
from dataclasses import replace

from twicing.data.digits import FOLDS
from twicing.names import listed
from twicing.training.augmentation import Augmentation
from twicing.training.evaluation import Evaluation
from twicing.training.protocol import Cosine, Primary, Recipe

__all__ = [
    "RECIPES",
    "Augmentation",
    "Cosine",
    "Evaluation",
    "Primary",
    "Recipe",
    "cifar10",
    "digits",
    "find_recipe",
    "imagefolder",
    "imagenet_deit_tiny",
    "mnist",
]

XAVIER = "Xavier-uniform weights, with which the tokens of so deep a model are alike before training"

EPS50 = Primary("eps50 under PGD", "eps50 [share of pixel range]", {"threat": "pgd"}, "higher")
CLEAN = Primary("clean accuracy", "accuracy [share of images]", {"threat": "clean"}, "higher")
SIMILARITY = Primary(
    "token similarity after the last block",
    "mean pairwise cosine",
    {"layer": "last", "where": "block output", "when": "trained"},
    "neither",
)

# Mean and deviation of ImageNet's pixels, as torchvision and timm have them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits() -> Recipe:
    """Handwritten digits of scikit-learn, 8 x 8 pixels, a ViT of 12 layers: the embedded default, minutes on a CPU."""
    return Recipe(
        name="digits",
        title="a vision transformer of {depth} layers on scikit-learn's handwritten digits",
        limits="smoke demonstration: 1,797 images of 8 x 8 pixels, undefended models; it says nothing about ImageNet",
        data="digits",
        # Mean and deviation of all its pixels, to one digit: constants of the data set, the same for every fold.
        mean=(0.3,),
        std=(0.4,),
        image_size=8,
        channels=1,
        classes=10,
        folds=FOLDS,
        initialisation=XAVIER,
        weights="xavier",
        patch_size=2,
        depth=12,
        width=64,
        heads=4,
        mlp_ratio=2.0,
        # Standard attention reaches .92 after ten epochs and gains little after these. Small batches, because 64 images
        # a batch take three times as long to get there.
        epochs=12,
        batch_size=16,
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_share=0.2,
        primary=(EPS50, CLEAN, SIMILARITY),
        # A verdict on all the images that the other recipes take would last as long as two trainings.
        evaluation=Evaluation(verdict_images=60, spsa_images=10),
        fixed=("image_size", "channels", "classes", "dataset"),
    )


def mnist() -> Recipe:
    """MNIST, 28 x 28 pixels, a ViT of 12 layers and 16 + 1 tokens for one epoch: a minute and a half of one core."""
    return replace(
        digits(),
        name="mnist",
        title="a vision transformer of {depth} layers on MNIST",
        limits="undertrained (one epoch) and small (width 64), undefended models; grey digits of 28 x 28 pixels, which "
        "say nothing about ImageNet",
        data="mnist",
        # Mean and deviation of the pixels to train on.
        mean=(0.1307,),
        std=(0.3081,),
        image_size=28,
        folds=0,
        patch_size=7,
        epochs=1,
        batch_size=32,
        evaluation=Evaluation(eps=("1/256", "1/128", "1/64", "1/32", "1/16"), probes=300, verdict_eps="1/64"),
    )


def cifar10() -> Recipe:
    """CIFAR-10, 32 x 32 pixels, the same ViT as for MNIST with patches of 8 pixels, two epochs."""
    return replace(
        mnist(),
        name="cifar10",
        title="a vision transformer of {depth} layers on CIFAR-10",
        limits="undertrained (two epochs) and small (width 64), undefended models; where the images were read from "
        "JPEG files they are CIFAR-10 (JPEG), whose accuracies cannot be compared with published ones",
        data="cifar10",
        # Mean and deviation of the pixels to train on.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        image_size=32,
        channels=3,
        patch_size=8,
        epochs=2,
        evaluation=Evaluation(
            noise=("1/32", "1/16", "1/8"),
            eps=("1/4/255", "1/2/255", "1/255", "2/255", "4/255"),
            probes=300,
            verdict_eps="1/255",
        ),
    )


def imagefolder() -> Recipe:
    """Any images in class folders, train/ and val/: sizes are yours to set, classes are found in the data."""
    return replace(
        mnist(),
        name="imagefolder",
        title="a vision transformer of {depth} layers on images in class folders",
        limits="trained from nothing with settings of no paper, undefended models: a comparison of arms, not a record",
        data="imagefolder",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=64,
        channels=3,
        classes=0,
        patch_size=8,
        width=192,
        heads=3,
        mlp_ratio=4.0,
        epochs=20,
        batch_size=64,
        # A third of the area and more, and mirrored: what small sets of photographs are usually given.
        augmentation=Augmentation(flip=True, smallest_crop=0.35),
        evaluation=Evaluation(
            noise=("1/32", "1/16", "1/8"),
            eps=("1/4/255", "1/2/255", "1/255", "2/255", "4/255"),
            probes=500,
            verdict_eps="1/2/255",
        ),
        fixed=("channels", "dataset"),
    )


def imagenet_deit_tiny() -> Recipe:
    """The whole recipe of DeiT-tiny on ImageNet-1K by timm's own parts; data by a folder or by a name of timm's.

    Source: arXiv 2012.12877, table 9, as the papers on attention that collapses less take it over: 4 x 256 images a
    step, AdamW at 1e-3. The last weights are evaluated, as in the released script; those of the running mean (EMA)
    are in the checkpoint beside them.
    """
    return Recipe(
        name="imagenet_deit_tiny",
        title="DeiT-tiny ({depth} layers) on ImageNet-1K",
        limits="undefended models; one training takes days on several GPUs, and one seed of this model differs from "
        "another by .2 to .5 points",
        data="timm",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=224,
        channels=3,
        classes=0,
        folds=0,
        initialisation="normal weights of deviation .02, as in DeiT",
        weights="timm",
        patch_size=16,
        depth=12,
        width=192,
        heads=3,
        mlp_ratio=4.0,
        drop_path=0.1,
        epochs=300,
        batch_size=1024,
        learning_rate=1e-3,
        weight_decay=0.05,
        cosine=Cosine(),
        # As DeiT's script has it by default.
        ema_decay=0.99996,
        augmentation=Augmentation(
            flip=True,
            smallest_crop=0.08,
            rand_augment="rand-m9-mstd0.5-inc1",
            colour_jitter=0.4,
            erasing=0.25,
            repeats=3,
            mixup=0.8,
            cutmix=1.0,
            switch=0.5,
            smoothing=0.1,
        ),
        primary=(EPS50, CLEAN, SIMILARITY),
        evaluation=Evaluation(
            noise=("1/32", "1/16", "1/8"),
            eps=("1/16/255", "1/8/255", "1/4/255", "1/2/255", "1/255", "2/255", "4/255"),
            probes=1000,
            verdict_eps="1/4/255",
        ),
        fixed=("channels",),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "imagefolder": imagefolder,
    "imagenet_deit_tiny": imagenet_deit_tiny,
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError that lists the known ones for any other."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: {listed(name, RECIPES)}")
    return RECIPES[name]()
