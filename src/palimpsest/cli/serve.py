"""`palimpsest serve`."""

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, ModelOptions

app = verb_app("serve", VERBS["serve"].capitalize() + ".")


@app.default
def serve(
    run_dir: Path,
    *,
    model: Annotated[tuple[str, ...] | None, Parameter(group="Models")] = None,
    tuned: Annotated[str | None, Parameter(group="Models")] = None,
    dictionary: Annotated[str | None, Parameter(group="Models")] = None,
    port: int = 8765,
    open: bool = False,
    models: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Show the runs of a folder in a local web page, read-only, to the user who was given its address.

    Args:
        run_dir: Folder whose runs are shown, however deep they lie.
        model: Let own text be read and latents be steered. Alone it loads, when first asked, the models that an
            examples run was made with; `--model BASE` says where the base is now.
        tuned: Where the tuned model is now.
        dictionary: Read own text with this dictionary, too; needs `--model BASE`.
        port: Where the app listens on this machine; 0 takes a free port.
        open: Open the page in the browser.
        models: How models are loaded.
        display: What is printed.
    """
    from palimpsest.web import ServeConfig, serve

    if model is not None and len(model) > 1:
        raise ConfigError("--model takes one base", found=", ".join(model))
    config = ServeConfig(
        root=run_dir,
        model=model is not None,
        base=model[0] if model else None,
        tuned=tuned,
        dictionary=dictionary,
        models=models,
        port=port,
    )

    def ready(address: str) -> None:
        emit(display, {"address": address, "folder": str(run_dir)}, lambda: _told(address, run_dir))
        sys.stdout.flush()
        if open:
            webbrowser.open(address)

    serve(config, ready)


def _told(address: str, run_dir: Path) -> None:
    say(f"Runs of {run_dir}: {address}")
    say(
        "The address works on this machine, for who has it. Nothing in the folder is changed. Ctrl-C ends the app."
    )
