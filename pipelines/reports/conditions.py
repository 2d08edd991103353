"""Under which conditions a benchmark was measured, what its numbers can show, and what has to be known before
believing them; for the tables, the page and the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import config
from pipelines.config import Params, metric_name
from pipelines.reports import statistics
from pipelines.reports.results import COMPLETE, FEWEST, SCORE, Results
from pipelines.reports.table import between, number

UNLEARNT = 1.0  # IoU in percent below which a class is not found at all
LEAD = 3.0  # mIoU by which a teacher has to beat the student alone before a comparison says much
ALPHA = 0.05  # of a test


def warnings(results: Results, times: bool = True) -> list[str]:
    """What a reader has to know before believing a table of this benchmark, which may show ``times``."""
    found = []
    for student in results.students:
        lead = results.lead(student)
        if lead is None:
            part = "the teacher" if results.teacher("val/miou") is None else f"{student} alone"
            found.append(
                f"the lead of the teacher over {student} is unknown, because {part} has no finished cell of "
                "today's settings."
            )
        elif lead < LEAD:
            found.append(
                f"the teacher leads {student} alone by {lead:+.2f} mIoU on validation, "
                f"less than {LEAD:g}: there is little to distil, so the differences say little about methods."
            )
        methods = (results.reference, *results.tested(results.methods))
        lost = _unlearnt(results, student, methods)
        alone = _unlearnt(results, student, [results.reference])
        if lost or alone:
            known = len({*results.classes()} - {*results.absent("test")})
            who = f"with every method, {student}" if lost else f"{student} alone"
            found.append(
                f"{who} has barely learned {', '.join(lost or alone)} (mean IoU below {UNLEARNT:g} %): it is "
                f"far from the end of its training. Alone, it has learned {known - len(alone)} of {known} "
                "classes."
            )
    found += [
        f"the last training of the teacher failed: {note}."
        for cell, note in results.failures.items()
        if cell.is_teacher
    ]
    if results.stale:
        named = "; ".join(
            f"{cell.path}: {', '.join(parts)}" for cell, parts in list(results.stale.items())[:5]
        )
        found.append(
            f"{len(results.stale)} cells are left out, because their settings, data or teacher are not those "
            f"of today ({named}); run `make repro`, or delete their folders in runs/."
        )
    for split in ("val", "test"):
        if missing := results.absent(split):
            found.append(
                f"the split {split} has no pixel of {', '.join(missing)}: no score there; the mean is over "
                "the other classes."
            )
    for tag, kind in (("data_sha256", "versions of the data"), ("teacher.sha256", "teachers")):
        if len(results.distinct(f"tags.{tag}", students_only=True)) > 1:  # there is no record of the teacher
            found.append(f"the cells were trained with different {kind}; run `make repro`.")
    if results.untuned:
        found.append(
            f"the weights of {', '.join(map(results.label, results.untuned))} in params.yaml are not those "
            "that were chosen; run `make tune`."
        )
    tested = results.tested(results.methods)  # the weights of the others are not to be searched
    ran = [m for m in tested if any(results.by_seed(student, m) for student in results.students)]
    others = [results.label(m) for m in ran if results.weights[m] and m not in results.trials]
    if results.trials and others:
        found.append(
            f"{', '.join(others)}: not tuned, while the others had {max(results.trials.values())} trials; "
            "put it into tuning.methods and run `make tune`."
        )
    if times and len({kind for kinds in results.machines.values() for kind in kinds}) > 1:
        found.append("seeds ran on different machines: compare times only within a seed, as the tables do.")
    rows = {*results.methods, *results.variants}
    away: dict[str, list[str]] = {}
    for (_, method), seeds in results.elsewhere.items():
        if method in rows:
            named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} of"
            away.setdefault(named, []).append(results.label(method))
    for named, labels in away.items():
        found.append(
            f"{named} {', '.join(dict.fromkeys(labels))}: trained on another kind of machine than "
            f"{results.reference}, so that their gains contain a difference of rounding, too."
        )
    return found


def _unlearnt(results: Results, student: str, methods: Sequence[str]) -> list[str]:
    """The classes that none of the methods finds."""
    lost = []
    for name in results.classes():
        scores = [results.mean(student, m, f"test/iou/{metric_name(name)}") for m in methods]
        known = [score for score in scores if score is not None]
        if known and max(known) < UNLEARNT:
            lost.append(name)
    return lost


def about(results: Results, params: Params) -> str:
    """What a benchmark consists of, in one sentence."""
    own = params.benchmark(results.benchmark)
    module = config.dataset_module(own.data, results.benchmark)
    size = own.data.get("size")
    shape = f", at {size[0]}×{size[1]} pixels (height × width)" if size else ""
    network = own.teacher.network
    return (
        f"{own.data['dataset']}: {module.ABOUT}{shape}. Teacher: {network.architecture} with "
        f"{network.encoder.removeprefix('tu-')}."
    )


def facts(results: Results) -> list[tuple[str, str]]:
    """Under which conditions a benchmark was measured; what the numbers mean is said in docs/tables.md."""
    counts = sorted({len(results.by_seed(s, m)) for s in results.students for m in results.methods} - {0})
    val, test = (number(results.teacher(metric), ".2f") for metric in ("val/miou", SCORE))
    leads, reference = [], results.reference
    controls = ", ".join(f"{factor:g}" for factor in results.controls.values())
    longer = f"for the comparison at equal compute also {controls} times the steps"
    for student in results.students:
        n = len(results.by_seed(student, reference, "val/miou"))
        lead = results.lead(student)
        leads.append(
            f"over {student} alone: " + ("unknown" if lead is None else f"{lead:+.2f} (mean over n = {n})")
        )
    hashes = [value[:12] for value in results.distinct("tags.data_sha256")]
    images = results.units if results.images else "unknown"
    if results.images and len(results.blocks) < FEWEST:
        images += f", fewer than {FEWEST}: no interval over images, and no method is called better or worse"
    found = [
        ("benchmark", f"{results.benchmark}; data {', '.join(hashes) or 'unknown'}"),
        ("test images", images),
        ("teacher", "not run" if test == "–" else f"{val} validation / {test} test mIoU"),
        ("lead of the teacher on validation", "; ".join(leads)),
        ("seeds", "; ".join(map(power, counts)) or "none has finished"),
        ("tests", " ".join(tests(results, results.methods)) or "none"),
        ("student alone", f"{reference}; {longer}" if controls else f"{reference}, not trained longer"),
        ("training", _training(results)),
        ("tuning", tuning(results)),
        ("code", _code(results)),
        ("machine of each seed", "; ".join(_machines(results)) or "unknown"),
        ("latency", "; ".join(exported(results)) or "not measured"),
    ]
    lacking = [
        f"{student}, {results.label(method)}: {status}"
        for student in results.students
        for method in dict.fromkeys((*results.rows(student), *results.shown(student)))
        if not (status := results.status(student, method)).startswith(COMPLETE)
    ]
    if lacking:
        found.append(("not complete", "; ".join(lacking)))
    return found


def schedule(results: Results, student: str) -> str:
    """How long a student and its teacher were trained, and from which weights, in one sentence; nothing
    without a record."""
    own = [
        r.run for r in results.finished if r.cell.student == student and r.cell.method not in results.controls
    ]
    taught = [r.run for r in results.finished if r.cell.is_teacher]
    if not own or not taught:
        return ""
    (student_run, *_), (teacher_run, *_) = own, taught
    return (
        f"{student} starts from {_start(student_run)} weights and trains for {student_run['steps']} steps of "
        f"{student_run['config']['training']['batch_size']} images; its teacher started from "
        f"{_start(teacher_run)} weights and trained for {teacher_run['steps']} steps."
    )


def begins(results: Results, student: str) -> tuple[str, int]:
    """From which weights a student, or the teacher, starts, and for how many steps it trains."""
    for record in results.finished:
        if record.cell.student == student and record.cell.method not in results.controls:
            return _start(record.run), int(record.run["steps"])
    return "unknown", 0


def _start(run: Mapping[str, Any]) -> str:
    return "random" if run["config"]["network"]["weights"] is None else "ImageNet"


def _training(results: Results) -> str:
    parts = []
    for student in results.students:
        for run in (r.run["config"] for r in results.finished if r.cell.student == student):
            protocol, recipe = run["training"], run["network"].get("recipe") or {"optimizer": "sgd"}
            values = protocol | recipe
            size = "×".join(map(str, values["crop"]))
            parts.append(
                f"{schedule(results, student)} Optimiser: {recipe['optimizer']}, learning rate "
                f"{values['lr']:g} (warm-up of {values['warmup_steps']} steps, then to 0 with the power "
                f"{values['power']:g}), weight decay {values['weight_decay']:g}, crops of {size} pixels, "
                f"auxiliary head {values['auxiliary_weight']:g}, {values['precision']}. Augmentation: "
                f"{', '.join(f'{name} {_plain(value)}' for name, value in values['augmentation'].items())}."
            )
            break
    return " ".join(parts).strip() or "unknown"


def _plain(value: Any) -> str:
    """``0.5``, or ``0.75 to 1.5``."""
    return " to ".join(f"{end:g}" for end in value) if isinstance(value, list) else f"{value:g}"


def _code(results: Results) -> str:
    """From which commits the trainings are."""
    states = [r.run["git"] for r in results.finished]
    commits = {state["commit"] for state in states} - {None}
    dirty = sum(bool(state["dirty"]) for state in states)
    text = f"{len(commits)} commit{'s' * (len(commits) != 1)}"
    if dirty:
        text += f", with changes that were not committed in {dirty} of {len(states)} trainings"
    return f"{text}; what decides a result is in every record's fingerprint, which is today's"


def trials(results: Results) -> str:
    if not results.trials:
        return "no method was tuned"
    how = results.tuning
    return f"{max(results.trials.values())} trials of {how.steps} steps for every method, on {how.student}"


def tuning(results: Results) -> str:
    text, how = trials(results), results.tuning
    if not results.trials:
        return f"{text}."
    text += "".join(f"; {results.label(m)}: {n} different ones" for m, n in results.different.items())
    middle = sum(choice.middle for choice in results.choices.values())
    text += (
        f". {middle} of {len(results.choices)} methods keep the middle of their ranges: no trial led it by "
        f"more than {how.margin:g} mIoU"
    )
    moved = [
        f"{results.label(m)} {choice.score - choice.first:+.1f}"
        for m, choice in results.choices.items()
        if not choice.middle and choice.first is not None  # that of the middle may have failed
    ]
    text += f"; the others gained on it {', '.join(moved)}." if moved else "."
    if ends := [results.label(m) for m, choice in results.choices.items() if choice.at_end]:
        text += f" At an end of a range, beyond which there may be better: {', '.join(ends)}."
    if most := [results.label(m) for m, own in results.choices.items() if own.outermost and not own.at_end]:
        text += f" At the largest or smallest value tried, beyond which nothing is known: {', '.join(most)}."
    return text + agreement(results)


def agreement(results: Results) -> str:
    """Whether what scored well in the short trials of tuning scores well in the table."""
    if results.benchmark != results.tuning.benchmark:
        return ""
    student = results.tuning.student
    rows = [
        (choice.score, val, test)
        for method, choice in results.choices.items()
        if (test := results.mean(student, method)) is not None
        and (val := results.mean(student, method, "val/miou")) is not None
    ]
    if len(rows) < statistics.FEWEST_PAIRS:
        return ""
    tried, validated, tested = ([row[column] for row in rows] for column in range(3))
    rho, interval = statistics.rank_correlation(tried, tested)
    return (
        f" Between the validation mIoU of the chosen trials and the mean test mIoU of the table, over "
        f"{len(rows)} methods, Spearman's ρ is {rho:+.2f} {between(interval)}; between it and the final "
        f"validation mIoU {statistics.rank_correlation(tried, validated)[0]:+.2f}, between that and test "
        f"{statistics.rank_correlation(validated, tested)[0]:+.2f}."
    )


def _machines(results: Results) -> list[str]:
    """Which seeds of each student come from which kind of machine."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (student, seed), kinds in results.machines.items():
        for kind, methods in kinds.items():
            named = f" ({', '.join(map(results.label, methods))})" if len(kinds) > 1 else ""
            found.setdefault((student, kind, named), []).append(str(seed))
    return [
        f"{student}, seed {', '.join(seeds)}{named}: {kind}"
        for (student, kind, named), seeds in found.items()
    ]


