"""Size and time of each form in which labels of a whole body are written.

    python -m benchmarks.output_formats [--quick] [--json=FILE]

A phantom's CT is written as a DICOM series, and its 117 structures in each form that
`predict.py` offers, and in others for comparison. RLE and deflating are what
`predict.py` does with LABELMAP and BINARY.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import markdown_table, run, save
from swinsmt_jax.data import dicom, label_table, nifti
from swinsmt_jax.labels import CLASS_NAMES
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.results import dicom_seg, meshes, viewer
from swinsmt_jax.results.result import Result

NAMES = dict(enumerate(CLASS_NAMES[1:], start=1))


def write_series(folder: Path, volume: nifti.Volume) -> None:
    """Write an axial CT series of a volume, head last."""
    import pydicom

    columns, rows, count = volume.array.shape
    sides = volume.spacing
    left_back = -(
        volume.affine[:2, 3]
        + np.array([(columns - 1) * sides[0], (rows - 1) * sides[1]])
    )
    hu = volume.array[::-1, ::-1].transpose(2, 1, 0) + 1024
    folder.mkdir()
    for i in range(count):
        found = pydicom.Dataset()
        found.SOPClassUID = pydicom.uid.CTImageStorage
        found.SOPInstanceUID = f"1.2.3.4.{i + 1}"
        found.StudyInstanceUID, found.SeriesInstanceUID = "1.2.3", "1.2.3.4"
        found.FrameOfReferenceUID, found.Modality = "1.2.3.5", "CT"
        found.InstanceNumber = i + 1
        height = volume.affine[2, 3] + i * sides[2]
        found.ImagePositionPatient = [*np.round(left_back, 6).tolist(), float(height)]
        found.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        found.PixelSpacing, found.SliceThickness = [sides[1], sides[0]], sides[2]
        found.RescaleSlope, found.RescaleIntercept = 1, -1024
        found.PhotometricInterpretation, found.SamplesPerPixel = "MONOCHROME2", 1
        found.BitsAllocated, found.BitsStored, found.HighBit = 16, 16, 15
        found.PixelRepresentation = 0
        found.Rows, found.Columns = rows, columns
        found.PixelData = np.ascontiguousarray(hu[i], np.uint16).tobytes()
        found.file_meta = pydicom.dataset.FileMetaDataset()
        found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        found.save_as(folder / f"{i:04}.dcm", enforce_file_format=True)


def in_syntax(path: Path, target: Path, *, deflated: bool) -> None:
    """Write a DICOM file raw, or deflated as a whole."""
    import pydicom

    found = pydicom.dcmread(path)
    if found.file_meta.TransferSyntaxUID.is_encapsulated:
        found.decompress(generate_instance_uid=False)
    uid = pydicom.uid
    syntax = uid.DeflatedExplicitVRLittleEndian if deflated else None
    found.file_meta.TransferSyntaxUID = syntax or uid.ExplicitVRLittleEndian
    found.save_as(target)


def size_of(path: Path) -> int:
    """Return the bytes of a file or of a folder's files."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def main(options: flags.FlagValues) -> None:
    """Measure, print the table and write the report."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        spacing = 6.0 if options.quick else 2.0
        write_dataset(root / "p", train=1, val=1, test=1, spacing=spacing, seed=0)
        ct = max(root.glob("p/s*/ct.nii.gz"), key=lambda file: file.stat().st_size)
        write_series(root / "series", nifti.load_ct(ct))
        volume = dicom.load_series(root / "series")
        labels = nifti.load_labels(ct.with_name("segmentations.nii.gz"), on=volume)
        result = Result(volume, labels.array, NAMES)
        table = label_table.xml(NAMES)

        def save_labels(path):
            nifti.save_labels(path, labels.array, like=volume, description=table)

        def write_masks(path):
            path.mkdir()
            for number, name in NAMES.items():
                mask = (labels.array == number).astype(np.uint8)
                nifti.save(path / f"{name}.nii.gz", mask, like=volume)

        forms = {
            "labels.nii.gz": save_labels,
            "labels.nii": save_labels,
            "labels.nrrd": save_labels,
            "labels.mha": save_labels,
            "masks": write_masks,
            "labelmap.dcm": lambda path: dicom_seg.write(path, result, "labelmap"),
            "binary.dcm": lambda path: dicom_seg.write(path, result, "binary"),
            "mesh_stl": lambda path: meshes.write(path, result, "stl"),
            "view.html": lambda path: viewer.write(path, result),
        }
        rows = []
        for form, make in forms.items():
            start = time.perf_counter()
            make(root / form)
            seconds = time.perf_counter() - start
            size = size_of(root / form)
            rows.append({"form": form, "megabytes": size / 1e6, "seconds": seconds})
        for form, source, deflated in (
            ("labelmap_raw.dcm", "labelmap.dcm", False),
            ("labelmap_deflated.dcm", "labelmap.dcm", True),
            ("binary_raw.dcm", "binary.dcm", False),
        ):  # not written by predict.py
            in_syntax(root / source, root / form, deflated=deflated)
            size = size_of(root / form) / 1e6
            rows.append({"form": form, "megabytes": size, "seconds": None})
        lines = [
            (r["form"], f"{r['megabytes']:.2f}", _text(r["seconds"])) for r in rows
        ]
        print(f"{len(result.boxes)} structures in {volume.array.shape} voxels\n")
        print(markdown_table(("", "MB", "s"), lines))
        sizes = {f"{r['form']}_mb": r["megabytes"] for r in rows}
        save(sizes, rows=rows, shape=volume.array.shape, structures=len(result.boxes))


def _text(seconds):
    return "" if seconds is None else f"{seconds:.1f}"


if __name__ == "__main__":
    run(main, quick="voxels of 6 mm instead of 2 mm")
