"""The number of drafted tokens follows the acceptance that is seen."""

import pytest

from nested_reft_mcore.rollout.draft_length import DraftLength


def settle(length: DraftLength, acceptance: float, passes: int, rows: int = 64) -> list[int]:
    """Lengths over so many passes in which each row accepts what is likeliest."""
    seen = []
    for _ in range(passes):
        drafted = length.current
        seen.append(drafted)
        # Rows by how many drafts they accept, in the shares that independent drafts have.
        edges = [round(rows * acceptance**number) for number in range(1, drafted + 1)]
        accepted = [sum(row < edge for edge in edges) for row in range(rows)]
        length.update(drafted, accepted if drafted else [])
    return seen


def best_length(acceptance: float, cost: float, longest: int) -> int:
    """Theorem 3.8, by its closed form."""
    ratios = [
        (1 - acceptance ** (g + 1)) / ((1 - acceptance) * (g * cost + 1))
        for g in range(longest + 1)
    ]
    return ratios.index(max(ratios))


@pytest.mark.parametrize("cost", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("acceptance", [0.05, 0.35, 0.6, 0.8, 0.95])
def test_it_settles_on_the_length_that_yields_most(acceptance, cost) -> None:
    length = DraftLength(8, cost)
    seen = settle(length, acceptance, 60)
    expected = best_length(acceptance, cost, 8)
    drafted = [number for number in seen[30:] if number] if expected else seen[30:]
    assert abs(sorted(drafted)[len(drafted) // 2] - expected) <= 1
    if expected:
        assert length.acceptance == pytest.approx(acceptance, abs=0.03)


def test_more_acceptance_never_drafts_less() -> None:
    for cost in (0.0, 0.2, 0.5, 0.9):
        settled = []
        for percent in range(0, 101, 10):
            length = DraftLength(8, cost)
            settle(length, percent / 100, 40, rows=100)
            settled.append(settle(length, percent / 100, 40)[-2])
        assert settled == sorted(settled), cost


def test_nothing_is_drafted_where_it_never_pays_but_probed_now_and_then() -> None:
    length = DraftLength(8, 1.0)
    seen = settle(length, 1.0, 200)
    assert set(seen) == {0, 1}
    assert sum(seen) == 200 // 33
    assert set(settle(DraftLength(0, 0.1), 1.0, 100)) == {0}


def test_it_falls_to_nothing_and_recovers() -> None:
    length = DraftLength(8, 0.5)
    settle(length, 0.0, 30)
    assert length.current == 0
    assert settle(length, 1.0, 4 * 33)[-1] == best_length(0.999, 0.5, 8)
    # Also with one row, whose probes say little each.
    settle(length, 0.0, 60, rows=1)
    assert length.current <= 1
    assert settle(length, 1.0, 30 * 33, rows=1)[-1] > 0


def test_drafts_behind_a_rejected_one_do_not_count() -> None:
    one, other = DraftLength(8, 0.1), DraftLength(8, 0.1)
    one.update(2, [1, 2, 0])
    other.update(8, [1, 2, 0])
    assert one.acceptance == pytest.approx((0.8 * 7.2 + 3) / (7.2 + 5))
    assert other.acceptance == pytest.approx((0.8 * 7.2 + 3) / (7.2 + 6))


def test_equal_counts_give_equal_lengths() -> None:
    one, other = DraftLength(8, 0.4), DraftLength(8, 0.4)
    assert settle(one, 0.7, 50) == settle(other, 0.7, 50)
    assert one.acceptance == other.acceptance


@pytest.mark.parametrize(("longest", "cost"), [(-1, 0.5), (4, -0.1), (4, float("nan"))])
def test_negative_sizes_are_refused(longest, cost) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        DraftLength(longest, cost)
