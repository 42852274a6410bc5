"""``navil-megatron generate``, ``evaluate`` and ``attention``: what an exported folder is asked. Its code is run."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.arguments import (
    DEVICE,
    DTYPE,
    EXPORTED,
    choice,
    chosen,
    count,
    count_from_0,
    flag,
    not_negative,
    require_picture_name,
    share,
    value,
)
from navil_megatron.verbs.verb import Extra, Outcome, verb

_PLACEHOLDER = "<image>"


@verb(
    "generate",
    "let an exported model answer a prompt about images, or talk about them; runs the code in the folder",
    'navil-megatron generate exported/ cat.jpg dog.jpg --prompt "<image>Describe it."\n'
    '  navil-megatron generate exported/ a.jpg b.jpg --prompt "<image><image>Which is redder?" --temperature 0.7\n'
    "  navil-megatron generate exported/ cat.jpg --chat",
    EXPORTED,
    value("images", "IMAGE", "one answer for as many as the prompt names; with --chat all of them", nargs="*"),
    value("--prompt", "TEXT", "each <image> stands for an image (<image>)", str, default=_PLACEHOLDER),
    flag("--chat", "read a user's turn from each line of stdin, and answer it; the images come first"),
    value("--max-new-tokens", "N", "longest answer (256)", count, default=256),
    value("--temperature", "T", "of the draw of each token; 0: always the likeliest (0)", not_negative, default=0.0),
    value("--top-p", "P", "draw from the likeliest with this much probability (1)", share, default=1.0),
    value("--seed", "N", "of the draws (0)", count_from_0, default=0),
    DTYPE,
    DEVICE,
)
def generate(options: Namespace) -> Outcome:
    """One answer for each group of images, or a conversation."""
    if options.top_p < 1 and not options.temperature:
        raise UserError("--top-p draws tokens, and --temperature 0 takes the likeliest; give a --temperature, as 0.7")
    groups = [] if options.chat else _groups(options.images, options.prompt)
    import torch

    from navil_megatron.hf.generate import Sampling, generate_captions, load_for_generation

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    captioner = load_for_generation(options.folder, dtype, options.device)
    sampling = Sampling(options.temperature, options.top_p)
    torch.manual_seed(options.seed)
    if options.chat:
        return _chat(options, captioner, sampling)
    texts = generate_captions(captioner, groups, options.prompt, options.max_new_tokens, sampling)
    answers = [
        {"image": str(group[0]), "text": text} if len(group) == 1 else {"images": [*map(str, group)], "text": text}
        for group, text in zip(groups, texts, strict=True)
    ]
    report = {"folder": str(options.folder), "prompt": options.prompt, "answers": answers}
    named = zip(groups, texts, strict=True)
    lines = texts if len(texts) == 1 else [f"{' '.join(map(str, group))}: {text}" for group, text in named]
    return Outcome(report, "\n".join(lines))


def _groups(images: list[Path], prompt: str) -> list[list[Path]]:
    """The images of each answer: as many as the prompt names."""
    size = max(1, prompt.count(_PLACEHOLDER))
    if not images or len(images) % size:
        raise UserError(
            f"found {len(images)} images, expected a multiple of {size}: --prompt asks about {size} at a time"
        )
    return [images[start : start + size] for start in range(0, len(images), size)]


def _chat(options: Namespace, captioner: Any, sampling: Any) -> Outcome:
    """Answers each line of stdin until there are no more."""
    from navil_megatron.evaluation.prompts import write_prompt
    from navil_megatron.hf.generate import generate_texts, open_picture

    pictures = [open_picture(image) for image in options.images]
    messages: list[dict[str, Any]] = []
    for line in _lines(options):
        places = [] if messages else [{"type": "image"} for _ in pictures]
        messages.append({"role": "user", "content": [*places, {"type": "text", "text": line}]})
        prompt = write_prompt(messages, captioner.processor, "chat")
        (answer,) = generate_texts(captioner, [pictures], [prompt], options.max_new_tokens, sampling)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        options.say(answer)
    turns = [{"role": turn["role"], "text": turn["content"][-1]["text"]} for turn in messages]
    return Outcome({"folder": str(options.folder), "images": [*map(str, options.images)], "turns": turns}, "")


def _lines(options: Namespace) -> Iterator[str]:
    """What the user says, asked for where there is a terminal."""
    mark = "> " if sys.stdin.isatty() else ""
    options.say(mark, end="")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
        options.say(mark, end="")


@verb(
    "evaluate",
    "score an exported model on local questions and captions, and show the worst; runs the code in the folder",
    "navil-megatron evaluate exported/ questions.jsonl --output runs/a/evaluation",
    EXPORTED,
    value(
        "data",
        "DATA.jsonl",
        'JSON lines of {"image": path or list, "question": text or none, "answers": list}; see docs/evaluation.md',
    ),
    value("--output", "FOLDER", "of answers and page (evaluation)", default=Path("evaluation")),
    value("--max-new-tokens", "N", "longest answer (64)", count, default=64),
    value("--batch-size", "N", "samples at a time (8)", count, default=8),
    choice(
        "--prompts",
        ("auto", "plain", "chat"),
        "ask in a user's turn or not (auto: questions, where the folder has a chat template)",
        default="auto",
    ),
    DTYPE,
    DEVICE,
    value("--worst", "N", "samples of each task on the page (24)", count, default=24),
    counts="samples",
    needs=Extra("evaluate", ("pycocoevalcap", "nltk", "sacrebleu", "rapidfuzz")),
)
def evaluate(options: Namespace) -> Outcome:
    """Answers, scores, and says how good it was."""
    from navil_megatron.evaluation.evaluate import Settings, evaluate
    from navil_megatron.evaluation.worst_page import describe_scores

    names = ("max_new_tokens", "prompts", "dtype", "batch_size", "device")
    settings = Settings(**chosen(options, *names), num_worst=options.worst)
    report = evaluate(options.folder, options.data, options.output, settings, options.on_progress)
    lines = [
        f"{report['num_answered']} of {report['num_samples']} samples answered",
        *describe_scores(report["scores"]),
        *(f"left out: {one['id']}: {one['reason']}" for one in report["damaged"]),
        f"answers: {report['predictions']}",
        f"the worst: {report['page']}",
    ]
    return Outcome(report, "\n".join(lines))


@verb(
    "attention",
    "draw how much of an exported model's attention goes from text to an image; runs the code in the folder",
    'navil-megatron attention exported/ cat.jpg --prompt "<image>What is it?" --output attention.svg',
    EXPORTED,
    value("image", "IMAGE", "the picture"),
    value("--prompt", "TEXT", "<image> stands for the image (<image>)", str, default=_PLACEHOLDER),
    value("--max-new-tokens", "N", "longest answer that is read too; 0: none (32)", int, default=32),
    value("--output", "FILE", ".svg or .png (attention.svg)", default=Path("attention.svg")),
    value("--layers", "N", "layers to show, from 0 (four)", int, nargs="+"),
    choice("--scales", ("largest", "all"), "scales to show (largest)", default="largest"),
    DEVICE,
    needs=Extra("study", ("matplotlib",)),
)
def attention(options: Namespace) -> Outcome:
    """Looks, draws, and gives the numbers."""
    require_picture_name(options.output)
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}, expected 0 or more")
    _require_one_image(options.prompt)
    from textwrap import shorten

    from navil_megatron.evaluation.attention import attention_to_image
    from navil_megatron.evaluation.attention_picture import draw_attention
    from navil_megatron.hf.generate import load_for_generation, open_picture

    image = open_picture(options.image)
    captioner = load_for_generation(options.folder, device=options.device)
    last = captioner.model.config.llm_config.num_hidden_layers - 1
    # Where none are named: four from first to last, evenly spaced.
    layers = options.layers or sorted({round(third * last / 3) for third in range(4)})
    wrong = [layer for layer in layers if not 0 <= layer <= last]
    if wrong:
        raise UserError(f"--layers names {wrong[0]}, but the model has layers 0 to {last}")
    found = attention_to_image(captioner, image, options.prompt, options.max_new_tokens)
    num_scales = len(found.covered)
    scales = range(num_scales) if options.scales == "all" else [num_scales - 1]
    title = shorten(f"{options.folder.name} on {options.image.name}: {found.answer}", 90, placeholder=" ...")
    draw_attention(found, image, layers, scales, title, options.output)
    shares = [found.share(layer) for layer in range(len(found.maps))]
    report = {
        "folder": str(options.folder),
        "image": str(options.image),
        "prompt": options.prompt,
        "answer": found.answer,
        "num_text_tokens": found.num_text_tokens,
        "share": shares,
        "share_by_scale": [[float(scale.sum()) for scale in maps] for maps in found.maps],
        "maps": {layer: [found.maps[layer][scale].tolist() for scale in scales] for layer in layers},
        "picture": str(options.output),
    }
    lines = [f"layer {layer}: {100 * share:.1f}% of the text's attention" for layer, share in enumerate(shares)]
    lines = [f"answer: {found.answer}", "to the image goes, in", *lines, f"picture: {options.output}"]
    return Outcome(report, "\n".join(lines))


def _require_one_image(prompt: str) -> None:
    if prompt.count(_PLACEHOLDER) > 1:
        raise UserError(f"--prompt holds {_PLACEHOLDER} more than once; an answer is about one image")


EXPORTED_VERBS = (generate, evaluate, attention)
