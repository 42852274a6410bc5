"""The files for clusters, as far as they can be judged without one: scripts, Dockerfile, manifest, sbatch options."""

import copy
import os
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.manifests import check_pytorch_job
from tools import check_image

EXAMPLES = REPOSITORY / "examples"
MODELS = ("navil_2b", "navil_9b")
PHASES = ("stage1_1", "stage1_2", "stage2")
SLURM = EXAMPLES / "navil_2b" / "slurm.sh"
MANIFEST = EXAMPLES / "navil_2b" / "kubernetes.yaml"
DOCKERFILE = REPOSITORY / "Dockerfile"
NOT_OURS = (".venv", "runs", "build", "shared")
SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "exclusive": None,
    "time": r"(\d+-)?\d{1,2}:\d{2}:\d{2}",
    "requeue": None,
    "signal": r"([RB]{1,2}:)?(SIG)?(TERM|INT|USR1|USR2|\d+)(@\d+)?",
    "open-mode": r"append|truncate",
    "output": r"\S+",
}
"""Options of sbatch that our scripts use, with the values of its manual; ``None``: no value. A new one needs a row."""


def lint(program: str, *files: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """What a linter that the ``test`` extra installs says; it lies beside this Python."""
    command = [str(Path(sysconfig.get_path("scripts")) / program), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def sbatch_problems(script: str) -> list[str]:
    """Lines of #SBATCH that sbatch would refuse, or not read because a command stands above them."""
    problems, commands_began = [], False
    for line in script.splitlines():
        if not line.startswith("#SBATCH"):
            commands_began |= bool(line.strip()) and not line.startswith("#")
            continue
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.+))?", line)
        if commands_began or found is None or not _is_option(*found.groups()):
            problems.append(line)
    return problems


def _is_option(name: str, value: str | None) -> bool:
    if name not in SBATCH or (value is None) != (SBATCH[name] is None):
        return False
    return value is None or re.fullmatch(str(SBATCH[name]), value) is not None


def test_shell_scripts_are_clean() -> None:
    found = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.sh"))
    scripts = [REPOSITORY / path for path in found if path.parts[0] not in NOT_OURS] + [REPOSITORY / ".ci" / "run"]
    assert SLURM in scripts
    checked = lint("shellcheck", *scripts)
    assert checked.returncode == 0, checked.stdout


def test_shellcheck_finds_something(tmp_path: Path) -> None:
    script = tmp_path / "wrong.sh"
    script.write_text("#!/bin/sh\nrm -rf $1/data\n")
    assert "SC2086" in lint("shellcheck", script).stdout


def test_dockerfile_is_clean() -> None:
    found = lint("hadolint", DOCKERFILE)
    assert found.returncode == 0, found.stdout + found.stderr


def test_hadolint_finds_something(tmp_path: Path) -> None:
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM ubuntu\nRUN cd /tmp && sudo pip install apex\n")
    assert "DL3006" in lint("hadolint", dockerfile).stdout


