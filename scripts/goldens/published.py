#!/usr/bin/env python3
"""Reads the settings of published recipes out of the repositories that published them, for tests/suite/published.rs.

    git clone https://github.com/lightly-ai/lightly https://github.com/vturrisi/solo-learn …     # full history
    python scripts/goldens/published.py --lightly DIR --solo-learn DIR --simclr DIR --swav DIR --simsiam DIR

Writes tests/goldens/published.toml: for each recipe the file that was read and its settings by the recipe's keys. Nothing is typed
in here but the mapping of names; a value that a repository has in its code alone and not as a setting is left out. Needs no
packages.
"""

import argparse
import re
import subprocess
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "tests/goldens/published.toml"
SOLO, LIGHTLY, SWAV, SIMSIAM = "9187ea3", "e8d317fc", "06b1b7c", "a7bc177"
CIFAR_IMAGES = 50_000


def show(repository, commit, path):
    words = ["git", f"--git-dir={repository}" if (Path(repository) / "HEAD").exists() else f"--git-dir={repository}/.git"]
    return subprocess.run([*words, "show", f"{commit}:{path}"], check=True, stdout=subprocess.PIPE, text=True).stdout


def number(text):
    text = text.strip().strip('"').rstrip(".")
    try:
        return int(text)
    except ValueError:
        return float(text)


def yaml_value(text, key):
    """The value of a key, whatever its indentation; the files have each once."""
    found = re.search(rf"^\s*{key}:\s*([^#\n]+)", text, re.M)
    value = found.group(1).strip().strip('"')
    return value == "True" if value in ("True", "False") else number(value)


def solo(repository, method, kind):
    folder = "scripts/pretrain/cifar"
    text = show(repository, SOLO, f"{folder}/{method}.yaml")
    views = show(repository, SOLO, f"{folder}/augmentations/{kind}.yaml").split("\n- rrc:")
    loader = show(repository, SOLO, "solo/data/pretrain_dataloader.py")
    base = show(repository, SOLO, "solo/methods/base.py")
    get = lambda key: yaml_value(text, key)  # noqa: E731
    lars = "optim.rule.lars."
    settings = {
        "train.epochs": get("max_epochs"), "train.batch": get("batch_size"), "optim.lr": get("lr"), "optim.lr_rule": "linear",
        "optim.warmup_from": float(re.search(r'scheduler.warmup_start_lr", ([\d.e-]+)', base).group(1)),
        "optim.end_lr": float(re.search(r'scheduler.min_lr", ([\d.e-]+)', base).group(1)),
        lars + "weight_decay": get("weight_decay"), lars + "trust": get("eta"), lars + "clip": get("clip_lr"),
        "method.hidden": get("proj_hidden_dim"), "method.embedding": get("proj_output_dim"),
        "network.depth": int(re.search(r"resnet(\d+)", text).group(1)),
    }  # fmt: skip
    if method == "swav":
        per_epoch = CIFAR_IMAGES // get("batch_size")
        settings |= {
            "method.prototypes": get("num_prototypes"), "method.queue": get("queue_size"),
            "method.queue_from": get("epoch_queue_starts"), "method.temperature": get("temperature"),
            "method.freeze_steps": get("freeze_prototypes_epochs") * per_epoch,
        }  # fmt: skip
    else:
        settings["method.momentum"] = get("base_tau")
    statistics = re.search(r'"cifar10": \(\(([^)]*)\), \(([^)]*)\)', loader)
    mean, std = ([float(v) for v in group.split(",")] for group in statistics.groups())
    bicubic = "InterpolationMode.BICUBIC" in loader
    for i, view in enumerate(views):
        prob = lambda what: float(re.search(rf"{what}:\s+prob: ([\d.]+)", view).group(1))  # noqa: B023, E731
        at = f"augment.{i}."
        settings |= {
            at + "size": yaml_value(view, "crop_size"), at + "filter": "bicubic" if bicubic else "bilinear",
            at + "area": [yaml_value(view, "crop_min_scale"), yaml_value(view, "crop_max_scale")],
            at + "jitter.p": prob("color_jitter"), at + "grey": prob("grayscale"), at + "flip": prob("horizontal_flip"),
            at + "blur.p": prob("gaussian_blur"), at + "solarise.p": prob("solarization"),
            at + "normalise.mean": mean, at + "normalise.std": std,
        }  # fmt: skip
        settings |= {f"{at}jitter.{k}": yaml_value(view, k) for k in ("brightness", "contrast", "saturation", "hue")}
    return f"vturrisi/solo-learn {SOLO} {folder}/{method}.yaml", settings


