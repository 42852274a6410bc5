"""doctor.py on constructed installs: real metadata look-ups in an interpreter that sees nothing else."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from navil_megatron import doctor
from tests.house import REPOSITORY

PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[1:]
from navil_megatron.doctor import as_json, diagnose
print(json.dumps(as_json(diagnose())))
"""

GOOD = {
    "torch": "2.11.0",
    "megatron-core": "0.19.2",
    "psutil": "7.0",
    "numpy": "2.3",
    "transformers": "5.1",
    "tokenizers": "0.22",
    "safetensors": "0.6",
    "webdataset": "1.0",
    "pillow": "12.0",
    "rich": "14",
    "xxhash": "3.5",
    "tensorboard": "2.20",
}


SETUP: dict[str, Any] = {
    word.arg: ast.literal_eval(word.value)
    for word in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8")))
    if isinstance(word, ast.keyword) and word.arg in ("install_requires", "extras_require", "python_requires")
}

PACKAGES_OF_OTHERS = ("apex", "nvidia-dali", "navil")
"""On PyPI these are a web toolkit, a placeholder and a gateway."""


def install(folder: Path, name: str, version: str, *lines: str) -> None:
    """What pip would leave of a distribution: its metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]))


def examine(folder: Path, checkout: Path = REPOSITORY) -> dict[str, Any]:
    """The doctor's report in an interpreter without site-packages, which sees ``folder`` and ``checkout`` alone."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM, str(folder), str(checkout)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    report: dict[str, Any] = json.loads(result.stdout)
    report["by_name"] = {check["name"]: check for check in report["checks"]}
    return report


@pytest.fixture
def good_install(tmp_path: Path) -> Path:
    for name, version in GOOD.items():
        install(tmp_path, name, version)
    return tmp_path


def test_good_install(good_install: Path) -> None:
    checks = examine(good_install)["by_name"]
    for name in GOOD:
        assert checks[name]["status"] == "ok", checks[name]
        assert checks[name]["found"] == GOOD[name]
    for name in ("transformer-engine", "apex", "dali"):
        assert checks[name]["status"] == "absent"


def test_nothing_installed(tmp_path: Path) -> None:
    report = examine(tmp_path)
    assert report["ok"] is False
    required = SETUP["install_requires"]
    assert [check["name"] for check in report["checks"][1 : 1 + len(required)]] == [_name(line) for line in required]
    for line in required:
        check = report["by_name"][_name(line)]
        assert check["status"] == "missing"
        assert check["advice"].endswith(f'pip install "{line}"')
    assert "waits for ever: pip install" in report["by_name"]["psutil"]["advice"]
    assert report["by_name"]["dali"]["advice"] == f'pip install "{SETUP["extras_require"]["dali"][0]}"'


def test_outside_a_checkout_the_bounds_are_those_that_pip_noted(good_install: Path) -> None:
    (good_install / "navil_megatron").mkdir()
    for name in ("__init__.py", "doctor.py"):
        shutil.copy(REPOSITORY / "navil_megatron" / name, good_install / "navil_megatron" / name)
    noted = [
        "Requires-Python: <3.12,>=3.9",
        "Requires-Dist: torch<2.10,>=2.9",
        "Requires-Dist: psutil",
        'Requires-Dist: transformer-engine[pytorch]<2.21,>=2.20; extra == "gpu"',
        'Requires-Dist: nvidia-dali-cuda130<2.5,>=2.4; extra == "dali"',
        'Requires-Dist: wandb>=0.31; extra == "wandb"',
        'Requires-Dist: navil_megatron[dali,wandb]; extra == "test"',
    ]
    install(good_install, "navil_megatron", "0.1.0", *noted)
    install(good_install, "wandb", "0.30.0")
    checks = examine(good_install, good_install)["by_name"]
    assert checks["python"]["advice"].startswith("expected >=3.9,<3.12: ")
    assert checks["torch"]["advice"] == 'expected >=2.9,<2.10: pip install "torch>=2.9,<2.10"'
    assert checks["psutil"]["status"] == "ok"
    assert checks["wandb"]["advice"] == 'expected >=0.31: pip install "wandb>=0.31"'
    assert "megatron-core" not in checks and "navil_megatron" not in checks


@pytest.mark.parametrize(
    ("name", "version", "advice"),
    [
        ("megatron-core", "0.16.1", 'expected >=0.19.2,<0.20: pip install "megatron-core>=0.19.2,<0.20"'),
        ("megatron-core", "0.20.0", 'expected >=0.19.2,<0.20: pip install "megatron-core>=0.19.2,<0.20"'),
        ("torch", "2.9.1", 'expected >=2.11,<2.16: pip install "torch>=2.11,<2.16"'),
        ("torch", "2.16.0", 'expected >=2.11,<2.16: pip install "torch>=2.11,<2.16"'),
        ("wandb", "0.30.1", 'expected >=0.31: pip install "wandb>=0.31"'),
        (
            "transformer-engine",
            "2.21.0",
            'expected >=2.20,<2.21: pip install --no-build-isolation "transformer-engine[pytorch]>=2.20,<2.21" '
            "(needs a CUDA torch, nvcc)",
        ),
    ],
)
def test_wrong_version(good_install: Path, name: str, version: str, advice: str) -> None:
    for folder in good_install.glob(f"{name.replace('-', '_')}-*"):
        shutil.rmtree(folder)
    install(good_install, name, version)
    if name == "transformer-engine":
        (good_install / "transformer_engine_torch.py").touch()
    (check,) = [check for check in examine(good_install)["checks"] if check["name"] == name]
    assert (check["status"], check["found"], check["advice"]) == ("wrong", version, advice)


