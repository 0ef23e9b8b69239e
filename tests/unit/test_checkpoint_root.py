"""Which checkpoints are kept, and what a publication leaves at every moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_reft_mcore.checkpoints.publish import (
    partial_directory,
    publish,
    set_aside,
    sync_tree,
    write_whole,
)
from nested_reft_mcore.checkpoints.root import (
    checkpoint_name,
    leftovers,
    list_checkpoints,
    move_latest,
    outdated,
    pass_over,
)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, 0, [0, 10, 20, 25, 30]),
        (2, 0, [0, 10, 20, 25]),
        (9, 0, []),
        (2, 20, [10, 25]),
        (1, 10, [25]),
    ],
)
def test_retention(keep_last: int, keep_every: int, expected: list[int]) -> None:
    assert outdated([30, 0, 10, 20, 25, 35], keep_last, keep_every) == expected


def test_only_names_of_checkpoints_count(tmp_path: Path) -> None:
    for name in ("step_00000020", "step_00000003", "step_7", ".partial_step_00000030.ab", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000040").touch()
    passed_over = pass_over(tmp_path / "step_00000003")
    assert passed_over.name == "passed_over_step_00000003.0"
    (tmp_path / "step_00000003").mkdir()
    assert pass_over(tmp_path / "step_00000003").name == "passed_over_step_00000003.1"
    assert list(list_checkpoints(tmp_path)) == [20]
    assert list_checkpoints(tmp_path / "gone") == {}
    move_latest(tmp_path, 20)
    assert (tmp_path / "latest").read_text() == "step_00000020\n"


def test_a_publication_replaces_the_former_one(tmp_path: Path) -> None:
    final = tmp_path / checkpoint_name(5)
    for content in ("first", "second"):
        partial = partial_directory(final, "token")
        assert partial.name == ".partial_step_00000005.token"
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_text(content)
        sync_tree(partial)
        publish(partial, final)
        assert (final / "inner" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == [final.name]


def test_what_was_killed_is_left_over_and_no_checkpoint(tmp_path: Path) -> None:
    final = tmp_path / checkpoint_name(5)
    for _ in range(2):
        final.mkdir()
        set_aside(final)
    partial_directory(final, "token").mkdir()
    assert sorted(path.name for path in leftovers(tmp_path)) == [
        ".partial_step_00000005.token",
        ".removed_step_00000005.0",
        ".removed_step_00000005.1",
    ]
    assert list_checkpoints(tmp_path) == {}


def test_small_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    write_whole(tmp_path / "latest", "a\n")
    write_whole(tmp_path / "latest", "b\n")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "b\n"
