"""What is converted, written into the config of a model of transformers, so that save_pretrained() saves it.

config.json then holds "attn_implementation": "twicing", which raises where that name is not registered, the spec, and
the mark by which from_pretrained() comes to ask us (transformers_loading.py).
"""

import copy
from typing import Any

from torch import nn

from twicing.adapters.site import entry_of

NAME = "twicing"
# The keys in config.json. The host reads two of them when it loads; the third is ours.
_MARKS = ("attn_implementation", "quantization_config")


class Record(dict[str, Any]):
    """What the config says: {"spec": [...], "layers": how many there are in all}.

    A config may be that of several models, made from the same object, of which one was converted. Its copy is what
    config.json is written from, and so the place to see that it is not written for another one.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "Record":
        from twicing.adapters.transformers_loading import refuse_anothers

        refuse_anothers(self)
        return Record(copy.deepcopy(dict(self), memo))


def record_of(config: object) -> dict[str, Any] | None:
    """What the config says was converted: {"spec": [...], "layers": how many there are in all}, or None."""
    found: dict[str, Any] | None = getattr(config, NAME, None)
    return found


def note(attention: nn.Module) -> None:
    """Write a layer that was just converted into its config."""
    config, entry = vars(attention)["config"], entry_of(attention)
    record = Record(record_of(config) or {"spec": [], "layers": entry.layers})
    if record["layers"] != entry.layers:
        # Converted in parts that were counted differently: loading will refuse it.
        record["layers"] = None
    same = [e for e in record["spec"] if (e["mechanism"], e["options"]) == (entry.mechanism, entry.options)]
    if same:
        # It is there already where another model has the same config, or where the config was read from a file.
        same[0]["layers"] = sorted({*same[0]["layers"], entry.layer})
    else:
        record["spec"].append({"mechanism": entry.mechanism, "layers": [entry.layer], "options": entry.options})
    setattr(config, NAME, record)
    config.attn_implementation = NAME
    if getattr(config, "quantization_config", None) is None:
        config.quantization_config = {"quant_method": NAME}


def forget(attention: nn.Module) -> None:
    """Take a layer that is about to be restored out of its config."""
    config, entry = vars(attention)["config"], entry_of(attention)
    record = record_of(config)
    if record is None:
        return
    for other in record["spec"]:
        if (other["mechanism"], other["options"]) == (entry.mechanism, entry.options) and entry.layer in other[
            "layers"
        ]:
            other["layers"].remove(entry.layer)
            break
    record["spec"] = [other for other in record["spec"] if other["layers"]]
    if not record["spec"]:
        wipe(config)


def wipe(config: Any) -> None:
    """Let the config say nothing of a conversion."""
    vars(config).pop(NAME, None)
    vars(config).pop("attn_implementation", None)
    if vars(config).get("quantization_config") == {"quant_method": NAME}:
        del config.quantization_config
