"""Promise: a cluster's file says what its reference says; each mistake is named with its mend."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from tests.policy.machine import MB, linear

from lasagna.cli.cluster_file import BESIDE_MB, ClusterFile, read_cluster
from lasagna.errors import UsageError
from lasagna.server.costs import ENTRY_S, LOAD_RATE
from lasagna.tee.epc_profiles import profile

ROOT: Final = Path(__file__).resolve().parents[2]
REFERENCE: Final = ROOT / "docs/reference/cluster-file.md"
SERVER: Final = '[[server]]\nname = "a"\nepc_mb = 100\n'
DEMAND: Final = "[demand]\nnet = 1\n"
FORMS: Final = (linear([MB, MB], [1000, 1000], [0.01, 0.01]),)


def read(folder: Path, text: str) -> ClusterFile:
    path = folder / "cluster.toml"
    path.write_text(text)
    return read_cluster(path)


def refused(folder: Path, text: str) -> str:
    """What is said of a file, which begins with its path."""
    with pytest.raises(UsageError) as caught:
        read(folder, text)
    said = str(caught.value)
    assert "cluster.toml" in said
    return said


def test_every_key_arrives_in_the_units_of_the_policies(tmp_path: Path) -> None:
    """Promise: MB, Mbit/s and milliseconds of the file are bytes and seconds for the planner."""
    file = read(
        tmp_path,
        '[[server]]\nname = "a"\nepc_mb = 100.5\nbeside_mb = 0.5\nthreads = 3\ncores = 4\n'
        "speed = 1.5\nlink_mbit = 80\ndelay_ms = 2\n[demand]\nnet = 4\n[limits_ms]\nnet = 500\n",
    )

    (server,) = file.servers
    assert server.machine.budget == 100 * MB
    assert (server.machine.lanes, server.machine.cores) == (3, 4)
    assert (server.machine.load_rate, server.machine.entry_s) == (LOAD_RATE, ENTRY_S)
    assert (server.name, server.speed) == ("a", 1.5)
    assert server.bandwidth == 10e6
    assert server.delay_s == 0.002
    assert (file.demand, file.limits_s) == ({"net": 4.0}, {"net": 0.5})


def test_defaults_are_for_servers_that_say_nothing_else(tmp_path: Path) -> None:
    """Promise: a server's own key wins, and either key of the EPC replaces the other."""
    file = read(
        tmp_path,
        '[defaults]\nepc = "sgx1-128"\nthreads = 2\n[[server]]\nname = "a"\n'
        '[[server]]\nname = "b"\nepc_mb = 50\nthreads = 1\n' + DEMAND,
    )

    first, second = (server.machine for server in file.servers)
    beside = int(BESIDE_MB * MB)
    assert first.budget == profile("sgx1-128").epc_bytes.value - beside
    assert (first.lanes, first.cores) == (2, 2)
    assert (second.budget, second.lanes) == (50 * MB - beside, 1)


