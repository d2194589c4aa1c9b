#!/usr/bin/env bash
# Loop the stages: sample, verify, update, R times; then evaluate on held-out problems.
#   bash run.sh     # runs/GRPO beside runs/demo (DS-GRPO with rehearsal), a core each
#   bash run.sh --name cd --model DIR --lr 1e-6 --max-new-tokens 999 --generate "--stop '</answer>'"
#
# Writes runs/NAME/, beside this script: settings; of each round (001/, 002/, ...) problems.jsonl,
# rollouts.jsonl, scored.jsonl and the model policy/; rehearsal/; eval/. The same command continues
# a stopped run, also with other --rounds, --keep, --nproc, --eval-* flags (then to eval-LABEL/).
# Flags in quotes are split as by a shell, not expanded; paths in them are relative to this script.
#   --name N                run folder runs/N                                   (demo)
#   --model DIR|HUB_ID      the base model                                      (weak-countdown)
#   --method M              ds-grpo | grpo | FILE.py:NAME, as in train.py       (ds-grpo)
#   --rounds R              rounds of sampling and updating                     (8)
#   --seed S                seed of problems, samples and shuffles              (0)
#   --keep K                rounds whose files are kept                         (2)
#   --prompts FILE          training problems, shuffled anew for each pass      (fresh Countdown)
#   --prompts-per-round P   problems a round                                    (192)
#   --n N                   samples a problem                                   (16)
#   --temperature T         of all sampling, in training and evaluation         (1.0)
#   --max-new-tokens L      longest completion; needed with a model of yours    (24)
#   --updates U             optimizer steps a round                             (4)
#   --lr LR                 learning rate; needed with a model of yours         (2e-4)
#   --rehearse N            rehearse the base's right answers to N problems     (0: off)
#   --rehearse-coef C|C,D@R  their weight in the loss: C, and D from round R on (1.0)
#   --sampler FILE.py       one process in place of generate.py, the same flags (generate.py)
#   --generate "FLAGS"      more flags for the sampler                          (none)
#   --train "FLAGS"         more flags for train.py                             (embedded: gammas)
#   --countdown "FLAGS"     for data/countdown.py, such as "--max-solutions 3"  (none)
#   --eval-prompts FILE     held-out problems                                   (Countdown's)
#   --eval-problems E       how many; 0 skips the evaluation                    (300)
#   --eval-n N              samples a held-out problem                          (64)
#   --eval-every R          evaluate every R-th round as well                   (0: off)
#   --against NAME          evaluate the newest round of runs/NAME along        (none)
#   --nproc N               processes of generate.py and train.py, by torchrun  (1)
set -euo pipefail
die() { echo "run.sh: error: $*" >&2; exit 2; }
stop() { trap '' INT TERM HUP; kill $(jobs -p) 2> /dev/null || true; wait; exit "$1"; }
rooted() { realpath -ms --relative-to="$root" -- "$1"; }  # one path, whoever calls from wherever
write() { cat > "$1.partial"; mv "$1.partial" "$1"; }  # FILE: stdin, atomically
number() { printf %03d "$1"; }
policy() { if (($1)); then echo "$dir/$(number "$1")/policy"; else echo "$model"; fi; }

draw() {  # ROUND COUNT OUT: training problems; 0 is the rehearsal
  local problems=(data.countdown --split train --seed $((seed * 100000 + $1)) "${drawing[@]}")
  [ -z "$prompts" ] ||
    problems=(data.select --prompts "$prompts" --seed "$seed" --round $(($1 > 0 ? $1 : 1)))
  mkdir -p "$(dirname "$3")"
  stage "${problems[@]}" --n "$2" --out "$3"
}

sample() {  # MODEL PROBLEMS N STREAM OUT MORE..: OUTrollouts.jsonl and OUTscored.jsonl
  # Streams of a seed: 1, 2, ... (below 99998) the rounds, 0 and 99999 the rehearsal, 99998 eval/.
  stage "$sampler" --model "$1" --prompts "$2" --n "$3" --seed $((seed * 100000 + $4)) \
    --out "$5rollouts.jsonl" "${sampling[@]}" "${@:6}"
  stage score.py "$5rollouts.jsonl" --out "$5scored.jsonl"
}

