"""A model spread over ranks: who holds which layers and how many parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.layout import check_layout, stage_of_layer
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.hf.transforms import padded_vocab_size
from nested_reft_mcore.planning.layer_costs import LayerShape


@dataclass(frozen=True)
class Layout:
    """A model, the parallel sizes, and the machines: Megatron's order, tensor ranks first."""

    architecture: ModelArchitecture
    tensor: int
    pipeline: int
    num_chunks: int
    """Virtual stages of each rank."""
    data: int
    sequence_parallel: bool
    gpus_per_node: int

    @classmethod
    def of(
        cls,
        architecture: ModelArchitecture,
        parallel: ParallelConfig,
        nodes: int,
        gpus_per_node: int,
    ) -> Layout:
        """The layout of one process per GPU.

        Raises:
            UserError: the model or the number of GPUs does not fit the parallel sizes.
        """
        return cls(
            architecture,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            num_chunks=parallel.virtual_pipeline_model_parallel_size or 1,
            data=check_layout(architecture, parallel, nodes * gpus_per_node),
            sequence_parallel=parallel.sequence_parallel,
            gpus_per_node=gpus_per_node,
        )

    @property
    def world_size(self) -> int:
        """Ranks, one on each GPU."""
        return self.tensor * self.pipeline * self.data

    @cached_property
    def layer(self) -> LayerShape:
        """A rank's share of a layer."""
        return LayerShape.of(self.architecture, self.tensor)

    @cached_property
    def stage_of_layer(self) -> tuple[int, ...]:
        """The pipeline rank of each global layer."""
        return stage_of_layer(self.architecture.num_layers, self.pipeline, self.num_chunks)

    def layers_of(self, stage: int) -> list[int]:
        """Global layers of a pipeline rank, those of all its chunks."""
        return [layer for layer, owner in enumerate(self.stage_of_layer) if owner == stage]

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return not self.architecture.untie_embeddings_and_output_weights

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding on one rank, Megatron's padding included."""
        return padded_vocab_size(self.architecture.vocab_size, self.tensor) // self.tensor

    @property
    def vocab_matrix(self) -> int:
        """Elements of a rank's shard of the embedding, or of the output matrix."""
        return self.vocab_rows * self.architecture.hidden_size

    def is_last(self, stage: int) -> bool:
        """Whether the stage has the output matrix."""
        return stage == self.pipeline - 1

    def parameters(self, stage: int) -> int:
        """Parameters of one rank of this stage.

        A tied embedding has a copy on the last of several stages.
        """
        count = len(self.layers_of(stage)) * self.layer.parameters
        if stage == 0:
            count += self.vocab_matrix
        if self.is_last(stage):
            count += self.architecture.hidden_size
            if not self.is_tied or self.pipeline > 1:
                count += self.vocab_matrix
        return count

    @property
    def model_parameters(self) -> int:
        """Parameters of the model itself: no padding, no copies."""
        whole = LayerShape.of(self.architecture, 1)
        vocab = self.architecture.vocab_size * self.architecture.hidden_size
        norm = self.architecture.hidden_size
        layers = self.architecture.num_layers * whole.parameters
        return layers + norm + vocab * (1 if self.is_tied else 2)

    @property
    def tensor_is_local(self) -> bool:
        """Whether tensor-parallel ranks share a node."""
        return self.gpus_per_node % self.tensor == 0

    @property
    def data_is_local(self) -> bool:
        """Whether the replicas of a rank share a node."""
        return self.gpus_per_node % (self.tensor * self.data) == 0

    @property
    def pipeline_is_local(self) -> bool:
        """Whether all stages of a replica share a node."""
        return self.world_size <= self.gpus_per_node

    def ranks_of_node(self, node: int) -> list[tuple[int, int]]:
        """Data-parallel rank and pipeline rank of each rank of a node."""
        first = node * self.gpus_per_node
        ranks = range(first, min(first + self.gpus_per_node, self.world_size))
        return [
            (rank // self.tensor % self.data, rank // (self.tensor * self.data)) for rank in ranks
        ]
