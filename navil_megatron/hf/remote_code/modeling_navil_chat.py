"""NaViL: visual encoder, pixel shuffle and connector, special-token embeddings, decoder with modality experts.

A single-device model in plain torch and transformers with the state-dict keys of the authors' release. Decoding
follows their code: the prompt's image tokens and ``<img>`` use the visual experts and special tokens their own
embedding; a generated token, special or not, is embedded from the plain table and uses the text experts.
Shapes: b batch, s tokens, h hidden, p patches, w encoder width.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_navil_chat import NaViLChatConfig
from .modeling_language_ve import LANGUAGE_MODELS, DecoderContext, NaViLRMSNorm, rotary_tables
from .modeling_navil_vit import NaViLVisionModelAnyRes, NaViLVisionRMSNorm

SPECIAL_TOKENS = (
    "</box>",
    "<box>",
    "<IMG_CONTEXT>",
    "</img>",
    "<img>",
    "</quad>",
    "<quad>",
    "</ref>",
    "<ref>",
    "<img_uncond>",
    "<IMG_LINE_BREAK>",
    "<IMG_FRAME_BREAK>",
)
"""The 12 special tokens in the row order of ``special_token_embedding`` and of ``config.special_token_ids``."""
CONTEXT, IMAGE_START = SPECIAL_TOKENS.index("<IMG_CONTEXT>"), SPECIAL_TOKENS.index("<img>")
IGNORED_LABEL = -100
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls keys and values of earlier tokens, in what it hands over and takes back."""


