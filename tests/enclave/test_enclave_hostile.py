"""Promise: whatever a host says of requests, rows, slices and memory that is not so, is an error;
the enclave lives on, and seals nothing under another request's key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from lasagna.bench.direct import ClientRequest, InsecureDirectEnclave
from lasagna.enclave import messages as m
from lasagna.errors import BudgetError, InvalidInputError, LasagnaError, ModelNotFoundError
from lasagna.package.forms import Form, extents

from .asking import (
    BATCH,
    BUDGET,
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
MINE, OTHER, GONE = 1, 2, 3


@pytest.fixture(scope="module")
def running(squeezenet: Sealed) -> Iterator[InsecureDirectEnclave]:
    with InsecureDirectEnclave(squeezenet.path, squeezenet.keys, BUDGET) as enclave:
        yield enclave


class Scene:
    """Two requests: rows 0 and 1 of the first are at cut 3, those of the other outside."""

    def __init__(self, enclave: InsecureDirectEnclave, sealed: Sealed) -> None:
        self.enclave, self.sealed, self.end = enclave, sealed, slices(sealed)
        give(enclave, in_stages(sealed, enclave.digest, CUTS))
        for number in (MINE, OTHER, GONE):
            enclave.call(m.Forget(enclave.next_id(), number), m.Done)
        self.values, self.request = client(enclave, sealed, 3, 1)
        self.others, self.other = client(enclave, sealed, 2, 2)
        results(enclave, [part(MINE, self.request, 0, 2)], 0, 3, keep=True)

    def run(self, *parts: m.Part, first: int = 0, last: int = 0, keep: bool = False) -> m.Run:
        return run(self.enclave, parts, first, last or self.end, keep=keep)

    def go_on(self) -> None:
        """Everything that was begun ends well."""
        enclave, sealed = self.enclave, self.sealed
        late = results(enclave, [part(MINE, self.request, 2, 1)], 0, self.end)
        found = results(enclave, [kept(MINE, 0, 2)], 3, self.end)
        assert_answer(enclave, sealed, self.values, self.request, *found, *late)
        (whole,) = results(enclave, [part(OTHER, self.other)], 0, self.end)
        assert_answer(enclave, sealed, self.others, self.other, whole)


@pytest.fixture
def scene(running: InsecureDirectEnclave, squeezenet: Sealed) -> Scene:
    return Scene(running, squeezenet)


def of(request: ClientRequest, **to: object) -> m.SealedRows:
    return replace(request.rows, **to)


RUNS: dict[str, tuple[type[LasagnaError], Callable[[Scene], m.Run]]] = {
    "rows that are not at the cut": (
        InvalidInputError,
        lambda s: s.run(kept(MINE, 0, 2), first=6),
    ),
    "a row that never came": (
        InvalidInputError,
        lambda s: s.run(kept(MINE, 2), first=3),
    ),
    "the same row twice to a cut": (
        InvalidInputError,
        lambda s: s.run(part(OTHER, s.other, 0, 1), part(OTHER, s.other, 0, 1), last=3, keep=True),
    ),
    "a row to the cut where it is": (
        InvalidInputError,
        lambda s: s.run(part(MINE, s.request, 0, 1), last=3, keep=True),
    ),
    "a request that is not here": (
        InvalidInputError,
        lambda s: s.run(kept(GONE), first=3),
    ),
    "another request under a known number": (
        InvalidInputError,
        lambda s: s.run(part(MINE, s.other)),
    ),
    "rows beyond the request": (
        InvalidInputError,
        lambda s: s.run(kept(MINE, 2, 2), first=3),
    ),
    "sealed rows beyond the request": (
        InvalidInputError,
        lambda s: s.run(m.Part(MINE, 2, 2, s.request.rows)),
    ),
    "keep at a cut that is none": (
        InvalidInputError,
        lambda s: s.run(part(OTHER, s.other), last=4, keep=True),
    ),
    "keep at the end": (
        InvalidInputError,
        lambda s: s.run(kept(MINE), first=3, keep=True),
    ),
    "rows from a cut that is none": (
        InvalidInputError,
        lambda s: s.run(kept(MINE), first=4),
    ),
    "more rows than there is memory for": (
        InvalidInputError,
        lambda s: s.run(*[part(10 + n, s.other) for n in range(BATCH)]),
    ),
    "a first run without sealed rows": (
        InvalidInputError,
        lambda s: s.run(kept(MINE)),
    ),
    "sealed rows and kept ones together": (
        InvalidInputError,
        lambda s: s.run(part(OTHER, s.other, 0, 1), kept(MINE), first=3),
    ),
    "slices backwards": (
        InvalidInputError,
        lambda s: s.run(kept(MINE), first=3, last=2),
    ),
    "no slice at all": (
        InvalidInputError,
        lambda s: s.run(kept(MINE), first=3, last=3),
    ),
    "slices beyond the model": (
        InvalidInputError,
        lambda s: s.run(part(OTHER, s.other), last=s.end + 1),
    ),
    "an unknown model": (
        ModelNotFoundError,
        lambda s: replace(s.run(part(OTHER, s.other)), model=bytes(32)),
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_cannot_be_is_refused_and_changes_nothing(scene: Scene, case: str) -> None:
    error, command = RUNS[case]
    with pytest.raises(error):
        scene.enclave.call(command(scene), m.Ran)
    scene.enclave.call(m.Forget(scene.enclave.next_id(), OTHER), m.Done)
    for number in range(10, 10 + BATCH):
        scene.enclave.call(m.Forget(scene.enclave.next_id(), number), m.Done)
    scene.go_on()


PARTS: dict[str, tuple[str, Callable[[Scene], m.SealedRows]]] = {
    "fewer records than rows": (
        "1 records for 2 rows",
        lambda s: of(s.other, records=(s.other.rows.records[0][:1],)),
    ),
    "no tensor": ("0 tensors were sent", lambda s: of(s.other, records=())),
    "two tensors": ("2 tensors were sent", lambda s: of(s.other, records=s.other.rows.records * 2)),
    "a record of another size": (
        "bytes, not 40",
        lambda s: of(s.other, records=((memoryview(bytes(40)),) * 2,)),
    ),
    "rows in another order": (
        "does not open",
        lambda s: of(s.other, records=(s.other.rows.records[0][::-1],)),
    ),
    "another request's records": (
        "does not open",
        lambda s: of(s.other, records=(s.request.rows.records[0][:2],)),
    ),
    "another request's capsule": (
        "does not open",
        lambda s: of(s.other, capsule=s.request.rows.capsule),
    ),
    "a capsule cut short": ("a capsule has", lambda s: of(s.other, capsule=b"short")),
    "another number of rows": ("does not open", lambda s: of(s.other, rows=3)),
    "a name that another client has taken": (
        "does not open",
        lambda s: of(s.other, request_id=s.request.rows.request_id),
    ),
}


@pytest.mark.parametrize("keep", [False, True], ids=["to the end", "to a cut"])
@pytest.mark.parametrize("case", PARTS)
def test_rows_that_do_not_open_fail_their_request_alone(
    scene: Scene, case: str, keep: bool
) -> None:
    reason, sealed = PARTS[case]
    bad = m.Part(OTHER, 0, 2, sealed(scene))
    last = 3 if keep else scene.end
    good = part(MINE, scene.request, 2, 1)
    found = results(scene.enclave, [bad, good], 0, last, keep=keep)
    assert reason in found[0].error
    assert (found[0].kind, found[0].records) == ("TrustError", ())
    assert not found[1].error
    if keep:
        found = found[:1] + results(scene.enclave, [kept(MINE, 2)], 3, scene.end)
    before = results(scene.enclave, [kept(MINE, 0, 2)], 3, scene.end)
    assert_answer(scene.enclave, scene.sealed, scene.values, scene.request, *before, found[1])


def test_a_number_that_is_given_again_finds_nothing_of_the_request_before(scene: Scene) -> None:
    """Else the new client could read what the old one's images gave."""
    enclave = scene.enclave
    enclave.call(m.Forget(enclave.next_id(), MINE), m.Done)
    results(enclave, [part(MINE, scene.other, 0, 1)], 0, 6, keep=True)
    with pytest.raises(InvalidInputError, match="row 0 of request 1 is not at this cut"):
        results(enclave, [kept(MINE)], 3, scene.end)
    (first,) = results(enclave, [kept(MINE)], 6, scene.end)
    (second,) = results(enclave, [part(MINE, scene.other, 1, 1)], 0, scene.end)
    assert_answer(enclave, scene.sealed, scene.others, scene.other, first, second)


