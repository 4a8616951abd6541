#!/bin/sh
# Runs heretic-ds on the nodes of a hostfile, over ssh. Started on one of them, or on any machine that reaches them.
#
#   launch/multinode.sh HOSTFILE [-n N] [options] <model> [key=value ...]     options: launch/run.sh --help
#   launch/multinode.sh launch/hostfile.example Qwen/Qwen3-235B-A22B capture=zero3 evaluate=tensor_parallel
#
# Needs   a hostfile, as launch/hostfile.example; ssh to every host without a password (--ssh "ssh -p 2222" for another
#         way); heretic-ds, its environment and the current folder at the same paths on every node, and the model where
#         every node can read it. The nodes reach the first host on --master-port (29500).
# Costs   one connection per node. Variables HF_*, NCCL_*, GLOO_*, TORCH_*, DS_*, OMP_*, UCX_*, MKL_*, TRITON_* and
#         LD_LIBRARY_PATH of this shell go along; they travel inside the connection, not on command lines.
# Leaves  the run folder on the node of rank 0, the first host, and no process on any node: when this command ends, is
#         killed, or loses a node, every node ends its ranks within a minute.
# Status  as launch/run.sh; the error of the rank that failed first comes last.
#
# Two nodes on one machine, to try it without a cluster, each command in a terminal of its own:
#   launch/run.sh --nodes 2 --node-rank 0 -n 1 --master-port 29500 <model> ...
#   launch/run.sh --nodes 2 --node-rank 1 -n 1 --master-port 29500 <model> ...
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
HERETIC_DS_LAUNCH_NAME=$0
export HERETIC_DS_LAUNCH_NAME
case ${1:-} in
'') echo "heretic-ds: no hostfile; the usage is: $0 HOSTFILE [-n N] <model> [key=value ...]" >&2 && exit 2 ;;
-*) exec "$here/run.sh" "$@" ;;
esac
hostfile=$1
shift
exec "$here/run.sh" --hostfile "$hostfile" "$@"
