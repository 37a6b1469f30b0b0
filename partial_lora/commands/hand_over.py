"""export, merge and push: a finished run for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from partial_lora.commands.common import A_RUN, libraries, parser_for, parser_of_run, share, weight
from partial_lora.errors import require
from partial_lora.finished.export_forms import FORMS
from partial_lora.finished.run import finished_run
from partial_lora.launching import directory


def export(arguments: Sequence[str]) -> int:
    """Write a finished run's adapter for other programs; return the exit code: 1 where it does not pass its check."""
    parser = parser_of_run("export", "Write the adapter of a finished run for other programs.")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(FORMS),
        help="; ".join(f"{name}: {form.words}" for name, form in FORMS.items()),
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/export/FORMAT")
    parser.add_argument(
        "--check",
        action="store_true",
        help="prove that the files load and compute the run's logits (peft, merged, serve: in an interpreter without "
        "this package; gguf: that the tensors are the run's)",
    )
    parsed = parser.parse_args(list(arguments))
    run = finished_run(parsed.run)
    with libraries():
        from partial_lora.finished import export
        from partial_lora.report import run_card
    done = export.export(run, parsed.to, parsed.out, check=parsed.check, describe=run_card.write)
    written = "written again, as it was" if done.existed else "written"
    print(f"{done.folder}: {written} ({done.size:,} bytes)")
    if done.proof:
        print(f"checked: {done.proof}")
    return 0


def merge(arguments: Sequence[str]) -> int:
    """Write one adapter that combines those of several runs, print their overlaps, and return the exit code."""
    parser = parser_for(
        "merge",
        "Merge the adapters of several finished runs into one, by PEFT's add_weighted_adapter. All runs "
        "must have been trained on the same base model.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="[BASE] RUN_DIR",
        help=f"{A_RUN}; BASE may name the base model, to be sure: another one is refused",
    )
    parser.add_argument("--weights", nargs="+", type=weight, required=True, metavar="W", help="one number for each run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--how",
        choices=("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
        default="cat",
        help="cat (the default): exactly the weighted sum, with the sum of the ranks as its rank; svd: as close to it "
        "as the largest rank comes; the others combine the factors in place of their products",
    )
    parser.add_argument(
        "--density",
        type=share,
        default=0.5,
        metavar="P",
        help="ties, dare_… and magnitude_prune: the share of each factor's entries to keep, zeros included (default: "
        "0.5)",
    )
    parsed = parser.parse_args(list(arguments))
    from rich.console import Console
    from rich.table import Table

    is_base = len(parsed.runs) == len(parsed.weights) + 1 and not _is_run(parsed.runs[0])
    base = parsed.runs.pop(0) if is_base else None
    runs = [finished_run(each) for each in parsed.runs]
    for run in runs if base else ():
        known = (run.config.model.name, run.config.model.weights.partition("@")[0])
        require(
            str(base).partition("@")[0] in known,
            "BASE",
            base,
            f"{' or '.join(known)}, which {run.directory} was trained over",
        )
    with libraries():
        from partial_lora.finished import merge
    overlaps = merge.merge(runs, parsed.weights, parsed.out, way=parsed.how, density=parsed.density)
    table = Table("run", "and run", "rows", "columns", "entries of W", title="what both change, of the smaller one's")
    for each in overlaps:
        shares = (f"{share:.1%}" for share in (each.rows, each.columns, each.entries))
        table.add_row(str(each.first + 1), str(each.second + 1), *shares)
    Console().print(table)
    print(f"{parsed.out}: written")
    return 0


def _is_run(place: Path) -> bool:
    return (directory.find(place) / directory.RESULT).is_file()


def push(arguments: Sequence[str]) -> int:
    """Upload a finished run's adapter to the model hub, with a page on it; return the exit code."""
    parser = parser_of_run(
        "push",
        "Upload the adapter of a finished run to the model hub, with the settings that made it and a page "
        "with its scores and sizes. The token is the one of huggingface_hub (`hf auth login`, HF_TOKEN).",
    )
    parser.add_argument("repo", metavar="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--compact", action="store_true", help="upload the kept values alone, in place of an ordinary adapter"
    )
    parser.add_argument(
        "--license", metavar="NAME", help="a licence by the hub's name, such as apache-2.0 (default: none)"
    )
    parser.add_argument("--dry-run", action="store_true", help="write RUN_DIR/export/hub and upload nothing")
    parsed = parser.parse_args(list(arguments))
    from partial_lora.finished import push

    push.check(parsed.repo)
    run = finished_run(parsed.run)
    with libraries():
        from partial_lora.report import run_card
    folder = push.write(
        run, lambda built: run_card.card(run, parsed.repo, built, license=parsed.license), compact=parsed.compact
    )
    place = folder if parsed.dry_run else push.upload(folder, parsed.repo, private=parsed.private)
    print(f"{place}: written")
    return 0
