"""What a checkpoint or a Hugging Face folder holds, by its headers alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from navil_megatron.blueprint.parameters import Part, parameters
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.checkpoint_folder import find_checkpoint, read_config, step_of
from navil_megatron.files.json_file import read_json
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.exported.tokenizer_files import TOKENIZER_FILE
from navil_megatron.hf.ingest import model_of_folder
from navil_megatron.hf.model_source import kind_of
from navil_megatron.hf.param_map import table
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import Signature, read_model_config, type_name

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
    lines += [f"  {name}: {_settings(values)}" for name, values in report["sizes"].items() if values]
    lines.append(
        f"  {report['num_tensors']} tensors, {report['num_parameters']:,} parameters, {report['num_bytes']:,} bytes"
    )
    lines += [
        f"    {part:<16}{counts['num_parameters']:>18,} parameters {counts['num_bytes']:>18,} bytes"
        for part, counts in report["parts"].items()
    ]
    lines.append("  types: " + ", ".join(f"{name} ({count})" for name, count in report["types"].items()))
    lines.append(f"  {len(report['files'])} files with tensors: {', '.join(report['files'][:8])}")
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
    parts = {row.key: _GROUPS[row.part] for row in parameters(model)}
    chunks = [chunk for tensor in reader.tensors.values() for chunk in tensor.chunks]
    return {
        **_counts(
            "checkpoint", folder, model.language.family, reader.signatures(), lambda key: parts.get(key, "unknown")
        ),
        "sizes": _sizes(model),
        "files": sorted({chunk.place.file for chunk in chunks}),
        "num_chunks": len(chunks),
        "most_chunks_a_layer": max((_most_in_a_layer(reader, key) for key in reader.tensors), default=0),
        "step": step_of(folder),
        "tokenizer": (read_config(folder).get("data") or {}).get("tokenizer"),
        "has_checksums": reader.checksums is not None,
    }


def _of_folder(folder: Path, kind: str) -> dict[str, Any]:
    config, reader = read_json(folder / "config.json"), TensorFolder(folder)
    if kind == "LLM folder":
        family, sizes, parts = str(config["model_type"]), {"language": _llm_sizes(config)}, {}
    else:
        model = model_of_folder(folder, config)
        family, sizes = model.language.family, _sizes(model)
        rows = ((row, keys) for row in table(model) for keys in row.hf_keys_of_layers())
        parts = {key: _GROUPS[row.parameter.part] for row, keys in rows for key in keys}
    part_of = _llm_part if kind == "LLM folder" else lambda key: parts.get(key, "unknown")
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    return {
        **_counts(kind, folder, family, reader.signatures(), part_of),
        "sizes": sizes,
        "files": [path.name for path in reader.parts],
        "tokenizer": str(folder / TOKENIZER_FILE) if has_tokenizer else None,
        "has_checksums": reader.checksums is not None,
    }


def _llm_part(key: str) -> str:
    if "embed" in key:
        return "embeddings"
    if key.startswith(("lm_head.", "output.")):
        return "head"
    return "norms" if "norm" in key else "text_experts"


def _counts(kind: str, path: Path, family: str, found: Mapping[str, Signature], part_of: Any) -> dict[str, Any]:
    parts = {part: {"num_parameters": 0, "num_bytes": 0} for part in PARTS}
    types: dict[str, int] = {}
    for key, (shape, dtype) in found.items():
        counts = parts[part_of(key)]
        counts["num_parameters"] += torch.Size(shape).numel()
        counts["num_bytes"] += torch.Size(shape).numel() * (dtype.itemsize if isinstance(dtype, torch.dtype) else 0)
        types[type_name(dtype)] = types.get(type_name(dtype), 0) + 1
    return {
        "path": str(path),
        "kind": kind,
        "family": family,
        "num_tensors": len(found),
        "num_parameters": sum(counts["num_parameters"] for counts in parts.values()),
        "num_bytes": sum(counts["num_bytes"] for counts in parts.values()),
        "parts": {part: counts for part, counts in parts.items() if counts["num_parameters"]},
        "types": types,
    }


def _most_in_a_layer(reader: CheckpointReader, key: str) -> int:
    """Chunks that hold one layer; for a parameter that exists once, all of its chunks."""
    tensor = reader.tensors[key]
    if ".layers." not in key:
        return len(tensor.chunks)
    first = tensor.chunks[0].offsets[0] if tensor.chunks else 0
    return sum(chunk.offsets[0] == first for chunk in tensor.chunks)


def _sizes(model: ModelConfig) -> dict[str, dict[str, Any]]:
    sections = config_to_dict(model)
    return {
        part: {
            name: value
            for name, value in sections[part].items()
            if name.startswith(("num_", "hidden", "ffn", "head", "vocab", "patch", "norm", "tied"))
        }
        for part in ("language", "vision")
    }


def _llm_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: config[name] for name in (*names, "vocab_size", "tie_word_embeddings") if name in config}


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
