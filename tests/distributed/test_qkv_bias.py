"""The fused projection with a bias per modality: values and gradients against a few lines of plain torch."""

import pytest
import torch

from navil_megatron.blueprint.modality_order import plan_modality_order
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.modality import build_packed_seq_params
from navil_megatron.layers.modality_linear import ModalityColumnParallelLinear
from navil_megatron.models.mcore_config import build_transformer_config
from tests.ranks import run_ranks, start_session, tiny_config

NUM_TOKENS, INPUT, OUTPUT = 10, 4, 6


def project(rank: int, world_size: int, num_text: int, sequence_parallel: bool) -> None:
    parallel = {"tp": world_size, "sequence_parallel": sequence_parallel}
    config = tiny_config(parallel=parallel)
    with start_session(rank, world_size, config) as session:
        transformer = build_transformer_config(config)
        layer = ModalityColumnParallelLinear(
            transformer, TORCH_KERNELS, OUTPUT, INPUT, session.groups.tp, bias=True
        ).double()
        generator = torch.Generator().manual_seed(0)
        whole = {
            name: torch.randn(OUTPUT, *rest, generator=generator, dtype=torch.float64)
            for name, rest in (
                ("text.weight", (INPUT,)),
                ("text.bias", ()),
                ("visual.weight", (INPUT,)),
                ("visual.bias", ()),
            )
        }
        layer.load_state_dict({name: value.chunk(world_size)[rank] for name, value in whole.items()})
        rows = torch.randn(NUM_TOKENS, INPUT, generator=generator, dtype=torch.float64)
        weight = torch.randn(NUM_TOKENS, OUTPUT, generator=generator, dtype=torch.float64)

        mask = torch.arange(NUM_TOKENS).numpy() >= num_text
        plan = build_packed_seq_params(plan_modality_order(mask, [NUM_TOKENS]))
        mine = rows.chunk(world_size)[rank] if sequence_parallel else rows
        output = layer(mine.unsqueeze(1), plan)
        (output.squeeze(1) * weight.chunk(world_size, dim=1)[rank]).sum().backward()

        plain = {name: value.clone().requires_grad_() for name, value in whole.items()}
        expected = torch.cat(
            [
                rows[:num_text] @ plain["text.weight"].T + plain["text.bias"],
                rows[num_text:] @ plain["visual.weight"].T + plain["visual.bias"],
            ]
        )
        (expected * weight).sum().backward()
        torch.testing.assert_close(output.squeeze(1), expected.detach().chunk(world_size, dim=1)[rank])
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, plain[name].grad.chunk(world_size)[rank], msg=name)


@pytest.mark.parametrize("num_text", [0, 4, NUM_TOKENS])
@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_biases_and_their_gradients(num_text: int, world_size: int, sequence_parallel: bool) -> None:
    run_ranks(world_size, project, num_text, sequence_parallel)
