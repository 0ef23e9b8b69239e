"""`generate` and `score` through the command line: files in, files out, against transformers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_cases import (
    PROMPT_LINES,
    PROMPTS,
    completion_logits,
    greedy_completion,
    read_lines,
    reference_logprobs,
    reference_model,
    write_lines,
    write_model_with_tokenizer,
)
from typer.testing import CliRunner

import nested_reft_mcore
from nested_reft_mcore.cli import app
from nested_reft_mcore.mcore.initialize import shutdown

SKIPPED = "1,2.attention"
NEW_TOKENS = 12

pytestmark = pytest.mark.usefixtures("keep_logging")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` and `prompts.jsonl`."""
    directory = tmp_path_factory.mktemp("room")
    write_model_with_tokenizer(directory / "model")
    write_lines(directory / "prompts.jsonl", PROMPT_LINES)
    return directory


def start(room: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in processes of its own."""
    repository = Path(nested_reft_mcore.__file__).parent.parent
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "nested_reft_mcore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=room,
        env={**os.environ, "PYTHONPATH": path},
    )


def call(*arguments: Any) -> Any:
    """The command in this process, which has imported everything already."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    # A command that failed leaves its groups to the end of its process.
    shutdown()
    return done


def generate(room: Path, output: Path, *arguments: Any, prompts: Path | None = None) -> list[dict]:
    prompts = prompts or room / "prompts.jsonl"
    files = ("--hf", room / "model", "--prompts", prompts, "--output", output)
    done = call("generate", *files, "--max-new-tokens", NEW_TOKENS, *arguments)
    assert done.exit_code == 0, done.output
    return read_lines(output)


def score(room: Path, given: Path, output: Path, *arguments: Any) -> list[dict]:
    files = ("--hf", room / "model", "--input", given, "--output", output)
    done = call("score", *files, *arguments)
    assert done.exit_code == 0, done.output
    return read_lines(output)


def refusal(*arguments: Any) -> str:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("arguments", "skipped", "executions"),
    [
        ((), "", r"48 on stage 0"),
        # Two groups, one on its way in each stage; how long a group lives hangs on its members.
        (("--pipeline-parallel", "2"), "", r"(\d+) on stage 0, \1 on stage 1"),
        # Of four layers one does not run and one runs by half.
        (("--tensor-parallel", "2", "--skip-layers", SKIPPED), SKIPPED, r"30 on stage 0"),
    ],
    ids=["alone", "pipeline", "tensor-nested"],
)
def test_greedy_is_what_transformers_generates(
    room: Path, tmp_path: Path, arguments: tuple[str, ...], skipped: str, executions: str
):
    output = tmp_path / "new" / "out.jsonl"
    files = ("--hf", "model", "--prompts", "prompts.jsonl", "--output", str(output))
    options = ("--greedy", "--max-new-tokens", str(NEW_TOKENS), "--logprobs", *arguments)
    done = start(room, "generate", *files, *options)
    assert done.returncode == 0, done.stderr
    lines = read_lines(output)
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    assert [line["prompt_token_ids"] for line in lines] == list(PROMPTS)
    model = reference_model(room / "model", skipped)
    for line, prompt in zip(lines, PROMPTS, strict=True):
        expected = greedy_completion(model, prompt, NEW_TOKENS)
        assert line["token_ids"] == expected
        assert line["finish_reason"] == ("stop" if expected[-1] == 7 else "length")
        assert line["text"] == " ".join(f"w{token}" for token in expected if token != 7)
        logprobs = reference_logprobs(model, prompt, expected)
        assert line["logprobs"] == pytest.approx(logprobs, abs=1e-5)
    last = done.stdout.splitlines()[-1]
    num_tokens = sum(len(line["token_ids"]) for line in lines)
    assert f"{len(PROMPTS)} completions, {num_tokens} tokens in" in last
    assert "tokens/s" in last
    assert re.search(
        f"passes through a layer: {executions}; skipped: {skipped or 'none'}$", last
    ), last


