"""Names that were given up still work."""

from implicit_grad import testing


def test_the_error_of_a_wrong_gradient_has_its_old_name_too():
    assert testing.ImplicitGradientError is testing.GradientCheckError
