"""The rules about imports that import-linter cannot say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nested_reft_mcore

PACKAGE = Path(nested_reft_mcore.__file__).parent
REPOSITORY = PACKAGE.parent


def imported_roots(path: Path) -> set[str]:
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


def test_mathematics_imports_nothing_but_torch_and_jaxtyping():
    files = list((PACKAGE / "algorithm").rglob("*.py"))
    assert files
    allowed = {"torch", "jaxtyping", "nested_reft_mcore"} | set(sys.stdlib_module_names)
    strangers = {str(path): imported_roots(path) - allowed for path in files}
    assert not {path: names for path, names in strangers.items() if names}


def test_only_mcore_imports_megatron():
    offenders = [
        path
        for path in PACKAGE.rglob("*.py")
        if "mcore" not in path.relative_to(PACKAGE).parts and "megatron" in imported_roots(path)
    ]
    assert offenders == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("nested_reft_mcore.config.schema", ("torch", "megatron", "transformers", "numpy")),
        ("nested_reft_mcore.observability.logging", ("torch", "megatron")),
        ("nested_reft_mcore.observability.tracking", ("torch", "tensorboard", "wandb")),
        ("nested_reft_mcore.observability.environment", ("torch", "psutil")),
        ("nested_reft_mcore.report.builder", ("torch", "numpy", "matplotlib")),
    ],
)
def test_import_stays_light(module: str, absent: tuple[str, ...]):
    code = f"import sys, {module}; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"
