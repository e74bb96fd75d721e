#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, CheckpointManager(best_fn=..., best_mode="max"): one NaN among the metrics makes a
# later, worse checkpoint the best one. After 0.9, NaN, 0.1, 0.2, best_step() is the step of 0.2, and
# max_to_keep=1 deletes the checkpoint of 0.9, which is kept without the NaN. Anyone who validates on a
# few cases loses the best network once no case has a class. Save such a step without metrics.
. "$(dirname "$0")/lib.sh"
need_python 11 12
venv "orbax-checkpoint==0.12.8" "jax==0.10.2" "numpy==2.2.6"
cat > run.py <<'PY'
import sys, jax.numpy as jnp, orbax.checkpoint as ocp
from importlib.metadata import version

def best(folder, metrics):
    options = ocp.CheckpointManagerOptions(best_fn=lambda m: m["dice"], best_mode="max", max_to_keep=1)
    with ocp.CheckpointManager(f"{sys.argv[1]}/{folder}", options=options) as manager:
        for step, dice in enumerate(metrics, start=1):
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.ones(2)}), metrics={"dice": dice})
        manager.wait_until_finished()
        return manager.best_step(), manager.all_steps()

print("orbax-checkpoint", version("orbax-checkpoint"))
found = {str(m): best(i, m) for i, m in enumerate(([0.9, 0.3, 0.1, 0.2], [0.9, float("nan"), 0.1, 0.2]))}
for metrics, (step, kept) in found.items():
    print(f"metrics {metrics}: best step {step}, kept {list(kept)}")
raise SystemExit([step for step, _ in found.values()] != [1, 4])
PY
"$py" run.py "$here" 2>/dev/null
