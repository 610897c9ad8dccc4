"""Holds DESIGN.md's rules of who may import whom, and the limit on a file's length.

The rules are the table RULES. They are checked on the source's syntax, so also for imports inside
functions and for names reached through a module (``os.fork``), without importing anything.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCE: Final = ROOT / "src"
MAX_LINES: Final = 400
LONGER_FILES: Final[dict[str, str]] = {}  # path from the root: the reason why it may be longer

STDLIB: Final = frozenset(sys.stdlib_module_names) | {"typing_extensions"}
# No clock, socket, file, thread, logging, random or environment in any of these.
PURE: Final = frozenset(
    "__future__ abc array base64 binascii bisect collections copy dataclasses datetime enum"
    " fractions functools hashlib heapq hmac itertools math operator re statistics string struct"
    " types typing typing_extensions".split()
)
IMPURE_NAMES: Final = frozenset(
    "open print input eval exec compile __import__ breakpoint globals"
    " datetime.datetime.now datetime.datetime.utcnow datetime.datetime.today datetime.date.today"
    " numpy.random numpy.load numpy.save numpy.savez numpy.fromfile numpy.memmap".split()
)
PICKLES: Final = frozenset(
    "pickle _pickle pickletools shelve marshal dill cloudpickle joblib".split()
)
# Whatever starts a process, loads code chosen at run time or reaches memory behind Python's back.
UNAUDITABLE: Final = frozenset(
    "subprocess multiprocessing importlib imp runpy pkgutil zipimport ctypes cffi code codeop pty"
    " concurrent.futures.process eval exec compile __import__ breakpoint os.fork os.forkpty"
    " os.system os.popen numpy.load numpy.ctypeslib"
    " os.posix_spawn os.posix_spawnp os.execl os.execle os.execlp os.execlpe os.execv os.execve"
    " os.execvp os.execvpe os.spawnl os.spawnle os.spawnlp os.spawnlpe os.spawnv os.spawnve"
    " os.spawnvp os.spawnvpe".split()
)

# What differs from run to run: the time, addresses, hashes of strings, and numpy's own generator.
UNREPEATABLE: Final = frozenset(
    "hash id datetime.datetime.now datetime.datetime.utcnow datetime.datetime.today"
    " datetime.date.today".split()
) | {
    f"numpy.random.{name}"
    for name in "RandomState choice exponential get_state normal permutation poisson rand randint"
    " randn random random_sample seed set_state shuffle uniform".split()
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What one part of the package may use.

    Attributes:
        ours: parts of lasagna that it may import besides itself; None for all.
        not_ours: parts of lasagna that it must not import.
        libraries: top-level modules from elsewhere that it may import; None for all.
        banned: dotted names that it must neither import nor reach through an import; a builtin's
            name is refused as a call (``open(...)``).
        repeatable: whether the same arguments must give the same result: every random generator
            has a seed, and nothing is gone through in the order of a set.
    """

    ours: frozenset[str] | None = None
    not_ours: frozenset[str] = frozenset()
    libraries: frozenset[str] | None = None
    banned: frozenset[str] = frozenset()
    repeatable: bool = False


