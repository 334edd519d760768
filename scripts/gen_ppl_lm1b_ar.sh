#!/usr/bin/env bash
#SBATCH -N 1 --mem=32000 -t 960:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Samples of the autoregressive baseline trained on LM1B, and their generative perplexity.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" gen_ppl_lm1b_ar

checkpoint_path=$(required checkpoint_path outputs/train_lm1b_ar_sentencepacking/checkpoints/last.ckpt)

run \
  experiment=gen_ppl_lm1b_ar \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
