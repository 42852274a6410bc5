"""The README.md of an exported folder: what the model is, from its config. Licence and data are the owner's to add."""

from navil_megatron.config.schema import ModelConfig


def model_card(model: ModelConfig, num_parameters: int, has_tokenizer: bool) -> str:
    """Markdown with the front matter that the Hub reads."""
    language, vision = model.language, model.vision
    family = {"qwen3": "Qwen3", "internlm2": "InternLM2"}[language.family]
    order = {"raster": "row by row", "window": "window by window"}[vision.token_order]
    usage = _USAGE if has_tokenizer else "This folder has no tokenizer yet; add one to use `AutoProcessor`.\n"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- navil
- custom_code
---

# NaViL model

A native multimodal language model in the architecture of NaViL (arXiv 2510.08565), exported by navil_megatron.
Licence, training data and evaluation are for the owner of the weights to add here.

| | |
|---|---|
| parameters | {num_parameters:,} |
| language model | {family} decoder with one text and one visual expert in attention and FFN |
| depth x width, FFN | {language.num_layers} x {language.hidden_size}, {language.ffn_hidden_size} |
| heads, KV heads, head size | {language.num_attention_heads}, {language.num_query_groups}, {language.head_dim} |
| vocabulary | {language.vocab_size:,} |
| visual encoder, depth x width, FFN | {vision.num_layers} x {vision.hidden_size}, {vision.ffn_hidden_size} |
| patch, merge | {vision.patch_size} px, {vision.merge_size} x {vision.merge_size} patches a token, ordered {order} |

## Use

{usage}
A generated token is embedded from the plain token table and uses the text experts, also if it is a special token:
so does the authors' code. Batches are padded on the left.
"""


_USAGE = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
inputs = processor(images=Image.open("picture.jpg"), text="<image>")
tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""
