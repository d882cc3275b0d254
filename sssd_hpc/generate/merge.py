"""Proof that a root holds every row of its manifest once, then its tables, hashes and data card.

Draws nothing. Refuses to finish a root with a record missing, doubled or foreign.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sssd_hpc import __version__
from sssd_hpc.ecg.ptbxl import PtbxlRow, finish_root, read_table
from sssd_hpc.ecg.statements import STATEMENTS, Statement, aggregate
from sssd_hpc.errors import UserError
from sssd_hpc.files import is_temporary, remove_temporaries
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.generate.names import SUMS_FILE
from sssd_hpc.generate.root import clear, damaged, has_record, read_back


def merge(out: Path, manifest: Manifest, request: Request, card: str) -> None:
    """Prove `out` complete and write the tables, `card` and, last, `SHA256SUMS.txt`. Idempotent.

    Nobody else may be at work in `out`: what killed processes left there is removed.

    Raises:
        UserError: a record is missing, not whole or of another request, or a file is foreign.
    """
    prove(out, manifest, request)
    for folder in out.glob("records*"):
        for path in [folder, *folder.glob("*")]:
            remove_temporaries(path)
    extra = [_statement(name) for name in manifest.label_names if name not in STATEMENTS]
    clear(out)
    finish_root(out, _table(manifest, request), statements_extra=extra, card=card)


def verify(out: Path) -> int:
    """Prove a finished root: every row of its manifest once, with its labels, and every hash.

    Reads, and writes nothing; needs neither the model nor the store.

    Returns:
        The number of records.

    Raises:
        UserError: `out` is no root or unfinished; a record is missing, damaged, of other labels or
            another request; the table has another row; a file is foreign or not as it was.
    """
    manifest, request = read_back(out)
    broken = damaged(out, manifest)
    if broken is None:
        there = sum(has_record(out, manifest, request, row) for row in range(len(manifest)))
        raise UserError(
            f"{out} is not finished: {there} of {len(manifest)} records are there; repeat the "
            f"sample command"
        )
    if broken:
        raise UserError(
            f"{out} has {len(broken)} files that differ from {SUMS_FILE}, the first "
            f"{min(broken)}; repeat the sample command, which makes them again"
        )
    prove(out, manifest, request)
    wanted = [replace(row, source_ecg_id=None, seed=None) for row in _table(manifest, request)]
    if read_table(out).rows != wanted:
        raise UserError(
            f"{out / 'ptbxl_database.csv'} has other rows than the manifest; remove {SUMS_FILE} "
            f"and repeat the sample command"
        )
    return len(manifest)


def lacking(out: Path, manifest: Manifest, request: Request) -> int | None:
    """Return the first row whose record is not whole in `out`, None where all are."""
    rows = range(len(manifest))
    return next((row for row in rows if not has_record(out, manifest, request, row)), None)


def prove(out: Path, manifest: Manifest, request: Request) -> None:
    """Check that the records below `out` are exactly the manifest's.

    Raises:
        UserError: a record is missing, not whole or of another request, or a file is foreign.
    """
    absent = [row for row in range(len(manifest)) if not has_record(out, manifest, request, row)]
    if absent:
        raise UserError(
            f"{out} lacks {len(absent)} of {len(manifest)} records, the first "
            f"{manifest.name(absent[0])}; repeat the same command"
        )
    present = {
        path.relative_to(out).as_posix()
        for folder in out.glob("records*")
        for path in [folder, *folder.rglob("*")]
        if not path.is_dir() and not is_temporary(path)
    }
    foreign = sorted(present - manifest.files())
    if foreign:
        raise UserError(
            f"{out / foreign[0]} and {len(foreign) - 1} more files are no part of this data set; "
            f"move them away and repeat the same command"
        )


def _table(manifest: Manifest, request: Request) -> list[PtbxlRow]:
    """Return the rows of ptbxl_database.csv."""
    low = manifest.rate_hz == 100
    return [
        PtbxlRow(
            ecg_id=int(manifest.ecg_id[row]),
            patient_id=manifest.patient_id(row),
            strat_fold=int(manifest.strat_fold[row]),
            scp_codes={code: 100.0 for code in manifest.codes(row)},
            filename_lr=manifest.name(row) if low else "",
            filename_hr="" if low else manifest.name(row),
            source_ecg_id=int(manifest.ecg_id[row]),
            seed=request.seed,
        )
        for row in range(len(manifest))
    ]


def _statement(name: str) -> Statement:
    """Describe a label that is no statement of PTB-XL: a class, or a code of the source's own."""
    try:
        return aggregate(name)
    except ValueError:
        return Statement(name, "a statement of the source, beyond the 71 of PTB-XL")


