"""Options that contradict each other are refused with the numbers that would fit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.algorithm import rejection
from nested_reft_mcore.config import corrections
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import (
    read_checkpoint_architecture,
    resolve_checkpoint,
)
from nested_reft_mcore.config.checks import (
    check_batches,
    check_config,
    check_depth,
    check_for_training,
    check_for_warm_up,
    check_warm_up_batches,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.layout import check_layout, needed_processes
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.config.schema import Config, ParallelConfig

ARCHITECTURE = {
    "num_layers": 12,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 176,
    "vocab_size": 41,
}


def config(**sections) -> Config:
    return Config.model_validate(
        {"run_dir": "r", "model": {"architecture": ARCHITECTURE}} | sections
    )


def refusal(made: Config) -> str:
    with pytest.raises(UserError) as caught:
        check_config(made)
    return str(caught.value)


def shape(**changes) -> ModelArchitecture:
    return ModelArchitecture.model_validate(ARCHITECTURE | changes)


def parallel(tensor=1, pipeline=1, virtual=None, data=None) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        data_parallel_size=data,
    )


def layout_refusal(architecture, sizes, world_size) -> str:
    with pytest.raises(UserError) as caught:
        check_layout(architecture, sizes, world_size)
    return str(caught.value)


def test_the_default_passes():
    check_config(config())


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({}, "found none of them"),
        ({"hf_path": "a", "checkpoint": "b"}, "found model.hf_path and model.checkpoint"),
        ({"hf_path": "a", "architecture": ARCHITECTURE}, "model.hf_path and model.architecture"),
    ],
)
def test_a_model_has_one_origin(model, found):
    assert found in refusal(config(model=model))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_query_groups": 3}, ("num_query_groups=3", "num_attention_heads=8", "1, 2, 4, 8")),
        ({"hidden_size": 60}, ("num_attention_heads=8", "hidden_size=60", "kv_channels")),
        ({"kv_channels": 5}, ("one head is 5", "even")),
    ],
)
def test_impossible_architectures(changes, parts):
    text = refusal(config(model={"architecture": ARCHITECTURE | changes}))
    assert all(part in text for part in ("model.architecture", *parts)), text


def test_kv_channels_free_the_hidden_size():
    check_config(
        config(model={"architecture": ARCHITECTURE | {"hidden_size": 60, "kv_channels": 8}})
    )


CONTRADICTIONS = [
    ({"parallel": {"sequence_parallel": True}}, "tensor_model_parallel_size above 1"),
    (
        {"parallel": {"virtual_pipeline_model_parallel_size": 2}},
        "pipeline_model_parallel_size above 1",
    ),
    (
        {"optimizer": {"overlap_param_gather": True}},
        "needs optimizer.use_distributed_optimizer=true and optimizer.overlap_grad_reduce=true",
    ),
    (
        {"sft": {"optimizer": {"overlap_param_gather": True, "overlap_grad_reduce": True}}},
        "sft.optimizer.overlap_param_gather=true needs sft.optimizer.use_distributed_optimizer",
    ),
    ({"optimizer": {"lr": 1e-5, "min_lr": 1e-4}}, "optimizer.min_lr=0.0001 is above"),
    ({"optimizer": {"lr_decay_style": "WSD"}}, "lr_wsd_decay_steps"),
    ({"nested": {"skip_ratio": 0.2, "num_skipped": 2}}, "set one of them"),
    ({"rollout": {"mode": "speculative"}}, "nested skips nothing"),
    ({"nested": {"num_skipped": 11}}, "11 layers to skip, but 12 layers"),
    ({"nested": {"num_skipped": 3, "border_layers": 5}}, "leave 2 that may be skipped"),
    ({"nested": {"skip_ratio": 0.9}}, "nested: 11 layers to skip"),
    ({"sft": {"max_skipped": 11}}, "sft: 11 layers to skip"),
    ({"sft": {"min_skipped": 1}}, "sft.min_skipped=1 is above sft.max_skipped=0"),
    (
        {"sft": {"max_skipped": 2, "optimizer": {"overlap_grad_reduce": True}}},
        "sft.optimizer.overlap_grad_reduce=true",
    ),
    ({"train": {"max_dropped_layers": 11}}, "train.max_dropped_layers: 11 layers to skip"),
    (
        {"train": {"max_dropped_layers": 1}, "optimizer": {"overlap_grad_reduce": True}},
        "train.max_dropped_layers=1 with optimizer.overlap_grad_reduce=true",
    ),
    (
        {"train": {"max_dropped_layers": 1}, "algorithm": {"objective": "gspo"}},
        "algorithm.objective=gspo: the clipped ratio would compare",
    ),
    (
        {
            "train": {"max_dropped_layers": 1},
            "nested": {"num_skipped": 2},
            "controller": {"metric": "ess", "target": 0.9},
        },
        "train.max_dropped_layers=1 with controller.metric=ess",
    ),
    (
        {"train": {"max_dropped_layers": 1}, "algorithm": {"kl_loss_coef": 0.1}},
        "toward the full-depth reference; expected kl_loss_coef=0",
    ),
    (
        {"train": {"max_dropped_layers": 1}, "diagnostics": {"split_every": 5}},
        "diagnostics.split_every=5: what updates leave out would be taken for staleness",
    ),
    (
        {"algorithm": {"objective": "ppo_clip", "bypass_mode": True, "rollout_is": "base"}},
        "algorithm.rollout_is=base would count it twice",
    ),
    ({"algorithm": {"bypass_mode": True}}, "found objective=reinforce"),
    ({"train": {"updates_per_step": 3}}, "does not divide the 128 completions"),
    (
        {"model": {"hf_path": "x", "recompute_granularity": "full"}},
        "needs model.recompute_method and model.recompute_num_layers",
    ),
    (
        {
            "model": {
                "hf_path": "x",
                "recompute_granularity": "selective",
                "recompute_num_layers": 1,
            }
        },
        "model.recompute_num_layers is set, but only",
    ),
    ({"model": {"hf_path": "x", "recompute_method": "block"}}, "model.recompute_method is set"),
]


@pytest.mark.parametrize(("sections", "part"), CONTRADICTIONS)
def test_contradictions(sections, part):
    text = refusal(config(**sections))
    assert part in text


AGREEMENTS = [
    {"parallel": {"sequence_parallel": True, "tensor_model_parallel_size": 2}},
    {"sft": {"max_skipped": 2}, "optimizer": {"overlap_grad_reduce": True}},
    {"algorithm": {"objective": "ppo_clip", "bypass_mode": True}},
    {
        "algorithm": {"objective": "ppo_clip", "bypass_mode": True},
        "train": {"max_dropped_layers": 2},
    },
    {"algorithm": {"objective": "ppo_clip", "rollout_is": "retrace"}},
    {"nested": {"num_skipped": 10}},
    {
        "optimizer": {
            "overlap_param_gather": True,
            "overlap_grad_reduce": True,
            "use_distributed_optimizer": True,
        }
    },
]


@pytest.mark.parametrize("sections", AGREEMENTS)
def test_what_fits_passes(sections):
    check_config(config(**sections))


@pytest.mark.parametrize(("name", "value"), [("top_k", 1), ("top_p", 0.9)])
def test_training_refuses_truncated_sampling_and_says_why(name, value):
    made = config(rollout={name: value}, data={"train_path": "x"})
    check_config(made)
    with pytest.raises(UserError, match=rf"rollout\.{name}={value}.*kept mass"):
        check_for_training(made)
    check_for_training(config(rollout={"top_p": 1.0}, data={"train_path": "x"}))
    check_for_training(config(evaluation={name: 1}, data={"train_path": "x"}))


def test_training_and_warm_up_need_data():
    for check in (check_for_training, check_for_warm_up):
        with pytest.raises(UserError, match=r"data\.train_path is missing"):
            check(config())
    check_for_training(config(rollout={"replay": "runs/other"}))


def test_depth_is_checked_for_models_that_the_file_does_not_describe():
    made = config(model={"hf_path": "x"}, nested={"num_skipped": 20})
    check_config(made)
    check_depth(made, 24)
    with pytest.raises(UserError, match="20 layers to skip, but 12 layers"):
        check_depth(made, 12)


@pytest.mark.parametrize(("ratio", "layers", "k"), [(0.25, 28, 7), (0.15, 28, 4), (0.0, 28, 0)])
def test_skip_ratio_is_of_all_layers(ratio, layers, k):
    assert num_skipped(config(nested={"skip_ratio": ratio}).nested, layers) == k


def test_layers_to_skip_are_rounded_as_generate_rounds_them():
    from nested_reft_mcore.algorithm.layer_skip import num_skipped_layers

    for layers in (12, 28, 50):
        for ratio in (0.0, 0.125, 0.29, 0.375, 0.42, 0.625):
            nested = config(nested={"skip_ratio": ratio}).nested
            assert num_skipped(nested, layers) == num_skipped_layers(ratio, layers)


def test_batches_are_shared_evenly():
    made = config(rollout={"prompts_per_step": 6, "group_size": 2}, train={"updates_per_step": 4})
    check_batches(made, 3)
    with pytest.raises(UserError, match=r"prompts_per_step=6 .* size 4; what would fit: 4, 8"):
        check_batches(made, 4)
    with pytest.raises(UserError, match=r"updates_per_step=4 .* 6 completions.* 1, 2, 3, 6"):
        check_batches(made, 2)
    made = config(sft={"global_batch_size": 24, "micro_batch_size": 6})
    check_warm_up_batches(made, 4)
    with pytest.raises(UserError, match=r"global_batch_size=24 .* size 3; what would fit: 18, 36"):
        check_warm_up_batches(made, 3)


@pytest.mark.parametrize(
    ("sizes", "world_size", "data"),
    [
        (parallel(), 1, 1),
        (parallel(2, 2), 4, 1),
        (parallel(2, 2), 8, 2),
        (parallel(4, 3, data=2), 24, 2),
        (parallel(1, 2, virtual=3), 2, 1),
    ],
)
def test_layouts_that_fit(sizes, world_size, data):
    assert check_layout(shape(), sizes, world_size) == data


@pytest.mark.parametrize(
    ("architecture", "sizes", "world_size", "parts"),
    [
        (shape(), parallel(3), 3, ("tensor_model_parallel_size=3", "heads=8", "fit: 1, 2, 4")),
        (shape(), parallel(8), 8, ("num_query_groups=4", "fit: 1, 2, 4")),
        (shape(ffn_hidden_size=66), parallel(4), 4, ("ffn_hidden_size=66", "fit: 1, 2")),
        (shape(), parallel(1, 5), 5, ("num_layers=12", "fit: 1, 2, 3, 4, 6, 12")),
        (shape(), parallel(1, 2, virtual=4), 2, ("the 6 layers of a stage", "fit: 2, 3, 6")),
        (shape(), parallel(1, 12, virtual=2), 12, ("fit: none, leave it out",)),
        (shape(), parallel(1, 1, virtual=2), 1, ("pipeline_model_parallel_size above 1",)),
        (
            shape(),
            parallel(2, 2),
            6,
            ("= 4 does not divide the 6 processes", "4 or 8 processes", "1 x 6, 2 x 1, 2 x 3"),
        ),
        (shape(), parallel(2, 2), 2, ("fit: 4 processes", "1 x 1, 1 x 2, 2 x 1")),
        (shape(), parallel(2, 1, data=2), 2, ("= 4, but there are 2", "data_parallel_size=1")),
    ],
)
def test_layouts_that_do_not_fit(architecture, sizes, world_size, parts):
    text = layout_refusal(architecture, sizes, world_size)
    assert all(part in text for part in parts), text


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 24), st.integers(1, 24), st.integers(1, 12)
)
def test_every_tensor_size_offered_is_accepted(tensor, pipeline, heads, layers, world_size):
    """What an error says would fit does fit."""
    architecture = shape(
        num_attention_heads=heads, num_query_groups=heads, num_layers=layers, kv_channels=8
    )
    try:
        data = check_layout(architecture, parallel(tensor, pipeline), world_size)
    except UserError as error:
        offer = str(error).rpartition("what would fit: ")[2]
        if "tensor x pipeline" in offer:
            for pair in offer.rpartition("tensor x pipeline ")[2].split(", "):
                t, p = (int(n) for n in pair.split(" x "))
                assert world_size % (t * p) == 0
                check_layout(architecture, parallel(t, p), world_size)
        elif "tensor_model_parallel_size" in str(error):
            for n in map(int, offer.split(", ")):
                assert check_layout(architecture, parallel(n, 1), n) == 1
        else:
            for n in map(int, offer.split(", ")):
                assert check_layout(architecture, parallel(1, n), n) == 1
    else:
        assert data * tensor * pipeline == world_size


def test_a_bare_start_makes_one_replica_unless_told():
    assert needed_processes(parallel(2, 3)) == 6
    assert needed_processes(parallel(2, 3, data=2)) == 12


def test_checkpoints_are_found_by_the_latest_pointer(tmp_path):
    step = tmp_path / "step_3"
    step.mkdir()
    (step / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    (tmp_path / "latest").write_text("step_3\n")
    assert resolve_checkpoint(tmp_path) == step
    assert resolve_checkpoint(step) == step
    assert read_checkpoint_architecture(tmp_path) == shape()


@pytest.mark.parametrize(
    ("latest", "part"),
    [
        (None, "not a checkpoint"),
        ("gone", "names 'gone'"),
        ("../x", "beside it"),
        ("", "beside it"),
    ],
)
def test_broken_pointers(tmp_path, latest, part):
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    with pytest.raises(UserError, match=part):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "part"),
    [("{", "not readable as JSON"), ("[]", "expected an object"), ('{"x": 1}', "unknown key `x`")],
)
def test_broken_architecture_files(tmp_path, text, part):
    (tmp_path / "architecture.json").write_text(text)
    with pytest.raises(UserError, match=part):
        read_checkpoint_architecture(tmp_path)


def test_no_checkpoint_directory(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        resolve_checkpoint(tmp_path / "none")


def test_a_micro_batch_has_room_for_the_longest_sequence() -> None:
    def made(budget: int, **parallel: object) -> Config:
        return config(
            train={"max_tokens_per_micro_batch": budget},
            data={"train_path": "x", "max_prompt_length": 30},
            rollout={"max_new_tokens": 12},
            parallel=parallel,
        )

    check_for_training(made(41))
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch=40 .* expected at least 41"):
        check_for_training(made(40))
    spread = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    with pytest.raises(UserError, match="expected at least 42"):
        check_for_training(made(41, **spread))


def test_the_configuration_names_the_rejections_there_are() -> None:
    """The configuration imports no mathematics, so it has a list of its own."""
    assert corrections.REJECTIONS == rejection.REJECTIONS
