"""From options to a running app, and the address that opens it."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import suppress

from palimpsest.errors import ConfigError
from palimpsest.web.app import EXTRA, create_app
from palimpsest.web.bench import Bench
from palimpsest.web.config import ServeConfig

LOOPBACK = "127.0.0.1"
"""The app listens to this machine only: what it shows is as private as the folder it shows."""

MOST_CONNECTIONS = 128


def serve(config: ServeConfig, ready: Callable[[str], None], *, bench: Bench | None = None) -> None:
    """Serve until interrupted.

    Args:
        config: What is served and where.
        ready: Called with the address, token included, once the app listens.
        bench: The models; made from the config by default.

    Raises:
        ConfigError: The web extra is not installed, or the port is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError("The app needs packages that are not installed", expected=EXTRA) from error
    with _listen(config.port) as listening:
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = create_app(config, token=token, port=port, bench=bench)
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            ws="none",
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=2,
        )
        ready(f"http://{LOOPBACK}:{port}/?token={token}")
        try:
            # Ctrl-C is how the app ends; uvicorn hands it on when it is done.
            with suppress(KeyboardInterrupt):
                uvicorn.Server(settings).run(sockets=[listening])
        finally:
            app.desk.close()


def _listen(port: int) -> socket.socket:
    # With the protocol named, asyncio sends each answer at once, instead of 40 ms later (Nagle's algorithm).
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        listening.listen(MOST_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"Port {port} of this machine cannot be used",
            found=error.strerror or error,
            fix="Choose another with --port, or --port 0 for a free one",
        ) from error
    return listening
