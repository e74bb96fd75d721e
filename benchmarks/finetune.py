"""Compare a run that starts from a model folder of nnU-Net with one from scratch.

    python -m benchmarks.finetune [--quick] [--folder=MODEL] [--steps=100] [--json=FILE]

Both use `configs/nnunet_finetune.py` on the same phantoms for the same steps, and are
evaluated on others. Without --folder, a small network is first trained for
--source_steps and written as a model folder. Its phantoms have another seed and other
classes, except for two.
"""

import functools
import json
import tempfile
from pathlib import Path

from absl import flags

from benchmarks import markdown_table, run, save, show

OWN = ("liver", "lung_lower_lobe_left", "brain", "heart")
THEIRS = ("liver", "heart", "lung_lower_lobe_right", "hip_left")
SPACING = (12.0, 12.0, 18.0)


def store_of(root: Path, name: str, *, seed: int, classes: tuple, cases: int) -> Path:
    """Make phantoms and a store of some of their classes."""
    from swinsmt_jax.data.preprocess import preprocess
    from swinsmt_jax.phantoms.dataset import write_dataset

    write_dataset(
        root / f"{name}_data", train=cases, val=1, test=3, spacing=12, seed=seed
    )
    preprocess(
        root / f"{name}_data", root / name, spacing=SPACING, classes=list(classes)
    )
    return root / name


def source_folder(root: Path, *, steps: int, cases: int) -> Path:
    """Train a small plain U-Net, and write it as a model folder of nnU-Net."""
    from swinsmt_jax.config import from_config_dict
    from swinsmt_jax.configs import nnunet_finetune
    from swinsmt_jax.convert import command
    from swinsmt_jax.training import loop

    store = store_of(root, "source", seed=0, classes=THEIRS, cases=cases)
    values = nnunet_finetune.get_config()
    values.model = {
        **{"name": "nnunet_plain", "in_channels": 1, "out_channels": len(THEIRS) + 1},
        **{"features_per_stage": (8, 16, 32), "strides": (1, 2, 2)},
        "dtype": "float32",
    }
    values.data.update({"patch_shape": (32, 24, 24), "batch_size": 2})
    values.data.update({"hu_range": (-900.0, 900.0), "normalization": (60.0, 300.0)})
    config = from_config_dict(_short(values, store, steps))
    loop.train(config, workdir=root / "source_run")
    command.to_nnunet(
        workdir=str(root / "source_run"), output=str(root / "Dataset001_S"), step=None
    )
    return root / "Dataset001_S"


def _short(values, store, steps):
    values.data.update({"root": str(store), "cache": False, "num_threads": 2})
    values.data.update({"spacing": 0.0, "foreground_ratio": 0.8})
    values.optimizer.update({"learning_rate": 3e-3, "warmup_steps": min(10, steps)})
    values.training.update({"num_steps": steps, "eval_every": 0, "log_every": 10})
    values.mesh = {"data": 1, "expert": 1}
    return values


def dice_after(root: Path, name: str, config, start_from=None) -> dict[str, float]:
    """Train a run and return its Dice on the test cases by class."""
    from swinsmt_jax.evaluation.evaluate_split import evaluate_split
    from swinsmt_jax.training import loop
    from swinsmt_jax.training.checkpoint import load_model

    loop.train(config, workdir=root / name, start_from=start_from)
    config, model, info = load_model(root / name)
    evaluate_split(
        model,
        config,
        split="test",
        groups={},
        rule="over_classes",
        output=root / f"{name}_eval",
        metrics=["dice"],
        step=info["step"],
    )
    found = json.loads((root / f"{name}_eval/results.json").read_text())
    return {"all": found["dice"]["overall"], **_by_class(found["cases"])}


def _by_class(cases):
    scores: dict = {}
    for case in cases.values():
        for name, value in case["dice"].items():
            if value is not None:
                scores.setdefault(name, []).append(value)
    return {name: sum(own) / len(own) for name, own in scores.items()}


def main(options: flags.FlagValues) -> None:
    """Train both, print the table and write the report."""
    from swinsmt_jax.configs import nnunet_finetune as config_file
    from swinsmt_jax.convert import nnunet_finetune, starting_point
    from swinsmt_jax.data import store

    quick = options.quick
    steps = 2 if quick else options.steps
    cases = 2 if quick else 10
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = options.folder or source_folder(
            root, steps=2 if quick else options.source_steps, cases=cases
        )
        data = store_of(root, "own", seed=1, classes=OWN, cases=cases)
        values = _short(config_file.get_config(), data, steps)
        values.model.update({"dtype": "float32", "remat": ()})
        config = nnunet_finetune.planned(values, str(source))
        names = store.read_options(data).classes.names
        begin = functools.partial(starting_point.start_from, str(source), names=names)
        rows = {
            "from the folder": dice_after(root, "tuned", config, begin),
            "from scratch": dice_after(root, "scratch", config),
        }
    columns = list(rows["from scratch"])
    table = [
        (name, *(f"{100 * row.get(c, float('nan')):.1f}" for c in columns))
        for name, row in rows.items()
    ]
    print(markdown_table((f"Dice after {steps} steps", *columns), table))
    tuned, scratch = (row["all"] for row in rows.values())
    headline = {"tuned": tuned, "scratch": scratch, "gain": tuned - scratch}
    show(headline)
    save(headline, rows=rows)


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "model folder of nnU-Net to begin with")
    flags.DEFINE_integer("steps", 100, "of both runs")
    flags.DEFINE_integer("source_steps", 500, "of the folder's own training")
    run(main, quick="two steps on two phantoms")
