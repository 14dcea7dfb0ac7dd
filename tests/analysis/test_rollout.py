"""Attention rollout, against the definition written out, and what it keeps."""

import pytest
import torch

from twicing.analysis.rollout import rollout


def layers(count, heads=2, tokens=5):
    return [torch.rand(3, heads, tokens, tokens, dtype=torch.float64).softmax(-1) for _ in range(count)]


def test_it_is_the_product_of_averaged_layers():
    matrices = layers(3)
    expected = torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    for matrix, rolled in zip(matrices, rollout(matrices), strict=True):
        half = torch.zeros(3, 5, 5, dtype=torch.float64)
        for image in range(3):
            for i in range(5):
                for j in range(5):
                    half[image, i, j] = 0.5 * (matrix[image, 0, i, j] + matrix[image, 1, i, j]) / 2 + 0.5 * (i == j)
        expected = half @ expected
        torch.testing.assert_close(rolled, expected)
        torch.testing.assert_close(rolled.sum(-1), torch.ones(3, 5, dtype=torch.float64))


def test_twiced_matrices_keep_the_sum_and_may_be_negative():
    sharp = [torch.rand(1, 6, 6, dtype=torch.float64).mul(40).softmax(-1) for _ in range(2)]
    twiced = [2 * matrix - matrix @ matrix for matrix in sharp]
    rolled = rollout(twiced)[-1]
    torch.testing.assert_close(rolled.sum(-1), torch.ones(6, dtype=torch.float64))
    assert rolled.min() < 0


def test_a_token_that_attends_to_nothing_stays_itself():
    matrix = torch.full((1, 3, 3), 1 / 3)
    matrix[:, 1] = 0
    assert rollout([matrix, matrix])[-1][1].tolist() == [0, 1, 0]


def test_attention_to_oneself_changes_nothing():
    identity = torch.eye(4).expand(2, 4, 4)
    for rolled in rollout([identity] * 5):
        torch.testing.assert_close(rolled, torch.eye(4))


def test_what_cannot_be_rolled_out_is_refused():
    with pytest.raises(ValueError, match="got none"):
        rollout([])
    with pytest.raises(ValueError, match=r"with heads.*\[4, 4\]"):
        rollout([torch.eye(4)])
