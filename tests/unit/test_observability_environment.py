"""The report says where a run took place, and none of its secrets."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import nested_reft_mcore
from nested_reft_mcore.mcore import native
from nested_reft_mcore.observability.environment import environment_report, write_environment

PACKAGE = Path(nested_reft_mcore.__file__).parent


def test_report_is_written_whole_as_json(tmp_path: Path):
    path = write_environment(tmp_path / "run", world_size=4)
    assert path.name == "environment.json"
    assert [one.name for one in path.parent.iterdir()] == ["environment.json"]
    report = json.loads(path.read_text())
    assert report["world_size"] == 4
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["versions"]["megatron-core"] == metadata.version("megatron-core")
    assert report["cpu"]["count"] >= 1
    assert report["cpu"]["memory_gib"] > 0
    assert report["cpu"]["model"]
    assert report["hostname"]
    assert report["decode_kernels"] == native.problem()


def test_variables_are_a_fixed_list(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("WANDB_API_KEY", "sesame")
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.setenv("SLURM_JWT", "sesame")
    report = environment_report()
    assert report["variables"]["SLURM_JOB_ID"] == "77"
    assert "sesame" not in json.dumps(report)


def git_of_copy(directory: Path) -> object:
    """What the report says about git, from a copy of the package in `directory`."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json\n"
            "from nested_reft_mcore.observability import environment\n"
            "print(json.dumps(environment._git()))",
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE / "observability", tmp_path / "nested_reft_mcore" / "observability")
    (tmp_path / "nested_reft_mcore" / "__init__.py").touch()
    return tmp_path


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_and_changes_of_the_checkout(copied: Path):
    git(copied, "init", "-q")
    git(copied, "add", "nested_reft_mcore")
    git(copied, "commit", "-qm", "first")
    commit = git(copied, "rev-parse", "HEAD")
    assert git_of_copy(copied) == {"commit": commit, "changed": False}
    (copied / "nested_reft_mcore" / "__init__.py").write_text("x = 1\n")
    assert git_of_copy(copied) == {"commit": commit, "changed": True}


def test_somebody_elses_repository_is_not_ours(copied: Path):
    git(copied, "init", "-q")
    git(copied, "commit", "-qm", "theirs", "--allow-empty")
    assert git_of_copy(copied) is None


def test_no_repository(copied: Path):
    assert git_of_copy(copied) is None
