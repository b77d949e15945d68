"""Some of the problems' models by linear layers and convolutions alone.

The specification knows the Kronecker factors of weights at linear layers and convolutions. A weight at any other
operation has those that it has when the operation is written out, with the weight's axes in its own order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

__all__ = ["WRITTEN_OUT", "WrittenOut"]

Params = dict[str, Tensor]
Factors = tuple[Tensor, ...]


class WrittenOut(NamedTuple):
    """A model of other parameters, the parameters from the problem's, and back from the model's factors."""

    model_fn: Callable[[Params, Any], Tensor]
    params: Callable[[Params], Params] = lambda params: params
    factors: Callable[[dict[str, Factors]], dict[str, Factors]] = lambda factors: factors


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def transposed(name: str) -> dict[str, Any]:
    """A matrix that multiplies from the right is the transpose of a linear layer's."""
    return {
        "params": lambda params: params | {name: params[name].T},
        "factors": lambda factors: factors | {name: factors[name][::-1]},
    }


def transposed_convolution(p: Params, X: Tensor) -> Tensor:
    z = F.group_norm(F.conv2d(X, p["0.weight"], p["0.bias"], padding=1), 2, p["1.weight"], p["1.bias"])
    return linear(p, "4", F.prelu(z, p["2.weight"]).flatten(1))


def as_convolution(params: Params) -> Params:
    return params | {"0.weight": params["0.weight"].flip(2, 3).transpose(0, 1)}


def of_transposed(factors: dict[str, Factors]) -> dict[str, Factors]:
    B, A = factors["0.weight"]
    return factors | {"0.weight": (B, A.reshape(2, 2, 2, 2, 2, 2).flip(1, 2, 4, 5).reshape(8, 8))}


def odd(p: Params, X: Tensor) -> Tensor:
    linear(p, "dead", X)
    return F.linear((X * p["scale"]).relu(), p["weight"])


def keywords(p: Params, X: dict[str, Tensor]) -> Tensor:
    one_hot = F.one_hot(X["ids"], 6).to(p["embedding.weight"].dtype)
    embedded = F.linear(one_hot, p["embedding.weight"])
    return linear(p, "head", (embedded * X["mask"].unsqueeze(-1)).tanh().sum(1))


def gates(p: Params, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    name = "recurrent."
    return (
        F.linear(x, p[name + "weight_ih_l0"], p[name + "bias_ih_l0"]),
        F.linear(h, p[name + "weight_hh_l0"], p[name + "bias_hh_l0"]),
    )


def lstm(p: Params, X: Tensor) -> Tensor:
    h = c = X.new_zeros(len(X), 2)
    for x in X.unbind(1):
        i, f, g, o = sum(gates(p, x, h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return linear(p, "head", h)


def gru(p: Params, X: Tensor) -> Tensor:
    h = X.new_zeros(len(X), 2)
    for x in X.unbind(1):
        (ri, zi, ni), (rh, zh, nh) = (g.chunk(3, 1) for g in gates(p, x, h))
        z = (zi + zh).sigmoid()
        h = (1 - z) * (ni + (ri + rh).sigmoid() * nh).tanh() + z * h
    return linear(p, "head", h)


def transformer(p: Params, X: Tensor) -> Tensor:
    layer = "encoder.layers.0."
    norm = lambda k, x: F.layer_norm(x, (4,), p[f"{layer}norm{k}.weight"], p[f"{layer}norm{k}.bias"])
    projected = F.linear(X, p[layer + "self_attn.in_proj_weight"], p[layer + "self_attn.in_proj_bias"])
    q, k, v = (t.unflatten(2, (2, 2)).transpose(1, 2) for t in projected.chunk(3, 2))  # [n, heads, s, 2]
    mixed = ((q @ k.mT / 2**0.5).softmax(3) @ v).transpose(1, 2).flatten(2)
    x = norm(1, X + linear(p, layer + "self_attn.out_proj", mixed))
    x = norm(2, x + linear(p, layer + "linear2", linear(p, layer + "linear1", x).relu()))
    return linear(p, "head", x.mean(1))


WRITTEN_OUT: dict[str, WrittenOut] = {
    "group norm and transposed convolution": WrittenOut(transposed_convolution, as_convolution, of_transposed),
    "a parameter that is not used": WrittenOut(odd, **transposed("weight")),
    "keyword inputs": WrittenOut(keywords, **transposed("embedding.weight")),
    "lstm": WrittenOut(lstm),
    "lstm, sequence first, as long as the batch": WrittenOut(lstm),
    "gru": WrittenOut(gru),
    "transformer, sequence first, as long as the batch": WrittenOut(transformer),
    "transformer, batch first": WrittenOut(transformer),
}
