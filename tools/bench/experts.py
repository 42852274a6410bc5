"""Modality experts in modality-major rows against the other ways to route by modality, forward and backward.

    python tools/bench/experts.py [--json] [--precision fp32|bf16] [--tokens T] [--layers L] [--rounds N]

- ``mask``: each modality's rows are picked by a boolean mask, and its results written back by it.
- ``index``: the same with row numbers that are made once, so that nothing is searched (or waited for on a GPU).
- ``released``: the authors' way: text projections on all rows and visual ones over them, feed-forward by mask.
- ``moe_layer``: megatron-core's ``MoELayer`` with two experts and a router that knows the modality, all-to-all
  dispatcher in a group of one; its experts are Transformer Engine's grouped GEMM where the run's kernels are, else one
  product each. In a decoder its projections go by ``index``.

Compared are one feed-forward network, one query-key-value projection, and a whole decoder. Peers have their rows in the
order that attention wants, so theirs needs no gather; ours pays for four a layer. Four rows in five are visual. Norms
of heads are left out. All ways have the same weights and must first give the same output and gradients.

Figures are seconds of the peer over ours, above 1 ours is faster: median and middle half of the rounds (``turns.py``).
"""

import argparse
import dataclasses
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from small_run import mixed_row, small_config
from torch import Tensor, nn
from turns import assert_near, ratio, show, take_turns

import navil_megatron.runtime  # noqa: F401  quiets core's import-time warnings
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.kernels.provider import choose_kernels
from navil_megatron.layers.attention_heads import AttentionHeads
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.modality_mlp import ModalityMLP
from navil_megatron.layers.rope import cos_sin, decoder_angles
from navil_megatron.layers.swiglu import SwiGLU
from navil_megatron.models.build import initialize_weights
from navil_megatron.models.inputs import ModelInputs
from navil_megatron.models.mcore_config import build_transformer_config
from navil_megatron.models.navil_model import NaViLModel
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs

type Rows = Callable[[Tensor], Tensor]
"""[t, in] -> [t, out]."""
type Combine = Callable[[Tensor, Rows, Rows], Tensor]
"""Rows, what text rows go through, what visual rows go through."""

PLAIN = {"family": "internlm2", "qk_norm": False, "composed_visual_output_projection": False}
"""A decoder of which every part has a peer."""


def by_mask(is_visual: Tensor) -> Combine:
    """Each modality's rows picked and written back by the mask."""

    def combine(rows: Tensor, text: Rows, visual: Rows) -> Tensor:
        from_text = text(rows[~is_visual])
        output = from_text.new_empty(rows.shape[0], from_text.shape[1])
        output[~is_visual] = from_text
        output[is_visual] = visual(rows[is_visual])
        return output

    return combine


def by_index(is_visual: Tensor) -> Combine:
    """Each modality's rows picked and put back by their numbers."""
    where = [mask.nonzero().squeeze(1) for mask in (~is_visual, is_visual)]
    back = torch.cat(where).argsort()

    def combine(rows: Tensor, text: Rows, visual: Rows) -> Tensor:
        outputs = [run(rows.index_select(0, numbers)) for run, numbers in zip((text, visual), where, strict=True)]
        return torch.cat(outputs).index_select(0, back)

    return combine


def everywhere(is_visual: Tensor) -> Combine:
    """Text weights on all rows, visual ones written over them."""

    def combine(rows: Tensor, text: Rows, visual: Rows) -> Tensor:
        output = text(rows)
        output[is_visual] = visual(rows[is_visual])
        return output

    return combine


class PeerMLP(nn.Module):
    """The experts of one of our feed-forward networks, each from end to end on its own rows."""

    def __init__(self, mlp: ModalityMLP, combine: Combine):
        super().__init__()
        self.linear_fc1, self.linear_fc2, self.kernels = mlp.linear_fc1, mlp.linear_fc2, mlp.kernels
        self.combine = combine

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """[t, 1, h] -> the same."""
        first, second = self.linear_fc1, self.linear_fc2
        text, visual = (
            lambda rows, m=name: second.get_submodule(m)(SwiGLU.apply(first.get_submodule(m)(rows), None, self.kernels))
            for name in ("text", "visual")
        )
        return self.combine(hidden_states.flatten(0, 1), text, visual).view_as(hidden_states)


class RouterByModality(nn.Module):
    """Core's router with what the mask says in place of a gate."""

    def __init__(self, is_visual: Tensor, dtype: torch.dtype):
        super().__init__()
        self.routing_map = torch.stack([~is_visual, is_visual], dim=1)
        self.probabilities = self.routing_map.to(dtype)

    def forward(self, *_: Any) -> tuple[Tensor, Tensor]:
        """Probabilities and routing map, [t, 2]."""
        return self.probabilities, self.routing_map

    def set_layer_number(self, _: int) -> None:
        """Core tells; nothing here asks."""


