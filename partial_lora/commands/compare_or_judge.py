"""compare: searches, seeds where they decide, a verdict; or a verdict on scores that are there."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from partial_lora.commands.common import add_where, libraries, parser_for
from partial_lora.commands.train_or_calibrate import stage_command
from partial_lora.errors import PartialLoraError, require
from partial_lora.progress import Bars

if TYPE_CHECKING:
    from partial_lora.compare.judge_options import Judging


def compare(arguments: Sequence[str]) -> int:
    """Find out which method is best at equal size, or what finished scores decide; return the exit code."""
    parser = parser_for(
        "compare",
        "Find out which method is best on your task at one size or under one limit. Every method searches "
        "for its learning rate; of more than three, those that are behind after half a run go no further. The others "
        "are trained with two seeds. From there seeds go to what is undecided, until the best is known or the time is "
        "over. It ends with a verdict in words, a table, a page, and the files to act with. "
        "Finished runs are not run again. With FILE or FOLDER nothing is trained: it judges the scores that are there, "
        "of finished runs, tables, PEFT's method_comparison or lm-eval; then the exit code is 1 while not all is "
        "decided.",
        epilog="For example: partial-lora compare task=text_table task.data_files=mails.csv model=minilm_l6 "
        "methods=[lora,partial,entries] margin=2 hours=1; or: partial-lora compare scores.csv margin=2",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="FILE|FOLDER|KEY=VALUE",
        help="methods=[…] or auto; budgets=[0.13]: shares of dense LoRA's parameters, or numbers of parameters; or "
        "one limit.{served,kept,memory,seconds}: bytes of the file that is served, bytes kept for the backward pass, "
        "peak memory, seconds a step; serve=true: what servers load alone; margin=1: points within which a method is "
        "as good; hours=N: that it may take; jobs=N: runs side by side (as many as cores and memory allow); "
        "search=quick, or full; seeds=N: of every method, in place of two and more where they decide; "
        "rates=3: learning rates of a search; reference=NAME: the method from which the table's differences are "
        "(lora, else the first); forgets=FILE or TASK, or several in brackets: of a language model, its loss on other "
        "rows before and after training, too; results_dir=results/compare; all other keys are those of train. "
        "experiment=race stage=methods alone is that stage of the study that its file lists. Beside FILE or FOLDER: "
        "margin=1; reference=NAME: judge by it in place of the best; rows=N: test rows behind each score; metric=NAME; "
        "lower=true: less is better; results_dir=verdict",
    )
    add_where(parser)
    parser.add_argument("--json", action="store_true", help="of finished scores: print one JSON object")
    parser.add_argument("--verify", action="store_true", help="derive the verdict of take/verdict.json again")
    parsed = parser.parse_intermixed_args(list(arguments))
    from partial_lora.compare.judge_options import Judging
    from partial_lora.compare.options import check, of_one, of_study, read

    if parsed.verify:
        return _verify(parsed.settings)
    if judging := Judging.of(parsed.settings):
        return _judge(judging, parsed.where, shlex.join(["partial-lora", "compare", *arguments]), parsed.json)
    if parsed.where or parsed.json:
        raise PartialLoraError("--where, --json: expected a file or folder of finished scores beside them")
    parts = [read(each) for each in of_study(parsed.settings)]
    options = of_one([chosen for chosen, _ in parts])
    for part in parts:
        check(*part)
    with libraries():
        from partial_lora.compare.comparison import Comparison
    from rich.console import Console

    say = functools.partial(print, flush=True)
    comparison = Comparison.of(options, parts)
    comparison.measure(say)
    with Bars(Console()) as bars:
        code = comparison.run(say, watch=bars.update, note=bars.note, sweep=functools.partial(stage_command, "train"))
    if code > 2:
        print("the same command goes on from here", file=sys.stderr)
        return code
    for line in comparison.remarks:
        print(f"partial-lora: {line}", file=sys.stderr)
    conclusion = comparison.conclude(shlex.join(["partial-lora", "compare", *arguments]))
    if conclusion is None:
        return 1
    Console().print(conclusion.table)
    for sentences, take in conclusion.verdicts:
        print(*sentences, take, sep="\n")
    print(conclusion.page)
    return code


def _judge(judging: Judging, where: Sequence[str], command: str, as_json: bool) -> int:
    """Judge finished scores; return 0 where all is decided, else 1."""
    with libraries():
        from partial_lora.compare import judge, scores
    found = scores.read(judging.places, where=where, metric=judging.metric, lower=judging.lower, rows=judging.rows)
    judgements = judge.every(found, judging.margin, judging.reference)
    files = judge.write(judgements, found, Path(judging.results_dir), command=command)
    if as_json:
        print(json.dumps(judge.as_json(judgements, found), allow_nan=False))
    else:
        from rich.console import Console

        for line in found.left_out:
            print(f"partial-lora: {line}", file=sys.stderr)
        for judgement in judgements:
            Console().print(judge.on_screen(judgement))
            print(*judge.sentences(judgement), "", sep="\n")
        print(*files, sep="\n")
    return int(not all(judgement.is_decided for judgement in judgements))


def _verify(places: Sequence[str]) -> int:
    """Derive the verdict of a certificate again; return 0 where it holds, else 1."""
    require(len(places) == 1, "--verify", " ".join(places), "one take/verdict.json of a comparison")
    from partial_lora.report import certificate

    wrong = certificate.found_wrong(Path(places[0]))
    for line in wrong:
        print(f"partial-lora: {places[0]}: {line}", file=sys.stderr)
    if not wrong:
        print(f"{places[0]}: the scores beside it say the same")
    return int(bool(wrong))
