#!/usr/bin/env bash
# A real Slurm of one node on this machine (Debian: slurm-wlm, munge; as root), and the suite on it by
# `make repro CLUSTER=slurm JOBS=2` in a temporary clone of tiny size: outside of CI, for maintainers.
# dask-jobqueue must be importable: in the environment, or in the folder JOBQUEUE.
set -euo pipefail
source_=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
host=$(hostname)

stop() {
  scancel --user root 2>/dev/null || true
  pkill slurmctld || true
  pkill slurmd || true
  pkill munged || true
  rm -rf "$place"
}
trap stop EXIT

mkdir -p "$place"/{state,spool,dask} /run/munge
chown munge: /run/munge
[[ -f /etc/munge/munge.key ]] || mungekey --create
runuser -u munge -- munged --force
cat > "$place/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(free -m | awk '/Mem/ {print $2}') State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$place/slurm.conf
slurmctld
slurmd
for _ in $(seq 60); do
  [[ $(sinfo --noheader --format=%T) == idle ]] && break
  sleep 1
done
sinfo

cd "$source_"
python - "$place/clone" <<'CLONE'
import sys
from pathlib import Path

sys.path.insert(0, "tests")
from conftest import copy_repository, read_params, tiny, write_params

root = copy_repository(Path(sys.argv[1]))
write_params(root, tiny(read_params(root)))
CLONE
cat > "$place/dask/jobqueue.yaml" <<CONF
jobqueue:
  slurm:
    cores: 1
    processes: 1
    memory: 4GB
    queue: cpu
    walltime: "00:30:00"
    interface: lo
    python: $(command -v python)
    job-script-prologue: ["export PYTHONPATH=$place/clone:${JOBQUEUE:-}"]
    worker-extra-args: ["--nthreads", "1"]
CONF
cd "$place/clone"
export DASK_CONFIG=$place/dask PYTHONPATH=$place/clone:${JOBQUEUE:-} DVC_NO_ANALYTICS=1
python -m pipelines.suite.repro --cluster slurm --jobs 2
squeue
python -m pipelines.suite.repro --cluster slurm --jobs 2 2>&1 | tail -3
ls reports/streets
