"""The few-shot example: its data, its runs, its resumption, its refusals."""

import csv
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

for neighbour in ("learn2learn", "torchvision", "matplotlib", "rich"):
    pytest.importorskip(neighbour)
Image = pytest.importorskip("PIL.Image")

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--hidden", "4", "--meta-batch", "2", "--steps", "2"]
TINY += ["--test-tasks", "8", "--eval-tasks", "4", "--eval-every", "2", "--checkpoint-every", "2"]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the examples as their own script does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def few_shot(out: Path, *arguments: str) -> None:
    """Run the script in this process."""
    import few_shot

    few_shot.main([*TINY, "--out", str(out), *arguments])


def result(folder: Path) -> dict:
    """What a run wrote about its end."""
    return json.loads((folder / "result.json").read_text())


def rows(folder: Path, column: str) -> dict[int, str]:
    """One column of a run's log by iteration."""
    with (folder / "log.csv").open() as file:
        return {int(r["iteration"]): r[column] for r in csv.DictReader(file) if r[column]}


@pytest.mark.parametrize("algorithm", ["fomaml", "imaml", "anil"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    algorithm: str, small_glyphs: None, tmp_path: Path
) -> None:
    few_shot(tmp_path / "straight", "--algorithm", algorithm, "--iterations", "6")
    few_shot(tmp_path / "halves", "--algorithm", algorithm, "--iterations", "3")
    half = result(tmp_path / "halves" / f"{algorithm}-seed0")
    few_shot(tmp_path / "halves", "--algorithm", algorithm, "--iterations", "6", "--resume")
    straight = result(tmp_path / "straight" / f"{algorithm}-seed0")
    halves = result(tmp_path / "halves" / f"{algorithm}-seed0")
    assert halves["model_sha256"] == straight["model_sha256"] != half["model_sha256"]
    assert halves["score"] == straight["score"]
    losses = [rows(tmp_path / way / f"{algorithm}-seed0", "loss") for way in ("straight", "halves")]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("algorithm", "curvature"), [("imaml", "gauss_newton"), ("anil-imaml", "hessian")]
)
def test_batched_is_the_loop(
    algorithm: str, curvature: str, small_glyphs: None, tmp_path: Path
) -> None:
    """Eight test tasks in batches of three: also the last batch, which is smaller."""
    arguments = ["--algorithm", algorithm, "--curvature", curvature, "--iterations", "2"]
    arguments += ["--meta-batch", "3"]
    few_shot(tmp_path / "loop", *arguments)
    few_shot(tmp_path / "batched", *arguments, "--batched")
    name = f"{algorithm}-seed0"
    for column in ("loss", "accuracy", "failed_solves", "test_accuracy"):
        loop, batched = (rows(tmp_path / way / name, column) for way in ("loop", "batched"))
        assert loop.keys() == batched.keys() != set()
        for iteration, value in loop.items():
            assert float(batched[iteration]) == pytest.approx(float(value), rel=1e-3)
    loop, batched = (result(tmp_path / way / name) for way in ("loop", "batched"))
    assert loop["score"]["accuracy"] == pytest.approx(batched["score"]["accuracy"], abs=0.03)
    assert batched["config"] == {**loop["config"], "batched": True}


