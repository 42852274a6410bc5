"""RMSNorm over each attention head, with one weight per modality (Qwen3-like query and key norms)."""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class NormWeight(nn.Module):
    """One modality's scale, [d]."""

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))


class ModalityHeadNorm(MegatronModule):
    """The scales of both modalities; ``AttentionHeads`` applies them to the heads of query or key.

    Every rank normalises its own heads with the same weights; megatron-core sums these weights' gradients over the
    tensor-parallel ranks because their names hold ``q_layernorm`` or ``k_layernorm``.
    """

    reads_weights_of_children = True

    def __init__(self, config: TransformerConfig, head_dim: int, shared: bool = False):
        super().__init__(config=config)
        self.text = NormWeight(head_dim, config.params_dtype)
        self.visual = self.text if shared else NormWeight(head_dim, config.params_dtype)

    def forward(self) -> Tensor:
        """[2, d] of text and visual tokens, or [1, d] of both where they share it. A call, not a weight that is read:
        core waits for gathered parameters when a module is called.
        """
        holders = [self.text] if self.visual is self.text else [self.text, self.visual]
        return torch.stack([holder.weight for holder in holders])