one_round() {  # ROUND
  local folder=$dir/$(number "$1") before=$(policy $(($1 - 1))) coef=${coefs[0]} rehearsed=()
  SECONDS=0
  draw "$1" "$prompts_per_round" "$folder/problems.jsonl"
  sample "$before" "$folder/problems.jsonl" "$n" "$1" "$folder/"
  (($1 < later_round)) || coef=${coefs[1]}
  ((rehearse == 0)) || rehearsed=(--rehearse "$dir/rehearsal/scored.jsonl" --rehearse-coef "$coef")
  stage train.py --model "$before" --rollouts "$folder/scored.jsonl" --out "$folder/policy" \
    "${updating[@]}" "${rehearsed[@]}" > "$folder/means.txt"
  printf '%3d  %s  %d s  %s\n' "$1" "$(cat "$folder/means.txt")" "$SECONDS" "$name" >&3
  prune "$1"
}

rehearsal() {  # the base's own samples: half for all problems, half for those it hardly solved
  local folder=$dir/rehearsal all hard
  draw 0 "$rehearse" "$folder/problems.jsonl"
  sample "$model" "$folder/problems.jsonl" "$n" 0 "$folder/all."
  stage data.select --prompts "$folder/problems.jsonl" --out "$folder/hard.jsonl" --at-most 1 \
    --scored "$folder/all.scored.jsonl"
  all=$(wc -l < "$folder/all.scored.jsonl") hard=$(wc -l < "$folder/hard.jsonl")
  ((hard == 0)) || sample "$model" "$folder/hard.jsonl" $((all / hard)) 99999 "$folder/hard."
  cat "$folder"/*.scored.jsonl | write "$folder/scored.jsonl"
}

stage() {  # FILE.py or data.NAME, and its flags
  local start=(python3)
  [[ "$1" != data.* ]] || start=(python3 -m)
  [[ "$nproc" -eq 1 || ! "$1" =~ ^(generate|train)\.py$ ]] ||
    start=(torchrun --standalone --nproc-per-node "$nproc" --)  # --: --n is no flag of torchrun's
  echo "+ ${start[*]} $*" >&2
  "${start[@]}" "$@" & wait $!  # in the background, so that `stop` can end it
}

curve() {  # NAME ID MODEL: one more curve; a round that is gone was sampled before
  [[ ! -d "$3" && -e "$eval/$2.scored.jsonl" ]] ||
    sample "$3" "$problems" "$eval_n" 99998 "$eval/$2." --limit "$eval_problems"
  names+=("$1") files+=("$eval/$2.scored.jsonl")
}

evaluate() {  # ROUND LINES: of the base, --against and all rounds so far; the table's last LINES
  local problems=${eval_prompts:-$eval/problems.jsonl} names=() files=() id round newest=$label out
  mkdir -p "$eval"; [ -s "$eval/label" ] || write "$eval/label" <<< "$eval_label"
  [ -n "$eval_prompts" ] || stage data.countdown --split test --seed 1 "${drawing[@]}" \
    --n "$eval_problems" --out "$problems"
  curve base base "$model"
  id=$(number "$(last_round "runs/$against")")
  [ -z "$against" ] || curve "$against" "$against-$id" "runs/$against/$id/policy"
  for ((round = 1; round < $1; round++)); do
    id=$(number "$round")
    [ ! -e "$eval/$id.scored.jsonl" ] || { curve "$round" "$id" "$dir/$id/policy"; newest=$1; }
  done
  id=$(number "$1") out=$eval/eval-$id${against:+-$against}.json
  curve "$newest" "$id" "$(policy "$1")"; rm -f "$out"  # it may lack a curve
  stage evaluate.py "${files[@]}" --names "${names[@]}" --out "$out" --plot "$eval/passk.png" \
    > "$eval/table.txt"
  stage evaluate.py --training "$dir" --plot "$eval/training.png"
  tail -n "$2" "$eval/table.txt" >&3
}

last_round() {  # RUN: the number of its last finished round, or 0
  { ls -d "$1"/[0-9]*/policy 2> /dev/null || true; } |
    awk -F/ '$(NF - 1) + 0 > last { last = $(NF - 1) + 0 } END { print last + 0 }'
}

prune() {  # ROUND: keep the K rounds up to it
  for folder in "$dir"/*/; do
    [[ ! "$folder" =~ /([0-9]+)/$ || 10#${BASH_REMATCH[1]} -gt $1-keep ]] || rm -rf "$folder"
  done
  rm -f "$dir"/*/policy.partial.lock  # of a train.py that was killed at its last step
}

