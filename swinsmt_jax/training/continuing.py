"""What a continued run may change, and what the log says about it."""

from dataclasses import replace
from pathlib import Path

from absl import logging

from swinsmt_jax.config import ExperimentConfig, from_config_dict
from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.files import absolute
from swinsmt_jax.training.checkpoint_folder import DamagedError, meta_of, steps_of
from swinsmt_jax.training.optimizer import make_schedule
from swinsmt_jax.training.workdir import CHECKPOINTS, differing, is_silent

EXTENDED = {
    "stretch": "is stretched over all steps, so it rises again",
    "constant": "stays at its last rate",
    "restart": "begins again, with its warm-up",
}


def continued(
    workdir: str | Path, config: ExperimentConfig
) -> tuple[ExperimentConfig, dict[str, list]]:
    """Return the config with the schedule of a continued run, and the changes.

    The checkpoint holds the run's earlier config. Without one, nothing changes.

    Returns:
        The config, and {key: [before, now]} of keys that affect learning or validation.
    """
    before, done = processes.run_on_all(lambda: _before(absolute(workdir)))
    if before is None:
        return config, {}
    old, stop = before.optimizer, config.training.num_steps
    length = before.training.num_steps
    spans, extend = old.spans, old.extend
    if stop > length:
        extend = config.optimizer.extend
        spans = {
            "stretch": (),
            "restart": (*spans, length),
            "constant": (*spans, length)[:1],
        }[extend]
    optimizer = replace(config.optimizer, spans=spans, extend=extend)
    config = replace(config, optimizer=optimizer)
    if stop > length and processes.is_first():
        rates = [
            float(make_schedule(own, num_steps=steps)(done))
            for own, steps in ((old, length), (optimizer, stop))
        ]
        logging.warning(
            "training.num_steps grows from %d to %d: the learning rate %s, from %.2g "
            "to %.2g at step %d (optimizer.extend=%s; the choices are %s)",
            *(length, stop, EXTENDED[extend], *rates, done, extend),
            ", ".join(EXTENDED),
        )
    changed = {
        key: list(values)
        for key, values in differing(before, config).items()
        if not is_silent(key)
    }
    if changed and processes.is_first():
        told = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
        logging.warning("the run continues with other settings: %s", "; ".join(told))
    return config, changed


def _before(workdir):
    """Return the config of the latest checkpoint that can be read, and its step."""
    for step in reversed(steps_of(workdir / CHECKPOINTS)):
        try:
            meta = meta_of(workdir / CHECKPOINTS / str(step))
            return from_config_dict(meta["config"]), step
        except DamagedError:  # told, and put aside, when the state is read
            continue
    return None, 0
