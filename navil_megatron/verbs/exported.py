"""``navil-megatron generate``, ``evaluate`` and ``attention``: what an exported folder is asked. Its code is run."""

from argparse import Namespace
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.arguments import DEVICE, DTYPE, EXPORTED, choice, chosen, count, require_picture_name, value
from navil_megatron.verbs.verb import Extra, Outcome, verb

_PLACEHOLDER = "<image>"
_PROMPT = value("--prompt", "TEXT", "<image> stands for the image (<image>)", str, default=_PLACEHOLDER)


@verb(
    "generate",
    "let an exported model answer a prompt about each image, by greedy decoding; runs the code in the folder",
    'navil-megatron generate exported/ cat.jpg dog.jpg --prompt "<image>Describe it."',
    EXPORTED,
    value("images", "IMAGE", "one answer is given for each", nargs="+"),
    _PROMPT,
    value("--max-new-tokens", "N", "longest answer (256)", count, default=256),
    DEVICE,
)
def generate(options: Namespace) -> Outcome:
    """One answer for each image."""
    _require_one_image(options.prompt)
    from navil_megatron.hf.generate import generate_captions, load_for_generation

    captioner = load_for_generation(options.folder, device=options.device)
    texts = generate_captions(captioner, options.images, options.prompt, options.max_new_tokens)
    answers = [{"image": str(image), "text": text} for image, text in zip(options.images, texts, strict=True)]
    report = {"folder": str(options.folder), "prompt": options.prompt, "answers": answers}
    lines = texts if len(texts) == 1 else [f"{answer['image']}: {answer['text']}" for answer in answers]
    return Outcome(report, "\n".join(lines))


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
    _PROMPT,
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