def lightly(repository, name, batch=256, epochs=800):
    """One class of the script; the table above it says batch 256 and 800 epochs, the script's variables say how both are used."""
    path = "docs/source/getting_started/benchmarks/imagenette_benchmark.py"
    text = show(repository, LIGHTLY, path)
    rows = [r"\| " + row for row in ("SimCLR ", "Moco ", "SimSiam ", "SwaV ")]
    assert all(re.search(rf"{row}.*\|\s+{batch} \|\s+{epochs} \|", text) for row in rows)
    assert "lr_factor = batch_size / 256" in text and "CosineAnnealingLR(optim, max_epochs)" in text
    body = re.search(rf"class {name}\(.*?(?=\nclass )", text, re.S).group(0)
    scaled = "* lr_factor" in body
    rate = float(re.search(r"lr=([\d.e-]+)", body).group(1))
    decay = float(re.search(r"weight_decay=([\d.e-]+)", body).group(1))
    settings = {"train.epochs": epochs, "train.batch": batch, "optim.decay": "cosine-per-epoch", "optim.lr_rule": "linear" if scaled else "fixed",
                "network.depth": int(re.search(r"resnet(\d+)\(\)", body).group(1)), "augment.0.size": int(re.search(r"input_size = (\d+)", text).group(1))}  # fmt: skip
    # The losses here are twice lightly's in SimCLR and MoCo: half the rate and twice the decay are the same steps of SGD.
    twice = 2.0 if name in ("SimCLRModel", "MocoModel") else 1.0
    rule = "adam" if "optim.Adam(" in body else "sgd"
    settings |= {"optim.lr": rate / twice, f"optim.rule.{rule}.weight_decay": decay * twice}
    if rule == "sgd":
        settings["optim.rule.sgd.momentum"] = float(re.search(r"momentum=([\d.]+)", body).group(1))
    transform = {"SimCLRModel": "simclr", "MocoModel": "simclr", "SimSiamModel": "simsiam", "SwaVModel": "swav"}[name]
    assert f"{name}: {transform}_transform" in text
    defaults = show(repository, LIGHTLY, f"lightly/transforms/{transform}_transform.py")
    default = lambda key: float(re.search(rf"{key}: float = ([\d.]+)", defaults).group(1))  # noqa: E731
    made = re.search(rf"\n{transform}_transform = .*?\n\)?\n", text, re.S).group(0)
    strength = re.search(r"cj_strength=([\d.]+)", made)
    strength = float(strength.group(1)) if strength else default("cj_strength")
    colours = {"brightness": "cj_bright", "contrast": "cj_contrast", "saturation": "cj_sat", "hue": "cj_hue"}
    settings |= {f"augment.0.jitter.{ours}": strength * default(theirs) for ours, theirs in colours.items()}
    settings |= {"augment.0.jitter.p": default("cj_prob"), "augment.0.grey": default("random_gray_scale"),
                 "augment.0.blur.p": default("gaussian_blur"), "augment.0.flip": default("hf_prob")}  # fmt: skip
    pair = lambda key: [float(v) for v in re.search(rf"{key}: Tuple\[float, float\] = \(([^)]*)\)", defaults).group(1).split(",")]  # noqa: E731
    head = [int(v) for v in re.findall(r"\d+", re.search(r"ProjectionHead\(([^)]*)\)", body).group(1))]
    if name == "SwaVModel":
        low, high = pair("crop_min_scales"), pair("crop_max_scales")
        counts = [int(v) for v in re.search(r"crop_counts=\((\d+), (\d+)\)", made).groups()]
        sizes = [int(v) for v in re.search(r"crop_sizes=\((\d+), (\d+)\)", made).groups()]
        for i in range(2):
            settings |= {f"augment.{i}.area": [low[i], high[i]], f"augment.{i}.repeat": counts[i], f"augment.{i}.size": sizes[i]}
        settings |= {"method.hidden": head[0], "method.embedding": head[1], "method.crops": sum(counts),
                     "method.prototypes": int(re.search(r"SwaVPrototypes\(\d+, (\d+)\)", body).group(1))}  # fmt: skip
        loss = show(repository, LIGHTLY, "lightly/loss/swav_loss.py")
        for ours, theirs in (("temperature", "temperature"), ("epsilon", "sinkhorn_epsilon"), ("sinkhorn_iterations", "sinkhorn_iterations")):
            settings[f"method.{ours}"] = number(re.search(rf"{theirs}: (?:float|int) = ([\d.]+)", loss).group(1))
    else:
        settings["augment.0.area"] = [default("min_scale"), 1.0]
    if name == "MocoModel":
        settings |= {"method.hidden": head[0], "method.embedding": head[1],
                     "method.momentum": float(re.search(r"update_momentum\(.*?, ([\d.]+)\)", body).group(1)),
                     "method.queue": int(re.search(r"memory_bank_size = (\d+)", text).group(1)),
                     "method.temperature": float(re.search(r"temperature=([\d.]+)", body).group(1)),
                     "method.symmetric": "0.5 * (loss_1 + loss_2)" in body}  # fmt: skip
    if name == "SimCLRModel":
        loss = show(repository, LIGHTLY, "lightly/loss/ntx_ent_loss.py")
        settings |= {"method.embedding": head[0], "method.temperature": float(re.search(r"temperature: float = ([\d.]+)", loss).group(1))}
    if name == "SimSiamModel":
        predictor = re.search(r"SimSiamPredictionHead\(\d+, (\d+), \d+\)", body)
        settings |= {"method.embedding": head[1], "method.hidden": int(predictor.group(1)), "method.fix_predictor_lr": False}
    return f"lightly-ai/lightly {LIGHTLY} {path} {name}", settings


