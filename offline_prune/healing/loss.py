"""KL(teacher ‖ student) of the next token, by chunks of positions: vocabulary × length never lies whole in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

#: float32 (n, vocabulary) from the last hidden states (n, H).
Logits = Callable[[torch.Tensor], torch.Tensor]

#: Bytes that the logits of one chunk may take, with all that is computed from them.
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}
#: float32 tensors of a chunk's logits that are there at once: both models' logits and log-softmax, loss, gradient.
COPIES = 6


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """How many positions go through the output head together."""
    return max(1, CHUNK_BYTES[device.type] // (4 * COPIES * vocabulary))


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, student_logits: Logits, teacher_logits: Logits, chunk: int
) -> torch.Tensor:
    """Σ over positions of KL(teacher ‖ student) = Σ_v p_v · (log p_v − log q_v), in nats.

    Args:
        student, teacher: last hidden states (n, H) of the same n positions.
        chunk: positions at once.

    Returns:
        float64 scalar.
    """
    with torch.no_grad():
        parts = [
            _kl(student_logits(found), teacher_logits(expected)).double()
            for found, expected in zip(student.split(chunk), teacher.split(chunk), strict=True)
        ]
    return torch.stack(parts).sum()


def divergence_and_gradient(
    student: torch.Tensor, teacher: torch.Tensor, student_logits: Logits, teacher_logits: Logits, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`divergence`, and its gradient with respect to `student`: (n, H) in `student`'s type.

    The output heads themselves get no gradient.
    """
    sums, gradients = [], []
    for found, expected in zip(student.detach().split(chunk), teacher.split(chunk), strict=True):
        here = found.detach().requires_grad_()
        with torch.no_grad():
            target = teacher_logits(expected)
        with torch.enable_grad():
            loss = _kl(student_logits(here), target)
        gradients += torch.autograd.grad(loss, here)
        sums.append(loss.detach().double())
    return torch.stack(sums).sum(), torch.cat(gradients)


def _kl(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return nn.functional.kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True)
