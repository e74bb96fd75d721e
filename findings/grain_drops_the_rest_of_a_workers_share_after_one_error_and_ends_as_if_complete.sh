#!/usr/bin/env bash
# grain 0.2.18: an element that raises behind mp_prefetch ends its worker's share. If you catch the error and go
# on (a damaged scan among thousands), you get the other workers' elements and then StopIteration, as if the
# epoch were complete. In one process all other elements arrive, but the end is a repeated IndexError instead of
# StopIteration. Stop at the first error, or return a mark instead of raising.
. "$(dirname "$0")/lib.sh"
need_python 11 12
venv "grain==0.2.18" "jax==0.10.2" "numpy==2.2.6"
cat > run.py <<'PY'
import grain
from absl import flags
from importlib.metadata import version

flags.FLAGS.mark_as_parsed()

class Load(grain.transforms.Map):
    def map(self, number):
        if number == 5:
            raise ValueError("scan 5 is damaged")
        return number

def seen(workers):
    data = grain.MapDataset.range(12).map(Load()).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator, got, raised = iter(data), [], []
    while len(raised) < 4:
        try:
            got.append(int(next(iterator)))
        except Exception as error:
            raised.append(type(error).__name__)
            if raised[-1] == "StopIteration":
                break
    return got, raised

if __name__ == "__main__":
    print("grain", version("grain"))
    alone, two = seen(0), seen(2)
    print("one process: ", *alone)
    print("two workers: ", *two)
    rest = [n for n in range(12) if n != 5]
    as_stated = alone == (rest, ["ValueError"] + ["IndexError"] * 3)
    as_stated &= two == ([0, 1, 2, 3, 4, 6, 8, 10], ["ValueError", "StopIteration"])
    raise SystemExit(not as_stated)
PY
"$py" run.py 2>/dev/null