def test_nothing_runs_before_memory_is_divided_or_after_a_division_failed(scene: Scene) -> None:
    enclave, digest = scene.enclave, scene.enclave.digest
    good = in_stages(scene.sealed, digest, CUTS)
    (wish,) = good.models
    refusals: list[tuple[type[LasagnaError], m.Arrange]] = [
        (InvalidInputError, replace(good, models=(replace(wish, stages=wish.stages[1:]),))),
        (InvalidInputError, replace(good, models=(replace(wish, stages=wish.stages[:1]),))),
        (InvalidInputError, replace(good, models=(replace(wish, form=Form.WHOLE),))),
        (InvalidInputError, replace(good, models=(wish, wish))),
        (InvalidInputError, replace(good, activation_bytes=0)),
        (InvalidInputError, replace(good, input_bytes=0)),
        (BudgetError, replace(good, activation_bytes=2**53)),
        (BudgetError, replace(good, workspace_bytes=2**53)),
        (BudgetError, replace(good, workspace_bytes=4096)),
        (BudgetError, replace(good, ring_slots=0)),
        (BudgetError, replace(good, slot_bytes=0)),
        (ModelNotFoundError, replace(good, models=(replace(wish, model=bytes(32)),))),
    ]
    for error, command in refusals:
        with pytest.raises(error):
            give(enclave, command)
        for refused in (
            scene.run(part(OTHER, scene.other)),
            m.Pin(enclave.next_id(), digest, 0),
            m.Unpin(enclave.next_id(), digest, 0),
        ):
            with pytest.raises(ModelNotFoundError, match="has no memory here"):
                enclave.call(refused, m.Done)
    enclave.call(m.Arrange(enclave.next_id(), (), 1, 0, 0, 0, 0, 0, 0), m.Arranged)
    assert enclave.stats().pool_bytes <= 3 * 4096
    give(enclave, good)
    (found,) = results(enclave, [part(OTHER, scene.other)], 0, scene.end)
    assert_answer(enclave, scene.sealed, scene.others, scene.other, found)


