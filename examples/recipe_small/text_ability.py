"""How well an exported folder predicts held-out English without any image, by transformers alone.

Every text is scored from its second token on, in float32. The hash is of all logits: equal hashes, equal bits.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoModelForCausalLM

from navil_megatron.hf.generate import load_for_generation

PEER_TEXTS = 4
"""Texts whose logits are compared with the peer's, one by one."""


@torch.inference_mode()
def measure(model: Any, texts: list[list[int]], peer: Any = None) -> dict[str, Any]:
    """Perplexity over all tokens, and a hash of all logits; with a peer also the largest difference of a logit."""
    state, total, count, difference = xxhash.xxh3_128(), 0.0, 0, 0.0
    for ids in texts:
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens).logits[0].float()
        state.update(logits.contiguous().numpy().data)
        total += float(torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum"))
        count += len(ids) - 1
        if peer is not None:
            theirs = peer(input_ids=tokens).logits[0].float()
            shared = min(theirs.shape[1], logits.shape[1])  # ours has rows for the special tokens
            difference = max(difference, float((logits[:, :shared] - theirs[:, :shared]).abs().max()))
    report = {"perplexity": math.exp(total / count), "tokens": count, "logits": state.hexdigest()}
    return report if peer is None else {**report, "largest_difference": difference}


def measure_text_ability(folder: Path, data: Path, output: Path, llm: Path | None = None) -> None:
    """Writes what was measured.

    Args:
        folder: What ``convert to-hf`` wrote.
        data: JSON lines with ``text``.
        output: The report.
        llm: The folder of the LLM that the weights come from: the same texts are scored by transformers' own model of
            it; their logits are compared with its weights rounded to the type of the exported ones.
    """
    model, processor = load_for_generation(folder)
    stored, model = model.dtype, model.float()
    told = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in told]
    ids = [one for one in ids if len(one) > 1]
    if llm is None:
        report = measure(model, ids)
    else:
        peer = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
        as_it_is = measure(peer, ids)["perplexity"]
        for parameter in peer.parameters():  # not its rotary frequencies, which never are in a smaller type
            parameter.data = parameter.data.to(stored).float()
        compared = measure(model, ids[:PEER_TEXTS], peer)["largest_difference"]
        report = measure(model, ids) | {"perplexity_of_the_llm": as_it_is, "largest_difference": compared}
    output.write_text(json.dumps(report, indent=1) + "\n")