@pytest.mark.distributed
def test_scores_are_the_log_probabilities_that_were_sampled_with(room: Path, tmp_path: Path):
    """Another code path (no cache), another layout, other batches: the same numbers."""
    sampled = tmp_path / "sampled.jsonl"
    options = ("--logprobs", "--num-samples", 3, "--skip-layers", SKIPPED, "--seed", 5)
    lines = generate(room, sampled, *options)
    assert len({tuple(line["token_ids"]) for line in lines}) > 12
    files = ("--hf", "model", "--input", str(sampled), "--output", str(tmp_path / "scores"))
    nested = ("--skip-layers", SKIPPED, "--pipeline-parallel", "2", "--batch-size", "2")
    done = start(room, "score", *files, *nested)
    assert done.returncode == 0, done.stderr
    assert "18 completions" in done.stdout.splitlines()[-1]
    for skipped, scores in (
        (SKIPPED, read_lines(tmp_path / "scores")),
        ("", score(room, sampled, tmp_path / "full", "--batch-size", 5)),
    ):
        model = reference_model(room / "model", skipped)
        for line, scored in zip(lines, scores, strict=True):
            assert scored["prompt_token_ids"] == line["prompt_token_ids"]
            assert scored["token_ids"] == line["token_ids"]
            expected = reference_logprobs(model, line["prompt_token_ids"], line["token_ids"])
            assert scored["logprobs"] == pytest.approx(expected, abs=1e-5)
            if skipped:
                assert scored["logprobs"] == pytest.approx(line["logprobs"], abs=1e-5)
            else:
                assert scored["logprobs"] != pytest.approx(line["logprobs"], abs=1e-2)


@pytest.mark.distributed
def test_a_mistake_in_the_file_ends_several_processes_with_one_code(room: Path, tmp_path: Path):
    prompts = write_lines(tmp_path / "bad.jsonl", [*PROMPT_LINES, {"promt": "w1"}])
    files = ("--hf", "model", "--prompts", str(prompts), "--output", str(tmp_path / "out.jsonl"))
    done = start(room, "generate", *files, "--pipeline-parallel", "2")
    assert done.returncode == 2
    assert f"error: {prompts}:7: found ['promt']; expected exactly one of" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_goes_through_the_chat_template_if_asked(room: Path, tmp_path: Path):
    lines = generate(room, tmp_path / "out.jsonl", "--greedy", "--template", "chat")
    # Messages always do, and token ids never.
    chats = [[1, 13, 4, 5, 2, 3], PROMPTS[1], PROMPTS[2], [1, 40, 2, 3], PROMPTS[4]]
    assert [line["prompt_token_ids"] for line in lines] == [*chats, [1, 6, 6, 2, 3]]
    model = reference_model(room / "model")
    assert lines[0]["token_ids"] == greedy_completion(model, chats[0], NEW_TOKENS)


