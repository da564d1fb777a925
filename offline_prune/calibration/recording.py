"""What a model's own code calls its decoder blocks with: hidden states, masks, positions, and more."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from offline_prune.calibration.kept_arguments import kept, restored
from offline_prune.model.loading import SourceModel
from offline_prune.runtime.matmul_precision import fast_matmul
from vllm_spense.errors import SpenseError, first_line

#: An uninitialized tensor (samples, length, width) where hidden states are kept.
Room = Callable[[int], torch.Tensor]
#: Makes logits (1, n, vocabulary) of n tokens, int64 (1, n), and what the last block returned for them, as it returned
#: it. What follows the blocks looks at each position alone, so any positions may come together.
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: What a multimodal model is called with for one sequence: `input_ids`, pixels, and what else its processor makes.
Inputs = dict[str, torch.Tensor]
#: Sequence that begins with images → makes its inputs.
ImageInputs = Mapping[int, Callable[[], Inputs]]
#: Makes of hidden states what a block returns.
_Form = Callable[[torch.Tensor], Any]

#: By how much a sum may miss what it should be, relative to the largest number: BF16 has eight bits.
_SUM_ERROR = 2e-2
#: What models' code expects of a block: the hidden states, or a tuple that begins with them.
_FORMS: tuple[_Form, ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
    lambda hidden: (hidden, None, None, None),
)


@dataclass
class Arguments:
    """What each block is called with beside the hidden states.

    Attributes:
        streams: how many hidden states a token has at once, in a dimension before the sequences (Gemma 3n); 0 for
            one without that dimension.
        common: of each block by name, what is the same whatever the text: masks, positions, settings. Made for one
            sequence.
        own: of each block by name, what depends on the tokens, (samples, length, …), such as Gemma's inputs of each
            layer.
        passed: names of mappings that blocks leave something in for later blocks.
        seeing: sequence that begins with images → of each block, what takes the place of `common` there: positions and
            masks of images are their own.
        added: block, sequence → rows of the hidden states, int64 (n,), and what the model adds to them in front of the
            block, (n, H): features of images (Qwen3-VL).
    """

    device: torch.device
    streams: int
    common: list[dict[str, Any]]
    own: list[dict[str, torch.Tensor]]
    passed: dict[str, Callable[[], MutableMapping[Any, Any]]]
    seeing: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    added: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _left: dict[tuple[int, int], dict[str, MutableMapping[Any, Any]]] = field(default_factory=dict)

    def of(self, index: int, sequences: slice) -> dict[str, Any]:
        own = {name: tensor[sequences].to(self.device) for name, tensor in self.own[index].items()}
        place = sequences.start, sequences.stop
        if self.passed and place not in self._left:
            self._left[place] = {name: make() for name, make in self.passed.items()}
        left = {name: each for name, each in self._left.get(place, {}).items() if name in self.common[index]}
        return {**self._common(index, sequences.start), **own, **left}

    def _common(self, index: int, sequence: int) -> dict[str, Any]:
        if sequence not in self.seeing:
            return self.common[index]
        return {name: restored(value, self.device) for name, value in self.seeing[sequence][index].items()}

    def of_units(
        self, index: int, chosen: torch.Tensor, units: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, Any]:
        own = {
            name: units(tensor).index_select(0, chosen.to(tensor.device)).to(self.device)
            for name, tensor in self.own[index].items()
        }
        return {**self.common[index], **own}


class _Recorder(nn.Module):
    """Stands for a decoder block while the model's own code prepares what blocks are called with.

    It returns the hidden states it is given, or `output`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # In a tuple, so that it does not become a submodule.
        self._signature = inspect.signature(block.forward)
        self.form: _Form = _FORMS[0]
        self.output: torch.Tensor | None = None
        self.zeros = False
        self.hidden: Any = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs).arguments
        first = next(iter(self._signature.parameters))
        self.hidden = bound.pop(first)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        self.kwargs = bound
        returned = self.hidden if self.output is None else self.output
        return self.form(torch.zeros_like(returned) if self.zeros else returned)


