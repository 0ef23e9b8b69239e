"""The page in a real browser: it draws without a complaint, and its filters do what they say."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nested_reft_mcore.cli import app

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from chromium import Chromium, find_chromium
from synthetic_run import write_run

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: apt-get install chromium"
)
READY = "document.documentElement?.dataset.ready === 'all'"
HOSTILE = "</script><img src=x onerror=\"document.title='hit'\">\0\ud800\u202eRTL <!-- &lt;"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    path = find_chromium()
    assert path is not None
    with Chromium(path) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one sound; one that is unfinished, and whose first completion is hostile."""
    room = tmp_path_factory.mktemp("runs")
    write_run(room / "first", 12, 200_000, seed=1)
    write_run(room / "second", 12, 200_000, seed=2, num_skipped=0)
    path = room / "second" / "rollouts" / "step_000000.dp0.jsonl"
    head, *rest = path.read_text().splitlines()
    line = json.loads(head) | {"completion": HOSTILE, "prompt": HOSTILE, "reward": -1.0}
    line["components"] = {"math_verify": 0.0, "<b>format": -2.0}
    path.write_text("\n".join([json.dumps(line), *rest]) + "\n")
    metrics = room / "second" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:8]) + '{"torn')
    output = room / "page.html"
    done = CliRunner().invoke(
        app, ["report", str(room / "first"), str(room / "second"), "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture
def opened(browser: Chromium, page: Path) -> Chromium:
    browser.resize(1280, 900)
    browser.prefer("light")
    browser.open(page)
    browser.wait_for(READY)
    return browser


def matches(browser: Chromium, **values: str) -> int:
    """How many rollouts the browser finds with these filters; the others stay as they are."""
    for name, value in values.items():
        browser.evaluate(f"document.getElementById('f-{name}').value = {json.dumps(value)}")
    browser.evaluate("document.getElementById('filters').dispatchEvent(new Event('input'))")
    browser.evaluate("new Promise((done) => setTimeout(done, 250))")
    said = browser.evaluate("document.getElementById('matches').textContent")
    return int(said.split()[0].replace(",", ""))


def text_of(browser: Chromium, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")


def test_it_draws_without_complaint_and_asks_for_nothing(opened: Chromium, page: Path) -> None:
    assert opened.problems() == []
    assert opened.requests() == [page.resolve().as_uri()]
    figures = "[...document.querySelectorAll('#charts figure')]"
    drawn = f"{figures}.map((one) => one.querySelectorAll('svg path').length)"
    charts = opened.evaluate(drawn)
    assert len(charts) >= 9
    assert min(charts) >= 2, "a curve of each run"
    assert opened.evaluate("document.querySelectorAll('#stacks svg path').length") >= 8
    assert opened.evaluate("document.querySelectorAll('#heatmaps canvas').length") == 2
    assert "unfinished: 8 of 12 steps" in text_of(opened, "#facts")
    assert "1 of its lines cannot be read" in text_of(opened, "#facts")
    for scheme in ("dark", "light"):
        opened.prefer(scheme)
    opened.resize(390, 800)
    opened.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390, "it scrolls sideways"
    assert opened.problems() == []


def test_the_heat_map_paints_what_was_skipped(opened: Chromium, page: Path) -> None:
    lines = (page.parent / "first" / "metrics.jsonl").read_text().splitlines()
    skipped = {int(layer) for layer in json.loads(lines[0])["nested/plan"].split(",")}
    painted = opened.evaluate(
        "(() => { const c = document.querySelector('#heatmaps canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, 1, c.height).data;"
        "return [...Array(c.height).keys()].map((y) => [...d.slice(4 * y, 4 * y + 3)].join()); })()"
    )
    blue = [layer for layer, colour in enumerate(painted) if colour == "0,114,178"]
    assert set(blue) == skipped


def test_no_chart_changes_its_size_in_the_observers_own_turn(browser: Chromium, page: Path) -> None:
    """A browser reports that as an error of the window, `ResizeObserver loop ...`."""
    listen = "window.said = []; addEventListener('error', (event) => said.push(event.message));"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=listen)
    try:
        browser.open(page)
        browser.wait_for(READY)
        for width in (700, 390, 1500):
            browser.resize(width, 900)
            browser.evaluate("new Promise((done) => setTimeout(done, 150))")
        assert browser.evaluate("said") == []
        widths = "[...document.querySelectorAll('#charts figure svg')].map((s) => s.clientWidth)"
        axes = "[...document.querySelectorAll('#charts figure svg .axis')]"
        drawn = f"{axes}.map((axis) => axis.getAttribute('x2'))"
        assert max(map(float, browser.evaluate(drawn))) == max(browser.evaluate(widths)) - 10
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", **script)
        browser.resize(1280, 900)


def test_filters_find_what_they_say(opened: Chromium, page: Path) -> None:
    rows = [
        json.loads(line)
        for name in ("first", "second")
        for path in (page.parent / name / "rollouts").glob("step_*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert matches(opened) == len(rows)
    assert matches(opened, **{"from": "3", "to": "4"}) == sum(r["step"] in (2, 3) for r in rows)
    assert matches(opened, **{"from": "", "to": "", "low": "1"}) == sum(
        r["reward"] >= 1 for r in rows
    )
    assert matches(opened, low="", failure="truncated") == sum(
        r["finish_reason"] == "length" and "judge_failure" not in r for r in rows
    )
    assert matches(opened, failure="", text="APPLES") == sum(
        "apples" in r["completion"] for r in rows
    )
    assert matches(opened, text="no such words") == 0
    assert "No rollout matches" in text_of(opened, "#detail")
    assert matches(opened, text="", run="1", order="worst") < len(rows)
    assert "-1" in text_of(opened, "#list li:first-child")
    assert opened.problems() == []


def test_hostile_text_stays_text(opened: Chromium) -> None:
    assert matches(opened, text="onerror") == 1
    assert opened.evaluate("document.title") != "hit"
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    shown = text_of(opened, "#detail .completion")
    for sign in ("</script><img", "␀", "⟨U+D800⟩", "⟨U+202E⟩", "<!-- &lt;"):
        assert sign in shown
    assert "of itmath_verify 0, <b>format -2" in text_of(opened, "#detail dl")
    assert opened.problems() == []


def test_tokens_are_coloured_by_their_ratio(opened: Chromium, page: Path) -> None:
    line = json.loads(
        (page.parent / "first" / "rollouts" / "step_000005.dp0.jsonl").read_text().splitlines()[0]
    )
    matches(opened, run="0", **{"from": "6", "to": "6"}, order="oldest")
    tokens = opened.evaluate(
        "[...document.querySelectorAll('#detail .token')]"
        ".map((t) => [t.textContent, t.style.backgroundColor])"
    )
    assert "".join(text for text, _ in tokens).replace("↵", "") == line["completion"]
    assert len(tokens) == len(line["token_ids"])
    ratios = [
        round(100 * (t - b))
        for t, b in zip(line["target_logprobs"], line["behavior_logprobs"], strict=True)
    ]
    for (_, colour), ratio in zip(tokens, ratios, strict=True):
        if ratio:
            assert ("213, 94, 0" if ratio < 0 else "0, 114, 178") in colour
    hover = (
        "document.querySelector('#detail .token').dispatchEvent(new PointerEvent('pointermove'))"
    )
    opened.evaluate(hover)
    assert "importance ratio" in text_of(opened, "#tip")
    assert "behavior log-prob" in text_of(opened, "#tip")


def test_smoothing_the_axis_and_hiding_a_run_redraw_the_curves(opened: Chromium) -> None:
    paths = "document.querySelector('#charts figure svg').innerHTML"
    seen = {opened.evaluate(paths)}
    for act in (
        "smoothing.value = 0.9; smoothing.dispatchEvent(new Event('input'))",
        "document.querySelector('input[value=time]').click()",
        "document.querySelector('#legend button').click()",
    ):
        opened.evaluate(act)
        seen.add(opened.evaluate(paths))
    assert len(seen) == 4
    assert "wall time" in opened.evaluate(paths)
    opened.evaluate(
        "document.querySelector('#charts svg')"
        ".dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))"
    )
    assert "second" in text_of(opened, "#tip")


def test_runs_are_compared_step_by_step(opened: Chromium, page: Path) -> None:
    # The second run ends with step 8: that is the last one in common.
    assert text_of(opened, "#c-value") == "step 8"
    opened.evaluate("document.getElementById('c-back').click()")
    assert text_of(opened, "#c-value") == "step 7"
    values = []
    for name in ("first", "second"):
        lines = (page.parent / name / "metrics.jsonl").read_text().splitlines()
        values.append(json.loads(lines[6])["nested/plan"])
    compared = text_of(opened, "#compared")
    assert f"plan skips{values[0]}nothing" in compared
    assert opened.evaluate("document.querySelectorAll('#compared article .completion').length") == 2
    assert opened.problems() == []


def test_one_run_and_an_empty_one_have_pages_too(browser: Chromium, tmp_path: Path) -> None:
    write_run(tmp_path / "one", 2, 10_000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    for name in ("one", "empty"):
        done = CliRunner().invoke(app, ["report", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        browser.open(tmp_path / name / "report.html")
        browser.wait_for(READY)
        assert browser.problems() == []
        assert browser.evaluate("document.getElementById('compare').hidden")
    assert "no step is recorded yet" in text_of(browser, "#facts")


def test_an_evaluation_is_browsed_like_a_run(browser: Chromium, tmp_path: Path) -> None:
    """120 prompts, a greedy completion and two samples of each, the last one hostile."""
    common = {"dataset": "sums", "policy": "full", "answer": "1", "finish_reason": "stop"}
    lines = [
        {**common, "mode": mode, "row": row, "sample": sample, "prompt": f"sum {row}?"}
        | {"completion": f"so {mode} {row}", "reward": float(row % 2), "num_tokens": 3}
        for mode, samples in (("greedy", 1), ("sampled", 2))
        for row in range(120)
        for sample in range(samples)
    ]
    lines[-1]["completion"] = HOSTILE
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "completions.jsonl").write_text(text)
    name = "val-core/sums/reward/greedy"
    metrics = {name: 0.5, f"{name}/low": 0.41, f"{name}/high": 0.59}
    figures = {"settings": {"weights": {"step": 30}}, "metrics": metrics, "config": {"seed": 5}}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "360 of 360 rollouts shown" in done.output
    browser.open(tmp_path / "report.html")
    browser.wait_for(READY)
    assert "evaluate" in text_of(browser, "#facts")
    assert "weights of step30" in text_of(browser, "#facts")
    assert matches(browser) == 360
    assert "page 1 of 8" in text_of(browser, "#matches")
    browser.evaluate("document.getElementById('next').click()")
    assert "page 2 of 8" in text_of(browser, "#matches")
    assert matches(browser, kind="1", low="1", text="so sampled") == 119
    assert "evaluationsums, sampled" in text_of(browser, "#detail dl")
    siblings = "document.querySelectorAll('#detail .siblings button')"
    assert browser.evaluate(f"{siblings}.length") == 2, "the greedy one is no sample"
    before = text_of(browser, "#detail dl")
    browser.evaluate(f"{siblings}[1].click()")
    assert text_of(browser, "#detail dl") != before
    assert matches(browser, low="", text="onerror") == 1
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.problems() == []