def test_logprobs_are_of_the_distribution_sampled_from(room: Path, tmp_path: Path):
    options = ("--logprobs", "--temperature", 0.7, "--top-k", 5, "--num-samples", 2)
    model = reference_model(room / "model")
    for line in generate(room, tmp_path / "out.jsonl", *options):
        tokens = line["token_ids"]
        logits = completion_logits(model, line["prompt_token_ids"], tokens) / 0.7
        kept = logits.topk(5).values
        chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert (chosen >= kept[:, -1]).all()
        expected = chosen - kept.logsumexp(-1)
        assert line["logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_chunks_change_nothing_but_the_progress(room: Path, tmp_path: Path):
    options = ("--num-samples", 2, "--seed", 9)
    whole = generate(room, tmp_path / "whole.jsonl", *options)
    assert [(line["prompt_index"], line["sample_index"]) for line in whole] == [
        (prompt, sample) for prompt in range(6) for sample in range(2)
    ]
    assert "logprobs" not in whole[0]
    arguments = ("--prompts", room / "prompts.jsonl", "--output", tmp_path / "cut.jsonl")
    done = call(
        *("generate", "--hf", room / "model", *arguments, *options),
        *("--max-new-tokens", NEW_TOKENS, "--slots", 1),
    )
    assert read_lines(tmp_path / "cut.jsonl") == whole
    shown = re.findall(r"generate (\d)/6", done.stdout)
    assert shown == ["2", "4", "6"]
    assert generate(room, tmp_path / "other.jsonl", "--num-samples", 2, "--seed", 10) != whole


def test_a_stop_token_ends_a_completion(room: Path, tmp_path: Path):
    model = reference_model(room / "model")
    full = [greedy_completion(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    stop = full[0][4]
    lines = generate(room, tmp_path / "out.jsonl", "--greedy", "--stop-token", f"w{stop}")
    assert lines[0]["finish_reason"] == "stop"
    for line, tokens in zip(lines, full, strict=True):
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert line["token_ids"] == expected


def test_a_stop_string_ends_a_completion(room: Path, tmp_path: Path):
    """The text may span tokens, and every stage sees it."""
    plain = generate(room, tmp_path / "plain.jsonl", "--seed", 4)
    words = plain[0]["text"].split()
    stop = f"{words[1]} {words[2]}"
    (first, *_) = generate(room, tmp_path / "out.jsonl", "--seed", 4, "--stop-string", stop)
    assert first["text"].split() == words[:3]
    assert first["finish_reason"] == "stop"
    assert first["token_ids"] == plain[0]["token_ids"][:3]


def test_speculation_is_lossless(room: Path, tmp_path: Path):
    """Greedy gives the full model's tokens; sampled tokens have the full model's log-probs."""
    skip = ("--skip-layers", "1,2.attention")
    full = generate(room, tmp_path / "full.jsonl", "--greedy")
    drafted = generate(room, tmp_path / "greedy.jsonl", "--greedy", "--speculative", *skip)
    assert [line["token_ids"] for line in drafted] == [line["token_ids"] for line in full]
    options = ("--speculative", "--logprobs", "--num-samples", 3)
    sampled = generate(room, tmp_path / "sampled.jsonl", *options, *skip)
    model = reference_model(room / "model")
    for line in sampled:
        expected = reference_logprobs(model, line["prompt_token_ids"], line["token_ids"])
        assert line["logprobs"] == pytest.approx(expected, abs=1e-5)
    done = call(
        "generate",
        *("--hf", room / "model", "--prompts", room / "prompts.jsonl"),
        *("--output", tmp_path / "no.jsonl", "--speculative", "--max-new-tokens", 4),
    )
    assert done.exit_code == 2
    assert "nothing is skipped" in done.output


def test_a_share_of_layers_is_drawn_from_the_seed(room: Path, tmp_path: Path):
    files = ("--hf", room / "model", "--prompts", room / "prompts.jsonl")
    options = ("--greedy", "--max-new-tokens", NEW_TOKENS, "--skip-ratio", 0.25)
    seen = set()
    for seed in range(6):
        output = tmp_path / f"{seed}.jsonl"
        done = call("generate", *files, "--output", output, *options, "--seed", seed)
        seen.add(done.stdout.splitlines()[-1].rpartition("skipped: ")[2])
        model = reference_model(room / "model", done.stdout.strip().rpartition("skipped: ")[2])
        expected = greedy_completion(model, PROMPTS[2], NEW_TOKENS)
        assert read_lines(output)[2]["token_ids"] == expected
    # One of four layers, the first and the last excepted.
    assert seen == {"1", "2"}


def test_texts_are_tokenized_apart_and_an_empty_one_has_no_scores(room: Path, tmp_path: Path):
    lines = [
        {"prompt": "w13 w4 w5", "text": "w8 w9"},
        {"prompt": "w13", "text": ""},
        {"prompt_token_ids": [6], "token_ids": [1, 2, 3, 7], "text": "w40", "prompt": "w40"},
    ]
    given = write_lines(tmp_path / "in.jsonl", lines)
    scores = score(room, given, tmp_path / "out.jsonl")
    model = reference_model(room / "model")
    for line, prompt, tokens in zip(
        scores, ([13, 4, 5], [13], [6]), ([8, 9], [], [1, 2, 3, 7]), strict=True
    ):
        assert (line["prompt_token_ids"], line["token_ids"]) == (prompt, tokens)
        expected = reference_logprobs(model, prompt, tokens) if tokens else []
        assert line["logprobs"] == pytest.approx(expected, abs=1e-5)


def test_mistakes_of_generate_are_one_message(room: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    files = ("--prompts", room / "prompts.jsonl", "--output", output)
    command = ("generate", "--hf", room / "model", *files, "--max-new-tokens", NEW_TOKENS)
    assert "--hf DIR and --checkpoint DIR, got both" in refusal(*command, "--checkpoint", "x")
    assert "--skip-layers 1,4: layer 4 does not exist" in refusal(*command, "--skip-layers", "1,4")
    assert "--skip-ratio 0.9: cannot skip 4 of 4" in refusal(*command, "--skip-ratio", 0.9)
    assert "token 'w41' is not in" in refusal(*command, "--stop-token", "w41")
    # 64 positions; the longest prompt has 6 tokens.
    assert re.search(
        r"prompts\.jsonl:3: the prompt has 6 tokens; expected at most 5, .* 64 positions .* 59",
        refusal(*command, "--max-new-tokens", 59),
    )
    assert "expected at most 63, less" in refusal(*command, "--max-new-tokens", 64)
    assert "expected a file to write" in refusal(*command, "--output", tmp_path)
    assert not output.exists()
    silent = shutil.copytree(
        room / "model", tmp_path / "model", ignore=shutil.ignore_patterns("chat_template*")
    )
    one = write_lines(tmp_path / "one.jsonl", PROMPT_LINES[:1])
    text = refusal(*command, "--hf", silent, "--prompts", one, "--template", "chat")
    assert re.search(r"one\.jsonl:1: .* no chat template", text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "w1"}', r"found \['prompt'\]; expected prompt_token_ids and token_ids, or"),
        (
            '{"prompt": "w1", "text": "w2", "token_ids": [1]}',
            "expected prompt_token_ids and token_ids, or",
        ),
        ('{"prompt_token_ids": [1], "token_ids": [41]}', "is 41; expected token ids from 0 to 40"),
        ('{"prompt_token_ids": [], "token_ids": [4]}', "the prompt has no tokens"),
        ("{", "not JSON"),
        (json.dumps({"prompt_token_ids": [1] * 60, "token_ids": [1] * 6}), "have 66 tokens; .* 65"),
    ],
)
def test_mistakes_in_lines_to_score_are_named(room: Path, tmp_path: Path, line, message):
    given = tmp_path / "in.jsonl"
    longest = json.dumps({"prompt_token_ids": [1] * 60, "token_ids": [1] * 5})
    given.write_text(f"{longest}\n\n{line}\n")
    output = tmp_path / "out.jsonl"
    text = refusal("score", "--hf", room / "model", "--input", given, "--output", output)
    assert re.search(rf"in\.jsonl:3: .*{message}", text), text
    given.write_text(f"{longest}\n")
    assert len(score(room, given, output)[0]["logprobs"]) == 5


def test_weights_that_are_not_numbers_are_not_scored(room: Path, tmp_path: Path):
    model = reference_model(room / "model")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    given = write_lines(tmp_path / "in.jsonl", [{"prompt_token_ids": [1], "token_ids": [2]}])
    output = write_lines(tmp_path / "out.jsonl", ["before"])
    done = call("score", "--hf", tmp_path / "model", "--input", given, "--output", output)
    assert done.exit_code == 2
    assert "in.jsonl:1: a log-probability is nan" in done.stderr
    # What was there stays, and nothing lies beside it.
    assert read_lines(output) == ["before"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "model"}
