"""The engine: cheap combinations first, the promising trained, all measured on the artifact.

1. the original, exported and measured;
2. the ladder: single techniques and combinations after training, seconds each;
3. trained combinations: those of the ladder that promise most, seeds from experience, then what a
   multi-objective sampler (TPE of optuna) proposes from what has been measured. Each is first
   built without training, which tells its bytes and milliseconds: too large or slow, it is dropped;
4. a longer training for the best few.

Each step is cut to the time that is left. A killed run goes on where it was.
"""

from __future__ import annotations

import tempfile
import time as clock
from collections.abc import Iterator
from pathlib import Path

import optuna
from torch import nn

from penjing import report
from penjing.deploy import artifact, measure
from penjing.deploy.comparison import Original
from penjing.errors import PenjingError
from penjing.exploration.budget import SECONDS, Budget, describe, parse_quantity
from penjing.exploration.candidates import Candidate, is_sensible, ladder, seeds, suggest
from penjing.exploration.study import BASELINE, Contribution, Point, Study
from penjing.plain import plain
from penjing.progress import Bar, bar, say
from penjing.recipe import Recipe, compress, identity
from penjing.tasks import Task, interval, outputs_of
from penjing.training import seconds_per_epoch

TRAINED_UNTIL = 0.55  # of the time: quick trainings
POLISHED_UNTIL = 0.95  # of the time: long trainings; the rest reads the test part
QUICK_TRAININGS = 8  # how many the time between should hold
POLISH = 3.0  # a long training has so many times the epochs of a quick one
SLACK = 1.1  # training may still shrink a file or a latency by a tenth
LONGEST_QUICK_EPOCHS = 6.0


def explore(
    model: nn.Module,
    task: Task,
    budget: Budget | None = None,
    *,
    folder: str | Path = "study",
    time: str | float = "30m",
    name: str = "model",
    data: str = "data",
    command: str | None = None,
    threads: int = 1,
    progress: bool = True,
) -> Study:
    """Find the frontier of smaller and faster versions of ``model``.

    Args:
        model: trained; left as it is.
        task: its data and score. Training reads *train*, choices read *validation*, and *test* is
            read once, for the points on the frontier.
        budget: what is enough; without one the whole frontier is searched and the best is the one
            that lost least.
        folder: the study. If it holds one of this model and data, the search goes on from there.
        time: how long in total, over all runs of this study: ``"30m"``, ``"2h"`` or seconds.
        name, data, command: how the report calls the model, the data, and what goes on with both.

        threads: of the runtime, for all latencies of the study.

    Returns:
        The study, whose ``best`` is None if nothing met the budget. Ctrl-C ends the search early
        with everything measured so far in it; ``stopped`` is then true.

    Raises:
        PenjingError: the model does not fit the task, or the folder cannot be used.
    """
    task.check(model)
    about = {"model": name, "data": data, "command": command, "seed": task.seed}
    about["key"] = identity(task, model).hexdigest()[:16]
    about["threads"] = threads
    study = Study(Path(folder), about, budget or Budget())
    search = _Search(model, task, study, parse_quantity(time, SECONDS, "time"), threads, progress)
    try:
        search.run()
    except KeyboardInterrupt:
        study.stopped = True
    if BASELINE in study.points:
        study.write()
        report.write(study.folder, study.folder / "report.html")
    return study


