"""`python -m implicit_grad`: it tells what is there, and what does not work."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import implicit_grad as ig
from implicit_grad import __main__ as doctor


@pytest.fixture
def without_neighbours(monkeypatch):
    """Importing them takes seconds."""
    monkeypatch.setattr(doctor, "_NEIGHBOURS", {})


def broken():
    raise RuntimeError("no licence\nand more lines")


def test_all_that_is_installed_works(capsys):
    assert doctor.main() == 0
    told = capsys.readouterr().out
    for version in (ig.__version__, torch.__version__.split("+")[0], sys.version.split()[0]):
        assert version in told
    assert "cpu     float64  relative error" in told and "All of these work." in told
    assert "check_implicit" in told and "FAILS" not in told


def test_as_a_program_where_nothing_else_is_installed():
    hide = """
import importlib.metadata, runpy
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
runpy.run_module("implicit_grad", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" not installed\n") == len(doctor._NEIGHBOURS)


@pytest.mark.parametrize(
    ("check", "told"),
    [(broken, "FAILS: RuntimeError: no licence\n"), (lambda: False, "FAILS: a wrong solution\n")],
)
def test_a_neighbour_that_does_not_work(monkeypatch, capsys, check, told):
    monkeypatch.setattr(doctor, "_NEIGHBOURS", {"numpy": check})
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert told in out and "1 of these do not work" in out


@pytest.mark.parametrize(
    ("cuda", "hip", "told"),
    [("12.8", None, "CUDA 12.8"), (None, "6.4", "ROCm 6.4"), (None, None, "the CPU")],
)
def test_what_torch_is_built_for(monkeypatch, capsys, without_neighbours, cuda, hip, told):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    doctor.main()
    assert f"torch is built for {told}\n" in capsys.readouterr().out


def test_a_device_that_computes_wrongly(monkeypatch, capsys, without_neighbours):
    softplus = doctor.softplus
    monkeypatch.setattr(doctor, "softplus", lambda z: softplus(1.01 * z))
    assert doctor.main() == 1
    assert capsys.readouterr().out.count("FAILS: relative error") == 2


def test_a_device_that_cannot_compute(monkeypatch, capsys, without_neighbours):
    monkeypatch.setattr(doctor, "_devices", lambda: ["meta"])
    assert doctor.main() == 1
    assert "meta    float32  FAILS: " in capsys.readouterr().out
