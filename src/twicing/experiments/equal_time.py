"""How many times as long as standard's a training step of an arm takes: what `standard-equal-time` goes by.

Measured once before a comparison, the two in turns, so that whatever else the machine does slows both alike.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from twicing.experiments.arms import Arm
from twicing.experiments.plan import AnyRecipe
from twicing.experiments.programmes import programme_of
from twicing.experiments.results import BASELINE
from twicing.training.hardware import wait_for

WARM_UP, STEPS = 3, 21


def step_time_ratio(
    recipe: AnyRecipe,
    arm: Arm,
    *,
    steps: int = STEPS,
    data_dir: Path | None = None,
    device: torch.device | None = None,
    precision: str = "32-true",
) -> float:
    """Median seconds of a training step with the arm / with standard, to two decimals; never below 1.

    On the CPU with one thread, as every training of a comparison has it there; on random inputs of the recipe's size.
    data_dir: where the data are, should they decide the model's size. device: what trainings run on, by default the
    CPU. precision: theirs, as Lightning calls it; where it is that of the weights too, fp32 is timed.
    An arm that is no slower than standard gives 1: the control then is standard itself.
    """
    device = device or torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build, loss = programme_of(recipe).timed(recipe, data_dir, device)
            standard = Arm(BASELINE, BASELINE, "all", "").apply(build(recipe), recipe.baseline).to(device)
            other = arm.apply(build(arm.recipe(recipe)), recipe.baseline).to(device)
            mixed = torch.autocast(
                device.type,
                torch.bfloat16 if precision.startswith("bf16") else torch.float16,
                enabled=precision.endswith("mixed"),
            )
            seconds = _in_turns([_Stepper(standard, loss, mixed), _Stepper(other, loss, mixed)], device, steps)
    finally:
        torch.set_num_threads(threads)
    return max(1.0, round(seconds[1] / seconds[0], 2))


class _Stepper:
    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], torch.Tensor], mixed: torch.autocast):
        self.model, self.loss, self.mixed = model.train(), loss, mixed
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, device: torch.device) -> float:
        wait_for(device)
        started = time.perf_counter()
        with self.mixed:
            loss = self.loss(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait_for(device)
        return time.perf_counter() - started


def _in_turns(steppers: list[_Stepper], device: torch.device, steps: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in steppers]
    for count in range(WARM_UP + steps):
        for of_one, stepper in zip(seconds, steppers, strict=True):
            taken = stepper.step(device)
            if count >= WARM_UP:
                of_one.append(taken)
    return [statistics.median(of_one) for of_one in seconds]
