"""Twicing Attention, U = A V + A (V - A V), and its relatives: the call, the formula, and the adapters of models.

arXiv 2503.00687. Importing this needs torch and nothing else.
"""

from twicing.adapters.surgery import convert, describe, spec, undo
from twicing.ops.attention import explain_backend, twicing_attention
from twicing.ops.boost import boost, boosted_values
from twicing.ops.decode import decode_step
from twicing.ops.decode_state import DecodeState
from twicing.ops.reference import attention_matrix, effective_matrix
from twicing.version import __version__

__all__ = [
    "DecodeState",
    "__version__",
    "attention_matrix",
    "boost",
    "boosted_values",
    "convert",
    "decode_step",
    "describe",
    "effective_matrix",
    "explain_backend",
    "spec",
    "twicing_attention",
    "undo",
]
