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


def step_time_ratio(recipe: Recipe, arm: Arm, *, steps: int = STEPS) -> float:
    """Median seconds of a training step with the arm / with standard, to two decimals; never below 1.

    One thread, as every training of a comparison has; random images of the recipe's size, the recipe's batch.
    An arm that is no slower than standard gives 1: the control then is standard itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            images = torch.rand(recipe.batch_size, recipe.channels, recipe.image_size, recipe.image_size)
            labels = torch.randint(recipe.classes, (recipe.batch_size,))
            standard = build_model(recipe, 0)
            other = arm.apply(build_model(arm.recipe(recipe), 0))
            seconds = _in_turns([_Stepper(standard), _Stepper(other)], images, labels, steps)
    finally:
        torch.set_num_threads(threads)
    return max(1.0, round(seconds[1] / seconds[0], 2))


class _Stepper:
    def __init__(self, model: nn.Module):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        started = time.perf_counter()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def _in_turns(steppers: list[_Stepper], images: torch.Tensor, labels: torch.Tensor, steps: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in steppers]
    for count in range(WARM_UP + steps):
        for of_one, stepper in zip(seconds, steppers, strict=True):
            taken = stepper.step(images, labels)
            if count >= WARM_UP:
                of_one.append(taken)
    return [statistics.median(of_one) for of_one in seconds]
