#!/usr/bin/env bash
# Loop the stages: sample, verify, update, R times; then evaluate the base and the trained model on held-out problems.
#
#   bash run.sh                                                            the demonstration: minutes on two CPU cores
#   bash run.sh --name grpo --method grpo --rounds 25 --seed 1             another run, into runs/grpo/
#   bash run.sh --name ds --rounds 25 -- --gamma-p 0.1 --gamma-n 0.01      what stands after -- goes to train.py; without it, ds-grpo
#                                                                          on the embedded model gets --gamma-p 0.3 --gamma-n 0.03
#   bash run.sh --model Qwen/Qwen2.5-Math-1.5B --prompts math.jsonl --eval-prompts aime.jsonl --nproc 8 ...
#   bash run.sh --suite paper                                              every arm of the README's tables (see --help of experiments/paper.py)
#
# In runs/NAME/: prompts-RRR.jsonl, rollouts-RRR.jsonl, scored-RRR.jsonl and the model round-RRR/ of each round; of these the
# last K rounds are kept. Then test.jsonl, base.scored.jsonl, trained-RRR.scored.jsonl, eval-RRR.json, passk.png and
# training.png. Stop it whenever you like: the same command carries on from the last finished stage.
#
#   --name N                run folder runs/N                                         (demo)
#   --model DIR|HUB_ID      the base model                                            (data/tiny-countdown)
#   --method M              ds-grpo | grpo | passk | cispo | w-reinforce              (ds-grpo)
#   --rounds R              rounds of sampling and updating                           (8)
#   --seed S                seed of problems, samples and shuffles                    (0)
#   --keep K                rounds whose files are kept                               (2)
#   --prompts FILE          training problems, taken in turn; without it fresh Countdown problems each round
#   --prompts-per-round P   problems a round                                          (192)
#   --n N                   samples a problem                                         (16)
#   --temperature T         of all sampling, in training and evaluation               (1.0)
#   --max-new-tokens L      longest completion                                        (24)
#   --attention A           of generate.py: auto | model | shared                     (auto)
#   --updates U             optimizer steps a round                                   (4)
#   --lr LR                 learning rate                                             (3e-4)
#   --eval-prompts FILE     held-out problems; without it Countdown problems of the test split
#   --eval-problems E       how many; 0 skips the evaluation                          (300)
#   --eval-n N              samples a held-out problem                                (64)
#   --countdown "FLAGS"     flags for data/countdown.py, such as "--max-solutions 3"  (none)
#   --nproc N               processes a stage, through torchrun                       (1: plain python)
set -euo pipefail
main() {  # read whole before it runs: an edit, or a git pull, in the middle of a night changes nothing
cd "$(dirname "$0")"

die() { echo "run.sh: error: $*" >&2; exit 2; }
say() { echo "+ $*" >&2; "$@"; }

name=demo model=data/tiny-countdown method=ds-grpo rounds=8 seed=0 keep=2 prompts= prompts_per_round=192 n=16 temperature=1.0
max_new_tokens=24 updates=4 lr=3e-4 eval_prompts= eval_problems=300 eval_n=64 countdown= nproc=1 attention=auto
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --suite) [ "${2:-}" = paper ] || die "--suite knows 'paper' only"; shift 2; exec python experiments/paper.py "$@" ;;
    --name|--model|--method|--rounds|--seed|--keep|--prompts|--prompts-per-round|--n|--temperature|--max-new-tokens|--updates|--lr|--eval-prompts|--eval-problems|--eval-n|--countdown|--nproc|--attention)
      [ $# -gt 1 ] || die "$1 needs a value"
      key=${1#--}; printf -v "${key//-/_}" '%s' "$2"; shift 2 ;;
    --) shift; break ;;
    *) die "unknown flag $1 (see --help)" ;;
  esac
done
for key in rounds seed keep prompts_per_round n max_new_tokens updates eval_problems eval_n nproc; do
  [[ "${!key}" =~ ^[0-9]{1,9}$ ]] || die "--${key//_/-} must be a whole number, not '${!key}'"
  printf -v "$key" %d "$((10#${!key}))"
done
[[ "$method" =~ ^(ds-grpo|grpo|passk|cispo|w-reinforce)$ ]] || die "no --method '$method' (see --help)"
[ "$keep" -ge 1 ] && [ "$rounds" -ge 1 ] || die "--keep and --rounds must be at least 1"
python() { command python3 "$@"; }
command -v python3 >/dev/null || die "no python3 on the PATH"
launch() { if [ "$nproc" -gt 1 ]; then say torchrun --standalone --nproc-per-node "$nproc" "$@"; else say python "$@"; fi; }

