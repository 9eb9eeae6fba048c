#!/usr/bin/env bash
# left_behind.sh MARK PARENT: once PARENT, which started this, has ended, end every process with MHC_LAUNCH=MARK in its environment.
#
# A rank that is killed leaves the processes that it had started, after its first save Megatron's helper for checkpoints. They never
# end, and hold the launcher's output open. torchrun.sh starts this beside torchrun, in a session of its own.
set -uo pipefail
trap '' INT TERM HUP

# A process that has ended keeps its number until its parent asks for it; those that it had started lose it as their parent at once.
while read -r _ _ _ parent _ <"/proc/$$/stat" && ((parent == $2)); do sleep 1; done

left_behind() {
    local environment
    for environment in $(timeout 10 grep -lsxz "MHC_LAUNCH=$1" /proc/[0-9]*/environ); do
        echo "${environment//[!0-9]/}"
    done
}

for signal in TERM KILL; do
    [[ -z $(left_behind "$1") ]] && exit
    sleep 5
    ids=$(left_behind "$1")
    [[ -z $ids ]] && exit
    echo "mhc-megatron: SIG$signal to what the job has left behind:" $ids >&2
    kill -"$signal" $ids 2>/dev/null
done
