"""README's claims beside what was measured: on files made up for it, and README as it is."""

import csv
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")

README = """
## Measurements

| Ratios | more |
|---|---|
| Time of a meta-gradient (net) | 1.03 to 1.05; Betty 1.18, TorchOpt 1.35 to 1.53, MAML 2.0, higher 2.5 |
| Memory, any number of steps | that of one step; MAML's grows with each |
| Time to a hypergradient within 1 % | 2.1, 2.2 and 6.6 times faster |
| 1,234 error bounds | none violated, median 1.6 times the error |

## More
"""  # noqa: E501
CONV = "conv net, 5-way 1-shot"


def put(folder: Path, name: str, *rows: dict[str, object]) -> None:
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def held(folder: Path, readme: str = README) -> dict[str, tuple[object, object]]:
    """What was measured, and whether it holds, by claim."""
    from claims import compared

    return {str(r["of"]): (r["measured"], r["holds"]) for r in compared(readme, folder)}


def floor(*ratios: float) -> list[dict[str, object]]:
    methods = ("implicit, own loop", "imaml, adapt(loss)")
    rows = [
        {"job": CONV, "method": m, "over_floor": r} for m, r in zip(methods, ratios, strict=True)
    ]
    other = [("MLP, 1M weights", "implicit, own loop"), (CONV, "by hand")]  # nothing is claimed
    return [*rows, *({"job": job, "method": m, "over_floor": 9.0} for job, m in other)]


@pytest.mark.parametrize(
    ("ratios", "holds"),
    [((1.026, 1.054), "yes"), ((1.024, 1.04), "NO"), ((1.04, 1.056), "NO")],
)
def test_a_range_holds_as_it_is_rounded(tmp_path, ratios, holds):
    put(tmp_path, "floor", *floor(*ratios))
    assert held(tmp_path)["ours over the floor"][1] == holds


@pytest.mark.parametrize(("ratio", "holds"), [(1.1, "yes"), (1.29, "yes"), (1.31, "NO")])
def test_a_single_number_holds_to_a_tenth(tmp_path, ratio, holds):
    put(tmp_path, "peers", {"method": "Betty", "over_floor": ratio})
    assert held(tmp_path)["Betty"] == (f"{ratio:.3g}", holds)


def test_one_of_three_numbers_that_is_off_is_seen(tmp_path):
    def rows(*ratios: float) -> list[dict[str, object]]:
        return [{"tolerance": t, "times_faster": r} for r in ratios for t in ("0.1", "0.01")]

    put(tmp_path, "time_to_accuracy_best", *rows(2.15, 6.5, 2.1))
    assert held(tmp_path)["times faster, at 1 %"] == ("2.1, 2.15, 6.5", "yes")
    put(tmp_path, "time_to_accuracy_best", *rows(1.8, 6.5, 2.1))
    assert held(tmp_path)["times faster, at 1 %"][1] == "NO"
    put(tmp_path, "time_to_accuracy_best", *rows(6.5))
    assert held(tmp_path)["times faster, at 1 %"][1] == "NO"


@pytest.mark.parametrize(("last", "holds"), [(6.51, "yes"), (6.6, "NO")])
def test_words_are_held_to_what_they_mean(tmp_path, last, holds):
    rows = [("iMAML", 1, 6.51), ("iMAML", 16, last), ("MAML", 1, 5.0), ("MAML", 16, 31.0)]
    put(tmp_path, "memory_steps", *({"method": m, "steps": s, "MiB": p} for m, s, p in rows))
    found = held(tmp_path)
    assert found["iMAML's, most steps over one"][1] == holds
    assert found["MAML's, most steps over one"] == ("6.2", "yes")


def test_a_bound_below_its_error_is_counted(tmp_path):
    good = {"error": 1e-3, "bound": 2e-3}
    put(tmp_path, "certificates_solve", good, good)
    assert held(tmp_path)["violated"] == ("0", "yes")
    put(tmp_path, "certificates_solve", good, {"error": 1e-3, "bound": 9e-4})
    assert held(tmp_path)["violated"] == ("1", "NO")


def test_what_was_not_measured_is_said_so(tmp_path):
    found = held(tmp_path)
    assert all(measured.startswith("not by this run: ") for measured, _ in found.values())
    put(tmp_path, "peers", {"method": "Betty", "over_floor": ""})  # it is not installed
    assert held(tmp_path)["Betty"] == ("not by this run: peers.py does", "")


def test_a_claim_that_readme_has_dropped_is_told(tmp_path):
    from claims import compared

    put(tmp_path, "peers", {"method": "Betty", "over_floor": 1.2})
    rows = compared(README.replace("Betty 1.18, ", ""), tmp_path)
    (row,) = (row for row in rows if row["of"] == "Betty")
    assert row["README"] == "says nothing of it any more" and row["holds"] == ""


def test_every_row_of_readme_is_held_to_something():
    import claims

    table = claims.claimed(claims.README.read_text())
    assert len(table) >= 5
    for claim in claims.CLAIMS:
        assert claims.told(claim, table), f"README says nothing of {claim.row}: {claim.what}"
        assert (claims.ROOT / "benchmarks" / f"{claim.script}.py").exists()
    for name in table:
        assert any(claim.row in name for claim in claims.CLAIMS), f"nothing measures {name}"


def test_the_published_tables_hold(tmp_path, capsys):
    """README was written from them."""
    import claims

    results = claims.ROOT / "benchmarks" / "results"
    rows = claims.compared(claims.README.read_text(), results)
    assert [row["of"] for row in rows if row["holds"] != "yes"] == []
    claims.main(["--out", str(tmp_path)])
    assert "not by this run: floor.py does" in capsys.readouterr().out
    assert (tmp_path / "claims.csv").exists()
