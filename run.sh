#!/usr/bin/env bash
# Loop the stages: sample, verify, update, R times; then evaluate the base and the trained model on
# held-out problems.
#
#   bash run.sh                                                  the demonstration, see below
#   bash run.sh --name grpo --method grpo --rounds 25 --seed 1   another run, into runs/grpo/
#   bash run.sh --name ds --train "--gamma-p 3.0 --gamma-n 0.1 --smooth-level sequence"
#   bash run.sh --name cd --model DIR --prompts cd.jsonl --eval-prompts held-out.jsonl --nproc 8 \
#     --lr 1e-6 --max-new-tokens 1024 --generate "--stop '</answer>'"
#
# Without any flag it trains the weak embedded model twice, a core each: with GRPO, in
# runs/demo-grpo, and with DS-GRPO and rehearsal of the base's right answers, in runs/demo.
# Both are compared with the base on the same held-out problems: five minutes on two CPU cores, with
# --rounds 5 --rehearse 1500 --eval-problems 100 --eval-n 256.
#
# In runs/NAME/, beside this script: prompts-RRR.jsonl, rollouts-RRR.jsonl, scored-RRR.jsonl and the
# model round-RRR/ of each round; of these the last K rounds are kept. Then test.jsonl,
# base.scored.jsonl, trained-RRR.scored.jsonl, eval-RRR.json, passk.png and training.png. All other
# relative paths are those of the caller. stdout has a line a round and the table of Pass@k, stderr
# what the stages say. Stop it whenever you like: the same command goes on from the last finished
# stage. A run that goes on may be given other --rounds, --keep, --nproc and --eval-* flags.
#
#   --name N                run folder runs/N                                 (demo)
#   --model DIR|HUB_ID      the base model                                    (data/weak-countdown)
#   --method M              ds-grpo | grpo | FILE.py:NAME, as in train.py     (ds-grpo)
#   --rounds R              rounds of sampling and updating                   (8)
#   --seed S                seed of problems, samples and shuffles            (0)
#   --keep K                rounds whose files are kept                       (2)
#   --prompts FILE          training problems, shuffled anew for each pass over them;
#                           without it fresh Countdown problems each round
#   --prompts-per-round P   problems a round                                  (192)
#   --n N                   samples a problem                                 (16)
#   --temperature T         of all sampling, in training and evaluation       (1.0)
#   --max-new-tokens L      longest completion, in tokens                     (24)
#   --attention A           of generate.py: auto | model | shared             (auto)
#   --updates U             optimizer steps a round                           (4)
#   --lr LR                 learning rate                                     (2e-4)
#   --rehearse N            sample N problems with the base, then as often those
#                           with at most one right answer: train.py rehearses
#                           the right ones; 0 is off                          (0)
#   --rehearse-coef C|C,D@R their weight in the loss, above 0; 1.0,0.3@11 is
#                           1.0 up to round 10 and 0.3 from round 11 on       (1.0)
#   --generate "FLAGS"      more flags for generate.py                        (none)
#   --train "FLAGS"         more flags for train.py; only without it ds-grpo on
#                           an embedded model gets the gammas tuned for it
#   --countdown "FLAGS"     such as "--max-solutions 3", for data/countdown.py (none)
#   --eval-prompts FILE     held-out problems; without it Countdown's test split
#   --eval-problems E       how many; 0 skips the evaluation                  (300)
#   --eval-n N              samples a held-out problem                        (64)
#   --against NAME          evaluate the newest round of runs/NAME along      (none)
#   --nproc N               processes a stage, through torchrun               (1)
#
# Flags in quotes are split as a shell splits them: "--stop '</answer>' 'Question: '" has two texts.
# They are checked, like all others, before anything is sampled or written; what --arm names is
# looked up by train.py alone.
set -euo pipefail

die() { echo "run.sh: error: $*" >&2; exit 2; }
say() { echo "+ $*" >&2; "$@"; }
python() { command python3 "$@"; }
of_data() { PYTHONPATH=${here:-.} python -P -m "data.$@"; }  # data/select.py hides no `select`
launch() {  # the -- keeps argparse of Python 3.11 from taking --n for one of torchrun's flags
  if [ "$nproc" -eq 1 ]; then say python "$@"; else
    say torchrun --standalone --nproc-per-node "$nproc" -- "$@"
  fi
}

