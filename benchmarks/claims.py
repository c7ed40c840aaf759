"""Does what README claims hold here? Its ratios, beside the ones that this run measured.

    python benchmarks/claims.py --out out            # after the others; `make bench` ends with it

Reads README's table "Measurements" and the CSV files in --out. A range holds where what was
measured, rounded as README rounds it, lies within; a single number, where it is off by at most a
tenth. What the run did not measure is said to be so, with the script that would.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tables import Row, write

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SLACK = 0.1  # of a number that README gives alone

Rows = list[dict[str, str]]
NUMBER = r"(\d[\d,]*(?:\.\d+)?)"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A number or a range in a row of README's table, and how it is measured.

    `row` is a part of the row's first cell. `says` finds the words: one number, or a range's two
    ends, or several numbers, or none (see `WORDS`). `measure` makes of a CSV file's rows the
    numbers to hold against them; `script` is what writes the file.
    """

    row: str
    what: str
    says: str
    script: str
    file: str
    measure: Callable[[Rows], Sequence[float]]


def _values(rows: Rows, column: str, **where: str) -> list[float]:
    return [
        float(r[column]) for r in rows if r[column] and all(r[k] == v for k, v in where.items())
    ]


def _ours(rows: Rows) -> list[float]:
    here = [
        r for r in rows if r.get("job", CONV) == CONV and r["method"].startswith(("im", "impl"))
    ]
    return _values(here, "over_floor")


def _peer(prefix: str) -> Callable[[Rows], list[float]]:
    return lambda rows: _values([r for r in rows if r["method"].startswith(prefix)], "over_floor")


def _maml(rows: Rows) -> list[float]:
    return _values(rows, "over_floor", method="learn2learn MAML")


def _accuracies(rows: Rows) -> list[float]:
    return _values(rows, "accuracy", steps="16")


def _growth(method: str) -> Callable[[Rows], list[float]]:
    def measure(rows: Rows) -> list[float]:
        peaks = {int(r["steps"]): float(r["MiB"]) for r in rows if r["method"] == method}
        return [peaks[max(peaks)] / peaks[min(peaks)]]

    return measure


def _violated(rows: Rows) -> list[float]:
    return [float(sum(float(r["error"]) > float(r["bound"]) for r in rows))]


def _median(rows: Rows) -> list[float]:
    return [float(r["median"]) for r in rows if r["ratio"].endswith("as it is")]


def _faster(rows: Rows) -> list[float]:
    return sorted(_values(rows, "times_faster", tolerance="0.01"))


CONV = "conv net, 5-way 1-shot"
TIME, SOON = "Time of a meta-gradient", "Time to a hypergradient"
MEMORY, BOUNDS, ACCURACY = "Memory", "error bounds", "Few-shot accuracy"
ONE_STEP, GROWS, NONE, LEVEL = "that of one step", "grows with each", "none violated", "level"
STEPS, THREE = "memory_steps", rf"^{NUMBER}, {NUMBER} and {NUMBER}"

CLAIMS = (
    Claim(TIME, "ours over the floor", rf"^{NUMBER} to {NUMBER};", "floor", "floor", _ours),
    Claim(TIME, "Betty", rf"Betty {NUMBER}", "peers", "peers", _peer("Betty")),
    Claim(TIME, "TorchOpt", rf"TorchOpt {NUMBER} to {NUMBER}", "peers", "peers", _peer("torchopt")),
    Claim(TIME, "MAML", rf"\bMAML {NUMBER}", "peers", "peers", _maml),
    Claim(TIME, "higher", rf"higher {NUMBER}", "peers", "peers", _peer("higher")),
    Claim(TIME, "jaxopt, jit", rf"jaxopt jit {NUMBER}", "peers", "peers", _peer("jaxopt")),
    Claim(MEMORY, "iMAML's, most steps over one", ONE_STEP, "memory", STEPS, _growth("iMAML")),
    Claim(MEMORY, "MAML's, most steps over one", GROWS, "memory", STEPS, _growth("MAML")),
    Claim(
        SOON, "times faster, at 1 %", THREE, "time_to_accuracy", "time_to_accuracy_best", _faster
    ),
    Claim(BOUNDS, "violated", NONE, "certificates", "certificates_solve", _violated),
    Claim(BOUNDS, "bound/error", rf"median {NUMBER}", "certificates", "certificates", _median),
    Claim(ACCURACY, "accuracies, %", LEVEL, "omniglot", "omniglot", _accuracies),
)

# Where README says a word and no number, what the measured numbers have to be.
WORDS: dict[str, Callable[[Sequence[float]], bool]] = {
    ONE_STEP: lambda found: max(found) < 1.005,
    GROWS: lambda found: min(found) > 2,
    NONE: lambda found: found == [0.0],
    LEVEL: lambda found: max(found) - min(found) < 2,  # percent; its intervals are 1
}


def claimed(readme: str) -> dict[str, str]:
    """The rows of README's table "Measurements": what, and what is said of it."""
    section = re.search(r"^## Measurements\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    lines = [line for line in (section[1] if section else "").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0]: row[1] for row in cells[1:]}


def told(claim: Claim, table: dict[str, str]) -> re.Match[str] | None:
    """Where README says it."""
    rows = [text for name, text in table.items() if claim.row in name]
    return re.search(claim.says, rows[0]) if rows else None


def judged(match: re.Match[str], found: Sequence[float]) -> bool:
    """Whether what was measured is what README says."""
    if not match.groups():
        return WORDS[match[0]](found)
    said = [float(number.replace(",", "")) for number in match.groups()]
    if len(said) == 1:
        return all(abs(value - said[0]) <= SLACK * said[0] for value in found)
    if len(said) == 2:
        digits = len(match[1].partition(".")[2])
        return all(min(said) <= round(value, digits) <= max(said) for value in found)
    near = [abs(b - a) <= SLACK * a for a, b in zip(sorted(said), sorted(found), strict=False)]
    return len(said) == len(found) and all(near)


def compared(readme: str, out: Path) -> list[Row]:
    """A row for each claim: README's words, what was measured, and whether they agree."""
    table, rows = claimed(readme), []
    for claim in CLAIMS:
        match, path = told(claim, table), out / f"{claim.file}.csv"
        row: Row = {"claim": claim.row, "of": claim.what}
        row["README"] = match[0].strip(" ;") if match else "says nothing of it any more"
        row["measured"], row["holds"] = f"not by this run: {claim.script}.py does", ""
        found: Sequence[float] = []
        if path.exists():
            with path.open(newline="") as file:
                found = claim.measure(list(csv.DictReader(file)))
        if found:
            shown = list(dict.fromkeys(f"{value:.3g}" for value in sorted(found)))
            few = len(shown) <= 3
            row["measured"] = ", ".join(shown) if few else f"{shown[0]} to {shown[-1]}"
            row["holds"] = "" if match is None else "yes" if judged(match, found) else "NO"
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The table, printed and into a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder with the results")
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args(arguments)
    write(compared(args.readme.read_text(), args.out), args.out / "claims.csv")


if __name__ == "__main__":
    main()
