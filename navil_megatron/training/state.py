"""How far a run has come: the small part of a checkpoint that is neither weight nor optimizer state."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Equal on every rank; holds only what ``weights_only`` loading allows: numbers, strings, lists and dicts."""

    run_id: str = ""
    """What the run's records are known by; empty in checkpoints of a version that knew none."""
    step: int = 0
    """Steps done; of some the update was refused."""
    consumed_samples: int = 0
    """Samples trained on, over all ranks."""
    consumed_tokens: int = 0
    """Tokens trained on, padding not counted, over all ranks."""
    refused_steps: list[int] = field(default_factory=list)
    """Those of the last 1,000 steps whose update was refused."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the last updates, for their median."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Where the data loader goes on."""

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Self:
        """From what ``to_dict`` gave, be it of a version that knew less."""
        return cls(**{field.name: stored[field.name] for field in fields(cls) if field.name in stored})


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this step."""
    return step == last or (every is not None and step % every == 0)