def test_a_batch_is_held_to_the_memory_of_its_inputs(scene: Scene) -> None:
    """A slot for two rows: a third would be read, and the first bound, beyond it."""
    enclave = scene.enclave
    good = in_stages(scene.sealed, enclave.digest, ())
    (wish,) = good.models
    stages = (replace(wish.stages[0], rows=2),)
    half = replace(
        good, models=(replace(wish, stages=stages),), input_bytes=good.input_bytes // 2
    )  # fmt: skip
    give(enclave, half)
    with pytest.raises(InvalidInputError, match=r"3 rows in one batch; .* have room for 2"):
        results(enclave, [part(MINE, scene.request)], 0, scene.end)
    (found,) = results(enclave, [part(OTHER, scene.other)], 0, scene.end)
    assert_answer(enclave, scene.sealed, scene.others, scene.other, found)


def test_a_batch_is_held_to_the_memory_of_its_activations(scene: Scene) -> None:
    enclave = scene.enclave
    (variant,) = scene.sealed.manifest.variants
    good = in_stages(scene.sealed, enclave.digest, (), input_slots=0)
    (wish,) = good.models
    one = replace(good, activation_bytes=max(extents(variant)) * 2)
    give(enclave, replace(one, models=(replace(wish, stages=(replace(wish.stages[0], rows=1),)),)))
    with pytest.raises(InvalidInputError, match="have room for 2"):
        results(enclave, [part(MINE, scene.request)], 0, scene.end)
    (found,) = results(enclave, [part(OTHER, scene.other)], 0, scene.end)
    assert_answer(enclave, scene.sealed, scene.others, scene.other, found)


def test_moves_that_cannot_be_are_refused_however_fast_they_come(scene: Scene) -> None:
    enclave, digest = scene.enclave, scene.enclave.digest
    sizes = [facts.weight_bytes for facts in scene.sealed.manifest.variants[0].slices]
    largest = sizes.index(max(sizes))
    room = in_stages(scene.sealed, digest, CUTS, pinned=(largest,))
    second = max(size for n, size in enumerate(sizes) if n != largest)
    give(enclave, replace(room, slot_bytes=second))
    commands: list[m.Pin | m.Unpin] = [
        m.Pin(enclave.next_id(), digest, 0 if largest else 1),
        m.Pin(enclave.next_id(), digest, 0 if largest else 1),
        m.Unpin(enclave.next_id(), digest, 0 if largest else 1),
        m.Unpin(enclave.next_id(), digest, 0 if largest else 1),
        m.Unpin(enclave.next_id(), digest, largest),
        m.Pin(enclave.next_id(), digest, len(sizes)),
    ]
    for command in commands:
        enclave.send(command)
    outcomes = {}
    for _ in commands:
        reply = enclave._receive()
        outcomes[reply.id] = reply.kind if isinstance(reply, m.Failed) else ""
    bad = "InvalidInputError"
    expected = ["", bad, "", bad, bad if second < sizes[largest] else "", bad]
    assert [outcomes[command.id] for command in commands] == expected
    whole = replace(room.models[0], form=Form.WHOLE, stages=(m.StageWish(0, 1, BATCH, 0),))
    give(enclave, replace(room, models=(whole,), workspace_bytes=40_000_000))
    with pytest.raises(InvalidInputError, match="is not in slices"):
        enclave.call(m.Unpin(enclave.next_id(), digest, 0), m.Done)
    (found,) = results(enclave, [part(OTHER, scene.other)], 0, 1)
    assert_answer(enclave, scene.sealed, scene.others, scene.other, found)
