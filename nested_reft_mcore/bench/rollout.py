"""`nested-reft bench rollout`: our own speed by depth, what skipping could gain, what others reach.

Every process of the policy runs this. The first one also runs the peers, while the others wait for
it without spinning, prints and writes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.bench.cases import Case, make_cases
from nested_reft_mcore.bench.ceiling import kv_formula_bytes
from nested_reft_mcore.bench.generation import Generator, as_prompts
from nested_reft_mcore.bench.hardware import Machine, measure_machine, step_bound
from nested_reft_mcore.bench.peer_set import PeerSet
from nested_reft_mcore.bench.peers import Peer, TransformersPeer, VllmPeer
from nested_reft_mcore.bench.report import print_results, write_results
from nested_reft_mcore.bench.results import (
    ModelFacts,
    PeerRow,
    Results,
    Row,
    WorkloadResult,
    make_decode_step,
    make_peer_row,
    make_rows,
)
from nested_reft_mcore.bench.rounds import run_rounds
from nested_reft_mcore.bench.workload import Timing, Workload
from nested_reft_mcore.config.bench import BenchRolloutOptions, PeerName
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import barrier, gather_all, on_main
from nested_reft_mcore.mcore.hf_weights import export_hf_weights
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.weights import named_parameters
from nested_reft_mcore.observability.environment import environment_report
from nested_reft_mcore.observability.progress import Progress
from nested_reft_mcore.training.policy_setup import load_policy

_MAX_PROGRESS_LINES = 20


def bench_rollout(options: BenchRolloutOptions, context: ParallelContext) -> None:
    """Measure as `options` says; rank 0 prints the table and writes the JSON.

    Raises:
        UserError: the model is missing or broken.
    """
    policy = load_policy(options.model(), options.parallel, context, options.seed)
    with PeerSet(context) as peers, ExitStack() as stack:
        bench = _Bench(options, policy, peers)
        bench.start_peers(stack)
        results = bench.run()
    if context.is_main:
        print_results(results)
        if options.output is not None:
            write_results(results, Path(options.output))
            print(f"{options.output}: written", flush=True)
    barrier()


@dataclass(frozen=True)
class _Load:
    """A workload with its prompts, and what is compared on it."""

    workload: Workload
    token_ids: list[list[int]]
    context: int | None
    """Set where decoding alone is compared, at so many positions; peers stay out of it."""
    num_rounds: int

    @property
    def name(self) -> str:
        """As in the tables."""
        if self.context is None:
            return self.workload.describe()
        return f"decoding at {self.context} positions, {self.workload.num_sequences} sequences"


class _Bench:
    """One run of the command on one process."""

    def __init__(self, options: BenchRolloutOptions, policy: Policy, peers: PeerSet) -> None:
        self._options = options
        self._policy = policy
        self._context = policy.context
        self._peers = peers
        self._generator = Generator(policy)
        self._cases = make_cases(options, policy.architecture.num_layers, policy.stage_of_layer)
        self._loads = _loads(options, policy)
        self._num_threads = sum(gather_all(torch.get_num_threads(), self._context))

    def start_peers(self, stack: ExitStack) -> None:
        """Start those that were asked for; `stack` removes what they read."""
        names = self._options.peer_names
        if not names:
            return
        directory = self._weights_directory(stack)
        for name in names:
            self._say(f"starting {name}")
            self._peers.start(name, partial(self._make_peer, name, directory))

    def run(self) -> Results:
        """Measure everything."""
        self._say(
            f"{self._num_threads} threads in {self._context.world_size} process(es); "
            "measuring the machine and running each workload once"
        )
        machine = self._measure_machine()
        self._say(_duration(self._expected_seconds()))
        measured = [self._measure(load) for load in self._loads]
        facts = self._facts()
        load, first = self._loads[0], measured[0]
        num_rows = load.workload.num_sequences
        bound = step_bound(facts.num_product_weights, facts.product_weight_bytes, num_rows, machine)
        return Results(
            what="bench rollout",
            options=self._options.model_dump(mode="json"),
            environment=environment_report(self._context.world_size),
            num_threads=self._num_threads,
            native_kernels=all(gather_all(self._generator.uses_native_kernels, self._context)),
            model=facts,
            machine=machine,
            decode_step=make_decode_step(first.rows, load.workload, bound),
            workloads=tuple(measured),
        )

    def _measure(self, load: _Load) -> WorkloadResult:
        """Rounds of all cases and peers."""
        ours: dict[str, Callable[[], Timing | float | None]] = {
            case.key: partial(self._generate, load, case) for case in self._cases
        }
        peers = self._peers.names if load.context is None else []
        theirs: dict[str, Callable[[], Timing | float | None]] = {
            name: partial(self._peers.generate, name, load.token_ids, load.workload.new_tokens)
            for name in peers
        }
        total = load.num_rounds * (len(ours) + len(theirs))
        every = -(-total // _MAX_PROGRESS_LINES)
        mode = "auto" if self._context.is_main else "off"
        with Progress(mode, total, title=load.name) as progress:

            def done(num_runs: int) -> None:
                if num_runs % every == 0 or num_runs == total:
                    progress.update(num_runs, {})

            found = run_rounds({**ours, **theirs}, load.num_rounds, done)
        timings = {key: [run for run in found[key] if isinstance(run, Timing)] for key in ours}
        rows = make_rows(
            self._cases,
            timings,
            load.workload,
            self._policy.stage_of_layer,
            [self._kv_formula(case, load, timings[case.key][-1].num_slots) for case in self._cases],
            decode_only=load.context is not None,
        )
        return WorkloadResult(
            name=load.name,
            workload=load.workload,
            context=load.context,
            rows=rows,
            peers=self._peer_rows(load, rows, found) if load.context is None else (),
        )

    def _peer_rows(
        self, load: _Load, rows: Sequence[Row], found: dict[str, list[Timing | float | None]]
    ) -> tuple[PeerRow, ...]:
        return tuple(
            make_peer_row(
                name,
                self._peers.versions.get(name),
                [run for run in found.get(name, []) if not isinstance(run, Timing)],
                self._peers.reasons.get(name),
                load.workload,
                rows[0].tokens_per_second,
            )
            for name in self._options.peer_names
        )

    def _generate(self, load: _Load, case: Case) -> Timing:
        workload = load.workload
        return self._generator.run(
            as_prompts(load.token_ids),
            workload.num_samples,
            workload.new_tokens,
            case.plan,
            seed=self._options.seed,
        )

    def _expected_seconds(self) -> float:
        """Run every workload once at full depth, and every peer: what all rounds take at most."""
        expected = 0.0
        for load in self._loads:
            seconds = len(self._cases) * self._generate(load, self._cases[0]).seconds
            for name in self._peers.names if load.context is None else []:
                theirs = self._peers.generate(name, load.token_ids, load.workload.new_tokens)
                seconds += theirs or 0.0
            expected += load.num_rounds * seconds
        return expected

    def _kv_formula(self, case: Case, load: _Load, num_slots: int) -> tuple[int, ...]:
        shape, workload = self._policy.architecture, load.workload
        return kv_formula_bytes(
            case.plan,
            self._policy.stage_of_layer,
            num_slots,
            # The last token is never read back.
            workload.prompt_tokens + workload.new_tokens - 1,
            shape.num_query_groups // self._context.tensor.size,
            shape.head_dim,
            self._policy.transformer_config.params_dtype.itemsize,
        )

    def _measure_machine(self) -> Machine:
        """The rates of all processes together, measured at the same time."""
        barrier()
        dtype = self._policy.transformer_config.params_dtype
        found = gather_all(measure_machine(self._context.device, dtype), self._context)
        return Machine(
            peak_flops=sum(machine.peak_flops for machine in found),
            read_bandwidth=sum(machine.read_bandwidth for machine in found),
        )

    def _facts(self) -> ModelFacts:
        """Counts of the whole model, a tied head once."""
        parameters = dict(named_parameters(self._policy))
        mine = sum(parameter.numel() for parameter in parameters.values())
        # Looking tokens up reads a few rows; the head's product reads the whole matrix.
        embedding = parameters.get("embedding.word_embeddings.weight")
        is_tied = not self._policy.architecture.untie_embeddings_and_output_weights
        has_own_head = "output_layer.weight" in parameters
        is_only_looked_up = embedding is not None and (
            has_own_head or not (is_tied and self._context.is_last_stage)
        )
        looked_up = embedding.numel() if embedding is not None and is_only_looked_up else 0
        is_copy = is_tied and self._context.is_last_stage and not self._context.is_first_stage
        copied = parameters["output_layer.weight"].numel() if is_copy else 0
        counts = gather_all((mine, looked_up, copied), self._context)
        weights = sum(count - looked for count, looked, _ in counts)
        itemsize = self._policy.transformer_config.params_dtype.itemsize
        return ModelFacts(
            num_layers=self._policy.architecture.num_layers,
            num_parameters=sum(count - copy for count, _, copy in counts),
            num_product_weights=weights,
            product_weight_bytes=weights * itemsize,
        )

    def _make_peer(self, name: PeerName, directory: Path) -> Peer:
        options = self._options
        if name == "transformers":
            dtype, device = getattr(torch, options.dtype), self._context.device
            return TransformersPeer(directory, dtype, device, self._num_threads)
        assert options.vllm_python is not None
        max_length = options.prompt_tokens + options.new_tokens
        shape = self._policy.architecture
        kv_bytes = sum(
            kv_formula_bytes(
                LayerSkipPlan.full(shape.num_layers),
                self._policy.stage_of_layer,
                options.prompts,
                max_length,
                shape.num_query_groups,
                shape.head_dim,
                self._policy.transformer_config.params_dtype.itemsize,
            )
        )
        return VllmPeer(
            options.vllm_python,
            directory,
            options.dtype,
            self._num_threads,
            max_sequences=options.prompts,
            max_length=max_length,
            # Its blocks are not all full: without room to spare it would put sequences off.
            kv_gigabytes=1 + -(-kv_bytes // 2**30),
        )

    def _weights_directory(self, stack: ExitStack) -> Path:
        """A Hugging Face directory with the policy's weights."""
        if self._options.hf is not None:
            return Path(self._options.hf)

        def make() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory(prefix="nested_reft_bench_"))

        directory = Path(on_main(make, self._context)) / "model"
        export_hf_weights(self._policy, directory)
        return directory

    def _say(self, text: str) -> None:
        if self._context.is_main:
            print(text, flush=True)


def _loads(options: BenchRolloutOptions, policy: Policy) -> list[_Load]:
    """The workload that was asked for, then one for each context."""
    shape = policy.architecture

    def make(workload: Workload, context: int | None, num_rounds: int) -> _Load:
        token_ids = workload.prompts(shape.vocab_size, options.seed)
        return _Load(workload, token_ids, context, num_rounds)

    whole = Workload(options.prompts, 1, options.prompt_tokens, options.new_tokens)
    loads = [make(whole, None, options.repeats)]
    for length in options.context_lengths(shape.max_position_embeddings):
        new_tokens = options.context_new_tokens
        # One prompt, so that a long one is prefilled once.
        workload = Workload(1, options.context_sequences, length - new_tokens, new_tokens)
        # A run has many decode steps, and their median is steadier than a whole generation.
        loads.append(make(workload, length, -(-options.repeats // 2)))
    return loads


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"takes at most about {seconds:.0f} s"
    return f"takes at most about {seconds / 60:.0f} min"
