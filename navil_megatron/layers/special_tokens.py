"""The 12 special tokens' own embedding table."""

from typing import Any

import torch
from torch import Tensor, nn

from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig


class SpecialTokenEmbedding(nn.Module):
    """Rows that replace the text table's for the 12 special tokens, so that a frozen table never needs them."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(SPECIAL_TOKENS), model.language.hidden_size, dtype=dtype))
        row_of_id = torch.full((model.language.vocab_size,), -1, dtype=torch.long)
        row_of_id[list(model.special_token_ids)] = torch.arange(len(SPECIAL_TOKENS))
        self.register_buffer("row_of_id", row_of_id, persistent=False)

    def forward(self, embeddings: Tensor, input_ids: Tensor) -> Tensor:
        """embeddings [t, h] of the text table -> [t, h] with special rows replaced."""
        replaced: Tensor = _Replace.apply(embeddings, self.weight, self.get_buffer("row_of_id")[input_ids])
        return replaced


class _Replace(torch.autograd.Function):
    """Rows of a small table where ``rows`` says which, the embeddings elsewhere (-1).

    The table's gradient is one product with a one-hot matrix, summed in FP32. Autograd's own adds up the gradients that
    one row gets one after the other, and most tokens of a batch would go to the same row, if with a gradient of zero.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """embeddings [t, h], table [r, h], rows [t] -> [t, h]."""
        ctx.save_for_backward(rows)
        ctx.num_rows = len(table)
        return torch.where((rows >= 0).unsqueeze(-1), table[rows.clamp(min=0)], embeddings)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the embeddings and of the table, where they are wanted."""
        (rows,) = ctx.saved_tensors
        needs_embeddings, needs_table = ctx.needs_input_grad[:2]
        grad_embeddings = grad_output.masked_fill((rows >= 0).unsqueeze(-1), 0) if needs_embeddings else None
        grad_table = None
        if needs_table:
            one_hot = torch.arange(ctx.num_rows, device=rows.device).unsqueeze(-1) == rows
            grad_table = one_hot.to(grad_output.dtype) @ grad_output
        return grad_embeddings, grad_table, None
