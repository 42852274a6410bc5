"""Planned activation memory against what a GPU allocates for one microbatch of a model with wide layers, in bf16.

Not yet run on a GPU: the planner's text says so until this passes.
"""

from typing import Any

import pytest
import torch

from navil_megatron.blueprint.workload import Workload
from navil_megatron.models.build import build_model
from navil_megatron.planner.memory import ActivationModel
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs
from tests.oracle import oracle_config
from tests.tolerances import ACTIVATION_BYTES_ON_GPU
from tools.bench.synthetic import synthetic_microbatch

WIDE = {
    "language": {
        "num_layers": 4,
        "hidden_size": 1024,
        "ffn_hidden_size": 4096,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "head_dim": 128,
    },
    "vision": {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 2048, "num_attention_heads": 8},
}


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_forward_allocates_what_is_planned(recompute: str) -> None:
    sections: dict[str, Any] = {
        "model": WIDE,
        "data": {"seq_length": 4096},
        "training": {"recompute": recompute},
        "precision": {"type": "bf16"},
        "runtime": {"device": "cuda"},
    }
    config = oracle_config(**sections)
    samples = [(256, ((32, 48),)) for _ in range(5)]
    row = synthetic_microbatch(config.model, 4096, 1, [samples])
    with Session.start(config) as session:
        (model,) = build_model(config, session.groups, session.device)
        inputs = session.platform.upload(build_model_inputs(row))()
        before = torch.cuda.memory_allocated()
        losses = model(inputs)
        allocated = torch.cuda.memory_allocated() - before
        assert losses.requires_grad
    visual = int(row.visual_token_mask.sum())
    work = Workload(
        text_tokens=row.input_ids.size - visual,
        visual_tokens=visual,
        segment_lengths=row.segment_lengths,
        grids=row.workload.grids,
        num_predictions=inputs.loss_positions.numel(),
    )
    planned = ActivationModel(config, work, fused=True)
    total = planned.encoder() + planned.embedding() + planned.shared_by_layers() + planned.final_norm()
    total += config.model.language.num_layers * planned.layer() + planned.head()
    assert total == pytest.approx(allocated, rel=ACTIVATION_BYTES_ON_GPU)
