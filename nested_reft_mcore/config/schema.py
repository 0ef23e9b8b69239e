"""Every option of a run. A file holds these sections; `section.field=value` overrides one value."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.data import DataConfig
from nested_reft_mcore.config.launch import LaunchConfig
from nested_reft_mcore.config.rewards import RewardConfig


class ModelConfig(Section):
    """Where the policy comes from: exactly one of `hf_path`, `checkpoint` and `architecture`."""

    hf_path: str | None = None
    """Hugging Face directory: its architecture, weights and tokenizer."""
    checkpoint: str | None = None
    """Checkpoint of `sft`, `train` or `convert`: its weights and architecture, not its step."""
    architecture: ModelArchitecture | None = None
    """Shape of a model with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; the optimizer keeps float32 masters."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer spec: Transformer Engine where it is installed, else the local one."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recomputation, as Megatron names it."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How `full` recomputation groups layers."""
    recompute_num_layers: int | None = Field(default=None, gt=0)
    """Layers in a recomputed group."""


class ParallelConfig(Section):
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: int = Field(default=1, gt=0)
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = Field(default=1, gt=0)
    """Stages that the layers are cut into."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, gt=1)
    """Chunks per stage of the interleaved schedule."""
    data_parallel_size: int | None = Field(default=None, gt=0)
    """Replicas; left out: as many as the launched processes make, 1 when started alone."""
    sequence_parallel: bool = False
    """Spread activations of the update over the tensor-parallel processes."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """A collective that waits longer ends the run."""


class NestedConfig(Section):
    """Which layers the behavior policy skips (arXiv 2508.10123)."""

    skip_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of all layers; k = round(skip_ratio * num_layers)."""
    num_skipped: int | None = Field(default=None, ge=0)
    """Number of layers, instead of `skip_ratio`."""
    law: Literal["uniform", "stage_balanced", "sensitivity"] = "stage_balanced"
    """`uniform` is the paper's; `stage_balanced` evens stages; `sensitivity` obeys `kl_budget`."""
    border_layers: int = Field(default=1, ge=0)
    """Layers at either end that are never skipped."""
    protected_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Further layers, 0-based, that are never skipped."""
    part: Literal["layer", "attention", "mlp"] = "layer"
    """What of a layer is skipped."""
    head_cost: float = Field(default=0.0, ge=0)
    """Time of the vocabulary head, in layers, that `stage_balanced` sees on the last stage."""
    sensitivity_path: str | None = None
    """JSON file of `nested-reft probe`, for the law `sensitivity`."""
    kl_budget: float | None = Field(default=None, gt=0)
    """Predicted KL of a plan of `sensitivity`, at most, in nats per token."""
    saving_tolerance: float = Field(default=0.2, ge=0, lt=1)
    """Share of the best plan's saving that a plan of `sensitivity` may lack: chance needs room."""
    check_plan_across_ranks: bool = False
    """Debug: compare a hash of every plan over all processes."""


class ControllerConfig(Section):
    """Steers how much is skipped; `nested` says where it begins."""

    metric: Literal["none", "ess", "ess_seq", "kl", "ratio_p05"] = "none"
    """`none` skips as `nested` says; else what is kept in bounds, per step, as it is logged."""
    target: float | None = Field(default=None, gt=0)
    """Worst value that is kept: least `ess`, `ess_seq` or `ratio_p05`, most `kl` in nats."""
    hysteresis: float = Field(default=0.3, ge=0, lt=1)
    """More is skipped only this share of the way from the target to on-policy, or closer."""
    patience: int = Field(default=4, gt=0)
    """Steps whose mean decides."""
    max_wait: int = Field(default=64, gt=0)
    """Most steps before a number that failed is tried again; the wait doubles with each failure."""
    min_skipped: int = Field(default=0, ge=0)
    """Fewest entries skipped, unless even they are too many: then none."""
    max_skipped: int | None = Field(default=None, gt=0)
    """Most entries skipped; left out: as many as `nested.border_layers` allows."""


