"""Promise: `lasagna trace` says where the time went, and what was wrong with what it was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.server.trace import Faults, Header, Span, TraceWriter

HEADER = Header(
    started="2026-01-02T03:04:05Z",
    models=("net \x1b[2J[red]",),
    lanes=1,
    emulated="sgx1-128",
    policy="lasagna",
    machine="2 cores",
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["trace", *map(str, arguments)])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Slices 0 to 11 of 80 ms, from second 1 on, with 20 ms between; slice 5 was waited for."""
    path = tmp_path / "trace.jsonl"
    model = HEADER.models[0]
    with TraceWriter(path, HEADER) as writer:
        for number in range(12):
            begin = 1 + number / 10
            span = Span("compute 0", "compute", begin, begin + 0.08, model, number, number + 1)
            writer.write([span])
        writer.write([Span("compute 0", "stall", 1.5, 1.54, model, 5)])
        writer.write([Span("loader", "load", 1.4, 1.54, model, 5)])
        writer.write([Faults(1.0, 7, 0.5), Faults(1.5, 1234, 0.25), Faults(9.0, 7, 0.5)])
    return path


def test_tables_show_shares_and_the_slices_that_took_most(recording: Path) -> None:
    result = run(recording)

    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "EMULATED EPC (sgx1-128): it protects nothing" in result.stdout
    assert ["compute", "0", "78", "%", "3", "%", "19", "%"] in lines
    assert ["loader", "12", "%", "88", "%"] in lines
    assert "the 10 of 12 that took most" in result.stdout
    (first,) = [line for line in lines if line[-3:] == ["40.0", "40.0", "140.0"]]
    assert first[-6:-3] == ["5", "1", "6.0"]
    assert "1,234 page faults, which took threads 0.250 s" in result.stdout


def test_names_can_not_steer_the_terminal(recording: Path) -> None:
    result = run(recording)

    assert "net \ufffd[2J[red]" in result.stdout
    assert "\x1b" not in result.stdout


def test_all_kinds_fit_into_a_narrow_terminal(
    recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with recording.open("a") as file:
        for second, kind in enumerate(("open", "seal", "gather", "pin"), 1):
            file.write(f'{{"t":"span","thread":"main","kind":"{kind}","model":"net",')
            file.write(f'"begin_s":{second},"end_s":{second}.5}}\n')

    headings = "computing stalled loading opening sealing gathering pinning".split()
    assert f"thread {' '.join(headings)} idle" in " ".join(run(recording).stdout.split())


def test_json_is_the_same_with_all_slices(recording: Path) -> None:
    result = run(recording, "--json", "--from", "1", "--to", "1.5")

    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["begin_s"], facts["end_s"]) == (1, 1.5)
    assert facts["shares"]["compute 0"] == pytest.approx({"compute": 0.8, "idle": 0.2})
    assert facts["shares"]["loader"] == pytest.approx({"load": 0.2, "idle": 0.8})
    assert facts["slices"][0]["slice"] == 5
    assert {one["slice"] for one in facts["slices"]} == {0, 1, 2, 3, 4, 5}
    assert facts["faults"] == {"pages": 1234, "seconds": 0.25}
    assert facts["header"]["emulated"] == "sgx1-128"
    assert len(json.loads(run(recording, "--json").stdout)["slices"]) == 12


def test_window_is_cut_to_the_recording(recording: Path) -> None:
    facts = json.loads(run(recording, "--json", "--from", "-inf", "--to", "inf").stdout)

    assert (facts["begin_s"], facts["end_s"]) == (0, pytest.approx(2.18))


def test_pictures_are_written_and_named(recording: Path, tmp_path: Path) -> None:
    png, page, batches = (tmp_path / name for name in ("a.png", "b.html", "c.png"))

    result = run(recording, "--png", png, "--html", page, "--batches", batches)

    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"wrote {path}\n" for path in (png, page, batches))
    assert png.read_bytes()[:4] == batches.read_bytes()[:4] == b"\x89PNG"
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_json_beside_a_picture_stays_json(recording: Path, tmp_path: Path) -> None:
    result = run(recording, "--json", "--html", tmp_path / "b.html")

    assert json.loads(result.stdout)["begin_s"] == 1
    assert result.stderr == f"wrote {tmp_path / 'b.html'}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "2.18"], "--from 2.18 is not before the recording's end at 2.18 s"),
        (["--from", "99"], "--from 99 is not before the recording's end at 2.18 s"),
        (["--from", "nan"], "--from nan is not before the recording's end at 2.18 s"),
        (["--from", "1.5", "--to", "1.5"], "--to 1.5 is not after the window's begin at 1.5 s"),
        (["--to", "0.5"], "--to 0.5 is not after the window's begin at 1 s"),
        (["--to", "nan"], "--to nan is not after the window's begin at 1 s"),
    ],
)
def test_empty_window_is_refused(recording: Path, options: list[str], message: str) -> None:
    result = run(recording, *options)

    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


def test_window_in_which_nothing_ran_is_idle(recording: Path) -> None:
    facts = json.loads(run(recording, "--json", "--from", "0.1", "--to", "0.2").stdout)

    assert facts["shares"] == {"compute 0": {"idle": 1}, "loader": {"idle": 1}}


def test_recording_without_spans_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    TraceWriter(path, HEADER).close()

    result = run(path)

    assert result.exit_code == 2
    assert "has no spans: nothing ran in the enclave while it was recorded" in result.stderr


def test_missing_file_is_named(tmp_path: Path) -> None:
    result = run(tmp_path / "none.jsonl")

    assert result.exit_code == 2
    assert "none.jsonl: No such file or directory" in result.stderr
