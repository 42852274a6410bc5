"""The matrices of the feed-forward experts that live on one rank, and their product with rows sorted by expert."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor, nn

from navil_megatron.blueprint.experts_placement import LocalExperts
from navil_megatron.config.modality import MODALITIES, Modality
from navil_megatron.layers.kernels import Kernels


class ExpertLinear(MegatronModule):
    """The experts of this rank by modality, named as ``ModalityLinear`` names its own: one matrix of the kernel
    library, or several as a stack [experts, out, in], which its grouped product multiplies.

    Rows come gathered from the experts' tensor-parallel ranks and outputs are summed over them elsewhere, so nothing
    is sent here. An expert without rows leaves a zero gradient: the product with no rows is in the graph too. Sizes,
    ``partition_dim`` and ``partition_stride`` as of ``ModalityLinear``.
    """

    reads_weights_of_children = True

    def __init__(
        self,
        config: TransformerConfig,
        kernels: Kernels,
        experts: LocalExperts,
        output_size: int,
        input_size: int,
        pg_collection: ProcessGroupCollection,
        partition_dim: int,
        partition_stride: int = 1,
    ):
        super().__init__(config=config)
        assert config.num_moe_experts is not None
        self.products: dict[str, Any] = {}
        self.is_stack = config.num_moe_experts > len(MODALITIES)
        shape = [output_size, input_size]
        shape[partition_dim] = divide(shape[partition_dim], pg_collection.expt_tp.size())
        for modality, numbers in experts.items():
            holder: Any = nn.Module()
            if self.is_stack:
                holder.weight = nn.Parameter(torch.empty(len(numbers), *shape, dtype=config.params_dtype))
                product = kernels.grouped_product(holder)
                self.products[modality] = product
                if isinstance(product, nn.Module):
                    self.add_module(f"{modality}_product", product)
            else:
                holder = kernels.linear(shape[1], shape[0], bias=False, dtype=config.params_dtype)
            dim = self.is_stack + partition_dim
            set_tensor_model_parallel_attributes(holder.weight, True, dim, partition_stride)
            # Core's mark of a weight that only the ranks with the same experts share: they alone sum its gradient.
            holder.weight.allreduce = False
            self.add_module(modality, holder)

    def forward(self, rows: Tensor, modality: Modality, ends: Tensor) -> Tensor:
        """[rows, in] of a modality sorted by expert -> [rows, out], of which in or out is this rank's part; ``ends``
        [experts here] int32 is one past the last row of each.
        """
        if not self.is_stack:
            output: Tensor = self.get_submodule(modality)(rows)
            return output
        output = self.products[modality](rows, ends)
        return output
