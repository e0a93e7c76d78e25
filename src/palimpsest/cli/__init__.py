"""The command line: a table of verbs, each in its own module that is imported only when it is called."""

import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {
    "demo": "train a tiny pair with planted changes, audit it, write the report (no downloads)",
    "audit": "measure which domains a fine-tune changed, how much, and in which latents",
    "battery": "fix the text a base is audited with, and calibrate it with innocent fine-tunes",
    "harvest": "write a model's activations, or a pair's side by side, to a store",
    "train": "train a dictionary: of one model (sae), of a difference (diff-sae), of a pair (crosscoder)",
    "diff": "find the latents that a fine-tune made, test them, and measure which of them cause the change",
    "examples": "collect for every latent where it fires, in both models, what it promotes and what fires beside it",
    "label": "name latents, by Neuronpedia, a language model or their own tokens, and score every name",
    "steer": "add, scale, clamp or ablate latents while a model writes; a sweep of strengths with a guard",
    "tune": "fine-tune a model through the latents of frozen dictionaries, as an adapter that peft loads",
    "explain": "rank the latents that a latent adapter changed, test them, prune it, compare it with another",
    "evaluate": "measure what a dictionary reconstructs, and what splicing it in does to the predictions",
    "convert": "write a dictionary in another library's format, or in ours; prove it on real text",
    "report": "write one page of one run or of many: verdict, evidence, method, tables, latents",
    "serve": "browse runs and latents, read your own text, steer and watch training in a local web page",
    "info": "explain any artifact: a run, a store, a dictionary of any format; try a dictionary on real text",
    "completion": "print a completion script for bash, zsh or fish",
}
"""Every verb with its one line of help; the module of a verb has its name."""

USAGE = """Palimpsest tells what a fine-tune wrote over its base model.

Usage: palimpsest VERB [OPTIONS]      palimpsest VERB --help

{verbs}

Every verb takes --config FILE (TOML, YAML or JSON; flags win), --json, --quiet and --verbose.
Exit codes: 0 done, 2 bad input or usage, 3 a gate failed (--fail-on), 130 interrupted (run again with --resume).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {line}" for name, line in VERBS.items())
        sys.stdout.write(USAGE.format(verbs=verbs))
        return 0 if arguments else 2
    if arguments[0] in {"-V", "--version"}:
        from importlib.metadata import version

        sys.stdout.write(f"palimpsest {version('palimpsest-lm')}\n")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        sys.stderr.write(f"palimpsest: there is no verb '{verb}'.{hint} Verbs: {', '.join(VERBS)}.\n")
        return 2
    from palimpsest.cli.command import run_verb

    return run_verb(verb, import_module(f"palimpsest.cli.{verb}").app, rest)


def entry() -> None:
    """Console-script entry point."""
    try:
        code = main()
    except KeyboardInterrupt:
        # During the imports of a verb, before anything was begun.
        code = 130
    raise SystemExit(code)
