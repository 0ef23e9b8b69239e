"""Data sets of the hub, without a network: directories, saved sets, and the cache."""

import os
import subprocess
import sys
import time

import pytest

from nested_reft_mcore.config.data import DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.sources import read_rows

pytest.importorskip("datasets")

SCRIPT = """
import sys
from pathlib import Path
import datasets
from nested_reft_mcore.config.data import DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.sources import read_rows

datasets.disable_progress_bars()
root = Path(sys.argv[1])
loaded = datasets.load_dataset(str(root / "sums"))
loaded.save_to_disk(root / "saved")
# What a download of acme/sums would have left behind.
(root / "cache" / "sums").rename(root / "cache" / "acme___sums")
for name, split in (("acme/sums", "test"), (root / "sums", "train"), (root / "saved", "test"),
                    ("acme/gone", "train"), (root / "saved", "dev")):
    try:
        rows = list(read_rows(DataSource(hub=str(name), split=split)))
        print([(row.fields["question"], row.source) for row in rows])
    except UserError as error:
        print("UserError", error)
"""


def test_names_and_directories_without_a_network(tmp_path):
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "train.jsonl").write_text('{"question": "1"}\n{"question": "2"}\n')
    (tmp_path / "sums" / "test.jsonl").write_text('{"question": "3"}\n')
    places = {"HF_HOME": "home", "HF_DATASETS_CACHE": "cache"}
    environment = {name: str(tmp_path / place) for name, place in places.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cached, directory, saved, gone, split = done.stdout.splitlines()[-5:]
    assert cached == "[('3', 'acme/sums@test:row 1')]"
    assert directory.startswith("[('1', '")
    assert "sums@train:row 2" in directory
    assert saved.startswith("[('3', '")
    assert gone.startswith("UserError acme/gone@train: cannot be loaded by `datasets`: ")
    assert "no split 'dev'" in split


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'nested_reft_mcore\[hub\]'"):
        list(read_rows(DataSource(hub="acme/sums")))


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Nobody listens there.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"acme/sums@train: http://127.*HF_HUB_OFFLINE=1 takes"):
        list(read_rows(DataSource(hub="acme/sums")))
    assert time.monotonic() - started < 15, "it was asked again and again"
