"""The study behind "Predicted and simulated" of docs/scaling.md: its tables and its figures.

    python tools/simulated_scaling.py                       # all: about five minutes on one core
    python tools/simulated_scaling.py --only stages laws    # some

Each study simulates the configurations of examples/ on H100s that need not exist, puts a table
between its marks in the page, and draws. Same code, same tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from nested_reft_mcore.config.errors import UserError  # noqa: E402
from nested_reft_mcore.config.load import load_config  # noqa: E402
from nested_reft_mcore.simulation.failures import (  # noqa: E402
    Faults,
    best_interval,
    checkpoint_bytes,
    cost_of_faults,
    daly_share,
    run_with_faults,
)
from nested_reft_mcore.simulation.page_tables import Study, place_of, put_study  # noqa: E402
from nested_reft_mcore.simulation.plan_gains import Mean, gains_by_step  # noqa: E402
from nested_reft_mcore.simulation.plot import new_figure, save_figure  # noqa: E402
from nested_reft_mcore.simulation.simulate import Scenario, Simulation, simulate  # noqa: E402
from nested_reft_mcore.simulation.stragglers import Stragglers  # noqa: E402

SIZES = {"7B": ("qwen2.5_math_7b", 1), "32B": ("qwen2.5_32b", 2), "70B": ("llama3.1_70b", 4)}
"""Example and the nodes that it needs at least."""
COLORS = {"7B": "#1f77b4", "32B": "#d95f02", "70B": "#2ca02c"}
NODE_HOURS = 6300.0
"""Of one node: 419 unexpected interruptions of 2,048 nodes in 54 days (arXiv 2407.21783, 3.3.4)."""


def scenario(size: str, nodes: int, *overrides: str, **fields: Any) -> Scenario:
    """An example on so many nodes of eight H100s."""
    path = REPOSITORY / "examples" / SIZES[size][0] / "config.yaml"
    return Scenario(load_config(path, overrides), nodes, **{"steps": 2, **fields})


def parallel(tensor: int, stages: int) -> tuple[str, ...]:
    """Overrides of a layout."""
    return (
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={stages}",
        f"parallel.sequence_parallel={str(tensor > 1).lower()}",
    )


def generation_seconds(made: Scenario) -> float:
    """Mean seconds of a step's generation."""
    return simulate(made).seconds["generation"]


def full_depth(made: Scenario) -> float:
    """The same where nothing is skipped."""
    return generation_seconds(made.changed({"rollout.mode": "full"}))


def study_sizes() -> Study:
    """Weak scaling: each replica has the work that it has in the example. Strong: 1,024 prompts."""
    rows, lines = [], {}
    for size, (_, least) in SIZES.items():
        for kind in ("weak", "strong"):
            points = []
            for nodes in (least, 8, 32, 128):
                prompts = 128 * nodes // least if kind == "weak" else 1024
                made = simulate(scenario(size, nodes, f"rollout.prompts_per_step={prompts}"))
                points.append((8 * nodes, made.tokens_per_second_per_gpu))
                rows.append([size, kind, f"{8 * nodes:,}", f"{prompts:,}", *_step_cells(made)])
            lines[size, kind] = points

    def draw(axes: Any) -> None:
        for (size, kind), points in lines.items():
            best = points[0][1]
            axes.plot(
                [x for x, _ in points],
                [y / best for _, y in points],
                "-o" if kind == "weak" else "--x",
                color=COLORS[size],
                label=f"{size} {kind}",
            )
        axes.set(
            xscale="log", xlabel="GPUs", ylabel="tokens/s a GPU, of the smallest", ylim=(0, 1.1)
        )
        axes.legend(fontsize=8)

    head = ["", "scaling", "GPUs", "prompts", "step", "generation", "update", "tokens/s a GPU",
            "waiting for own replica", "for others"]  # fmt: skip
    return Study(head, rows, draw)


def _step_cells(made: Simulation) -> list[str]:
    seconds, total = made.seconds, made.step_seconds[0]
    waiting = made.waiting()
    return [
        f"{total:.1f} s",
        f"{seconds['generation'] / total:.0%}",
        f"{seconds['update'] / total:.0%}",
        f"{made.tokens_per_second_per_gpu:,.0f}",
        f"{waiting['inside'].mean():.1%}",
        f"{waiting['outside'].mean():.1%}",
    ]