# ---- Flags ---------------------------------------------------------------------------------------
read_flags() {
  name=demo model=${here}data/weak-countdown method=ds-grpo rounds=8 seed=0 keep=2
  prompts='' prompts_per_round=192 n=16 temperature=1.0 max_new_tokens=24 attention=auto
  updates=4 lr=2e-4 rehearse=0 rehearse_coef=1.0 generate='' train='' countdown=''
  eval_prompts='' eval_problems=300 eval_n=64 against='' nproc=1 given=''
  while [ $# -gt 0 ]; do
    case "$1" in
      -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
      --name|--model|--method|--rounds|--seed|--keep|--prompts|--prompts-per-round|--n|\
      --temperature|--max-new-tokens|--attention|--updates|--lr|--rehearse|--rehearse-coef|\
      --generate|--train|--countdown|\
      --eval-prompts|--eval-problems|--eval-n|--against|--nproc)
        [ $# -gt 1 ] || die "$1 needs a value"
        key=${1#--} given+=" $1 "
        printf -v "${key//-/_}" '%s' "$2"
        shift 2 ;;
      *) die "unknown flag $1 (see --help)" ;;
    esac
  done
}

words() {  # WHERE TEXT: the words of the text into the array `split`; nothing in it is expanded
  local code='import shlex, sys; print(end="".join(w + "\0" for w in shlex.split(sys.argv[1])))'
  split=()
  [ -n "$2" ] || return 0
  mapfile -d '' -t split < <(python -c "$code" "$2" 2> /dev/null)
  wait $! || die "--$1: a quote in it is not closed"
  local word
  for word in "${split[@]}"; do
    case "${word%%=*}" in
      --model|--prompts|--rollouts|--out|--limit|--split|--n|--temperature|--max-new-tokens|\
      --attention|--seed|--method|--updates|--lr|--rehearse|--rehearse-coef|--check-flags)
        die "--$1: ${word%%=*} is given to the stage by run.sh itself (see --help)" ;;
      -h|--help) die "--$1: $word is no setting; ask the stage itself" ;;
    esac
  done
}

check_flags() {  # everything that can be wrong with them, before the first round samples anything
  local key
  for key in rounds seed keep prompts_per_round n max_new_tokens updates rehearse \
      eval_problems eval_n nproc; do
    [[ "${!key}" =~ ^[0-9]{1,9}$ ]] || die "--${key//_/-} must be a whole number, not '${!key}'"
    printf -v "$key" %d "$((10#${!key}))"
  done
  [ "$keep" -ge 1 ] && [ "$rounds" -ge 1 ] || die "--keep and --rounds must be at least 1"
  for key in prompts_per_round eval_n nproc; do
    [ "${!key}" -ge 1 ] || die "--${key//_/-} must be at least 1"
  done
  [ "$updates" -le "$prompts_per_round" ] || die "--updates: more than --prompts-per-round"
  [[ ! "$temperature" =~ ^(0+\.?0*|\.0+)$ ]] ||
    die "--temperature 0: nothing is learned from greedy samples"
  [[ "$name" =~ ^[^/]+$ && "$name" != .* ]] || die "--name is a folder's name in runs/, not '$name'"
  dir=${here}runs/$name
  [[ "$method" =~ ^(ds-grpo|grpo|.+\.py:.+)$ ]] ||
    die "no --method '$method' (see --help)"
  for key in prompts eval_prompts; do
    [ -z "${!key}" ] || [ -f "${!key}" ] || die "--${key//_/-}: no file ${!key}"
  done
  [ -z "$prompts" ] || [ "$updates" -le "$(grep -c '[^[:space:]]' "$prompts")" ] ||
    die "--updates: more than the problems in $prompts"
  [ -z "$against" ] || [ "$eval_problems" -gt 0 ] ||
    die "--against: nothing is evaluated with --eval-problems 0"
  [ -z "$against" ] || [[ "$name" != base && ! "$against" =~ ^(base|trained)$ ]] ||
    die "--against: with base or trained for a name, figures could not be told apart"
  [ "$against" != "$name" ] || die "--against: another run than runs/$name itself"
  [ -z "$against" ] || [ "$(last_round "${here}runs/$against")" -gt 0 ] ||
    die "--against: no round in ${here}runs/$against"
  [[ "$given" != *' --rehearse-coef '* || "$rehearse" -gt 0 ]] ||
    die "--rehearse-coef belongs to --rehearse"
  [[ "$rehearse_coef" =~ ^[^,@\ ]+(,[^,@\ ]+@([2-9]|[1-9][0-9]{1,8}))?$ ]] ||
    die "--rehearse-coef is C, or C,D@R with D from round R > 1 on, not '$rehearse_coef'"
  [ -z "$countdown" ] || [ -z "$prompts" ] || [ "$eval_problems" -gt 0 -a -z "$eval_prompts" ] ||
    die "--countdown: no problem is drawn, all are of --prompts and --eval-prompts"
  command -v python3 > /dev/null || die "no python3 on the PATH"
  [ "$nproc" -eq 1 ] || command -v torchrun > /dev/null || die "--nproc: no torchrun on the PATH"

  if [ -z "$train" ] && [ "$method" = ds-grpo ]; then
    case "$(recorded "$model")" in  # above the 0.01 of models a thousand times larger
      data/weak-countdown) train="--gamma-p 3.0 --gamma-n 0.1" ;;
      data/tiny-countdown) train="--gamma-p 0.3 --gamma-n 0.03" ;;
    esac
  fi
  words generate "$generate"
  sampling=(--temperature "$temperature" --max-new-tokens "$max_new_tokens")
  sampling+=(--attention "$attention" "${split[@]}")
  words train "$train"
  updating=(--method "$method" --updates "$updates" --lr "$lr" --seed "$seed" "${split[@]}")
  words countdown "$countdown"
  problems=("${split[@]}")
  python "${here}generate.py" --model . --prompts . --out . --n "$n" "${sampling[@]}" --check-flags
  local round rounds_checked=(1)
  [[ "$rehearse_coef" != *@* ]] || rounds_checked+=("${rehearse_coef#*@}")
  for round in "${rounds_checked[@]}"; do
    rehearsing_in "$round"
    python "${here}train.py" --model . --rollouts . --out . "${updating[@]}" "${rehearsing[@]}" \
      --check-flags
  done
  of_data countdown --out . "${problems[@]}" --check-flags
}

