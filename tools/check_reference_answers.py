"""Do the reference answers of data sets verify against themselves, and against no other?

For every row the reference answer goes into a box and is judged by its own reward: it has to be
right. So is the next answer of the set that is written otherwise: it has to be wrong, unless it has
the same value. Where the set has worked answers, these are judged as completions too.

    python tools/check_reference_answers.py DIRECTORY [--reward NAME] [--output FILE]
    python tools/check_reference_answers.py --set gsm8k=test.jsonl --set math=test.parquet

DIRECTORY holds the usual sets, under the names in FILES below; absent ones are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nested_reft_mcore.config.data import PRESET_NAMES, DataConfig, DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import RewardFunctionConfig
from nested_reft_mcore.data.rows import RowReader
from nested_reft_mcore.data.sources import read_rows
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.rewards.base import RewardItem, RewardResult
from nested_reft_mcore.rewards.pool import RewardPool

FILES = (
    *(("gsm8k", "gsm8k/train.jsonl"), ("gsm8k", "gsm8k/test.jsonl")),
    *(("gsm8k", "bench/gsm8k.test.jsonl"), ("svamp", "svamp/SVAMP.json")),
    *(("svamp", "bench/svamp.test.jsonl"), ("mawps", "svamp/mawps-asdiv-a_svamp.train.csv")),
    *(("mawps", "svamp/mawps-asdiv-a_svamp.dev.csv"), ("mawps", "mawps/mawps_addsub.jsonl")),
    *(("mawps", "mawps/mawps_singleeq.jsonl"), ("mawps", "mawps/mawps_singleop.jsonl")),
    *(("aime24", "bench/aime24.test.jsonl"), ("amc23", "bench/amc23.test.jsonl")),
    *(("math500", "bench/math500.test.parquet"), ("math", "math/train.parquet")),
    *(("math", "math/test.parquet"), ("minerva", "bench/minerva_math.test.jsonl")),
    ("olympiadbench", "bench/olympiadbench.test.jsonl"),
)
WORKED = frozenset({"gsm8k", "math", "minerva"})
"""Sets whose worked answers end as a completion should."""
Kind = Literal["itself", "another", "worked"]


@dataclass(frozen=True)
class Row:
    """A reference answer, where it is from, and what is compared with it."""

    place: str
    answer: str
    another: str | None
    worked: str | None


@dataclass(frozen=True)
class Finding:
    """A verdict that is not as it should be."""

    set: str
    place: str
    kind: Kind
    answer: str
    judged: str
    error: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print a table and write the list; returns the exit code."""
    options = _parse(arguments)
    try:
        sets = _sets(options)
        found: list[Finding] = []
        function = RewardFunctionConfig(name=options.reward)
        with RewardPool((function,), options.workers, options.deadline) as pool:
            print(f"{'set':34} rows  itself  another  worked", flush=True)
            for source in sets:
                rows = list(_rows(source, options.every))
                findings = _check(pool, source, rows)
                counts = Counter(finding.kind for finding in findings)
                worked = counts["worked"] if source.preset in WORKED else "-"
                name = f"{source.preset} {Path(source.path or '').name}"
                numbers = f"{counts['itself']:6} {counts['another']:8} {worked:>7}"
                print(f"{name:34} {len(rows):5} {numbers}", flush=True)
                found += findings
    except UserError as error:
        print(f"check_reference_answers: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    if options.output is not None:
        lines = [json.dumps(asdict(finding), ensure_ascii=False) + "\n" for finding in found]
        options.output.write_text("".join(lines), encoding="utf-8")
        print(f"{len(found)} findings: {options.output}")
    return ExitCode.OK


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", help="holds the usual sets")
    parser.add_argument("--set", action="append", default=[], metavar="PRESET=FILE")
    parser.add_argument("--reward", default="math_verify", help="a reward, as reward.name takes it")
    parser.add_argument("--every", type=int, default=1, help="take one row of so many")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=20.0, help="seconds for one verdict")
    parser.add_argument("--output", type=Path, help="JSON lines of what is not as it should be")
    return parser.parse_args(arguments)


def _sets(options: argparse.Namespace) -> list[DataSource]:
    if options.directory is not None and not options.directory.is_dir():
        raise UserError(f"{options.directory}: is no directory")
    found = []
    for preset, name in FILES if options.directory is not None else ():
        if (options.directory / name).is_file():
            found.append(DataSource(path=str(options.directory / name), preset=preset))
    for entry in options.set:
        preset, equals, path = entry.partition("=")
        if not equals or preset not in PRESET_NAMES:
            known = ", ".join(PRESET_NAMES)
            raise UserError(f"--set {entry}: expected PRESET=FILE, with one of {known}")
        found.append(DataSource(path=path, preset=preset))
    if not found:
        raise UserError("nothing to check; expected a DIRECTORY with the usual sets, or --set")
    return found


def _rows(source: DataSource, every: int) -> Iterator[Row]:
    reader = RowReader(source, DataConfig())
    records = list(read_rows(source))
    answers = [reader.answer(record) for record in records]
    for place in range(0, len(records), every):
        others = (answers[(place + step) % len(answers)] for step in range(1, len(answers)))
        another = next((other for other in others if other != answers[place]), None)
        worked = reader.demonstration(records[place]) if source.preset in WORKED else None
        yield Row(records[place].source, answers[place], another, worked)


def _check(pool: RewardPool, source: DataSource, rows: Sequence[Row]) -> list[Finding]:
    cases: list[tuple[Row, Kind, str]] = []
    for row in rows:
        cases.append((row, "itself", f"\\boxed{{{row.answer}}}"))
        if row.another is not None:
            cases.append((row, "another", f"\\boxed{{{row.another}}}"))
        if row.worked is not None:
            cases.append((row, "worked", row.worked))
    items = [RewardItem("", text, row.answer) for row, _, text in cases]
    findings = []
    for (row, kind, text), result in zip(cases, pool.score(items), strict=True):
        if not _as_it_should(kind, result):
            name = Path(row.place.rpartition(":")[0]).name + ":" + row.place.rpartition(":")[2]
            findings.append(
                Finding(source.preset or "", name, kind, row.answer, text[-80:], result.error)
            )
    return findings


def _as_it_should(kind: Kind, result: RewardResult) -> bool:
    return result.error is None and (result.value > 0) == (kind != "another")


if __name__ == "__main__":
    sys.exit(main())
