"""The engine: cheap combinations first, the promising trained, all measured on the artifact.

1. the original, exported and measured;
2. the ladder: single techniques and combinations, post-training, seconds each;
3. trained combinations: those of the ladder that promise most, seeds from experience, then what a
   multi-objective sampler (TPE of optuna) proposes from what has been measured. Each is first
   built without training, which tells its bytes and milliseconds: too large or slow, it is dropped;
4. a longer training for the best few.

Each step is cut to the time, or the number of trials, that is left. A killed run resumes where it was.
Whatever a candidate does, it ends as a point or as a failure, and the search continues.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import torch
from torch import nn

from penjing import files
from penjing.devices import artifact, measurement
from penjing.devices.comparison import Original
from penjing.devices.local import Local
from penjing.errors import PenjingError
from penjing.exploration.attempt import TooLongError, attempt, blamed, reason_of
from penjing.exploration.budget import Budget, describe
from penjing.exploration.candidates import (
    Candidate,
    is_sensible,
    is_trained,
    ladder,
    seeds,
    suggest,
)
from penjing.exploration.effort import Effort, Phase
from penjing.exploration.predictions import predictions
from penjing.exploration.study import BASELINE, Contribution, Point, Study, alone
from penjing.net.plain import plain
from penjing.progress import Bar, bar, say
from penjing.recipe import Recipe, compress, identity, parse
from penjing.tasks import Task, interval, outputs_of
from penjing.training import seconds_per_epoch

LADDER = Phase(time=0.55, trials=0.5)
QUICK = Phase(time=0.55, trials=0.85)
LONG = Phase(time=0.95, trials=1.0)  # the rest of the time reads the test part
QUICK_TRAININGS = 8  # how many the time between should hold
POLISH = 3.0  # a long training has so many times the epochs of a quick one
SLACK = 1.1  # training may still shrink a file or a latency by a tenth
LONGEST_QUICK_EPOCHS = 6.0
UNTIMED_EPOCHS = 2.0
LONGEST_S = 600.0
"""Seconds that a post-training candidate may take, or a quarter of all time if that is more."""
PREDICTIONS = "predictions.json"
"""The file, in a point's folder, of the classes that it gives images."""
PROPOSALS = 1000
"""After which a sampler has nothing new to propose."""


def explore(
    model: nn.Module,
    task: Task,
    budget: Budget | None = None,
    *,
    folder: str | Path = "study",
    time: str | float | None = None,
    trials: int | None = None,
    name: str = "model",
    data: str = "data",
    command: str | None = None,
    threads: int = 1,
    progress: bool = True,
    on_change: Callable[[Study], None] = lambda study: None,
) -> Study:
    """Find the frontier of smaller and faster versions of ``model``.

    Args:
        model: trained; left as it is.
        task: its data and score. Training reads *train*, choices read *validation*, and *test* is
            read once, for the points on the frontier.
        budget: what is enough; without one the whole frontier is searched and the best is the one
            that lost least.
        folder: the study. If it holds one of this model and data, the search resumes.
        time: how long in total, over all runs of this study: ``"30m"``, ``"2h"`` or seconds; half an
            hour where ``trials`` is not given either.
        trials: how many candidates in total, over all runs; what is only built to know the cost of a
            training comes on top. Without ``time`` no choice depends on a clock: the same seed gives the
            same candidates.
        name, data, command: how the report calls the model, the data, and what resumes the study.
        threads: of the runtime, for all latencies of the study.
        on_change: called with the study after each candidate, and at the end, when it no longer is
            ``running``.

    Returns:
        The study, whose ``best`` is None if nothing met the budget. Ctrl-C ends the search early
        with everything measured so far in it (no point at all while the original is measured);
        ``stopped`` is then true.

    Raises:
        PenjingError: the model does not fit the task or cannot be measured, the folder cannot be used
            or is in use by another process, or the disk is full: what was measured is then kept.
    """
    effort, folder = Effort.of(time, trials), Path(folder)
    task.check(model)
    about = {"model": name, "data": data, "command": command, "seed": task.seed}
    about["key"] = identity(task, model).hexdigest()[:16]
    about["threads"] = threads
    with alone(folder), _said_when_full(folder):
        study = Study(folder, about, budget or Budget())
        study.running = True
        try:
            _Search(model, task, study, effort, threads, progress, on_change).run()
        except KeyboardInterrupt:
            study.stopped = True
        finally:
            study.running = False
        if BASELINE in study.points:
            study.write()
            on_change(study)
    return study


