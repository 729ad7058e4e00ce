"""Published and Hugging Face weights: what their tensors are called, how they are loaded, checked and written."""

from deimkit.weights.classes import COCO_IDS, COCO_NAMES
from deimkit.weights.files import State, read
from deimkit.weights.hf import load_hf, save_hf
from deimkit.weights.infer import detect_arch
from deimkit.weights.load import LoadReport, default_categories, load_weights
from deimkit.weights.published import published_state, save_published

__all__ = [
    "COCO_IDS", "COCO_NAMES", "LoadReport", "State", "default_categories", "detect_arch", "load_hf", "load_weights",
    "published_state", "read", "save_hf", "save_published",
]  # fmt: skip
