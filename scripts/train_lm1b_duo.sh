#!/usr/bin/env bash
#SBATCH -N 1 --mem=64000 -t 960:00:00
#SBATCH --ntasks-per-node=8 --gres=gpu:8
#SBATCH --open-mode=append --requeue --signal=USR1@120
# Trains DUO with its curriculum on LM1B.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" train_lm1b_duo

run \
  experiment=train_lm1b_duo \
  "$@"
