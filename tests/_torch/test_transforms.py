"""Transforms of torch.func and forward mode: equal to those of a differentiable solver."""

import functools
import itertools

import optree
import pytest
import torch
from problems import PROBLEMS, Instance, tensors
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import implicit_grad as ig

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    # torch 2.15's own forward mode compiles its formulas with it
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
]

M = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.2, 0.7]], dtype=torch.float64)
B = torch.tensor([[0.3, 0.1], [-0.2, 0.4]], dtype=torch.float64)


def objective(w, theta, lam):
    return torch.nn.functional.softplus(M @ w).sum() + lam / 2 * (w - theta).square().sum()


def solved(A, b):
    """A⁻¹b by Cramer's rule: torch.linalg.solve is wrong under vmap(jacfwd) in older torch."""
    numerators = A[1, 1] * b[0] - A[0, 1] * b[1], A[0, 0] * b[1] - A[1, 0] * b[0]
    return torch.stack(numerators) / (A[0, 0] * A[1, 1] - A[0, 1] * A[1, 0])


def minimum(w, theta, lam):
    """Newton's method, with as many derivatives as it is asked for: five steps are enough."""
    for _ in range(6):
        slope = jacrev(objective)(w, theta, lam)
        w = w - solved(jacrev(jacrev(objective))(w, theta, lam), slope)
    return w


def image(x, theta, lam):
    return torch.tanh(B @ x + theta) / (1 + lam)


def iterated(x, theta, lam):
    for _ in range(30):
        x = image(x, theta, lam)
    return x


def near_theta(w):
    return torch.nn.functional.softplus(M @ w).sum()


class Solver:
    """A black box that refuses to be looked at, and counts its calls."""

    def __init__(self, solve):
        self.solve, self.calls = solve, 0

    def __call__(self, theta, lam):
        self.calls += 1
        assert type(theta) is torch.Tensor and isinstance(lam.item(), float)
        return solution(self.solve, tuple(theta.tolist()), lam.item()).clone()


@functools.cache
def solution(solve, theta, lam):
    """Of plain numbers."""
    return solve(torch.zeros(2), torch.tensor(theta), torch.tensor(lam))


CONDITIONS = {
    "argmin": (minimum, ig.argmin(objective)),
    "root": (minimum, ig.root(lambda w, *a: jacrev(objective)(w, *a))),
    "fixed_point": (iterated, ig.fixed_point(image)),
}
LINEAR_SOLVERS = {
    "argmin": (ig.CG(rtol=1e-14), ig.MINRES(rtol=1e-14), ig.Neumann(terms=400), ig.Exact()),
    "root": (ig.GMRES(rtol=1e-14), ig.NormalCG(rtol=1e-14), ig.Exact()),
    "fixed_point": (ig.NormalCG(rtol=1e-14), ig.Neumann(terms=100), ig.Exact()),
}
CASES = [(name, solver) for name, solvers in LINEAR_SOLVERS.items() for solver in solvers]

AT = (torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))

FIRST = {
    "grad": lambda f: grad(f, argnums=(0, 1)),
    "vjp": lambda f: lambda t, lam: vjp(f, t, lam)[1](torch.ones(())),
    "jvp": lambda f: lambda t, lam: jvp(f, (t, lam), (t.cos(), lam.sin())),
    "jacrev": lambda f: jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: jacfwd(f, argnums=(0, 1)),
    "vmap": lambda f: lambda t, lam: vmap(f, in_dims=(0, None))(torch.stack([t, -t]), lam),
}


def outer(solve):
    """A scalar with curvature, of the solution and of an argument itself."""
    return lambda theta, lam: (solve(theta, lam) * torch.tensor([1.0, 2.0])).sin().sum() * lam


def summed(result):
    """A scalar function of whatever a transform returned, to apply another one to."""
    return sum((leaf * leaf.cos()).sum() for leaf in tensors(result))


def transformed(solve, inner, second=None):
    """What one transform or two give of the outer loss of a solver."""
    first = FIRST[inner](outer(solve))
    return (FIRST[second](lambda *at: summed(first(*at))) if second else first)(*AT)


