"""How evenly the feed-forward experts load the ranks: rows that each rank computes in one training step, counted.

    python tools/bench/expert_loads.py [--experts 4] [--tokens 512] [--json]

One expert per modality and several, at expert-parallel sizes 1 to 4, on gloo ranks of this machine. All take the same
batch, about three quarters visual tokens. Routers are as they start; a run records ``*_expert_imbalance``.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from small_run import mixed_row, small_config, start_rank

from navil_megatron.config.run import NaViLConfig
from navil_megatron.layers.expert_linear import ExpertLinear
from navil_megatron.layers.modality_mlp import ModalityMLP
from navil_megatron.models.build import build_model
from navil_megatron.training.batch import place_of
from navil_megatron.training.expert_load import ExpertLoad, balance
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step

SHAPE = {"hidden": 128, "ffn": 384, "heads": 4, "groups": 2, "head_dim": 32, "vocabulary": 1024, "vision": 64}
LAYERS, NUM_ROWS = 2, 4
EP = "expert_model_parallel_size"
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

LAYOUTS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "one expert, tp2": (2, False, TP2),
    "one expert, ep2": (2, False, {EP: 2}),
    "several, dp2": (2, True, {}),
    "several, ep2": (2, True, {EP: 2}),
    "several, ep4": (4, True, {EP: 4}),
    "several, tp2, expert tensor 1": (2, True, {**TP2, "expert_tensor_parallel_size": 1}),
}
"""Name -> ranks, several experts per modality, and the layout."""


def config_of(layout: str, options: argparse.Namespace) -> NaViLConfig:
    """A run small enough for a few CPU ranks."""
    _, several, parallel = LAYOUTS[layout]
    config = small_config(layers=LAYERS, tokens=options.tokens, precision="fp32", shape=SHAPE, parallel=parallel)
    if not several:
        return config
    experts = {"num_experts": options.experts, "experts_per_token": options.experts_per_token}
    return replace(config, model=replace(config.model, language=replace(config.model.language, **experts)))


def measure_rank(rank: int, layout: str, options: argparse.Namespace, folder: str) -> None:
    """One step of one rank, written as JSON."""
    config = config_of(layout, options)
    with start_rank(config, rank, LAYOUTS[layout][0], Path(folder) / "rendezvous") as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        load = ExpertLoad(chunks, LAYERS, config.model.language.num_experts)
        computed = 0.0

        def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal computed
            # Under tensor parallelism a rank computes a part of each row.
            split = module.tp_group.size() if isinstance(module, ExpertLinear) else session.groups.tp.size()
            rows = inputs[0].shape[0] * (session.groups.tp.size() if isinstance(module, ModalityMLP) else 1)
            computed += rows / split

        for module in (module for chunk in chunks for module in chunk.modules()):
            is_first = isinstance(module, ExpertLinear) and module.partition_dim == 0
            if is_first or isinstance(module, ModalityMLP):
                module.register_forward_pre_hook(count)
        rows = [mixed_row(config, seed, (16, 16), place_of(session)) for seed in range(NUM_ROWS)]
        mine = rows[session.groups.dp.rank() :: session.groups.dp.size()]
        train_step(config, session, chunks, build_optimizer(config, chunks, session), mine, lr=0.0)
        sums = load.take(session.device)
        torch.distributed.all_reduce(sums)
        held = sum(p.numel() for chunk in chunks for name, p in chunk.named_parameters() if ".mlp.linear" in name)
        found = {"rows": computed / LAYERS, "weights": held, "routers": balance(sums)}
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))


def measure(layout: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank of a layout found."""
    with tempfile.TemporaryDirectory() as folder:
        num_ranks = LAYOUTS[layout][0]
        torch.multiprocessing.spawn(measure_rank, (layout, options, folder), nprocs=num_ranks)
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]


def main() -> int:
    """Prints a line a layout, or one JSON object last on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4, help="of each modality, where there are several")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    found = {}
    for layout in LAYOUTS:
        ranks = found[layout] = measure(layout, options)
        rows = [rank["rows"] for rank in ranks]
        shown = ", ".join(f"{number:,.0f}" for number in rows)
        weights = max(rank["weights"] for rank in ranks) / 1e6
        print(
            f"{layout:30} rows of each rank and layer {shown:26} busiest over mean "
            f"{max(rows) * len(rows) / sum(rows):.2f}   {weights:5.2f} M feed-forward weights a rank"
        )
    routers = found["several, ep2"][0]["routers"]
    print("routers at their start: " + ", ".join(f"{name} {value:.2f}" for name, value in routers.items()))
    if options.json:
        print(json.dumps({"layouts": found, "options": vars(options), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
