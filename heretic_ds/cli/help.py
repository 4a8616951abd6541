"""`--help`, and answers to those who come from Heretic and type its options. Imports nothing slow."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence

from heretic_ds import __version__
from heretic_ds.conf_files import choices

NO_MODEL = "no model given; the usage is: heretic-ds <model> [key=value ...], see heretic-ds --help"

EXAMPLES = (
    ("heretic-ds experiment=demo", "the whole job on the built-in demo model: minutes on a CPU, no network"),
    ("heretic-ds Qwen/Qwen3-4B-Instruct-2507", "find an edit, verify it, export the edited model"),
    ("heretic-ds Qwen/Qwen3-4B-Instruct-2507 task=chat export.trial=12", "talk to the model with the edit of a trial"),
    ("heretic-ds Qwen/Qwen3-4B-Instruct-2507 task=upload export.repo=me/edited", "write the exported model to the hub"),
    ("heretic-ds Qwen/Qwen3-32B task=plan hardware=h100x8", "what a model needs and takes; reads no weights"),
    (
        "heretic-ds my/model run.launch=auto search.trials=50 prompts.target.eval.source=mine.txt",
        "a rank for every GPU",
    ),
)
GROUPS = (
    ("task", "what a command does"),
    ("capture", "how the model lies on ranks while directions are captured"),
    ("evaluate", "the same while edits are evaluated"),
    ("prompts", "sets of prompts"),
    ("hardware", "the machine that task=plan reckons with"),
    ("experiment", "settings that belong together"),
)
OFTEN_CHANGED = (
    ("search.trials=200", "how many edits are tried; more of them go on with the same run"),
    ("prompts.target.train.source=FILE", "prompts that show the behaviour; .eval: those that are scored"),
    ("prompts.baseline.train.source=FILE", "prompts that do not"),
    ("prompts.target.train.slice=0:400", "rows to use; of a file all, unless given"),
    ("export.max_kl=0.1", "largest KL divergence from the original, in nats"),
    ("export.dir=FOLDER", "where the edited model goes; run.dir: where the run is kept"),
    ("export.format=both", "beside the model a LoRA adapter; adapter: that alone"),
    ("generation.batch_size=0", "rows a batch; 0: found by measuring"),
    ("run.launch=auto", "start a rank for every GPU of this machine"),
)
FLAGS = (
    ("--cfg job", "print the composed configuration and stop"),
    ("--multirun, -m", "a run for every combination of comma-separated values: -m search.seed=0,1,2"),
    ("--config-dir DIR", "also look for configuration in DIR"),
    ("--hydra-help, --info", "Hydra's own flags; where the configuration comes from"),
    ("--version", "print the version"),
)
STATUSES = (
    ("0", "done"),
    ("2", "a mistake in the command or its input: one line says what to change"),
    ("1", "anything else, such as a search that found nothing to export"),
    ("130", "interrupted"),
)

HERETIC_OPTIONS = {
    "model": "{}",
    "evaluate-model": "task=evaluate",
    "n-trials": "search.trials={}",
    "n-startup-trials": "search.startup_trials={}",
    "seed": "search.seed={}",
    "batch-size": "generation.batch_size={}",
    "max-response-length": "generation.max_new_tokens={}",
    "kl-divergence-target": "search.kl_target={}",
    "system-prompt": "prompts.system={}",
    "response-prefix": "prompts.response_prefix={}",
    "refusal-markers": "scoring.markers={}",
    "print-responses": "scoring.print_answers={}",
    "trust-remote-code": "model.trust_remote_code={}",
    "dtypes": "model.dtype={}",
    "quantization": "model.quantization={}",
    "device-map": "evaluate={}",
    "orthogonalize-direction": "direction.orthogonalize={}",
    "winsorization-quantile": "direction.winsorize_quantile={}",
    "row-normalization": "ablation.row_norm={}",
    "max-shard-size": "export.max_shard_size={}",
    "study-checkpoint-dir": "run.dir={}",
    "print-residual-geometry": "task=geometry",
    "plot-residuals": "task=geometry",
    "good-prompts.dataset": "prompts.baseline.train.source={}",
    "bad-prompts.dataset": "prompts.target.train.source={}",
    "good-evaluation-prompts.dataset": "prompts.baseline.eval.source={}",
    "bad-evaluation-prompts.dataset": "prompts.target.eval.source={}",
}
"""Options of Heretic's command line, and what is said here in their place."""
_SWITCHES = {"print-responses", "trust-remote-code", "orthogonalize-direction"}
_WITHOUT_VALUE = {"print-residual-geometry", "plot-residuals"}