@functools.cache
def of_reference(solve, *transforms):
    """The same for all conditions and linear solvers."""
    return transformed(lambda theta, lam: solve(torch.zeros(2), theta, lam), *transforms)


def compared(transform, solve, reference, at):
    close(transform(outer(solve))(*at), transform(outer(reference))(*at))


def close(found, expected):
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for x, y in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def solvers_of(name, linear_solver):
    solve, condition = CONDITIONS[name]
    box = Solver(solve)
    implicit = ig.implicit(box, condition, linear_solver=linear_solver)
    return implicit, lambda theta, lam: solve(torch.zeros(2), theta, lam), box


@pytest.mark.parametrize(("name", "linear_solver"), CASES, ids=str)
@pytest.mark.parametrize("transform", FIRST)
def test_transforms(name, linear_solver, transform):
    implicit, _, box = solvers_of(name, linear_solver)
    close(transformed(implicit, transform), of_reference(CONDITIONS[name][0], transform))
    assert box.calls == (2 if transform == "vmap" else 1)  # once a sample, whatever is asked of it


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize(("inner", "second"), list(itertools.product(FIRST, FIRST)))
def test_pairs_of_transforms(name, inner, second):
    implicit, _, _ = solvers_of(name, None if name == "argmin" else ig.Exact())
    expected = of_reference(CONDITIONS[name][0], inner, second)
    close(transformed(implicit, inner, second), expected)


def test_hessians_and_third_derivatives():
    implicit, reference, _ = solvers_of("argmin", ig.CG(rtol=1e-14))
    compared(lambda f: hessian(f, argnums=(0, 1)), implicit, reference, AT)
    compared(lambda f: jacrev(hessian(f)), implicit, reference, AT)
    compared(lambda f: vmap(hessian(f), (0, None)), implicit, reference, (torch.eye(2), AT[1]))


@pytest.mark.parametrize("make", PROBLEMS)
def test_forward_mode_of_the_zoo(make):
    """The directional derivative in forward mode is the gradient's product with the direction."""
    instance: Instance = make()
    if instance.captured:
        return  # see test_captured_tensors
    solve = ig.implicit(instance.solver, instance.condition, linear_solver=ig.Exact())
    primals = [t.detach() for t in instance.wanted]
    directions = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t) for t in primals]

    def loss(*leaves):
        places = iter(leaves)
        args = optree.tree_map(
            lambda t: next(places) if torch.is_tensor(t) and t.requires_grad else t, instance.args
        )
        return instance.outer(solve(*args))

    _, tangent = jvp(loss, tuple(primals), tuple(directions))
    grads = instance.gradients(solve)
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(tangent, expected, rtol=1e-8, atol=1e-10)


def test_gradcheck_in_every_mode():
    implicit, _, _ = solvers_of("argmin", ig.CG(rtol=1e-14))
    at = tuple(t.clone().requires_grad_() for t in AT)
    assert torch.autograd.gradcheck(implicit, at, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(implicit, at, check_fwd_over_rev=True)


def test_tasks_under_vmap_equal_the_loop():
    thetas = torch.randn(5, 2)

    def adapt(theta, lam):
        return minimum(theta, theta, lam)

    solve = ig.implicit(
        lambda theta: adapt(theta.detach(), torch.tensor(0.7)),
        ig.proximal(near_theta, 0.7),
    )
    grads = vmap(grad(lambda theta: solve(theta).sin().sum()))(thetas)
    for theta, found in zip(thetas, grads, strict=True):
        leaf = theta.clone().requires_grad_()
        solve(leaf).sin().sum().backward()
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)


def test_containers_under_vmap():
    def solver(tree, scale):
        return {"a": tree["a"] * scale, "b": (tree["b"] + scale,)}

    def residual(phi, tree, scale):
        return {"a": phi["a"] - tree["a"] * scale, "b": (phi["b"][0] - tree["b"] - scale,)}

    solve = ig.implicit(solver, ig.root(residual))
    tree = {"a": torch.randn(4, 3), "b": torch.randn(4, 2, 2)}
    found = vmap(solve, in_dims=(0, None))(tree, torch.tensor(2.0))
    assert found["a"].shape == (4, 3) and found["b"][0].shape == (4, 2, 2)
    torch.testing.assert_close(found["a"], tree["a"] * 2)
    jacobian = vmap(jacrev(solve), in_dims=(0, None))(tree, torch.tensor(2.0))
    torch.testing.assert_close(jacobian["a"]["a"], (2 * torch.eye(3)).expand(4, 3, 3))


