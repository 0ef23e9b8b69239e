"""Conversion against a plain copy: time and memory, both directions, on a 3 GB checkpoint.

Writes a Hugging Face directory of random bfloat16 values in the shapes of Qwen2.5-1.5B. Then, round
by round: `cp` and fsync of it, Hugging Face to Megatron, Megatron to Hugging Face. Times leave out
imports and the start of processes, and end when everything is on the disk. Memory is the highest
RssAnon of any process (its own pages; mapped files can be dropped by the system at any time), with
what importing torch and Megatron takes.

python benchmarks/bench_convert.py [--rounds 3] [--processes 1 2] [--layers 28] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path("bench_convert.json"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        report = measure(Path(name), options)
    show(report)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{options.output}: written")


def measure(room: Path, options: argparse.Namespace) -> dict[str, Any]:
    num_bytes = write_source(room / "hf", options.layers)
    print(f"{num_bytes / 1e9:.2f} GB of weights, {options.rounds} rounds", flush=True)
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for processes in options.processes:
            row: dict[str, Any] = {"round": number, "processes": processes}
            # A copy before each direction, so that all three see the same disk.
            row["cp_s"] = [copy_durably(room / "hf", room / "copy")]
            row["hf_to_mcore"] = convert("hf-to-mcore", room / "hf", room / "mcore", processes)
            row["cp_s"].append(copy_durably(room / "hf", room / "copy"))
            row["mcore_to_hf"] = convert("mcore-to-hf", room / "mcore", room / "back", processes)
            check_equal(room / "hf", room / "back")
            shutil.rmtree(room / "mcore")
            shutil.rmtree(room / "back")
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {
        "what": "bench_convert",
        "weight_bytes": num_bytes,
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine(),
        "import_rss_anon": convert("imports", room, room, 1)["rss_anon"],
        "rows": rows,
    }


def write_source(directory: Path, num_layers: int) -> int:
    import torch

    from nested_reft_mcore.hf.config import read_architecture
    from nested_reft_mcore.hf.directory_writer import ShardWriter, plan_shards, write_json
    from nested_reft_mcore.hf.families import weight_map

    directory.mkdir()
    write_json(directory / "config.json", SHAPE | {"num_hidden_layers": num_layers})
    shapes = weight_map(read_architecture(directory)).hf_shapes
    plan = plan_shards(shapes, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(directory, plan) as writer:
        for name, shape in shapes.items():
            writer.add(name, torch.randn(shape, generator=generator))
    plan.finish(directory)
    return plan.num_bytes


def copy_durably(source: Path, target: Path) -> float:
    """Seconds that `cp` and fsync of every file take."""
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def convert(what: str, source: Path, target: Path, processes: int) -> dict[str, Any]:
    """Convert in so many real processes; seconds, and the highest RssAnon of any of them."""
    port = str(20000 + os.getpid() % 20000)
    workers = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHDYNAMO_DISABLE": "1",
        }
        command = [sys.executable, __file__, "--worker", what, str(source), str(target)]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    answers = []
    for worker in workers:
        out, _ = worker.communicate()
        if worker.returncode:
            raise SystemExit(f"{what} with {processes} processes left with {worker.returncode}")
        answers.append(json.loads(out.splitlines()[-1]))
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def work(what: str, source: str, target: str) -> None:
    """One process of a conversion: prints its seconds and its highest RssAnon."""
    from nested_reft_mcore.config.inference import HfToMcoreOptions, McoreToHfOptions
    from nested_reft_mcore.config.schema import ParallelConfig
    from nested_reft_mcore.launch.ranks import discover_ranks
    from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
    from nested_reft_mcore.training.conversion import hf_to_mcore, mcore_to_hf

    ranks = discover_ranks(os.environ)
    assert ranks is not None
    context = initialize_parallel(ParallelConfig(), ranks, seed=0)
    with RssAnonWatch() as watch:
        started = time.perf_counter()
        if what == "hf-to-mcore":
            hf_to_mcore(HfToMcoreOptions(hf=source, output=target), context)
        elif what == "mcore-to-hf":
            mcore_to_hf(McoreToHfOptions(checkpoint=source, output=target), context)
        seconds = time.perf_counter() - started
    shutdown()
    print(json.dumps({"seconds": seconds, "rss_anon": watch.highest}), flush=True)


class RssAnonWatch:
    """The highest RssAnon of this process, looked at two hundred times a second."""

    def __init__(self) -> None:
        self.highest = rss_anon()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.highest = max(self.highest, rss_anon())

    def __enter__(self) -> RssAnonWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, rss_anon())


def rss_anon() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell RssAnon")


def check_equal(one: Path, other: Path) -> None:
    """Compare every tensor, read in turn."""
    import torch

    from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader

    with SafetensorsReader(one) as expected, SafetensorsReader(other) as found:
        assert expected.names == found.names
        for name in expected.names:
            bits = [reader.read(name).view(torch.int16) for reader in (expected, found)]
            assert torch.equal(*bits), name


def show(report: dict[str, Any]) -> None:
    share = report["weight_bytes"]
    print(f"imports alone: {report['import_rss_anon'] / 1e9:.2f} GB")
    print("direction    processes  seconds (median, spread)   x cp+fsync   peak GB   share GB")
    for processes in sorted({row["processes"] for row in report["rows"]}):
        rows = [row for row in report["rows"] if row["processes"] == processes]
        copies = [seconds for row in rows for seconds in row["cp_s"]]
        for direction in ("hf_to_mcore", "mcore_to_hf"):
            seconds = [row[direction]["seconds"] for row in rows]
            peak = max(row[direction]["rss_anon"] for row in rows)
            middle = statistics.median(seconds)
            spread = f"{middle:6.1f} ({min(seconds):.1f}-{max(seconds):.1f})"
            ratio = middle / statistics.median(copies)
            print(
                f"{direction:<12} {processes:>9}  {spread:<25} {ratio:>11.2f} {peak / 1e9:>9.2f} "
                f"{share / processes / 1e9:>9.2f}"
            )
        print(
            f"cp + fsync   {'':>9}  {statistics.median(copies):6.1f} "
            f"({min(copies):.1f}-{max(copies):.1f})"
        )


def machine() -> dict[str, Any]:
    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"processor": model[0] if model else "", "cores": os.cpu_count()}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
