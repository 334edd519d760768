#!/usr/bin/env bash
#SBATCH -N 1 --mem=64000 -t 960:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue --signal=USR1@120
# Distils a DUO model on OpenWebText, in five rounds.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" distil_owt

finetune_path=$(required finetune_path outputs/train_owt_duo/checkpoints/last.ckpt)

run \
  mode=train \
  loader.batch_size=2 \
  loader.eval_batch_size=2 \
  data=openwebtext-split \
  model=small \
  algo=distillation \
  training.finetune_path="$(quote "$finetune_path")" \
  sampling.num_sample_batches=10 \
  sampling.steps=32 \
  eval.compute_generative_perplexity=True \
  algo.T=512 \
  lr_scheduler.num_warmup_steps=500 \
  trainer.val_check_interval=1000 \
  trainer.max_steps=50000 \
  loader.global_batch_size=128 \
  training.ema=0.999 \
  algo.update_teacher_every=10000 \
  optim.lr=6e-5 \
  trainer.limit_val_batches=8 \
  algo.teacher_ema=False \
  algo.linear_growth_dt=false \
  +wandb.offline=true \
  "$@"
