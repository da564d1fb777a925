"""Whether an MLP of vLLM is plainly down(SiluAndMul(gate_up(x))), found out by running its own code.

gate_up may hand raw sums to the activation, and that FP8 to down, only where nothing else reads either. Hundreds of
models have their own MLP or another's, so there is no list of them: the MLP's `forward` runs with opaque tokens in
place of tensors. A token can be handed on and nothing else: whatever the code does with it beside that raises.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

logger = logging.getLogger("vllm.spense")


def is_plain(mlp: nn.Module | None, gate_up: nn.Module, activation: type[nn.Module]) -> bool:
    """Whether there is no `reason_against` it; if there is one, it is logged once for each class."""
    reason = reason_against(mlp, gate_up, activation)
    if reason:
        _say(type(mlp).__name__, reason)
    return reason is None


def reason_against(mlp: nn.Module | None, gate_up: nn.Module, activation: type[nn.Module]) -> str | None:
    """Why an MLP is not down(activation(gate_up(x))) with a gate_up without bias; None if it is.

    Args:
        mlp: that `gate_up` is in, with its submodules built; it is not changed.
        activation: the class of the activation.
    """
    if mlp is None:
        return "nothing is known of the module that gate_up is in"
    children = dict(mlp.named_children())
    gate_ups = [name for name, child in children.items() if child is gate_up]
    activations = [name for name, child in children.items() if type(child) is activation]
    downs = [name for name, child in children.items() if _split(child) == "input"]
    if not len(gate_ups) == len(activations) == len(downs) == 1:
        return f"its modules are {', '.join(f'{name} ({type(child).__name__})' for name, child in children.items())}"
    (up_name,), (activation_name,), (down_name,) = gate_ups, activations, downs
    down = children[down_name]
    if not (isinstance(gate_up, ColumnParallelLinear) and isinstance(down, RowParallelLinear)):
        return f"{up_name} is a {type(gate_up).__name__}, {down_name} a {type(down).__name__}"
    if gate_up.gather_output or not down.input_is_parallel:
        return "ranks exchange what is between gate_up and down"
    if getattr(gate_up, "bias", None) is not None:
        return "gate_up has a bias"
    x, sums, activated, out = (Token(of) for of in ("x", up_name, activation_name, down_name))
    calls: list[tuple[str, object]] = []

    def recorder(name: str, module: nn.Module, result: Token) -> nn.Module:
        def forward(given: object) -> object:
            calls.append((name, given))
            return (result, None) if getattr(module, "return_bias", name != activation_name) else result

        return _replica(module, forward=forward)

    recorders = {
        up_name: recorder(up_name, gate_up, sums),
        activation_name: recorder(activation_name, children[activation_name], activated),
        down_name: recorder(down_name, down, out),
    }
    try:
        returned = _replica(mlp, _modules={**mlp._modules, **recorders})(x)
    except Exception as error:  # Whatever the code of a model raises.
        return f"its code does more: {type(error).__name__}: {error}"
    if calls != [(up_name, x), (activation_name, sums), (down_name, activated)]:
        return f"it calls {', then '.join(f'{name}({given})' for name, given in calls) or 'none of them'}"
    return None if returned is out else f"it returns {returned}"


class Token:
    """Stands for a tensor that is only handed on. Equal to itself alone."""

    def __init__(self, of: str) -> None:
        self._of = of

    def __repr__(self) -> str:
        return f"<{self._of}>"

    def __bool__(self) -> bool:
        raise TypeError("what it does depends on numbers")


def _split(child: nn.Module) -> str | None:
    return getattr(getattr(child, "quant_method", None), "split", None)


def _replica(module: nn.Module, **changed: object) -> nn.Module:
    """The same module but for these attributes; without its constructor, which would build and register."""
    replica: Any = object.__new__(type(module))
    vars(replica).update(vars(module), **changed)
    return replica


@cache
def _say(mlp: str, reason: str) -> None:
    logger.info("Spense: SiLU · mul · quantize of %s is left to the compiler: %s", mlp, reason)
