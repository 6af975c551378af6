"""Peak signal-to-noise ratio."""

import numpy as np
from jaxtyping import Float, UInt8


def psnr(
    images: UInt8[np.ndarray, "B H W C"], references: UInt8[np.ndarray, "B H W C"]
) -> Float[np.ndarray, "B"]:
    """PSNR of each image in dB, peak 255; infinite for equal images."""
    error = np.mean(np.square(images.astype(np.float64) - references), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)
