"""from_pretrained() of a model that was saved converted: the mechanisms are there before the weights are loaded.

transformers has one place where another package may change the modules of a model between its construction and the
loading of its weights: a quantizer, asked for by "quantization_config" in config.json. Nothing is quantised here, and
the loaded model does not count as quantised.
"""

import copy
import inspect
import sys
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from twicing.adapters import surgery
from twicing.adapters.site import AttentionSite, entry_of, is_converted, mechanism_of
from twicing.adapters.transformers_record import NAME, Record, record_of, wipe
from twicing.mechanisms.options import build
from twicing.mechanisms.registry import find_mechanism


class TwicingConfig(QuantizationConfigMixin):
    """The mark in config.json; what is converted stands under "twicing" beside it."""

    def __init__(self, **_more: Any) -> None:
        self.quant_method: Any = NAME


class TwicingLoading(HfQuantizer):
    """Converts a model that is being loaded as its config says it was when it was saved."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self) -> bool:
        """Whether such a model may be saved."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """The attention function of the layers that are not converted is the host's choice, as at the first loading."""
        if config._attn_implementation == NAME:
            config._attn_implementation = None
        return config

    # transformers 5.17 does not ask for the one, and shows the config to the other.
    update_tp_plan = update_attn_implementation

    def preprocess_model(self, model: Any, *_args: Any, **_kwargs: Any) -> None:
        """Before the weights are loaded: convert the model, so that what a mechanism learned has its place."""
        spec = _spec_for(model)
        wipe(model.config)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        surgery.convert(model, spec=spec)

    def postprocess_model(self, model: Any, **_kwargs: Any) -> None:
        """After the weights are loaded: build the mechanisms anew, off the meta device, around what was loaded."""
        del model.hf_quantizer
        missing = [
            f"{path}.twicing_mechanism.{name}"
            for path, module in model.named_modules()
            if is_converted(module)
            for name, parameter in mechanism_of(module).named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)
        ]
        if missing:
            raise ValueError(
                f"The saved weights lack {', '.join(missing)}, which the conversion in config.json needs: the folder "
                "holds the weights of another model than its config."
            )
        for site in surgery.find_sites(model):
            if is_converted(site.attention):
                _renew(site)


def register_loading() -> None:
    """Make the mark in config.json known to transformers."""
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(NAME)(TwicingConfig)
        register_quantizer(NAME)(TwicingLoading)


def refuse_unloadable() -> None:
    """Raise where save_pretrained() is under way, and what it writes could not be loaded as what the model is.

    Only the outermost model knows that it is being saved, and only its layers know that they are converted; so a layer
    that is asked for its weights looks for who asks.
    """
    model = _being_saved()
    if model is None:
        return
    part = f"{type(model).__name__} was converted in a part"
    if record_of(model.config) is None:
        raise ValueError(
            f"{part} that has a config of its own, so that the config.json of the whole would not tell, and it would "
            "load as standard attention: save that part by itself, and the rest after undo()."
        )
    try:
        surgery.spec(model)
        _spec_for(model)
    except ValueError as error:
        raise ValueError(f"This conversion cannot be saved so that from_pretrained() finds it: {error}") from error


def refuse_anothers(record: Record) -> None:
    """Raise where a model is being saved whose config says of it what is true of another model."""
    model = _being_saved()
    if model is None or record_of(model.config) is not record:
        return
    try:
        converted, recorded = surgery.spec(model), _spec_for(model)
    except ValueError:
        # Its layers say what is wrong when they are asked for their weights, or its config does when it is loaded.
        return
    if _by_layer(converted) != _by_layer(recorded):
        name = type(model).__name__
        raise ValueError(
            f"The config of this {name} says that other layers of it were converted than were, since another model was "
            "made from the same config object: undo the conversion of that one before saving this, and give each model "
            f"its own, {name}(copy.deepcopy(config))."
        )


def _being_saved() -> Any | None:
    """The model whose save_pretrained() is under way, or None."""
    frame = sys._getframe()
    saving = inspect.unwrap(PreTrainedModel.save_pretrained).__code__
    while frame is not None and frame.f_code is not saving:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["self"]


def _by_layer(spec: list[dict[str, Any]]) -> dict[int, tuple[str, dict[str, Any]]]:
    return {layer: (entry["mechanism"], entry["options"]) for entry in spec for layer in entry["layers"]}


def _renew(site: AttentionSite) -> None:
    """Build the mechanism of a layer again with what was loaded: what is no weight was lost on the meta device."""
    loaded, entry = mechanism_of(site.attention), entry_of(site.attention)
    factory = find_mechanism(entry.mechanism)
    options = copy.deepcopy(entry.options)
    fresh = build(factory, entry.mechanism, options, site.layer, site.num_heads, site.head_dim)
    like = next(site.attention.parameters())
    fresh.to(device=like.device, dtype=like.dtype).train(site.attention.training)
    fresh.load_state_dict(loaded.state_dict())
    site.attention.add_module("twicing_mechanism", fresh)


def _spec_for(model: Any) -> list[dict[str, Any]]:
    """What the model's config says was converted. Raises ValueError where it is not for this model."""
    record = record_of(model.config)
    if record is None:
        raise ValueError(
            "config.json says that the model was converted by twicing, but not how: the entry 'twicing' is missing."
        )
    count = len(surgery.find_sites(model))
    if record["layers"] != count:
        raise ValueError(
            f"A part with {record['layers']} attention layers was converted, and {type(model).__name__} has {count}, "
            "so that the layers cannot be told: convert the whole model, layers='...' saying which."
        )
    spec: list[dict[str, Any]] = record["spec"]
    return spec
