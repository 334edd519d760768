#!/usr/bin/env bash
#SBATCH -N 1 --mem=100000 -t 960:00:00
#SBATCH --ntasks-per-node=4 --gres=gpu:4
#SBATCH --open-mode=append --requeue
# Perplexity of DUO on LM1B.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" eval_lm1b_duo

checkpoint_path=$(required checkpoint_path outputs/train_lm1b_duo_sentencepacking/checkpoints/last.ckpt)

run \
  experiment=eval_lm1b_duo \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
