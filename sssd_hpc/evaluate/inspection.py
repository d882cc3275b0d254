"""What a synthetic set is like beside real records: fidelity, physiology, labels, privacy.

Held-out real records (folds 9 and 10) are the yardstick: neither the generator nor the classifier
whose features are compared was trained on them. That classifier has seen the training records, as
an attacker's would have: by its features, membership and memory of its own cannot be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sssd_hpc.ecg.store import Store
from sssd_hpc.evaluate import damage, features, figures, physiology, privacy, relations
from sssd_hpc.evaluate.comparison import Measure, Side, compare
from sssd_hpc.evaluate.self_test import SelfTest, self_test, simulated_sides
from sssd_hpc.evaluate.splits import FOLDS, Split, split
from sssd_hpc.evaluate.utility import Arm, Laboratory
from sssd_hpc.files import write_json

GROUPS: dict[str, tuple[Measure, ...]] = {
    "Features of the classifier": features.FEATURES,
    "Signals": relations.RELATIONS,
    "Physiology": physiology.MEASURES,
}
"""The measures of fidelity, as a reader meets them."""
MEASURES = tuple(measure for group in GROUPS.values() for measure in group)


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found, and what the pictures are drawn from."""

    found: dict[str, Any]
    """For JSON: fidelity, physiology, label_effects, privacy."""
    sides: dict[str, Side]
    """Held-out "real" records and "synthetic" ones."""


def inspect(
    real: Store, synthetic: Store, label: str, laboratory: Laboratory, *, seed: int
) -> Inspection:
    """Compare a synthetic set with held-out real records, and audit it for copies.

    Args:
        real: store of the real records.
        synthetic: store of the synthetic ones.
        label: what the classifier tells apart whose features are compared; it is trained on the
            real training records.
        laboratory: trains it, or remembers its features.
        seed: of draws and bootstraps.
    """
    parts = {part: split(real, [label], part) for part in FOLDS}
    every = np.arange(synthetic.num_records)
    training = parts["training"]
    tried = privacy.members(len(training), seed)
    splits = {
        "real": parts["validation"] + parts["test"],
        "synthetic": Split(((synthetic, every),), synthetic.labels_of(every)),
        "tried": Split(((real, training.rows[tried]),), training.labels[tried]),
    }
    arm = Arm("real", training, parts["validation"])
    values = dict(zip(splits, laboratory.features(arm, list(splits.values())), strict=True))
    heldout = Side.of_store(real, splits["real"].rows, values["real"])
    ours = Side.of_store(synthetic, every, values["synthetic"])
    sides = {"real": heldout, "synthetic": ours}
    compared = compare(MEASURES, heldout, ours, seed=seed)
    audited = privacy.audit(
        ours,
        Side.of_store(real, training.rows),
        heldout,
        synthetic_ids=splits["synthetic"].ecg_id,
        training_ids=training.ecg_id,
        member_features=values["tried"],
        seed=seed,
    )
    found = {
        "fidelity": {
            group: {
                measure.name: {"title": measure.title, **compared[measure.name].to_json()}
                for measure in measures
            }
            for group, measures in GROUPS.items()
        },
        "physiology": {
            name: physiology.drawn_table(side, seed).summary() for name, side in sides.items()
        },
        "label_effects": [
            {**effect.to_json(), "title": physiology.TITLES[effect.quantity][0]}
            for effect in physiology.label_effects(heldout, ours, seed=seed)
        ],
        "privacy": audited.to_json(),
    }
    return Inspection(found, sides)


def self_check(out: Path, *, seed: int = 0) -> dict[str, SelfTest]:
    """Test every measure on simulated records: of fidelity by damage, of privacy by copies.

    Writes self_test.json and, of each, figures/self_test_fidelity.png or _privacy.png into `out`.
    """
    heldout, training, features_of = simulated_sides(seed)
    results = {
        name: self_test(measures, heldout, training, features_of, damages=damages, seed=seed)
        for name, measures, damages in (
            ("fidelity", MEASURES, damage.FIDELITY),
            ("privacy", privacy.as_measures(training), damage.COPIES),
        )
    }
    (out / "figures").mkdir(parents=True, exist_ok=True)
    write_json(out / "self_test.json", {name: one.to_json() for name, one in results.items()})
    for name, result in results.items():
        figures.save(figures.self_test_matrix(result), out / "figures" / f"self_test_{name}.png")
    return results