@contextmanager
def _said_when_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not files.disk_is_full(error):
            raise
        raise PenjingError(
            f"no space is left on the disk for the study in {folder}; what was measured is kept: free "
            "some space and give the same command again."
        ) from error


class _Search:
    """One run of the engine over a study."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        study: Study,
        effort: Effort,
        threads: int,
        progress: bool,
        on_change: Callable[[Study], None],
    ) -> None:
        device = next((p.device for p in model.parameters()), task.example.device)
        self.model = plain(model, task.example.to(device))
        self.form = outputs_of(self.model, task.batches("train", 1, limit=1))[0]
        self.original = Original(study.folder / "trials" / BASELINE / "model.onnx", task, self.form)
        self.task, self.study, self.effort, self.device = task, study, effort, Local(threads)
        self.before_s, self.start = study.elapsed_s, clock.monotonic()
        self.progress, self.line, self.on_change = progress, Bar(), on_change

    def run(self) -> None:
        with bar("exploring", hidden=not self.progress) as self.line:
            try:
                self.measure_baseline()
                self.compare_older_points()
                for candidate in self.plan():
                    self.trial(candidate)
                    with self.survived("on_change"):
                        self.on_change(self.study)
                self.finish()
            finally:
                self.study.elapsed_s = self.elapsed()
                self.study.write()

    def elapsed(self) -> float:
        """Seconds spent on this study, earlier runs included."""
        return self.before_s + clock.monotonic() - self.start

    def count(self) -> int:
        """Candidates tried in this study, earlier runs included. What is only built to know the cost of
        a training does not count, so that a run resumes with the count that it stopped with."""
        rungs = {candidate.name for candidate in self.ladder()}
        tried = [point.name for point in self.study.compressed] + list(self.study.failures)
        return sum(name in rungs or is_trained(name) for name in tried)

    def ladder(self) -> list[Candidate]:
        """Return the first candidates, as far as the number of trials goes."""
        return [c for at, c in enumerate(ladder()) if at < self.effort.trials * LADDER.trials]

    def allows(self, phase: Phase) -> bool:
        return self.effort.allows(phase, self.elapsed(), self.count())

    def show(self, what: str) -> None:
        self.line.update(self.effort.share(self.elapsed(), self.count()), what)

    def tell(self, line: str) -> None:
        if self.progress:
            say(line)

    def measure_baseline(self) -> None:
        if BASELINE in self.study.points:
            return
        self.show("measuring the original")
        folder = Path("trials") / BASELINE
        try:
            card = artifact.build(
                self.model,
                self.task,
                self.study.folder / folder,
                recipe={"name": BASELINE},
                device=self.device,
            )
        except Exception as error:
            if isinstance(error, PenjingError) or files.disk_is_full(error):
                raise
            raise PenjingError(f"the original cannot be measured ({reason_of(error)})") from error
        same = interval.unchanged(self.task.size("validation"))
        self.study.add(Point(**(card.model_dump() | same.model_dump()), folder=str(folder)))

    def compare_older_points(self) -> None:
        """Points of an earlier version lack what their files still tell."""
        for point in self.study.compressed:
            if point.divergence is None:
                with self.survived(point.name):
                    file = self.study.folder / point.folder / "model.onnx"
                    found = self.original.compared(file, point.split, trained=point.trained)
                    self.study.add(point.model_copy(update=found.model_dump()))

    def plan(self) -> Iterator[Candidate]:
        """Yield the next candidate, decided with what has been measured until then."""
        for candidate in self.ladder():
            if self.elapsed() < self.effort.seconds * LADDER.time:
                yield candidate
        epochs = self.quick_epochs()
        if epochs is None:
            return
        for candidate in [*self.promising(epochs), *seeds(epochs)]:
            if self.allows(QUICK):
                yield candidate
        while self.allows(QUICK) and (proposed := self.propose(epochs)) is not None:
            yield proposed
        while (
            self.allows(LONG) and (longer := self.polish(epochs) or self.more(epochs)) is not None
        ):
            yield longer

    def more(self, epochs: float) -> Candidate | None:
        """Trials that are left over; time that is left over is saved."""
        return None if self.effort.timed else self.propose(epochs)

    def quick_epochs(self) -> float | None:
        """Epochs such that eight trainings fit in the time given to them, so that more time gives
        longer trainings; None where the model cannot be trained."""
        if not self.effort.timed:
            return UNTIMED_EPOCHS
        if self.epoch_s is None:
            self.show("timing the training")
            try:
                seconds = seconds_per_epoch(self.model, self.task, teacher=self.model)
            except Exception as error:
                if files.disk_is_full(error):
                    raise
                self.tell(
                    f"nothing is trained: a training of the original fails ({reason_of(error)})"
                )
                return None
            self.study.about["seconds_per_epoch"] = float(f"{max(seconds, 1e-3):.2g}")
            self.study.write()
        assert self.epoch_s is not None
        allowed = self.effort.seconds * (QUICK.time - 0.1) / QUICK_TRAININGS
        return float(f"{min(allowed / self.epoch_s, LONGEST_QUICK_EPOCHS):.2g}")

    @property
    def epoch_s(self) -> float | None:
        """Seconds that an epoch of the original takes, measured once; None where nothing is timed."""
        return self.study.about.get("seconds_per_epoch") if self.effort.timed else None

    def promising(self, epochs: float) -> list[Candidate]:
        """The ladder's points that save much and have not lost everything: worth training."""
        baseline = self.study.baseline
        allowed = self.study.budget.drop or 0.01
        hopeful = [
            point
            for candidate in self.ladder()
            if (point := self.study.points.get(candidate.name))
            and allowed < point.drop < baseline.score / 2
            and not self.too_costly(point)
        ]
        hopeful.sort(key=self.cost)
        return [Candidate(**{**point.candidate, "epochs": epochs}) for point in hopeful[:2]]

    def cost(self, point: Point) -> float:
        """Return bytes times time, which is to be small."""
        return point.packed_bytes * self.work(point)

    def work(self, point: Point) -> float:
        """The time of an image, the original's being 1. Where nothing may depend on a clock, the share
        of MACs stands for it, which integers do about twice as fast."""
        if self.effort.timed:
            return self.study.speed(point)
        faster = 2 if point.candidate.get("integers") else 1
        return point.macs / max(self.study.baseline.macs, 1) / faster

    def propose(self, epochs: float) -> Candidate | None:
        """A combination not yet tried, from a sampler that knows all trained points; None if it finds
        no more."""
        sampler = optuna.samplers.TPESampler(
            seed=self.task.seed + self.count(), multivariate=True, n_startup_trials=6
        )
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        known = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
        for point in self.study.points.values():
            if point.trained:
                # Points of an earlier version do not say what only this one knows.
                settings = Candidate(**point.candidate).model_dump()
                known.enqueue_trial(settings, skip_if_exists=False)
                trial = known.ask()
                suggest(trial, epochs)
                known.tell(trial, [point.packed_bytes, self.work(point), point.drop])
        for _ in range(PROPOSALS):
            trial = known.ask()
            candidate = suggest(trial, epochs)
            if is_sensible(candidate) and not self.tried(candidate):
                return candidate
            known.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def polish(self, epochs: float) -> Candidate | None:
        """The best quickly trained point whose long training still fits in the time left."""
        left = self.effort.seconds * LONG.time - self.elapsed()
        allowed = max(self.study.budget.drop or 0.01, 1e-3)

        def cost(point: Point) -> float:
            return self.cost(point) * (1 + max(point.drop / allowed, 0.0)) ** 2

        for point in sorted(self.study.compressed, key=cost):
            if not point.trained or point.candidate["epochs"] != epochs or self.too_costly(point):
                continue
            candidate = Candidate(**{**point.candidate, "epochs": round(epochs * POLISH, 3)})
            if not self.tried(candidate) and point.seconds * POLISH <= left:
                return candidate
        return None

    def tried(self, candidate: Candidate) -> bool:
        study = self.study
        return any(
            candidate.name in known for known in (study.points, study.failures, study.dropped)
        )

    def trial(self, candidate: Candidate) -> None:
        """Run one candidate's recipe, build its artifact, measure it, keep it."""
        if self.tried(candidate) or not is_sensible(candidate) or not self.allows(LONG):
            return
        folder = self.study.folder / "trials" / candidate.folder
        if (reason := blamed(folder)) is not None:
            self.fail(candidate, reason)
        elif candidate.epochs and (reason := self.dropped(candidate)):
            self.study.dropped[candidate.name] = reason
        elif self.allows(LONG):  # An untrained candidate may have been the last.
            self.show(candidate.name)
            with self.survived(candidate.name, candidate):
                with attempt(folder, self.longest_s(candidate)):
                    point = self.realize(candidate)
                self.keep(point)

    @contextmanager
    def survived(self, name: str, candidate: Candidate | None = None) -> Iterator[None]:
        """Whatever is raised is said, and the search continues: if by a ``candidate``, it has failed.
        Only a full disk ends the search, since that is no candidate's fault."""
        try:
            yield
        except (Exception, TooLongError) as error:
            if files.disk_is_full(error):
                raise
            if candidate is not None:
                self.fail(candidate, reason_of(error), error)
            else:
                self.tell(f"{name}: {reason_of(error)}")
        else:
            return
        # Only now does nothing hold the failed model any more.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def keep(self, point: Point) -> None:
        self.study.elapsed_s = self.elapsed()
        self.study.add(point)
        low, high = self.study.bounds(point) or (math.nan, math.nan)
        self.tell(
            f"{point.name}: {point.packed_bytes / 1000:.1f} KB, {point.latency_ms:.3f} ms, "
            f"drop {point.drop:.2%} ({low:.2%} to {high:.2%})"
        )

    def fail(self, candidate: Candidate, reason: str, error: BaseException | None = None) -> None:
        self.study.elapsed_s = self.elapsed()
        self.study.fail(candidate.name, candidate.folder, reason, error)
        self.tell(f"{candidate.name}: {reason}")

    def longest_s(self, candidate: Candidate) -> float | None:
        """Seconds that ``candidate`` may take, None where its training was promised no time."""
        seconds = LONGEST_S
        if self.effort.timed:
            seconds = max(seconds, self.effort.seconds / 4)
        if not candidate.epochs:
            return seconds
        limits = [s.train.time_budget for s in self.recipe(candidate).stages if s.train is not None]
        return seconds + sum(filter(None, limits)) if all(limits) else None

    def recipe(self, candidate: Candidate) -> Recipe:
        return candidate.recipe(self.epoch_s)

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

    def realize(self, candidate: Candidate) -> Point:
        recipe, start = self.recipe(candidate), clock.monotonic()
        model = compress(self.model, self.task, recipe, cache=self.study.folder / "cache")
        folder = Path("trials") / candidate.folder
        card = artifact.build(
            model,
            self.task,
            self.study.folder / folder,
            recipe=recipe.to_dict(),
            reference=self.original,
            device=self.device,
        )
        if not all(map(math.isfinite, (card.score, card.drop, card.divergence or 0.0))):
            raise PenjingError("its outputs are not finite numbers")
        recipe.save(self.study.folder / folder / "recipe.yaml")
        return Point(
            **card.model_dump(),
            folder=str(folder),
            trained=candidate.epochs > 0,
            candidate=candidate.model_dump(),
            seconds=clock.monotonic() - start,
        )

    def finish(self) -> None:
        """Give the frontier's points their test scores and what each stage contributed."""
        for point in [self.study.baseline, *self.study.frontier]:
            self.show(f"finishing {point.name}")
            with self.survived(point.name):
                if self.task.has_test and point.test_score is None:
                    self.test(point)
                if point.candidate and not point.contributions:
                    point.contributions = self.contributions(point)
                self.study.add(point)
        with self.survived("predictions"):
            self.predict()

    def predict(self) -> None:
        """Keep which images get another class from the best point, or the one nearest to it."""
        best = self.study.best
        point = best.point if best else self.study.nearest()[0]
        target = self.study.folder / point.folder / PREDICTIONS
        if point is self.study.baseline or not self.task.classifies or target.exists():
            return
        pair = self.original.outputs(self.study.folder / point.folder / "model.onnx", "validation")
        files.write_text(target, json.dumps(predictions(self.task, *pair)))

    def test(self, point: Point) -> None:
        file, baseline = self.study.folder / point.folder / "model.onnx", self.study.baseline
        if point is baseline:
            point.test_score = measurement.score(file, self.task, "test", form=self.form)
            point.test_drop = point.test_drop_low = point.test_drop_high = 0.0
            return
        found = self.original.compared(file, "test", trained=True)
        point.test_score = (baseline.test_score or 0.0) - found.drop
        point.test_drop = found.drop
        point.test_drop_low, point.test_drop_high = found.drop_low, found.drop_high

    def contributions(self, point: Point) -> list[Contribution]:
        """Measure the model after each stage; stages come from the cache, the last is the point."""
        stages = parse(point.recipe or {}, point.name).stages
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
        model = compress(self.model, self.task, recipe, cache=self.study.folder / "cache")
        with tempfile.TemporaryDirectory() as folder:
            return artifact.build(
                model, self.task, Path(folder), recipe=recipe.to_dict(), device=self.device
            )
