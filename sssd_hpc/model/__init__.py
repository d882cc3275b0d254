"""The noise predictor, its checkpoints and the public reference's."""

from sssd_hpc.model.export import load_export, save_export
from sssd_hpc.model.reference import convert_reference, load_reference
from sssd_hpc.model.sssd import SSSDECG

__all__ = ["SSSDECG", "convert_reference", "load_export", "load_reference", "save_export"]
