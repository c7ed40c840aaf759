"""Values handed on to backward live as long as they are in use, whatever torch counts."""

import ctypes
import sys

import pytest
import torch

from implicit_grad._torch import handed_on
from implicit_grad._torch.handed_on import HandedOn


class Forgetful:
    """Torch's store as it was in older versions: it gives up references that it never took."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}

    def store(self, key: str, value: object) -> None:
        old, self.addresses[key] = self.addresses.get(key), id(value)
        if old is not None:
            ctypes.pythonapi.Py_DecRef(ctypes.cast(old, ctypes.py_object))

    def load(self, key: str) -> object:
        return ctypes.cast(self.addresses[key], ctypes.py_object).value


@pytest.fixture(params=["this torch", "older torch"])
def handed(request, monkeypatch):
    """A value in this version's store, or in an older one's."""
    if request.param == "older torch":
        store = Forgetful()
        monkeypatch.setattr(torch._C, "_stash_obj_in_tls", store.store)
        monkeypatch.setattr(torch._C, "_get_obj_in_tls", store.load)
        monkeypatch.setattr(torch._C, "_is_key_in_tls", store.addresses.__contains__)
    handed_on._takes_no_reference.cache_clear()
    yield HandedOn(f"a test: {request.param}", "default")
    handed_on._takes_no_reference.cache_clear()


def test_a_value_is_held_while_it_is_set_and_let_go_then(handed):
    assert handed.value == "default"
    value = frozenset({1.5})
    before = sys.getrefcount(value)
    for _ in range(5):
        handed.value = value
        assert sys.getrefcount(value) == before + 1
    assert handed.value is value
    for _ in range(5):
        handed.value = "another"
    assert handed.value == "another" and sys.getrefcount(value) == before