def record(
    model: SourceModel,
    tokens: torch.Tensor,
    batches: list[slice],
    device: torch.device,
    dtype: torch.dtype,
    room: Room,
    images: ImageInputs = MappingProxyType({}),
) -> tuple[torch.Tensor, Arguments]:
    """Runs the model's code around its blocks.

    Args:
        tokens: int64 (samples, length).
        batches: sequences that go through the model at once; those that begin with images go alone.
        room: where the hidden states, and other arguments that depend on the tokens, are kept.
        images: sequences that the whole multimodal model is run on, vision tower and all, in place of their tokens.

    Returns:
        The first block's input (samples, length, H), `packed` if a token has several, and all blocks' other arguments.

    Raises:
        SpenseError: the model calls its blocks in a way that cannot be repeated block by block.
    """
    with _recorders(model, device, dtype, whole=bool(images)) as (text, recorders):
        one = tokens[:1].to(device)
        _find_form(model, text, recorders, one)
        common = [dict(recorder.kwargs) for recorder in recorders]
        passed: dict[str, Callable[[], MutableMapping[Any, Any]]] = {
            name: type(value)
            for kwargs in common
            for name, value in kwargs.items()
            if isinstance(value, MutableMapping) and not value
        }
        # Other tokens of the same number: what is different now depends on them.
        _run(text, (one + 1) % (int(tokens.max()) + 1))
        depends = [_differing(model, i, common[i], recorder.kwargs) for i, recorder in enumerate(recorders)]
        streams = len(recorders[0].hidden) if recorders[0].hidden.ndim > 3 else 0
        hidden = room(max(1, streams) * recorders[0].hidden.shape[-1])
        own: list[dict[str, torch.Tensor]] = [{} for _ in recorders]
        arguments = Arguments(device, streams, common, own, passed)
        for batch in batches:
            if batch.start in images:
                _see(model, recorders, images[batch.start](), batch.start, arguments, depends)
            else:
                _run(text, tokens[batch].to(device))
            hidden[batch].copy_(packed(recorders[0].hidden, streams), non_blocking=True)
            rooms: dict[int, torch.Tensor] = {}
            for mine, names, recorder in zip(own, depends, recorders, strict=True):
                for name in names:
                    value = recorder.kwargs[name]
                    # Blocks that are all given the same tensor share the room for it.
                    if name not in mine:
                        mine[name] = rooms[id(value)] if id(value) in rooms else room(value.shape[-1])
                    if id(value) not in rooms:
                        mine[name][batch].copy_(value, non_blocking=True)
                    rooms[id(value)] = mine[name]
        for kwargs, names in zip(common, depends, strict=True):
            for name in names:
                del kwargs[name]
    return hidden, arguments


def _see(
    model: SourceModel,
    recorders: list[_Recorder],
    inputs: Inputs,
    sequence: int,
    arguments: Arguments,
    depends: list[list[str]],
) -> None:
    """Runs the whole model on a sequence with images, and keeps what is its own: `seeing`, `added`.

    Of a block that returns zeros the next one gets what the model adds in between.

    Raises:
        SpenseError: the model cannot read the inputs, or does something else than add between two blocks.
    """
    whole, device = model.skeleton.base_model, arguments.device
    dtype = recorders[0].hidden.dtype
    here = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}

    def run(zeros: bool) -> list[torch.Tensor]:
        for recorder in recorders:
            recorder.zeros = zeros
        try:
            with torch.inference_mode():
                whole(**here, use_cache=False)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, KeyError) as error:
            raise SpenseError(f"{type(whole).__name__}: it cannot be run on images: {first_line(error)}") from error
        finally:
            for recorder in recorders:
                recorder.zeros = False
        return [recorder.hidden for recorder in recorders]

    through = run(zeros=False) if not arguments.seeing else []
    added = run(zeros=True)
    for i in range(1, len(through)):
        # Two runs of a vision tower on a GPU may not agree to the bit.
        error = (through[i] - through[i - 1] - added[i]).abs().max()
        if error > _SUM_ERROR * through[i].abs().max():
            raise SpenseError(
                f"{model.blocks[i].name}: {type(whole).__name__} changes the hidden states of images in front of it; "
                "expected at most a sum"
            )
    for i in range(1, len(added)):
        more = packed(added[i], arguments.streams)[0]
        rows = more.any(dim=-1).nonzero()[:, 0]
        if len(rows):
            arguments.added[i, sequence] = rows.cpu(), more[rows].cpu()
    known: dict[int, Any] = {}
    arguments.seeing[sequence] = [
        {name: kept(value, known) for name, value in recorder.kwargs.items() if name not in names}
        for recorder, names in zip(recorders, depends, strict=True)
    ]


