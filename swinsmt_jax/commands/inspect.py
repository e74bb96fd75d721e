"""Describe a folder or file: a run, a store, a dataset, a model folder, weights.

    swinsmt inspect runs/x data/mine_store
    swinsmt inspect Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres
    swinsmt inspect ~/.totalsegmentator/nnunet/results

prints one screen: classes, spacing, cases, steps, scores and origin.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from swinsmt_jax import checks
from swinsmt_jax.data import layouts, meta, nnunet_plan, store
from swinsmt_jax.data.dataset import description_of, open_dataset
from swinsmt_jax.data.spacing import plain, text
from swinsmt_jax.models import registry
from swinsmt_jax.runtime.files import absolute


def define_flags() -> None:
    """Define the command line, which has no flags."""


def main(arguments: list[str]) -> None:
    """Print what each of the folders and files is."""
    checks.require(
        len(arguments) > 1, "give a folder or a file: swinsmt inspect runs/x"
    )
    for given in arguments[1:]:
        print("\n".join(lines_of(absolute(given))))


def lines_of(path: Path) -> Iterator[str]:
    """Yield lines about a folder or a file.

    Raises:
        UserError: for what is not there, or nothing of this program.
    """
    from swinsmt_jax.convert import nnunet_folder

    checks.require(path.exists(), f"{path} does not exist.")
    if path.is_file():
        kind = _exported if path.suffix == ".npz" else _weights
    elif (path / "config.json").is_file():
        kind = _run
    elif nnunet_folder.is_folder(path):
        kind = _nnunet
    elif any(map(nnunet_folder.is_folder, _datasets(path))):
        kind = _models
    else:
        kind = _store if store.is_store(path) else _dataset
    yield from kind(path)


def _classes(names, groups=()):
    yield f"  {len(names)} classes: {', '.join(names)}"
    if groups:
        yield f"  groups: {', '.join(groups)}"


def _run(path):
    from swinsmt_jax.training.checkpoint_folder import ranked, score_of, steps_of
    from swinsmt_jax.training.workdir import CHECKPOINTS, recorded_config

    config = recorded_config(path / "config.json")
    data, root = config.data, path / CHECKPOINTS
    steps, best = steps_of(root), ranked(root)[:1]
    yield f"{path}: a run of {registry.entry_of(config.model).name}"
    yield (
        f"  checkpoints of steps {checks.listed(steps) or 'none'}, of "
        f"{config.training.num_steps}"
    )
    for step in best:
        dice, _ = score_of(root / str(step))
        yield f"  best by validation: step {step}, Dice {dice:.4f}"
    yield f"  trained on {data.root}, fingerprint {data.seen.fingerprint or 'unknown'}"
    own = ""
    if not data.spacing and data.seen.least:
        low, high = data.seen.least, data.seen.most
        own = f": from {text(low)} to {text(high)} mm"
    sides = f"{text(data.spacing)} mm" if data.spacing else "each scan's own"
    yield f"  voxels {sides}{own}, {data.orientation}, HU {data.hu_range}"
    yield f"  patch {data.patch_shape}"
    yield from _classes(data.class_names[1:], data.seen.groups)


def _store(path):
    options, index = store.read_options(path), store.read_json(path / store.INDEX)
    splits = Counter(meta.read(path).values())
    source = index.get("source", {}).get("root", "unknown")
    yield f"{path}: a store made of {source}"
    yield f"  {', '.join(f'{splits[s]} {s}' for s in meta.SPLITS)}"
    yield (
        f"  voxels {text(options.spacing)} mm"
        if options.spacing
        else ("  voxels as each scan has them")
    )
    for key in ("failed", "excluded"):
        if index.get(key):
            yield f"  {key}: {', '.join(index[key])}"
    yield from _classes(options.classes.names[1:], options.classes.groups)


def _dataset(path):
    found = open_dataset(path)
    splits = Counter(found.splits.values())
    layout = layouts.recognised(path, description_of(path)).TITLE
    yield f"{path}: a dataset, its layout {layout}"
    yield f"  {', '.join(f'{splits[s]} {s}' for s in meta.SPLITS)}"
    for name, why in found.refused.items():
        yield f"  refused: {name}: {why}"
    yield from _classes(found.classes.names[1:], found.classes.groups)


def _models(path):
    """Yield lines about a folder of nnU-Net's results, such as TotalSegmentator's."""
    from swinsmt_jax.inference import totalsegmentator

    folders = {folder.name.split("_")[0]: folder for folder in _datasets(path)}
    yield f"{path}: models of nnU-Net v2 for {len(folders)} datasets"
    for spacing, parts in totalsegmentator.TASKS.items():
        lacking = [name for n in parts if (name := f"Dataset{n}") not in folders]
        if len(lacking) < len(parts):
            there = f"lacks {', '.join(lacking)}" if lacking else "complete"
            yield f"  TotalSegmentator's task total at {spacing:g} mm: {there}"
    for folder in folders.values():
        yield from _nnunet(folder)


def _datasets(path):
    """Return folders of datasets in nnU-Net's results, or TotalSegmentator's home."""
    inner = path / "nnunet" / "results"
    root = inner if inner.is_dir() else path
    return sorted(root.glob("Dataset[0-9]*_*"))


def _nnunet(path):
    """Yield lines about a dataset's folder of nnU-Net models, or about one model."""
    from swinsmt_jax.convert import nnunet_finetune, nnunet_folder

    own = [path / nnunet_plan.PLANS]
    if not own[0].is_file():
        own = sorted(path.glob(f"*__*__*/{nnunet_plan.PLANS}"))
    for model in (file.parent for file in own):
        folds = nnunet_folder.folds_of(model)
        yield f"{model}: a model folder of nnU-Net v2"
        yield f"  folds with a final checkpoint: {', '.join(folds) or 'none'}"
        try:
            read = nnunet_folder.read(model, folds=folds[:1])
        except checks.UserError as error:
            yield f"  cannot be used here: {error}"
            continue
        plan, name = read.plan, registry.entry_of(read.network).name
        spacing = nnunet_finetune.spacing_of(read)
        patch = [plan.patch_shape[axis] for axis in nnunet_folder.axes_of_scan(plan)]
        yield f"  {read.configuration}: {name} of {_numbers(read.models[0])} parameters"
        yield f"  voxels {text(spacing)} mm, patch {tuple(patch)}, {plan.modality}"
        regions = ", overlapping regions" if plan.regions else ""
        yield f"  normalised by {plan.normalization.scheme}{regions}"
        yield from _classes(plan.names[1:])