def test_captured_tensors_are_refused_under_transforms():
    lam = torch.tensor(0.7, requires_grad=True)
    solve = ig.implicit(lambda t: minimum(t, t, lam.detach()), ig.proximal(near_theta, lam))
    assert grad(lambda t: solve(t).sum())(AT[0]).shape == (2,)  # λ of a condition is an argument

    weight = torch.tensor(0.5, requires_grad=True)
    condition = ig.argmin(lambda w, t: (w - weight * t).square().sum())
    solve = ig.implicit(lambda t: weight.detach() * t, condition)
    with pytest.raises(ig.GraphError, match="captured a tensor"):
        grad(lambda t: solve(t).sum())(AT[0])

    theta = AT[0].clone().requires_grad_()

    def through_capture(w):
        condition = ig.argmin(lambda phi, t: (phi - w * t).square().sum())
        return ig.implicit(lambda t: 0.5 * t, condition)(theta).sum()

    for transformed in (grad(through_capture), jacfwd(through_capture)):
        with pytest.raises(ig.GraphError, match="captured a tensor"):
            transformed(torch.tensor(0.5))
    with pytest.raises(ig.GraphError, match=r"captured a tensor.*one for each sample"):
        vmap(through_capture)(torch.tensor([0.5, 0.6]))


def test_what_else_is_wrong_is_not_taken_for_a_captured_batch():
    def diverged(w):
        def solver(t):
            solver.log = w  # which has no part in the problem
            return t * float("nan")

        return ig.implicit(solver, ig.argmin(lambda phi, t: (phi - t).square().sum()))(
            AT[0] + 0 * w
        )

    with pytest.raises(ig.InvalidSolutionError, match="diverged"):
        vmap(diverged)(torch.tensor([0.5, 0.6]))


@pytest.mark.parametrize("inner", [grad, jacfwd, lambda f: lambda x: vmap(f)(x[None])[0]])
@pytest.mark.parametrize("outer", [grad, jacfwd])
def test_what_a_transform_further_out_looks_at_is_captured_too(outer, inner):
    """It was a constant to the transform within, and its gradient 0."""
    a = torch.tensor(3.0)

    def by_argument(w):
        solve = ig.implicit(lambda a, w: (a * w).sqrt(), ig.root(lambda phi, a, w: phi**2 - a * w))
        return inner(lambda a: solve(a, w))(a)

    def by_capture(w):
        solve = ig.implicit(lambda a: (a * w).sqrt(), ig.root(lambda phi, a: phi**2 - a * w))
        return inner(lambda a: solve(a))(a)

    def with_a_constant(w):
        two = torch.full((), 2.0)  # to torch, a tensor of the transforms around as well
        solve = ig.implicit(lambda a: (a * two).sqrt(), ig.root(lambda phi, a: phi**2 - a * two))
        return w * inner(lambda a: solve(a))(a)

    w = torch.tensor(2.0)
    right = outer(lambda w: inner(lambda a: (a * w).sqrt())(a))(w)
    torch.testing.assert_close(outer(by_argument)(w), right)
    torch.testing.assert_close(outer(with_a_constant)(w), inner(lambda a: (a * 2).sqrt())(a))
    with pytest.raises(ig.GraphError, match="captured a tensor"):
        outer(by_capture)(w)


