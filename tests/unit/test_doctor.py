"""The doctor finds what is missing or broken, and never falls ill itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement as Declared

from nested_reft_mcore.launch import doctor
from nested_reft_mcore.launch.doctor import REQUIREMENTS, Requirement, check_requirement
from nested_reft_mcore.mcore import native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A directory on the import path for packages that are not what they seem."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def package(room: Path, name: str, body: str, version: str = "1.0") -> None:
    (room / name).mkdir()
    (room / name / "__init__.py").write_text(body)
    info = room / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {d.name: str(d.specifier) for d in map(Declared, project["dependencies"])}
    assert {r.distribution: r.version for r in REQUIREMENTS} == declared


@pytest.mark.parametrize(
    ("version", "wanted", "status"),
    [
        ("2.10.0", ">=2.6", "ok"),
        ("2.5.1+cu124", ">=2.6", "too old"),
        ("0.16.1", "==0.16.1", "ok"),
        ("0.17.0", "==0.16.1", "wrong version"),
        ("3", "", "ok"),
    ],
)
def test_versions(room, version, wanted, status):
    package(room, "made_up_versions", "", version)
    found = check_requirement(Requirement("made_up_versions", "made_up_versions", wanted))
    sys.modules.pop("made_up_versions")
    assert found.status == status
    assert version in found.version
    assert found.fatal == (status != "ok")


def test_a_missing_package_is_fatal_and_named():
    found = check_requirement(Requirement("no-such-thing", "no_such_thing", ">=3"))
    assert (found.status, found.fatal) == ("not there", True)
    assert "no-such-thing>=3" in found.version


@pytest.mark.parametrize(
    "body", ["raise RuntimeError('no backend found')", "import sys; sys.exit(3)", "1 +"]
)
def test_a_package_that_breaks_on_import_is_a_finding(room, body):
    package(room, "made_up_broken", body)
    found = check_requirement(Requirement("made_up_broken", "made_up_broken"))
    assert (found.status, found.fatal) == ("broken", True)


def test_a_broken_transformer_engine_is_reported_and_replaced(room):
    package(room, "transformer_engine", "raise RuntimeError('Found empty package')")
    engine = doctor.check_accelerators()[0]
    assert (engine.name, engine.status, engine.fatal) == ("Transformer Engine", "broken", False)
    assert "Found empty package" in engine.version
    assert "local layers" in engine.note


def test_another_package_called_apex_is_not_taken_for_nvidias(room):
    package(room, "apex", "")
    apex = next(f for f in doctor.check_accelerators() if f.name.startswith("apex"))
    sys.modules.pop("apex")
    assert apex.status == "broken"
    assert "amp_C is missing" in apex.version


@pytest.mark.parametrize(
    ("problem", "status"),
    [(None, "ok"), ("not built: no compiler", "not there"), ("this processor is old", "broken")],
)
def test_the_decode_kernels_are_found_or_what_is_used_instead(monkeypatch, problem, status):
    monkeypatch.setattr(native, "problem", lambda: problem)
    kernels = next(f for f in doctor.check_accelerators() if f.name == "decode kernels")
    assert (kernels.status, kernels.version, kernels.fatal) == (status, problem or "", False)
    assert ("torch" in kernels.note) == (problem is not None)


def test_the_report_is_json_and_the_exit_code_says_whether_it_is_well(tmp_path):
    # What is needed and not there: psutil hidden behind a package that breaks.
    (tmp_path / "psutil.py").write_text("raise ImportError('hidden')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from nested_reft_mcore.launch.doctor import run_doctor; sys.exit(run_doctor(as_json=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    states = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert report["healthy"] is False
    assert states["psutil"] == "broken"
    assert {"torch", "megatron-core", "NCCL", "gloo", "MPI", "flash-attn", "decode kernels"} <= set(
        states
    )


def test_the_tables_name_what_is_used_instead(capsys):
    code = doctor.run_doctor()
    out, err = capsys.readouterr()
    healthy = not any(finding.fatal for finding in doctor.examine())
    assert code == (0 if healthy else 1)
    assert ("error:" in err) != healthy
    assert "Transformer Engine" in out
