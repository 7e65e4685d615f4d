"""Print the seconds that each share of the tests took, from pytest's JUnit report."""

import sys
from collections import Counter
from xml.etree import ElementTree as ET

SHARES = {
    "training": ("training", "kernels", "bench_cuda", "demo"),
    "circuits": ("circuits", "bench_graph"),
    "evaluation": ("evaluat",),
    "explore, figures, command line, notebooks": ("explore", "figures", "cli", "docs", "notebooks"),
}


def share(module: str) -> str:
    """Name the share of a test module; what is not listed is core."""
    name = module.rsplit("test_", maxsplit=1)[-1]
    return next((share for share, starts in SHARES.items() if name.startswith(starts)), "core")


def main(report: str) -> None:
    """Add up a report's seconds."""
    seconds: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):  # noqa: S314
        seconds[share(case.attrib["classname"].split(".")[1])] += float(case.attrib["time"])
    for name, total in sorted(seconds.items()):
        sys.stdout.write(f"{total:6.0f} s  {name}\n")


if __name__ == "__main__":
    main(sys.argv[1])
