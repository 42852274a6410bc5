"""NaViL: visual encoder, connector, and a decoder with modality experts, as one megatron-core language module.

The first pipeline stage holds encoder, connector and embeddings, the last the LM head. Tokens are modality-major from
the embedding to the head (``blueprint.modality_order``), and the head runs only where a prediction carries loss.
"""

import copy
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from navil_megatron.blueprint.vocabulary import held_rows
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.training import TrainingConfig
from navil_megatron.layers.feature_gather import gather_features
from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.loss_head import LossHead
from navil_megatron.layers.rope import cos_sin, decoder_angles
from navil_megatron.layers.special_tokens import SpecialTokenEmbedding
from navil_megatron.models.connector import Connector
from navil_megatron.models.inputs import FirstStageInputs, ModelInputs
from navil_megatron.models.layer_specs import decoder_block_spec
from navil_megatron.models.sharded_weights import shard_weights
from navil_megatron.models.vision_encoder import VisionEncoder


class NaViLModel(LanguageModule):
    """One pipeline stage of NaViL, or chunk ``vp_stage`` of one under the interleaved schedule.

    Where it does ``pre_process``, it embeds tokens and encodes images; where ``post_process``, it computes the loss.
    """

    def __init__(
        self,
        model: ModelConfig,
        training: TrainingConfig,
        config: TransformerConfig,
        kernels: Kernels,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.model, self.vp_stage = model, vp_stage
        self.loss_chunk_tokens = training.loss_chunk_tokens
        self.pre_process, self.post_process = pre_process, post_process
        # The ranks that share a row share its images. A group of its own is a communicator of its own.
        self.row_group = pg_collection.tp_cp if self.cp_group.size() > 1 else self.tp_group
        self.share_embeddings_and_output_weights = model.language.tied_embeddings
        if pre_process:
            self.vision_encoder = VisionEncoder(model.vision, config, kernels, training.recomputes("encoder"))
            self.connector = Connector(model, config)
            for parameter in (*self.vision_encoder.parameters(), *self.connector.parameters()):
                parameter.sum_gradient_over_tensor_parallel = True
            self.embedding = self._build_embedding()
            self.special_token_embedding = SpecialTokenEmbedding(model, config.params_dtype)
        self.decoder = TransformerBlock(
            config,
            decoder_block_spec(
                model.language, config, kernels, training.recompute == "full", vp_stage, self.pp_group.rank()
            ),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = self._build_output_layer(kernels)
        self.setup_embeddings_and_output_layer()

    def _build_embedding(self) -> LanguageModelEmbedding:
        return LanguageModelEmbedding(
            config=self.config,
            vocab_size=held_rows(self.model.language.vocab_size, self.tp_group.size()) * self.tp_group.size(),
            max_sequence_length=self.model.language.max_position_embeddings,
            position_embedding_type="rope",
            scatter_to_sequence_parallel=False,
            tp_group=self.tp_group,
        )

    def _build_output_layer(self, kernels: Kernels) -> LossHead:
        # The head reads rows that were already gathered and picked, so it must not gather the sequence again.
        config = copy.copy(self.config)
        config.sequence_parallel = False
        return LossHead(
            self.model.language.hidden_size,
            self.model.language.vocab_size,
            kernels,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=self.tp_group,
        )

    @property
    def first_layer(self) -> int:
        """Decoder layers before the chunk's first."""
        return self.decoder.layers[0].layer_number - 1 if len(self.decoder.layers) else 0

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """The weights for core's checkpoints, by the table of parameters instead of module by module."""
        assert not prefix and not sharded_offsets
        state = self.state_dict(keep_vars=True)
        weights = {name: weight for name, weight in state.items() if not name.endswith("_extra_state")}
        routed = self.config.num_moe_experts is not None
        return shard_weights(weights, self.model, self.pg_collection, self.first_layer, routed)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the activations that the previous stage sent (megatron-core's schedules call this)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """One microbatch.

        Returns:
            On the last stage the cross entropy of each predicted position, [k] float32, or its logits [k, v] where
            ``labels`` is None; else the activations for the next stage.
        """
        rotary = cos_sin(decoder_angles(inputs.position_ids, self.model.language))
        hidden_states = self.decoder(
            hidden_states=self.embed(inputs.first_stage) if inputs.first_stage and self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=inputs.packed_seq_params,
        )
        return self.predict(hidden_states, inputs) if self.post_process else hidden_states

    def embed(self, inputs: FirstStageInputs) -> Tensor:
        """Text table, special tokens, visual features. -> [t, 1, h], or [t/tp, 1, h] under sequence parallelism."""
        features = self.encode_images(inputs)  # first, as registered: gathers of weights follow that order
        embeddings = self.embedding(input_ids=inputs.input_ids.unsqueeze(0), position_ids=None).squeeze(1)
        embeddings = self.special_token_embedding(embeddings, inputs.input_ids)
        embeddings = embeddings.index_copy(0, inputs.image_positions, features).unsqueeze(1)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.tp_group)
        return embeddings

    def encode_images(self, inputs: FirstStageInputs) -> Tensor:
        """Visual features of every image token in row order, [m, h]. Runs without an image too: same collectives."""
        features = self.connector(self.vision_encoder(inputs.encoder))
        gathered = gather_features(features, inputs.gathered_tokens, self.row_group, self.cp_group)
        return gathered.index_select(0, inputs.feature_index)

    def predict(self, hidden_states: Tensor, inputs: ModelInputs) -> Tensor:
        """LM head and cross entropy at the predicted positions alone."""
        if self.config.sequence_parallel:
            # Each rank's head computes part of the vocabulary for all rows; its input gradient is summed by the head.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
            )
        picked = hidden_states.index_select(0, inputs.loss_positions).squeeze(1)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(picked, weight, inputs.labels, self.loss_chunk_tokens)
