"""Between the fused projection and the softmax, forward and backward: ours in one step against each operation alone.

    python tools/bench/attention_heads.py [--json] [--precision fp32|bf16] [--device cpu|cuda] [--tokens T] [--rounds N]

The peer is plain torch as most models have it: query, key and value are split, their heads normed and scaled modality
by modality, turned by rotate-half, and each is gathered into attention order. Cases are the heads of NaViL-2B and -9B
(with norms of heads) and of an encoder's windows. Both must first give the same output and gradients.

Figures are seconds of the peer over ours, above 1 ours is faster: median and middle half of the rounds (``turns.py``),
and bytes that the operators write, which is what both cost on a GPU if nothing is fused.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

import torch
from torch import Tensor
from turns import assert_near, ratio, show, take_turns
from written_bytes import copied, watching_writes

import navil_megatron.runtime  # noqa: F401  quiets core's import-time warnings
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.attention_heads import AttentionHeads
from navil_megatron.layers.kernels import FusedHeads
from navil_megatron.layers.rope import cos_sin, rotary_angles, rotary_frequencies

EPSILON = 1e-6


class Case(NamedTuple):
    """Heads of a model; ``text`` is the share of its rows that are text."""

    heads: int
    groups: int
    head_dim: int
    norms: bool
    text: float = 0.2
    is_encoder: bool = False


CASES = {
    "2b": Case(16, 8, 128, norms=False),
    "9b": Case(32, 8, 128, norms=True),
    "windows": Case(16, 16, 64, norms=False, is_encoder=True),
}
Found = dict[str, float]


class Given(NamedTuple):
    """Rows of a fused projection, in another order than the softmax wants, and what both ways take besides."""

    qkv: Tensor
    weights: Tensor | None
    order: Tensor
    inverse: Tensor
    angles: Tensor
    """[t, d/2], in attention order."""
    num_text: int
    fused: FusedHeads

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.qkv] if self.weights is None else [self.qkv, self.weights]


def given(case: Case, tokens: int, dtype: torch.dtype, device: torch.device) -> Given:
    """Random rows."""
    generator = torch.Generator(device).manual_seed(0)
    per_group = case.heads // case.groups
    shape = (3, case.heads) if case.is_encoder else (case.groups, per_group + 2)
    qkv = torch.randn(tokens, *shape, case.head_dim, generator=generator, device=device, dtype=dtype)
    weights = torch.rand(2, 2, case.head_dim, generator=generator, device=device, dtype=dtype) if case.norms else None
    order = torch.randperm(tokens, generator=generator, device=device)
    angles = rotary_angles(
        torch.arange(tokens, device=device), rotary_frequencies(case.head_dim, 1e6, torch.device(device))
    )
    fused = FusedHeads((1, 1, 1), 1) if case.is_encoder else FusedHeads((per_group, 1, 1), 2)
    found = Given(qkv, weights, order, order.argsort(), angles, round(case.text * tokens), fused)
    for leaf in found.leaves():
        leaf.requires_grad_()
    return found


def ours(rows: Given) -> tuple[Tensor, ...]:
    """As the layers have it."""
    is_visual = rows.order >= rows.num_text if rows.weights is not None else None
    rotary = cos_sin(rows.angles)
    found: tuple[Tensor, ...] = AttentionHeads.apply(
        rows.qkv, rows.weights, is_visual, EPSILON, rows.order, rows.inverse, rotary, rows.fused, TORCH_KERNELS
    )
    return found


def one_by_one(rows: Given) -> tuple[Tensor, ...]:
    """Every operation alone."""
    parts = [part.flatten(1, 2) for part in rows.qkv.split(rows.fused.sizes, rows.fused.dim)]
    if rows.weights is not None:
        parts[:2] = [
            _normed(heads, weight, rows.num_text) for heads, weight in zip(parts[:2], rows.weights, strict=True)
        ]
    doubled = torch.cat([rows.angles, rows.angles], dim=-1).unsqueeze(1)[rows.inverse]
    cos, sin = doubled.cos().to(rows.qkv.dtype), doubled.sin().to(rows.qkv.dtype)
    parts[:2] = [_turned(heads, cos, sin) for heads in parts[:2]]
    return tuple(heads.index_select(0, rows.order) for heads in parts)


def _normed(heads: Tensor, weight: Tensor, num_text: int) -> Tensor:
    normed = torch.nn.functional.rms_norm(heads, heads.shape[-1:], None, EPSILON)
    return torch.cat([normed[:num_text] * weight[0], normed[num_text:] * weight[1]])


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def compare(case: Case, tokens: int, rounds: int, dtype: torch.dtype, device: torch.device) -> Found:
    """Time, and bytes written and copied, of both.

    Raises:
        AssertionError: The peer's output or a gradient is not ours.
    """
    rows = given(case, tokens, dtype, device)
    ways: dict[str, Callable[[Given], tuple[Tensor, ...]]] = {"ours": ours, "one by one": one_by_one}
    wanted = [torch.randn_like(part) for part in ours(rows)]

    def step(name: str) -> list[Tensor]:
        outputs = ways[name](rows)
        return [*outputs, *torch.autograd.grad(outputs, rows.leaves(), wanted)]

    for found, expected in zip(step("one by one"), step("ours"), strict=True):
        assert_near(found, expected, "one by one")
    written: dict[str, Any] = {}
    for name in ways:
        with watching_writes() as written[name]:
            step(name)
    seconds = take_turns({name: lambda n=name: step(n) for name in ways}, rounds, device)
    return {
        **ratio(seconds["ours"], seconds["one by one"]),
        "ours_written": written["ours"].total(),
        "theirs_written": written["one by one"].total(),
        "ours_reordered": written["ours"]["index_select"],
        "ours_copied": copied(written["ours"]),
        "theirs_copied": copied(written["one by one"]),
        "qkv": rows.qkv.nbytes,
    }


def main() -> int:
    """Prints a table, or one JSON object last on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=11, help="counted rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    found = {
        name: compare(case, options.tokens, options.rounds, dtype, torch.device(options.device))
        for name, case in CASES.items()
    }
    for name, figures in found.items():
        qkv = figures["qkv"]
        sizes = ", ".join(
            f"{what} {figures[f'ours_{what}'] / qkv:.1f} over {figures[f'theirs_{what}'] / qkv:.1f}"
            for what in ("written", "copied")
        )
        print(f"{show(name, figures)}; of the fused rows' bytes {sizes}")
    if options.json:
        print(json.dumps({**found, "options": vars(options), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
