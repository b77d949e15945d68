"""Recurrent layers, written out: one product for the inputs of all time steps, then a loop over hidden states."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.registry import DECOMPOSITIONS

Weights = Sequence[Any]  # W of the input, W of the state, their biases or None, and an optional projection
Cell = Callable[[Tensor, tuple[Tensor, ...], Weights], tuple[Tensor, ...]]


def _tanh(z: Tensor, state: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...]:
    """h' = tanh(z + W h + b), z the projected input."""
    return (torch.tanh(z + F.linear(state[0], w[1], w[3])),)


def _relu(z: Tensor, state: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...]:
    """h' = relu(z + W h + b)."""
    return (torch.relu(z + F.linear(state[0], w[1], w[3])),)


def _lstm(z: Tensor, state: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...]:
    """Input, forget, cell and output gates; an optional projection of h'."""
    h, c = state
    i, f, g, o = (z + F.linear(h, w[1], w[3])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if len(w) < 5 else F.linear(h, w[4])), c


def _gru(z: Tensor, state: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...]:
    """Reset, update and new gates; the reset gate acts after the hidden product."""
    h = state[0]
    zr, zu, zn = z.chunk(3, -1)
    hr, hu, hn = F.linear(h, w[1], w[3]).chunk(3, -1)
    u = torch.sigmoid(zu + hu)
    return ((1 - u) * torch.tanh(zn + torch.sigmoid(zr + hr) * hn) + u * h,)


def _layer(cell: Cell, x: Tensor, state: tuple[Tensor, ...], w: Weights, reverse: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction of one layer; x [t, *n, i]."""
    steps = F.linear(x, w[0], w[2]).unbind(0)
    outputs = []
    for z in reversed(steps) if reverse else steps:
        state = cell(z, state, w)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _stack(cell: Cell, states: int) -> Callable[..., Any]:
    """The call that ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` make, for one kind of cell."""

    def run(
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> tuple[Tensor, ...]:
        if isinstance(hx, Tensor) and not hx.is_floating_point():  # these are the batch sizes of packed sequences
            raise NotImplementedError(
                "packed sequences have no sample axis, so per-sample quantities of a recurrent layer cannot be taken "
                "through them. Pass padded sequences and mask the loss, or sort samples of equal length into batches."
            )
        hidden = tuple(hx) if states == 2 else (hx,)
        x = input.transpose(0, 1) if batch_first else input
        directions = 2 if bidirectional else 1
        size = len(params) // (num_layers * directions)
        initial = [h.unbind(0) for h in hidden]
        last: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for d in range(directions):
                k = layer * directions + d
                w = list(params[k * size : (k + 1) * size])
                if not has_biases:
                    w = [w[0], w[1], None, None, *w[2:]]
                y, state = _layer(cell, x, tuple(h[k] for h in initial), w, reverse=d == 1)
                outputs.append(y)
                last.append(state)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if dropout and train and layer < num_layers - 1:
                x = F.dropout(x, dropout, True)
        out = x.transpose(0, 1) if batch_first else x
        return (out, *[torch.stack([s[j] for s in last]) for j in range(states)])

    return run


def _one_step(cell: Cell, states: int) -> Callable[..., Any]:
    """The call that ``nn.RNNCell``, ``nn.LSTMCell`` and ``nn.GRUCell`` make."""

    def run(input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Any:
        state = tuple(hx) if states == 2 else (hx,)
        new = cell(F.linear(input, w_ih, b_ih), state, [w_ih, w_hh, b_ih, b_hh])
        return new if states == 2 else new[0]

    return run


DECOMPOSITIONS[torch.rnn_tanh] = _stack(_tanh, 1)
DECOMPOSITIONS[torch.rnn_relu] = _stack(_relu, 1)
DECOMPOSITIONS[torch.lstm] = _stack(_lstm, 2)
DECOMPOSITIONS[torch.gru] = _stack(_gru, 1)
DECOMPOSITIONS[torch.rnn_tanh_cell] = _one_step(_tanh, 1)
DECOMPOSITIONS[torch.rnn_relu_cell] = _one_step(_relu, 1)
DECOMPOSITIONS[torch.lstm_cell] = _one_step(_lstm, 2)
DECOMPOSITIONS[torch.gru_cell] = _one_step(_gru, 1)