def simclr(repository, commit, which):
    """The pretraining commands of the README at a commit: CIFAR-10's or ImageNet's; what they leave out has run.py's default."""
    readme, code = show(repository, commit, "README.md"), show(repository, commit, "run.py")
    command = next(c for c in re.findall(r"```\n(python run.py --train_mode=pretrain.*?)```", readme, re.S) if which in c)
    given = dict(re.findall(r"--(\w+)=(\S+)", command))
    default = lambda key: re.search(rf"DEFINE_\w+\(\s*'{key}', ([^,]+),", code).group(1).strip("'")  # noqa: E731
    get = lambda key: given.get(key) or default(key)  # noqa: E731
    strength = float(get("color_jitter_strength"))
    later = "num_proj_layers" in code
    size = int(get("image_size"))
    settings = {
        "train.batch": int(get("train_batch_size")), "train.epochs": int(get("train_epochs")), "optim.lr": float(get("learning_rate")),
        "optim.lr_rule": get("learning_rate_scaling") if later else "linear", "optim.warmup_epochs": float(get("warmup_epochs")),
        "optim.rule.lars.weight_decay": float(get("weight_decay")), "optim.rule.lars.momentum": float(get("momentum")),
        "method.temperature": float(get("temperature")), "method.embedding": int(get("proj_out_dim" if later else "head_proj_dim")),
        "method.head_layers": int(get("num_proj_layers")) if later else int(get("num_nlh_layers")) + 1,
        "network.depth": int(get("resnet_depth")), "augment.0.size": size,
        "augment.0.jitter.brightness": 0.8 * strength, "augment.0.jitter.contrast": 0.8 * strength,
        "augment.0.jitter.saturation": 0.8 * strength, "augment.0.jitter.hue": 0.2 * strength,
        "augment.0.blur.p": 0.5 if get("use_blur") == "True" else 0.0,
    }  # fmt: skip
    data = show(repository, commit, "data_util.py")
    # The state of June 2020 has both, and takes the multiplicative one unless `color_jitter` is told otherwise.
    settings["augment.0.jitter.additive_brightness"] = not re.search(r"impl='simclrv2'", data)
    return f"google-research/simclr {commit} README.md", settings


def swav(repository, script):
    text = show(repository, SWAV, f"scripts/{script}.sh")
    given = dict(re.findall(r"--(\w+) (.+?) \\\n", text))
    gpus = int(re.search(r"--nodes=(\d+)", text).group(1)) * int(re.search(r"--ntasks-per-node=(\d+)", text).group(1))
    many = lambda key: [number(v) for v in given[key].split()]  # noqa: E731
    crops = many("nmb_crops")
    settings = {
        "train.epochs": int(given["epochs"]), "train.batch": gpus * int(given["batch_size"]), "optim.lr": float(given["base_lr"]),
        "optim.lr_rule": "fixed", "optim.end_lr": float(given["final_lr"]), "optim.warmup_epochs": float(given["warmup_epochs"]),
        "optim.rule.lars.weight_decay": float(given["wd"]), "method.crops": sum(crops), "method.queue": int(given["queue_length"]),
        "method.temperature": float(given["temperature"]), "method.epsilon": float(given["epsilon"]),
        "method.sinkhorn_iterations": int(given["sinkhorn_iterations"]), "method.embedding": int(given["feat_dim"]),
        "method.prototypes": int(given["nmb_prototypes"]), "method.freeze_steps": int(given["freeze_prototypes_niters"]),
    }  # fmt: skip
    if "start_warmup" in given and float(given["warmup_epochs"]) > 0:
        settings["optim.warmup_from"] = float(given["start_warmup"])
    if int(given["queue_length"]) > 0:
        settings["method.queue_from"] = int(given["epoch_queue_starts"])
    for i, repeat in enumerate(crops):
        settings |= {f"augment.{i}.repeat": repeat, f"augment.{i}.size": many("size_crops")[i],
                     f"augment.{i}.area": [many("min_scale_crops")[i], many("max_scale_crops")[i]]}  # fmt: skip
    return f"facebookresearch/swav {SWAV} scripts/{script}.sh", settings


