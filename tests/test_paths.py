"""How long the ways through the package are; see `benchmarks.paths`."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from benchmarks import config_way, paths

ROOT = Path(__file__).resolve().parents[1]
PATHS = {  # at most; lower them when the ways become shorter
    "training_files": 75,
    "training_functions": 653,
    "prediction_files": 53,
    "prediction_functions": 414,
}
WAY = {"stays": 105, "stays_of_the_whole": 20, "moves": 47, "climbs": 24}


@pytest.mark.slow
def test_a_step_and_a_prediction_enter_few_files_and_functions(tmp_path):
    file = tmp_path / "paths.json"
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.paths", "--quick", f"--json={file}"],
        **{"cwd": ROOT, "capture_output": True, "text": True},
        env=os.environ | cache,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert set(found["headline"]) == set(PATHS)
    for name, most in PATHS.items():
        assert 0 < found["headline"][name] <= most, name
    for part, name in (("training", "step"), ("prediction", "segmenter")):
        assert any(name in Path(f).stem for f in found[part]["files"]), found[part]


def test_the_config_makes_few_stays_moves_and_climbs():
    found = config_way.follow(ROOT, start=paths.START)
    assert set(found) == set(WAY)
    for name, most in WAY.items():
        assert 0 < found[name] <= most, name


def test_stays_moves_and_climbs_are_counted_as_described(tmp_path):
    sources = {
        "script.py": """
            from swinsmt_jax.config import ExperimentConfig, read
            from swinsmt_jax.room import inner

            def main():
                inner.use(read())
        """,
        "swinsmt_jax/config.py": """
            class ExperimentConfig:
                data: DataConfig

            def read() -> ExperimentConfig:
                pass
        """,
        "swinsmt_jax/checks.py": """
            def require(condition, message):
                pass
        """,
        "swinsmt_jax/room/inner.py": """
            from swinsmt_jax import checks

            def use(config):
                _part(config.data, count=1)
                _part(config.data, count=2)
                _nothing(1)

            def _part(data, *, count):
                checks.require(data.side > 0, "a value that is made of the config")

            def _nothing(number):
                pass
        """,
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    found = config_way.follow(tmp_path, start=("script", "main"))
    assert found == {"stays": 2, "stays_of_the_whole": 1, "moves": 2, "climbs": 1}
