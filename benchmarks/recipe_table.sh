#!/usr/bin/env bash
# Train msnn_resnet12, half as wide, for five epochs at 24 pixels by recipe/baseline and recipe/student, and without each
# of their parts; held-out images of CIFAR-100 judge. Rows go into benchmarks/results/experiments.csv; those that are
# there are not trained again. Then: python -m benchmarks.trainings report
#
#   benchmarks/recipe_table.sh data/cifar100 /tmp/baselines                        # bf16; five to ten minutes a training on one core with AMX
#   benchmarks/recipe_table.sh data/cifar100 /tmp/baselines --trainer.precision 32-true
set -euo pipefail
data=$1 baselines=$2
shift 2
seeds=(0 1 2)
short=(--config data/cifar100 --data.root "$data" --data.image_size 24 --data.val_fraction 0.1 --data.crop_padding 2
    --trainer.max_epochs 5 --trainer.callbacks "[{class_path: Whitening}]" --model.network msnn_resnet12 --run.test false "$@")
half="widths: [24, 48, 96, 192]"

row() { # name, seeds, recipe, options
    python -m benchmarks.trainings run experiments whitened_recipe "$1" --seeds $2 $keep -- \
        --config "recipe/$3" "${short[@]}" "${@:4}"
}

relu="{stem: whitened, spiking: false, windows: single, $half}"
baseline() { row "the ReLU baseline$1" "${2:-0}" baseline --model.network_kwargs "${3:-$relu}" "${@:4}"; }
keep="--keep $baselines" # the teachers below
baseline "" "${seeds[*]}"
keep=""
baseline ", stem not whitened" "0 1 2" "${relu/whitened/convolution}" --trainer.callbacks "[]"
baseline ", Haar's filters in the place of whitening" 0 "$relu" --trainer.callbacks "[]"
baseline ", biases of the stem learn to the end" 0 "$relu" --trainer.callbacks.until 1.0
baseline ", one cycle" 0 "$relu" --model.schedule one_cycle --model.warmup_epochs 1
baseline ", AdamW, lr 0.004, batch 128" 0 "$relu" --model.optimizer adamw --model.lr 0.004 --data.batch_size 128
baseline ", batch 128" 0 "$relu" --data.batch_size 128
baseline ", flips by chance" 0 "$relu" --data.flip 0.5
baseline ", zeros beyond the border" 0 "$relu" --data.border zeros
baseline ", crops of 4 pixels" 0 "$relu" --data.crop_padding 4
baseline ", no average of weights" 0 "$relu" --run.ema 0
baseline ", sizes 16 and 24 by epoch" 0 "$relu" --data.train_sizes "{0: 16, 2: 24}"

white="{class_path: Whitening}" cutmix="{class_path: Mixing}" spiking="{stem: whitened, threshold: 1.0, $half}"
student() { # name, seeds, arguments of the network, further callbacks, weight of the teacher (0: none), options
    for seed in $2; do
        from=$baselines/$seed/baseline/version_0/checkpoints/best.ckpt
        taught=", {class_path: Teacher, init_args: {source: $from, weight: $5}}"
        test "$5" != 0 || taught=""
        row "the spiking network$1" "$seed" student --run.monitors true --model.pretrained "$from" \
            --model.network_kwargs "$3" --trainer.callbacks "[$white$4$taught]" "${@:6}"
    done
}
student "" "${seeds[*]}" "$spiking" "" 0.5
student ", threshold 0.5" 0 "${spiking/1.0/0.5}" "" 0.5
student ", windows single" 0 "${spiking/stem/windows: single, stem}" "" 0.5
student ", annealed over 60 %" 0 "$spiking" ", {class_path: SpikeAnnealing}" 0.5
student ", not taught" 0 "$spiking" "" 0 --model.label_smoothing 0.1
student ", taught alone" 0 "$spiking" "" 1.0
student ", from scratch" 0 "$spiking" "" 0.5 --model.pretrained false
student ", cutmix and crops of 4 pixels" 0 "$spiking" ", $cutmix" 0.5 --data.crop_padding 4
