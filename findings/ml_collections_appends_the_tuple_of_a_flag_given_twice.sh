#!/usr/bin/env bash
# ml_collections 1.1.0 (absl-py 2.5.1): of a number given by two flags the last one counts, but the tuples of two
# flags are joined. --config.sides="(4,5)" --config.sides="(6,)" is (4, 5, 6), and nothing is said. A launch script
# that has a default flag and appends the user's gets another network or frozen part than either of them asks for.
# Keep only the last flag of each key before absl parses them.
. "$(dirname "$0")/lib.sh"
venv "ml_collections==1.1.0" "absl-py==2.5.1"
cat > run.py <<'PY'
from importlib.metadata import version

from absl import app
from ml_collections import config_dict, config_flags

DEFAULT = config_dict.ConfigDict({"sides": (1, 2), "steps": 3})
CONFIG = config_flags.DEFINE_config_dict("config", DEFAULT)


def main(_):
    found = CONFIG.value
    print("ml_collections", version("ml_collections"), "absl-py", version("absl-py"))
    print("sides", found.sides, "steps", found.steps)
    raise SystemExit((found.sides, found.steps) != ((4, 5, 6), 9))


app.run(main)
PY
"$py" run.py "--config.sides=(4,5)" "--config.sides=(6,)" --config.steps=8 --config.steps=9
