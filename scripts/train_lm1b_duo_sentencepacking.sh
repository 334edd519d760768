#!/usr/bin/env bash
#SBATCH -N 1 --mem=64000 -t 960:00:00
#SBATCH --ntasks-per-node=8 --gres=gpu:8
#SBATCH --open-mode=append --requeue --signal=USR1@120
# Trains DUO with its curriculum on LM1B, documents packed.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" train_lm1b_duo_sentencepacking

run \
  loader.batch_size=64 \
  loader.eval_batch_size=64 \
  data=lm1b-wrap \
  wandb.name=duo-lm1b \
  model=small \
  algo=duo \
  model.length=128 \
  algo.curriculum.mode=simple \
  algo.curriculum.gumbel_tau_log10_start=-3.0 \
  algo.curriculum.gumbel_tau_log10_end=-3.0 \
  algo.curriculum.gamma_min=-3.5 \
  algo.curriculum.gamma_max=-1.75 \
  algo.curriculum.start=0 \
  algo.curriculum.end=500000 \
  "$@"
