"""The policy: one GPTModel (or its chunks on this process) at full depth, or nested in itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_viewless_tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.architecture import ModelArchitecture, RopeScaling
from nested_reft_mcore.config.layout import stage_of_layer
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.hf.transforms import padded_vocab_size
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore import cpu_backend
from nested_reft_mcore.mcore.nested_layer import NestedTransformerLayer
from nested_reft_mcore.mcore.output_layer import take_over_output_layer
from nested_reft_mcore.mcore.transformer_config import block_spec, transformer_config


class Policy:
    """This process's part of the model, and the switch that makes it the behavior policy.

    Weights exist once: `nested(plan)` only sets flags on the layers.
    """

    def __init__(
        self,
        chunks: list[GPTModel],
        config: TransformerConfig,
        architecture: ModelArchitecture,
        context: ParallelContext,
    ) -> None:
        self.chunks = chunks
        """One GPTModel, or one for each virtual pipeline stage of this process."""
        self.transformer_config = config
        self.architecture = architecture
        self.context = context
        self.plan = LayerSkipPlan.full(architecture.num_layers)
        """What is skipped now."""
        self.is_replaced = False
        """Whether other weights are in the place of its own now: neither to save nor to update."""
        self.ddp_chunks: list[Any] = []
        """The chunks inside Megatron's DistributedDataParallel, once an optimizer is attached."""

    @property
    def modules(self) -> list[Any]:
        """What forward passes go through: the wrapped chunks if there are any."""
        return self.ddp_chunks or self.chunks

    @property
    def layers(self) -> list[NestedTransformerLayer]:
        """This process's layers, of all its chunks."""
        layers: list[Any] = [layer for chunk in self.chunks for layer in chunk.decoder.layers]
        return layers

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks, padding included."""
        return padded_vocab_size(self.architecture.vocab_size, self.context.tensor.size)

    @property
    def stage_of_layer(self) -> tuple[int, ...]:
        """The pipeline rank that holds each global layer."""
        return stage_of_layer(
            self.architecture.num_layers, self.context.pipeline.size, self.context.num_chunks
        )

    @contextmanager
    def nested(self, plan: LayerSkipPlan) -> Iterator[Policy]:
        """The behavior policy of `plan`, as long as the context lasts.

        A backward pass belongs inside the context too: recomputation reads the flags again.
        """
        if plan.num_layers != self.architecture.num_layers:
            raise ValueError(
                f"the plan is for {plan.num_layers} layers, the policy has "
                f"{self.architecture.num_layers}"
            )
        outer = self.plan
        self._apply(plan)
        try:
            yield self
        finally:
            self._apply(outer)

    def sync_parameters(self) -> None:
        """Bring every parameter up to date.

        With `overlap_param_gather` the distributed optimizer's new values otherwise arrive in the
        hooks of the next training forward, which generation does not run through.
        """
        for chunk in self.ddp_chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _apply(self, plan: LayerSkipPlan) -> None:
        self.plan = plan
        for layer in self.layers:
            layer.skip_attention = plan.skips_attention(layer.global_index)
            layer.skip_mlp = plan.skips_mlp(layer.global_index)


def build_policy(
    architecture: ModelArchitecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    context: ParallelContext,
) -> Policy:
    """Build this process's part of the model, weights left to `mcore.weights` or a checkpoint."""
    config = transformer_config(architecture, model, parallel)
    is_tied = not architecture.untie_embeddings_and_output_weights
    num_chunks = context.num_chunks
    chunks = []
    for index in range(num_chunks):
        layers: Any = block_spec(config, model, index if num_chunks > 1 else None)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=padded_vocab_size(architecture.vocab_size, context.tensor.size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=context.is_first_stage and index == 0,
            post_process=context.is_last_stage and index == num_chunks - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=is_tied,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,  # pyright: ignore[reportArgumentType]
            vp_stage=index if num_chunks > 1 else None,
        )
        _scale_rotary(chunk, architecture.rope_scaling)
        # Norms are made in float32, whatever the type of the matrices.
        chunk.to(device=context.device, dtype=config.params_dtype)
        _mark_tensor_parallel(chunk)
        _guard_output(chunk)
        take_over_output_layer(chunk)
        chunks.append(chunk)
    # Building a model may have imported more of Megatron.
    cpu_backend.install()
    return Policy(chunks, config, architecture, context)


def _scale_rotary(chunk: GPTModel, scaling: RopeScaling | None) -> None:
    """Stretch the rotary frequencies by Megatron's own formula.

    GPTModel's `rope_scaling` takes the factor alone, and fixes the other numbers at Llama 3.1's.
    """
    if scaling is not None:
        rotary: Any = chunk.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling.model_dump())


def _mark_tensor_parallel(chunk: GPTModel) -> None:
    """Tell Megatron which parameters are shards.

    It does so itself only while it draws initial values, which are ours; unmarked shards would be
    left out of the gradient norm on all tensor-parallel ranks but the first.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dimension = 0
        elif isinstance(module, RowParallelLinear):
            dimension = 1
        else:
            continue
        for parameter in (module.weight, getattr(module, "bias", None)):
            # The bias of a row-parallel layer is whole on every rank.
            if parameter is None or (dimension == 1 and parameter is not module.weight):
                continue
            if not hasattr(parameter, "partition_dim"):
                set_tensor_model_parallel_attributes(parameter, True, dimension, 1)


def _guard_output(chunk: GPTModel) -> None:
    """Give a chunk an output that the pipeline schedule may free once it is sent.

    Where all layers are skipped the output is the very tensor that the previous stage sent:
    freeing it would silently make gradients wrong. Where the last MLP is skipped it can be a view,
    which the schedule refuses to free.
    """

    def own_output(module: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        if output is module.input_tensor:
            return output.clone()
        return make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True)

    if not chunk.post_process:
        chunk.decoder.register_forward_hook(own_output, with_kwargs=True)
