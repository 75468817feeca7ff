#!/bin/sh
# What launchers take for ssh: enter.sh [OPTION...] HOST COMMAND... runs the command on that host.
# The folder $EXTRAPCOMM_HOSTS holds the process id of every host's first process, under the host's name.
set -eu
while [ "${1#-}" != "$1" ]; do shift; done
first=$(cat "$EXTRAPCOMM_HOSTS/$1")
shift
exec nsenter --target "$first" --net --uts --ipc --pid --mount sh -c "$*"
