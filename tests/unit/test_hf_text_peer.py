"""On text alone the Qwen3-like model is transformers' own Qwen3."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from tests.unit.hf_examples import random_hf_tensors, tiny_model


def test_text_logits_equal_transformers_qwen3() -> None:
    model = tiny_model("qwen3")
    config = hf_config_from_model(model, dtype="float32", token_ids={}, image_settings={})
    ours = NaViL(NaViLChatConfig(**config)).eval()
    tensors = random_hf_tensors(model)
    ours.load_state_dict(tensors)
    settings = {key: value for key, value in config["llm_config"].items() if key not in ("architectures", "model_type")}
    theirs = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    prefix = "language_model."
    text = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    theirs.load_state_dict({key: value for key, value in text.items() if "_ve." not in key})
    ids = torch.randint(0, 380, (2, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        actual = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[1, 5:], expected[1, 5:], atol=1e-5, rtol=1e-5)
