# shellcheck shell=bash
# The same run for each of several values of a key, and a table of them.

# each KEY VALUES RESULTS TABLE OVERRIDE...
# One run for each value, in a folder of its own, into which its results go: the file
# RESULTS=NAME of a key. One that fails does not stop the others. The status at the end
# is that of the last failure.
each() {
  local key=$1 values=$2 results=$3 table=$4 folder value code status=0
  shift 4
  folder=$(absolute "${RUN_DIR:-$OUTPUTS/$NAME}")
  trap 'exit 130' INT
  trap 'exit 143' TERM
  for value in $values; do
    code=0
    RUN_DIR=$folder/$value run "$key=$value" \
      "${results%=*}=$(quote "$folder/$value/${results#*=}")" "$@" || code=$?
    if ((code)); then
      echo "error: $value failed with status $code" >&2
      status=$code
    fi
  done
  "$PYTHON" -u "$ROOT/main.py" mode=report report.table="$table" \
    report.runs="[$(quote "$folder")]" report.path="$(quote "$folder/report")" \
    hydra.run.dir="$(quote "$folder")" || status=$?
  return "$status"
}
