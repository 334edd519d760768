#!/usr/bin/env bash
#SBATCH -N 1 --mem=32000 -t 960:00:00
#SBATCH --ntasks-per-node=2 --gres=gpu:2
#SBATCH --open-mode=append --requeue --signal=USR1@120
# Trains MDLM on LM1B.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" train_lm1b_mdlm

run \
  experiment=train_lm1b_mdlm \
  "$@"
