"""One comparison, from its options to its conclusion: sizes, searches, seeds where they decide, files to act with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Group
from rich.styled import Styled

from partial_lora.compare import measure_forgetting, rate_search, take, verdict
from partial_lora.compare.candidates import (
    Entrant,
    Half,
    is_made,
    jobs_at_once,
    known_rates,
    limit_text,
    prepared,
    refuse_twins,
    timed,
    was_killed,
)
from partial_lora.compare.measure_forgetting import Other
from partial_lora.compare.options import FULL, QUICK, Options
from partial_lora.compare.rate_search import FINALISTS, HALF, SURVIVORS, Asked, Search, Trial, full, validation_of
from partial_lora.errors import PartialLoraError
from partial_lora.files import grouped, is_locked
from partial_lora.launching import directory, packs, pool
from partial_lora.launching.launch import Outcome
from partial_lora.launching.packs import recorded
from partial_lora.report import certificate, ranking, records, tables
from partial_lora.report.forgetting import changes_of

Say = Callable[[str], None]
Watch = Callable[[Mapping], None]  # as bars.Bars.update
EntrantRun = tuple[Entrant, Trial]
Make = Callable[[Sequence[EntrantRun]], int]  # makes runs, returns an exit code


class StoppedError(Exception):
    """Runs were asked to stop. code: the exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass
class Conclusion:
    """Table and page of a comparison, and of each group the verdict in sentences with the folder of its files."""

    table: Group
    verdicts: list[tuple[list[str], Path]]
    page: Path


