"""A cluster file for `ray up`: machines of a cloud account, without Kubernetes. AWS: its provider needs the least."""

from __future__ import annotations

from cluster.pods import Object
from cluster.settings import Settings

PORT = 6379


def ray_up(s: Settings) -> Object:
    folders = {"inputs": "ro,nconnect=8", "output": "nconnect=8"}
    mounts = [
        f"mountpoint -q /mnt/{name} || (sudo mkdir -p /mnt/{name} && "
        f"sudo mount -t nfs -o {options} {s.nfs}/{name} /mnt/{name})"
        for name, options in folders.items()
    ]
    volumes = [f"-v /mnt/inputs:{s.inputs}:ro", f"-v /mnt/output:{s.output}"]
    memory = f"--object-store-memory={s.object_store_bytes}"
    return {
        "cluster_name": s.name,
        "max_workers": s.workers,
        "idle_timeout_minutes": 10,
        "provider": {"type": "aws", "region": "us-east-1", "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": s.image,
            "container_name": "ties-dist",
            "pull_before_run": True,
            # As the machine's own user: else the key with which the head starts workers cannot be read.
            "run_options": [
                "--user=1000:1000",
                f"--tmpfs {s.scratch}:exec,uid=1000,gid=1000",
                "--cap-drop=ALL",
                "--security-opt=no-new-privileges",
                "--ulimit nofile=65536",
                *volumes,
            ],
        },
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {"InstanceType": "m6i.large"}},
            "worker": {
                "min_workers": s.workers,
                "max_workers": s.workers,
                "resources": {},
                "node_config": {
                    "InstanceType": "c6in.2xlarge",
                    "InstanceMarketOptions": {"MarketType": "spot"},
                },
            },
        },
        "initialization_commands": ["sudo apt-get update -q && sudo apt-get install -yq nfs-common", *mounts],
        "head_start_ray_commands": [
            "ray stop",
            f"ray start --head --port={PORT} --num-cpus=0 {memory} --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"ray start --address=$RAY_HEAD_IP:{PORT} {memory}"],
    }
