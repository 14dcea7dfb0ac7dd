"""A model of transformers from a local folder, with its tokenizer or the settings of its pictures; no downloads."""

import copy
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twicing.adapters.surgery import find_sites, spec
from twicing.adapters.transformers_record import wipe
from twicing.experiments.diagnose.cases import Case, converted, drawn, follow, refuse
from twicing.experiments.diagnose.inputs import Inputs, picture_inputs
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.diagnose.windows import window_inputs
from twicing.experiments.evaluate.weights import fingerprint
from twicing.experiments.results import BASELINE
from twicing.models.vision import PixelModel

PICTURES = "preprocessor_config.json"
# Parts on top of the blocks that a base model may have and its checkpoint may lack: no token passes through them.
ON_TOP = ("pooler",)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
OF_OTHERS = ("checkpoint", "pretrained", "model_args", "arms", "seeds", "data_dir")


class TokenModel(nn.Module):
    """network(input_ids): windows of ids to whatever the network gives."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        # Nothing is generated, and with a cache a converted layer would not be run as what it is.
        network.config.use_cache = False  # type: ignore[union-attr]

    def forward(self, ids: Tensor) -> Any:
        """ids: [B, N], int64, no padding."""
        return self.network(input_ids=ids)


def hugging_face_case(folder: Path, options: Diagnose) -> Case:
    """The model that transformers saved into the folder, with the conversion that the options name.

    Raises ImportError without transformers; ValueError where the folder lacks weights, a tokenizer or the settings of
    its pictures, where the library does not know the model's attention, or where options do not fit.
    """
    refuse(options, OF_OTHERS, "a folder of transformers")
    try:
        # First, as it mends the import of torchvision, and makes models that were saved converted known.
        importlib.import_module("twicing.adapters.transformers")
        import transformers
    except ImportError as error:
        raise ImportError(f"Models of transformers need {error.name}: pip install 'twicing[hf]'") from error
    config = _quietly(lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True), folder)
    takes_pictures = hasattr(config, "patch_size")
    refuse(options, ("text", "tokens") if takes_pictures else ("images",), f"a model of {_kind(takes_pictures)}")
    network = converted(_loaded(folder), options)
    if not find_sites(network):
        raise ValueError(f"the library finds no attention layers in {type(network).__name__}: there is nothing to see.")

    def fresh() -> nn.Module:
        plain = copy.deepcopy(config)
        # The draws are converted like the model itself, and not as the config says.
        wipe(plain)
        return follow(
            transformers.AutoModel.from_config(plain, attn_implementation="sdpa", dtype=torch.float32), network
        )

    wrap = _picture_wrapper(folder) if takes_pictures else TokenModel
    found = spec(network)
    mechanism = "+".join(dict.fromkeys(entry["mechanism"] for entry in found)) or BASELINE
    layers = ",".join(str(layer) for entry in found for layer in entry["layers"]) or "all"
    inputs = _inputs(folder, config, options, takes_pictures)
    label = folder.resolve().name + (f", {mechanism} [{options.layers}]" if options.convert else "")
    return Case(
        label=label,
        seed=None,
        mechanism=mechanism,
        layers=layers,
        weights=_fingerprints(folder),
        folder_name=label.replace(", ", "-").replace(" ", "-").replace("[", "").replace("]", ""),
        build=lambda: wrap(network).eval(),
        draw=lambda seed: wrap(drawn(seed, fresh)).eval(),
        inputs=lambda: inputs,
    )


def _kind(takes_pictures: bool) -> str:
    return "pictures" if takes_pictures else "text"


def _loaded(folder: Path) -> nn.Module:
    """The base model with all its weights. Raises ValueError where the folder lacks some of them."""
    import transformers

    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"{folder} holds no weights ({' or '.join(WEIGHTS)}): save_pretrained() the model into it.")

    def load() -> tuple[nn.Module, dict[str, Any]]:
        return transformers.AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            attn_implementation="sdpa",
            # Half precision would blur what is measured.
            dtype=torch.float32,
            output_loading_info=True,
        )

    network, info = _quietly(load, folder)
    missing = [name for name in sorted(info["missing_keys"]) if not name.split(".")[0].startswith(ON_TOP)]
    wrong = [*missing, *(str(one) for one in info["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{folder} lacks weights of {type(network).__name__} ({', '.join(wrong[:3])}, {len(wrong)} in all), which "
            "would be random: save the whole model."
        )
    return network


def _quietly(load: Callable[[], Any], folder: Path) -> Any:
    """What `load` returns, without the tables that transformers prints, and its errors as one sentence."""
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return load()
    # Whatever is wrong with the files makes it stumble anywhere: OSError, ValueError, KeyError, SafetensorError, ...
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"transformers cannot load {folder}: {first}") from error
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _inputs(folder: Path, config: Any, options: Diagnose, takes_pictures: bool) -> Inputs:
    if not takes_pictures:
        longest = getattr(config, "max_position_embeddings", None) or options.tokens
        return window_inputs(
            options.text, _cut_by(folder), count=options.inputs, tokens=min(options.tokens, int(longest))
        )
    return picture_inputs(options.images, options.inputs, _image_size(folder, config), options.seed)


def _cut_by(folder: Path) -> Callable[[str, int], Sequence[Sequence[int]]]:
    """Cuts a text into windows by the folder's own tokenizer, with its special tokens in each."""
    import transformers

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ValueError(
            f"{folder} holds no tokenizer (tokenizer.json), so that a text cannot be read: save the tokenizer into it."
        )
    tokenizer = _quietly(lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), folder)

    def cut(text: str, tokens: int) -> Sequence[Sequence[int]]:
        windows: Sequence[Sequence[int]] = tokenizer(
            text, truncation=True, max_length=tokens, return_overflowing_tokens=True
        )["input_ids"]
        return windows

    return cut


def _picture_wrapper(folder: Path) -> Callable[[nn.Module], nn.Module]:
    path = folder / PICTURES
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        mean, std = settings["image_mean"], settings["image_std"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} does not say how pictures are normalised (image_mean, image_std): save the image processor."
        ) from error
    return lambda network: PixelModel(network, mean, std)


def _image_size(folder: Path, config: Any) -> int:
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{folder / 'config.json'} names no square image_size: got {size!r}.")
    return size


def _fingerprints(folder: Path) -> str:
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return ", ".join(f"{path.name} {fingerprint(path)}" for path in files[:2]) + (", ..." if len(files) > 2 else "")
