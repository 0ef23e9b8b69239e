"""tools/check_reference_answers.py: it finds what does not verify, and the usual sets do."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
KNOWN = {
    # docs/reference_answers.md tells why.
    *(f"train.parquet:row {row}" for row in (5342, 5344, 6628, 7302)),
    *("test.parquet:row 3527", "olympiadbench.test.jsonl:195"),
    *("math500.test.parquet:row 23", "minerva_math.test.jsonl:132"),
}
NUMBER_OF_SETS = 17


@pytest.fixture(scope="module")
def check():
    return runpy.run_path(str(REPOSITORY / "tools" / "check_reference_answers.py"))["main"]


def findings(path: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["kind"], line["place"]) for line in lines]


def test_it_finds_answers_that_do_not_verify_and_worked_ones_that_say_another(
    check, tmp_path, capsys
):
    rows = [("so 1+1 = 2\n#### 2", 1), ("it is five\n#### five", 2), ("7\n#### 3.0", 3)]
    rows += [("it is 2\n#### 2.0", 4)]
    text = "".join(json.dumps({"question": "q", "answer": answer}) + "\n" for answer, _ in rows)
    (tmp_path / "set.jsonl").write_text(text)
    output = tmp_path / "found.jsonl"
    code = check(
        [
            "--set",
            f"gsm8k={tmp_path}/set.jsonl",
            "--reward",
            "numeric_match",
            "--workers",
            "1",
            "--output",
            str(output),
        ]
    )
    assert code == 0
    # 2 and 2.0 have one value; `five` is no number.
    assert findings(output) == [
        *(("itself", "set.jsonl:2"), ("another", "set.jsonl:2"), ("worked", "set.jsonl:2")),
        ("another", "set.jsonl:4"),
    ]
    assert "set.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a DIRECTORY with the usual sets, or --set"),
        (["--set", "gsm9k=x"], "expected PRESET=FILE, with one of gsm8k"),
        (["/nowhere/at/all"], "is no directory"),
        (["--set", "gsm8k=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes(check, capsys, arguments, message):
    assert check(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
def test_a_sample_of_every_usual_set_verifies(check, tmp_path, capsys):
    """One row of 40; the whole check takes minutes and is the tool's."""
    output = tmp_path / "found.jsonl"
    assert check([str(DATA), "--every", "40", "--workers", "1", "--output", str(output)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + NUMBER_OF_SETS + 1
    found = {place for kind, place in findings(output) if kind != "worked"}
    assert found <= KNOWN
