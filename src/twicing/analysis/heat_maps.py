"""Where in the image attention goes: a row of an attention matrix, laid out as the grid of patches.

Fused kernels never form A; attention_inputs.py computes it again from queries and keys.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from twicing.analysis.capture import sites_to_look_into

# 6 x 6: with fewer a patch is more than a sixth of the picture each way, as large as the things in it, and a map
# cannot say where in it attention goes. The 4 x 4 patches of the recipes for small images are too few.
FEWEST_PATCHES = 36


@dataclass(frozen=True)
class Patches:
    """How tokens lie on the image: prefix tokens first (class token, registers), then rows x columns patches.

    only_registers: whether the prefix holds no class token, as in models that answer by the mean patch.
    """

    prefix: int
    rows: int
    columns: int
    only_registers: bool = False

    @property
    def enough(self) -> bool:
        """Whether there are enough for a heat map to mean something."""
        return self.rows * self.columns >= FEWEST_PATCHES

    @property
    def whose(self) -> str:
        """Whose attention a map shows, in words."""
        return "the class token's" if self._class_token else "the patches', on average (there is no class token)"

    def laid_out(self, matrices: Tensor) -> Tensor:
        """The map [..., rows, columns] of matrices [..., N, N]: what the class token, token 0, takes from each patch.

        Without a class token, the mean over the patches that take; registers are none. What goes to the prefix tokens
        themselves is not on the map, so a map of A sums to less than 1.
        Raises ValueError where the tokens are not these.
        """
        tokens = self.prefix + self.rows * self.columns
        if matrices.shape[-2:] != (tokens, tokens):
            raise ValueError(
                f"a map of {self.rows} x {self.columns} patches and {self.prefix} prefix tokens is made of matrices "
                f"[..., {tokens}, {tokens}]: got {list(matrices.shape)}."
            )
        taken = matrices[..., 0, :] if self._class_token else matrices[..., self.prefix :, :].mean(-2)
        return taken[..., self.prefix :].unflatten(-1, (self.rows, self.columns))

    @property
    def _class_token(self) -> bool:
        return self.prefix > 0 and not self.only_registers


def patches_of(model: nn.Module, tokens: int) -> Patches:
    """How so many tokens of a vision transformer lie on its image.

    Read from what holds its blocks, `patch_embed.grid_size`, `num_prefix_tokens` and `cls_token` (None where there is
    none), as timm names them; or from a config with image_size and patch_size around it, as models of transformers
    have, where all tokens but the patches come first.
    Raises ValueError where neither is there, or there are fewer tokens than patches, so that no map can be drawn.
    """
    path = sites_to_look_into(model)[0].stack
    holder = model.get_submodule(path.rpartition(".")[0])
    grid = getattr(getattr(holder, "patch_embed", None), "grid_size", None)
    prefix = getattr(holder, "num_prefix_tokens", None)
    if grid is None or prefix is None:
        grid = _grid_of_config(model, path)
        prefix = tokens - grid[0] * grid[1]
    if min(grid) < 1 or prefix < 0:
        raise ValueError(
            f"{type(holder).__name__} does not say how its {tokens} tokens lie on the image (patch_embed.grid_size and "
            "num_prefix_tokens, as timm's vision transformers do, or a config with image_size and patch_size, as those "
            "of transformers), so there is no map of it."
        )
    only_registers = prefix > 0 and getattr(holder, "cls_token", prefix) is None
    return Patches(int(prefix), int(grid[0]), int(grid[1]), only_registers)


def _grid_of_config(model: nn.Module, path: str) -> tuple[int, int]:
    """Patches each way by the nearest config around a part of the model; (0, 0) where there is none."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        pixels, of_patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
        if isinstance(pixels, int) and isinstance(of_patch, int):
            return pixels // of_patch, pixels // of_patch
    return 0, 0