class RolloutConfig(Section):
    """Generation of completions."""

    prompts_per_step: int = Field(default=16, gt=0)
    """Prompts in a step's global batch."""
    group_size: int = Field(default=8, gt=0)
    """Completions of each prompt."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Longest completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; every log-probability of training is taken at it."""
    top_k: int | None = Field(default=None, gt=0)
    """Keep the k likeliest tokens; refused by `train`."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the smallest set of tokens with this mass; refused by `train`."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, beside the tokenizer's end of sequence."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a completion as soon as it contains one."""
    ignore_eos: bool = False
    """Training rollouts go on past ends of sequence; stop tokens and strings still end them."""
    mode: Literal["nested", "full", "speculative"] = "nested"
    """Skip layers; skip none; or lossless: the nested policy drafts, the full one verifies."""
    max_draft_tokens: int = Field(default=8, gt=0)
    """Longest draft of `speculative`; shorter ones where few of their tokens are accepted."""
    max_slots: int | None = Field(default=None, gt=0)
    """Sequences decoded at the same time; left out: what memory allows, 256 at most."""
    kv_cache_gb: float | None = Field(default=None, gt=0)
    """Memory for keys and values on each process, in 10^9 bytes; left out: half of what is free."""
    max_num_batched_tokens: int = Field(default=2048, gt=0)
    """Tokens of one pass of a slot group; longer prompts run in pieces."""
    replay: str | None = None
    """Run directory whose dumped rollouts are used instead of generating."""


Correction = Literal[
    "practical",
    "base",
    "retrace",
    "retrace_cumulative",
    "trajectory",
    "sequence",
    "prefix",
    "tis",
    "token",
    "icepop",
    "geometric",
]


class AlgorithmConfig(Section):
    """Advantages, off-policy correction and objective; docs/algorithm.md has the formulas."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"] = "grpo"
    """How a completion is judged against the others of its prompt."""
    filter_groups: bool = False
    """Dynamic sampling: drop groups with equal rewards and generate for further prompts."""
    max_refills: int = Field(default=3, ge=0)
    """Dynamic sampling: most further generations in a step."""
    rollout_is: Correction = "practical"
    """Correction; `token` and `sequence` are verl's, for `tis` and a truncated `trajectory`."""
    rollout_is_threshold: float | str | None = None
    """Largest weight, or "low_high"; left out: 2 for `tis` and `sequence`, "0.5_5" for `icepop`."""
    retrace_lambda: float = Field(default=1.0, gt=0, le=1)
    """Lambda of `retrace` and `retrace_cumulative` (arXiv 1606.02647); 0 would be no gradient."""
    rollout_rs: str | None = None
    """Rejections, comma-separated: token_k1 to _k3, seq_sum_k1, seq_mean_k3, seq_max_k2, ...."""
    rollout_rs_threshold: float | str | None = None
    """Bound of each rejection, comma-separated; k1: behavior / target as "low_high", else nats."""
    log_ratio_clamp: float = Field(default=20.0, gt=0, le=80)
    """Log importance ratios are cut to this magnitude."""
    objective: Literal["reinforce", "ppo_clip", "cispo", "gspo"] = "reinforce"
    """Policy-gradient objective."""
    clip_ratio_low: float = Field(default=0.2, ge=0)
    """The ratio is clipped below 1 - this; GSPO wants about 3e-4."""
    clip_ratio_high: float = Field(default=0.2, ge=0)
    """The ratio is clipped above 1 + this; GSPO wants about 4e-4."""
    clip_ratio_c: float | None = Field(default=None, gt=1)
    """Dual clip of `ppo_clip`: bound on the loss of a negative advantage, as a ratio."""
    bypass_mode: bool = False
    """The ratio is target / behavior instead of target / old times a correction (`decoupled`)."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """Denominator: tokens, each sequence's tokens, or a constant; always of the global batch."""
    entropy_coeff: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    kl_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL from the initial policy, kept on the host, in the loss."""
    kl_loss_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence in the loss."""
    kl_corrected: bool = False
    """Weigh the KL estimate by target / behavior: unbiased for nested rollouts."""
    kl_reward_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the initial policy that is taken off the rewards."""
    kl_penalty: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL divergence in the rewards."""
    mask_truncated: bool = False
    """Completions cut off at `rollout.max_new_tokens` teach nothing (overlong filtering)."""

    @field_validator("rollout_is", mode="before")
    @classmethod
    def _explain_null(cls, value: object) -> object:
        if value is None:
            raise ValueError("a name: verl's null, no correction, is `practical` here")
        return value


class OptimizerConfig(Section):
    """AdamW and its schedule, as Megatron names them."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "constant"
    """Shape of the decay."""
    lr_wsd_decay_steps: int | None = Field(default=None, gt=0)
    """Length of the final linear decay of `WSD`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm is cut to this; 0 turns clipping off."""
    use_distributed_optimizer: bool = False
    """Spread optimizer state over data-parallel replicas."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs; needs the distributed optimizer."""


