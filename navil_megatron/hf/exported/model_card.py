"""The README.md of an exported folder: what the model is, where it came from, how to run it.

Written from the config alone. Licence, base model, data and evaluation are the owner's to add.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.renamed import with_new_names
from navil_megatron.config.vision import VisionConfig
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, read_config, step_of
from navil_megatron.hf.llm.families import HF_FAMILIES

_ORDERS = {"raster": "row by row", "window": "window by window"}


def model_card(
    model: ModelConfig,
    num_parameters: int,
    *,
    has_tokenizer: bool,
    has_chat_template: bool = False,
    checkpoint: Path | None = None,
) -> str:
    """Markdown with the front matter that the Hub reads; of the exported ``checkpoint``, config and step are told."""
    usage = _CAPTION if has_tokenizer else "This folder has no tokenizer yet; add one to use `AutoProcessor`.\n"
    if has_tokenizer and has_chat_template:
        usage += _CHAT
    architecture = {"parameters": f"{num_parameters:,}", **_of_decoder(model.language), **_of_encoder(model.vision)}
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- navil
- custom_code
---

# NaViL model

> **To the owner of these weights:** this card names no licence, base model, data or evaluation. Before you publish it,
> add a `license:` line, and a `base_model:` line if training started from another model, to the block at the top of
> this file, and describe the data here.

A native multimodal language model in the architecture of NaViL (arXiv 2510.08565), exported by navil_megatron. It needs
`trust_remote_code=True` and transformers 4.51 or newer.

## Architecture

{_table(architecture)}

## Training

{_table(_of_training(checkpoint))}

## Use

{usage}
A generated token is embedded from the plain token table and uses the text experts, also if it is a special token:
so does the authors' code. Batches are padded on the left.
"""


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a parsed ``navil_config.json`` as canonical JSON: sorted keys, no spaces, UTF-8."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _of_decoder(language: LanguageConfig) -> dict[str, str]:
    """The decoder, with whatever sets its family apart."""
    extras = {
        "RMSNorm on queries and keys of each head, one per modality": language.qk_norm,
        "bias on query, key and value, one per modality": language.qkv_bias,
        "visual tokens leave through W_visual(W_text(.))": language.composed_visual_output_projection,
    }
    return {
        "language model": (
            f"{HF_FAMILIES[language.family].title} decoder, one text and one visual expert in attention and FFN"
        ),
        "depth x width, FFN": f"{language.num_layers} x {language.hidden_size}, {language.ffn_hidden_size}",
        "heads, KV heads, head size": (
            f"{language.num_attention_heads}, {language.num_query_groups}, {language.head_dim}"
        ),
        "attention": "; ".join(text for text, present in extras.items() if present) or "no bias, no norm on heads",
        "vocabulary": f"{language.vocab_size:,}, {'tied' if language.tied_embeddings else 'untied'} embeddings",
        "longest row": f"{language.max_position_embeddings:,} tokens, RoPE base {language.rope_theta:,.0f}",
    }


def _of_encoder(vision: VisionConfig) -> dict[str, str]:
    side = vision.merge_size
    return {
        "visual encoder, depth x width, FFN": f"{vision.num_layers} x {vision.hidden_size}, {vision.ffn_hidden_size}",
        "encoder heads, norm": f"{vision.num_attention_heads}, {vision.norm}",
        "patch, merge": f"{vision.patch_size} px, {side} x {side} patches a token, {_ORDERS[vision.token_order]}",
    }


def _of_training(checkpoint: Path | None) -> dict[str, str]:
    """What tells one export of a run from another; nothing that names a machine or a path."""
    if checkpoint is None:
        return {"training config": "not known"}
    config, step = read_config(checkpoint), step_of(checkpoint)
    training = config.get("training")
    found = {"digest of the training config": f"sha256:{config_digest(config)} ({CONFIG_FILE} as canonical JSON)"}
    if not isinstance(training, Mapping):
        return found | {"run": "none: the weights were converted, not trained here"}
    found["phase, precision"] = f"{training.get('phase')}, {with_new_names(config).get('precision', {}).get('type')}"
    if step is not None:
        found["step"] = f"{step:,} of {training.get('train_steps', 0):,}"
    return found


def _table(entries: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in entries.items())])


_CAPTION = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
inputs = processor(images=Image.open("picture.jpg"), text="<image>")
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""

_CHAT = """
In a conversation, if the model was trained on some:

```python
messages = [
    {"role": "user", "content": [{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "What is this?"}]}
]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""
