"""Presets read the layouts in which the usual sets are published, and their answers."""

import json
from pathlib import Path

import pytest
from test_prompts import ByteTokenizer

from nested_reft_mcore.config.data import PRESET_NAMES, DataConfig, DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.answers import after_hashes, last_boxed, number_text
from nested_reft_mcore.data.demonstrations import load_demonstrations
from nested_reft_mcore.data.math12k import write_math12k
from nested_reft_mcore.data.presets import PRESETS
from nested_reft_mcore.data.prompts import load_prompts

SHARED = Path(__file__).parents[3] / "shared" / "data"
INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."
CONFIG = DataConfig(max_prompt_length=100_000)


def math_row(question, solution, target="5"):
    truth = {"question": question + INSTRUCTION, "solution": solution, "target": target}
    prompt = [{"role": "user", "content": question + INSTRUCTION}]
    return {
        "level": "Level 4",
        "type": "Algebra",
        "prompt": prompt,
        "reward_model": {"ground_truth": truth, "style": "rule"},
    }


LAYOUTS = [
    (
        "gsm8k",
        {"question": "How?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"},
        ("How?", "1200", (), "2 * 600 = 1200\n#### 1,200"),
    ),
    (
        "svamp",
        {"Body": "3 pens cost 6", "Question": "What does one?", "Answer": 2.0, "Type": "Division"},
        ("3 pens cost 6. What does one?", "2", (("subject", "Division"),), "2"),
    ),
    ("mawps", {"input": "Half of 5 ?", "target": 2.5}, ("Half of 5 ?", "2.5", (), "2.5")),
    (
        "mawps",
        {"Question": "number0 of number1 ?", "Numbers": "56.0 2.5", "Answer": "140.0"},
        ("56 of 2.5 ?", "140", (), "140"),
    ),
    (
        "math",
        math_row("Find $x$.", "So $\\boxed{5}$."),
        ("Find $x$.", "5", (("level", "4"), ("subject", "Algebra")), "So $\\boxed{5}$."),
    ),
    (
        "math",
        {"problem": "Find.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"},
        ("Find.", "\\frac{1}{2}", (("level", "1"),), "It is $\\boxed{\\frac{1}{2}}$."),
    ),
    (
        "math12k",
        {"prompt": "Find.", "answer": "7", "demonstration": "It is 7.", "level": "2"},
        ("Find.", "7", (("level", "2"),), "It is 7."),
    ),
    (
        "math500",
        {"problem": "Find.", "solution": "p", "answer": "p - q", "subject": "Algebra", "level": 5},
        ("Find.", "p - q", (("level", "5"), ("subject", "Algebra")), "p"),
    ),
    (
        "math",
        {
            "reward_model": {
                "ground_truth": {
                    "question": "Find.",
                    # As in the file: a backslash and the row's end are gone.
                    "target": r"\begin{pmatrix}6\3\end{pmatrix}",
                    "solution": r"So \boxed{\begin{pmatrix}6\\3\end{pmatrix}}",
                }
            }
        },
        (
            "Find.",
            r"\begin{pmatrix}6\\3\end{pmatrix}",
            (),
            r"So \boxed{\begin{pmatrix}6\\3\end{pmatrix}}",
        ),
    ),
    (
        "aime24",
        {"problem": "Find.", "answer": "073", "solution": "...", "url": "x"},
        ("Find.", "073", (), "..."),
    ),
    ("amc23", {"problem": "Find.", "answer": 27.0}, ("Find.", "27", (), "27")),
    (
        "minerva",
        {"problem": "Find.", "solution": "\\boxed{1} no, \\boxed{2e3}", "type": "Ecology"},
        ("Find.", "2e3", (("subject", "Ecology"),), "\\boxed{1} no, \\boxed{2e3}"),
    ),
    (
        "olympiadbench",
        {
            "question": "Find.",
            "context": None,
            "final_answer": ["$(1,2)$", "3"],
            "solution": ["First."],
            "subfield": "Algebra",
        },
        ("Find.", "$(1,2)$, 3", (("subject", "Algebra"),), "First."),
    ),
]


