"""How far a pruned model is from the one it was made from, by domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from offline_prune.calibration.context_length import context_length
from offline_prune.calibration.data import check_vocabulary
from offline_prune.checkpoint.dense_model import compared
from offline_prune.checkpoint.model_card import public_name, table
from offline_prune.checkpoint.verify import open_checkpoint
from offline_prune.evaluation.streamed import Logits, Progress, last_hidden, logits
from offline_prune.evaluation.texts import domains, require_texts
from offline_prune.model.loading import SourceModel
from offline_prune.runtime.device import pick_device
from offline_prune.runtime.versions import versions
from vllm_spense.checkpoint_files import read_object
from vllm_spense.conformance import read_annotated
from vllm_spense.errors import SpenseError
from vllm_spense.format import Annotation

#: At most so many logits of a model are there at once: 128 MiB.
MOST_LOGITS = 2**25


@dataclass(frozen=True)
class DomainLoss:
    """What pruning cost on one text.

    Attributes:
        sequences, length: of the text, in tokens; every sequence is predicted on its own, from its second token on.
        perplexity_model, perplexity_pruned: exp of the mean negative log-likelihood of each next token.
        kl: mean over the positions of KL(MODEL ‖ PRUNED) of the next token, in nats.
        top1_agreement: share of the positions where both find the same token most likely.
    """

    domain: str
    sequences: int
    length: int
    perplexity_model: float
    perplexity_pruned: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Evaluation:
    """A whole comparison; `to_dict` is what `spense evaluate --json` writes.

    Attributes:
        method: PRUNED's, as its annotation names it; None for a checkpoint that Spense did not prune.
        device: kind of device that computed.
    """

    model: str
    pruned: str
    method: str | None
    device: str
    domains: tuple[DomainLoss, ...]
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    pruned: str,
    against: str,
    texts: Sequence[Path] = (),
    samples: int = 32,
    length: int = 512,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Compares two models block by block; each passes over all texts once.

    Activations are not rounded to FP8, as a server does; weights stored in FP8 are multiplied by their scales.

    Args:
        pruned: a Spense checkpoint; or a plain or FP8 one, for a comparison with it.
        against: the model that it was made from; folder or hub name, as `pruned` is.
        texts: files or folders, each a domain; none for the built-in held-out texts.
        samples, length: at most so many sequences of so many tokens of each text; a length beyond MODEL's context is
            cut to it.
        progress: told about every block of both models.
        say: told what a person should know.

    Raises:
        SpenseError: no such model, models that differ in more than their weights, a text without one whole sequence.
    """
    if samples < 1 or length < 2:
        raise SpenseError(f"--samples, --length: found {samples}, {length}, expected at least 1 and 2")
    require_texts(texts)
    place = pick_device(device)
    dense = SourceModel(against, trust_remote_code, as_stored=True)
    sparse = SourceModel(pruned, trust_remote_code, as_stored=True)
    annotation = _annotation(sparse, say)
    _require_alike(sparse, dense)
    context = context_length(dense.text.config)
    if context is not None and length > context:
        say(f"sequences of {context} tokens instead of {length}, because the model's context is {context}")
        length = context
    found = domains(texts, dense.tokenizer, samples, length, say)
    tokens = torch.cat(list(found.values()))
    check_vocabulary(tokens, cast(nn.Embedding, dense.text.get_input_embeddings()).num_embeddings)
    blocks = len(dense.blocks)
    expected = last_hidden(dense, tokens, place, lambda done, _, name: progress(done, 2 * blocks, name))
    actual = last_hidden(sparse, tokens, place, lambda done, _, name: progress(blocks + done, 2 * blocks, name))
    losses = []
    with logits(dense, tokens, expected) as of_model, logits(sparse, tokens, actual) as of_pruned:
        first = 0
        for name, mine in found.items():
            losses.append(_loss(name, mine, first, of_model, of_pruned))
            first += len(mine)
    return Evaluation(against, pruned, annotation.method if annotation else None, place.type, tuple(losses))


def _annotation(model: SourceModel, say: Callable[[str], None]) -> Annotation | None:
    """What Spense wrote about a checkpoint, if it did; the checkpoint is checked against it.

    Raises:
        FormatError: files that break the format.
    """
    if read_annotated(model.folder, read_object(model.folder / "config.json")) is None:
        say(f"{model.folder}: not a Spense checkpoint; it is compared as it is")
        return None
    return open_checkpoint(model.folder).annotation


def _require_alike(pruned: SourceModel, model: SourceModel) -> None:
    """Raises SpenseError for two models whose predictions cannot be compared, or are not of one architecture."""
    of_pruned, of_model = map(_described, (pruned, model))
    for what, found in of_pruned.items():
        if found != of_model[what]:
            raise SpenseError(
                f"{pruned.folder}: {what}: found {found}, expected {of_model[what]} as {model.folder} has; PRUNED must "
                "be made from MODEL"
            )
    if pruned.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise SpenseError(
            f"{pruned.folder}: found another vocabulary in its tokenizer than {model.folder} has; expected the same"
        )


def _described(model: SourceModel) -> dict[str, object]:
    embedding = cast(nn.Embedding, model.text.get_input_embeddings())
    return {
        "architecture": type(model.skeleton).__name__,
        "decoder blocks": len(model.blocks),
        "hidden size": embedding.embedding_dim,
        "vocabulary": embedding.num_embeddings,
    }


def _loss(name: str, tokens: torch.Tensor, first: int, of_model: Logits, of_pruned: Logits) -> DomainLoss:
    """Compares the logits a few positions at a time.

    Args:
        tokens: int64 (n, length).
        first: number of its first sequence among those that the logits are of.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    n, length = tokens.shape
    step = max(1, min(length - 1, MOST_LOGITS // of_model(first, 0, 1).shape[-1]))
    for sequence in range(n):
        for start in range(0, length - 1, step):
            stop = min(start + step, length - 1)
            found, expected = (of(first + sequence, start, stop)[0].log_softmax(-1) for of in (of_pruned, of_model))
            totals += compared(found, expected, tokens[sequence, start + 1 : stop + 1].to(expected.device))
    loss_pruned, loss_model, kl, same = (totals / (n * (length - 1))).tolist()
    return DomainLoss(name, n, length, math.exp(loss_model), math.exp(loss_pruned), kl, same)


def card_section(evaluation: Evaluation) -> list[str]:
    """Markdown for the pruned model's card; nothing in it says when or in which folders it was measured."""
    rows = [
        (
            loss.domain,
            f"{loss.sequences} × {loss.length}",
            f"{loss.perplexity_model:.3f}",
            f"{loss.perplexity_pruned:.3f}",
            f"{loss.kl:.4f}",
            f"{loss.top1_agreement:.2%}",
        )
        for loss in evaluation.domains
    ]
    said = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    return [
        "## What pruning cost",
        "",
        *table(["text", "tokens", "perplexity, original", "perplexity, pruned", "KL, nats", "same top token"], rows),
        "",
        f"`spense evaluate` against `{public_name(evaluation.model, Path(evaluation.model))}` ({evaluation.device}, "
        f"{said}). KL is KL(original ‖ pruned) of the next token, the mean over positions.",
    ]
