"""The benchmarks of memory, scaling and the paper's figure: in miniature, with what they claim."""

import csv
from pathlib import Path

import pytest

for neighbour in ("learn2learn", "matplotlib", "rich"):
    pytest.importorskip(neighbour)

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


STATED = ("kappa of", "method", "steps")


def table(path: Path, *keys: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a CSV file by the values of some columns."""
    with path.open(newline="") as file:
        return {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}


def column(path: Path, value: str, *keys: str) -> dict[tuple[str, ...], float]:
    """One column of it, as numbers."""
    return {key: float(row[value]) for key, row in table(path, *keys).items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchOpt's, about functorch
def test_memory_does_not_grow_with_the_steps(tmp_path, monkeypatch):
    import memory

    nets = {"OmniglotCNN": lambda ways: memory.l2l.vision.models.OmniglotCNN(ways, hidden_size=16)}
    monkeypatch.setattr(memory, "NETS", nets)
    memory.main(["--out", str(tmp_path), "--steps", "4", "--shots", "1"])
    peaks = column(tmp_path / "memory_steps.csv", "MiB", "method", "steps")
    assert peaks["iMAML", "4"] == pytest.approx(peaks["iMAML", "1"], rel=1e-5)  # some numbers
    assert peaks["iMAML", "4"] < peaks["MAML", "4"]
    found = column(tmp_path / "memory_parts.csv", "over_gradient", "network", "task", "method")
    assert found["OmniglotCNN", "20-way 1-shot", "FOMAML"] == pytest.approx(1, abs=0.01)
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_cost_grows_with_parameters_and_tasks_and_memory_not_with_iterations(
    tmp_path, monkeypatch, few_rounds
):
    import scaling

    monkeypatch.setattr(scaling, "TASKS", (1, 2, 4))
    monkeypatch.setattr(scaling, "ITERATIONS", (1, 8, 64))
    scaling.main(["--out", str(tmp_path), "--largest", "10000", "--shots", "1", "--repeats", "0"])
    memory = column(tmp_path / "scaling_exponents.csv", "memory", "factor")
    assert memory["parameters",] == pytest.approx(1, abs=0.1)
    assert memory["CG iterations",] == memory["tasks",] == 0
    taken = column(tmp_path / "scaling.csv", "iterations", "factor", "value")
    assert taken["CG iterations", "64"] == 64  # nothing ends CG earlier
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_figure_2_in_miniature(tmp_path, few_rounds):
    import figure2

    sizes = {"problems": 2, "steps": 64, "ways": 5, "shots": 1, "repeats": 0, "unrolled": 4}
    options = [part for k, v in sizes.items() for part in (f"--{k}", str(v))]
    figure2.main(["--out", str(tmp_path), "--kappa", "100", *options])
    error = column(tmp_path / "figure2_error.csv", "error", "method", "steps")
    assert error["iMAML, CG 10", "64"] < error["iMAML, CG 5", "64"] < error["iMAML, CG 2", "64"]
    truncated = error[f"MAML, truncated to {figure2.LAST}", "64"]
    assert truncated == pytest.approx(error[f"iMAML, Neumann {figure2.LAST}", "64"], rel=1e-5)
    of, stated = "loss", column(tmp_path / "figure2_stated.csv", "error", *STATED)
    assert stated[of, "iMAML, CG 5", "4"] < stated[of, "MAML", "4"] < stated[of, "FOMAML", "4"]
    assert stated[of, "MAML", "64"] < 1e-3 < stated[of, "iMAML, CG 5", "64"] < 0.05  # no further
    growth = column(tmp_path / "figure2_exponents.csv", "exponent", "of")
    assert growth["gradient descent, iterations",] == pytest.approx(1, abs=0.05)
    assert growth["Nesterov, iterations",] == pytest.approx(0.5, abs=0.05)
    assert growth["CG, iterations",] == pytest.approx(0.5, abs=0.05)
    assert growth["iMAML, MiB",] == growth["FOMAML, MiB",] == 0 < growth["MAML, MiB",]
    assert (tmp_path / "figure2.png").stat().st_size > 10_000


def test_theorem_1_and_the_limits_in_miniature(tmp_path, monkeypatch):
    import identities

    monkeypatch.setattr(identities, "STEPS", (1, 64))
    monkeypatch.setattr(identities, "PRODUCTS", (1, 20))
    identities.main(["--out", str(tmp_path), "--problems", "1"])
    keys = ("problem", "seed", "steps", "products")
    errors = column(tmp_path / "identities_theorem.csv", "error", *keys)
    allowed = column(tmp_path / "identities_theorem.csv", "allowed", *keys)
    assert all(0 < error <= 1.001 * allowed[key] for key, error in errors.items())
    for limit in ("implicit to unrolled", "Reptile to FOMAML"):
        apart = column(tmp_path / "identities_limits.csv", limit, "steps")
        assert apart["64",] < 1e-3 < apart["1",]
    assert (tmp_path / "identities.png").stat().st_size > 10_000


def test_the_published_code_tests_on_characters_that_it_trained_on(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import published_code

    assert published_code.shared() == (310, 423)


def test_without_a_lam_the_gradient_is_nearer_to_mamls_than_first_order_mamls(
    tmp_path, monkeypatch
):
    import default_lam

    monkeypatch.setattr(default_lam, "SETTINGS", ((2, 0.01),))
    default_lam.main(["--out", str(tmp_path), "--tasks", "2"])
    errors = column(tmp_path / "default_lam.csv", "error", "choice")
    first_order = errors.pop(("first-order MAML",))
    assert 0 < first_order < 0.1  # so short are the steps
    del errors["lam=None, Gauss-Newton",]  # has no part in most of that
    # which leaves out what is negative in the Hessian
    for default in ("lam=None, the default", "lam=None, the default with five products"):
        assert errors.pop((default,)) < first_order / 2
    assert all(error < first_order / 3 for error in errors.values())


def test_a_short_training_has_a_row_for_each_method(tmp_path):
    import short_training

    methods = ["first", "default", "maml", "learned-per-tensor"]
    sizes = ["--iterations", "2", "--tests", "3", "--seeds", "1", "--steps", "2", "--lr", "1e-6"]
    short_training.main(["--out", str(tmp_path), *sizes, "--methods", *methods])
    rows = table(tmp_path / "short_training_sinusoids_2x1e-06_lam.csv", "method")
    assert {rows[m,]["length"] for m in methods[:3]} == {"1.00"}  # no step leads anywhere
    assert " to " in rows["learned-per-tensor",]["lam"]


def test_gradients_of_policies_in_miniature(tmp_path):
    import policy_gradients

    sizes = {"iterations": 1, "tasks": 3, "episodes": 5, "width": 4, "seeds": 1}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    policy_gradients.main(["--out", str(tmp_path), *options])
    error, longest = (
        column(tmp_path / "policy_gradients.csv", name, "algorithm", "method")
        for name in ("error", "longest")
    )
    first, exact = "first-order MAML", "EarlyStopped(maxiter=5)"  # exact where no step overshoots
    for algorithm in ("TRPO", "ProMP"):
        assert error[algorithm, exact] < 1e-4 < error[algorithm, first]
    for algorithm in ("TRPO", "ProMP", "DiCE"):
        assert longest[algorithm, "default"] <= longest[algorithm, first] * 1.001


def test_stopped_trainings_in_miniature(tmp_path):
    import stopped_training

    loops = ["logistic regression", "fine-tuning"]
    sizes = ["--seeds", "1", "--lengths", "1"]
    stopped_training.main(["--out", str(tmp_path), "--loops", *loops, *sizes])
    error = column(tmp_path / "stopped_training.csv", "error", "loop", "method")
    assert error["logistic regression", "unrolled"] == 0
    for method in ("default", "EarlyStopped, time", "EarlyStopped, steps", "CG 20", "Neumann"):
        assert error["logistic regression", method] < 1e-6  # the training has settled
    assert error["fine-tuning", "EarlyStopped, steps"] < error["fine-tuning", "Neumann"]
    pieces = [error["fine-tuning", f"EarlyStopped, {n} pieces"] for n in (4, 16)]
    assert pieces[1] < pieces[0] < error["fine-tuning", "EarlyStopped, time"]
    settled = column(tmp_path / "stopped_training_goals.csv", "settled_trainings", "method")
    assert settled["EarlyStopped, time",] == 1
    assert (tmp_path / "stopped_training.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["MLP, decay per tensor", "CNN, decay per tensor", "fine-tuning"])
def test_the_unrolled_steps_are_those_of_torch_s_optimizer(name):
    import dataclasses

    from stopped_loops import LOOPS

    loop = dataclasses.replace(LOOPS[name](0), epochs=3)
    weights, unrolled = loop.train(), loop.unrolled(loop.argument)
    for key, found in weights.items():
        assert float((found - unrolled[key]).detach().abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["weight net", "DARTS", "LoRA, decay per tensor", "PDE"])
def test_the_unrolled_gradient_is_that_of_differences_of_whole_loops(name):
    import dataclasses

    from stopped_loops import LOOPS, normal
    from stopped_training import unrolled

    loop = dataclasses.replace(LOOPS[name](0), epochs=3)
    along = normal(*loop.argument.shape, seed=3)

    def outer(step):
        moved = dataclasses.replace(loop, argument=loop.argument + step * along)
        return float(loop.outer(moved.train()))

    difference = (outer(1e-5) - outer(-1e-5)) / 2e-5
    assert float(unrolled(loop) @ along) == pytest.approx(difference, rel=1e-4)