class MoE(nn.Module):
    """Core's ``MoELayer`` with the weights of one of our feed-forward networks, in its place in a layer."""

    def __init__(self, mlp: ModalityMLP, session: Session, is_visual: Tensor, engine: bool):
        super().__init__()
        config = dataclasses.replace(
            mlp.config,
            num_moe_experts=2,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            moe_token_dispatcher_type="alltoall",
            moe_ffn_hidden_size=mlp.config.ffn_hidden_size,
            moe_grouped_gemm=engine,
            # What core has fused for a GPU, it may use.
            moe_permute_fusion=engine,
            bias_activation_fusion=session.device.type == "cuda",
        )
        builder = get_moe_module_spec(use_te=engine, num_experts=2, moe_grouped_gemm=engine)
        with torch.device(session.device):
            self.layer = builder(config=config, pg_collection=session.groups)
        self.layer.router = RouterByModality(is_visual, config.params_dtype)
        self.weights: dict[str, Tensor] = {}
        for number, modality in enumerate(("text", "visual")):
            for name in ("linear_fc1", "linear_fc2"):
                experts = self.layer.experts
                weight = (
                    getattr(getattr(experts, name), f"weight{number}")
                    if engine
                    else getattr(experts.local_experts[number], name).weight
                )
                weight.data.copy_(getattr(mlp, name).get_submodule(modality).weight.data)
                self.weights[f"{name}.{modality}.weight"] = weight

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """[t, 1, h] -> the same."""
        output: Tensor = self.layer(hidden_states)[0]
        return output


@dataclass(frozen=True)
class Way:
    """One way to compute a part."""

    run: Rows
    """[t, 1, h] -> [t, 1, out]."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """By our names."""


@dataclass(frozen=True)
class Bench:
    """A model of ours, a row for it, and how the peers see that row."""

    config: NaViLConfig
    session: Session
    model: NaViLModel
    inputs: ModelInputs

    @property
    def packed(self) -> NaViLPackedSeqParams:
        """The modality plan."""
        return self.inputs.packed_seq_params

    @property
    def is_visual(self) -> Tensor:
        """[t] bool: the mask, in the peers' order."""
        return self.packed.to_attention >= self.packed.num_text_tokens

    @property
    def engine(self) -> bool:
        """Whether Transformer Engine computes."""
        return self.config.runtime.kernels == "transformer_engine"


def feed_forwards(bench: Bench) -> dict[str, Way]:
    """One feed-forward network."""
    mlp = bench.model.decoder.layers[0].mlp
    weights, moe = dict(mlp.named_parameters()), MoE(mlp, bench.session, bench.is_visual, bench.engine)
    return {
        "ours": Way(lambda x: mlp(x, bench.packed), weights),
        "mask": Way(PeerMLP(mlp, by_mask(bench.is_visual)), weights),
        "index": Way(PeerMLP(mlp, by_index(bench.is_visual)), weights),
        "moe_layer": Way(moe, moe.weights),
    }


def projections(bench: Bench) -> dict[str, Way]:
    """One query-key-value projection, in the ways that exist for it."""
    linear = bench.model.decoder.layers[0].self_attention.linear_qkv
    weights = dict(linear.named_parameters())

    def peer(combine: Combine) -> Way:
        return Way(lambda x: combine(x.flatten(0, 1), linear.text, linear.visual).unsqueeze(1), weights)

    return {
        "ours": Way(lambda x: linear(x, bench.packed), weights),
        "mask": peer(by_mask(bench.is_visual)),
        "index": peer(by_index(bench.is_visual)),
        "released": peer(everywhere(bench.is_visual)),
    }


def decoders(bench: Bench) -> dict[str, Way]:
    """The decoder with every projection and feed-forward network in each way."""
    mask, index = by_mask(bench.is_visual), by_index(bench.is_visual)
    return {
        "ours": _decoder(bench, bench.model),
        "mask": _peer(bench, mask, mask),
        "index": _peer(bench, index, index),
        "released": _peer(bench, everywhere(bench.is_visual), mask),
        "moe_layer": _peer(bench, index, None),
    }


