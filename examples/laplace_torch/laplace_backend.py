"""A curvature back end of laplace-torch 0.3 that runs on curvfunc: ``Laplace(model, ..., backend=CurvfuncGGN)``.

It works on models that BackPACK's refuses (tied weights, attention, residual connections), and needs no change of the model.
Run as a script, it fits all approximations to a small network and to a transformer with tied weights. See docs/laplace.md.

    python examples/laplace_torch/laplace_backend.py
"""

import torch
from laplace import Laplace
from laplace.curvature import GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvfunc import KFAC, KFLR, BatchGrad, BatchJac, DiagGGN, Loss, Output, accumulation, compute, functionalize, kronecker


class Factors(Kron):
    """Kronecker factors, with exact blocks for parameters that have none, where laplace-torch starts from zeros of pairs."""

    def __radd__(self, other: Kron) -> Kron:
        """The sum: Python asks the right operand first, since it is of the subclass."""
        pairs = zip(other.kfacs, self.kfacs, strict=True)
        start = [own if len(own) == len(new) else [torch.zeros_like(F) for F in new] for own, new in pairs]
        return Kron(start) + Kron(self.kfacs)


class CurvfuncGGN(GGNInterface):
    """The Gauss-Newton matrix, exact or with ``stochastic=True`` from ``num_samples`` draws of the labels."""

    def diag(self, x, y, **kwargs):
        """Loss and the diagonal of the matrix, [P]."""
        spec = DiagGGN(self.num_samples if self.stochastic else 0)
        loss, diagonal = self._compute(x, y, (Loss(), spec))
        flat = torch.cat([diagonal[name].flatten() for name in self.params_dict])
        return self.factor * loss, self.factor * (flat if self.subnetwork_indices is None else flat[self.subnetwork_indices])

    def kron(self, x, y, N, **kwargs):
        """Loss and Kronecker factors of a batch out of ``N`` samples: outputs' are summed, inputs' averaged."""
        model_fn, params, X = self._arguments(x)
        self._check_layouts(kronecker.structure(model_fn, params, X))
        specs = Loss(), KFAC(self.num_samples, **kwargs) if self.stochastic else KFLR(**kwargs)
        batches = accumulation(model_fn, params, specs, loss_fn=self.lossfunc)
        (loss,), factors = batches.update(batches.init(), params, X, y)["results"]
        found = []
        for parts in factors:  # "output_factor", and "input_factor" or "input_factor, first", times the samples of the batch
            scaled = [part / N if "input" in name else part for name, part in parts.items()]
            found.append(scaled[::-1] if any("first" in name for name in parts) else scaled)
        return self.factor * loss["result"], Factors((self.factor * Kron(found)).kfacs)

    def jacobians(self, x, enable_backprop=False):
        """Jacobians [N, C, P] and outputs; with ``enable_backprop`` they can be differentiated by x."""
        if self.last_layer:
            return self.last_layer_jacobians(x, enable_backprop)
        with torch.set_grad_enabled(enable_backprop):
            out, jacobians = self._compute(x, None, (Output(), BatchJac()), loss_fn=lambda out, y: out.sum())
        flat = torch.cat([jacobians[name].flatten(out.ndim) for name in self.params_dict], dim=-1)
        return flat if self.subnetwork_indices is None else flat[..., self.subnetwork_indices], out

    def gradients(self, x, y):
        """Per-sample gradients [N, P] and the loss."""
        loss, grads = self._compute(x, y, (Loss(), BatchGrad()))
        flat = torch.cat([grads[name].flatten(1) for name in self.params_dict], dim=1)
        return flat if self.subnetwork_indices is None else flat[:, self.subnetwork_indices], loss

    def _compute(self, x, y, specs, loss_fn=None):
        model_fn, params, X = self._arguments(x)
        return compute(model_fn, params, X, X if y is None else y, specs, loss_fn=loss_fn or self.lossfunc)

    def _arguments(self, x):
        """Model function, parameters, and its input: of a last layer, the features."""
        model_fn, params = functionalize(self._model)
        if self.last_layer:
            with torch.no_grad():
                return model_fn, params, self.model.forward_with_features(x)[1]
        return model_fn, params, x if isinstance(x, Tensor) else (dict(x),)  # laplace-torch calls model(dictionary)

    def _check_layouts(self, structure):
        """Factors are of the first axis and all others, as laplace-torch takes for granted."""
        if others := [layout.name for layout in structure.layouts if layout.split]:
            raise NotImplementedError(f"the factors of {others} are of other axes than laplace-torch's. Take a diagonal.")


class Tied(nn.Module):
    """A small transformer whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """The next token, [N, 7]."""
        return (self.layer(self.embedding(tokens)) @ self.embedding.weight.t())[:, -1]


def main() -> None:
    """Fit, and tell the marginal likelihood."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    cases = {
        "network": (net, TensorDataset(torch.randn(60, 4), torch.randint(3, (60,)))),
        "tied": (Tied(), TensorDataset(torch.randint(7, (60, 5)), torch.randint(7, (60,)))),
    }
    for name, (model, data) in cases.items():
        for structure in ("diag", "kron", "full"):
            posterior = Laplace(model, "classification", "all", structure, backend=CurvfuncGGN)
            posterior.fit(DataLoader(data, batch_size=32))
            posterior.optimize_prior_precision(method="marglik", n_steps=20)
            print(f"{name:8} {structure:5} log marginal likelihood {float(posterior.log_marginal_likelihood()):8.2f}")


if __name__ == "__main__":
    main()
