"""Two hosts, as two network namespaces with a cable between them: torchrun's rendezvous, gloo, and a host that is lost.

Each has its own network, name and table of names; disk and clock they share. Needs root and `ip`.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from scripts import ROOT, SHARED, compare, finish, launch, load, options

from training import checkpoint
from training.datasets import Digits

STEPS = 3 * 14
# Without it a host that comes back waits for an address that rank 0 has told once and won't tell again (torch 2.15)
TOLD_AGAIN = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
# What runs within a namespace: names of all hosts, own name, command
AS_HOST = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


class Hosts:
    """Two of them; `names` are in the order of their ranks."""

    def __init__(self, folder):
        self.names = [f"host-{os.getpid()}-{number}" for number in range(2)]
        self.table = folder / "hosts"
        self.addresses = [f"10.77.0.{number}" for number in (1, 2)]
        lines = [f"{address} {name}\n" for address, name in zip(self.addresses, self.names, strict=True)]
        self.table.write_text("".join(["127.0.0.1 localhost\n", *lines]))

    def connect(self):
        for name in self.names:
            ip("netns", "add", name)
        one, two = self.names
        ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")

    def start(self, number, argv):
        """torchrun on that host, as the README has it: the first one's name is all that is told."""
        name = self.names[number]
        torchrun = ["torch.distributed.run", *options(nnodes=2), "--nproc-per-node", "1", "--max-restarts", "3"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.names[0]}:29500"]
        within = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", AS_HOST, "sh", str(self.table), name]
        words = ["env", TOLD_AGAIN, sys.executable, "-m", *torchrun, str(ROOT / "train_imagenet.py"), *argv]
        return launch([*within, *words])

    def kill(self, number):
        """All that runs there, at once."""
        for pid in ip("netns", "pids", self.names[number]).split():
            os.kill(int(pid), signal.SIGKILL)

    def plug(self, number, how):
        """Pull the cable ("down") or put it back ("up")."""
        ip("-n", self.names[number], "link", "set", "eth0", how)

    def remove(self):
        for number, name in enumerate(self.names):
            if name in ip("netns", "list"):
                self.kill(number)
                ip("netns", "delete", name)


@pytest.fixture
def hosts(tmp_path):
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    hosts = Hosts(tmp_path)
    try:
        hosts.connect()
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        hosts.remove()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The digits as shards: eight to train on, two to evaluate."""
    root = tmp_path_factory.mktemp("digits")
    for split in ("train", "val"):
        digits = Digits(split == "train")
        for number in range(len(digits)):
            image, label = digits[number]
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(root / split / str(label) / f"{number}.png")
    assert load("write_shards").main(options(dir=root, path=root / "shards", images=180)) == 0
    return root / "shards"


@pytest.fixture(scope="module")
def run(shards):
    return [*SHARED, *options(data__name="wds", data__dir=shards, epochs=3, save_every=5, keep=99)]


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """Where one process ends that takes in turn, within each step, what two would take at a time."""
    output = tmp_path_factory.mktemp("alone")
    argv = [*run, *options(output=output, data__workers=2, optim__accumulate=2)]
    assert load("train_imagenet").main(argv) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_hosts_train_like_one_process(parallel, hosts, run, alone, tmp_path):
    argv = [*run, *options(output=tmp_path / "run", parallel=parallel)]
    (code, out, err), (other, quiet, _) = map(finish, [hosts.start(number, argv) for number in range(2)])
    assert (code, other, quiet) == (0, 0, ""), err
    assert f"cpu × 2 ({parallel})" in out
    compare(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("power", [True, False], ids=["killed", "cut_off"])
def test_a_host_that_is_lost_comes_back_and_the_run_goes_on(power, parallel, hosts, run, alone, tmp_path):
    """Killed, its connections are closed; without power nobody hears of it, until it is there again."""
    output = tmp_path / "run"
    argv = [*run, *options(output=output, parallel=parallel, resume="auto")]
    first, second = (hosts.start(number, argv) for number in range(2))
    lines = [first.stdout.readline() for _ in range(2)]
    assert lines[1].startswith("epoch 1/3"), first.stderr.read()
    if not power:
        hosts.plug(1, "down")
    hosts.kill(1)
    assert finish(second)[0] == -signal.SIGKILL
    hosts.plug(1, "up")
    assert 14 <= checkpoint.load(output / "last.pt")["step"] < STEPS
    second = hosts.start(1, argv)
    code, out, err = finish(first)
    assert code == 0, err
    assert out.count("goes on from") == 1 and finish(second)[0] == 0
    compare(alone, output)


@pytest.mark.slow
def test_where_the_hosts_met_is_lost_and_all_are_started_again(hosts, run, alone, tmp_path):
    """The rendezvous goes with its host: the other one ends with an error, and does not wait for ever."""
    output = tmp_path / "run"
    argv = [*run, *options(output=output, resume="auto")]
    first, second = (hosts.start(number, argv) for number in range(2))
    assert all(first.stdout.readline() for _ in range(2)), first.stderr.read()
    hosts.kill(0)
    code, _, err = finish(second)
    assert finish(first)[0] == -signal.SIGKILL and code == 1 and "Rendezvous" in err, err
    assert 14 <= checkpoint.load(output / "last.pt")["step"] < STEPS
    (code, out, err), (other, _, _) = map(finish, [hosts.start(number, argv) for number in range(2)])
    assert (code, other) == (0, 0) and out.count("goes on from") == 1, err
    compare(alone, output)
