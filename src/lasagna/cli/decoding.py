"""Decoding files that people write: which file, which key, what is wrong, what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from msgspec import inspect

from lasagna.errors import UsageError

_T = TypeVar("_T", bound=msgspec.Struct)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_INVALID: Final = re.compile(r"Invalid (?:enum )?value '(.*)'", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*)`")


def read_limited(path: Path, what: str, limit: int) -> bytes:
    """A file's content.

    Args:
        path: of the file.
        what: it should be, with its article.
        limit: bytes that it may have.

    Raises:
        UsageError: it can't be read, or is longer.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from None
    if len(content) > limit:
        raise UsageError(f"{path} has more than {limit:,} bytes: this is not {what}")
    return content


def converted(content: object, type_: type[_T], where: str) -> _T:
    """What was parsed, as a structure.

    Args:
        content: dictionaries, lists and so on.
        type_: what it should be; its keys are suggested for unknown ones.
        where: file, and place in it.

    Raises:
        UsageError: it is something else.
    """
    try:
        return msgspec.convert(content, type_)
    except msgspec.ValidationError as error:
        raise UsageError(_explained(str(error), type_, where)) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """What to say of an unknown word: the known one that was meant perhaps, or all of them."""
    words = list(known)
    close = get_close_matches(word, words, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(words)}"


def _explained(message: str, type_: type[msgspec.Struct], where: str) -> str:
    what, _, place = message.rpartition(" - at `$")
    what, key = (what, place.removesuffix("`").lstrip(".")) if what else (message, "")
    place = f"{where}, {key}" if key else where
    if unknown := _UNKNOWN.fullmatch(what):
        known = "" if key else "; " + nearest(unknown[1], type_.__struct_encode_fields__)
        return f"{place}: there is no key {unknown[1][:80]!r}{known}"
    if missing := _MISSING.fullmatch(what):
        return f"{place}: the key {missing[1]!r} is missing"
    if (invalid := _INVALID.fullmatch(what)) and (words := _choices(type_, key)):
        return f"{place}: {invalid[1][:80]!r}; {nearest(invalid[1], words)}"
    return f"{place}: {_plainer(what)}"


def _choices(type_: type[msgspec.Struct], key: str) -> list[str]:
    """Words that may be there: of a literal or an enumeration, or tags of several structures."""
    found: list[inspect.Type] = [inspect.type_info(type_)]
    words: list[str] = []
    for name in re.findall(r"[^.\[\]]+", key):
        below: list[inspect.Type] = []
        for one in chain.from_iterable(map(_members, found)):
            if isinstance(one, inspect.VarTupleType | inspect.ListType) and name.isdigit():
                below.append(one.item_type)
            elif isinstance(one, inspect.StructType):
                below += [field.type for field in one.fields if field.encode_name == name]
                words += [str(one.tag)] if one.tag_field == name else []
        found = below
    for one in chain.from_iterable(map(_members, found)):
        if isinstance(one, inspect.LiteralType):
            words += map(str, one.values)
        elif isinstance(one, inspect.EnumType):
            words += [str(member.value) for member in one.cls]
    return words


def _members(one: inspect.Type) -> tuple[inspect.Type, ...]:
    return one.types if isinstance(one, inspect.UnionType) else (one,)


def _plainer(what: str) -> str:
    """Without quotes, and without "or null", which TOML has not."""
    plain = what.replace("`", "").replace(" | null", "")
    return plain[:1].lower() + plain[1:]