class _Search:
    """One run of the engine over a study."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        study: Study,
        limit_s: float,
        threads: int,
        progress: bool,
    ) -> None:
        device = next((p.device for p in model.parameters()), task.example.device)
        self.model = plain(model, task.example.to(device))
        self.form = outputs_of(self.model, task.batches("train", 1, limit=1))[0]
        self.original = Original(study.folder / "trials" / BASELINE / "model.onnx", task, self.form)
        self.task, self.study, self.limit_s, self.threads = task, study, limit_s, threads
        self.before_s, self.start = study.elapsed_s, clock.monotonic()
        self.progress, self.line = progress, Bar()

    def run(self) -> None:
        with bar("exploring", hidden=not self.progress) as self.line:
            try:
                self.measure_baseline()
                for candidate in self.plan():
                    self.trial(candidate)
                self.finish()
            finally:
                self.study.elapsed_s = self.elapsed()
                self.study.write()

    def elapsed(self) -> float:
        """Seconds spent on this study, earlier runs included."""
        return self.before_s + clock.monotonic() - self.start

    def show(self, what: str) -> None:
        self.line.update(min(self.elapsed() / self.limit_s, 1.0), what)

    def tell(self, line: str) -> None:
        if self.progress:
            say(line)

    def measure_baseline(self) -> None:
        if BASELINE in self.study.points:
            return
        self.show("measuring the original")
        folder = Path("trials") / BASELINE
        card = artifact.build(
            self.model,
            self.task,
            self.study.folder / folder,
            recipe={"name": BASELINE},
            threads=self.threads,
        )
        same = interval.unchanged(self.task.size("validation"))
        self.study.add(Point(**(card.model_dump() | same.model_dump()), folder=str(folder)))

    def plan(self) -> Iterator[Candidate]:
        """What to try next, decided with what has been measured until then."""
        for candidate in ladder():
            if self.elapsed() < self.limit_s * TRAINED_UNTIL:
                yield candidate
        epochs = self.quick_epochs()
        for candidate in [*self.promising(epochs), *seeds(epochs)]:
            if self.elapsed() < self.limit_s * TRAINED_UNTIL:
                yield candidate
        while self.elapsed() < self.limit_s * TRAINED_UNTIL:
            yield self.propose(epochs)
        while (longer := self.polish(epochs)) is not None:
            yield longer

    def quick_epochs(self) -> float:
        """Epochs such that eight trainings fit in the time given to them; the same in every run."""
        known = self.study.about.get("quick_epochs")
        if known is None:
            self.show("timing the training")
            seconds = self.limit_s * (TRAINED_UNTIL - 0.1) / QUICK_TRAININGS
            epochs = seconds / seconds_per_epoch(self.model, self.task, teacher=self.model)
            known = float(f"{min(epochs, LONGEST_QUICK_EPOCHS):.2g}")
            self.study.about["quick_epochs"] = known
            self.study.write()
        return known

    def promising(self, epochs: float) -> list[Candidate]:
        """The ladder's points that save much and have not lost everything: worth training."""
        baseline = self.study.baseline
        allowed = self.study.budget.drop or 0.01
        hopeful = [
            point
            for point in self.study.points.values()
            if point.candidate
            and not point.trained
            and allowed < point.drop < baseline.score / 2
            and not self.too_costly(point)
        ]
        hopeful.sort(key=lambda point: point.packed_bytes * self.study.speed(point))
        chosen = hopeful[:2]
        return [Candidate(**{**point.candidate, "epochs": epochs}) for point in chosen]

    def propose(self, epochs: float) -> Candidate:
        """A combination not yet tried, from a sampler that knows all trained points."""
        seed = (self.task.seed * 1_000_003 + len(self.study.points)) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=6)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        known = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
        for point in self.study.points.values():
            if point.trained:
                # Points of an earlier version do not say what only this one knows.
                settings = Candidate(**point.candidate).model_dump()
                known.enqueue_trial(settings, skip_if_exists=False)
                trial = known.ask()
                suggest(trial, epochs)
                known.tell(trial, [point.packed_bytes, self.study.speed(point), point.drop])
        while True:
            trial = known.ask()
            candidate = suggest(trial, epochs)
            if is_sensible(candidate) and not self.tried(candidate):
                return candidate
            known.tell(trial, state=optuna.trial.TrialState.FAIL)

    def polish(self, epochs: float) -> Candidate | None:
        """The best quickly trained point whose long training still fits in the time left."""
        left = self.limit_s * POLISHED_UNTIL - self.elapsed()
        allowed = max(self.study.budget.drop or 0.01, 1e-3)

        def cost(point: Point) -> float:
            excess = max(point.drop / allowed, 0.0)
            return point.packed_bytes * self.study.speed(point) * (1 + excess) ** 2

        for point in sorted(self.study.points.values(), key=cost):
            if not point.trained or point.candidate["epochs"] != epochs or self.too_costly(point):
                continue
            candidate = Candidate(**{**point.candidate, "epochs": round(epochs * POLISH, 3)})
            if not self.tried(candidate) and point.seconds * POLISH <= left:
                return candidate
        return None

    def tried(self, candidate: Candidate) -> bool:
        return candidate.name in self.study.points or candidate.name in self.study.failures

    def trial(self, candidate: Candidate) -> None:
        """Run one candidate's recipe, build its artifact, measure it, keep it."""
        if self.tried(candidate) or not is_sensible(candidate):
            return
        if candidate.epochs and (reason := self.dropped(candidate)):
            self.study.failures[candidate.name] = reason
            return
        self.show(candidate.name)
        try:
            point = self.realize(candidate)
        except PenjingError as error:
            self.study.failures[candidate.name] = str(error)
            self.tell(f"{candidate.name}: {error}")
        else:
            self.study.elapsed_s = self.elapsed()
            self.study.add(point)
            self.tell(
                f"{point.name}: {point.packed_bytes / 1000:.1f} KB, {point.latency_ms:.3f} ms, "
                f"drop {point.drop:.2%}"
            )

    def dropped(self, candidate: Candidate) -> str | None:
        """Why ``candidate`` is not worth training: what it costs is known without."""
        untrained = candidate.model_copy(update={"epochs": 0.0})
        self.trial(untrained)
        point = self.study.points.get(untrained.name)
        over = self.too_costly(point) if point else {}
        return f"not trained: without training it has {describe(over)}" if over else None

    def too_costly(self, point: Point) -> dict[str, tuple[float, float]]:
        """The limits of size and latency that ``point`` exceeds by more than training may save."""
        size, latency = point.packed_bytes / SLACK, point.latency_ms / SLACK
        return self.study.budget.excess(size, latency, drop=0.0)

    def compressed(self, recipe: Recipe) -> nn.Module:
        cache = self.study.folder / "cache"
        return compress(self.model, self.task, recipe, cache=cache, progress=self.progress)

    def realize(self, candidate: Candidate) -> Point:
        recipe, start = candidate.recipe(), clock.monotonic()
        model = self.compressed(recipe)
        folder = Path("trials") / recipe.name
        card = artifact.build(
            model,
            self.task,
            self.study.folder / folder,
            recipe=recipe.to_dict(),
            reference=self.original,
            threads=self.threads,
        )
        recipe.save(self.study.folder / folder / "recipe.yaml")
        return Point(
            **card.model_dump(),
            folder=str(folder),
            trained=candidate.epochs > 0,
            candidate=candidate.model_dump(),
            seconds=clock.monotonic() - start,
        )

    def finish(self) -> None:
        """What only the frontier's points get: the test score, and what each stage contributed."""
        for point in [self.study.baseline, *self.study.frontier]:
            self.show(f"finishing {point.name}")
            if self.task.has_test and point.test_score is None:
                file = self.study.folder / point.folder / "model.onnx"
                point.test_score = measure.score(file, self.task, "test", form=self.form)
                point.test_drop = (self.study.baseline.test_score or 0.0) - point.test_score
            if point.candidate and not point.contributions:
                point.contributions = self.contributions(point)
            self.study.add(point)

    def contributions(self, point: Point) -> list[Contribution]:
        """Measure the model after each stage; stages come from the cache, the last is the point."""
        stages = Candidate(**point.candidate).recipe().stages
        measured: list[Contribution] = []
        for index in range(len(stages)):
            card: artifact.Card = point
            if index + 1 < len(stages):
                card = self.prefix(Recipe(name=point.name, stages=stages[: index + 1]))
            names = [technique.name for technique in stages[index].techniques]
            fields = card.model_dump(include=set(Contribution.model_fields))
            measured.append(Contribution(stage=index + 1, techniques=names, **fields))
        return measured

    def prefix(self, recipe: Recipe) -> artifact.Card:
        model = self.compressed(recipe)
        with tempfile.TemporaryDirectory() as folder:
            return artifact.build(
                model, self.task, Path(folder), recipe=recipe.to_dict(), threads=self.threads
            )
