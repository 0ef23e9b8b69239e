"""The math-verify reward: equal expressions match, whatever their form."""

import threading

import pytest

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.math_verify import math_verify_reward


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("the answer is 43", "43.0", 1.0),
        (r"so $\boxed{0.75}$", r"\frac{3}{4}", 1.0),
        (r"thus $\boxed{1+x^2}$", "x^2+1", 1.0),
        (r"thus $\boxed{1-x^2}$", "x^2+1", 0.0),
        (r"$\sqrt{8}$", r"$2\sqrt{2}$", 1.0),
        ("it is 72", "48/2 = 24, 48+24 = 72\n#### 72", 1.0),
        ("it is 24", "48/2 = 24, 48+24 = 72\n#### 72", 0.0),
        ("", "43", 0.0),
        (r"\boxed{\$36}", r"\$36", 1.0),
        (r"\boxed{32348}", r"\$32,\!348", 1.0),
        ("the answer 3 is wrong, 21 - 12 = 9 answered so\n#### 9", "9", 1.0),
        ("#### 9\nbut the answer is 3", "9", 0.0),
        (r"so \boxed{8}, not #### 9", "9", 0.0),
        (r"\boxed{x_0 + $ $y / z}", "x_0 + $ $y / z", 1.0),
    ],
)
def test_value(completion, answer, value):
    assert math_verify_reward(RewardItem("", completion, answer)) == value


def test_it_sets_no_alarm_and_so_runs_off_the_main_thread():
    found: list[float] = []
    thread = threading.Thread(
        target=lambda: found.append(math_verify_reward(RewardItem("", "$43$", "43")))
    )
    thread.start()
    thread.join()
    assert found == [1.0]


def test_an_unreadable_answer_is_an_error():
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        math_verify_reward(RewardItem("", "43", ""))