def test_two_workers_do_what_one_process_does(
    omniglot: tuple[Path, list[Path]], tmp_path: Path, in_two_processes: Callable[..., str]
) -> None:
    """Three tasks for two, and five to test on; solves that fail in either are counted."""
    arguments = ["--data", f"omniglot:{omniglot[0]}", "--algorithm", "imaml", "--iterations", "3"]
    arguments += ["--curvature", "hessian", "--meta-batch", "3", "--test-tasks", "5"]
    few_shot(tmp_path / "one", *arguments)
    printed = in_two_processes("few_shot.py", *TINY, *arguments, "--out", str(tmp_path / "two"))
    assert printed.count("MiB") == 1  # the table of results
    one, two = (tmp_path / way / "imaml-seed0" for way in ("one", "two"))
    for column in ("loss", "accuracy", "failed_solves", "test_accuracy"):
        expected = {k: float(v) for k, v in rows(one, column).items()}
        found = {k: float(v) for k, v in rows(two, column).items()}
        assert found == pytest.approx(expected, rel=1e-4)
    assert any(float(v) for v in rows(two, "failed_solves").values())


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    small_glyphs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import few_shot as script

    few_shot(tmp_path / "straight", "--algorithm", "fomaml", "--iterations", "6")
    step, calls = script.MetaLearner.step, []

    def fails_at_last(self: object, tasks: object) -> object:
        calls.append(None)
        if len(calls) == 7:  # one step measures the memory, then the sixth of six
            raise KeyboardInterrupt
        return step(self, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(script.MetaLearner, "step", fails_at_last)
        with pytest.raises(KeyboardInterrupt):
            few_shot(tmp_path / "cut", "--algorithm", "fomaml", "--iterations", "6")
    folder = tmp_path / "cut" / "fomaml-seed0"
    assert max(rows(folder, "loss")) == 5
    few_shot(tmp_path / "cut", "--algorithm", "fomaml", "--iterations", "6", "--resume")
    straight = tmp_path / "straight" / "fomaml-seed0"
    assert result(folder)["model_sha256"] == result(straight)["model_sha256"]
    assert rows(folder, "loss") == rows(straight, "loss")


def test_testing_does_not_disturb_training(small_glyphs: None, tmp_path: Path) -> None:
    seen = []
    for every in ("1", "100"):
        few_shot(
            tmp_path / every, "--algorithm", "fomaml", "--iterations", "3", "--eval-every", every
        )
        seen.append(result(tmp_path / every / "fomaml-seed0")["model_sha256"])
    assert seen[0] == seen[1]


def test_runs_leave_log_result_and_picture_and_are_not_redone(
    small_glyphs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--algorithm", "fomaml", "--iterations", "2", "--seed", "0", "1"]
    few_shot(tmp_path, *arguments)
    printed = capsys.readouterr().out
    assert "mean" in printed
    for seed in (0, 1):
        folder = tmp_path / f"fomaml-seed{seed}"
        assert sorted(rows(folder, "loss")) == [1, 2]
        assert sorted(rows(folder, "test_accuracy")) == [0, 2]
        assert result(folder)["test_tasks"] == 8
        assert result(folder)["peak_memory"] > 10_000
        assert 0 <= result(folder)["score"]["accuracy"] <= 1
    with Image.open(tmp_path / "learning_curves.png") as picture:
        assert picture.size == (1500, 600)
    written = (tmp_path / "fomaml-seed0" / "result.json").stat().st_mtime_ns
    few_shot(tmp_path, *arguments, "--resume")
    assert (tmp_path / "fomaml-seed0" / "result.json").stat().st_mtime_ns == written
    few_shot(tmp_path, *arguments)
    assert (tmp_path / "fomaml-seed0" / "result.json").stat().st_mtime_ns > written


def test_the_score_is_the_mean_with_its_normal_interval() -> None:
    from reporting import Score

    score = Score.of([0.0, 1.0] * 50)
    assert score.accuracy == 0.5
    assert score.interval == pytest.approx(1.96 * np.sqrt(0.25 * 100 / 99) / 10)


def test_glyphs_are_deterministic_and_held_out_alphabets_are_new() -> None:
    import glyphs
    from characters import Characters

    render = glyphs.render.__wrapped__  # past the cache
    images, names = render(drawings=2)
    again, _ = render(drawings=2)
    other, _ = render(drawings=2, seed=1)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert images.shape == (len(names), 2, 1, 28, 28)
    assert images.amin() >= 0 and images.amax() <= 1
    assert (images.amax((1, 2, 3, 4)) > 0.9).all()
    assert len(names) > 900
    train, test = Characters(images, names).split(glyphs.HELD_OUT)
    assert set(test.alphabets) == set(glyphs.HELD_OUT)
    assert set(train.alphabets).isdisjoint(test.alphabets)
    assert len(train.names) + len(test.names) == len(names)
    assert len(test.names) > 80


def test_no_glyph_occurs_twice_not_even_turned() -> None:
    import glyphs

    clean, all_names = glyphs._clean_glyphs()
    kept, names = glyphs._distinct(clean, all_names)
    twins = {("Latin", "U+0041"), ("Greek", "U+0391"), ("Cyrillic", "U+0410")}
    assert twins <= set(all_names)
    assert len(twins & set(names)) <= 1
    test = torch.tensor([alphabet in glyphs.HELD_OUT for alphabet, _ in names])
    flat = kept[test].flatten(1)
    for turn in range(4):
        turned = torch.rot90(kept[~test], turn, (2, 3)).flatten(1)
        assert torch.cdist(flat, turned).amin() > 5  # one printed stroke is some 10 to 20 apart


def write_set(root: Path, name: str, alphabets: dict[str, int]) -> Path:
    """A folder in Omniglot's layout: `alphabets` names each one's number of characters."""
    for alphabet, count in alphabets.items():
        for character in range(1, count + 1):
            folder = root / name / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawing in range(1, 5):
                ink = np.full((105, 105), 255, dtype=np.uint8)
                ink[10 * character : 10 * character + 8, 5 * drawing : 60] = 0
                identity = sum(map(ord, alphabet)) + character
                Image.fromarray(ink).save(folder / f"{identity:04}_{drawing:02}.png")
    return root / name


@pytest.fixture
def omniglot(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Two overlapping sets, as a folder and as zips."""
    root = tmp_path / "omniglot"
    sets = [
        write_set(root, "small1", {"Greek": 3, "Korean": 2}),
        write_set(root, "small2", {"Greek": 3, "Tagalog": 2}),
    ]
    zips = []
    for folder in sets:
        zips.append(tmp_path / f"{folder.name}.zip")
        with zipfile.ZipFile(zips[-1], "w") as archive:
            for file in reversed(sorted(folder.rglob("*.png"))):
                archive.write(file, file.relative_to(root))
    return root, zips


def test_omniglot_folder_and_zips_are_the_same_without_duplicates(
    omniglot: tuple[Path, list[Path]],
) -> None:
    from characters import load

    root, zips = omniglot
    folder, held_out = load(f"omniglot:{root}", None)
    zipped, _ = load("omniglot:" + ",".join(map(str, zips)), None)
    zip_folder, _ = load(f"omniglot:{zips[0].parent}", None)
    assert folder.names == [
        *(("Greek", f"character0{number}") for number in (1, 2, 3)),
        *(("Korean", f"character0{number}") for number in (1, 2)),
        *(("Tagalog", f"character0{number}") for number in (1, 2)),
    ]
    assert folder.images.shape == (7, 4, 1, 28, 28)
    for other in (zipped, zip_folder):
        assert other.names == folder.names
        assert torch.equal(other.images, folder.images)
    assert held_out == ["Korean", "Tagalog"]
    assert folder.images[0, 0, 0, 3, 8] > 0.9  # ink is 1
    assert folder.images[0, 0, 0, 20, 20] == 0


def test_a_task_has_its_classes_in_order_and_its_turns_right(
    omniglot: tuple[Path, list[Path]],
) -> None:
    from characters import Drawings, load, taskset

    characters, _ = load(f"omniglot:{omniglot[0]}", None)
    drawings = Drawings(characters)
    upright, label = drawings[5]
    turned, turned_label = drawings[5 + 28]
    assert (label, turned_label) == (1, 1 + 7)
    assert torch.equal(turned, torch.rot90(upright, 1, (1, 2)))
    data, labels = taskset(characters, ways=3, shots=2).sample()
    assert data.shape == (12, 1, 28, 28)
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    assert all(len(set(group)) == 1 for group in labels.view(3, 4).tolist())


def test_the_pipeline_learns_from_omniglot(
    omniglot: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few_shot(out, "--data", f"omniglot:{omniglot[0]}", "--iterations", "1", "--algorithm", "fomaml")
    assert result(out / "fomaml-seed0")["config"]["test_alphabets"] == ["Korean", "Tagalog"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "-1"], "argument --lr: -1 is not a number above 0"),
        (["--ways", "1"], "argument --ways: 1 is not a number at least 2"),
        (["--lam", "many"], "argument --lam: invalid float value: 'many'"),
        (["--algorithm", "sgd"], "argument --algorithm: invalid choice: 'sgd'"),
        (["--device", "abacus"], "argument --device: this machine has no device 'abacus'"),
        (["--data", "mnist"], "--data mnist: choose glyphs, omniglot or omniglot:PATH"),
        (["--data", "omniglot"], "--data omniglot: say where, omniglot:PATH[,PATH...] or --root"),
        (["--data", "omniglot:nowhere"], "--data omniglot: there is no nowhere"),
        (["--test-alphabets", "Klingon"], "--test-alphabets: no alphabet 'Klingon'; there are"),
        (["--ways", "500"], "--ways 500: only 292 classes in ['Greek', 'Latin']"),
        (
            ["--batched", "--algorithm", "imaml", "maml"],
            "--batched: maml adapts to one task at a time, imaml to many",
        ),
        (["--shots", "11"], "--shots 11: a character has drawings for at most 10"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str],
    sentence: str,
    small_glyphs: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        few_shot(tmp_path / "out", *arguments)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert sentence in last
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_options_is_refused(
    small_glyphs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--algorithm", "fomaml", "--iterations", "2"]
    few_shot(tmp_path, *run)
    for change, sentence in (
        (["--lr", "0.3"], "--resume: fomaml-seed0 began with lr 0.4, not 0.3"),
        (["--iterations", "1"], "--iterations 1: fomaml-seed0 has already done 2"),
    ):
        with pytest.raises(SystemExit):
            few_shot(tmp_path, *run, *change, "--resume")
        assert sentence in capsys.readouterr().err
