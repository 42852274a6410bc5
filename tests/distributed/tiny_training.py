"""A small tensor-parallel model and its training loop, for the tests of optimizer and checkpoints."""

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.run import NaViLConfig
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, set_learning_rate, wrap_ddp

WIDTH, INNER, ROWS = 8, 12, 4


class TinyModel(MegatronModule):
    """Norm, linear up (split by rows), GELU, linear down (split by columns): every kind of sharding in four lines.

    With experts the output is also scaled by a table of numbers, split over the expert-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, session: Session, frozen: bool = False, num_experts: int | None = None
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        # Core's gradient reduction asks every stage of a pipeline for these.
        self.pre_process, self.post_process = session.is_first_stage, session.is_last_stage
        self.share_embeddings_and_output_weights = False
        common: dict[str, Any] = {
            "config": config,
            "init_method": torch.nn.init.zeros_,
            "bias": True,
            "skip_bias_add": False,
            "tp_group": session.groups.tp,
        }
        self.norm = torch.nn.LayerNorm(WIDTH, dtype=config.params_dtype)
        self.up = ColumnParallelLinear(WIDTH, INNER, gather_output=False, **common)
        self.down = RowParallelLinear(INNER, WIDTH, input_is_parallel=True, **common)
        self.session = session
        self.experts: torch.nn.Parameter | None = None
        if num_experts is not None:
            self.experts = torch.nn.Parameter(
                torch.ones(num_experts // session.groups.ep.size(), 2, dtype=config.params_dtype)
            )
            # Core's mark of a parameter that is reduced over other ranks than the dense ones.
            self.experts.allreduce = session.groups.ep.size() == 1  # type: ignore[attr-defined]
        self._draw(session)
        self.requires_grad_(not frozen)

    def _draw(self, session: Session) -> None:
        """The same whole weights in every layout."""
        generator = torch.Generator().manual_seed(7)
        up = torch.randn(INNER, WIDTH, generator=generator)
        down = torch.randn(WIDTH, INNER, generator=generator)
        self.up.weight.data.copy_(up.chunk(session.groups.tp.size(), 0)[session.groups.tp.rank()])
        self.down.weight.data.copy_(down.chunk(session.groups.tp.size(), 1)[session.groups.tp.rank()])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output = self.down(torch.nn.functional.gelu(self.up(self.norm(rows))[0]))[0]
        return output if self.experts is None else output * (1 + self.experts.sum())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Core's own, and the experts split along their first axis."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.experts is not None:
            offset = (0, self.session.groups.ep.rank(), self.session.groups.ep.size())
            state[f"{prefix}experts"] = ShardedTensor.from_rank_offsets(f"{prefix}experts", self.experts, offset)
        return state


class Run:
    """Model, optimizer and a data order that is a function of the step."""

    def __init__(
        self, config: NaViLConfig, session: Session, frozen: bool = False, num_experts: int | None = None
    ) -> None:
        dtype = torch.bfloat16 if config.precision.type == "bf16" else torch.float32
        transformer = TransformerConfig(
            num_layers=1,
            hidden_size=WIDTH,
            num_attention_heads=2,
            tensor_model_parallel_size=session.groups.tp.size(),
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=False,
        )
        self.session, self.dtype = session, dtype
        self.chunks: list[DistributedDataParallel] = wrap_ddp(
            config, session, [TinyModel(transformer, session, frozen, num_experts)]
        )
        self.optimizer: ChainedOptimizer = build_optimizer(config, self.chunks, session)
        self.lr = config.optimizer.lr
        self.norms: list[float] = []

    def step(self, number: int) -> None:
        """One update on this rank's share of the step's rows."""
        generator = torch.Generator().manual_seed(number)
        rows = torch.randn(ROWS, 1, WIDTH, generator=generator).to(self.dtype)
        mine = rows.chunk(self.session.groups.dp.size())[self.session.groups.dp.rank()]
        (model,) = self.chunks
        model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = (model(mine).float() ** 2).sum()
        if loss.requires_grad:
            loss.backward()
        finalize_model_grads([model], torch.tensor(len(mine), dtype=torch.int), pg_collection=self.session.groups)
        set_learning_rate(self.optimizer, self.lr)
        done, norm, _ = self.optimizer.step()
        assert done
        self.norms.append(float(norm))

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's weights."""
        return {name: weight.detach().clone() for name, weight in self.chunks[0].module.named_parameters()}


def manager_of(config: NaViLConfig, session: Session, num_experts: int | None = None) -> CheckpointManager:
    """Checkpoints of a run whose model is the tiny one."""
    manager = CheckpointManager(config, session)
    manager.shapes = {
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "up.weight": (INNER, WIDTH),
        "up.bias": (INNER,),
        "down.weight": (WIDTH, INNER),
        "down.bias": (WIDTH,),
        **({} if num_experts is None else {"experts": (num_experts, 2)}),
    }
    return manager
