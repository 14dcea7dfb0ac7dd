"""The blocks of A of one box after another: made in a buffer in the cache, needed again after a sweep over all."""

from collections.abc import Callable, Iterator

from torch import Tensor

from twicing.ops.blocked.plan import Plan
from twicing.ops.blocked.scratch import Scratch

# (buffer, rows) -> the block of these rows, made at the start of the buffer.
Make = Callable[[Tensor, slice], Tensor]


class Blocks:
    """One buffer for the block that is worked on, and room for those that the plan keeps."""

    def __init__(self, plan: Plan, scratch: Scratch):
        self.rows = plan.row_blocks()
        self.buffer = scratch.take(plan.block_size)
        self.kept = [scratch.take(plan.block_size) for _ in range(plan.kept)]

    def made(self, make: Make, *, backwards: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Every block, from first to last or the other way round; after its use it is copied to where it is kept."""
        for number, rows in reversed(list(enumerate(self.rows))) if backwards else enumerate(self.rows):
            block = make(self.buffer, rows)
            yield rows, block
            if number < len(self.kept):
                self.kept[number][: block.numel()].copy_(block.view(-1))

    def again(self, make: Make, shaped: Make) -> Iterator[tuple[slice, Tensor]]:
        """Every block once more, from last to first: the last is still there, others are kept, the rest made anew."""
        for number, rows in reversed(list(enumerate(self.rows))):
            if number < len(self.kept):
                yield rows, shaped(self.kept[number], rows)
            elif number == len(self.rows) - 1:
                yield rows, shaped(self.buffer, rows)
            else:
                yield rows, make(self.buffer, rows)
