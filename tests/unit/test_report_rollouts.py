"""Which rollouts a page holds, how they are cut into tokens, and that no text can hurt it."""

import base64
import json
import re
import sys
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.report.builder import build_page
from nested_reft_mcore.report.page import packed, render_page
from nested_reft_mcore.report.page_data import rollouts_data
from nested_reft_mcore.report.rollout_files import RolloutEntry, index_rollouts
from nested_reft_mcore.report.run_record import read_runs
from nested_reft_mcore.report.selection import MEASURES, kept_counts, select, select_both, weight
from nested_reft_mcore.report.tokens import token_lengths, utf16_length

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from synthetic_run import write_run

HOSTILE = ("</script><script>alert(1)</script>", "a\0b", "x\ud800y", "\u202eabc\u2066", "<!--")


def entry(step: int, place: int = 0, **more: Any) -> RolloutEntry:
    fields: dict[str, Any] = {
        "step": step,
        "prompt_index": place // 4,
        "sample_index": place % 4,
        "path": Path("f"),
        "offset": place,
        "reward": 0.5,
        "num_tokens": 10,
        "num_characters": 50,
        "failure": "",
        "mean_log_ratio": 0.0,
        "largest_log_ratio": 0.0,
    }
    return RolloutEntry(**{**fields, **more})


def test_extremes_failures_and_the_newest_stay_when_most_have_to_go():
    entries = [entry(step, place) for step in range(1, 201) for place in range(8)]
    odd = {
        3: {"reward": 9.0},
        5: {"reward": -9.0},
        77: {"num_tokens": 11},
        500: {"mean_log_ratio": -3.0},
        900: {"largest_log_ratio": 8.0},
        901: {"failure": "timeout"},
        902: {"failure": "error"},
        903: {"failure": "nan"},
        904: {"failure": "truncated"},
    }
    for place, more in odd.items():
        entries[place] = entries[place]._replace(**more)
    budget = 100 * weight(entries[0])
    chosen = select(entries, budget)
    assert len(chosen) < 0.1 * len(entries)
    assert sum(map(weight, chosen)) <= budget
    assert {entries[place] for place in odd} <= set(chosen)
    assert {e for e in entries if e.step == 200} <= set(chosen)
    counts = kept_counts(entries, chosen)
    assert counts["all"] == (len(chosen), 1600)
    assert counts["newest step"] == (8, 8)
    assert counts["timeout"] == counts["truncated"] == (1, 1)
    # The rest lies evenly: no long stretch without a rollout.
    steps = sorted({e.step for e in chosen})
    assert max(b - a for a, b in pairwise(steps)) <= 16


def test_many_truncated_ones_do_not_crowd_out_the_others():
    entries = [
        entry(step, place, failure="truncated" if place % 2 else "")
        for step in range(1, 101)
        for place in range(8)
    ]
    chosen = select(entries, 200 * weight(entries[0]))
    cut = sum(e.failure == "truncated" for e in chosen)
    assert 0.3 * len(chosen) < cut < 0.8 * len(chosen)


def test_two_runs_keep_the_same_steps_and_prompts():
    both = [
        [entry(s, p, reward=float((s * p + run) % 7)) for s in range(1, 301) for p in range(8)]
        for run in range(2)
    ]
    kept = [{(e.step, e.prompt_index) for e in select(b, 300 * weight(b[0]))} for b in both]
    assert len(kept[0] & kept[1]) > 0.6 * len(kept[0] | kept[1])


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.integers(0, 30), st.floats(-5, 5), st.integers(1, 900)),
        max_size=60,
    ),
    st.floats(0, 50_000),
)
def test_selection_is_a_subset_with_the_extremes(
    some: list[tuple[int, int, float, int]], budget: float
):
    entries = [entry(s, p, reward=r, num_tokens=n) for s, p, r, n in some]
    chosen = select(entries, budget)
    assert set(chosen) <= set(entries)
    assert chosen == sorted(set(chosen))
    for measure in MEASURES.values():
        values, kept = [measure(e) for e in entries], [measure(e) for e in chosen]
        assert not values or (max(values), min(values)) == (max(kept), min(kept))
    assert chosen == select(list(reversed(entries)), budget)


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("ab cd", ["ab", " cd"], [2, 3]),
        # sentencepiece: a token by itself has lost its space; the end of sequence has no text.
        ("gets 5 now", ["gets", "5", "now", ""], [4, 2, 4, 0]),
        # A character of three tokens: the last gets it, in UTF-16 units.
        ("a\U0001f600b", ["a", "\ufffd", "\ufffd", "\ufffd", "b"], [1, 0, 0, 2, 1]),
        ("\U0001f600", ["\ufffd", "\ufffd"], [0, 2]),
        ("", [""], [0]),
        ("other text", ["ab", "cd"], None),
        ("ab and more", ["ab"], None),
    ],
)
def test_completions_are_cut_into_tokens(text: str, pieces: list[str], expected: list[int] | None):
    found = token_lengths(text, range(len(pieces)), pieces)
    if expected is None:
        # What does not fit is not shown as if it did.
        assert found is None or found.count(0) == len(found) - 1
    else:
        assert found == expected


@given(st.lists(st.text(min_size=1, max_size=4).filter(lambda t: "\ufffd" not in t), max_size=20))
def test_cuts_of_exact_pieces_are_exact(pieces: list[str]):
    found = token_lengths("".join(pieces), range(len(pieces)), pieces)
    assert found == [utf16_length(piece) for piece in pieces]


def unpacked(html: str, name: str) -> Any:
    match = re.search(rf'id="data-{name}">([^<]*)</script>', html)
    assert match is not None
    return json.loads(zlib.decompress(base64.b64decode(match[1])))


