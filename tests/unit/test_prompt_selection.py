"""Selection of prompts: who is taken, what is learnt, and that it comes back with a checkpoint."""

import json
import random

import pytest

from nested_reft_mcore.config.selection import SelectionConfig
from nested_reft_mcore.data.selection import PosteriorSelector, build_selector
from nested_reft_mcore.data.stream import PromptStream


def selector(policy, num_prompts=40, per_step=4, seed=5, **options):
    config = SelectionConfig(policy=policy, **options)
    return build_selector(config, PromptStream(num_prompts, per_step, seed))


def test_uniform_is_the_stream():
    stream = PromptStream(40, 4, 5)
    chosen = selector("uniform")
    assert [chosen.next() for _ in range(25)] == [stream.next() for _ in range(25)]


def test_solved_and_hopeless_prompts_rest_and_come_back():
    filtered = selector("filter", num_prompts=8, rest=2)
    scores = {index: (1.0, 0.0, 0.5, 0.5)[index % 4] for index in range(8)}
    epochs = []
    for _ in range(12):
        batch = filtered.next()
        filtered.observe(batch, [scores[index] for index in batch], 8)
        epochs.append(batch)
    first = [index for batch in epochs[:2] for index in batch]
    assert sorted(first) == list(range(8)), "before anything is known everybody has a turn"
    # Each epoch of the stream brings the four that teach; the others pass twice, then have a turn.
    assert all(index % 4 >= 2 for index in epochs[2] + epochs[3])
    later = [index for batch in epochs[4:] for index in batch]
    assert {index % 4 for index in later} == {0, 1, 2, 3}
    shares = sum(index % 4 >= 2 for index in later) / len(later)
    assert shares > 0.6
    assert filtered.metrics()["selection/num_passed_over"] > 0


def test_patience_counts_groups_in_a_row():
    filtered = selector("filter", num_prompts=4, patience=2, rest=0)
    everyone = list(range(4))
    filtered.observe(everyone, [1.0, 1.0, 0.0, 1.0], 8)
    assert sorted(filtered.next()) == everyone
    filtered.observe(everyone, [1.0, 0.5, 0.0, 0.0], 8)
    # 0 was solved twice and 2 hopeless twice; 3 was once each. Too few are left: they help out.
    batch = filtered.next()
    assert len(batch) == 4
    assert {*batch[:2]} <= {1, 3}
    assert filtered.metrics()["selection/num_resting"] == 2


def test_where_everybody_rests_a_step_is_full_all_the_same():
    filtered = selector("filter", num_prompts=6, rest=0)
    filtered.observe(list(range(6)), [1.0] * 6, 8)
    assert len(filtered.next()) == 4


def test_the_posterior_is_the_papers():
    chosen = selector("mopps", decay=0.5, prior_success=2.0, prior_failure=1.0)
    assert isinstance(chosen, PosteriorSelector)
    chosen.observe([3], [0.25], 8)
    # 0.5 * 2 + 0.5 * 2 + 2 and 0.5 * 1 + 0.5 * 1 + 6.
    assert chosen.success_rate(3) == pytest.approx(4 / 11)
    chosen.observe([3], [1.0], 8)
    assert chosen.success_rate(3) == pytest.approx(11 / (11 + 4))
    assert chosen.success_rate(4) == pytest.approx(2 / 3)
    # |4/11 - 1|: only the second observation was of a prompt that was known.
    assert chosen.metrics()["selection/prediction_error"] == pytest.approx(7 / 11)


@pytest.mark.parametrize("sampler", ["thompson", "ucb"])
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_prompts_near_the_target_are_found_without_extra_rollouts(sampler, target):
    """Rates are spread over [0, 1]: uniform choice is 0.29 from these targets on average."""
    num_prompts, group_size = 200, 8
    rates = [(index + 0.5) / num_prompts for index in range(num_prompts)]
    chosen = selector("mopps", num_prompts, 8, candidates=8, sampler=sampler, target=target)
    rng = random.Random(0)
    late = []
    for step in range(120):
        batch = chosen.next()
        assert len(set(batch)) == 8
        scores = [sum(rng.random() < rates[i] for _ in range(group_size)) / 8 for i in batch]
        chosen.observe(batch, scores, group_size)
        if step >= 60:
            late += [abs(rates[index] - target) for index in batch]
    assert sum(late) / len(late) < 0.15


def test_the_curriculum_follows_a_policy_that_gets_better():
    """Rates rise by 0.4: with decay the choice moves on to prompts that were harder."""
    chosen = selector("mopps", 200, 8, candidates=8, decay=0.5)
    rng = random.Random(1)
    means = []
    for step in range(200):
        batch = chosen.next()
        gain = 0.4 * (step >= 100)
        scores = [sum(rng.random() < min(1.0, i / 200 + gain) for _ in range(8)) / 8 for i in batch]
        chosen.observe(batch, scores, 8)
        means.append(sum(batch) / len(batch))
    assert sum(means[60:100]) / 40 > sum(means[160:]) / 40 + 30


@pytest.mark.parametrize("policy", ["uniform", "filter", "mopps"])
def test_a_resumed_run_chooses_as_the_killed_one_would_have(policy):
    whole = selector(policy)

    def step(one, number):
        batch = one.next()
        one.observe(batch, [((index * 7 + number) % 5) / 4 for index in batch], 8)
        return batch

    for number in range(9):
        step(whole, number)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = selector(policy)
    step(resumed, 0)
    resumed.load_state_dict(state)
    for number in range(9, 30):
        assert step(resumed, number) == step(whole, number)
    assert resumed.state_dict() == whole.state_dict()


def test_another_policy_goes_on_at_the_same_place():
    whole = selector("mopps")
    batch = whole.next()
    whole.observe(batch, [0.5] * 4, 8)
    other = selector("filter")
    other.load_state_dict(whole.state_dict())
    assert other.state_dict()["position"] == whole.state_dict()["position"]
    assert other.state_dict()["selection"]["rests"] == {}


def test_fewer_prompts_than_a_step_needs_repeat():
    chosen = selector("mopps", num_prompts=3)
    assert sorted(set(chosen.next())) == [0, 1, 2]
    assert len(chosen.next()) == 4
