"""Two torchrun agents as two machines: what becomes of a run when one of them dies, freezes or held the rendezvous."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Place:
    """Where an agent runs: on this machine, or in a network namespace, which has interfaces of its own."""

    enter: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"
    settings: tuple[str, ...] = ()
    """Of the config, for this node alone."""


class Node:
    """One agent and its rank; both write to the node's log."""

    def __init__(self, log: Path, host: str, is_host: bool, config: str, place: Place) -> None:
        # docs/multi_node.md explains the settings; the times are shorter here.
        conf = f"is_host={int(is_host)},keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"
        command = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1", "--monitor-interval", "0.1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", host]
        command += ["--rdzv-conf", conf, "--local-addr", place.address]
        command += ["-m", "navil_megatron.pretrain", config, *place.settings]
        settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        settings["GLOO_SOCKET_IFNAME"] = place.interface
        self.log = log
        with log.open("w") as file:
            self.agent = psutil.Popen(
                [*place.enter, sys.executable, "-m", "torch.distributed.run", *command],
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

    def start(self, is_host: bool, place: Place = Place()) -> Node:
        if is_host:
            self.host = f"{place.address}:{self.port}"
        node = Node(self.folder / f"node{len(self.all)}.log", self.host, is_host, self.toml, place)
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
def nodes_of(folder: Path, config: NaViLConfig) -> Iterator[Nodes]:
    """No process of theirs outlives the test."""
    nodes = Nodes(folder, config)
    try:
        yield nodes
    finally:
        for node in nodes.all:
            node.signal(signal.SIGKILL)
            node.agent.wait(timeout=30)


@contextmanager
def two_nodes(world: World, folder: Path, **runtime: int) -> Iterator[tuple[Nodes, Node, Node]]:
    """A run on a node that holds the rendezvous and another one, past its first save."""
    saving = {"save_every_steps": SAVE_EVERY}
    config = make_run(world, folder, training={"train_steps": TRAIN_STEPS}, checkpoint=saving, runtime=runtime)
    with nodes_of(folder, config) as nodes:
        host, other = nodes.start(is_host=True), nodes.start(is_host=False)
        nodes.wait(lambda: FIRST_SAVE in saved_steps(config))
        yield nodes, host, other


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


class Network:
    """Machines as network namespaces on a switch, each with a disk of its own; none outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, list[str]()

    def add(self) -> Place:
        """A machine; the first one is the switch, too."""
        number, first = len(self.names) + 1, self.names[:1]
        name, interface, address = f"navil{os.getpid()}-{number}", "eth0" if first else "switch", f"10.77.0.{number}"
        self._ip("netns", "add", name)
        self.names.append(name)
        if first:
            self._ip("-n", *first, "link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            self._ip("-n", *first, "link", "set", f"to{number}", "master", "switch", "up")
        else:
            self._ip("-n", name, "link", "add", "switch", "type", "bridge")
        self._ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
        for device in ("lo", interface):
            self._ip("-n", name, "link", "set", device, "up")
        self._ip("-n", name, "route", "add", "default", "dev", interface)
        disk = self.folder / f"disk{number}"
        enter, setting = ("ip", "netns", "exec", name), f"checkpoint.local_directory={disk}"
        return Place(enter, address, interface, (setting,))

    def remove(self, number: int) -> None:
        """A machine that will not come back, nor its disk."""
        self._ip("netns", "delete", self.names[number - 1])
        shutil.rmtree(self.folder / f"disk{number}")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Skips where no namespaces can be made."""
    probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"]
    if shutil.which("ip") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no network namespaces can be made here")
    made = Network(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
def test_a_node_is_lost_with_its_disk(world: World, network: Network, tmp_path: Path) -> None:
    """No checkpoint at all: the run goes on from copies, one of which lay on the next node."""
    every = {"local_directory": "each has its own", "local_every_steps": 2}
    config = make_run(world, tmp_path, training={"train_steps": TRAIN_STEPS}, checkpoint=every)
    with nodes_of(tmp_path, config) as nodes:
        host, other = nodes.start(is_host=True, place=network.add()), nodes.start(is_host=False, place=network.add())
        nodes.wait(lambda: len(list(tmp_path.glob("disk*/*/step_00000006.*/rank_*[0-9]"))) == 4)
        other.signal(signal.SIGKILL)
        network.remove(2)
        nodes.wait(lambda: host.says("broke off: rank"))
        last = max(record["step"] for record in records(config, "train"))
        assert 6 <= last < TRAIN_STEPS and not any(name.startswith("step") for name in saved_steps(config))
        nodes.finish(host, nodes.start(is_host=False, place=network.add()))
        assert nodes.say("restored step_")
        steps = [record["step"] for record in records(config, "train") if record["step"] % 2 == 0]
        again = steps[steps.index(last - last % 2) + 1]
        assert last - 4 <= again <= last + 2  # two copies back at most
        assert not list(tmp_path.glob("disk*/*"))  # the run is over
    assert_unharmed(world, tmp_path, config)
