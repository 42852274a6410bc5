"""``[training]``: length, batch, phase and what is computed again."""

from dataclasses import dataclass
from typing import Literal

Recomputed = Literal["attention", "mlp", "encoder"]
"""Parts of the model whose activations can be computed again in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How long, how much at once, and what is trained."""

    train_steps: int
    """Optimizer updates of the whole run."""
    global_batch_size: int
    """Packed rows of one update, over all data-parallel ranks."""
    micro_batch_size: int = 1
    """Packed rows of one forward pass of one rank."""
    phase: Literal["s1.1", "s1.2", "s2"] = "s2"
    """Stage of the recipe, which decides what is trainable (paper, tables 7 and 8): ``s1.1`` encoder, connector,
    visual experts and special tokens; ``s1.2`` also the text attention; ``s2`` everything."""
    seed: int = 1234
    """Decides initial weights and data order."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of ``recompute_modules``, or those of every layer of
    decoder and encoder."""
    recompute_modules: tuple[Recomputed, ...] = ("attention",)
    """What ``recompute = "selective"`` computes again: ``attention`` the decoder's softmax and its gathers, ``mlp`` its
    feed-forward experts, ``encoder`` every layer of the visual encoder. Read where ``recompute`` is selective."""
    loss_chunk_tokens: int = 1_024
    """Predicted positions whose logits exist at once, in tokens: 1,024 fill a GPU's GEMM, and their FP32 logits over
    152k words take 0.6 GB."""
    router_aux_loss: float = 0.01
    """Weight of the loss that balances the experts of one modality (Switch Transformer), each layer's mean over the
    modality's tokens; 0: off. Read where ``num_experts`` is more than 1."""
    router_z_loss: float = 0.001
    """Weight of the loss that keeps router logits small (ST-MoE), averaged and read as above; 0: off."""
    log_every_steps: int = 1
    """Steps between metric records."""

    def recomputes(self, part: Recomputed) -> bool:
        """Whether the activations of a part are computed again in the backward pass."""
        return self.recompute == "full" or (self.recompute == "selective" and part in self.recompute_modules)
