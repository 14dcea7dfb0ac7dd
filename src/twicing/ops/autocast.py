"""Autocast, as scaled_dot_product_attention treats it: its floating-point arguments are cast, but not those in fp64."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which SDPA would get it: unchanged without autocast."""
    device_type = tensor.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which dtypes are what the code says: none where they are anyway, since entering one takes time."""
    # The meta device knows no autocast, not even how to end it.
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
