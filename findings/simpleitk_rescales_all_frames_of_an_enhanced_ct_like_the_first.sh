#!/usr/bin/env bash
# SimpleITK 2.5.7: an enhanced CT may give each frame its own RescaleIntercept (PS3.3 C.7.6.16.2.9). ReadImage
# applies the first frame's to all of them without a warning, so HU are off by the difference.
# Anyone who segments or measures an enhanced CT (one file, many frames) with SimpleITK gets wrong values.
# Read the functional groups (pydicom, highdicom) and rescale frame by frame.
. "$(dirname "$0")/lib.sh"
venv "SimpleITK==2.5.7" "pydicom==3.0.2" "numpy==2.2.6"
cat > run.py <<'PY'
import numpy as np, pydicom, SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset

def item(**tags):
    found = Dataset()
    for name, value in tags.items():
        setattr(found, name, value)
    return found

intercepts = [-1024, -1000, -500]
ct = item(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", SOPInstanceUID="1.2.3.4", Modality="CT", StudyInstanceUID="1.2", SeriesInstanceUID="1.2.3",
          Rows=4, Columns=5, NumberOfFrames=3, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
          BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=0,
          PixelData=np.full((3, 4, 5), 1000, np.uint16).tobytes())
ct.SharedFunctionalGroupsSequence = [item(
    PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    PixelMeasuresSequence=[item(PixelSpacing=[1, 1], SliceThickness=2)])]
ct.PerFrameFunctionalGroupsSequence = [item(
    PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2 * i])],
    PixelValueTransformationSequence=[item(RescaleIntercept=b, RescaleSlope=1, RescaleType="HU")])
    for i, b in enumerate(intercepts)]
ct.file_meta = FileMetaDataset()
ct.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
ct.file_meta.MediaStorageSOPClassUID, ct.file_meta.MediaStorageSOPInstanceUID = ct.SOPClassUID, ct.SOPInstanceUID
ct.save_as("ct.dcm", enforce_file_format=True)

seen = sitk.GetArrayFromImage(sitk.ReadImage("ct.dcm"))[:, 0, 0].tolist()
print("SimpleITK", sitk.Version.VersionString(), "pydicom", pydicom.__version__)
print("HU by the file:", [1000 + b for b in intercepts], "as read:", seen)
raise SystemExit(seen != [1000 + intercepts[0]] * 3)
PY
"$py" run.py
