#!/usr/bin/env bash
#SBATCH -N 1
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Psi sampler of DUO on CIFAR-10: the looping ReMDM schedule.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" psi_samplers/cifar10/duo_constant_remdm

CHECKPOINT_PATH=$(required CHECKPOINT_PATH outputs/cifar10/duo_base_1_5M_d3pm_like_cosine/checkpoints/last.ckpt)
DATA_CACHE_DIR=$(required DATA_CACHE_DIR /path/to/cache)
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$(values sampling.steps sampling.psi.middle_mode)}

run \
  experiment=psi_samplers/cifar10/duo_constant_remdm \
  data.cache_dir="$(quote "$DATA_CACHE_DIR")" \
  ${NOISE:+noise="$NOISE"} \
  ${NUM_STEPS:+sampling.steps="$NUM_STEPS"} \
  eval.checkpoint_path="$(quote "$CHECKPOINT_PATH")" \
  ${EVAL_BATCH_SIZE:+loader.eval_batch_size="$EVAL_BATCH_SIZE"} \
  ${ETA:+sampling.psi.middle_mode="constant-remdm-$ETA"} \
  "$@"
