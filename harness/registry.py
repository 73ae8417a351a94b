"""Names of networks and of loss terms, the built-in ones and a user's.

This module imports no PyTorch: a built-in part is the address of a function, "module:function".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from harness.errors import UserError

Output = Literal["sigmoid", "identity"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Network:
    """A registered network.

    Attributes:
        function: (data_shape, latent_size, **options) -> (encoder, decoder), two plain modules
            (B, *data_shape) -> (B, 2 L) and (B, L) -> (B, *data_shape); or its address.
        output: non-linearity behind the decoder's last layer.
        initialize: "stream": weights are drawn from the run's stream "weights", layer by layer;
            "torch": they are those of the function, called with PyTorch's generator seeded from
            that stream.
        settings: fields of `RunConfig` that the function takes as options.
    """

    function: Callable[..., Any] | str
    output: Output
    initialize: Literal["stream", "torch"] = "torch"
    settings: tuple[str, ...] = ()

    def build(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - of any network
        """Call the function."""
        if isinstance(self.function, str):
            module, _, name = self.function.partition(":")
            return getattr(importlib.import_module(module), name)(*args, **options)
        return self.function(*args, **options)


def _built_in(name: str, output: Output, *settings: str) -> Network:
    return Network(f"harness.models.networks:{name}", output, "stream", settings)


NETWORKS = {
    "mlp": _built_in("mlp", "sigmoid", "hidden"),
    "linear": _built_in("linear", "identity"),
    "conv": _built_in("conv", "sigmoid", "channels"),
}
"""Networks by the name that `RunConfig.model` takes."""

BUILT_IN = tuple(NETWORKS)

TERMS: dict[str, Callable[..., Any]] = {}
"""Loss terms by the name that `RunConfig.terms` takes."""


def network(name: str, *, output: Output = "sigmoid") -> Callable[[Function], Function]:
    """Register a function as the network `RunConfig(model=name)`; a second one replaces the first.

    Args:
        name: neither empty nor the name of a built-in network.
        output: "sigmoid" for pixels in [0, 1], or "identity".

    Returns:
        A decorator of functions (data_shape, latent_size) -> (encoder, decoder): two plain modules
        (B, *data_shape) -> (B, 2 L), the posterior's parameters, and (B, L) -> (B, *data_shape),
        before the output's non-linearity.

    Raises:
        UserError: the name or the output is not allowed.
    """
    if not name or name in BUILT_IN:
        raise UserError(
            f"network {name!r}: choose a name that is not empty and none of {', '.join(BUILT_IN)}"
        )
    if output not in ("sigmoid", "identity"):
        raise UserError(f"output={output!r} of network {name!r}: choose sigmoid or identity")

    def register(function: Function) -> Function:
        NETWORKS[name] = Network(function, output)
        return function

    return register


def term(name: str) -> Callable[[Function], Function]:
    """Register a function as the loss term `RunConfig(terms={name: weight})`.

    Args:
        name: not empty; a second term of that name replaces the first.

    Returns:
        A decorator of functions `(Batch) -> Tensor` of shape () (`harness.objective.Batch`).

    Raises:
        UserError: the name is empty.
    """
    if not name:
        raise UserError("a loss term needs a name that is not empty")

    def register(function: Function) -> Function:
        TERMS[name] = function
        return function

    return register
