"""``lasagna insecure-broker``."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Annotated

import typer

from lasagna.cli.options import AllowMeasurement, InsecureAllowEmulated, digests_of, listen

DEFAULT_PORT = 8100


def insecure_broker(
    keys: Annotated[
        list[Path], typer.Argument(help="Key files of models, as lasagna seal writes them.")
    ],
    allow_measurement: AllowMeasurement,
    insecure_allow_emulated: InsecureAllowEmulated = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any.")] = DEFAULT_PORT,
    state: Annotated[
        Path | None,
        typer.Option(help="Folder of the broker's own secrets, made when it is not there."),
    ] = None,
    insecure_listen_anywhere: Annotated[
        bool,
        typer.Option("--insecure-listen-anywhere", help="Allow an address that others can reach."),
    ] = False,
    listen_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Release models' keys to allowed enclaves; for development.

    The keys lie in plain files, and so do the broker's own secrets: whoever can read the machine
    has them. Run it where the models' owner would keep the keys, not on the edge server.
    """
    import uvicorn

    from lasagna.server.broker import InsecureBroker, broker_app, require_loopback
    from lasagna.server.broker_state import open_state, read_model_keys
    from lasagna.trust.policy import MeasurementIn

    require_loopback(host, insecure_listen_anywhere=insecure_listen_anywhere)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    broker = InsecureBroker(
        secrets=open_state(state or default_state()),
        models=read_model_keys(keys),
        policy=MeasurementIn(digests_of("--allow-measurement", allow_measurement)),
        insecure_allow_emulated=insecure_allow_emulated,
    )
    listener = socket.socket(fileno=listen_fd) if listen_fd is not None else listen(host, port)
    bound = listener.getsockname()
    typer.echo(f"insecure key broker on http://{bound[0]}:{bound[1]}", err=True)
    typer.echo(f"its public key, for clients: --broker-key {broker.public_key.hex()}", err=True)
    if insecure_allow_emulated:
        typer.echo("emulated enclaves are allowed: any process may have the keys", err=True)
    config = uvicorn.Config(broker_app(broker), log_config=None, access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


def default_state() -> Path:
    """Where a broker keeps its secrets unless it is told."""
    return Path(typer.get_app_dir("lasagna")) / "insecure-broker"
