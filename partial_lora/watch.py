"""The bars that show how far a run is, drawn by the parent from the worker's events."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """One bar a stage; plain lines at the start and end of a stage where the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._ended: set[str] = set()
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]:>14}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
        )

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, event: dict) -> None:
        """Take in one event of the worker: how far a stage is."""
        stage, done, total = event["stage"], event["done"], event["total"]
        if self._console.is_terminal:
            self._draw(stage, done, total, _detail(event))
        else:
            self._say(stage, done, total)

    def _draw(self, stage: str, done: int, total: int, detail: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, count="", detail="")
        count = f"{done // 1_000_000}/{total // 1_000_000} MB" if stage == "download" else f"{done}/{total}"
        self._progress.update(self._tasks[stage], completed=done, total=total, count=count, detail=detail)

    def _say(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = TaskID(len(self._tasks))
            self._console.print(f"{stage} …", highlight=False)
        if done >= total and stage not in self._ended:
            self._ended.add(stage)
            self._console.print(f"{stage} done", highlight=False)


def _detail(event: dict) -> str:
    """What a stage tells beside its count: the module and its sparsity so far, or the loss and the speed."""
    if "module" in event:
        return f"{event['module']} {event.get('axis', '')} {event.get('sparsity', 0):.2f}"
    told = [f"loss {event['loss']:.3f}"] if "loss" in event else []
    if "tokens_per_second" in event:
        told.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(told)
