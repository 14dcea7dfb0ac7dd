"""Published mechanisms, one file each; importing this package registers them."""

from twicing.mechanisms.base import Mechanism
from twicing.mechanisms.context import Context
from twicing.mechanisms.linear import Linear, TwicingLinear
from twicing.mechanisms.neutreno import Neutreno
from twicing.mechanisms.registry import find_mechanism, known_mechanisms, register
from twicing.mechanisms.standard import Standard
from twicing.mechanisms.twicing import Twicing

__all__ = [
    "Context",
    "Linear",
    "Mechanism",
    "Neutreno",
    "Standard",
    "Twicing",
    "TwicingLinear",
    "find_mechanism",
    "known_mechanisms",
    "register",
]