class TrainConfig(Section):
    """The loop of `nested-reft train`."""

    num_steps: int = Field(default=100, ge=0)
    """Rollout batches, one generation each."""
    updates_per_step: int = Field(default=1, gt=0)
    """Mini-batches that a rollout batch is split into, one optimizer step each."""
    micro_batch_size: int = Field(default=8, gt=0)
    """Sequences in one forward pass of the update."""
    max_tokens_per_micro_batch: int | None = Field(default=None, gt=0)
    """Instead: sequences of like length up to so many tokens, padding included; spread evenly."""
    logprob_chunk_tokens: int | None = Field(default=None, gt=0)
    """Tokens whose logits exist at the same time; left out: as many as make 128 MiB."""
    max_dropped_layers: int = Field(default=0, ge=0)
    """Layer dropout: each update leaves out 0 to so many random layers; `nested` protects some."""
    max_skipped_updates: int = Field(default=5, gt=0)
    """So many non-finite updates in a row stop the run."""


class SftConfig(Section):
    """Supervised warm-up, `nested-reft sft`."""

    num_steps: int = Field(default=100, ge=0)
    """Updates."""
    global_batch_size: int = Field(default=24, gt=0)
    """Demonstrations in an update."""
    micro_batch_size: int = Field(default=24, gt=0)
    """Demonstrations in one forward pass."""
    min_skipped: int = Field(default=0, ge=0)
    """Layer dropout: fewest layers skipped in a batch."""
    max_skipped: int = Field(default=0, ge=0)
    """Layer dropout: most layers skipped in a batch; 0 turns it off."""
    border_layers: int = Field(default=1, ge=0)
    """Layers at either end that dropout keeps."""
    log_interval: int = Field(default=10, gt=0)
    """Updates between two metric lines."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    """Optimizer of the warm-up, apart from the reinforcement one."""


class EvaluationConfig(Section):
    """Evaluation on held-out prompts: at full depth, and nested if `skip_layers` says so."""

    interval: int = Field(default=10, ge=0)
    """Steps between evaluations; 0 turns them off."""
    before_training: bool = True
    """Also evaluate before the first step."""
    num_prompts: int | None = Field(default=None, gt=0)
    """Use n prompts of each set, evenly spread over it."""
    num_samples: int = Field(default=1, ge=0)
    """Sampled completions of each prompt, beside the greedy one."""
    reward: str | None = None
    """Label of the function that tells what is right; by default the one that compares answers."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled completions."""
    top_k: int | None = Field(default=None, gt=0)
    """Keep the k likeliest tokens of the sampled completions."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the smallest set of tokens with this mass."""
    skip_layers: tuple[str, ...] = ()
    """Also evaluate without these layers and parts; each entry is a plan, as in `3,5.attention`."""


class CheckpointConfig(Section):
    """Saving and coming back."""

    interval: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that are a multiple of this are kept for ever; 0 keeps none of them."""
    async_save: bool = True
    """Train on while files are written; needs host memory for a copy of what is saved."""
    resume: str = "auto"
    """`auto` goes on from the run directory's newest whole checkpoint; `never`; a path."""
    stop_deadline_seconds: float = Field(default=0.0, ge=0)
    """So long after a stop signal the process leaves, saved or not; 0 waits for the save."""
    requeue_on_lost_peer: bool = False
    """When a process is lost, write `requeue` too: the job is to go on from the last checkpoint."""
    export_hf: bool = False
    """Write a Hugging Face directory at the end of the run."""


class DiagnosticsConfig(Section):
    """Measurements that cost time."""

    split_every: int = Field(default=0, ge=0)
    """Steps between splits of the ratio into engine, skip and staleness, two passes; 0 is off."""


class LoggingConfig(Section):
    """What a run tells while it runs."""

    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str | None = None
    """Send metrics to this Weights & Biases project; needs the `wandb` extra."""
    progress: Literal["auto", "bar", "plain", "off"] = "auto"
    """Live display: `auto` draws a bar on a terminal and prints lines elsewhere."""
    dump_rollouts: bool = True
    """Write every rollout to `rollouts/`, for `nested-reft report` and `rollout.replay`."""
    level: Literal["debug", "info", "warning"] = "info"
    """Least severe message that is shown."""


class Config(Section):
    """A run: one file for warm-up, training, evaluation and generation."""

    run_dir: str
    """Directory of everything that the run writes."""
    seed: int = Field(default=0, ge=0)
    """Key of every random choice: weights, data order, plans, sampling."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    launch: LaunchConfig = LaunchConfig()
    data: DataConfig = DataConfig()
    nested: NestedConfig = NestedConfig()
    controller: ControllerConfig = ControllerConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    logging: LoggingConfig = LoggingConfig()
