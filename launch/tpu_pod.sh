#!/usr/bin/env bash
# DeepSeek-V3 on 256 chips of a TPU v5p pod: 64 hosts of 4 chips, the same command on every host.
#
#   launch/tpu_pod.sh POD ZONE create    ask for the pod
#   launch/tpu_pod.sh POD ZONE install   once: this code and its packages on every host
#   launch/tpu_pod.sh POD ZONE train     start, or go on where the run stopped
#   launch/tpu_pod.sh POD ZONE log       what process 0 says
#   launch/tpu_pod.sh POD ZONE stop      save and stop
#
# /mnt/runs and /mnt/corpus have to be the same folders on every host: NFS (Filestore), Lustre, or a mounted bucket.
# --workdir=gs://... is refused. A checkpoint is committed by renaming its folder, which of mounted buckets only those
# with a hierarchical namespace do in one piece. The repository has to be where the hosts can clone it.
set -euo pipefail
pod=${1:?POD} zone=${2:?ZONE} action=${3:?create, install, train, log or stop}
repository=${REPOSITORY:-https://github.com/OWNER/dsv3_jax}

on() {
  gcloud compute tpus tpu-vm ssh "$pod" --zone="$zone" --worker="$1" --command="$2"
}

case $action in
create)
  # v5p counts cores, two a chip.
  gcloud compute tpus queued-resources create "$pod" --node-id="$pod" --zone="$zone" \
    --accelerator-type=v5p-512 --runtime-version=v2-alpha-tpuv5
  ;;
install)
  # uv brings a Python of its own: that of the hosts' image may be older than 3.11.
  on all "curl -LsSf https://astral.sh/uv/install.sh | sh && git clone $repository dsv3_jax && cd dsv3_jax &&
    ~/.local/bin/uv venv --python=3.12 && ~/.local/bin/uv pip install -r requirements.txt 'jax[tpu]'"
  ;;
train)
  # The hosts find each other through the metadata server. microbatches: one row a chip at a time. streams: one a host.
  on all "$(cat <<'COMMAND'
cd dsv3_jax && . .venv/bin/activate && test -d /mnt/runs && {
  nohup python train.py --config=v3_671b --workdir=/mnt/runs/v3_671b \
    --data.path=/mnt/corpus --data.tokenizer=/mnt/corpus/tokenizer.json --data.streams=64 \
    --mesh.fsdp=4 --mesh.expert=64 --training.microbatches=60 --checkpoint.interval=100 \
    >> train.log 2>&1 < /dev/null &
  echo $! > train.pid
}
COMMAND
)"
  ;;
log) on 0 "tail -n 40 -f dsv3_jax/train.log" ;;
# One process told is all told: they stop at the same step.
stop) on 0 'kill -TERM "$(cat dsv3_jax/train.pid)"' ;;
*)
  echo "$action: give create, install, train, log or stop" >&2
  exit 2
  ;;
esac