recorded() {  # a path as the settings spell it: the same for any caller; a Hub id as it is
  local path=$1
  [ ! -e "$path" ] || path=$(cd "$(dirname -- "$path")" && pwd)/$(basename -- "$path")
  echo "${path#"$(cd "$here." && pwd)/"}"
}

claim_folder() {  # a run folder belongs to one set of flags
  local key value settings other
  settings=$(
    for key in model method seed prompts prompts_per_round n temperature max_new_tokens attention \
        updates lr rehearse rehearse_coef generate train countdown; do
      value=${!key}
      case "$key" in
        model|prompts) value=$(recorded "$value") ;;
        method) [ "$value" = "${value#*:}" ] || value=$(recorded "${value%:*}"):${value##*:} ;;
      esac
      printf '%s=%s\n' "$key" "${value//$'\n'/\\n}"
    done)
  mkdir -p "$dir"
  if [ -s "$dir/settings" ]; then
    other=$(grep -vxFf <(echo "$settings") "$dir/settings" | tr '\n' ' ') || true
    [ -z "$other" ] ||
      die "$dir was begun with other flags (${other% }); choose another --name or delete it"
  else
    echo "$settings" > "$dir/settings.new"
    sync "$dir/settings.new"
    mv "$dir/settings.new" "$dir/settings"
  fi
}

# ---- Rounds --------------------------------------------------------------------------------------
round_path() { if [ "$1" -eq 0 ]; then echo "$model"; else printf '%s/round-%03d' "$dir" "$1"; fi; }

