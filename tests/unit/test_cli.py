"""The command line as a user meets it: help with examples, one JSON object, one-line errors and exit code 2."""

import ast
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from navil_megatron import cli
from navil_megatron.cli import main
from navil_megatron.verbs.verb import Verb
from tests.unit.config_examples import EXAMPLE_TOML

VERBS = [
    ("tokenizer",),
    ("init",),
    ("train",),
    ("report",),
    ("replay",),
    ("plan",),
    ("data", "build"),
    ("data", "index"),
    ("data", "inspect"),
    ("data", "show"),
    ("convert", "to-hf"),
    ("convert", "from-hf"),
    ("convert", "upcycle"),
    ("convert", "verify"),
    ("convert", "inspect"),
    ("scaling", "fit"),
    ("scaling", "recommend"),
    ("scaling", "plan-sweep"),
    ("scaling", "plot"),
    ("generate",),
    ("evaluate",),
    ("attention",),
    ("doctor",),
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on stderr of a call that must exit with code 2 and print nothing else."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.splitlines()


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_has_an_example_of_its_verb(verb: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*verb, "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  navil-megatron {' '.join(verb)}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in (("train",), ("replay",))], ids=" ".join)
def test_reporting_verbs_take_json(verb: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    assert "--json" in capsys.readouterr().out


def test_the_list_of_verbs_is_whole() -> None:
    assert [verb.words for verb in cli.VERBS] == [" ".join(words) for words in VERBS]


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.words)
def test_examples_are_taken(verb: Verb) -> None:
    lines = [line for line in verb.example.splitlines() if line.strip().startswith("navil-megatron")]
    assert lines
    for line in lines:
        options, rest = cli.build_parser().parse_known_args(shlex.split(line)[1:])
        assert options.verb is verb
        assert not rest or "overrides" in options


@pytest.fixture(scope="module")
def modules_of_help() -> dict[str, str]:
    """Module -> file of all that a process has loaded after the help of the command, of every verb, and doctor."""
    calls = [[], *({words[0]: [words[0]] for words in VERBS}.values()), *map(list, VERBS)]
    program = (
        "import contextlib, json, sys\n"
        "before = set(sys.modules)\n"
        "from navil_megatron.cli import main\n"
        "with contextlib.redirect_stdout(sys.stderr):\n"
        f"    for words in {calls!r}:\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main([*words, '--help'])\n"
        "            raise RuntimeError(f'{words} --help ran the verb')\n"
        "    main(['doctor'])\n"
        "files = {name: getattr(sys.modules[name], '__file__', None) for name in set(sys.modules) - before}\n"
        "print(json.dumps(files))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert done.stderr.count("usage: navil-megatron") == len(calls)
    files: dict[str, str] = json.loads(done.stdout)
    return files


def test_help_and_doctor_import_the_standard_library_alone(modules_of_help: dict[str, str]) -> None:
    """Counted, for a time would depend on what else the machine does: help loads few modules, and none of others."""
    packages = {name.split(".")[0] for name in modules_of_help}
    assert packages - sys.stdlib_module_names == {"navil_megatron"}
    ours = {name for name in modules_of_help if name.startswith("navil_megatron.")}
    assert len(ours) <= 25
    assert "navil_megatron.config.run" not in ours  # takes longer than all others together
    assert len(modules_of_help) <= 200


def test_help_and_doctor_can_be_read_by_an_old_python(modules_of_help: dict[str, str]) -> None:
    """Doctor says on an old Python that it is too old; what is loaded before it can say so must be understood."""
    ours = {name: path for name, path in modules_of_help.items() if name.startswith("navil_megatron")}
    assert {"navil_megatron.cli", "navil_megatron.doctor", "navil_megatron.verbs.data"} <= ours.keys()
    for path in ours.values():
        ast.parse(Path(path).read_text(encoding="utf-8"), path, feature_version=(3, 10))


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)  # what Python itself takes for "not installed"
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    (line,) = refused(capsys, "evaluate", "absent", "absent.jsonl")
    assert line == ("error: evaluate needs nltk, rapidfuzz, not installed here: pip install 'navil_megatron[evaluate]'")


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-verb"], ["train"], ["doctor", "--no-such"], ["doctor", "extra"], ["convert"]]
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_counts_are_whole_and_positive(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "run.toml", "--nproc", count])
    assert stopped.value.code == 2
    assert "--nproc" in capsys.readouterr().err


def test_train_refuses_a_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "train", "absent.toml") == [
        "error: absent.toml: cannot read the config (No such file or directory); give the path of a TOML file"
    ]


def test_train_names_the_nearest_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE_TOML)
    # The override after the option reaches the config too.
    lines = refused(capsys, "train", str(path), "training.train_step=1", "--nproc", "2", "optimizer.lrr=1")
    assert lines == [
        "error: override training.train_step=1: training.train_step is not a setting; "
        "the nearest is training.train_steps",
        "error: override optimizer.lrr=1: optimizer.lrr is not a setting; the nearest is optimizer.lr",
    ]


def test_train_refuses_a_layout_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE_TOML)
    (line,) = refused(capsys, "train", str(path), "parallel.tensor_model_parallel_size=2", "--nproc", "3")
    assert line.startswith("error: world size 3 does not hold whole replicas")


def test_doctor_reports_in_json_and_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == (0 if report["ok"] else 1)
    assert {check["name"] for check in report["checks"]} >= {"python", "torch", "megatron-core", "gpu", "apex", "dali"}
    main(["doctor"])
    assert "megatron-core" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "build", "absent.jsonl", "out", "--tokenizer", "absent"),
        ("data", "index", "absent.tar", "--output", "out", "--tokenizer", "absent"),
        ("data", "inspect", "absent.index"),
        ("convert", "to-hf", "absent", "out"),
        ("convert", "from-hf", "absent", "out"),
        ("evaluate", "absent", "absent.jsonl", "--output", "out"),
        ("generate", "absent", "image.png"),
        ("attention", "absent", "image.png", "--output", "out.svg"),
        ("attention", "absent", "image.png", "--output", "out"),
        ("generate", "absent", "image.png", "--prompt", "<image><image>"),
        ("generate", "absent"),
        ("generate", "absent", "image.png", "--top-p", "0.5"),
        ("attention", "absent", "image.png", "--prompt", "<image><image>", "--output", "out.svg"),
    ],
    ids=" ".join,
)
def test_missing_folders_are_one_line(
    arguments: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = refused(capsys, *arguments)
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()
