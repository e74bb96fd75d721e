#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: below a folder with [...] in its name, a save reports success, but the checkpoint cannot
# be restored. Orbax finds the files of its processes by a pattern in which brackets have a meaning, so
# it merges nothing. If you name runs after their settings ("run[lr=1e-3]"), you train to the end and have no
# network. Read the first checkpoint of a run back, or keep brackets out of paths.
. "$(dirname "$0")/lib.sh"
need_python 11 12
venv "orbax-checkpoint==0.12.8" "jax==0.10.2" "numpy==2.2.6"
cat > run.py <<'PY'
import sys, jax.numpy as jnp, orbax.checkpoint as ocp
from importlib.metadata import version

def restored(folder):
    tree = {"w": jnp.arange(4.0)}
    with ocp.CheckpointManager(f"{sys.argv[1]}/{folder}") as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        steps = list(manager.all_steps())
        try:
            manager.restore(1, args=ocp.args.StandardRestore(tree))
            return steps, "restored"
        except Exception as error:
            return steps, type(error).__name__

print("orbax-checkpoint", version("orbax-checkpoint"))
seen = {name: restored(name) for name in ("run", "run[lr]")}
for name, (steps, what) in seen.items():
    print(f"folder {name!r}: steps listed after the save {steps}, then {what}")
raise SystemExit(not (seen["run"] == ([1], "restored") and seen["run[lr]"][0] == [1] and seen["run[lr]"][1] != "restored"))
PY
"$py" run.py "$here" 2>/dev/null
