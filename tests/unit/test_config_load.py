"""config/load.py: what a TOML file and overrides become, and what the user is told when they are wrong."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from navil_megatron.config.data import SourceConfig
from navil_megatron.config.errors import ConfigError, UserError, describe
from navil_megatron.config.load import (
    config_to_dict,
    load_config,
    section_from_dict,
    setting_names,
)
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.optimizer import OptimizerConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.renamed import RENAMED, with_new_names
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.config.vision import VisionConfig
from tests.house import REPOSITORY
from tests.unit.config_examples import EXAMPLE_TOML, example_tables


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE_TOML)
    return path


def problems_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_values_and_defaults(config_path: Path) -> None:
    config = load_config(config_path)
    assert config.model.language.family == "qwen3"
    assert config.model.vision.patch_size == 16
    assert config.data.train_sources == (SourceConfig(index=str(config_path.parent / "shards/train.index")),)
    assert config.parallel == ParallelConfig()
    assert config.microbatch_tokens == 2048


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("training.train_steps=7", "training", "train_steps", 7),
        ("optimizer.lr=2e-4", "optimizer", "lr", 2e-4),
        ("optimizer.clip_grad=1", "optimizer", "clip_grad", 1.0),
        ("optimizer.clip_grad=none", "optimizer", "clip_grad", None),
        ('optimizer.clip_grad="none"', "optimizer", "clip_grad", None),
        ("training.recompute=none", "training", "recompute", "none"),
        ("optimizer.distributed=false", "optimizer", "distributed", False),
        ("training.phase=s1.1", "training", "phase", "s1.1"),
        ("data.tokenizer=/a/b=c", "data", "tokenizer", "/a/b=c"),
        ("data.tokenizer= with space ", "data", "tokenizer", "with space"),
        ('evaluation.sources=["a","b"]', "evaluation", "sources", ("a", "b")),
        ("parallel.pipeline_layers=[3, 1]", "parallel", "pipeline_layers", (3, 1)),
        ('data.tokenizer=x"\ny = 1', "data", "tokenizer", 'x"\ny = 1'),
        ('data.tokenizer="x"\ny = 1', "data", "tokenizer", '"x"\ny = 1'),
    ],
)
def test_override(config_path: Path, override: str, section: str, field: str, value: object) -> None:
    found = getattr(getattr(load_config(config_path, [override]), section), field)
    assert found == value
    assert type(found) is type(value)


def test_later_override_wins_and_nested_sections_are_reached(config_path: Path) -> None:
    config = load_config(config_path, ["training.seed=1", "training.seed=2", "model.vision.full_attention_layers=[1]"])
    assert config.training.seed == 2
    assert config.model.vision.full_attention_layers == (1,)


def test_unknown_key_names_file_key_and_nearest(config_path: Path) -> None:
    config_path.write_text(EXAMPLE_TOML.replace("num_query_groups = 2", "num_query_group = 2"))
    key = "model.language.num_query_group"
    assert problems_of(config_path) == (
        f"{config_path}: {key} is not a setting; the nearest is {key}s",
        f"{config_path}: {key}s is missing; set it",
    )


def test_key_of_another_section(config_path: Path) -> None:
    (problem,) = problems_of(config_path, "training.beta1=0.1")
    assert problem == "override training.beta1=0.1: training.beta1 is not a setting; it belongs in optimizer.beta1"


@pytest.mark.parametrize(
    "override",
    [
        "precision.type=fp8",
        "precision.fp8=true",
        "model.language.moe_router_topk=2",
    ],
)
def test_what_this_version_cannot_do_is_refused(config_path: Path, override: str) -> None:
    """What waits for its code is refused; no setting is a silent no-op."""
    assert len(problems_of(config_path, override)) == 1


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(config_path: Path, old: str, new: str) -> None:
    section, _, name = old.partition(".")
    said = f"{old} is not a setting; it is {new} now"
    assert problems_of(config_path, f"{old}=1") == (f"override {old}=1: {said}",)
    config_path.write_text(EXAMPLE_TOML.replace(f"[{section}]", f"[{section}]\n{name} = 1"))
    assert problems_of(config_path) == (f"{config_path}: {said}",)


def test_new_names_are_settings_and_old_ones_are_none() -> None:
    keys = set(setting_names(NaViLConfig))
    assert keys >= set(RENAMED.values())
    assert not keys & set(RENAMED)


def test_a_stored_config_is_read_under_the_names_of_today(config_path: Path) -> None:
    config = load_config(config_path, ["precision.type=fp32", 'evaluation.sources=["a"]', "evaluation.every_steps=5"])
    new = config_to_dict(config)
    old = json.loads(json.dumps(new))
    for name, section in (("precision", "precision"), ("evaluation", "evaluation")):
        assert old.pop(name) == new[section]
    old["training"] |= {"precision": "fp32", "fp8": "none", "evaluate_every_steps": 5}
    old["data"]["validation_sources"] = ["a"]
    assert section_from_dict(NaViLConfig, with_new_names(old), "navil_config.json") == config
    assert with_new_names(new) == new


def test_key_near_nothing_lists_the_section(config_path: Path) -> None:
    (problem,) = problems_of(config_path, "parallel.zzz=1")
    assert "[parallel] has tensor_model_parallel_size, pipeline_model_parallel_size" in problem


def test_unknown_section(config_path: Path) -> None:
    (problem,) = problems_of(config_path, "optimiser.lr=1")
    assert problem == "override optimiser.lr=1: optimiser is not a setting; the nearest is optimizer"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.train_steps=1e6", "training.train_steps: found 1000000.0, expected an integer"),
        ("training.train_steps=true", "training.train_steps: found true, expected an integer"),
        ("training.train_steps=many", 'training.train_steps: found "many", expected an integer'),
        ("optimizer.lr=true", "optimizer.lr: found true, expected a number"),
        ("optimizer.distributed=1", "optimizer.distributed: found 1, expected true or false"),
        ("data.tokenizer=5", "data.tokenizer: found 5, expected a string; quote it: 'data.tokenizer=\"...\"'"),
        (
            "evaluation.sources=a",
            'evaluation.sources: found "a", expected an array of strings, e.g. ["a", "b"]',
        ),
        ("data.train_sources=a", 'data.train_sources: found "a", expected an array of tables [[data.train_sources]]'),
        (
            "data.train_sources=[{index='a', wight=1}]",
            "data.train_sources[0].wight is not a setting; the nearest is data.train_sources[0].weight",
        ),
        ("parallel.pipeline_layers=[1,true]", "parallel.pipeline_layers[1]: found true, expected an integer"),
        ("precision.type=fp16", "precision.type: found \"fp16\", expected one of 'bf16', 'fp32'"),
        ("training.phase=1", "training.phase: found 1, expected one of 's1.1', 's1.2', 's2'"),
        ("training=3", "training: expected a table [training], found 3"),
        ("training.seed.deep=3", "training.seed: found a table, expected an integer"),
    ],
)
def test_wrong_value_is_blamed_on_the_override(config_path: Path, override: str, expected: str) -> None:
    assert problems_of(config_path, override) == (f"override {override}: {expected}",)


@pytest.mark.parametrize("override", ["", "training.train_steps", "=3", "training.=3", ".x=3"])
def test_override_that_is_no_assignment(config_path: Path, override: str) -> None:
    (problem,) = problems_of(config_path, override)
    assert problem.startswith(f"override {override!r}: expected section.field=value")


def test_every_problem_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    text = EXAMPLE_TOML.replace("[runtime]", "[runtim]").replace("vocab_size = 96", 'vocab_size = "96"')
    path.write_text(text.replace("lr = 1e-3", "lr = 1e-3\nbeta3 = 0.5"))
    problems = problems_of(path, "training.global_batch_size=x")
    assert [problem for problem in problems if not problem.startswith((f"{path}: ", "override "))] == []
    text = "\n".join(problems)
    for part in (
        "model.language.vocab_size",
        "training.global_batch_size",
        "optimizer.beta3 is not a setting; the nearest is optimizer.beta",
        "runtim is not a setting; the nearest is runtime",
        "section [runtime] is missing; it needs device",
    ):
        assert part in text
    assert len(problems) == 5


def test_unreadable_files(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "absent.toml")
    assert problem.endswith("cannot read the config (No such file or directory); give the path of a TOML file")
    (tmp_path / "broken.toml").write_text("[data\n")
    (problem,) = problems_of(tmp_path / "broken.toml")
    assert "broken.toml: not valid TOML: " in problem
    assert "line 1" in problem
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in problems_of(tmp_path / "binary.toml")[0]


def test_dictionary_round_trip(config_path: Path) -> None:
    config = load_config(config_path, ["parallel.pipeline_layers=[3, 1]", "optimizer.clip_grad=none"])
    text = json.dumps(config_to_dict(config))
    assert section_from_dict(NaViLConfig, json.loads(text), "navil_config.json") == config
    model = section_from_dict(ModelConfig, json.loads(text)["model"], "navil_config.json")
    assert model == config.model


def test_section_from_dict_names_keys_below_the_section() -> None:
    with pytest.raises(ConfigError) as caught:
        section_from_dict(ModelConfig, {"language": {}, "vision": {}, "special_token_ids": []}, "config.json")
    assert "config.json: language.family is missing; set it" in caught.value.problems


@given(
    lr=st.floats(allow_nan=False, allow_infinity=False),
    clip=st.none() | st.floats(0, 10),
    warmup=st.integers(-(2**63), 2**63 - 1),
)
def test_any_numbers_survive_json(lr: float, clip: float | None, warmup: int) -> None:
    section = OptimizerConfig(lr=lr, clip_grad=clip, warmup_steps=warmup)
    values = json.loads(json.dumps(config_to_dict(section)))
    assert section_from_dict(OptimizerConfig, values, "x") == section


@given(st.lists(st.integers(-5, 40), max_size=5))
def test_arrays_become_tuples(layers: list[int]) -> None:
    values = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    section = section_from_dict(VisionConfig, values | {"full_attention_layers": layers}, "x")
    assert section.full_attention_layers == tuple(layers)


def test_error_types_and_lines() -> None:
    error = ConfigError(["first", "second"])
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)
    assert describe(error) == "error: first\nerror: second"
    assert describe(UserError("one\ntwo")) == "error: one two"


def test_config_error_crosses_processes() -> None:
    assert pickle.loads(pickle.dumps(ConfigError(["first", "second"]))).problems == ("first", "second")


def test_config_is_frozen() -> None:
    config = section_from_dict(NaViLConfig, example_tables(), "example")
    assert isinstance(config, NaViLConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.seed = 1  # type: ignore[misc]


def test_config_loads_without_torch(config_path: Path) -> None:
    program = (
        "import sys\n"
        "from navil_megatron.config.load import load_config\n"
        "from navil_megatron.config.validate import validate\n"
        "validate(load_config(sys.argv[1]), 1)\n"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", program, str(config_path)], check=True, timeout=60)


def test_documented_example_is_a_valid_run(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "running.md").read_text(encoding="utf-8")
    path = tmp_path / "run.toml"
    path.write_text(page.partition("```toml\n")[2].partition("```")[0])
    config = load_config(path)
    validate(config, 8)
    assert config.optimizer.clip_grad is None


def test_a_file_lies_over_those_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "model.toml").write_text(EXAMPLE_TOML.replace("train_steps = ", "train_steps = 1"))
    (tmp_path / "cluster.toml").write_text("[training]\nseed = 3\n[data]\nseq_length = 512\n")
    run = tmp_path / "run.toml"
    run.write_text('extends = ["sizes/model.toml", "cluster.toml"]\n[training]\nseed = 4\n')
    config = load_config(run)
    assert (config.training.seed, config.data.seq_length) == (4, 512)
    assert config.training.train_steps == load_config(tmp_path / "sizes" / "model.toml").training.train_steps
    # A path belongs to the file that states it.
    assert config.data.train_sources[0].index == str(tmp_path / "sizes" / "shards" / "train.index")
    last = tmp_path / "last.toml"
    last.write_text("[training]\nseed = 5\nlog_every_steps = 7\n")
    config = load_config(run, ["training.log_every_steps=2", str(last), "data.seq_length=256"])
    assert (config.training.seed, config.training.log_every_steps, config.data.seq_length) == (5, 7, 256)


def test_a_problem_is_told_of_the_file_that_made_it(tmp_path: Path) -> None:
    base, run, more = (tmp_path / f"{name}.toml" for name in ("base", "run", "more"))
    base.write_text(EXAMPLE_TOML.replace("num_query_groups = 2", 'num_query_groups = "two"'))
    run.write_text('extends = "base.toml"\n[training]\nsteps = 3\n')
    more.write_text("[optimizer]\nlr = true\n")
    groups, steps, rate = problems_of(run, str(more))
    assert groups.startswith(f"{base}: model.language.num_query_groups")
    assert steps.startswith(f"{run}: training.steps is not a setting")
    assert rate.startswith(f"{more}: optimizer.lr")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('extends = "run.toml"', "extends itself"),
        ('extends = "none.toml"', "none.toml: cannot read the config"),
        ("extends = 3", 'extends: found 3, expected the path of a config, or several: extends = "base.toml"'),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "run.toml").write_text(text + "\n" + EXAMPLE_TOML)
    (problem,) = problems_of(tmp_path / "run.toml")
    assert expected in problem


def test_paths_are_relative_to_the_config_and_those_of_overrides_are_not(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = EXAMPLE_TOML.replace("[checkpoint]", '[checkpoint]\ninitial_weights = "../weights"')
    config_path.write_text(text + '[evaluation]\nsources = ["held.index", "/data/b.index", "s3://c/d.index"]\n')
    folder = config_path.parent
    config = load_config(config_path, ["logging.directory=logs"])
    assert config.checkpoint.initial_weights == str(folder.parent / "weights")
    assert config.evaluation.sources == (str(folder / "held.index"), "/data/b.index", "s3://c/d.index")
    assert config.logging.directory == "logs"
    monkeypatch.chdir(folder.parent)
    config = load_config(Path(folder.name) / "run.toml")
    assert config.data.train_sources[0].index == f"{folder.name}/shards/train.index"
    config_path.write_text(EXAMPLE_TOML.replace("[checkpoint]", '[checkpoint]\ninitial_weights = "none"'))
    assert load_config(config_path).checkpoint.initial_weights is None


def test_a_byte_order_mark_is_passed_over(config_path: Path) -> None:
    expected = load_config(config_path)
    config_path.write_text(EXAMPLE_TOML, encoding="utf-8-sig")
    assert load_config(config_path) == expected