def card_text(
    metadata: Mapping[str, Any], manifest: Manifest, request: Request, store: Mapping[str, Any]
) -> str:
    """Return the data card (Markdown) of a root; names no path, person or machine.

    `metadata` is the model's, `store` the manifest of the store whose labels were taken.
    """
    model = metadata["model"]
    source, selection = store["source"], store["command"]["labels"]
    origin = f"{source['layout']} {source['version'] or '(version unknown)'}"
    if source["synthetic"]:
        origin += ", itself synthetic"
    made_by = {
        "model": f"SSSD-ECG, {model['num_blocks']} blocks, {model['channels']} channels, state "
        f"size {model['d_state']}, label embedding {model['label_embedding']}",
        "model leads": " ".join(metadata["leads"]),
        "checkpoint": f"SHA-256 {request.model_sha256} ({request.weights} weights)",
        "samples seen in training": str(metadata["samples_seen"] or "not known"),
        "diffusion": f"{json.dumps(metadata['diffusion'])}, predicts {metadata['prediction']}",
        "sampler": request.method(),
        "seed": f"{request.seed}, batches of {request.batch_size}, on {request.device}",
        "signals": f"12 leads, {manifest.rate_hz} Hz, {metadata['length']} samples, 1 uV a step",
        "label set": f"`{selection}` (`sssd-hpc prepare --labels {selection}` reads it back)",
        "labels taken from": origin,
        "written by": f"sssd_hpc {__version__}",
    }
    facts = "\n".join(f"| {name} | {value} |" for name, value in made_by.items())
    return _CARD.format(records=len(manifest), facts=facts, counts=_count_table(manifest))


def _count_table(manifest: Manifest) -> str:
    folds = np.unique(manifest.strat_fold)
    marks = {name: manifest.labels[:, k] == 1 for k, name in enumerate(manifest.label_names)}
    marks["(none)"] = ~(manifest.labels == 1).any(axis=1)
    marks["records"] = np.ones(len(manifest), dtype=bool)
    lines = ["| label | all | " + " | ".join(f"fold {fold}" for fold in folds) + " |"]
    lines.append("| --- |" + " ---: |" * (len(folds) + 1))
    for name, mark in marks.items():
        counts = [int(mark.sum())] + [
            int(mark[manifest.strat_fold == fold].sum()) for fold in folds
        ]
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


_CARD = """# Synthetic 12-lead ECGs

**These {records} recordings are synthetic.** A diffusion model drew them; no person was measured.
The files have the layout of PTB-XL, so that code written for PTB-XL reads them.

## How they were made

| | |
| --- | --- |
{facts}

One record was drawn for each real record of the chosen folds, conditioned on that record's labels
and on nothing else of it. `ecg_id` and `source_ecg_id` are the number of that real record,
`strat_fold` is its fold. `patient_id` is invented, one a record; age and sex are not given.
`scp_codes` holds the labels that the model was told, with likelihood 100; an aggregate class such
as MI stands there as a code, with a row of its own in `scp_statements.csv`. Nobody has checked
that a signal shows what its label says.

## Labels

Records with each label, per fold:

{counts}

## What they are for, and what not

For research on machine learning with ECGs: training and testing classifiers, developing software.
Not for diagnosis, treatment, or any decision about a patient; not as evidence about a population,
since counts and shapes follow the model; not to be passed off as recordings. The model may have
memorised part of its training data: being synthetic is no proof of privacy. Report results on
real data beside results on these.

## Licence and citation

These records derive from the data that the model was trained on, whose licence and duty to cite
go with them. For PTB-XL: CC BY 4.0;

- Wagner, Strodthoff, Bousseljot, Kreiseler, Lunze, Samek, Schaeffter: PTB-XL, a large publicly
  available electrocardiography dataset. Scientific Data 7, 154 (2020).
  doi:10.1038/s41597-020-0495-6
- Alcaraz, Strodthoff: Diffusion-based conditional ECG generation with structured state space
  models. Computers in Biology and Medicine 163, 107115 (2023). arXiv:2301.08227
- Skorik, Avetisyan: SSSD-ECG-nle, new label embeddings with structured state-space models for ECG
  generation (2024). arXiv:2407.11108
"""
