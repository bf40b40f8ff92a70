"""Commands that work on a run have its model and its method."""

import pytest
from tiny_runs import finished_run

from cakeflow.cli.command_line import run_command as main
from cakeflow.cli.editors import with_record
from cakeflow.data import builtin_facts
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import BatchBody, RunBody

from .test_edit import PAIRS


def said(run, kind):
    """What the ledger of a run says in entries of a kind."""
    return bodies(read_entries(run / "journal/ledger.jsonl"), kind)


def test_model_and_method_of_a_run_are_those_of_what_goes_on_from_it(method, workplace, capsys):
    main(["edit", *PAIRS, *method, "--run_dir", "runs/one"])
    main(["edit", "Ann Lee is from", "Peru", "--run_dir", "runs/two", "--from", "runs/one"])
    assert said(workplace / "runs/two", RunBody)[-1].method == said(workplace / "runs/one", RunBody)[-1].method != {}
    capsys.readouterr()
    assert [row["target"] for row in main(["undo", "runs/two", "Google"])] == ["Newton"]
    main(["edit", "Ann Lee is from", "Peru", "--run_dir", "runs/named", "--from", "runs/one", *method])
    main(["undo", "runs/named", "Google", *method])
    by_record, by_name = (said(workplace / "runs" / name, BatchBody) for name in ("two", "named"))
    assert [each.changes for each in by_record] == [each.changes for each in by_name]
    assert len(by_record) == 3


@pytest.mark.parametrize("words", [["undo", "run", "LeBron James"], ["edit", "Ann is from", "Peru", "--from", "run"]])
def test_a_run_that_does_not_say_its_method_wants_it_named(words, method, workplace, lm, capsys):
    finished_run(lm, workplace, builtin_facts()[:2])
    named = ["--model", str(workplace / "model")]
    with pytest.raises(SystemExit):
        main([*words, *named])
    assert "name it, --method NAME" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, *named, "--layers", "[1]"])
    assert "--layers belong to --method" in capsys.readouterr().err


def test_fit_without_the_run_to_go_on_from_or_with_numbers_for_its_method_is_told_so(workplace, capsys):
    for words, message in (
        (["--from", "nowhere"], "nowhere"),
        (["--from", "run", "--model_config", "smollm2-135m"], "--model_config belong to --method"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--data", "builtin", *words])
        assert message in capsys.readouterr().err


def test_only_fit_that_names_no_method_takes_that_of_a_run():
    for words in (
        ["fit", "--data", "x"],
        ["fit", "--from_run", "run", "--method", "cake"],
        ["fit", "--from_run=run", "--config", "all.yaml"],
        ["edit", "--from_run", "run"],
    ):
        assert with_record(words) == words
    assert with_record(["edit", "--from=run"]) == ["edit", "--from_run=run"]