def simsiam(repository, batch):
    text = show(repository, SIMSIAM, "main_simsiam.py")
    default = lambda flag: number(re.search(rf"'--{flag}',.*?default=([\d.e-]+)", text, re.S).group(1))  # noqa: E731
    assert "init_lr = args.lr * args.batch_size / 256" in text
    settings = {
        "train.epochs": int(default("epochs")), "train.batch": batch or int(default("batch-size")), "optim.lr": default("lr"),
        "optim.lr_rule": "linear", "optim.decay": "cosine-per-epoch", "optim.rule.sgd.momentum": default("momentum"),
        "optim.rule.sgd.weight_decay": default("weight-decay"), "method.embedding": default("dim"), "method.hidden": default("pred-dim"),
    }  # fmt: skip
    crop = re.search(r"RandomResizedCrop\((\d+), scale=\(([\d.]+), ([\d.]+)\)\)", text)
    jitter = [float(v) for v in re.search(r"ColorJitter\(([^)]*)\)", text).group(1).split(",")]
    settings |= {"augment.0.size": int(crop.group(1)), "augment.0.area": [number(crop.group(2)), number(crop.group(3))]}
    settings |= {f"augment.0.jitter.{key}": value for key, value in zip(("brightness", "contrast", "saturation", "hue"), jitter)}
    return f"facebookresearch/simsiam {SIMSIAM} main_simsiam.py", settings


def toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("lightly", "solo-learn", "simclr", "swav", "simsiam"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    args = parser.parse_args()
    old, today = "0075cc0", "383d414"
    recipes = {
        "byol-cifar10": solo(args.solo_learn, "byol", "asymmetric"),
        "swav-cifar10": solo(args.solo_learn, "swav", "symmetric"),
        "simclr-imagenette": lightly(args.lightly, "SimCLRModel"),
        "moco-v2-imagenette": lightly(args.lightly, "MocoModel"),
        "simsiam-imagenette": lightly(args.lightly, "SimSiamModel"),
        "swav-imagenette": lightly(args.lightly, "SwaVModel"),
        "simclr-cifar10": simclr(args.simclr, old, "cifar10"),
        "simclr-cifar10-today": simclr(args.simclr, today, "cifar10"),
        "simclr-imagenet-100ep": simclr(args.simclr, old, "imagenet2012"),
        "simclr-imagenet-100ep-today": simclr(args.simclr, today, "imagenet2012"),
        "simsiam-imagenet": simsiam(args.simsiam, None),
        "simsiam-imagenet-256": simsiam(args.simsiam, 256),
    }
    for epochs in (100, 200, 400, 800):
        recipes["swav-imagenet" if epochs == 800 else f"swav-imagenet-{epochs}ep"] = swav(args.swav, f"swav_{epochs}ep_pretrain")
    recipes["swav-imagenet-2x224"] = swav(args.swav, "swav_400ep_2x224_pretrain")
    recipes["swav-imagenet-256"] = swav(args.swav, "swav_400ep_bs256_pretrain")
    recipes["swav-imagenet-256-200ep"] = swav(args.swav, "swav_200ep_bs256_pretrain")
    lines = ["# Made by scripts/goldens/published.py from the repositories that are named."]
    for name, (source, settings) in sorted(recipes.items()):
        lines += ["", f"[{name}]", f'source = "{source}"'] + [f'"{key}" = {toml(value)}' for key, value in settings.items()]
    OUT.write_text("\n".join(lines) + "\n")
    print(f"{OUT.name}: {len(recipes)} recipes, {sum(len(s) for _, s in recipes.values())} settings")


if __name__ == "__main__":
    main()
