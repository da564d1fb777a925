"""The divergence by chunks against the whole one."""

from __future__ import annotations

import torch
from torch import nn

from offline_prune.healing.loss import divergence, divergence_and_gradient

N, H, V = 13, 8, 40


def test_chunks_give_what_the_whole_gives() -> None:
    student, teacher = torch.randn(N, H, dtype=torch.float64), torch.randn(N, H, dtype=torch.float64)
    heads = [torch.randn(V, H, dtype=torch.float64) for _ in range(2)]
    logits = [lambda x, head=head: x @ head.T for head in heads]
    whole = student.clone().requires_grad_()
    p, q = (logits[1](teacher)).softmax(-1), (logits[0](whole)).softmax(-1)
    expected = (p * (p.log() - q.log())).sum()
    (gradient,) = torch.autograd.grad(expected, whole)
    for chunk in (1, 5, N, 100):
        found, slope = divergence_and_gradient(student, teacher, *logits, chunk)
        torch.testing.assert_close(found, expected.detach())
        torch.testing.assert_close(slope, gradient)
        torch.testing.assert_close(divergence(student, teacher, *logits, chunk), expected.detach())


def test_heads_get_no_gradient() -> None:
    head = nn.Linear(H, V)
    divergence_and_gradient(torch.randn(N, H), torch.randn(N, H), head, head, 4)
    assert head.weight.grad is None
