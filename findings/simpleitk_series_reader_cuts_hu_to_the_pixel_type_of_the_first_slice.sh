#!/usr/bin/env bash
# SimpleITK 2.5.7, ImageSeriesReader: the volume takes its pixel type from the first file. If the first slice has an
# integer slope and intercept and a later one does not (scanners rescale slice by slice), the later HU are
# truncated towards zero to integers, without a warning. In the other order they are kept.
# Reading a PET-CT or dual-energy series loses up to one unit per voxel. Read slice by slice.
. "$(dirname "$0")/lib.sh"
venv "SimpleITK==2.5.7" "pydicom==3.0.2" "numpy==2.2.6"
cat > run.py <<'PY'
import numpy as np, pydicom, SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset

def write(path, z, slope, intercept):
    ct = Dataset()
    tags = dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.2", SOPInstanceUID=f"1.2.3.{z + 1}", SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2",
                Modality="CT", InstanceNumber=z + 1, ImagePositionPatient=[0, 0, z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                PixelSpacing=[1, 1], SliceThickness=1, RescaleSlope=slope, RescaleIntercept=intercept, Rows=4, Columns=5,
                SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15,
                PixelRepresentation=0, PixelData=np.full((4, 5), 1001, np.uint16).tobytes())
    for name, value in tags.items():
        setattr(ct, name, value)
    ct.file_meta = FileMetaDataset()
    ct.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ct.file_meta.MediaStorageSOPClassUID, ct.file_meta.MediaStorageSOPInstanceUID = ct.SOPClassUID, ct.SOPInstanceUID
    ct.save_as(path, enforce_file_format=True)

whole, half = (1, -1024), (0.5, -1000.75)
print("SimpleITK", sitk.Version.VersionString(), "pydicom", pydicom.__version__)
seen = {}
for name, order in {"whole numbers first": (whole, half), "fractions first": (half, whole)}.items():
    files = [f"{name}{z}.dcm" for z in range(2)]
    for z, (file, (slope, intercept)) in enumerate(zip(files, order)):
        write(file, z, slope, intercept)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    image = reader.Execute()
    seen[name] = sitk.GetArrayFromImage(image)[:, 0, 0].tolist()
    print(f"{name}: HU by the tags {[1001 * s + b for s, b in order]}, as read {seen[name]} ({image.GetPixelIDTypeAsString()})")
raise SystemExit(not (seen["whole numbers first"] == [-23, -500] and seen["fractions first"] == [-500.25, -23]))
PY
"$py" run.py
