"""Build the optional C++ extension, sssd_hpc/_C.torch-<version>.so, and nothing else.

It never fails an installation: without torch or a compiler, or on a compile error, the package
installs without it and one line says so. Everything else of the build stands in pyproject.toml.
The library holds torch operators and no Python module, so it is bound to a version of torch, which
its name carries, and not to a version of Python.

    SSSD_HPC_BUILD=0 pip install ...         installs without the extension
    python setup.py build_ext --inplace      builds it alone and shows what the compiler says
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
SKIPPED = "sssd_hpc: the C++ extension is not built"


def arguments() -> dict[str, Any]:
    """Return what setup() needs to build the extension: nothing where it cannot be built."""
    if os.environ.get("SSSD_HPC_BUILD") == "0":
        print(f"{SKIPPED}: SSSD_HPC_BUILD=0", file=sys.stderr)
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # noqa: BLE001 - a broken torch fails in many ways
        print(f"{SKIPPED}: {error} (--no-build-isolation lets pip see torch)", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        """torch's build, with the library's own name and no way to fail."""

        def get_ext_filename(self, ext_name: str) -> str:
            name = f"_C.torch-{torch.__version__}.so"
            return str(Path(*ext_name.split(".")).with_name(name))

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # noqa: BLE001 - compilers fail in many ways
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                print(f"{SKIPPED}: {reason}", file=sys.stderr)

    # ninja compiles the files side by side; it lies beside a Python that may not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h"))
    extension = CppExtension(
        "sssd_hpc._C",
        sources,
        depends=headers,
        extra_compile_args=[
            *("-O3", "-g0", "-fopenmp", "-fvisibility=hidden"),
            *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
        ],
        extra_link_args=["-fopenmp"],
        # No Python in the library: it links neither libpython nor libtorch_python.
        py_limited_api=True,
    )
    # Without this a build that failed would be missed by the step that copies it.
    extension.optional = True
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**arguments())
