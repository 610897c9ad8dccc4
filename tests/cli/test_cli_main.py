from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.errors import LasagnaError, PackageError, UsageError

PLANTED = "lasagna_test_planted_command"


def greet(name: Annotated[str, typer.Argument(help="Whom.")], loud: bool = False) -> None:
    """Greet somebody."""
    typer.echo(f"hello {name.upper() if loud else name}")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with the command `greet`, entered in the table."""
    module = ModuleType(PLANTED)
    vars(module)["greet"] = greet
    monkeypatch.setitem(sys.modules, PLANTED, module)
    monkeypatch.setitem(main.COMMANDS, "greet", main.Command(f"{PLANTED}:greet", "Greet somebody."))
    return module


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main.app, arguments)


def run_raising(planted: ModuleType, error: BaseException, *options: str) -> Result:
    def fail() -> None:
        raise error

    vars(planted)["greet"] = fail
    return run(*options, "greet")


def test_version() -> None:
    result = run("--version")

    assert result.exit_code == 0
    assert result.stdout == f"lasagna {metadata.version('lasagna')}\n"


def test_without_arguments_it_shows_help() -> None:
    assert "Usage:" in run().output


def test_command_runs_with_its_arguments(planted: ModuleType) -> None:
    result = run("greet", "ada", "--loud")

    assert (result.exit_code, result.stdout) == (0, "hello ADA\n")


def test_help_lists_a_command_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = main.Command("lasagna_no_such_module:absent", "Not written yet.")
    monkeypatch.setitem(main.COMMANDS, "absent", absent)

    result = run("--help")

    assert result.exit_code == 0
    assert "absent" in result.stdout
    assert "Not written yet." in result.stdout


def test_shell_completes_a_commands_own_options(
    planted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_LASAGNA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "lasagna greet --l")
    monkeypatch.setenv("COMP_CWORD", "2")

    result = CliRunner().invoke(main.app, prog_name="lasagna")

    assert result.stdout.split() == ["--loud"]


def test_command_shows_its_own_help(planted: ModuleType) -> None:
    result = run("greet", "--help")

    assert result.exit_code == 0
    assert "Whom." in result.stdout
    assert "greet [OPTIONS]" in result.stdout


def test_command_can_have_subcommands(planted: ModuleType) -> None:
    group = typer.Typer()
    group.command("warmly")(greet)
    group.callback()(lambda: None)
    vars(planted)["greet"] = group

    assert run("greet", "warmly", "ada").stdout == "hello ada\n"


def test_mistyped_command_gets_a_suggestion(planted: ModuleType) -> None:
    result = run("gret")

    assert result.exit_code == 2
    assert "Did you mean 'greet'?" in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (UsageError("no such size"), 2),
        (LasagnaError("it broke"), 1),
        (PackageError("tampered with"), 1),
        (FileNotFoundError(2, "No such file", "model.onnx"), 1),
    ],
)
def test_error_is_one_line_on_stderr(planted: ModuleType, error: Exception, exit_code: int) -> None:
    result = run_raising(planted, error)

    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr == f"error: {error}\n"


def test_error_is_red_on_a_terminal(planted: ModuleType) -> None:
    vars(planted)["greet"] = raise_usage_error

    result = CliRunner().invoke(main.app, ["greet"], color=True)

    assert result.stderr == "\x1b[31merror: no such size\x1b[0m\n"


def test_error_can_not_steer_the_terminal(planted: ModuleType) -> None:
    result = run_raising(planted, LasagnaError("a\nb\x1b]0;title\x07\u202ec"))

    assert result.stderr == "error: a b ]0;title  c\n"


def test_error_without_a_message_gives_its_name(planted: ModuleType) -> None:
    assert run_raising(planted, PackageError()).stderr == "error: PackageError\n"


def test_debug_lets_the_error_through(planted: ModuleType) -> None:
    result = run_raising(planted, LasagnaError("it broke"), "--debug")

    assert isinstance(result.exception, LasagnaError)


def test_a_bug_is_not_dressed_up_as_an_error(planted: ModuleType) -> None:
    assert isinstance(run_raising(planted, ZeroDivisionError()).exception, ZeroDivisionError)


def test_interrupt_exits_quietly(planted: ModuleType) -> None:
    result = run_raising(planted, KeyboardInterrupt())

    assert (result.exit_code, result.output) == (130, "")


def test_unhandled_traceback_shows_no_local_variables(planted: ModuleType) -> None:
    # Typer's own tracebacks print them, and they may be keys.
    assert main.app.pretty_exceptions_enable is False


def test_table_agrees_with_the_commands() -> None:
    for name, entry in main.COMMANDS.items():
        command: Any = entry.load(name)
        assert command.help.partition("\n")[0] == entry.summary


def test_help_of_the_program_loads_no_engine() -> None:
    # A fresh interpreter: this one may have imported anything.
    script = (
        "import sys; from lasagna.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'numpy', 'onnx', 'onnxruntime', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.stderr.strip() == ""


def raise_usage_error() -> None:
    raise UsageError("no such size")
