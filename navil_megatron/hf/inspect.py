"""What a checkpoint or a Hugging Face folder holds, by its headers alone."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from navil_megatron.blueprint.parameters import Part
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.checkpoint_folder import find_checkpoint, read_config, step_of
from navil_megatron.files.json_file import read_json
from navil_megatron.files.tokenizer_file import TOKENIZER_FILE
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.hf_parameters import hf_parameters
from navil_megatron.hf.ingest import model_of_folder
from navil_megatron.hf.model_source import kind_of
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import read_model_config, size_of, type_name

_GROUPS: Mapping[Part, str] = {
    "vision_encoder": "vision_encoder",
    "connector": "connector",
    "embedding": "embeddings",
    "special_token_embedding": "embeddings",
    "text attention": "text_experts",
    "text feed-forward": "text_experts",
    "visual attention": "visual_experts",
    "visual feed-forward": "visual_experts",
    "norms": "norms",
    "output_layer": "head",
}
PARTS = (*dict.fromkeys(_GROUPS.values()), "unknown")
"""What parameters are counted by; ``norms`` are those of the decoder that both modalities share."""
_SIZES = ("num_", "hidden", "ffn", "head", "vocab", "patch", "norm", "tied")
"""Beginnings of the names of settings that are told."""
_LLM_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)


def inspect(path: Path) -> dict[str, Any]:
    """What lies at a path, ready for JSON.

    Raises:
        UserError: Nothing that can be converted, or it is damaged.
    """
    kind = kind_of(path)
    return _of_checkpoint(find_checkpoint(path)) if kind == "checkpoint" else _of_folder(path, kind)


def describe_contents(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{report['path']}: {report['kind']}, family {report['family']}"]
    for name, sizes in report["sizes"].items():
        if sizes:
            lines.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in sizes.items()))
    lines += [
        f"  {report['num_tensors']} tensors, {report['num_parameters']:,} parameters, {report['num_bytes']:,} bytes",
        *(
            f"    {part:<16}{counts['num_parameters']:>18,} parameters {counts['num_bytes']:>18,} bytes"
            for part, counts in report["parts"].items()
        ),
        "  types: " + ", ".join(f"{name} ({count})" for name, count in report["types"].items()),
        f"  {len(report['files'])} files with tensors: {', '.join(report['files'][:8])}",
    ]
    if report["kind"] == "checkpoint":
        step = "unknown" if report["step"] is None else report["step"]
        lines.append(
            f"  saved as {report['num_chunks']} chunks, at most {report['most_chunks_a_layer']} to a layer; step {step}"
        )
    lines.append(f"  tokenizer: {report['tokenizer'] or 'none'}")
    lines.append(f"  checksums: {'yes' if report['has_checksums'] else 'no'}")
    return "\n".join(lines)


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    model, reader = read_model_config(folder), CheckpointReader(folder)
    chunks = [chunk for tensor in reader.tensors.values() for chunk in tensor.chunks]
    return {
        **_counts(reader, _parts(model)),
        "path": str(folder),
        "kind": "checkpoint",
        "family": model.language.family,
        "sizes": _sizes(model),
        "files": sorted({chunk.place.file for chunk in chunks}),
        "num_chunks": len(chunks),
        "most_chunks_a_layer": max((_most_in_a_layer(reader, key) for key in reader.tensors), default=0),
        "step": step_of(folder),
        "tokenizer": (read_config(folder).get("data") or {}).get("tokenizer"),
    }


def _of_folder(folder: Path, kind: str) -> dict[str, Any]:
    config, reader = read_json(folder / "config.json"), TensorFolder(folder)
    if kind == "LLM folder":
        family = str(config["model_type"])
        sizes = {"language": {name: config[name] for name in _LLM_SIZES if name in config}}
        parts = {key: _llm_part(key) for key in reader}
    else:
        model = model_of_folder(folder, config)
        family, sizes, parts = model.language.family, _sizes(model), _parts(model)
    tokenizer = folder / TOKENIZER_FILE
    return {
        **_counts(reader, parts),
        "path": str(folder),
        "kind": kind,
        "family": family,
        "sizes": sizes,
        "files": [path.name for path in reader.files],
        "tokenizer": str(tokenizer) if tokenizer.is_file() else None,
    }


def _parts(model: ModelConfig) -> dict[str, str]:
    """What each key counts to, in a checkpoint and in a folder."""
    parameters = ((found, slots) for found in hf_parameters(model) for slots in found.slots(model))
    return {slot.key: _GROUPS[found.parameter.part] for found, (ours, theirs) in parameters for slot in (ours, *theirs)}


def _llm_part(key: str) -> str:
    if "embed" in key:
        return "embeddings"
    if key.startswith(("lm_head.", "output.")):
        return "head"
    return "norms" if "norm" in key else "text_experts"


def _counts(reader: CheckpointReader | TensorFolder, part_of: Mapping[str, str]) -> dict[str, Any]:
    """Tensors, parameters and bytes, of all parts and of each."""
    found, parts = reader.signatures(), {part: {"num_parameters": 0, "num_bytes": 0} for part in PARTS}
    for key, signature in found.items():
        counts = parts[part_of.get(key, "unknown")]
        for name, size in zip(counts, size_of(signature), strict=True):
            counts[name] += size
    return {
        "num_tensors": len(found),
        "num_parameters": sum(counts["num_parameters"] for counts in parts.values()),
        "num_bytes": sum(counts["num_bytes"] for counts in parts.values()),
        "parts": {part: counts for part, counts in parts.items() if counts["num_parameters"]},
        "types": dict(Counter(type_name(dtype) for _, dtype in found.values())),
        "has_checksums": reader.checksums is not None,
    }


def _most_in_a_layer(reader: CheckpointReader, key: str) -> int:
    """Chunks that hold one layer; for a parameter that exists once, all of its chunks."""
    chunks = reader.tensors[key].chunks
    if ".layers." not in key or not chunks:
        return len(chunks)
    return sum(chunk.offsets[0] == chunks[0].offsets[0] for chunk in chunks)


def _sizes(model: ModelConfig) -> dict[str, dict[str, Any]]:
    sections = config_to_dict(model)
    return {
        part: {name: value for name, value in sections[part].items() if name.startswith(_SIZES)}
        for part in ("language", "vision")
    }
