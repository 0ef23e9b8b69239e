"""What a killed evaluation leaves is taken up by the same evaluation and by no other."""

import json

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.training.evaluation_record import Parts, RawCompletion

SETTINGS = {"seed": 1, "sampling": {"num_samples": 2}, "policies": ["full"]}


def completion(row: int, sample: int = 0, **more) -> RawCompletion:
    fields = {"policy": "full", "mode": "sampled", "dataset": "maths", "token_ids": (4, row, 7)}
    return RawCompletion(
        **(fields | {"row": row, "sample": sample, "finish_reason": "stop"} | more)
    )


def test_all_starts_and_replicas_are_read_together(tmp_path):
    parts = Parts(tmp_path / "parts")
    assert parts.begin(SETTINGS, restart=False) == []
    for replica in (0, 1):
        writer = parts.open(replica)
        writer.add(completion(replica, 1))
        writer.add(completion(replica, 0))
        writer.close()
    again = parts.open(0)
    again.add(completion(7))
    again.add(completion(0))  # once more, as a start that was killed may have it
    assert len(list(parts.directory.glob("*.jsonl"))) == 3
    found = Parts(tmp_path / "parts").begin(SETTINGS, restart=False)
    assert found == [
        *(completion(0, 0), completion(0, 1), completion(1, 0), completion(1, 1), completion(7)),
    ]


@pytest.mark.parametrize(
    "torn", [b'{"policy": "full", "mo', b'{"policy": "full"}\n', b"\x00\xff\n"]
)
def test_a_line_that_was_not_finished_is_left_out(tmp_path, torn):
    parts = Parts(tmp_path)
    parts.begin(SETTINGS, restart=False)
    writer = parts.open(0)
    writer.add(completion(0))
    writer.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + torn)
    assert parts.begin(SETTINGS, restart=False) == [completion(0)]


def test_a_line_is_on_the_disk_when_add_returns(tmp_path):
    parts = Parts(tmp_path)
    parts.begin(SETTINGS, restart=False)
    parts.open(0).add(completion(3))
    assert parts.begin(SETTINGS, restart=False) == [completion(3)]


def test_other_settings_are_refused_by_name(tmp_path):
    parts = Parts(tmp_path)
    parts.begin(SETTINGS, restart=False)
    parts.open(0).add(completion(0))
    changed = {"seed": 1, "sampling": {"num_samples": 4}, "policies": ["full", "3"]}
    with pytest.raises(UserError) as refused:
        parts.begin(changed, restart=False)
    message = str(refused.value)
    assert str(tmp_path / "settings.json") in message
    assert "sampling.num_samples was 2, is 4" in message
    assert 'policies was ["full"], is ["full", "3"]' in message
    assert "--restart" in message
    assert "seed" not in message
    # Refused, not lost.
    assert parts.begin(SETTINGS, restart=False) == [completion(0)]
    assert parts.begin(changed, restart=True) == []
    assert json.loads((tmp_path / "settings.json").read_text()) == changed


def test_restart_removes_no_directory_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no settings\.json"):
        Parts(tmp_path).begin(SETTINGS, restart=True)
    assert (tmp_path / "thesis.tex").exists()
