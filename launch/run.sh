#!/bin/sh
# Runs heretic-ds on several ranks of this machine, with DeepSpeed's launcher.
#
#   launch/run.sh [-n N] [options] <model> [key=value ...]       launch/run.sh --help lists the options
#   launch/run.sh -n 4 Qwen/Qwen3-4B capture=zero3 evaluate=tensor_parallel
#
# Needs   an environment with heretic-ds: the checkout's .venv (`make venv`), the active one, or PYTHON=/path/to/python.
#         GPUs, or none: then the ranks share the cores (DS_ACCELERATOR=cpu, OMP_NUM_THREADS = cores / ranks).
# Costs   what heretic-ds costs, and some ten seconds to start. Ranks take the GPUs 0 to N-1, or those that
#         CUDA_VISIBLE_DEVICES lists. They talk over a free port, to this machine only.
# Leaves  the run folder, as heretic-ds does, and no process: Ctrl-C, SIGTERM, a closed terminal and a dying rank end
#         every rank. The first Ctrl-C ends the search alone and goes on with what it found. After an unexpected end
#         the output of ranks above 0 stays in a temporary folder, which is named.
# Status  as heretic-ds: 0 done, 2 a mistake in the command or its input (one line), 130 interrupted, 1 anything else.
#
# Where only the package is installed, `python -m heretic_ds.launching` is the same command.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$root/.venv/bin/python" ]; then
        PYTHON=$root/.venv/bin/python
    else
        PYTHON=$(command -v python3 || command -v python) || { echo "heretic-ds: no python found; set PYTHON" >&2; exit 2; }
    fi
fi
if [ -f "$root/heretic_ds/__init__.py" ]; then
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
HERETIC_DS_LAUNCH_NAME=${HERETIC_DS_LAUNCH_NAME:-$0}
export HERETIC_DS_LAUNCH_NAME
exec "$PYTHON" -m heretic_ds.launching "$@"
