"""Tabulate runs of any kind: Markdown, JSON and pictures.

    python scripts/report.py RUN [RUN ...] --out FOLDER

A RUN is a folder of one of four kinds, or holds folders of runs. All are of one kind.

    a language model    run.json, or the output of fairseq-train and fairseq-eval-lm (docs/language_models.md)
    a classifier        result.json of examples/document_classification/table.py
    a translation       result.json of examples/translation/table.py, and speed.json. With --samples DATA, results.md
                        shows sentences of the first test set of DATA (prepare.py's) as each model translates them
    signals             result.json of examples/signals/table.py

The command writes FOLDER/results.md and results.json, and prints the table. Where matplotlib is installed, it draws
learning curves, confusion matrices, filters or BLEU.

    python scripts/report.py --circumstances RUN --config NAME

notes a run's machine, commit and name in RUN/circumstances.json; call it before training.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fairseq_rkm.experiments import classification_report, language_model_report, signal_report, translation_report
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.result_files import write_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    if args.circumstances:
        write_json(args.circumstances / "circumstances.json", circumstances(args.config))
        return
    results = read_results(args.runs)
    without = [str(run) for run in args.runs if results and not any(run.rglob("result.json"))]
    if without:
        raise SystemExit(f"report: no result.json in {', '.join(without)}, as in others: make a report of each kind")
    translations = [result for result in results if "bleu" in result]
    signals = [result for result in results if "folds" in result]
    if any(kind and len(kind) < len(results) for kind in (translations, signals)):
        raise SystemExit("report: these are of several kinds, as classifiers and translations: make a report of each")
    if args.samples and not translations:
        raise SystemExit("report: --samples is for translations, and there are none")
    if translations:
        translation_report.write(translations, args.out, (args.samples, args.runs[0]) if args.samples else None)
    elif signals:
        signal_report.write(signals, args.out)
    elif results:
        classification_report.write(results, args.out)
    else:
        language_model_report.write(args.runs, args.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder, or its run.json")
    parser.add_argument("--out", type=Path, help="where results.md, results.json and the pictures go")
    parser.add_argument("--samples", type=Path, metavar="DATA", help="show translations of its first test set")
    parser.add_argument("--circumstances", type=Path, metavar="RUN", help="note machine and commit there, before a run")
    parser.add_argument("--config", help="what the run is called in the table's last column")
    args = parser.parse_args(arguments)
    if not args.circumstances and not (args.runs and args.out):
        parser.error("give runs, and --out for the results")
    return args


def read_results(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read every ``result.json`` in and below folders; ``speed`` holds the ``speed.json`` beside it, or None.

    Raises:
        SystemExit: a file is damaged, or two are of one row and seed: a report would take them for several seeds.
    """
    results = []
    places: dict[tuple, Path] = {}
    for path in sorted({path for folder in folders for path in folder.rglob("result.json")}):
        speed = path.with_name("speed.json")
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not {"bleu", "confusion", "folds"} & set(result):
                raise ValueError("neither a classifier's nor a translation's")
            if "folds" in result:
                result["folder"] = str(path.parent)
            if "bleu" in result:
                result["speed"] = json.loads(speed.read_text(encoding="utf-8")) if speed.is_file() else None
        except (ValueError, TypeError) as error:
            raise SystemExit(f"report: {path.parent} has a damaged result or speed file: {error}") from error
        row = tuple(result.get(name) for name in ("dataset", "model", "ngram", "seed"))
        if places.setdefault(row, path.parent) != path.parent and "bleu" not in result:
            raise SystemExit(
                f"report: {places[row]} and {path.parent} are of one row and seed: make a report of each, or of "
                "runs that differ in their kernel a table by scripts/kernel_tables.py"
            )
        results.append(result)
    return results


if __name__ == "__main__":
    main()
