"""Two torchrun agents as two machines: what becomes of a run when one of them dies, freezes or held the rendezvous."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from navil_megatron.config.run import NaViLConfig
from tests.conftest import REPOSITORY
from tests.e2e.runs import World, make_run, records, saved_steps, train_in_rank, write_toml
from tests.ranks import run_ranks
from tests.whole_checkpoint import read_whole_checkpoint

TRAIN_STEPS, SAVE_EVERY = 40, 10
FIRST_SAVE = f"step_{SAVE_EVERY:08d}"
BUSY_SECONDS = 300.0
"""A start of four processes that import torch, on cores that others use too."""


class Node:
    """One agent and its rank; both write to the node's log."""

    def __init__(self, log: Path, port: int, is_host: bool, config: str) -> None:
        # docs/multi_node.md explains the settings; the times are shorter here.
        conf = f"is_host={int(is_host)},keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"
        command = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1", "--monitor-interval", "0.1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        command += ["--rdzv-conf", conf, "--local-addr", "127.0.0.1", "-m", "navil_megatron.pretrain", config]
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.log = log
        with log.open("w") as file:
            self.agent = psutil.Popen(
                [sys.executable, "-m", "torch.distributed.run", *command],
                cwd=REPOSITORY,
                env=os.environ | settings,
                stdout=file,
                stderr=file,
            )

    def signal(self, number: int) -> None:
        """The same to all processes at once, as a machine that stops; ranks have sessions of their own."""
        with suppress(psutil.NoSuchProcess):
            for process in (self.agent, *self.agent.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def says(self, words: str) -> bool:
        """Whether its log holds these words."""
        return words in self.log.read_text()


class Nodes:
    """The machines of one run."""

    def __init__(self, folder: Path, config: NaViLConfig) -> None:
        self.folder, self.config = folder, config
        self.toml = str(write_toml(config, folder / "run.toml"))
        self.port = free_port()
        self.all: list[Node] = []

    def start(self, is_host: bool) -> Node:
        node = Node(self.folder / f"node{len(self.all)}.log", self.port, is_host, self.toml)
        self.all.append(node)
        return node

    def say(self, words: str) -> bool:
        """Whether any node's log holds these words. Agents order ranks by process id, so the first may be on any."""
        return any(node.says(words) for node in self.all)

    def wait(self, happened: Callable[[], bool], seconds: float = BUSY_SECONDS) -> None:
        """Until something is there; the logs of all nodes if it does not come."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise AssertionError("".join(f"\n--- {node.log.name}\n{node.log.read_text()}" for node in self.all))
            time.sleep(0.02)

    def finish(self, *nodes: Node) -> None:
        """Waits for agents to end, each with 0."""
        self.wait(lambda: all(node.agent.poll() is not None for node in nodes))
        assert [node.agent.returncode for node in nodes] == [0] * len(nodes), [node.log.read_text() for node in nodes]


@contextmanager
def two_nodes(world: World, folder: Path, **runtime: int) -> Iterator[tuple[Nodes, Node, Node]]:
    """A run on a node that holds the rendezvous and another one, past its first save; nothing outlives the test."""
    saving = {"save_every_steps": SAVE_EVERY}
    config = make_run(world, folder, training={"train_steps": TRAIN_STEPS}, checkpoint=saving, runtime=runtime)
    nodes = Nodes(folder, config)
    try:
        host, other = nodes.start(is_host=True), nodes.start(is_host=False)
        nodes.wait(lambda: FIRST_SAVE in saved_steps(config))
        yield nodes, host, other
    finally:
        for node in nodes.all:
            node.signal(signal.SIGKILL)
            node.agent.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def assert_unharmed(world: World, folder: Path, config: NaViLConfig) -> None:
    """Every step's record, also of steps that were done twice, and the last weights are those of an undisturbed run."""
    straight = make_run(world, folder / "straight", training={"train_steps": TRAIN_STEPS})
    run_ranks(2, train_in_rank, straight)
    names = ("loss", "grad_norm", "consumed_samples", "consumed_tokens")
    expected = {record["step"]: [record[name] for name in names] for record in records(straight, "train")}
    found = records(config, "train")
    assert {record["step"] for record in found} == set(range(1, TRAIN_STEPS + 1))
    assert all([record[name] for name in names] == expected[record["step"]] for record in found)
    last = f"step_{TRAIN_STEPS:08d}"
    weights = [read_whole_checkpoint(Path(run.checkpoint.directory) / last)[1] for run in (config, straight)]
    torch.testing.assert_close(*weights, rtol=0.0, atol=0.0)


def test_another_node_takes_the_place_of_a_dead_one(world: World, tmp_path: Path) -> None:
    with two_nodes(world, tmp_path) as (nodes, host, other):
        other.signal(signal.SIGKILL)
        nodes.wait(lambda: host.says("broke off: rank"))
        assert len(records(nodes.config, "train")) < TRAIN_STEPS
        nodes.finish(host, nodes.start(is_host=False))
        assert nodes.say("restored") and host.says("exitcode: 3")
    assert_unharmed(world, tmp_path, nodes.config)


@pytest.mark.slow
def test_a_node_that_is_drained_costs_no_step(world: World, tmp_path: Path) -> None:
    with two_nodes(world, tmp_path) as (nodes, host, other):
        other.agent.terminate()
        nodes.wait(lambda: host.says("exitcode: 4"))
        nodes.finish(host, nodes.start(is_host=False))
        assert nodes.say("stopped on request at step")
        assert [record["step"] for record in records(nodes.config, "train")] == list(range(1, TRAIN_STEPS + 1))
    assert_unharmed(world, tmp_path, nodes.config)


@pytest.mark.slow
def test_a_frozen_node_comes_back(world: World, tmp_path: Path) -> None:
    with two_nodes(world, tmp_path, collective_timeout_seconds=5) as (nodes, host, other):
        other.signal(signal.SIGSTOP)
        nodes.wait(lambda: host.says("hung: rank"))
        other.signal(signal.SIGCONT)
        nodes.finish(host, other)
    assert_unharmed(world, tmp_path, nodes.config)


@pytest.mark.slow
def test_without_the_rendezvous_the_run_ends_and_can_be_started_again(world: World, tmp_path: Path) -> None:
    with two_nodes(world, tmp_path) as (nodes, host, other):
        host.signal(signal.SIGKILL)
        nodes.wait(lambda: other.agent.poll() is not None)
        assert other.agent.returncode == 1
        assert len(records(nodes.config, "train")) < TRAIN_STEPS
        # The scheduler starts the job again: the same port, the same name of the run.
        nodes.finish(nodes.start(is_host=True), nodes.start(is_host=False))
    assert_unharmed(world, tmp_path, nodes.config)
