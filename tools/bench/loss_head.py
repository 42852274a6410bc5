"""LM head and cross entropy, forward and backward: ours, chunk by chunk, against the logits of all positions at once.

    python tools/bench/loss_head.py [--json] [--precision fp32|bf16] [--positions K] [--vocabulary V] [--rounds N]

- ``torch``: a linear layer and torch's ``cross_entropy`` on its logits in FP32.
- ``core``: megatron-core's head and its ``vocab_parallel_cross_entropy``.

Ratios are of the peer over ours: seconds (above 1 ours is faster; median and middle half of the rounds, ``turns.py``)
and peak memory beyond weights and hidden states, with their gradients. Ours makes every chunk's logits twice, which is
the price: a fourth GEMM beside three.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig
from small_run import small_config
from torch.nn import functional
from turns import assert_near, peak_bytes, ratio, show, take_turns

from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.loss_head import LossHead
from navil_megatron.runtime.session import Session


def compare(config: NaViLConfig, session: Session, positions: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time and memory of each peer over ours.

    Raises:
        AssertionError: A peer's losses are not ours.
    """
    device, language = session.device, config.model.language
    dtype = torch.float32 if config.precision.type == "fp32" else torch.bfloat16
    head = build_head(config, session, dtype)
    generator = torch.Generator(device).manual_seed(0)
    shape = (positions, language.hidden_size)
    hidden = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    labels = torch.randint(language.vocab_size, (positions,), generator=generator, device=device)
    ways = {
        "ours": lambda: head(hidden, None, labels, config.training.loss_chunk_tokens),
        "torch": lambda: functional.cross_entropy(
            functional.linear(hidden, head.weight).float(), labels, reduction="none"
        ),
        "core": lambda: vocab_parallel_cross_entropy(head(hidden, None, None, 1), labels, tp_group=session.groups.tp),
    }

    def step(name: str) -> None:
        hidden.grad = head.weight.grad = None
        ways[name]().sum().backward()

    with torch.no_grad():
        expected = ways["ours"]()
        for name, losses in ways.items():
            assert_near(losses().to(dtype), expected.to(dtype), f"{name}: losses")
    seconds = take_turns({name: lambda n=name: step(n) for name in ways}, rounds, device)
    bytes_of = {}
    for name in ways:
        hidden.grad = head.weight.grad = None
        bytes_of[name] = peak_bytes(lambda n=name: step(n), device)
    return {
        name: {
            **ratio(seconds["ours"], seconds[name]),
            "memory_ratio": bytes_of[name] / bytes_of["ours"],
            "ours_bytes": bytes_of["ours"],
            "theirs_bytes": bytes_of[name],
        }
        for name in ("torch", "core")
    }


def build_head(config: NaViLConfig, session: Session, dtype: torch.dtype) -> LossHead:
    """A head alone."""
    language = config.model.language
    core = TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        perform_initialization=False,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
    )
    with torch.device(session.device):
        head = LossHead(
            language.hidden_size,
            language.vocab_size,
            TORCH_KERNELS,
            config=core,
            init_method=core.init_method,
            bias=False,
            tp_group=session.groups.tp,
        )
    torch.nn.init.normal_(head.weight, std=0.02)
    return head


def main() -> int:
    """Prints a table, or one JSON object last on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--positions", type=int, default=2048, help="predicted positions")
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256, help="positions whose logits exist at once")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds")
    options = parser.parse_args()
    shape = {"hidden": options.hidden, "ffn": 64, "heads": 8, "groups": 4, "head_dim": options.hidden // 8}
    config = small_config(
        layers=1,
        tokens=64,
        precision=options.precision,
        shape={**shape, "vocabulary": options.vocabulary, "vision": 64},
        training={"loss_chunk_tokens": options.chunk},
    )
    with Session.start(config) as session:
        found: dict[str, Any] = compare(config, session, options.positions, options.rounds)
    for name, figures in found.items():
        memory = f"memory {figures['memory_ratio']:.1f}x ({figures['theirs_bytes'] / 2**20:.0f} MiB"
        print(f"{show(name, figures)}, {memory} over {figures['ours_bytes'] / 2**20:.0f})")
    if options.json:
        print(json.dumps({**found, "options": vars(options), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
