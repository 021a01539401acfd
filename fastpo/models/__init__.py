"""The denoisers and encoders: from a model folder to predictions."""

from typing import TYPE_CHECKING

from fastpo.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastpo.models.denoisers import Denoisers as Denoisers
    from fastpo.models.denoisers import add_lora as add_lora
    from fastpo.models.denoisers import setup_denoisers as setup_denoisers
    from fastpo.models.denoisers import without_dropout as without_dropout
    from fastpo.models.encoders import Encoders as Encoders
    from fastpo.models.family import ModelFamily as ModelFamily
    from fastpo.models.folder import ModelFolder as ModelFolder
    from fastpo.models.schedule import NoiseSchedule as NoiseSchedule
    from fastpo.models.unet import load_unet as load_unet
    from fastpo.models.unet import predict as predict

__all__ = [
    "Denoisers",
    "Encoders",
    "ModelFamily",
    "ModelFolder",
    "NoiseSchedule",
    "add_lora",
    "load_unet",
    "predict",
    "setup_denoisers",
    "without_dropout",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Denoisers": "fastpo.models.denoisers",
        "Encoders": "fastpo.models.encoders",
        "ModelFamily": "fastpo.models.family",
        "ModelFolder": "fastpo.models.folder",
        "NoiseSchedule": "fastpo.models.schedule",
        "add_lora": "fastpo.models.denoisers",
        "load_unet": "fastpo.models.unet",
        "predict": "fastpo.models.unet",
        "setup_denoisers": "fastpo.models.denoisers",
        "without_dropout": "fastpo.models.denoisers",
    },
)