class Quartic(torch.autograd.Function):
    """Σ w⁴/12 as an external program: the old form, which torch.func refuses."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return torch.as_tensor((w.detach().numpy() ** 4).sum() / 12)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        return g * torch.as_tensor(w.numpy() ** 3 / 3)


def taking_a_gradient(w):
    x = w.new_ones(()).requires_grad_()
    (slope,) = torch.autograd.grad((w**4).sum() * x**2 / 24, x, create_graph=True)
    return slope


def in_forward_mode(w):
    with forward_ad.dual_level():
        one = forward_ad.make_dual(w.new_ones(()), w.new_ones(()))
        return forward_ad.unpack_dual((w**4).sum() * one**2 / 24).tangent


@pytest.mark.parametrize("quartic", [Quartic.apply, taking_a_gradient, in_forward_mode])
def test_conditions_that_torch_func_cannot_run(quartic):
    def newton(a):
        w = torch.zeros_like(a)
        for _ in range(40):
            w = w - (w**3 / 3 + w - a) / (w**2 + 1)
        return w

    def objective(w, a, c):
        return quartic(w) + w.square().sum() / 2 - c * (a * w).sum()

    one = torch.ones(())
    a, solve = AT[0], ig.implicit(newton, ig.argmin(lambda w, a: objective(w, a, one)))
    right = 1 / (newton(a) ** 2 + 1)
    x = a.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(solve(x).sum(), x)[0], right)
    torch.testing.assert_close(grad(lambda a: solve(a).sum())(a), right)
    torch.testing.assert_close(vmap(grad(lambda a: solve(a).sum()))(a[None]), right[None])
    torch.testing.assert_close(jacrev(solve)(a), right.diag())

    def by_capture(c):
        return ig.implicit(newton, ig.argmin(lambda w, a: objective(w, a, c)))(a).sum()

    with pytest.raises(ig.GraphError, match="captured a tensor"):
        grad(by_capture)(one)


def test_a_call_beside_a_transform():
    theta, lam = (t.clone().requires_grad_() for t in AT)
    implicit, _, _ = solvers_of("argmin", None)
    found = vmap(lambda x: x * implicit(theta, lam).sum())(torch.ones(3))
    torch.testing.assert_close(found, implicit(theta, lam).sum().expand(3))
    by_theta, by_lam = torch.autograd.grad(found.sum(), (theta, lam))
    expected = torch.autograd.grad(3 * implicit(theta, lam).sum(), (theta, lam))
    torch.testing.assert_close((by_theta, by_lam), expected)


def test_batches_from_before_torch_func_are_refused():
    implicit, _, _ = solvers_of("argmin", None)
    phi = implicit(*(t.clone().requires_grad_() for t in AT))
    theta = AT[0].clone().requires_grad_()
    phi = implicit(theta, AT[1])
    with pytest.raises(ig.GraphError, match="batches of gradients"):
        torch.autograd.grad(phi, theta, torch.eye(2), is_grads_batched=True)


@pytest.mark.parametrize("theta_only", [False, True])
def test_cotangents_under_transforms(theta_only):
    """Backward of a plain call, for many cotangents at once and for one with a tangent."""
    implicit, reference, box = solvers_of("argmin", ig.CG(rtol=1e-14))
    theta, lam = AT[0].clone().requires_grad_(), AT[1].clone().requires_grad_(not theta_only)
    wanted = (theta,) if theta_only else (theta, lam)

    def pulled(solve):
        phi = solve(theta, lam)
        return lambda v: torch.autograd.grad(phi, wanted, v, retain_graph=True)

    many = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -1.0]])
    found, expected = (vmap(pulled(solve))(many) for solve in (implicit, reference))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    found, expected = (
        jvp(pulled(solve), (many[2],), (many[0],)) for solve in (implicit, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert box.calls == 2  # one for each plain call: backward does not solve again


def test_cotangents_of_a_part_of_phi_under_vmap():
    a = torch.randn(3, requires_grad=True)
    condition = ig.root(lambda phi, a: (phi[0] - a.sin(), phi[1] - phi[0] * a))
    first, _ = ig.implicit(lambda a: (a.sin(), a.sin() * a), condition)(a)
    found = vmap(lambda v: torch.autograd.grad(first, a, v, retain_graph=True)[0])(torch.eye(3))
    torch.testing.assert_close(found, torch.diag(a.detach().cos()))


def test_a_captured_tensor_with_a_tangent_is_refused():
    theta = AT[0].clone().requires_grad_()
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        condition = ig.argmin(lambda phi, t: (phi - w * t).square().sum())
        with pytest.raises(ig.GraphError, match=r"captured a tensor.*pass it to the solver"):
            ig.implicit(lambda t: 0.5 * t, condition)(theta)