def test_the_image_gets_the_real_packages() -> None:
    text = re.sub(r"^\s*#.*$", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert not re.findall(r"(?<![/\w-])apex(?![@\w])(?=[^\n]*(?:==|$))|nvidia-dali(?!-cuda)", text)
    copied = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept and all((REPOSITORY / path).exists() for path in copied)


def test_an_image_that_lacks_something_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """This environment has no Transformer Engine, which is what the check of an image must say."""
    assert check_image.main() == 1
    assert re.search(r"error: this image cannot train: .*transformer-engine", capsys.readouterr().err)


def test_sbatch_would_take_the_options() -> None:
    script = SLURM.read_text()
    assert len(re.findall("^#SBATCH", script, re.MULTILINE)) >= 10
    assert sbatch_problems(script) == []


@pytest.mark.parametrize(
    "line", ["#SBATCH --gpu-per-node=8", "#SBATCH --time=1 day", "#SBATCH --requeue=yes", "#SBATCH --signal=B:TREM@9"]
)
def test_sbatch_would_refuse(line: str) -> None:
    assert sbatch_problems(f"#!/bin/sh\n{line}\n") == [line]


def test_sbatch_reads_no_option_below_a_command() -> None:
    assert sbatch_problems("#!/bin/sh\ntrue\n#SBATCH --nodes=8\n") == ["#SBATCH --nodes=8"]


STEP = """#!/bin/sh
echo "$@" >srun.words
trap 'echo saved >saved; exit 1' TERM
echo $$ >srun.pid.new; mv srun.pid.new srun.pid
while :; do sleep 0.02; done
"""


@pytest.mark.parametrize(
    ("number", "saves", "comes_back"), [(signal.SIGUSR1, True, True), (signal.SIGTERM, False, False)]
)
def test_the_batch_script_saves_before_its_limit(
    tmp_path: Path, number: signal.Signals, saves: bool, comes_back: bool
) -> None:
    """The script itself in bash; Slurm's three commands are played by scripts that write down what they were told."""
    commands = {
        "srun": STEP,
        "scontrol": '#!/bin/sh\n[ $1 = show ] && echo node1 || echo "$@" >requeued\n',
        "scancel": '#!/bin/sh\necho "$@" >cancelled; kill -TERM $(cat srun.pid)\n',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-8]", "SLURM_NNODES": "8", "SLURM_JOB_ID": "77"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", str(SLURM), "stage1_1.toml"], cwd=tmp_path, env=environment)
    try:
        while not (tmp_path / "srun.pid").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(number)
        assert job.wait(timeout=30) != 0
    finally:
        job.kill()
        step = int((tmp_path / "srun.pid").read_text())
        if not saves:
            os.kill(step, signal.SIGKILL)
    assert (tmp_path / "saved").exists() == saves
    assert (tmp_path / "requeued").exists() == comes_back
    if comes_back:
        assert (tmp_path / "cancelled").read_text() == "--signal=TERM 77\n"
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    words = (tmp_path / "srun.words").read_text()
    assert "--rdzv-endpoint node1:29500" in words and words.endswith("-m navil_megatron.pretrain stage1_1.toml\n")


def manifest(model: str = "2b", phase: str = "stage1_1") -> dict[str, Any]:
    """The manifest as its own comments say to change it."""
    text = MANIFEST.read_text().replace("2b", model)
    digit = phase.removeprefix("stage1_")
    text = re.sub(r"stage1([-_])1", rf"stage1\g<1>{digit}" if digit.isdigit() else phase, text)
    return yaml.safe_load(text)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("phase", PHASES)
def test_the_manifest_is_a_pytorch_job(model: str, phase: str) -> None:
    job = manifest(model.removeprefix("navil_"), phase)
    assert check_pytorch_job(job) == []
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    (config,) = container["args"]
    assert (EXAMPLES / Path(container["workingDir"]).name / config).is_file()
    assert container["workingDir"].endswith(model) and job["metadata"]["name"] == job["spec"]["elasticPolicy"]["rdzvId"]


def test_both_models_share_their_files() -> None:
    for path in (SLURM, MANIFEST):
        assert (EXAMPLES / "navil_9b" / path.name).resolve() == path


def test_both_clusters_set_the_same_for_torchrun() -> None:
    job = manifest()
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    settings = {entry["name"]: entry["value"] for entry in container["env"]}
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", SLURM.read_text(), re.MULTILINE))
    assert settings.keys() == exported.keys()
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        assert settings[name] == exported[name]
    assert int(settings["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"] == 600
    assert "--signal=B:USR1@600" in SLURM.read_text()
    assert worker["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"] == 64
    assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])


def _pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "spec.elasticPolicy.maxRestart": lambda job: job["spec"]["elasticPolicy"].update(maxRestart=3),
    "spec.nprocPerNode": lambda job: job["spec"].update(nprocPerNode=8),
    "spec.runPolicy.backoffLimit": lambda job: job["spec"]["runPolicy"].update(backoffLimit="many"),
    "Worker.replica": lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].update(replica=8),
    "spec.pytorchReplicaSpecs.Slave": lambda job: job["spec"]["pytorchReplicaSpecs"].update(Slave={"replicas": 1}),
    "restartPolicy": lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].update(restartPolicy="Sometimes"),
    "spec.runPolicy": lambda job: job["spec"].pop("runPolicy"),
    "terminationGracePeriod": lambda job: _pod(job).update(terminationGracePeriod=600),
    "volumeMount": lambda job: _pod(job)["containers"][0].update(volumeMount=[]),
    "medium": lambda job: _pod(job)["volumes"][1]["emptyDir"].update(medium=1),
    "apiVersion": lambda job: job.update(apiVersion="kubeflow.org/v2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_manifest_is_found(name: str) -> None:
    job = copy.deepcopy(manifest())
    WRONG[name](job)
    assert any(name in problem for problem in check_pytorch_job(job)), check_pytorch_job(job)
