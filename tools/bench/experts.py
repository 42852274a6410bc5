"""Modality experts in modality-major rows against the other ways to route by modality, forward and backward.

    python tools/bench/experts.py [--json] [--precision fp32|bf16] [--tokens T] [--layers L] [--rounds N]

- ``mask``: each modality's rows are picked by a boolean mask, multiplied, and written back by it.
- ``everywhere``: text weights on all rows, then visual ones on the visual rows, written over them by the mask. The
  released code works like this.
- ``moe_layer``: megatron-core's ``MoELayer`` with two experts and a router that knows the modality, all-to-all
  dispatcher in a group of one (Transformer Engine's grouped GEMM where it is installed, else one product an expert).

Compared are one feed-forward network, one query-key-value projection, and a whole decoder; there attention and its
gathers are ours on all sides and ``moe_layer`` has ``mask`` projections. Four rows in five are visual. Weights are the
same, and so is what comes out, which is checked first. Ratios are seconds of the peer over ours, medians over rounds in
which all take turns; above 1 ours is faster. The peers' masks are made once and are sorted, which favours them.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from small_run import mixed_row, small_config
from torch import Tensor, nn

import navil_megatron.runtime  # noqa: F401  quiets core's import-time warnings
from navil_megatron.config.schema import NaViLConfig
from navil_megatron.kernels.provider import Kernels, choose_kernels
from navil_megatron.layers.modality_mlp import ModalityMLP, SwiGLU
from navil_megatron.layers.rope import cos_sin, decoder_angles
from navil_megatron.models.build import initialize_weights
from navil_megatron.models.inputs import ModelInputs
from navil_megatron.models.mcore_config import build_transformer_config
from navil_megatron.models.navil_model import NaViLModel
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs
from tests.tolerances import BF16_KERNELS, RANKS

type Pass = Callable[[Tensor], Tensor]
"""[t, 1, h] -> [t, 1, out]."""
type Product = Callable[..., Tensor]


def by_mask(is_visual: Tensor) -> Product:
    """Each modality's rows picked and written back by the mask."""

    def product(rows: Tensor, text: nn.Module, visual: nn.Module, *_: Any) -> Tensor:
        from_text = text(rows[~is_visual])
        output = from_text.new_empty(rows.shape[0], from_text.shape[1])
        output[~is_visual] = from_text
        output[is_visual] = visual(rows[is_visual])
        return output

    return product


def everywhere(is_visual: Tensor) -> Product:
    """Text weights on all rows, visual ones written over them."""

    def product(rows: Tensor, text: nn.Module, visual: nn.Module, *_: Any) -> Tensor:
        output = text(rows)
        output[is_visual] = visual(rows[is_visual])
        return output

    return product


class RouterByModality(nn.Module):
    """Core's router with what the mask says in place of a gate."""

    def __init__(self, is_visual: Tensor, dtype: torch.dtype):
        super().__init__()
        self.probabilities = torch.stack([~is_visual, is_visual], dim=1).to(dtype)
        self.routing_map = self.probabilities.bool()

    def forward(self, *_: Any) -> tuple[Tensor, Tensor]:
        """Probabilities and routing map, [t, 2]."""
        return self.probabilities, self.routing_map

    def set_layer_number(self, _: int) -> None:
        """Core tells; nothing here asks."""


class MoE(nn.Module):
    """Core's ``MoELayer`` with the weights of one of our feed-forward networks, in its place in a layer."""

    def __init__(self, mlp: ModalityMLP, session: Session, is_visual: Tensor):
        super().__init__()
        engine = torch.cuda.is_available()
        config = dataclasses.replace(
            mlp.config,
            num_moe_experts=2,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=engine,
        )
        builder = get_moe_module_spec(use_te=engine, num_experts=2, moe_grouped_gemm=engine)
        self.layer = builder(config=config, pg_collection=session.groups)
        self.layer.router = RouterByModality(is_visual, config.params_dtype)
        for number, modality in enumerate(("text", "visual")):
            for name in ("linear_fc1", "linear_fc2"):
                weight = getattr(mlp, name).get_submodule(modality).weight
                experts = self.layer.experts
                theirs = (
                    getattr(getattr(experts, name), f"weight{number}")
                    if engine
                    else getattr(experts.local_experts[number], name).weight
                )
                theirs.data.copy_(weight.data)

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """[t, 1, h] -> the same."""
        output: Tensor = self.layer(hidden_states)[0]
        return output


def build(config: NaViLConfig, session: Session, kernels: Kernels) -> NaViLModel:
    """A whole model on one rank, with these kernels."""
    with torch.device(session.device):
        model = NaViLModel(config.model, config.training, build_transformer_config(config), kernels, session.groups)
    initialize_weights(model, config.model, seed=0)
    return model


def visual_rows(inputs: ModelInputs) -> Tensor:
    """[t] bool: the mask, in modality-major order."""
    packed = inputs.packed_seq_params
    return torch.arange(packed.num_packed_tokens, device=packed.to_attention.device) >= packed.num_text_tokens