def test_no_text_leaves_its_place(tmp_path: Path):
    run = tmp_path / "</title><script>alert(2)"
    (run / "rollouts").mkdir(parents=True)
    lines = [
        {
            **{"step": 0, "prompt_index": 0, "sample_index": i, "prompt": text, "answer": text},
            **{"completion": text, "reward": 0.0, "token_ids": [0, 1], "finish_reason": text},
            **{"behavior_logprobs": [-1.0, -2.0], "judge_failure": text, "source": text},
        }
        for i, text in enumerate(HOSTILE)
    ]
    (run / "rollouts" / "step_000000.dp0.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    (run / "config.yaml").write_text(json.dumps({"a": list(HOSTILE[:1])}))
    page = build_page(read_runs([run]), 1_000_000).html
    page.encode("utf-8")
    assert "alert(" not in page.replace("&lt;script&gt;alert(2)", "")
    assert page.count("</script>") == 3
    (data,) = unpacked(page, "rollouts")
    assert data["columns"]["completion"] == list(HOSTILE)
    assert unpacked(page, "overview")["runs"][0]["name"] == run.name


def test_pages_hold_no_number_that_json_cannot():
    with pytest.raises(ValueError, match="not JSON compliant"):
        packed({"a": float("nan")})


def test_broken_lines_are_counted(tmp_path: Path):
    write_run(tmp_path / "run", 2, 20_000)
    path = next((tmp_path / "run" / "rollouts").glob("step_*1.dp0.jsonl"))
    path.write_bytes(path.read_bytes() + b'\xff\xfe\n{"step": 1}\n[1]\nnull\n{"st')
    index = index_rollouts(tmp_path / "run")
    assert index.num_broken == 5
    assert len({e.step for e in index.entries}) == 2


def test_a_page_is_as_small_as_asked_and_says_what_it_left_out(tmp_path: Path):
    write_run(tmp_path / "run", 60, 2_000_000)
    runs = read_runs([tmp_path / "run"])
    whole, small = build_page(runs, 9_000_000), build_page(runs, 300_000)
    there = whole.counts[0]["all"][1]
    assert whole.counts[0]["all"] == [there, there]
    assert len(small.html) <= 300_000 < len(whole.html) < 0.8 * 2_000_000
    assert 20 < small.counts[0]["all"][0] < there == small.counts[0]["all"][1]
    (data,) = unpacked(small.html, "rollouts")
    assert data["counts"]["all"] == small.counts[0]["all"]
    # Room is used, not wasted.
    assert len(small.html) > 0.85 * 300_000
    assert build_page(runs, 9_000_000, with_rollouts=False).counts == [
        {"all": [0, 0], "newest step": [0, 0]}
    ]


def test_a_template_without_its_marks_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nested_reft_mcore.report.page._asset", lambda name: "<html>")
    with pytest.raises(ValueError, match="no mark for TITLE"):
        render_page("t", {})


def evaluated(row: int, sample: int = 0, **more: Any) -> str:
    """A line as `evaluate` writes it."""
    line = {"dataset": "sums", "policy": "full", "mode": "greedy", "row": row, "sample": sample}
    line |= {
        "source": f"sums.jsonl:{row + 1}",
        "prompt": f"sum {row}?",
        "completion": f"it is {row}",
    }
    line |= {"answer": str(row), "reward": 1.0, "finish_reason": "stop", "num_tokens": 4}
    return json.dumps({**line, "labels": {}, **more}) + "\n"


def test_completions_of_evaluations_are_found_beside_rollouts(tmp_path: Path):
    run = tmp_path / "run"
    write_run(run, 2, 5_000)
    (run / "evaluation").mkdir()
    nested = evaluated(1, policy="3,5.mlp", mode="sampled", finish_reason="length")
    (run / "evaluation" / "step_000002.jsonl").write_text(evaluated(0) + nested + '{"torn')
    (run / "evaluate").mkdir()
    (run / "evaluate" / "completions.jsonl").write_text(evaluated(0, reward=0.0))
    settings = {"weights": {"kind": "checkpoint", "step": 7}}
    (run / "evaluate" / "metrics.json").write_text(json.dumps({"settings": settings}))
    index = index_rollouts(run)
    found = [entry for entry in index.entries if entry.kind]
    assert [(e.step, e.kind, e.num_tokens, e.failure) for e in found] == [
        (2, "sums, greedy", 4, ""),
        (2, "sums, sampled, skip 3,5.mlp", 4, "truncated"),
        (7, "sums, greedy", 4, ""),
    ]
    assert index.num_broken == 1
    data = rollouts_data(index, index.entries)
    assert data["counts"]["evaluated"] == [3, 3]
    assert data["columns"]["completion"][-1] == "it is 0"
    assert data["columns"]["ratios"][-1] is None
    plans = [data["plans"][place] for place in data["columns"]["plan"][-3:]]
    assert plans == ["", "3,5.mlp", ""]


def test_neither_training_nor_evaluations_crowd_the_other_out():
    trained = [entry(step, place) for step in range(1, 101) for place in range(8)]
    evaluated = [entry(200, place, kind="sums, greedy") for place in range(4000)]
    budget = weight(trained[0]) * 400
    shown = select_both(trained + evaluated, budget)
    counts = Counter(bool(one.kind) for one in shown)
    assert counts[True] == pytest.approx(80, abs=3), "a fifth of the room"
    assert counts[False] == pytest.approx(320, abs=3)
    # Where training leaves room, evaluations take it.
    few = select_both(trained[:8] + evaluated, budget)
    assert Counter(bool(one.kind) for one in few)[True] > 380
