"""Names of networks and of loss terms, the built-in ones and a user's.

This module imports no PyTorch: a built-in network is the address of a function, "module:function".
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal, TypeVar, get_args

from harness.errors import UserError

Output = Literal["sigmoid", "identity"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Network:
    """A registered network."""

    function: Callable[..., Any] | str  # as `network` registers it, or its address
    output: Output  # non-linearity behind the decoder's last layer
    # Weights are drawn from the run's stream "weights", or by the function itself from PyTorch's
    # generator, seeded from that stream.
    initialize: Literal["stream", "torch"] = "torch"
    settings: tuple[str, ...] = ()  # fields of `RunConfig` that the function takes as options

    def build(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - of any network
        """Return the encoder and the decoder that the function makes."""
        address = self.function
        return (resolve_name(address) if isinstance(address, str) else address)(*args, **options)


NETWORKS = {  # by the name that `RunConfig.model` takes
    "mlp": Network("harness.models.networks:mlp", "sigmoid", "stream", ("hidden",)),
    "linear": Network("harness.models.networks:linear", "identity", "stream"),
    "conv": Network("harness.models.networks:conv", "sigmoid", "stream", ("channels",)),
}
BUILT_IN = tuple(NETWORKS)
TERMS: dict[str, Callable[..., Any]] = {}  # by the name that `RunConfig.terms` takes


def network(name: str, *, output: Output = "sigmoid") -> Callable[[Function], Function]:
    """Register the decorated function as the network `RunConfig(model=name)`.

    The function is (data_shape, latent_size) -> (encoder, decoder): two plain modules
    (B, *data_shape) -> (B, 2 L), the posterior's parameters, and (B, L) -> (B, *data_shape).

    Args:
        name: not that of a built-in network; a second function of the same name replaces the first.
        output: non-linearity that follows the decoder: "sigmoid" for pixels in [0, 1], "identity".
    """
    if not name or name in BUILT_IN:
        others = ", ".join(BUILT_IN)
        raise UserError(f"network {name!r}: choose a name that is not empty and none of {others}")
    if output not in get_args(Output):
        raise UserError(f"output={output!r} of network {name!r}: choose sigmoid or identity")

    def register(function: Function) -> Function:
        NETWORKS[name] = Network(function, output)
        return function

    return register


def term(name: str) -> Callable[[Function], Function]:
    """Register the decorated function as the loss term `RunConfig(terms={name: weight})`.

    The function is (`harness.objective.Batch`) -> Tensor of shape (); a second one replaces it.
    """
    if not name:
        raise UserError("a loss term needs a name that is not empty")

    def register(function: Function) -> Function:
        TERMS[name] = function
        return function

    return register