def feed_forwards(run: NaViLConfig, model: NaViLModel, inputs: ModelInputs, session: Session) -> dict[str, Pass]:
    """One feed-forward network in every way."""
    mlp, is_visual = model.decoder.layers[0].mlp, visual_rows(inputs)

    def through(product: Product) -> Pass:
        first, second = mlp.linear_fc1, mlp.linear_fc2

        def feed_forward(x: Tensor) -> Tensor:
            gate_up = product(x.flatten(0, 1), first.text, first.visual)
            return product(SwiGLU.apply(gate_up), second.text, second.visual).view(x.shape)

        return feed_forward

    return {
        "ours": lambda x: mlp(x, inputs.packed_seq_params),
        "mask": through(by_mask(is_visual)),
        "everywhere": through(everywhere(is_visual)),
        "moe_layer": MoE(mlp, session, is_visual),
    }


def projections(run: NaViLConfig, model: NaViLModel, inputs: ModelInputs, session: Session) -> dict[str, Pass]:
    """One query-key-value projection in the ways that exist for it."""
    linear, is_visual = model.decoder.layers[0].self_attention.linear_qkv, visual_rows(inputs)

    def through(product: Product) -> Pass:
        return lambda x: product(x.flatten(0, 1), linear.text, linear.visual).unsqueeze(1)

    return {
        "ours": lambda x: linear(x, inputs.packed_seq_params),
        "mask": through(by_mask(is_visual)),
        "everywhere": through(everywhere(is_visual)),
    }


def decoders(run: NaViLConfig, model: NaViLModel, inputs: ModelInputs, session: Session) -> dict[str, Pass]:
    """The decoder with every projection and feed-forward network in each way."""
    is_visual = visual_rows(inputs)
    rotary = cos_sin(decoder_angles(inputs.position_ids, run.model.language), model.config.params_dtype)

    def peer(product: Product, moe: bool = False) -> NaViLModel:
        other = build(run, session, dataclasses.replace(choose_kernels(run), modality_product=product))
        other.load_state_dict(model.state_dict())
        for layer, source in zip(other.decoder.layers, model.decoder.layers, strict=True):
            if moe:
                layer.mlp = MoE(source.mlp, session, is_visual)
        return other

    def through(of: NaViLModel) -> Pass:
        return lambda x: of.decoder(x, None, rotary_pos_emb=rotary, packed_seq_params=inputs.packed_seq_params)

    return {
        "ours": through(model),
        "mask": through(peer(by_mask(is_visual))),
        "everywhere": through(peer(everywhere(is_visual))),
        "moe_layer": through(peer(by_mask(is_visual), moe=True)),
    }


PARTS = {"feed_forward": feed_forwards, "qkv_projection": projections, "decoder": decoders}


def compare(config: NaViLConfig, rounds: int) -> dict[str, dict[str, Any]]:
    """For each part and peer, seconds of the peer over ours."""
    found: dict[str, dict[str, Any]] = {}
    with Session.start(config) as session:
        model = build(config, session, choose_kernels(config))
        inputs = build_model_inputs(mixed_row(config), config.model, session.device)
        shape = (config.microbatch_tokens, 1, config.model.language.hidden_size)
        rows = torch.randn(shape, device=session.device, dtype=model.config.params_dtype)
        for part, ways in PARTS.items():
            found[part] = race(ways(config, model, inputs, session), rows, session, rounds)
    return found


def race(passes: dict[str, Pass], rows: Tensor, session: Session, rounds: int) -> dict[str, Any]:
    """All ways in turns, after each has shown that it gives what ours gives."""
    tolerance = RANKS if rows.dtype == torch.float32 else BF16_KERNELS
    expected = passes["ours"](rows).detach()
    for name, run in passes.items():
        torch.testing.assert_close(run(rows).detach(), expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    gradient = torch.randn_like(expected)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            x = rows.clone().requires_grad_()
            session.platform.synchronize()
            started = time.perf_counter()
            run(x).backward(gradient)
            session.platform.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: [peer / ours for peer, ours in zip(theirs, seconds["ours"], strict=True)]
        for name, theirs in seconds.items()
        if name != "ours"
    }
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ours_seconds": statistics.median(seconds["ours"]),
            "theirs_seconds": statistics.median(seconds[name]),
        }
        for name, values in ratios.items()
    }


def main() -> int:
    """Prints a table, or one JSON object last on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the row")
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = small_config(
        layers=options.layers, tokens=options.tokens, precision=options.precision, threads=options.threads
    )
    found = compare(config, options.rounds)
    for part, peers in found.items():
        for name, figures in peers.items():
            print(
                f"{part:16} {name:12} {figures['median']:.2f}x  ({figures['min']:.2f} to {figures['max']:.2f})  "
                f"ours {figures['ours_seconds']:.3f} s, peer {figures['theirs_seconds']:.3f} s"
            )
    if options.json:
        medians = {part: {name: f["median"] for name, f in peers.items()} for part, peers in found.items()}
        print(json.dumps({**medians, "details": found, "options": vars(options), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
