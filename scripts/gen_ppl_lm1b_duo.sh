#!/usr/bin/env bash
#SBATCH -N 1 --mem=32000 -t 960:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Samples of DUO trained on LM1B, and their generative perplexity.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" gen_ppl_lm1b_duo

checkpoint_path=$(required checkpoint_path outputs/train_lm1b_duo_sentencepacking/checkpoints/last.ckpt)
steps=${steps:-32}
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$steps}

run \
  mode=sample_eval \
  loader.batch_size=2 \
  loader.eval_batch_size=64 \
  data=lm1b-wrap \
  algo=duo_base \
  model=small \
  model.length=128 \
  sampling.num_sample_batches=15 \
  sampling.steps="$steps" \
  +wandb.offline=true \
  sampling.noise_removal=greedy \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
