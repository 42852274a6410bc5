"""RMSNorm over each attention head, with one weight per modality (Qwen3-like query and key norms)."""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from navil_megatron.layers.modality import NaViLPackedSeqParams


class NormWeight(nn.Module):
    """One modality's scale, [d]."""

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))


class ModalityHeadNorm(MegatronModule):
    """[t, heads, d] -> [t, heads, d] in modality-major order.

    Every rank normalises its own heads with the same weights; megatron-core sums these weights' gradients over the
    tensor-parallel ranks because their names hold ``q_layernorm`` or ``k_layernorm``.
    """

    def __init__(self, config: TransformerConfig, head_dim: int, shared: bool = False):
        super().__init__(config=config)
        self.text = NormWeight(head_dim, config.params_dtype)
        self.visual = self.text if shared else NormWeight(head_dim, config.params_dtype)
        self.epsilon = config.layernorm_epsilon

    def forward(self, heads: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Normalise every head of every token."""
        normed = torch.nn.functional.rms_norm(heads, heads.shape[-1:], None, self.epsilon)
        num_text = packed_seq_params.num_text_tokens
        return torch.cat([normed[:num_text] * self.text.weight, normed[num_text:] * self.visual.weight])
