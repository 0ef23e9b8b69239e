"""What counts as the final number of a completion, and when two numbers are the same."""

import time

import pytest

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.numeric_match import numeric_match

RIGHT = [
    ("43", "43.0"),
    ("so it is 43.", "43"),
    ("1,234 apples", "1234"),
    ("12,345,678.90", "12345678.9"),
    ("first 3, then 17", "17"),
    ("> 8 , 6 , 7 , 3", "3"),
    ("8,6,7,300", "300"),
    ("# 3 ,", "3"),
    ("-5", "-5"),
    ("it fell to \u22125 degrees", "-5"),
    ("+5", "5"),
    ("7-3", "3"),
    ("x = -3", "-3"),
    ("(-3)", "-3"),
    ("COVID-19", "19"),
    (".5", "1/2"),
    ("3/4", "0.75"),
    ("-3/4", "-0.75"),
    (r"\frac{3}{4}", "3/4"),
    (r"-\dfrac{3}{4}", "-0.75"),
    ("50%", "50"),
    ("50%", "0.5"),
    ("0.5", "50 %"),
    (r"12.5\%", "12.5%"),
    ("$1,000", "1000"),
    ("-$5", "-5"),
    (r"\$20", "20"),
    ("#### 42", "42"),
    ("#### 42\nThat was 7 steps.", "42"),
    (r"thus \boxed{42}, in 3 steps", "42"),
    (r"\boxed{7} no, \boxed{\text{about } 42}", "42"),
    (r"\boxed{\frac{1}{2}} of 9", "0.5"),
    (r"10{,}000", "10000"),
    (r"10,\!000", "10000"),
    ("6.02e3", "6020"),
    ("1e-07", "0.0000001"),
    ("2/3", "0.6666666667"),
    ("0.66667", "2/3"),
    ("0.3", "0.30000000000000004"),
    ("72", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72"),
    (r"\boxed{} 5", "5"),
    ("12345678901234567890", "12345678901234567890"),
    ("1 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    ("10 1/2 cups", "21/2"),
    (r"\boxed{1\frac{1}{2}}", "1.5"),
    (r"\boxed{1 1/2}", "1.5"),
    (r"\frac{-3}{4}", "-0.75"),
    (r"\boxed{\frac{10}{-4}}", "-2.5"),
    (r"\frac34", "0.75"),
    (r"1.2\times 10^{5}", "120000"),
    (r"\boxed{1.2 \times 10^{-5}}", "0.000012"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{5 \text{ m}^2}", "5"),
    (r"\boxed{5\,\mathrm{cm}^{3}}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{\$1,234.50}", "1234.5"),
    (r"\boxed{\textbf{42}}", "42"),
    (r"\boxed{12 \%}", "12"),
    (r"\fbox{3}", "3"),
    ("5 m^2", "5"),
    ("**42**", "42"),
    ("it is 72!", "72"),
]

WRONG = [
    ("42", "43"),
    ("", "43"),
    ("none", "0"),
    ("43 and then 44", "43"),
    ("7-3", "-3"),
    ("5", "-5"),
    ("0.67", "0.6666666667"),
    ("0.5", "0.6"),
    ("1234.56", "1234.57"),
    ("3/0", "3"),
    ("50%", "5"),
    ("0.5%", "50"),
    (r"\boxed{41} 42", "42"),
    ("12345678901234567891", "12345678901234567890"),
    ("1e999999999", "1"),
    ("\uff14\uff13", "43"),
    (r"\boxed{2^{10}}", "10"),
    (r"\boxed{3\sqrt{2}}", "2"),
    (r"\boxed{9\pi}", "9"),
    ("an area of 9\\pi", "9"),
    (r"\boxed{5+3}", "3"),
    (r"\boxed{(3, 4)}", "4"),
    (r"\boxed{10:30}", "30"),
    (r"\boxed{3x}", "3"),
    (r"\boxed{3 apples and 4 pears}", "4"),
    (r"\boxed{\text{five}} 5", "5"),
    ("3^2", "2"),
    ("2**10", "10"),
    ("2x", "2"),
]


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_right(completion, answer):
    assert numeric_match(RewardItem("", completion, answer)) == 1.0


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong(completion, answer):
    assert numeric_match(RewardItem("", completion, answer)) == 0.0


def test_an_answer_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="'forty' holds no number"):
        numeric_match(RewardItem("", "40", "forty"))


@pytest.mark.parametrize(
    "completion",
    [
        "9" * 1_000_000,
        "1,111" + ",111" * 250_000,
        "1," * 500_000,
        "1/" * 500_000,
        "-" * 1_000_000,
        "\\boxed{" * 140_000,
        "#### " * 200_000,
        "{" * 1_000_000,
        "\\boxed{" + "1 " * 500_000 + "}",
        "\\boxed{" + "a " * 500_000 + "}",
        "\\boxed{5" + "\\text" * 200_000 + "}",
        "x^2" * 300_000,
        "1 \\times 10^" * 80_000,
        "\\sqrt[" * 160_000 + "1",
    ],
    ids=lambda text: text[:8],
)
def test_a_megabyte_is_read_in_linear_time(completion):
    start = time.process_time()
    assert numeric_match(RewardItem("", completion, "43")) == 0.0
    assert time.process_time() - start < 5
