"""SCP-ECG statements: the 71 of PTB-XL, their official sets, and records' labels.

A record carries statement codes with likelihoods; a training set asks for one set of names: all
codes, diagnostic, form or rhythm ones, diagnostic subclasses or superclasses, or a list of codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.errors import UserError
from sssd_hpc.files import read_csv, write_csv

SETS = ("all", "diag", "sub", "super", "form", "rhythm")
FILE = "scp_statements.csv"
_TRUE = ("1", "1.0")
COLUMNS = (
    "",
    "description",
    "diagnostic",
    "form",
    "rhythm",
    "diagnostic_class",
    "diagnostic_subclass",
    "Statement Category",
    "SCP-ECG Statement Description",
    "AHA code",
    "aECG REFID",
    "CDISC Code",
    "DICOM Code",
)
"""PTB-XL's own columns; the first, the code, has no name."""


@dataclass(frozen=True)
class Statement:
    """One row of the table: a code, what it says, and the sets that it belongs to."""

    code: str
    description: str
    diagnostic: bool = False
    form: bool = False
    rhythm: bool = False
    diagnostic_class: str = ""
    diagnostic_subclass: str = ""


Statements = Mapping[str, Statement]

# Source: PTB-XL (Wagner et al., Scientific Data 2020; PhysioNet, CC BY 4.0), in its order:
# code | D diagnostic, F form, R rhythm | superclass | subclass | description.
_TABLE = """\
NDT|DF|STTC|STTC|non-diagnostic T abnormalities
NST_|DF|STTC|NST_|non-specific ST changes
DIG|DF|STTC|STTC|digitalis-effect
LNGQT|DF|STTC|STTC|long QT-interval
NORM|D|NORM|NORM|normal ECG
IMI|D|MI|IMI|inferior myocardial infarction
ASMI|D|MI|AMI|anteroseptal myocardial infarction
LVH|D|HYP|LVH|left ventricular hypertrophy
LAFB|D|CD|LAFB/LPFB|left anterior fascicular block
ISC_|D|STTC|ISC_|non-specific ischemic
IRBBB|D|CD|IRBBB|incomplete right bundle branch block
1AVB|D|CD|_AVB|first degree AV block
IVCD|D|CD|IVCD|non-specific intraventricular conduction disturbance (block)
ISCAL|D|STTC|ISCA|ischemic in anterolateral leads
CRBBB|D|CD|CRBBB|complete right bundle branch block
CLBBB|D|CD|CLBBB|complete left bundle branch block
ILMI|D|MI|IMI|inferolateral myocardial infarction
LAO/LAE|D|HYP|LAO/LAE|left atrial overload/enlargement
AMI|D|MI|AMI|anterior myocardial infarction
ALMI|D|MI|AMI|anterolateral myocardial infarction
ISCIN|D|STTC|ISCI|ischemic in inferior leads
INJAS|D|MI|AMI|subendocardial injury in anteroseptal leads
LMI|D|MI|LMI|lateral myocardial infarction
ISCIL|D|STTC|ISCI|ischemic in inferolateral leads
LPFB|D|CD|LAFB/LPFB|left posterior fascicular block
ISCAS|D|STTC|ISCA|ischemic in anteroseptal leads
INJAL|D|MI|AMI|subendocardial injury in anterolateral leads
ISCLA|D|STTC|ISCA|ischemic in lateral leads
RVH|D|HYP|RVH|right ventricular hypertrophy
ANEUR|D|STTC|STTC|ST-T changes compatible with ventricular aneurysm
RAO/RAE|D|HYP|RAO/RAE|right atrial overload/enlargement
EL|D|STTC|STTC|electrolytic disturbance or drug (former EDIS)
WPW|D|CD|WPW|Wolf-Parkinson-White syndrome
ILBBB|D|CD|ILBBB|incomplete left bundle branch block
IPLMI|D|MI|IMI|inferoposterolateral myocardial infarction
ISCAN|D|STTC|ISCA|ischemic in anterior leads
IPMI|D|MI|IMI|inferoposterior myocardial infarction
SEHYP|D|HYP|SEHYP|septal hypertrophy
INJIN|D|MI|IMI|subendocardial injury in inferior leads
INJLA|D|MI|AMI|subendocardial injury in lateral leads
PMI|D|MI|PMI|posterior myocardial infarction
3AVB|D|CD|_AVB|third degree AV block
INJIL|D|MI|IMI|subendocardial injury in inferolateral leads
2AVB|D|CD|_AVB|second degree AV block
ABQRS|F|||abnormal QRS
PVC|F|||ventricular premature complex
STD_|F|||non-specific ST depression
VCLVH|F|||voltage criteria (QRS) for left ventricular hypertrophy
QWAVE|F|||Q waves present
LOWT|F|||low amplitude T-waves
NT_|F|||non-specific T-wave changes
PAC|F|||atrial premature complex
LPR|F|||prolonged PR interval
INVT|F|||inverted T-waves
LVOLT|F|||low QRS voltages in the frontal and horizontal leads
HVOLT|F|||high QRS voltage
TAB_|F|||T-wave abnormality
STE_|F|||non-specific ST elevation
PRC(S)|F|||premature complex(es)
SR|R|||sinus rhythm
AFIB|R|||atrial fibrillation
STACH|R|||sinus tachycardia
SARRH|R|||sinus arrhythmia
SBRAD|R|||sinus bradycardia
PACE|R|||normal functioning artificial pacemaker
SVARR|R|||supraventricular arrhythmia
BIGU|R|||bigeminal pattern (unknown origin, SV or Ventricular)
AFLT|R|||atrial flutter
SVTAC|R|||supraventricular tachycardia
PSVT|R|||paroxysmal supraventricular tachycardia
TRIGU|R|||trigeminal pattern (unknown origin, SV or Ventricular)
"""