last_round() {  # the last finished one of a run folder
  local folder id last=0
  for folder in "$1"/round-*/; do
    id=${folder%/} id=${id##*-}
    if [[ "$id" =~ ^[0-9]+$ ]] && [ "$((10#$id))" -gt "$last" ]; then last=$((10#$id)); fi
  done
  echo "$last"
}

prune() {  # keep the last K rounds up to $1; what a killed run did not get to remove goes, too
  local path id
  for path in "$dir"/{prompts,rollouts,scored,round}-[0-9]*; do
    id=${path##*-} id=${id%%.*}
    if [[ "$id" =~ ^[0-9]+$ ]] && [ "$((10#$id))" -le "$(($1 - keep))" ]; then rm -rf "$path"; fi
  done
}

sample_and_score() {  # MODEL PROMPTS N SEED ROLLOUTS SCORED, and more flags of generate.py
  local began=$SECONDS
  launch "${here}generate.py" --model "$1" --prompts "$2" --out "$5" --n "$3" --seed "$4" \
    "${sampling[@]}" "${@:7}"
  sampled=$((SECONDS - began)) began=$SECONDS
  say python "${here}score.py" "$5" --out "$6" > /dev/null
  verified=$((SECONDS - began))
}

problems_of() {  # ROUND COUNT OUT: so many training problems
  if [ -n "$prompts" ]; then
    say of_data select --prompts "$prompts" --out "$3" --n "$2" --seed "$seed" \
      --round "$(($1 > 0 ? $1 : 1))" > /dev/null
  else
    say of_data countdown --out "$3" --n "$2" --split train \
      --seed $((seed * 100000 + $1)) "${problems[@]}" > /dev/null
  fi
}

rehearsal() {  # the base's own samples: half for all problems, half for those it hardly solved
  local to=$dir/rehearsal total hard
  mkdir -p "$to"
  problems_of 0 "$rehearse" "$to/prompts.jsonl"
  sample_and_score "$model" "$to/prompts.jsonl" "$n" $((seed * 100000)) \
    "$to/rollouts.jsonl" "$to/once.jsonl"
  say of_data select --prompts "$to/prompts.jsonl" --out "$to/hard.jsonl" \
    --scored "$to/once.jsonl" --at-most 1 > /dev/null
  total=$(wc -l < "$to/once.jsonl") hard=$(wc -l < "$to/hard.jsonl")
  cat "$to/once.jsonl" > "$to/scored.jsonl.partial"
  if [ "$hard" -gt 0 ]; then
    sample_and_score "$model" "$to/hard.jsonl" $((total / hard)) $((seed * 100000 + 99999)) \
      "$to/hard-rollouts.jsonl" "$to/again.jsonl"
    cat "$to/again.jsonl" >> "$to/scored.jsonl.partial"
  fi
  mv "$to/scored.jsonl.partial" "$to/scored.jsonl"
}

rehearsing_in() {  # ROUND: train.py's flags of the rehearsal into the array `rehearsing`
  local coef=${rehearse_coef%%,*} later=${rehearse_coef#*,}
  rehearsing=()
  [ "$rehearse" -gt 0 ] || return 0
  if [[ "$later" == *@* ]] && [ "$1" -ge "${later#*@}" ]; then coef=${later%@*}; fi
  rehearsing=(--rehearse "$dir/rehearsal/scored.jsonl" --rehearse-coef "$coef")
}

one_round() {
  local id before began
  id=$(printf %03d "$1") before=$(round_path $(($1 - 1)))
  problems_of "$1" "$prompts_per_round" "$dir/prompts-$id.jsonl"
  sample_and_score "$before" "$dir/prompts-$id.jsonl" "$n" $((seed * 100000 + $1)) \
    "$dir/rollouts-$id.jsonl" "$dir/scored-$id.jsonl"
  rehearsing_in "$1"
  began=$SECONDS
  launch "${here}train.py" --model "$before" --rollouts "$dir/scored-$id.jsonl" \
    --out "$dir/round-$id" "${updating[@]}" "${rehearsing[@]}"
  tell "$1" "$dir/round-$id/metrics.jsonl" "$sampled" "$verified" $((SECONDS - began))
}

tell() {  # ROUND METRICS SECONDS..: a line on stdout, the means over the round's updates
  python - "$name" "$updates" "$@" << 'END'
import json
import sys

name, updates, number, path, *seconds = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file][-int(updates):]
means = [sum(row[key] for row in rows) / len(rows)
         for key in ("pass@1", "entropy", "completion_len", "truncated_frac")]
print("{:5}  {:6.3f}  {:7.3f}  {:6.1f}  {:9.3f}  {:>7}  {:>7}  {:>7}  {}".format(
    int(number), *means, *(f"{second} s" for second in seconds), name), flush=True)
END
}

# ---- Evaluation ----------------------------------------------------------------------------------
evaluation_label() {
  local label
  label=$(recorded "${eval_prompts:-test}")
  echo "${label//\//_}-${eval_problems}x$eval_n"
}

set_aside() {  # an evaluation with other --eval-* flags keeps its files, in a folder of its own
  local label path old
  label=$(evaluation_label)
  if [ -s "$dir/evaluation" ] && [ "$(cat "$dir/evaluation")" != "$label" ]; then
    old=$dir/evaluation-$(cat "$dir/evaluation")
    echo "$dir: the evaluation with other flags goes to $old" >&2
    rm -rf "$dir"/*.rollouts.jsonl.partial "$dir"/*.scored.jsonl.partial
    mkdir -p "$old"
    for path in "$dir"/{test.jsonl,eval-,passk.png}* "$dir"/*.{rollouts,scored}.jsonl*; do
      [ ! -e "$path" ] || mv -f "$path" "$old/"
    done
  fi
  echo "$label" > "$dir/evaluation.new"
  mv "$dir/evaluation.new" "$dir/evaluation"
}

evaluate() {
  local test=$eval_prompts label=${method##*:} id index files=() names=() models=()
  [ "$rehearse" -eq 0 ] || label+=+rehearsal
  [ "$label" != "$against" ] || label=$name
  id=$(printf %03d "$rounds")
  if [ -z "$test" ]; then
    test=$dir/test.jsonl
    say of_data countdown --out "$test" --n "$eval_problems" --seed 1 --split test \
      "${problems[@]}" > /dev/null
  fi
  files=(base) names=(base) models=("$model")
  if [ -n "$against" ]; then
    index=$(printf %03d "$(last_round "${here}runs/$against")")
    files+=("$against-$index") names+=("$against") models+=("${here}runs/$against/round-$index")
  fi
  files+=("trained-$id") names+=("$label") models+=("$(round_path "$rounds")")
  for index in "${!files[@]}"; do
    if [ "${files[index]}" = "trained-$id" ] && [ ! -d "${models[index]}" ] &&
      [ -e "$dir/trained-$id.scored.jsonl" ]; then
      continue  # the model is pruned, what is asked of it is there
    fi
    sample_and_score "${models[index]}" "$test" "$eval_n" 1 "$dir/${files[index]}.rollouts.jsonl" \
      "$dir/${files[index]}.scored.jsonl" --limit "$eval_problems"
  done
  files=("${files[@]/%/.scored.jsonl}")
  say python "${here}evaluate.py" "${files[@]/#/$dir/}" --names "${names[@]}" \
    --out "$dir/eval-$id${against:+-$against}.json" --plot "$dir/passk.png"
  say python "${here}evaluate.py" --training "$dir" --plot "$dir/training.png"
  tell_evaluation "$dir/eval-$id${against:+-$against}.json"
  echo "$dir: eval-$id${against:+-$against}.json, passk.png and training.png are there" >&2
}

tell_evaluation() {  # EVAL.json: what is to be seen, in one line
  python - "$1" << 'END'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    runs = json.load(file)["runs"]
ks = [list(runs[0]["pass_at_k"])[place] for place in (0, -1)]
told = [run["name"] + " {:.3f} and {:.3f}".format(*(run["pass_at_k"][k]["value"] for k in ks))
        for run in runs]
print("\nPass@{} and Pass@{}: ".format(*ks) + "; ".join(told))
END
}

# ---- The whole -----------------------------------------------------------------------------------
demonstration() {  # two runs side by side, then three curves
  local runs=("--name demo-grpo --method grpo --rounds 5" "--name demo --rehearse 1500 --rounds 5")
  set -m  # a process group of their own, which ends with this script
  (printf '%s --eval-problems 0\n' "${runs[@]}" |
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} xargs -P 2 -L 1 bash "$0") &
  trap 'kill -- -$! 2> /dev/null' INT TERM
  wait $! || die "a run ended early, it says above why; the same command goes on"
  trap - INT TERM
  set +m
  main ${runs[1]} --against demo-grpo --eval-problems 100 --eval-n 256
}

main() {
  local last round
  here=$(dirname -- "$0")/
  here=${here#./}  # nothing in the repository itself, so that paths stay short
  [ $# -gt 0 ] || { demonstration; return; }
  read_flags "$@"
  check_flags
  claim_folder
  last=$(last_round "$dir")
  if [ "$rounds" -lt "$last" ]; then
    [ "$eval_problems" -eq 0 ] || [ -d "$(round_path "$rounds")" ] ||
      [ -e "$dir/trained-$(printf %03d "$rounds").scored.jsonl" -a \
        "$(cat "$dir/evaluation" 2> /dev/null)" = "$(evaluation_label)" ] ||
      die "round $rounds of $last in $dir was pruned, its model is gone; evaluate with" \
        "--rounds $last, or train again with another --name and a larger --keep"
  else
    prune "$last"
  fi
  if [ "$rounds" -gt "$last" ]; then
    [ "$rehearse" -eq 0 ] || rehearsal
    echo "round  Pass@1  entropy  length  truncated   sample   verify   update  run"
  fi
  for ((round = last + 1; round <= rounds; round++)); do
    echo "== $name: round $round of $rounds" >&2
    one_round "$round"
    prune "$round"
  done
  if [ "$eval_problems" -gt 0 ]; then
    set_aside
    evaluate
  fi
}

# Read whole before anything runs: an edit, or a git pull, in the middle of a night changes nothing.
main "$@"; exit
