"""A NaViL small enough for a benchmark on a CPU: its config, rows of a wished composition, and ranks of this machine.

Shared by the scripts beside this file.
"""

from pathlib import Path
from typing import Any

import navil_megatron.runtime  # noqa: F401  quiets core's import-time warnings
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import ALONE, DataPlace, Microbatch
from navil_megatron.runtime.session import Launch, Session
from tools.bench.synthetic import synthetic_microbatch

SHAPE = {"hidden": 512, "ffn": 1536, "heads": 8, "groups": 4, "head_dim": 64, "vocabulary": 16_384, "vision": 256}
"""The shape that the ratios of ``step.py`` are asked for."""


def small_config(
    *, layers: int, tokens: int, precision: str, threads: int = 1, shape: dict[str, int] = SHAPE, **sections: Any
) -> NaViLConfig:
    """A complete config.

    Args:
        layers: Layers of decoder and encoder.
        tokens: Tokens of a row.
        precision: ``fp32`` or ``bf16``.
        threads: Threads of a rank.
        shape: Widths, named as in ``SHAPE``.
        **sections: Fields to set in a section, such as ``parallel``.
    """
    vocabulary = shape["vocabulary"]
    base: dict[str, dict[str, Any]] = {
        "model": {
            "special_token_ids": list(range(vocabulary - 12, vocabulary)),
            "language": {
                "family": "qwen3",
                "num_layers": layers,
                "hidden_size": shape["hidden"],
                "ffn_hidden_size": shape["ffn"],
                "num_attention_heads": shape["heads"],
                "num_query_groups": shape["groups"],
                "head_dim": shape["head_dim"],
                "vocab_size": vocabulary,
                "qk_norm": True,
            },
            "vision": {
                "num_layers": layers,
                "hidden_size": shape["vision"],
                "ffn_hidden_size": 4 * shape["vision"],
                "num_attention_heads": 4,
            },
        },
        "data": {"train_sources": [{"index": "none"}], "tokenizer": "none", "seq_length": tokens},
        "training": {"train_steps": 1, "global_batch_size": 1},
        "precision": {"type": precision},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "checkpoint": {"directory": "none"},
        "runtime": {"device": "cpu", "cpu_threads": threads},
        "logging": {"directory": "none"},
        "parallel": {},
    }
    return section_from_dict(
        NaViLConfig, {name: {**base[name], **sections.get(name, {})} for name in base}, "the benchmark"
    )


def mixed_row(
    config: NaViLConfig, seed: int = 0, grid: tuple[int, int] = (32, 32), place: DataPlace = ALONE
) -> Microbatch:
    """One sample that fills the row: images of ``grid`` patches for 80% of the tokens, then text."""
    rows, columns = grid
    # Line and frame tokens and both ends of an image are text for the experts, but for <img>.
    per_image = rows * columns // 4 + rows // 2 + 3
    num_images = round(0.8 * config.data.seq_length / (rows * columns // 4))
    num_text = config.data.seq_length - num_images * per_image - 1
    return one_sample_row(config, seed, num_text, [grid] * num_images, place)


def one_sample_row(
    config: NaViLConfig, seed: int, num_text: int, grids: list[tuple[int, int]], place: DataPlace = ALONE
) -> Microbatch:
    """A row of one sample, as long as it takes to fill it."""
    length = config.data.seq_length
    for shorter in range(num_text, 0, -1):
        try:
            padded = config.parallel.context_parallel_size
            return synthetic_microbatch(
                config.model, length, seed, [[(shorter, grids)]], pad_segments_to=padded, place=place
            )
        except ValueError:
            continue
    raise SystemExit(f"--tokens {length} has no room for {len(grids)} images")


def start_rank(config: NaViLConfig, rank: int, world_size: int, rendezvous: Path) -> Session:
    """The session of one rank of this machine; the ranks meet through a file."""
    launch = Launch(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, rendezvous_file=rendezvous
    )
    return Session.start(config, launch)