@dataclass
class Comparison:
    """Candidates that are compared under the same settings, and how far each has come.

    left_out: a line on each method that is not among them. reached: the share of its steps that each run has made, by
    candidate, learning rate and seed. total: whole runs that there are if all looks are made at what is not decided.
    share: of them, which is done. others: sets that each group may forget. unmeasured: a line on each run of which
    that is not known.
    """

    options: Options
    progress: list[Entrant]
    left_out: list[str]
    reached: dict[tuple[Entrant, float, int], float] = field(default_factory=dict)
    total: float = 0.0
    share: float = 0.0
    others: dict[str, list[Other]] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, options: Options, parts: Sequence[tuple[Options, Sequence[str]]]) -> Comparison:
        """Return comparisons that are made as one. parts: of each its methods and budgets, and the settings of `train`.

        Raises PartialLoraError for what `train` would refuse, and for what one verdict cannot tell apart.
        """
        found = [prepared(*part) for part in parts]
        candidates = [candidate for candidates, _ in found for candidate in candidates]
        refuse_twins(candidates)
        fit = {one.group: one for one in reversed(candidates) if one.unfit is None} if options.forgets else {}
        others = {title: [Other.of(name, one.usual) for name in options.forgets] for title, one in fit.items()}
        left_out = [line for _, lines in found for line in lines]
        return cls(options, list(map(Entrant, candidates)), left_out, others=others)

    def measure(self, say: Say) -> None:
        """Say what is left out and what every candidate takes, timed for a quick search; share the cores among runs.

        Without a number of jobs, it is as many as cores and memory allow.
        """
        for line in self.left_out:
            say(line)
        for one in self.progress:
            if self.options.search == QUICK:
                one.candidate = timed(one.candidate)
            candidate, step = one.candidate, one.candidate.step_seconds
            of_steps = f", {step:.3f} s a step of {candidate.steps:,}" if step else ""
            say(f"{candidate.name}: " + (candidate.unfit or f"{candidate.parameters:,} parameters{of_steps}"))
        candidates = [one.candidate for one in self.progress]
        self.options.jobs = self.options.jobs or jobs_at_once(candidates)
        pool.share_threads(self.options.jobs)  # memory may allow fewer at once than cores
        if any(one.seconds for one in self.alive):
            for line in verdict.prospects([one.candidate for one in self.alive], self.options):
                say(line)

    @property
    def alive(self) -> list[Entrant]:
        """Those that are not refused."""
        return [one for one in self.progress if one.refused is None]

    @property
    def groups(self) -> dict[str, list[Entrant]]:
        """Those with a learning rate, by what they have in common."""
        return grouped((one for one in self.alive if one.best is not None), lambda one: one.candidate.group)

    # --- The runs.

    def run(self, say: Say, *, watch: Watch, note: Say, sweep: Callable[[list[str]], int]) -> int:
        """Make the runs that decide; return the exit code, above 2 if interrupted: made again it goes on from there.

        say: takes what is found and decided; note: why a run failed; watch: how much is done. sweep: `train -m`, which
        makes the runs where settings name one of Hydra's launchers.
        """
        settings = (override for one in self.progress for override in one.candidate.overrides)
        if any(override.startswith("hydra/launcher=") for override in settings):
            make = partial(by_sweeps, sweep=sweep)
        else:
            groups = grouped(self.alive, lambda one: one.candidate.group).values()
            last = verdict.looks_of(self.options)[-1]
            self.total = sum(self.options.runs_of(len(group), last) for group in groups)
            make = partial(self._side_by_side, watch=watch, note=note)
        code = self.decide(make, say)
        if code < 2 and self.reached:
            watch({"stage": "runs", "done": 1, "total": 1})
        if code < 2 and self.others:
            self.measure_forgetting(say)
        return code

    def measure_forgetting(self, say: Say) -> None:
        """Measure the runs at the best rates on other sets, where that is not recorded."""
        self.unmeasured = []
        for title, group in self.groups.items():
            places = [place for one in group for place in one.best_places().values()]
            others = self.others[title]
            say(f"forgetting on {', '.join(other.name for other in others)}: {len(places)} runs")
            self.unmeasured += measure_forgetting.measure(places, others)

    def decide(self, make: Make, say: Say) -> int:
        """Search for every learning rate, and train with the seeds that looks ask for; return the exit code.

        Runs that are finished are not made again. After an interruption no further run is made. The code is 1 where a
        run was killed, so that its learning rate was not tried.
        """
        began = time.monotonic()
        try:
            self.search(make, say)
        except StoppedError as stopped:
            return stopped.code
        last, decided = verdict.looks_of(self.options)[-1], set()
        for group in self.groups.values():
            while group:
                seeds, sentences = self.next_look(group)
                for one in {*group} - seeds.keys() - decided:
                    decided.add(one)
                    self.total -= last - one.seeds
                for sentence in sentences:
                    say(sentence)
                if not seeds:
                    break
                runs = [(one, Trial(one.best, seed)) for one in group for seed in range(seeds.get(one, 0))]
                new = [(one, trial) for one, trial in runs if one.of_seed(trial.seed) is None]
                left = sum(one.seconds for one, _ in new) / self.options.jobs
                hours, needed = self.options.hours, time.monotonic() - began + left
                if hours and max(seeds.values()) > 2 and needed > 3600 * hours:
                    say(f"hours={hours:g} are over: {len(new)} runs more would take {verdict.in_time(left)}")
                    break
                if sentences:
                    say(f"{len(new)} runs more: {verdict.in_time(left)}")
                try:
                    self.make_missing(runs, make)
                except StoppedError as stopped:
                    return stopped.code
                for one in {one for one, trial in new if one.of_seed(trial.seed) is None}:
                    one.failed, one.best = f"a seed failed at its best learning rate, {one.best:g}", None
                    group.remove(one)
        return 1 if any(one.killed for one in self.progress) else 0

    def search(self, make: Make, say: Say) -> None:
        """Find the learning rate of every candidate that is not refused, all of them side by side.

        A race drops the methods that are behind after half a run.
        """
        rates, seeds, until = self.options.rates, self.options.seeds, self.options.until
        starts = [(one, one.candidate.centre, known_rates(one.candidate, until)) for one in self.alive]
        if self.options.search == FULL:
            found = self._ask({one: full(centre, rates, seeds, known) for one, centre, known in starts}, make)
        else:
            early = self._ask({one: rate_search.early(centre, rates, known) for one, centre, known in starts}, make)
            self._race({one: by_loss[0] for one, by_loss in early.items() if by_loss}, make)
            left = {one: by_loss[:FINALISTS] for one, by_loss in early.items() if by_loss and one.dropped is None}
            finals = self._ask({one: rate_search.final(rates) for one, rates in left.items()}, make)
            found = dict.fromkeys(early) | {one: by_score[0] for one, by_score in finals.items() if by_score}
        for one, best in found.items():
            one.best = best
            say(f"{one.name}: " + (one.refused or f"learning rate {best:g}"))

    def _ask(self, searches: Mapping[Entrant, Search | Asked], make: Make) -> dict:
        """Make the trials that searches ask for, and return what each ends with; with nothing it has failed."""
        trials = {one: next(search) for one, search in searches.items()}
        found = {}
        while trials:
            self.make_missing([(one, trial) for one, batch in trials.items() for trial in batch], make)
            for one, batch in list(trials.items()):
                runs = {trial: recorded(place) for trial, place in one.places(batch).items()}
                one.killed += [trial.rate for trial, record in runs.items() if was_killed(record)]
                try:
                    trials[one] = searches[one].send(
                        {trial: validation_of(runs[trial], trial.until) for trial in batch}
                    )
                    continue
                except StopIteration as end:
                    found[one] = end.value
                del trials[one]
                if not found[one]:
                    errors = [record["error"] for record in runs.values() if record and record.get("error")]
                    one.failed = errors[0] if errors else "no run of it finished"
        return found

    def _race(self, rates: Mapping[Entrant, float], make: Make) -> None:
        """Train the methods of each group for half a run at the best of their rates, and drop those that are behind.

        Three go on, those of the least loss on validation, and all that its rows do not tell from the third of them. A
        method whose run fails there has its other rate to try, and goes on.
        """
        groups = grouped(rates, lambda one: one.candidate.group).values()
        raced = [group for group in groups if self.options.is_race(len(group))]
        self.make_missing([(one, Trial(rates[one], 0, HALF)) for group in raced for one in group], make)
        for group in raced:
            places = {one: one.places([trial := Trial(rates[one], 0, HALF)])[trial] for one in group}
            validations = {one: validation_of(recorded(place), HALF) for one, place in places.items()}
            losses = {one: -found[1] for one, found in validations.items() if found is not None}
            by_loss = sorted(losses, key=losses.__getitem__)
            for place, one in enumerate(by_loss[SURVIVORS:], SURVIVORS + 1):
                third = by_loss[SURVIVORS - 1]
                # It has gone on before; a pack keeps no such rows.
                is_whole = validation_of(recorded(places[one])) is not None
                if not is_whole and verdict.tells_apart(places[one], places[third]):
                    one.dropped = Half(rates[one], losses[one], place, len(group), losses[third])

    def make_missing(self, runs: Sequence[EntrantRun], make: Make) -> None:
        """Make those of the runs that are not recorded, and keep the records of all; raises StoppedError."""
        places = {
            (one, trial): place for one, trials in by_candidate(runs) for trial, place in one.places(trials).items()
        }
        new = [
            (one, trial)
            for (one, trial), place in places.items()
            if (one.candidate.overwrite and place not in one.records)
            or validation_of(recorded(place), trial.until) is None
        ]
        code = make(new) if new else 0  # a record is enough: what is compared needs no weights
        for one, trial in new:
            one.made.add(trial[:2])
        if code > 2:
            raise StoppedError(code)
        if held := [str(places[run]) for run in new if is_locked(places[run] / directory.LOCK)]:
            raise PartialLoraError(f"{held[0]} is in use by another process: run this again when it has ended")
        for (one, _), place in places.items():
            record = recorded(place)
            if validation_of(record) is not None:
                one.records[place] = record

    def _side_by_side(self, runs: Sequence[EntrantRun], watch: Watch, note: Say) -> int:
        """Make runs side by side; return the exit code.

        `watch` takes the share of the work that is done. It never falls where more turns up, such as at an edge: every
        run takes its part of what was left before it, and one is always thought to come.
        """
        runs = [(one, trial) for one, trials in by_candidate(runs) for trial in trials]
        configs = [config for one, trials in by_candidate(runs) for config in one.configs(trials).values()]
        coming = {(one, *trial[:2]): trial.until for one, trial in runs}
        self.total = max(self.total, sum((self.reached | coming).values()))

        def advance(place: int, outcome: Outcome) -> None:
            one, trial = runs[place]
            left = 1 + self.total - sum(self.reached.values())
            made = trial.until - self.reached.get((one, *trial[:2]), 0.0)
            self.reached[(one, *trial[:2])] = trial.until
            self.share += (1 - self.share) * made / left
            watch({"stage": "runs", "done": 0, "total": 1, "share": self.share})
            if outcome.exit_code:
                note(f"{one.name}, learning rate {trial.rate:g}, seed {trial.seed}: {outcome.reason}")

        return pool.side_by_side(configs, self.options.jobs, is_made, advance)

    def next_look(self, group: Sequence[Entrant]) -> tuple[dict[Entrant, int], list[str]]:
        """Return the seeds that the members of a group need next, none at the end, and what is decided so far."""
        least = self.options.seeds or 1
        for seeds in (min(2, least), least) if self.options.hours else (least,):  # two in any case
            if any(one.of_seed(seed) is None for one in group for seed in range(seeds)):
                return dict.fromkeys(group, seeds), []
        found, sentences = verdict.judged(group, self.options)
        seeds = {one: found.next_seeds[one.name] for one in group if one.name in found.next_seeds}
        return seeds, sentences if found.by_method and seeds else []

    # --- What it comes to.

    @property
    def remarks(self) -> list[str]:
        """Lines on the methods that are left out, on candidates that could not be trained, and on rates not tried."""
        reasons = grouped((one for one in self.progress if one.refused), lambda one: one.refused)
        named = {reason: "; ".join(one.name for one in alike) for reason, alike in reasons.items()}
        untried = [
            f"{one.name}: learning rate {rate:g} was not tried, its run was killed; the same command tries it again"
            for one in self.progress
            for rate in one.killed
        ]
        refused = [f"{names}: {reason}" for reason, names in named.items()]
        return [*self.left_out, *refused, *untried, *self.unmeasured]

    def conclude(self, command: str) -> Conclusion | None:
        """Write table, page and the files to act with; None where nothing has been trained. command: for the page.

        A quick search has chosen among a part of its rates: the ranking has no others, whatever their runs came to.
        Where the reference could not be trained, the first method that could takes its place.
        """
        places = {
            place: record
            for one in self.progress
            for place, record in one.records.items()
            if self.options.search == FULL or record["config"]["trainer"]["learning_rate"] == one.best
        }
        if not places:
            return None
        out = verdict.results_of(places)
        trained = [one for one in self.progress if places.keys() & one.records.keys()]
        first = min(trained, key=lambda one: one.candidate.method != self.options.reference)
        reference = ranking.form_of(next(iter(first.records.values()))["config"])
        runs = [records.run_of(record, place) for place, record in places.items()]
        limit = limit_text(self.options.limit) if self.options.limit else None
        _, numbers = ranking.write(runs, out, "compare", reference, limit)
        verdicts, lines = [], []
        for title, group in self.groups.items():
            sets = {other.name for other in self.others.get(title, ())}
            at_best = {one.name: one.best_places().items() for one in group}
            known = {name: {seed: packs.forgetting(at, sets) for seed, at in runs} for name, runs in at_best.items()}
            forgotten = changes_of(known)
            found, sentences = verdict.judged(group, self.options, forgotten)
            best = next(one for one in group if one.name == found.leader)
            folder, named = out / take.FOLDER, ""
            if len(self.groups) > 1:
                folder, named = folder / title.replace(", ", "-"), f"{title}: "
            verdicts.append((sentences, take.write(best, folder)))
            outputs, metric, *_ = verdict.outputs_of(group, out)
            certificate.write(
                folder,
                outputs,
                found,
                metric=metric,
                margin=self.options.margin / 100,
                looks=verdict.looks_of(self.options),
                settings={one.name: one.of_seed(0)["config"] for one in group if one.of_seed(0)},
                verdict=sentences,
                forgotten=forgotten,
            )
            lines += [f"{named}{sentences[0]}", *sentences[1:]]
        dropped = verdict.dropped(self.progress)
        page = ranking.write_page(
            numbers, out, reference=reference, command=command, refused=self.remarks, verdict=lines, dropped=dropped
        )
        greyed = [Styled(tables.drawn("dropped after half a run", dropped), "dim")] if len(dropped) else []
        return Conclusion(Group(ranking.on_screen(numbers, reference), *greyed), verdicts, page)


def by_candidate(runs: Sequence[EntrantRun]) -> list[tuple[Entrant, list[Trial]]]:
    """Return the trials of each candidate, of one seed and one share each."""
    parts = grouped(runs, lambda run: (run[0], run[1].seed, run[1].until))
    return [(one, [trial for _, trial in part]) for (one, *_), part in parts.items()]


def by_sweeps(runs: Sequence[EntrantRun], sweep: Callable[[list[str]], int]) -> int:
    """Make runs by sweeps of `train`, whose launcher may be that of a cluster; return the exit code."""
    codes = [0]
    for one, trials in by_candidate(runs):
        codes.append(sweep(one.arguments(trials)))
        if codes[-1] > 2:
            break
    return max(codes)
