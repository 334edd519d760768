#!/usr/bin/env bash
#SBATCH -N 1
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Psi sampler of MDLM on CIFAR-10: kappa capped at ETA.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" psi_samplers/cifar10/mdlm_max_capped_remdm

CHECKPOINT_PATH=$(required CHECKPOINT_PATH outputs/train_cifar10_mdlm_cosine/checkpoints/last.ckpt)
DATA_CACHE_DIR=$(required DATA_CACHE_DIR /path/to/cache)
NUM_STEPS=${NUM_STEPS:-256}
ETA=${ETA:-0.005}
NOISE=${NOISE:-cosine}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-500}
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$NUM_STEPS-$ETA}

run \
  mode=fid_eval \
  data=cifar10 \
  data.cache_dir="$(quote "$DATA_CACHE_DIR")" \
  model=unet \
  algo=mdlm \
  algo.backbone=unet \
  noise="$NOISE" \
  sampling.predictor=psi \
  sampling.steps="$NUM_STEPS" \
  sampling.guid_weight=1.0 \
  eval.checkpoint_path="$(quote "$CHECKPOINT_PATH")" \
  loader.eval_batch_size="$EVAL_BATCH_SIZE" \
  sampling.psi.time_profile=linear \
  sampling.psi.high_mode="max-capped-$ETA" \
  sampling.psi.middle_mode="max-capped-$ETA" \
  sampling.psi.low_mode="max-capped-$ETA" \
  sampling.psi.high_frac=0.0 \
  sampling.psi.middle_frac=0.0 \
  "$@"
