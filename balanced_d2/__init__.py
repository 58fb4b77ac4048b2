"""Balanced learning (Libra R-CNN) for Detectron2. Importing this package registers everything."""

import importlib.util

if importlib.util.find_spec("detectron2") is None:
    raise ModuleNotFoundError(
        "Detectron2 is not installed; run: python tools/install_detectron2.py", name="detectron2"
    )

try:
    import cv2  # noqa: F401  # Detectron2's first error would not say whose it is
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "OpenCV is not installed; run: pip install opencv-python (on a machine without a desktop: "
        "opencv-python-headless)",
        name="cv2",
    ) from error
except ImportError as error:
    raise ImportError(
        f"OpenCV does not import here ({error}); its build without windows needs less. Run: "
        "pip uninstall -y opencv-python, then pip install opencv-python-headless",
        name="cv2",
    ) from error

from balanced_d2.compat import no_torchscript_warnings  # noqa: E402

with no_torchscript_warnings():
    from balanced_d2 import data, modeling  # noqa: F401  # registration
    from balanced_d2.config import add_balanced_config, load_config

__version__ = "0.1.0"

__all__ = ["add_balanced_config", "load_config"]
