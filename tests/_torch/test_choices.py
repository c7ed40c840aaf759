"""Functions that choose what they chose in their first call."""

import pytest
import torch

from implicit_grad._torch.choices import SameChoices

FIRST, OTHER = torch.tensor([0.5, -1.0]), torch.tensor([0.6, 2.0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * (x > 0)).sum(),
        lambda x: (x * (x > 0).logical_not_()).sum(),
        lambda x: (x * x.sign()).sum(),
        lambda x: x[x.argmax()],
        lambda x: x.square().sum() if x[1] < 0 else x.sum(),
    ],
)
def test_choices_are_those_of_the_first_call(function):
    same = SameChoices(lambda phi: function(*phi))
    first = same((FIRST,))
    assert torch.equal(first, function(FIRST))
    assert not torch.equal(same((OTHER,)), function(OTHER))
    assert torch.equal(same((FIRST,)), first)


@pytest.mark.parametrize(
    "otherwise",
    [
        lambda x: x.sum(),
        lambda x: (x * (x > 0)).sum(),
        lambda x: (x * (x > 0) * (x > 1)).sum(),
        lambda x: (x * (x > 0) * (x < 2) * (x < 1)).sum(),
        lambda x: (x[1:] * (x[1:] > 0) * (x[1:] < 3)).sum(),
    ],
)
def test_another_way_is_gone_with_choices_of_its_own(otherwise):
    def function(phi):
        (x,) = phi
        return (x * (x > 0) * (x < 2)).sum() if x[1].item() < 0 else otherwise(x)

    same = SameChoices(function)
    same((FIRST,))
    assert torch.equal(same((OTHER,)), otherwise(OTHER))


def test_numbers_seen_as_bits_are_no_choice():
    same = SameChoices(lambda phi: phi[0].view(torch.int32).view(torch.float32).sum())
    same((FIRST,))
    other = OTHER.clone()
    assert torch.equal(same((other,)), OTHER.sum()) and torch.equal(other, OTHER)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randint(1 << 30, (9,)),
        lambda x: x.sigmoid().multinomial(99, replacement=True),
    ],
)
def test_what_is_drawn_is_no_choice(draw):
    same = SameChoices(lambda phi: (phi[0] > 0).sum() * draw(phi[0]))
    assert not torch.equal(same((FIRST,)), same((FIRST,)))
