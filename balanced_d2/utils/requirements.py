"""Checks for Detectron2 and OpenCV, which are not installed together with this package.

Imported first by every part of the package that needs them.

Raises:
    ImportError: with the command to run, if one is missing or cannot be imported.
"""

import warnings

try:
    import detectron2
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Detectron2 is not installed; run: balanced-d2 install-detectron2", name="detectron2"
    ) from error

try:
    import cv2  # noqa: F401  # Detectron2's own error would not say which package to install
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "OpenCV is not installed; run: pip install opencv-python (on a machine without a desktop: "
        "opencv-python-headless)",
        name="cv2",
    ) from error
except ImportError as error:
    raise ImportError(
        f"OpenCV cannot be imported ({error}); its headless build needs fewer libraries. Run: "
        "pip uninstall -y opencv-python, then pip install opencv-python-headless",
        name="cv2",
    ) from error

# Both Detectron2 0.6 and main script some of their functions during import.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r".*torch\.jit\..* is (deprecated|not supported)")
    import detectron2.modeling  # noqa: F401
