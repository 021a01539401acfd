"""The reference's errors on the visits to come: computed once, for every run that shares them."""

from typing import TYPE_CHECKING

from fastpo.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastpo.reference_cache.compute import load_reference as load_reference
    from fastpo.reference_cache.compute import prepare_reference as prepare_reference
    from fastpo.reference_cache.fingerprint import reference_identity as reference_identity
    from fastpo.reference_cache.open import open_for_run as open_for_run
    from fastpo.reference_cache.store import ReferenceErrors as ReferenceErrors

__all__ = [
    "ReferenceErrors",
    "load_reference",
    "open_for_run",
    "prepare_reference",
    "reference_identity",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ReferenceErrors": "fastpo.reference_cache.store",
        "load_reference": "fastpo.reference_cache.compute",
        "open_for_run": "fastpo.reference_cache.open",
        "prepare_reference": "fastpo.reference_cache.compute",
        "reference_identity": "fastpo.reference_cache.fingerprint",
    },
)
