"""PyTorch's checkpoint format of before 2020, read without PyTorch and without running anything.

The file is five pickles, one after the other, and then raw memory::

    magic number | protocol version | description of the writer's machine
    | the object: tensors as views of storages, which are named by key
    | the list of storage keys, in the order of what follows
    | for each key: element count (int64, little endian), elements

A pickle is a program, and the usual cure, an ``Unpickler`` with its own ``find_class``, still
leaves that program to CPython's unpickler, where a flipped bit in a memo index allocates
gigabytes. So the opcodes are parsed by ``pickletools`` and interpreted here: the two dozen that
``torch.save`` writes for a state dict, none of which can call anything. The names that may appear
are those of OrderedDict, of the tensor constructor and of the storage types; each stands for
something this module does itself.

No tensor may have more elements than its storage, and no storage more than the file, so memory is
bounded by the file's size.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from lasagna.errors import ModelError

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_VERSION: Final = 1001
_PICKLE_PROTOCOL: Final = 2
_COUNT_BYTES: Final = 8


class _Mark(Enum):
    """The stack's separator; a type of its own, so that no value in a file equals it."""

    MARK = auto()


class _Callable(Enum):
    """The two globals that a pickle may apply, and only to the arguments known for them."""

    ORDERED_DICT = "collections OrderedDict"
    REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor before its storage is read; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_GLOBALS: Final[Mapping[str, _Callable | _StorageType]] = {
    **{known.value: known for known in _Callable},
    "torch DoubleStorage": _StorageType(np.dtype("<f8")),
    "torch FloatStorage": _StorageType(np.dtype("<f4")),
    "torch HalfStorage": _StorageType(np.dtype("<f2")),
    "torch LongStorage": _StorageType(np.dtype("<i8")),
    "torch IntStorage": _StorageType(np.dtype("<i4")),
    "torch ShortStorage": _StorageType(np.dtype("<i2")),
    "torch CharStorage": _StorageType(np.dtype("i1")),
    "torch ByteStorage": _StorageType(np.dtype("u1")),
    "torch BoolStorage": _StorageType(np.dtype("?")),
}
_LITERALS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WITH_VALUE: Final = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"})
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_torch_checkpoint(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a legacy checkpoint file, by name.

    Raises:
        ModelError: the file can't be read, or as ``parse_torch_checkpoint``.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"can't read the checkpoint {path}: {error.strerror}") from error
    return parse_torch_checkpoint(data)


def parse_torch_checkpoint(data: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a legacy checkpoint, by name, in the order of the file.

    Returns:
        Read-only arrays. Those that were views of one storage still share memory, and one that
        was transposed still is.

    Raises:
        ModelError: the data is malformed, or holds anything but a dictionary of tensors.
    """
    if data.startswith(b"PK\x03\x04"):
        raise ModelError(
            "the checkpoint is in torch's zip format: save it again with "
            "torch.save(..., _use_new_zipfile_serialization=False)"
        )
    stream = io.BytesIO(data)
    if _unpickle(stream) != _MAGIC:
        raise ModelError("the data is no legacy torch checkpoint: its magic number is missing")
    if (version := _unpickle(stream)) != _VERSION:
        raise ModelError(f"unknown checkpoint version {_show(version)}, not {_VERSION}")
    machine = _unpickle(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ModelError("the checkpoint was not written on a little-endian machine")
    views = _check_state_dict(_unpickle(stream))
    keys = _unpickle(stream)
    storages = _read_storages(memoryview(data)[stream.tell() :], keys, views)
    return {name: _array(name, view, storages[view.storage.key]) for name, view in views.items()}


def _check_state_dict(found: object) -> dict[str, _View]:
    if not isinstance(found, dict):
        raise ModelError(f"the checkpoint holds {_show(found)}, not a dictionary of tensors")
    declared: dict[str, _Storage] = {}
    for name, value in found.items():
        if not isinstance(value, _View):
            raise ModelError(f"the checkpoint's {_show(name)} is {_show(value)}, not a tensor")
        storage = value.storage
        if declared.setdefault(storage.key, storage) != storage:
            raise ModelError(f"storage {_show(storage.key)} is declared in two ways")
    return found


def _read_storages(
    data: memoryview, keys: object, views: Mapping[str, _View]
) -> dict[str, NDArray[Any]]:
    """The storages' elements, one flat read-only array each."""
    declared = {view.storage.key: view.storage for view in views.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ModelError("the checkpoint's list of storages is not a list of names")
    if len(keys) != len(declared) or set(keys) != set(declared):
        raise ModelError("the checkpoint's list of storages is not that of its tensors")
    storages: dict[str, NDArray[Any]] = {}
    for key in keys:
        storage = declared[key]
        header, data = data[:_COUNT_BYTES], data[_COUNT_BYTES:]
        if len(header) < _COUNT_BYTES:
            raise ModelError(f"the checkpoint ends before storage {_show(key)}")
        if (count := int.from_bytes(header, "little", signed=True)) != storage.count:
            raise ModelError(
                f"storage {_show(key)} has {count} elements, but {storage.count} were declared"
            )
        size = count * storage.dtype.itemsize
        if len(data) < size:
            raise ModelError(
                f"storage {_show(key)} needs {size} bytes, but only {len(data)} are left"
            )
        storages[key] = _elements(key, data[:size], storage.dtype)
        data = data[size:]
    if data:
        raise ModelError(f"{len(data)} bytes follow the checkpoint's last storage")
    return storages


def _elements(key: str, data: memoryview, dtype: np.dtype[Any]) -> NDArray[Any]:
    # A copy, because the file aligns nothing.
    if dtype.kind == "b":
        values = np.frombuffer(data, np.uint8).copy()
        if values.max(initial=0) > 1:
            raise ModelError(f"storage {_show(key)} has a byte that is neither true nor false")
        values = values.view(dtype)
    else:
        values = np.frombuffer(data, dtype).copy()
    values.flags.writeable = False
    return values


def _array(name: str, view: _View, storage: NDArray[Any]) -> NDArray[Any]:
    elements = 1
    last = view.offset
    for length, stride in zip(view.shape, view.strides, strict=True):
        elements *= length
        last += (length - 1) * stride
    # The first check keeps a tensor whose strides are 0 from growing out of a single element.
    if elements > storage.size or (elements > 0 and last >= storage.size):
        raise ModelError(f"tensor {_show(name)} reaches beyond its storage")
    offset = view.offset if elements else 0
    size = storage.itemsize
    strides = tuple(stride * size for stride in view.strides)
    try:
        return np.ndarray(view.shape, storage.dtype, storage.data, offset * size, strides)
    except (ValueError, OverflowError) as error:
        raise ModelError(f"tensor {_show(name)} has an impossible shape") from error


def _unpickle(stream: io.BytesIO) -> object:
    """Interpret one pickle and leave the stream behind it."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
    except ValueError as error:  # what pickletools raises for malformed opcodes
        raise ModelError("the checkpoint is malformed or cut short") from error
    return machine.result()


@dataclass(slots=True)
class _Machine:
    """A pickle machine that knows no more than state dicts need."""

    stack: list[object] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)

    def step(self, opcode: str, argument: Any) -> None:
        """Execute one opcode.

        Raises:
            ModelError: the opcode is unknown here, or the stack does not hold what it needs.
        """
        if opcode in _LITERALS:
            self.stack.append(_LITERALS[opcode])
        elif opcode in _WITH_VALUE:
            self.stack.append(argument)
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[opcode])))
        else:
            self._container_step(opcode, argument)

    def result(self) -> object:
        """What the pickle left on the stack."""
        (value,) = self._pop(1)
        if self.stack:
            raise ModelError("the checkpoint is malformed: a pickle leaves more than one object")
        return value

    def _container_step(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "MARK":
                self.stack.append(_Mark.MARK)
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "TUPLE":
                self.stack.append(tuple(self._pop_to_mark()))
            case "APPEND" | "APPENDS":
                self._extend(self._pop(1) if opcode == "APPEND" else self._pop_to_mark())
            case "SETITEM" | "SETITEMS":
                self._update(self._pop(2) if opcode == "SETITEM" else self._pop_to_mark())
            case _:
                self._reference_step(opcode, argument)

    def _reference_step(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "PROTO" if argument == _PICKLE_PROTOCOL:
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ModelError("the checkpoint is malformed: it recalls nothing stored")
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise ModelError(f"the checkpoint refers to {_show(argument)}: refused")
                self.stack.append(_GLOBALS[argument])
            case "BINPERSID":
                self.stack.append(_storage(*self._pop(1)))
            case "REDUCE":
                self.stack.append(_apply(*self._pop(2)))
            case "BUILD":
                self._drop_metadata()
            case _:
                raise ModelError(f"the checkpoint's pickle has the opcode {opcode}: refused")

    def _drop_metadata(self) -> None:
        # A state dict's OrderedDict carries the versions of its modules as an attribute.
        (state,) = self._pop(1)
        if not isinstance(state, dict) or not isinstance(self._top(), dict):
            raise ModelError("the checkpoint sets attributes on something else than a dictionary")

    def _top(self) -> object:
        if not self.stack or self.stack[-1] is _Mark.MARK:
            raise _missing_operands()
        return self.stack[-1]

    def _pop(self, count: int) -> list[object]:
        start = len(self.stack) - count
        if start < 0 or _Mark.MARK in self.stack[start:]:
            raise _missing_operands()
        popped = self.stack[start:]
        del self.stack[start:]
        return popped

    def _pop_to_mark(self) -> list[object]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _Mark.MARK:
                popped = self.stack[start + 1 :]
                del self.stack[start:]
                return popped
        raise _missing_operands()

    def _extend(self, values: list[object]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise _missing_operands()
        target.extend(values)

    def _update(self, values: list[object]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            raise _missing_operands()
        for key, value in _pairs(values):
            if not isinstance(key, str):
                raise ModelError(f"the checkpoint has a dictionary key that is {_show(key)}")
            target[key] = value


def _pairs(values: list[object]) -> Iterator[tuple[object, object]]:
    return zip(values[::2], values[1::2], strict=True)


def _storage(reference: object) -> _Storage:
    match reference:
        case ("storage", _StorageType(dtype), str(key), str(), count, None) if _is_count(count):
            return _Storage(key, dtype, count)
    raise ModelError("the checkpoint refers to a storage in an unknown way")


def _apply(function: object, arguments: object) -> object:
    match function, arguments:
        case _Callable.ORDERED_DICT, ():
            return {}
        case _Callable.REBUILD_TENSOR, (
            _Storage() as storage,
            offset,
            tuple(shape),
            tuple(strides),
            bool(),
            {},
        ) if (
            _is_count(offset)
            and _are_counts(shape)
            and _are_counts(strides)
            and len(shape) == len(strides)
        ):
            return _View(storage, offset, shape, strides)
    raise ModelError("the checkpoint calls something else than a tensor's constructor: refused")


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _are_counts(values: tuple[object, ...]) -> TypeGuard[tuple[int, ...]]:
    return all(_is_count(value) for value in values)


def _missing_operands() -> ModelError:
    return ModelError("the checkpoint is malformed: an opcode lacks its operands")


def _show(value: object) -> str:
    """A value for an error's text: short, and without a look inside containers."""
    if isinstance(value, (str, int)):
        text = repr(value) if isinstance(value, str) or value.bit_length() < 64 else "a huge number"
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"a {type(value).__name__.lstrip('_').lower()}"
