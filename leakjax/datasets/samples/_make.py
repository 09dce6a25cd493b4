"""Make the sample set: crops of scikit-image's CC0 and public-domain photos, as PNG files of 32x32 and 64x64 pixels.

Run once, `python leakjax/datasets/samples/_make.py`, with scikit-image installed; nothing at run time needs it.
A file is named `<label>_<name>.png`, so that the sorted folder is the data set. Sources and terms: `SOURCES.md`.
"""

from pathlib import Path

from PIL import Image
from skimage import data

SIZES = (32, 64)

# name: (scikit-image picture, left, top, side) of a square in the picture; label = position in this table
CROPS = {
    "astronaut": ("astronaut", 0, 0, 512),
    "chelsea": ("chelsea", 75, 0, 300),
    "coffee": ("coffee", 100, 0, 400),
    "rocket": ("rocket", 106, 0, 427),
    "retina": ("retina", 150, 150, 1111),
    "galaxies": ("hubble_deep_field", 640, 400, 128),
    "astronaut_face": ("astronaut", 143, 5, 160),
    "astronaut_shuttle": ("astronaut", 340, 0, 172),
    "chelsea_eye": ("chelsea", 110, 50, 120),
    "coffee_spoon": ("coffee", 180, 190, 190),
}


def make(folder: Path) -> None:
    """Write every crop at every size below `folder`; Lanczos resampling, which averages before it subsamples."""
    for label, (name, (picture, left, top, side)) in enumerate(CROPS.items()):
        crop = Image.fromarray(getattr(data, picture)()).crop((left, top, left + side, top + side))
        for size in SIZES:
            path = folder / str(size) / f"{label:02d}_{name}.png"
            path.parent.mkdir(exist_ok=True)
            crop.resize((size, size), Image.Resampling.LANCZOS).save(path, optimize=True)


if __name__ == "__main__":
    make(Path(__file__).parent)