def load(tmp_path, preset, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = DataSource(path=str(path), preset=preset)
    return source, load_prompts(source, CONFIG, ByteTokenizer())


@pytest.mark.parametrize(("preset", "row", "expected"), LAYOUTS)
def test_a_row_of_each_layout(tmp_path, preset, row, expected):
    source, prompts = load(tmp_path, preset, row)
    (prompt,) = prompts.prompts
    assert (prompt.question, prompt.answer, prompt.labels) == expected[:3]
    assert prompt.dataset == preset
    (shown,) = load_demonstrations(source, CONFIG, ByteTokenizer()).demonstrations
    assert ByteTokenizer().decode(shown.response_ids) == expected[3]


def test_every_preset_has_a_layout_and_a_reader():
    assert set(PRESET_NAMES) == set(PRESETS) == {preset for preset, _, _ in LAYOUTS}


def test_a_source_may_name_fields_of_its_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1", "final": "2"}\n')
    source = DataSource.model_validate(
        {"path": str(path), "preset": "gsm8k", "fields": {"answer": "final"}}
    )
    assert load_prompts(source, CONFIG, ByteTokenizer())[0].answer == "2"


@pytest.mark.parametrize(
    ("preset", "row", "message"),
    [
        ("gsm8k", {"question": "a", "answer": "5"}, ":1: field 'answer' is '5'; expected a sol"),
        ("minerva", {"problem": "a", "solution": "5"}, r"expected a solution with its answer in"),
        ("mawps", {"Question": "number1", "Numbers": "1", "Answer": "1"}, "a number for number1"),
        ("olympiadbench", {"question": "a", "final_answer": []}, "expected a list of texts"),
        ("aime24", {"text": "a"}, "no field 'problem' or 'question'"),
    ],
)
def test_a_row_of_another_layout_is_named(tmp_path, preset, row, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, preset, row)


SVAMP = {"Body": "3 pens", "Question": "How many?", "Answer": 3.0, "Type": "Division"}
MAWPS_CSV = {"Body": "number0 a", "Question": "number0 a ?", "Numbers": "3", "Answer": "3"}
AIME = {"problem": "Find.", "solution": "\\boxed{5}", "answer": "5", "url": "x/2024_AIME_I"}
GSM8K = {"question": "How?", "answer": "It is\n#### 5"}


@pytest.mark.parametrize(
    ("preset", "row", "fits"),
    [
        ("svamp", MAWPS_CSV, "mawps"),
        ("mawps", SVAMP, "svamp"),
        ("minerva", AIME, "aime24"),
        ("math", AIME, "aime24"),
        ("amc23", AIME, "aime24"),
        ("mawps", GSM8K, "gsm8k"),
        ("math", GSM8K, "gsm8k"),
        ("minerva", {"problem": "a", "solution": "\\boxed{1}", "level": "Level 1"}, "math"),
        ("math500", math_row("a", "\\boxed{5}"), "math"),
        ("aime24", {"problem": "a", "answer": "p", "subject": "x", "level": 1}, "math500"),
        (None, GSM8K, "gsm8k"),
    ],
)
def test_rows_of_another_set_are_refused_with_the_preset_that_fits(tmp_path, preset, row, fits):
    with pytest.raises(UserError) as refused:
        load(tmp_path, preset, row)
    message = str(refused.value)
    assert "rows.jsonl:1: " in message
    assert message.endswith(f"; the preset that fits is {fits}")
    assert ("data.prompt_field" in message) == (preset is None)


def test_an_answer_that_is_no_number_is_of_another_set(tmp_path):
    with pytest.raises(UserError, match=r":1: no row of the preset amc23: it has the answer 'p'"):
        load(tmp_path, "amc23", {"problem": "a", "answer": "p"})


def test_a_source_with_fields_of_its_own_is_not_compared(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(AIME) + "\n")
    source = DataSource.model_validate(
        {"path": str(path), "preset": "minerva", "fields": {"answer": "answer"}}
    )
    assert load_prompts(source, CONFIG, ByteTokenizer())[0].answer == "5"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a \\boxed{\\frac{1}{\\sqrt{2}}} b", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{1}, \\boxed{ 2 }", "2"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("so \\boxed 7$.", "7"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\fbox{1}", None),
        ("none", None),
    ],
)
def test_the_last_box_counts(text, answer):
    assert last_boxed(text) == answer


