"""``lasagna demo``: the main job from end to end, with real processes on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lasagna.errors import LasagnaError
from lasagna.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from lasagna.models.seal import SealReport

MODEL: Final = "efficientnet-lite0"
START_TIMEOUT_S: Final = 60.0
_SAID: Final = {
    "url": re.compile(r"serving on (http://\S+)"),
    "measurement": re.compile(r"--allow-measurement ([0-9a-f]{64})"),
    "broker": re.compile(r"--broker-key ([0-9a-f]{64})"),
    "ready": re.compile(r"model \S+: (.*)"),
}


@dataclass(frozen=True, slots=True)
class _Server:
    """A running ``lasagna serve`` and what it printed."""

    url: str
    measurement: bytes
    broker: bytes


def demo(
    budget: Annotated[
        str, typer.Option(help="Enclave memory; the model's weights take 18.5 MB.")
    ] = "12MB",
    photo: Annotated[
        list[Path] | None, typer.Option(help="Classify your own pictures as well; repeatable.")
    ] = None,
) -> None:
    """Seal a real network, classify real photos in an enclave too small for it, show the cost.

    Owner, key broker, server, enclave and client are processes of their own on this machine; the
    enclave is an ordinary process here, so it protects nothing. Nothing is left running.
    """
    console = Console()
    try:
        pictures = _pictures(photo or [])
    except ModuleNotFoundError as missing:
        raise LasagnaError(
            f"the demo needs the package {missing.name}: run `pip install 'lasagna[demo]'`"
        ) from None
    with tempfile.TemporaryDirectory(prefix="lasagna-demo-") as folder:
        package, keys = Path(folder) / f"{MODEL}.lsg", Path(folder) / f"{MODEL}.key"
        report = _seal(console, package, keys)
        console.print(
            f"[bold]Owner[/]: sealed {MODEL}, {format_bytes(_weights(report))} of weights, into "
            f"{format_bytes(report.file_bytes)} ({', '.join(sorted(report.self_check))}); differs "
            f"from plain ONNX Runtime by {max(report.self_check.values()):.0e} at most"
        )
        expected, plain_s = _plain(pictures)
        with _serving(console, package, keys, budget, Path(folder) / "broker") as server:
            console.print(
                f"[bold]Server[/]: {server.url}, enclave of {format_bytes(parse_bytes(budget))} "
                "(an ordinary process: EMULATED, it protects nothing)"
            )
            answers, seconds, stats = _classify(server, pictures)
        for name, picture in pictures.items():
            console.print(_photo_table(name, picture, answers[name], expected[name]))
        console.print(_cost_table(stats, seconds, plain_s))


def _pictures(own: list[Path]) -> dict[str, Any]:
    from lasagna.models.zoo.photos import PHOTOS, file_input, photo_input

    pictures = {name: photo_input(name) for name in PHOTOS}
    return pictures | {str(path): file_input(path) for path in own}


def _seal(console: Console, package: Path, keys: Path) -> SealReport:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from lasagna.models.seal import SealOptions, seal
    from lasagna.models.source import prepare
    from lasagna.models.zoo.catalog import load
    from lasagna.trust.model_keys import encode_model_keys

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"reading {MODEL}")
        source = prepare(load(MODEL))
        released, report = seal(
            source,
            MODEL,
            Ed25519PrivateKey.generate(),
            package,
            SealOptions(slice_bytes=512 * 1024),
            lambda what, done, total: progress.update(
                task, description=f"sealing: {what} {done}/{total}"
            ),
        )
    keys.touch(mode=0o600)
    keys.write_bytes(encode_model_keys(released))
    return report


def _weights(report: SealReport) -> int:
    return report.manifest.variants[0].weight_bytes


def _plain(pictures: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Answers of plain ONNX Runtime, one thread, and its seconds a photo."""
    import onnxruntime as ort

    from lasagna.models.source import open_session, prepare
    from lasagna.models.zoo.catalog import load

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = open_session(prepare(load(MODEL)), options)
    session.run(None, {"image": next(iter(pictures.values()))})
    start = time.perf_counter()
    answers = {name: session.run(None, {"image": x})[0][0] for name, x in pictures.items()}
    return answers, (time.perf_counter() - start) / len(pictures)