claim_folder() {  # a run's folder belongs to one set of flags
  settings=$(for flag in model method seed prompts prompts_per_round n temperature max_new_tokens \
      updates lr rehearse rehearse_coef sampler generate train countdown; do
    echo "$flag=${!flag//$'\n'/\\n}"; done)
  other=$(grep -vxFf <(echo "$settings") "$dir/settings" 2> /dev/null | tr '\n' ' ') || true
  [ -z "$other" ] || die "$dir was begun with other flags (${other% }); delete it or change --name"
  mkdir -p "$dir"; [ -s "$dir/settings" ] || write "$dir/settings" <<< "$settings"
}

read_flags() {
  name=demo model=data/weak-countdown method=ds-grpo rounds=8 seed=0 keep=2 prompts=''
  prompts_per_round=192 n=16 temperature=1.0 max_new_tokens=24 updates=4 lr=2e-4
  rehearse=0 rehearse_coef=1.0 sampler=generate.py generate='' train='' countdown=''
  eval_prompts='' eval_problems=300 eval_n=64 eval_every=0 against='' nproc=1 given=''
  while [ $# -gt 0 ]; do
    case $1 in -h | --help) sed '1d; /^set /Q; s/^# \?//' "$0" >&3; exit ;; esac
    [[ "$1" =~ ^--[a-z-]+$ ]] && grep -q "^#   $1 " "$0" || die "unknown flag $1 (see --help)"
    [ $# -gt 1 ] || die "$1 needs a value"
    key=${1#--} value=$2 given+="$1 "
    [[ ! "$1" =~ prompts$|sampler$ || -z "$2" || -f "$2" ]] || die "$1: no file $2"
    [[ ! "$1" =~ prompts$|sampler$|model$ || ! -e "$2" ]] || value=$(rooted "$2")  # or a Hub id
    [[ "$1 $2" != "--method "*.py:* ]] || value=$(rooted "${2%:*}"):${2##*:}
    printf -v "${key//-/_}" %s "$value"
    shift 2
  done
  cd "$root"
}

split_flags() {  # NAME ARRAY: append the words of the quoted flags
  local text="${!1} " word='' begun='' own
  local part=$'^(\'([^\']*)\'|"(([^"\\\\]|\\\\.)*)"|\\\\(.)|([^[:space:]\'"\\\\])|([[:space:]]+))'
  local -n words=$2 match=BASH_REMATCH
  own=" --rollouts --out --limit --split -h --help $(grep -o '^#   --[a-z-]*' run.sh | tr '\n' ' ')"
  while [[ "$text" =~ $part ]]; do text=${text:${#match}}
    if [ -z "${match[7]}" ]; then
      word+=${match[2]}${match[5]}${match[6]} begun=1
      if [[ "${match[3]}" != *\\* ]]; then word+=${match[3]}
      else word+=$(sed 's/\\\(["\\$`]\)/\1/g' <<< "${match[3]}"); fi
    elif [ -n "$begun" ]; then
      [[ -z "$word" || $own != *" ${word%%=*} "* ]] || die "--$1: ${word%%=*} is run.sh's own flag"
      words+=("$word") word='' begun=''
    fi
  done
  [ -z "$text" ] || die "--$1: a quote in it is not closed"
}

check_flags() {
  local key least coef=()
  for key in rounds keep seed prompts_per_round n max_new_tokens updates rehearse eval_problems \
      eval_n eval_every nproc; do
    [[ "$key" =~ ^(seed|rehearse|eval_problems|eval_every)$ ]] && least=0 || least=1
    [[ "${!key}" =~ ^(0|[1-9][0-9]{0,8})$ && "${!key}" -ge least ]] ||
      die "--${key//_/-} must be a whole number of at least $least, not '${!key}'"
  done
  ((updates <= prompts_per_round)) || die "--updates: more than --prompts-per-round"
  [[ "$name" =~ ^[^/.-][^/]*$ ]] || die "--name is a folder's name in runs/, not '$name'"
  [[ "$rehearse_coef" =~ ^([^,@\ ]+)(,([^,@\ ]+)@([2-9]|[1-9][0-9]{1,8}))?$ ]] ||
    die "--rehearse-coef is C, or C,D@R with D from round R > 1 on, not '$rehearse_coef'"
  coefs=(${BASH_REMATCH[1]} ${BASH_REMATCH[3]}) later_round=${BASH_REMATCH[4]:-99998}
  dir=runs/$name eval=$dir/eval label=${method##*:}
  [[ "$rehearse" -gt 0 || "$given" != *-coef* ]] || die "--rehearse-coef belongs to --rehearse"
  ((!rehearse)) || label+=+rehearsal
  [[ "$label" != base && "$label" != "$against" && ! "$against" =~ ^(base|[0-9]+)$ ]] ||
    die "--method and --against: no two curves may have one name, nor one be named base"
  [[ -z "$against" || "$against" != "$name" && "$(last_round "runs/$against")" -gt 0 ]] ||
    die "--against: no round in runs/$against, or it is this run itself"
  [[ "$train" = *-gamma* || "$train" = *-level* ]] || case $model$method in  # tuned, level token
    data/weak-countdownds-grpo) train="--gamma-p 3.0 --gamma-n 0.1${train:+ $train}" ;;
    data/tiny-countdownds-grpo) train="--gamma-p 0.3 --gamma-n 0.03${train:+ $train}" ;;
  esac
  [[ -d "$model" || "$model" =~ ^[^/.][^/]*/[^/]+$ && ! -d "${model%/*}" ]] ||
    die "--model $model: no such model folder (a Hub id is written owner/name)"
  [[ "$model" =~ ^data/(weak|tiny)-countdown$ || "$given" = *"--lr "* && "$given" = *-tokens* ]] ||
    die "--model $model needs --lr and --max-new-tokens; the defaults fit the embedded models"
  eval_label=$(tr / _ <<< "${eval_prompts:-test}-${eval_problems}x$eval_n")
  [ ! -s "$eval/label" ] || [ "$(cat "$eval/label")" = "$eval_label" ] || eval+=-$eval_label
  sampling=(--temperature "$temperature" --max-new-tokens "$max_new_tokens")
  updating=(--method "$method" --updates "$updates" --lr "$lr" --seed "$seed") drawing=()
  split_flags generate sampling; split_flags train updating; split_flags countdown drawing
  python3 "$sampler" --model . --prompts . --out . --n "$n" "${sampling[@]}" --check-flags
  for key in "${coefs[@]}"; do
    ((rehearse == 0)) || coef=(--rehearse . --rehearse-coef "$key")
    python3 train.py --model . --rollouts . --out . --temperature "$temperature" "${updating[@]}" \
      "${coef[@]}" --check-flags
  done
  python3 -m data.countdown --out . "${drawing[@]}" --check-flags
  [ -z "$prompts" ] || python3 score.py "$prompts" --check-problems "$updates"
  [ -z "$eval_prompts" ] || python3 score.py "$eval_prompts" --check-problems
}

demonstration() {  # two runs side by side, then three curves
  local recipe=(--name demo --rehearse 1000 --train "--rehearse-n 128" --rounds 5)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a core each; and equal bits everywhere
  bash "$0" --name GRPO --method grpo --rounds 5 --eval-problems 0 >&3 &
  bash "$0" "${recipe[@]}" --eval-problems 0 >&3 &
  wait -n && wait -n || { wait; die "a run ended early, see above; the same command goes on"; }
  main "${recipe[@]}" --against GRPO --eval-problems 80 --eval-n 256
}

main() {
  [ $# -gt 0 ] || { demonstration; return; }
  read_flags "$@"
  check_flags
  claim_folder
  last=$(last_round "$dir")
  [[ "$eval_problems" -eq 0 || "$rounds" -ge "$last" || -d "$(policy "$rounds")" ||
    -e "$eval/$(number "$rounds").scored.jsonl" ]] ||
    die "round $rounds was pruned; evaluate $last, or train with another --name and a larger --keep"
  ((rounds < last)) || prune "$last"
  ((rounds <= last || rehearse == 0)) || rehearsal
  for ((round = last; round < rounds; round++)); do
    ((!eval_problems || !eval_every || !round || round % eval_every)) || evaluate "$round" 1
    one_round $((round + 1))
  done
  ((eval_problems == 0)) || evaluate "$rounds" +1
}

root=$(realpath "$(dirname -- "$0")")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # for --sampler
exec 3>&1  # the caller's stdout; what the stages print goes to stderr
trap 'stop 130' INT; trap 'stop 143' TERM; trap 'stop 129' HUP
main "$@" >&2; exit  # read whole by now: an edit or a git pull in the middle changes nothing