LEAF: Final = frozenset({"units", "errors"})
RULES: Final[dict[str, Rule]] = {
    # Whoever imports a part imports this file, so it must bring nothing along: it switches
    # telemetry off, and imports the client when somebody asks for it.
    "__init__": Rule(
        frozenset({"client"}),
        libraries=frozenset({"__future__", "os", "typing"}),
        banned=UNAUDITABLE,
    ),
    "errors": Rule(frozenset(), libraries=PURE, banned=IMPURE_NAMES),
    "units": Rule(frozenset({"errors"}), libraries=PURE, banned=IMPURE_NAMES),
    "policy": Rule(
        LEAF, libraries=PURE | {"msgspec", "numpy", "scipy", "highspy"}, banned=IMPURE_NAMES
    ),
    "trust": Rule(
        LEAF, libraries=PURE | {"cryptography", "msgspec", "dcap_qvl"}, banned=IMPURE_NAMES
    ),
    "package": Rule(
        LEAF | {"trust"},
        libraries=STDLIB | {"cryptography", "msgspec", "numpy"},
        banned=UNAUDITABLE,
    ),
    "enclave": Rule(
        LEAF | {"trust", "package"},
        libraries=STDLIB | {"cryptography", "msgspec", "numpy", "onnxruntime"},
        banned=UNAUDITABLE,
    ),
    "journal": Rule(LEAF | {"policy"}, libraries=PURE | {"msgspec", "pathlib"}),
    "sim": Rule(
        not_ours=frozenset({"server", "cluster"}),
        libraries=PURE | {"msgspec", "numpy", "pathlib"},
        banned=UNREPEATABLE,
        repeatable=True,
    ),
    "server": Rule(not_ours=frozenset({"sim", "models"})),
    "cluster": Rule(not_ours=frozenset({"sim"})),
    "gateway": Rule(not_ours=frozenset({"models"})),
    "client": Rule(not_ours=frozenset({"models"})),
}
# The one file that reads a PyTorch checkpoint, with an unpickler that refuses everything else.
MAY_PICKLE: Final = "models/zoo/torch_checkpoint.py"


@dataclass(frozen=True, slots=True)
class Use:
    """A name that a file imports or refers to; ``imported`` tells which."""

    name: str
    line: int
    imported: bool


def uses(tree: ast.Module, package: str) -> Iterator[Use]:
    """Whatever a module in ``package`` imports, reaches through an import, or calls by bare name.

    Names are the original ones: ``np.load`` is ``numpy.load`` whatever it was imported as.
    """
    original: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    first = alias.name.partition(".")[0]
                    original[alias.asname or first] = alias.name if alias.asname else first
                    yield Use(alias.name, node.lineno, True)
            case ast.ImportFrom(names=names):
                for alias in names:
                    name = f"{absolute(node, package)}.{alias.name}"
                    original[alias.asname or alias.name] = name
                    yield Use(name, node.lineno, True)
            case _:
                pass
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                root, dot, rest = (dotted(node) or "").partition(".")
                if root in original:
                    yield Use(original[root] + dot + rest, node.lineno, False)
            case ast.Call(func=ast.Name(id=name)) if name not in original:
                yield Use(name, node.lineno, False)
            case _:
                pass


def absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that ``from ... import`` names, seen from ``package``."""
    parts = package.split(".")
    parents = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*parents, *filter(None, [node.module])])


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of such an expression; None for one that begins with anything but a name."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            start = dotted(value)
            return f"{start}.{attribute}" if start else None
        case _:
            return None


def within(name: str, modules: frozenset[str]) -> bool:
    """Whether the dotted name is one of the modules, or inside one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts) + 1))


def complaint(use: Use, part: str, rule: Rule, may_pickle: bool) -> str | None:
    """Why this use breaks the part's rule; None if it doesn't."""
    if within(use.name, rule.banned):
        return f"{part} must not use {use.name}"
    if not use.imported:
        return None
    if within(use.name, PICKLES) and not may_pickle:
        return f"{use.name}: only {MAY_PICKLE} may unpickle"
    root, *rest = use.name.split(".")
    if root == "lasagna":
        target = rest[0] if rest else "__init__"
        foreign = target not in (part, "__init__")
        if foreign and (
            target in rule.not_ours or (rule.ours is not None and target not in rule.ours)
        ):
            return f"{part} must not import lasagna.{target}"
    elif rule.libraries is not None and root not in rule.libraries:
        return f"{part} must not import {root}"
    return None


