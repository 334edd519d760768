# shellcheck shell=bash
# Settings of a site: copy this file to scripts/env.sh, which git ignores and every
# script reads, or give the path of another one, DUO_ENV=/path/to/file sbatch ...
# All of it is optional. With `: "${NAME:=value}"` a variable of the command line wins.

# module load cuda
# conda activate diffusion                  # instead of .venv in the repository
# : "${PYTHON:=/path/to/python}"            # instead of either

# : "${DUO_OUTPUTS:=/path/to/outputs}"      # where runs have their folders
# export DUO_CACHE_DIR=/path/to/cache       # where prepared data are kept
# export HF_HOME=/path/to/huggingface
# export HF_HUB_OFFLINE=1                   # nodes without a network
# export WANDB_MODE=offline

# : "${checkpoint_path:=/path/to/outputs/train_owt_duo/checkpoints/last.ckpt}"
