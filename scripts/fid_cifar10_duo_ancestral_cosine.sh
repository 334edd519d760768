#!/usr/bin/env bash
#SBATCH -N 1
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# FID of ancestral samples of DUO on CIFAR-10.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" fid_cifar10_duo_ancestral_cosine

CHECKPOINT_PATH=$(required CHECKPOINT_PATH outputs/cifar10/duo_base_1_5M_d3pm_like_cosine/checkpoints/last.ckpt)
DATA_CACHE_DIR=$(required DATA_CACHE_DIR /path/to/cache)

run \
  experiment=fid_cifar10_duo_ancestral_cosine \
  data.cache_dir="$(quote "$DATA_CACHE_DIR")" \
  eval.checkpoint_path="$(quote "$CHECKPOINT_PATH")" \
  "$@"