def _numbers(model):
    from swinsmt_jax.convert import torch_state

    return f"{sum(a.size for a in torch_state.to_torch(model).values()):,}"


def _exported(path):
    from swinsmt_jax.inference import portable

    about = portable.load(path).about
    yield f"{path}: an exported network of step {about.get('step')}"
    for key in ("window", "spacing", "orientation", "hu_range", "data"):
        yield f"  {key}: {about.get(key)}"
    if about.get("least"):
        low, high = (text(plain(about[key])) for key in ("least", "most"))
        yield f"  trained at scans' own spacings, from {low} to {high} mm"
    names = about.get("class_names", {}).values()
    yield from _classes(list(names), about.get("groups") or ())


def _weights(path):
    from swinsmt_jax.convert import files

    arrays = files.read(path)
    count = sum(array.size for array in arrays.values())
    yield f"{path}: weights, {len(arrays)} arrays of {count:,} numbers"
    for name in dict.fromkeys([next(iter(arrays)), list(arrays)[-1]]):
        yield f"  {name}: {arrays[name].shape}"
    document = files.read_document(path)
    if isinstance(document, Mapping) and "trainer_name" in document:
        about = document.get("init_args") or {}
        yield (
            f"  a checkpoint of nnU-Net v2: {document['trainer_name']}, "
            f"{about.get('configuration')}; swinsmt inspect {path.parent.parent} says "
            "more"
        )
    names = files.class_names(path)
    if names:
        yield from _classes(names[1:])
    else:
        yield "  its classes have no names"
