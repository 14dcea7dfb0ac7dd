"""Twicing Attention and its relatives."""

from twicing.ops.attention import twicing_attention
from twicing.ops.boost import boost, boosted_values
from twicing.version import __version__

__all__ = ["__version__", "boost", "boosted_values", "twicing_attention"]
