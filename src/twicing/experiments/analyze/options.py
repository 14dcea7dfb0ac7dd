"""What `twicing analyze` can be told: the command line is made of this dataclass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Analyze:
    """Look inside: spectra of attention matrices, heat maps, logits of tokens and positions, and the bandwidth test.

    Takes a run folder of compare or train, with every trained model in it; a folder of a model that transformers saved,
    with its tokenizer where it reads text; or vision transformers of timm by name, which are shown side by side on the
    same pictures. Writes analysis.html, analysis.json, CSV tables and arrays.npz; below the run folder in analysis/,
    where the comparison's report finds them. Of text there are no heat maps.

    Example: twicing analyze runs/mnist

    Example: twicing analyze deit_tiny_patch16_224 --checkpoint deit.pth --convert twicing --layers 10-12
    --images pictures

    Example: twicing analyze my-gpt2 --text book.txt --convert twicing
    """

    models: Positional[tuple[str, ...]]
    """A run folder, a folder that transformers saved, or one or more vision transformers of timm by name."""
    images: Path | None = None
    """A folder of pictures, at any depth; by default scikit-learn's two photographs and views cut from them. A run
    folder has its own held-out images or text."""
    text: Path | None = None
    """A text file for a language model, cut into windows; by default Python's documentation of its own language."""
    tokens: int = 128
    """Tokens in a window of the text, special ones included; fewer where the model takes fewer."""
    data_dir: Path | None = None
    """For a run folder: the folder that its recipe reads, if it has moved."""
    checkpoint: tuple[Path, ...] = ()
    """Weights of timm's models, one file for each name, in order: a state dict, or a checkpoint that holds one."""
    pretrained: bool = False
    """Take timm's own weights, which timm downloads if they are not in its cache."""
    convert: str = ""
    """Show each model of timm or transformers a second time, with this mechanism in it, by name or import path."""
    layers: str = "all"
    """Where to put it, counted from 1: all, 10-12, first-3, last-3, or 1,2,3."""
    options: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Options of the mechanism, as in --options gain=0.5.")
    ] = ()
    model_args: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Arguments of timm's models, as in num_classes=10 img_size=32.")
    ] = ()
    spectrum_images: int = 4
    """On how many images, or windows of a text, attention matrices are taken apart; what is shown is their mean. The
    time grows with the cube of the tokens: seconds for an image of 197 tokens, minutes for one of 577."""
    map_images: int = 2
    """On how many images heat maps are drawn."""
    bandwidth_images: int = 256
    """On how many images, or windows of a text, logits are scaled, every class in its share where there are classes; 0
    leaves it out."""
    seed: int = 0
    """Decides random weights, and the views that are cut from photographs."""
    batch_size: int = 64
    """Images or windows that a model is shown at once in the bandwidth test."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU if there is one."""
    out: Path | None = None
    """The folder for what is found; RUN/analysis, or runs/analyze-MODEL by default."""
