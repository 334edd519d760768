# shellcheck shell=bash
# What every script begins with: source "$ROOT/scripts/lib/launch.sh" NAME
#
# Reads the site's settings, finds Python, and gives the script these:
#   OUTPUTS                     where runs have their folders; DUO_OUTPUTS
#   required VARIABLE EXAMPLE   its value, or one line and status 2
#   quote VALUE                 a value as Hydra reads it, whatever is in it
#   absolute PATH               a path that holds in any folder
#   values KEY...               their values with dashes between, for Hydra to fill in
#   run OVERRIDE...             main.py in RUN_DIR, under Slurm by srun

NAME=$1
ROOT=$(cd "$ROOT" && pwd)

refuse() {
  echo "error: $*" >&2
  exit 2
}

required() {
  [[ ${!1:-} ]] ||
    refuse "$1 is not set; for example: $1=$2 sbatch scripts/$NAME.sh"
  printf '%s' "${!1}"
}

# In single quotes; backslashes count only in front of a quote, the last one included.
quote() {
  local value
  value=$(sed -E "s/(\\\\+)('|$)/\1\1\2/g; s/'/\\\\'/g" <<< "$1")
  printf "'%s'" "$value"
}

absolute() {
  case $1 in
    /* | *://*) printf '%s' "$1" ;;
    *) printf '%s' "$PWD/$1" ;;
  esac
}

# A part of a folder's or file's name: ${KEY}-${KEY}, which follows overrides, too.
values() {
  local key text=
  for key; do
    text+="-\${$key}"
  done
  printf '%s' "${text#-}"
}

# ---- the site

settings=${DUO_ENV:-$ROOT/scripts/env.sh}
if [[ -r $settings && ! -d $settings ]]; then
  set +eu # `module load` and `conda activate` are written without them
  # shellcheck source=scripts/env.example.sh
  source "$settings"
  set -eu
elif [[ ${DUO_ENV:-} ]]; then
  refuse "DUO_ENV=$DUO_ENV is not a file"
fi
OUTPUTS=$(absolute "${DUO_OUTPUTS:-outputs}")
DATA_CACHE_DIR=${DATA_CACHE_DIR:-${DUO_CACHE_DIR:-}} # of the scripts that ask for it

if [[ ! ${PYTHON:-}${VIRTUAL_ENV:-} && ${CONDA_DEFAULT_ENV:-base} == base &&
  -f $ROOT/.venv/bin/activate ]]; then
  # shellcheck source=/dev/null
  source "$ROOT/.venv/bin/activate"
fi
PYTHON=${PYTHON:-python}
command -v "$PYTHON" > /dev/null ||
  refuse "PYTHON=$PYTHON is not found; scripts/env.example.sh says how to set it"

# ---- main.py

# In a job, but not in a step of it: the shell of sbatch or salloc.
in_allocation() {
  [[ ${SLURM_JOB_ID:-} && ! ${SLURM_STEP_ID:-} ]]
}
[[ ${SLURM_STEP_NUM_TASKS:-1} == 1 ]] ||
  refuse "srun starts several of this script; sbatch starts one, which calls srun"

# A run's folder depends on the script alone, so a job that comes back goes on in it.
run() {
  local folder command given
  folder=$(absolute "${RUN_DIR:-$OUTPUTS/$NAME}")
  command=("$PYTHON" -u "$ROOT/main.py")
  given=(hydra.run.dir="$(quote "$folder")")
  if in_allocation; then
    if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then # srun does not take it over
      command=(--cpus-per-task="$SLURM_CPUS_PER_TASK" "${command[@]}")
    fi
    # Lightning looks at the name: "interactive" would have it start processes itself.
    command=(srun --job-name="${NAME##*/}" "${command[@]}")
    given+=(trainer.num_nodes="${SLURM_NNODES:-1}")
    given+=(trainer.devices="${SLURM_NTASKS_PER_NODE:-1}")
  fi
  "${command[@]}" "${given[@]}" "$@"
}