def study_tail() -> Study:
    """Long-tailed lengths of one mean, and what continuous batching brings."""
    rows, lines = [], {}
    laws = [("fixed", 0.0), ("lognormal", 0.3), ("lognormal", 0.7), ("lognormal", 1.2)]
    for size, (_, least) in SIZES.items():
        for nodes in (least, 16):
            cells, gains = [], []
            for law, spread in laws:
                # Slots for a quarter of the completions, so that batching matters.
                slots = 128 * 8 // (4 * nodes // least) if nodes == least else 64
                options = [f"rollout.prompts_per_step={128 * nodes // least}",
                           f"rollout.max_slots={max(8, slots)}"]  # fmt: skip
                made = scenario(size, nodes, *options, lengths=law, length_spread=spread)
                speeds = [
                    simulate(one).generated_per_second_per_gpu
                    for one in (made, made.changed(batching="static"))
                ]
                gains.append(speeds[0] / speeds[1])
                cells.append(f"{speeds[0]:,.0f} ({gains[-1]:.2f}x)")
            rows.append([size, f"{8 * nodes:,}", *cells])
            if nodes > least:
                lines[size] = gains

    def draw(axes: Any) -> None:
        for size, gains in lines.items():
            axes.plot([s for _, s in laws], gains, "-o", color=COLORS[size], label=size)
        axes.set(xlabel="spread of the lengths", ylabel="continuous over static batching")
        axes.legend(fontsize=8)

    head = ["", "GPUs", "all equal", *(f"spread {spread:g}" for _, spread in laws[1:])]
    return Study(head, rows, draw)


def study_stages() -> Study:
    """The same GPUs cut into more stages and fewer replicas."""
    layouts = {"7B": (4, (1, 2, 4)), "32B": (8, (1, 2, 4, 8)), "70B": (8, (2, 4, 8))}
    rows, lines = [], {}
    for size, (tensor, cuts) in layouts.items():
        lines[size] = []
        for stages in cuts:
            options = *parallel(tensor, stages), "rollout.prompts_per_step=512"
            made = simulate(scenario(size, 8, *options))
            if made.run.fits:
                lines[size].append((stages, made.tokens_per_second_per_gpu))
            layout = f"TP {tensor} x PP {stages} x DP {made.run.layout.data}"
            ceiling = made.generated_per_second_per_gpu / made.generation_ceiling
            rows.append(
                [size, layout, "yes" if made.run.fits else "no", f"{made.run.slots}",
                 f"{made.generated_per_second_per_gpu:,.0f}", f"{ceiling:.0%}",
                 f"{made.seconds['update']:.1f} s", f"{made.tokens_per_second_per_gpu:,.0f}"]
            )  # fmt: skip

    def draw(axes: Any) -> None:
        for size, points in lines.items():
            best = max(y for _, y in points)
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, [y / best for y in ys], "-o", color=COLORS[size], label=size)
        axes.set(xlabel="pipeline stages (layouts that fit)", ylabel="tokens/s a GPU, of the best")
        axes.set(ylim=(0, 1.1))
        axes.legend(fontsize=8)

    head = ["", "layout", "fits 80 GB", "slots", "generated/s a GPU", "of its ceiling", "update",
            "tokens/s a GPU"]  # fmt: skip
    return Study(head, rows, draw)


