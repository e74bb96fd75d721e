"""The documentation cites benchmarks that are there, with flags that they have."""

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CITING = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile"]
HELPERS = ("__init__", "model_worker")  # of which the table of options tells
CITED = r"benchmarks[./](\w+)(?:\.py)?((?:\s+(?:\\\n\s*)?--[^\s`,)]+)*)"
BENCHMARKS = sorted(
    file.stem
    for file in (ROOT / "benchmarks").glob("*.py")
    if "    run(main, quick=" in file.read_text()
)


def cited():
    """The benchmarks that documentation names, with the flags given there."""
    found = {}
    for file in CITING:
        for name, rest in re.findall(CITED, file.read_text()):
            if name not in ("results", "NOTES", *HELPERS):
                found.setdefault(name, set()).update(re.findall(r"--(\w+)", rest))
    return found


def test_every_benchmark_that_is_cited_exists():
    assert len(cited()) >= 10 and cited().keys() <= set(BENCHMARKS)


# Each in a fork of one process, so that jax is imported once.
HELP = """
import os, pathlib, runpy, sys, traceback
import benchmarks.trials
for name in sys.argv[2:]:
    if os.fork() == 0:
        sys.stdout = (pathlib.Path(sys.argv[1]) / name).open("w")
        sys.argv = [f"benchmarks/{name}.py", "--help"]
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.close()
        os._exit(0)  # at once: to free what was imported takes longer
    os.wait()
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """Folder of the --help of every benchmark."""
    folder = tmp_path_factory.mktemp("help")
    command = [sys.executable, "-c", HELP, str(folder), *BENCHMARKS]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_the_flags_that_are_said(name, helps):
    """Those of its docstring and of the documentation, --quick and --json."""
    text = ast.get_docstring(ast.parse((ROOT / f"benchmarks/{name}.py").read_text()))
    said = set(re.findall(r"--(\w+)", text))
    assert {"quick", "json"} <= said and f"python -m benchmarks.{name}" in text
    help = (helps / name).read_text()
    has = set(re.findall(r"^  --(?:\[no\])?(\w+)", help, re.MULTILINE))
    has |= {f"no{flag}" for flag in has}
    assert said | cited().get(name, set()) <= has, help


def test_the_index_and_the_site_list_each_page():
    pages = {file.name for file in (ROOT / "docs").glob("*.md")}
    index = (ROOT / "docs/README.md").read_text()
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|", index, re.MULTILINE)
    assert sorted(rows) == [(page, page) for page in sorted(pages - {"README.md"})]
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"]
    assert sorted(_pages(nav)) == sorted(pages)


def _pages(nav):
    """The files of a navigation, whose sections are lists."""
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else _pages(target)


# What sets an option of XLA or JAX: in Python, in a shell, in an image, in a manifest.
OPTION = r"\b(?:XLA|JAX|TF_CPP)_[A-Z_]+"
SETTING = (
    rf"""config\.update\(\s*"jax_|compiler_options\(platform|= "XLA_FLAGS"|"""
    rf"""{OPTION}"\] =|setdefault\("{OPTION}|"{OPTION}": |{OPTION}=|{OPTION}, value:"""
)


def test_the_table_of_options_names_each_file_that_sets_one():
    page = (ROOT / "docs/performance.md").read_text().split("## XLA flags")[1]
    rows = re.findall(r"^\| (`.*?`.*?) \| .* \| .* \|$", page, re.MULTILINE)
    told = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    files = [*ROOT.glob("*.py"), ROOT / "Makefile", *(ROOT / "launch").iterdir()]
    for folder in ("swinsmt_jax", "benchmarks", "examples"):
        files += (ROOT / folder).rglob("*.py")
    found = set()
    for file in (file for file in files if file.is_file()):
        name = str(file.relative_to(ROOT)).removeprefix("swinsmt_jax/")
        if re.search(SETTING, file.read_text()):
            found.add(name)
            assert any(fnmatch.fnmatch(name, row) for row in told), name
    for row in told:
        assert fnmatch.filter(found, row), row


