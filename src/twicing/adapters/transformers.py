"""transformers' models: GPT-2, Llama, BERT, ViT, DeiT, and whatever else goes through its attention interface.

Importing this makes the name "twicing" known to transformers, which a saved model that was converted needs:
`import twicing.adapters.transformers` before from_pretrained().
"""

from typing import Any

from torch import nn

from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()

try:
    from transformers import AttentionMaskInterface, DynamicCache, StaticCache  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"twicing.adapters.transformers needs transformers 5.17 or later ({error}): pip install 'twicing[hf]'"
    ) from error

from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer  # noqa: E402

from twicing.adapters.transformers_attention import register  # noqa: E402
from twicing.adapters.transformers_loading import register_loading  # noqa: E402
from twicing.adapters.transformers_sites import find_sites, no_layers  # noqa: E402

__all__ = ["find_sites", "no_layers", "twicing_cache"]

register()
register_loading()


def twicing_cache(model: nn.Module, max_length: int | None = None) -> Cache:
    """A cache that converted layers can keep their residuals in, to be passed as past_key_values.

    Most calls need none: generate() and the model make their own, to which a converted layer adds residuals. Needed is
    it where those are of a kind that cannot hold them, such as quantised ones, or those of fixed size that forget.
    max_length: how many tokens it is to hold, for one of fixed size (StaticCache); None lets it grow (DynamicCache).
    """
    config: Any = model.config
    if max_length is None:
        return DynamicCache(config=config)
    cache = StaticCache(config=config, max_cache_len=max_length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[index] = StaticLayer(max_cache_len=max_length)
    return cache