class NaViL(PreTrainedModel, GenerationMixin):
    """Images and text in, next-token logits out."""

    config_class = NaViLChatConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _auto_class = "AutoModelForImageTextToText"  # save_pretrained copies this code; transformers 4 would leave it out
    _supports_cache_class = True  # asked by transformers 4
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement: ClassVar[list[str]] = [CACHE]
    _no_split_modules: ClassVar[list[str]] = [
        "NaViLVisionEncoderLayer",
        *sorted({model.layer_class.__name__ for model in LANGUAGE_MODELS.values()}),
    ]

    def __init__(self, config: NaViLChatConfig) -> None:
        """Builds the model that ``config`` describes."""
        super().__init__(config)
        llm, vision = config.llm_config, config.vision_config
        name = llm.architectures[0]
        if name not in LANGUAGE_MODELS:
            raise ValueError(f"llm_config.architectures is {name!r}, expected one of {', '.join(LANGUAGE_MODELS)}")
        self.merge_size = round(1 / config.downsample_ratio)
        merged = vision.hidden_size * self.merge_size**2
        self.vision_model = NaViLVisionModelAnyRes(vision)
        self.language_model = LANGUAGE_MODELS[name](llm)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged, eps=config.connector_norm_eps),
            nn.Linear(merged, llm.hidden_size),
            nn.GELU(),
            nn.Linear(llm.hidden_size, llm.hidden_size),
        )
        self.special_token_embedding = nn.Embedding(len(SPECIAL_TOKENS), llm.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.llm_config.initializer_range)
        if isinstance(module, (nn.LayerNorm, NaViLRMSNorm, NaViLVisionRMSNorm)):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        """The plain token table."""
        return self.language_model.embedding

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head; none where it is tied."""
        return getattr(self.language_model, self.language_model.head_name, None)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the plain token table, e.g. by a longer one."""
        self.language_model.model[self.language_model.embedding_name] = value

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        setattr(self.language_model, self.language_model.head_name, value)

    def init_special_token_ids(self, tokenizer: Any) -> None:
        """Takes the ids of the special tokens from a tokenizer; needed where config.json lacks them."""
        ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        unknown = (None, tokenizer.unk_token_id)
        missing = [token for token, index in zip(SPECIAL_TOKENS, ids, strict=True) if index in unknown]
        if missing:
            raise ValueError(f"the tokenizer does not know {', '.join(missing)}")
        self.config.special_token_ids = ids

    def extract_feature(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches [p, ...] and grids [num_scales, 3] -> visual tokens [p / merge_size**2, h]."""
        patches = self.vision_model(pixel_values, image_grid_thw)
        return self.mlp1(patches.reshape(-1, self.merge_size**2 * patches.shape[-1]))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seqlens: torch.Tensor | None = None,
        prompt_length: int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: [b, s].
            attention_mask: [b, cached + s], 0 on padding; ``None``: no padding.
            position_ids: [b, s]; ``None``: counted from the attention mask.
            pixel_values: [p, 3, patch, patch] or [p, 3 * patch * patch], all images of the batch end to end.
            image_grid_thw: [num_scales, 3]: frames, patch rows and columns of every scale image.
            labels: [b, s], not shifted; -100 is ignored, and so is the prediction made at an ``<IMG_CONTEXT>``.
            past_key_values: Keys and values of the tokens before ``input_ids``.
            cache: The same, by its newer name.
            use_cache: Return a cache; default: outside training.
            logits_to_keep: Logits of the last so many positions only; 0: all.
            cu_seqlens: [samples + 1] starts of the samples packed into a single row; none of them sees another.
            prompt_length: Tokens of the row, from its start, that are prompt; later ones count as generated.
                Default: all without a cache, none of ``input_ids`` with one.
            return_dict: ``False``: a plain tuple.
        """
        cache = past_key_values if cache is None else cache
        cached = 0 if cache is None else int(cache.get_seq_length())
        length = input_ids.shape[1]
        if prompt_length is None:
            prompt_length = cached or length
        in_prompt = torch.arange(cached, cached + length, device=input_ids.device) < prompt_length
        inputs_embeds = self._embed(input_ids, in_prompt, pixel_values, image_grid_thw)
        if use_cache is None:
            use_cache = not self.training and labels is None
        if use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            position_ids = self._position_ids(input_ids, attention_mask, cached)
        cos, sin = rotary_tables(position_ids, self.config.llm_config, inputs_embeds.dtype)
        mask = _attention_mask(input_ids, attention_mask, cu_seqlens, cached)
        text, visual = self._modalities(input_ids, in_prompt)
        context = DecoderContext(cos, sin, mask, text, visual, cache, cached + length)
        hidden_states = self.language_model(inputs_embeds, context)
        if isinstance(logits_to_keep, torch.Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = self.language_model.logits(hidden_states)
        loss = None if labels is None else self._loss(logits, labels, input_ids)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _special_ids(self, device: torch.device) -> torch.Tensor:
        """[12] ids of the special tokens."""
        if self.config.special_token_ids is None:
            raise ValueError("config.json has no special_token_ids: call model.init_special_token_ids(tokenizer) first")
        return torch.tensor(self.config.special_token_ids, device=device)

    def _embed(
        self,
        input_ids: torch.Tensor,
        in_prompt: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
    ) -> torch.Tensor:
        """Table rows; special-token rows in the prompt; visual tokens in place of ``<IMG_CONTEXT>``. [b, s, h]."""
        ids = self._special_ids(input_ids.device)
        matches = input_ids[..., None] == ids
        special = (matches.any(-1) & in_prompt)[..., None]
        embeds = self.language_model.embedding(input_ids)
        embeds = torch.where(special, self.special_token_embedding(matches.int().argmax(-1)), embeds)
        is_context = matches[..., CONTEXT] & in_prompt
        num_context = int(is_context.sum())
        if pixel_values is None:
            if num_context:
                raise ValueError(f"the prompt holds {num_context} <IMG_CONTEXT> tokens but pixel_values is missing")
            return embeds
        if image_grid_thw is None:
            raise ValueError("pixel_values needs image_grid_thw")
        features = self.extract_feature(pixel_values, image_grid_thw)
        if len(features) != num_context:
            raise ValueError(f"the prompt holds {num_context} <IMG_CONTEXT> tokens, the images give {len(features)}")
        # The encoder may lie on another device than the table (device_map).
        return embeds.masked_scatter(is_context[..., None], features.to(embeds))

    def _modalities(self, input_ids: torch.Tensor, in_prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Flat positions of text and of visual tokens; ``<img>`` is visual, the break tokens are text."""
        ids = self._special_ids(input_ids.device)
        visual = (((input_ids == ids[CONTEXT]) | (input_ids == ids[IMAGE_START])) & in_prompt).flatten()
        visual_index = visual.nonzero().flatten()
        return (~visual).nonzero().flatten(), visual_index if len(visual_index) else None

    def _position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cached: int) -> torch.Tensor:
        """[b, s]: every token that is not padding takes one position, image tokens included."""
        if attention_mask is None:
            positions = torch.arange(cached, cached + input_ids.shape[1], device=input_ids.device)
            return positions.expand(input_ids.shape)
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token cross entropy in float32 over the labels that count."""
        context = self.config.special_token_ids[CONTEXT]
        labels, input_ids = labels.to(logits.device), input_ids.to(logits.device)
        targets = labels[:, 1:].masked_fill(input_ids[:, :-1] == context, IGNORED_LABEL)
        total = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return total / (targets != IGNORED_LABEL).sum().clamp(min=1)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; also marks where the prompt ends, which decides how a token is embedded."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is None:
            raise ValueError("generate needs input_ids: images alone hold no <IMG_CONTEXT> to put them at")
        kwargs.setdefault("prompt_length", prompt.shape[1])
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        prompt_length: int | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward: tokens not yet cached, pixels only while the cache is empty."""
        cache = past_key_values if cache is None else cache
        cached = 0 if cache is None else int(cache.get_seq_length())
        return {
            "input_ids": input_ids[:, cached:],
            "attention_mask": attention_mask,
            CACHE: cache,
            "pixel_values": pixel_values if cached == 0 else None,
            "image_grid_thw": image_grid_thw if cached == 0 else None,
            "prompt_length": prompt_length,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep or 0,
        }

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeats each row and its images: patches are packed, so they cannot be repeated one by one."""
        images = {name: kwargs.pop(name) for name in ("pixel_values", "image_grid_thw") if name in kwargs}
        if expand_size > 1 and images.get("pixel_values") is not None:
            images = self._repeat_images(input_ids, images["pixel_values"], images["image_grid_thw"], expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | images

    def _repeat_images(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, times: int
    ) -> dict[str, torch.Tensor]:
        num_context = (input_ids == self._special_ids(input_ids.device)[CONTEXT]).sum(1)
        row_ends = (num_context * self.merge_size**2).cumsum(0)
        row_of_grid = torch.searchsorted(row_ends, image_grid_thw.prod(1).cumsum(0).to(row_ends.device))
        patches = pixel_values.tensor_split(row_ends[:-1].cpu())
        grids = [image_grid_thw[(row_of_grid == row).to(image_grid_thw.device)] for row in range(len(input_ids))]
        return {
            "pixel_values": torch.cat([row for row in patches for _ in range(times)]),
            "image_grid_thw": torch.cat([row for row in grids for _ in range(times)]),
        }


def _attention_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None, cached: int
) -> torch.Tensor | None:
    """Which keys each query sees, [b, 1, s, cached + s]; ``None`` where plain causal attention says the same."""
    length = input_ids.shape[1]
    padded = attention_mask is not None and not bool(attention_mask.all())
    if cu_seqlens is None and not padded and (cached == 0 or length == 1):
        return None
    keys = torch.arange(cached + length, device=input_ids.device)
    queries = keys[cached:, None]
    mask = (keys <= queries)[None, None]
    if cu_seqlens is not None:
        sample = torch.bucketize(keys, cu_seqlens.to(keys).flatten(), right=True)
        mask = mask & (sample == sample[cached:, None])
    if padded:
        # A padding query would see nothing and softmax to NaN, so every token sees at least itself.
        mask = mask & attention_mask[:, None, None].bool() | (keys == queries)
    return mask
