# Functions of the scripts in this directory. Submit the scripts from the repository's root.

set -euo pipefail

warned=""                      # yes after SLURM's warning that it will end this job
code=0                         # exit code of the last step
container=()                   # command that runs another one in a container
trap 'warned=yes' USR1

# What this cluster needs: modules, an environment, a container. See site.example.sh. Such scripts
# may read variables that are not set.
set +u
[[ ! -e launchers/slurm/site.sh ]] || . launchers/slurm/site.sh
set -u

# in_site COMMAND ...: runs the command in the container, if there is one.
in_site() { ${container[@]+"${container[@]}"} "$@"; }

# run_directory CONFIG.yaml [key=value ...]: checks the settings and prints run.dir.
run_directory() {
    in_site python -c '
import sys
from shardes.config.loading import load
from shardes.errors import ConfigError
try:
    print(load(sys.argv[1], sys.argv[2:]).run.dir)
except (IndexError, ConfigError) as error:
    usage = "give CONFIG.yaml [key=value ...] after the name of the script"
    sys.exit(f"error: {error if sys.argv[1:] else usage}")
' "$@"
}

# begin CONFIG.yaml [key=value ...]: checks the settings; sets run_dir and logs.
begin() {
    run_dir=$(run_directory "$@")
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    logs=$run_dir/logs/${job:-$SLURM_JOB_ID}
    mkdir -p "$logs"
    rm -f "$logs/preempted"
    # This script runs on the first node. Jobs that share a node must not share a port.
    export MASTER_ADDR=${MASTER_ADDR:-$(hostname)}
    export MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): run $run_dir, logs in $logs"
}

# ranks_per_node: prints the number of ranks that deepspeed's launcher starts on a node.
ranks_per_node() {
    local error="error: a node without GPUs: set RANKS_PER_NODE"
    echo "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?"$error"}}"
}

# task rank|launcher ARGUMENTS ...: srun runs this function in every task, with a log per task.
# Sets code.
task() {
    # srun does not inherit this from sbatch. Without --cpus-per-task, tasks share the node's CPUs.
    local shared=$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((shared > 0 ? shared : 1))} LOGS=$logs
    srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/task%t.log" \
        bash -c '. launchers/slurm/common.sh; "$@"' task "$@" &
    local step=$!
    while kill -0 "$step" 2>/dev/null; do
        # srun forwards the signal to all tasks. It is sent repeatedly, since a rank that is still
        # starting ignores it.
        [[ -z $warned ]] || kill -USR1 "$step" 2>/dev/null || true
        sleep 2 & wait $! || true   # a signal ends this wait at once
    done
    code=0
    wait "$step" || code=$?
    [[ $code != 0 || ! -e $logs/preempted ]] || code=75
}

# rank COMMAND ...: in a task, runs the command as one rank.
rank() {
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
    run_to_end "$@"
}

# launcher ARGUMENTS ...: in a task, runs deepspeed's launcher, with a log per rank.
launcher() {
    run_to_end deepspeed --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        --enable_each_rank_log "$LOGS" "$@"
}

# run_to_end COMMAND ...: in a task, runs the command and waits for its end.
run_to_end() {
    # USR1 would kill deepspeed's launcher and ranks that have no handler yet. A rank's own handler
    # still receives it.
    trap '' USR1
    trap : TERM     # wait for the command to end
    code=0
    in_site "$@" || code=$?
    # On exit code 75 of the first rank, srun would kill the ranks that are still stopping.
    [[ $code != 75 ]] || touch "$LOGS/preempted"
    exit $((code == 75 ? 0 : code))
}

# finish: ends the job with the step's code, or requeues it if it was preempted.
finish() {
    # 75: start the same command again. A step that failed in another way after the warning
    # received it too late.
    if [[ $code == 75 || ( -n $warned && $code != 0 && $code != 2 ) ]]; then
        echo "job $SLURM_JOB_ID: preempted (exit code $code); requeued, it will resume"
        scontrol requeue "$SLURM_JOB_ID"   # ends this script
    fi
    exit "$code"
}
