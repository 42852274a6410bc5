"""One run of a study in a process of its own: the engine's training from the engine's conversion, and its result."""

import json
import os
import shutil
import socket
from pathlib import Path

from navil_megatron.blueprint.parameters import count_by_part
from navil_megatron.config.load import load_config
from navil_megatron.config.run import NaViLConfig
from navil_megatron.files.atomic_file import new_file
from navil_megatron.hf.llm.ingest import convert_llm
from navil_megatron.pretrain import main as train
from tools.study.arms import HEAD_DIM, Arm, Llm, Scale

RESULT = "result.json"


def overrides(arm: Arm, llm: Llm, seed: int, data: dict, folder: Path) -> list[str]:
    """What of the config depends on the arm, the seed and the data."""
    values = {
        "model.special_token_ids": data["special_token_ids"],
        "model.language.num_layers": llm.layers,
        "model.language.hidden_size": llm.width,
        "model.language.ffn_hidden_size": 3 * llm.width,
        "model.language.num_attention_heads": llm.heads,
        "model.language.num_query_groups": llm.groups,
        "model.language.head_dim": HEAD_DIM,
        "model.language.vocab_size": data["vocab_size"],
        "model.language.modality_experts": list(arm.experts),
        "model.language.visual_expert_init": arm.visual_experts,
        "model.vision.num_layers": arm.depth,
        "model.vision.hidden_size": arm.width,
        "model.vision.ffn_hidden_size": 4 * arm.width,
        "model.vision.num_attention_heads": arm.heads,
        "data.multi_scale": arm.multi_scale,
        "data.tokenizer": data["tokenizer"],
        "evaluation.sources": [data["heldout_index"]],
        "training.seed": seed,
        "checkpoint.directory": str(folder / "checkpoints"),
        "logging.directory": str(folder / "logs"),
    }
    if arm.max_image_pixels is not None:
        values["data.max_image_pixels"] = arm.max_image_pixels
    if arm.rate is not None:
        values["optimizer.lr"] = arm.rate
    words = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    words.append(f"data.train_sources=[{{index={json.dumps(data['train_index'])}}}]")
    if arm.start == "pretrained":
        words.append(f"checkpoint.initial_weights={json.dumps(str(folder / 'start'))}")
    return words


def run(scale: Scale, arm: Arm, seed: int, data: dict, llm_folder: Path, folder: Path) -> None:
    """Trains one arm with one seed and writes ``result.json``; goes on from its newest checkpoint."""
    config_file = Path(__file__).with_name(scale.config)
    words = [*overrides(arm, scale.llms[arm.llm], seed, data, folder), *scale.overrides]
    if arm.length > 1:
        words.append(f"training.train_steps={arm.length * load_config(config_file, words).training.train_steps}")
    config = load_config(config_file, words)
    if arm.start == "pretrained" and not (folder / "start").exists():
        convert_llm(llm_folder, folder / "start", config_file, words, seed=seed)
    _be_the_only_rank()
    code = train([str(config_file), *words])
    if code:
        raise SystemExit(code)
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    points = _points(records)
    if points[-1]["step"] < config.training.train_steps:
        raise SystemExit(f"stopped at step {points[-1]['step']} of {config.training.train_steps}; start again to go on")
    scales = [record for record in records if record["kind"] == "feature_scale"][-1]
    layers = sorted(name.removeprefix("text/") for name in scales if name.startswith("text/layer_"))
    ratios = [scales[f"visual/{layer}"] / scales[f"text/{layer}"] for layer in layers]
    result = {"arm": arm.name, "seed": seed, **_sizes(config), "visual_over_text": ratios, "points": points}
    with new_file(folder / RESULT) as file:
        file.write(json.dumps(result).encode() + b"\n")
    for done in ("start", "checkpoints"):
        shutil.rmtree(folder / done, ignore_errors=True)


def _be_the_only_rank() -> None:
    """What torchrun tells the rank of a run with one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    one = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in one.items()}, MASTER_ADDR="127.0.0.1")


def _points(records: list[dict]) -> list[dict]:
    """The held-out loss wherever it was measured, after how many steps, samples and tokens."""
    seen = {r["step"]: r for r in records if r["kind"] == "train"}
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "evaluation"}
    return [
        {
            "step": step,
            "samples": seen[step]["consumed_samples"],
            "tokens": seen[step]["consumed_tokens"],
            "loss": loss,
        }
        for step, loss in sorted(losses.items())
    ]


def _sizes(config: NaViLConfig) -> dict[str, int]:
    """Parameters of the encoder, and of the LLM without its visual experts."""
    parts = count_by_part(config.model)
    llm = sum(n for part, n in parts.items() if part.startswith(("text", "norms", "embedding", "output_layer")))
    return {"llm_parameters": llm, "encoder_parameters": parts["vision_encoder"]}
