"""From an LLM and pictures to a run: ``tokenizer``, ``data build``, ``init``, and the config trains as it is."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from navil_megatron.blueprint.parameters import count_by_part
from navil_megatron.cli import main
from navil_megatron.config.load import load_config
from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.data.tokenizer import load_tokenizer
from navil_megatron.files.checkpoint_folder import read_config
from tests.e2e.runs import error_lines, pretrain_in_rank, records
from tests.ranks import run_ranks
from tests.unit.data_examples import example_tokenizer, picture
from tests.unit.llm_examples import save_random_llm

NUM_SAMPLES = 12


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an LLM, its tokenizer with the special tokens, and shards."""
    folder = tmp_path_factory.mktemp("start")
    save_random_llm("llama", 3, folder / "llm")
    example_tokenizer(folder / "llm")
    lines = []
    for number in range(NUM_SAMPLES):
        (folder / f"{number}.png").write_bytes(picture(40, 64, seed=number))
        lines.append(json.dumps({"image": f"{number}.png", "caption": "red apple left of key"}) + "\n")
    (folder / "images.jsonl").write_text("".join(lines))
    assert main(["tokenizer", str(folder / "tokenizer"), "--from", str(folder / "llm")]) == 0
    words = [str(folder / "images.jsonl"), str(folder / "shards"), "--tokenizer", str(folder / "tokenizer")]
    assert main(["data", "build", *words]) == 0
    return folder


def init(folder: Path, *words: str, output: str = "run.toml") -> int:
    data = ["--data", str(folder / "shards" / "shard.index"), "--device", "cpu", "--gpus", "1"]
    return main(["init", "--llm", str(folder / "llm"), *data, "--output", str(folder / output), *words])


def test_a_config_runs_as_it_is(
    start: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert init(start, "--steps", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Nothing depends on where it is started.
    monkeypatch.chdir(tmp_path)
    config = load_config(start / "run.toml")
    assert (report["num_samples"], report["train_steps"], config.training.train_steps) == (NUM_SAMPLES, 2, 2)
    assert (
        config.model.language.num_layers == json.loads((start / "llm" / "config.json").read_text())["num_hidden_layers"]
    )
    parts = count_by_part(config.model)
    of_llm = sum(count for part, count in parts.items() if part.startswith("text") or part in ("embedding", "head"))
    # docs/scaling.md: encoder = 0.435 * LLM^0.525, in billions; the shape comes as near as heads of 64 let it.
    assert parts["vision_encoder"] == pytest.approx(0.435e9 * (of_llm / 1e9) ** 0.525, rel=0.35)
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, start / "run.toml")
    assert (code, error_lines(stderr)) == (0, [])
    assert [record["step"] for record in records(config, "train")] == [1, 2]
    assert Path(config.logging.directory) == start / "run" / "logs"
    assert sorted(path.name for path in (start / "run" / "checkpoints").iterdir() if path.is_dir()) == [
        "step_00000001",
        "step_00000002",
    ]


def test_a_second_config_takes_the_weights_that_are_there(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(start, "--weights", str(start / "small"), "--encoder", "200K", output="one.toml") == 0
    assert init(start, "--weights", str(start / "small"), "--json", output="two.toml") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not report["weights_made"]
    one, two = (load_config(start / f"{name}.toml") for name in ("one", "two"))
    assert one.model == two.model and report["encoder"]["num_layers"] == one.model.vision.num_layers
    stored = read_config(start / "small")["model"]["vision"]
    assert stored["hidden_size"] == one.model.vision.hidden_size == 128
    # One pass over twelve small samples is less than the fewest steps; the warm-up is a tenth of them.
    assert (one.training.train_steps, one.training.global_batch_size, one.optimizer.warmup_steps) == (100, 1, 10)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", "{0}/images.jsonl"], "images.jsonl exists already"),
        (["--llm", "{0}/shards"], "neither a checkpoint"),
        (["--data", "{0}/none.index"], "none.index cannot be read"),
        (["--hbm", "0.000001"], "no layout fits 1 GPUs of 1e-06 GB; the nearest"),
        (["--weights", "{0}/shards"], "shards exists already"),
        (["--tokenizer", "{0}/other"], "counts the tokens of another tokenizer"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    start: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    if not (start / "other").exists():
        main(["tokenizer", str(start / "other"), "--train", str(start / "images.jsonl"), "--vocab", "256"])
    before = sorted(start.iterdir())
    rest = [word.format(start) for word in words]
    assert init(start, "--encoder", "200K", "--weights", str(start / "new"), *rest, output="new.toml") == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert expected in line
    assert sorted(start.iterdir()) == before


def test_a_tokenizer_of_an_llm_keeps_its_tokens(start: Path) -> None:
    llm, ours = (AutoTokenizer.from_pretrained(start / name) for name in ("llm", "tokenizer"))
    assert ours.encode("red apple") == llm.encode("red apple")
    assert set(SPECIAL_TOKENS) <= set(ours.get_vocab())


def test_a_tokenizer_is_trained_on_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.txt").write_text("a red apple\nthe red house\n" * 20, encoding="utf-8-sig")
    words = ["--train", str(tmp_path / "corpus.txt"), "--vocab", "270", "--json"]
    assert main(["tokenizer", str(tmp_path / "made"), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    made = load_tokenizer(tmp_path / "made")
    assert report["special_token_ids"] == dict(zip(SPECIAL_TOKENS, made.special_token_ids, strict=True))
    assert report["has_turns"] and report["vocab_size"] == made.vocab_size == 270 + len(SPECIAL_TOKENS) + 3
    assert len(made.encode(" red")) == 1 and made.hugging_face.decode(made.encode("grün 字")) == "grün 字"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "expected one of --from LLM and --train TEXT"),
        (["--from", "llm", "--train", "a.txt"], "expected one of"),
        (["--train", "absent.txt"], "absent.txt cannot be read (No such file or directory)"),
        (["--train", "latin.txt"], "latin.txt is not UTF-8"),
        (["--train", "latin.txt", "--vocab", "9"], "--vocab is 9, expected at least 256"),
        (["--from", "absent"], "absent has no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("grün\n".encode("latin-1"))
    assert main(["tokenizer", "made", *words]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert expected in line
    assert not Path("made").exists()
