"""The joint model: plan prior, trajectory decoder, return model."""

from gac_fast.model.gac import GAC, Batch

__all__ = ["GAC", "Batch"]