def study_laws() -> Study:
    """Balanced against uniform plans over stages and skip ratios; means over 32 plans of each."""
    ratios, laws = (0.1, 0.15, 0.25, 0.5), ("stage_balanced", "uniform")
    rows, lines, paired = [], {}, []
    for size, stages in (("32B", 2), ("70B", 4), ("70B", 8)):
        options = *parallel(8, stages), "rollout.prompts_per_step=32", "rollout.max_slots=128"
        base = scenario(size, stages, *options, steps=32)
        whole = simulate(base.changed({"rollout.mode": "full"}))
        found = {law: [law_gains(base, whole, law, ratio) for ratio in ratios] for law in laws}
        pairs = zip(*(found[law] for law in laws), strict=True)
        # Step by step: both laws have the same completions there.
        found["the first over the second"] = [one / other for one, other in pairs]
        for law, values in found.items():
            means = [Mean.of(value) for value in values]
            lines[size, stages, law] = means
            rows.append([size, str(stages), law, *(mean.text() for mean in means)])
        paired += means

    def draw(axes: Any) -> None:
        for (size, stages, law), means in lines.items():
            if law not in laws:
                continue
            axes.errorbar(
                ratios,
                [mean.value for mean in means],
                yerr=[mean.error for mean in means],
                fmt="-o" if law == "stage_balanced" else "--x",
                color=COLORS[size],
                alpha=1.0 if stages < 8 else 0.4,
                capsize=2,
                label=f"{size}, PP {stages}, {law}",
            )
        axes.set(xlabel="share of layers skipped", ylabel="generation against full depth")
        axes.legend(fontsize=7)

    head = ["", "stages", "law", *(f"{ratio:.0%} skipped" for ratio in ratios)]
    clear = sum(mean.value - 1 > 2 * mean.error for mean in paired)
    note = (
        f"Means over the plans of {base.steps} steps, ± their standard error. A step has the same "
        f"completions under both laws and at full depth; {base.config.rollout.max_slots} slots a "
        "replica in every cell. Balanced plans gain more, by more than two standard errors of the "
        f"paired ratio, in {clear} of {len(paired)} cells."
    )
    return Study(head, rows, draw, note)


def law_gains(base: Scenario, whole: Simulation, law: str, ratio: float) -> Any:
    """Of each step's plan, `[steps]`."""
    nested = simulate(base.changed({"nested.law": law, "nested.skip_ratio": ratio}))
    return gains_by_step(nested, whole)


def study_erosion() -> Study:
    """What 15% skipped gain in generation, over TP and over the length of responses."""
    contexts = (1024, 4096, 16384, 32768)
    found: dict[tuple[str, str, int], list[float]] = {}
    for size in ("32B", "70B"):
        for tensor in (2, 4, 8):
            for length in contexts:
                base = scenario(
                    size,
                    1,
                    *parallel(tensor, 1),
                    "rollout.prompts_per_step=16",
                    f"rollout.max_new_tokens={length}",
                    "train.max_tokens_per_micro_batch=40000",
                    "nested.law=uniform",
                    # As much room for every layout.
                    "rollout.max_slots=64",
                    "rollout.kv_cache_gb=1000",
                    gpus_per_node=tensor,
                    gpu_memory_gb=2000,
                    steps=1,
                )
                whole = full_depth(base)
                for part in ("layer", "attention", "mlp"):
                    gain = whole / generation_seconds(base.changed({"nested.part": part}))
                    found.setdefault((size, part, tensor), []).append(gain)
    rows = [
        [size, part, str(tensor), *(f"{gain:.3f}x" for gain in gains)]
        for (size, part, tensor), gains in sorted(found.items())
    ]
    lines = {key: gains for key, gains in found.items() if key[2] != 4}

    def draw(axes: Any) -> None:
        styles = {"layer": "-o", "attention": "--x", "mlp": ":s"}
        for (size, part, tensor), gains in lines.items():
            shade = 0.4 if tensor == 2 else 1.0
            label = f"{size}, {part}, TP {tensor}"
            axes.plot(contexts, gains, styles[part], color=COLORS[size], alpha=shade, label=label)
        axes.set(xscale="log", xlabel="rollout.max_new_tokens", ylabel="gain of 15% skipped")
        axes.legend(fontsize=6)

    head = ["", "part", "TP", *(f"{length:,} tokens" for length in contexts)]
    return Study(head, rows, draw, _erosion_note(base))


def _erosion_note(base: Scenario) -> str:
    """What all of its cells assume, by one of the scenarios."""
    rollout, nested = base.config.rollout, base.config.nested
    return (
        f"Assumed in every cell: one replica of TP GPUs on one stage; GPUs with "
        f"{base.gpu_memory_gb:,.0f} GB of memory, {rollout.kv_cache_gb:,.0f} GB of it for keys and "
        "values, which no GPU has, so that every layout and length has room for the same "
        f"{rollout.max_slots} slots; {rollout.prompts_per_step} prompts x {rollout.group_size} "
        f"completions; one plan of `nested.law={nested.law}`, `nested.skip_ratio="
        f"{nested.skip_ratio:g}`."
    )


