"""Evaluate a split from end to end: predictions, table, files and picture."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from swinsmt_jax import checks, models
from swinsmt_jax.config import ExperimentConfig, to_dict
from swinsmt_jax.data import pipeline
from swinsmt_jax.evaluation import kept, published_results
from swinsmt_jax.evaluation.averages import known_groups
from swinsmt_jax.evaluation.looks import Looks
from swinsmt_jax.evaluation.metrics import chosen_metrics
from swinsmt_jax.evaluation.pictures import views_of
from swinsmt_jax.evaluation.results import about_metrics, write_results
from swinsmt_jax.evaluation.scoring import Evaluation
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.evaluation.validation import known_classes, segment_case
from swinsmt_jax.inference.ensemble import decision_of
from swinsmt_jax.inference.grid import LARGEST
from swinsmt_jax.inference.nnunet import NNUNetSegmenter
from swinsmt_jax.inference.provenance import digest_of_network as digest
from swinsmt_jax.inference.segmenter import batch_sharding, left_right_swap, predict_fn
from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.operations import forward_operations
from swinsmt_jax.runtime.workers import Once


def evaluate_split(
    model: Callable,
    config: ExperimentConfig,
    *,
    split: str,
    groups: Mapping[str, Sequence[int]],
    rule: str,
    output: Path,
    limit: int = 0,
    step: int | None = None,
    metrics: Sequence[str] | None = None,
    surface_rule: SurfaceRule | None = None,
    protocol: str | None = None,
    mirror: bool = False,
    segmenter: NNUNetSegmenter | None = None,
    looks: Looks = Looks(),  # noqa: B008
    load: Callable[[], tuple[Callable, NNUNetSegmenter | None]] | None = None,
    workers: int = 1,
    dask: str = "",
) -> str:
    """Segment the cases of a split, write all results, and return the Dice table.

    Written to `output`: per_class.csv, per_case.csv, results.json, overview.png and
    report.html.
    Several processes divide the cases between them, and the first one writes. Scores
    are kept by case until then, so that the same call after a failure continues.

    Args:
        model: the trained network, or the function of the segmenter.
        config: of its experiment; `data.root` holds the cases.
        split: "train", "val" or "test".
        groups: class ids by group, the columns of the table.
        rule: the average that counts as the result, one of `averages.AVERAGES`.
        output: folder, made if missing.
        limit: evaluate only so many cases, the first ones; 0 takes all.
        step: of the checkpoint, for the record.
        metrics, surface_rule, protocol: as in `metrics.chosen_metrics`.
        mirror: average over windows and their mirror images.
        segmenter: of a model folder of nnU-Net; it says how scans are seen.
        looks: what is requested besides scores.
        load: returns `model` and `segmenter` in another process; it can be pickled.
        workers: processes that share the cases by `load`; one is this process itself.
        dask: address of a Dask scheduler, whose workers do it instead.

    Raises:
        SomeFailedError: after all cases, for bad files, and labels unknown to the
            network.
        UserError: for an empty split, or an output path that is not a folder.
    """
    checks.in_range("limit", limit, 0, 10**9)
    looks.require()
    chosen = chosen_metrics(
        metrics,
        surface_rule=surface_rule,
        protocol=protocol,
        confidence=looks.confidence,
    )
    data, names = config.data, config.data.class_names
    classes = pipeline.class_map(data)
    to_data = known_classes(data, classes)
    num_classes = config.model.out_channels if segmenter is None else len(names)
    swap = None
    if segmenter is None:
        swap = left_right_swap(names, num_classes=num_classes) if mirror else None
        network, made = digest(model), f"checkpoint of step {step}"
    else:
        network, mirror = segmenter.network, segmenter.mirror
        made = f"nnU-Net, {', '.join(segmenter.folds)}"

    how = about_metrics(chosen, surface_rule=surface_rule, protocol=protocol)
    decides = {**to_dict(config), "mirror": mirror, "metrics": how}
    decides |= {"network": network, "surfaces": repr(surface_rule)}
    decides |= {"classes": classes.names, **looks.decides}
    so_far = kept.Kept(output, kept.key_of(decides))

    def find():
        cases = pipeline.find_cases(data, split=split)
        if processes.is_first():
            so_far.begin()
        return cases[: limit or None]

    known = names if to_data is None else to_data.names
    settings = {
        "data": data,
        "inference": config.inference,
        "num_classes": num_classes,
        "metrics": chosen,
        "surface_rule": surface_rule,
        "to_data": to_data,
    }
    decision = LARGEST if segmenter else decision_of(config)
    own = _network(lambda: (model, segmenter), swap, decision)
    elsewhere = functools.partial(_network, load, swap, decision)

    def segment():
        return kept.outcomes(
            _Job(Once(elsewhere, own), so_far, settings, looks, known),
            processes.shard(cases),
            title=f"evaluating {split}",
            folder=output,
            **{"workers": workers, "dask": dask},
        )

    cases = processes.run_on_all(find)
    processes.require_same({"cases": [case.name for case in cases]})
    if processes.several():
        whole = processes.run_on_all(lambda: pipeline.fingerprint(cases, whole=True))
        processes.require_same({"the fingerprint of the cases": whole})
    found = processes.unshard(processes.run_on_all(segment))
    results, views = kept.scores_of(found)
    if to_data is not None:
        names, num_classes = to_data.names, to_data.num_classes
    groups = known_groups(groups, num_classes)
    about = {
        "split": split,
        "step": step,
        "data_root": str(data.root),
        "window": list(data.patch_shape),
        "overlap": config.inference.overlap,
        "blend": config.inference.blend,
        "mirror": mirror,
        "spacing": data.spacing,
        "dtype": config.model.dtype,
        "device": ", ".join(sorted({own["device"] for own in found})),
        "parameters": models.count_parameters(config.model),
        # Of a Soft MoE in its dense form.
        "gflop_per_window": forward_operations(config.model, data.patch_shape) / 1e9,
        "seconds_per_scan": statistics.median(r.seconds for r in results),
        **how,
    }
    note = (
        f"{about['parameters'] / 1e6:,.1f} M parameters, "
        f"{about['gflop_per_window']:,.0f} GFLOP a window, "
        f"{about['seconds_per_scan']:.1f} s a scan (median, reading not counted)"
    )
    pages = looks.pages(output, cases, views, names) if processes.is_first() else {}
    table = write_results(
        output,
        Evaluation(results, groups, rule, names),
        views,
        about=about,
        title=f"{len(results)} cases of the split {split!r}, {made}",
        note=note,
        pages=pages,
        reported=published_results.are_of(data.root, [case.name for case in cases]),
    )
    processes.on_first(so_far.end)
    return table


def _network(load, swap, decision):
    """Return the function of a network, and how it sees a case, for `segment_case`."""
    model, segmenter = load()
    if segmenter is None:
        predict = predict_fn(model, left_right_swap=swap)
        return predict, {"decision": decision}
    return model, {
        "view": segmenter.view_of,
        "decision": segmenter.decision,
        "channels": segmenter.plan.channels,
    }


@dataclass(frozen=True)
class _Job:
    """What is done with a case, in this process or another."""

    network: Once[tuple[Callable, dict]]
    so_far: kept.Kept
    settings: Mapping[str, Any]
    looks: Looks
    names: Sequence[str]

    def __call__(self, case):
        found = self.so_far.outcome(case, case.files, self._score)
        return found | {"device": jax.devices()[0].device_kind}

    def _score(self, case):
        predict, seen = self.network()
        sharding = batch_sharding()
        segmented = segment_case(
            predict, case, sharding=sharding, **seen, **self.settings
        )
        usual_ml = self.settings["data"].seen.usual_ml
        result = self.looks.at(segmented, self.names, self.so_far.output, usual_ml)
        return result, views_of(segmented)
