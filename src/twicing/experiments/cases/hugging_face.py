"""A model of transformers from a local folder, with its tokenizer or the settings of its pictures; no downloads."""

import copy
import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twicing.adapters.surgery import find_sites, spec
from twicing.adapters.transformers_record import wipe
from twicing.experiments.cases.case import Case, Put, drawn, follow, put_in, refuse
from twicing.experiments.cases.inputs import Wanted, picture_inputs
from twicing.experiments.cases.windows import Cut, window_inputs
from twicing.experiments.evaluate.weights import fingerprint
from twicing.experiments.results import BASELINE
from twicing.models.vision import PixelModel

PICTURES = "preprocessor_config.json"
# Parts on top of the blocks that a base model may have and its checkpoint may lack: no token passes through them.
ON_TOP = ("pooler",)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# How transformers names models that score the next word, or classes of pictures.
NEXT_WORD = ("ForCausalLM", "LMHeadModel")
CLASSIFIER = "ForImageClassification"
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


class Logits(nn.Module):
    """network(pixels): the scores of classes alone, [B, classes]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, C, height, width]."""
        logits: Tensor = self.network(pixels).logits
        return logits


class NextToken(TokenModel):
    """network(input_ids): windows of ids to the scores of what comes next, [B, vocabulary]."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        # Scores at every position would take a hundred times the memory; not every model can leave them out.
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [B, N], int64, no padding."""
        logits: Tensor = self.network(input_ids=ids, **self.last).logits
        return logits[:, -1]


def hugging_face_case(folder: Path, options: Any, wanted: Wanted, put: Put, *, answers: bool) -> Case:
    """The model that transformers saved into the folder, with the mechanism that is put into it.

    options: of the command, in which those of other kinds of models are refused. answers: whether the model is to
    score classes or the next word, where it was saved with a head that does.
    Raises ImportError without transformers; ValueError where the folder lacks weights, a tokenizer or the settings of
    its pictures, where the library does not know the model's attention, or where options do not fit.
    """
    # Not every command has all of these.
    others = tuple(name for name in OF_OTHERS if hasattr(options, name))
    refuse(options, others, f"{folder} is a folder of transformers")
    try:
        # First, as it mends the import of torchvision, and makes models that were saved converted known.
        importlib.import_module("twicing.adapters.transformers")
        import transformers
    except ImportError as error:
        raise ImportError(f"Models of transformers need {error.name}: pip install 'twicing[hf]'") from error
    config = _quietly(lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True), folder)
    takes_pictures = hasattr(config, "patch_size")
    kind, of_others = ("pictures", ("text", "tokens")) if takes_pictures else ("text", ("images",))
    refuse(options, of_others, f"{folder} is a model of {kind}")
    tokenizer = None if takes_pictures else _tokenizer(folder)
    silent = _silent(config, tokenizer)
    with_head = answers and not silent
    auto: Any = transformers.AutoModel
    if with_head:
        auto = transformers.AutoModelForImageClassification if takes_pictures else transformers.AutoModelForCausalLM
    network = put_in(_loaded(folder, auto), put)
    if not find_sites(network):
        raise ValueError(f"the library finds no attention layers in {type(network).__name__}: there is nothing to see.")

    def fresh() -> nn.Module:
        plain = copy.deepcopy(config)
        # The draws are converted like the model itself, and not as the config says.
        wipe(plain)
        return follow(auto.from_config(plain, attn_implementation="sdpa", dtype=torch.float32), network)

    if takes_pictures:
        mean, std = _normalisation(folder)
        inputs = picture_inputs(wanted, _image_size(folder, config))
    else:
        longest = getattr(config, "max_position_embeddings", None) or wanted.tokens
        wanted = dataclasses.replace(wanted, tokens=min(wanted.tokens, int(longest)))
        inputs = window_inputs(wanted, _cut_by(tokenizer))

    def wrap(network: nn.Module) -> nn.Module:
        if takes_pictures:
            return PixelModel(Logits(network) if with_head else network, mean, std).eval()
        return (NextToken if with_head else TokenModel)(network).eval()

    found = spec(network)
    mechanism = "+".join(dict.fromkeys(entry["mechanism"] for entry in found)) or BASELINE
    layers = ",".join(str(layer) for entry in found for layer in entry["layers"]) or "all"
    label = folder.resolve().name + (f", {mechanism} [{put.layers}]" if put.mechanism else "")
    return Case(
        label=label,
        seed=None,
        mechanism=mechanism,
        layers=layers,
        weights=_fingerprints(folder),
        folder_name=label.replace(", ", "-").replace(" ", "-").replace("[", "").replace("]", ""),
        build=lambda: wrap(network),
        draw=lambda seed: wrap(drawn(seed, fresh)),
        inputs=lambda: inputs,
        silent=silent,
    )


def _silent(config: Any, tokenizer: Any) -> str:
    """Why the folder's model scores neither classes nor next words, as a clause; "" where it does."""
    saved = (getattr(config, "architectures", None) or ["a model without a name"])[0]
    if tokenizer is None:
        if CLASSIFIER in saved:
            return ""
        return f"it was saved without a head that names classes ({saved}), so that there is no answer to compare"
    if not saved.endswith(NEXT_WORD):
        return f"it was saved without a head that gives the next word ({saved}), so that there is no answer to compare"
    if tokenizer("a")["input_ids"][-1] in tokenizer.all_special_ids and len(tokenizer("a")["input_ids"]) > 1:
        return "its tokenizer ends every window with a special token, so that the last one is no word to be foretold"
    return ""


def _loaded(folder: Path, auto: Any) -> nn.Module:
    """The model with all its weights. Raises ValueError where the folder lacks some of them."""
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"{folder} holds no weights ({' or '.join(WEIGHTS)}): save_pretrained() the model into it.")

    def load() -> tuple[nn.Module, dict[str, Any]]:
        return auto.from_pretrained(
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


def _tokenizer(folder: Path) -> Any:
    import transformers

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ValueError(
            f"{folder} holds no tokenizer (tokenizer.json), so that a text cannot be read: save the tokenizer into it."
        )
    return _quietly(lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), folder)


def _cut_by(tokenizer: Any) -> Cut:
    """Cuts a text into windows by the folder's own tokenizer, with its special tokens in each."""

    def cut(text: str, tokens: int) -> Sequence[Sequence[int]]:
        windows: Sequence[Sequence[int]] = tokenizer(
            text, truncation=True, max_length=tokens, return_overflowing_tokens=True
        )["input_ids"]
        return windows

    return cut


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    path = folder / PICTURES
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return settings["image_mean"], settings["image_std"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} does not say how pictures are normalised (image_mean, image_std): save the image processor."
        ) from error


def _image_size(folder: Path, config: Any) -> int:
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{folder / 'config.json'} names no square image_size: got {size!r}.")
    return size


def _fingerprints(folder: Path) -> str:
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return ", ".join(f"{path.name} {fingerprint(path)}" for path in files[:2]) + (", ..." if len(files) > 2 else "")
