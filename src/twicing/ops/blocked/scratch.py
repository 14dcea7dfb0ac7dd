"""Room for what a call forgets, kept from call to call: fresh pages would cost as much as a pass over the buffer."""

import math
import threading

import torch
from torch import Tensor

# What a thread keeps. What a call needs beyond it is allocated, and given back after it.
KEPT_BYTES = 32 << 20
ALIGNMENT = 64

_of_this_thread = threading.local()


class Scratch:
    """Hands out uninitialised tensors. All of them end with the call: the next one writes over them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.used = 0
        if not hasattr(_of_this_thread, "memory"):
            _of_this_thread.memory = torch.empty(KEPT_BYTES, dtype=torch.uint8)
        self.memory: Tensor = _of_this_thread.memory

    def take(self, *size: int) -> Tensor:
        """A contiguous tensor of this size."""
        stop = self.used + math.prod(size) * self.dtype.itemsize
        if stop > KEPT_BYTES:
            return torch.empty(size, dtype=self.dtype)
        taken = self.memory[self.used : stop].view(self.dtype).view(size)
        self.used = -(-stop // ALIGNMENT) * ALIGNMENT
        if torch.are_deterministic_algorithms_enabled():
            # As torch.empty does there: what nobody wrote cannot pass for a number.
            taken.fill_(math.nan)
        return taken
