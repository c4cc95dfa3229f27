#!/usr/bin/env bash
# One merge on the nodes of a Slurm allocation: Ray's head and the driver on the first, a worker on each.
#   ties-dist plan recipe.yml /shared/merged                # first, here: finds what is wrong before nodes are taken
#   sbatch --nodes=8 cluster/slurm.sh recipe.yml /shared/merged
#   sbatch --nodes=8 --gpus-per-node=4 cluster/slurm.sh recipe.yml /shared/merged --device cuda
# Further arguments go to `ties-dist merge`. ties-dist must be on PATH on all nodes (activate its environment first);
# recipe, inputs and output lie on a file system that all of them see.
#SBATCH --job-name=ties-dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# TIES_DIST_IP: the first node's address, where its name resolves to one that the others cannot reach.
# exclusive: two Ray clusters on a node get into each other's ports. signal: to this script, before time runs out.
set -euo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE OUT [OPTIONS OF ties-dist merge]}
out=${2:?usage: sbatch slurm.sh RECIPE OUT [OPTIONS OF ties-dist merge]}
shift 2
attempts=${TIES_DIST_ATTEMPTS:-10}

may=() # what decides on whether OUT may be used
for option in "$@"; do
    case $option in --overwrite | --fresh) may+=("$option") ;; esac
done
ties-dist plan "$recipe" "$out" "${may[@]}"

export RAY_USAGE_STATS_ENABLED=0 OMP_WAIT_POLICY=passive
head=${SLURMD_NODENAME:-$(hostname)}
ip=${TIES_DIST_IP:-$(hostname --ip-address | awk '{ print $1 }')}
address=$ip:$((20000 + SLURM_JOB_ID % 20000))
store=(--object-store-memory=$((256 << 20)) --disable-usage-stats)
started=()

end() {
    for pid in "${started[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
}
trap end EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --block --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false \
    --temp-dir="/tmp/ties-dist-$SLURM_JOB_ID" "${store[@]}" &
started+=($!)
tries=0
until ray health-check --address "$address" >/dev/null 2>&1; do
    if ((++tries > 60)); then
        echo "Ray's head does not answer at $address" >&2
        exit 1
    fi
    sleep 2
done
if ((SLURM_JOB_NUM_NODES > 1)); then # they join when they can: the merge takes whoever comes
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --block --address="$address" "${store[@]}" &
    started+=($!)
fi

ties-dist merge "$recipe" "$out" --executor ray --address "$address" --wait "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
status=0
wait "$driver" || status=$?
if ((status > 128)); then # a signal to this script ends the first wait before the driver has ended
    again=0
    wait "$driver" || again=$?
    ((again == 127)) || status=$again
fi

if ((status == 75 && ${SLURM_RESTART_COUNT:-0} < attempts)); then
    echo "resumable: attempt $((${SLURM_RESTART_COUNT:-0} + 2)) will go on from here" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
