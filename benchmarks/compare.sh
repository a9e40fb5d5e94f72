#!/usr/bin/env bash
# This project, LitGPT and TRL on the same model, the same rows and the same machine, in turn; medians and ratios.
#
#   benchmarks/compare.sh                                        # a random 58M Llama, random words
#   benchmarks/compare.sh DATA=rows.json TOKENIZER=checkpoints/ORG/MODEL ROUNDS=3 STEPS=8
#   benchmarks/compare.sh METHODS=lora PRECISIONS=bf16-true VOCAB=128256 PROGRAMS="ours litgpt" ROUNDS=1
#
# On first use it makes the peers' virtual environments in PEERS (benchmarks/.peers): LitGPT 0.5.13, and TRL 1.16.0 with
# PEFT 0.21.2. Each program trains on exactly STEPS x SAMPLES rows. Every run adds a line of JSON to OUT, which is begun
# anew; for each vocabulary after the first, with which LoRA alone is run, there is a file of its own beside it. METHODS,
# PRECISIONS, VOCAB, PROGRAMS and ROUNDS choose a part of all this.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROUNDS=${ROUNDS:-3}
STEPS=${STEPS:-8}
SAMPLES=${SAMPLES:-8}
MICRO=${MICRO:-4}      # rows that go through the model at once
LENGTH=${LENGTH:-512}  # tokens of the longest row
METHODS=${METHODS:-lora full}
PRECISIONS=${PRECISIONS:-bf16-true 32-true}
PROGRAMS=${PROGRAMS:-ours litgpt trl}
VOCAB=${VOCAB:-32000 128256}
SHAPE=${SHAPE:-}          # more flags of prepare.py, for example "--width 256 --layers 4"
DATA=${DATA:-}            # an Alpaca file; random words without it
TOKENIZER=${TOKENIZER:-}  # a folder; the built-in pico's without it
PYTHON=${PYTHON:-python}
PEERS=${PEERS:-$here/.peers}
PEERS_PYTHON=${PEERS_PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}  # what the peers install it from; options for pip may stand here too
WORK=${WORK:-$here/.work}
OUT=${OUT:-}  # WORK/compare.jsonl without it

for word in "$@"; do
  case $word in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit ;;
    [A-Z]*=*)
      name=${word%%=*}
      case " ROUNDS STEPS SAMPLES MICRO LENGTH METHODS PRECISIONS PROGRAMS VOCAB SHAPE DATA TOKENIZER PYTHON PEERS \
PEERS_PYTHON TORCH WORK OUT " in
        *" $name "*) printf -v "$name" %s "${word#*=}" ;;
        *) echo "compare.sh: there is no $name; see compare.sh -h" >&2; exit 2 ;;
      esac ;;
    *) echo "compare.sh: $word is not NAME=value; see compare.sh -h" >&2; exit 2 ;;
  esac
done

install() {  # install FOLDER PACKAGE...: a virtual environment, unless it is there
  [ -e "$1/.installed" ] && return
  "$PEERS_PYTHON" -m venv "$1"
  # shellcheck disable=SC2086
  "$1/bin/pip" install -q $TORCH
  "$1/bin/pip" install -q "${@:2}"
  touch "$1/.installed"
}

case " $PROGRAMS " in *" litgpt "*)
  # the other pins are the newest that LitGPT 0.5.13 was seen to work with
  install "$PEERS/litgpt" litgpt==0.5.13 'bitsandbytes<0.50' 'lm-eval<0.4.9.1' 'transformers<4.57' 'datasets<4' \
    'huggingface-hub<1' litserve sentencepiece torchmetrics tensorboard ;;
esac
case " $PROGRAMS " in *" trl "*)
  install "$PEERS/hf" trl==1.16.0 peft==0.21.2 transformers==5.23.0 accelerate datasets sentencepiece protobuf ;;
esac

OUT=${OUT:-$WORK/compare.jsonl}
mkdir -p "$WORK" "$(dirname "$OUT")"

compare() {  # compare VOCABULARY METHODS FILE
  local out=$3 method precision program round
  rm -rf "$WORK/shared"
  # shellcheck disable=SC2086
  "$PYTHON" "$here/prepare.py" "$WORK/shared" --n_rows $((STEPS * SAMPLES)) --vocab "$1" $SHAPE \
    ${DATA:+--data "$DATA"} ${TOKENIZER:+--tokenizer "$TOKENIZER"}
  local model=$WORK/shared/model rows=$WORK/shared/rows
  case " $PROGRAMS " in *" litgpt "*)
    PYTHONPATH='' "$PEERS/litgpt/bin/python" "$here/to_litgpt.py" "$model" "$WORK/shared/litgpt" ;;
  esac
  : >"$out"
  for ((round = 1; round <= ROUNDS; round++)); do
    for method in $2; do
      for precision in $PRECISIONS; do
        for program in $PROGRAMS; do
          local flags=(--method "$method" --precision "$precision" --samples "$SAMPLES" --micro_batch_size "$MICRO"
            --steps "$STEPS" --max_seq_length "$LENGTH" --json "$out")
          echo "--- round $round of $ROUNDS: $program, $method, $precision, vocabulary $1"
          case $program in
            ours) "$PYTHON" "$here/train.py" --model "$model" --data "$rows/train.json" "${flags[@]}" ;;
            litgpt) "$PYTHON" "$here/peer.py" litgpt --python "$PEERS/litgpt/bin/python" \
              --model "$WORK/shared/litgpt" --rows "$rows" "${flags[@]}" ;;
            trl) "$PYTHON" "$here/peer.py" trl --python "$PEERS/hf/bin/python" --model "$model" --rows "$rows" \
              "${flags[@]}" ;;
            *) echo "compare.sh: PROGRAMS has $program; there are ours, litgpt and trl" >&2; exit 2 ;;
          esac
        done
      done
    done
  done
}

methods=$METHODS
files=()
for vocab in $VOCAB; do
  file=$OUT
  [ ${#files[@]} -eq 0 ] || file=${OUT%.jsonl}-$vocab.jsonl
  compare "$vocab" "$methods" "$file"
  files+=("$file")
  methods=lora
done
for file in "${files[@]}"; do
  echo
  "$PYTHON" "$here/medians.py" "$file"
  echo
  echo "The runs: $file"
done
