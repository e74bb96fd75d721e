"""Which expert looks where, on a scan; see `benchmarks.soft_moe`."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib import colors
from matplotlib.figure import Figure

from benchmarks import save
from benchmarks.expert_use import network_image
from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import nifti, pipeline
from swinsmt_jax.data.meta import SPLITS
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.data.volume import spacing_of
from swinsmt_jax.evaluation import routing
from swinsmt_jax.training.checkpoint import load_model

flags.disclaim_key_flags()  # they are the benchmark's
UNUSED = 1e-3  # an expert's share in every group, at most, if nothing looks at it


def choose_case(cases, name):
    """Return the case of that name, or the first."""
    names = [case.name for case in cases]
    if name is None:
        return cases[0]
    checks.one_of("--case", name, names)
    return cases[names.index(name)]


def case_of(
    data: DataConfig, *, split: str, name: str | None
) -> tuple[Sample, Mapping[str, Sequence[int]]]:
    """Return a case of a dataset or a store as the network sees it, and its groups.

    Where the data have no groups, all their classes are one.
    """
    case = choose_case(pipeline.find_cases(data, split=split), name)
    sample = pipeline.load_foreground(data, case)
    classes = pipeline.class_map(data)
    groups = classes.groups or {"structures": range(1, classes.num_classes)}
    return replace(sample, image=network_image(data, sample)[..., 0]), groups


def group_map(label, groups):
    """Return the number of each voxel's group, from 1; 0 is background."""
    numbers = np.zeros_like(label)
    for number, ids in enumerate(groups.values(), start=1):
        numbers[np.isin(label, list(ids))] = number
    return numbers


def draw(path, sample, experts, num_experts, groups):
    """Draw CT, groups and experts in the planes with most anatomy."""
    count, groups = len(groups), group_map(sample.label, groups)
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, axis in zip(figure.subplots(2, 3), (1, 2), strict=True):
        others = tuple(a for a in range(3) if a != axis)
        index = int((groups > 0).sum(others).argmax())
        across, up = (spacing_of(sample.affine)[a] for a in others)

        def rows(a, axis=axis, index=index):
            return a.take(index, axis=axis)[::-1, ::-1].T

        grey = rows(sample.image)
        shown = [("CT", None, 1), ("groups of the truth", rows(groups), count)]
        shown += [("expert with the largest share", rows(experts), num_experts)]
        for picture, (title, numbers, count) in zip(axes, shown, strict=True):
            picture.imshow(grey, cmap="gray", aspect=up / across)
            if numbers is not None:
                hues = np.arange(count) * 0.618 % 1
                palette = colors.ListedColormap(
                    colors.hsv_to_rgb(np.stack([hues, hues * 0 + 0.8, hues * 0 + 1], 1))
                )
                picture.imshow(
                    np.ma.masked_equal(numbers, 0),
                    cmap=palette,
                    vmin=0.5,
                    vmax=count + 0.5,
                    alpha=0.55,
                    interpolation="nearest",
                    aspect=up / across,
                )
            picture.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def write_table(path, by_group):
    """Write and print the mean share of each expert in each group."""
    names = list(by_group)
    count = len(by_group[names[0]])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["expert", *names])
        for e in range(count):
            writer.writerow([e + 1, *(f"{by_group[n][e]:.6f}" for n in names)])
    print("expert " + " ".join(f"{n:>10}" for n in names))
    for e in range(count):
        print(f"{e + 1:6} " + " ".join(f"{by_group[n][e]:10.3f}" for n in names))


def headline(rows):
    """Return how many experts of each block have no share to speak of."""
    found = {}
    for row in rows:
        most = np.max(list(row["shares"].values()), axis=0)
        name = row["block"].replace("/", "_")
        found[f"experts_without_share_{name}"] = int((most < UNUSED).sum())
    return found


def draw_maps(options) -> None:
    """Write maps, pictures and tables of the run in --maps_of."""
    workdir = Path(options.maps_of)
    config, model, _ = load_model(workdir)
    data = config.data
    if options.data_root:  # the training's description is of its own data
        root, about = options.data_root, options.description
        data = replace(data, root=root, description=about, fold=-1)
    checks.require(
        config.model.num_experts > 0,
        f"{workdir} holds a network without experts; take a run of a Swin SMT.",
    )
    sample, groups = case_of(data, split=options.split, name=options.case)
    output = Path(options.output or workdir / "routing")
    output.mkdir(parents=True, exist_ok=True)
    blocks = [options.block] if options.block else list(config.model.moe_strides)
    rows = []
    for block in blocks[:1] if options.quick else blocks:
        shares = routing.expert_shares(
            model,
            config.model,
            sample.image[..., None],
            block=block,
            window=config.data.patch_shape,
            inference=config.inference,
        )
        experts = (shares.argmax(-1) + 1).astype(np.uint8)
        stem = f"{sample.name}_{block.replace('/', '_')}"
        nifti.write(output / f"{stem}_experts.nii.gz", experts, sample.affine)
        if options.shares:
            nifti.write(output / f"{stem}_shares.nii.gz", shares, sample.affine)
        draw(output / f"{stem}.png", sample, experts, config.model.num_experts, groups)
        print(block)
        by_group = routing.shares_by_group(shares, sample.label, groups=groups)
        write_table(output / f"{stem}.csv", by_group)
        of_groups = {name: np.asarray(s).tolist() for name, s in by_group.items()}
        rows.append({"block": block, "case": sample.name, "shares": of_groups})
    save(headline(rows), rows=rows)
    print(f"written to {output}")


def define_flags() -> None:
    """Define what chooses case and block."""
    flags.DEFINE_string("maps_of", None, "draw the routing of this training run")
    flags.DEFINE_enum("split", "test", SPLITS, "split of the case")
    flags.DEFINE_string("case", None, "name of the case; by default the first")
    flags.DEFINE_string("block", None, "such as stage3/block0; by default all")
    flags.DEFINE_string("data_root", None, "data folder, if not the training's")
    flags.DEFINE_string("description", "", "of --data_root, as data.description")
    flags.DEFINE_string("output", None, "folder; by default <workdir>/routing")
    flags.DEFINE_bool("shares", False, "also write the shares of all experts")