@contextmanager
def head(model: SourceModel, device: torch.device, dtype: torch.dtype, gradients: bool = False) -> Iterator[Head]:
    """Inside, all of the model but its blocks is in memory, and makes logits of what the last block returns.

    It is the model's own code that does, so norms, scales and soft-capping of logits are its own.

    Args:
        gradients: logits have some, of the hidden states.

    Raises:
        SpenseError: the model has no output head.
    """
    if model.head_name is None:
        raise SpenseError(
            f"{model.folder}: {type(model.skeleton).__name__} has no output head, so it predicts no token"
        )
    with _recorders(model, device, dtype) as (text, recorders):
        _find_form(model, text, recorders, torch.zeros(1, 2, dtype=torch.int64, device=device))
        model.load(model.head_name, device, dtype)

        def logits(tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            recorders[-1].output = hidden
            with torch.inference_mode(not gradients), fast_matmul():
                return model.skeleton(input_ids=tokens.to(device), use_cache=False).logits

        try:
            yield logits
        finally:
            model.unload(model.head_name)


def packed(hidden: torch.Tensor, streams: int) -> torch.Tensor:
    """Hidden states as they are kept: several of a token, (streams, n, length, H), become (n, length, streams · H)."""
    return hidden.permute(1, 2, 0, 3).flatten(2) if streams else hidden


def unpacked(hidden: torch.Tensor, streams: int) -> torch.Tensor:
    """The opposite of `packed`: hidden states as blocks take them."""
    return hidden.unflatten(-1, (streams, -1)).permute(2, 0, 1, 3) if streams else hidden


def _run(text: nn.Module, tokens: torch.Tensor) -> Any:
    with torch.inference_mode():
        return text(input_ids=tokens, use_cache=False)


def _find_form(model: SourceModel, text: nn.Module, recorders: list[_Recorder], tokens: torch.Tensor) -> None:
    """Finds out what the model's code expects a block to return: with anything else, later blocks get no hidden states.

    Raises:
        SpenseError: no form works.
    """
    reason = ""
    for form in _FORMS:
        for recorder in recorders:
            recorder.form, recorder.hidden = form, None
        try:
            output = _run(text, tokens)[0]
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, KeyError, AssertionError) as error:
            reason = reason or first_line(error)
            continue
        missed = [i for i, recorder in enumerate(recorders) if recorder.hidden is None]
        if missed and len(missed) < len(recorders):
            name = model.blocks[missed[0]].name
            raise SpenseError(f"{name}: the model does not run this block on text; expected all blocks to run on it")
        shape = getattr(recorders[0].hidden, "shape", None)
        if shape is None or getattr(output, "shape", (None,))[:2] != tokens.shape:
            continue
        if any(getattr(recorder.hidden, "shape", None) != shape for recorder in recorders):
            continue
        if shape[-3:-1] != tokens.shape or len(shape) > 4:
            raise SpenseError(
                f"{model.blocks[0].name}: found hidden states of shape {tuple(shape)}, expected (sequences, length, H)"
            )
        return
    raise SpenseError(
        f"{type(text).__name__}: its code cannot be run around its blocks{': ' if reason else ''}{reason}; expected "
        "blocks that take hidden states and return them, alone or first in a tuple"
    )


def _differing(model: SourceModel, index: int, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of arguments that are not the same for two texts.

    Raises:
        SpenseError: one that is not a tensor (sequences, length, …).
    """
    names = [name for name in before if not _same(before[name], after[name])]
    for name in names:
        value = before[name]
        if not isinstance(value, torch.Tensor) or value.ndim != 3:
            raise SpenseError(
                f"{model.blocks[index].name}: its argument {name} depends on the text and is no tensor (sequences, "
                "length, width); blocks that take such arguments are not pruned"
            )
    return names


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return True


@contextmanager
def _recorders(
    model: SourceModel, device: torch.device, dtype: torch.dtype, whole: bool = False
) -> Iterator[tuple[nn.Module, list[_Recorder]]]:
    """The language model with its embeddings loaded and a recorder in place of every block.

    Args:
        whole: with the rest of the multimodal model around it loaded too.
    """
    names = [block.name for block in model.blocks]
    parent = model.module(names[0].rpartition(".")[0])
    assert isinstance(parent, nn.ModuleList)
    originals = list(parent)
    recorders = [_Recorder(block) for block in originals]
    with model.outside_blocks(device, dtype, whole) as text:
        for i, recorder in enumerate(recorders):
            parent[i] = recorder
        try:
            yield text, recorders
        finally:
            for i, block in enumerate(originals):
                parent[i] = block
