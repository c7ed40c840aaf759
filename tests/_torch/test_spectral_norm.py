"""Spectral norms: in training mode the cure is told, and it is one."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import implicit_grad as ig
from implicit_grad._torch.spectral_norm import turned

pytestmark = pytest.mark.usefixtures("double_precision")
NORMS = {"parametrization": parametrizations.spectral_norm, "hook": nn.utils.spectral_norm}


def normed(kind, size=2):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torches', of the old one
        layer = NORMS[kind](nn.Linear(3, size))
    with torch.no_grad():
        for _ in range(300):  # until the iteration has found the norm
            layer(X)
    return layer


X, Y = torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def solver(held, **options):
    """Of a layer that is drawn to where it was, with a weight for that."""

    def value(layer, pull):
        drawn = zip(layer.parameters(), held, strict=True)
        return (layer(X) - Y[:, :2]).square().mean() + pull * sum(
            (p - q).square().sum() for p, q in drawn
        )

    return ig.implicit(ig.solvers.NewtonCG(tol=1e-10, maxiter=200), ig.argmin(value), **options)


def outer(solve, layer, pull):
    return sum(p.sin().sum() for p in solve(layer, pull).parameters())


@pytest.mark.parametrize("kind", NORMS)
def test_in_training_mode_the_cure_is_told_and_it_is_one(kind):
    layer, pull, h = normed(kind), torch.tensor(1.0, requires_grad=True), 1e-4
    held = [p.detach() + 0.2 for p in layer.parameters()]
    with pytest.warns(ig.ImplicitGradWarning, match=r"spectral norm in training mode.*\.eval\(\)"):
        descent = ig.solvers.GradientDescent(lr=0.3, steps=3)
        ig.implicit(descent, solver(held).setup.condition)(layer, pull)
    solve = solver(held, on_failure="raise")
    layer.eval()
    (found,) = torch.autograd.grad(outer(solve, layer, pull), pull)
    ends = [outer(solve, layer, pull.detach() + s * h).detach() for s in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", NORMS)
def test_one_that_is_no_part_of_phi_is_no_matter(kind):
    features, pull = normed(kind, size=3), torch.tensor(0.3, requires_grad=True)

    def value(w, pull):
        return (features(X) @ w - Y[:, 0]).square().mean() + pull * w.square().sum()

    def fit(pull):
        with torch.no_grad():
            made = features.eval()(X)
            features.train()
        gram = made.T @ made / 12 + pull.detach() * torch.eye(3)
        return torch.linalg.solve(gram, made.T @ Y[:, 0] / 12)

    phi = ig.implicit(fit, ig.argmin(value), on_failure="raise")(pull)
    torch.autograd.grad(phi.sum(), pull)


class Named:
    """A hook with a name, as that of the older spectral norm has one."""

    name = "weight"

    def __call__(self, module, args):
        return None


def test_a_vector_is_divided_by_its_length_which_takes_no_iteration():
    layer = parametrizations.spectral_norm(nn.Linear(3, 2), "bias")
    layer.register_forward_pre_hook(Named())
    solve = solver([p.detach() + 0.2 for p in layer.parameters()], on_failure="raise")
    pull, h = torch.tensor(1.0, requires_grad=True), 1e-4
    (found,) = torch.autograd.grad(outer(solve, layer, pull), pull)
    ends = [outer(solve, layer, pull.detach() + s * h).detach() for s in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", NORMS)
def test_what_other_threads_do_and_what_comes_after_is_no_matter(kind):
    layer = normed(kind)
    with turned() as found:
        other = threading.Thread(target=layer, args=(X,))
        other.start()
        other.join()
    layer(X)
    assert not found
