"""The examples with a point: each makes it in miniature, with a hypergradient that is right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import implicit_grad as ig

for neighbour in ("scipy", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(neighbour)

pytestmark = pytest.mark.usefixtures("examples_on_path")


def command_line(out: Path, **numbers: int) -> list[str]:
    """Options of an example."""
    return ["--out", str(out), *(part for k, v in numbers.items() for part in (f"--{k}", str(v)))]


def assert_right(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-3) -> None:
    """Along a random direction, the implicit gradient is the difference of whole inner solves."""
    at = at.detach().requires_grad_()
    direction = torch.randn_like(at) / at.numel() ** 0.5
    (gradient,) = torch.autograd.grad(loss(at), [at])

    def moved(k: int) -> float:
        return loss(at.detach() + k * step * direction).item()

    reference = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    assert abs(reference) > 1e-6
    assert (gradient * direction).sum().item() == pytest.approx(reference, rel=1e-5)


def with_values(parameters: Any, vector: Tensor) -> None:
    """Write a vector into parameters, outside any graph."""
    nn.utils.vector_to_parameters(vector.detach(), parameters)


def assert_right_for(loss: Callable[[], Tensor], parameters: Any, step: float = 1e-3) -> None:
    """The same for the parameters of a module, whose gradients arrive in `.grad`."""
    parameters = list(parameters)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, vector: Tensor) -> Tensor:
            with_values(parameters, vector)
            with torch.enable_grad():
                value = loss()
                gradients = torch.autograd.grad(value, parameters)
            ctx.save_for_backward(torch.cat([g.flatten() for g in gradients]))
            return value.detach()

        @staticmethod
        def backward(ctx: Any, above: Tensor) -> Tensor:
            return above * ctx.saved_tensors[0]

    assert_right(Loss.apply, nn.utils.parameters_to_vector(parameters), step)


def picture(out: Path, name: str) -> bool:
    """Whether a picture of reasonable size was saved."""
    return 5_000 < (out / f"{name}.png").stat().st_size < 150_000


def test_one_ridge_weight_for_each_feature_beats_a_shared_one(tmp_path):
    import ridge_weights

    arguments = command_line(tmp_path, features=300, samples=240, steps=25, seeds=1)
    (shared,), _, (many,) = ridge_weights.main(arguments).values()
    assert many < 0.7 * shared
    assert picture(tmp_path, "ridge_weights")


def test_hypergradient_of_ridge_weights():
    import ridge_weights

    parts = ridge_weights.data(40, 80, seed=0)
    zero = torch.zeros(40, dtype=torch.float64)
    lam = ig.LearnedLam(zero, init=3.0, per="element")
    solve = ridge_weights.differentiable(lam, linear_solver=ig.CG(rtol=1e-12))
    assert_right_for(
        lambda: ridge_weights.error(solve(zero, *parts.train), parts.valid), lam.parameters()
    )


def test_weights_of_wrong_labels_fall(tmp_path):
    import label_noise

    scores = label_noise.main(command_line(tmp_path, samples=200, steps=6, seeds=1))
    for noisy, both, learned in zip(
        scores["noisy samples"],
        scores["noisy and clean samples"],
        scores["learned weights"],
        strict=True,
    ):
        assert learned > max(noisy, both) + 5
    assert picture(tmp_path, "label_noise")


def test_hypergradient_of_sample_weights(monkeypatch):
    import label_noise

    exact = ig.solvers.NewtonCG(maxiter=50, cg=200, tol=1e-12)
    monkeypatch.setattr(label_noise, "LBFGS", exact)
    parts, log_lam = label_noise.data(60, seed=0), torch.tensor(-3.0, dtype=torch.float64)
    solve = label_noise.solver(linear_solver=ig.CG(rtol=1e-10))
    assert_right(
        lambda logits: cross_entropy(
            parts.clean[0] @ solve(logits, log_lam, *parts.train), parts.clean[1]
        ),
        torch.randn(60, dtype=torch.float64),
    )


def test_influence_is_what_training_again_shows(tmp_path):
    import influence

    scores = influence.main(command_line(tmp_path, samples=100, seeds=1))
    assert scores["the 20 worst, corrected"][0] < 0.5 * scores["first order"][0] < 0.2
    assert scores["by influence"][0] > scores["at random"][0]
    assert picture(tmp_path, "influence")


def test_hypergradient_of_the_weights_of_points():
    import influence

    parts = influence.data(60, seed=0)
    solve = ig.implicit(influence.fit, ig.argmin(influence.objective))
    assert_right(
        lambda weights: influence.losses(solve(weights, *parts.train), parts.valid).mean(),
        torch.rand(60, dtype=torch.float64),
    )


def test_pictures_of_noise_become_digits_to_train_on(tmp_path, monkeypatch):
    import distillation

    monkeypatch.setattr(distillation, "LENGTHS", (10,))
    monkeypatch.setattr(distillation, "RIDGES", (1e-1,))
    untaught = distillation.main(command_line(tmp_path, samples=100, steps=0, seeds=1))
    taught = distillation.main(command_line(tmp_path, samples=100, steps=10, seeds=1))
    assert taught[distillation.LEARNED][0] > untaught[distillation.LEARNED][0] + 30
    assert picture(tmp_path, "distillation")


def test_hypergradient_of_the_pictures(monkeypatch):
    import distillation

    exact = ig.solvers.NewtonCG(maxiter=50, cg=700, tol=1e-12)
    monkeypatch.setattr(distillation, "NEWTON", exact)
    (X, y), _ = distillation.data(20, seed=0)
    solve = distillation.solver(linear_solver=ig.CG(rtol=1e-12))
    assert_right(
        lambda pictures: cross_entropy(
            distillation.logits(solve(pictures, distillation.LABELS), X), y
        ),
        X[:10],
    )


def test_equilibrium_layer_learns_digits_in_constant_memory(tmp_path):
    import deep_equilibrium

    found = deep_equilibrium.main(command_line(tmp_path, width=32, epochs=3, seeds=1))
    assert found["equilibrium"][0] > 85
    assert len(set(found["implicit"])) == 1
    assert found["unrolled"][-1] > 8 * found["implicit"][-1]
    assert picture(tmp_path, "deep_equilibrium")


@pytest.mark.parametrize("solver", ["anderson", "iteration"])
def test_hypergradient_of_the_equilibrium_layer(solver):
    import deep_equilibrium

    options = {"anderson": {"tol": 1e-12, "depth": 300}, "iteration": {"depth": 400}}
    layer, x = deep_equilibrium.Layer(4, 6).double(), torch.randn(5, 4).double()

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return getattr(deep_equilibrium, solver)(layer, x, **options[solver])

    solve = deep_equilibrium.equilibrium(layer, run, linear_solver=ig.NormalCG(rtol=1e-12))
    assert_right_for(lambda: solve(x).square().mean(), layer.parameters())


def test_learning_through_the_portfolio_has_less_regret():
    pytest.importorskip("gurobipy")
    import portfolio

    noiseless = portfolio.market(64, 0, 0)
    noiseless = noiseless._replace(returns=noiseless.means)
    least_squares = torch.linalg.lstsq(noiseless.X, noiseless.means).solution
    _, regrets = portfolio.end_to_end(least_squares, noiseless, noiseless, 3, ig.Monitor())
    assert 0 < regrets[-1] < 0.8 * regrets[0]


def test_portfolio_compares_both_ways(tmp_path):
    pytest.importorskip("gurobipy")
    import portfolio

    scores = portfolio.main(command_line(tmp_path, periods=32, epochs=1, seeds=1))
    assert all(0 < value < 1 for values in scores.values() for value in values)
    assert picture(tmp_path, "portfolio")


def test_hypergradient_of_the_portfolio():
    pytest.importorskip("gurobipy")
    import portfolio

    of = portfolio.market(3, 0, 0)
    invest = portfolio.layer(on_failure="raise")
    assert_right(
        lambda guess: portfolio.cost(invest(guess, of.covariance), of.means, of.covariance),
        of.returns / 2,
    )


def test_hessian_free_imaml_fits_sinusoids_best(tmp_path):
    pytest.importorskip("learn2learn")
    import sinusoids

    errors = sinusoids.main(command_line(tmp_path, iterations=15, tasks=2, test=10, width=20))
    assert errors["iMAML, Hessian-free"] < 0.8 * errors["FOMAML"]
    assert picture(tmp_path, "sinusoids")


def test_hypergradient_of_hessian_free_imaml():
    pytest.importorskip("learn2learn")
    import sinusoids

    model = sinusoids.network(3).double()
    learner = sinusoids.wrapped(
        "iMAML, Hessian-free",
        model,
        solver=ig.solvers.NewtonCG(maxiter=100, cg=40, tol=1e-12),
        linear_solver=ig.CG(rtol=1e-12),
        curvature="hessian",
        on_failure="raise",
    )
    x, y, query, target = (t.double() for t in sinusoids.task(torch.Generator().manual_seed(0)))
    assert_right_for(
        lambda: mse_loss(sinusoids.adapted(learner, x, y)(query), target), model.parameters()
    )


def test_the_regulator_lowers_the_damage_where_unrolling_costs_more(tmp_path):
    import equilibrium_game

    found = equilibrium_game.main(command_line(tmp_path, sites=5, steps=15, unroll=100))
    assert found["error"] < 1e-7
    assert found["after"] < found["before"]
    kib = {name: value for name, value in found.items() if " " in name}
    implicit = kib.pop("implicit, extragradient as black box")
    assert implicit < min(kib.values()) / 2
    assert picture(tmp_path, "equilibrium_game")


def test_hypergradient_of_the_equilibrium():
    import equilibrium_game

    rules = equilibrium_game.game(4, 0)
    solve = equilibrium_game.equilibrium(rules)
    assert_right(lambda shares: rules.loss(solve(shares)), torch.randn(4).double())


def test_a_richer_lambda_is_a_better_prior(tmp_path):
    pytest.importorskip("learn2learn")
    import learned_lambda

    scores = learned_lambda.main(command_line(tmp_path, iterations=20, tasks=2, seeds=1))
    fixed, scalar, per_tensor, per_element, _, bayes = (values[0] for values in scores.values())
    assert scalar > 0.95 * fixed
    assert bayes < per_element < per_tensor < 0.9 * fixed
    assert picture(tmp_path, "learned_lambda")


@pytest.mark.parametrize("form", [{"per": "tensor"}, {"per": "element", "rank": 2}])
def test_hypergradient_of_lambda(form):
    l2l = pytest.importorskip("learn2learn")
    import learned_lambda

    model = nn.Linear(learned_lambda.SLOPES, 1).double()
    lam = ig.LearnedLam(model, init=0.5, **form)
    learner = ig.imaml(
        l2l.algorithms.MAML(model, lr=0.1),
        lam=lam,
        solver=ig.solvers.NewtonCG(maxiter=5, cg=40),
        linear_solver=ig.CG(rtol=1e-12),
    )
    random = torch.Generator().manual_seed(0)
    tasks = learned_lambda.world(random).tasks(1, 2 * learned_lambda.SHOTS, random)
    loss = lambda: learned_lambda.query_loss(learner.clone(), tasks.X[0], tasks.y[0])  # noqa: E731
    assert_right_for(loss, learner.parameters())


def test_the_batch_of_linear_systems_is_what_a_learner_does():
    l2l = pytest.importorskip("learn2learn")
    import learned_lambda

    model = nn.Linear(learned_lambda.SLOPES, 1).double()
    lam = ig.LearnedLam(model, per="element", rank=3)
    newton = ig.solvers.NewtonCG(maxiter=5, cg=40)
    learner = ig.imaml(l2l.algorithms.MAML(model, lr=0.1), lam=lam, solver=newton).clone()
    random = torch.Generator().manual_seed(0)
    tasks = learned_lambda.world(random).tasks(1, learned_lambda.SHOTS, random)
    learner.adapt(lambda: mse_loss(learner(tasks.X[0])[:, 0], tasks.y[0]))
    phi = torch.cat([p.detach().flatten() for p in learner.parameters()])[: tasks.weights.shape[1]]
    expected = (phi - tasks.weights[0]).square().sum()
    found = learned_lambda.errors(learned_lambda.flat(model), learned_lambda.matrix(lam), tasks)
    torch.testing.assert_close(found[0], expected)


def test_wrong_sources_of_large_data_are_found_by_one_process_as_by_two(tmp_path, in_two_processes):
    import large_data

    numbers = {"batches": 3, "steps": 2}
    alone = large_data.main(command_line(tmp_path / "one", **numbers))
    assert alone["weights"][:3].max() < 0.3 < 0.7 < alone["weights"][3:].min()
    assert picture(tmp_path / "one", "large_data")
    printed = in_two_processes("large_data.py", *command_line(tmp_path / "two", **numbers))
    weights = ", ".join(f"{w:.3f}" for w in alone["weights"])
    assert printed.count(f"weights {weights};") == 1


def test_hypergradient_of_the_sources_weights():
    import large_data

    share = large_data.Share(0, 1, 2)
    exact = ig.solvers.NewtonCG(maxiter=50, cg=100, tol=1e-12)
    x, y = share.validation()
    solve = large_data.regression(share, None, solver=exact, linear_solver=ig.CG(rtol=1e-12))
    assert_right(
        lambda logits: cross_entropy(x @ solve(logits), y),
        torch.randn(large_data.SOURCES, dtype=torch.float64),
    )


def test_the_obstacle_is_found_through_the_planner(tmp_path):
    import planner

    found = planner.main(command_line(tmp_path, cars=2, steps=20, plans=8))
    assert found["gradient"] < 1e-3
    by_hypergradient, *others = (found[name] for name in planner.METHODS)
    assert by_hypergradient[-1] < min(curve[-1] for curve in others) / 2
    assert picture(tmp_path, "planner")


def test_an_energy_learned_by_steps_has_the_worse_minimum(tmp_path, monkeypatch):
    import energy_model

    monkeypatch.setattr(energy_model, "BATCH", 8)
    scores = energy_model.main(command_line(tmp_path, updates=28, seeds=1, test=50))
    (by_minimum,) = scores["learned by its minimum, minimised"]
    (by_steps,) = scores["learned by 5 steps, minimised"]
    assert by_minimum < by_steps
    assert picture(tmp_path, "energy_model")


def test_hypergradient_of_the_energy(monkeypatch):
    import energy_model

    exact = ig.solvers.NewtonCG(maxiter=50, cg=200, tol=1e-10)
    monkeypatch.setattr(energy_model, "MINIMISER", exact)
    x, y = (t[:2].double() for t in energy_model.digits(0)[:2])
    weights = torch.full((8,), -4.0, dtype=torch.float64)

    def loss(filters: Tensor) -> Tensor:
        answer = energy_model.minimum(x, (filters, weights), linear_solver=ig.CG(rtol=1e-10))
        return (answer - y).square().mean()

    assert_right(loss, energy_model.cosines().double())


def test_a_learned_reward_says_more_than_a_clone(tmp_path):
    import fitted_q

    found = fitted_q.main(command_line(tmp_path, transitions=500, updates=15, seeds=1))
    assert found["gradient"] < 1e-5
    few = {name: found[name][0][0] for name in (fitted_q.LEARNED, fitted_q.CLONED)}
    assert few[fitted_q.LEARNED] > few[fitted_q.CLONED] + 0.05
    assert picture(tmp_path, "fitted_q")


def test_a_learned_regulariser_makes_the_better_density(tmp_path):
    import density

    scores = density.main(command_line(tmp_path, updates=12, seeds=1, test=60))
    at = density.DOTS.index(density.SHOTS)
    learned, *others = (scores[way][0][at] for way in (density.LEARNED, "kernel", "smooth"))
    assert learned < min(others)
    assert picture(tmp_path, "density")


def test_hypergradient_of_the_regulariser():
    import density

    truth = torch.rand(3, density.PIXELS, dtype=torch.float64).softmax(-1)
    counts = torch.randint(3, truth.shape).double()
    condition = ig.argmin(density.objective, tasks=True)
    solve = ig.implicit(density.fit, condition, linear_solver=ig.CG(rtol=1e-12))
    assert_right(
        lambda factor: density.divergence(truth, solve(counts, truth.log(), factor)),
        torch.linalg.cholesky(density.ROUGHNESS),
    )


def test_evidence_finds_the_precision_if_its_gradient_is_whole(tmp_path):
    import evidence

    found = evidence.main(command_line(tmp_path, tasks=30, steps=25, seeds=1))["found"]
    off = {name: (lam / evidence.TRUE).log().median().abs() for name, (lam,) in found.items()}
    assert off[evidence.LEARNED] < off[evidence.PART] - 0.5
    assert picture(tmp_path, "evidence")


def test_hypergradient_of_the_evidence():
    import evidence

    torch.manual_seed(0)
    (X, y), _ = evidence.world(4)
    condition = ig.argmin(evidence.objective, tasks=True)
    solve = ig.implicit(evidence.fit, condition, linear_solver=ig.CG(rtol=1e-12))
    assert_right(
        lambda log_lam: evidence.surprise(solve(log_lam.exp(), X, y), log_lam.exp(), X, y),
        torch.zeros_like(evidence.TRUE),
    )


def test_a_decay_for_each_layer_is_learned_through_a_loop(tmp_path, monkeypatch):
    import layer_decay

    monkeypatch.setattr(layer_decay, "GRID", layer_decay.GRID[:2])
    found = layer_decay.main(command_line(tmp_path, epochs=15, steps=3, seeds=1))
    assert layer_decay.START == layer_decay.GRID[0]
    assert found["losses"]["learned"][0] < found["losses"]["grid"][0][0]  # where it started
    error, kib, _ = found["costs"]["EarlyStopped"]
    assert error < 1 and kib < found["costs"]["unrolled"][1] / 4
    assert picture(tmp_path, "layer_decay")


def test_hypergradient_of_the_decays():
    """Of one layer, which has a minimum; that of the CNN is held against all steps above."""
    import layer_decay

    parts = layer_decay.data(20, seed=0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    exact = ig.solvers.NewtonCG(maxiter=20, cg=30, tol=1e-10)
    solve = layer_decay.differentiable(
        parts.loader, 1, solver=exact, linear_solver=ig.CG(rtol=1e-9)
    )
    assert_right(
        lambda logs: layer_decay.loss(solve(start, logs, parts.loader, 1), parts.valid),
        torch.tensor([0.0], dtype=torch.float64),
        step=1e-2,
    )


def test_large_losses_are_believed_less(tmp_path):
    import weight_net

    numbers = {"samples": 400, "epochs": 20, "steps": 6, "seeds": 1}
    found = weight_net.main(command_line(tmp_path, **numbers))
    assert found[weight_net.LEARNED][0] > found["all weights 1/2"][0] + 2
    error, kib, _ = found["costs"]["EarlyStopped"]
    assert error < 1 and kib < found["costs"]["unrolled"][1] / 4
    assert picture(tmp_path, "weight_net")


def test_hypergradient_of_the_weight_net(monkeypatch):
    """Of one layer, and with a strong decay."""
    import weight_net

    monkeypatch.setattr(weight_net, "DECAY", 1.0)
    parts, net = weight_net.noisy(60, 0), weight_net.WeightNet()
    exact = ig.solvers.NewtonCG(maxiter=50, cg=200, tol=1e-12)
    solve = weight_net.differentiable(60, 1, solver=exact, linear_solver=ig.CG(rtol=1e-12))
    start = nn.Linear(65, 10).double()
    assert_right_for(
        lambda: weight_net.losses(solve(start, net, parts.train, 1), parts.clean).mean(),
        net.parameters(),
    )


def test_steps_with_weights_held_fixed_go_down_their_integral():
    import weight_net

    net, values = weight_net.WeightNet(), torch.tensor([0.1, 1.0, 3.0]).double().requires_grad_()
    (slope,) = torch.autograd.grad(net.integral(values).sum(), values)
    torch.testing.assert_close(slope, net(values).detach())


def test_a_backbone_learns_through_solved_heads(tmp_path, small_glyphs):
    import solved_head

    numbers = {"iterations": 16, "tasks": 4, "width": 8, "test": 20}
    found = solved_head.main(command_line(tmp_path, **numbers))
    for head in solved_head.HEADS:
        assert found[head][-1] > found[head][0]
    told = found["costs"]
    assert told[solved_head.SOLVED][0] < 0.05 < told["5 unrolled steps"][0]
    assert told[solved_head.SOLVED][1] < told["320 unrolled steps"][1] / 4
    assert picture(tmp_path, "solved_head")


def test_hypergradient_of_the_backbone_and_its_ridge():
    import solved_head

    exact = ig.solvers.NewtonCG(maxiter=50, cg=100, tol=1e-12)
    head = solved_head.solved(exact, linear_solver=ig.CG(rtol=1e-12))
    learner = solved_head.Learner(2, head).double()
    images = torch.rand(2, 5, 2, 1, 28, 28, dtype=torch.float64)
    assert_right_for(lambda: solved_head.loss(learner, images), learner.parameters(), step=1e-5)


def test_what_is_hidden_in_a_plate_is_found(tmp_path, monkeypatch):
    import simulator

    monkeypatch.setattr(simulator, "LENGTHS", (100,))
    found = simulator.main(command_line(tmp_path, size=5, iterations=25))
    assert found["correlation"] > 0.6
    assert found["by the implicit gradient"] < found["by differences"] / 10
    for name, (error, *_) in found["costs"].items():
        assert error < (1e-5 if name.startswith("implicit") else 0.5)
    assert picture(tmp_path, "simulator")


def test_hypergradient_of_the_conductivities():
    import simulator

    measured = simulator.Measured(6)
    assert_right(measured.loss, 0.3 * torch.randn(6, 6, dtype=torch.float64))


def test_the_ways_that_gradients_are_held_against():
    """All of them, on a problem that is solved by hand: w = b / (1 + a), by gradient descent."""
    import compared

    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def step_loss(model: nn.Module, a: Tensor) -> Tensor:
        w = model.weight[0, 0]
        return (w - 3).square() / 2 + a * w.square() / 2

    def outer(model: nn.Module) -> Tensor:
        return model.weight[0, 0].square()

    expected = -18 / (1 + a.detach()) ** 3

    def unrolled() -> Tensor:
        steps = [(a, 0.1)] * 200
        value = compared.unrolled(model, step_loss, steps, outer, momentum=0.5)
        return torch.autograd.grad(value, a)[0]

    torch.testing.assert_close(unrolled(), expected)
    torch.testing.assert_close(
        compared.differences(lambda a: (3 / (1 + a)) ** 2, a), expected, rtol=1e-6, atol=0
    )
    pytest.importorskip("torchopt")
    nn.init.constant_(model.weight, 2.0)
    torch.testing.assert_close(compared.by_torchopt(model, step_loss, outer, a), expected)


def test_a_way_is_measured_against_the_first(capsys):
    import compared

    ones = torch.ones(4, dtype=torch.float64)
    told = compared.costs({"exact": lambda: ones.clone(), "half": lambda: ones / 2})
    assert told["exact"][0] == 0 and told["half"][0] == 0.5
    assert "half" in capsys.readouterr().out