def _peer(bench: Bench, projection: Combine, feed_forward: Combine | None) -> Way:
    """A decoder with our weights; ``feed_forward`` None: core's ``MoELayer``."""

    def product(text: nn.Module, visual: nn.Module) -> Callable[..., Tensor]:
        return lambda rows, *_: projection(rows, text, visual)

    def attend(attention: Any, qkv: Tensor, _: None, rotary: Tensor, packed: NaViLPackedSeqParams) -> Tensor:
        heads = qkv.view(-1, attention.num_groups, sum(attention.fused.sizes), attention.head_dim)
        query, key, value = AttentionHeads.apply(
            heads, None, None, 0.0, None, None, rotary, attention.fused, attention.kernels
        )
        segments = {"groups": packed.attention_groups, "cu_seqlens": packed.cu_seqlens_q}
        context: Tensor = attention.kernels.segment_attention(
            query, key, value, max_seqlen=packed.max_seqlen_q, causal=True, **segments
        )
        return context

    config = bench.config
    with torch.device(bench.session.device):
        kernels = dataclasses.replace(choose_kernels(config), modality_product=product)
        transformer = build_transformer_config(config)
        model = NaViLModel(config.model, config.training, transformer, kernels, bench.session.groups)
    model.load_state_dict(bench.model.state_dict())
    renamed = {}
    for number, layer in enumerate(model.decoder.layers):
        layer.self_attention._attend = types.MethodType(attend, layer.self_attention)
        if feed_forward is not None:
            layer.mlp = PeerMLP(layer.mlp, feed_forward)
        else:
            layer.mlp = MoE(layer.mlp, bench.session, bench.is_visual, bench.engine)
            renamed |= {f"layers.{number}.mlp.{name}": weight for name, weight in layer.mlp.weights.items()}
    way = _decoder(bench, model)
    return Way(way.run, {**way.weights, **renamed})


def _decoder(bench: Bench, model: NaViLModel) -> Way:
    rotary = cos_sin(decoder_angles(bench.inputs.position_ids, bench.config.model.language))
    weights = {name: p for name, p in model.decoder.named_parameters() if ".mlp.layer." not in name}
    return Way(lambda x: model.decoder(x, None, rotary_pos_emb=rotary, packed_seq_params=bench.packed), weights)


PARTS: dict[str, Callable[[Bench], dict[str, Way]]] = {
    "feed_forward": feed_forwards,
    "qkv_projection": projections,
    "decoder": decoders,
}


def compare(config: NaViLConfig, row: Microbatch, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each part and peer, seconds of the peer over ours.

    Raises:
        AssertionError: A peer's output or a gradient is not ours.
    """
    language = dataclasses.replace(config.model.language, **PLAIN)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, language=language))
    found = {}
    with Session.start(config) as session:
        with torch.device(session.device):
            transformer = build_transformer_config(config)
            model = NaViLModel(config.model, config.training, transformer, choose_kernels(config), session.groups)
        initialize_weights(model, config.model, seed=0)
        bench = Bench(config, session, model, session.platform.upload(build_model_inputs(row))())
        for part, ways_of in PARTS.items():
            found[part] = race(ways_of(bench), bench, rounds)
    return found


def race(ways: dict[str, Way], bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """All ways in turns, after each has shown that it gives what ours gives."""
    device, dtype, order = bench.session.device, bench.model.config.params_dtype, bench.packed.to_attention
    generator = torch.Generator(device).manual_seed(1)
    width = bench.config.model.language.hidden_size
    x = torch.randn(order.numel(), 1, width, device=device, dtype=dtype, generator=generator)
    gradient = torch.randn(ways["ours"].run(x).shape, device=device, dtype=dtype, generator=generator)
    given = {name: (x, gradient) if name == "ours" else (x[order], gradient[order]) for name in ways}

    def step(name: str) -> tuple[Tensor, Tensor]:
        """Output and the gradient of the input."""
        way, (rows, wanted) = ways[name], given[name]
        rows = rows.detach().requires_grad_()
        for weight in way.weights.values():
            weight.grad = None
        output = way.run(rows)
        output.backward(wanted)
        return output.detach(), rows.grad

    ours = step("ours")
    expected = {name: weight.grad.clone() for name, weight in ways["ours"].weights.items()}
    for name in ways.keys() - {"ours"}:
        for found, wanted in zip(step(name), ours, strict=True):
            assert_near(found, wanted[order], f"{name}: rows")
        assert ways[name].weights.keys() == expected.keys(), f"{name} has other weights"
        for weight, wanted in expected.items():
            assert_near(ways[name].weights[weight].grad, wanted, f"{name}: gradient of {weight}")
    seconds = take_turns({name: lambda n=name: step(n) for name in ways}, rounds, device)
    return {name: ratio(seconds["ours"], theirs) for name, theirs in seconds.items() if name != "ours"}


def main() -> int:
    """Prints a table, or one JSON object last on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the row")
    parser.add_argument("--layers", type=int, default=2, help="layers of the decoder")
    parser.add_argument("--rounds", type=int, default=11, help="counted rounds")
    options = parser.parse_args()
    config = small_config(layers=options.layers, tokens=options.tokens, precision=options.precision)
    found = compare(config, mixed_row(config), options.rounds)
    for part, peers in found.items():
        for name, figures in peers.items():
            print(show(f"{part} {name}", figures))
    if options.json:
        medians = {part: {name: f["median"] for name, f in peers.items()} for part, peers in found.items()}
        print(json.dumps({**medians, "details": found, "options": vars(options), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