def study_stragglers() -> Study:
    """Slow GPUs among 1,024: what the whole job loses."""
    cases = {
        "none": Stragglers(),
        "jitter 2%": Stragglers(jitter=0.02),
        "jitter 5%": Stragglers(jitter=0.05),
        "0.1% of GPUs, 1.3 times as long": Stragglers(share=0.001, factor=1.3),
        "1% of GPUs, 1.3 times as long": Stragglers(share=0.01, factor=1.3),
    }
    rows = []
    for size, (_, least) in SIZES.items():
        times = [
            simulate(scenario(size, 128, f"rollout.prompts_per_step={128 * 32 // least}",
                              stragglers=slow))
            for slow in cases.values()
        ]  # fmt: skip
        base = times[0].step_seconds[0]
        for name, made in zip(cases, times, strict=True):
            waiting = made.waiting()
            shares = waiting["inside"] + waiting["outside"]
            rows.append(
                [size, name, f"{made.step_seconds[0] / base:.2f}x", f"{shares.mean():.0%}",
                 f"{shares.min():.0%}"]
            )  # fmt: skip
    return Study(["", "slow", "step", "waiting, mean", "waiting, least of a stage"], rows)


def study_failures() -> Study:
    """Lost nodes, with checkpoint.interval=20 and with the best interval."""
    rows, lines = [], {}
    for size, (_, least) in SIZES.items():
        lines[size] = []
        for nodes in (least, 32, 128):
            prompts = f"rollout.prompts_per_step={128 * nodes // least}"
            made = simulate(scenario(size, nodes, prompts, "train.num_steps=2000", steps=1))
            cost = cost_of_faults(made, Faults(NODE_HOURS), 2000)
            course = cost.course
            steps = best_interval(course)
            best = run_with_faults(course.with_interval(steps), 2000, 2000, seed=0)
            blocking = cost_of_faults(
                simulate(made.scenario.changed({"checkpoint.async_save": False})),
                Faults(NODE_HOURS),
                2000,
            )
            lines[size].append((8 * nodes, cost.useful_share))
            rows.append(
                [size, f"{8 * nodes:,}", f"{checkpoint_bytes(made.run) / 1e9:,.0f} GB",
                 f"{course.mtbf / 3600:,.0f} h", f"{cost.useful_share:.2%}",
                 f"{blocking.useful_share:.2%} ({daly_share(blocking.course):.2%})",
                 f"{best.useful_share:.2%} every {steps}"]
            )  # fmt: skip

    def draw(axes: Any) -> None:
        for size, points in lines.items():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, [100 * y for y in ys], "-o", color=COLORS[size], label=size)
        axes.set(xscale="log", xlabel="GPUs", ylabel="useful time, %")
        axes.legend(fontsize=8)

    head = ["", "GPUs", "checkpoint", "a failure every", "useful, saved in the background",
            "useful, saves that block (Daly)", "useful, best interval in steps"]  # fmt: skip
    return Study(head, rows, draw)


STUDIES: dict[str, Callable[[], Study]] = {
    "sizes": study_sizes,
    "stages": study_stages,
    "tail": study_tail,
    "laws": study_laws,
    "erosion": study_erosion,
    "stragglers": study_stragglers,
    "failures": study_failures,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies; 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=STUDIES, help="Studies; default: all.")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "scaling.md")
    parser.add_argument("--images", type=Path, default=REPOSITORY / "docs" / "images")
    options = parser.parse_args(arguments)
    names = options.only or list(STUDIES)
    try:
        for name in names:
            # Before minutes are spent on it.
            place_of(options.page, name)
        for name in names:
            started = time.process_time()
            study = STUDIES[name]()
            put_study(options.page, name, study)
            if study.draw is not None:
                figure, axes = new_figure(1, 5.2)
                study.draw(axes[0])
                save_figure(figure, options.images / f"simulated_{name}.png", "--images")
            print(f"{name}: {len(study.rows)} rows, {time.process_time() - started:.0f} s of CPU")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