@contextmanager
def _serving(
    console: Console, package: Path, keys: Path, budget: str, state: Path
) -> Iterator[_Server]:
    """Start ``lasagna serve`` with a key broker of its own, and stop it again."""
    command = [
        *(sys.executable, "-m", "lasagna.cli.main", "serve", str(package)),
        *("--insecure-local-broker", str(keys), "--broker-state", str(state)),
        *("--budget", budget, "--max-batch", "1", "--port", "0"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        with console.status("starting broker, server and enclave ..."):
            said = _listen(process)
        if not said["ready"].startswith("ready"):
            raise LasagnaError(f"the server could not start: {said['ready']}")
        yield _Server(
            said["url"], bytes.fromhex(said["measurement"]), bytes.fromhex(said["broker"])
        )
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _listen(process: subprocess.Popen[str]) -> dict[str, str]:
    """Read what the server prints until it says how the model is."""
    said: dict[str, str] = {}
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(said) < len(_SAID) and time.monotonic() < deadline:
        line = process.stdout.readline()
        if not line:
            reason = process.communicate(timeout=10)[1].strip().splitlines()
            raise LasagnaError(f"the server ended: {reason[-1] if reason else 'without a word'}")
        for name, pattern in _SAID.items():
            if found := pattern.search(line):
                said.setdefault(name, found[1])
    if len(said) < len(_SAID):
        raise LasagnaError(f"the server was not ready after {START_TIMEOUT_S:.0f} s")
    return said


def _classify(
    server: _Server, pictures: Mapping[str, Any]
) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """What a client does: verify the enclave, seal every photo, open every answer."""
    from lasagna import Client
    from lasagna.trust.policy import MeasurementIn

    with Client(
        server.url,
        policy=MeasurementIn(frozenset({server.measurement})),
        brokers=[server.broker],
        insecure_allow_emulated=True,
    ) as client:
        client.infer(MODEL, {"image": next(iter(pictures.values()))})
        before = client.statistics(MODEL)
        start = time.perf_counter()
        answers = {
            name: client.infer(MODEL, {"image": x})["probabilities"][0]
            for name, x in pictures.items()
        }
        seconds = (time.perf_counter() - start) / len(pictures)
        after = client.statistics(MODEL)
    stats = after | {
        key: (after[key] - before[key]) / len(pictures)
        for key in ("load_s", "compute_s", "stall_s", "open_s", "seal_s", "entries", "loaded_bytes")
    }
    return answers, seconds, stats


def _photo_table(name: str, picture: Any, secure: Any, plain: Any) -> Table:
    from lasagna.models.zoo.labels import best_guesses
    from lasagna.models.zoo.photos import PHOTOS

    shows = PHOTOS[name].shows if name in PHOTOS else ""
    table = Table(title=f"[bold]{name}[/] {shows}", title_justify="left", min_width=72)
    table.add_column("sealed, in the enclave")
    table.add_column("p", justify="right")
    table.add_column("plain ONNX Runtime")
    table.add_column("p", justify="right")
    for mine, theirs in zip(best_guesses(secure), best_guesses(plain), strict=True):
        table.add_row(
            mine.label, f"{mine.probability:.4f}", theirs.label, f"{theirs.probability:.4f}"
        )
    return table


def _cost_table(stats: Mapping[str, Any], seconds: float, plain_s: float) -> Table:
    plan = stats["plan"]
    table = Table(title="What it cost (a photo, mean)", title_justify="left", min_width=72)
    table.add_column("memory of the enclave")
    table.add_column("", justify="right")
    table.add_column("time and calls")
    table.add_column("", justify="right")
    left = [
        ("weights sealed", plan["weight_bytes"]),
        (f"pinned ({len(plan['pinned_slices'])} of {plan['slices']} slices)", plan["pinned_bytes"]),
        ("streamed, a photo", int(stats["loaded_bytes"])),
        ("activations", plan["activation_bytes"] + plan["input_bytes"]),
        ("workspace", plan["workspace_bytes"]),
        (f"ring of {plan['ring_slots']} slots", plan["ring_slots"] * plan["slot_bytes"]),
        ("[bold]planned[/]", stats["pool_high_water"] + stats["workspace_bytes"]),
        ("[bold]budget[/]", stats["budget_bytes"]),
        ("[bold]process, all of it[/]", stats["process_peak_bytes"]),
    ]
    right = [
        ("open the request", _ms(stats["open_s"])),
        ("compute", _ms(stats["compute_s"])),
        ("load (beside computing)", _ms(stats["load_s"])),
        ("wait for a load", _ms(stats["stall_s"])),
        ("seal the answer", _ms(stats["seal_s"])),
        ("calls into the enclave", f"{stats['entries']:.0f}"),
        ("", ""),
        ("[bold]client to client[/]", _ms(seconds)),
        ("[bold]plain ONNX Runtime[/]", _ms(plain_s)),
    ]
    for (name, size), (what, figure) in zip(left, right, strict=True):
        table.add_row(name, format_bytes(size), what, figure)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