def unrepeatable(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that make a random generator without a seed, or go through a set, as far as shows."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func, args=[], keywords=[]):
                if (dotted(func) or "").endswith("default_rng"):
                    yield node.lineno, "a random generator needs a seed"
            case ast.For(iter=over) | ast.comprehension(iter=over):
                match over:
                    case (
                        ast.Set() | ast.SetComp() | ast.Call(func=ast.Name(id="set" | "frozenset"))
                    ):
                        yield over.lineno, "a set is gone through in no order: sort it"
                    case _:
                        pass
            case _:
                pass


def violations(source: Path) -> list[str]:
    """All breaches of RULES below ``source``, as ``path:line: complaint``."""
    found: dict[str, None] = {}  # ordered, without the doubles of a.b.c and its part a.b
    for path in sorted((source / "lasagna").rglob("*.py")):
        inside = path.relative_to(source / "lasagna")
        part = inside.parts[0].removesuffix(".py")
        package = ".".join(("lasagna", *inside.parts[:-1]))
        may_pickle = inside.as_posix() == MAY_PICKLE
        rule = RULES.get(part, Rule())
        tree = ast.parse(path.read_text())
        for use in uses(tree, package):
            if wrong := complaint(use, part, rule, may_pickle):
                found[f"{inside}:{use.line}: {wrong}"] = None
        for line, wrong in unrepeatable(tree) if rule.repeatable else ():
            found[f"{inside}:{line}: {wrong}"] = None
    return list(found)


def long_files(root: Path) -> list[str]:
    """Files of src, tests and native with more than MAX_LINES lines, as paths from the root."""
    paths = (path for folder in ("src", "tests", "native") for path in (root / folder).rglob("*"))
    code = (path for path in paths if path.suffix in {".py", ".pyi", ".c", ".h"})
    return sorted(
        path.relative_to(root).as_posix()
        for path in code
        if path.read_bytes().count(b"\n") > MAX_LINES
    )


def test_every_part_keeps_its_rule() -> None:
    assert violations(SOURCE) == []


def test_no_file_is_longer_than_400_lines_without_a_reason() -> None:
    # Equal, so that a file that was cut down loses its exception.
    assert long_files(ROOT) == sorted(LONGER_FILES)


@pytest.mark.parametrize("part", sorted(RULES))
def test_each_rule_is_about_a_part_of_lasagna(part: str) -> None:
    planned = {"policy", "sim", "cluster"}  # of DESIGN.md, written later
    folder = SOURCE / "lasagna" / part

    assert folder.is_dir() or folder.with_suffix(".py").is_file() or part in planned


@pytest.mark.parametrize(
    ("path", "code", "wrong"),
    [
        ("policy/a.py", "import time", "policy must not import time"),
        ("policy/a.py", "from os import path", "policy must not import os"),
        ("policy/a.py", "def f():\n    import socket", "policy must not import socket"),
        ("policy/a.py", "open('x')", "policy must not use open"),
        ("policy/a.py", "import numpy as np\nnp.random.rand()", "policy must not use numpy.random"),
        ("policy/a.py", "import numpy as n\nn.load('x')", "policy must not use numpy.load"),
        ("policy/a.py", "from numpy import random", "policy must not use numpy.random"),
        ("policy/a.py", "from lasagna.trust import record", "policy must not import lasagna.trust"),
        ("policy/deep/a.py", "from ...trust import x", "policy must not import lasagna.trust"),
        ("policy/deep/a.py", "from ... import trust", "policy must not import lasagna.trust"),
        ("trust/a.py", "import datetime\ndatetime.datetime.now()", "datetime.datetime.now"),
        ("trust/a.py", "from datetime import datetime\ndatetime.now()", "datetime.datetime.now"),
        ("trust/a.py", "import datetime as d\nd.date.today()", "datetime.date.today"),
        ("trust/a.py", "import logging", "trust must not import logging"),
        ("trust/a.py", "import secrets", "trust must not import secrets"),
        ("trust/a.py", "import pathlib", "trust must not import pathlib"),
        ("enclave/a.py", "import pickle", "only models/zoo/torch_checkpoint.py may unpickle"),
        ("enclave/a.py", "import ctypes.util", "enclave must not use ctypes"),
        ("enclave/a.py", "import os\nos.fork()", "enclave must not use os.fork"),
        ("enclave/a.py", "import os as o\nspawn = o.fork", "enclave must not use os.fork"),
        ("enclave/a.py", "from os import fork", "enclave must not use os.fork"),
        ("enclave/a.py", "from importlib import import_module", "enclave must not use importlib"),
        ("enclave/a.py", "__import__('x')", "enclave must not use __import__"),
        ("enclave/a.py", "from lasagna import models", "enclave must not import lasagna.models"),
        ("enclave/a.py", "import lasagna.native", "enclave must not import lasagna.native"),
        ("enclave/a.py", "import onnx", "enclave must not import onnx"),
        ("package/a.py", "import lasagna.enclave", "package must not import lasagna.enclave"),
        ("package/a.py", "import onnxruntime", "package must not import onnxruntime"),
        ("sim/a.py", "import lasagna.server.host", "sim must not import lasagna.server"),
        ("sim/a.py", "import time", "sim must not import time"),
        ("sim/a.py", "import random", "sim must not import random"),
        ("sim/a.py", "from os import urandom", "sim must not import os"),
        ("sim/a.py", "import datetime as d\nd.datetime.now()", "sim must not use datetime"),
        ("sim/a.py", "import numpy as np\nnp.random.seed(1)", "must not use numpy.random.seed"),
        ("sim/a.py", "import numpy as np\nnp.random.default_rng()", "needs a seed"),
        ("sim/a.py", "x.sort(key=f)\nhash('x')", "sim must not use hash"),
        ("sim/a.py", "for x in {1, 2}: f(x)", "in no order"),
        ("sim/a.py", "y = [f(x) for x in set(z)]", "in no order"),
        ("journal.py", "import lasagna.server", "journal must not import lasagna.server"),
        ("server/a.py", "from lasagna.sim import x", "server must not import lasagna.sim"),
        ("cluster/a.py", "from lasagna import sim", "cluster must not import lasagna.sim"),
        ("gateway/a.py", "import lasagna.models", "gateway must not import lasagna.models"),
        ("client/a.py", "import lasagna.models", "client must not import lasagna.models"),
        ("bench/a.py", "from pickle import loads", "only models/zoo/torch_checkpoint.py"),
        ("models/zoo/b.py", "import pickle", "only models/zoo/torch_checkpoint.py"),
        ("units.py", "from lasagna.trust import x", "units must not import lasagna.trust"),
        ("__init__.py", "import numpy", "__init__ must not import numpy"),
        ("__init__.py", "from lasagna.models import x", "must not import lasagna.models"),
    ],
)
def test_checker_finds_a_planted_violation(
    tmp_path: Path, path: str, code: str, wrong: str
) -> None:
    plant(tmp_path, path, code)

    assert len(found := violations(tmp_path)) >= 1
    assert wrong in found[0]
    assert found[0].startswith(f"{path}:{code.count(chr(10)) + 1}:")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("policy/a.py", "from lasagna.policy.costs import x\nimport heapq\nimport numpy"),
        ("trust/a.py", "import lasagna\nfrom datetime import datetime, timedelta\nimport hmac"),
        ("trust/a.py", "from lasagna.errors import TrustError\nimport cryptography.x509"),
        ("trust/a.py", "def open_record(): ...\nopen_record()\nrecord.open()"),
        ("enclave/a.py", "import os, threading, numpy, onnxruntime\nos.read(0, 1)"),
        ("enclave/a.py", "from lasagna.package.reader import x\nlayer.compile()"),
        ("enclave/a.py", "code = f()\ncode.run()\narray.ctypes.data"),
        ("package/a.py", "import json, mmap\nfrom lasagna.trust import x"),
        ("server/a.py", "import subprocess\nfrom lasagna.policy import scheduler"),
        ("models/zoo/torch_checkpoint.py", "import pickle"),
        ("sim/a.py", "import numpy as np\nnp.random.default_rng(1).random()"),
        ("sim/a.py", "for x in sorted({1, 2}): f(x)"),
        ("cli/a.py", "import importlib\nfrom lasagna import sim, server"),
    ],
)
def test_checker_lets_pass_what_is_allowed(tmp_path: Path, path: str, code: str) -> None:
    plant(tmp_path, path, code)

    assert violations(tmp_path) == []


def test_checker_finds_a_long_file(tmp_path: Path) -> None:
    for name, lines in [("src/a.py", 401), ("native/b.c", 401), ("tests/c.py", 400)]:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("\n" * lines)

    assert long_files(tmp_path) == ["native/b.c", "src/a.py"]


def plant(source: Path, path: str, code: str) -> None:
    file = source / "lasagna" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