def test_count_makes_servers_alike_with_names_of_their_own(tmp_path: Path) -> None:
    """Promise: count = 3 is three servers of one kind."""
    file = read(tmp_path, '[[server]]\nname = "edge-{}"\ncount = 3\nepc_mb = 100\n' + DEMAND)

    assert [server.name for server in file.servers] == ["edge-1", "edge-2", "edge-3"]
    assert len({server.kind for server in file.servers}) == 1


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[server", "is no TOML"),
        ("\xff[demand]", "is no TOML"),
        (SERVER, "the key 'demand' is missing"),
        (DEMAND, "the key 'server' is missing"),
        (f"server = []\n{DEMAND}", "server: expected array of length >= 1"),
        (f"[[servers]]\n{DEMAND}", "there is no key 'servers'; did you mean 'server'?"),
        (f"{SERVER}thread = 2\n{DEMAND}", r"number 1 \('a'\): .*'thread'; did you mean 'threads'"),
        (f"{SERVER}threads = 0\n{DEMAND}", r"number 1 \('a'\), threads: expected int >= 1"),
        (f'{SERVER}cores = "2"\n{DEMAND}', "cores: expected int, got str"),
        (f"{SERVER}speed = nan\n{DEMAND}", "speed: expected float > 0"),
        (f"{SERVER}speed = inf\n{DEMAND}", "speed: expected float <= 1"),
        (f"{SERVER}link_mbit = 0\n{DEMAND}", "link_mbit: expected float > 0"),
        (f"{SERVER}delay_ms = -1\n{DEMAND}", "delay_ms: expected float >= 0"),
        (f"[[server]]\nepc_mb = 9\n{DEMAND}", "number 1: the key 'name' is missing"),
        (f'[[server]]\nname = "a"\n{DEMAND}', "its EPC is missing: give epc = .* or epc_mb"),
        (f'{SERVER}epc = "sgx1-128"\n{DEMAND}', "epc and epc_mb are both given"),
        (
            f'[[server]]\nname = "a"\nepc = "sgx9"\n{DEMAND}',
            "epc: there is no profile 'sgx9'; there are .*sgx1-128",
        ),
        (f"{SERVER}beside_mb = 100\n{DEMAND}", "an EPC of 100 MB leaves nothing for models"),
        (f"{SERVER}count = 2\n{DEMAND}", 'with count it needs one {} .* such as "edge-{}"'),
        (f"{SERVER}{SERVER}{DEMAND}", "two servers are called 'a'"),
        (f'[[server]]\nname = "a\\u0007"\nepc_mb = 100\n{DEMAND}', "can't be printed"),
        (f'[defaults]\nname = "a"\n{SERVER}{DEMAND}', r"\[defaults\]: 'name' belongs to each"),
        (f"[defaults]\nspeeds = 1\n{SERVER}{DEMAND}", r"\[defaults\]: .* did you mean 'speed'"),
        (f"{SERVER}[demand]\nnet = -1\n", "demand.*: expected float >= 0"),
        (f"{SERVER}{DEMAND}[limits_ms]\nnet = 0\n", "limits_ms.*: expected float > 0"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_mend(
    tmp_path: Path, text: str, wrong: str
) -> None:
    """Promise: whoever makes a mistake is told the file, the key and what would be right."""
    said = refused(tmp_path, text)

    assert re.search(wrong, said), said


def test_a_file_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    """Promise: what is missing, binary or far too long is refused in one line."""
    with pytest.raises(UsageError, match=r"can't read .*absent\.toml: No such file"):
        read_cluster(tmp_path / "absent.toml")
    (tmp_path / "cluster.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is no TOML"):
        read_cluster(tmp_path / "cluster.toml")
    (tmp_path / "cluster.toml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(UsageError, match="more than 1,048,576 bytes"):
        read_cluster(tmp_path / "cluster.toml")


@pytest.mark.parametrize(
    ("demand", "wrong"),
    [
        ("[demand]\nnet = 1\nnett = 1\n", r"\[demand\]: no model 'nett' .* did you mean 'net'?"),
        ("[demand]\nzoo = 1\n", r"\[demand\]: no model 'zoo' was given; there are net"),
        ("[demand]\n", r"\[demand\]: 'net' is missing: add the requests a second"),
        ("[demand]\nnet = 0\n", "no model has requests a second above 0"),
        ("[demand]\nnet = 1\n[limits_ms]\nbet = 9\n", r"\[limits_ms\]: no model 'bet'"),
    ],
)
def test_demand_and_models_must_agree(tmp_path: Path, demand: str, wrong: str) -> None:
    """Promise: a model that is misspelt is not taken for one that nobody asks for."""
    file = read(tmp_path, SERVER + demand)

    with pytest.raises(UsageError, match=wrong):
        file.cluster({"net": FORMS})


def test_a_cluster_has_the_servers_and_the_models(tmp_path: Path) -> None:
    """Promise: what the planner gets is the file's servers and the given models."""
    file = read(tmp_path, SERVER + DEMAND)
    cluster = file.cluster({"net": FORMS})

    assert cluster.servers == file.servers
    assert cluster.wanted == ("net",)


def test_the_reference_documents_every_key_and_its_example_is_right(tmp_path: Path) -> None:
    """Promise: the reference can be relied on: no key is left out, and its example can be read."""
    text = REFERENCE.read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    keys = "name count epc epc_mb beside_mb threads cores speed link_mbit delay_ms".split()

    assert [key for key in keys if f"| `{key}` |" not in text] == []
    assert f"| {BESIDE_MB:g} |" in text
    assert len(read(tmp_path, example).servers) == 4


def test_the_example_can_be_read() -> None:
    """Promise: examples/cluster.toml works with the costs beside it."""
    file = read_cluster(ROOT / "examples/cluster.toml")

    for name in file.demand:
        assert (ROOT / f"examples/costs/{name}.json").is_file()
