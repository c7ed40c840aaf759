"""Methods that are written in C: whose they are, and the same of another object."""

import math

import pytest

from implicit_grad._torch.bound import bound_to, owner_of


class Other(dict):
    """Whose `get` is another method in C, and whose `pop` is none."""

    get = dict.pop
    pop = 5


def test_only_objects_own_methods():
    """And not modules functions, nor classes what makes an object of them."""
    words = ["a"]
    assert owner_of(words.append) is words and owner_of(words.__len__) is words
    for value in (len, math.sin, dict.fromkeys, int.from_bytes, words, str.upper, None):
        assert owner_of(value) is None


@pytest.mark.parametrize("name", ["get", "pop", "setdefault", "__getitem__"])
def test_the_same_method_and_not_what_a_class_has_by_that_name(name):
    mine, owner = Other(a=1), Other(a=2)
    same = bound_to(owner, getattr(super(Other, mine), name))
    assert same("a") == 2 and mine == {"a": 1}
    assert owner == ({} if name == "pop" else {"a": 2})
    assert bound_to({}, mine.__len__)() == 0
