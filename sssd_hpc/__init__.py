"""sssd_hpc: train and sample structured state-space diffusion models of 12-lead ECGs."""

__version__ = "0.1.0"
