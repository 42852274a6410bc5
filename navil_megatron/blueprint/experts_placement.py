"""Where the experts of both modalities live among the expert-parallel ranks, and how even that is."""

from navil_megatron.config.modality import MODALITIES, Modality

type LocalExperts = dict[Modality, range]
"""The experts that live on one rank, by their number inside their modality; a modality without any is left out."""


def experts_side_by_side(num_experts: int, num_ranks: int) -> int:
    """How many experts of one modality the ranks' numbering lays side by side before it turns to the other modality.

    Where the ranks divide the experts of a modality, each holds as many text as visual ones, and the mixture of a batch
    does not matter to its load. Else all text experts come first.
    """
    return num_experts // num_ranks if num_experts % num_ranks == 0 else num_experts


def local_experts(rank: int, num_ranks: int, num_experts: int) -> LocalExperts:
    """The experts on one expert-parallel rank of so many, where each modality has ``num_experts``."""
    num_local = len(MODALITIES) * num_experts // num_ranks
    block = experts_side_by_side(num_experts, num_ranks)
    experts: dict[Modality, list[int]] = {}
    for column in range(rank * num_local, (rank + 1) * num_local):
        group, inside = divmod(column, len(MODALITIES) * block)
        modality, number = divmod(inside, block)
        experts.setdefault(MODALITIES[modality], []).append(group * block + number)
    return {modality: range(numbers[0], numbers[-1] + 1) for modality, numbers in experts.items()}


def loads_of_ranks(visual_share: float, num_ranks: int, num_experts: int) -> list[float]:
    """Rows of each expert-parallel rank over their mean, where the routers are even; ``num_experts`` a modality."""
    shares = dict(zip(MODALITIES, (1 - visual_share, visual_share), strict=True))
    placed = [local_experts(rank, num_ranks, num_experts) for rank in range(num_ranks)]
    return [
        num_ranks * sum(shares[modality] * len(numbers) / num_experts for modality, numbers in experts.items())
        for experts in placed
    ]
