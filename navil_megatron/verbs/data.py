"""``navil-megatron data``: build, index, inspect, show."""

from argparse import Namespace

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.arguments import CONFIG, JOBS, OVERRIDES, chosen, count, count_from_0, flag, value
from navil_megatron.verbs.verb import Outcome, verb

_TOKENIZER = value("--tokenizer", "FOLDER", "the run's tokenizer; its tokens are counted", required=True)


@verb(
    "data build",
    "write tar shards and their index from images and captions, conversations or text; run again, it goes on",
    "navil-megatron data build images.jsonl shards/ --tokenizer tokenizer/ --jobs 8",
    value(
        "manifest",
        "MANIFEST",
        'JSON lines of {"image": path or list, "caption": text}, or with "text", "texts", "conversations" or '
        '"messages"; the same as a JSON array; either as .gz; parquet, or a folder that datasets saved',
    ),
    value("output", "FOLDER", "where the shards and PREFIX.index go"),
    value("--prefix", "PREFIX", "start of the shards' names (shard)", str, default="shard"),
    value("--samples-per-shard", "N", "lines a shard (10000)", count, default=10_000),
    value(
        "--map", "OURS=YOURS", "your names of keys, as image=img_path,caption=text", str, action="append", default=[]
    ),
    value("--ignore", "KEYS", "keys that are no part of a sample, as url,score", str, action="append", default=[]),
    value("--text-column", "NAME", "the rows of a table are pure text, in this column", str),
    flag("--allow-outside", "also take images from outside the manifest's folder; only if you trust the manifest"),
    flag("--fetch", "ask the network for images that are named by URL; never addresses of private networks"),
    flag("--overwrite", "remove what was built under this prefix, and begin anew"),
    _TOKENIZER,
    JOBS,
    counts="shards",
)
def build(options: Namespace) -> Outcome:
    """Writes shards and says what was left out."""
    from navil_megatron.data.shards.build_shards import build_shards
    from navil_megatron.data.shards.index_report import describe_index_report
    from navil_megatron.data.shards.manifest_line import Keys
    from navil_megatron.data.tokenizer import load_tokenizer

    keys = Keys.parse(options.map, options.ignore)
    report = build_shards(
        options.manifest,
        options.output,
        load_tokenizer(options.tokenizer),
        keys=keys,
        **chosen(options, "prefix", "samples_per_shard", "text_column", "allow_outside", "fetch", "overwrite"),
        **chosen(options, "jobs", "on_progress"),
    )
    return Outcome(report, describe_index_report(report))


@verb(
    "data index",
    "make one index over WebDataset tars that exist already; run again, it goes on",
    "navil-megatron data index 'shards/*.tar' --output shards/web.index --tokenizer tokenizer/ --jobs 8",
    value("shards", "TAR", "paths, glob patterns, or URLs that fsspec opens", str, nargs="+"),
    value("--output", "FILE", "the index to write, as web.index", required=True),
    flag("--headers-only", "do not decode the images: faster, finds less damage"),
    _TOKENIZER,
    JOBS,
    counts="shards",
)
def index(options: Namespace) -> Outcome:
    """Indexes shards and says what was left out."""
    from navil_megatron.data.shards.index_report import describe_index_report
    from navil_megatron.data.shards.index_shards import index_shards
    from navil_megatron.data.tokenizer import load_tokenizer

    report = index_shards(
        options.shards,
        options.output,
        load_tokenizer(options.tokenizer),
        decode=not options.headers_only,
        **chosen(options, "jobs", "on_progress"),
    )
    return Outcome(report, describe_index_report(report))


@verb(
    "data inspect",
    "tell what an index holds: samples, images, tokens, sizes, shards",
    "navil-megatron data inspect shards/web.index --check --deep",
    value("index", "INDEX", "what data build or data index wrote"),
    flag("--check", "look whether every shard is there with the right size"),
    flag("--deep", "with --check: read every shard, and compare all bytes with what was indexed"),
    JOBS,
    counts="shards",
)
def inspect(options: Namespace) -> Outcome:
    """Says what an index holds."""
    from navil_megatron.data.shards.deep_check import check_all_bytes
    from navil_megatron.data.shards.index_report import describe_index_report, report_index
    from navil_megatron.data.shards.source import Source

    if options.deep and not options.check:
        raise UserError("--deep compares every byte, which belongs to --check: give both")
    report = report_index(options.index)
    if options.check:
        Source(options.index).check_shards(urls=True)
    if options.deep:
        check_all_bytes(options.index, **chosen(options, "jobs", "on_progress"))
    return Outcome(report, describe_index_report(report))


@verb(
    "data show",
    "show rows of a step as a run will see them: tokens, images, texts, loss weights, padding",
    "navil-megatron data show run.toml --step 100 --rows 2 --output rows.html",
    CONFIG,
    OVERRIDES,
    value("--step", "N", "which step, from 0 (0)", count_from_0, default=0),
    value("--first-row", "N", "of the global batch, from 0 (0)", count_from_0, default=0),
    value("--rows", "N", "how many rows (2)", count, default=2),
    value("--output", "FILE", "the page to write, as rows.html", required=True),
)
def show(options: Namespace) -> Outcome:
    """Shows rows."""
    from navil_megatron.config.load import load_config
    from navil_megatron.config.validate import validate
    from navil_megatron.data.show.step import show_step

    config = load_config(options.config, options.overrides)
    validate(config)
    report = show_step(config, options.step, options.first_row, options.rows, options.output)
    text = f"{options.output}: {report['rows']} rows with {report['samples']} samples, {report['fill']:.1%} full"
    return Outcome(report | {"output": str(options.output)}, text)


DATA_VERBS = (build, index, inspect, show)