def exported(results: Results) -> list[str]:
    """How the latencies of each student were measured."""
    return [
        f"{student}: seed {record['seed']}, {record['rounds']} rounds, "
        f"{'×'.join(map(str, record['input']))} pixels, {_threads(record['hardware']['threads'])} of "
        f"{record['hardware']['processor']}, onnxruntime {record['versions']['onnxruntime']}"
        for student, record in results.exports.items()
    ]


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def power(n: int) -> str:
    """What so few seeds can show at all."""
    if n == 1:
        return "n = 1: one seed, so nothing can be told apart"
    text = f"n = {n}: the smallest p that a sign-flip test can reach is {statistics.smallest_p(n):.2g}"
    return text + (", exploratory" if n < statistics.SEEDS_FOR_SIGNIFICANCE else "")


def significance(results: Results, student: str, methods: Sequence[str]) -> str | None:
    """Which methods of one table differ from the student alone after each adjustment, and whether any
    could; None where nothing was tested."""
    tested = {m: s for m, s in results.standings(student, methods).items() if s.p is not None}
    if not tested:
        return None

    def below(name: str) -> str:
        small = {m: (s.gain.paired.mean or 0) > 0 for m, s in tested.items() if getattr(s, name) < ALPHA}
        parts = [
            f"{', '.join(found)} {word}"
            for word, wanted in (("better", True), ("worse", False))
            if (found := [results.label(m) for m, above in small.items() if above == wanted])
        ]
        return f"{' and '.join(parts) or 'nothing'} below {ALPHA:g}"

    seeds = sorted({s.gain.paired.n for s in tested.values()})
    n = seeds[-1]
    first = min(1.0, len(tested) * statistics.smallest_p(n))
    least = ", ".join(
        f"{statistics.smallest_p(own):.2g}" + f" with n = {own}" * (len(seeds) > 1) for own in seeds
    )
    how = f"smallest possible: {first:.2g}"
    if first >= ALPHA:
        how += f"; n = {statistics.seeds_needed(len(tested), ALPHA)} is needed"
    return (
        f"sign-flip tests of {len(tested)} method{'s' * (len(tested) > 1)}, n = "
        f"{' or '.join(map(str, seeds))}: {below('p_holm')} by "
        f"Holm ({how}), {below('p_max')} by max-T (smallest possible: {least})"
    )


def tests(results: Results, methods: Sequence[str], *students: str) -> list[str]:
    """What a table says about the tests of each student, and about rows that differ in their seeds."""
    found = []
    for student in students or results.students:
        if text := significance(results, student, methods):
            found.append(f"{student}, {text}.")
        ranked = (results.reference, *results.tested(methods))
        seeds = {tuple(s) for m in ranked if (s := results.by_seed(student, m))}
        if len(seeds) > 1:
            found.append(
                f"{student}, the rows have different seeds: compare rows of one n, and not means of another."
            )
    return found
