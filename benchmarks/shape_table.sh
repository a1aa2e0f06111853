#!/usr/bin/env bash
# Train msnn_resnet9 in several shapes for four epochs with ReLU by recipe/baseline, then for four epochs with spikes from that
# baseline and taught by it; held-out images of CIFAR-100 judge. Rows go into benchmarks/results/experiments.csv; those that
# are there are not trained again. Then: python -m benchmarks.trainings report
#
#   benchmarks/shape_table.sh data/cifar100 /tmp/baselines      # bf16; 10 to 25 minutes a training on one core with AMX
#   benchmarks/shape_table.sh data/cifar100 /tmp/baselines --trainer.precision 32-true
set -euo pipefail
data=$1 baselines=$2
shift 2
short=(--config data/cifar100 --data.root "$data" --data.val_fraction 0.1 --data.crop_padding 2 --trainer.max_epochs 4
    --model.network msnn_resnet9 --trainer.callbacks "[{class_path: Whitening}]" --run.test false "$@")

both() { # name, seeds, arguments of both networks, options of both
    for seed in $2; do
        keep=$baselines/${1//[, ]/_} # a path without what YAML reads as a list
        python -m benchmarks.trainings run experiments shapes "$1, ReLU" --seeds "$seed" --keep "$keep" -- \
            --config recipe/baseline "${short[@]}" \
            --model.network_kwargs "{stem: whitened, spiking: false, windows: single, $3}" "${@:4}"
        spiking "$1" "$seed" "$1" "stem: whitened, threshold: 0.6, $3" "${@:4}"
    done
}

spiking() { # name, seeds, its baseline, arguments of the network, options
    for seed in $2; do
        from=$baselines/${3//[, ]/_}/$seed/baseline/version_0/checkpoints/best.ckpt
        python -m benchmarks.trainings run experiments shapes "$1, spiking" --seeds "$seed" -- \
            --config recipe/student "${short[@]}" --run.monitors true --model.lr 0.01 --model.pretrained "$from" \
            --trainer.callbacks "[{class_path: Whitening}, {class_path: Teacher, init_args: {source: $from, weight: 0.8}}]" \
            --model.network_kwargs "{$4}" "${@:5}"
    done
}

both "2, 4, 3 of 64, 128, 256" 0 "depths: [2, 4, 3]"
spiking "2, 4, 3 of 64, 128, 256, windows single" 0 "2, 4, 3 of 64, 128, 256" \
    "stem: whitened, threshold: 0.6, windows: single, depths: [2, 4, 3]"
both "2, 4, 3 of 64, 128, 256, maximum and mean in the read-out" 0 "depths: [2, 4, 3], global_pool: catavgmax"
both "3, 4, 2 of 64, 128, 256" 0 "depths: [3, 4, 2]"
both "2, 3, 1 of 64, 128, 512" 0 "depths: [2, 3, 1], widths: [64, 128, 512]"
both "3, 4, 2 of 64, 128, 256, maximum and mean in the read-out" 0 "depths: [3, 4, 2], global_pool: catavgmax"
