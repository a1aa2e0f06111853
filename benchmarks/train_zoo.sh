#!/usr/bin/env bash
# Train an entry of the zoo on one device, and a ReLU baseline to teach it: weights, measured figures and card of both.
#
#   benchmarks/train_zoo.sh msnn_resnet12 cifar100 data/cifar100 out               # on CUDA, bf16
#   EPOCHS=2 benchmarks/train_zoo.sh msnn_vit12 cifar10 data/cifar10 out --trainer.accelerator cpu
#
# What stops it does not matter: the same command goes on from the last checkpoint. out/zoo/<entry> is there when done;
# LIGHTNING_MSNN_ZOO=out/zoo puts its entries in front of those that the package has.
set -euo pipefail
network=$1 data=$3 out=$4
size=32
case $2 in
cifar100) tag=c100 ;;
cifar10) tag=c10 ;;
tiny_imagenet) tag=tiny_imagenet size=64 ;;
*) echo "no entries are of the data set '$2': cifar100, cifar10, tiny_imagenet" >&2 && exit 2 ;;
esac
of=data/$2
shift 4
epochs=${EPOCHS:-60}
export LIGHTNING_MSNN_ZOO=$out/zoo

fit() { # entry, recipe, options
    entry=$1 recipe=$2
    shift 2
    grep -qs '"top1"' "$out/zoo/$entry/config.json" && return
    rm -rf "${out:?}/zoo/$entry" # stopped before it was measured
    words=(--config "$of" --config "recipe/$recipe" --model.network "$network" --data.image_size $size
        --trainer.max_epochs "$epochs" --trainer.accelerator gpu "$@")
    lightning-msnn fit "${words[@]}" --data.root "$data" --trainer.default_root_dir "$out/runs" --run.name "$entry" \
        --run.test false --ckpt_path last
    run=$(ls -td "$out/runs/$entry"/version_* | head -1)
    python - "$epochs" "${words[@]}" > "$run/fields.json" <<-'PYTHON'
	import json, platform, shlex, sys
	from datetime import date

	import torch

	device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
	print(json.dumps({
	    "command": shlex.join(["lightning-msnn", "fit", *sys.argv[2:]]),
	    "recipe": "whitened stem, Muon along a triangle, alternating flips and reflected crops",
	    "epochs": int(sys.argv[1]), "seed": 0, "hardware": device, "date": date.today().isoformat(),
	    "license": "apache-2.0",
	}))
	PYTHON
    python -m lightning_msnn.zoo export "$run/checkpoints/best.ckpt" "$entry" --root "$data" --out "$out/zoo" \
        --dtype int8 --fields "$run/fields.json"
}

mkdir -p "$out/zoo"
fit "$network.${tag}_relu" baseline "$@"
fit "$network.$tag" student --model.pretrained "$network.${tag}_relu" \
    --trainer.callbacks.source "$network.${tag}_relu" "$@"
