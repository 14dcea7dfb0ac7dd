"""On what a training runs: precision, devices, nodes and strategy are Lightning's; processes are started by torchrun.

It decides no number of a training but its rounding, and where several processes draw dropout, each draws its own.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from twicing.training.language_recipe import LanguageRecipe
from twicing.training.protocol import Recipe

PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
ACCELERATORS = ("cpu", "auto", "gpu", "cuda", "mps")
STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class Hardware:
    """devices: processes on this machine, one each; "auto" is as many as torchrun started, one without it.

    workers: processes of each that read and augment images; 0 does it in between.
    Raises ValueError for what Lightning does not take, and where another number of processes was started.
    """

    precision: str = "32-true"
    devices: str = "auto"
    accelerator: str = "cpu"
    num_nodes: int = 1
    strategy: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("accelerator", ACCELERATORS), ("strategy", STRATEGIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}: got {getattr(self, name)!r}.")
        if self.devices != "auto" and not (self.devices.isdecimal() and int(self.devices) > 0):
            raise ValueError(f'--devices must be "auto" or a number from 1 on: got {self.devices!r}.')
        if self.num_nodes < 1:
            raise ValueError(f"--num-nodes must be 1 or larger: got {self.num_nodes}.")
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 or larger: got {self.workers}.")
        if self.accelerator == "cpu" and self.precision in ("16-mixed", "16-true"):
            # Lightning would take bf16 instead, with a warning that nobody reads.
            raise ValueError(f"--precision {self.precision} needs a GPU: on the CPU take bf16-mixed or 32-true.")
        if self.accelerator == "cpu" and self.strategy == "fsdp":
            raise ValueError("--strategy fsdp needs GPUs: on the CPU take ddp.")

    @property
    def processes_here(self) -> int:
        """Processes on this machine."""
        return _started_here() if self.devices == "auto" else int(self.devices)

    def check_processes(self) -> None:
        """Raise ValueError unless torchrun, or whoever started this process, started as many as are meant."""
        here, everywhere = _started_here(), int(os.environ.get("WORLD_SIZE", "1"))
        wanted = self.processes_here
        if (here, everywhere) != (wanted, wanted * self.num_nodes):
            nodes = f" --nnodes {self.num_nodes}" if self.num_nodes > 1 else ""
            raise ValueError(
                f"{wanted * self.num_nodes} processes were asked for and {everywhere} started: start the command by "
                f"torchrun{nodes} --nproc-per-node {wanted} -m twicing ..., with --devices and --num-nodes to match."
            )

    def trainer_options(self) -> dict[str, Any]:
        """The same as lightning.Trainer takes it."""
        return {
            "precision": self.precision,
            "devices": self.processes_here,
            "accelerator": self.accelerator,
            "num_nodes": self.num_nodes,
            "strategy": self._lightning_strategy(),
        }

    def _lightning_strategy(self) -> Any:
        if self.strategy != "fsdp":
            return "ddp" if self.strategy == "auto" and self.processes_here * self.num_nodes > 1 else self.strategy
        from lightning.pytorch.strategies import FSDPStrategy

        # One file with all weights, so that a checkpoint is read the same way wherever it was written.
        return FSDPStrategy(state_dict_type="full", use_orig_params=True)


# Language models up to this width are those made for a CPU.
SMALL_WIDTH = 64


def default_hardware(recipe: Recipe | LanguageRecipe) -> Hardware:
    """The CPU for small images in memory and small texts, where a GPU would mostly wait; else a GPU if there is one.

    Images in files are read by worker processes.
    """
    if isinstance(recipe, LanguageRecipe):
        return Hardware() if recipe.width <= SMALL_WIDTH else Hardware(accelerator="auto")
    if not recipe.reads_files:
        return Hardware()
    return Hardware(accelerator="auto", workers=min(8, (os.cpu_count() or 1) - 1))


def process_rank() -> int:
    """The number of this process among all of a training, from 0; only 0 writes files."""
    return int(os.environ.get("RANK", "0"))


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given: a GPU is still at work when its calls return."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _started_here() -> int:
    everywhere = os.environ.get("WORLD_SIZE", "1")
    return int(os.environ.get("LOCAL_WORLD_SIZE", everywhere))