def answered(arguments: Sequence[str]) -> int | None:
    """Answer what needs no configuration; returns the exit status, None for everything else.

    Without arguments, which are no command, help is followed by what is missing: a script whose variable is empty
    has to fail.
    """
    if "--version" in arguments:
        print(f"heretic-ds {__version__}")
        return 0
    if "--help" in arguments or "-h" in arguments:
        show_help()
        return 0
    if arguments or "RANK" in os.environ:
        return None
    show_help()
    print(f"heretic-ds: {NO_MODEL}", file=sys.stderr)
    return 2


def show_help() -> None:
    """Print how the command is used."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(*_help(console.width), sep="\n", markup=False, highlight=False)


def _help(width: int) -> Iterator[object]:
    from rich.text import Text

    yield Text.assemble(
        ("heretic-ds", "bold"),
        " finds the direction of a behaviour in a language model and removes it from the weights.\n\n",
        ("Usage: ", "bold"), ("heretic-ds <model> [key=value ...]", "bold cyan"),
        "\n<model> is a Hugging Face hub id or a local folder. The same command again goes on with its run,"
        " whose results are in run.dir, by default runs/<model name>.\n",
        ("heretic-ds reproduce <heretic_ds.json>", "bold cyan"), " makes an export again and compares the files.\n",
    )  # fmt: skip
    yield from _section("Examples", EXAMPLES, width, "green", below=True)
    named = [(group, f"{about}: {', '.join(choices(group))}") for group, about in GROUPS]
    yield from _section("Groups (group=choice)", named, width, "cyan")
    yield from _section("Often changed (key=value)", OFTEN_CHANGED, width, "magenta")
    yield from _section("Flags", FLAGS, width, "yellow")
    yield from _section("Exit status", STATUSES, width, "blue")
    yield Text("Every key: docs/configuration.md. Coming from Heretic: its options are answered with ours.")


def _section(
    title: str, rows: Sequence[tuple[str, str]], width: int, style: str, below: bool = False
) -> Iterator[object]:
    """A titled list of words and what they mean, which stands beside them, or ``below`` where they are long."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    yield Text(title, "bold")
    if below:
        for word, meaning in rows:
            yield Padding(Text(word, style), (0, 0, 0, 2))
            yield Padding(Text(meaning, "dim"), (0, 0, 0, 6))
    else:
        table = Table.grid(padding=(0, 2, 0, 0), expand=False)
        table.add_column(no_wrap=True, style=style)
        table.add_column()
        for word, meaning in rows:
            table.add_row(Text(word), Text(meaning))
        yield Padding(table, (0, 0, 0, 2))
    yield Text()


def in_our_spelling(arguments: Sequence[str]) -> str | None:
    """One sentence for options as Heretic has them; None where there is none among the arguments."""
    ours: list[str] = []
    theirs: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--") or name not in HERETIC_OPTIONS:
            ours.append(word)
            continue
        if name in _SWITCHES or name in _WITHOUT_VALUE:
            value = value or "true"
        elif not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "..."
        theirs.append(f"--{name}")
        ours.append(HERETIC_OPTIONS[name].format(value))
    if not theirs:
        return None
    words = [word if word == "..." or word.endswith("=...") else shlex.quote(word) for word in _model_first(ours)]
    options = ", ".join(dict.fromkeys(theirs))
    verb = "is an option" if len(set(theirs)) == 1 else "are options"
    return f"{options} {verb} of Heretic; here the same is written: heretic-ds {' '.join(words)}"


def _model_first(words: Sequence[str]) -> list[str]:
    """The bare word, which is the model, before the overrides; a place for it where there is none."""
    bare = [word for word in words if "=" not in word and not word.startswith(("-", "+", "~"))]
    others = [word for word in words if word not in bare]
    named = any(word.startswith(("model.path=", "experiment=")) for word in others)
    return [*(bare or ([] if named else ["MODEL"])), *others]
