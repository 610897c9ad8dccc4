from __future__ import annotations

import dataclasses
import platform
from importlib import metadata
from pathlib import Path

import pytest

import lasagna
from lasagna import native
from lasagna.errors import LasagnaError


def test_build_info_is_the_installed_packages() -> None:
    info = native.build_info()

    assert info.version == metadata.version("lasagna")
    assert info.cpu == platform.machine()
    assert info.build_type == "Release"
    assert info.sanitizer == "none"
    assert "-Werror" in info.flags
    assert info.compiler.split()[0] in {"GNU", "Clang"}


def test_build_info_has_no_empty_field_but_instruction_sets() -> None:
    info = dataclasses.asdict(native.build_info())
    info.pop("instruction_sets")  # a target may guarantee none that we look for

    assert all(info.values())


def test_build_info_holds_no_path() -> None:
    # Two machines with the same compiler must build the same library.
    assert "/" not in " ".join(dataclasses.asdict(native.build_info()).values())


def test_build_info_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        native.build_info().version = "9"  # type: ignore[misc]


def test_library_is_inside_the_package() -> None:
    path = native.library_path()

    assert path.parent in [Path(folder) for folder in lasagna.__path__]
    assert native.library()._name == str(path)


def test_a_source_tree_that_was_not_installed_is_told_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lasagna, "__path__", [str(tmp_path)])

    with pytest.raises(LasagnaError, match=r"pip install \."):
        native.library_path()


def test_a_library_the_system_refuses_is_an_error_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / native.library_path().name).write_bytes(b"not an ELF file")
    monkeypatch.setattr(lasagna, "__path__", [str(tmp_path)])

    with pytest.raises(LasagnaError, match="can't load"):
        native.library.__wrapped__()
