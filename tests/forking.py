"""Processes that are forked after their imports, which take longest."""

import multiprocessing
import os
import sys

import pytest


def start_method(module: str) -> str:
    """multiprocessing's, for functions of a module of tests; one server serves all modules."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    from multiprocessing import forkserver

    # optimizers import the compiler
    forkserver.set_forkserver_preload([module, "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:  # where the server finds the module
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return "forkserver"
