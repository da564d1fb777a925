"""The file beside a checkpoint's weights that says how the pruner reordered each MLP's intermediate indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_spense.checkpoint_files import read_headers
from vllm_spense.errors import FormatError
from vllm_spense.format import PERMUTATION, Annotation

_DTYPE = "I32"


def read_permutations(folder: Path, annotation: Annotation) -> dict[str, torch.Tensor] | None:
    """How each pruned module was reordered.

    Returns:
        Module → int64 (I,), the original index of each intermediate index; what holds the experts of a layer → (E, I).
        None for a checkpoint without the file.

    Raises:
        FormatError: the file is damaged, it has not exactly the annotation's modules, or a tensor of it is no
            permutation of 0 … I − 1.
    """
    file = folder / PERMUTATION
    if not file.exists():
        return None
    headers = read_headers([file])
    expected_names = {*annotation.modules, *annotation.experts}
    if headers.keys() != expected_names:
        raise FormatError(
            "other modules than the annotation's",
            file=file,
            key="modules",
            found=sorted(headers.keys() - expected_names) or "nothing more",
            expected=sorted(expected_names - headers.keys()) or "nothing more",
        )
    for module, header in headers.items():
        size = annotation.regions(module).intermediate
        expected = _DTYPE, (annotation.experts[module], size) if module in annotation.experts else (size,)
        if (header.dtype, header.shape) != expected:
            raise FormatError(
                "wrong type or shape", file=file, layer=module, found=(header.dtype, header.shape), expected=expected
            )
    permutations = {module: order.long() for module, order in load_file(file).items()}
    for module, order in _each(permutations):
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise FormatError(
                "not a permutation",
                file=file,
                layer=module,
                found=f"{len(order.unique())} different indices, from {order.min()} to {order.max()}",
                expected=f"each of 0 to {len(order) - 1} once",
            )
    return permutations


def _each(permutations: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for module, order in permutations.items():
        if order.ndim == 1:
            yield module, order
        else:
            yield from ((f"{module}.{expert}", each) for expert, each in enumerate(order))
