"""A user's mistake gives one clear message and exit code 2, before any process is started."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ARCHITECTURE = {
    "num_layers": 12,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "ffn_hidden_size": 176,
    "vocab_size": 41,
}
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID")


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).parents[2]
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "nested_reft_mcore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        env=clean | {"PYTHONPATH": path} | env,
    )


def refusal(*arguments: str, cwd: Path, **env: str) -> str:
    done = run(*arguments, cwd=cwd, **env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stdout == ""
    return done.stderr


@pytest.fixture
def room(tmp_path: Path) -> Path:
    config = {
        "run_dir": "run",
        "model": {"architecture": ARCHITECTURE},
        "data": {"train_path": "data.jsonl"},
    }
    # JSON is YAML.
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    return tmp_path


@pytest.mark.parametrize("command", ["train", "sft", "evaluate"])
def test_missing_file(room, command):
    assert refusal(command, "none.yaml", cwd=room) == (
        "error: none.yaml: no such file; expected a YAML configuration\n"
    )


def test_wrong_key(room):
    text = refusal("train", "config.yaml", "rollout.grop_size=4", cwd=room)
    assert "unknown key `rollout.grop_size`; did you mean `rollout.group_size`?" in text


def test_not_yaml(room):
    (room / "config.yaml").write_text("run_dir: [a\nmodel: b\n")
    assert refusal("train", "config.yaml", cwd=room).startswith("error: config.yaml:2: not valid")


def test_several_mistakes_are_one_error(room):
    text = refusal("train", "config.yaml", "seed=x", "rollot.a=1", cwd=room)
    assert "`seed`" in text
    assert "`rollot`" in text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "parallel.tensor_model_parallel_size=2",
            ("tensor_model_parallel_size=2", "num_query_groups=1", "what would fit: 1"),
        ),
        (
            "parallel.pipeline_model_parallel_size=5",
            ("pipeline_model_parallel_size=5", "num_layers=12", "1, 2, 3, 4, 6, 12"),
        ),
        ("rollout.top_p=0.9", ("rollout.top_p=0.9", "kept mass")),
        ("nested.num_skipped=11", ("11 layers to skip", "leave 10")),
        ("rollout.max_new_tokens=0", ("rollout.max_new_tokens", "greater than 0")),
        ("data.train_path=gone.jsonl", ("data.train_path: gone.jsonl does not exist",)),
        ("data.train_path=null", ("data.train_path is missing",)),
        ("model={hf_path: gone}", ("gone/config.json",)),
        ("model={checkpoint: gone}", ("gone: does not exist",)),
    ],
)
def test_what_cannot_work_is_refused_before_any_process_starts(room, override, parts):
    start = time.monotonic()
    # Two stages: a start of processes would be asked for.
    pipeline = "parallel.pipeline_model_parallel_size=2"
    text = refusal("train", "config.yaml", pipeline, override, cwd=room)
    assert all(part in text for part in parts), text
    assert time.monotonic() - start < 20
    assert not (room / "run").exists()


def test_unknown_model_type(room):
    (room / "hf").mkdir()
    (room / "hf" / "config.json").write_text('{"model_type": "mamba"}')
    text = refusal("train", "config.yaml", "model={hf_path: hf}", cwd=room)
    assert "'mamba' is not supported; supported are llama, mistral, qwen2, qwen3" in text


def test_batches_that_replicas_cannot_share(room):
    text = refusal(
        "train",
        "config.yaml",
        "parallel.data_parallel_size=3",
        "train.updates_per_step=1",
        cwd=room,
    )
    assert "rollout.prompts_per_step=16 is not a multiple" in text
    assert "what would fit: 15, 18" in text
    text = refusal("sft", "config.yaml", "parallel.data_parallel_size=3", cwd=room)
    assert "sft.global_batch_size=24" in text


def test_sizes_that_do_not_make_the_launched_processes(room):
    """All find it, and leave it to rank 0 to say so."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    sizes = "parallel.pipeline_model_parallel_size=2"
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def launch(rank: int) -> tuple[int, str]:
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
        done = run("train", "config.yaml", sizes, cwd=room, **place, **mine)
        return done.returncode, done.stderr

    with ThreadPoolExecutor() as pool:
        (code, text), *others = pool.map(launch, range(3))
    assert code == 2, text
    assert text.startswith("error: ")
    assert "does not divide the 3 processes" in text
    assert text.count("error:") == 1
    assert others == [(2, ""), (2, "")]


def test_a_reward_that_is_not_there_is_told_before_a_model_is_built(room):
    text = refusal("train", "config.yaml", "reward.name=gone:judge", cwd=room)
    assert "reward: name is 'gone:judge': cannot be imported" in text


def test_half_an_environment(room):
    text = refusal("train", "config.yaml", cwd=room, RANK="1")
    assert "WORLD_SIZE, LOCAL_RANK" in text


def test_generate_and_score_refuse_before_they_load(room):
    prompts = ("--prompts", "data.jsonl", "--output", "out.jsonl")
    cases = [
        (("generate", *prompts), "exactly one of --hf DIR and --checkpoint DIR, got neither"),
        (("generate", *prompts, "--hf", "gone"), "gone/config.json"),
        (
            ("generate", "--prompts", "gone", "--output", "o", "--hf", "hf"),
            "--prompts gone: does not exist",
        ),
        (
            ("generate", *prompts, "--hf", "hf", "--greedy", "--num-samples", "2"),
            "would be the same",
        ),
        (("generate", *prompts, "--hf", "hf", "--skip-ratio", "1.5"), "`skip_ratio`: expected"),
        (("score", "--input", "gone", "--output", "o", "--hf", "hf"), "--input gone"),
        (("convert", "mcore-to-hf", "--checkpoint", "hf", "--output", "o"), "not a checkpoint"),
    ]
    (room / "hf").mkdir()
    for arguments, part in cases:
        assert part in refusal(*arguments, cwd=room)


def test_skipped_layers_that_are_not_there(room):
    checkpoint = room / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    arguments = ("score", "--input", "data.jsonl", "--output", "o", "--checkpoint", "checkpoint")
    for layers in ("12", "3.nose", "x"):
        text = refusal(*arguments, "--skip-layers", layers, cwd=room)
        assert text.startswith(f"error: --skip-layers {layers}: ")


def test_every_command_explains_itself_with_an_example(tmp_path):
    listed = run("--help", cwd=tmp_path)
    assert listed.returncode == 0
    commands = ["train", "sft", "evaluate", "generate", "score", "doctor", "bench"]
    grouped = ["convert hf-to-mcore", "convert mcore-to-hf", "bench rollout"]
    for command in commands:
        assert f"\n  {command} " in listed.stdout
    for command in commands + grouped:
        done = run(*command.split(), "--help", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"nested-reft {command}" in done.stdout.partition("Example")[2]


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, nested_reft_mcore.cli\n"
        "heavy = {'torch', 'megatron', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_command_or_option_is_a_users_mistake(tmp_path):
    for arguments in (("trian",), ("train",), ("generate", "--gredy")):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
