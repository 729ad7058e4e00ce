"""A run as a job of Slurm: the script for `sbatch` that trains it, and goes on by itself until it is finished."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deimkit.errors import RecipeError

if TYPE_CHECKING:
    from deimkit.training.run import Plan

CORES = 8  # of a node for each of its devices, where the plan does not say how many processes load
MARGIN = 60  # seconds; Slurm counts in minutes

BODY = r"""
node() {  # what each node does: torchrun starts a process for every device
    trap '' TERM  # Slurm sends it to every process, so that one which torchrun passed on would mean "leave at once"
    exec "$python" -m torch.distributed.run \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$devices" --max-restarts=0 \
        --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
        --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.$attempt" \
        --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
        -m deimkit train --resume "$run" --wait
}

stopped() {  # by the user: such a request is empty, and final
    [ -e "$run/stop" ] && [ ! -s "$run/stop" ]
}

leave() {  # Slurm wants the nodes back soon: save and leave after the current step
    stopped && return
    echo "job $SLURM_JOB_ID" >"$run/stop"
    { sleep "$grace"; again; } &  # whatever keeps it from leaving, the last checkpoint is there to go on from
}

preempted() {
    scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}

finished() {
    tail -n 1 "$run/events.jsonl" | grep -qE '"event": "(finished|early_stop)"'
}

checkpoint() {  # which one is there: each is a new file
    ls -li "$run/checkpoints/last.pt" 2>&1
}

again() {  # queue this job once more, unless it was cancelled or would never get any further
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit 1
    if [ "$(checkpoint)" = "$before" ]; then
        echo "job $SLURM_JOB_ID wrote no checkpoint and is not queued again: it needs a longer --time"
        exit 1
    fi
    rm -f "$run/stop"
    scontrol requeue "$SLURM_JOB_ID"
    exit
}

echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, started again ${SLURM_RESTART_COUNT:-0} times, $(date)"
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && stopped; then
    echo "asked to stop while it was waiting"
    exit 0
fi
rm -f "$run/stop"
before=$(checkpoint)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))  # so that two jobs on a node do not meet
export run python devices head port attempt
export -f node

trap leave USR1
for attempt in $(seq 0 "$restarts"); do  # all processes start again if one is lost, on whichever node
    srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c node &
    step=$!
    while kill -0 "$step" 2>/dev/null; do  # a signal ends `wait`, but not the training
        wait "$step"
        status=$?
    done
    if [ "$status" = 0 ] || [ -e "$run/stop" ] || preempted; then break; fi
done

if finished || stopped; then exit 0; fi
if [ -e "$run/stop" ] || preempted; then again; fi
exit "$status"
"""


def job_script(
    folder: Path,
    plan: Plan,
    time: str,
    partition: str | None = None,
    account: str | None = None,
    cpus: int | None = None,
    notice: int = 300,
    lines: Sequence[str] = (),
) -> str:
    """The text of a script for `sbatch` that trains the run in `folder`; see `Run.sbatch`. Raises `RecipeError`."""
    _check(folder, plan, time, partition, account, cpus, notice, lines)
    path = os.path.abspath(folder)
    options = {
        "job-name": _name(path),
        "dependency": "singleton",
        "partition": partition,
        "account": account,
        "nodes": plan.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": None if plan.device == "cpu" else plan.devices,
        "cpus-per-task": cpus or plan.devices * (CORES if plan.workers is None else plan.workers + 1),
        "time": time,
        "signal": f"B:USR1@{notice}",
        "open-mode": "append",
        "output": os.path.join(path, "log.txt").replace("%", "%%"),
    }
    asked = [f"--{name}={_quoted(value)}" for name, value in options.items() if value is not None]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in (*asked, "--requeue", *lines)),
            "# Trains a run of deimkit, and waits in the queue again until it is finished; `sbatch` this file.",
            "",
            f"run={shlex.quote(path)}",
            f"python={shlex.quote(sys.executable)}",
            f"devices={plan.devices}",
            f"restarts={plan.restarts}",
            f"grace={notice - MARGIN}",
            f"cd {shlex.quote(os.getcwd())} || exit",
            BODY,
        ]
    )


def _check(
    folder: Path,
    plan: Plan,
    time: str,
    partition: str | None,
    account: str | None,
    cpus: int | None,
    notice: int,
    lines: Sequence[str],
) -> None:
    if plan.device not in ("auto", "cuda", "cpu"):
        raise RecipeError(f"A job counts its own GPUs: prepare the run with device='cuda', not {plan.device!r}.")
    if cpus is not None and cpus < 1:
        raise RecipeError(f"cpus must be at least 1; got {cpus}.")
    if not MARGIN < notice < seconds(time):
        raise RecipeError(
            f"notice must be more than {MARGIN} s and less than the job's time, {seconds(time)} s; got {notice}."
        )
    for name, value in {"partition": partition, "account": account}.items():
        if value is not None and not re.fullmatch(r"\S+", value):
            raise RecipeError(f"{name} must be one word; got {value!r}.")
    for line in lines:
        if not line.startswith("-") or not line.isprintable():
            raise RecipeError(f"lines must be options of sbatch such as '--qos=long'; got {line!r}.")
    if not str(folder).isprintable():
        raise RecipeError(f"sbatch cannot be told of a folder with such a name: {str(folder)!r}. Rename it.")


def seconds(time: str) -> int:
    """How long "[DAYS-]HOURS:MINUTES:SECONDS" is; `RecipeError` for anything else, such as "24:00", 24 min to Slurm."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)", time)
    if match is None:
        raise RecipeError(f"time must be [DAYS-]HOURS:MINUTES:SECONDS, as '24:00:00' or '2-12:00:00'; got {time!r}.")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + rest


def _name(path: str) -> str:
    """A job's name that no other run's job has, so that `--dependency=singleton` keeps two from training one run."""
    readable = re.sub(r"[^\w.-]+", "-", os.path.basename(path), flags=re.ASCII)
    return f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def _quoted(value: object) -> str:
    """A value as `#SBATCH` lines take it: the shell's rules, and one word without need for quotes as it is."""
    return shlex.quote(str(value))
