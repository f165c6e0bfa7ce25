"""What configurations say of values that are left out."""

import pytest

from layerbits.plain import unset


@pytest.mark.parametrize("value", [None, "", "none", "null"])
def test_a_value_that_is_left_out_is_unset(value):
    assert unset(value)


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false", [], "nonesuch"])
def test_a_value_that_says_something_is_set(value):
    assert not unset(value)
