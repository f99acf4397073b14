# What the scripts in this directory share; they source it. Submit them from the repository's root.

set -euo pipefail

warned=""                      # yes, once SLURM has announced that it will end this job
code=0                         # the last step's exit code
trap 'warned=yes' USR1

# begin CONFIG.yaml [key=value ...]: checks the settings, and says where the logs are. Sets run_dir, logs.
begin() {
    run_dir=$(python -c '
import sys
from shardes import config
try:
    print(config.load(sys.argv[1], sys.argv[2:]).run.dir)
except (IndexError, config.ConfigError) as error:
    sys.exit(f"error: {error}" if sys.argv[1:] else "error: give CONFIG.yaml [key=value ...] after the name of the script")
' "$@")
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    logs=$run_dir/logs/${job:-$SLURM_JOB_ID}
    mkdir -p "$logs"
    rm -f "$logs/preempted"
    # This script runs on the first node. Jobs that share a node must not share a port.
    export MASTER_ADDR=${MASTER_ADDR:-$(hostname)} MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): run $run_dir, logs in $logs"
}

# ranks_per_node: the ranks that deepspeed's launcher is to start on a node.
ranks_per_node() {
    echo "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?"error: a node without GPUs: set RANKS_PER_NODE"}}"
}

# task rank|launcher ARGUMENTS ...: srun starts that function in every task, with a log per task. Sets code.
task() {
    # srun does not take this over from sbatch by itself.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} LOGS=$logs
    srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/task%t.log" \
        bash -c '. launchers/slurm/common.sh; "$@"' task "$@" &
    local step=$!
    while kill -0 "$step" 2>/dev/null; do
        # srun hands it to all tasks. More than once: a rank that is only starting does not listen yet.
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
    patiently "$@"
}

# launcher ARGUMENTS ...: in a task, runs deepspeed's launcher, whose ranks have logs of their own.
launcher() {
    patiently deepspeed --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        --enable_each_rank_log "$LOGS" "$@"
}

# patiently COMMAND ...: in a task, runs the command.
patiently() {
    trap '' USR1    # it would kill deepspeed's launcher, and a rank that does not listen yet; who listens still hears it
    trap : TERM     # wait for the command to end
    code=0
    "$@" || code=$?
    # With 75, the first rank to end would have srun kill those that are still about it.
    [[ $code != 75 ]] || touch "$LOGS/preempted"
    exit $((code == 75 ? 0 : code))
}

# finish: ends the job with the step's code, or lets SLURM start it again where it was preempted.
finish() {
    # 75: start the same command again. A step that died otherwise after the announcement did not know it in time.
    if [[ $code == 75 || ( -n $warned && $code != 0 && $code != 2 ) ]]; then
        echo "job $SLURM_JOB_ID: preempted (exit code $code); requeued, it goes on where it was"
        scontrol requeue "$SLURM_JOB_ID"   # ends this script
    fi
    exit "$code"
}
