"""A number is recognised however it is written, and a different one never is."""

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.numeric_match import numeric_match

DECIMALS = st.decimals(-(10**9), 10**9, places=3)
WRAPPINGS = ("{}", "I get 7, then {}.", "#### {}\nin 3 steps", r"so \boxed{{{}}} (by 2)", "= ${}")


def ways_to_write(value: Decimal) -> list[str]:
    plain = f"{value:f}"
    return [plain, f"{value:,f}", plain + "000", plain.replace("-", "\u2212"), f"{plain}%"]


@given(DECIMALS, st.sampled_from(WRAPPINGS), st.integers(0, 4))
def test_every_way_of_writing_matches(value, wrapping, way):
    completion = wrapping.format(ways_to_write(value)[way])
    assert numeric_match(RewardItem("", completion, str(float(value)))) == 1.0


@given(DECIMALS, DECIMALS, st.sampled_from(WRAPPINGS), st.integers(0, 3))
def test_another_number_does_not_match(value, other, wrapping, way):
    completion = wrapping.format(ways_to_write(other)[way])
    assert numeric_match(RewardItem("", completion, str(value))) == float(value == other)


@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 9))
def test_a_fraction_equals_its_multiples(top, bottom, factor):
    completion = f"{top * factor}/{bottom * factor}"
    assert numeric_match(RewardItem("", completion, f"{top}/{bottom}")) == 1.0
    assert numeric_match(RewardItem("", completion, f"{top + 1}/{bottom}")) == 0.0


@given(st.text())
def test_any_text_is_judged(completion):
    assert numeric_match(RewardItem("", completion, "43")) in (0.0, 1.0)
