"""The command line of `launch/run.sh` and `launch/multinode.sh`: launcher options first, then those of heretic-ds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from heretic_ds import cli, needs
from heretic_ds.errors import UserError
from heretic_ds.foreign.streams import keep_standard_streams
from heretic_ds.launching import nodes
from heretic_ds.launching.plan import DEFAULT_PORT, Launch
from heretic_ds.launching.supervisor import Supervised, Supervisor, supervise

_OWN_MODULE = Launch.module
_SWEEP_FLAGS = {"-m", "--multirun"}


def main(words: Sequence[str]) -> int:
    """Start the ranks of a job and wait for their end. Returns the job's exit status."""
    keep_standard_streams()
    try:
        if unfit := needs.unfit_system():
            raise UserError(unfit)
        if list(words) == ["--as-node"]:
            return nodes.serve()
        options, arguments = _parse(words)
        launch = _launch(options, arguments)
        if launch.module == _OWN_MODULE:
            _check_arguments(arguments)
        return supervise(_job(launch, options))
    except KeyboardInterrupt:
        print("heretic-ds: interrupted", file=sys.stderr)
        return cli.EXIT_INTERRUPTED
    except Exception as error:
        return cli.report(error)


def _job(launch: Launch, options: argparse.Namespace) -> Supervised:
    if options.hostfile is None:
        return Supervisor(launch)
    hosts = nodes.read_hostfile(Path(options.hostfile), options.nodes)
    return nodes.Cluster(launch, hosts, options.ssh)


def _launch(options: argparse.Namespace, arguments: Sequence[str]) -> Launch:
    by_ssh = options.hostfile is not None
    if by_ssh and options.node_rank is not None:
        raise UserError("--hostfile starts every node from here; --node-rank is for starting each node by itself")
    if not by_ssh and (options.node_rank is None) != ((options.nodes or 1) == 1):
        raise UserError("--nodes and --node-rank go together: how many nodes there are, and which of them this one is")
    return Launch(
        arguments=tuple(arguments),
        ranks=options.ranks,
        nodes=1 if by_ssh else options.nodes or 1,
        node_rank=options.node_rank or 0,
        master_addr=options.master_addr,
        master_port=options.master_port,
        options=tuple(options.deepspeed),
        module=options.module,
    )


def _check_arguments(arguments: Sequence[str]) -> None:
    """Find in a second, before any rank is started, what is wrong with the overrides. Raises what `cli` reports."""
    if _SWEEP_FLAGS & set(arguments):
        raise UserError("this starts the ranks of one job; for a sweep: heretic-ds -m hydra/launcher=deepspeed ...")
    if not any(word.startswith("-") for word in arguments):
        cli.compose(arguments)


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; {parser.prog} --help shows the usage")

    parser.error = refuse  # type: ignore[method-assign]  # argparse itself would print its usage and exit
    own = _count_own(parser, words)
    arguments = list(words[own:])
    return parser.parse_args(words[:own]), arguments[1:] if arguments[:1] == ["--"] else arguments


def _count_own(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """How many words at the beginning are the launcher's; the first that is none of its options ends them."""
    place = 0
    while place < len(words):
        name, _, value = words[place].partition("=")
        action = parser._option_string_actions.get(name)
        if action is None:
            break
        place += 1 if value or action.nargs == 0 else 2
    return min(place, len(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=os.environ.get("HERETIC_DS_LAUNCH_NAME", "python -m heretic_ds.launching"),
        usage="%(prog)s [options] <model> [key=value ...]",
        description="Runs heretic-ds on several ranks. What follows the options is as for heretic-ds, see its --help.",
        epilog="Exit status: that of heretic-ds. Ctrl-C once ends the search and goes on with what there is; "
        "Ctrl-C twice, or SIGTERM, ends every rank.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", "--num-gpus", dest="ranks", type=int, metavar="N", help="ranks on a node; default: its GPUs, 1 without")
    add("--hostfile", metavar="FILE", help="start every host listed (name slots=N) over ssh, the first one with rank 0")
    add("--ssh", default=nodes.SSH, metavar="COMMAND", help="how to reach a host of the hostfile; default: %(default)s")
    add("--nodes", type=int, metavar="M", help="nodes of the job; of a hostfile the first M")
    add("--node-rank", type=int, metavar="R", help="start this node alone, the R-th from 0, of a job of --nodes")
    add("--master-addr", metavar="HOST", help="where rank 0 is; default: the first host")
    add("--master-port", type=int, metavar="PORT", help=f"default: a free one; {DEFAULT_PORT} on several nodes")
    add("--deepspeed", action="append", default=[], metavar="OPTION", help="an option of deepspeed, as --name=value")
    add("--module", default=_OWN_MODULE, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
