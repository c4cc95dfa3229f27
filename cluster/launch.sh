#!/usr/bin/env bash
# Starts a RayJob and stays until it ends, so that the Job or CronJob this runs in lasts as long as the merge and knows
# how it ended. Of a name there is one RayJob: one that is active is waited for, not doubled; one that ended is replaced.
#   launch.sh NAME MANIFEST
# Exit status: 0 done; 2 something to correct; 1 a bug, or ended by hand; 75 whatever else: another attempt resumes.
set -uo pipefail

name=$1
manifest=$2
poll=${POLL_SECONDS:-15}
patience=${API_ATTEMPTS:-20} # questions in a row that the API server may leave unanswered
fields='{.metadata.uid}{"\n"}{.status.jobDeploymentStatus}{"\n"}{.status.jobStatus}{"\n"}{.status.reason}{"\n"}'
fields+='{.status.message}'

trap 'exit 75' TERM # the first process of a container has no default for it

pause() {
    sleep "$poll" &
    wait $!
}

# Sets uid (empty: there is none), deployment, job, reason, message.
look() {
    local answer attempt
    for ((attempt = 0; attempt < patience; attempt++)); do
        if answer=$(kubectl get rayjobs.ray.io "$name" --ignore-not-found --output "jsonpath=$fields"); then
            { read -r uid; read -r deployment; read -r job; read -r reason; read -r message; } <<<"$answer"
            return
        fi
        pause
    done
    echo "the API server does not answer" >&2
    exit 75
}

ended() {
    case $deployment in Complete | Failed | ValidationFailed) ;; *) return 1 ;; esac
}

look
while [ -n "$uid" ] && ended; do
    echo "removing RayJob $name, which ended as $deployment"
    kubectl delete rayjobs.ray.io "$name" --ignore-not-found --wait=false
    pause
    look
done

if [ -n "$uid" ]; then
    echo "RayJob $name is active (${deployment:-new}): waiting for its end"
else
    kubectl create --filename "$manifest" # refused where another was quicker: that one is waited for
    look
    if [ -z "$uid" ]; then
        echo "RayJob $name could not be created" >&2
        exit 75
    fi
fi

while ! ended; do
    pause
    look
    if [ -z "$uid" ]; then
        echo "RayJob $name was deleted" >&2
        exit 1
    fi
done

echo "RayJob $name: $deployment $job $reason $message"
case $deployment/$job in
    ValidationFailed/*) exit 2 ;;
    Complete/SUCCEEDED) exit 0 ;;
    Complete/STOPPED) exit 1 ;;
esac
if [[ $message =~ failed\ with\ exit\ code\ ([0-9]+) ]] && ((BASH_REMATCH[1] == 1 || BASH_REMATCH[1] == 2)); then
    exit "${BASH_REMATCH[1]}"
fi
exit 75
