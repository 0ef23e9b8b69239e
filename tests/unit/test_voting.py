"""Equal answers are counted together, as the reward itself understands them."""

import pytest

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.rewards import RewardConfig, RewardFunctionConfig
from nested_reft_mcore.data.prompt import Prompt
from nested_reft_mcore.rewards.numeric_match import numeric_match
from nested_reft_mcore.rollout.types import Rollout, RolloutBatch, RolloutStats
from nested_reft_mcore.training.voting import (
    AnswerGroup,
    AnswerVotes,
    answer_text,
    comparing_reward,
    merge_equal,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} or \boxed{x^{2}} holds", "x^{2}"),
        (r"\boxed{3} and then \boxed{4", "4"),
        (r"\boxed{} is empty, 5", "5"),
        ("first 3\n#### 1,234 \nand 9", "1234"),
        ("7 - 2 = 5 apples, 50%", "50%"),
        ("it is 0.50", "1/2"),
        ("nothing at all", None),
        ("", None),
    ],
)
def test_answers_of_rewards_that_read_numbers(text, answer):
    assert answer_text(text, reads_numbers=True) == answer


def test_answers_of_other_rewards_are_texts():
    assert answer_text("I like 3.\nThe answer is (B)", reads_numbers=False) == "(B)"
    assert answer_text("Paris\n", reads_numbers=False) == "Paris"
    assert answer_text(" \n", reads_numbers=False) is None


def test_which_reward_compares():
    def functions(*names: str) -> RewardConfig:
        return RewardConfig(functions=tuple(RewardFunctionConfig(name=n, weight=3) for n in names))

    assert comparing_reward(RewardConfig()).name == "numeric_match"
    found = comparing_reward(functions("format", "exact_match"))
    assert (found.name, found.weight) == ("exact_match", 1.0)
    assert comparing_reward(functions("own.module:judge", "length")) is None
    two = functions("numeric_match", "format", "exact_match")
    assert comparing_reward(two, 2).name == "exact_match"
    assert comparing_reward(two, 1).name == "numeric_match"


def rollouts(*texts: str) -> list[Rollout]:
    prompt = Prompt((1,), "how many?", "6")
    return [Rollout(prompt, 0, i, (), (), "stop", text) for i, text in enumerate(texts)]


def numbers(texts, rewards, same=lambda items: [numeric_match(i) > 0.5 for i in items]):
    group = AnswerGroup(rollouts(*texts), rewards)
    merge_equal([group], same)
    return group.numbers()


def test_the_rewards_own_equality_decides():
    texts = ("is 0.5", r"\boxed{1/2}", "50%", "1,000", r"\boxed{1000.0}", "7", "no")
    assert numbers(texts, [0] * 7) == [1, 1, 1, 2, 2, 3, None]


def test_right_ones_are_one_answer_whatever_they_look_like():
    assert numbers((r"\boxed{six}", "6.0", "6", "7"), [1, 1, 1, 0]) == [0, 0, 0, 1]


def test_no_answer_does_not_vote_right_or_wrong():
    """Else the right one would win against any number of wrong ones that look like it."""
    wrong, right = r"The answer is $3\pi$.", r"The answer is $2\pi$."
    assert numbers((wrong, wrong, wrong, right), [0, 0, 0, 1]) == [None] * 4


def test_graded_rewards_say_nothing_of_equality():
    assert numbers(("6", "6.0", "7"), [1.0, 0.9, 0.1]) == [1, 1, 2]


def test_groups_are_compared_together_and_each_pair_once():
    asked = []

    def same(items):
        asked.append([(item.answer, item.completion) for item in items])
        return [numeric_match(item) > 0.5 for item in items]

    groups = [
        AnswerGroup(rollouts(*t), [0] * len(t)) for t in (("1", "2", "3"), ("4", "5"), ("6",))
    ]
    merge_equal(groups, same)
    assert [group.numbers() for group in groups] == [[1, 2, 3], [1, 2], [1]]
    assert asked == [
        [("1", r"\boxed{2}"), ("1", r"\boxed{3}"), ("4", r"\boxed{5}")],
        [("2", r"\boxed{3}")],
    ]


def batch(*texts: str) -> RolloutBatch:
    return RolloutBatch(
        tuple(rollouts(*texts)), len(texts), LayerSkipPlan.full(2), RolloutStats(0, 0.0)
    )


def test_workers_compare_and_hostile_answers_are_equal_to_nothing():
    """`1/2` and `0.5` need the reward; what it cannot read it calls unequal."""
    with AnswerVotes(RewardConfig(name="numeric_match")) as votes:
        found = votes(batch(r"\boxed{1/2}", r"\boxed{0.5}", r"\boxed{??}", r"\boxed{!}"), [0] * 4)
    assert found == [1, 1, 2, 3]


def test_two_samples_need_no_comparison(monkeypatch):
    monkeypatch.setattr(AnswerVotes, "_same", lambda self, items: pytest.fail("compared"))
    with AnswerVotes(RewardConfig(name="numeric_match")) as votes:
        assert votes(batch("1/2", "0.5"), [0, 0]) is not None
