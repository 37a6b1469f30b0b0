"""One comparison, from its settings to its verdict: sizes, searches, seeds where they decide, and files to act with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Group

from partial_lora.files import grouped
from partial_lora.launching import compare
from partial_lora.launching.compare import Entry
from partial_lora.launching.launch import Outcome
from partial_lora.launching.search import Trial
from partial_lora.report import certificate, ranking, records, verdict
from partial_lora.report.sequential import LOOKS
from partial_lora.settings.comparison import FULL, QUICK, Comparison

Say = Callable[[str], None]
Watch = Callable[[Mapping], None]  # as bars.Bars.update


@dataclass
class Ruling:
    """Table and page of a comparison, and of each group the verdict in sentences with the folder of its files."""

    table: Group
    verdicts: list[tuple[list[str], Path]]
    page: Path


@dataclass
class Contest:
    """Entries that are compared under the same settings.

    left_out: a line on each method that is not among them. reached: the share of its steps that each run has made, by
    entry, learning rate and seed.
    """

    comparison: Comparison
    entries: list[Entry]
    left_out: list[str]
    reached: dict[tuple[Entry, float, int], float] = field(default_factory=dict)

    @classmethod
    def of(cls, comparison: Comparison, parts: Sequence[tuple[Comparison, Sequence[str]]]) -> Contest:
        """Return comparisons that are made as one. parts: of each its methods and budgets, and the settings of `train`.

        Raises PartialLoraError for what `train` would refuse, and for what one verdict cannot tell apart.
        """
        prepared = [compare.prepared(*part) for part in parts]
        entries = [entry for entries, _ in prepared for entry in entries]
        compare.refuse_twins(entries)
        return cls(comparison, entries, [line for _, lines in prepared for line in lines])

    def measure(self, say: Say) -> None:
        """Say what is left out and what every entry takes, timed for a quick search; share the cores among the runs."""
        for line in self.left_out:
            say(line)
        for entry in self.entries:
            if self.comparison.search == QUICK:
                compare.time_entry(entry)
            step = f", {entry.step_seconds:.3f} s a step of {entry.steps:,}" if entry.step_seconds else ""
            say(f"{entry.name}: " + (entry.refused or f"{entry.parameters:,} parameters{step}"))
        self.comparison.jobs = self.comparison.jobs or compare.jobs_at_once(self.entries)
        compare.share_threads(self.comparison.jobs)  # memory may allow fewer at once than cores
        if any(entry.seconds for entry in self.entries if entry.refused is None):
            for line in verdict.prospects(self.entries, self.comparison):
                say(line)

    def run(self, say: Say, *, watch: Watch, note: Say, sweep: Callable[[list[str]], int]) -> int:
        """Make the runs that decide; return the exit code, above 2 if interrupted: made again it goes on from there.

        say: takes what is found and decided; note: why a run failed; watch: how much is done. sweep: `train -m`, which
        makes the runs where settings name one of Hydra's launchers.
        """
        settings = (override for entry in self.entries for override in entry.overrides)
        if any(override.startswith("hydra/launcher=") for override in settings):
            make = partial(compare.by_sweeps, sweep=sweep)
        else:
            alive = sum(entry.refused is None for entry in self.entries)
            least = alive * compare.runs_of_each(self.comparison, self.comparison.seeds or 2)
            make = partial(self._side_by_side, least=least, watch=watch, note=note)
        return self.decide(make, say)

    def decide(self, make: compare.Make, say: Say) -> int:
        """Search for every learning rate, and train with the seeds that looks ask for; return the exit code.

        Runs that are finished are not made again. After an interruption no further run is made. The code is 1 where a
        run was killed, so that its learning rate was not tried.
        """
        comparison, began = self.comparison, time.monotonic()
        code = compare.search_rates(self.entries, comparison, make, say)
        if code > 2:
            return code
        for group in self.groups.values():
            while group and (seeds := self.asks(group, say)):
                runs = [(entry, Trial(entry.best, seed)) for entry in group for seed in range(seeds.get(entry, 0))]
                new = [(entry, trial) for entry, trial in runs if entry.of_seed(trial.seed) is None]
                left = sum(entry.seconds for entry, _ in new) / comparison.jobs
                needed = time.monotonic() - began + left
                if comparison.hours and max(seeds.values()) > 2 and needed > 3600 * comparison.hours:
                    say(f"hours={comparison.hours:g} are over: {len(new)} runs more would take {compare.in_time(left)}")
                    break
                code = compare.make_missing(runs, make)
                if code > 2:
                    return code
                for entry in {entry for entry, trial in new if entry.of_seed(trial.seed) is None}:
                    entry.refused, entry.best = f"a seed failed at its best learning rate, {entry.best:g}", None
                    group.remove(entry)
        return 1 if any(entry.killed for entry in self.entries) else 0

    @property
    def groups(self) -> dict[str, list[Entry]]:
        """The entries with a learning rate, by what they have in common."""
        return grouped((entry for entry in self.entries if entry.best is not None), lambda entry: entry.group)

    def _side_by_side(self, runs: Sequence[tuple[Entry, Trial]], least: float, watch: Watch, note: Say) -> int:
        """Make runs side by side; return the exit code. least: of how many runs `watch` takes the share, or of more."""
        coming = {(entry, *trial[:2]): trial.until for entry, trial in runs}
        total = max(least, sum((self.reached | coming).values()))

        def ended(entry: Entry, trial: Trial, outcome: Outcome) -> None:
            self.reached[(entry, *trial[:2])] = trial.until
            watch({"stage": "runs", "done": 0, "total": 1, "share": sum(self.reached.values()) / total})
            if outcome.exit_code:
                note(f"{entry.name}, learning rate {trial.rate:g}, seed {trial.seed}: {outcome.reason}")

        return compare.side_by_side(runs, self.comparison.jobs, ended)

    def asks(self, group: Sequence[Entry], say: Say) -> dict[Entry, int]:
        """Return the seeds that the entries of a group need next, and say what is decided so far."""
        least = self.comparison.seeds or 1
        for seeds in (min(2, least), least) if self.comparison.hours else (least,):  # two in any case
            if any(entry.of_seed(seed) is None for entry in group for seed in range(seeds)):
                return dict.fromkeys(group, seeds)
        found, sentences = verdict.judged(group, self.comparison)
        if found.standings and found.asks:
            for sentence in sentences:
                say(sentence)
        return {entry: found.asks[entry.name] for entry in group if entry.name in found.asks}

    @property
    def refused(self) -> list[str]:
        """Lines on the methods that are left out, on entries that could not be trained, and on rates not tried."""
        reasons = grouped((entry for entry in self.entries if entry.refused), lambda entry: entry.refused)
        named = {reason: "; ".join(entry.name for entry in alike) for reason, alike in reasons.items()}
        untried = [
            f"{entry.name}: learning rate {rate:g} was not tried, its run was killed; the same command tries it again"
            for entry in self.entries
            for rate in entry.killed
        ]
        return [*self.left_out, *(f"{names}: {reason}" for reason, names in named.items()), *untried]

    def rule(self, command: str) -> Ruling | None:
        """Write table, page and the files to act with; None where nothing has been trained. command: for the page.

        A quick search has chosen among a part of its rates: the ranking has no others, whatever their runs came to.
        Where the reference could not be trained, the first method that could takes its place.
        """
        places = {
            place: record
            for entry in self.entries
            for place, record in entry.done.items()
            if self.comparison.search == FULL or record["config"]["trainer"]["learning_rate"] == entry.best
        }
        if not places:
            return None
        out = verdict.results_of(places)
        trained = [entry for entry in self.entries if places.keys() & entry.done.keys()]
        first = min(trained, key=lambda entry: entry.method != self.comparison.reference)
        reference = ranking.form_of(next(iter(first.done.values()))["config"])
        runs = [records.run_of(record, place) for place, record in places.items()]
        limit = compare.in_words(self.comparison.limit) if self.comparison.limit else None
        _, numbers = ranking.write(runs, out, "compare", reference, limit)
        verdicts, lines = [], []
        for title, group in self.groups.items():
            found, sentences = verdict.judged(group, self.comparison)
            best = next(entry for entry in group if entry.name == found.leader)
            take, named = out / verdict.TAKE, ""
            if len(self.groups) > 1:
                take, named = take / title.replace(", ", "-"), f"{title}: "
            verdicts.append((sentences, verdict.write_take(best, take)))
            outputs, metric, *_ = verdict.outputs_of(group, out)
            certificate.write(
                take,
                outputs,
                found,
                metric=metric,
                margin=self.comparison.margin / 100,
                looks=LOOKS if self.comparison.seeds is None else (self.comparison.seeds,),
                settings={entry.name: entry.of_seed(0)["config"] for entry in group if entry.of_seed(0)},
                verdict=sentences,
            )
            lines += [f"{named}{sentences[0]}", *sentences[1:]]
        page = ranking.write_page(
            numbers, out, reference=reference, command=command, refused=self.refused, verdict=lines
        )
        return Ruling(ranking.on_screen(numbers, reference), verdicts, page)