def test_an_extra_that_is_absent_or_fits_is_not_spoken_of(good_install: Path) -> None:
    assert "wandb" not in examine(good_install)["by_name"]
    install(good_install, "wandb", "0.31.0")
    assert "wandb" not in examine(good_install)["by_name"]


@pytest.mark.parametrize(
    ("line", "status", "found"),
    [
        ("cuda: Optional[str] = '13.0'", "ok", "13.0 (torch's build)"),
        ("cuda = '12.9'", "ok", "12.9 (torch's build)"),
        ("cuda: Optional[str] = None", "absent", 'torch is a CPU build: runtime.device = "cpu" only'),
    ],
)
def test_cuda_of_torch(good_install: Path, line: str, status: str, found: str) -> None:
    (good_install / "torch").mkdir()
    (good_install / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\n")
    check = examine(good_install)["by_name"]["cuda"]
    assert (check["status"], check["found"]) == (status, found)


def test_web_toolkit_named_apex(good_install: Path) -> None:
    install(good_install, "apex", "0.9.10.dev0")
    (good_install / "apex").mkdir()
    (good_install / "apex" / "__init__.py").write_text("raise RuntimeError('the doctor must not import this')\n")
    report = examine(good_install)
    check = report["by_name"]["apex"]
    assert report["ok"] is False
    assert check["status"] == "wrong"
    assert "web toolkit" in check["found"]
    assert check["advice"].startswith("pip uninstall apex")


def test_apex_without_extensions_and_whole(good_install: Path) -> None:
    install(good_install, "apex", "0.1")
    (good_install / "apex" / "normalization").mkdir(parents=True)
    (good_install / "apex" / "__init__.py").touch()
    check = examine(good_install)["by_name"]["apex"]
    assert check["status"] == "wrong"
    assert "no amp_C" in check["found"]
    (good_install / "amp_C.py").touch()
    assert "fused_weight_gradient_mlp_cuda" in examine(good_install)["by_name"]["apex"]["found"]
    (good_install / "fused_weight_gradient_mlp_cuda.py").touch()
    assert examine(good_install)["by_name"]["apex"]["status"] == "ok"


def test_dali_outside_the_bounds(good_install: Path) -> None:
    install(good_install, "nvidia-dali-cuda130", "2.5.0")
    check = examine(good_install)["by_name"]["dali"]
    assert (check["status"], check["found"]) == ("wrong", "nvidia-dali-cuda130 2.5.0")
    assert check["advice"] == 'expected >=2.4,<2.5: pip install "nvidia-dali-cuda130>=2.4,<2.5"'


def test_dali(good_install: Path) -> None:
    install(good_install, "nvidia-dali-cuda130", "2.4.0")
    assert examine(good_install)["by_name"]["dali"]["found"] == "nvidia-dali-cuda130 2.4.0"
    install(good_install, "nvidia-dali", "0.0.1")
    check = examine(good_install)["by_name"]["dali"]
    assert check["status"] == "wrong"
    assert "placeholder" in check["found"]
    assert check["advice"].startswith("pip uninstall nvidia-dali")


def test_transformer_engine_without_its_torch_part(good_install: Path) -> None:
    install(good_install, "transformer-engine", "2.20.2")
    (good_install / "transformer_engine").mkdir()
    assert examine(good_install)["by_name"]["transformer-engine"]["status"] == "wrong"
    (good_install / "transformer_engine_torch.py").touch()
    assert examine(good_install)["by_name"]["transformer-engine"]["status"] == "ok"


@pytest.mark.parametrize("version", [(3, 11, 7), (3, 14, 0)])
def test_python_that_was_not_tried(version: tuple[int, ...]) -> None:
    check = doctor.check_python(version, ">=3.12,<3.14")
    assert check.is_problem
    assert check.advice.startswith("expected >=3.12,<3.14: apt-get install python3.12 python3.12-venv")
    assert not doctor.check_python((3, 12, 0), ">=3.12,<3.14").is_problem


@pytest.mark.parametrize(
    ("version", "wanted", "met"),
    [
        ("2.11.0a0+nv", ">=2.11", True),
        ("2.10.9", ">=2.11", False),
        ("0.19", ">=0.19,<0.20", True),
        ("0.20.0", ">=0.19,<0.20", False),
        ("0.19.0rc1", ">=0.19,<0.20", True),
        ("anything", "", True),
    ],
)
def test_bounds(version: str, wanted: str, met: bool) -> None:
    assert doctor.satisfies(version, wanted) is met


def test_setup_asks_for_no_package_of_others() -> None:
    listed = [*SETUP["install_requires"], *(line for lines in SETUP["extras_require"].values() for line in lines)]
    assert not [line for line in listed if _name(line) in PACKAGES_OF_OTHERS]


def _name(line: str) -> str:
    return re.split(r"[^\w.-]", line)[0]
