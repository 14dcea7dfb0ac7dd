"""What the worst case of a linear model is, in closed form: the truth that attacks are measured against."""

import torch
from torch import nn


def two_classes(linear_model, images, labels, first=3, second=8):
    """The linear model and the digits cut to two classes, where FGSM is the optimal attack."""
    kept = (labels == first) | (labels == second)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2).double()).eval()
    with torch.no_grad():
        model[1].weight.copy_(linear_model[1].weight[[first, second]])
        model[1].bias.copy_(linear_model[1].bias[[first, second]])
    return model, images[kept], (labels[kept] == second).long()


def worst_margins(model, images, labels, eps):
    """min over the ball and the pixel range of z_y - z_j, for every j: [n, classes], exact for a linear model."""
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    difference = weight[labels].unsqueeze(1) - weight
    x = images.flatten(1).unsqueeze(1)
    worst = torch.where(difference > 0, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
    margins = (difference * worst).sum(2) + bias[labels].unsqueeze(1) - bias
    return margins.scatter(1, labels.unsqueeze(1), torch.inf)


def smallest_eps(model, images, labels):
    """The smallest eps that fools a two-class linear model, margin / |w_y - w_j|_1, [n]; 0 where it is wrong already.

    Away from the bounds only: images must not come within eps of them.
    """
    weight = model[1].weight.detach()
    logits = model(images).detach()
    margin = logits.gather(1, labels.unsqueeze(1)) - logits.gather(1, 1 - labels.unsqueeze(1))
    return margin.squeeze(1).clamp(min=0) / (weight[0] - weight[1]).abs().sum()
