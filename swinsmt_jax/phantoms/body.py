"""One whole body: its size, posture, contrast phase, field of view and scan."""

import numpy as np
from scipy import ndimage

from swinsmt_jax import checks
from swinsmt_jax.phantoms import abdomen, skeleton, trunk, vessels
from swinsmt_jax.phantoms.canvas import Canvas
from swinsmt_jax.phantoms.frame import Painter
from swinsmt_jax.phantoms.solids import rotation

VERSION = 1  # raise when the drawing changes: old folders are then refused
SPACING = (0.5, 12.0)  # mm; up to 8 a whole body keeps all 117 structures
THINNEST = 0.75  # least radius in voxels of what is drawn

# Fields of view: lower and upper end in mm above the spine's L5/S1, and how often.
REGIONS = {
    "whole": (-225, 735, 0.35),
    "trunk": (-190, 470, 0.25),
    "abdomen": (-185, 290, 0.12),
    "chest": (170, 480, 0.12),
    "pelvis": (-210, 70, 0.08),
    "head": (400, 740, 0.08),
}
WIDTH, DEPTH = 480.0, 360.0  # mm of the largest field of view
TISSUES = {
    **{"skin": 20, "fat": -105, "visceral fat": -95, "muscle": 50, "mediastinum": -40},
    **{"cortical": 500, "spongy": 180, "disc": 85, "cartilage": 105, "cord": 30},
    **{"brain": 36, "lung": -810, "gas": -950, "stool": -60, "chyme": 15, "fluid": 8},
    **{"bowel": 38, "adrenal": 25, "prostate": 40, "thyroid": 95},
    **{"foam": -880, "plastic": 60},
}
# Tissues whose HU follow the contrast agent: without, arterial, venous phase.
CONTRAST = {
    "arterial": (42, 320, 150),
    "venous": (42, 70, 150),
    "portal": (42, 85, 165),
    "heart": (42, 210, 135),
    "liver": (56, 66, 110),
    "spleen": (48, 115, 122),
    "kidney": (32, 150, 185),
    "pancreas": (38, 95, 90),
}


def make_phantom(
    seed: int, *, spacing: float, region: str | None = None, variation: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one body; a pure function of its arguments.

    Args:
        seed: of the body, its posture, contrast phase, field of view and noise.
        spacing: voxel side in mm; structures thinner than the grid are thickened.
        region: one of `REGIONS`; None draws it too. A "whole" body holds all 117
            structures; others may lack gallbladder, prostate and cysts.
        variation: scale of the differences between bodies.

    Returns:
        CT int16 HU [X, Y, Z], labels uint8 [X, Y, Z] and the affine [4, 4], in RAS.
    """
    checks.in_range("spacing", spacing, *SPACING)
    rng = np.random.default_rng([VERSION, seed])
    share = np.array([r[2] for r in REGIONS.values()])
    drawn = str(rng.choice(list(REGIONS), p=share / share.sum()))
    region = drawn if region is None else region
    checks.one_of("region", region, REGIONS)
    canvas, affine = _grid(rng, spacing, region, variation)
    missing = {"gallbladder": 0.15, "prostate": 0.4}
    missing |= {"kidney_cyst_left": 0.6, "kidney_cyst_right": 0.6}
    absent = {name for name, share in missing.items() if rng.random() < share}
    painter = Painter(
        canvas,
        rng,
        _hounsfield(rng),
        variation,
        thinnest=THINNEST * canvas.voxel,
        absent=frozenset() if region == "whole" else frozenset(absent),
    )
    arms_up = bool(rng.random() < 0.6)
    trunk.draw_outline(painter, arms_up=arms_up)
    domes = trunk.diaphragm(painter)
    trunk.draw_lungs(painter, domes)
    abdomen.draw_abdomen(painter, domes)
    skeleton.draw_muscles(painter)
    skeleton.draw_head(painter)
    skeleton.draw_pelvis(painter)
    skeleton.draw_shoulders(painter, arms_up=arms_up)
    vessels.draw_chest(painter)
    skeleton.draw_rib_cage(painter)
    skeleton.draw_spine(painter)
    vessels.draw_vessels(painter)
    return _scan(canvas.hu, rng), canvas.labels, affine


def _hounsfield(rng: np.random.Generator) -> dict[str, float]:
    phase = rng.choice(3, p=(0.25, 0.25, 0.5))
    near = np.eye(3)[phase] * 0.8 + rng.dirichlet((1, 1, 1)) * 0.2
    hu = TISSUES | {name: float(near @ values) for name, values in CONTRAST.items()}
    spread = {name: max(4.0, 0.08 * abs(value)) for name, value in hu.items()}
    return {name: value + spread[name] * rng.normal() for name, value in hu.items()}


def _grid(
    rng: np.random.Generator, spacing: float, region: str, variation: float
) -> tuple[Canvas, np.ndarray]:
    """Place an empty grid over a body of random size and posture."""
    scale = np.exp(variation * np.clip(rng.normal(size=3), -2, 2) * (0.05, 0.05, 0.035))
    low, high, _ = REGIONS[region]
    if region != "whole":
        low, high = np.array([low, high]) + variation * rng.uniform(-20, 20, 2)
    sides = np.array([WIDTH, DEPTH, (high - low) * scale[2]])
    if region != "whole":
        sides[:2] -= rng.uniform(0, 60, 2) * (1, 0.7)
    shape = np.maximum(np.rint(sides / spacing), 8).astype(int)
    centre = np.array([0.0, -10.0, (low + high) / 2 * scale[2]])
    centre[:2] += variation * rng.uniform(-8, 8, 2)
    origin = centre - (shape - 1) / 2 * spacing
    step = spacing / scale
    flat = np.stack(
        np.meshgrid(
            *(
                ((o + spacing * np.arange(n)) / s).astype(np.float32)
                for o, n, s in zip(origin, shape, scale, strict=True)
            ),
            indexing="ij",
        )
    )
    places = _bend(flat, rng, variation)
    margin = float(np.abs(places - flat).max())
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = origin + rng.uniform(-200, 200, 3)
    return Canvas(places, origin=origin / scale, step=step, margin=margin), affine


def _bend(flat: np.ndarray, rng: np.random.Generator, variation: float) -> np.ndarray:
    """Turn the body a little about its middle and bend it in smooth waves, in mm."""
    turn = rotation(variation * rng.normal(size=3) * (1.2, 1.2, 2.5)).astype(np.float32)
    middle = np.array([0, 0, 250], np.float32).reshape(3, 1, 1, 1)
    places = np.tensordot(turn, flat - middle, 1) + middle
    waves = []
    for axis in range(3):
        phase, along = rng.uniform(0, 2 * np.pi), flat[(axis + 1) % 3]
        phase_z, height = rng.uniform(0, 2 * np.pi), flat[2]
        wave = 2.5 * np.sin(along / 45 + phase)
        if axis < 2:
            wave = wave + 5 * np.sin(height / 120 + phase_z)
        waves.append(variation * wave)
    return places + np.stack(waves).astype(np.float32)


def _scan(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur and noise of the scanner."""
    blurred = ndimage.gaussian_filter(hu, rng.uniform(0.2, 0.45))
    noise = rng.standard_normal(hu.shape, dtype=np.float32) * rng.uniform(6, 24)
    noise = ndimage.gaussian_filter(noise, 0.4)
    return np.clip(np.rint(blurred + noise), -1024, 3071).astype(np.int16)
