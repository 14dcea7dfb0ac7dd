"""The device that --device of evaluate, diagnose and analyze names."""

import torch


def chosen_device(name: str) -> torch.device:
    """cpu, cuda, or auto, which is a GPU where there is one.

    Raises ValueError for other names, and for cuda without a GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is cpu, cuda or auto: got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; use cpu.")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")
