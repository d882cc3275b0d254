"""The paper's own figures, to stand beside ours: Tables I to IV of SSSD-ECG-nle.

Source: Skorik and Avetisyan, arXiv 2407.11108. Rows are G-mean and F1 by label; Table I's "IABV" is
1AVB. Its records, classifiers and seeds are not ours: figures to compare with, not to reproduce.
"""

from __future__ import annotations

Row = dict[str, tuple[float, float]]

TABLE_I: dict[str, Row] = {
    "TRTR": {
        "AFIB": (0.950, 0.744),
        "1AVB": (0.910, 0.391),
        "PVC": (0.971, 0.820),
        "CRBBB": (0.977, 0.642),
    },
    "sssd_ecg TSTR": {
        "AFIB": (0.848, 0.720),
        "1AVB": (0.860, 0.270),
        "PVC": (0.872, 0.338),
        "CRBBB": (0.931, 0.474),
    },
    "nle TSTR": {
        "AFIB": (0.922, 0.709),
        "1AVB": (0.871, 0.293),
        "PVC": (0.850, 0.561),
        "CRBBB": (0.940, 0.640),
    },
    "sssd_ecg TRTS": {
        "AFIB": (0.904, 0.450),
        "1AVB": (0.867, 0.109),
        "PVC": (0.834, 0.187),
        "CRBBB": (0.943, 0.318),
    },
    "nle TRTS": {
        "AFIB": (0.985, 0.858),
        "1AVB": (0.933, 0.824),
        "PVC": (0.864, 0.649),
        "CRBBB": (1.000, 0.981),
    },
}
"""Conditioning: rows by arm and protocol."""

TABLE_II_LABELS = 71
TABLE_II = {"TSTR": (0.674, 0.456, 0.820), "TRTS": (0.775, 0.567, 0.894)}
"""Multilabel, SSSD-ECG-nle: weighted G-mean, weighted F1, ROC-AUC."""

TABLE_III: dict[str, Row] = {
    "baseline": {
        "AFIB": (0.950, 0.734),
        "CRBBB": (0.977, 0.642),
        "1AVB": (0.910, 0.391),
        "CLBBB": (0.976, 0.627),
        "PVC": (0.971, 0.820),
    },
    "double": {
        "AFIB": (0.954, 0.796),
        "CRBBB": (0.984, 0.784),
        "1AVB": (0.921, 0.373),
        "CLBBB": (0.974, 0.593),
        "PVC": (0.965, 0.794),
    },
    "synthetic": {
        "AFIB": (0.951, 0.806),
        "CRBBB": (0.985, 0.819),
        "1AVB": (0.912, 0.424),
        "CLBBB": (0.970, 0.686),
        "PVC": (0.948, 0.808),
    },
}
"""Augmentation: rows by what joins the real training records."""

TABLE_IV: dict[str, dict[str, dict[int, tuple[float, float]]]] = {
    "TSTR": {
        "AFIB": {
            4_000: (0.507, 0.308),
            24_000: (0.828, 0.434),
            100_000: (0.745, 0.564),
            1_200_000: (0.922, 0.673),
        },
        "CRBBB": {
            4_000: (0.885, 0.218),
            24_000: (0.908, 0.378),
            80_000: (0.940, 0.640),
            880_000: (0.853, 0.678),
        },
        "PVC": {48_000: (0.561, 0.121), 576_000: (0.847, 0.400), 1_632_000: (0.850, 0.561)},
    },
    "TRTS": {
        "AFIB": {
            4_000: (0.541, 0.163),
            24_000: (0.632, 0.191),
            100_000: (0.809, 0.292),
            1_200_000: (0.985, 0.858),
        },
        "CRBBB": {
            4_000: (0.238, 0.095),
            24_000: (0.980, 0.953),
            80_000: (1.000, 0.981),
            880_000: (0.992, 0.757),
        },
        "PVC": {48_000: (0.329, 0.149), 576_000: (0.864, 0.649), 1_632_000: (0.808, 0.621)},
    },
}
"""Convergence: G-mean and F1 by protocol, label and samples seen; a network for each label."""


def of_label(label: str) -> dict[str, dict[str, float]]:
    """Return Table I's G-mean and F1 of SSSD-ECG-nle for a label, by protocol; empty if unknown."""
    return {
        row.removeprefix("nle "): dict(zip(("g_mean", "f1"), figures[label], strict=True))
        for row, figures in TABLE_I.items()
        if not row.startswith("sssd_ecg") and label in figures
    }
