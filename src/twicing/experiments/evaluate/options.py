"""What `twicing evaluate` can be told: the command line is made of this dataclass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

ATTACKS = ("clean", "noise", "fgsm", "pgd", "spsa", "autoattack", "paper_compat", "verdict")
# For other test sets alone.
NO_ATTACK = "none"


@dataclass(frozen=True)
class Evaluate:
    """Evaluate trained models: attacks, corruptions, ImageNet's shifted test sets, with or without a conversion.

    Takes a run folder of compare or train, with every trained model in it, or a model of timm by name. Writes
    evaluation.html, results.jsonl and the predictions; below the run folder in evaluation/. Interrupted, it goes on
    after the last finished part when the same command is given again; other parts can be added by a later command.

    Example: twicing evaluate runs/mnist --attacks clean pgd spsa --corruptions generated

    Example: twicing evaluate deit_tiny_patch16_224 --checkpoint deit.pth --mechanism twicing --layers 10-12
    --data-dir imagenet --imagenet-c imagenet-c --imagenet-a imagenet-a
    """

    model: Positional[str]
    """A run folder, or a vision transformer of timm by name."""
    data_dir: Path | None = None
    """A timm model's held-out images, one folder per class (by itself, or as val/ or test/ below it). For a run
    folder the folder that its recipe reads, if it has moved."""
    attacks: tuple[str, ...] = ("clean",)
    """Of clean, noise (Gaussian), fgsm, pgd, spsa, autoattack, verdict (on gradient masking), and paper_compat: PGD on
    normalised images without clipping, eps 1/255 to 6/255 there, as papers of this line seem to run it (unverified).
    none for corruptions and other test sets alone."""
    eps: tuple[str, ...] = ()
    """Sizes of attacks in units of the pixel range, ascending, as in 1/255 4/255; the recipe's by default, or
    1/4/255 1/2/255 1/255 2/255 4/255."""
    noise: tuple[str, ...] = ()
    """Standard deviations of Gaussian noise, as in 1/16 1/8; the recipe's by default, or 1/16 1/8 1/4."""
    corruptions: tuple[str, ...] = ()
    """"generated" for all eight that are made on the fly (not ImageNet-C), or some of them by name."""
    images: int = 500
    """How many held-out images are attacked and corrupted, every class in its share; 0 for all."""
    imagenet_c: Path | None = None
    """ImageNet-C as released: CORRUPTION/SEVERITY/SYNSET/*.JPEG."""
    imagenet_c_kinds: tuple[str, ...] = ()
    """Some of its corruptions; all fifteen (and the extra four where they are) by default, as the mCE needs."""
    imagenet_a: Path | None = None
    """ImageNet-A as released, SYNSET/*.jpg of 200 classes."""
    imagenet_r: Path | None = None
    """ImageNet-R as released, SYNSET/*.jpg of 200 classes."""
    imagenet_v2: Path | None = None
    """ImageNet-V2 as released, folders 0 to 999."""
    sketch: Path | None = None
    """ImageNet-Sketch as released, SYNSET/*.JPEG."""
    transform: str = "papers"
    """How pictures in folders are prepared: papers (resize 256, crop 224) or 0.9 (resize 248, crop 224). A run
    folder's own images keep their recipe's; ImageNet-C is cropped only."""
    checkpoint: Path | None = None
    """Weights of a timm model: a state dict, or a checkpoint that holds one; ours name their mechanism themselves."""
    pretrained: bool = False
    """Take timm's own weights, which timm downloads if they are not in its cache."""
    mechanism: str = "standard"
    """Put this mechanism into a timm model, by name or import path."""
    layers: str = "all"
    """Where to put it, counted from 1: all, 10-12, first-3, last-3, or 1,2,3."""
    options: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Options of the mechanism, as in --options gain=0.5.")
    ] = ()
    model_args: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Arguments of timm's model, as in num_classes=10 img_size=32.")
    ] = ()
    pgd_steps: int = 20
    """Steps of PGD, each of 3 eps / steps."""
    pgd_restarts: int = 1
    """Random starts of PGD, each with both losses."""
    spsa_iterations: int = 40
    """Steps of SPSA."""
    spsa_samples: int = 128
    """Random directions of each step of SPSA, two answers of the model each."""
    verdict_eps: str | None = None
    """The size of attack at which gradient masking is looked for; the recipe's by default, or 1/2/255."""
    verdict_images: int = 100
    """How many images that is done on."""
    seed: int = 0
    """Decides random starts and noise for a timm model; trained models have their own seed."""
    batch_size: int = 64
    """Images that the model is shown at once."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU if there is one."""
    out: Path | None = None
    """The folder for what is found; RUN/evaluation, or runs/evaluate-MODEL by default."""