BACKED = {  # each row of docs/formats.md, and a test of what it says
    "`.nii`, `.nii.gz`, NIfTI-1 and 2": "test_every_orientation_loads_as_the_same_ras_",
    "sform and qform, codes above 0": "test_ct_and_labels_lie_in_one_place_in_every_",
    "qform alone": "test_ct_and_labels_lie_in_one_place_in_every_reader",
    "both codes 0": "test_ct_and_labels_lie_in_one_place_in_every_reader",
    "a qform that cannot be read": "test_a_qform_that_cannot_be_read_is_a_note",
    "axes that are not at right angles": "test_ct_and_labels_lie_in_one_place_in_",
    "`pixdim` unlike": "test_ct_and_labels_lie_in_one_place_in_every_reader",
    "lengths in metres": "test_ct_and_labels_lie_in_one_place_in_every_reader",
    "axes of length one": "test_ct_and_labels_lie_in_one_place_in_every_reader",
    "4-D with several volumes": "test_bad_volumes_are_refused_by_name",
    "an affine that cannot": "test_affine_that_cannot_be_inverted_is_refused",
    "NaN or infinite": "test_bad_volumes_are_refused_by_name",
    "truncated, damaged": "test_damage_that_only_the_checksum_shows_is_refused",
    "slope and intercept": "test_ids_that_are_stored_with_a_slope_are_rounded",
    "values unlike HU": "test_values_unlike_hounsfield_units_are_told",
    "label names in the header": "test_ids_are_mapped_by_the_names_of_the_header",
    "masks: 0 and 1": "test_a_resampled_mask_is_thresholded_with_a_note",
    "labels off the grid": "test_a_grid_is_compared_before_voxels_are_read",
    "labels of a dataset cut": "test_labels_that_were_cut_to_a_box_are_put_in_place",
    "one series of a CT": "test_each_slice_has_its_own_rescaling_whatever_comes_",
    "tilted gantry": "test_a_series_is_the_volume_that_its_slices_say",
    "scouts, reports": "test_what_is_no_slice_is_named",
    "enhanced CT": "test_frames_of_an_enhanced_ct_have_their_own_place_and_",
    "many series in one folder": "test_one_series_of_many_is_chosen_or_named",
    "slices that differ": "test_bad_series_are_refused",
    "a single slice": "test_a_single_slice_is_as_thick_as_its_tags_say",
    "labels, `.nii.gz`": "test_simpleitk_reads_label_files_in_their_places",
    "probabilities, `.nii.gz`": "test_simpleitk_scales_probabilities",
    "DICOM-SEG, LABELMAP": "test_dcmqi_reads_117_segments_in_their_places",
    "DICOM-SEG, BINARY": "test_highdicom_reads_117_segments_in_their_places",
    "surfaces, `.stl`": "test_vtk_reads_surfaces_with_outward_faces",
    "RTSTRUCT is not written": "test_rt_utils_exchanges_the_sides_of_pixels",
    "the lists of the first fold": "test_what_a_fold_of_nnunet_says_of_cases_is_kept",
    "a channel that is not a CT": "test_what_of_nnunet_is_not_supported_is_said",
    "nnU-Net's ignore label": "test_the_ignore_label_of_nnunet",
    "class names with": "test_names_become_safe_file_names",
}


ENDS = ("| elsewhere |", "is done |", "| rt-utils |")  # of headings


def test_a_test_stands_behind_each_row_of_the_formats():
    lines = (ROOT / "docs/formats.md").read_text().splitlines()
    rows = [line[2:] for line in lines if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith(ENDS)]
    tests = "".join(f.read_text() for f in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        assert [start for start in BACKED if row.startswith(start)], row
    for start, test in BACKED.items():
        assert sum(row.startswith(start) for row in rows) == 1, start
        assert f"\ndef {test}" in tests, test
