"""What a profile's kernels were for: shares of a step by kind, the longest ones, and what was idle."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("communication", ("nccl", "c10d", "gloo")),
    ("attention", ("flash", "fmha", "sdpa", "attention", "fused_attn")),
    ("gemm", ("gemm", "cutlass", "xmma", "nvjet", "cublas", "splitk", "::mm", "addmm", "::bmm")),
    ("gathers", ("index", "gather", "scatter", "embedding")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "lamb")),
    ("memcpy", ("memcpy", "memset", "copy_", "fill", "zero_")),
    ("norms_elementwise", ("",)),
)
"""Kind -> words in a kernel's name, the first that fits; the last kind takes what is left."""


def summarize(spans: Sequence[tuple[str, float, float]], wall: float) -> dict[str, Any]:
    """Shares of the wall time by kind.

    Args:
        spans: Name, start and end of each kernel, in microseconds. Where some overlap, shares add up to more than the
            time that is not idle.
        wall: Microseconds of the whole step.
    """
    by_kind, by_name = dict.fromkeys((kind for kind, _ in KINDS), 0.0), Counter[str]()
    busy, reached = 0.0, float("-inf")
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        by_kind[kind_of(name)] += end - start
        by_name[name] += end - start
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    shares = {kind: round(micros / wall, 4) for kind, micros in by_kind.items()}
    counts = Counter(name for name, _, _ in spans)
    longest = [
        {"name": name[:160], "kind": kind_of(name), "share": round(micros / wall, 4), "calls": counts[name]}
        for name, micros in by_name.most_common(10)
    ]
    idle = round(max(0.0, 1 - busy / wall), 4)
    return {"milliseconds": round(wall / 1e3, 1), "shares": {**shares, "idle": idle}, "longest_kernels": longest}


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    lower = name.lower()
    return next(kind for kind, words in KINDS if any(word in lower for word in words))
