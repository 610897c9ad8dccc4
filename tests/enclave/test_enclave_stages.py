"""Promise: rows that go through a model in stages, kept in the enclave between them and gathered
into other batches, come out as from plain ONNX Runtime; and memory is as the host divides it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lasagna.bench.direct import InsecureDirectEnclave
from lasagna.enclave import messages as m
from lasagna.errors import EnclaveError, InvalidInputError, ModelNotFoundError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare
from lasagna.models.zoo.light import light_model
from lasagna.tee.measurement import measure_code, source_root
from lasagna.trust.keys import SecretKey, ServiceSecret

from .asking import (
    BUDGET,
    HELD,
    assert_answer,
    client,
    give,
    in_stages,
    kept,
    part,
    results,
    run,
    slices,
)
from .conftest import Sealed

pytestmark = pytest.mark.integration

CUTS = (3, 6)


def started(
    sealed: Sealed, threads: int = 1, secret: ServiceSecret | None = None
) -> InsecureDirectEnclave:
    return InsecureDirectEnclave(
        sealed.path, sealed.keys, BUDGET, threads=threads, service_secret=secret
    )


@pytest.fixture(scope="module")
def running(squeezenet: Sealed) -> Iterator[InsecureDirectEnclave]:
    with started(squeezenet) as enclave:
        yield enclave


@pytest.fixture
def enclave(running: InsecureDirectEnclave, squeezenet: Sealed) -> InsecureDirectEnclave:
    """Three stages, nothing inside."""
    for number in range(10):
        running.call(m.Forget(running.next_id(), number), m.Done)
    give(running, in_stages(squeezenet, running.digest, CUTS))
    return running


def test_rows_of_three_requests_are_gathered_into_one_late_batch(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    clients = [client(enclave, squeezenet, rows, seed) for seed, rows in enumerate((1, 2, 1))]
    before = enclave.stats()
    for number, (_, request) in enumerate(clients):
        assert results(enclave, [part(number, request)], 0, 3, keep=True) == (m.PartResult(),)
    late = [kept(number, 0, request.rows.rows) for number, (_, request) in enumerate(clients)]
    results(enclave, late[:2], 3, 6, keep=True)
    results(enclave, late[2:], 3, 6, keep=True)
    found = results(enclave, late, 6, slices(squeezenet))
    after = enclave.stats()
    for (values, request), one in zip(clients, found, strict=True):
        assert_answer(enclave, squeezenet, values, request, one)
    assert after.rows - before.rows == 4
    assert after.slice_runs - before.slice_runs == 3 * 3 + 2 * 3 + slices(squeezenet) - 6
    assert after.row_slices - before.row_slices == 4 * slices(squeezenet)


def test_a_requests_rows_go_their_own_ways(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    """In other runs, in another order than they came, with another request's between them."""
    (values, request), (others, other) = (client(enclave, squeezenet, n, 9 - n) for n in (3, 1))
    end = slices(squeezenet)
    results(enclave, [part(1, request, 2, 1), part(2, other)], 0, 3, keep=True)
    results(enclave, [part(1, request, 0, 2)], 0, 3, keep=True)
    (second, third) = results(enclave, [kept(1, 1), kept(1, 2)], 3, end)
    (foreign, first) = results(enclave, [kept(2), kept(1, 0)], 3, end)
    assert_answer(enclave, squeezenet, values, request, first, second, third)
    assert_answer(enclave, squeezenet, others, other, foreign)


def test_a_run_may_go_past_cuts(enclave: InsecureDirectEnclave, squeezenet: Sealed) -> None:
    values, request = client(enclave, squeezenet, 2, 5)
    results(enclave, [part(1, request)], 0, 6, keep=True)
    found = results(enclave, [kept(1, 0, 2)], 6, slices(squeezenet))
    assert_answer(enclave, squeezenet, values, request, *found)


