"""What `twicing diagnose` can be told: the command line is made of this dataclass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Diagnose:
    """Does this model collapse? Layer by layer, against its own random initialisation, with a verdict.

    Takes a vision transformer of timm by name, a folder of a model that transformers saved, or a run folder of compare
    or train. Writes diagnosis.html with figures, diagnosis.json, diagnosis.csv and inputs.csv with every number; below
    a run folder in diagnosis/. Without pictures or a text it uses two photographs of scikit-learn, or Python's own
    documentation.

    Example: twicing diagnose deit_tiny_patch16_224 --pretrained

    Example: twicing diagnose runs/mnist

    Example: twicing diagnose my-llama --text book.txt --convert twicing --layers last-3
    """

    model: Positional[str]
    """A vision transformer of timm by name, a folder that transformers saved, or a run folder."""
    images: Path | None = None
    """A folder of pictures, at any depth; by default scikit-learn's two photographs and views cut from them. A run
    folder has its own held-out images."""
    text: Path | None = None
    """A text file for a language model, cut into windows; by default Python's documentation of its own language."""
    inputs: int = 32
    """How many pictures, or windows of the text."""
    tokens: int = 128
    """Tokens in a window of the text, special ones included; fewer where the model takes fewer."""
    checkpoint: Path | None = None
    """Weights of a timm model: a state dict, or a checkpoint that holds one; ours name their mechanism themselves."""
    pretrained: bool = False
    """Take timm's own weights, which timm downloads if they are not in its cache."""
    convert: str = ""
    """Put this mechanism into the model, by name or import path, and into its random initialisation too."""
    layers: str = "all"
    """Where to put it, counted from 1: all, 10-12, first-3, last-3, or 1,2,3."""
    options: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Options of the mechanism, as in --options gain=0.5.")
    ] = ()
    model_args: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Arguments of timm's model, as in num_classes=10 img_size=32.")
    ] = ()
    arms: tuple[str, ...] = ()
    """Of a run folder, these arms by their labels; all by default."""
    seeds: tuple[int, ...] = ()
    """Of a run folder, these seeds; the first by default."""
    data_dir: Path | None = None
    """For a run folder: the folder that its recipe reads, if it has moved."""
    draws: int = 3
    """How many random initialisations the model is held against."""
    seed: int = 0
    """Decides the random initialisations, the bands, and the views that are cut from photographs."""
    batch_size: int = 16
    """Inputs that the model is shown at once. Changes no number."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU if there is one."""
    out: Path | None = None
    """The folder for what is found; RUN/diagnosis, or runs/diagnose-MODEL by default."""
