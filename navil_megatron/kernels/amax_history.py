"""The largest values that delayed FP8 scaling remembers, after a step whose numbers were not finite."""

from torch import Tensor, nn


def forget_bad_amax(model: nn.Module) -> None:
    """Takes what is not finite out of every history.

    Transformer Engine scales by the largest value of past steps and keeps the scale that it has while that is not
    finite: one bad step would freeze all scales for as long as the history is.
    """
    for module in model.modules():
        for state in getattr(module, "fp8_meta", {}).values():
            history = getattr(state, "amax_history", None)
            if isinstance(history, Tensor):
                history.masked_fill_(~history.isfinite(), 0.0)
