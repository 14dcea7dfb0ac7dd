"""What `twicing compare` and `twicing train` can be told: the command line is made of these dataclasses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

Settings = Annotated[
    tuple[str, ...],
    arg(metavar="KEY=VALUE", help="Change the recipe, as in --set epochs=5 evaluation.eps=1/16,1/8."),
]


@dataclass(frozen=True)
class Compare:
    """Train standard attention and other mechanisms side by side, and report what is shown and what is not.

    Every mechanism is trained once per seed, on the same data in the same order from the same weights; differences
    are paired by seed. Writes a folder with config, logs, checkpoints, results.jsonl, predictions.npz and report.html.
    Interrupted, it goes on where it stopped when the same command is given again.

    Example: twicing compare digits --mechanisms standard twicing --seeds 6 --controls
    """

    recipe: Positional[str] = "digits"
    """What to train on what. Images: digits (scikit-learn's handwritten digits, no download), mnist, cifar10,
    imagefolder, imagenet_deit_tiny. Language: text_demo (Python's own documentation, no download), ptb, imdb_lm,
    wikitext103_10m, wikitext103_small, wikitext103_medium, wikitext103_linear. All but the two read --data-dir."""
    mechanisms: tuple[str, ...] = ("standard", "twicing")
    """Mechanisms by name, or your own by import path, as in my_pkg.my_file:MyAttention, which is checked before it
    trains. NAME@LAYERS places one, as in twicing@10-12."""
    seeds: int = 6
    """How many seeds; fewer than five can hardly show anything."""
    layers: tuple[str, ...] = ("all",)
    """Where to put the mechanisms, counted from 1: all, 10-12, first-3, last-3, or 1,2,3. Several placements are
    several arms: --layers 1-3 10-12 7-12 1-12."""
    controls: bool = False
    """Add the five controls: standard for equal time, standard widened to equal multiply-adds, two attentions a block,
    smooth-more (A^2 V), and standard against standard with other seeds (the noise floor)."""
    data_dir: Path | None = None
    """Where the recipe's data are: mnist.npz or its folder; train and test folders of images, or archives of them; the
    folder with train, valid and test texts."""
    jobs: int | None = None
    """Trainings side by side, each on one thread; as many as there are cores by default. Changes no result."""
    accelerator: str | None = None
    """cpu, gpu or auto; the CPU by default for small images."""
    precision: str = "32-true"
    """Lightning's: 32-true, bf16-mixed, 16-mixed."""
    workers: int | None = None
    """Processes that read and augment the images of one training; by the recipe by default."""
    out: Path | None = None
    """The run folder; runs/RECIPE by default."""
    set: Settings = ()


@dataclass(frozen=True)
class Train:
    """Train one model of a recipe with one mechanism, and evaluate it.

    Several devices: torchrun --nproc-per-node 8 -m twicing train imagenet_deit_tiny --data-dir DIR --devices 8 ...

    Example: twicing train digits --mechanism twicing --layers 10-12 --set epochs=5 --options gain=0.5
    """

    recipe: Positional[str] = "digits"
    """What to train on what: digits, mnist, cifar10, imagefolder, imagenet_deit_tiny; text_demo, ptb, imdb_lm,
    wikitext103_10m, wikitext103_small, wikitext103_medium, wikitext103_linear."""
    mechanism: str = "standard"
    """A mechanism by name, or your own by import path, as in my_pkg.my_file:MyAttention."""
    layers: str = "all"
    """Where to put it, counted from 1: all, 10-12, first-3, last-3, or 1,2,3."""
    options: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Options of the mechanism, as in --options gain=0.5 order=3.")
    ] = ()
    seed: int = 0
    """Decides weights, data order, and the fold that is held out."""
    data_dir: Path | None = None
    """Where the recipe's data are: mnist.npz or its folder; train and test folders of images, or archives of them; the
    folder with train, valid and test texts."""
    accelerator: str | None = None
    """cpu, gpu or auto; the CPU by default for small images."""
    precision: str = "32-true"
    """Lightning's: 32-true, bf16-mixed, 16-mixed."""
    devices: str = "auto"
    """Processes on this machine, as many as torchrun started. The batch is divided among them."""
    num_nodes: int = 1
    """Machines, each with its own torchrun."""
    strategy: str = "auto"
    """Lightning's: ddp or fsdp for several devices."""
    workers: int | None = None
    """Processes that read and augment the images; by the recipe by default."""
    out: Path | None = None
    """The run folder; runs/train-RECIPE-MECHANISM by default."""
    set: Settings = ()