def test_what_is_forgotten_makes_room_and_is_not_to_be_had_again(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    _, request = client(enclave, squeezenet, HELD, 1)
    for first in (0, 3):
        results(enclave, [part(1, request, first, 3)], 0, 3, keep=True)
    values, other = client(enclave, squeezenet, 1, 2)
    with pytest.raises(InvalidInputError, match="its capacity"):
        results(enclave, [part(2, other)], 0, 3, keep=True)
    for _ in range(2):  # once too often does no harm
        enclave.call(m.Forget(enclave.next_id(), 1), m.Done)
    with pytest.raises(InvalidInputError, match="request 1 is not here"):
        results(enclave, [kept(1)], 3, 6)
    results(enclave, [part(2, other)], 0, 3, keep=True)
    (found,) = results(enclave, [kept(2)], 3, slices(squeezenet))
    assert_answer(enclave, squeezenet, values, other, found)


@pytest.mark.parametrize("cut", [1, 5, -1])
def test_activations_sealed_at_a_cut_go_on_in_another_enclave(squeezenet: Sealed, cut: int) -> None:
    """At this cut only, and in other batches than they came from; from sealed and kept rows."""
    secret = ServiceSecret(SecretKey(os.urandom(32)))
    end = slices(squeezenet)
    cut %= end
    with started(squeezenet, secret=secret) as one, started(squeezenet, secret=secret) as two:
        give(one, in_stages(squeezenet, one.digest, [max(1, cut - 1)]))
        give(two, in_stages(squeezenet, two.digest, [2]))
        values, request = client(one, squeezenet, 2, 3)
        halves = list(results(one, [part(1, request, 0, 1)], 0, cut))
        if cut > 1:
            results(one, [part(1, request, 1, 1)], 0, cut - 1, keep=True)
            halves += results(one, [kept(1, 1)], cut - 1, cut)
        else:
            halves += results(one, [part(1, request, 1, 1)], 0, cut)
        records = [
            tuple(tuple(memoryview(row) for row in rows) for rows in half.records)
            for half in halves
        ]
        passed = [
            m.Part(1, row, 1, m.SealedRows(request.rows.request_id, request.rows.capsule, 2, found))
            for row, found in enumerate(records)
        ]
        assert_answer(two, squeezenet, values, request, *results(two, passed, cut, end))
        for wrong_cut in {cut + 1, cut - 1} - {0, end}:
            for refused in results(two, passed, wrong_cut, end):
                assert refused.kind == "TrustError"
        swapped = [m.Part(1, 1 - row, 1, one.sealed) for row, one in enumerate(passed)]
        for refused in results(two, swapped, cut, end):
            assert refused.kind == "TrustError"


def test_one_bad_record_fails_its_own_request_only(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    """In a run that keeps its rows, too: nothing of the bad one is kept."""
    clients = [client(enclave, squeezenet, 1, seed) for seed in range(3)]
    parts = [part(number, request) for number, (_, request) in enumerate(clients)]
    sealed = parts[1].sealed
    assert sealed is not None
    bad = bytearray(sealed.records[0][0])
    bad[-1] ^= 1
    records = ((memoryview(bad),),)
    parts[1] = m.Part(1, 0, 1, m.SealedRows(sealed.request_id, sealed.capsule, 1, records))
    found = results(enclave, parts, 0, 3, keep=True)
    assert [one.kind for one in found] == ["", "TrustError", ""]
    with pytest.raises(InvalidInputError, match="row 0 of request 1 is not at this cut"):
        results(enclave, [kept(0), kept(1)], 3, 6)
    good = results(enclave, [kept(0), kept(2)], 3, slices(squeezenet))
    for index, one in zip((0, 2), good, strict=True):
        assert_answer(enclave, squeezenet, *clients[index], one)


# The division of the memory.


def test_memory_is_divided_anew_and_what_was_inside_is_gone(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    values, request = client(enclave, squeezenet, 1, 4)
    results(enclave, [part(1, request)], 0, 3, keep=True)
    first = give(enclave, in_stages(squeezenet, enclave.digest, [4], pinned=(0, 5)))
    with pytest.raises(InvalidInputError, match="no rows are kept at cut 3"):
        results(enclave, [kept(1)], 3, 6)
    with pytest.raises(InvalidInputError, match="row 0 of request 1 is not at this cut"):
        results(enclave, [kept(1)], 4, 6)
    results(enclave, [part(1, request)], 0, 4, keep=True)
    (found,) = results(enclave, [kept(1)], 4, slices(squeezenet))
    assert_answer(enclave, squeezenet, values, request, found)
    assert enclave.stats().pool_bytes == first.pool_bytes
    for _ in range(3):
        again = give(enclave, in_stages(squeezenet, enclave.digest, [4], pinned=(0, 5)))
        assert again.pool_bytes == first.pool_bytes


def _mapped(pid: int) -> int:
    """Bytes of writable memory of a process that is no file's."""
    total = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, access, _, _, _, *name = line.split(maxsplit=5)
        if access == "rw-p" and not name:
            begin, end = (int(place, 16) for place in span.split("-"))
            total += end - begin
    return total


def test_an_arrangement_gives_its_memory_back_before_the_next_takes_any(
    squeezenet: Sealed,
) -> None:
    """Also what a thread that waits has seen last; and a run that failed."""
    with started(squeezenet, threads=2) as enclave:
        sizes = []
        for turn in range(6):
            room = in_stages(squeezenet, enclave.digest, CUTS, threads=2, held=25)
            give(enclave, room)
            enclave.call(m.Forget(enclave.next_id(), 9), m.Done)
            sizes.append(_mapped(enclave.pid))
            _, request = client(enclave, squeezenet, 1, turn)
            for number in range(4):  # on both threads
                enclave.send(run(enclave, [part(number, request)], 0, slices(squeezenet)))
                enclave.send(run(enclave, [part(9, request)], 0, 3, keep=True))
            outcomes = []
            for _ in range(8):
                try:
                    outcomes.append(enclave.receive(m.Ran).results)
                except InvalidInputError:
                    outcomes.append(())
            assert outcomes.count(()) == 3, "the row was at the cut already"
        used = enclave.stats().pool_bytes
        assert used > 60_000_000
        assert max(sizes) < sizes[0] + used // 3


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """Another SqueezeNet, in other slices."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    source = prepare(light_model("squeezenet", seed=4))
    path = tmp_path_factory.mktemp("other") / "other.lsg"
    options = SealOptions(slice_bytes=1024 * 1024, profile=False, portable=False)
    keys, report = seal(source, "other", Ed25519PrivateKey.generate(), path, options)
    return Sealed(path, keys, report.manifest, open_session(source))


class Two:
    """Two models in one enclave; ``use`` says for which one to seal and run."""

    def __init__(self, enclave: InsecureDirectEnclave, first: Sealed, second: Sealed) -> None:
        self.enclave = enclave
        self._facts = {id(first): (enclave.digest, enclave._claims)}
        enclave._load(second.path, second.keys, measure_code(source_root()), None)
        self._facts[id(second)] = (enclave.digest, enclave._claims)

    def use(self, sealed: Sealed) -> bytes:
        self.enclave.digest, self.enclave._claims = self._facts[id(sealed)]
        return self.enclave.digest

    def give(self, first: Sealed, second: Sealed) -> None:
        wishes = [in_stages(one, self.use(one), CUTS, pinned=(1,)) for one in (first, second)]
        slot = max(wish.slot_bytes for wish in wishes)
        most = max(wish.activation_bytes for wish in wishes)
        work = max(wish.workspace_bytes for wish in wishes)
        models = tuple(wish.models[0] for wish in wishes)
        inputs = wishes[0].input_bytes
        give(self.enclave, m.Arrange(0, models, 1, 2, slot, 2, inputs, most, work))


def test_two_models_share_an_enclave_and_keep_their_requests_apart(
    squeezenet: Sealed, other: Sealed
) -> None:
    with started(squeezenet) as enclave:
        two = Two(enclave, squeezenet, other)
        two.give(squeezenet, other)
        asked = []
        for number, sealed in enumerate((squeezenet, other, squeezenet, other)):
            two.use(sealed)
            values, request = client(enclave, sealed, 2, number)
            results(enclave, [part(number, request)], 0, 3, keep=True)
            asked.append((sealed, values, request))
        two.use(other)
        with pytest.raises(InvalidInputError, match="request 0 is for another model"):
            results(enclave, [kept(0)], 3, 6)
        with pytest.raises(InvalidInputError, match="request 0 is for another model"):
            results(enclave, [part(0, asked[0][2])], 0, 6)
        (refused,) = results(enclave, [part(7, asked[0][2])], 0, 6)
        assert refused.kind == "TrustError", "its capsule is for the other service"
        for sealed in (other, squeezenet):
            two.use(sealed)
            mine = [number for number, (of, _, _) in enumerate(asked) if of is sealed]
            found = results(enclave, [kept(n, 0, 2) for n in mine], 3, slices(sealed))
            for number, one in zip(mine, found, strict=True):
                assert_answer(enclave, sealed, *asked[number][1:], one)


def test_a_model_is_unloaded_when_it_has_no_memory_and_comes_again(
    squeezenet: Sealed, other: Sealed
) -> None:
    with started(squeezenet) as enclave:
        two = Two(enclave, squeezenet, other)
        two.give(squeezenet, other)
        digest = two.use(other)
        with pytest.raises(EnclaveError, match="model 'other' is in the arrangement"):
            enclave.call(m.Unload(enclave.next_id(), digest), m.Done)
        _, old = client(enclave, other, 1, 0)
        results(enclave, [part(1, old)], 0, 3, keep=True)
        give(enclave, in_stages(squeezenet, two.use(squeezenet), CUTS))
        enclave.call(m.Unload(enclave.next_id(), digest), m.Done)
        for gone in (
            m.Unload(enclave.next_id(), digest),
            m.Attest(enclave.next_id(), digest),
            m.Run(enclave.next_id(), digest, 0, 3, (part(2, old),)),
            m.Arrange(0, in_stages(other, digest, CUTS).models, 1, 2, 2**20, 0, 0, 2**22, 2**22),
        ):
            with pytest.raises(ModelNotFoundError):
                enclave.call(gone, m.Done)
        two = Two(enclave, squeezenet, other)  # with another service, whose keys are others
        two.give(squeezenet, other)
        two.use(other)
        with pytest.raises(InvalidInputError, match="request 1 is not here"):
            results(enclave, [kept(1)], 3, 6)
        assert results(enclave, [part(1, old)], 0, 6)[0].kind == "TrustError"
        values, request = client(enclave, other, 1, 1)
        (found,) = results(enclave, [part(1, request)], 0, slices(other))
        assert_answer(enclave, other, values, request, found)


@pytest.mark.parametrize("threads", [1, 2])
def test_slices_are_pinned_and_unpinned_while_runs_go_on(squeezenet: Sealed, threads: int) -> None:
    with started(squeezenet, threads=threads) as enclave:
        give(enclave, in_stages(squeezenet, enclave.digest, (), pinned=(2,), threads=threads))
        before = enclave.stats().pool_bytes
        end, asked = slices(squeezenet), {}
        moves: set[int] = set()
        for turn in range(12):
            values, request = client(enclave, squeezenet, 1, turn)
            command = run(enclave, [part(turn, request)], 0, end)
            asked[command.id] = (values, request)
            enclave.send(command)
            for number in (turn % end, (3 * turn + 1) % end):
                if number == 2:
                    continue
                for kind in (m.Pin, m.Unpin):
                    move = kind(enclave.next_id(), enclave.digest, number)
                    moves.add(move.id)
                    enclave.send(move)
        while asked or moves:
            reply = enclave._receive()
            if isinstance(reply, m.Ran):
                assert_answer(enclave, squeezenet, *asked.pop(reply.id), *reply.results)
            else:
                assert isinstance(reply, m.Done)
                moves.remove(reply.id)
        assert enclave.stats().pool_bytes == before
        assert enclave.stats().loads > 12


def test_a_pinned_slice_is_loaded_no_more(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    everything = range(slices(squeezenet))
    for number in everything:
        enclave.call(m.Pin(enclave.next_id(), enclave.digest, number), m.Done)
    before = enclave.stats()
    values, request = client(enclave, squeezenet, 1, 8)
    (found,) = results(enclave, [part(1, request)], 0, slices(squeezenet))
    assert_answer(enclave, squeezenet, values, request, found)
    assert enclave.stats().loads == before.loads
