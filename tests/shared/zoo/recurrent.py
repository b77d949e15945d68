"""Recurrent networks, and others that apply one block repeatedly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import architecture, classes, noise

Made = tuple[nn.Module, object, Tensor]


class Classifier(nn.Module):
    """A recurrent layer reads the sequence; the mean of its outputs is classified."""

    def __init__(self, layer: nn.RNNBase, features: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0]
        return self.head(h.mean(1 if self.layer.batch_first else 0))


@architecture("lstm_classifier")
def _() -> Made:
    return Classifier(nn.LSTM(2, 3, batch_first=True), 3), noise(4, 4, 2), classes(4, 3)


@architecture("lstm_bidirectional_sequence_first")
def _() -> Made:
    return Classifier(nn.LSTM(2, 3, num_layers=2, bidirectional=True), 6), noise(3, 3, 2), classes(3, 3)


@architecture("lstm_with_projection")
def _() -> Made:
    return Classifier(nn.LSTM(2, 4, proj_size=3, batch_first=True), 3), noise(3, 4, 2), classes(3, 3)


@architecture("gru_classifier")
def _() -> Made:
    return Classifier(nn.GRU(2, 3, num_layers=2, batch_first=True), 3), noise(4, 3, 2), classes(4, 3)


@architecture("gru_bidirectional_sequence_first")
def _() -> Made:
    return Classifier(nn.GRU(2, 3, bidirectional=True), 6), noise(3, 3, 2), classes(3, 3)


@architecture("rnn_classifier")
def _() -> Made:
    return Classifier(nn.RNN(2, 3, nonlinearity="tanh", bias=False), 3), noise(4, 4, 2), classes(4, 3)


@architecture("rnn_relu_bidirectional")
def _() -> Made:
    layer = nn.RNN(2, 3, num_layers=2, nonlinearity="relu", bidirectional=True, batch_first=True)
    return Classifier(layer, 6), noise(3, 3, 2), classes(3, 3)


class Captioner(nn.Module):
    """An encoder's GRU hands its last state to a loop of `nn.GRUCell` (Cho et al. 2014), fed with the words before."""

    def __init__(self, words: int = 5, d: int = 3) -> None:
        super().__init__()
        self.encoder, self.words = nn.GRU(2, d, batch_first=True), nn.Embedding(words, 2)
        self.cell, self.head = nn.GRUCell(2, d), nn.Linear(d, words)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        h = self.encoder(x)[1][0]
        steps = []
        for t in range(words.shape[1]):
            h = self.cell(self.words(words[:, t]), h)
            steps.append(self.head(h))
        return torch.stack(steps, dim=2)


@architecture("gru_decoder_loop")
def _() -> Made:
    return Captioner(), (noise(3, 4, 2), classes(3, 5, 3)), classes(3, 5, 3)


class CellLoop(nn.Module):
    """`nn.LSTMCell` and `nn.RNNCell` on top of each other, states made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper, self.head = nn.LSTMCell(2, 3), nn.RNNCell(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(len(x), 3), x.new_zeros(len(x), 3))
        top = x.new_zeros(len(x), 2)
        for step in x.unbind(1):
            state = self.lower(step, state)
            top = self.upper(state[0], top)
        return self.head(top)


@architecture("lstm_cell_loop")
def _() -> Made:
    return CellLoop(), noise(3, 3, 2), classes(3, 3)


class NeuralODE(nn.Module):
    """Euler steps along one vector field (Chen et al. 2018): each of its parameters is used at every step."""

    def __init__(self, d: int = 3, steps: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.lift, self.head = nn.Linear(2, d), nn.Linear(d, 3)
        self.hidden, self.field = nn.Linear(d + 1, 5), nn.Linear(5, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for k in range(self.steps):
            time = torch.full_like(x[:, :1], k / self.steps)
            x = x + self.field(torch.tanh(self.hidden(torch.cat([x, time], dim=1)))) / self.steps
        return self.head(x)


@architecture("neural_ode")
def _() -> Made:
    return NeuralODE(), noise(4, 2), classes(4, 3)


class BagOfWords(nn.Module):
    """Mean embedding of the words of a text, by `nn.EmbeddingBag` (fastText, Joulin et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


@architecture("embedding_bag")
def _() -> Made:
    return BagOfWords(), classes(4, 7, 3), classes(4, 3)


class TextCNN(nn.Module):
    """Convolutions of several widths over word vectors, maximum over time (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 3, padding_idx=0)
        self.convs, self.head = nn.ModuleList([nn.Conv1d(3, 2, k) for k in (2, 3)]), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).permute(0, 2, 1)
        return self.head(torch.cat([F.relu(conv(x)).max(dim=2).values for conv in self.convs], dim=1))


@architecture("text_cnn")
def _() -> Made:
    return TextCNN(), classes(4, 6, 5), classes(4, 3)


class CosineWords(nn.Module):
    """Word vectors at unit length, their norms looked up apart: what has no rule must respect the padding as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(self.words.weight, dim=1)
        return self.head((self.words(ids) / norms[ids].unsqueeze(-1)).mean(1))


@architecture("words_of_unit_length", without_rule=("words.weight",))
def _() -> Made:
    return CosineWords(), classes(4, 6, 5), classes(4, 3)
