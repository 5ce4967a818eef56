"""`luthier data check PATH`: what a source is taken for, what is in it, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from orchestrator.ingest.assign import assign
from orchestrator.ingest.decoding import Job, Progress, decode_all
from orchestrator.ingest.duplicates import find_duplicates, in_words
from orchestrator.ingest.errors import DataError, counted, existing, few
from orchestrator.ingest.report import DataReport, Sizes
from orchestrator.ingest.request import IngestRequest, open_source
from orchestrator.ingest.source import Outcome, Source


def check(
    path: str | Path,
    workers: int | None = None,
    progress: Progress | None = None,
    label: str | None = None,
    fail_on_leak: bool = False,
) -> DataReport:
    """Open every image of a source and explain what was found; nothing is written.

    Args:
        path: folder, `.parquet` or `.npz` file, or the word `digits` where no such path exists.
        workers: decoder processes; None = one per CPU.
        progress: called from several threads with (images done, images in all, unreadable ones).
        label: column with the classes of a Parquet source; None = the one with a usual name.
        fail_on_leak: the same image in several splits or domains is a problem.

    Raises:
        DataError: nothing there, or nothing that could be read as data.
    """
    request = IngestRequest(source=detect(Path(path)), root=str(path), label=label)
    source = open_source(request)
    # Pictures are decoded as for a store, but to a thumbnail: what is wanted is whether they can be.
    outcomes = decode_all(source, range(len(source.samples)), Job(side=8, interpolation="nearest"), workers, progress)
    report = _report(Path(path), source, request, outcomes)
    return replace(report, problems=[*report.problems, *_leaks(report)]) if fail_on_leak else report


def _leaks(report: DataReport) -> list[str]:
    found = report.duplicates
    count = found["across_groups"]
    rule = "No image may lie in more than one split or domain (--fail-on-leak), but "
    what = f"{counted(count, 'image')} {'does' if count == 1 else 'do'}: {few(map(in_words, found['across']))}"
    return [f"{rule}{what}. Remove the copies; --json lists them all."] if count else []


def detect(path: Path) -> str:
    """The kind of source at a path: by its ending, or by which kind of file a folder holds.

    Raises:
        DataError: nothing there, or a file of no known kind.
    """
    if str(path) == "digits" and not path.exists():
        return "digits"
    root = existing(path.expanduser())
    kinds = {".parquet": "parquet", ".npz": "npz"}
    if root.is_file():
        if root.suffix.lower() not in kinds:
            raise DataError(
                f"Data must be a folder, a .parquet file or an .npz file, but {path} is none of these. Unpack archives "
                "into <class>/<image>, and put the images that a table names there too."
            )
        return kinds[root.suffix.lower()]
    if any(root.glob("*.npz")):
        return "npz"
    return "parquet" if next(root.rglob("*.parquet"), None) else "folder"


def _report(path: Path, source: Source, request: IngestRequest, outcomes: Mapping[int, Outcome]) -> DataReport:
    samples = source.samples
    good = [i for i, outcome in outcomes.items() if outcome.reason is None]
    domains: dict[str, dict[str, int]] = {domain: {} for domain in source.empty_domains}
    for (domain, label), count in sorted(Counter((samples[i].domain, samples[i].label) for i in good).items()):
        domains.setdefault(domain, {})[label] = count
    splits = Counter(samples[i].split for i in good if samples[i].split is not None)
    bad = [i for i in outcomes if outcomes[i].reason is not None]
    place_of, problems = _places(source, request, bad)
    return DataReport(
        path=str(path),
        source=source.kind,
        layout=source.layout,
        images=len(good),
        domains={domain: domains[domain] for domain in sorted(domains)},
        ood_domains=sorted(source.evaluation_domains),
        splits={name: splits[name] for name in ("train", "val", "test") if name in splits},
        sizes=_sizes([outcomes[i] for i in good]),
        formats=dict(Counter(outcomes[i].format for i in good).most_common()),
        notes=dict(Counter(note for i in good for note in outcomes[i].notes).most_common()),
        unreadable=[{"name": samples[i].name, "reason": str(outcomes[i].reason)} for i in bad],
        ignored=[left._asdict() for left in source.ignored],
        duplicates=find_duplicates(samples, outcomes, place_of).to_dict(),
        problems=problems,
    )


def _places(source: Source, request: IngestRequest, bad: list[int]) -> tuple[dict[int, str], list[str]]:
    """The split of each sample in a study with default settings (if that would refuse the data: as the source says),
    and why it would."""
    if len(bad) == len(source.samples):
        return {}, [f"Images must be readable, but none of {len(bad)} is."]
    try:
        assignment = assign(source, request, bad)
    except DataError as error:
        return {i: sample.split or "" for i, sample in enumerate(source.samples)}, [str(error)]
    return {int(i): name for name, positions in assignment.splits.items() for i in positions}, []


def _sizes(outcomes: list[Outcome]) -> Sizes | None:
    if not outcomes:
        return None
    by_area = sorted((o.width * o.height, o.width, o.height) for o in outcomes)
    (_, *least), (_, *middle), (_, *most) = by_area[0], by_area[len(by_area) // 2], by_area[-1]
    common = Counter((o.width, o.height) for o in outcomes).most_common(5)
    return Sizes(
        smallest=(least[0], least[1]),
        median=(middle[0], middle[1]),
        largest=(most[0], most[1]),
        most_common={f"{width}x{height}": count for (width, height), count in common},
    )
