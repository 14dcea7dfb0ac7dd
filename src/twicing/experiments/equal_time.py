"""How many times as long as standard's a training step of an arm takes: what `standard-equal-time` goes by.

Measured once before a comparison, the two in turns, so that whatever else the machine does slows both alike.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from twicing.experiments.arms import Arm
from twicing.training.classification import build_model
from twicing.training.recipe import Recipe

WARM_UP, STEPS = 3, 21
# A larger batch takes as much longer in either arm, and minutes on a CPU.
MOST_IMAGES = 32


def step_time_ratio(recipe: Recipe, arm: Arm, *, steps: int = STEPS, device: torch.device | None = None) -> float:
    """Median seconds of a training step with the arm / with standard, to two decimals; never below 1.

    On the CPU with one thread, as every training of a comparison has it there; random images of the recipe's size, at
    most 32 of them. device: what trainings run on, the CPU by default.
    An arm that is no slower than standard gives 1: the control then is standard itself.
    """
    device = device or torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            count = min(recipe.batch_size, MOST_IMAGES) if device.type == "cpu" else recipe.batch_size
            images = torch.rand(count, recipe.channels, recipe.image_size, recipe.image_size, device=device)
            labels = torch.randint(recipe.classes, (count,), device=device)
            standard = build_model(recipe, 0).to(device)
            other = arm.apply(build_model(arm.recipe(recipe), 0)).to(device)
            seconds = _in_turns([_Stepper(standard), _Stepper(other)], images, labels, steps)
    finally:
        torch.set_num_threads(threads)
    return max(1.0, round(seconds[1] / seconds[0], 2))


class _Stepper:
    def __init__(self, model: nn.Module):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        _wait_for(images.device)
        started = time.perf_counter()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait_for(images.device)
        return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    # A GPU is still at work when its call returns.
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_turns(steppers: list[_Stepper], images: torch.Tensor, labels: torch.Tensor, steps: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in steppers]
    for count in range(WARM_UP + steps):
        for of_one, stepper in zip(seconds, steppers, strict=True):
            taken = stepper.step(images, labels)
            if count >= WARM_UP:
                of_one.append(taken)
    return [statistics.median(of_one) for of_one in seconds]
