#!/usr/bin/env bash
#SBATCH -N 1
#SBATCH --ntasks-per-node=4 --gres=gpu:4
#SBATCH --open-mode=append --requeue --signal=USR1@120
# Trains DUO on CIFAR-10, cosine schedule.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" train_cifar10_duo_base_cosine

DATA_CACHE_DIR=$(required DATA_CACHE_DIR /path/to/cache)
RUN_DIR=${RUN_DIR:-$OUTPUTS/cifar10/duo_base_1_5M_d3pm_like_cosine}

run \
  experiment=train_cifar10_duo_base_cosine \
  data.cache_dir="$(quote "$DATA_CACHE_DIR")" \
  "$@"