if [ $# -eq 0 ] && [ "$method" = ds-grpo ] && [ "$model" = data/tiny-countdown ]; then
  set -- --gamma-p 0.3 --gamma-n 0.03  # larger than the paper's 0.01 / 0.01, whose models are a thousand times larger; experiments/tuning.csv
fi

# A run folder belongs to one set of flags; only --rounds, --keep, --nproc and what is evaluated may change when it is continued.
dir=runs/$name
mkdir -p "$dir"
settings="model=$model method=$method seed=$seed prompts=$prompts prompts_per_round=$prompts_per_round n=$n temperature=$temperature"
settings+=" max_new_tokens=$max_new_tokens attention=$attention updates=$updates lr=$lr countdown=$countdown train=$*"
if [ -f "$dir/settings" ] && [ "$(cat "$dir/settings")" != "$settings" ]; then
  die "$dir was begun with other flags ($(cat "$dir/settings")); choose another --name or delete it"
fi
echo "$settings" > "$dir/settings.new"
mv "$dir/settings.new" "$dir/settings"

last=0  # the last finished round
for folder in "$dir"/round-*/; do
  id=${folder%/} id=${id##*-}
  if [[ "$id" =~ ^[0-9]+$ ]] && [ "$((10#$id))" -gt "$last" ]; then last=$((10#$id)); fi
done
prune() {  # keep the last K rounds up to $1; what a killed run did not get to remove goes, too
  local path id
  for path in "$dir"/{prompts,rollouts,scored,round}-[0-9]*; do
    id=${path##*-} id=${id%%.*}
    if [[ "$id" =~ ^[0-9]+$ ]] && [ "$((10#$id))" -le "$(($1 - keep))" ]; then rm -rf "$path"; fi
  done
}
prune "$last"
round_path() { if [ "$1" -eq 0 ]; then echo "$model"; else printf '%s/round-%03d' "$dir" "$1"; fi; }

for ((round = last + 1; round <= rounds; round++)); do
  id=$(printf %03d "$round")
  echo "== $name: round $round of $rounds" >&2
  if [ -n "$prompts" ]; then  # the next P lines of the file, around its end
    awk -v from="$(((round - 1) * prompts_per_round))" -v count="$prompts_per_round" \
      '{ line[NR - 1] = $0 } END { for (i = 0; i < count && i < NR; i++) print line[(from + i) % NR] }' "$prompts" > "$dir/prompts-$id.new"
    mv "$dir/prompts-$id.new" "$dir/prompts-$id.jsonl"
  else
    # shellcheck disable=SC2086
    say python data/countdown.py --out "$dir/prompts-$id.jsonl" --n "$prompts_per_round" --seed $((seed * 100000 + round)) --split train $countdown
  fi
  launch generate.py --model "$(round_path $((round - 1)))" --prompts "$dir/prompts-$id.jsonl" --out "$dir/rollouts-$id.jsonl" --n "$n" \
    --temperature "$temperature" --max-new-tokens "$max_new_tokens" --attention "$attention" --seed $((seed * 100000 + round))
  say python score.py "$dir/rollouts-$id.jsonl" --out "$dir/scored-$id.jsonl"
  launch train.py --model "$(round_path $((round - 1)))" --rollouts "$dir/scored-$id.jsonl" --out "$dir/round-$id" --method "$method" \
    --updates "$updates" --lr "$lr" --seed "$seed" "$@"
  prune "$round"
done

if [ "$eval_problems" -gt 0 ]; then
  if [ -n "$eval_prompts" ]; then test=$eval_prompts; else
    test=$dir/test.jsonl
    # shellcheck disable=SC2086
    say python data/countdown.py --out "$test" --n "$eval_problems" --seed 1 --split test $countdown
  fi
  trained=trained-$(printf %03d "$rounds")
  for which in base "$trained"; do
    if [ "$which" = base ]; then path=$model; else path=$(round_path "$rounds"); fi
    launch generate.py --model "$path" --prompts "$test" --limit "$eval_problems" --out "$dir/$which.rollouts.jsonl" --n "$eval_n" \
      --temperature "$temperature" --max-new-tokens "$max_new_tokens" --attention "$attention" --seed 1
    say python score.py "$dir/$which.rollouts.jsonl" --out "$dir/$which.scored.jsonl"
  done
  say python evaluate.py "$dir/base.scored.jsonl" "$dir/$trained.scored.jsonl" --names base "$method" \
    --out "$dir/eval-${trained#*-}.json" --plot "$dir/passk.png"
  say python evaluate.py --training "$dir" --plot "$dir/training.png"
  echo "$dir: eval-${trained#*-}.json, passk.png and training.png are there" >&2
fi
}
main "$@"