def test_other_answers():
    assert after_hashes("#### 1\n####  $1,234,567.50 ") == "$1234567.50"
    assert after_hashes("####") is None
    assert [number_text(t) for t in ("27.0", "-3.00", "2.50", "0.1", "1.0x")] == [
        *("27", "-3", "2.50", "0.1", "1.0x")
    ]


def test_math12k_is_math_without_what_math500_asks(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    train = write("train.jsonl", math_row("A", "\\boxed{5}"), math_row("B", "\\boxed{5}"))
    test = write("test.jsonl", math_row("C", "\\boxed{5}"), math_row("D  d", "\\boxed{5}"))
    held_out = write("500.jsonl", {"problem": "d e", "answer": "5"})
    with pytest.raises(UserError, match=r"1 of its 1 questions are neither"):
        write_math12k(train, test, held_out, tmp_path / "out.jsonl")
    held_out = write("500.jsonl", {"problem": "d D", "answer": "5"})
    assert write_math12k(train, test, held_out, tmp_path / "out.jsonl") == (3, 1)
    source = DataSource(path=str(tmp_path / "out.jsonl"), preset="math12k")
    prompts = load_prompts(source, CONFIG, ByteTokenizer())
    assert [prompt.question for prompt in prompts.prompts] == ["A", "B", "C"]
    assert prompts[0].labels == (("level", "4"), ("subject", "Algebra"))


REAL = [
    ("gsm8k", "gsm8k/train.jsonl", 7473),
    ("gsm8k", "gsm8k/test.jsonl", 1319),
    ("gsm8k", "bench/gsm8k.test.jsonl", 1319),
    ("svamp", "svamp/SVAMP.json", 1000),
    ("svamp", "bench/svamp.test.jsonl", 1000),
    ("mawps", "svamp/mawps-asdiv-a_svamp.train.csv", 3138),
    ("mawps", "svamp/mawps-asdiv-a_svamp.dev.csv", 1000),
    ("mawps", "mawps/mawps_singleop.jsonl", 562),
    ("mawps", "mawps/mawps_addsub.jsonl", 395),
    ("mawps", "mawps/mawps_singleeq.jsonl", 508),
    ("math", "math/train.parquet", 7500),
    ("math", "math/test.parquet", 5000),
    ("math500", "bench/math500.test.parquet", 500),
    ("aime24", "bench/aime24.test.jsonl", 30),
    ("amc23", "bench/amc23.test.jsonl", 40),
    ("minerva", "bench/minerva_math.test.jsonl", 272),
    ("olympiadbench", "bench/olympiadbench.test.jsonl", 675),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not here")
@pytest.mark.parametrize(("preset", "name", "rows"), REAL)
def test_real_files_as_they_are(preset, name, rows):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not here")
    source = DataSource(path=str(SHARED / name), preset=preset)
    prompts = load_prompts(source, CONFIG, ByteTokenizer())
    assert len(prompts) == rows
    # Two boxes of MATH's training file are empty.
    assert prompts.num_without_answer == (2 if name == "math/train.parquet" else 0)
    assert not any("####" in (prompt.answer or "") for prompt in prompts.prompts)
    assert not any("step by step and output" in prompt.text for prompt in prompts.prompts)
