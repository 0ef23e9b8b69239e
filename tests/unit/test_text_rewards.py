"""Exact match, multiple choice, format and length: what counts as right."""

import pytest

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.exact_match import exact_match
from nested_reft_mcore.rewards.final_answer import final_answer
from nested_reft_mcore.rewards.length import length_within, relative_length
from nested_reft_mcore.rewards.multiple_choice import multiple_choice
from nested_reft_mcore.rewards.response_format import response_format


def item(completion: str, answer: str = "") -> RewardItem:
    return RewardItem("", completion, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7} or \boxed{ \frac{1}{2} } it is", r"\frac{1}{2}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{never closed", "never closed"),
        ("work\n#### Paris \nmore", "Paris"),
        ("The answer is: Paris.\n", "Paris."),
        ("answer: a\nThe final answer is b", "b"),
        ("one\n\ntwo\n", "two"),
        ("####", "####"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("The answer is **Paris**.", "paris", 1.0),
        (r"\boxed{New   York}", "new york", 1.0),
        ("#### New York City", "New York", 0.0),
        ("\uff21", "a", 1.0),
        ("", "a", 0.0),
    ],
)
def test_exact_match(completion, answer, value):
    assert exact_match(item(completion, answer)) == value


def test_exact_match_options():
    assert exact_match(item("paris", "Paris"), ignore_case=False) == 0.0
    assert exact_match(item("it is Paris", "Paris"), whole=True) == 0.0
    with pytest.raises(ValueError, match="no answer"):
        exact_match(item("a", " "))


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("The answer is B.", "B", 1.0),
        ("The answer is (B)", "b", 1.0),
        (r"A is wrong, \boxed{\text{B}}", "B", 1.0),
        (r"\boxed{b}", "B", 1.0),
        (r"\boxed{B) 7}", "B", 1.0),
        (r"\boxed{Bananas}", "B", 0.0),
        ("**C**", "C", 1.0),
        ("c", "C", 1.0),
        ("Answer: A\nNo: Answer: D", "D", 1.0),
        ("I choose a fruit. A) is it", "A", 1.0),
        ("The answer is a difficult one, so B.", "B", 1.0),
        ("#### E", "E", 1.0),
        ("The answer is F", "E", 0.0),
        ("A dog. I am sure", "A", 0.0),
        ("", "A", 0.0),
    ],
)
def test_multiple_choice(completion, answer, value):
    assert multiple_choice(item(completion, answer)) == value


def test_multiple_choice_options():
    assert multiple_choice(item("answer: J", "J"), choices="ABCDEFGHIJ") == 1.0
    with pytest.raises(ValueError, match="'7' is none of the choices A, B"):
        multiple_choice(item("A", "7"), choices="AB")
    with pytest.raises(ValueError, match="expected letters"):
        multiple_choice(item("A", "A"), choices="A1")


@pytest.mark.parametrize(
    ("completion", "style", "value"),
    [
        (r"x \boxed{1}", "boxed", 1.0),
        (r"\boxed{1} \boxed{1}", "boxed", 0.0),
        (r"\boxed{1", "boxed", 0.0),
        ("1", "boxed", 0.0),
        ("work\n#### 1\n", "hash", 1.0),
        ("#### 1\nand more", "hash", 0.0),
        ("#### 1 #### 2", "hash", 0.0),
        ("<think>a</think>\n<answer>b</answer>", "think_answer", 1.0),
        ("<think>a</think><answer> </answer>", "think_answer", 0.0),
        ("so <think>a</think><answer>b</answer>", "think_answer", 0.0),
        ("<think>a</think> b <answer>b</answer>", "think_answer", 0.0),
        ("<think><think>a</think><answer>b</answer>", "think_answer", 0.0),
        ("<answer>b</answer><think>a</think>", "think_answer", 0.0),
    ],
)
def test_format(completion, style, value):
    assert response_format(item(completion), style=style) == value


def test_format_by_pattern():
    assert response_format(item("a\nb = 7"), pattern=r".*= \d") == 1.0
    assert response_format(item("a\nb = 7."), pattern=r".*= \d") == 0.0
    with pytest.raises(ValueError, match="no regular expression"):
        response_format(item(""), pattern="(")
    with pytest.raises(ValueError, match="expected one of boxed, hash, think_answer"):
        response_format(item(""), style="box")


def counted(num_tokens: int | None, completion: str = "") -> RewardItem:
    return RewardItem("", completion, "5", num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "value"), [(9, 0.0), (10, 0.5), (11, 1.0), (20, 1.0), (21, 0.5), (22, 0.0)]
)
def test_length_within(num_tokens, value):
    found = length_within(counted(num_tokens), min_tokens=11, max_tokens=20, buffer_tokens=2)
    assert found == value


def test_length_needs_counts_and_limits_in_order():
    with pytest.raises(ValueError, match="not counted"):
        length_within(counted(None), max_tokens=3)
    with pytest.raises(ValueError, match="expected 0 <= min_tokens"):
        length_within(counted(1), min_tokens=4, max_tokens=3)


def test_relative_length_of_kimi():
    """By hand from arXiv 2501.12599: 10, 20, 30 tokens give 0.5, 0, -0.5; wrong ones at most 0."""
    group = [counted(10, "5"), counted(20, "5"), counted(30, "5"), counted(10, "6")]
    assert relative_length(group) == [0.5, 0.0, -0.5, 0.0]
    assert relative_length(group, correct_by=None) == [0.5, 0.0, -0.5, 0.5]
    assert relative_length([counted(10), counted(10)], correct_by=None) == [0.0, 0.0]