def _parse(line: str) -> Statement:
    code, kinds, superclass, subclass, description = line.split("|")
    return Statement(
        code=code,
        description=description,
        diagnostic="D" in kinds,
        form="F" in kinds,
        rhythm="R" in kinds,
        diagnostic_class=superclass,
        diagnostic_subclass=subclass,
    )


STATEMENTS: Statements = {s.code: s for s in map(_parse, _TABLE.splitlines())}
"""The 71 statements of PTB-XL by code."""


def load_statements(root: Path) -> Statements:
    """Read a root's `scp_statements.csv`.

    Raises:
        UserError: as `files.read_csv`, or a code is empty or repeated.
    """
    path = root / FILE
    statements: dict[str, Statement] = {}
    for row in read_csv(path, COLUMNS[:7]):
        code = row[""]
        if not code or code in statements:
            raise UserError(f"{path} has an empty or repeated code: {code[:40]!r}")
        statements[code] = Statement(
            code=code,
            description=row["description"],
            diagnostic=row["diagnostic"] in _TRUE,
            form=row["form"] in _TRUE,
            rhythm=row["rhythm"] in _TRUE,
            diagnostic_class=row["diagnostic_class"],
            diagnostic_subclass=row["diagnostic_subclass"],
        )
    return statements


def write_statements(path: Path, extra: Sequence[Statement] = ()) -> None:
    """Write the 71 statements, then `extra` ones, with PTB-XL's columns."""
    write_csv(
        path,
        COLUMNS,
        (
            {
                "": statement.code,
                "description": statement.description,
                "diagnostic": 1.0 if statement.diagnostic else "",
                "form": 1.0 if statement.form else "",
                "rhythm": 1.0 if statement.rhythm else "",
                "diagnostic_class": statement.diagnostic_class,
                "diagnostic_subclass": statement.diagnostic_subclass,
            }
            for statement in (*STATEMENTS.values(), *extra)
        ),
    )


def aggregate(name: str) -> Statement:
    """Return the extra row that lets records be labelled with a class alone ("MI", "AMI", ..).

    Raises:
        ValueError: `name` is no superclass or subclass of PTB-XL.
    """
    classes = {
        s.diagnostic_subclass: s.diagnostic_class for s in STATEMENTS.values() if s.diagnostic
    }
    # STTC is both: as a subclass it counts in either set.
    if name in classes:
        return Statement(name, f"subclass {name}", True, False, False, classes[name], name)
    if name in classes.values():
        return Statement(name, f"superclass {name}", True, diagnostic_class=name)
    raise ValueError(f"{name!r} is neither a superclass nor a subclass of PTB-XL")


def label_names(selection: str, statements: Statements) -> tuple[str, ...]:
    """Return the sorted label names of a set (`SETS`) or of a list `CODE,CODE`.

    PTB-XL's table gives 71, 44, 23, 5, 19 and 12 names. Rows that stand for a class
    (`aggregate`) are no codes of their own and count for `super` and `sub` alone.

    Raises:
        UserError: an unknown code, an empty list, or a set without members in this table.
    """
    codes = [s for s in statements.values() if not _is_aggregate(s)]
    names = {
        "all": [s.code for s in codes],
        "diag": [s.code for s in codes if s.diagnostic],
        "sub": [s.diagnostic_subclass for s in statements.values() if s.diagnostic],
        "super": [s.diagnostic_class for s in statements.values() if s.diagnostic],
        "form": [s.code for s in codes if s.form],
        "rhythm": [s.code for s in codes if s.rhythm],
    }.get(selection)
    if names is None:
        names = [code.strip() for code in selection.split(",")]
        unknown = [name for name in names if name not in statements]
        if unknown:
            near = difflib.get_close_matches(unknown[0].upper(), [*statements, *SETS], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(
                f"labels {selection!r}: unknown code {unknown[0]!r}; allowed are "
                f"{', '.join(SETS)} or codes of {FILE} joined by commas{hint}"
            )
    found = tuple(sorted({name for name in names if name}))
    if not found:
        raise UserError(f"labels {selection!r}: {FILE} has no such statements")
    return found


def _is_aggregate(statement: Statement) -> bool:
    classes = (statement.diagnostic_class, statement.diagnostic_subclass)
    return statement.code not in STATEMENTS and statement.code in classes


def encode(
    scp_codes: Mapping[str, float],
    selection: str,
    names: Sequence[str],
    statements: Statements,
    min_likelihood: float | None = None,
) -> NDArray[np.uint8]:
    """Return a record's label row (K,): 1 where it carries the name of `names`.

    By default every code counts whatever its likelihood, 0 included, as in the public codes.
    `min_likelihood` (percent) drops diagnostic statements below it; form and rhythm statements
    carry no likelihood in PTB-XL (0 stands for "not given") and always count.

    Raises:
        ValueError: a code is not in `statements`.
    """
    present: set[str] = set()
    for code, likelihood in scp_codes.items():
        statement = statements.get(code)
        if statement is None:
            raise ValueError(f"scp_codes has a code that {FILE} lacks")
        if min_likelihood is not None and statement.diagnostic and likelihood < min_likelihood:
            continue
        if selection == "super":
            present.add(statement.diagnostic_class)
        elif selection == "sub":
            present.add(statement.diagnostic_subclass)
        else:
            present.add(code)
    return np.array([name in present for name in names], dtype=np.uint8)
